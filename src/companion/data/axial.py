"""Axial slices of a head in a volume of any orientation, nose up, in known units."""

from __future__ import annotations

import nibabel
import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor

BELOW_TOP_MM = (40.0, 110.0)


def canonical(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The volume (x, y, z) of magnitudes towards right, front and top, and its voxel size in mm."""
    image = nibabel.as_closest_canonical(
        nibabel.Nifti1Image(np.abs(array).astype(np.float32).transpose(2, 1, 0), affine)
    )
    return np.asarray(image.dataobj), np.linalg.norm(image.affine[:3, :3], axis=0)


def head_slices(array: np.ndarray, affine: np.ndarray, size: str, count: int) -> Tensor:
    """Axial slices (slice, 1, y, x) of a head, nose up, from the top down; 1 is the 99th percentile of the tissue.

    They lie between `BELOW_TOP_MM` below the top of the head. size: "64", 64 x 64 pixels of 3.25 mm, or "native", the
    volume's own pixels, not interpolated, in a field of view of about 240 mm (multiples of 8). Raises ValueError for an
    empty volume.
    """
    x, voxel = canonical(array, affine)
    if not (x > 0).any():
        raise ValueError("the volume is empty")
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
