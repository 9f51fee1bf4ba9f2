"""NIfTI volumes in and out, with the right affine.

Arrays here are `(z, y, x)`; NIfTI files and their affines are in the order (x, y, z). Only the order of the
axes changes, no voxel is moved or resampled: `affine @ (i_x, i_y, i_z, 1)` is the position of `array[i_z,
i_y, i_x]` in mm, in the world of the file (RAS+).
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np

from companion.data.intake.readers import read_image
from companion.data.intake.records import Volume
from companion.files import atomic_write

__all__ = ["Volume", "centred_affine", "load_nifti", "save_nifti"]


def save_nifti(path: str | os.PathLike, array, *, affine=None, voxel_mm=None, units: str = "") -> Path:
    """The path of the NIfTI-1 file written, atomically, from `array` (z, y, x): real, complex, integer or
    boolean.

    Give either `affine` (4 x 4, from (x, y, z) indices to mm) or `voxel_mm` (a number or (z, y, x)), which
    puts the centre of the volume at the origin. `.nii` or `.nii.gz`. units: a note of up to 79 characters in
    the header. Raises ValueError for NaN, other than three axes, or a missing or singular affine.
    """
    path, array = Path(path), np.asarray(array)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path.name}: a NIfTI file ends in .nii or .nii.gz")
    if array.ndim != 3:
        raise ValueError(
            f"{path.name}: expected a volume (z, y, x), got shape {array.shape}; save one frame and channel"
        )
    if (affine is None) == (voxel_mm is None):
        raise ValueError(f"{path.name}: give affine=... or voxel_mm=..., one of them, so that positions are right")
    array = _supported(_finite(array, path.name), path.name)
    affine = centred_affine(array.shape, voxel_mm) if affine is None else _check_affine(affine, path.name)
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = units.encode()[:79]
    content = image.to_bytes()
    with atomic_write(path) as aside:
        aside.write_bytes(gzip.compress(content, 6, mtime=0) if path.name.endswith(".gz") else content)
    return path


def load_nifti(path: str | os.PathLike, *, frame: int | None = None, affine=None) -> Volume:
    """The volume `(z, y, x)` of a NIfTI file, or of another image file that `data.intake` knows, and its affine in mm.

    Values are as stored, or float32 where the file scales them. frame: which volume of a 4D file. affine: for files
    that carry none. Raises FileNotFoundError, or Unreadable (a ValueError) for a damaged file, NaN, 4D without `frame`,
    a missing affine, and anything else that `data.intake` refuses.
    """
    return read_image(path, frame=frame, affine=affine)


def centred_affine(shape: Sequence[int], voxel_mm) -> np.ndarray:
    """The 4 x 4 affine of an axis-aligned volume, shape (z, y, x), whose centre is the origin; voxel_mm (z,
    y, x)."""
    size = np.broadcast_to(np.asarray(voxel_mm, dtype=float), (3,))[::-1]
    if not (np.isfinite(size).all() and (size > 0).all()):
        raise ValueError(f"voxel_mm must be positive, got {voxel_mm}")
    affine = np.diag([*size, 1.0])
    affine[:3, 3] = -size * (np.asarray(shape[::-1]) - 1) / 2
    return affine


def _supported(array: np.ndarray, name: str) -> np.ndarray:
    """The array in a type that NIfTI readers know."""
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype.kind not in "iufc":
        raise ValueError(f"{name}: cannot store {array.dtype}; use numbers")
    if array.dtype == np.int64 or array.dtype == np.uint64:
        narrow = array.astype(np.int32)
        if not np.array_equal(narrow, array):
            raise ValueError(f"{name}: integers beyond 32 bits; use a float array")
        return narrow
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _check_affine(affine, name: str) -> np.ndarray:
    affine = np.asarray(affine, dtype=float)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise ValueError(f"{name}: the affine must be a finite, invertible 4 x 4 matrix, got {affine.tolist()}")
    return affine


def _finite(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind in "fc" and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{name}: {bad} NaN or infinite voxels of {array.size}; mask or repair them first")
    return array
