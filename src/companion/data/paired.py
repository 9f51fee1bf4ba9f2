"""Two contrasts of the same anatomy: slices and NIfTI volumes in, aligned pairs out, and translations back to NIfTI.

    pairs = SlicePairs({"T1": "IXI/T1", "PD": "IXI/PD"})            # the layout of the LMI release: equal file names
    cohort = find_subjects("IXI", LAYOUTS["IXI"])                     # or one NIfTI per subject and contrast
    data = prepare("ixi.h5", cohort, contrasts=("T1", "PD"), reference="PD", per_subject=16, ...)

    cut = cut_file("IXI/IXI012-HH-1211-PD.nii.gz", size=(128, 128))   # slices of a volume, and how they were cut
    save_translation("t1.nii.gz", translate(cut.slices), cut.slicing, scale)    # the shape and affine of the source

Images are float32 in [0, 1], stacks (slice, 1, y, x). Volumes are (z, y, x) with an affine, as in `nifti`. Nothing is
registered here: `alignment` says whether a pair needs it. Wang et al. 2024 (IEEE TMI, doi 10.1109/TMI.2024.3382043)
publish neither slicing, scaling nor splits; the choices are ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from PIL import Image, UnidentifiedImageError
from scipy.ndimage import affine_transform, gaussian_filter
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..networks.local_mi import entropy, normalised
from .nifti import Volume, load_nifti, save_nifti
from .store import SPLITS, Prepared, open_dataset, write_dataset

Array = np.ndarray | Tensor
Size = tuple[int, int]

# Ends of paths without .nii or .nii.gz: "{subject}" and "*" stand for part of a name. IXI and RESECT (CuRIOUS) as they
# are distributed; Gold Atlas comes as DICOM, so these are the names to convert it to.
LAYOUTS = {
    "IXI": {"T1": "{subject}-T1", "T2": "{subject}-T2", "PD": "{subject}-PD"},
    "CuRIOUS": {"T1": "{subject}-T1", "FLAIR": "{subject}-FLAIR"},
    "GoldAtlas": {"CT": "{subject}/CT", "MR": "{subject}/MR"},
}
# Directions in which slices, rows and columns run: axial slices as in `anatomy`, the nose up.
PLANES = {"axial": "SPR", "coronal": "AIR", "sagittal": "RIP"}
FOREGROUND = 0.1  # scaled values above this are foreground when slices are chosen
MAX_SHIFT = 0.75  # pixels that a pair may seem apart: noise makes half of one, a neighbouring slice a whole
QUARTER = 2000  # pixels from which a quarter of an image has enough of a joint histogram to say how it fits
GREY, COLOUR = ("L", "I", "I;16", "I;16B", "I;16L", "F"), ("RGB",)  # modes of Pillow
SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
SLICE_NUMBER = r"(?P<subject>.+?)[-_. ]*(?:slice|z)?[-_. ]*\d+"  # case ignored, of a file's stem


# ------------------------------------------------------------------------------------------------------- intensity


@dataclass(frozen=True)
class Scale:
    """The linear map that takes `low` to 0 and `high` to 1, in `units`; values beyond are clipped."""

    low: float
    high: float
    units: str = ""

    def __post_init__(self):
        if not (np.isfinite([self.low, self.high]).all() and self.low < self.high):
            raise ValueError(f"a scale needs finite low < high, got {self.low} and {self.high}")

    def apply(self, x: Array) -> Array:
        """`x` (any shape) in [0, 1]."""
        return ((x - self.low) / (self.high - self.low)).clip(0, 1)

    def undo(self, x: Array) -> Array:
        """`x` (any shape) in the units of the file: exact where `apply` did not clip."""
        return x * (self.high - self.low) + self.low

    def clipped(self, x: Array) -> float:
        """The fraction of `x` that `apply` changes for good."""
        return float(((x < self.low) | (x > self.high)).sum()) / np.prod(x.shape)


def percentile_scale(array: np.ndarray, low: float = 0.5, high: float = 99.5) -> Scale:
    """The scale from percentile `low` of all values to percentile `high` of the foreground, those above the mean.

    The mean lies between air and tissue, so that the amount of air around a head does not change its brightness.
    Raises ValueError for NaN and constant images.
    """
    _check_values(array, "the image")
    if not 0 <= low < high <= 100:
        raise ValueError(f"percentiles must satisfy 0 <= low < high <= 100, got {low} and {high}")
    bottom = float(np.percentile(array, low))
    return Scale(bottom, float(np.percentile(array[array > array.mean(dtype=np.float64)], high)))


def ct_window(centre: float = 40.0, width: float = 400.0) -> Scale:
    """The scale of a CT window, Hounsfield units; by default soft tissue, bone clipped (300 and 2000 keep it)."""
    return Scale(centre - width / 2, centre + width / 2, "HU")


def scaled(array: np.ndarray, scale: Scale | None = None, name: str = "the image") -> tuple[np.ndarray, Scale]:
    """`array` in [0, 1], float32, and its scale, by default `percentile_scale`.

    Raises ValueError for NaN, complex values, constant images, and windows in which nothing is to be seen.
    """
    _check_values(array, name)
    scale = percentile_scale(array) if scale is None else scale
    values = scale.apply(array.astype(np.float32))
    if values.min() == values.max():
        raise ValueError(
            f"{name}: values from {array.min():.4g} to {array.max():.4g} all lie outside the window {scale.low:.4g} "
            f"to {scale.high:.4g} {scale.units}; is the image in these units (a CT with its rescale intercept)?"
        )
    return values, scale


def typical_scale(scales: Iterable[Scale]) -> Scale:
    """The median scale of several subjects: what a translated image, whose own scale nobody knows, is written with."""
    scales = list(scales)
    if not scales:
        raise ValueError("no scales to take the median of")
    return Scale(*(float(np.median([getattr(s, end) for s in scales])) for end in ("low", "high")), scales[0].units)


# -------------------------------------------------------------------------------------------- from volumes to slices


@dataclass(frozen=True)
class Slicing:
    """How a volume of `shape` (z, y, x) and `affine` becomes slices on a canvas of `size` (y, x), and back.

    Axes are reordered and mirrored to the `plane` closest to the volume's, without interpolation. Each slice is then
    resampled to `inner` (y, x) pixels (bilinear, anti-aliased; nothing if it has that size already) and placed in the
    middle of the canvas: zeros around it, or its margin cropped. Make one with `Slicing.of`. All fields can be stored
    as JSON: `Slicing(**asdict(slicing))` is the same again.
    """

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    plane: str
    size: Size
    inner: Size

    def __post_init__(self):
        object.__setattr__(self, "affine", tuple(tuple(float(v) for v in row) for row in self.affine))
        for name in ("shape", "size", "inner"):
            object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))

    @classmethod
    def of(cls, volume: Volume, size: Size, pixel_mm: float | None = None, plane: str = "axial") -> Slicing:
        """The slicing of a volume. pixel_mm: side of the pixels; by default the whole field of view fits the canvas."""
        if plane not in PLANES:
            raise ValueError(f"unknown plane {plane!r}; use {', '.join(PLANES)}")
        if volume.array.ndim != 3:
            raise ValueError(f"expected a volume (z, y, x), got shape {volume.array.shape}")
        whole = cls(volume.array.shape, volume.affine, plane, size, size)
        step_mm = np.linalg.norm(whole._oriented_affine[:3, :3], axis=0)[[1, 0]]
        return replace(whole, inner=_inner(whole.oriented[1:], size, step_mm, pixel_mm))

    def cut(self, array: np.ndarray, nearest: bool = False) -> Tensor:
        """The slices (slice, 1, y, x), float32, of `array` (z, y, x). nearest: for labels, whose values cannot mix."""
        if tuple(array.shape) != self.shape:
            raise ValueError(f"this slicing is for volumes {self.shape}, got {tuple(array.shape)}; make another")
        turned = apply_orientation(np.asarray(array, np.float32).transpose(2, 1, 0), self._turn).transpose(2, 1, 0)
        return _onto_canvas(torch.from_numpy(np.array(turned))[:, None], self.inner, self.size, nearest)

    def assemble(self, slices: Tensor, fill: float = 0.0, nearest: bool = False) -> np.ndarray:
        """The volume (z, y, x), float32, of slices (slice, 1, y, x) on the canvas; `fill` where `cut` cropped."""
        expected = (self.oriented[0], 1, *self.size)
        if tuple(slices.shape) != expected:
            raise ValueError(f"expected the slices {expected} of the whole volume, got {tuple(slices.shape)}")
        turned = _off_canvas(slices.detach().cpu().float(), self.inner, self.oriented[1:], fill, nearest)[:, 0]
        back = apply_orientation(turned.numpy().transpose(2, 1, 0), self._turn_back)
        return np.ascontiguousarray(back.transpose(2, 1, 0))

    @property
    def oriented(self) -> tuple[int, int, int]:
        """Number of slices, and their rows and columns before they are resampled."""
        order = np.argsort(self._turn[:, 0])  # which axis (x, y, z) of the file becomes column, row, slice
        return tuple(self.shape[::-1][i] for i in order[::-1])

    @property
    def canvas_affine(self) -> np.ndarray:
        """The 4 x 4 affine, (x, y, z) indices to mm, of the stack of slices on the canvas."""
        place = np.eye(4)
        for axis, (n, m, side) in enumerate(zip(self.oriented[:0:-1], self.inner[::-1], self.size[::-1], strict=True)):
            place[axis, axis] = n / m
            place[axis, 3] = (0.5 - _start(m, side)) * n / m - 0.5  # edges of the first and last pixels stay
        return self._oriented_affine @ place

    def __str__(self) -> str:
        rows = self.oriented[1:]
        mm = np.linalg.norm(self.canvas_affine[:3, :3], axis=0)
        steps = [f"{self.oriented[0]} {self.plane} slices of {rows[0]} x {rows[1]}"]
        if self.inner != rows:
            steps.append(f"resampled to {self.inner[0]} x {self.inner[1]} pixels of {mm[1]:.4g} x {mm[0]:.4g} mm")
        for axis, n, side in zip(("rows", "columns"), self.inner, self.size, strict=True):
            if n != side:
                steps.append(f"{n - side} {axis} cropped" if n > side else f"{side - n} {axis} of zeros added")
        return ", ".join(steps)

    @cached_property
    def _codes(self) -> np.ndarray:
        return axcodes2ornt(PLANES[self.plane][::-1])

    @cached_property
    def _turn(self) -> np.ndarray:
        return ornt_transform(io_orientation(np.array(self.affine)), self._codes)

    @cached_property
    def _turn_back(self) -> np.ndarray:
        return ornt_transform(self._codes, io_orientation(np.array(self.affine)))

    @cached_property
    def _oriented_affine(self) -> np.ndarray:
        return np.array(self.affine) @ inv_ornt_aff(self._turn, self.shape[::-1])


@dataclass(frozen=True, eq=False)
class Cut:
    """`slices` (slice, 1, y, x) in [0, 1] of a volume, how they were cut, and the scale of their values."""

    slices: Tensor
    slicing: Slicing
    scale: Scale


def cut_file(
    path: str | os.PathLike,
    *,
    size: Size,
    pixel_mm: float | None = None,
    plane: str = "axial",
    scale: Scale | None = None,
) -> Cut:
    """The slices of a NIfTI volume, ready to be translated; every slice, also the empty ones at its ends.

    Arguments as for `Slicing.of` and `scaled`. Raises FileNotFoundError, or ValueError as `load_nifti` and `scaled`.
    """
    volume = load_nifti(path)
    values, scale = scaled(volume.array, scale, str(path))
    slicing = Slicing.of(volume, size, pixel_mm, plane)
    return Cut(slicing.cut(values), slicing, scale)


def save_translation(path: str | os.PathLike, slices: Tensor, slicing: Slicing, scale: Scale) -> Path:
    """The path of the NIfTI file written from translated slices (slice, 1, y, x) in [0, 1].

    It has the shape and the affine of the volume that `slicing` cut; what was cropped is `scale.low`. scale: that of
    the contrast translated to (of the training set: `stored_scale`). Raises ValueError for NaN or other shapes.
    """
    volume = scale.undo(slicing.assemble(slices)).astype(np.float32)
    return save_nifti(path, volume, affine=slicing.affine, units=scale.units)


def _inner(shape: Sequence[int], size: Size, step_mm: Sequence[float], pixel_mm: float | None) -> Size:
    """The size in pixels of an image of `shape` after resampling to square pixels, which by default fit `size`."""
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be two positive numbers of pixels (y, x), got {size}")
    if pixel_mm is not None and not (np.isfinite(pixel_mm) and pixel_mm > 0):
        raise ValueError(f"pixel_mm must be positive, got {pixel_mm}")
    extent = [n * mm for n, mm in zip(shape, step_mm, strict=True)]
    pixel = max(e / n for e, n in zip(extent, size, strict=True)) if pixel_mm is None else pixel_mm
    return tuple(max(1, round(e / pixel)) for e in extent)


def _start(inner: int, side: int) -> int:
    return side // 2 - inner // 2  # negative: cropped


def _onto_canvas(images: Tensor, inner: Size, size: Size, nearest: bool = False) -> Tensor:
    images = _resize(images, inner, nearest)
    start = [_start(m, side) for m, side in zip(inner, size, strict=True)]
    end = [side - m - s for m, side, s in zip(inner, size, start, strict=True)]
    return F.pad(images, (start[1], end[1], start[0], end[0]))  # negative amounts crop


def _off_canvas(images: Tensor, inner: Size, shape: Size, fill: float, nearest: bool) -> Tensor:
    start = [_start(m, side) for m, side in zip(inner, images.shape[-2:], strict=True)]
    end = [side - m - s for m, side, s in zip(inner, images.shape[-2:], start, strict=True)]
    return _resize(F.pad(images, (-start[1], -end[1], -start[0], -end[0]), value=fill), shape, nearest)


def _resize(images: Tensor, shape: Size, nearest: bool) -> Tensor:
    if tuple(images.shape[-2:]) == tuple(shape):
        return images
    if nearest:
        return F.interpolate(images, size=tuple(shape), mode="nearest-exact")
    return F.interpolate(images, size=tuple(shape), mode="bilinear", align_corners=False, antialias=True)


# ----------------------------------------------------------------------------------------------------------- geometry


def grid_distance_mm(a: Volume, b: Volume) -> float:
    """How far, at most, equal voxel indices of two volumes lie apart in mm; infinite if their shapes differ."""
    if a.array.shape != b.array.shape:
        return float("inf")
    z, y, x = a.array.shape
    corners = np.array([(i, j, k, 1) for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)])
    return float(np.linalg.norm((corners @ (a.affine - b.affine).T)[:, :3], axis=1).max())


def resample(volume: Volume, reference: Volume, nearest: bool = False) -> Volume:
    """The volume on the grid of another, by their affines; trilinear after a Gaussian against aliasing.

    Voxels outside become the smallest value of the volume. This does not register: it trusts that both affines lead
    to the same world. nearest: for labels. Raises ValueError if the volumes do not overlap.
    """
    to_voxel = np.linalg.inv(volume.affine) @ reference.affine  # (x, y, z) indices of the reference to those here
    shape = np.array(reference.array.shape[::-1])
    probe = np.stack(np.meshgrid(*(np.linspace(0, n - 1, 12) for n in shape), indexing="ij")).reshape(3, -1)
    at = to_voxel[:3, :3] @ probe + to_voxel[:3, 3:]
    if not ((at > -0.5) & (at < np.array(volume.array.shape[::-1])[:, None] - 0.5)).all(0).any():
        raise ValueError("the two volumes lie in different places and do not overlap; check their affines")
    array = volume.array if nearest else volume.array.astype(np.float32)
    if not nearest:
        step = np.linalg.norm(to_voxel[:3, :3], axis=1)[::-1]  # of the new grid, in voxels of this one
        array = gaussian_filter(array, np.sqrt((step**2 - 1).clip(0)) / 2.355)
    moved = affine_transform(
        array,
        to_voxel[:3, :3][::-1, ::-1],
        to_voxel[:3, 3][::-1],
        output_shape=reference.array.shape,
        order=0 if nearest else 1,
        cval=float(array.min()),
    )
    return Volume(moved, reference.affine)


@dataclass(frozen=True)
class Alignment:
    """How two images fit: the shift of the second that would fit best, along each axis, in pixels.

    `information` is their normalised mutual information as they are, `best` the largest that was found nearby; `reach`
    the largest shifts tried. A shift as long as the reach may be longer, or the images have nothing in common. `local`
    is the longest in-plane shift of any quarter by itself, which tells rotations and stretches; 0 for small images.
    """

    shift: tuple[float, ...]
    information: float
    best: float
    reach: tuple[int, ...]
    local: float = 0.0

    @property
    def distance(self) -> float:
        """The longest shift along any axis, of the whole or of a quarter, pixels; infinite at the end of the reach."""
        return float("inf") if self._far else max(self.local, *(abs(s) for s in self.shift))

    @property
    def _far(self) -> bool:
        return any(abs(s) >= r > 0 for s, r in zip(self.shift, self.reach, strict=True))

    def __str__(self) -> str:
        shift = " x ".join(f"{s:+.1f}" for s in self.shift)
        shift += " pixels or more, or unrelated" if self._far else " pixels"
        told = f"mutual information {self.information:.3f}, {self.best:.3f} nearby"
        return f"shifted by {shift}, a quarter by {self.local:.1f} ({told})"


def alignment(a: np.ndarray, b: np.ndarray, reach: int = 3, bins: int = 32) -> Alignment:
    """How two images or volumes of the same shape, (y, x) or (z, y, x), of any contrasts, fit each other.

    Compares the mutual information where they are with that after shifts of up to `reach` pixels along each axis by
    itself (less along axes too short for it); a parabola through the maximum gives fractions. Quarters are compared
    likewise if they have `QUARTER` pixels. It sees displacements of about a pixel; two people whose heads are alike
    may pass. Raises ValueError for different shapes, NaN or constant images.
    """
    a, b = (np.asarray(x) for x in (a, b))
    if a.shape != b.shape or a.ndim not in (2, 3):
        raise ValueError(f"pairs must have one shape, (y, x) or (z, y, x), got {a.shape} and {b.shape}")
    values = [scaled(x, name=name)[0] for x, name in ((a, "the first image"), (b, "the second image"))]
    reaches = tuple(min(reach, (n - 1) // 4) for n in a.shape)
    middle = [slice(r, n - r) for r, n in zip(reaches, a.shape, strict=True)]  # so that every shift counts as many
    shift, here, best = _best_shift(*values, middle, reaches, bins)
    halves = [(slice(s.start, (s.start + s.stop) // 2), slice((s.start + s.stop) // 2, s.stop)) for s in middle[-2:]]
    quarters = [(*middle[:-2], rows, columns) for rows in halves[0] for columns in halves[1]]
    quarters = [q for q in quarters if a[q].size >= QUARTER and all(np.ptp(v[q]) > FOREGROUND for v in values)]
    in_plane = (*(0 for _ in middle[:-2]), *reaches[-2:])
    local = [max(map(abs, _best_shift(*values, q, in_plane, bins // 2)[0])) for q in quarters]
    return Alignment(shift, here, best, reaches, max(local, default=0.0))


def _best_shift(a: np.ndarray, b: np.ndarray, region: Sequence[slice], reaches: Sequence[int], bins: int):
    """The shift of `b` along each axis at which it tells most about `a` in `region`; what it tells now, and at best."""
    fixed, moving = (np.rint(x * (bins - 1)).astype(np.int64) for x in (a, b))
    fixed = fixed[tuple(region)].ravel() * bins

    def information(axis: int, by: int) -> float:
        window = [slice(s.start + by, s.stop + by) if i == axis else s for i, s in enumerate(region)]
        counts = np.bincount(fixed + moving[tuple(window)].ravel(), minlength=bins * bins)
        p = torch.from_numpy(counts.reshape(bins, bins) / counts.sum())
        h1, h2 = entropy(p.sum(1)), entropy(p.sum(0))
        return float(normalised(h1 + h2 - entropy(p, dims=2), h1, h2))

    here = information(0, 0)
    curves = [[here if by == 0 else information(axis, by) for by in range(-r, r + 1)] for axis, r in enumerate(reaches)]
    # Where the second image, read `by` further on, fits the first, it lies `by` too far along the axis.
    return tuple(-_peak(curve) for curve in curves), here, max(map(max, curves))


def _peak(curve: Sequence[float]) -> float:
    """Where a curve sampled at ..., -1, 0, 1, ... is largest; the top of the parabola through it and its neighbours."""
    i, middle = int(np.argmax(curve)), len(curve) // 2
    if i in (0, len(curve) - 1):
        return float(i - middle)
    left, top, right = curve[i - 1 : i + 2]
    bend = left - 2 * top + right
    return i - middle + (0.5 * (left - right) / bend if bend < 0 else 0.0)


# ------------------------------------------------------------------------------------------------ subjects and splits


@dataclass(frozen=True)
class Cohort:
    """`files`: subject -> contrast -> path. `left_out`: subject -> why it is not among them."""

    files: Mapping[str, Mapping[str, Path]]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def without(self, reasons: Mapping[str, str]) -> Cohort:
        """The cohort without these subjects; reasons: subject -> why."""
        if unknown := sorted(set(reasons) - set(self.files)):
            raise ValueError(f"no subject {_some(unknown)} in this cohort")
        return Cohort({s: f for s, f in self.files.items() if s not in reasons}, {**self.left_out, **reasons})


def find_subjects(
    folder: str | os.PathLike, patterns: Mapping[str, str], *, complete_only: bool = False
) -> Cohort:
    """The subjects of a folder, in natural order, with the NIfTI file of each contrast.

    patterns: contrast -> end of the path below `folder`, without .nii or .nii.gz, as in `LAYOUTS`. complete_only:
    leave subjects out that miss a contrast (IXI has some) rather than stop. Raises FileNotFoundError for a missing
    folder, ValueError for contrasts without files, subjects that miss one (named), or two files for the same.
    """
    folder = _existing_folder(folder)
    paths = sorted(p for p in folder.rglob("*") if p.name.endswith((".nii", ".nii.gz")))
    files: dict[str, dict[str, Path]] = {}
    for contrast, pattern in patterns.items():
        form, count = _pattern(pattern), 0
        for path in paths:
            if not (match := form.fullmatch(path.relative_to(folder).as_posix())):
                continue
            count += 1
            mine = files.setdefault(match["subject"], {})
            if contrast in mine:
                raise ValueError(f"two files of {match['subject']}, {contrast}: {mine[contrast]} and {path}; keep one")
            mine[contrast] = path
        if not count:
            found = _some([p.relative_to(folder).as_posix() for p in paths]) if paths else "no NIfTI files at all"
            raise ValueError(f"{folder}: no {contrast}, expected files like {pattern}.nii.gz; there is {found}")
    missing = {s: ", ".join(c for c in patterns if c not in mine) for s, mine in files.items()}
    missing = {s: f"no {missing[s]}" for s in sorted(missing, key=_natural) if missing[s]}
    if missing and not complete_only:
        raise ValueError(f"{folder}: {len(missing)} of {len(files)} subjects lack a contrast: "
                         f"{_some([f'{s} ({why})' for s, why in missing.items()])}; add the files or leave these "
                         f"subjects out with complete_only=True")
    complete = {s: files[s] for s in sorted(files, key=_natural) if s not in missing}
    if not complete:
        raise ValueError(f"{folder}: none of {len(files)} subjects has all of {', '.join(patterns)}")
    return Cohort(complete, missing)


def split_subjects(
    subjects: Iterable[str], fractions: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0
) -> dict[str, list[str]]:
    """Which subjects are for "train", "validation" and "test": a seeded draw that the order of the names cannot change.

    Every part with a fraction above 0 gets one at least; ValueError if there are too few for that.
    """
    names = sorted(set(subjects), key=_natural)
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must be three numbers of at least 0 with sum 1, got {fractions}")
    if len(names) < sum(f > 0 for f in fractions):
        raise ValueError(f"{len(names)} subjects cannot be split into {fractions}: a part would be empty")
    counts = [max(round(f * len(names)), int(f > 0)) for f in fractions]
    counts[int(np.argmax(fractions))] += len(names) - sum(counts)
    drawn = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    ends = np.cumsum(counts)
    return {part: sorted(drawn[end - n : end], key=_natural)
            for part, n, end in zip(SPLITS, counts, ends, strict=True)}


def read_subject(
    files: Mapping[str, Path], *, reference: str | None = None, labels: str | None = None, tolerance: float = 0.1
) -> dict[str, Volume]:
    """The volumes of one subject, contrast -> volume, all on one grid.

    reference: the contrast whose grid the others are resampled to where they differ; without it a difference is an
    error. labels: the contrast that is a label map. tolerance: of the grid, in parts of the smallest voxel side.
    Raises ValueError naming the files if grids differ, or as `load_nifti`.
    """
    volumes = {contrast: load_nifti(path) for contrast, path in files.items()}
    for name, role in ((reference, "reference"), (labels, "labels")):
        if name is not None and name not in volumes:
            raise ValueError(f"{role}={name!r} is not among the contrasts {', '.join(volumes)}")
    first = next(iter(files)) if reference is None else reference
    grid = volumes[first]
    for contrast, volume in volumes.items():
        apart = grid_distance_mm(volume, grid)
        if apart <= tolerance * min(grid.voxel_mm):
            continue
        if reference is None:
            why = (f"shapes {volume.array.shape} and {grid.array.shape} (z, y, x)" if np.isinf(apart)
                   else f"affines up to {apart:.3g} mm apart")
            raise ValueError(f"{files[contrast]} and {files[first]} lie on different grids: {why}; register them, or "
                             f"resample to one with reference={first!r}")
        volumes[contrast] = resample(volume, grid, nearest=contrast == labels)
    return volumes


def prepare(
    path: str | os.PathLike,
    cohort: Cohort,
    *,
    contrasts: Sequence[str],
    per_subject: int,
    split: Mapping[str, Sequence[str]],
    size: Size = (128, 128),
    pixel_mm: float | None = None,
    plane: str = "axial",
    scales: Mapping[str, Scale] | None = None,
    reference: str | None = None,
    labels: str | None = None,
    max_shift: float = MAX_SHIFT,
    source: str = "",
) -> Prepared:
    """The prepared file written: an array (subject, slice, 1, y, x) for each contrast, values in [0, 1].

    per_subject  slices of each, evenly spaced where at least 5 % of the slice is foreground
    split        from `split_subjects`, or the sets of others; `size`, `pixel_mm`, `plane` as for `Slicing.of`
    scales       contrast -> scale that all subjects share, such as `ct_window()`; by default each its percentiles
    reference    contrast whose grid the others are resampled to, see `read_subject`
    labels       contrast of the cohort that is a label map: kept as it is, stored as uint8 under "labels"
    max_shift    pixels by which contrasts may seem apart (`alignment`); infinite to accept everything
    Each subject's slicing, slice positions, scales and alignment are kept in `attrs`; `stored_slicing` and
    `stored_scale` read them. Raises ValueError naming the subjects that are misaligned, or as `read_subject`.
    """
    if not contrasts or labels in contrasts:
        raise ValueError(f"give contrasts, and labels apart from them; got {contrasts} and labels={labels!r}")
    wanted = (*contrasts, *([labels] if labels else []))
    stacks: dict[str, list[np.ndarray]] = {name: [] for name in (*contrasts, *(["labels"] if labels else []))}
    about, misaligned = {}, {}
    for subject, files in cohort.files.items():
        if lacking := [name for name in wanted if name not in files]:
            raise ValueError(f"{subject} has no {', '.join(lacking)}, only {', '.join(files)}")
        try:
            volumes = read_subject({n: files[n] for n in wanted}, reference=reference, labels=labels)
            slices, about[subject], fits = _slices(volumes, contrasts, per_subject, labels, dict(scales or {}),
                                             {"size": size, "pixel_mm": pixel_mm, "plane": plane})
        except ValueError as error:
            raise ValueError(f"{subject}: {error}") from error
        for name in stacks:
            stacks[name].append(slices[name])
        for name, fit in fits.items():
            if fit.distance > max_shift:
                misaligned[subject] = f"{name} {fit}"
    if misaligned:
        raise ValueError(f"{len(misaligned)} of {len(cohort.files)} pairs do not fit {contrasts[0]}: "
                         f"{_some([f'{s}: {why}' for s, why in misaligned.items()])}; register them, drop them with "
                         f"cohort.without(...), or raise max_shift={max_shift}")
    write_dataset(
        path,
        {name: np.stack(value) for name, value in stacks.items()},
        units={name: "1" for name in stacks},
        scale={name: "label values" if name == "labels" else "0 and 1 are attrs.subjects.*.scales" for name in stacks},
        source=source or "NIfTI volumes: " + ", ".join(wanted),
        seed=None,
        split=split,
        subjects=list(cohort.files),
        attrs={"subjects": about, "left_out": dict(cohort.left_out)},
    )
    return open_dataset(path, require=list(contrasts))


def stored_slicing(prepared: Prepared, subject: str) -> tuple[Slicing, list[int]]:
    """How a subject of a prepared file was cut, and which of its slices the file holds."""
    about = _stored(prepared, subject)
    return Slicing(**about["slicing"]), list(about["positions"])


def stored_scale(prepared: Prepared, contrast: str, subject: str | None = None) -> Scale:
    """The scale of a contrast of one subject of a prepared file; by default `typical_scale` of those for training."""
    subjects = prepared.split.get("train", ()) if subject is None else (subject,)
    scales = [_stored(prepared, s)["scales"] for s in subjects]
    if any(contrast not in s for s in scales):
        raise ValueError(f"{prepared.path.name} has no scale of {contrast!r}; it has {', '.join(scales[0])}")
    return typical_scale(Scale(**s[contrast]) for s in scales)


def _stored(prepared: Prepared, subject: str) -> dict:
    about = prepared.attrs.get("subjects", {})
    if subject not in about:
        raise ValueError(f"{prepared.path.name} says nothing of the volume of {subject!r}; it knows {_some(about)}")
    return about[subject]


def _slices(volumes, contrasts, count: int, labels: str | None, scales: dict[str, Scale], options: dict):
    """One subject's slices, name -> (slice, 1, y, x), what is to be remembered of them, and how they fit the first."""
    slicing = Slicing.of(volumes[contrasts[0]], **options)
    stacks = {}
    for name in contrasts:
        values, scales[name] = scaled(volumes[name].array, scales.get(name), name)
        stacks[name] = slicing.cut(values).numpy()
    first = stacks[contrasts[0]]
    filled = np.flatnonzero((first > FOREGROUND).mean((1, 2, 3)) >= 0.05)
    if not 1 <= count <= len(filled):
        raise ValueError(f"{len(filled)} slices with anything in them, {count} wanted; choose a smaller per_subject")
    positions = filled[np.linspace(0, len(filled) - 1, count).round().astype(int)]
    fits = {name: alignment(first[:, 0], stacks[name][:, 0]) for name in contrasts[1:]}
    kept = {name: stack[positions] for name, stack in stacks.items()}
    if labels:
        kept["labels"] = slicing.cut(volumes[labels].array, nearest=True).numpy()[positions].astype(np.uint8)
    return kept, {"slicing": asdict(slicing), "positions": positions.tolist(),
                  "scales": {name: asdict(scales[name]) for name in contrasts},
                  "alignment": {name: asdict(fit) for name, fit in fits.items()}}, fits


# -------------------------------------------------------------------------------------------------- folders of slices


class SlicePairs(Dataset):
    """The images with equal names of several folders, `pairs[i]` -> one tensor (channel, y, x) in [0, 1] per folder.

    This is the layout of the LMI release: 8-bit or 16-bit images (PNG, TIFF, BMP, JPEG), divided by 255 or 65535;
    float TIFF as it is. Files are read when asked for, but names, sizes and modes are checked at once.
    folders        contrast -> folder, in the order of the tensors
    channels       1 for grey, 3 for colour
    size           (y, x) to bring all images to, keeping their aspect ratio, zeros around
    complete_only  use the names that all folders have, as published, rather than stop; `left_out` lists the others
    subject        regular expression with a group `subject`, for a file's name without its ending; by default the
                   subject is what stands before the last number
    Raises FileNotFoundError or ValueError: names without a partner (listed), different sizes, colour where grey was
    expected; when read, constant images and NaN.
    """

    def __init__(
        self,
        folders: Mapping[str, str | os.PathLike],
        *,
        channels: int = 1,
        size: Size | None = None,
        complete_only: bool = False,
        subject: str = SLICE_NUMBER,
    ):
        if not folders or channels not in (1, 3):
            raise ValueError(f"give folders, and channels of 1 (grey) or 3 (colour), not {channels}")
        found = {contrast: _images(folder) for contrast, folder in folders.items()}
        self.contrasts, self.channels, self.size = tuple(found), channels, size
        common = set.intersection(*(set(files) for files in found.values()))
        alone = {contrast: sorted(set(files) - common, key=_natural) for contrast, files in found.items()}
        if any(alone.values()) and not complete_only or not common:
            told = "; ".join(f"only {_some(names)} in {folders[c]}" for c, names in alone.items() if names)
            hint = ", or pass complete_only=True" if common else ""
            raise ValueError(f"the folders are not paired by file names: {told}; rename or complete them{hint}")
        self.left_out = alone
        self.names = sorted(common, key=_natural)
        self.files = {name: tuple(files[name] for files in found.values()) for name in self.names}
        self._subject = subject
        self._check_headers()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        images = (read_image(path, self.channels) for path in self.files[self.names[index]])
        if self.size is None:
            return tuple(images)
        return tuple(_onto_canvas(x[None], _inner(x.shape[1:], self.size, (1, 1), None), self.size)[0] for x in images)

    @cached_property
    def subjects(self) -> list[str]:
        """The subject of each image; ValueError if the names do not tell."""
        matches = {name: re.fullmatch(self._subject, name, re.IGNORECASE) for name in self.names}
        if silent := [name for name, match in matches.items() if not match]:
            raise ValueError(f"cannot tell the subject from the names {_some(silent)}; give subject=r'...' with a "
                             f"group (?P<subject>...), so that nobody's slices are both trained on and tested")
        return [match["subject"] for match in matches.values()]

    def split(self, fractions: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0) -> dict[str, Subset]:
        """The images for "train", "validation" and "test", split by subject; see `split_subjects`."""
        members = split_subjects(self.subjects, fractions, seed)
        return {part: Subset(self, [i for i, s in enumerate(self.subjects) if s in set(names)])
                for part, names in members.items()}

    def misaligned(self, max_shift: float = MAX_SHIFT, reach: int = 3) -> dict[str, Alignment]:
        """The names of pairs that seem shifted by more than `max_shift` pixels against their first image, and how."""
        found = {}
        for name, images in zip(self.names, self, strict=True):
            first, *others = (x.mean(0).numpy() for x in images)
            fits = [alignment(first, other, reach) for other in others]
            worst = max(fits, key=lambda fit: fit.distance, default=None)
            if worst and worst.distance > max_shift:
                found[name] = worst
        return found

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def _check_headers(self) -> None:
        sizes = {name: [_header(path, self.channels) for path in paths] for name, paths in self.files.items()}
        for name, mine in sizes.items():
            if len(set(mine)) > 1:
                each = ", ".join(f"{y} x {x} ({c})" for c, (y, x) in zip(self.contrasts, mine, strict=True))
                raise ValueError(f"the images {name} have different sizes: {each}; pairs must show the same pixels")
        if self.size is None and len({mine[0] for mine in sizes.values()}) > 1:
            one, other = list({mine[0]: name for name, mine in sizes.items()}.items())[:2]
            each = " and ".join(f"{y} x {x} ({name})" for (y, x), name in (one, other))
            raise ValueError(f"the images have different sizes: {each}; bring them to one with size=(y, x)")


def read_image(path: str | os.PathLike, channels: int = 1) -> Tensor:
    """The image (channel, y, x) of a file, float32 in [0, 1]: 8 and 16 bits divided by 255 and 65535, floats as stored.

    Raises ValueError for other modes than asked for (grey, or colour with channels=3), NaN, values beyond [0, 1], and
    constant images.
    """
    path = Path(path)
    _header(path, channels)
    try:
        with Image.open(path) as image:
            stored = np.array(image)
    except OSError as error:
        raise ValueError(f"{path}: damaged ({error}); export it again") from error
    _check_values(stored, str(path))
    divisor = 255 if stored.dtype == np.uint8 else 65535 if stored.dtype.kind in "iu" else 1
    values = stored.astype(np.float32) / divisor
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"{path}: {stored.dtype} values from {stored.min():.4g} to {stored.max():.4g}; expected 8 or "
                         f"16 bits, or floats in 0 to 1: scale them first")
    return torch.from_numpy(values[None] if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1)))


def _header(path: Path, channels: int) -> Size:
    """The size (y, x) of an image file of the right mode, read without its pixels."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    try:
        with Image.open(path) as image:
            mode, (width, height), frames = image.mode, image.size, getattr(image, "n_frames", 1)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); export it again") from error
    if mode not in (GREY if channels == 1 else COLOUR):
        expected, hint = (("grey", "save it as 8-bit or 16-bit grey, or read colours with channels=3") if channels == 1
                          else ("RGB", "save it as RGB, or read grey images with channels=1"))
        raise ValueError(f"{path}: mode {mode} where {expected} was expected; {hint}")
    if frames > 1:
        raise ValueError(f"{path}: {frames} images in one file; save each slice by itself")
    return height, width


def _images(folder: str | os.PathLike) -> dict[str, Path]:
    """The image files of a folder by the stem of their names."""
    files: dict[str, Path] = {}
    for path in sorted(_existing_folder(folder).iterdir()):
        if path.suffix.lower() not in SUFFIXES:
            continue
        if path.stem in files:
            raise ValueError(f"{folder}: {files[path.stem].name} and {path.name} have the same name; keep one of them")
        files[path.stem] = path
    if not files:
        raise ValueError(f"{folder}: no images; expected files ending in {', '.join(SUFFIXES)}")
    return files


# ------------------------------------------------------------------------------------------------------------ helpers


def _check_values(array: np.ndarray, name: str) -> None:
    if array.dtype.kind not in "iuf" or not array.size:
        raise ValueError(f"{name}: expected real numbers, got {array.dtype} of shape {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name}: {int((~np.isfinite(array)).sum())} NaN or infinite values; mask or repair them")
    if array.min() == array.max():
        raise ValueError(f"{name}: constant, {array.min()} everywhere: nothing to learn or translate; remove it")


def _existing_folder(folder: str | os.PathLike) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; check the path")
    return folder


def _pattern(pattern: str) -> re.Pattern:
    if "{subject}" not in pattern:
        raise ValueError(f"pattern {pattern!r} must say where the subject stands, as in '{{subject}}-T1'")
    first = iter(("(?P<subject>[^/]+)",))
    parts = {"{subject}": lambda: next(first, "(?P=subject)"), "*": lambda: "[^/]*"}
    body = "".join(parts.get(p, lambda p=p: re.escape(p))() for p in re.split(r"(\{subject\}|\*)", pattern))
    return re.compile(rf"(?:.*/)?{body}\.nii(?:\.gz)?")


def _natural(name: str) -> list:
    """Sorts Case2 before Case10."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", name)]


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
