"""A virtual cohort of brains, drawn from the ICBM 152 maps that nilearn ships: no download, real anatomy.

Subject *i* is a seeded, mild, diffeomorphic warp of the template together with its own tissue parameters, phase and
bias field. Everything is defined in millimetres, so one subject is the same person at every matrix size.

Arrays are (z, y, x): z from inferior to superior, y from anterior (first row) to posterior, x from left to right, so
that `imshow` shows an axial slice with the nose up. `affine` says the same to NIfTI readers.

Sources
    maps: ICBM 152 nonlinear symmetric 2009a, Fonov et al., NeuroImage 2011 (licence: see data/README.md)
    warps: stationary velocity field by scaling and squaring, Arsigny et al., MICCAI 2006
    relaxation at 3 T: grey and white matter, Wansapura et al., JMRI 1999; T1 of CSF, Lin et al., JMRI 2001;
        T2 of CSF, Piechnik et al., MRM 2009; water content (proton density), Whittall et al., MRM 1997
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from companion.extras import extra

TISSUES = ("csf", "grey", "white")
LABELS = {"background": 0, "csf": 1, "grey": 2, "white": 3}

# (proton density relative to water, T1 in ms, T2 in ms) of CSF, grey and white matter at 3 T; sources above.
RELAXATION = {"csf": (1.00, 4163.0, 2000.0), "grey": (0.83, 1331.0, 110.0), "white": (0.71, 832.0, 79.6)}
RELAXATION_SPREAD = 0.04  # relative standard deviation between subjects of T1 and T2; a quarter of it for density

# Spin-echo and inversion-recovery settings of a clinical 3 T protocol, milliseconds.
SEQUENCES = {
    "T1w": {"repetition_ms": 2500.0, "echo_ms": 4.0, "inversion_ms": 1100.0},  # MPRAGE-like
    "T2w": {"repetition_ms": 5000.0, "echo_ms": 100.0},
    "PDw": {"repetition_ms": 3000.0, "echo_ms": 15.0},
    "FLAIR": {"repetition_ms": 9000.0, "echo_ms": 120.0, "inversion_ms": 2500.0},
}

FIELD_OF_VIEW_MM = 208.0  # the template is 181 mm long; leaves room for the largest warps
CENTRE_MM = (0.0, -17.0, 5.0)  # MNI (x, y, z) of the middle of the template's brain
SLAB_MM = (-30.0, 50.0)  # axial range (MNI z) that 2-D data sets cut: cerebellum top to vertex
WARP_MM = (1.6, 0.9, 0.45)  # velocity amplitude on the control grids below: more looks like crumpled paper
WARP_GRID = (4, 8, 14)
AFFINE_SPREAD = 0.03
PHASE_RAD = 0.6  # standard deviation of the smooth image phase, on top of a uniformly random constant
PHASE_GRID = 4  # control points of the phase and bias fields along each axis of the field of view
FIRST_SEED = {"train": 0, "validation": 1_000_000, "test": 2_000_000}  # whose people never overlap


def signal(contrast: str | Mapping[str, float], density: float, t1_ms: float, t2_ms: float) -> float:
    """Return the signal of a spin echo, or of inversion recovery with spin-echo readout, relative to pure water.

    S = density |1 - 2 exp(-TI/T1) + exp(-TR/T1)| exp(-TE/T2), without the TI term for a plain spin echo.
    contrast: one of `SEQUENCES`, or settings as they have them.
    """
    if isinstance(contrast, str) and contrast not in SEQUENCES:
        raise ValueError(f"unknown contrast {contrast!r}; expected one of {', '.join(SEQUENCES)}")
    sequence = SEQUENCES[contrast] if isinstance(contrast, str) else contrast
    recovery = math.exp(-sequence["repetition_ms"] / t1_ms)
    if "inversion_ms" in sequence:
        longitudinal = abs(1 - 2 * math.exp(-sequence["inversion_ms"] / t1_ms) + recovery)
    else:
        longitudinal = 1 - recovery
    return density * longitudinal * math.exp(-sequence["echo_ms"] / t2_ms)


@dataclass(frozen=True)
class Subject:
    """One virtual person; `seed` decides everything about them."""

    seed: int

    def generator(self, purpose: str) -> torch.Generator:
        """Return an independent random stream for one purpose, so that new purposes never disturb old ones."""
        word = int.from_bytes(purpose.encode()[:4].ljust(4, b"\0"), "little")
        return torch.Generator().manual_seed((self.seed * 0x9E3779B1 + word) % 2**63)

    def relaxation(self) -> dict[str, tuple[float, float, float]]:
        """Return this subject's (proton density, T1 ms, T2 ms) of each tissue."""
        draws = torch.randn(len(TISSUES), 3, generator=self.generator("relax")).clamp(-2, 2)
        spread = torch.tensor([RELAXATION_SPREAD / 4, RELAXATION_SPREAD, RELAXATION_SPREAD])
        factors = (draws * spread).exp().tolist()
        return {
            k: tuple(v * f for v, f in zip(RELAXATION[k], row, strict=True))
            for k, row in zip(TISSUES, factors, strict=True)
        }


def cohort(split: str, count: int) -> list[Subject]:
    """Return the first `count` subjects of a split ("train", "validation" or "test"); splits share nobody."""
    if split not in FIRST_SEED:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(FIRST_SEED)}")
    if not 0 < count <= 1_000_000:
        raise ValueError(f"count must lie between 1 and 1,000,000 subjects, got {count}")
    return [Subject(FIRST_SEED[split] + i) for i in range(count)]


def grid_mm(shape: Sequence[int], voxel_mm: float, slices_mm: Tensor | None = None) -> Tensor:
    """Return the MNI coordinates (z, y, x, 3), last axis (x, y, z) in mm, of the voxel centres of an array.

    `slices_mm` replaces the regular z positions by MNI heights, for data sets of single slices.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be (z, y, x) with positive sizes, got {shape}")
    if not voxel_mm > 0:
        raise ValueError(f"voxel_mm must be positive, got {voxel_mm}")
    centred = [(torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * voxel_mm for n in shape]
    z = centred[0] + CENTRE_MM[2] if slices_mm is None else slices_mm.to(torch.float32)
    y = CENTRE_MM[1] - centred[1]  # rows run from anterior to posterior
    x = centred[2] + CENTRE_MM[0]
    zz, yy, xx = torch.meshgrid(z, y, x, indexing="ij")
    return torch.stack([xx, yy, zz], -1)


def affine(shape: tuple[int, int, int], voxel_mm: float) -> np.ndarray:
    """Return the 4x4 matrix from voxel indices (x, y, z) of a (z, y, x) array to MNI millimetres."""
    depth, height, width = shape
    matrix = np.diag([voxel_mm, -voxel_mm, voxel_mm, 1.0])
    half = np.array([(width - 1) / 2, -(height - 1) / 2, (depth - 1) / 2]) * voxel_mm
    matrix[:3, 3] = np.array(CENTRE_MM) - half
    return matrix


def template(voxel_mm: float) -> tuple[Tensor, Tensor]:
    """Return the template's maps as `tissue_maps` samples them, (4, z, y, x), and the matrix from MNI mm to voxels."""
    return _template(round(float(voxel_mm), 3))


def tissue_maps(subject: Subject | None, points_mm: Tensor, voxel_mm: float) -> Tensor:
    """Return CSF, grey and white matter fractions and the template's texture at the points: (4, z, y, x).

    The maps are low-passed to the voxel size first (no aliasing). `subject=None` gives the template itself.
    """
    maps, to_voxel = template(voxel_mm)
    return sampled(maps, to_voxel, points_mm if subject is None else warp(subject, points_mm))


def sampled(maps: Tensor, to_voxel: Tensor, points_mm: Tensor) -> Tensor:
    """Return maps (map, z, y, x) at points (*space, 3) of MNI mm, (map, *space); 0 outside."""
    voxels = points_mm @ to_voxel[:3, :3].T + to_voxel[:3, 3]
    size = torch.tensor(maps.shape[:0:-1], dtype=torch.float32)  # (x, y, z)
    unit = 2 * voxels / (size - 1) - 1
    return F.grid_sample(maps[None], unit[None], align_corners=True)[0]


def warp(subject: Subject, points_mm: Tensor) -> Tensor:
    """Return where a subject's points lie in the template, mm: random affine, then a diffeomorphism."""
    draws = torch.randn(3, 3, generator=subject.generator("affine")).clamp(-2, 2)
    size = torch.diag(draws.diagonal())
    matrix = torch.eye(3) + AFFINE_SPREAD * size + AFFINE_SPREAD / 3 * (draws - size)
    centre = torch.tensor(CENTRE_MM)
    points = (points_mm - centre) @ matrix.T
    field = _displacement_mm(subject)
    unit = points / (FIELD_OF_VIEW_MM / 2)
    moved = F.grid_sample(field[None], unit[None], padding_mode="border", align_corners=True)[0]
    return points + moved.movedim(0, -1) + centre


def _displacement_mm(subject: Subject, n: int = 40) -> Tensor:
    """Return the displacement (3, n, n, n) on the field-of-view cube: exp of a smooth stationary velocity field."""
    generator = subject.generator("warp")
    velocity = torch.zeros(1, 3, n, n, n)
    for control, amplitude in zip(WARP_GRID, WARP_MM, strict=True):
        noise = torch.randn(1, 3, control, control, control, generator=generator)
        velocity += amplitude * _upsample(noise, (n, n, n))
    line = torch.linspace(-1, 1, n)
    identity = torch.stack(torch.meshgrid(line, line, line, indexing="ij")[::-1], -1)[None]
    half = FIELD_OF_VIEW_MM / 2
    squarings = 4
    displacement = velocity / 2**squarings
    for _ in range(squarings):
        at = identity + displacement.movedim(1, -1) / half
        displacement = displacement + F.grid_sample(displacement, at, padding_mode="border", align_corners=True)
    return displacement[0]


def _upsample(noise: Tensor, shape: tuple[int, ...], keep: slice = slice(None)) -> Tensor:
    """Return control values (batch, channel, *small) interpolated smoothly (cubic B-spline) to `shape`, unit gain.

    keep: the part of the first axis that is wanted.
    """
    for axis, n in enumerate(shape, start=2):
        position = torch.linspace(0, noise.shape[axis] - 1, n, device=noise.device)
        index = torch.arange(noise.shape[axis], device=noise.device)
        distance = (position[:, None] - index).abs()
        weight = torch.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clamp(min=0) ** 3 / 6)
        weight = weight / weight.pow(2).sum(1, keepdim=True).sqrt()  # keeps unit variance everywhere
        weight = weight[keep] if axis == 2 else weight
        noise = torch.movedim(torch.tensordot(weight, noise.movedim(axis, 0), 1), 0, axis)
    return noise


@lru_cache(maxsize=4)
def _template(voxel_mm: float) -> tuple[Tensor, Tensor]:
    """Return (csf, grey, white, texture) of the template, blurred to a voxel size, and the matrix MNI mm -> voxel."""
    with extra("notebooks"):
        from nilearn import datasets
    from scipy.ndimage import binary_fill_holes, gaussian_filter

    images: list[Any] = [
        load(resolution=1)
        for load in (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    ]
    t1, grey, white = (np.asarray(image.dataobj, np.float32).transpose(2, 1, 0) for image in images)
    mask = t1 > 0.05
    mask = np.stack([np.asarray(binary_fill_holes(slice_)) for slice_ in mask]).astype(np.float32)
    grey, white = grey * mask, white * mask
    excess = np.maximum(grey + white, 1)
    grey, white = grey / excess, white / excess
    fractions = np.stack([mask - grey - white, grey, white])
    inside = mask > 0
    levels = np.linalg.lstsq(fractions[:, inside].T, t1[inside], rcond=None)[0]
    # What the three tissues do not explain of the real T1w template (deep nuclei, brain stem) modulates the density.
    expected = np.tensordot(levels, fractions, 1)
    texture = np.where(inside, np.clip(t1 / np.maximum(expected, 0.05), 0.8, 1.2), 1.0)
    sigma = voxel_mm / 2.355 if voxel_mm > 1 else 0.0  # Gaussian of FWHM one voxel
    maps = np.stack([gaussian_filter(m, sigma) if sigma else m for m in [*fractions, texture]]).astype(np.float32)
    to_voxel = torch.from_numpy(np.linalg.inv(images[0].affine).astype(np.float32))
    return torch.from_numpy(maps), to_voxel


def image_from_tissue(subject: Subject, maps: Tensor, contrast: str) -> Tensor:
    """Return the real signal (z, y, x) of tissue maps (4, z, y, x); 1 is the brightest pure tissue of the subject."""
    values = {tissue: signal(contrast, *parameters) for tissue, parameters in subject.relaxation().items()}
    brightest = max(values.values())
    weights = torch.tensor([values[tissue] / brightest for tissue in TISSUES])
    return torch.tensordot(weights, maps[:3], 1) * maps[3]


def labels_from_tissue(maps: Tensor) -> Tensor:
    """Return the label map (z, y, x), uint8: 0 where the brain fills less than half the voxel, else `LABELS`."""
    brain = maps[:3].sum(0) > 0.5
    return torch.where(brain, maps[:3].argmax(0) + 1, 0).to(torch.uint8)


def smooth_field(points: Tensor, generator: torch.Generator) -> Tensor:
    """Return a smooth Gaussian random field (z, y, x) of unit variance at points (z, y, x, 3) of MNI mm."""
    noise = torch.randn((1, 1) + (PHASE_GRID,) * 3, generator=generator)
    field = _upsample(noise, (32, 32, 32))
    unit = (points - torch.tensor(CENTRE_MM)) / (FIELD_OF_VIEW_MM / 2)
    return F.grid_sample(field, unit[None], padding_mode="border", align_corners=True)[0, 0]


def random_phase(magnitude: Tensor, generator: torch.Generator) -> Tensor:
    """Return complex images (batch, 1, y, x) that fill the field of view, each with a new phase like `render`'s."""
    batch = magnitude.shape[0]
    noise = torch.randn(batch, 1, PHASE_GRID, PHASE_GRID, generator=generator, device=generator.device)
    constant = 2 * math.pi * torch.rand(batch, 1, 1, 1, generator=generator, device=generator.device)
    phase = constant + PHASE_RAD * _upsample(noise, tuple(magnitude.shape[2:]))
    return torch.polar(magnitude, phase.to(magnitude.device))


def random_sequence_phase(magnitude: Tensor, spacing_mm: float, generator: torch.Generator) -> Tensor:
    """Return complex sequences (batch, frame, 1, y, x) that fill the field of view, each with a new phase.

    The phase follows the law of `render`: smooth along all three axes, so that neighbours, `spacing_mm` apart (of any
    distance that makes a cine's phase drift as it should), resemble each other.
    """
    batch, frames, _, *space = magnitude.shape
    levels = max(frames, math.ceil(FIELD_OF_VIEW_MM / spacing_mm))
    noise = torch.randn(batch, 1, *(PHASE_GRID,) * 3, generator=generator, device=generator.device)
    constant = 2 * math.pi * torch.rand(batch, 1, 1, 1, 1, generator=generator, device=generator.device)
    first = int(torch.randint(levels - frames + 1, (), generator=generator, device=generator.device))
    field = _upsample(noise, (levels, *space), keep=slice(first, first + frames))
    return torch.polar(magnitude, (constant + PHASE_RAD * field.transpose(1, 2)).to(magnitude.device))


@dataclass(frozen=True)
class Rendered:
    """One subject on a grid: `image` complex64, `labels` uint8, `tissue` float32 (csf, grey, white); (.., z, y, x)."""

    image: Tensor
    labels: Tensor
    tissue: Tensor
    affine: np.ndarray


def render(
    subject: Subject,
    contrast: str = "T1w",
    shape: tuple[int, int, int] = (64, 64, 64),
    voxel_mm: float | None = None,
    slices_mm: Tensor | None = None,
    *,
    phase_rad: float = PHASE_RAD,
    bias: float = 0.08,
) -> Rendered:
    """Return a complex image of a subject with the labels it came from.

    shape      (z, y, x), any sizes; `voxel_mm` defaults to filling the field of view with the larger of y and x
    slices_mm  MNI heights of the z slices, for single-slice data sets (then the affine only describes y and x)
    phase_rad  standard deviation of the smooth phase, on top of one uniformly random constant
    bias       relative standard deviation of the smooth receive bias
    Magnitudes are relative to the brightest pure tissue of the subject. Noise belongs to the measurement, not here.
    """
    voxel_mm = FIELD_OF_VIEW_MM / max(shape[1:]) if voxel_mm is None else voxel_mm
    if slices_mm is not None and len(slices_mm) != shape[0]:
        raise ValueError(f"shape asks for {shape[0]} slices but slices_mm has {len(slices_mm)}; make them agree")
    points = grid_mm(shape, voxel_mm, slices_mm)
    maps = tissue_maps(subject, points, voxel_mm)
    magnitude = image_from_tissue(subject, maps, contrast)
    magnitude = magnitude * (bias * smooth_field(points, subject.generator("bias"))).exp()
    generator = subject.generator("phase")
    constant = 2 * math.pi * torch.rand((), generator=generator)
    phase = constant + phase_rad * smooth_field(points, generator)
    return Rendered(torch.polar(magnitude, phase), labels_from_tissue(maps), maps[:3], affine(shape, voxel_mm))


def slice_heights(subject: Subject, count: int) -> Tensor:
    """Return `count` seeded axial heights (MNI mm), one in each of `count` equal parts of the slab `SLAB_MM`."""
    low, high = SLAB_MM
    jitter = torch.rand(count, generator=subject.generator("slices"))
    return low + (high - low) * (torch.arange(count) + jitter) / count
