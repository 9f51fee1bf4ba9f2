"""Noise: the levels a sampler visits, the discrete schedules a network was trained with, and the draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# --- levels for samplers


def karras(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """n levels, dense near sigma_min, and a final 0, float64 (n+1,): Eq. (5) of [karras2022]."""
    _check_range(n, sigma_min, sigma_max)
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _end_with_zero((high + ramp * (low - high)) ** rho)


def log_uniform(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """n levels of constant ratio from sigma_max to sigma_min and a final 0, float64 (n+1,)."""
    _check_range(n, sigma_min, sigma_max)
    return _end_with_zero(torch.linspace(math.log(sigma_max), math.log(sigma_min), n, dtype=torch.float64).exp())


def linear(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """n equidistant levels from sigma_max to sigma_min and a final 0, float64 (n+1,)."""
    _check_range(n, sigma_min, sigma_max)
    return _end_with_zero(torch.linspace(sigma_max, sigma_min, n, dtype=torch.float64))


def flow_levels(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, shift: float = 1.0) -> Tensor:
    """n levels evenly spaced in the time t = sigma / (1 + sigma) of a rectified flow, and a final 0, float64 (n+1,).

    shift: even in the time of sigma / shift instead, so that t becomes shift t / (1 + (shift - 1) t): above 1 more of
    the levels are noisy ones, which large images need, whose pixels average the noise away [esser2024]. MONAI's
    RFlowScheduler takes the ratio of the images' side to 32 pixels.
    """
    _check_range(n, sigma_min, sigma_max)
    if not shift > 0:
        raise ValueError(f"shift={shift}: expected a factor above 0")
    high, low = sigma_max / shift, sigma_min / shift
    t = torch.linspace(high / (1 + high), low / (1 + low), n, dtype=torch.float64)
    return _end_with_zero(shift * t / (1 - t))


def _check_range(n: int, sigma_min: float, sigma_max: float) -> None:
    if n < 1:
        raise ValueError(f"{n} noise levels were asked for; at least 1 is needed")
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(f"sigma_min={sigma_min}, sigma_max={sigma_max}: expected 0 < sigma_min <= sigma_max < inf")


def _end_with_zero(levels: Tensor) -> Tensor:
    return torch.cat([levels, levels.new_zeros(1)])


# --- schedules of discrete networks


def linear_betas(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Equidistant betas, float64 (steps,): [ho2020]. The ends do not depend on the steps."""
    return torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)


def scaled_linear_betas(steps: int = 1000, beta_start: float = 0.0015, beta_end: float = 0.0195) -> Tensor:
    """Squares of equidistant roots, float64 (steps,): latent diffusion [rombach2022]."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2


def cosine_betas(steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Betas of a squared-cosine signal level, float64 (steps,): Eq. (17) of [nichol2021]."""
    time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    signal = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(max=max_beta)


def zero_terminal_betas(betas: Tensor) -> Tensor:
    """Betas whose last signal level is 0 and whose first is as before: Alg. 1 of [lin2024].

    The root of abar is shifted and stretched. The last beta is 1, so a network must not predict epsilon there.
    """
    root = torch.cumprod(1 - betas, 0).sqrt()
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


@dataclass(frozen=True, eq=False)
class DiscreteSchedule:
    """The chain x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) n of a network trained at discrete times.

    betas: (T,). timesteps: (T,) the t that the network is given for each index; None means 0 .. T-1. A
    respaced schedule keeps the original numbers here. Tables are float64; `at` gathers them for a batch. [ho2020]
    """

    betas: Tensor
    timesteps: Tensor | None = None

    def __post_init__(self):
        betas = torch.as_tensor(self.betas, dtype=torch.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"betas of shape {tuple(betas.shape)} must be one row of numbers in (0, 1]")
        timesteps = torch.arange(len(betas)) if self.timesteps is None else torch.as_tensor(self.timesteps)
        if timesteps.shape != betas.shape:
            raise ValueError(f"{len(timesteps)} timesteps were given for {len(betas)} betas")
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "timesteps", timesteps)

    @property
    def times(self) -> Tensor:
        """The network's t of each beta: `timesteps`, which were counted if none were given."""
        assert self.timesteps is not None
        return self.timesteps

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "DiscreteSchedule":
        return cls(linear_betas(steps, beta_start, beta_end))

    @classmethod
    def scaled_linear(cls, steps: int = 1000, beta_start: float = 0.0015, beta_end: float = 0.0195):
        return cls(scaled_linear_betas(steps, beta_start, beta_end))

    @classmethod
    def zero_terminal(cls, steps: int = 1000, beta_start: float = 0.0015, beta_end: float = 0.0195):
        """The scaled linear schedule, stretched to leave no signal at its end, for v and x0 networks."""
        return cls(zero_terminal_betas(scaled_linear_betas(steps, beta_start, beta_end)))

    @classmethod
    def cosine(cls, steps: int = 1000) -> "DiscreteSchedule":
        return cls(cosine_betas(steps))

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar_t, the squared signal level."""
        return torch.cumprod(1 - self.betas, 0)

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        """abar_{t-1}, with abar_{-1} = 1."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @cached_property
    def sigmas(self) -> Tensor:
        """sqrt((1 - abar) / abar), increasing with t: the noise level of x_t / sqrt(abar_t)."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x0), Eq. (7) of [ho2020]; 0 at t = 0."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> Tensor:
        """Its logarithm, where the value at t = 0 (minus infinity) is replaced by the one at t = 1."""
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @cached_property
    def posterior_mean_coef1(self) -> Tensor:
        """Weight of x0 in the mean of q(x_{t-1} | x_t, x0)."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Tensor:
        """Weight of x_t in the mean of q(x_{t-1} | x_t, x0)."""
        return (1 - self.alphas_cumprod_prev) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)

    def levels(self, steps: int | None = None) -> Tensor:
        """Levels for `sample`: the schedule's own sigmas, decreasing, and a final 0, float64 (T+1,).

        steps: only so many of them, as `respace` spreads them; None: all.
        """
        if steps is not None and steps != len(self):
            return self.respace(str(steps)).levels()
        return _end_with_zero(self.sigmas.flip(0))

    def respace(self, spec: str | int | Sequence[int]) -> "DiscreteSchedule":
        """The same chain at fewer times: betas are recomputed from abar, the network keeps the original t.

        spec: "25" (25 times over the whole range), "10,15,20" (so many in each of three equal sections, from
        the clean end), "ddim25" (a constant integer stride from t = 0). Improved DDPM [nichol2021].
        """
        keep = torch.tensor(respaced_indices(len(self), spec))
        abar = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[keep]])
        return DiscreteSchedule(1 - abar[1:] / abar[:-1], self.times[keep])

    def sigma_to_t(self, sigma: Tensor, mode: str = "interpolate") -> Tensor:
        """The network's t for noise levels sigma (batch,), clamped to the ends of the schedule.

        "interpolate": float64, linear in log sigma; "nearest": the integer t whose log sigma is nearest.
        """
        if mode == "nearest":
            return self.times.to(sigma.device)[self.nearest_index(sigma)]
        if mode != "interpolate":
            raise ValueError(f"mode={mode!r}: expected 'interpolate' or 'nearest'")
        below, weight = self._locate(sigma)
        times = self.times.to(sigma.device).double()
        return torch.lerp(times[below], times[(below + 1).clamp(max=len(self) - 1)], weight)

    def nearest_index(self, sigma: Tensor) -> Tensor:
        """Indices of the schedule nearest to sigma (batch,) in log sigma."""
        below, weight = self._locate(sigma)
        return (below + (weight > 0.5)).clamp(max=len(self) - 1)

    def _locate(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The index below sigma, and the way from there to the next in log sigma, from 0 to 1."""
        # a schedule of zero terminal signal ends at sigma = inf, which has no logarithm to interpolate
        table = self.sigmas.clamp(max=1e6).log().to(sigma.device)
        log_sigma = sigma.double().clamp(min=1e-12).log().contiguous()
        below = (torch.searchsorted(table, log_sigma) - 1).clamp(0, max(len(table) - 2, 0))
        above = (below + 1).clamp(max=len(table) - 1)
        gap = (table[above] - table[below]).clamp(min=1e-12)
        return below, ((log_sigma - table[below]) / gap).clamp(0, 1)

    def at(self, table: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Entries of a table at indices t (batch,), as a column that broadcasts against `like` (batch, ...).

        The tables are float64; the result has the real precision of `like`.
        """
        real = like.real.dtype if like.is_complex() else like.dtype
        return table.to(t.device)[t].to(like.device, real).reshape(-1, *[1] * (like.ndim - 1))

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, for indices t (batch,)."""
        abar = self.alphas_cumprod
        return self.at(abar.sqrt(), t, x0) * x0 + self.at((1 - abar).sqrt(), t, x0) * noise

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x0): Eqs. (6, 7) of [ho2020]."""
        mean = self.at(self.posterior_mean_coef1, t, x_t) * x0 + self.at(self.posterior_mean_coef2, t, x_t) * x_t
        variance = self.at(self.posterior_variance, t, x_t)
        return mean, variance, self.at(self.posterior_log_variance_clipped, t, x_t)


def respaced_indices(steps: int, spec: str | int | Sequence[int]) -> list[int]:
    """The times that a respacing keeps, increasing; `spec` as for `DiscreteSchedule.respace`."""
    if isinstance(spec, str) and spec.startswith("ddim"):
        count = int(spec[4:])
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == count:
                return list(range(0, steps, stride))
        raise ValueError(
            f"respacing {spec!r}: no integer stride through {steps} steps gives {count}; "
            f"use '{count}' for uneven strides"
        )
    if isinstance(spec, str):
        counts = [int(part) for part in spec.split(",")]
    else:
        counts = [spec] if isinstance(spec, int) else list(spec)
    sizes = [steps // len(counts) + (i < steps % len(counts)) for i in range(len(counts))]
    kept, first = [], 0
    for size, count in zip(sizes, counts, strict=True):
        if not 1 <= count <= size:
            raise ValueError(f"respacing {spec!r}: a section of {size} steps cannot keep {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1
        kept += [first + round(stride * i) for i in range(count)]
        first += size
    return kept
