"""Annealed Langevin dynamics with data, the sampler of score-based compressed sensing (CSGM-Langevin)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor

from companion.diffusion.denoisers import Denoiser, column
from companion.diffusion.gibbs import chain, check_levels
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.sampling import Samples
from companion.randomness import randn


def langevin(
    D: Denoiser,
    G: posterior_mean,
    sigmas: Tensor | Sequence[float],
    *,
    seeds: str | int | Iterable[int] | Sequence[Generator],
    steps: int = 5,
    step_size: float = 0.3,
    dtype: torch.dtype = torch.complex64,
    device: torch.device | str = "cpu",
    cond: Tensor | None = None,
    batch_size: int | None = None,
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> Samples:
    """Draws from p(x0 | y), x (draw, *A.domain_shape), by `steps` Langevin steps at each noise level sigma:

        x <- x + e (score + A^H (y - A x) / (noise_std^2 + sigma^2)) + sqrt(2 e) n,    e = step_size sigma^2,

    with score = (D(x) - x) / sigma^2 and n fresh noise; at the last level the result is D(x). G: holds the data,
    G = posterior_mean(A, y, noise_std); its covariance is not used. sigmas: strictly decreasing; a last 0 is ignored.
    step_size below 1 is stable for |A| <= 1. Many small steps at the last level draw from its posterior exactly, and
    the nearer that level is to 0 the nearer this is to p(x0 | y); few steps leave errors of earlier levels, and D(x)
    of the last one is narrower than a draw. Raises ValueError as `annealed_gibbs` does. [song2019], Algorithm 1;
    [jalal2021], Eq. (3), where the likelihood is widened by sigma^2 as here.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float64).flatten()
    levels = check_levels(levels[:-1] if levels[-1:].eq(0).all() else levels)
    if len(set(levels)) < len(levels):
        raise ValueError(f"sigmas repeat a level among {levels[:4]} ...; `steps` says how many steps each level gets")
    if steps < 1 or not 0 < step_size < 1:
        raise ValueError(f"got steps={steps}, step_size={step_size}; expected at least 1 step, of a size within (0, 1)")

    def sweep(data: posterior_mean, x: Tensor, step: int, sigma: float, draws, cond) -> tuple[Tensor, None]:
        level = torch.full((len(x),), sigma, dtype=x.real.dtype, device=x.device)
        if step == 0:
            x = sigma * randn(x.shape[1:], x.dtype, draws, x.device)
        pull = step_size / (1 + (data.noise_std / sigma) ** 2)
        for _ in range(steps):
            drift = step_size * (D(x, level, cond) - x) + pull * data.A.H(data.y - data.A(x))
            x = x + drift + (2 * step_size) ** 0.5 * column(level, x) * randn(x.shape[1:], x.dtype, draws, x.device)
        return D(x, level, cond) if step == len(levels) - 1 else x, None

    samples = chain(sweep, D, levels, G, steps, seeds, dtype, device, cond, batch_size, callback, progress)
    count = steps * len(levels)
    calls = getattr(D, "denoiser_calls", 1) * (count + 1)
    return replace(samples, bill=replace(samples.bill, denoiser_calls=calls, operator_calls=2 * count))
