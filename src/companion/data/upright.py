"""Upright slices of a head in a volume of any orientation, in known units: axial, or as acquired if those are thick."""

from __future__ import annotations

from typing import NamedTuple

import nibabel
import numpy as np
import torch
from scipy.ndimage import gaussian_filter, map_coordinates
from torch import Tensor

from companion.data.intensity import magnitudes

BELOW_TOP_MM = (40.0, 110.0)  # of axial slices
MIDDLE = (0.75, 0.25)  # of the head's extent, between which sagittal and coronal slices lie
LONG = 1.5  # times that a pixel may be longer than wide; else slices are cut another way
FEWEST = 16  # pixels along a side of a slice


class Cut(NamedTuple):
    """How slices lie in a volume (x, y, z) towards right, front and top: axes across, down and along the image."""

    name: str
    across: int
    down: int
    along: int
    sign: int  # of the step along the image; down the image coordinates always fall

    def upright(self, x: np.ndarray) -> np.ndarray:
        """The volume (x, y, z) as slices (slice, y, x), top or nose up."""
        return x.transpose(self.across, self.down, self.along)[:, ::-1, :: self.sign]

    def spacing(self, voxel: np.ndarray) -> tuple[float, float, float]:
        """Distance of slices, height and width of pixels, of voxels (x, y, z)."""
        return float(voxel[self.across]), float(voxel[self.down]), float(voxel[self.along])


CUTS = (Cut("axial", 2, 1, 0, 1), Cut("coronal", 1, 2, 0, 1), Cut("sagittal", 0, 2, 1, -1))  # noses point left


def cut_of(voxel: np.ndarray, shape: tuple[int, ...], name: str = "the volume") -> Cut:
    """Axial slices, unless their pixels would be more than `LONG` times as long as wide: then slices as acquired.

    voxel, shape: of a volume (x, y, z). A sagittal or coronal scan of thick slices has no axial ones worth the name.
    Raises ValueError where no plane has pixels that are nearly square, `FEWEST` or more along each side.
    """

    def elongation(cut: Cut) -> float:
        height, width = cut.spacing(voxel)[1:]
        return max(height / width, width / height)

    cut = CUTS[0] if elongation(CUTS[0]) <= LONG else min(CUTS, key=elongation)
    if elongation(cut) > LONG or min(shape[cut.down], shape[cut.along]) < FEWEST:
        _, height, width = cut.spacing(voxel)
        raise ValueError(
            f"{name}: its {cut.name} slices have {shape[cut.along]} x {shape[cut.down]} pixels of {width:.3g} x "
            f"{height:.3g} mm; expected nearly square pixels, {FEWEST} or more along each side: resample it"
        )
    return cut


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


def head_slices(array: np.ndarray, affine: np.ndarray, size: str, count: int) -> Tensor:
    """Slices (slice, 1, y, x) of a head as `cut_of` has them; 1 is the 99th percentile of the tissue.

    Axial ones lie between `BELOW_TOP_MM` below the top of the head, from the top down, others about its middle. size:
    "64", 64 x 64 pixels of 3.25 mm, or "native", the volume's own pixels, not interpolated, in a field of view of about
    240 mm (multiples of 8). Raises ValueError for an empty volume, and as `canonical` and `cut_of`.
    """
    x, voxel = canonical(array, affine)
    cut = cut_of(voxel, x.shape)
    x = x / np.percentile(x[x > 0.08 * np.percentile(x, 99.9)], 99)
    body = np.argwhere(gaussian_filter(x, 3 / voxel) > 0.1)
    low, high = body.min(0), body.max(0)
    centre, n, (high_mm, wide_mm) = (low + high) / 2, 64, (3.25, 3.25)
    if size == "native":
        _, high_mm, wide_mm = cut.spacing(voxel)
        n = 8 * round(240 / ((high_mm + wide_mm) / 2) / 8)
        centre = np.round(centre)
    else:  # what a pixel of 3.25 mm sees
        x = gaussian_filter(x, 0.42 * 3.25 / voxel)
    k, ends = cut.across, np.linspace(*(BELOW_TOP_MM if cut.across == 2 else MIDDLE), count)
    places = high[k] - ends / voxel[k] if cut.across == 2 else low[k] + ends * (high[k] - low[k])
    steps = np.arange(n) - n // 2
    rows = centre[cut.down] - steps * high_mm / voxel[cut.down]
    columns = centre[cut.along] + cut.sign * steps * wide_mm / voxel[cut.along]
    at = {cut.down: np.repeat(rows[:, None], n, 1), cut.along: np.repeat(columns[None], n, 0)}
    images = [
        map_coordinates(x, [({k: np.full((n, n), p)} | at)[axis] for axis in range(3)], order=1)
        for p in np.clip(places, low[k], high[k]).round()
    ]
    return torch.from_numpy(np.clip(np.stack(images), 0, None).astype(np.float32))[:, None]
