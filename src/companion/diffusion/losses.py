"""Training losses. Each returns one number per batch item and draws from the generator it is given."""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from companion.diffusion.complexify import to_channels
from companion.diffusion.ddpm import DiscreteProcess
from companion.diffusion.denoisers import ComplexDenoiser, Denoiser, column, run_network
from companion.randomness import randn


def edm_loss(
    D: Denoiser,
    x0: Tensor,
    generator: Generator | None = None,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    cond: Tensor | None = None,
    *,
    variance_weight: float = 1.0,
    sigma: Tensor | None = None,
    noise: Tensor | None = None,
    weight: Tensor | None = None,
    **labels: Tensor,
) -> Tensor:
    """EDM loss of each batch item (batch,): mean over pixels of |F - target|^2 in preconditioned units.

    Equals lambda(sigma) |D(x0 + sigma n) - x0|^2 with lambda = 1/c_out^2 and ln sigma ~ N(P_mean, P_std^2):
    Eqs. (2, 8) of [karras2022]. Draws one normal number per item for sigma (batch,), then the noise
    (shape of x0); either may be supplied instead. A learned variance adds variance_weight times the Gaussian
    negative log likelihood e^2 exp(-u) + u per pixel; its error e is detached, so this term teaches u and not
    the mean. x0: (batch, channel, *space), complex for a ComplexDenoiser. weight: factors on the squared errors,
    broadcast to x0; where they depend on x0 the optimum leans towards the images that weigh more. labels: what else
    the network takes by name, such as y= and augment= of an EDMUNet.
    """
    inner, x0, cond, noise = in_channels(D, x0, cond, noise)
    if sigma is None:
        sigma = (P_mean + P_std * randn((len(x0),), x0.dtype, generator, x0.device)).exp()
    if noise is None:
        noise = randn(x0.shape, x0.dtype, generator, x0.device)
    x = x0 + column(sigma, x0) * noise
    F, u = inner.raw(x, sigma, cond, **labels)
    c_skip, c_out, _, _ = inner.preconditioning(x, sigma)
    e = F - (x0 - c_skip * x) / c_out
    loss = per_sample(e**2 if weight is None else weight * e**2)
    if u is not None:
        loss = loss + variance_weight * per_sample(e.detach() ** 2 * torch.exp(-u) + u)
    return loss


def flow_loss(
    D: Denoiser,
    x0: Tensor,
    generator: Generator | None = None,
    cond: Tensor | None = None,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    **labels: Tensor,
) -> Tensor:
    """Rectified-flow loss of each batch item (batch,): mean over pixels of |u(x_t, t) - (n - x0)|^2.

    Draws t (batch,) uniformly from [0, 1), then the noise; either may be supplied. labels: as for `edm_loss`.
    [liu2022], Eq. (1).
    """
    inner, x0, cond, noise = in_channels(D, x0, cond, noise)
    if t is None:
        if generator is None:
            raise TypeError("give a generator, or t and noise")
        t = torch.rand(len(x0), generator=generator, device=generator.device).to(x0.device)
    if noise is None:
        noise = randn(x0.shape, x0.dtype, generator, x0.device)
    x_t = torch.lerp(x0, noise, column(t, x0))
    return per_sample((inner.velocity(x_t, t, cond, **labels) - (noise - x0)) ** 2)


class DiscreteTerms(NamedTuple):
    """Terms of a discrete loss, each (batch,). Without a learned variance vb is None and loss is mse."""

    loss: Tensor
    mse: Tensor | None
    vb: Tensor | None


def discrete_loss(
    D: Denoiser,
    x0: Tensor,
    generator: Generator | None = None,
    kind: str = "mse",
    cond: Tensor | None = None,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Loss of each batch item (batch,) for an epsilon, v or x0 network: `discrete_terms(...).loss`."""
    return discrete_terms(D, x0, generator, kind, cond, t=t, noise=noise).loss


def discrete_terms(
    D: Denoiser,
    x0: Tensor,
    generator: Generator | None = None,
    kind: str = "mse",
    cond: Tensor | None = None,
    *,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    **labels,
) -> DiscreteTerms:
    """Loss, mse and variational term of each batch item, for the network and the process inside D.

    kind: "mse", the mean squared error of the prediction, plus the variational term if the variance is
    learned (its prediction detached, so that this term teaches the variance only: L_hybrid of Nichol and
    Dhariwal 2021, there with weight 0.001, which for T = 1000 is the 1 of "mse" and of "rescaled_mse", whose
    weight is T/1000); "kl", the variational term alone, and "rescaled_kl", T times that, an estimate of the
    whole bound. Draws t (batch,) uniformly over the schedule's indices, then the noise; either may be
    supplied. labels: of the network, such as y (batch,), the classes.
    """
    inner, x0, cond, noise = in_channels(D, x0, cond, noise)
    process, T = inner.process, len(inner.schedule)
    weights = {"mse": 1.0, "rescaled_mse": T / 1000, "kl": 1.0, "rescaled_kl": float(T)}
    if kind not in weights:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(weights)}")
    if t is None:
        if generator is None:
            raise TypeError("give a generator, or t and noise")
        t = torch.randint(len(process.schedule), (len(x0),), generator=generator, device=generator.device)
        t = t.to(x0.device)
    if noise is None:
        noise = randn(x0.shape, x0.dtype, generator, x0.device)
    x_t = process.schedule.q_sample(x0, t, noise)
    output = run_network(inner.network, x_t, process.network_t(t), cond, inner.autocast, **labels)
    if kind.endswith("kl"):
        vb = weights[kind] * variational_bound(process, output, x0, x_t, t)
        return DiscreteTerms(vb, None, vb)
    prediction, v = process.split(output, x0.shape[process.channel_axis])
    mse = per_sample((prediction - process.target(x0, t, noise)) ** 2)
    if v is None:
        return DiscreteTerms(mse, mse, None)
    frozen = torch.cat([prediction.detach(), v], process.channel_axis)
    vb = weights[kind] * variational_bound(process, frozen, x0, x_t, t)
    return DiscreteTerms(mse + vb, mse, vb)


def variational_bound(process: DiscreteProcess, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Term t of the variational bound in bits per dimension (batch,): KL for t > 0, discretised likelihood at
    t = 0.

    Eq. (5) of [ho2020]. The estimate of x0 is not clipped here, whatever the process says.
    """
    p = dataclasses.replace(process, clip=None).p_mean_variance(output, x_t, t)
    mean, _, log_variance = process.schedule.q_posterior(x0, x_t, t)
    kl = (
        p.log_variance
        - log_variance
        + (log_variance - p.log_variance).exp()
        + (mean - p.mean) ** 2 * (-p.log_variance).exp()
        - 1
    ) / 2
    nll = -discretised_log_likelihood(x0, p.mean, p.log_variance / 2)
    return torch.where(t == 0, per_sample(nll), per_sample(kl)) / math.log(2)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log of the Gaussian mass in the bin of width 2/255 around x, per pixel; open-ended bins at -1 and 1.

    Sec. 3.3 of [ho2020]: it assumes 8-bit pixels scaled to [-1, 1]. The normal distribution function is
    the approximation (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2, which published weights were trained
    with.
    """

    def below(z: Tensor) -> Tensor:
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2

    inverse_std = (-log_std).exp()
    upper, lower = below((x - mean + 1 / 255) * inverse_std), below((x - mean - 1 / 255) * inverse_std)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def in_channels(
    D: Denoiser, x0: Tensor, cond: Tensor | None, noise: Tensor | None
) -> tuple[Any, Tensor, Tensor | None, Tensor | None]:
    """The denoiser inside a ComplexDenoiser and its x0, cond, noise as real channels; others unchanged."""
    if not isinstance(D, ComplexDenoiser):
        return D, x0, cond, noise
    cond, noise = (None if x is None else to_channels(x, D.channel_axis) for x in (cond, noise))
    return D.D, to_channels(x0, D.channel_axis), cond, noise


def per_sample(values: Tensor) -> Tensor:
    """Mean over all axes but the first: (batch, ...) -> (batch,)."""
    return values.flatten(1).mean(1)
