"""Axial slices of a head in a volume of any orientation, nose up, in known units."""

from __future__ import annotations

import nibabel
import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor

from companion.data.intensity import magnitudes

BELOW_TOP_MM = (40.0, 110.0)
LONGEST, FEWEST = 1.5, 16  # sides of a pixel, long to short; pixels along a side of a slice


def canonical(array: np.ndarray, affine: np.ndarray, name: str = "the volume") -> tuple[np.ndarray, np.ndarray]:
    """The volume (x, y, z) of magnitudes towards right, front and top, and its voxel size in mm.

    Raises ValueError for what is no image of magnitudes, and for a sheared affine.
    """
    refuse_sheared(affine, name)
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(magnitudes(array, name).transpose(2, 1, 0), affine))
    return np.asarray(image.dataobj), np.linalg.norm(image.affine[:3, :3], axis=0)


def refuse_sheared(affine: np.ndarray, name: str) -> None:
    """Raise ValueError for an affine whose axes are far from right angles."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if abs(np.linalg.det(axes)) < 0.9:
        raise ValueError(
            f"{name}: the axes of the affine are not at right angles (sheared); resample the volume to a straight grid "
            "first"
        )


def refuse_long_pixels(voxel: np.ndarray, shape: tuple[int, ...], name: str = "the volume") -> None:
    """Raise ValueError where axial slices of a volume (x, y, z) are too coarse along one side, or no slices at all."""
    (x, y), (width, height) = voxel[:2], shape[:2]
    if max(x, y) > LONGEST * min(x, y) or min(width, height) < FEWEST:
        raise ValueError(
            f"{name}: its axial slices have {width} x {height} pixels of {x:.3g} x {y:.3g} mm; expected nearly square "
            f"pixels, {FEWEST} or more along each side: give a series acquired axially or in 3D, or resample it"
        )


def head_slices(array: np.ndarray, affine: np.ndarray, size: str, count: int) -> Tensor:
    """Axial slices (slice, 1, y, x) of a head, nose up, from the top down; 1 is the 99th percentile of the tissue.

    They lie between `BELOW_TOP_MM` below the top of the head. size: "64", 64 x 64 pixels of 3.25 mm, or "native", the
    volume's own pixels, not interpolated, in a field of view of about 240 mm (multiples of 8). Raises ValueError for an
    empty volume, as `canonical`, and for native pixels that are not nearly square.
    """
    x, voxel = canonical(array, affine)
    if size == "native":
        refuse_long_pixels(voxel, x.shape)
    x = x / np.percentile(x[x > 0.08 * np.percentile(x, 99.9)], 99)
    body = np.argwhere(gaussian_filter(x, 3 / voxel) > 0.1)
    low, high = body.min(0), body.max(0)
    centre, n, mm = (low + high) / 2, 64, np.full(2, 3.25)
    if size == "native":
        mm = voxel[:2]
        n = 8 * round(240 / mm.mean() / 8)
        centre = np.round(centre)
    else:  # what a pixel of 3.25 mm sees
        x = gaussian_filter(x, 0.42 * 3.25 / voxel)
    heights = np.clip(high[2] - np.linspace(*BELOW_TOP_MM, count) / voxel[2], low[2], high[2]).round()
    steps = np.arange(n) - n // 2
    rows, columns = centre[1] - steps * mm[1] / voxel[1], centre[0] + steps * mm[0] / voxel[0]
    yy, xx = np.meshgrid(rows, columns, indexing="ij")
    images = [map_coordinates(x, [xx, yy, np.full_like(xx, z)], order=1) for z in heights]
    return torch.from_numpy(np.clip(np.stack(images), 0, None).astype(np.float32))[:, None]
