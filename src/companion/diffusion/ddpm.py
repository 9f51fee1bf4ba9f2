"""The discrete diffusion process itself: for losses with a variational term, and for published ancestral
chains.

New sampling goes through `sampling.sample`, where a discrete network is a DiscreteDenoiser like any other.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from companion.diffusion.noise import DiscreteSchedule

PREDICTIONS = ("epsilon", "v", "x0")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t) and the estimate of the clean image that it came from."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x0_hat: Tensor


@dataclass(frozen=True, eq=False)
class DiscreteProcess:
    """How a network's output at index t becomes p(x_{t-1} | x_t). Images are at the variance-preserving
    scale.

    prediction: "epsilon", "v" (sqrt(abar) n - sqrt(1 - abar) x0) or "x0". variance: "fixed_small",
    "fixed_large", or "learned_range", where the output has twice the channels and the second half v mixes the
    logarithms of the two (Eq. (15) of [nichol2021]). clip: (low, high) for the estimate of x0, or
    None. channel_axis: 1, or 2 for sequences. t: indices of the schedule (batch,); `network_t` gives what the
    network is to be told.
    """

    schedule: DiscreteSchedule
    prediction: str = "epsilon"
    variance: str = "fixed_small"
    clip: tuple[float, float] | None = None
    channel_axis: int = 1

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction={self.prediction!r}: expected one of {', '.join(PREDICTIONS)}")
        if self.variance not in VARIANCES:
            raise ValueError(f"variance={self.variance!r}: expected one of {', '.join(VARIANCES)}")

    def network_t(self, t: Tensor) -> Tensor:
        """The original times of indices t, the same for a respaced process."""
        return self.schedule.times.to(t.device)[t]

    def split(self, output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
        """The prediction and, with a learned variance, v. Raises ValueError for other channel counts."""
        expected = 2 * channels if self.variance == "learned_range" else channels
        if output.shape[self.channel_axis] != expected:
            raise ValueError(
                f"the network returned {output.shape[self.channel_axis]} channels for images of "
                f"{channels}; variance={self.variance!r} needs {expected}"
            )
        if expected == channels:
            return output, None
        prediction, v = output.chunk(2, self.channel_axis)
        return prediction, v

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should predict."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return x0
        abar = self.schedule.alphas_cumprod
        return self.schedule.at(abar.sqrt(), t, x0) * noise - self.schedule.at((1 - abar).sqrt(), t, x0) * x0

    def x0_hat(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean image that a prediction means, clipped if asked."""
        at, abar = self.schedule.at, self.schedule.alphas_cumprod
        if self.prediction == "epsilon":
            x0 = at(abar.rsqrt(), t, x_t) * x_t - at((1 / abar - 1).sqrt(), t, x_t) * prediction
        elif self.prediction == "v":
            x0 = at(abar.sqrt(), t, x_t) * x_t - at((1 - abar).sqrt(), t, x_t) * prediction
        else:
            x0 = prediction
        return x0 if self.clip is None else x0.clamp(*self.clip)

    def p_mean_variance(self, output: Tensor, x_t: Tensor, t: Tensor) -> Reverse:
        """p(x_{t-1} | x_t) from the network's output at x_t (batch, channel, *space)."""
        schedule = self.schedule
        prediction, v = self.split(output, x_t.shape[self.channel_axis])
        x0 = self.x0_hat(prediction, x_t, t)
        mean, small, log_small = schedule.q_posterior(x0, x_t, t)
        if v is not None:
            share = (v + 1) / 2
            log_variance = share * schedule.at(schedule.betas.log(), t, x_t) + (1 - share) * log_small
            return Reverse(mean, log_variance.exp(), log_variance, x0)
        if self.variance == "fixed_small":
            return Reverse(mean, small.expand_as(x_t), log_small.expand_as(x_t), x0)
        # beta, but at t = 0 the smaller posterior variance, for a better likelihood there
        large = schedule.at(torch.cat([schedule.posterior_variance[1:2], schedule.betas[1:]]), t, x_t)
        return Reverse(mean, large.expand_as(x_t), large.log().expand_as(x_t), x0)

    def step(self, output: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_{t-1} by ancestral sampling, Algorithm 2 of [ho2020]; no noise is added where t = 0."""
        p = self.p_mean_variance(output, x_t, t)
        return p.mean + _column(t > 0, x_t) * (p.log_variance / 2).exp() * noise

    def ddim_step(
        self, output: Tensor, x_t: Tensor, t: Tensor, noise: Tensor | None = None, eta: float = 0.0
    ) -> Tensor:
        """x_{t-1} by Eq. (12) of [song2021]; noise is needed for eta > 0 only."""
        schedule = self.schedule
        abar, abar_prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
        x0 = self.x0_hat(self.split(output, x_t.shape[self.channel_axis])[0], x_t, t)
        # the noise that leads from the (clipped) x0 to x_t
        n = (x_t - schedule.at(abar.sqrt(), t, x_t) * x0) / schedule.at((1 - abar).sqrt(), t, x_t)
        up = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()
        mean = schedule.at(abar_prev.sqrt(), t, x_t) * x0 + schedule.at((1 - abar_prev - up**2).sqrt(), t, x_t) * n
        if eta == 0:
            return mean
        if noise is None:
            raise TypeError(f"eta={eta} adds noise, and none was given; give noise, shaped like x_t")
        return mean + schedule.at(up, t, x_t) * noise

    def stochastic_step(self, output: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_{t-1} by AID's rule [luo2024]: x0_hat with fresh noise of the next level."""
        x0 = self.x0_hat(self.split(output, x_t.shape[self.channel_axis])[0], x_t, t)
        abar_prev = self.schedule.alphas_cumprod_prev
        return (
            self.schedule.at(abar_prev.sqrt(), t, x_t) * x0 + self.schedule.at((1 - abar_prev).sqrt(), t, x_t) * noise
        )


def _column(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like.device, like.dtype.to_real()).reshape(-1, *[1] * (like.ndim - 1))
