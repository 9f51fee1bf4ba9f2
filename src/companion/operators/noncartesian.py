"""MRI off the grid: the non-uniform Fourier transform, its Toeplitz normal operator, trajectories and densities.

A trajectory is `(sample, axis)` in cycles per field of view, the axes in the order of space, (y, x) or (z, y, x): an
image of n pixels resolves |k| <= n / 2, and integers are the samples of a Cartesian scan. BART and ISMRMRD use the
same unit; trajectories between -0.5 and 0.5 are multiplied by n. The transforms are FINUFFT's [barnett2019],
on the processor; the normal operator runs on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from scipy.fft import next_fast_len
from torch import Tensor

from companion.extras import extra
from companion.operators.linear import LinearOperator, Shape, _check, check_finite, derived
from companion.operators.soft_sense import coils_of

GOLDEN = math.pi * (math.sqrt(5) - 1) / 2  # angle between successive spokes, radians; Winkelmann et al. 2007


def nufft(x: Tensor, trajectory: Tensor) -> Tensor:
    """Samples (..., sample) of the orthonormal Fourier transform of images (..., *space) at the trajectory.

    y_j = sum_r x(r) exp(-2 pi i sum_a k_ja (r_a - n_a // 2) / n_a) / sqrt(prod n): `operators.mri.fft` at integers.
    Relative error about 1e-6 in single precision, 1e-10 in double.
    """
    ndim = trajectory.shape[-1]
    space = x.shape[-ndim:]
    flat = x.detach().cpu().contiguous().flatten(0, -ndim - 1) if x.ndim > ndim else x.detach().cpu()[None]
    y = _finufft(2, trajectory, space, flat, -1)
    return y.reshape(*x.shape[:-ndim], len(trajectory)).to(x.device) / math.sqrt(math.prod(space))


def nufft_adjoint(y: Tensor, trajectory: Tensor, space: Shape) -> Tensor:
    """The adjoint of `nufft`: images (..., *space) of samples (..., sample)."""
    flat = y.detach().cpu().reshape(-1, y.shape[-1])
    x = _finufft(1, trajectory, space, flat, 1)
    return x.reshape(*y.shape[:-1], *space).to(y.device) / math.sqrt(math.prod(space))


def _finufft(kind: int, trajectory: Tensor, space: Shape, data: Tensor, sign: int) -> Tensor:
    """Transforms (batch, ...) of type 1 (samples to grid) or 2 (grid to samples)."""
    with extra("mri-extra"):
        import finufft
    values = data.contiguous().resolve_conj().numpy()
    double = values.dtype == np.complex128
    points = (2 * torch.pi * trajectory.detach().cpu().double() / torch.tensor(space)).numpy()
    points = [np.ascontiguousarray(p, dtype=np.float64 if double else np.float32) for p in points.T]
    plan = finufft.Plan(
        kind,
        tuple(space),
        n_trans=len(values),
        eps=1e-10 if double else 1e-6,
        isign=sign,
        dtype=values.dtype.name,
        nthreads=torch.get_num_threads(),
    )
    plan.setpts(*points)
    return torch.from_numpy(plan.execute(values))


@dataclass(frozen=True, eq=False, repr=False)
class NUFFT(LinearOperator):
    """F: images `(..., channel, *space)`, `shape` = (channel, *space), to samples `(..., channel, sample)`.

    trajectory: (sample, axis), cycles per field of view. `normal` is a convolution: F^H F is Toeplitz, so two Fourier
    transforms of twice the size do what two non-uniform ones would [fessler2005]. Padding and cropping go axis
    by axis, which leaves out transforms of zeros, and image by image, which keeps them in cache. Gradients do not flow
    through `forward` and `adjoint`.
    """

    trajectory: Tensor = field(repr=False)
    shape: Shape

    domain_dtype = torch.complex64
    range_dtype = torch.complex64

    def __post_init__(self):
        check_finite(self.trajectory, "trajectory")
        ndim, space = len(self.shape) - 1, self.shape[1:]
        if self.trajectory.ndim != 2 or self.trajectory.shape[1] != ndim or not len(self.trajectory):
            raise ValueError(
                f"trajectory has shape {tuple(self.trajectory.shape)}; expected (sample, {ndim}) for images of {space}"
            )
        reach = self.trajectory.abs().amax(0).tolist()
        if any(k > 0.5 * n + 1 for k, n in zip(reach, space, strict=True)):
            raise ValueError(
                f"the trajectory reaches {reach} cycles per field of view, more than half of the image size {space}; "
                "use larger images, leave out the outer samples, or check the unit"
            )

    domain_shape = derived(lambda self: tuple(self.shape))
    range_shape = derived(lambda self: (self.shape[0], len(self.trajectory)))

    def forward(self, x: Tensor) -> Tensor:
        return nufft(x, self.trajectory)

    def adjoint(self, y: Tensor) -> Tensor:
        return nufft_adjoint(y, self.trajectory, self.shape[1:])

    @cached_property
    def _spectrum(self) -> Tensor:
        """Eigenvalues of the circulant matrix around F^H F, real, on a grid of at least 2 n - 1 along each axis."""
        space = self.shape[1:]
        grid: Shape = tuple(int(next_fast_len(2 * n - 1 + (n == 1)) or 0) for n in space)
        # nufft_adjoint scales positions by its own grid: give it cycles per field of view of that grid
        stretched = self.trajectory.double() * torch.tensor([m / n for m, n in zip(grid, space, strict=True)]).to(
            self.trajectory.device
        )
        ones = torch.ones(len(self.trajectory), dtype=torch.complex128)
        kernel = nufft_adjoint(ones, stretched, grid) * math.sqrt(math.prod(grid)) / math.prod(space)
        for axis, (m, n) in enumerate(zip(grid, space, strict=True)):  # distances that no two pixels have
            far = (torch.arange(m) - m // 2).abs() >= n
            kernel = kernel * (~far).reshape([-1 if a == axis else 1 for a in range(len(grid))])
        return torch.fft.fftn(torch.fft.ifftshift(kernel)).real.to(self.trajectory.device)

    def normal(self, x: Tensor) -> Tensor:
        _check(self, x)
        spectrum = self._spectrum.to(x.real.dtype)
        items = x.flatten(0, -spectrum.ndim - 1)
        return torch.stack([self._convolve(item, spectrum) for item in items]).reshape(x.shape)

    def _convolve(self, x: Tensor, spectrum: Tensor) -> Tensor:
        """One image (*space) times the circulant matrix; the axis at work is kept last, where it is contiguous."""
        ndim, space = x.ndim, self.shape[1:]
        order = [(axis + 1) % ndim for axis in range(ndim)]  # of the axes after ndim - 1 turns: all but the first
        for axis in range(ndim - 1, -1, -1):
            x = torch.fft.fft(x, spectrum.shape[axis], dim=-1)
            x = x.movedim(-1, 0).contiguous() if axis else x
        x = x * spectrum.permute(order)
        for axis in range(ndim):
            x = x if axis == 0 else x.movedim(0, -1).contiguous()
            x = torch.fft.ifft(x, dim=-1)[..., : space[axis]]
        return x


def noncartesian_sense(maps: Tensor, trajectory: Tensor, ndim: int = 2) -> LinearOperator:
    """A = F S from images `(..., set, *space)` to samples `(..., coil, sample)`; see `NUFFT`.

    maps: `(coil, *space)`, or `(set, coil, *space)` for fields of view that fold. trajectory: (sample, axis), cycles
    per field of view. [pruessmann2001].
    """
    coils = coils_of(maps if maps.ndim > ndim + 1 else maps[None], ndim)
    return NUFFT(trajectory.to(maps.device), coils.range_shape) @ coils


def density_compensation(trajectory: Tensor, space: Shape, iterations: int = 30) -> Tensor:
    """Weights (sample,) that even out the density of a trajectory, 1 for Cartesian samples, for F^H (w y).

    w <- w / (K w) with K the convolution in k-space by a kernel that is positive and as wide as the field of view
    demands, a product of sinc^2. For gridding and for starting points: a likelihood weighs all samples alike.
    Pipe & Menon 1999; Johnson & Pipe 2009.
    """
    grid = tuple(2 * n for n in space)
    stretched = trajectory.detach().cpu().double() * 2
    window = torch.ones(())
    for n in space:  # a triangle over the doubled field of view transforms into sinc^2
        window = window[..., None] * (1 - (torch.arange(2 * n) - n).abs() / n)
    w = torch.ones(len(trajectory), dtype=torch.complex128)
    for _ in range(iterations):
        spread = nufft(window * nufft_adjoint(w, stretched, grid), stretched).real
        spread = spread * math.prod(grid) / math.prod(space)
        w = w / spread.clamp_min(1e-12)
    return w.real.float().to(trajectory.device)


def radial_trajectory(angles: Tensor, samples: int, width: float, delay: Tensor | None = None) -> Tensor:
    """Spokes (spoke, sample, 2) through the centre of k-space, axes (y, x), cycles per field of view.

    angles: (spoke,) radians, from the x axis to the y axis. width: of a spoke, -width / 2 to width / 2, with sample
    `samples // 2` at the centre: the image size, for a readout without loss of resolution. delay: (2, 2) symmetric S
    (y, x), in samples: a spoke of direction n is moved by S n (Moussavi et al. 2014; [rosenzweig2019]).
    """
    direction = torch.stack([angles.sin(), angles.cos()], -1)
    step = width / samples
    t = (torch.arange(samples, device=angles.device) - samples // 2) * step
    spokes = direction[:, None] * t[:, None]
    return spokes if delay is None else spokes + step * (direction @ delay.to(direction).mT)[:, None]


def spiral_trajectory(interleaves: int, samples: int, turns: float, width: float) -> Tensor:
    """Archimedean spirals (interleaf, sample, 2) from the centre to radius width / 2, each with so many turns."""
    t = torch.arange(samples) / (samples - 1)
    start = 2 * torch.pi * torch.arange(interleaves)[:, None] / interleaves
    angle = start + 2 * torch.pi * turns * t
    return width / 2 * t[:, None] * torch.stack([angle.sin(), angle.cos()], -1)
