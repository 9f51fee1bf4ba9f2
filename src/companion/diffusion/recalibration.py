"""The variance that a denoiser states, corrected by what it was found to be worth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from companion.diffusion.denoisers import Denoiser, column
from companion.randomness import randn


@dataclass(frozen=True, eq=False)
class Recalibrated:
    """D with moments(x, sigma, cond) -> (x0_hat, variance), the variance times E[squared error / stated | stated].

    A network is seldom wrong about its error everywhere alike: where it claims to be almost certain, in the background,
    it errs by a larger factor than where it admits doubt. One factor for all pixels would then take the doubt of the
    background out on the object. sigmas (levels,) increasing; stated and factor (levels, bins): the logarithm of the
    stated variance, and that of the factor; interpolated in both, constant outside. The wrapped denoiser is `.D`.
    """

    D: Denoiser
    sigmas: Tensor
    stated: Tensor
    factor: Tensor

    @classmethod
    @torch.no_grad()
    def fit(cls, D: Denoiser, images: Tensor, sigmas, *, bins: int = 8, seed: int = 0, cond=None) -> Recalibrated:
        """The table for D at the noise levels `sigmas`, from images (batch, channel, *space) that D was not trained on.

        Bins hold equally many pixels. Raises TypeError for a denoiser that states no variance.
        """
        if not hasattr(D, "moments"):
            raise TypeError(f"{type(D).__name__} has no moments, so no stated variance to correct; use D as it is")
        generator = torch.Generator().manual_seed(seed)
        sigmas = torch.as_tensor(sigmas).sort().values.to(images.dtype.to_real())
        stated, factor = [], []
        for level in sigmas:
            sigma = level.to(images.device).expand(len(images))
            noise = randn(images.shape, images.dtype, generator, images.device)
            x0_hat, v = D.moments(images + column(sigma, images) * noise, sigma, cond)
            error = (images - x0_hat).abs().square() / (1 + images.is_complex())
            v, order = v.expand(error.shape).flatten().double().clamp_min(1e-20).sort()
            error = error.flatten()[order].double()
            groups = list(zip(v.tensor_split(bins), error.tensor_split(bins), strict=True))
            stated.append(torch.stack([a.log().mean() for a, _ in groups]))
            factor.append(torch.stack([(e.mean() / a.mean()).clamp_min(1e-6).log() for a, e in groups]))
        return cls(D, sigmas, torch.stack(stated), torch.stack(factor))

    def __call__(self, x: Tensor, sigma: Tensor, cond=None) -> Tensor:
        """x0_hat, as D gives it."""
        return self.D(x, sigma, cond)

    def moments(self, x: Tensor, sigma: Tensor, cond=None) -> tuple[Tensor, Tensor]:
        """(x0_hat, corrected variance)."""
        x0_hat, v = self.D.moments(x, sigma, cond)
        return x0_hat, v * self.correction(v, sigma).to(v.dtype)

    def correction(self, v: Tensor, sigma: Tensor) -> Tensor:
        """The factor for the variances v (batch, ...) stated at sigma (batch,), float64."""
        at, values = self.rows(sigma.double().expand(len(v)))
        wanted = v.double().clamp_min(1e-20).log().flatten(1)
        k = torch.searchsorted(at, wanted).clamp(1, at.shape[1] - 1)
        left, right = at.gather(1, k - 1), at.gather(1, k)
        w = ((wanted - left) / (right - left).clamp_min(1e-12)).clamp(0, 1)
        return ((1 - w) * values.gather(1, k - 1) + w * values.gather(1, k)).exp().reshape(v.shape)

    def rows(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """`stated` and `factor` at sigma (batch,), (batch, bins) each: between levels, linear in log sigma."""
        levels = self.sigmas.to(sigma).log()
        t = sigma.log().clamp(levels[0], levels[-1])
        right = torch.searchsorted(levels, t).clamp(min(1, len(levels) - 1), len(levels) - 1)
        left = (right - 1).clamp(min=0)
        w = ((t - levels[left]) / (levels[right] - levels[left]).clamp_min(1e-12))[:, None]
        tables = self.stated.to(sigma), self.factor.to(sigma)
        return tuple((1 - w) * table[left] + w * table[right] for table in tables)
