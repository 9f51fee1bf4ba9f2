"""Are draws given counts right? Ranks of truths whose prior is known, so that no posterior has to be.

    problem = CountProblem(counts=1000)
    p, ranks = problem.ranks(lambda A, y, b, seeds: poisson_gibbs(...).x)      # p below 0.05: the draws are wrong

A truth drawn from the prior, its scan, and draws given the scan: the truth is one more draw, so that any number of it
ranks evenly among theirs [talts2018]. The prior is a Gaussian of activity around a disc, 0.25 of its mean wide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from companion.diffusion.covariance import Measured
from companion.diffusion.exact import GaussianDenoiser
from companion.evaluation import ranks
from companion.operators.counts import poisson_counts
from companion.operators.linear import LinearOperator
from companion.operators.pet import ParallelBeam, background, emission_model, with_counts

LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # noise at which the prior's error is measured
Draw = Callable[[LinearOperator, Tensor, Tensor | None, Sequence[int]], Tensor]


@dataclass(frozen=True)
class CountProblem:
    """A prior of size x size pixels, attenuated scans of so many true counts, and a share of them in the background.

    lesion: how much more active one place is than the disc, in the mean.
    """

    size: int = 6
    counts: float = 1000.0
    background: float = 0.0
    lesion: float = 0.0
    seed: int = 0

    @cached_property
    def prior(self) -> GaussianDenoiser:
        """E[x0 | x] of activity of about 10 in a disc and 3 around it, smooth and rough parts."""
        axis = torch.linspace(-1, 1, self.size, dtype=torch.float64)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        mean = 3 + 7 * torch.sigmoid((0.9 - (x**2 + y**2).sqrt()) * 12)
        distance = (y.flatten()[:, None] - y.flatten()) ** 2 + (x.flatten()[:, None] - x.flatten()) ** 2
        K = 0.7 * torch.exp(-distance / (2 * 0.5**2)) + 0.3 * torch.eye(self.size**2, dtype=torch.float64)
        std = 0.25 * mean.flatten()
        mean = mean + self.lesion * torch.exp(-((x - 0.3) ** 2 + (y - 0.2) ** 2) / 0.1)
        return GaussianDenoiser(mean[None], std[:, None] * K * std)

    @cached_property
    def covariance(self) -> Measured:
        """The error of the prior, as one would measure it of a network."""
        images = self.prior.draw(200, Generator().manual_seed(3)).float()
        return Measured.fit(self.prior, images, torch.tensor(LEVELS), bins=4)

    @cached_property
    def scanner(self) -> LinearOperator:
        """A, the same for all truths: `counts` true ones of the mean activity."""
        n = self.size
        A = emission_model(ParallelBeam((n, n)), factors=torch.linspace(0.6, 1.0, n).expand(1, 2 * n, n))
        return with_counts(A, self.prior.mean.float()[None], self.counts)

    def ranks(self, draw: Draw, cases: int = 100, draws: int = 9) -> tuple[float, Tensor]:
        """The p-value of all ranks being even, and the ranks (case, quantity): projections, total, deviance.

        draw(A, y, background, seeds) -> (draw, 1, y, x), one for each scan of y (draw, 1, angle, bin).
        """
        A, generator = self.scanner, Generator().manual_seed(self.seed + 77)
        truth = self.prior.draw(cases, generator).float()
        expected = A(truth.clamp(min=0))
        share = self.background / 2
        b = background(expected.mean(0, keepdim=True), randoms=share, scatter=share) if share else None
        y = poisson_counts(expected if b is None else expected + b, range(self.seed, self.seed + cases))
        repeated = y.repeat_interleave(draws, 0)
        x = draw(A, repeated, b, range(10_000, 10_000 + len(repeated)))
        x = x.float().unflatten(0, (cases, draws)).transpose(0, 1)
        directions = ranks.projections(truth.shape[1:], 3, torch.float32, self.seed)

        def numbers(images: Tensor) -> Tensor:  # the deviance sees what projections do not: counts not used up
            flat = images.flatten(0, -4)
            means = A(flat.clamp(min=0)).unflatten(0, images.shape[:-3]) + (0 if b is None else b)
            means = means.clamp(min=1e-6)
            deviance = (means - torch.xlogy(y, means)).flatten(-3).sum(-1)
            return torch.cat(
                [ranks.along(images, directions), images.flatten(-3).sum(-1)[..., None], deviance[..., None]], -1
            )

        found = ranks.rank(numbers(truth), numbers(x))
        return ranks.all_uniform(found, draws), found
