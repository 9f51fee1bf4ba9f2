"""Fully 3D PET: the projector of a cylindrical scanner, with oblique planes and, where asked for, time of flight.

Volumes are `(..., 1, z, y, x)`, sinograms `(..., 1, plane, angle, bin)` or `(..., 1, tof, plane, angle, bin)`, planes
in the order of the Michelogram: segment 0, +1, -1, +2, ... by growing ring difference, each from the first ring on.
Lengths are in mm; the axis of the scanner is z, its middle the middle of the volume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.special import erf
from torch import Tensor

from companion.operators.linear import LinearOperator, Shape, derived, unset
from companion.operators.pet import _from_scipy, _Linear

VIEWS = 2**22  # numbers of resampled views that are held at a time: what stays in the processor's cache
COLUMNS = 16  # views times items that go through a sparse product together, at least: fewer read its indices in vain
FWHM = math.sqrt(8 * math.log(2))  # in standard deviations of a Gaussian


@dataclass(frozen=True)
class Cylinder:
    """Rings of detectors around a volume of `shape` (z, y, x), and which of their pairs are measured.

    voxel_mm: (z, y = x). angles: how many over half a turn, or the angles in radians. bins of bin_mm, centred;
    arc_corrected: whether they are even. If not, their distance shrinks outwards as along the ring, s = R sin(u / R).
    rings, ring_mm: how many and their distance; radius_mm of their detectors. max_difference: of the rings of a pair,
    by default all. span: an odd number; pairs of so many ring differences with the same middle are added up in a plane.
    tof_bins of tof_bin_mm along each line, centred, of a scanner that places an event to tof_fwhm_mm; the outermost
    bins take what is further out, so that bins add up to the measurement without TOF.
    Raises ValueError for sizes that are not positive, even spans, and lines or volumes that leave the cylinder.
    """

    shape: Shape
    voxel_mm: tuple[float, float]
    angles: int | Sequence[float]
    bins: int
    bin_mm: float
    rings: int
    ring_mm: float
    radius_mm: float
    max_difference: int = unset
    span: int = 1
    tof_bins: int = 1
    tof_bin_mm: float = 0.0
    tof_fwhm_mm: float = 0.0
    arc_corrected: bool = True

    def __post_init__(self):
        angles = self.angles
        if isinstance(angles, int):
            angles = np.pi * np.arange(angles) / max(angles, 1)
        most = self.rings - 1 if self.max_difference is None else self.max_difference
        for name, value in {"angles": tuple(map(float, angles)), "shape": tuple(self.shape)}.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "max_difference", most)
        sizes = (*self.shape, *self.voxel_mm, len(self.theta), self.bins, self.bin_mm, self.rings, self.ring_mm)
        if len(self.shape) != 3 or min(sizes) <= 0 or not 0 <= most < self.rings or self.span % 2 != 1:
            raise ValueError(
                f"volume {self.shape}, voxels of {self.voxel_mm} mm, {len(self.theta)} angles, {self.bins} bins, "
                f"{self.rings} rings, ring differences up to {most}, span {self.span}: need positive sizes, an odd "
                "span, and differences below the number of rings"
            )
        corner = math.hypot(*self.shape[1:]) / 2 * self.voxel_mm[1]
        widest = (self.bins - 1) / 2 * self.bin_mm
        if max(widest / (1 if self.arc_corrected else math.pi / 2), corner) >= self.radius_mm:
            raise ValueError(
                f"bins up to {widest:g} mm{'' if self.arc_corrected else ' along the ring'} and a volume up to "
                f"{corner:g} mm from the axis leave the ring of {self.radius_mm:g} mm; give sizes in mm"
            )
        if self.tof_bins < 1 or (self.tof_bins > 1 and not (self.tof_bin_mm > 0 and self.tof_fwhm_mm > 0)):
            raise ValueError(
                f"{self.tof_bins} TOF bins of {self.tof_bin_mm} mm, resolution {self.tof_fwhm_mm} mm: give both, in mm"
            )

    @property
    def theta(self) -> tuple[float, ...]:
        """The angles in radians."""
        return cast("tuple[float, ...]", self.angles)

    @property
    def shifts_mm(self) -> np.ndarray:
        """The distance (bin,) of each bin's lines from the axis, signed."""
        along = (np.arange(self.bins) - (self.bins - 1) / 2) * self.bin_mm
        return along if self.arc_corrected else self.radius_mm * np.sin(along / self.radius_mm)

    @property
    def planes(self) -> list[list[tuple[int, int]]]:
        """The pairs of rings (at the lower end, at the upper end of the lines) of each plane, in Michelogram order."""
        half, planes = self.span // 2, []
        for segment in range((self.max_difference + half) // self.span + 1):
            for sign in (1, -1) if segment else (1,):
                middles: dict[int, list[tuple[int, int]]] = {}
                for difference in range(segment * self.span - half, segment * self.span + half + 1):
                    for first in range(self.rings):
                        pair = first, first + sign * difference
                        if 0 <= pair[1] < self.rings and abs(difference) <= self.max_difference:
                            middles.setdefault(sum(pair), []).append(pair)
                planes += [middles[m] for m in sorted(middles)]
        return planes

    @property
    def volume_shape(self) -> Shape:
        return (1, *self.shape)

    @property
    def sinogram_shape(self) -> Shape:
        tof = (self.tof_bins,) if self.tof_bins > 1 else ()
        return (1, *tof, len(self.planes), len(self.theta), self.bins)


@dataclass(frozen=True, eq=False, repr=False)
class Projector3D(LinearOperator):
    """P: activity to its integrals along the lines of a `Cylinder` (activity mm), summed over the pairs of each plane.

    A line is sampled at steps of one voxel, trilinearly between voxels. So a projection is two sparse products: each
    slice resampled along the lines of a view, one matrix an angle, and steps and slices gathered into planes (and
    TOF bins), one matrix a bin that all views share. Matrices are made at first use and kept; the adjoint is made of
    their transposes. Works on the device and in the precision of its input.
    """

    scanner: Cylinder
    _tables: dict = field(default_factory=dict)

    domain_shape = derived(lambda self: self.scanner.volume_shape)
    range_shape = derived(lambda self: self.scanner.sinogram_shape)
    domain_dtype = range_dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self._project, self._backproject)

    def adjoint(self, y: Tensor) -> Tensor:
        return _Linear.apply(y, self._backproject, self._project)

    def to(self, device) -> Projector3D:
        """The same operator: its tables follow the device of the input."""
        return self

    def some_angles(self, angles: slice) -> Projector3D:
        """The projector of some of the angles, which shares its tables."""
        return Projector3D(replace(self.scanner, angles=self.scanner.theta[angles]), self._tables)

    def _project(self, x: Tensor) -> Tensor:
        c, lead = self.scanner, x.shape[: x.ndim - 4]
        rows = x.reshape(-1, c.shape[0], math.prod(c.shape[1:]))
        pixels = rows.permute(2, 1, 0).reshape(rows.shape[2], -1)  # (pixel, z * item)
        y = x.new_empty(c.bins, math.prod(c.sinogram_shape[1:-2]), len(c.theta), len(rows))  # of tof * plane
        for some in self._view_blocks(len(rows)):
            # each view: (bin, step * z, item)
            along = [(self._view(v, x)[0] @ pixels).reshape(c.bins, -1, len(rows)) for v in some]
            for j in range(c.bins):
                block = torch.stack([view[j] for view in along], 1).flatten(1)  # (step * z, view * item)
                y[j, :, some.start : some.stop] = (self._axial(j, x)[0] @ block).unflatten(1, (len(some), len(rows)))
        return y.permute(3, 1, 2, 0).reshape(*lead, *c.sinogram_shape)

    def _backproject(self, y: Tensor) -> Tensor:
        c = self.scanner
        lead = y.shape[: y.ndim - len(c.sinogram_shape)]
        rows = y.reshape(math.prod(lead), -1, len(c.theta), c.bins).permute(3, 1, 2, 0)  # (bin, plane, view, item)
        items = rows.shape[-1]
        total = y.new_zeros(math.prod(c.shape[1:]), c.shape[0] * items)
        for some in self._view_blocks(items):
            part = rows[:, :, some.start : some.stop].flatten(2)
            along = y.new_empty(len(some), c.bins, self._steps * c.shape[0], items)
            for j in range(c.bins):
                block = self._axial(j, y)[1] @ part[j]  # (step * z, view * item)
                along[:, j] = block.unflatten(1, (len(some), items)).transpose(0, 1)
            for v, view in zip(some, along, strict=True):
                total.addmm_(self._view(v, y)[1], view.reshape(-1, c.shape[0] * items))
        x = total.reshape(-1, c.shape[0], items).permute(2, 1, 0)
        return x.reshape(*lead, *c.volume_shape)

    def _view_blocks(self, items: int) -> list[range]:
        one = self.scanner.bins * self._steps * self.scanner.shape[0] * max(1, items)
        size, count = max(VIEWS // one, -(-COLUMNS // max(1, items))), len(self.scanner.theta)
        return [range(i, min(i + size, count)) for i in range(0, count, size)]

    @property
    def _steps(self) -> int:
        """Samples along a line: the diagonal of a slice."""
        return math.ceil(math.hypot(*self.scanner.shape[1:])) + 1

    @property
    def _along(self) -> np.ndarray:
        """Where a line is sampled, mm from its middle."""
        return (np.arange(self._steps) - (self._steps - 1) / 2) * self.scanner.voxel_mm[1]

    def _view(self, v: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix (bin * step, pixel) of a view and its transpose: values of a slice along its lines, bilinear."""
        angle = self.scanner.theta[v]
        return self._keep(("view", angle), like, lambda: self._bilinear(angle))

    def _bilinear(self, angle: float) -> coo_array:
        c = self.scanner
        s = c.shifts_mm[:, None]
        x, y = s * math.cos(angle) - self._along * math.sin(angle), s * math.sin(angle) + self._along * math.cos(angle)
        column = x / c.voxel_mm[1] + (c.shape[2] - 1) / 2
        row = (c.shape[1] - 1) / 2 - y / c.voxel_mm[1]
        parts = []
        for at_row, of_row in _corners(row, c.shape[1]):
            for at_column, of_column in _corners(column, c.shape[2]):
                parts.append((of_row * of_column, at_row * c.shape[2] + at_column))
        values, pixels = (np.stack(part).reshape(4, -1) for part in zip(*parts, strict=True))
        lines = np.broadcast_to(np.arange(values.shape[1]), values.shape)
        return _sparse(values, lines, pixels, (values.shape[1], math.prod(c.shape[1:])))

    def _axial(self, j: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix (tof * plane, step * z) of a bin and its transpose; bins on both sides of the axis share it."""
        shift = abs(float(self.scanner.shifts_mm[j]))
        return self._keep(("axial", round(shift, 9)), like, lambda: self._gathered(shift))

    def _gathered(self, shift: float) -> coo_array:
        c, depth = self.scanner, self.scanner.shape[0]
        planes = c.planes
        pairs = np.array([pair for plane in planes for pair in plane])
        plane = np.repeat(np.arange(len(planes)), [len(p) for p in planes])[:, None]
        half = math.sqrt(c.radius_mm**2 - shift**2)  # from the middle of a line to its detectors, seen along the axis
        ends = (pairs - (c.rings - 1) / 2) * c.ring_mm
        slope = (ends[:, 1] - ends[:, 0])[:, None] / (2 * half)
        z = (ends.mean(1)[:, None] + slope * self._along) / c.voxel_mm[0] + (depth - 1) / 2  # (pair, step)
        stretch = np.sqrt(1 + slope**2)
        times = self._tof(self._along * stretch)  # (tof, pair, step)
        step = np.broadcast_to(np.arange(self._steps), z.shape)
        values, rows, columns = [], [], []
        for at, share in _corners(z, depth):
            for k, time in enumerate(times):
                values.append(share * time * stretch * c.voxel_mm[1])
                rows.append(np.broadcast_to(k * len(planes) + plane, z.shape))
                columns.append(step * depth + at)
        shape = (len(times) * len(planes), self._steps * depth)
        return _sparse(np.stack(values), np.stack(rows), np.stack(columns), shape)

    def _tof(self, place: np.ndarray) -> np.ndarray:
        """The share of what happens at a place on the line, mm from its middle, in each TOF bin, first axis."""
        c = self.scanner
        if c.tof_bins == 1:
            return np.ones((1, *place.shape))
        edges = (np.arange(1, c.tof_bins) - c.tof_bins / 2) * c.tof_bin_mm
        below = (1 + erf((edges[:, None, None] - place) / (math.sqrt(2) * c.tof_fwhm_mm / FWHM))) / 2
        return np.diff(below, axis=0, prepend=0, append=1)

    def _keep(self, key: tuple, like: Tensor, make) -> tuple[Tensor, Tensor]:
        key = (*key, like.dtype, str(like.device))
        if key not in self._tables:
            with torch.inference_mode(False), torch.no_grad():
                matrix = make().tocsr().astype(np.float64 if like.dtype == torch.float64 else np.float32)
                self._tables[key] = tuple(_from_scipy(m).to(like.device) for m in (matrix, matrix.T.tocsr()))
        return self._tables[key]


def _corners(at: np.ndarray, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The two samples around each place on an axis of n, and their linear weights; 0 outside."""
    first = np.floor(at).astype(np.int64)
    share = at - first
    return [
        (np.clip(i, 0, n - 1), np.where((i >= 0) & (i < n), w, 0.0))
        for i, w in ((first, 1 - share), (first + 1, share))
    ]


def _sparse(values, rows, columns, shape) -> coo_array:
    hit = values.ravel() > 1e-7 * values.max()
    entries = values.ravel()[hit], (rows.ravel()[hit], columns.ravel()[hit])
    return coo_array(entries, shape=shape)
