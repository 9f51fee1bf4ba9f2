"""Slices of a head on the grid of the virtual cohort, wherever and however large the head is, and back.

A network that has seen heads of one place and size takes a small head for a slice further up. So a person's volume is
brought to the cohort's template by an affine registration first, and what was made there is brought back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter, map_coordinates
from torch import Tensor

from companion.data import anatomy
from companion.data.intensity import FOREGROUND, Scale, Size, percentile_scale, scaled
from companion.data.nifti import Volume
from companion.data.registration import WHOLE, Registration, to_template

MARGIN_MM = 4.0  # around the template's brain, kept of whole heads
RIND_MM = 6.0  # of the template's brain, which does not say how bright a whole head's brain is: fat and eyes are near


@dataclass(frozen=True)
class OnTemplate:
    """How a volume of `shape` (z, y, x) and `affine` becomes axial slices on the cohort's grid, and back.

    found: where the volume lies to the template. size: pixels (y, x) of `pixel_mm`. heights: mm in MNI, evenly spaced.
    stripped: whether what lies outside of the template's brain is set to the smallest value: of whole heads, since the
    cohort has brains only. Make one with `OnTemplate.of`. All fields can be stored as JSON.
    """

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    found: Registration
    size: Size
    pixel_mm: float
    heights: tuple[float, ...]
    stripped: bool = False

    def __post_init__(self):
        if not isinstance(self.found, Registration):
            object.__setattr__(self, "found", Registration(**self.found))
        object.__setattr__(self, "affine", tuple(tuple(float(v) for v in row) for row in self.affine))
        for name in ("shape", "size", "heights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @classmethod
    def of(
        cls,
        volume: Volume,
        size: Size,
        *,
        pixel_mm: float | None = None,
        heights: tuple[float, ...] | None = None,
        step_mm: float | None = None,
        found: Registration | None = None,
    ) -> OnTemplate:
        """That of a volume, registered here unless `found` says where it lies.

        pixel_mm: by default the cohort's field of view fills the rows. heights: by default from end to end of the
        volume, or of the template where that is less, every `step_mm` (by default half a pixel).
        """
        found = found or to_template(volume)
        pixel_mm = pixel_mm or anatomy.FIELD_OF_VIEW_MM / size[-1]
        if heights is None:
            low, high = _reach(volume, found)
            step = step_mm or pixel_mm / 2
            count = max(1, int((high - low) / step) + 1)
            heights = tuple((low + high) / 2 + step * (i - (count - 1) / 2) for i in range(count))
        made = cls(volume.array.shape, volume.affine.tolist(), found, size, pixel_mm, heights)
        return cls(made.shape, made.affine, found, size, pixel_mm, heights, made.outside(volume.array) > WHOLE)

    def cut(self, array: np.ndarray, nearest: bool = False) -> Tensor:
        """The slices (slice, 1, y, x), float32, of `array` (z, y, x), no sharper than pixels; `nearest`: of labels."""
        if tuple(array.shape) != self.shape:
            raise ValueError(f"this slicing is for volumes {self.shape}, got {tuple(array.shape)}; make another")
        array = np.asarray(array, np.float32)
        own = np.linalg.norm(np.array(self.affine)[:3, :3], axis=0)[::-1]
        if not nearest:
            wide = self.pixel_mm * self.found.scale
            array = gaussian_filter(array, np.sqrt((wide**2 - own**2).clip(0)) / 2.355 / own)
        low, slices = float(array.min()), []
        for inside, points in zip(self._brain, self._points, strict=True):
            at = self._to_voxel(points)
            made = map_coordinates(array, at, order=0 if nearest else 1, cval=low)
            slices.append(np.where(inside, made, low) if self.stripped else made)
        return torch.from_numpy(np.stack(slices).astype(np.float32))[:, None]

    def scaled(self, slices: Tensor, scale: Scale | None = None, name: str = "the image") -> tuple[np.ndarray, Scale]:
        """What `cut` made, in [0, 1], and the scale, by default that of its values, of whole heads inside the brain.

        Raises ValueError as `intensity.scaled`.
        """
        values = slices.numpy()
        if scale is None and self.stripped:
            inside = brain(self.size, self.pixel_mm, self.heights, -RIND_MM)[:, None]
            scale = percentile_scale(np.where(inside, values, values.min())) if inside.any() else None
        return scaled(values, scale, name)

    def assemble(self, slices: Tensor, fill: float = 0.0, nearest: bool = False) -> np.ndarray:
        """The volume (z, y, x), float32, on the person's own grid, of slices (slice, 1, y, x); `fill` beyond them."""
        expected = (len(self.heights), 1, *self.size)
        if tuple(slices.shape) != expected:
            raise ValueError(f"expected the slices {expected} of the whole volume, got {tuple(slices.shape)}")
        stack = slices[:, 0].detach().cpu().float().numpy()
        to_mm = np.linalg.inv(self.found.array) @ np.array(self.affine)
        to_grid = np.linalg.inv(self._grid) @ to_mm  # (x, y, z) indices of the person to those of the stack
        z, y, x = self.shape
        rows, columns = np.mgrid[:y, :x]
        made = []
        for level in range(z):
            at = np.stack([columns, rows, np.full_like(rows, level)], -1) @ to_grid[:3, :3].T + to_grid[:3, 3]
            made.append(map_coordinates(stack, np.moveaxis(at, -1, 0)[::-1], order=0 if nearest else 1, cval=fill))
        return np.stack(made).astype(np.float32)

    def outside(self, array: np.ndarray) -> float:
        """The share of the foreground of a volume (z, y, x) that lies outside of the template's brain."""
        values = self.cut(array)[:, 0].numpy()
        values = percentile_scale(values).apply(values) > FOREGROUND if np.ptp(values) > 0 else values > 0
        return float((values & ~self._brain).sum() / max(1, values.sum()))

    def __str__(self) -> str:
        step = self.step_mm
        text = f"{len(self.heights)} axial slices, {step:.3g} mm apart, of {self.size[0]} x {self.size[1]} pixels of "
        text += f"{self.pixel_mm:.4g} mm on the template ({self.found})"
        return text + (", a whole head cut to the template's brain" if self.stripped else "")

    @property
    def step_mm(self) -> float:
        """Distance of the slices on the template."""
        return self.heights[1] - self.heights[0] if len(self.heights) > 1 else self.pixel_mm

    @property
    def _grid(self) -> np.ndarray:
        """From (x, y, slice) indices of the stack to mm of the template."""
        matrix = anatomy.affine((1, *self.size), self.pixel_mm)
        matrix[2, 2], matrix[2, 3] = self.step_mm, self.heights[0]
        return matrix

    @property
    def _points(self) -> Tensor:
        """Mm of the template (slice, y, x, 3)."""
        shape = (len(self.heights), *self.size)
        return anatomy.grid_mm(shape, self.pixel_mm, torch.tensor(self.heights, dtype=torch.float64))

    @property
    def _brain(self) -> np.ndarray:
        """Where the template's brain is, and `MARGIN_MM` around, (slice, y, x)."""
        return brain(self.size, self.pixel_mm, self.heights, MARGIN_MM)

    def _to_voxel(self, points: Tensor) -> np.ndarray:
        """Indices (3, y, x) of axes (z, y, x) of the person's volume at points (y, x, 3) of the template."""
        matrix = np.linalg.inv(np.array(self.affine)) @ self.found.array
        at = points.numpy().astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
        return np.moveaxis(at, -1, 0)[::-1]


@lru_cache(maxsize=8)
def brain(size: Size, pixel_mm: float, heights: tuple[float, ...], margin_mm: float) -> np.ndarray:
    """Where the template's brain is, and so much around it in every slice, or less if below 0; bool (slice, y, x)."""
    points = anatomy.grid_mm((len(heights), *size), pixel_mm, torch.tensor(heights, dtype=torch.float64))
    inside = anatomy.tissue_maps(None, points, pixel_mm)[:3].sum(0).numpy() > 0.5
    change = binary_dilation if margin_mm > 0 else binary_erosion
    pixels = max(1, round(abs(margin_mm) / pixel_mm))
    return np.stack([change(slice_, iterations=pixels) for slice_ in inside])


def slab_heights(count: int) -> tuple[float, ...]:
    """`count` heights (mm in MNI), the middles of equal parts of the slab that the cohort's slices come from."""
    low, high = anatomy.SLAB_MM
    return tuple(low + (high - low) * (i + 0.5) / count for i in range(count))


def _reach(volume: Volume, found: Registration) -> tuple[float, float]:
    """The lowest and highest height on the template that a volume shows something at, within the template's brain."""
    filled = np.argwhere(percentile_scale(volume.array).apply(volume.array.astype(np.float32)) > FOREGROUND)
    ends = np.stack([filled.min(0), filled.max(0)])[:, ::-1]
    corners = np.array([(ends[i, 0], ends[j, 1], ends[k, 2], 1) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    z = (corners @ (np.linalg.inv(found.array) @ volume.affine).T)[:, 2]
    return max(float(z.min()), -72.0), min(float(z.max()), 84.0)
