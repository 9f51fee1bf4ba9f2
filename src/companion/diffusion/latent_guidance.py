"""Guidance by data through an autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.diffusion.covariance import Factor
from companion.diffusion.denoisers import Denoiser, column
from companion.diffusion.guidance import Guidance, posterior_mean, solve
from companion.diffusion.latent import LatentSpace
from companion.randomness import generators, randn

ERROR_SIGMAS = torch.logspace(-1.5, 1.5, 7)  # noise levels of the latents at which the error of estimates is measured


@dataclass(frozen=True, eq=False)
class Errors:
    """How far estimates of a prior are from the truth, place by place, at noise levels sigmas (level,), increasing.

    variance (level, 1, z, y, x): of decoded volumes. latent (level, channel, *cells): of the latents. codec: of what
    comes back from a code without any noise, mean over voxels. Measured on people who were not trained on; heads lie in
    MNI space, so where a prior errs is the same place for all.
    """

    sigmas: Tensor
    variance: Tensor
    latent: Tensor
    codec: float

    @classmethod
    @torch.no_grad()
    def measure(
        cls, D: Denoiser, space: LatentSpace, x: Tensor, sigmas: Tensor = ERROR_SIGMAS, seed: int = 0
    ) -> Errors:
        """The errors of D(encode(x) + sigma n), and of its decoding, for people x (person, 1, z, y, x)."""
        z = space.encode(x)
        noise = randn(z.shape[1:], z.dtype, generators(range(seed, seed + len(z))), z.device)
        variance, latent = [], []
        for sigma in sigmas.tolist():
            z0_hat = D(z + sigma * noise, torch.full((len(z),), sigma, device=z.device))
            variance.append(_smooth((space.decode_in_parts(z0_hat) - x).square().mean(0), 5))
            latent.append(_smooth((z0_hat - z).square().mean(0), 3))
        codec = (space.decode_in_parts(z) - x).square().mean().item()
        volumes, latents = (torch.stack(rows).clamp(min=1e-6) for rows in (variance, latent))
        return cls(sigmas.to(x.device), volumes, latents, codec)

    def at(self, sigma: Tensor) -> Tensor:
        """The variance of volumes (batch, 1, z, y, x) at sigma (batch,), log-linear, constant outside."""
        return self._between(self.variance, sigma)

    def latent_at(self, sigma: Tensor) -> Tensor:
        """The variance of latents (batch, channel, *cells) at sigma (batch,), likewise."""
        return self._between(self.latent, sigma)

    def _between(self, table: Tensor, sigma: Tensor) -> Tensor:
        levels = self.sigmas.log()
        t = sigma.log().clamp(*levels[[0, -1]].tolist())
        i = torch.searchsorted(levels, t.contiguous()).clamp(1, len(levels) - 1)
        w = column((t - levels[i - 1]) / (levels[i] - levels[i - 1]), table)
        return ((1 - w) * table[i - 1].log() + w * table[i].log()).exp()


def _smooth(x: Tensor, width: int) -> Tensor:
    return F.avg_pool3d(x[None], width, 1, width // 2, count_include_pad=False)[0]


@dataclass(frozen=True, eq=False)
class LatentGuidance(Guidance):
    """A guidance whose denoiser D works on latents of `space`, while A sees decoded volumes. errors: see `Errors`."""

    space: LatentSpace = field(kw_only=True)
    errors: Errors = field(kw_only=True)
    iterations: int = 8

    @property
    def operator_calls(self):
        return 2 + 2 * self.iterations


@dataclass(frozen=True, eq=False)
class projection(LatentGuidance):
    """Decode the estimate, make it agree with the data as far as its error allows, encode the change.

    z0_hat + encode(x') - encode(x0_hat), x0_hat = decode(z0_hat), x' the Gaussian posterior mean for the variance of
    decoded volumes. What the autoencoder cannot keep is not taken for a change. No gradient of any network. After Song
    et al. 2024 (ReSample), with their optimisation replaced by a Gaussian update.
    """

    def estimate(self, D, x, sigma, cond=None):
        z0_hat = D(x, sigma, cond)
        x0_hat = self.space.decode(z0_hat)
        corrected = explain(x0_hat, self.errors.at(sigma), self)
        return z0_hat + self.space.encode(corrected) - self.space.encode(x0_hat)


@dataclass(frozen=True, eq=False)
class gradient(LatentGuidance):
    """E[z | y] for p(z) = N(z0_hat, C) and a decoder that is linear around z0_hat, by its derivatives.

    z0_hat + C J^T A^H (A J C J^T A^H + s^2)^-1 (y - A decode(z0_hat)): a Gauss-Newton step. J is the decoder's
    derivative at z0_hat, C the variance of latents, s^2 the noise plus what the autoencoder cannot express, spread over
    coils. A product with J and one with J^T for every conjugate-gradient step; none of the prior.
    """

    def estimate(self, D, x, sigma, cond=None):
        z0_hat = D(x, sigma, cond)
        x0_hat, forward, transposed = linearised(self.space.decode, z0_hat)
        std = self.errors.latent_at(sigma).sqrt()
        s2 = self.noise_std**2 + self.errors.codec / (2 * self.y.shape[1])

        def normal(u: Tensor) -> Tensor:
            return std * transposed(self.A.normal(forward(std * u))) + s2 * u

        b = std * transposed(self.A.H(self.y - self.A(x0_hat)))
        return z0_hat + std * solve(normal, b, self.iterations, len(x))


def linearised(f: Callable, z: Tensor) -> tuple[Tensor, Callable, Callable]:
    """f(z), v -> J v and w -> J^T w, J the derivative of f at z.

    J v is the derivative of <J^T w, v> by w, at any w: two backward passes do what a forward derivative would.
    """
    with torch.inference_mode(False), torch.enable_grad():
        z = z.detach().clone().requires_grad_()
        x = f(z)
        w = torch.zeros_like(x, requires_grad=True)
        g = torch.autograd.grad(x, z, w, create_graph=True)[0]

    def product(output: Tensor, of: Tensor) -> Callable:
        return lambda v: torch.autograd.grad(output, of, v, retain_graph=True)[0]

    return x.detach(), product(g, w), product(x, z)


def explain(x: Tensor, variance: Tensor, G: LatentGuidance) -> Tensor:
    """The Gaussian posterior mean of a volume: x (batch, 1, z, y, x), off by `variance`, given the data of G."""
    data = posterior_mean(G.A, G.y, G.noise_std, iterations=G.iterations, tol=1e-6)
    return x + data.correction(Factor.diagonal(variance), G.y - G.A(x), len(x))
