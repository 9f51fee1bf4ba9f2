"""Denoisers: everything becomes D(x, sigma, cond) -> x0_hat, the mean of the clean image given the noisy one.

x: (batch, channel, *space) or (batch, frame, channel, y, x), with x = x0 + sigma n and n standard normal per real
component; sigma: (batch,); cond: whatever the network takes. A denoiser that knows its own error also has
moments(x, sigma, cond) -> (x0_hat, variance), the variance of x0 given x per real component, broadcastable to x.
Denoisers without this knowledge have no attribute `moments`, so hasattr(D, "moments") tells. Wrappers keep the
denoiser that they wrap as `.D`.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from ..complexify import to_channels, to_complex
from .noise import DiscreteSchedule, randn


class Denoiser(Protocol):
    """What samplers and guidances ask for."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor: ...


def column(values: Tensor, like: Tensor) -> Tensor:
    """Values (batch,) or a scalar, in the real precision of `like`, shaped to multiply it: (batch, 1, ..., 1)."""
    real = like.dtype.to_real()
    values = torch.as_tensor(values, device=like.device).to(real)
    return values.reshape(-1, *[1] * (like.ndim - 1))


def run_network(network: Callable, x: Tensor, t: Tensor, cond: Tensor | None, autocast: torch.dtype | None) -> Tensor:
    """The network's output in the precision of x. All conversions between sampler and network happen here.

    The network computes in the precision of its weights (float32), its convolutions under `autocast` if given;
    2D images are laid out channels_last, without which bf16 convolutions on CPUs are several times slower.
    """
    weights = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    dtype = x.dtype if weights is None else weights.dtype
    inputs = x.to(dtype)
    if inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    t = t if not t.is_floating_point() else t.to(dtype)
    with torch.autocast(x.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        out = network(inputs, t) if cond is None else network(inputs, t, cond.to(dtype))
    return out.to(x.dtype)


class EDMDenoiser(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise): the preconditioning of Karras et al. 2022, Table 1.

    network: F(x, t, cond=None), t = c_noise = ln(sigma)/4. sigma_data: standard deviation of the clean data per real
    component. learned_variance: the network returns `variance_channels` further channels u (default: one for each
    data channel; 1 is shared by all), and Var[x0 | x] = c_out^2 exp(u), since c_out is the natural size of the
    error; u is held softly within +-10. cond_scale multiplies cond on its way to the network. autocast: dtype
    for the network, e.g. torch.bfloat16. channel_axis: 1, or 2 for sequences.
    """

    u_limit = 10.0

    def __init__(self, network: nn.Module, sigma_data: float = 0.5, learned_variance: bool = False, *,
                 variance_channels: int | None = None, cond_scale: float = 1.0,
                 autocast: torch.dtype | None = None, channel_axis: int = 1):
        super().__init__()
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data={sigma_data}: expected the standard deviation of the data, above 0")
        self.network, self.sigma_data, self.learned_variance = network, sigma_data, learned_variance
        self.variance_channels, self.cond_scale = variance_channels, cond_scale
        self.autocast, self.channel_axis = autocast, channel_axis

    def preconditioning(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in, shaped to multiply x, and c_noise (batch,)."""
        sigma, s = column(sigma, x), self.sigma_data
        norm = (sigma**2 + s**2).sqrt()
        c_noise = (sigma.reshape(-1).log() / 4).expand(len(x))
        return s**2 / norm**2, sigma * s / norm, 1 / norm, c_noise

    def raw(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The network's F and u (None without learned_variance): what the loss compares in preconditioned units."""
        _, _, c_in, c_noise = self.preconditioning(x, sigma)
        out = run_network(self.network, c_in * x, c_noise, None if cond is None else self.cond_scale * cond, self.autocast)
        channels = x.shape[self.channel_axis]
        extra = (self.variance_channels or channels) if self.learned_variance else 0
        if out.shape[self.channel_axis] != channels + extra:
            raise ValueError(f"the network returned {out.shape[self.channel_axis]} channels; expected {channels} "
                             f"for the image and {extra} for its variance: set its out_channels to {channels + extra}")
        if not extra:
            return out, None
        F, u = out.split([channels, extra], self.channel_axis)
        return F, self.u_limit * torch.tanh(u / self.u_limit)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """x0_hat, the shape and dtype of x."""
        c_skip, c_out, _, _ = self.preconditioning(x, sigma)
        return c_skip * x + c_out * self.raw(x, sigma, cond)[0]

    def _moments(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        c_skip, c_out, _, _ = self.preconditioning(x, sigma)
        F, u = self.raw(x, sigma, cond)
        return c_skip * x + c_out * F, c_out**2 * u.exp()

    @property
    def moments(self) -> Callable:
        """moments(x, sigma, cond) -> (x0_hat, variance); exists only with learned_variance."""
        if not self.learned_variance:
            raise AttributeError("moments need learned_variance=True")
        return self._moments


class ComplexDenoiser(nn.Module):
    """Complex images in and out, around a denoiser D that sees two real channels (re, im) for each.

    x: (batch, C, *space) complex; a complex cond is split likewise. The variance of a complex pixel is the mean over
    its two parts.
    """

    def __init__(self, D: Denoiser, channel_axis: int = 1):
        super().__init__()
        self.D, self.channel_axis = D, channel_axis

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """x0_hat, complex, the shape of x."""
        return to_complex(self.D(*self._split(x, sigma, cond)), self.channel_axis)

    def _split(self, x: Tensor, sigma: Tensor, cond: Tensor | None) -> tuple:
        if not x.is_complex():
            raise TypeError(f"ComplexDenoiser got a {x.dtype} image; give a complex one, or call its .D with channels")
        return to_channels(x, self.channel_axis), sigma, None if cond is None else to_channels(cond, self.channel_axis)

    def _moments(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, variance = self.D.moments(*self._split(x, sigma, cond))
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
