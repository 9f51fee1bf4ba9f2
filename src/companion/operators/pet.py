"""Emission tomography: parallel-beam projector, the model of a scan, Poisson counts and their likelihood.

Activity images are `(..., 1, y, x)` or stacks `(..., 1, z, y, x)`, not negative; sinograms are `(..., 1, angle, bin)`
or `(..., 1, z, angle, bin)`. Row 0 of an image lies at the largest y, column 0 at the smallest x, the origin is the
centre; the line of angle theta and shift s is `x cos(theta) + y sin(theta) = s`. Lengths are in mm.

A scan is `y ~ Poisson(A x + background)`: `A` turns activity (kBq/mL) into expected counts, `background` is what
randoms and scatter add. A dose is a factor on both, so activity keeps its units at every dose.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from scipy.special import erf
from torch import Tensor

from companion.operators.counts import _per_item, check_counts
from companion.operators.linear import (
    Composition,
    Diagonal,
    LinearOperator,
    Scaled,
    Shape,
    check_finite,
    derived,
    unset,
)

SAME_ANGLE = 1e-13  # radians: closer angles are one angle, when symmetries are looked for
STORED_MIB = 1024  # `storage="auto"` keeps tables up to this size, and computes larger ones on the fly
BLOCK = 2**19  # chord lengths computed at a time
CACHE_FLOATS = {"cpu": 2**18, "cuda": 2**28}  # columns are multiplied in groups that fit the cache (or memory),
COLUMNS = 8  # but as many at least: fewer waste the matrix that is read


# ------------------------------------------------------------------------------------------------------- geometry
@dataclass(frozen=True)
class ParallelBeam:
    """Lines through an image of `shape` (y, x), or through each slice of a stack (z, y, x).

    angles: how many over half a turn, or the angles themselves in radians; by default twice the image's side.
    bins: shifts per angle, centred; by default the image's side. bin_mm: their distance, by default `pixel_mm`.
    bin_offset: by how many bins the axis of rotation lies behind the middle of the bins. radius_mm: of a ring whose
    bins are not arc corrected: their distance is `bin_mm` in the middle and shrinks outwards, s = R sin(u / R); none:
    bins are even. Raises ValueError for sizes that are not positive, angles that are not finite, bins beyond the ring.
    """

    shape: Shape
    angles: int | Sequence[float] | None = None
    bins: int = unset
    pixel_mm: float = 1.0
    bin_mm: float = unset
    bin_offset: float = 0.0
    radius_mm: float | None = None

    def __post_init__(self):
        shape = tuple(int(n) for n in self.shape)
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"shape must be (y, x) or (z, y, x) with positive sizes, got {self.shape}")
        side = max(shape[-2:])
        angles = 2 * side if self.angles is None else self.angles
        if isinstance(angles, int):
            angles = np.pi * np.arange(angles) / max(angles, 1)
        angles = tuple(float(a) for a in angles)
        bins = side if self.bins is None else int(self.bins)
        bin_mm = self.pixel_mm if self.bin_mm is None else self.bin_mm
        if not angles or bins < 1 or not (self.pixel_mm > 0 and bin_mm > 0) or not np.isfinite(angles).all():
            raise ValueError(
                f"{len(angles)} angles, {bins} bins of {bin_mm} mm, pixels of {self.pixel_mm} mm: "
                "need at least one finite angle and one bin, and positive sizes"
            )
        for name, value in {"shape": shape, "angles": angles, "bins": bins, "bin_mm": float(bin_mm)}.items():
            object.__setattr__(self, name, value)
        widest = ((bins - 1) / 2 + abs(self.bin_offset)) * bin_mm
        if not np.isfinite(widest) or (self.radius_mm is not None and not widest < self.radius_mm * np.pi / 2):
            raise ValueError(
                f"bins up to {widest:.4g} mm from the centre, along a ring of radius {self.radius_mm} mm; half of its "
                "circumference is the most: give radius_mm and bin_mm in mm, and bin_offset in bins"
            )

    @property
    def theta(self) -> tuple[float, ...]:
        """The angles in radians."""
        return cast("tuple[float, ...]", self.angles)

    @classmethod
    def published(cls, size: int) -> ParallelBeam:
        """The geometry of the published system: the square [-1, 1]^2, 2 size angles, size bins."""
        return cls((size, size), pixel_mm=2 / size)

    @property
    def shifts_mm(self) -> np.ndarray:
        """The distance (bin,) of each bin's lines from the axis of rotation, signed."""
        along = (np.arange(self.bins) - (self.bins - 1) / 2 - self.bin_offset) * self.bin_mm
        return along if self.radius_mm is None else self.radius_mm * np.sin(along / self.radius_mm)

    def bin_at(self, shift_mm: Tensor) -> Tensor:
        """The bin, with fractions, of lines at a distance from the axis: the inverse of `shifts_mm`."""
        if self.radius_mm is not None:
            shift_mm = self.radius_mm * (shift_mm / self.radius_mm).clamp(-1, 1).asin()
        return shift_mm / self.bin_mm + (self.bins - 1) / 2 + self.bin_offset

    @property
    def slice_shape(self) -> Shape:
        return self.shape[-2:]

    @property
    def image_shape(self) -> Shape:
        """Axes of an image: (1, y, x) or (1, z, y, x)."""
        return (1, *self.shape)

    @property
    def sinogram_shape(self) -> Shape:
        """Axes of a sinogram: (1, angle, bin) or (1, z, angle, bin)."""
        return (1, *self.shape[:-2], len(self.theta), self.bins)

    @property
    def rays(self) -> int:
        return len(self.theta) * self.bins


def _chord(distance: Tensor, major: Tensor, minor: Tensor, pixel_mm: float) -> Tensor:
    """The length (mm) of a line in a pixel, in closed form.

    major, minor: the larger and smaller of |cos|, |sin|. distance: from the pixel's centre to the line along the axis
    of the larger one, in pixels. The chord is constant up to (1 - r) / 2, r = minor / major, and falls linearly to 0
    at (1 + r) / 2. A line on the edge of two pixels (r = 0, distance 1/2) is shared by both; so that rounding does not
    decide between them, edges are 1e-7 pixels wide.
    """
    ratio = (minor / major).clamp(min=1e-7)
    share = ((0.5 - distance) / ratio + 0.5).clamp(0, 1)
    share = torch.where(share > 1e-12, share, 0.0)  # rounding at a corner is not a chord
    return share * (pixel_mm / major)


def _along_rays(beam: ParallelBeam, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Chord lengths (ray, step, 2), float64, and the pixels they are in; where a ray leaves the image, length 0.

    A ray is followed along the image axis it is closer to; there it meets at most two pixels of each row (or column).
    """
    height, width = beam.slice_shape
    angles = torch.tensor(beam.theta, dtype=torch.float64, device=rays.device)[rays // beam.bins]
    shift = torch.from_numpy(beam.shifts_mm / beam.pixel_mm).to(rays.device)[rays % beam.bins]
    cos, sin = angles.cos(), angles.sin()
    down = cos.abs() >= sin.abs()  # closer to the y axis: step through rows, cross over columns
    step = torch.arange(max(height, width), device=rays.device)
    # along the ray, in pixels: y of each row or x of each column, and where the ray crosses it
    steps, crossed = (torch.where(down, *pair)[:, None] for pair in ((height, width), (width, height)))
    position = torch.where(down, -1.0, 1.0)[:, None] * (step.double() - (steps - 1) / 2)
    major, minor = torch.where(down, cos, sin)[:, None], torch.where(down, sin, cos)[:, None]
    crossing = torch.where(down, 1.0, -1.0)[:, None] * (shift[:, None] - minor * position) / major + (crossed - 1) / 2
    first = crossing.floor()
    index = torch.stack([first, first + 1], -1)
    length = _chord((index - crossing[..., None]).abs(), major.abs()[..., None], minor.abs()[..., None], beam.pixel_mm)
    inside = (index >= 0) & (index < crossed[..., None]) & (step[:, None] < steps[..., None])
    across = index.long()
    pixel = torch.where(down[:, None, None], step[:, None] * width + across, across * width + step[:, None])
    return torch.where(inside, length, 0.0), torch.where(inside, pixel, 0)


def _around_pixels(beam: ParallelBeam, pixels: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Chord lengths (pixel, angle, bin), float64, and the rays they are on, for the numbers `angles` of all angles."""
    height, width = beam.slice_shape
    theta = torch.tensor(beam.theta, dtype=torch.float64, device=pixels.device)[angles]
    cos, sin = theta.cos(), theta.sin()
    x, y = (pixels % width).double() - (width - 1) / 2, (height - 1) / 2 - (pixels // width).double()
    centre = (x[:, None] * cos + y[:, None] * sin) * beam.pixel_mm
    reach = (cos.abs() + sin.abs()) / 2 * beam.pixel_mm
    first = (beam.bin_at(centre - reach) - 1e-6).ceil().clamp(min=0)
    last = (beam.bin_at(centre + reach) + 1e-6).floor().clamp(max=beam.bins - 1)
    index = first[..., None] + torch.arange(max(0, int((last - first).max())) + 1, device=pixels.device)
    major, minor = torch.maximum(cos.abs(), sin.abs()), torch.minimum(cos.abs(), sin.abs())
    inside = index <= last[..., None]
    shifts = torch.from_numpy(beam.shifts_mm).to(pixels.device)[index.long().clamp(0, beam.bins - 1)]
    distance = (shifts - centre[..., None]).abs() / beam.pixel_mm / major[:, None]
    length = _chord(distance, major[:, None], minor[:, None], beam.pixel_mm)
    ray = angles[:, None] * beam.bins + index.long()
    return torch.where(inside, length, 0.0), torch.where(inside, ray, 0)


# ------------------------------------------------------------------------------------------------------ symmetries
@dataclass(frozen=True, eq=False)
class _Symmetries:
    """The flips and quarter turns g that map the image and all rays onto themselves: A(g ray, g pixel) = A(ray, pixel).

    Only the rows of `kept` rays need be known: (A x)[g ray] = sum over pixels of A(ray, pixel) x[g pixel]. So a product
    of an eighth of the matrix with eight images (turned and flipped) replaces a product of the matrix with one. The
    images lie side by side as columns, `width` of them in one product and `order / width` products.
    """

    kept: Tensor  # (ray) numbers of the rays whose rows are known
    turned: Tensor  # (product, pixel, column) flattened: the pixel that g takes each pixel to
    back: Tensor  # (pixel, g) flattened: where each pixel is found among (product, pixel, column)
    source: Tensor  # (all rays) where each ray is found among (product, kept ray, column)
    order: int
    width: int

    @classmethod
    def of(cls, beam: ParallelBeam) -> _Symmetries:
        pixels, rays = (torch.stack(maps) for maps in zip(*_elements(beam), strict=True))  # (g, pixel), (g, ray)
        kept = rays.amin(0).unique()
        # Neighbours in angle meet nearly the same pixels: side by side, they find them in the cache.
        kept = kept[torch.argsort(kept % beam.bins, stable=True)]
        source = torch.full((beam.rays,), -1)
        for g in reversed(range(len(rays))):
            source[rays[g, kept]] = torch.arange(len(kept)) * len(rays) + g
        if (source < 0).any():  # angles so irregular that the maps form no group: do without
            pixels, kept, source = pixels[:1], torch.arange(beam.rays), torch.arange(beam.rays)
        order = len(pixels)
        back = pixels.argsort(1) * order + torch.arange(order)[:, None]
        return cls(kept, pixels.T.flatten(), back.T.flatten(), source, order, order)

    def split(self, width: int) -> _Symmetries:
        """The same for products of `width` columns; self has one product of all."""

        def moved(place: Tensor, rows: int) -> Tensor:
            row, g = place // self.order, place % self.order
            return (g // width * rows + row) * width + g % width

        pixels = len(self.turned) // self.order
        turned = self.turned.reshape(pixels, -1, width).transpose(0, 1).flatten()
        back, source = moved(self.back, pixels), moved(self.source, len(self.kept))
        return _Symmetries(self.kept, turned, back, source, self.order, width)

    def to(self, device) -> _Symmetries:
        return replace(self, **{n: getattr(self, n).to(device) for n in ("kept", "turned", "back", "source")})


def _elements(beam: ParallelBeam):
    """Pairs (pixel g takes each pixel to, ray g takes each ray to) of the symmetries of a geometry, identity first."""
    height, width = beam.slice_shape
    index = torch.arange(height * width).reshape(height, width)
    bins = np.arange(beam.bins)
    angles = np.asarray(beam.theta)
    flips = {(): (1, 0), (0, 1): (1, 2), (1,): (-1, 2), (0,): (-1, 0)}  # theta becomes sign theta + quarters pi / 2
    for swap in (False, True) if height == width else (False,):
        for axes, (sign, quarters) in flips.items():
            image = (index.T if swap else index).flip(axes)
            if swap:  # (x, y) becomes (-y, -x)
                sign, quarters = -sign, -1 - quarters
            if not swap and not axes:
                to, mirrored = np.arange(len(angles)), np.zeros(len(angles), bool)
            else:
                to, mirrored = _match(angles, sign * angles + quarters * np.pi / 2)
            if (to < 0).any() or len(np.unique(to)) < len(to) or (mirrored.any() and beam.bin_offset):
                continue
            shifted = np.where(mirrored[:, None], beam.bins - 1 - bins, bins)
            yield image.flatten(), torch.from_numpy((to[:, None] * beam.bins + shifted).ravel())


def _match(angles: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of the angle that looks along each wanted one (-1: none), and whether it sees the shifts mirrored."""
    order = np.argsort(angles % (2 * np.pi))
    ordered = (angles % (2 * np.pi))[order]

    def nearest(values):
        at = np.searchsorted(ordered, values % (2 * np.pi))
        found = np.full(len(values), -1)
        for candidate in (at % len(order), at - 1):
            apart = np.abs((ordered[candidate] - values + np.pi) % (2 * np.pi) - np.pi)
            found = np.where(apart < SAME_ANGLE, order[candidate], found)
        return found

    same, opposite = nearest(wanted), nearest(wanted + np.pi)
    return np.where(same >= 0, same, opposite), (same < 0)


# ------------------------------------------------------------------------------------------------------- projector
class _Linear(torch.autograd.Function):
    """forward(x) with the true adjoint as its gradient, in both directions and to any order."""

    @staticmethod
    def forward(x, forward, adjoint):
        return forward(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.forward_map, ctx.adjoint_map = inputs[1:]

    @staticmethod
    def backward(ctx, *grad_outputs):
        return _Linear.apply(*grad_outputs, ctx.adjoint_map, ctx.forward_map), None, None


@dataclass(frozen=True, eq=False, repr=False)
class Projector(LinearOperator):
    """P: activity to its line integrals (activity mm), by exact chord lengths; `(..., 1, [z,] y, x)` to `(..., 1, [z,]
    angle, bin)`.

    storage: "sparse" keeps the chord lengths (CSR of P and of its transpose, one copy per precision and device, made
    at first use), "matrix-free" computes them at every application, "auto" is sparse up to 1 GiB. Flips and quarter
    turns that map the geometry onto itself are found and used: with the default angles only an eighth is kept, 10 MB
    at 128 pixels and 640 MB at 512 in single precision. Works on the device and in the precision of its input.
    """

    beam: ParallelBeam
    storage: str = "auto"
    _tables: dict = field(init=False, default_factory=dict)

    def __post_init__(self):
        if self.storage not in ("auto", "sparse", "matrix-free"):
            raise ValueError(f"storage {self.storage!r} is unknown; use 'auto', 'sparse' or 'matrix-free'")

    domain_shape = derived(lambda self: self.beam.image_shape)
    range_shape = derived(lambda self: self.beam.sinogram_shape)
    domain_dtype = range_dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self._project, self._backproject)

    def adjoint(self, y: Tensor) -> Tensor:
        return _Linear.apply(y, self._backproject, self._project)

    def to(self, device) -> Projector:
        """The same operator: its tables follow the device of the input."""
        return self

    @property
    def stored(self) -> bool:
        """Whether chord lengths are kept (True) or computed at every application."""
        if self.storage != "auto":
            return self.storage == "sparse"
        return self.table_mib() <= STORED_MIB

    def table_mib(self, bytes_per_value: int = 4) -> float:
        """Size of the stored tables in MiB, estimated from the geometry: P and its transpose, values and indices."""
        kept = len(self._symmetries("cpu").kept)
        return 2 * kept * 1.28 * max(self.beam.slice_shape) * (bytes_per_value + 4) / 2**20

    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        """(ray, pixel, chord length in mm) of all entries of the matrix of one slice, float64, row by row.

        Ray = angle * bins + bin, pixel = row * width + column. For studies and tests: 24 bytes an entry.
        """
        parts = []
        for rays in torch.arange(self.beam.rays).split(self._rays_at_once()):
            length, pixel = (v.flatten(1) for v in _along_rays(self.beam, rays))
            hit = length > 0
            parts.append((rays[:, None].expand_as(pixel)[hit], pixel[hit], length[hit]))
        ray, pixel, length = (torch.cat(column) for column in zip(*parts, strict=True))
        return ray, pixel, length

    def _project(self, x: Tensor) -> Tensor:
        lead = x.shape[: x.ndim - 2]
        pixels = x.reshape(math.prod(lead), -1)
        return self._in_groups(self._project_group, pixels).reshape(*lead, *self.beam.sinogram_shape[-2:])

    def _backproject(self, y: Tensor) -> Tensor:
        lead = y.shape[: y.ndim - 2]
        rays = y.reshape(math.prod(lead), -1)
        return self._in_groups(self._backproject_group, rays).reshape(*lead, *self.beam.slice_shape)

    def _in_groups(self, product, rows: Tensor) -> Tensor:
        """product of (item, ...) in groups of items and symmetries whose images fit the cache."""
        pixels = math.prod(self.beam.slice_shape)
        columns = max(COLUMNS, CACHE_FLOATS.get(rows.device.type, 2**28) // pixels)
        order = self._symmetries("cpu").order
        width = next(w for w in (order, order // 2, order // 4, 1) if w and (w == 1 or w * len(rows) <= columns))
        symmetries = self._symmetries(rows.device, width)
        parts = [product(part, symmetries) for part in rows.split(columns)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _project_group(self, x: Tensor, symmetries: _Symmetries) -> Tensor:
        products = symmetries.order // symmetries.width
        turned = x.T.contiguous().index_select(0, symmetries.turned)  # (product * pixel * column, item)
        kept = self._rows(turned.reshape(products, x.shape[1], -1))
        return kept.reshape(-1, len(x)).index_select(0, symmetries.source).T

    def _backproject_group(self, y: Tensor, symmetries: _Symmetries) -> Tensor:
        order, products, kept = symmetries.order, symmetries.order // symmetries.width, len(symmetries.kept)
        rays = y.new_zeros(kept * order, len(y)).index_copy_(0, symmetries.source, y.T)
        turned = self._columns(rays.reshape(products, kept, -1)).reshape(-1, len(y))
        return F.embedding_bag(symmetries.back.reshape(-1, order), turned, mode="sum").T  # gathers and adds at once

    def _rows(self, x: Tensor) -> Tensor:
        """The kept rows of P times x (product, pixel, column)."""
        if self.stored:
            return _times(self._matrices(x.dtype, x.device)[0], x)
        kept, pixels = self._symmetries(x.device).kept, x.shape[1]
        blocks = (_along_rays(self.beam, rays) for rays in kept.split(self._rays_at_once()))
        return torch.cat([_times(_csr(length, pixel, pixels, x.dtype), x) for length, pixel in blocks], 1)

    def _columns(self, y: Tensor) -> Tensor:
        """The transpose of the kept rows of P times y (product, kept ray, column)."""
        if self.stored:
            return _times(self._matrices(y.dtype, y.device)[1], y)
        kept = self._symmetries(y.device).kept
        angles = (kept // self.beam.bins).unique()
        place = torch.full((self.beam.rays,), -1, device=y.device)
        place[kept] = torch.arange(len(kept), device=y.device)
        parts = []
        pixels = torch.arange(math.prod(self.beam.slice_shape), device=y.device)
        for some in pixels.split(max(1, BLOCK // (3 * len(angles)))):
            length, ray = _around_pixels(self.beam, some, angles)
            at = place[ray]
            length = torch.where(at >= 0, length, 0.0)
            parts.append(_times(_csr(length, at.clamp(min=0), len(kept), y.dtype), y))
        return torch.cat(parts, 1)

    def _rays_at_once(self) -> int:
        return max(1, BLOCK // (2 * max(self.beam.slice_shape)))

    def _symmetries(self, device, width: int | None = None) -> _Symmetries:
        def make():
            if str(device) != "cpu":
                return self._symmetries("cpu", width).to(device)
            return _Symmetries.of(self.beam) if width is None else self._symmetries("cpu").split(width)

        return self._keep(("symmetries", str(device), width), make)

    def _matrices(self, dtype: torch.dtype, device) -> tuple[Tensor, Tensor]:
        """The kept rows of P, and their transpose, as CSR."""

        def make():
            values, columns, counts = [], [], []
            for rays in self._symmetries("cpu").kept.split(self._rays_at_once()):
                length, pixel = (v.flatten(1) for v in _along_rays(self.beam, rays))
                hit = length > 0
                values.append(length[hit].to(dtype))
                columns.append(pixel[hit].to(torch.int32))
                counts.append(hit.sum(1))
            rows = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(counts).cumsum(0)])
            shape = (len(rows) - 1, math.prod(self.beam.slice_shape))
            matrix = csr_array((torch.cat(values).numpy(), torch.cat(columns).numpy(), rows.numpy()), shape=shape)
            return tuple(_from_scipy(m).to(device) for m in (matrix, matrix.T.tocsr()))

        return self._keep((dtype, str(device)), make)

    def _keep(self, key, make):
        if key not in self._tables:
            with torch.inference_mode(False), torch.no_grad():
                self._tables[key] = make()
        return self._tables[key]


def _times(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix times each of (product, row, column)."""
    return torch.stack([matrix @ one for one in columns]) if len(columns) > 1 else (matrix @ columns[0])[None]


def _csr(values: Tensor, columns: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """A CSR matrix from as many entries (row, ...) in each row."""
    values, columns = values.flatten(1), columns.flatten(1)
    rows = torch.arange(len(values) + 1, dtype=torch.int32, device=values.device) * values.shape[1]
    return _sparse(rows, columns.flatten().to(torch.int32), values.flatten().to(dtype), (len(values), width))


def _from_scipy(matrix: csr_array) -> Tensor:
    rows, columns = (torch.from_numpy(v.astype(np.int32)) for v in (matrix.indptr, matrix.indices))
    return _sparse(rows, columns, torch.from_numpy(matrix.data), _shape(matrix))


def _shape(matrix: Any) -> Shape:
    return tuple(map(int, matrix.shape))  # scipy's own type says that it may be None


def _sparse(rows: Tensor, columns: Tensor, values: Tensor, shape: Shape) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(rows, columns, values, shape, check_invariants=False)


def column_normalised(projector: Projector, dtype: torch.dtype = torch.float32) -> LinearOperator:
    """The published convention: every column of the projector divided by its sum, so sensitivity is 1 everywhere.

    MLEM with it reconstructs activity times sensitivity, which ripples by some percent and halves in the corners: use
    it to compare with published results only.
    """
    total = sensitivity(projector, dtype=torch.float64)
    inverse = torch.where(total > 0, 1 / total, 0.0)
    return projector @ Diagonal(inverse.to(dtype), projector.domain_shape)


# ----------------------------------------------------------------------------------------------- model of a scan
@dataclass(frozen=True, eq=False, repr=False)
class Blur(LinearOperator):
    """Convolution with a Gaussian of `fwhm_mm` (a number, or one per axis), averaged over each pixel: the resolution
    of a scanner, or a post-filter. Self-adjoint; activity outside the image counts as none.

    shape (y, x) or (z, y, x); voxel_mm a number or one per axis. fwhm_mm = 0 does nothing.
    """

    shape: Shape
    voxel_mm: float | Sequence[float]
    fwhm_mm: float | Sequence[float]
    kernels: tuple[Tensor | None, ...] = field(init=False)

    def __post_init__(self):
        voxel, fwhm = (np.broadcast_to(np.asarray(v, float), len(self.shape)) for v in (self.voxel_mm, self.fwhm_mm))
        if not (voxel > 0).all() or not (fwhm >= 0).all() or not np.isfinite(fwhm).all():
            raise ValueError(f"voxel_mm must be positive and fwhm_mm not negative, got {self.voxel_mm}, {self.fwhm_mm}")
        of = zip(self.shape, voxel, fwhm, strict=True)
        object.__setattr__(self, "kernels", tuple(gaussian(n, v, f) if f else None for n, v, f in of))

    domain_shape = range_shape = derived(lambda self: (1, *self.shape))
    domain_dtype = range_dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        for axis, kernel in zip(range(-len(self.shape), 0), self.kernels, strict=True):
            if kernel is not None:
                x = torch.movedim(torch.movedim(x, axis, -1) @ kernel.to(x), -1, axis)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return self.forward(y)

    def to(self, device) -> Blur:
        return self


def gaussian(n: int, voxel_mm: float, fwhm_mm: float) -> Tensor:
    """The symmetric matrix (n, n) of a pixel's share of a Gaussian, fwhm_mm > 0, around each other pixel."""
    scale = fwhm_mm / math.sqrt(8 * math.log(2)) * math.sqrt(2)
    edges = (np.arange(n + 1) - 0.5) * voxel_mm
    share = np.diff(erf(edges / scale)) / 2
    index = np.arange(n)
    return torch.from_numpy(share[np.abs(index[:, None] - index)])


def emission_model(
    beam: ParallelBeam, factors: Tensor | None = None, fwhm_mm=0.0, voxel_mm=None, storage: str = "auto"
) -> LinearOperator:
    """A = factors * P * blur: activity to expected true counts.

    factors: what each line integral is multiplied by, broadcastable to `(..., 1, [z,] angle, bin)`: attenuation times
    the counts per activity and mm (calibration, time, dose); one per item of a batch is fine. fwhm_mm: resolution.
    voxel_mm: (z, y, x) for the resolution of a stack, by default cubes of `beam.pixel_mm`.
    Raises ValueError for negative factors.
    """
    A = Projector(beam, storage)
    if np.any(fwhm_mm):
        A = A @ Blur(beam.shape, beam.pixel_mm if voxel_mm is None else voxel_mm, fwhm_mm)
    if factors is not None:
        if (factors < 0).any():
            raise ValueError(f"factors must not be negative, got a minimum of {factors.min():.3g}")
        A = Diagonal(factors, beam.sinogram_shape) @ A
    return A


def attenuation_factors(projector: LinearOperator, mu_per_mm: Tensor) -> Tensor:
    """exp(-line integrals of mu), the share of photon pairs that escape, in the shape of a sinogram.

    mu_per_mm `(..., 1, [z,] y, x)`: water is 0.0096 / mm, skull 0.0151 / mm at 511 keV.
    """
    check_finite(mu_per_mm, "mu_per_mm")
    if (mu_per_mm < 0).any() or mu_per_mm.max() > 0.1:
        raise ValueError(
            f"mu must lie between 0 and 0.1 per mm, got {mu_per_mm.min():.3g} to {mu_per_mm.max():.3g}; "
            "divide values per cm by 10"
        )
    return torch.exp(-projector(mu_per_mm))


def with_counts(A: LinearOperator, x: Tensor, counts: float | Tensor) -> LinearOperator:
    """A times one number per item (batch), such that the activity x is expected to give `counts` true counts.

    This calibrates a simulated scan, once, at full dose; `fraction * A` is the same scan at another dose. Raises
    ValueError for an item without activity.
    """
    total = _per_item(A(x), A.range_shape).double().sum(-1)
    counts = torch.as_tensor(counts, dtype=torch.float64, device=total.device)
    if not (total > 0).all():
        raise ValueError(
            f"items {torch.nonzero(total <= 0).flatten().tolist()} have no activity in view, so no scale gives them "
            "counts; leave empty slices out, or calibrate the volume as one item"
        )
    if not (counts > 0).all():
        raise ValueError(f"counts must be positive, got {counts.tolist()}")
    factor = (counts / total).to(x.dtype)
    return Diagonal(factor[(..., *[None] * len(A.range_shape))], A.range_shape) @ A


def background(expected: Tensor, randoms: float = 0.0, scatter: float = 0.0, scatter_bins: float = 20.0) -> Tensor:
    """Expected counts of randoms and scatter, shaped like the expected true counts `(..., angle, bin)`.

    randoms, scatter: their number as a share of the item's true counts. Randoms are uniform; scatter is the true
    sinogram blurred along the bins with a Gaussian of FWHM `scatter_bins`, a usual simple model of its shape.
    """
    if randoms < 0 or scatter < 0:
        raise ValueError(f"shares of randoms and scatter must not be negative, got {randoms}, {scatter}")
    smooth = expected @ gaussian(expected.shape[-1], 1.0, scatter_bins).to(expected)
    total, axes = expected.sum((-2, -1), keepdim=True), math.prod(expected.shape[-2:])
    scattered = smooth * (total / smooth.sum((-2, -1), keepdim=True).clamp(min=1e-30))
    return randoms * total / axes + scatter * scattered


def sensitivity(A: LinearOperator, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """A^T 1, the counts that a unit of activity in each pixel gives, `(*A.batch_shape, *A.domain_shape)`."""
    return A.H(torch.ones(*A.batch_shape, *A.range_shape, dtype=dtype, device=device))


def mean_activity(y: Tensor, A: LinearOperator, background: Tensor | None = None) -> Tensor:
    """The activity of a uniform image that would give the measured number of counts, one per item (batch).

    The scale of a scan, known without its image and the same (in expectation) at every dose: networks take
    x / mean_activity. Raises ValueError for an empty scan.
    """
    check_counts(y)
    counts = _per_item(y, A.range_shape).double().sum(-1)
    if background is not None:
        counts = counts - _per_item(background.expand(y.shape), A.range_shape).double().sum(-1)
    if not (counts > 0).all():
        raise ValueError(
            f"items {torch.nonzero(counts <= 0).flatten().tolist()} of the scan are empty: no counts above the "
            "background, so no activity scale; leave them out or scale the volume as one item"
        )
    unit = A(torch.ones(*y.shape[: y.ndim - len(A.range_shape)], *A.domain_shape, device=y.device))
    return (counts / _per_item(unit, A.range_shape).double().sum(-1)).to(torch.float32)


@runtime_checkable
class HasAngles(Protocol):
    """A projector that is one of `operators.cylinder`, or behaves like it."""

    def some_angles(self, angles: slice) -> LinearOperator: ...


def subset(A: LinearOperator, angles: slice) -> LinearOperator:
    """A for some of the angles: `subset(A, slice(k, None, n))(x) == A(x)[..., k::n, :]`, without the others' work."""
    match A:
        case Projector():
            beam = replace(A.beam, angles=A.beam.theta[angles])
            return A._keep(("subset", beam.theta), lambda: Projector(beam, A.storage))
        case HasAngles():  # of three dimensions
            return A.some_angles(angles)
        case Diagonal():
            weights = A.weights
            if weights.ndim > 1 and weights.shape[-2] > 1:
                weights = weights[..., angles, :]
            count = len(range(A.domain_shape[-2])[angles])
            return Diagonal(weights, (*A.domain_shape[:-2], count, A.domain_shape[-1]), A.domain_dtype)
        case Composition() if _projects(A.outer):
            return subset(A.outer, angles) @ A.inner
        case Composition() if _projects(A.inner):
            return subset(A.outer, angles) @ subset(A.inner, angles)
        case Scaled():
            return Scaled(A.scalar, subset(A.operator, angles))
    raise TypeError(f"{A!r} holds no Projector to take angles of; build it with emission_model or Projector")


def _projects(A: LinearOperator) -> bool:
    match A:
        case Projector():
            return True
        case HasAngles():
            return True
        case Composition():
            return _projects(A.outer) or _projects(A.inner)
        case Scaled():
            return _projects(A.operator)
    return False
