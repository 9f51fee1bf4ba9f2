"""Sampling: one loop for every denoiser, solver and shape."""

import contextlib
import difflib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from companion.diffusion.denoisers import Denoiser, moments_of
from companion.diffusion.solvers import SOLVERS, Solver
from companion.randomness import are_antithetic, generators, randn


@dataclass(frozen=True)
class Bill:
    """What one draw cost: network evaluations, operator applications, its share of the seconds."""

    denoiser_calls: float
    operator_calls: float
    seconds: float


@dataclass(frozen=True)
class Samples:
    """x: draws (draw, *shape) in the order of the seeds. trajectory: x0_hat (step, draw, *shape), if kept.

    mean: E[x0 | x at the last level], alike, with the data if D has seen them; None where a sampler has none. Its
    average over draws and that of `x` estimate the same posterior mean, that of `mean` with less Monte-Carlo noise
    (Rao, Blackwell) and without the texture that a draw has where nothing is seen: take `mean` for an image and its
    PSNR, `x` for error bars. paired: draws 2k and 2k + 1 are antithetic (`randomness.antithetic`), so that their noise
    nearly cancels in their mean.
    """

    x: Tensor
    bill: Bill
    trajectory: Tensor | None = field(default=None, repr=False)
    mean: Tensor | None = field(default=None, repr=False)
    paired: bool = False

    @property
    def centres(self) -> Tensor:
        """Independent estimates of the posterior mean (draw or pair, *shape): of each draw, or of each pair."""
        means = self.x if self.mean is None else self.mean
        return means.unflatten(0, (-1, 2)).mean(1) if self.paired else means


@torch.no_grad()
def sample(
    D: Denoiser,
    sigmas: Tensor | Sequence[float],
    *,
    shape: Sequence[int],
    seeds: str | int | Iterable[int] | Sequence[Generator],
    solver: str | Solver = "heun",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    cond: Tensor | None = None,
    start: Tensor | None = None,
    state: Tensor | None = None,
    batch_size: int | None = None,
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
    trajectory: bool = False,
) -> Samples:
    """Draws from the prior in D, or from the posterior if D has seen data: Samples(x, bill, trajectory, mean).

    sigmas: decreasing noise levels, usually ending in 0.
    shape: of one draw, without the batch axis.
    seeds: ints, text such as "0-7,12", or generators. Each draw has its own generator on the CPU, so that its
        noise is the same alone, in any batch and on any device.
    solver: a name, or a Solver such as ddim(eta=0.5).
    dtype: of the state, of what D sees, and of the result; None: complex64 for a `ComplexDenoiser`, else float32.
        Either is enough: against float64 a sample changes by 2e-7 of its norm after 60 steps and by 8e-7 after 400.
    cond: (draws or 1, ...), passed to D.
    start: clean images (draws or 1, *shape), noised here to sigmas[0] (SDEdit, warm start).
    state: images at noise level sigmas[0] already. Without either a draw begins with pure noise, sigmas[0] n.
    batch_size: draws per evaluation of D; all by default.
    callback: gets dict(step, sigma, x, x0_hat) after every step: x is the image at the next level.
    progress: shows a bar with the time left. trajectory: keeps x0_hat of every step, on the CPU.

    The bill counts D.denoiser_calls (1 if not stated) and D.operator_calls (0) for each evaluation of D.
    Raises ValueError or TypeError for arguments that do not fit, FloatingPointError for NaN in the state.
    """
    solver, levels = find_solver(solver), check_sigmas(sigmas)
    kind: torch.dtype = dtype or getattr(D, "state_dtype", torch.float32)
    draws = generators(seeds)
    count, shape = len(draws), tuple(shape)
    if count == 0:
        raise ValueError("no seeds were given; sample draws one image per seed")
    if start is not None and state is not None:
        raise ValueError("give start (clean images, noised here) or state (noisy images, used as they are), not both")
    cond = per_draw("cond", cond, count)
    first = per_draw("state" if start is None else "start", state if start is None else start, count, shape)
    if first is not None and first.is_complex() and not kind.is_complex:
        raise TypeError(f"the first image is {first.dtype} but dtype={kind}; give dtype=torch.complex64")
    solver.check(levels)

    batch_size = batch_size or count
    parts = [slice(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    results, means, paths, calls, began = [], [], [], 0, time.perf_counter()
    with (
        evaluating(D),
        tqdm(total=len(parts) * (len(levels) - 1), desc=solver.name, disable=not progress) as bar,
    ):
        for part in parts:
            bound = Bound(D, None if cond is None else cond[part].to(device))
            x = torch.zeros((), dtype=kind, device=device) if first is None else first[part].to(device, kind)
            if state is None:
                x = x + levels[0] * randn(shape, kind, draws[part], device)
            path, info = [], {}  # check_sigmas sees to it that there is a step
            for info in steps(bound, x, levels, solver, draws[part]):
                bar.update()
                if trajectory:
                    path.append(info["x0_hat"].cpu())
                if callback is not None:
                    callback(info)
            results.append(info["x"])
            means.append(info["x0_hat"])
            paths.append(path)
            calls += bound.calls * len(info["x"]) / count
    bill = Bill(
        calls * getattr(D, "denoiser_calls", 1),
        calls * getattr(D, "operator_calls", 0),
        (time.perf_counter() - began) / count,
    )
    kept = torch.cat([torch.stack(path) for path in paths], dim=1) if trajectory else None
    return Samples(torch.cat(results), bill, kept, torch.cat(means), are_antithetic(draws))


class Bound:
    """D for solvers: sigma is a plain number, cond is settled, output is checked, calls are counted."""

    def __init__(self, D: Denoiser, cond: Tensor | None):
        self.D, self.cond, self.calls = D, cond, 0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        return self._checked(self.D(*self._arguments(x, sigma)), x)

    def moments(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        if not hasattr(self.D, "moments"):
            raise ValueError(
                "this solver asks for the variance of x0_hat, but the denoiser has no moments; choose "
                "another solver or variance, or a denoiser with a learned variance"
            )
        x0_hat, variance = moments_of(self.D)(*self._arguments(x, sigma))
        return self._checked(x0_hat, x), variance

    def _arguments(self, x: Tensor, sigma: float) -> tuple:
        self.calls += 1
        return x, torch.full((len(x),), sigma, dtype=x.dtype.to_real(), device=x.device), self.cond

    def _checked(self, x0_hat: Tensor, x: Tensor) -> Tensor:
        if x0_hat.shape != x.shape:
            raise ValueError(f"the denoiser returned {tuple(x0_hat.shape)} for images of {tuple(x.shape)}")
        return x0_hat.to(x.dtype)


def steps(D: Bound, x: Tensor, levels: list[float], solver: Solver, draws: list[Generator]) -> Iterator[dict]:
    """The loop: carries the state x (batch, *shape) down all levels, reporting every step."""

    def noise() -> Tensor:
        return randn(x.shape[1:], x.dtype, draws, x.device)

    memory = None
    for i, sigma in enumerate(levels[:-1]):
        x, x0_hat, memory = solver.step(D, x, levels, i, noise, memory)
        if not torch.isfinite(torch.view_as_real(x) if x.is_complex() else x).all():
            raise FloatingPointError(
                f"{solver.name} met NaN or infinity at step {i} of {len(levels) - 1}, sigma = {sigma:.4g}: "
                "the denoiser or its guidance diverged there; lower the guidance step, or check its inputs"
            )
        yield dict(step=i, sigma=sigma, x=x, x0_hat=x0_hat)


@contextlib.contextmanager
def evaluating(D: Denoiser) -> Iterator[None]:
    """Holds the networks inside D, also below wrappers that keep theirs as `.D`, in evaluation mode."""
    inner: Any = D
    while inner is not None and not isinstance(inner, nn.Module):
        inner = getattr(inner, "D", None)
    modes = {} if inner is None else {module: module.training for module in inner.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def find_solver(solver: str | Solver) -> Solver:
    """A Solver from its name, or the Solver itself."""
    if isinstance(solver, Solver):
        return solver
    if solver not in SOLVERS:
        near = difflib.get_close_matches(str(solver), SOLVERS, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no solver {solver!r}; {hint}known are {', '.join(SOLVERS)}")
    return SOLVERS[solver]()


def check_sigmas(sigmas: Tensor | Sequence[float]) -> list[float]:
    """The levels as plain numbers. Raises ValueError unless they decrease and stay above, or end at, 0."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64).tolist()
    falling = all(a > b for a, b in zip(levels, levels[1:], strict=False))
    if len(levels) < 2 or not falling or not levels[-1] >= 0 or not levels[0] < float("inf"):
        raise ValueError(
            f"sigmas must be at least two finite, strictly decreasing levels, the last 0 or above; "
            f"got {levels[:4]} ... {levels[-2:]}"
        )
    return levels


def per_draw(name: str, x: Tensor | None, count: int, shape: tuple | None = None) -> Tensor | None:
    """x (draws or 1, ...) with one item per draw. Raises ValueError for other sizes and for NaN."""
    if x is None:
        return None
    if x.shape[0] not in (1, count) or (shape is not None and x.shape[1:] != shape):
        wanted = "..." if shape is None else ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({count}, {wanted}) or (1, {wanted})")
    if torch.isnan(x).any():
        raise ValueError(f"{name} contains NaN; remove it before sampling")
    return x.expand(count, *x.shape[1:])
