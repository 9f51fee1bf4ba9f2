"""Gibbs samplers of the posterior: they draw where guided denoisers take means, so that errors are forgotten.

Both alternate between a clean image and a noisy copy of it and lower the noise on the way: `split_gibbs`
lets the data act on one copy and the prior, a whole reverse diffusion, on the other. Exact in the limit,
and slow. `annealed_gibbs` lets data and prior act on the clean image together, with a Gaussian model of
p(x0 | x): one denoiser evaluation a sweep, exact for Gaussian priors from the first sweep on.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from companion.diffusion.covariance import Factor, Jacobian
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.noise import karras
from companion.diffusion.sampling import Bill, Samples, evaluating, per_draw, sample
from companion.diffusion.solvers import Solver
from companion.diffusion.symmetry import moved
from companion.operators.linear import LinearOperator
from companion.randomness import are_antithetic, generators, randn


def annealed_gibbs(
    D: Denoiser,
    G: posterior_mean,
    sigmas: Tensor | Sequence[float],
    *,
    seeds: str | int | Iterable[int] | Sequence[Generator],
    refresh: float | None = None,
    start: Tensor | None = None,
    dtype: torch.dtype = torch.complex64,
    device: torch.device | str = "cpu",
    cond: Tensor | None = None,
    batch_size: int | None = None,
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> Samples:
    """Draws from p(x0 | y), x (draw, *A.domain_shape), and their conditional means, by one sweep for each level sigma:

        x = x0 + sigma e,   e <- sqrt(1 - f) e + sqrt(f) n           a part f of the noise is fresh,
        x0 | x, y ~ N(x0; D(x), C) N(y; A x0, noise_std^2)           exactly: perturb, solve by CG,
        e = (x - x0) / sigma.

    G: the data and the covariance model C, G = posterior_mean(A, y, noise_std, covariance): `Measured` is
    best, `Jacobian` has no factor to draw with. sigmas: decreasing, as for `sample`; a last 0 is ignored.
    Each sweep leaves the posterior unchanged if p(x0 | x) = N(D(x), C), whatever f and the next level, since e is
    then standard normal and independent of x0: few levels cost no variance, unlike ancestral steps. Where the model
    is wrong, which is at high noise, fresh noise lets later sweeps forget what earlier ones got wrong; hundreds of
    sweeps with nothing but fresh noise, though, drift to wherever the errors of the model lead.
    `mean` of the result is E[x0 | x, y] at the last level, which costs one solution by CG more and no evaluation of D.
    refresh: how often the noise is renewed while sigma falls by a factor e, f = 1 - (sigma / last sigma)^refresh, so
    that many sweeps tend to a limit, a guided reverse diffusion. None: all of it in every sweep, f = 1.
    start: a clean image (draws or 1, *A.domain_shape) in the place of x0 = 0 of the first sweep, such as CG-SENSE's:
    with it the first sigma may be as low as the errors of that image are, and sweeps are saved. Its errors are
    forgotten as far as sigma drowns them.
    seeds: those of `randomness.antithetic` give draws in pairs, whose mean needs few of them.
    Where D states symmetries (`companion.diffusion.symmetry`), each sweep sees each draw moved by one of them.
    Raises ValueError as `sample` does and for a negative refresh, TypeError for a covariance without factor.
    [zhang2024], Algorithm 1, where f = 1, with their Langevin steps for an isotropic C replaced by an
    exact draw for a better one.
    """
    if refresh is not None and not refresh >= 0:
        raise ValueError(f"refresh={refresh}: the noise is renewed at a rate of 0 or more, or wholly with None")
    if isinstance(G.covariance, Jacobian):
        raise TypeError(
            "annealed_gibbs draws from C, and Jacobian has no factor to draw with; use Measured or PerPixel"
        )

    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    levels = levels[:-1] if levels[-1] == 0 else levels
    noise: list[Tensor] = []  # of the last sweep

    def sweep(data: posterior_mean, z: Tensor, step: int, sigma: float, draws, cond) -> tuple[Tensor, Tensor | None]:
        e = randn(z.shape[1:], z.dtype, draws, z.device)
        if step and refresh is not None:
            kept = (sigma / levels[step - 1].item()) ** refresh
            e = kept**0.5 * noise.pop() + (1 - kept) ** 0.5 * e
        x = z + sigma * e
        level = torch.full((len(x),), sigma, dtype=x.real.dtype, device=x.device)
        x0_hat, C = data.covariance(moved(D, draws), x, level, cond)
        z = data.draw(x0_hat, C, draws)
        noise[:] = [(x - z) / sigma]
        last = step == len(levels) - 1
        return z, data.mean(x0_hat, C) if last else None

    samples = chain(sweep, D, levels, G, 1, seeds, dtype, device, cond, batch_size, callback, progress, start)
    calls = samples.bill.operator_calls + G.operator_calls  # those of the mean
    return replace(samples, bill=replace(samples.bill, operator_calls=calls))


def split_gibbs(
    D: Denoiser,
    A: LinearOperator,
    y: Tensor,
    noise_std: float,
    rhos: Tensor | Sequence[float],
    *,
    seeds: str | int | Iterable[int] | Sequence[Generator],
    steps: int = 3,
    solver: str | Solver = "dpmpp_2m_sde",
    iterations: int = 20,
    dtype: torch.dtype = torch.complex64,
    device: torch.device | str = "cpu",
    cond: Tensor | None = None,
    batch_size: int | None = None,
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> Samples:
    """Draws from p(x0 | y), x (draw, *A.domain_shape), by sweeps between x and a copy z, one for each
    coupling rho:

        x | z, y ~ N(y; A x, noise_std^2) N(x; z, rho^2)    exactly: perturb, solve by CG
        z | x    ~ p(z) N(x; z, rho^2)                      reverse diffusion, `steps` levels from sigma = rho

    rhos: positive, not increasing. z is returned; its law is the posterior for a likelihood of covariance
    noise_std^2 + rho^2 A A^H, so the last rho belongs below noise_std, and the way there must be slow:
    directions whose posterior deviation is far above rho hardly move any more. `solver` must be stochastic,
    for a deterministic one does not draw z given x; few `steps` lose variance. y: (draws or 1,
    *A.range_shape). Exact for many sweeps, many steps and small rho. Raises ValueError as `sample` and
    `posterior_mean` do. [vono2019] (split Gibbs), [bouman2023] (generative plug and play),
    [wu2024] (PnP-DM), Algorithm 1.
    """

    def sweep(data: posterior_mean, z: Tensor, step: int, rho: float, draws, cond) -> tuple[Tensor, None]:
        C = Factor.diagonal(torch.tensor(rho**2, dtype=z.real.dtype, device=z.device))
        levels = karras(steps, rho / 20, rho) if steps > 1 else [rho, 0.0]
        x = data.draw(z, C, draws)
        z = sample(
            D,
            levels,
            shape=z.shape[1:],
            seeds=draws,
            solver=solver,
            dtype=dtype,
            device=device,
            cond=cond,
            state=x,
        ).x
        return z, None

    G = posterior_mean(A, y, noise_std, iterations=iterations)
    return chain(sweep, D, rhos, G, steps, seeds, dtype, device, cond, batch_size, callback, progress)


@torch.no_grad()
def chain(
    sweep, D, levels, G, calls, seeds, dtype, device, cond, batch_size, callback, progress, start=None
) -> Samples:
    """z, mean <- sweep(data, z, step, level, generators, cond) for every level, from z = start or 0, in batches.

    calls: of D in a sweep, for the bill; G: what the sweeps get as `data`, its y cut to the batch. The mean of the last
    sweep is kept, None for a sampler without one.
    """
    levels = check_levels(levels)
    draws = generators(seeds)
    count, shape = len(draws), tuple(G.A.domain_shape)
    if count == 0:
        raise ValueError("no seeds were given; a Gibbs sampler draws one image per seed")
    y, cond = cast(Tensor, per_draw("y", G.y, count)), per_draw("cond", cond, count)
    first = torch.zeros(1, *shape, dtype=dtype) if start is None else start
    first = cast(Tensor, per_draw("start", first, count, shape))
    batch_size = batch_size or count
    parts = [slice(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    results, means, began = [], [], time.perf_counter()
    with (
        evaluating(D),
        tqdm(total=len(parts) * len(levels), desc="Gibbs sweeps", disable=not progress) as bar,
    ):
        for part in parts:
            data = replace(G, y=y[part].to(device))
            condition = None if cond is None else cond[part].to(device)
            z, mean = first[part].to(device, dtype), None
            for step, level in enumerate(levels):
                z, mean = sweep(data, z, step, level, draws[part], condition)
                bar.update()
                if callback is not None:
                    callback(dict(step=step, sigma=level, x=z, x0_hat=z))
            results.append(z)
            means.append(mean)
    bill = Bill(
        getattr(D, "denoiser_calls", 1) * calls * len(levels),
        G.operator_calls * len(levels),
        (time.perf_counter() - began) / count,
    )
    mean = None if means[0] is None else torch.cat(means)
    return Samples(torch.cat(results), bill, mean=mean, paired=are_antithetic(draws))


def check_levels(levels: Tensor | Sequence[float]) -> list[float]:
    """The levels as plain numbers. Raises ValueError unless they are finite, positive and do not increase."""
    levels = torch.as_tensor(levels, dtype=torch.float64).flatten().tolist()
    falling = all(a >= b for a, b in zip(levels, levels[1:], strict=False))
    if not levels or not falling or not 0 < levels[-1] or not levels[0] < float("inf"):
        raise ValueError(
            "levels must be positive, finite and not increasing, one for each sweep; "
            f"got {levels[:4]} ... {levels[-2:]}"
        )
    return levels
