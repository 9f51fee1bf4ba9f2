"""How far a denoiser is from the truth on people it never saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Generator, Tensor

from companion.diffusion.denoisers import Denoiser, moments_of
from companion.randomness import randn

Estimate = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def denoising_errors(
    estimates: Mapping[str, Estimate],
    x0: Tensor,
    sigmas: Sequence[float],
    *,
    seed: int | Generator = 0,
    digits: int | None = 4,
) -> list[dict[str, float]]:
    """A row for each sigma: root mean squared error, per real component, of each estimate of the noised images x0.

    estimates: name -> f(x, sigma), for instance a denoiser, or one that is told something:
    {"alone": D, "given the slice before": lambda x, sigma: D(x, sigma, before)}. All see the same noise at all levels.
    x0 (batch, channel, *space). digits: after the point; None: all.
    """
    return [
        {"sigma": sigma} | {name: _rms(estimate(x, level) - x0, digits) for name, estimate in estimates.items()}
        for sigma, x, level in _noised(x0, sigmas, seed)
    ]


@torch.no_grad()
def expected_errors(
    D: Denoiser,
    x0: Tensor,
    sigmas: Sequence[float],
    *,
    cond: Tensor | None = None,
    seed: int = 0,
    digits: int | None = 4,
) -> list[dict[str, float]]:
    """A row for each sigma: the "error" of D, as `denoising_errors`, and what D's own variance "expected" it to be.

    cond: what D is given beside every noisy image.
    """
    rows = []
    for sigma, x, level in _noised(x0, sigmas, seed):
        mean, variance = moments_of(D)(x, level, cond)
        expected = variance.mean().sqrt().item()
        expected = expected if digits is None else round(expected, digits)
        rows.append({"sigma": sigma, "error": _rms(mean - x0, digits), "expected": expected})
    return rows


def _noised(x0: Tensor, sigmas: Sequence[float], seed: int | Generator) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Each sigma with x0 noised by the same noise, and the sigma of each image (batch,)."""
    generator = seed if isinstance(seed, Generator) else Generator().manual_seed(seed)
    noise = randn(x0.shape, x0.dtype, generator).to(x0.device)
    for sigma in sigmas:
        yield sigma, x0 + sigma * noise, torch.full((len(x0),), sigma, device=x0.device)


def _rms(error: Tensor, digits: int | None) -> float:
    value = (error.abs().square().mean() / (1 + error.is_complex())).sqrt().item()
    return value if digits is None else round(value, digits)


def latent_errors(D: Denoiser, z: Tensor, sigmas: Sequence[float], seed: int = 0, cond: Tensor | None = None) -> list:
    """For each sigma, the root mean squared error of D on latents z (batch, channel, *cells) of other people.

    "blank": of the best guess that knows nothing but mean 0 and standard deviation 1, sigma / sqrt(1 + sigma^2).
    """
    rows = denoising_errors({"error": lambda x, sigma: D(x, sigma, cond)}, z, sigmas, seed=seed)
    return [row | {"blank": round(row["sigma"] / (1 + row["sigma"] ** 2) ** 0.5, 4)} for row in rows]
