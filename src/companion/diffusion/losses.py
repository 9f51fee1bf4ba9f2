"""Training losses. Each returns one number per batch item and draws from the generator it is given."""

import torch
from torch import Generator, Tensor

from ..complexify import to_channels
from .denoisers import ComplexDenoiser, EDMDenoiser, column
from .noise import randn


def edm_loss(D: EDMDenoiser | ComplexDenoiser, x0: Tensor, generator: Generator | None = None, P_mean: float = -1.2,
             P_std: float = 1.2, cond: Tensor | None = None, *, variance_weight: float = 1.0,
             sigma: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
    """EDM loss of each batch item (batch,): mean over pixels of |F - target|^2 in preconditioned units.

    Equals lambda(sigma) |D(x0 + sigma n) - x0|^2 with lambda = 1/c_out^2 and ln sigma ~ N(P_mean, P_std^2): Eqs. (2,
    8) of Karras et al. 2022. Draws one normal number per item for sigma (batch,), then the noise (shape of x0);
    either may be supplied instead. A learned variance adds variance_weight times the Gaussian negative log
    likelihood e^2 exp(-u) + u per pixel; its error e is detached, so this term teaches u and not the mean.
    x0: (batch, channel, *space), complex for a ComplexDenoiser.
    """
    if isinstance(D, ComplexDenoiser):
        x0, axis = to_channels(x0, D.channel_axis), D.channel_axis
        cond = None if cond is None else to_channels(cond, axis)
        noise = None if noise is None else to_channels(noise, axis)
        D = D.D
    if sigma is None:
        sigma = (P_mean + P_std * randn((len(x0),), x0.dtype, generator, x0.device)).exp()
    if noise is None:
        noise = randn(x0.shape, x0.dtype, generator, x0.device)
    x = x0 + column(sigma, x0) * noise
    F, u = D.raw(x, sigma, cond)
    c_skip, c_out, _, _ = D.preconditioning(x, sigma)
    e = F - (x0 - c_skip * x) / c_out
    loss = per_sample(e**2)
    if u is not None:
        loss = loss + variance_weight * per_sample(e.detach() ** 2 * torch.exp(-u) + u)
    return loss


def per_sample(values: Tensor) -> Tensor:
    """Mean over all axes but the first: (batch, ...) -> (batch,)."""
    return values.flatten(1).mean(1)
