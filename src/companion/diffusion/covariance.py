"""How the uncertainty of a denoiser is shaped: models of the covariance of p(x0 | x)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from companion.diffusion.denoisers import column
from companion.randomness import randn


def with_vjp(D, x: Tensor, sigma: Tensor, cond) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """D(x) and v -> J^T v, its transposed Jacobian over real components (J is symmetric for an exact D)."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        x0_hat = D(x, sigma, cond)
    if not x0_hat.requires_grad:
        raise ValueError(
            "this guidance needs the gradient of the denoiser, but D(x) carries none; use a denoiser that "
            "does not switch gradients off, or a guidance without one (dds, posterior_mean with PerPixel)"
        )

    def vjp(v: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(x0_hat, x, v.clone(), retain_graph=True)[0]

    return x0_hat.detach(), vjp


# ----------------------------------------------------------------------------------- covariance of p(x0 | x)
class Factor(NamedTuple):
    """C = L L^H of a Gaussian model of p(x0 | x), per real component; both maps keep the shape of x.

    variance: the diagonal of L^H L, or near it, which balances systems to be solved; None where it is not known.
    spectrum: where L is a filter between maps, its power over all frequencies (FFT order), 1 on average; None likewise.
    """

    L: Callable[[Tensor], Tensor]
    LH: Callable[[Tensor], Tensor]
    variance: Tensor | None = None
    spectrum: Tensor | None = None

    @classmethod
    def diagonal(cls, variance: Tensor) -> "Factor":
        std = variance.clamp_min(0).sqrt()
        return cls(lambda z: std * z, lambda x: std * x, std.square(), torch.ones_like(std))


@dataclass(frozen=True)
class Isotropic:
    """C = sigma^2 p^2 / (sigma^2 + p^2), as if every pixel were independent with standard deviation p =
    prior_std.

    The guess of [song2023] for r_t^2.
    """

    prior_std: float = 0.5

    def variance(self, sigma: Tensor) -> Tensor:
        return sigma.square() / (1 + (sigma / self.prior_std).square())

    def __call__(self, D, x, sigma, cond=None) -> tuple[Tensor, Factor]:
        return D(x, sigma, cond), Factor.diagonal(column(self.variance(sigma), x))


@dataclass(frozen=True)
class Proportional:
    """C = sigma^2 / weight: the belief of DiffPIR [zhu2023], right only for a flat prior."""

    weight: float = 1.0

    def __call__(self, D, x, sigma, cond=None) -> tuple[Tensor, Factor]:
        return D(x, sigma, cond), Factor.diagonal(column(sigma.square() / self.weight, x))


@dataclass(frozen=True)
class PerPixel:
    """C = diag(v) with the variance that the denoiser itself states, `D.moments(x, sigma, cond) -> (x0_hat,
    v)`.

    Background is certain, edges are not: the data are explained where the prior has doubts.
    """

    def __call__(self, D, x, sigma, cond=None) -> tuple[Tensor, Factor]:
        if not hasattr(D, "moments"):
            raise TypeError(
                f"{type(D).__name__} has no moments(x, sigma, cond); PerPixel needs a denoiser with learned "
                "variance. Use covariance=Isotropic(prior_std), or Measured.fit(D, images, sigmas)"
            )
        x0_hat, variance = D.moments(x, sigma, cond)
        return x0_hat, Factor.diagonal(variance)


FIT_SIGMAS = torch.logspace(-2, 1.3, 12)  # noise levels at which the error of a prior is measured


@dataclass(frozen=True, eq=False)
class Measured:
    """C = diag(v)^1/2 F^H diag(s(sigma, |k|)) F diag(v)^1/2 with s measured on validation images.

    v is the variance D states (`D.moments`), or the `Isotropic` guess for a D without moments. s is a
    radial power spectrum of the whitened error (x0 - x0_hat) / sqrt(v): neighbouring errors are alike,
    which no diagonal model knows, and its mean corrects the scale of v. sigmas: (levels,) increasing;
    spectrum: (levels, bins), bins evenly spaced from 0 to the corner of k-space, so any image size will do;
    one bin measures the scale alone.
    """

    sigmas: Tensor
    spectrum: Tensor
    prior_std: float = 0.5
    ndim: int = 2

    @classmethod
    @torch.no_grad()
    def fit(
        cls, D, images: Tensor, sigmas=FIT_SIGMAS, *, bins=12, prior_std=0.5, ndim=2, seed=0, cond=None
    ) -> "Measured":
        """The table for D at the noise levels `sigmas`, from images (batch, channel, *space) that D was not
        trained on; a few dozen are enough, in one batch."""
        generator = torch.Generator().manual_seed(seed)
        sigmas = torch.as_tensor(sigmas).sort().values.to(images.real.dtype)
        rows = []
        for level in sigmas[sigmas > 0]:
            sigma = level.expand(len(images))
            x = images + column(sigma, images) * randn(images.shape, images.dtype, generator, images.device)
            x0_hat, v = pixel_moments(D, x, sigma, cond, prior_std)
            power = spatial_fft((images - x0_hat) / v.clamp_min(1e-12).sqrt(), ndim).abs().square()
            power = (power / (1 + images.is_complex())).cpu()
            bin_of = radial_bins(images.shape[-ndim:], bins).expand(power.shape)
            total = torch.zeros(bins, dtype=power.dtype).index_add_(0, bin_of.flatten(), power.flatten())
            rows.append(total / torch.bincount(bin_of.flatten(), minlength=bins).clamp_min(1))
        return cls(sigmas[sigmas > 0], torch.stack(rows).clamp_min(1e-4), prior_std, ndim)

    def at(self, sigma: Tensor) -> Tensor:
        """The spectrum (batch, bins) at sigma (batch,), log-log interpolated, constant outside the table."""
        table, levels = self.spectrum.to(sigma).log(), self.sigmas.to(sigma).log()
        if len(levels) == 1:
            return table.exp().expand(len(sigma), -1)
        t = sigma.log().clamp(levels[0], levels[-1])
        i = torch.searchsorted(levels, t).clamp(1, len(levels) - 1)
        w = ((t - levels[i - 1]) / (levels[i] - levels[i - 1]))[:, None]
        return ((1 - w) * table[i - 1] + w * table[i]).exp()

    def __call__(self, D, x, sigma, cond=None) -> tuple[Tensor, Factor]:
        x0_hat, v = pixel_moments(D, x, sigma, cond, self.prior_std)
        bins = radial_bins(x.shape[-self.ndim :], self.spectrum.shape[1]).to(x.device)
        gain = self.at(sigma).sqrt()[:, bins]  # (batch, *space)
        gain = gain.reshape(len(x), *[1] * (x.ndim - 1 - self.ndim), *gain.shape[1:])
        std = v.clamp_min(0).sqrt()

        def colour(z):  # F^H diag(sqrt s) F is Hermitian, and real for real images because s is radial
            if x.is_complex():
                return spatial_fft(gain * spatial_fft(z, self.ndim), self.ndim, inverse=True)
            axes, size = tuple(range(-self.ndim, 0)), z.shape[-self.ndim :]
            half = gain[..., : size[-1] // 2 + 1]
            return torch.fft.irfftn(half * torch.fft.rfftn(z, dim=axes), s=size, dim=axes)

        scale = gain.square().mean(tuple(range(-self.ndim, 0)), keepdim=True)
        power = gain.square() / scale
        return x0_hat, Factor(lambda z: std * colour(z), lambda x: colour(std * x), scale * std.square(), power)


def pixel_moments(D, x, sigma, cond, prior_std) -> tuple[Tensor, Tensor]:
    """(x0_hat, variance) from D.moments, or from D and the isotropic guess."""
    if hasattr(D, "moments"):
        return D.moments(x, sigma, cond)
    return D(x, sigma, cond), column(Isotropic(prior_std).variance(sigma), x)


def spatial_fft(x: Tensor, ndim: int, inverse=False) -> Tensor:
    """Orthonormal FFT over the last ndim axes, zero frequency first."""
    return (torch.fft.ifftn if inverse else torch.fft.fftn)(x, dim=tuple(range(-ndim, 0)), norm="ortho")


def radial_bins(shape, bins: int) -> Tensor:
    """The radial bin of each frequency; bins divide 0 to the corner (sqrt(ndim)/2 cycles a pixel) evenly."""
    axes = torch.meshgrid(*[torch.fft.fftfreq(n, dtype=torch.float32) for n in shape], indexing="ij")
    radius = reduce(torch.add, [k.square() for k in axes]).sqrt() / (0.5 * math.sqrt(len(shape)))
    return (radius * bins).long().clamp_max(bins - 1)


@dataclass(frozen=True)
class Jacobian:
    """C = sigma^2 J, the true covariance of p(x0 | x) by Tweedie's second-order formula, one gradient per
    product.

    Exact, hence D_y is exact when p(x0 | x) is Gaussian. [boys2024]; [rozet2024].
    """
