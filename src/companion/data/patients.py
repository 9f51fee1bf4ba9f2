"""Brains of many anatomies with and without lesions, as scanners and settings differ: what translators learn from.

The virtual cohort (`companion.data.anatomy`) is one smooth template in one size, healthy, by one protocol. Here a
person begins with the ICBM template or with the brain of a real head (`companion data get heads`: bias removed, brain
and tissues found by classical steps, brought to the template), and is warped, made smaller or larger, with wider
ventricles or sulci; two of three have lesions (`companion.data.lesions`) that push tissue aside. Tissue parameters, the
protocol of every contrast, gamma, texture, shading and noise are drawn anew. Nothing leads from one contrast to another
but the tissue.

    found = anatomies("data/heads", "train", voxel_mm=3.25)
    images = patient(found[1], anatomy.Subject(7), ("T1w", "T2w"), heights=torch.tensor([0.0, 20.0]))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor
from tqdm.auto import tqdm

from companion.data import anatomy
from companion.data.anatomy import Subject
from companion.data.head_tissues import even_brain, fluid_level, tissue_levels
from companion.data.heads import Head
from companion.data.heads_download import load_heads
from companion.data.intensity import scaled
from companion.data.lesions import KINDS, SIZES_MM, Lesion, lesion_at
from companion.data.nifti import Volume
from companion.data.registration import to_template

PLATEAU = 0.2  # of the way between two tissues' signals, at either end: noise there is no partial volume
# Ranges of settings, milliseconds; round numbers of clinical protocols at 1.5 and 3 T, but for T2w's echo: longer, so
# that tissue is as dark beside fluid as in real images, which turbo spin echoes and shorter T2 times make so.
PROTOCOLS = {
    "T1w": (
        {"repetition_ms": (1900, 2700), "echo_ms": (2, 5), "inversion_ms": (850, 1150)},
        {"repetition_ms": (400, 700), "echo_ms": (8, 15)},
    ),
    "T2w": ({"repetition_ms": (4500, 10000), "echo_ms": (105, 165)},),
    "PDw": ({"repetition_ms": (2000, 5000), "echo_ms": (8, 30)},),
    "FLAIR": ({"repetition_ms": (7000, 11000), "echo_ms": (90, 140), "inversion_ms": (2100, 2700)},),
}
HEALTHY = 0.35  # share of people without a lesion
PIXELS_MM = (2.0, 2.5, 3.0, 3.5)  # of `tissue_slices`
UNKNOWN = ((0.6, 1.0), (300.0, 4200.0), (25.0, 1500.0))  # density, T1 and T2 (ms) of what no list has


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A brain in the template's space: shares of CSF, grey and white matter and the texture, (4, z, y, x).

    to_voxel: matrix (4, 4) from MNI mm to voxels (x, y, z).
    """

    name: str
    maps: Tensor
    to_voxel: Tensor

    def at(self, points: Tensor) -> Tensor:
        """The maps (4, *space) at points (*space, 3) of MNI mm."""
        return anatomy.sampled(self.maps, self.to_voxel, points)


def anatomies(folder: str | Path | None, split: str, voxel_mm: float, more: bool = False) -> list[Anatomy]:
    """The template and the whole heads of a folder that are for a split, low-passed for voxels of `voxel_mm`.

    folder: as `companion data get heads` leaves it; none: the template alone. more: those of `more-heads` too, to train
    on. Raises as `load_heads` does, and ValueError for a head without a brain.
    """
    maps, to_voxel = anatomy.template(voxel_mm)
    found = [Anatomy("ICBM 152", maps, to_voxel)]
    if folder is not None:
        known = load_heads(folder, split) + (load_heads(folder, "more") if more else [])
        heads = [head for head in known if not head.name.endswith("_brain")]
        found += [head_anatomy(head, voxel_mm) for head in heads]
    return found


def head_anatomy(head: Head, voxel_mm: float) -> Anatomy:
    """The brain of a T1-weighted head in the template's space: tissues by its signal, low-passed for `voxel_mm`."""
    x, y, z = (2 * v for v in head.voxel_mm)
    step = (x, y, z)
    signal = head.signal[::2, ::2, ::2].numpy()
    brain, bias = even_brain(signal, step)
    signal = signal / bias
    _, grey, white = tissue_levels(signal, brain)
    csf = fluid_level(grey, white)
    affine = np.diag([*step, 1.0])
    affine[:3, 3] = -(np.array(signal.shape) - 1) / 2 * step
    place = torch.from_numpy(to_template(Volume((signal * brain).transpose(2, 1, 0), affine)).array).float()
    spacing = max(1.0, voxel_mm / 2.2)
    depth, height, width = (round(mm / spacing) for mm in (180, 216, 180))
    shape = (depth, height, width)
    points = anatomy.grid_mm(shape, spacing) @ place[:3, :3].T + place[:3, 3]
    there = Head(head.name, torch.from_numpy(signal), step, head.tissue, head.levels).at(points).numpy()
    share = Head("brain", torch.from_numpy(brain), step, head.tissue, head.levels).at(points).numpy()

    def beyond(low: float, high: float) -> np.ndarray:
        return np.clip(((there - low) / (high - low) - PLATEAU) / (1 - 2 * PLATEAU), 0, 1)

    above_csf, above_grey = beyond(csf, grey), beyond(grey, white)
    shares = share * np.stack([1 - above_csf, above_csf - above_grey, above_grey])
    expected = np.tensordot((csf, grey, white), shares, 1)
    texture = np.where(share > 0.5, np.clip(there / np.maximum(expected, 0.5 * csf), 0.8, 1.2), 1.0)
    sigma = voxel_mm / 2.355 / spacing if voxel_mm > 1 else 0.0
    maps = np.stack([gaussian_filter(m, sigma) if sigma else m for m in (*shares, texture)]).astype(np.float32)
    to_voxel = np.linalg.inv(anatomy.affine(shape, spacing))
    return Anatomy(head.name, torch.from_numpy(maps), torch.from_numpy(to_voxel).float())


def patient(
    source: Anatomy, subject: Subject, contrasts: Sequence[str], heights: Tensor, image_size: int = 64
) -> dict[str, Tensor]:
    """Slices (slice, 1, y, x) at `heights` (MNI mm): each contrast in [0, 1], "labels", and "lesion", its share.

    `subject` decides everything, lesions, size and protocols included. Raises ValueError for unknown contrasts.
    """
    shape, voxel = (len(heights), image_size, image_size), anatomy.FIELD_OF_VIEW_MM / image_size
    images, maps, lesion = scanned(source, subject, contrasts, anatomy.grid_mm(shape, voxel, heights))
    found = {c: torch.from_numpy(scaled(x.numpy(), name=c)[0])[:, None].float() for c, x in images.items()}
    return found | {"labels": anatomy.labels_from_tissue(maps)[:, None], "lesion": lesion[:, None]}


def scanned(
    source: Anatomy, subject: Subject, contrasts: Sequence[str], points: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Magnitudes (z, y, x) of each contrast at points (z, y, x, 3) of MNI mm, with noise and on no common scale.

    Beside them the maps (4, z, y, x): shares of CSF, grey and white matter, texture; and the share of lesions.
    """
    rng = np.random.default_rng([subject.seed, 0x9A71E47])
    centre = torch.tensor(anatomy.CENTRE_MM)
    size = torch.from_numpy(np.exp(rng.normal(0, 0.04) + rng.normal(0, 0.025, 3)).clip(0.85, 1.15)).float()
    at = anatomy.warp(subject, (points - centre) / size + centre)
    at = at + _ventricles(at, rng)
    found = [] if rng.random() < HEALTHY else draw_lesions(source.at(at), points, rng)
    for lesion in found:
        at = at + _pushed(points, lesion, rng)
    maps = _atrophied(source.at(at), rng)
    shares = [lesion.weights(points) * maps[:3].sum(0) for lesion in found]
    whole = torch.stack([s.sum(0) for s in shares]).amax(0) if shares else torch.zeros(points.shape[:3])
    tissue = {
        k: [v * f for v, f in zip(p, np.exp(rng.normal(0, (0.02, 0.08, 0.08))), strict=True)]
        for k, p in anatomy.RELAXATION.items()
    }
    shading = (abs(rng.normal(0, 0.08)) * anatomy.smooth_field(points, subject.generator("bias"))).exp()
    images = {c: _contrast(c, maps, tissue, found, shares, rng) * shading for c in contrasts}
    return {c: torch.from_numpy(_noisy(x, rng)) for c, x in images.items()}, maps, whole


def patients(
    heads: str | Path | None,
    counts: Mapping[str, int],
    per_subject: int,
    contrasts: Sequence[str],
    image_size: int = 64,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Slices (subject, slice, 1, y, x) of so many people of each split, whose anatomies take turns; see `patient`."""
    found: dict[str, list[Tensor]] = {}
    for split, count in counts.items():
        known = anatomies(heads, split, anatomy.FIELD_OF_VIEW_MM / image_size)
        for i, subject in enumerate(tqdm(anatomy.cohort(split, count), desc=f"{split} patients", disable=not progress)):
            heights = anatomy.slice_heights(subject, per_subject)
            for name, x in patient(known[i % len(known)], subject, contrasts, heights, image_size).items():
                found.setdefault(name, []).append(x)
    return {name: torch.stack(stacks) for name, stacks in found.items()}


def tissue_slices(
    sources: Sequence[Anatomy], split: str, count: int, per_subject: int, image_size: int = 64, progress: bool = False
) -> Tensor:
    """What so many people of a split are made of, in no contrast: slices (subject * slice, 5, y, x).

    CSF, grey and white matter, lesions, whose shares add up to the brain's, and the texture. sources: anatomies
    low-passed for the smallest of `PIXELS_MM`, which take turns, as the sizes of pixels do; an image of small pixels
    shows a part of the brain, anywhere.
    """
    found: dict[int, Tensor] = {}
    for k, pixel in enumerate(PIXELS_MM):
        known = [_softened(source, PIXELS_MM[0], pixel) for source in sources]
        turn = list(enumerate(anatomy.cohort(split, count)))[k :: len(PIXELS_MM)]
        for j, (i, subject) in enumerate(tqdm(turn, desc=f"{pixel:g} mm", disable=not progress)):
            shape = (per_subject, image_size, image_size)
            points = anatomy.grid_mm(shape, pixel, anatomy.slice_heights(subject, per_subject))
            room = max(0.0, anatomy.FIELD_OF_VIEW_MM - image_size * pixel) / 2
            points[..., :2] += room * (2 * torch.rand(2, generator=subject.generator("place")) - 1)
            _, maps, lesion = scanned(known[j % len(known)], subject, (), points)
            covered = (lesion / maps[:3].sum(0).clamp(min=1e-3)).clamp(0, 1)
            parts = [*(maps[:3] * (1 - covered)), maps[:3].sum(0) * covered, maps[3]]
            found[i] = torch.stack(parts, 1)
    return torch.cat([found[i] for i in range(count)])


def _softened(source: Anatomy, from_mm: float, to_mm: float) -> Anatomy:
    """An anatomy low-passed for larger voxels than it is."""
    sigma = math.sqrt(to_mm**2 - from_mm**2) / 2.355 * source.to_voxel[:3, :3].det().abs().item() ** (1 / 3)
    maps = [torch.from_numpy(gaussian_filter(m.numpy(), sigma)) for m in source.maps] if sigma else source.maps
    return Anatomy(source.name, torch.stack(list(maps)), source.to_voxel)


def draw_lesions(maps: Tensor, points: Tensor, rng: np.random.Generator) -> list[Lesion]:
    """One mass of any kind and size, or a few white matter lesions, in the white matter (maps) of the points."""
    white = (maps[2] > 0.6).nonzero()
    if not len(white):
        return []
    many = rng.random() < 0.3
    found = []
    for _ in range(int(rng.integers(2, 9)) if many else 1):
        kind = "white matter lesion" if many else str(rng.choice(list(KINDS)))
        size = "small" if many else str(rng.choice(list(SIZES_MM)))
        z, y, x = white[int(rng.integers(len(white)))].tolist()
        away = rng.uniform(-0.5, 0.5, 3) * SIZES_MM[size][0]
        middle = tuple((points[z, y, x].numpy() + away).tolist())
        lesion = lesion_at(middle, kind, size, int(rng.integers(2**31)))
        parts = tuple((part[0], *_parameters(part[1:], rng)) for part in lesion.parts)
        found.append(Lesion(kind, size, lesion.centre_mm, lesion.radius_mm, lesion.stretch, parts, lesion.seed))
    return found


def _parameters(known: Sequence[float], rng: np.random.Generator) -> tuple[float, float, float]:
    """Density, T1 and T2 about the known ones, or, of one part in five, any at all."""
    if rng.random() < 0.2:
        low, high = np.log(UNKNOWN).T
        return tuple(np.exp(rng.uniform(low, high)).tolist())
    density, t1, t2 = np.asarray(known) * np.exp(rng.normal(0, (0.03, 0.15, 0.15)))
    return min(float(density), 1.0), float(t1), float(t2)


def _ventricles(at: Tensor, rng: np.random.Generator) -> Tensor:
    """Displacements (*space, 3), mm, that widen or narrow the lateral ventricles of either side by up to a half."""
    total = torch.zeros_like(at)
    both = rng.uniform(-0.15, 0.5) if rng.random() < 0.6 else 0.0
    for side in (-1, 1):
        middle = torch.tensor([side * 14.0, -18.0 + rng.normal(0, 6), 16.0 + rng.normal(0, 4)])
        away, radius = at - middle, rng.uniform(12, 24)
        strength = both + rng.normal(0, 0.06)
        total -= strength * away * torch.exp(-away.square().sum(-1, keepdim=True) / (2 * radius**2))
    return total


def _pushed(points: Tensor, lesion: Lesion, rng: np.random.Generator) -> Tensor:
    """Displacements (*space, 3), mm, by which a mass pushes tissue away, or a scar draws it near."""
    away = points - torch.tensor(lesion.centre_mm)
    strength = rng.uniform(0, 0.4) if lesion.kind in ("tumour", "haemorrhage") else rng.uniform(-0.1, 0.15)
    radius = 1.3 * lesion.radius_mm
    return -strength * away * torch.exp(-away.square().sum(-1, keepdim=True) / (2 * radius**2))


def _atrophied(maps: Tensor, rng: np.random.Generator) -> Tensor:
    """Maps (4, z, y, x) with more fluid, or less, beside fluid: sulci of the young and of the old."""
    amount = rng.uniform(-0.4, 0.7)
    near = F.avg_pool2d(maps[:1].transpose(0, 1), 3, 1, 1).transpose(0, 1)[0]
    brain = maps[:3].sum(0).clamp(min=1e-3)
    csf = (maps[0] + amount * near * (1 - maps[0] / brain)).clamp(min=0) if amount > 0 else maps[0] * (1 + amount)
    csf = torch.minimum(csf, brain)
    rest = (brain - csf) / (brain - maps[0]).clamp(min=1e-3)
    solid = maps[1:3] * rest.clamp(0, 3)
    return torch.cat([csf[None], solid, maps[3:]])


def draw_protocol(contrast: str, rng: np.random.Generator) -> dict[str, float]:
    """Settings of a contrast for `anatomy.signal`, of one of its kinds in `PROTOCOLS`."""
    if contrast not in PROTOCOLS:
        raise ValueError(f"unknown contrast {contrast!r}; use {', '.join(PROTOCOLS)}")
    kinds = PROTOCOLS[contrast]
    kind = kinds[0 if rng.random() < 0.75 else len(kinds) - 1]
    return {name: float(rng.uniform(*limits)) for name, limits in kind.items()}


def _contrast(
    contrast: str,
    maps: Tensor,
    tissue: Mapping[str, Sequence[float]],
    lesions: Sequence[Lesion],
    shares: Sequence[Tensor],
    rng: np.random.Generator,
) -> Tensor:
    """The signal (z, y, x) of tissue and lesions by a new protocol, before shading and noise."""
    protocol = draw_protocol(contrast, rng)
    level = torch.tensor([anatomy.signal(protocol, *tissue[name]) for name in anatomy.TISSUES], dtype=torch.float32)
    brain = maps[:3].sum(0)
    image = torch.tensordot(level, maps[:3], 1)
    for lesion, share in zip(lesions, shares, strict=True):
        values = torch.tensor([anatomy.signal(protocol, *part[1:]) for part in lesion.parts], dtype=torch.float32)
        covered = (share.sum(0) / brain.clamp(min=1e-3)).clamp(0, 1)
        image = image * (1 - covered) + torch.tensordot(values, share, 1)
    texture = maps[3].clamp(min=0.1) ** float(rng.normal(0, 0.7))
    return image * texture


def _noisy(image: Tensor, rng: np.random.Generator) -> np.ndarray:
    """The magnitude with another gamma and noise, relative to its bright tissue."""
    image = image / image.flatten().quantile(0.995).clamp(min=1e-6)
    image = image.clamp(min=0) ** math.exp(rng.normal(0, 0.08))
    std = 0.03 * rng.random() ** 2
    noise = torch.from_numpy(rng.normal(0, std, (2, *image.shape)).astype(np.float32))
    noise = noise * (image > 0.02)  # stripped
    return torch.hypot(image + noise[0], noise[1]).numpy()
