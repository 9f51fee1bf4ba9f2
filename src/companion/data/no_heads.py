"""What is no head, drawn anew by every seed: parts of bodies, phantoms, fruits, patterns, leaves, collages.

To learn what a head looks like takes things that do not (`companion.papers.organ`). What matters is variety, and that a
texture alone never tells: surfaces may be filled with that of any image given, a head's or a photograph's.

    image = drawn(np.random.default_rng(0), size=128)             # (128, 128), signed as `heads.head_image`
    image = drawn(rng, 128, others=[head_slice, photograph])      # whose textures fill some of the shapes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.ndimage import gaussian_filter, zoom

from companion.data.bodies import BODIES, FINE, Canvas, Tissues, draw_tissues
from companion.data.heads import MARGIN, bias_field, dead_leaves, resolution, texture


def fruit(c: Canvas, t: Tissues, rng: np.random.Generator) -> None:
    """A fruit, a root or an egg: peel, segments or rings around a core, seeds."""
    values, r = rng.uniform(0.1, 1, 6), rng.uniform(0.5, 0.95)
    peel = rng.uniform(0.02, 0.2)
    c.paint(c.blob(0, 0, r, r * rng.uniform(0.7, 1), waves=0.05), float(values[0]))
    inner = c.paint(c.blob(0, 0, r * (1 - peel), r * (1 - peel) * 0.95, waves=0.04), float(values[1]))
    count = int(rng.integers(4, 14))
    if rng.random() < 0.6:
        for i in range(count):
            a = 2 * math.pi * (i + rng.normal(0, 0.08)) / count
            c.paint(
                c.blob(0.5 * r * math.sin(a), 0.5 * r * math.cos(a), 0.8 * r / count, 0.36 * r, a),
                float(values[2]),
                inner,
            )
            c.paint(c.blob(0.25 * r * math.sin(a), 0.25 * r * math.cos(a), 0.03, 0.06, a), float(values[3]), inner)
    else:
        for k in range(count):
            c.paint(
                c.blob(0, 0, r * (1 - k / count) * 0.9, r * (1 - k / count) * 0.85, waves=0.03),
                float(values[2 + k % 4]),
                inner,
            )
    c.paint(c.blob(0, 0, *rng.uniform(0.02, 0.2, 2)), float(values[5]))


def phantom(c: Canvas, t: Tissues, rng: np.random.Generator) -> None:
    """A vessel of water with inserts in rows, rings or at random; line pairs, wedges, a bubble; or several vessels."""
    if rng.random() < 0.25:  # several bottles
        for _ in range(int(rng.integers(2, 12))):
            r, place = rng.uniform(0.08, 0.35), rng.uniform(-0.8, 0.8, 2)
            shape = (
                c.blob(*place, r, r, waves=0)
                if rng.random() < 0.6
                else c.box(*place, r, r * rng.uniform(0.4, 1.5), rng.uniform(0, 3), power=8)
            )
            c.paint(shape, rng.uniform(0.2, 1))
        return
    r, level = rng.uniform(0.6, 0.95), rng.uniform(0.3, 1)
    shape = (
        c.blob(0, 0, r, r * rng.uniform(0.75, 1), waves=0)
        if rng.random() < 0.6
        else c.box(0, 0, r, r * rng.uniform(0.5, 1), power=10)
    )
    inside = c.paint(shape, level)
    for _ in range(int(rng.integers(1, 4))):
        kind, value = int(rng.integers(7)), float(rng.choice([0.02, rng.uniform(0, 1.2)]))
        y, x = rng.uniform(-0.4, 0.4, 2)
        step, hole = rng.uniform(0.08, 0.35), rng.uniform(0.2, 0.45)
        if kind == 0:  # rods
            for i, j in np.ndindex(*rng.integers(2, 7, 2)):
                size = step * hole * (0.8 ** (i if rng.random() < 0.5 else 0))
                c.paint(c.blob(y + (i - 1) * step, x + (j - 1) * step, size, size, waves=0), value, inside)
        elif kind == 1:  # line pairs
            wave = np.sin((c.x if rng.random() < 0.5 else c.y) * 2 * math.pi / step * 2) > 0
            c.paint(wave, value, inside & c.box(y, x, *rng.uniform(0.1, 0.5, 2), power=20))
        elif kind == 2:  # a ring of tubes
            for a in np.linspace(0, 2 * math.pi, int(rng.integers(4, 16)))[:-1]:
                c.paint(
                    c.blob(0.6 * r * math.sin(a), 0.6 * r * math.cos(a), step * 0.4, step * 0.4, waves=0),
                    rng.uniform(0, 1.3),
                    inside,
                )
        elif kind == 3:  # blocks and wedges
            c.paint(c.box(y, x, *rng.uniform(0.03, 0.4, 2), rng.uniform(0, 3), power=20), value, inside)
        elif kind == 4:  # a bubble, a level
            c.paint(c.y < rng.uniform(-0.8, -0.3), 0.0, inside)
        elif kind == 5:  # grid
            lines = (abs((c.y / step) % 1 - 0.5) < hole * 0.3) | (abs((c.x / step) % 1 - 0.5) < hole * 0.3)
            c.paint(lines, value, inside)
        else:  # ellipses, few or many
            for _ in range(int(rng.integers(2, 14))):
                c.paint(
                    c.blob(*rng.uniform(-0.6, 0.6, 2), *rng.uniform(0.03, 0.4, 2), rng.uniform(0, 3), waves=0),
                    rng.uniform(0, 1),
                    inside,
                )
    if rng.random() < 0.25:  # a bright rim, as of a shell
        c.paint(shape & ~c.blob(0, 0, r * 0.93, r * 0.9, waves=0), rng.uniform(0.5, 1.3))


def pattern(c: Canvas, t: Tissues, rng: np.random.Generator) -> None:
    """No object at all: stripes, checks, clouds, gradients, or next to nothing."""
    kind = int(rng.integers(5))
    n, step = c.n, rng.uniform(0.06, 0.5)
    if kind == 0:
        c.image[:] = 0.5 + 0.5 * np.sin(2 * math.pi * c.x / step)
    elif kind == 1:
        c.image[:] = (np.sin(2 * math.pi * c.x / step) * np.sin(2 * math.pi * c.y / step)) > 0
    elif kind == 2:
        c.image[:] = gaussian_filter(rng.normal(size=(n, n)), n * 10 ** rng.uniform(-2.3, -0.9))
        c.image -= np.quantile(c.image, rng.uniform(0, 0.7))
        c.image = (c.image / np.quantile(c.image, 0.99)).clip(0, 2)
    elif kind == 3:
        c.image[:] = (0.5 + c.x * rng.normal(0, 0.4) + c.y * rng.normal(0, 0.4)).clip(0, 1)
    else:
        c.image[:] = 0.02 * abs(rng.normal(size=(n, n)))
        c.paint(c.blob(*rng.uniform(-0.8, 0.8, 2), *rng.uniform(0.02, 0.2, 2)), 1.0)


THINGS = (fruit, phantom, phantom, phantom, pattern)
Other = Callable[[np.random.Generator, int], np.ndarray]  # (rng, size) -> an image (size, size)


def drawn(rng: np.random.Generator, size: int = 128, others: Sequence[Other] = ()) -> np.ndarray:
    """Return an image (size, size) float32 of something that is no head; 1 is bright, negative where it rings.

    others: what lends its texture to some of the shapes, and its parts to collages; may be heads.
    """
    kind = rng.random()
    if kind < 0.08:
        return dead_leaves(rng, size)
    if others and kind < 0.2:
        return collage(rng, size, others)
    grain = None
    if others and rng.random() < 0.4:
        lent = others[int(rng.integers(len(others)))](rng, size)
        lent = np.abs(lent - gaussian_filter(lent, size / 12))  # detail without its place
        grain = np.asarray(zoom(lent, (size + 2 * MARGIN) * FINE / size, order=1)) / max(
            float(np.quantile(lent, 0.95)), 1e-3
        )
    canvas = Canvas(rng, size, grain=grain)
    among = BODIES if rng.random() < 0.68 else THINGS
    among[int(rng.integers(len(among)))](canvas, draw_tissues(rng), rng)
    image = canvas.image
    if rng.random() < 0.3:
        image = gaussian_filter(image, rng.uniform(0.3, 1.5) * FINE)
    n = len(image)
    grainy = texture(n, rng) if rng.random() < 0.7 else 1.0
    return resolution(image * grainy * bias_field(n, rng), rng, size, FINE)


def collage(rng: np.random.Generator, size: int, others: Sequence[Other]) -> np.ndarray:
    """Return an image (size, size) whose cells are parts of other images, in wrong places; some in a drawn outline."""
    cells = int(rng.integers(4, 24))
    at = rng.uniform(0, size, (cells, 2))
    y, x = np.mgrid[:size, :size]
    owner = np.argmin([(y - a) ** 2 + (x - b) ** 2 for a, b in at], 0)
    lent = [others[int(rng.integers(len(others)))](rng, size) for _ in range(int(rng.integers(1, 4)))]
    image = np.zeros((size, size), np.float32)
    for i in range(cells):
        part = lent[int(rng.integers(len(lent)))]
        part = np.rot90(np.roll(part, tuple(int(v) for v in rng.integers(size, size=2)), (0, 1)), int(rng.integers(4)))
        image = np.where(owner == i, part * rng.uniform(0.6, 1.2), image)
    if rng.random() < 0.5:
        c = Canvas(rng, size)
        edge = MARGIN * FINE
        where = c.blob(0, 0, *rng.uniform(0.5, 1, 2), rng.uniform(0, 3), waves=0.2)[edge:-edge:FINE, edge:-edge:FINE]
        image = image * where
    return image.astype(np.float32)
