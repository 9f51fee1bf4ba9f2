"""Cine series and volumes as sequences (frame, channel, y, x), the form that sequence models learn from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from companion.data.cfl import read_cfl
from companion.data.intake.readers import is_image, read_frames, read_image, sniff
from companion.data.intake.records import Item, Unreadable, Volume
from companion.data.slicing import turned
from companion.operators.mri import normalise

Sizes = tuple[float | None, float | None, float | None]  # mm between frames, rows and columns; None for time


@dataclass(frozen=True, eq=False)
class Series:
    """`frames` (frame, 1, y, x), complex64 or float32, of largest magnitude 1; times `scale` they are as in the file.

    `pixel_mm` (y, x) and `step_mm` between frames, or None where the file does not say or frames are times.
    """

    name: str
    frames: Tensor
    scale: float
    pixel_mm: tuple[float, float] | None = None
    step_mm: float | None = None

    def resized(self, shape: tuple[int, int]) -> Series:
        """The series at matrix size (y, x), with the same aspect ratio: zeros fill what the other shape leaves free.

        The field of view grows to the new shape, then frames are resampled (bilinear, anti-aliased); pixels become
        square where `pixel_mm` is known, and keep their ratio where it is not. The scale stays, so the maximum may
        fall below 1.
        """
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"shape must be two positive sizes (y, x), got {shape}")
        height, width = self.frames.shape[-2:]
        mm = self.pixel_mm or (1.0, 1.0)
        pixel = max(height * mm[0] / shape[0], width * mm[1] / shape[1])
        inner = [min(m, max(1, round(n * d / pixel))) for n, m, d in zip((height, width), shape, mm, strict=True)]
        frames = _resample(self.frames, inner)
        before = [m // 2 - n // 2 for m, n in zip(shape, inner, strict=True)]
        after = [m - n - b for m, n, b in zip(shape, inner, before, strict=True)]
        frames = F.pad(frames, (before[1], after[1], before[0], after[0]))
        return Series(self.name, frames, self.scale, (pixel, pixel) if self.pixel_mm else None, self.step_mm)


def load_series(
    source: str | os.PathLike | Item,
    *,
    axis: int | None = None,
    plane: str | None = None,
    position: int | None = None,
    frames: slice = slice(None),
    shape: tuple[int, int] | None = None,
    magnitude: bool = False,
) -> Series:
    """A series from NIfTI or any image volume of `data.intake`, NumPy (.npy) or BART (.cfl), divided by its maximum.

    The phase stays as it is (dividing by the complex maximum would turn it).
    source     a file, or an item of the intake, such as a DICOM series
    axis       of the stored array that counts the frames: NIfTI volumes are (z, y, x), by default z; NumPy (frame, y,
               x) or (frame, 1, y, x), by default the first; cfl without its axes of length 1, by default the last
    plane      of image volumes, in place of `axis`: "axial", "coronal", "sagittal"; axes are reordered and mirrored to
               the closest plane, the nose or the head up, as `slicing.PLANES`
    position   for a 4D NIfTI, a cine of several slices: which z to take; its frames are the times
    frames     which of them to keep, as in slice(50, -30), before the scale is taken
    shape      (y, x) to resize to; see `Series.resized`
    magnitude  drop the phase, or the sign
    Raises FileNotFoundError, or ValueError for damaged or foreign files, NaN, or other than three axes.
    """
    item, path = (source, source.path) if isinstance(source, Item) else (None, Path(source))
    if not path.is_file() and path.suffix not in (".cfl", ".hdr"):
        raise FileNotFoundError(f"{path} does not exist; check the path")
    if is_image(path) or (item and item.reader.join):
        array, mm = _image(item or path, position, plane)
        array, mm = _frames_first(array, 0 if axis is None else axis, mm, path)
    elif path.suffix == ".npy":
        array, mm = _frames_first(_npy(path), 0 if axis is None else axis, None, path)
    elif path.suffix in (".cfl", ".hdr"):
        array, mm = _frames_first(read_cfl(path, squeeze=True).numpy(), -1 if axis is None else axis, None, path)
    else:
        raise Unreadable(
            path, "expected .nii, .nii.gz or another image volume, .npy or .cfl; convert it to one of these"
        )
    array = array[frames]
    if not array.size:
        raise ValueError(f"{path}: {frames} leaves no frames; choose a part of what there is")
    kind = np.complex64 if array.dtype.kind == "c" else np.float32
    values = torch.from_numpy(np.ascontiguousarray(array, dtype=kind))
    values = values.abs() if magnitude else values
    values, scale = normalise(values[:, None])  # checks for NaN
    step, height, width = mm or (None, None, None)
    pixel = None if height is None or width is None else (height, width)
    name = path.name.removesuffix(".gz").removesuffix(path.suffix if path.suffix != ".gz" else ".nii")
    series = Series(name, values, float(scale), pixel, step)
    return series if shape is None else series.resized(shape)


def windows(frames: int, length: int) -> tuple[list[slice], int]:
    """The consecutive windows of `length` frames in one volume of `frames`, none overlapping, and the frames left over.

    Cut each volume by itself: then no window holds two patients. A volume shorter than a window gives none, and all
    its frames are left over. For every start there is, see `store.SequenceDataset`.
    """
    if frames < 0 or length < 1:
        raise ValueError(f"cannot cut {frames} frames into windows of {length}; give a length of at least 1")
    count = frames // length
    return [slice(i * length, (i + 1) * length) for i in range(count)], frames - count * length


def _image(source: Path | Item, position: int | None, plane: str | None) -> tuple[np.ndarray, Sizes]:
    """The array (z, y, x), or (time, y, x) at one z of a 4D file, and the sizes of its voxels in mm (None for time).

    A 4D file of one slice is its frames in time; its slice stays as it is.
    """
    if isinstance(source, Item):
        what, read, path = source.what, source.read, source.path
    else:
        (what, _), read, path = sniff(source), partial(read_image, source), source
    times = what.axes[0] == "t"
    if times and position is None and what.shape[1] == 1:
        position = 0
    if position is None:
        volume = read()
        volume = volume if plane is None else turned(volume, plane)
        return volume.array, volume.voxel_mm
    if not times:
        raise Unreadable(path, f"position is for series of volumes, 4D; this has shape {what.shape} (z, y, x)")
    if not 0 <= position < what.shape[1]:
        raise Unreadable(path, f"position {position} of a series with {what.shape[1]} slices")
    if isinstance(source, Item):
        volumes = [read(frame=i) for i in range(what.shape[0])]
        _, height, width = volumes[0].voxel_mm
        return np.stack([v.array[position] for v in volumes]), (None, height, width)
    frames, affine = read_frames(path)
    _, height, width = Volume(frames[0], affine).voxel_mm
    return frames[:, position], (None, height, width)


def _npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a readable array of numbers ({error})") from error
    return array[:, 0] if array.ndim == 4 and array.shape[1] == 1 else array


def _frames_first(array: np.ndarray, axis: int, mm: Sizes | None, path: Path) -> tuple[np.ndarray, Sizes | None]:
    if array.ndim != 3 or array.dtype.kind not in "fciub":
        raise ValueError(
            f"{path}: {array.dtype} {array.shape}; expected numbers with three axes, frames and two of space"
        )
    if not -3 <= axis < 3:
        raise ValueError(f"{path}: axis {axis} of an array with three; choose 0, 1 or 2")
    axis %= 3
    if mm is not None:
        height, width = (size for i, size in enumerate(mm) if i != axis)
        mm = (mm[axis], height, width)
    return np.moveaxis(array, axis, 0), mm


def _resample(frames: Tensor, shape: list[int]) -> Tensor:
    parts = torch.view_as_real(frames).movedim(-1, 1).squeeze(2) if frames.is_complex() else frames
    parts = F.interpolate(parts, size=shape, mode="bilinear", align_corners=False, antialias=True)
    if not frames.is_complex():
        return parts
    return torch.view_as_complex(parts.movedim(1, -1).contiguous())[:, None]
