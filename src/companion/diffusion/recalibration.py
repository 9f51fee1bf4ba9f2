"""The variance that a denoiser states, corrected by what it was found to be worth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from companion.diffusion.covariance import Factor, Measured
from companion.diffusion.denoisers import Denoiser, column, moments_of
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
            x0_hat, v = moments_of(D)(images + column(sigma, images) * noise, sigma, cond)
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
        x0_hat, v = moments_of(self.D)(x, sigma, cond)
        return x0_hat, v * self.correction(v, sigma).to(v.dtype)

    def correction(self, v: Tensor, sigma: Tensor) -> Tensor:
        """The factor for the variances v (batch, ...) stated at sigma (batch,), float64."""
        at, values = self.rows(sigma.to(v.device).double().expand(len(v)))
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
        stated, factor = self.stated.to(sigma), self.factor.to(sigma)
        return (1 - w) * stated[left] + w * stated[right], (1 - w) * factor[left] + w * factor[right]


@dataclass(frozen=True, eq=False)
class ErrorModel:
    """A covariance model C of p(x0 | x): `Measured`, of the variance of D corrected by a table of `Recalibrated`.

    Where D meets images unlike its training set, it errs most where it claims certainty: one factor for all pixels,
    which is what `Measured` alone has, would be set by the background and drown the object. images: in words, those
    that the error was measured on. table: sigmas, stated, factor of a `Recalibrated`, None to take D at its word.
    widening: of posterior draws made with this model, the factor on their variance that validation scans asked for: an
    error that is right at every noise level does not make chains right that see the same error again at each.
    pixel_mm: the least and the largest pixel of those images, where the size matters.
    """

    measured: Measured
    table: tuple[Tensor, Tensor, Tensor] | None = None
    images: str = ""
    widening: float = 1.0
    pixel_mm: tuple[float, float] | None = None

    @classmethod
    def fit(
        cls,
        D: Denoiser,
        images: Tensor,
        sigmas,
        *,
        about: str = "",
        bins: int = 8,
        seed: int = 0,
        cond: Tensor | None = None,
    ) -> ErrorModel:
        """The model for D at the noise levels `sigmas` from images (batch, channel, *space) that D was not trained on.

        cond: what D is given beside each image. A denoiser without `moments` has no stated variance to correct, and
        gets `Measured` alone.
        """
        if not hasattr(D, "moments"):
            return cls(Measured.fit(D, images, sigmas, ndim=images.ndim - 2, seed=seed, cond=cond), None, about)
        known = Recalibrated.fit(D, images, sigmas, bins=bins, seed=seed, cond=cond)
        table = known.sigmas.cpu(), known.stated.cpu(), known.factor.cpu()
        measured = Measured.fit(known, images, sigmas, ndim=images.ndim - 2, seed=seed + 1, cond=cond)
        return cls(measured, table, about)

    def __call__(self, D: Denoiser, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Factor]:
        """(x0_hat, C), as `posterior_mean` asks of a covariance."""
        return self.measured(D if self.table is None else Recalibrated(D, *self.table), x, sigma, cond)

    def times(self, factor: float) -> ErrorModel:
        """The same with its variance multiplied."""
        return replace(self, measured=replace(self.measured, spectrum=factor * self.measured.spectrum))

    def to_dict(self) -> dict:
        """The model as plain numbers, for JSON."""
        table = None if self.table is None else [values.tolist() for values in self.table]
        m = self.measured
        plain = {"sigmas": m.sigmas.tolist(), "spectrum": m.spectrum.tolist(), "prior_std": m.prior_std, "ndim": m.ndim}
        more: dict = {} if self.widening == 1 else {"widening": self.widening}
        more |= {} if self.pixel_mm is None else {"pixel_mm": list(self.pixel_mm)}
        return {"images": self.images, **plain, "table": table, **more}

    @classmethod
    def from_dict(cls, plain: dict) -> ErrorModel:
        """The model that `to_dict` stored. Raises ValueError for numbers that are not one."""
        try:
            sigmas, spectrum = (torch.tensor(plain[name], dtype=torch.float32) for name in ("sigmas", "spectrum"))
            table = None
            if plain["table"] is not None:
                levels, stated, factor = (torch.tensor(v, dtype=torch.float64) for v in plain["table"])
                table = levels, stated, factor
            measured = Measured(sigmas, spectrum, float(plain["prior_std"]), int(plain["ndim"]))
            images, widening = str(plain["images"]), float(plain.get("widening", 1.0))
            low, high = (float(mm) for mm in plain.get("pixel_mm") or (1.0, 1.0))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not an error model: {error!r}; measure it again") from error
        whole = spectrum.ndim == 2 and sigmas.shape == spectrum.shape[:1] and bool((spectrum > 0).all())
        if table is not None:
            whole &= table[1].shape == table[2].shape and table[0].shape == table[1].shape[:1]
        if not whole or not widening > 0 or not 0 < low <= high:
            raise ValueError("not an error model: its tables do not fit together; measure it again")
        return cls(measured, table, images, widening, (low, high) if plain.get("pixel_mm") else None)
