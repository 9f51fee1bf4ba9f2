"""Virtual patients: people of the cohort with a lesion, whose look in every contrast follows from tissue parameters.

A lesion has a proton density, T1 and T2 of its own, each drawn independently from the range of its kind (at 3 T, round
numbers from reviews: vasogenic oedema and glioma, Eis et al., JMRI 1995; chronic infarction is near fluid; white matter
lesions, MacKay et al., MRM 1994; blood products, Bradley, Radiology 1993). The signal equation of `anatomy` gives the
greys, so that no curve from one contrast to another holds for all lesions. There is no mass effect and no enhancement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.data import anatomy
from companion.data.intensity import scaled

# Kind -> its parts from outside in: how far each reaches in radii, and ranges of density, T1 and T2 (ms).
OEDEMA = ((0.86, 0.95), (1500, 2300), (130, 230))
Ranges = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
KINDS: dict[str, tuple[tuple[float, Ranges], ...]] = {
    "oedema": ((1.0, OEDEMA),),
    "tumour": ((1.5, OEDEMA), (1.0, ((0.82, 0.94), (1200, 2400), (90, 260)))),
    "cavity": ((1.0, ((0.94, 1.0), (2600, 4200), (500, 2000))),),
    "white matter lesion": ((1.0, ((0.78, 0.88), (1150, 1700), (115, 190))),),
    "haemorrhage": ((1.0, ((0.7, 0.9), (350, 800), (30, 220))),),
}
SIZES_MM = {"small": (4.0, 8.0), "medium": (8.0, 14.0), "large": (14.0, 24.0)}  # radii
RAGGED = 0.25  # of the radius, by which the border wanders


@dataclass(frozen=True)
class Lesion:
    """Where a lesion is (MNI mm), how large, and its parts from outside in: (reach in radii, density, T1, T2)."""

    kind: str
    size: str
    centre_mm: tuple[float, float, float]
    radius_mm: float
    stretch: tuple[float, float, float]
    parts: tuple[tuple[float, float, float, float], ...]
    seed: int

    def weights(self, points: Tensor) -> Tensor:
        """How much of each point (..., 3) of MNI mm each part fills, (part, ...), whether brain is there or not."""
        away = (points - torch.tensor(self.centre_mm)) / torch.tensor(self.stretch)
        generator = torch.Generator().manual_seed(self.seed)
        turns = torch.randn(6, 3, generator=generator) / (0.6 * self.radius_mm)
        phases = 2 * math.pi * torch.rand(6, generator=generator)
        border = torch.sin(points @ turns.T + phases).mean(-1) * RAGGED * 2
        far = away.norm(dim=-1) / self.radius_mm + border
        soft = 1.0 / self.radius_mm  # a border of about two millimetres
        covers = [torch.sigmoid((reach - far) / soft * 2) for reach, *_ in self.parts]
        inner = [*covers[1:], torch.zeros_like(far)]
        return torch.stack([(outer - later).clamp(min=0) for outer, later in zip(covers, inner, strict=True)])


def draw_lesion(subject: anatomy.Subject, kind: str, size: str = "medium", seed: int = 0) -> Lesion:
    """A lesion of a kind and size (`KINDS`, `SIZES_MM`) in this person's white matter, within the cohort's slab.

    Raises ValueError for unknown kinds and sizes.
    """
    _check_kind(kind, size)
    generator = torch.Generator().manual_seed((subject.seed * 7919 + 31 * seed + len(kind)) % 2**63)
    radius = _between(*SIZES_MM[size], generator)
    points = anatomy.grid_mm((14, 36, 36), 5.0, torch.linspace(-15, 45, 14))
    white = anatomy.tissue_maps(subject, points, 5.0)[2]
    off_middle = points[..., 0].abs() > min(12.0 + radius / 2, 28.0)  # the mirrored side is to be healthy
    at = ((white > 0.6) & off_middle).nonzero()
    z, y, x = at[int(torch.randint(len(at), (), generator=generator))].tolist()
    across, front, up = points[z, y, x].tolist()
    return _lesion(kind, size, (across, front, up), radius, generator, seed)


def lesion_at(centre_mm: tuple[float, float, float], kind: str, size: str = "medium", seed: int = 0) -> Lesion:
    """A lesion of a kind and size (`KINDS`, `SIZES_MM`) with its middle at a place (MNI mm). ValueError as above."""
    _check_kind(kind, size)
    generator = torch.Generator().manual_seed(seed)
    return _lesion(kind, size, centre_mm, _between(*SIZES_MM[size], generator), generator, seed)


def _check_kind(kind: str, size: str) -> None:
    if kind not in KINDS or size not in SIZES_MM:
        raise ValueError(f"unknown lesion {kind!r}, {size!r}; use {', '.join(KINDS)} and {', '.join(SIZES_MM)}")


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _lesion(
    kind: str,
    size: str,
    centre_mm: tuple[float, float, float],
    radius: float,
    generator: torch.Generator,
    seed: int,
) -> Lesion:
    parts = []
    for reach, ranges in KINDS[kind]:
        density, t1, t2 = (_between(*limits, generator) for limits in ranges)
        parts.append((reach, density, t1, t2))
    x, y, z = (math.exp(_between(-0.25, 0.25, generator)) for _ in range(3))
    return Lesion(kind, size, centre_mm, radius, (x, y, z), tuple(parts), seed)


def patient_slices(
    subject: anatomy.Subject,
    lesion: Lesion | None,
    contrasts: Sequence[str],
    heights: Tensor,
    image_size: int = 64,
) -> dict[str, Tensor]:
    """Slices (slice, 1, y, x) at `heights` (MNI mm): each contrast in [0, 1], "labels", and "lesion", its share.

    As `contrasts.cohort_slices` makes them, for one person; without a lesion the same person in health.
    """
    shape, voxel = (len(heights), image_size, image_size), anatomy.FIELD_OF_VIEW_MM / image_size
    points = anatomy.grid_mm(shape, voxel, heights)
    maps = anatomy.tissue_maps(subject, points, voxel)
    brain = maps[:3].sum(0)
    shares = lesion.weights(points) * brain if lesion else maps.new_zeros(0, *shape)
    whole = shares.sum(0)
    shading = (0.08 * anatomy.smooth_field(points, subject.generator("bias"))).exp()
    healthy = torch.cat([maps[:3] * (1 - whole / brain.clamp(min=1e-3)), maps[3:]])
    images = {}
    for contrast in contrasts:
        unit = max(anatomy.signal(contrast, *parameters) for parameters in subject.relaxation().values())
        image = anatomy.image_from_tissue(subject, healthy, contrast)
        for share, (_, *parameters) in zip(shares, lesion.parts if lesion else (), strict=True):
            image = image + share * maps[3] * anatomy.signal(contrast, *parameters) / unit
        images[contrast] = torch.from_numpy(scaled((image * shading).numpy(), name=contrast)[0])[:, None]
    return images | {"labels": anatomy.labels_from_tissue(maps)[:, None], "lesion": whole[:, None]}
