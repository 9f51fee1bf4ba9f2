"""Parts of bodies, drawn anew by every seed: limbs, joints, spines, trunks, breasts, hearts, hands; no heads.

No anatomy of anyone is needed: contours with random waves, layers, bones and organs in tissues of a random contrast, in
every plane of some part of a body. They are no atlas; `companion.data.no_heads` makes images of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from companion.data.heads import MARGIN, smooth_noise

FINE = 2  # points along a pixel, over which edges are averaged
TISSUES = ("fat", "muscle", "marrow", "cortex", "cartilage", "fluid", "blood", "organ", "gland", "lung")
CONTRASTS = (  # signals of TISSUES: T1, T2, fat-suppressed proton density, bright blood, CT
    (1.0, 0.35, 0.85, 0.05, 0.45, 0.15, 0.2, 0.5, 0.4, 0.03),
    (0.7, 0.2, 0.6, 0.03, 0.35, 1.0, 0.15, 0.35, 0.55, 0.03),
    (0.15, 0.45, 0.2, 0.04, 0.85, 1.0, 0.5, 0.55, 0.6, 0.05),
    (0.55, 0.35, 0.5, 0.05, 0.5, 0.8, 1.0, 0.45, 0.4, 0.05),
    (0.42, 0.52, 0.6, 1.0, 0.55, 0.5, 0.56, 0.55, 0.5, 0.08),
)

Tissues = dict[str, float]


class Canvas:
    """Points (n, n) of an image, -1 to 1 along its visible part, warped; shapes are painted on them.

    `y`, `x` are of the body, turned and shifted in the image; `grain` fills surfaces with a texture, or is None.
    """

    def __init__(self, rng: np.random.Generator, size: int, warp: float = 0.03, grain: np.ndarray | None = None):
        self.rng, self.n, self.grain = rng, (size + 2 * MARGIN) * FINE, grain
        line = (np.arange(self.n) + 0.5) * 2 / (size * FINE) - self.n / (size * FINE)
        waves = warp * abs(rng.normal()) * smooth_noise(self.n, rng, int(rng.integers(5, 12)), 2).numpy()
        y, x = line[:, None] + waves[0], line + waves[1]
        angle, zoomed = rng.normal(0, 0.25) + rng.integers(4) * math.pi / 2, np.exp(rng.normal(0.05, 0.25))
        dy, dx = rng.normal(0, 0.12, 2)
        c, s = math.cos(angle) / zoomed, math.sin(angle) / zoomed
        self.y, self.x = c * (y - dy) - s * (x - dx), s * (y - dy) + c * (x - dx)
        if rng.random() < 0.5:
            self.x = -self.x
        self.image = np.zeros((self.n, self.n), np.float32)

    def blob(self, *place: float, waves: float = 0.08) -> np.ndarray:
        """Where a round thing with a wavy contour is, (n, n) bool; place: y, x, its radii along them, its angle."""
        y, x, ry, rx, angle = (*place, 0.0)[:5]
        a, b = self.y - y, self.x - x
        c, s = math.cos(angle), math.sin(angle)
        a, b = (a * c - b * s) / ry, (a * s + b * c) / rx
        theta, bound = np.arctan2(a, b), 1.0
        for k in range(2, 6):
            bound = bound + waves / k * self.rng.normal() * np.cos(k * theta + self.rng.uniform(0, 2 * math.pi))
        return np.hypot(a, b) <= bound

    def box(self, *place: float, power: float = 4.0) -> np.ndarray:
        """Where a rounded rectangle is; place: as of a blob."""
        y, x, ry, rx, angle = (*place, 0.0)[:5]
        a, b = self.y - y, self.x - x
        c, s = math.cos(angle), math.sin(angle)
        return abs((a * c - b * s) / ry) ** power + abs((a * s + b * c) / rx) ** power <= 1

    def tube(self, points, width, flare: float = 0.0) -> np.ndarray:
        """Where a tube along a polyline is; `flare` widens both ends of it, as those of long bones."""
        found, points = np.zeros(self.image.shape, bool), np.asarray(points, float)
        for i, (p, q) in enumerate(zip(points[:-1], points[1:], strict=True)):
            along = q - p
            t = ((self.y - p[0]) * along[0] + (self.x - p[1]) * along[1]) / (along @ along)
            t = t.clip(0, 1)
            whole = (i + t) / (len(points) - 1)
            far = np.hypot(self.y - p[0] - t * along[0], self.x - p[1] - t * along[1])
            found |= far <= width * (1 + flare * abs(2 * whole - 1) ** 3)
        return found

    def paint(self, where: np.ndarray, value: float, within: np.ndarray | None = None) -> np.ndarray:
        """Give a place a signal, mostly plain, else with the canvas's grain; returns where it was painted."""
        where = where if within is None else where & within
        if self.grain is not None and self.rng.random() < 0.7:
            shift = tuple(int(v) for v in self.rng.integers(self.n, size=2))
            grain = np.roll(self.grain, shift, (0, 1))[where]
            self.image[where] = value * (1 + self.rng.uniform(0.3, 1) * (grain - 0.5))
        else:
            self.image[where] = value
        return where

    def bone(self, where: Callable[[float], np.ndarray], t: Tissues, within=None, cartilage: bool = False) -> None:
        """A bone: where(scale) is its extent; marrow inside of a cortex, maybe under cartilage."""
        if cartilage:
            self.paint(where(1.13), t["cartilage"], within)
        self.paint(where(1.0), t["cortex"], within)
        self.paint(where(self.rng.uniform(0.72, 0.92)), t["marrow"], within)


def draw_tissues(rng: np.random.Generator) -> Tissues:
    """Signals of `TISSUES`: a contrast that is known, varied, or, one time of four, anything."""
    values = np.array(CONTRASTS[int(rng.integers(len(CONTRASTS)))]) * np.exp(rng.normal(0, 0.15, len(TISSUES)))
    if rng.random() < 0.25:
        values = rng.uniform(0.02, 1, len(TISSUES))
    return dict(zip(TISSUES, (float(v) for v in values), strict=True))


def limb_across(c: Canvas, t: Tissues, rng: np.random.Generator) -> None:
    """One or two limbs, cut across: skin, fat, muscles with fat between them, bones, vessels."""
    places = (
        [(0, 0)] if rng.random() < 0.6 else [(rng.normal(0, 0.05), side * rng.uniform(0.42, 0.55)) for side in (-1, 1)]
    )
    for y, x in places:
        r = rng.uniform(0.55, 0.9) / len(places) ** 0.8
        ry, rx, rim = r * rng.uniform(0.8, 1.1), r * rng.uniform(0.8, 1.1), rng.uniform(0.03, 0.3)
        c.paint(c.blob(y, x, ry, rx, waves=0.06), t["fat"])
        inner = c.paint(c.blob(y, x, ry * (1 - rim), rx * (1 - rim), waves=0.08), t["muscle"])
        for _ in range(int(rng.integers(2, 8))):
            angle, bend = rng.uniform(0, 2 * math.pi), rng.normal(0, 0.5)
            ends = [
                (y + k * ry * math.sin(angle + bend * k), x + k * rx * math.cos(angle + bend * k))
                for k in (0.1, 0.5, 1)
            ]
            c.paint(c.tube(ends, rng.uniform(0.008, 0.03)), t["fat"], inner)
        for _ in range(int(rng.integers(3))):
            c.paint(
                c.blob(*(rng.normal(0, 0.35 * r, 2) + (y, x)), 0.25 * r, 0.2 * r),
                t["muscle"] * rng.uniform(0.7, 1.3),
                inner,
            )
        for _ in range(1 if rng.random() < 0.5 else 2):
            by, bx, b = *(rng.normal(0, 0.3 * r, 2) + (y, x)), r * rng.uniform(0.12, 0.35)
            angle, squash = rng.uniform(0, 3), rng.uniform(0.7, 1)
            c.bone(
                lambda k, a=(by, bx, b, angle, squash): c.blob(a[0], a[1], a[2] * k, a[2] * k * a[4], a[3], waves=0.05),
                t,
                inner,
            )
        for _ in range(int(rng.integers(1, 7))):
            c.paint(c.blob(*(rng.normal(0, 0.4 * r, 2) + (y, x)), 0.04 * r + 0.01, 0.04 * r + 0.01), t["blood"], inner)


def limb_along(c: Canvas, t: Tissues, rng: np.random.Generator) -> None:
    """A joint of long bones, cut along: knee, elbow, ankle, wrist, as it comes."""
    bend, wide = rng.normal(0, 0.35), rng.uniform(0.3, 0.65)
    middle = (rng.normal(0, 0.1), rng.normal(0, 0.1))
    up, down = (-1.6, rng.normal(0, 0.15)), (1.6, middle[1] + 1.5 * bend)
    c.paint(c.tube((up, middle, down), wide), t["fat"])
    inner = c.paint(c.tube((up, middle, down), wide * rng.uniform(0.65, 0.92)), t["muscle"])
    for _ in range(int(rng.integers(3, 9))):
        side = rng.uniform(-wide, wide)
        ends = [(-1.5, side), (middle[0] + rng.normal(0, 0.2), middle[1] + side * 1.1), (1.5, down[1] + side)]
        c.paint(c.tube(ends, rng.uniform(0.01, 0.05)), t[str(rng.choice(["fat", "fat", "cortex", "blood"]))], inner)
    c.paint(c.blob(*middle, 0.35, wide * 0.9), t[str(rng.choice(["fat", "fluid", "muscle"]))], inner)
    gap, flare = rng.uniform(0.02, 0.08), rng.uniform(0.3, 1.5)
    for start, sign in ((up, -1), (down, 1)):
        count = 1 if rng.random() < 0.7 else 2
        for i in range(count):
            shift = (i - (count - 1) / 2) * wide
            size = wide * rng.uniform(0.22, 0.42) / count**0.6
            end = (middle[0] + sign * (gap + size * (1 + flare) * 0.8), middle[1] + shift * 0.8)
            first = (start[0], start[1] + shift)
            c.bone(lambda k, a=(first, end, size, flare): c.tube(a[:2], a[2] * k, a[3]), t, cartilage=True)
    for _ in range(int(rng.integers(4))):
        side, s = int(rng.choice([-1, 1])), rng.uniform(0.06, 0.2)
        y, x = middle[0] + rng.normal(0, 0.25), middle[1] + side * wide * rng.uniform(0.5, 0.9)
        c.bone(lambda k, a=(y, x, s): c.blob(a[0], a[1], a[2] * k, 0.5 * a[2] * k), t, cartilage=True)


def ball_joint(c: Canvas, t: Tissues, rng: np.random.Generator) -> None:
    """A hip or shoulder: a ball on a shaft in a cup, between muscles."""
    c.paint(c.blob(0, 0.15, rng.uniform(0.8, 1.3), rng.uniform(0.8, 1.3)), t["fat"])
    inner = c.paint(c.blob(0, 0.15, rng.uniform(0.6, 0.95), rng.uniform(0.6, 0.95)), t["muscle"])
    for _ in range(int(rng.integers(3, 9))):
        c.paint(c.tube(rng.normal(0, 0.6, (3, 2)), rng.uniform(0.01, 0.06)), t["fat"], inner)
    y, x, r = *rng.normal(0, 0.1, 2), rng.uniform(0.2, 0.35)
    c.bone(lambda k: c.blob(y - 0.1, x - 0.25, r * 1.5 * k, r * 1.3 * k, waves=0.2), t)
    c.paint(c.blob(y, x, r * 1.2, r * 1.2, waves=0), t["cartilage"])
    shaft = rng.uniform(0.3, 0.6)
    c.bone(lambda k: c.tube(((y, x), (y + 0.15, x + 0.45), (y + 1.5, x + 0.55)), r * shaft * k), t)
    c.bone(lambda k: c.blob(y, x, r * k, r * k, waves=0.02), t)


def spine(c: Canvas, t: Tissues, rng: np.random.Generator) -> None:
    """A spine along its length: vertebrae, discs, canal and cord, muscles and fat behind, organs before."""
    curve, phase = rng.uniform(0, 0.2), rng.uniform(0, 6)
    c.paint(c.box(0, 0.1, 1.7, rng.uniform(0.7, 1.2)), t["fat"])
    c.paint(c.box(0, -0.05, 1.7, rng.uniform(0.5, 0.8)), t["muscle"])
    for _ in range(int(rng.integers(6))):
        c.paint(
            c.blob(rng.uniform(-1, 1), rng.uniform(-1, -0.3), *rng.uniform(0.1, 0.5, 2)),
            t[str(rng.choice(["organ", "blood", "lung", "fat"]))],
        )
    height, width = rng.uniform(0.1, 0.28), rng.uniform(0.1, 0.25)

    def at(y):
        return curve * math.sin(1.5 * y + phase)

    line = [(y, at(y) + width + 0.1) for y in np.linspace(-1.6, 1.6, 9)]
    if rng.random() < 0.8:
        c.paint(c.tube(line, 0.09), t["fluid"])
        c.paint(c.tube(line, rng.uniform(0.03, 0.06)), t["gland"])
    for i, y in enumerate(np.arange(-1.5, 1.5, height)):
        turn = -curve * 1.5 * math.cos(1.5 * y + phase)
        c.paint(
            c.box(y + height / 2, at(y + height / 2), 0.2 * height, width * 0.9, turn),
            t["fluid" if i % 3 else "cartilage"],
        )
        c.bone(lambda k, a=(y, turn): c.box(a[0], at(a[0]), 0.37 * height * k, width * k, a[1]), t)
        c.bone(
            lambda k, a=(y, turn): c.box(a[0] + 0.1, at(a[0]) + width + 0.33, 0.2 * height * k, 0.13 * k, a[1] - 0.4), t
        )


def trunk_across(c: Canvas, t: Tissues, rng: np.random.Generator) -> None:
    """A chest, an abdomen or a pelvis, cut across; arms and a table may lie beside it."""
    ry, rx = rng.uniform(0.5, 0.75), rng.uniform(0.78, 1.0)
    rim = rng.uniform(0.03, 0.2)
    if rng.random() < 0.3:
        for side in (-1, 1):
            c.paint(c.blob(rng.normal(0, 0.15), side * (rx + 0.25), 0.2, 0.17), t["fat"])
            c.paint(c.blob(0, side * (rx + 0.25), 0.15, 0.12), t["muscle"])
            c.bone(lambda k, a=side: c.blob(0, a * (rx + 0.25), 0.06 * k, 0.06 * k), t)
    if rng.random() < 0.4:
        c.paint(
            c.tube(((ry + 0.12, -1.3), (ry + rng.uniform(0.12, 0.25), 0), (ry + 0.12, 1.3)), 0.02),
            rng.uniform(0.1, 0.8),
        )
    c.paint(c.box(0, 0, ry, rx, power=2.5), t["fat"])
    c.paint(c.box(0, 0, ry - rim, rx - rim, power=2.5), t["muscle"])
    inside = c.paint(c.box(-0.02, 0, ry - rim - 0.1, rx - rim - 0.08, power=2.5), t["fat"])
    kind = rng.random()
    if kind < 0.4:  # chest
        for side in (-1, 1):
            lung = c.paint(
                c.blob(
                    rng.normal(0, 0.04),
                    side * rng.uniform(0.38, 0.48),
                    rng.uniform(0.3, 0.45),
                    rng.uniform(0.22, 0.34),
                    side * 0.2,
                ),
                t["lung"],
                inside,
            )
            for _ in range(int(rng.integers(5, 25))):
                y, x = rng.normal(0, 0.15), side * rng.uniform(0.2, 0.6)
                c.paint(c.tube(((0, side * 0.2), (y, x)), rng.uniform(0.004, 0.015)), t["blood"], lung)
        if rng.random() < 0.7:
            c.paint(c.blob(-0.1, 0.1, rng.uniform(0.15, 0.3), rng.uniform(0.2, 0.3), 0.5), t["muscle"])
            for _ in range(int(rng.integers(1, 5))):
                c.paint(c.blob(*(rng.normal(0, 0.09, 2) + (-0.1, 0.1)), *rng.uniform(0.05, 0.13, 2)), t["blood"])
        for angle in np.linspace(0, 2 * math.pi, int(rng.integers(8, 20))):
            y, x = (ry - rim - 0.04) * math.sin(angle), (rx - rim - 0.04) * math.cos(angle)
            c.bone(lambda k, a=(y, x, angle): c.blob(a[0], a[1], 0.03 * k, 0.09 * k, -a[2] + math.pi / 2), t)
    elif kind < 0.8:  # abdomen
        for _ in range(int(rng.integers(5, 30))):
            y, x, r = rng.uniform(-0.4, 0.2), rng.uniform(-0.6, 0.6), rng.uniform(0.04, 0.14)
            c.paint(c.blob(y, x, r, r * rng.uniform(0.6, 1.6), waves=0.2), t["gland"], inside)
            c.paint(c.blob(y, x, r * 0.6, r * 0.6, waves=0.3), t[str(rng.choice(["lung", "fluid", "fat"]))], inside)
        side = int(rng.choice([-1, 1]))
        c.paint(
            c.blob(-0.1, -0.45 * side, rng.uniform(0.25, 0.42), rng.uniform(0.2, 0.45), waves=0.15), t["organ"], inside
        )
        c.paint(c.blob(0.05, 0.6 * side, 0.25, 0.12, 0.3), t["organ"] * rng.uniform(0.7, 1.3), inside)
        for s in (-1, 1):
            c.paint(c.blob(0.2, 0.33 * s, 0.14, 0.1, 0.4 * s), t["gland"] * 1.2, inside)
            c.paint(c.blob(0.2, 0.3 * s, 0.06, 0.04), t["fat"], inside)
    else:  # pelvis
        c.paint(c.blob(-0.1, 0, rng.uniform(0.1, 0.3), rng.uniform(0.15, 0.35)), t["fluid"], inside)
        c.paint(c.blob(0.2, 0, rng.uniform(0.1, 0.2), rng.uniform(0.1, 0.25)), t["gland"], inside)
        for side in (-1, 1):
            c.bone(lambda k, a=side: c.tube(((-0.2, a * 0.6), (0.1, a * 0.5), (0.3, a * 0.25)), 0.07 * k), t)
            c.bone(lambda k, a=side: c.blob(0, a * 0.62, 0.16 * k, 0.14 * k), t, cartilage=True)
    y = ry - rim - rng.uniform(0.2, 0.3)
    c.bone(lambda k: c.blob(y, 0, 0.12 * k, 0.15 * k), t)
    c.paint(c.blob(y + 0.16, 0, 0.05, 0.07), t["fluid"])
    c.bone(lambda k: c.tube(((y + 0.22, -0.2), (y + 0.2, 0), (y + 0.22, 0.2)), 0.03 * k), t)
    c.paint(c.blob(y - 0.18, rng.normal(0, 0.08), 0.06, 0.06), t["blood"])
    for side in (-1, 1):
        c.paint(c.blob(y + 0.2, side * 0.25, 0.1, 0.16), t["muscle"])


def trunk_along(c: Canvas, t: Tissues, rng: np.random.Generator) -> None:
    """A trunk from the front: lungs, heart, liver, kidneys, bowel, pelvis; any part of it fills the image."""
    move = rng.uniform(-0.7, 0.7)
    c.paint(c.box(0, 0, 1.8, rng.uniform(0.75, 0.95)), t["fat"])
    inside = c.paint(c.box(0, 0, 1.8, rng.uniform(0.6, 0.74)), t["muscle"])
    for side in (-1, 1):
        lung = c.paint(
            c.blob(move - 0.75, side * 0.38, rng.uniform(0.4, 0.6), rng.uniform(0.22, 0.3), side * 0.1),
            t["lung"],
            inside,
        )
        for _ in range(12):
            c.paint(
                c.tube(
                    ((move - 0.75, side * 0.1), (move - 0.75 + rng.normal(0, 0.3), side * rng.uniform(0.2, 0.6))), 0.01
                ),
                t["blood"],
                lung,
            )
        c.paint(c.blob(move + 0.4, side * 0.3, 0.2, 0.1, -side * 0.2), t["gland"], inside)
        c.bone(lambda k, a=side: c.tube(((move + 0.75, a * 0.6), (move + 1.1, a * 0.4)), 0.1 * k), t)
    c.paint(c.blob(move - 0.55, 0.12, 0.25, 0.22, 0.5), t["blood"], inside)
    c.paint(c.blob(move, -0.3, 0.25, 0.4, waves=0.2), t["organ"], inside)
    for _ in range(int(rng.integers(25))):
        c.paint(
            c.blob(move + rng.uniform(0.4, 1.1), rng.uniform(-0.5, 0.5), *rng.uniform(0.04, 0.13, 2)),
            t[str(rng.choice(["gland", "fluid", "lung"]))],
            inside,
        )
    if rng.random() < 0.5:
        for y in np.arange(-1.6, 1.6, 0.16):
            c.bone(lambda k, a=y: c.box(a, 0, 0.06 * k, 0.11 * k), t)


def breasts(c: Canvas, t: Tissues, rng: np.random.Generator) -> None:
    """Breasts that hang from a chest, with glands."""
    for side in (-1, 1):
        one = c.paint(c.blob(-0.1, side * 0.45, rng.uniform(0.5, 0.8), rng.uniform(0.35, 0.45), waves=0.05), t["fat"])
        for _ in range(int(rng.integers(5, 40))):
            end = (rng.uniform(-0.4, 0.5), side * 0.45 + rng.normal(0, 0.18))
            c.paint(c.tube(((-0.7, side * 0.45), end), rng.uniform(0.01, 0.05)), t["gland"], one)
    c.paint(c.box(0.75, 0, 0.35, 1.4), t["muscle"])
    c.paint(c.box(1.1, 0, 0.4, 1.2), t["lung"])
    c.paint(c.blob(1.0, 0.2, 0.25, 0.3), t["blood"])


def heart(c: Canvas, t: Tissues, rng: np.random.Generator) -> None:
    """A heart across or along its axis, large, with lungs, a wall and a liver around it."""
    c.paint(c.box(0, 0, 1.2, 1.3), t["fat"])
    c.paint(c.blob(0, 0, rng.uniform(0.8, 1.2), rng.uniform(0.8, 1.2), waves=0.2), t["lung"])
    c.paint(c.blob(0.9, rng.uniform(-0.6, 0.6), rng.uniform(0.3, 0.6), 0.7, waves=0.2), t["organ"])
    r, angle = rng.uniform(0.2, 0.42), rng.uniform(0, 3)
    long = rng.uniform(1, 1.8) if rng.random() < 0.5 else 1.0
    c.paint(c.blob(0, -0.1, 1.5 * r, 1.7 * r * long**0.5), t["fat"])
    c.paint(c.blob(0.02, -0.22 - 0.4 * r, 0.9 * r, 0.75 * r, angle / 4, waves=0.15), t["blood"])
    c.paint(c.blob(0, 0.1, r, r * long, angle, waves=0.04), t["muscle"])
    wall = rng.uniform(0.45, 0.8)
    cavity = c.paint(c.blob(0, 0.1, r * wall, r * wall * long, angle), t["blood"])
    for _ in range(int(rng.integers(3))):
        c.paint(c.blob(*(rng.normal(0, 0.3 * r, 2) + (0, 0.1)), 0.12 * r, 0.12 * r), t["muscle"], cavity)
    for _ in range(int(rng.integers(6))):
        c.paint(c.blob(*rng.uniform(-0.8, 0.8, 2), *rng.uniform(0.02, 0.1, 2)), t["blood"])


def fingers(c: Canvas, t: Tissues, rng: np.random.Generator) -> None:
    """Hands and feet: rays side by side, of bones in a row, or cut across."""
    count = int(rng.integers(2, 6))
    for i in range(count):
        x = (i - (count - 1) / 2) * 1.6 / count
        width, lean = 0.6 / count * rng.uniform(0.8, 1.2), rng.normal(0, 0.1)
        if rng.random() < 0.5:
            c.paint(c.tube(((-0.8 + 0.1 * abs(x), x + lean), (1.4, x * 0.7)), width), t["fat"])
            for y in np.arange(1.2, -0.6, -rng.uniform(0.3, 0.6)):
                at = x * 0.7 + (x * 0.3 + lean) * (1.4 - y) / 2.2
                c.bone(lambda k, a=(y, at, 0.5 * width): c.tube((a[:2], (a[0] - 0.25, a[1])), a[2] * k, 0.4), t)
        else:
            c.paint(c.blob(rng.normal(0, 0.1), x, width, width), t["fat"])
            c.bone(lambda k, a=(x, 0.5 * width): c.blob(0, a[0], a[1] * k, a[1] * k), t)


BODIES = (limb_across, limb_along, ball_joint, spine, trunk_across, trunk_across, trunk_along, breasts, heart, fingers)
