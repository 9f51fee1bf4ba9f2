"""Denoisers: everything becomes D(x, sigma, cond) -> x0_hat, the mean of the clean image given the noisy one.

x: (batch, channel, *space) or (batch, frame, channel, y, x), with x = x0 + sigma n and n standard normal per
real component; sigma: (batch,); cond: whatever the network takes. A denoiser that knows its own error also
has moments(x, sigma, cond) -> (x0_hat, variance), the variance of x0 given x per real component,
broadcastable to x. Denoisers without this knowledge have no attribute `moments`, so hasattr(D, "moments")
tells. Wrappers keep the denoiser that they wrap as `.D`.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from companion.diffusion.complexify import to_channels, to_complex
from companion.diffusion.ddpm import DiscreteProcess
from companion.diffusion.noise import DiscreteSchedule


class Denoiser(Protocol):
    """What samplers and guidances ask for."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor: ...


class Uncertain(Denoiser, Protocol):
    """A denoiser that states how far off it is."""

    @property
    def moments(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """moments(x, sigma, cond) -> (x0_hat, variance of a real component), the variance to broadcast."""
        ...


def moments_of(D: Denoiser) -> Callable[..., tuple[Tensor, Tensor]]:
    """D.moments; AttributeError for a denoiser that states no variance."""
    return cast(Uncertain, D).moments


def inner_denoiser(D: Denoiser | nn.Module) -> Any:
    """The denoiser that holds the network, under any number of wrappers: what they wrap is their `D`."""
    inner: Any = D
    while hasattr(inner, "D"):
        inner = inner.D
    return inner


def column(values: Tensor, like: Tensor) -> Tensor:
    """Values (batch,) or a scalar as (batch, 1, ..., 1), in the real precision of `like`."""
    real = like.dtype.to_real()
    values = torch.as_tensor(values, device=like.device).to(real)
    return values.reshape(-1, *[1] * (like.ndim - 1))


def once(f: Callable[[Tensor], Tensor], cond: Tensor | None) -> Tensor | None:
    """f(cond); a condition expanded over the batch is worked out once and stays expanded.

    Networks see by its stride of 0 that all draws share it.
    """
    if cond is None:
        return None
    if len(cond) > 1 and cond.stride(0) == 0:
        return f(cond[:1]).expand(len(cond), *[-1] * (cond.ndim - 1))
    return f(cond)


def run_network(
    network: Callable, x: Tensor, t: Tensor, cond: Tensor | None, autocast: torch.dtype | None, **labels
) -> Tensor:
    """The network's output in the precision of x. All conversions between sampler and network happen here.

    The network computes in the precision of its weights (float32), its convolutions under `autocast` if
    given; 2D images are laid out channels_last, without which bf16 convolutions on CPUs are several times
    slower.
    """
    weights = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    dtype = x.dtype if weights is None else weights.dtype
    x_in = x.to(dtype)
    if x_in.ndim == 4:
        x_in = x_in.contiguous(memory_format=torch.channels_last)
    extra = () if cond is None else (once(lambda c: c.to(dtype) if c.is_floating_point() else c, cond),)
    # without an option of its own the network follows the caller's autocast, such as a training loop's
    with torch.autocast(x.device.type, dtype=autocast) if autocast else contextlib.nullcontext():
        out = network(x_in, t.to(dtype) if t.is_floating_point() else t, *extra, **labels)
    return out.to(x.dtype)


class EDMDenoiser(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise): the preconditioning of [karras2022], Table 1.

    network: F(x, t, cond=None), t = c_noise = ln(sigma)/4. sigma_data: standard deviation of the clean data
    per real component. learned_variance: the network returns `variance_channels` further channels u (default:
    one for each data channel; 1 is shared by all), and Var[x0 | x] = c_out^2 exp(u), since c_out is the
    natural size of the error; u is held softly within +-10. cond_scale multiplies cond on its way to the
    network. cond_channels: of a condition that may be left out; the network is given zeros for it then.
    **labels of the methods are further tensors that the network takes by name, such as y= and augment=
    of an EDMUNet; they reach it as they are. autocast: dtype for the network, e.g. torch.bfloat16. channel_axis:
    1, or -3 for sequences of 2D images and their single frames alike. symmetries: of the law of its images,
    which samplers may use: names of `companion.diffusion.symmetry.Symmetries`.
    """

    u_limit = 10.0

    def __init__(
        self,
        network: nn.Module,
        sigma_data: float = 0.5,
        learned_variance: bool = False,
        *,
        variance_channels: int | None = None,
        cond_scale: float = 1.0,
        cond_channels: int = 0,
        autocast: torch.dtype | None = None,
        channel_axis: int = 1,
        symmetries: Sequence[str] = (),
    ):
        super().__init__()
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data={sigma_data}: expected the standard deviation of the data, above 0")
        self.network, self.sigma_data, self.learned_variance = network, sigma_data, learned_variance
        self.variance_channels, self.cond_scale, self.cond_channels = variance_channels, cond_scale, cond_channels
        self.autocast, self.channel_axis, self.symmetries = autocast, channel_axis, tuple(symmetries)

    def preconditioning(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in, shaped to multiply x, and c_noise (batch,)."""
        sigma, s = column(sigma, x), self.sigma_data
        norm = (sigma**2 + s**2).sqrt()
        c_noise = (sigma.reshape(-1).log() / 4).expand(x.shape[0])
        return s**2 / norm**2, sigma * s / norm, 1 / norm, c_noise

    def raw(
        self, x: Tensor, sigma: Tensor, cond: Tensor | None = None, **labels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The network's F and u (None without learned_variance), in preconditioned units."""
        _, _, c_in, c_noise = self.preconditioning(x, sigma)
        if cond is None and self.cond_channels:
            cond = x.new_zeros(1, self.cond_channels, *x.shape[2:]).expand(len(x), *[-1] * (x.ndim - 1))
        scaled = once(lambda c: self.cond_scale * c, cond)
        out = run_network(self.network, c_in * x, c_noise, scaled, self.autocast, **labels)
        channels = x.shape[self.channel_axis]
        extra = (self.variance_channels or channels) if self.learned_variance else 0
        if out.shape[self.channel_axis] != channels + extra:
            raise ValueError(
                f"the network returned {out.shape[self.channel_axis]} channels; expected {channels} "
                f"for the image and {extra} for its variance: set its out_channels to {channels + extra}"
            )
        if not extra:
            return out, None
        F, u = out.split([channels, extra], self.channel_axis)
        return F, self.u_limit * torch.tanh(u / self.u_limit)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None, **labels: Tensor) -> Tensor:
        """x0_hat, the shape and dtype of x."""
        c_skip, c_out, _, _ = self.preconditioning(x, sigma)
        return c_skip * x + c_out * self.raw(x, sigma, cond, **labels)[0]

    def _moments(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None, **labels: Tensor) -> tuple[Tensor, Tensor]:
        c_skip, c_out, _, _ = self.preconditioning(x, sigma)
        F, u = self.raw(x, sigma, cond, **labels)
        assert u is not None  # `moments` exists with learned_variance only
        return c_skip * x + c_out * F, c_out**2 * u.exp()

    @property
    def moments(self) -> Callable:
        """moments(x, sigma, cond) -> (x0_hat, variance); exists only with learned_variance."""
        if not self.learned_variance:
            raise AttributeError("moments need learned_variance=True")
        return self._moments


class DiscreteDenoiser(nn.Module):
    """D(x, sigma) from a network trained at discrete times on x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) n.

    The noise level decides the rest: abar = 1 / (1 + sigma^2), x_t = sqrt(abar) x, and t is where the
    schedule has this sigma. timesteps: "interpolate" gives the network a float t between two trained ones
    (fine for sinusoidal embeddings); "nearest" an integer. network: F(x_t, t, cond=None). prediction:
    "epsilon", "v" or "x0". learned_variance: the output has twice the channels, the second half being the
    learned-range v of p(x_{t-1} | x_t); it says Var[x0 | x] too, see `moments`. clip: (low, high) for x0_hat,
    or None. autocast and channel_axis as for EDMDenoiser. `process` is the discrete process that the losses
    need.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: DiscreteSchedule,
        prediction: str = "epsilon",
        learned_variance: bool = False,
        *,
        timesteps: str = "interpolate",
        clip: tuple[float, float] | None = None,
        autocast: torch.dtype | None = None,
        channel_axis: int = 1,
    ):
        super().__init__()
        if timesteps not in ("interpolate", "nearest"):
            raise ValueError(f"timesteps={timesteps!r}: expected 'interpolate' or 'nearest'")
        variance = "learned_range" if learned_variance else "fixed_small"
        self.process = DiscreteProcess(schedule, prediction, variance, None, channel_axis)
        self.network, self.learned_variance, self.timesteps = network, learned_variance, timesteps
        self.clip, self.autocast, self.channel_axis = clip, autocast, channel_axis

    @property
    def schedule(self) -> DiscreteSchedule:
        return self.process.schedule

    def predict(self, x: Tensor, sigma: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x0_hat and the network's v (None without learned_variance)."""
        sigma = sigma.to(x.device)
        signal = (1 + column(sigma, x) ** 2).rsqrt()  # sqrt(abar)
        t = self.schedule.sigma_to_t(sigma, self.timesteps).reshape(-1).expand(x.shape[0])
        output = run_network(self.network, signal * x, t, cond, self.autocast)
        out, v = self.process.split(output, x.shape[self.channel_axis])
        if self.process.prediction == "epsilon":
            out = x - column(sigma, x) * out
        elif self.process.prediction == "v":
            out = signal**2 * x - signal * column(sigma, x) * out
        return out if self.clip is None else out.clamp(*self.clip), v

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """x0_hat, the shape and dtype of x."""
        return self.predict(x, sigma, cond)[0]

    def _moments(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sigma = sigma.to(x.device)
        x0_hat, v = self.predict(x, sigma, cond)
        assert v is not None  # `moments` exists with learned_variance only
        schedule, share = self.schedule, (v + 1) / 2
        i = schedule.nearest_index(sigma).reshape(-1).expand(x.shape[0])
        small, log_small = schedule.posterior_variance, schedule.posterior_log_variance_clipped
        learned = (share * schedule.at(schedule.betas.log(), i, x) + (1 - share) * schedule.at(log_small, i, x)).exp()
        excess = (learned - schedule.at(small, i, x)).clamp(min=0)
        variance = excess / schedule.at(schedule.posterior_mean_coef1, i, x) ** 2
        return x0_hat, variance * (column(sigma, x) / schedule.at(schedule.sigmas, i, x)) ** 2

    @property
    def moments(self) -> Callable:
        """moments(x, sigma, cond) -> (x0_hat, variance); exists only with learned_variance.

        Var[x_{t-1} | x_t] = posterior variance + coef1^2 Var[x0 | x_t] (law of total variance) is solved for
        the last term at the nearest trained level, and scaled with sigma^2 from there. Where the learned
        variance is below the posterior variance the result is 0.
        """
        if not self.learned_variance:
            raise AttributeError("moments need learned_variance=True")
        return self._moments


class FlowDenoiser(nn.Module):
    """D(x, sigma) from the velocity of a rectified flow: x_t = (1 - t) x0 + t n, network(x_t, 1000 t) = n - x0.

    The noise level decides t = sigma / (1 + sigma), and x_t = (1 - t) x. A straight step of the flow from t to t' is
    Euler's step between the noise levels, so every solver and guidance serves; levels evenly spaced in t are
    `noise.flow_levels`. Data should have standard deviation 1. [liu2022]; [lipman2023]. The network's times
    go to 1000, the range that sinusoidal embeddings are made for. to_data: the network gives x0 - n instead, as
    MONAI's do. autocast, channel_axis, **labels: as for EDMDenoiser.
    """

    times = 1000.0

    def __init__(
        self,
        network: nn.Module,
        *,
        to_data: bool = False,
        autocast: torch.dtype | None = None,
        channel_axis: int = 1,
    ):
        super().__init__()
        self.network, self.to_data = network, to_data
        self.autocast, self.channel_axis = autocast, channel_axis

    def velocity(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, **labels: Tensor) -> Tensor:
        """The estimate of n - x0 at interpolations x_t and times t (batch,) in [0, 1]."""
        u = run_network(self.network, x_t, self.times * t, cond, self.autocast, **labels)
        if u.shape != x_t.shape:
            raise ValueError(f"the network returned shape {tuple(u.shape)} for images {tuple(x_t.shape)}")
        return -u if self.to_data else u

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None, **labels: Tensor) -> Tensor:
        """x0_hat, the shape and dtype of x."""
        t = (sigma / (1 + sigma)).to(x.device).reshape(-1).expand(x.shape[0])
        x_t = x / (1 + column(sigma, x))
        return x_t - column(t, x) * self.velocity(x_t, t, cond, **labels)


class ComplexDenoiser(nn.Module):
    """Complex images in and out, around a denoiser D that sees two real channels (re, im) for each.

    x: (batch, C, *space) complex; a complex cond is split likewise. The variance of a complex pixel is the
    mean over its two parts.
    """

    state_dtype = torch.complex64  # of the images that `sample` draws from it, unless told otherwise

    def __init__(self, D: Denoiser, channel_axis: int = 1):
        super().__init__()
        self.D, self.channel_axis = D, channel_axis

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """x0_hat, complex, the shape of x."""
        return to_complex(self.D(*self._split(x, sigma, cond)), self.channel_axis)

    def _split(self, x: Tensor, sigma: Tensor, cond: Tensor | None) -> tuple:
        if not x.is_complex():
            raise TypeError(f"ComplexDenoiser got a {x.dtype} image; give a complex one, or call its .D with channels")
        return (
            to_channels(x, self.channel_axis),
            sigma,
            once(lambda c: to_channels(c, self.channel_axis), cond),
        )

    def _moments(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, variance = moments_of(self.D)(*self._split(x, sigma, cond))
        axis = self.channel_axis
        if variance.ndim == mean.ndim and variance.shape[axis] == mean.shape[axis]:
            variance = variance.unflatten(axis, (-1, 2)).mean(axis + 1)
        return to_complex(mean, axis), variance

    @property
    def moments(self) -> Callable:
        """moments(x, sigma, cond) -> (x0_hat complex, variance per real component); exists if D has it."""
        if not hasattr(self.D, "moments"):
            raise AttributeError("the wrapped denoiser has no moments")
        return self._moments


class AnySize(nn.Module):
    """D for images of any size, around a denoiser that needs multiples of `multiple` (y, x) pixels.

    Images and condition images are extended at their ends by reflection, noise and all, and the result is cropped:
    E[x0 | x] of a slightly larger field of view. Changes nothing for sizes that fit.
    """

    def __init__(self, D: Denoiser, multiple: Sequence[int]):
        super().__init__()
        self.D, self.multiple = D, tuple(multiple)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """x0_hat, the shape and dtype of x."""
        return self.crop(self.D(self.extend(x), sigma, once(self.extend, cond)), x)

    def extend(self, x: Tensor) -> Tensor:
        """x with each of its last axes reflected at its end up to a multiple."""
        for axis, m in zip(range(-len(self.multiple), 0), self.multiple, strict=True):
            n = x.shape[axis]
            if n % m:
                period = torch.cat([torch.arange(n), torch.arange(n - 2, 0, -1)]) if n > 2 else torch.arange(n)
                index = period[torch.arange(n + m - n % m) % len(period)]
                x = x.index_select(axis, index.to(x.device))
        return x

    def crop(self, values: Tensor, x: Tensor) -> Tensor:
        """The part of values (batch, channel, *space) that belongs to x; axes to broadcast stay 1 long."""
        for axis in range(-len(self.multiple), 0):
            values = values.narrow(axis, 0, min(x.shape[axis], values.shape[axis]))
        return values

    def _moments(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x0_hat, variance = moments_of(self.D)(self.extend(x), sigma, once(self.extend, cond))
        return self.crop(x0_hat, x), self.crop(variance, x)

    @property
    def moments(self) -> Callable:
        """moments(x, sigma, cond) -> (x0_hat, variance); exists if D has it."""
        if not hasattr(self.D, "moments"):
            raise AttributeError("the wrapped denoiser has no moments")
        return self._moments
