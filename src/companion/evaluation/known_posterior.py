"""Posteriors that are known in closed form: a sampler has nowhere to hide.

The operator is real SENSE (coils, equispaced lines, noise). The prior is a complex Gaussian, brain-like in mean,
support and spectrum; a mixture of such Gaussians that differ where the data hardly see (a non-linear denoiser, a
posterior of several modes); or a Gaussian that the denoiser has learned from too few images (the prior of a short
training). Mean and covariance of the posterior are then matrices.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.diffusion.exact import GaussianDenoiser, GaussianMixtureDenoiser
from companion.operators.linear import LinearOperator
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, sense
from companion.randomness import randn

PRIORS = ("gaussian", "mixture", "overfit")


@dataclass(frozen=True)
class Problem:
    """A prior, data, and the exact posterior: mean, variance per real component, draws, (..., 1, y, x)."""

    name: str
    truth: GaussianDenoiser | GaussianMixtureDenoiser
    prior: GaussianDenoiser | GaussianMixtureDenoiser  # what the samplers get: the truth, or what training made of it
    A: LinearOperator
    y: Tensor
    noise_std: float
    mean: Tensor
    variance: Tensor
    draws: Tensor

    @property
    def shape(self):
        return tuple(self.A.domain_shape)

    def images(self, count: int, seed: int = 1) -> Tensor:
        """Draws from the true prior, as validation images."""
        return self.truth.draw(count, torch.Generator().manual_seed(seed), torch.complex64)


def brain_like(size: int) -> tuple[Tensor, Tensor]:
    """Mean (1, size, size) and dense covariance: an ellipse with linear phase; inside, a smooth random
    texture of standard deviation 0.3 per component, outside almost nothing."""
    axis = torch.linspace(-1, 1, size, dtype=torch.float64)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    body = torch.sigmoid((1 - ((column / 0.8) ** 2 + (row / 0.95) ** 2).sqrt()) * 12)
    mean = 0.6 * body * torch.exp(0.8j * column)
    k = torch.fft.fftfreq(size, dtype=torch.float64) * size
    spectrum = (1 + (k[:, None] ** 2 + k**2) / 2) ** -1.5
    pixels = torch.eye(size**2, dtype=torch.complex128).reshape(-1, size, size)
    texture = torch.fft.ifft2((spectrum / spectrum.mean()).sqrt() * torch.fft.fft2(pixels)).reshape(size**2, -1)
    factor = (0.02 + 0.3 * body).reshape(-1, 1) * texture.T
    return mean[None], factor @ factor.mH


def overfit(truth: GaussianDenoiser, count: int = 150) -> GaussianDenoiser:
    """The denoiser of the Gaussian that `count` images suggest: right on those, over-confident on others."""
    images = truth.draw(count, torch.Generator().manual_seed(50), torch.complex128).flatten(1)
    centred = images - images.mean(0)
    covariance = centred.T @ centred.conj() / (2 * count) + 1e-5 * torch.eye(images.shape[1])
    return GaussianDenoiser(images.mean(0).reshape(truth.mean.shape), (covariance + covariance.mH) / 2)


def matrix(A: LinearOperator) -> tuple[Tensor, Tensor]:
    """A as a dense matrix (samples, pixels), without the samples that are always 0."""
    pixels = torch.eye(math.prod(A.domain_shape), dtype=torch.complex128).reshape(-1, *A.domain_shape)
    rows = A(pixels).flatten(1).T
    return rows[rows.abs().sum(1) > 0], rows.abs().sum(1) > 0


def condition(mean: Tensor, covariance: Tensor, M: Tensor, y: Tensor, noise_std: float):
    """(mean, covariance per real component, log evidence) of a Gaussian after seeing y = M x + noise."""
    S = M @ covariance @ M.mH + noise_std**2 * torch.eye(len(M))
    gain = torch.linalg.solve(S, M @ covariance).mH
    r = y - M @ mean
    evidence = -(r.conj() @ torch.linalg.solve(S, r)).real / 2 - torch.linalg.slogdet(S)[1]
    return mean + gain @ r, covariance - gain @ M @ covariance, evidence


def make_problem(name: str, size=16, coils=4, R=4, noise_std=0.02, seed=3, draws=2000) -> Problem:
    """name: "gaussian"; "mixture" of six means that differ in the six least determined directions; "overfit",
    a Gaussian that the denoiser knows from 150 images only, while the posterior is that of the truth."""
    generator = torch.Generator().manual_seed(seed)
    A = sense(birdcage_maps((size, size), coils), cartesian_mask(size, R).mask)
    M, measured = matrix(A)
    mean, covariance = brain_like(size)
    means, covariances = [mean.flatten()], [covariance]
    if name == "mixture":
        covariances = [covariance / 2] * 6
        _, C, _ = condition(means[0], covariances[0], M, M @ means[0], noise_std)
        values, vectors = torch.linalg.eigh((C + C.mH) / 2)
        loose = vectors[:, -6:] * values[-6:].sqrt()
        means = [mean.flatten() + 1.6 * loose @ randn((6,), torch.complex128, generator) for _ in range(6)]
    parts = [GaussianDenoiser(m.reshape(mean.shape), c) for m, c in zip(means, covariances, strict=True)]
    prior = parts[0] if len(parts) == 1 else GaussianMixtureDenoiser(torch.ones(len(parts)), parts)
    D = overfit(parts[0]) if name == "overfit" else prior
    y = A(prior.draw(1, generator, torch.complex128))
    y = y + noise_std * randn(y.shape, y.dtype, generator)

    seen = [condition(m, c, M, y.flatten()[measured], noise_std) for m, c in zip(means, covariances, strict=True)]
    share = torch.softmax(torch.stack([evidence for *_, evidence in seen]), 0)
    centre = torch.stack([w * m for w, (m, _, _) in zip(share, seen, strict=True)]).sum(0)
    parts_of_variance = [
        w * (C.diagonal().real + (m - centre).abs() ** 2 / 2) for w, (m, C, _) in zip(share, seen, strict=True)
    ]
    variance = torch.stack(parts_of_variance).sum(0)
    exact = [GaussianDenoiser(m.reshape(mean.shape), (C + C.mH) / 2).draw(draws, generator) for m, C, _ in seen]
    chosen = torch.multinomial(share, draws, replacement=True, generator=generator)
    exact = torch.stack([exact[k][i] for i, k in enumerate(chosen.tolist())])
    shape = mean.shape
    return Problem(
        name,
        prior,
        D,
        A,
        y.to(torch.complex64),
        noise_std,
        centre.reshape(shape),
        variance.reshape(shape),
        exact,
    )


# ---------------------------------------------------------------------------------------------------- scores
def score(x: Tensor, problem: Problem, means: Tensor | None = None) -> dict:
    """The columns of the table for draws x (draw, 1, y, x), or their conditional means; else of the draws alone.

    mean_error: rms over pixels of (mean of draws - posterior mean), in posterior standard deviations, with what the
    finite number of draws explains removed; mean_mc is that part. variance_ratio: mean over pixels of the draws'
    variance / mean of the true one, variance_mc its Monte-Carlo error; ratio_p5, ratio_p95: of pixels. coverage: share
    of true posterior draws inside the sampler's central 90 % interval, mean +- 1.645 standard deviations.
    """
    x = x.to(torch.complex128)
    mean, n = x.mean(0), len(x)
    energy = (x - mean).abs().square() / 2  # per real component
    variance = energy.sum(0) / (n - 1)
    ratio = variance / problem.variance
    estimates = x if means is None else means.to(torch.complex128)
    centre = estimates.mean(0)
    squared = ((centre - problem.mean).abs().square() / (2 * problem.variance)).mean().item()
    scatter = (estimates - centre).abs().square().sum(0) / (2 * (n - 1))
    monte_carlo = (scatter / problem.variance).mean().item() / n
    low_high = 1.645 * variance.sqrt()
    inside = [
        ((part(problem.draws) - part(mean)).abs() < low_high).double().mean().item()
        for part in (torch.real, torch.imag)
    ]
    return dict(
        mean_error=math.sqrt(max(squared - monte_carlo, 0)),
        mean_mc=math.sqrt(monte_carlo),
        variance_ratio=(variance.mean() / problem.variance.mean()).item(),
        variance_mc=(energy.flatten(1).mean(1).std() / math.sqrt(n) / problem.variance.mean()).item(),
        ratio_p5=ratio.quantile(0.05).item(),
        ratio_p95=ratio.quantile(0.95).item(),
        coverage=sum(inside) / 2,
    )
