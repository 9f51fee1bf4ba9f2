"""The parts of a virtual chest: walls, ventricles, papillary muscles, lungs, spine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from companion.data.anatomy import Subject
from companion.data.heart_canvas import ANGLES, Canvas, Polar, _bump, _ease, _wave

LABELS = {"background": 0, "lv_blood": 1, "myocardium": 2, "rv_blood": 3}

# (T1, T2) in ms at 1.5 T; sources above. CSF is water-like.
RELAXATION = {
    "blood": (1441.0, 290.0),
    "myocardium": (1030.0, 40.0),
    "muscle": (1008.0, 44.0),
    "fat": (343.0, 58.0),
    "marrow": (549.0, 49.0),
    "liver": (586.0, 46.0),
    "spleen": (1057.0, 79.0),
    "csf": (4000.0, 2000.0),
}
RELAXATION_SPREAD = 0.06  # relative standard deviation between subjects
FLIP_DEG = 55.0
LUNG = 0.035  # relative to blood: little water, short T2*

DENSITY = {"fat": 0.85, "marrow": 0.7}  # of protons, relative to soft tissue, where it matters
LENGTH_SHARE = 0.18  # long axis ~ V^0.18 and area ~ V^0.82: an ejection fraction of 60 % shortens the axis by 15 %
HEART_FOLLOWS = (0.6, -0.15)  # shift of the heart (y, x) per shift of the diaphragm


def bssfp(t1_ms: float, t2_ms: float, flip_deg: float = FLIP_DEG) -> float:
    """Return the steady-state signal on resonance, for a repetition time far below T2, relative to the equilibrium.

    S = sin(a) / (1 + cos(a) + (1 - cos(a)) T1 / T2).
    """
    flip = math.radians(flip_deg)
    return math.sin(flip) / (1 + math.cos(flip) + (1 - math.cos(flip)) * t1_ms / t2_ms)


@dataclass(frozen=True)
class Heart(Subject):
    """One virtual person's heart and chest; `seed` decides everything about them."""

    @cached_property
    def build(self) -> Build:
        """Everything drawn about this person that a number can say."""
        return Build.draw(self.generator("build"))

    def signals(self) -> dict[str, float]:
        """Return the bSSFP signal of each tissue, relative to this person's blood."""
        draws = torch.randn(len(RELAXATION), generator=self.generator("relax")).clamp(-2, 2) * RELAXATION_SPREAD
        values = {
            k: bssfp(t1, t2 * f) for (k, (t1, t2)), f in zip(RELAXATION.items(), draws.exp().tolist(), strict=True)
        }
        return {tissue: DENSITY.get(tissue, 1.0) * value / values["blood"] for tissue, value in values.items()}

    def volume(self, cycle: Tensor) -> Tensor:
        """Return the volume of the left ventricle relative to end diastole; `cycle` 0 is end diastole, 1 the next.

        A raised cosine empties it by `ejection_fraction`; early filling, diastasis and the atrial kick refill it.
        """
        b, phase = self.build, torch.remainder(cycle, 1.0)
        emptying = _ease(phase / b.systole)
        after = (phase - b.systole) / (1 - b.systole)
        kick = b.atrial_kick
        filling = (1 - kick) * _ease((after - 0.06) / 0.46) + kick * _ease((after - 0.72) / 0.28)
        return 1 - b.ejection_fraction * (emptying - filling)

    def diaphragm_mm(self, times_ms: Tensor) -> Tensor:
        """Return how far breathing has moved the diaphragm down, mm, from full expiration."""
        b = self.build
        return b.breath_mm * torch.cos(math.pi * (times_ms / b.breath_ms + b.breath_start)) ** 4


@dataclass(frozen=True)
class Build:
    """The drawn numbers of a person: mm, degrees (0 is right, 90 up), ms, fractions."""

    size: float  # scales chest and heart
    level: float  # slice position, 0 at the base, 1 at the apex
    centre: tuple[float, float]  # (y, x) of the left ventricle at end diastole
    radius: float  # of the cavity at end diastole, at the widest level
    wall: float  # of the left ventricle at end diastole
    septum_deg: float  # direction from the left ventricle to the middle of the septum
    rv_half_deg: float  # half the sector that the right ventricle takes
    rv_width: float
    rv_wall: float
    fat: float  # epicardial
    fat_pad: float  # between heart and chest wall
    subcutaneous: float
    ejection_fraction: float
    rv_ejection_fraction: float
    systole: float  # fraction of the cycle
    atrial_kick: float
    cycle_ms: float
    twist_deg: float
    breath_mm: float
    breath_ms: float
    breath_start: float

    @classmethod
    def draw(cls, generator: torch.Generator) -> Build:
        """Return one person, from ranges of healthy adults."""

        def between(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator))

        return cls(
            size=between(0.92, 1.04),
            level=between(0.15, 0.75),
            centre=(between(-20, -9), between(-6, 9)),
            radius=between(22.5, 27.5),
            wall=between(7.5, 10.5),
            septum_deg=between(165, 192),
            rv_half_deg=between(58, 68),
            rv_width=between(27, 37),
            rv_wall=between(2.5, 3.8),
            fat=between(1.5, 4.0),
            fat_pad=between(4, 18),
            subcutaneous=between(6, 20),
            ejection_fraction=between(0.53, 0.68),
            rv_ejection_fraction=between(0.45, 0.6),
            systole=between(0.32, 0.38),
            atrial_kick=between(0.18, 0.35),
            cycle_ms=between(750, 1100),
            twist_deg=between(4, 12),
            breath_mm=between(5, 13),
            breath_ms=between(3300, 5500),
            breath_start=between(0, 1),
        )


def _chest(subject: Heart, canvas: Canvas, down: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return the signed signal (frame, y, x) of everything around the heart, and the cover (y, x) of the thorax.

    down: shift of the diaphragm (frame,), mm.
    """
    b, s, g = subject.build, subject.signals(), subject.generator("chest")
    canvas = canvas.bend(g, 1.6, 28.0)
    middle, half = (8.0 * b.size, 6.0 * b.size), (108.0 * b.size, 129.0 * b.size)  # (y, x)
    polar = Polar(canvas, *middle)
    theta, exponent = polar.angles, 2.3
    outline = (theta.sin().abs() / half[0]) ** exponent + (theta.cos().abs() / half[1]) ** exponent
    outline = outline ** (-1 / exponent) * (1 + 0.016 * _wave(theta, g, range(2, 6)))
    fat = b.subcutaneous * (0.5 + 0.8 * _bump(theta, 140, 50) + 0.12 * _wave(theta, g, range(2, 9))).clamp(min=0.2)
    muscle = 14 * b.size * (1 + 0.4 * _bump(theta, -38, 25) + 0.2 * _wave(theta, g, range(2, 9)))
    signal = -s["fat"] * polar.cover(outline) * (1 + 0.06 * canvas.field(g, 14.0))
    signal = signal + 0.5 * s["muscle"] * (polar.cover(outline) - polar.cover(outline - 1.8))  # skin
    wall = _wall(polar, outline - fat, muscle, s, g)
    signal = torch.lerp(signal, wall, polar.cover(outline - fat))
    lung = _lungs(canvas, b, down, g)
    abdomen, below = _abdomen(subject, canvas, down, s, g, level)
    inside = polar.cover(outline - fat - muscle)
    signal = torch.lerp(signal, torch.lerp(lung, abdomen, below), inside)
    return _spine(signal, canvas, polar.cover(outline - fat), middle, b.size, s, g), inside


def _wall(polar: Polar, outer: Tensor, muscle: Tensor, s: dict, g: torch.Generator) -> Tensor:
    """Return the chest wall (y, x): muscle with planes of fat, and ribs, oblique ovals of marrow with dark rims."""
    canvas, theta = polar.canvas, polar.angles
    edge, thick = polar.at(outer), polar.at(muscle)
    depth = edge - polar.radius
    signal = s["muscle"] * (1 + 0.12 * canvas.field(g, 9.0))
    plane = canvas.cover(1.1 - (depth - 0.3 * thick).abs()) * canvas.field(g, 26.0).clamp(0, 0.9)
    signal = torch.lerp(signal, torch.tensor(-s["fat"]), plane)

    count = 9
    middle = (torch.arange(count) + 0.5 * torch.rand(count, generator=g)) * (2 * math.pi / count)
    half = 8 + 9 * torch.rand(count, generator=g)  # mm along the wall
    offset = torch.remainder(theta - middle[:, None] + math.pi, 2 * math.pi) - math.pi  # (rib, angle)
    nearest = offset.abs().argmin(0, keepdim=True)
    along = polar.at((offset.gather(0, nearest)[0] * outer / half[nearest[0]]).square())
    across = (depth - 0.66 * thick) / (0.3 * thick)
    rim = 1 - (along + across.square()).sqrt()
    signal = torch.lerp(signal, torch.tensor(0.1), canvas.cover(rim * 4.5, 1.0))
    return torch.lerp(signal, torch.tensor(-0.55 * s["marrow"]), canvas.cover(rim * 4.5 - 1.3, 1.5))


def _lungs(canvas: Canvas, b: Build, down: Tensor, g: torch.Generator) -> Tensor:
    """Return lung (frame, y, x): nearly empty, with vessels that thin out from the hilum and move with breathing."""
    hilum = (b.centre[0] - 4, b.centre[1] + 62)
    count = 60
    spread = 34 * torch.randn(2, count, generator=g)
    far = spread.square().sum(0).sqrt() / 70
    radius = (0.8 + 1.9 * torch.rand(count, generator=g)) * (1.3 - far).clamp(0.4, 1.3)
    shift = 0.5 * down[:, None]
    tone = 0.5 * (radius / 2).clamp(max=1)
    side = torch.where(torch.arange(count) % 4 > 0, hilum[1], hilum[1] - 135)  # a quarter is in the right lung
    spots = canvas.spots(hilum[0] + spread[0] + shift, (side + spread[1]).expand(len(down), -1), radius, tone)
    still = torch.zeros(1, 1)
    course, gate = canvas.field(g, 26.0, (shift, still)), canvas.field(g, 22.0, (shift, still))
    near = torch.exp(-0.5 * (((canvas.y[:, None] - hilum[0]) / 45).square() + ((canvas.x - hilum[1]) / 45).square()))
    wide = max(0.1, 0.1 * canvas.edge / 2.5)
    vessels = (0.1 / wide) * torch.exp(-0.5 * (course / wide).square()) * gate.clamp(0, 1) * near
    low = 1 + 0.5 * (canvas.y[:, None] + canvas.x) / 150  # denser towards the back
    haze = LUNG * low.clamp(min=0.4) * (1 + 0.3 * canvas.field(g, 14.0))
    return haze + spots.clamp(max=0.5) + 0.35 * vessels


def _abdomen(subject: Heart, canvas: Canvas, down: Tensor, s: dict, g: torch.Generator, level: float):
    """Return the signal below the diaphragm and how much of each pixel lies there, both (frame, y, x)."""
    b = subject.build
    bottom = b.centre[0] + b.size * (_lv_radius(b, level) + b.wall) + 1.0
    shift = (down[:, None], torch.zeros(1, 1))
    y, x = canvas.down - down[:, None, None], canvas.right
    u = (x / b.size + 34 + 10 * float(torch.randn((), generator=g).clamp(-1.5, 1.5))) / 70
    dome = bottom - 4 + torch.where(u > 0, 13.0, 15.0) * u.square()  # highest over the liver
    depth = (y - dome) / (1 + (26 * u / 70).square()).sqrt()
    fat = -s["fat"] * (1 + 0.1 * canvas.field(g, 12.0, shift))
    mottle = 1 + 0.05 * canvas.field(g, 7.0, shift)
    vein, gate = canvas.field(g, 20.0, shift), canvas.field(g, 24.0, shift)
    wide = max(0.13, 0.13 * canvas.edge / 2.5)
    vessels = (0.13 / wide) * torch.exp(-0.5 * (vein / wide).square()) * gate.clamp(0, 1)
    liver = s["liver"] * mottle * (1 + 0.45 * vessels)
    tip = 26 + 26 * float(torch.rand((), generator=g))  # how far the left lobe reaches
    edge = (tip - 0.012 * (y - bottom - 8).square() - 0.2 * (y - bottom)) * b.size
    organs = torch.lerp(fat, liver, canvas.cover((edge - x) * 0.9).minimum(canvas.cover(depth - 2.5)))
    full = 0.2 + 0.5 * float(torch.rand((), generator=g))
    for cy, cx, a, c, turn, value in ((34, 42, 26, 16, -20, full), (52, 78, 24, 13, -50, s["spleen"])):
        jitter = 5 * torch.randn(2, generator=g).clamp(-1.5, 1.5)
        place = (bottom + cy + jitter[0] + down[:, None, None], cx * b.size + jitter[1])
        organs = torch.lerp(organs, torch.tensor(s["muscle"]), canvas.ellipse(*place, a, c, turn))
        organs = torch.lerp(organs, value * mottle, canvas.ellipse(*place, a - 2.5, c - 2.5, turn))
    muscle = canvas.cover(1.1 - (depth - 1.1).abs())
    return torch.lerp(organs, torch.tensor(s["muscle"]), muscle), canvas.cover(depth)


def _spine(signal: Tensor, canvas: Canvas, within: Tensor, middle, size: float, s: dict, g: torch.Generator) -> Tensor:
    """Return the chest with vertebra, canal and back muscle, and the descending aorta in front of them."""
    toward = math.radians(-38 + 4 * float(torch.randn((), generator=g).clamp(-1.5, 1.5)))
    turn = math.degrees(toward) + 90  # of the tangent
    tone = s["muscle"] * (1 + 0.15 * canvas.field(g, 7.0))
    marrow = 0.85 * s["marrow"] * (1 + 0.15 * canvas.field(g, 6.0))
    fat, dark, csf, cord = (torch.tensor(v) for v in (-0.8 * s["fat"], 0.1, 0.75 * s["csf"], 0.6))
    blood, vessel_wall = torch.tensor(0.93), torch.tensor(0.3)
    for out, side, a, b, value in (  # mm from the middle and along the tangent, half axes along tangent and radius
        (103, 0, 38, 14, fat),
        (103, -18, 19, 12, tone),
        (103, 18, 19, 12, tone),
        (79, 0, 20, 16, dark),
        (79, 0, 18, 14.2, marrow),
        (97, 0, 9.5, 7.5, dark),
        (97, 0, 8, 6, csf),
        (97, 0, 4.2, 3.2, cord),
        (54, 15, 12.2, 12.2, vessel_wall),
        (54, 15, 11, 11, blood),
    ):
        cy = middle[0] + size * (-out * math.sin(toward) - side * math.cos(toward))
        cx = middle[1] + size * (out * math.cos(toward) - side * math.sin(toward))
        signal = torch.lerp(signal, value, within * canvas.ellipse(cy, cx, a * size, b * size, turn))
    return signal


def _lv_radius(b: Build, level: float) -> float:
    """Return the mean cavity radius at end diastole at a slice level, before `size`: half an ellipsoid."""
    return b.radius * math.sqrt(1 - (0.88 * level) ** 2)


def _ventricles(
    subject: Heart, canvas: Canvas, signal: Tensor, inside: Tensor, cycle: Tensor, down: Tensor, level: float
) -> tuple[Tensor, Tensor]:
    """Return the signal with the heart in it, and the labels, both (frame, y, x)."""
    b, s, g = subject.build, subject.signals(), subject.generator("heart")
    volume = subject.volume(cycle)[:, None]  # (frame, 1)
    squeeze = (1 - volume) / b.ejection_fraction  # 0 at end diastole, 1 at end systole
    shift = [down * HEART_FOLLOWS[0], down * HEART_FOLLOWS[1]]
    cy = b.centre[0] + shift[0][:, None] + 1.5 * squeeze
    cx = b.centre[1] + shift[1][:, None] - 2.0 * squeeze
    polar = Polar(canvas, cy[..., None], cx[..., None])
    endo, epi, rv, outer, sac = _contours(b, polar.angles, volume, squeeze, level, g)

    # Texture moves and shrinks with the heart; the stream of blood changes over the cycle and repeats with it.
    shrink = (endo.mean(-1, keepdim=True) / endo[:1].mean()).sqrt()
    place = (cy, cx)
    speckle = canvas.field(g, 9.0, place, shrink)
    swirl, eddy = canvas.field(g, 20.0, place), canvas.field(g, 20.0, place)
    angle = 2 * math.pi * cycle[:, None, None]
    flow = 1 + 0.045 * (swirl * angle.cos() + eddy * angle.sin())
    muscle = s["myocardium"] * (1 + 0.09 * speckle)

    signal = torch.lerp(signal, -s["fat"] * (1 + 0.08 * speckle), polar.cover(sac) * inside)
    signal = torch.lerp(signal, muscle, polar.cover(outer))
    rv_cover = polar.cover(rv)
    lv_cover, epi_cover = polar.cover(endo), polar.cover(epi)
    rough = (0.9 + _wave(polar.angles, g, range(5, 16), 0.5)).clamp(min=0)
    rv_rough = rv - ((rv - epi) / 6).clamp(max=1) * rough
    signal = torch.lerp(signal, 0.97 * flow, polar.cover(rv_rough, 2.0))
    signal = _moderator_band(signal, canvas, b, cy, cx, epi, rv, rv_cover, level, g, s)
    signal = torch.lerp(signal, muscle, epi_cover)
    rough = (0.5 + 0.5 * _wave(polar.angles, g, range(3, 12), 0.7)).clamp(min=0)
    signal = torch.lerp(signal, flow, polar.cover(endo - rough, 2.0))
    signal = _papillary(signal, canvas, b, cy, cx, endo, squeeze, muscle, level, g)

    labels = torch.zeros(signal.shape, dtype=torch.uint8)
    for name, cover in (("rv_blood", rv_cover), ("myocardium", epi_cover), ("lv_blood", lv_cover)):
        labels[cover > 0.5] = LABELS[name]
    return signal, labels


def _contours(b: Build, theta: Tensor, volume: Tensor, squeeze: Tensor, level: float, g: torch.Generator):
    """Return the radii (frame, angle), mm about the left ventricle, of endocardium, epicardium, right ventricular
    cavity, outer myocardium and the fat around it."""
    radius = _lv_radius(b, level) * b.size
    shape = 1 + 0.04 * _wave(theta, g, range(2, 5))
    start = radius * shape / shape.square().mean().sqrt()
    endo = start * volume ** ((1 - LENGTH_SHARE) / 2)  # area ~ V^0.82
    wall = b.wall * b.size * (1 + 0.06 * _wave(theta, g, range(1, 5)) + 0.06 * torch.cos(theta - math.pi))
    epi = (endo.square() + (start + wall).square() - start.square()).sqrt()

    side = torch.remainder(theta - math.radians(b.septum_deg) + math.pi, 2 * math.pi) - math.pi
    u = (side / math.radians(b.rv_half_deg * (1 - 0.25 * level))).clamp(-1, 1)
    width = b.rv_width * b.size * math.sqrt(max(0.0, 1 - (1.02 * level) ** 2))
    width = width * (1 - b.rv_ejection_fraction * squeeze * 0.62)
    belly = (1 - u.abs().pow(2.2)).pow(0.8) * (1 - 0.18 * u + 0.06 * _wave(theta, g, range(2, 7)))
    crescent = width * belly
    rv = epi + crescent
    outer = epi.maximum(rv + b.rv_wall * (1 + 0.4 * squeeze) * (crescent / 4).clamp(0, 1))

    kernel = torch.exp(-0.5 * (torch.arange(-40, 41) / 16.0).square())
    kernel = (kernel / kernel.sum())[None, None]
    around = torch.cat([outer[:, -40:], outer, outer[:, :40]], -1)[:, None]
    hull = torch.nn.functional.conv1d(around, kernel)[:, 0]
    grooves = _bump(theta, b.septum_deg + b.rv_half_deg, 14) + _bump(theta, b.septum_deg - b.rv_half_deg, 16)
    fat = b.fat * (1 + 0.3 * _wave(theta, g, range(2, 8)) + 1.3 * grooves).clamp(min=0.3)
    pad = b.fat_pad * _bump(theta, 150 + 20 * float(torch.randn((), generator=g).clamp(-1, 1)), 26)
    sac = outer.maximum(hull) + fat + pad
    return endo, epi, rv, outer, torch.lerp(sac, sac[:1], 0.25)


def _papillary(signal, canvas: Canvas, b: Build, cy, cx, endo, squeeze, muscle, level: float, g: torch.Generator):
    """Return the cavity with its two papillary muscles, which stay as large and come together in systole."""
    present = max(0.0, min(1.0, (level - 0.1) / 0.2, (1.02 - level) / 0.2))
    draws = torch.rand(2, 5, generator=g)
    for degrees, (a, c, deep, turn, angle) in zip((48.0, 285.0), draws.tolist(), strict=True):
        at = math.radians(degrees + 24 * (angle - 0.5)) + torch.deg2rad(torch.tensor(b.twist_deg)) * squeeze
        half = ((3.3 + 1.4 * a) * b.size * present, (2.6 + 1.2 * c) * b.size * present)
        if min(half) < 0.8:
            continue
        r = endo.mean(-1, keepdim=True) - half[0] * (0.75 + 0.65 * deep)
        where = ((cy - r * at.sin())[..., None], (cx + r * at.cos())[..., None])
        lean = torch.rad2deg(at)[..., None] + 50 * (turn - 0.5)
        signal = torch.lerp(signal, muscle, canvas.ellipse(*where, *half, lean))
    return signal


def _moderator_band(signal, canvas: Canvas, b: Build, cy, cx, epi, rv, inside, level: float, g, s: dict):
    """Return the right ventricle with the muscle strand from septum to free wall, seen in the apical half."""
    draws = torch.rand(2, generator=g).tolist()
    strength = max(0.0, min(1.0, (level - 0.35) / 0.2))
    at = math.radians(b.septum_deg + b.rv_half_deg * (0.1 + 0.4 * draws[0]))
    half = 1.0 + 0.8 * draws[1]
    index = int(math.degrees(at) % 360 * ANGLES / 360)
    middle = (epi[:, index] + rv[:, index])[:, None, None] / 2
    length = (rv[:, index] - epi[:, index])[:, None, None] * 0.5 + 1
    where = (cy[..., None] - middle * math.sin(at), cx[..., None] + middle * math.cos(at))
    dy, dx = canvas.down - where[0], canvas.right - where[1]
    along = dx * math.cos(at + 0.3) - dy * math.sin(at + 0.3)
    across = dx * math.sin(at + 0.3) + dy * math.cos(at + 0.3)
    strand = canvas.cover((half - across.abs()).minimum(length - along.abs())) * min(1.0, 2 * half / canvas.edge)
    return torch.lerp(signal, torch.tensor(1.3 * s["myocardium"]), 0.65 * strength * strand * inside)
