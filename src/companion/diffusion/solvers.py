"""Solvers: how one noise level becomes the next. The loop, the noise and the bookkeeping live in `sampling`.

A solver is frozen data and one short `step`. In it, `D(x, sigma)` takes a plain number, `sigmas` is the list
of all levels, `i` the index of the present one, `noise()` a fresh standard normal draw in the shape of x, and
`memory` whatever a multistep method kept from its last step (None at the first). The probability flow of a
variance-exploding process is dx/dsigma = (x - D(x, sigma)) / sigma.
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

    def step(self, D: Any, x: Tensor, sigmas: Sequence[float], i: int, noise: Callable, memory: Any) -> Step:
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
    """Algorithm 1 of [karras2022]: trapezoidal rule on the probability flow, Euler into sigma = 0."""

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


@dataclass(frozen=True)
class HeunChurn(Solver):
    """Algorithm 2 of [karras2022]: noise is raised by a factor 1 + gamma, then one Heun step leads
    down.

    gamma = min(S_churn / steps, sqrt(2) - 1) while S_min <= sigma <= S_max, else 0. Defaults: the paper's for
    ImageNet-64 with 256 steps. Order 2 holds for S_noise = 1; other values change the law on purpose.
    """

    S_churn: float = 40.0
    S_min: float = 0.05
    S_max: float = 50.0
    S_noise: float = 1.003

    name: ClassVar[str] = "heun_churn"
    order: ClassVar[int] = 2
    calls: ClassVar[int] = 2

    def check(self, sigmas):
        window = [sigma for sigma in sigmas[:-1] if self.S_min <= sigma <= self.S_max]
        steps = len(sigmas) - 1
        limit = math.sqrt(2) - 1
        if window and self.S_churn / steps >= limit:
            warnings.warn(
                f"S_churn = {self.S_churn:g} over {steps} steps is cut to gamma = sqrt(2) - 1 on all "
                f"{len(window)} steps inside [{self.S_min:g}, {self.S_max:g}]: any S_churn above "
                f"{limit * steps:.4g} gives the same samples; lower it or take more steps",
                stacklevel=3,
            )

    def step(self, D, x, sigmas, i, noise, memory):
        sigma, gamma = sigmas[i], 0.0
        if self.S_min <= sigma <= self.S_max:
            gamma = min(self.S_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * self.S_noise * noise()
        x_next, x0_hat = heun_step(D, x, sigma_hat, sigmas[i + 1])
        return Step(x_next, x0_hat)


@dataclass(frozen=True)
class DDIM(Solver):
    """Eqs. (12, 16) of [song2021], written for x = x0 + sigma n.

    x' = x0_hat + sigma_down n_hat + sigma_up n, n_hat = (x - x0_hat) / sigma, with sigma_up = eta sigma'
    sqrt(1 - sigma'^2 / sigma^2) and sigma_down^2 + sigma_up^2 = sigma'^2. eta = 0 is Euler's method, eta = 1
    ancestral DDPM.
    """

    eta: float = 0.0

    name: ClassVar[str] = "ddim"
    order: ClassVar[int] = 1

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta}: expected a number from 0 (deterministic) to 1 (ancestral)")

    def step(self, D, x, sigmas, i, noise, memory):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        x0_hat = D(x, sigma)
        sigma_up = self.eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        sigma_down = math.sqrt(sigma_next**2 - sigma_up**2)
        x_next = x0_hat + sigma_down / sigma * (x - x0_hat)
        return Step(x_next + sigma_up * noise() if sigma_up > 0 else x_next, x0_hat)


@dataclass(frozen=True)
class DDPM(Solver):
    """Ancestral sampling, Eqs. (6, 7) of [ho2020] written for x = x0 + sigma n.

    x' = x0_hat + (sigma'/sigma)^2 (x - x0_hat) + sqrt(v) n. variance: "small", v = sigma'^2 (1 -
    (sigma'/sigma)^2), right if x0 were known; "large", the beta of the chain, right if x0 were white noise of
    unit variance; "learned", the small one plus what D.moments says x0 still varies: v + (1 -
    (sigma'/sigma)^2)^2 Var[x0 | x], the covariance of the true reverse step ([bao2022], Theorem 1),
    pixel by pixel. No noise is added at the last step to 0.
    """

    variance: str = "small"

    name: ClassVar[str] = "ddpm"
    order: ClassVar[int] = 1

    def __post_init__(self):
        if self.variance not in ("small", "large", "learned"):
            raise ValueError(f"variance={self.variance!r}: expected 'small', 'large' or 'learned'")

    def step(self, D, x, sigmas, i, noise, memory):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        x0_hat, uncertainty = D.moments(x, sigma) if self.variance == "learned" else (D(x, sigma), x.new_zeros(()))
        keep = (sigma_next / sigma) ** 2
        x_next = x0_hat + keep * (x - x0_hat)
        if sigma_next == 0:
            return Step(x_next, x0_hat)
        small = sigma_next**2 * (1 - keep)
        if self.variance == "small":
            return Step(x_next + math.sqrt(small) * noise(), x0_hat)
        if self.variance == "large":
            large = (1 + sigma_next**2) * (sigma**2 - sigma_next**2) / (1 + sigma**2)
            return Step(x_next + math.sqrt(large) * noise(), x0_hat)
        return Step(x_next + (small + (1 - keep) ** 2 * uncertainty).sqrt() * noise(), x0_hat)


@dataclass(frozen=True)
class AIDStochastic(Solver):
    """x' = x0_hat + sigma' n with fresh noise at every step: the rule of AID [luo2024], called ddnm
    there.

    It forgets all but the estimate x0_hat, the fully stochastic member of the DDIM family. Order 0: more
    steps do not lead to the prior. For a Gaussian prior the samples' variance falls towards half of the true
    one, so use it to reproduce published reconstructions, not for error bars.
    """

    name: ClassVar[str] = "aid_stochastic"
    order: ClassVar[int] = 0

    def step(self, D, x, sigmas, i, noise, memory):
        x0_hat = D(x, sigmas[i])
        return Step(x0_hat + sigmas[i + 1] * noise() if sigmas[i + 1] > 0 else x0_hat, x0_hat)


@dataclass(frozen=True)
class DPMpp2M(Solver):
    """DPM-Solver++(2M), Algorithm 2 of [lu2022]: second order at one evaluation a step."""

    name: ClassVar[str] = "dpmpp_2m"
    order: ClassVar[int] = 2
    multistep: ClassVar[bool] = True

    def step(self, D, x, sigmas, i, noise, memory):
        x0_hat = D(x, sigmas[i])
        if sigmas[i + 1] == 0:
            return Step(x0_hat, x0_hat, x0_hat)
        ratio = sigmas[i + 1] / sigmas[i]  # exp(-h), h the step in lambda = -ln(sigma)
        extrapolated = x0_hat
        if memory is not None:
            r = math.log(sigmas[i - 1] / sigmas[i]) / -math.log(ratio)
            extrapolated = x0_hat + (x0_hat - memory) / (2 * r)
        return Step(ratio * x + (1 - ratio) * extrapolated, x0_hat, x0_hat)


@dataclass(frozen=True)
class DPMpp2MSDE(Solver):
    """SDE-DPM-Solver++(2M) of [lu2022] (Sec. 5, midpoint form), with a share eta of the reverse SDE's
    noise.

    eta = 0 is DPM-Solver++(2M), eta = 1 the reverse-time SDE. First order into 0.
    """

    eta: float = 1.0

    name: ClassVar[str] = "dpmpp_2m_sde"
    order: ClassVar[int] = 2
    multistep: ClassVar[bool] = True

    def __post_init__(self):
        if not self.eta >= 0:
            raise ValueError(f"eta={self.eta}: expected 0 (deterministic) or above; 1 is the reverse SDE")

    def step(self, D, x, sigmas, i, noise, memory):
        x0_hat = D(x, sigmas[i])
        if sigmas[i + 1] == 0:
            return Step(x0_hat, x0_hat, x0_hat)
        h = math.log(sigmas[i] / sigmas[i + 1])
        keep = math.exp(-h * (1 + self.eta**2))
        extrapolated = x0_hat
        if memory is not None:
            r = math.log(sigmas[i - 1] / sigmas[i]) / h
            extrapolated = x0_hat + (x0_hat - memory) / (2 * r)
        x_next = keep * x + (1 - keep) * extrapolated
        if self.eta > 0:
            x_next = x_next + sigmas[i + 1] * math.sqrt(-math.expm1(-2 * self.eta**2 * h)) * noise()
        return Step(x_next, x0_hat, x0_hat)


SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver for solver in (DDPM, DDIM, AIDStochastic, Euler, Heun, HeunChurn, DPMpp2M, DPMpp2MSDE)
}

# the names that notebooks use: solver=ddim(eta=0.5)
ddpm, ddim, aid_stochastic, euler = DDPM, DDIM, AIDStochastic, Euler
heun, heun_churn, dpmpp_2m, dpmpp_2m_sde = Heun, HeunChurn, DPMpp2M, DPMpp2MSDE
