"""What is no head, drawn anew by every seed: knees, bellies, phantoms and hearts, for `benchmarks/verdicts.py`.

Each function takes a generator and a size and gives magnitudes (size, size), a heart its complex image. They know
anatomy from textbooks only: soft contours, three contrasts, texture and receive bias, no vessels or fibres.
"""

from __future__ import annotations

import numpy as np

from companion.data import heart
from companion.data.heads import bias_field, smooth_noise, texture

FINE = 4  # points along a pixel, over which edges are averaged


class Paper:
    """A square, -1 to 1 along both axes, that shapes are painted on; smooth displacements make them organic."""

    def __init__(self, rng: np.random.Generator, size: int, wobble: float = 0.0):
        n = size * FINE
        line = (np.arange(n) + 0.5) * 2 / n - 1
        waves = wobble * smooth_noise(n, rng, 7, 2).numpy()
        self.y, self.x = line[:, None] + waves[0], line + waves[1]
        self.image = np.zeros((n, n), np.float32)

    def ellipse(self, y, x, ry, rx, value, angle=0.0, within=None) -> np.ndarray:
        """Paint an ellipse, and return where it is."""
        a, b = self.y - y, self.x - x
        c, s = np.cos(angle), np.sin(angle)
        return self.fill(((a * c - b * s) / ry) ** 2 + ((a * s + b * c) / rx) ** 2 <= 1, value, within)

    def box(self, y, x, ry, rx, value, angle=0.0, within=None) -> np.ndarray:
        a, b = self.y - y, self.x - x
        c, s = np.cos(angle), np.sin(angle)
        return self.fill((abs(a * c - b * s) <= ry) & (abs(a * s + b * c) <= rx), value, within)

    def fill(self, where, value, within=None) -> np.ndarray:
        where = where if within is None else where & within
        self.image[where] = value
        return where

    def done(self, rng: np.random.Generator, grain: bool) -> np.ndarray:
        n = len(self.image) // FINE
        pixels = self.image.reshape(n, FINE, n, FINE).mean((1, 3)) * bias_field(n, rng)
        return pixels * texture(n, rng) if grain else pixels


def tissues(rng: np.random.Generator) -> dict[str, float]:
    """Signals of fat, marrow, muscle, cartilage, fluid and an organ: T1, proton density without fat, or T2."""
    kinds = ((1.0, 0.9, 0.35, 0.45, 0.2, 0.5), (0.25, 0.2, 0.45, 0.8, 1.0, 0.6), (0.7, 0.6, 0.2, 0.35, 1.0, 0.4))
    values = np.array(kinds[int(rng.integers(3))]) * np.exp(rng.normal(0, 0.12, 6))
    return dict(zip(("fat", "marrow", "muscle", "cartilage", "fluid", "organ"), values, strict=True))


def knee(rng: np.random.Generator, size: int) -> np.ndarray:
    """A knee: sagittal, coronal or axial. Bones have dark rims and cartilage where they meet."""
    t, p = tissues(rng), Paper(rng, size, rng.uniform(0.015, 0.03))
    scale, turn = rng.uniform(0.8, 1.1), rng.normal(0, 0.12)

    def bone(shape, y, x, ry, rx, rim: str = "", angle=0.0):
        sizes = (1.12, "cartilage"), (1.0, ""), (0.93, "marrow")
        for factor, name in sizes if rim else sizes[1:]:
            shape(y * scale, x * scale, ry * factor * scale, rx * factor * scale, t.get(name, 0.03), angle + turn)

    kind = rng.random()
    if kind < 0.25:  # axial: condyles side by side, the patella before them
        p.ellipse(0, 0, 0.85 * scale, 0.8 * scale, t["fat"])
        p.ellipse(0.08, 0, 0.68 * scale, 0.66 * scale, t["muscle"], turn)
        for side in (-1, 1):
            bone(p.ellipse, 0.05, 0.27 * side, 0.4, 0.3, "c", 0.25 * side)
        bone(p.box, -0.1, 0, 0.2, 0.25)
        bone(p.ellipse, -0.58, rng.normal(0, 0.05), 0.11, 0.3, "c")
        p.ellipse(0.55 * scale, 0.05, 0.07, 0.07, rng.choice([0.03, t["fluid"]]))
        return p.done(rng, True)
    p.box(0, 0, 1.2, rng.uniform(0.7, 0.8) * scale, t["fat"], turn)
    p.box(0, 0.05, 1.2, 0.58 * scale, t["muscle"], turn)
    for _ in range(5):  # fat between muscles
        p.ellipse(rng.uniform(-1, 1), rng.uniform(0.2, 0.5), 0.35, 0.03, t["fat"], rng.normal(0, 0.2))
    if kind < 0.7:  # sagittal
        p.ellipse(0.12 * scale, -0.3 * scale, 0.3, 0.2, t["fat"])  # Hoffa's pad
        bone(p.box, -0.75, -0.02, 0.5, 0.2)
        bone(p.ellipse, -0.13, 0.0, 0.33, 0.4, "c")
        bone(p.box, 0.4, 0.02, 0.16, 0.4, "c")
        bone(p.box, 0.85, -0.02, 0.5, 0.2)
        bone(p.ellipse, -0.25, -0.53, 0.22, 0.1, "c")
        p.box(0.2, -0.56 * scale, 0.3, 0.025, 0.05, turn - 0.15)  # ligament
    else:  # coronal
        bone(p.box, -0.75, 0, 0.5, 0.24)
        for side in (-1, 1):
            bone(p.ellipse, -0.18, 0.25 * side, 0.3, 0.28, "c")
        bone(p.box, 0.35, 0, 0.18, 0.5, "c")
        bone(p.box, 0.8, 0, 0.5, 0.22)
        for side in (-1, 1):
            p.box(0.13 * scale, 0.36 * side * scale, 0.03, 0.1, 0.06, turn)  # menisci
    return p.done(rng, True)


def belly(rng: np.random.Generator, size: int) -> np.ndarray:
    """An axial slice of an abdomen: fat, muscle, liver, spleen, kidneys, spine, vessels and bowel."""
    t, p = tissues(rng), Paper(rng, size, rng.uniform(0.02, 0.04))
    rim = rng.uniform(0.04, 0.15)
    p.ellipse(0, 0, 0.65, 0.92, t["fat"])
    p.ellipse(0, 0, 0.65 - rim, 0.92 - rim, t["muscle"])
    inside = p.ellipse(-0.03, 0, 0.55 - rim, 0.82 - rim, t["fat"])
    for _ in range(25):
        y, x = rng.uniform(-0.5, 0.2), rng.uniform(-0.4, 0.7)
        p.ellipse(y, x, *rng.uniform(0.04, 0.12, 2), rng.uniform(0.1, 0.9), rng.uniform(0, 3), inside)
    p.ellipse(-0.1, -0.45, 0.38, 0.33, t["organ"], within=inside)
    p.ellipse(0.05, 0.6, 0.2, 0.12, t["organ"] * rng.uniform(0.7, 1.3), 0.4, inside)
    for side in (-1, 1):
        p.ellipse(0.22, 0.33 * side, 0.13, 0.09, t["organ"] * 1.3, 0.5 * side)
        p.ellipse(0.23, 0.3 * side, 0.06, 0.04, t["fluid"], 0.5 * side)
        p.ellipse(0.42, 0.2 * side, 0.12, 0.15, t["muscle"])
    p.ellipse(0.28, 0, 0.12, 0.14, t["marrow"])
    p.ellipse(0.43, 0, 0.05, 0.06, t["fluid"])
    p.ellipse(0.1, 0.04, 0.05, 0.05, rng.choice([0.05, t["fluid"]]))
    return p.done(rng, True)


def phantom(rng: np.random.Generator, size: int) -> np.ndarray:
    """A quality phantom: a disc or a bottle with rods, bars, a grid, wedges or tubes; or many ellipses in one."""
    p = Paper(rng, size)
    kind, r = int(rng.integers(6)), rng.uniform(0.7, 0.92)
    whole = (p.ellipse if rng.random() < 0.75 else p.box)(0, 0, r, r * rng.uniform(0.8, 1), 1.0)
    if kind == 0:  # rods of falling size, bars, a flat disc
        for i in range(5):
            for j, k in np.ndindex(4, 4):
                d = 0.07 / (1 + 0.5 * i)
                p.ellipse(-0.45 + d * 2 * j, -0.5 + 0.25 * i + d * 2 * k - d, d / 2, d / 2, 0.05, within=whole)
        for i in range(8):
            p.box(0.25, -0.5 + 0.09 * i, 0.12, 0.005 * (i + 1), 0.0, within=whole)
        p.ellipse(0.25, 0.45, 0.15, 0.15, rng.uniform(0.2, 0.8), within=whole)
    elif kind == 1:  # a grid
        step = rng.uniform(0.1, 0.25)
        for at in np.arange(-1, 1, step):
            p.box(at, 0, 0.015, 1, 0.05, within=whole)
            p.box(0, at, 1, 0.015, 0.05, within=whole)
    elif kind == 2:  # tubes
        for i, angle in enumerate(np.linspace(0, 2 * np.pi, int(rng.integers(6, 15)))):
            at = (0.55 if i % 2 else 0.3) * r * np.array([np.sin(angle), np.cos(angle)])
            p.ellipse(*at, 0.08, 0.08, rng.uniform(0, 1.2), within=whole)
    elif kind == 3:  # a bottle with an air bubble, a tube and a label
        p.box(-r, 0, rng.uniform(0.05, 0.3), 1, 0.0, within=whole)
        p.box(*rng.uniform(-0.3, 0.3, 2), rng.uniform(0.2, 0.5), 0.04, 0.1, rng.uniform(0, 3), whole)
    elif kind == 4:  # wedges, inserts and a block
        p.box(0, 0, 0.04, 1, 0.0, rng.uniform(-0.1, 0.1), whole)
        p.box(-0.35, 0.1, 0.15, 0.3, 0.05, within=whole)
        for i in range(3):
            p.ellipse(-0.35, -0.1 + 0.2 * i, 0.05, 0.05, 0.9, within=whole)
        p.ellipse(0.4, 0.2, 0.12, 0.12, 0.1, within=whole)
        p.ellipse(0.4, 0.2, 0.07, 0.07, 1.0, within=whole)
    else:  # Shepp and Logan's, with other ellipses each time
        p.ellipse(0, 0, 0.92 * r, 0.69 * r, 0.25, within=whole)
        p.image[~whole] = 0
        for side in (-1, 1):
            p.ellipse(0, 0.22 * side, rng.uniform(0.2, 0.4), rng.uniform(0.08, 0.16), 0.0, 0.3 * side, whole)
        for _ in range(int(rng.integers(4, 9))):
            y, x = rng.uniform(-0.5, 0.5), rng.uniform(-0.3, 0.3)
            p.ellipse(y, x, *rng.uniform(0.02, 0.2, 2), rng.uniform(0.1, 0.6), rng.uniform(0, 3), whole)
    return p.done(rng, False)


def beating(rng: np.random.Generator, size: int) -> np.ndarray:
    """A virtual heart with the chest around it, at some moment."""
    cine = heart.render(heart.cohort("validation", 40)[int(rng.integers(40))], 4, (size, size))
    return cine.image[int(rng.integers(4))].numpy()
