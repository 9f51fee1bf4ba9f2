"""Solvers: how one noise level becomes the next. The loop, the noise and the bookkeeping live in `sampling`.

A solver is frozen data and one short `step`. In it, `D(x, sigma)` takes a plain number, `sigmas` is the list of all
levels, `i` the index of the present one, `noise()` a fresh standard normal draw in the shape of x, and `memory`
whatever a multistep method kept from its last step (None at the first). The probability flow of a variance-exploding
process is dx/dsigma = (x - D(x, sigma)) / sigma.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """What a step returns: the image at the next level, the estimate that it started from, and its memory."""

    x: Tensor
    x0_hat: Tensor
    memory: Any = None


@dataclass(frozen=True)
class Solver:
    """Base of all solvers. order: of convergence in the number of steps (of the law, if noise is added)."""

    name: ClassVar[str]
    order: ClassVar[int]
    calls: ClassVar[int] = 1  # of D, per step
    multistep: ClassVar[bool] = False

    def check(self, sigmas: Sequence[float]) -> None:
        """Warns or raises before the first step when these levels do not suit the solver."""

    def step(self, D: Callable, x: Tensor, sigmas: Sequence[float], i: int, noise: Callable, memory: Any) -> Step:
        raise NotImplementedError


@dataclass(frozen=True)
class Euler(Solver):
    """Euler's method on the probability flow; the same as DDIM with eta = 0."""

    name: ClassVar[str] = "euler"
    order: ClassVar[int] = 1

    def step(self, D, x, sigmas, i, noise, memory):
        x0_hat = D(x, sigmas[i])
        slope = (x - x0_hat) / sigmas[i]
        return Step(x + (sigmas[i + 1] - sigmas[i]) * slope, x0_hat)


@dataclass(frozen=True)
class Heun(Solver):
    """Algorithm 1 of Karras et al. 2022: trapezoidal rule on the probability flow, Euler into sigma = 0."""

    name: ClassVar[str] = "heun"
    order: ClassVar[int] = 2
    calls: ClassVar[int] = 2

    def step(self, D, x, sigmas, i, noise, memory):
        x_next, x0_hat = heun_step(D, x, sigmas[i], sigmas[i + 1])
        return Step(x_next, x0_hat)


def heun_step(D: Callable, x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
    """(x at sigma_next, D(x, sigma)): two evaluations, one when sigma_next is 0."""
    x0_hat = D(x, sigma)
    slope = (x - x0_hat) / sigma
    x_next = x + (sigma_next - sigma) * slope
    if sigma_next > 0:
        slope_next = (x_next - D(x_next, sigma_next)) / sigma_next
        x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
    return x_next, x0_hat


SOLVERS: dict[str, type[Solver]] = {solver.name: solver for solver in (Euler, Heun)}
