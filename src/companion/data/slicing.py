"""Slices cut from volumes, and volumes put together again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from companion.data.cohort import existing_folder
from companion.data.intake.walk import is_hidden
from companion.data.intensity import Scale, Size, _check_values, scaled
from companion.data.nifti import Volume, load_nifti, save_nifti

# Directions in which slices, rows and columns run: axial slices as in `anatomy`, the nose up.
PLANES = {"axial": "SPR", "coronal": "AIR", "sagittal": "RIP"}
GREY, COLOUR = ("L", "I", "I;16", "I;16B", "I;16L", "F"), ("RGB",)  # modes of Pillow
SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")


# -------------------------------------------------------------------------------------------- from volumes to slices


def turned(volume: Volume, plane: str) -> Volume:
    """The volume with its axes reordered and mirrored to slices of a plane of `PLANES`; no voxel is changed."""
    turn = ornt_transform(io_orientation(volume.affine), axcodes2ornt(PLANES[plane][::-1]))
    array = apply_orientation(volume.array.transpose(2, 1, 0), turn)
    affine = volume.affine @ inv_ornt_aff(turn, volume.array.shape[::-1])
    return Volume(np.ascontiguousarray(array.transpose(2, 1, 0)), affine)


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
        whole = cls(volume.array.shape, volume.affine.tolist(), plane, size, size)
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
    """The slices of an image volume, ready to be translated; every slice, also the empty ones at its ends.

    Of complex volumes the magnitude.
    Arguments as for `Slicing.of` and `scaled`. Raises FileNotFoundError, or ValueError as `load_nifti` and `scaled`.
    """
    volume = load_nifti(path)
    if np.iscomplexobj(volume.array):
        volume = Volume(np.abs(volume.array), volume.affine)
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
    height, width = (max(1, round(e / pixel)) for e in extent)
    return height, width


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
        raise ValueError(
            f"{path}: {stored.dtype} values from {stored.min():.4g} to {stored.max():.4g}; expected 8 or "
            f"16 bits, or floats in 0 to 1: scale them first"
        )
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
        expected, hint = (
            ("grey", "save it as 8-bit or 16-bit grey, or read colours with channels=3")
            if channels == 1
            else ("RGB", "save it as RGB, or read grey images with channels=1")
        )
        raise ValueError(f"{path}: mode {mode} where {expected} was expected; {hint}")
    if frames > 1:
        raise ValueError(f"{path}: {frames} images in one file; save each slice by itself")
    return height, width


def _images(folder: str | os.PathLike) -> dict[str, Path]:
    """The image files of a folder by the stem of their names."""
    files: dict[str, Path] = {}
    for path in sorted(existing_folder(folder).iterdir()):
        if path.suffix.lower() not in SUFFIXES or is_hidden(path.name):
            continue
        if path.stem in files:
            raise ValueError(f"{folder}: {files[path.stem].name} and {path.name} have the same name; keep one of them")
        files[path.stem] = path
    if not files:
        raise ValueError(f"{folder}: no images; expected files ending in {', '.join(SUFFIXES)}")
    return files
