"""Magnetic resonance imaging: Fourier transform, sampling masks, coil maps and the SENSE operator.

Images are complex `(..., 1, *space)`, coil images and k-space `(..., coil, *space)`, space = (y, x) or (z, y,
x). The Fourier transform is centred (zero frequency at index n // 2) and orthonormal. Lines are undersampled
along the last axis, x: this is the phase encoding direction; y (and z) are fully sampled.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.operators.linear import LinearOperator, Shape, _broadcasts, _check, check_finite, derived
from companion.operators.masks import CartesianMask


def fft(x: Tensor, ndim: int = 2) -> Tensor:
    """Centred orthonormal Fourier transform over the last `ndim` axes, right for odd and even sizes."""
    dims = tuple(range(-ndim, 0))
    return torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(x, dims), dim=dims, norm="ortho"), dims)


def ifft(x: Tensor, ndim: int = 2) -> Tensor:
    """Inverse of `fft`."""
    dims = tuple(range(-ndim, 0))
    return torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(x, dims), dim=dims, norm="ortho"), dims)


class _Complex(LinearOperator):
    domain_dtype = torch.complex64
    range_dtype = torch.complex64


@dataclass(frozen=True, eq=False, repr=False)
class Fourier(_Complex):
    """F: `(..., channel, *space)` to its k-space, `shape` = (channel, *space); unitary, so F^H F = 1."""

    shape: Shape

    domain_shape = derived(lambda self: tuple(self.shape))
    range_shape = derived(lambda self: tuple(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        return fft(x, len(self.shape) - 1)

    def adjoint(self, y: Tensor) -> Tensor:
        return ifft(y, len(self.shape) - 1)

    def normal(self, x: Tensor) -> Tensor:
        _check(self, x)
        return x


@dataclass(frozen=True, eq=False, repr=False)
class Mask(_Complex):
    """M: multiplies k-space `(..., channel, *space)`, `shape` = (channel, *space), by a real mask.

    `mask` broadcasts to `(..., channel, *space)`: (x,), (y, x), or one per item, (batch, 1, y, x).
    """

    mask: Tensor
    shape: Shape

    def __post_init__(self):
        object.__setattr__(self, "mask", _as_mask(self.mask, tuple(self.shape)))

    domain_shape = derived(lambda self: tuple(self.shape))
    range_shape = derived(lambda self: tuple(self.shape))
    batch_shape = derived(lambda self: tuple(self.mask.shape[: max(0, self.mask.ndim - len(self.shape))]))

    def forward(self, x: Tensor) -> Tensor:
        return self.mask * x

    def adjoint(self, y: Tensor) -> Tensor:
        return self.mask * y


class CoilMaps(_Complex):
    """Images to coil images by maps, `ndim` axes of space: `Coils`, or `soft_sense.CoilSets`."""

    maps: Tensor
    ndim: int


@dataclass(frozen=True, eq=False, repr=False)
class Coils(CoilMaps):
    """S: image `(..., 1, *space)` to coil images `(..., coil, *space)` by maps `(coil, *space)` or `(batch,
    coil, *space)`.

    `ndim` is the number of space axes, 2 or 3.
    """

    maps: Tensor
    ndim: int = 2

    def __post_init__(self):
        _check_maps(self.maps, self.ndim)

    domain_shape = derived(lambda self: (1, *self.maps.shape[-self.ndim :]))
    range_shape = derived(lambda self: tuple(self.maps.shape[-self.ndim - 1 :]))
    batch_shape = derived(lambda self: tuple(self.maps.shape[: -self.ndim - 1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.maps * x

    def adjoint(self, y: Tensor) -> Tensor:
        return (self.maps.conj() * y).sum(-self.ndim - 1, keepdim=True)


@dataclass(frozen=True, eq=False, repr=False)
class Sense(_Complex):
    """A = M F S; made by `sense(maps, mask)`.

    Its `normal` is exact and cheap: S^H F^H M F S is a convolution per coil, so the centring shifts cancel
    and only the axes along which the mask changes need a Fourier transform.
    """

    coils: CoilMaps
    mask: Mask

    domain_shape = derived(lambda self: self.coils.domain_shape)
    range_shape = derived(lambda self: self.coils.range_shape)
    batch_shape = derived(lambda self: np.broadcast_shapes(self.coils.batch_shape, self.mask.batch_shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.mask.forward(fft(self.coils.forward(x), self.coils.ndim))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.coils.adjoint(ifft(self.mask.adjoint(y), self.coils.ndim))

    @cached_property
    def _spectrum(self) -> tuple[Tensor, tuple[int, ...]]:
        """|mask|^2 with the zero frequency first, one element long along constant axes, and the axes that
        change."""
        power = self.mask.mask.square()
        power = power.expand(*np.broadcast_shapes(power.shape, (1,) * (self.coils.ndim + 1)))
        axes = []
        for axis in range(-self.coils.ndim, 0):
            if torch.equal(power, power.narrow(axis, 0, 1).expand_as(power)):
                power = power.narrow(axis, 0, 1)
            else:
                axes.append(axis)
        return torch.fft.ifftshift(power, axes) if axes else power, tuple(axes)

    def normal(self, x: Tensor) -> Tensor:
        _check(self, x)
        power, axes = self._spectrum
        z = self.coils.forward(x)
        z = torch.fft.ifftn(power * torch.fft.fftn(z, dim=axes), dim=axes) if axes else power * z
        return self.coils.adjoint(z)


def sense(maps: Tensor, mask: Tensor | CartesianMask, ndim: int = 2) -> Sense:
    """The SENSE operator A = M F S from images `(..., 1, *space)` to masked k-space `(..., coil, *space)`.

    maps: `(coil, *space)`, or `(batch, coil, *space)` with maps for each item; any number of coils.
    mask: broadcastable to `(*space)`, or `(batch, 1, *space)`; zeros and ones, or real weights.
    ndim: space axes, 2 or 3. Raises ValueError when maps and mask do not fit. [pruessmann1999].
    """
    coils = Coils(maps, ndim)
    mask = mask.mask if isinstance(mask, CartesianMask) else mask
    return Sense(coils, Mask(mask.to(maps.device), coils.range_shape))


def birdcage_maps(shape: Shape, coils: int = 8) -> Tensor:
    """Simulated coil maps `(coil, *shape)`, complex64, unit sum of squares at every pixel; shape (y, x) or
    (z, y, x)."""
    from sigpy.mri import birdcage_maps as birdcage

    if len(shape) not in (2, 3) or min(*shape, coils) < 1:
        raise ValueError(f"birdcage maps need a shape (y, x) or (z, y, x) and at least one coil, got {shape}, {coils}")
    maps = birdcage((coils, *shape), nzz=min(coils, 8))
    maps = maps / np.sqrt(np.sum(np.abs(maps) ** 2, axis=0))
    return torch.from_numpy(maps.astype(np.complex64))


def estimate_maps(
    kspace: Tensor,
    acs: int,
    ndim: int = 2,
    kernel: int | None = None,
    crop: float = 0.8,
    threshold: float = 0.02,
) -> Tensor:
    """Coil maps, shaped like kspace, `(..., coil, *space)`, from the fully sampled centre (`acs` wide) by
    ESPIRiT.

    Only the central acs^ndim samples are read, so what else is measured does not matter. Unit sum of squares
    where there is signal, zero where the ESPIRiT eigenvalue stays below `crop`; the phase is relative to the
    first coil, so the image carries that coil's phase. kernel: width in samples, by default acs // 3 within 3
    and 6. Raises ValueError when the centre is not fully sampled or too small. [uecker2014],
    through sigpy.
    """
    from sigpy.mri.app import EspiritCalib

    space = kspace.shape[-ndim:]
    kernel = min(6, max(3, acs // 3)) if kernel is None else kernel
    if kspace.ndim < ndim + 1 or not kspace.is_complex():
        raise ValueError(f"kspace must be complex (..., coil, *space), got {tuple(kspace.shape)} {kspace.dtype}")
    if not kernel <= acs <= min(space):
        raise ValueError(
            f"an ACS of {acs} does not suit kernel {kernel} and shape {tuple(space)}: need kernel <= acs <= "
            "the smallest axis; sample more centre lines or use birdcage_maps"
        )
    check_finite(kspace, "kspace")
    centre = centre_crop(kspace, (acs,) * ndim)
    energy = centre.abs().square().sum(-ndim - 1)
    if (energy == 0).any():
        raise ValueError(f"the central {acs} samples are not all measured; give the acs of the mask")
    flat = kspace.detach().cpu().to(torch.complex64).reshape(-1, *kspace.shape[-ndim - 1 :]).numpy()
    maps = []
    for item in flat:
        with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0 where there is no signal
            one: Any = EspiritCalib(
                item, calib_width=acs, kernel_width=kernel, thresh=threshold, crop=crop, show_pbar=False
            ).run()
        one = np.nan_to_num(one)
        if not one.any():
            raise ValueError(
                f"ESPIRiT finds no coil maps in an ACS of {acs} with kernel {kernel} and crop {crop}; use "
                "a wider ACS (12 or more), a smaller kernel, or a lower crop"
            )
        maps.append(one)
    return torch.from_numpy(np.stack(maps)).to(torch.complex64).reshape(kspace.shape).to(kspace.device)


def coil_maps(kspace: Tensor, width: int) -> Tensor:
    """Coil maps `(..., coil, y, x)` from the centre of k-space, `width` wide, by `estimate_maps`; ones for a single
    coil.
    """
    return torch.ones_like(kspace) if kspace.shape[-3] == 1 else estimate_maps(kspace, width)


def combine(kspace: Tensor, maps: Tensor) -> Tensor:
    """The image `(..., 1, y, x)` of fully sampled k-space `(..., coil, y, x)`: least squares for maps of unit sum of
    squares.
    """
    return (maps.conj() * ifft(kspace)).sum(-3, keepdim=True)


def low_pass(kspace: Tensor, width: int) -> Tensor:
    """k-space `(..., y, x)` with all but its `width` x `width` centre zero, under cosines against ringing.

    An odd width is centred on the zero frequency; an even one loses its first row and column, as |k| < width / 2.
    """
    distance = [(torch.arange(n, device=kspace.device) - n // 2).abs() * 2 / width for n in kspace.shape[-2:]]
    rows, columns = (torch.where(d < 1, torch.cos(torch.pi / 2 * d), 0.0) for d in distance)
    return kspace * rows[:, None] * columns


def estimate_noise(kspace: Tensor) -> float:
    """The noise per real component of raw k-space `(..., y, x)`, from its corners, where signal is least.

    Median absolute deviation of the measured samples among the tenth that lies furthest from the centre; samples that
    are exactly zero count as not measured. Signal in the corners adds to it: brains of 64 pixels with a noise of 1 % of
    their peak give 2 % too much, of 0.3 % 20 % too much, of 128 pixels 3 %. Raises ValueError for NaN, infinity and
    fewer than 50 such samples.
    """
    check_finite(kspace, "kspace")
    grids = torch.meshgrid(*[(torch.arange(n) - n // 2) / n for n in kspace.shape[-2:]], indexing="ij")
    radius = torch.stack([g.square() for g in grids]).sum(0).flatten()
    corner = kspace.flatten(-2)[..., (radius >= torch.quantile(radius, 0.9)).to(kspace.device)]
    values = torch.view_as_real(corner[corner != 0]).flatten()
    if values.numel() < 100:
        raise ValueError(f"only {values.numel() // 2} samples lie in the corners of k-space; give noise_std")
    return (1.4826 * values.abs().median()).item()


def compress_coils(kspace: Tensor, coils: int, ndim: int = 2) -> tuple[Tensor, Tensor]:
    """k-space `(..., virtual coil, *space)` of the strongest virtual coils, and the matrix (virtual coil,
    coil).

    One matrix with orthonormal rows (the leading singular vectors) for all items given; apply it to oracle
    maps too: `torch.einsum("vc,...cyx->...vyx", matrix, maps)`. Buehrer et al. 2007, [huang2008].
    """
    present = kspace.shape[-ndim - 1]
    if not 1 <= coils <= present:
        raise ValueError(f"cannot compress {present} coils to {coils}; use 1 to {present}")
    check_finite(kspace, "kspace")
    data = kspace.movedim(-ndim - 1, 0).flatten(1)  # (coil, samples)
    covariance = (data.to(torch.complex128) @ data.to(torch.complex128).mH).detach()
    _, vectors = torch.linalg.eigh(covariance)  # ascending
    matrix = vectors.flip(-1)[:, :coils].mH.to(kspace.dtype)
    return (matrix @ data).unflatten(1, kspace.movedim(-ndim - 1, 0).shape[1:]).movedim(0, -ndim - 1), matrix


def normalise(x: Tensor, dim: int | tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """x / scale and scale = max |x|: the largest magnitude becomes 1 and the phase stays.

    dim: axes to take the maximum over (kept with length 1 in `scale`); by default all, one scale for the
    volume, as a tensor without axes. An image of zeros has scale 1. Dividing by the *complex* maximum, the
    value with the largest real part, would turn the phase and may leave magnitudes above 1.
    """
    check_finite(x, "image")
    scale = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    return x / scale, scale


def centre_crop(x: Tensor, shape: Shape) -> Tensor:
    """The central `shape` of the last axes of x, from n // 2 - m // 2, so that the centre sample stays the
    centre."""
    for axis, m in zip(range(-len(shape), 0), shape, strict=True):
        n = x.shape[axis]
        if m > n:
            raise ValueError(f"cannot crop {tuple(x.shape[-len(shape) :])} to the larger {tuple(shape)}")
        x = x.narrow(axis, n // 2 - m // 2, m)
    return x


def crop_kspace(kspace: Tensor, shape: Shape) -> Tensor:
    """k-space of the field of view cropped to `shape` in image space, `(..., *space)` to `(..., *shape)`.

    This removes readout oversampling; the resolution stays. Only for axes that are fully sampled.
    """
    return fft(centre_crop(ifft(kspace, len(shape)), shape), len(shape))


def _as_mask(mask: Tensor, shape: Shape) -> Tensor:
    if mask.is_complex():
        raise TypeError("a mask is real: zeros and ones, or weights")
    mask = mask if mask.is_floating_point() else mask.to(torch.float32)
    space = shape[1:]
    if mask.ndim == 0 or (mask.shape[-1] not in (1, space[-1])):
        columns = mask.shape[-1] if mask.ndim else 0
        raise ValueError(
            f"mask has {columns} columns but the maps have {space[-1]}; crop the maps or build the mask with "
            f"cartesian_mask({space[-1]}, ...)"
        )
    _broadcasts(mask, shape, "mask values")
    return check_finite(mask, "mask")


def _check_maps(maps: Tensor, ndim: int) -> None:
    if ndim not in (2, 3):
        raise ValueError(f"ndim is the number of space axes, 2 or 3; got {ndim}")
    if not isinstance(maps, Tensor):
        raise TypeError(f"coil maps are a tensor, got {type(maps).__name__}; use torch.as_tensor(maps)")
    if maps.ndim < ndim + 1:
        raise ValueError(
            f"maps have shape {tuple(maps.shape)}; expected (coil, *space) or (batch, coil, *space) with "
            f"{ndim} space axes; add a coil axis with maps[None], or give ndim"
        )
    if not maps.is_complex():
        raise TypeError(f"coil maps are complex, got {maps.dtype}; use maps.to(torch.complex64)")
    check_finite(maps, "coil maps")
