"""What the original did wrong, one mistake at a time, and why its loss did not tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.diffusion.latent import LatentSpace
from companion.diffusion.noise import DiscreteSchedule
from companion.diffusion.sampling import sample
from companion.models.latent import LatentPrior
from companion.randomness import generators, randn

SMALL_LATENTS = 0.05  # the original's codebook began within so much of 0


class Clipped(torch.nn.Module):
    """A denoiser whose estimate is clipped to [-1, 1] in the units of the autoencoder, as image samplers do."""

    def __init__(self, prior: LatentPrior):
        super().__init__()
        self.D = prior.D

    def forward(self, z: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        space = self.D.space
        mean, std = (v.reshape(-1, *[1] * (z.ndim - 2)) for v in (space.mean, space.std))
        return ((self.D(z, sigma, cond) * std + mean).clamp(-1, 1) - mean) / std


@torch.no_grad()
def short_steps(prior: LatentPrior, schedule: DiscreteSchedule, visited: int, seeds: Sequence[int]) -> Tensor:
    """Latents of a chain that evaluates `visited` of its times, but whose every step removes one time's noise.

    From t to t - 1, and then on at t - T / visited as if it were there: the step of published schedulers that do not
    know that times are skipped.
    """
    draws, device = generators(seeds), prior.device
    x = randn(prior.latent_shape, torch.float32, draws, device)
    abar = schedule.alphas_cumprod
    for t in range(len(schedule) - 1, -1, -(len(schedule) // visited)):
        at = torch.full((len(x),), t)
        sigma = schedule.sigmas[t].to(device, torch.float32).expand(len(x))
        x0_hat = prior.D(x / abar[t].sqrt().item(), sigma)
        mean, variance, _ = schedule.q_posterior(x0_hat, x, at)
        x = mean + variance.sqrt() * randn(prior.latent_shape, torch.float32, draws, device)
    return x


@torch.no_grad()
def mistakes(prior: LatentPrior, evaluations: int, seeds: Sequence[int] = (0, 1)) -> dict[str, Tensor]:
    """Volumes (draw, 1, z, y, x) of this prior with one mistake of the original at a time, first without any.

    All from the same seeds, by DDPM with about so many evaluations.
    """
    schedule = DiscreteSchedule.linear(1000)
    options: dict[str, Any] = dict(shape=prior.latent_shape, seeds=seeds, device=prior.device, solver="ddpm")
    levels = schedule.respace(str(evaluations)).levels()
    good = sample(prior.D, levels, **options).x
    clipped = sample(Clipped(prior), levels, **options).x
    noise = randn(prior.latent_shape, torch.float32, generators(seeds), prior.device)
    # T = 200 with the betas of 1000 ends with 36 % of the signal's amplitude, yet sampling begins with noise alone
    early = DiscreteSchedule.linear(200)
    first = noise / early.alphas_cumprod[-1].sqrt().item()
    started = sample(prior.D, early.respace(str(evaluations)).levels(), state=first, **options).x
    # our autoencoder, but for a factor that makes its latents as small as the original's, used without that factor
    small = SMALL_LATENTS / prior.space.std.mean()
    unscaled = LatentSpace(prior.space.codec, std=1 / small, intensity=prior.space.intensity)
    return {
        "repaired": prior.decode(good),
        "scale not\nundone": unscaled.decode(good),
        "clipped to\n[-1, 1]": prior.decode(clipped),
        "steps of one\ntime only": prior.decode(short_steps(prior, schedule, evaluations, seeds)),
        "36 % signal\nat the start": prior.decode(started),
        "nothing but\nscale learnt": prior.decode(noise),
    }


@torch.no_grad()
def unexplained(prior: LatentPrior, z: Tensor, sigmas: Tensor) -> Tensor:
    """E|D(z + sigma n) - z|^2 over that of the best white network, sigma^2 / (1 + sigma^2), for each level.

    1: the prior knows no more of the latents z (batch, *latent_shape) than that their standard deviation is 1.
    """
    noise = randn(z.shape[1:], z.dtype, generators(range(len(z))), z.device)
    errors = []
    for sigma in sigmas.tolist():
        level = torch.full((len(z),), sigma, device=z.device)
        errors.append((prior.D(z + sigma * noise, level) - z).square().mean().item())
    return torch.tensor(errors, dtype=torch.float64) * (1 + sigmas**2) / sigmas**2


def loss_against_scale(
    prior: LatentPrior, z: Tensor, scales=(1.0, 0.3, 0.1, 0.03), steps: int = 500, levels: int = 12
) -> list[dict[str, object]]:
    """The epsilon loss, averaged over the times of the original chain, of latents z scaled to a deviation s.

    Of a network that knows the scale of the latents and nothing else (exact: s^2 abar / (s^2 abar + 1 - abar) for white
    Gaussian latents), and of this prior, whose estimate s D(z + sigma n / s, sigma / s) suits any s: the same times the
    share that `unexplained` measures, interpolated between noise levels.
    """
    schedule = DiscreteSchedule.linear(steps)
    abar = schedule.alphas_cumprod
    sigmas = torch.logspace(-2, 2, levels, dtype=torch.float64)
    share, rows = unexplained(prior, z, sigmas), []
    for s in scales:
        only_scale = s**2 * abar / (s**2 * abar + 1 - abar)
        at = np.interp((schedule.sigmas / s).log().numpy(), sigmas.log().numpy(), share.numpy())
        losses = only_scale.mean().item(), (only_scale * torch.from_numpy(at)).mean().item()
        rows.append(
            {
                "standard deviation": s,
                "loss that knows only the scale": f"{losses[0]:.4f}",
                "loss of this prior": f"{losses[1]:.4f}",
                "left to learn": f"{losses[0] - losses[1]:.4f}",
            }
        )
    return rows
