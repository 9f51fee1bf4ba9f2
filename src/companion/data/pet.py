"""Activity to scan: an FDG-like cohort of virtual people, and loaders for BrainWeb and NIfTI activity maps.

Subject i of `data.anatomy` gets a tracer uptake of their own: grey to white matter about 4 to 1, little in CSF, smooth
regional differences, and lesions of known place and contrast if asked for. Activity is in kBq/mL everywhere, the
attenuation coefficient at 511 keV in 1/mm; arrays are (z, y, x) like there. How many counts a scan of it has is not
decided here: see `operators.pet.with_counts`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from companion.data import anatomy
from companion.data.anatomy import FIELD_OF_VIEW_MM, SLAB_MM, TISSUES, Subject, grid_mm
from companion.data.intake import others, streams
from companion.data.intake.records import Unreadable
from companion.data.nifti import Volume, centred_affine, load_nifti
from companion.data.npz import read_npz
from companion.data.slicing import turned

# FDG 45 minutes after injection, about 200 MBq in 70 kg: kBq/mL.
UPTAKE = {"csf": 1.0, "grey": 22.0, "white": 5.5}
UPTAKE_SPREAD = {"all": 0.15, "tissue": 0.08, "regional": 0.08}  # relative standard deviations: person, tissue, place
LESION_RADIUS_MM = (5.0, 10.0)
LESION_CONTRAST = (1.5, 2.5)  # times the subject's grey matter
MU_WATER, MU_SKULL = 0.0096, 0.0151  # 1/mm at 511 keV
SKULL_MM, SKIN_MM = (3.0, 9.0), 12.0  # outside the brain's surface

# Classes of the BrainWeb anatomical models, in the order of their labels, and what they mean here.
BRAINWEB = (
    "background",
    "csf",
    "grey",
    "white",
    "fat",
    "muscle",
    "skin",
    "skull",
    "vessels",
    "around fat",
    "dura",
    "marrow",
)
BRAINWEB_SHAPE, BRAINWEB_MM = others.BRAINWEB_SHAPE, others.BRAINWEB_MM
BRAINWEB_UPTAKE = UPTAKE | {"skin": 2.75, "muscle": 2.75, "vessels": 4.0, "fat": 1.0, "around fat": 1.0, "marrow": 2.0}
ACTIVITY_UNITS = {"kBq/mL": 1.0, "Bq/mL": 1e-3, "MBq/mL": 1e3, "SUV": None, "relative": 1.0}  # kBq/mL of one
LEAST_KBQ, MOST_KBQ = 0.1, 5000.0  # of the hottest voxel: a 200th of grey matter, and 200 times as much as it has
ROUNDING = 1e-4  # of the hottest voxel, by which stored and resampled activity may lie below 0
PHANTOM_SLICES = 281  # of each subject in the published file


@dataclass(frozen=True)
class Lesion:
    """A sphere: centre in MNI mm (x, y, z), radius, and activity as a multiple of the subject's grey matter."""

    position_mm: tuple[float, float, float]
    radius_mm: float
    contrast: float


@dataclass(frozen=True)
class Activity:
    """One subject on a grid, (z, y, x): `image` in kBq/mL and what it was made from, where that is known.

    labels: 0 background, then `anatomy.LABELS`. lesions: 0, or the number of the lesion from 1. mu: 1/mm.
    """

    image: Tensor
    pixel_mm: float
    affine: np.ndarray
    labels: Tensor | None = None
    lesions: Tensor | None = None
    mu: Tensor | None = None

    def slices(self, name: str = "image") -> Tensor:
        """The array `name` as a batch of slices (z, 1, y, x)."""
        array = getattr(self, name)
        if array is None:
            raise ValueError(f"this activity map has no {name}; it came without")
        return array[:, None]


@dataclass(frozen=True)
class Slices:
    """Slices of many subjects, (slice, 1, y, x): `image` in kBq/mL, `labels`, `lesions`, `mu` as in `Activity`.

    subject (slice,) the subject's seed, height_mm (slice,) its MNI height.
    """

    image: Tensor
    labels: Tensor
    lesions: Tensor
    mu: Tensor
    subject: Tensor
    height_mm: Tensor
    pixel_mm: float


# ------------------------------------------------------------------------------------------------- virtual people
def uptake(subject: Subject) -> dict[str, float]:
    """This subject's activity in each pure tissue, kBq/mL."""
    draws = torch.randn(1 + len(TISSUES), generator=subject.generator("uptake")).clamp(-2, 2).tolist()
    person = UPTAKE_SPREAD["all"] * draws[0]
    return {
        tissue: UPTAKE[tissue] * math.exp(person + UPTAKE_SPREAD["tissue"] * draw)
        for tissue, draw in zip(TISSUES, draws[1:], strict=True)
    }


def place_lesions(subject: Subject, count: int, slices_mm: Tensor | None = None) -> list[Lesion]:
    """`count` seeded lesions inside the brain, apart from each other, fewer where they do not fit.

    slices_mm: MNI heights; the centres then lie in these slices. By default anywhere in `anatomy.SLAB_MM`.
    """
    heights = torch.arange(SLAB_MM[0], SLAB_MM[1] + 1, 4.0) if slices_mm is None else slices_mm
    generator = subject.generator("lesions")
    coarse = 4.0
    side = round(FIELD_OF_VIEW_MM / coarse)
    points = grid_mm((len(heights), side, side), coarse, heights)
    brain = anatomy.tissue_maps(subject, points, coarse)[:3].sum(0) > 0.9
    depth = torch.from_numpy(np.stack([_depth(plane, coarse) for plane in brain.numpy()]))
    lesions: list[Lesion] = []
    for _ in range(50 * count):
        if len(lesions) == count:
            break
        size, strength = torch.rand(2, generator=generator).tolist()
        radius = LESION_RADIUS_MM[0] + size * (LESION_RADIUS_MM[1] - LESION_RADIUS_MM[0])
        fits = torch.nonzero(depth > radius)
        if not len(fits):
            continue
        at = fits[int(torch.randint(len(fits), (), generator=generator))]
        position = tuple(points[tuple(at)].tolist())
        if all(math.dist(position, other.position_mm) > radius + other.radius_mm + 8 for other in lesions):
            contrast = LESION_CONTRAST[0] + strength * (LESION_CONTRAST[1] - LESION_CONTRAST[0])
            lesions.append(Lesion(position, radius, contrast))
    return lesions


def render(
    subject: Subject,
    shape: tuple[int, int, int] = (64, 64, 64),
    pixel_mm: float | None = None,
    slices_mm: Tensor | None = None,
    lesions: Sequence[Lesion] = (),
) -> Activity:
    """The activity of a subject on a grid (z, y, x), with labels, lesions and attenuation.

    pixel_mm: by default the field of view filled by the larger of y and x. slices_mm: MNI heights of single slices
    (then the affine only describes y and x). Every voxel holds the mean over itself, so edges have partial volume.
    """
    pixel_mm = FIELD_OF_VIEW_MM / max(shape[1:]) if pixel_mm is None else pixel_mm
    if slices_mm is not None and len(slices_mm) != shape[0]:
        raise ValueError(f"shape asks for {shape[0]} slices but slices_mm has {len(slices_mm)}; make them agree")
    points = grid_mm(shape, pixel_mm, slices_mm)
    tissue = anatomy.tissue_maps(subject, points, pixel_mm)[:3].clamp(min=0)
    values = uptake(subject)
    regional = UPTAKE_SPREAD["regional"] * anatomy.smooth_field(points, subject.generator("regional"))
    image = torch.tensordot(torch.tensor([values[name] for name in TISSUES]), tissue, 1) * regional.exp()
    numbers = torch.zeros(shape, dtype=torch.uint8)
    for number, lesion in enumerate(lesions, start=1):
        distance = (points - torch.tensor(lesion.position_mm)).norm(dim=-1)
        share = ((lesion.radius_mm - distance) / pixel_mm + 0.5).clamp(0, 1)
        image = torch.lerp(image, torch.full_like(image, lesion.contrast * values["grey"]), share)
        numbers[share > 0.5] = number
    mu = _attenuation(tissue.sum(0) > 0.5, pixel_mm)
    return Activity(image, pixel_mm, anatomy.affine(shape, pixel_mm), anatomy.labels_from_tissue(tissue), numbers, mu)


def _depth(inside: np.ndarray, pixel_mm: float) -> np.ndarray:
    """How far each pixel is from the outside, mm."""
    return np.asarray(distance_transform_edt(inside, sampling=pixel_mm))


def _attenuation(brain: Tensor, pixel_mm: float) -> Tensor:
    """Brain and skin as water, and a skull around each slice of the brain."""
    away = torch.from_numpy(
        np.stack([_depth(~plane, pixel_mm) if plane.any() else np.full(plane.shape, np.inf) for plane in brain.numpy()])
    ).to(torch.float32)
    skull = (away > SKULL_MM[0]) & (away <= SKULL_MM[1])
    return torch.where(skull, MU_SKULL, torch.where(away <= SKIN_MM, MU_WATER, 0.0))


def cohort_slices(
    split: str,
    subjects: int,
    size: int = 64,
    per_subject: int = 8,
    lesions: int = 0,
    pixel_mm: float | None = None,
    lesion_share: float = 1.0,
    first: int = 0,
) -> Slices:
    """`per_subject` axial slices of each of `subjects` people of a split ("train", "validation", "test").

    lesions: how many each person has, centred in some of the slices; lesion_share: the share of people who have any.
    pixel_mm: by default `anatomy.FIELD_OF_VIEW_MM` / size. first: how many people of the split to leave out before.
    No slice is empty: they lie in `anatomy.SLAB_MM`.
    """
    pixel_mm = FIELD_OF_VIEW_MM / size if pixel_mm is None else pixel_mm
    parts = []
    for subject in anatomy.cohort(split, first + subjects)[first:]:
        heights = anatomy.slice_heights(subject, per_subject)
        ill = lesions and torch.rand((), generator=subject.generator("ill")) < lesion_share
        found = place_lesions(subject, lesions, heights) if ill else []
        one = render(subject, (per_subject, size, size), pixel_mm, heights, found)
        parts.append(
            (
                one.slices(),
                one.slices("labels"),
                one.slices("lesions"),
                one.slices("mu"),
                torch.full((per_subject,), subject.seed),
                heights,
            )
        )
    return Slices(*(torch.cat(column) for column in zip(*parts, strict=True)), pixel_mm=pixel_mm)


def tissue_shares(people: Slices) -> Tensor:
    """The share of CSF, grey and white matter in each pixel, (slice, tissue, 1, y, x): what a segmented MR scan gives.

    Of virtual people only: lesions are not in it, as they are in no anatomical scan.
    """
    shape = (1, *people.image.shape[-2:])
    maps = [
        anatomy.tissue_maps(Subject(int(seed)), grid_mm(shape, people.pixel_mm, height[None]), people.pixel_mm)
        for seed, height in zip(people.subject, people.height_mm, strict=True)
    ]
    return torch.stack([one[:3].clamp(min=0) for one in maps])


# -------------------------------------------------------------------------------------------------------- loaders
def load_phantoms(path: str | os.PathLike, slices: int = PHANTOM_SLICES, order: str = "lexicographic") -> Tensor:
    """The published phantoms, (subject, slice, 1, y, x) float32, slices in anatomical order.

    The file holds `phantoms` (subjects * slices, pixels), rows as their files sort by name: slice 0, 1, 10, 100, ...
    Values are small relative activities (0 to 12, no units), each slice with a contrast of its own. order: "numeric"
    for a file whose rows are in anatomical order already; which of the two is checked, since neighbouring slices
    resemble each other. Raises ValueError for a file of another kind.
    """
    path = Path(path)
    rows = _phantom_rows(path)
    side = math.isqrt(rows.shape[1])
    if side**2 != rows.shape[1] or len(rows) % slices:
        raise ValueError(
            f"{path}: phantoms of shape {rows.shape}; expected (subjects * {slices}, side * side), so square images "
            f"and {slices} slices each; give slices=..."
        )
    if order not in ("lexicographic", "numeric"):
        raise ValueError(f"order {order!r} is unknown; use 'lexicographic' (as published) or 'numeric'")
    stored = torch.from_numpy(rows.astype(np.float32)).reshape(-1, slices, 1, side, side)
    place = torch.tensor(sorted(range(slices), key=str))
    sorted_back = torch.empty_like(stored)
    sorted_back[:, place] = stored
    steps = {"lexicographic": _roughness(sorted_back), "numeric": _roughness(stored)}
    if slices > 10 and steps[order] > min(steps.values()):
        other = next(name for name in steps if name != order)
        raise ValueError(
            f"{path}: the rows are not in {order} order: neighbouring slices would differ by {steps[order]:.3g} on "
            f"average, in {other} order by {steps[other]:.3g}; give order={other!r}, or slices=... if not {slices}"
        )
    return sorted_back if order == "lexicographic" else stored


def _phantom_rows(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    arrays = read_npz(path)
    if "phantoms" not in arrays:
        raise ValueError(f"{path}: holds {', '.join(arrays) or 'nothing'} but not 'phantoms': a foreign file")
    rows = arrays["phantoms"]
    if rows.ndim != 2 or rows.dtype.kind not in "uif" or not len(rows):
        raise ValueError(f"{path}: phantoms of shape {rows.shape}, {rows.dtype}; expected numbers (slice, pixel)")
    return _check_activity(rows, path)


def _roughness(volumes: Tensor) -> float:
    return (volumes[:, 1:] - volumes[:, :-1]).abs().mean().item()


def load_brainweb(path: str | os.PathLike) -> Volume:
    """Labels of a BrainWeb anatomical model, uint8 (z, y, x), numbered as `BRAINWEB`, anterior rows first.

    Discrete volumes: MINC (.mnc, .mnc.gz) or raw shorts or bytes (.raws, .rawb, .bin, with or without .gz) of the 20
    normal models, 362 x 434 x 362 at 0.5 mm. Raises ValueError for fuzzy models, other shapes or unknown labels.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; download it from brainweb.bic.mni.mcgill.ca")
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".mnc"):
        volume = others.read_minc((path,))
    elif name.endswith((".raws", ".rawb", ".bin")):
        if reason := streams.instead(path, zeros=True):
            raise Unreadable(path, reason)
        volume = others.read_brainweb((path,))
    else:
        raise ValueError(f"{path.name}: expected .mnc, .raws, .rawb or .bin, with or without .gz")
    values, affine = volume.array, volume.affine
    labels = np.rint(values)
    if np.abs(values - labels).max() > 1e-3:
        raise ValueError(f"{path}: values between the labels, so a fuzzy model; use the discrete ('crisp') one")
    if labels.max() >= len(BRAINWEB):  # raw shorts hold 16 times the label, and sometimes lower bits
        labels = labels // 16
    if labels.min() < 0 or labels.max() >= len(BRAINWEB) or labels.max() < 3:
        raise ValueError(f"{path}: labels {labels.min():g} to {labels.max():g}; expected 0 to {len(BRAINWEB) - 1}")
    return turned(Volume(labels.astype(np.uint8), affine), "axial")


def activity_from_labels(volume: Volume, size: int = 64, values: dict[str, float] = BRAINWEB_UPTAKE) -> Activity:
    """FDG activity and attenuation of a BrainWeb model, averaged to cubic voxels, `size` along the longer of y and x.

    values: kBq/mL of each class of `BRAINWEB`, 0 if not named.
    """
    labels = torch.from_numpy(np.asarray(volume.array)).long()
    step = volume.voxel_mm
    if max(step) > 1.001 * min(step):
        raise ValueError(f"voxels of {step} mm are not cubes; resample the labels first")
    side = max(labels.shape[1:])
    pixel_mm = step[0] * side / size
    depth = max(1, round(labels.shape[0] * step[0] / pixel_mm))

    def averaged(of_label: Sequence[float]) -> Tensor:
        full = torch.tensor(of_label, dtype=torch.float32)[labels]
        pad = [v for n in (labels.shape[2], labels.shape[1]) for v in ((side - n) // 2, side - n - (side - n) // 2)]
        return F.interpolate(F.pad(full, pad)[None, None], (depth, size, size), mode="area")[0, 0]

    bone = ("skull", "marrow", "dura")
    mu = averaged([0.0, *(MU_SKULL if name in bone else MU_WATER for name in BRAINWEB[1:])])
    tissue = torch.stack([averaged([float(name == wanted) for name in BRAINWEB]) for wanted in TISSUES])
    image = averaged([values.get(name, 0.0) for name in BRAINWEB])
    affine = centred_affine((depth, size, size), pixel_mm)
    return Activity(image, pixel_mm, affine, anatomy.labels_from_tissue(tissue), torch.zeros_like(image).byte(), mu)


def load_activity(
    path: str | os.PathLike, units: str, frame: int | None = None, kbq_per_suv: float | None = None
) -> Activity:
    """The activity map of a NIfTI file, (z, y, x), upright and in kBq/mL; only the image, without labels.

    units: those of the file, "kBq/mL", "Bq/mL", "MBq/mL", "SUV" (with kbq_per_suv, the kBq/mL that are 1: injected dose
    at the time of the scan over body weight, MBq/kg), or "relative" (kept as they are). frame: of a dynamic scan.
    Raises ValueError for negative activity, for more than any tissue takes up, and for pixels that are not square.
    """
    _kbq(path, units, kbq_per_suv)
    return activity_from_volume(load_nifti(path, frame=frame), units, path, kbq_per_suv)


def _kbq(name: str | os.PathLike, units: str, kbq_per_suv: float | None) -> float:
    """The kBq/mL that are 1 in units; ValueError where that is not known."""
    if units not in ACTIVITY_UNITS:
        stated = f"units {units!r} are no activity" if units else "its units are not said, and are not guessed"
        raise ValueError(f"{name}: {stated}; give units, one of {', '.join(ACTIVITY_UNITS)}")
    if units != "SUV":
        return ACTIVITY_UNITS[units]
    if not (kbq_per_suv and kbq_per_suv > 0):
        raise ValueError(
            f"{name}: SUV become kBq/mL by the injected dose at the time of the scan over body weight; give it "
            "as kbq_per_suv, in MBq/kg"
        )
    return kbq_per_suv


def activity_from_volume(
    volume: Volume, units: str, name: str | os.PathLike = "the volume", kbq_per_suv: float | None = None
) -> Activity:
    """The activity of a volume that was read, units and kbq_per_suv as for `load_activity`, which see."""
    if np.iscomplexobj(volume.array):
        raise ValueError(f"{name}: complex values are no activity; give the PET image")
    factor, volume = _kbq(name, units, kbq_per_suv), turned(volume, "axial")
    array = volume.array.astype(np.float32) * np.float32(factor)
    array = _check_activity(array, Path(name))
    _, y, x = volume.voxel_mm
    if abs(y - x) > 1e-3 * x:
        raise ValueError(f"{name}: pixels of {y:.4g} x {x:.4g} mm are not square; resample to square pixels first")
    if units != "relative" and not LEAST_KBQ <= array.max() <= MOST_KBQ:
        off = "more than any tissue takes up" if array.max() > MOST_KBQ else "less than a scan of a person shows"
        also = " and kbq_per_suv" if units == "SUV" else ""
        raise ValueError(
            f"{name}: up to {array.max():.4g} kBq/mL if its units are {units}, {off} ({LEAST_KBQ:g} to {MOST_KBQ:g}); "
            f"check the units{also}, or say that they are relative"
        )
    return Activity(torch.from_numpy(array), x, volume.affine)


def _check_activity(array: np.ndarray, path: Path) -> np.ndarray:
    """The activity, rounding below 0 cut; ValueError for what cannot be activity."""
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {(~np.isfinite(array)).sum()} NaN or infinite values; repair them first")
    if array.min() < -ROUNDING * array.max():
        raise ValueError(
            f"{path}: negative activity, down to {array.min():.4g}; activity cannot be negative: clip a reconstruction "
            "that is (filtered back projection), knowing that this biases low regions"
        )
    if not array.any():
        raise ValueError(f"{path}: no activity at all: an empty scan")
    return array.clip(min=0)


FIELD_MM = 224.0  # side of the image and width of the scanner's view: heads fit, scalp included
PEOPLE = "virtual cohort of companion.data.pet (ICBM 152), FDG-like axial slices"


def held_out(
    split: str,
    subjects: int,
    image_size: int = 64,
    per_subject: int = 1,
    lesions: int = 0,
    pixel_mm: float | None = None,
    first: int = 0,
) -> Slices:
    """Slices of the first people of "validation" or "test", by default FIELD_MM wide as for the embedded weights.

    With one slice each, the slices of successive people sweep the slab, so that few people show all of it. first: how
    many people of the split to leave out before.
    """
    pixel_mm = FIELD_MM / image_size if pixel_mm is None else pixel_mm
    if per_subject > 1 or subjects == 1:
        return cohort_slices(split, subjects, image_size, per_subject, lesions, pixel_mm, first=first)
    low, high = anatomy.SLAB_MM
    parts = []
    for i, subject in enumerate(anatomy.cohort(split, first + subjects)[first:]):
        height = torch.tensor([low + (high - low) * (i + 0.5) / subjects])
        found = place_lesions(subject, lesions, height) if lesions else []
        one = render(subject, (1, image_size, image_size), pixel_mm, height, found)
        images = (one.slices(name) for name in ("image", "labels", "lesions", "mu"))
        parts.append((*images, torch.tensor([subject.seed]), height))
    return Slices(*(torch.cat(column) for column in zip(*parts, strict=True)), pixel_mm=pixel_mm)
