"""Denoisers and samplers that have seen counts, y ~ Poisson(A x + background), as in emission tomography.

Near an image m the Poisson law is a Gaussian one whose variance is the expected counts,

    y - background ~ N(A x, W^-1),    W = 1 / (A m + background),

and at m the Gaussian has the Poisson law's own gradient, A^T (y / expected - 1). So the whitened operator W^1/2 A turns
counts into what `guidance` and `gibbs` know. The weights come from the *expected* counts of the present estimate D(x)
and follow it to the lower noise levels (Fisher scoring); weights from the counts, 1 / y, would trust most what was
counted low by chance. Single bins may well hold no count: many need be only the counts seen by one degree of freedom
of x.

| guidance        | what it does to D(x)                                         | cost per evaluation      |
|-----------------|--------------------------------------------------------------|--------------------------|
| `em_steps`      | MAP-EM steps, anchored to D(x) by its variance (PET-DDS)     | D, 2 `iterations` A      |
| `poisson_dps`   | a gradient step through D                                    | D and its gradient, 2 A  |
| `poisson_pigdm`| a step through D with the likelihood's curvature             | D and its gradient, CG   |
| `poisson_mean`  | the mean given D(x), its measured covariance, and the counts | D, CG                    |

`poisson_gibbs(D, poisson_mean(...), ...)` draws from the posterior; docs/pet.md compares all with exact answers.

Units are those of A: for a network that calls `scale` kBq/mL 1, give `scale * A` and multiply the draws by `scale`. A
Gaussian draw may be slightly negative where there is nothing; cutting it off inside the sampler would bias it, so only
the expected counts take the positive part, and what is shown or exported may be cut at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from companion.diffusion.covariance import Factor, Isotropic, PerPixel, pixel_moments, with_vjp
from companion.diffusion.denoisers import Denoiser, column
from companion.diffusion.gibbs import chain
from companion.diffusion.guidance import Guidance, pigdm, posterior_mean
from companion.diffusion.response import Response
from companion.diffusion.sampling import Bill
from companion.diffusion.symmetry import moved
from companion.operators.counts import check_counts, counts_ratio, expected_counts
from companion.operators.linear import Diagonal, LinearOperator, check_finite
from companion.operators.pet import sensitivity
from companion.operators.stacked import Tied
from companion.randomness import randn

# No bin's variance is below this share of the mean bin's: a line through nothing but air must not weigh infinitely.
FLOOR = 0.05
EDGES = 2.0  # gamma of the relative difference prior between slices


@dataclass(frozen=True, eq=False)
class Counts(Guidance):
    """A `Guidance` by counts y (batch, *A.range_shape), whole and not negative, y ~ Poisson(A x + background).

    background: expected counts of randoms and scatter, of the shape of y or broadcastable to it. y, background and a
    batch of A are 1 long or as long as the draws. Raises ValueError for what is not counts, another geometry, or a
    background that is negative or not finite.
    """

    noise_std: float = field(default=1.0, init=False)  # of whitened counts
    background: Tensor | None = None

    def __post_init__(self):
        super().__post_init__()
        check_counts(self.y)
        if self.background is not None:
            check_finite(self.background, "background")
            if (self.background < 0).any():
                raise ValueError(f"the background must not be negative, got {self.background.min():.4g}")

    def expected(self, x: Tensor) -> Tensor:
        """The counts that the positive part of x lets expect, floored."""
        expected = expected_counts(self.A, x.clamp(min=0), self.background)
        axes = tuple(range(-len(self.A.range_shape), 0))
        return torch.maximum(expected, FLOOR * expected.mean(axes, keepdim=True) + 1e-6)

    def whitened(self, m: Tensor) -> tuple[LinearOperator, Tensor]:
        """The operator and the data with unit noise that stand for the counts near the image m."""
        root = self.expected(m).rsqrt()
        trues = self.y if self.background is None else self.y - self.background
        return Diagonal(root, self.A.range_shape) @ self.A, root * trues


@dataclass(frozen=True, eq=False)
class poisson_mean(Counts):
    """E[x0 | x, y] when p(x0 | x) = N(D(x), C) and counts are whitened at D(x): `posterior_mean` for counts.

    covariance, iterations, tol: as there; `Measured` is best. `draw` is what `annealed_gibbs` needs.
    ties: of volumes, the prior is times exp(-ties * relative difference prior [nuyts2002] between each voxel and the
    one above it), which a prior of independent slices does not know; in 1 / unit of x, and the same at every dose. Near
    an image it is a quadratic, as the counts are. [chung2023mbir] (total variation between slices). 0: none.
    """

    covariance: Callable = PerPixel()
    iterations: int = 30
    tol: float = 1e-3
    ties: float = 0.0

    def near(self, m: Tensor) -> posterior_mean:
        """The Gaussian problem that stands for the counts, and for the ties, near the image m."""
        A, y = self.whitened(m)
        if self.ties:
            flat, A = y.flatten(-len(self.A.range_shape)), Tied(A, self.tied(m))
            y = F.pad(flat, (0, A.range_shape[0] - flat.shape[-1]))
        return posterior_mean(A, y, self.noise_std, self.covariance, self.iterations, self.tol, response=self.response)

    @cached_property
    def response(self) -> Response | None:
        """What the operator does to images, whitened by the counts themselves: near enough for all sweeps."""
        if len(self.A.domain_shape) < 3:
            return None
        axes = tuple(range(-len(self.A.range_shape), 0))
        root = torch.maximum(self.y, FLOOR * self.y.mean(axes, keepdim=True)).add(1).rsqrt()
        return Response.of(Diagonal(root, self.A.range_shape) @ self.A, root)

    def tied(self, m: Tensor) -> Tensor:
        """The roots (batch, 1, z - 1, y, x) of the weights of squared differences that stand for the ties near m."""
        m = m.clamp(min=0)
        sums, change = m[..., 1:, :, :] + m[..., :-1, :, :], m.diff(dim=-3).abs()
        least = FLOOR * m.mean((-4, -3, -2, -1), keepdim=True) + 1e-12
        return (2 * self.ties / (sums + EDGES * change + least)).sqrt()

    def estimate(self, D, x, sigma, cond=None):
        return self.mean(*self.covariance(D, x, sigma, cond))

    def mean(self, x0_hat: Tensor, C: Factor) -> Tensor:
        """The mean of N(x0; x0_hat, C) times the likelihood, as it is near x0_hat."""
        return self.near(x0_hat).mean(x0_hat, C)

    def draw(self, x0_hat: Tensor, C: Factor, draws: list[Generator]) -> Tensor:
        """A draw from N(x0; x0_hat, C) times the likelihood, as it is near x0_hat; a generator for each item."""
        return self.near(x0_hat).draw(x0_hat, C, draws)

    @property
    def operator_calls(self):
        return 3 + 2 * self.iterations


@dataclass(frozen=True)
class Posterior:
    """`x` (draw, *shape) draws in the order of the seeds; `mean`, alike: E[x0 | the noisy image of the last sweep, y],
    or its average over the last sweeps.

    Their averages over draws are the same posterior mean, that of `mean` with less Monte-Carlo noise (Rao, Blackwell).
    """

    x: Tensor
    mean: Tensor
    bill: Bill


def poisson_gibbs(
    D: Denoiser,
    G: poisson_mean,
    sigmas: Tensor | Sequence[float],
    *,
    seeds: str | int | Iterable[int] | Sequence[Generator],
    tails: float | None = 8.0,
    window: int = 3,
    start: Tensor | None = None,
    averaged: int = 1,
    device: torch.device | str = "cpu",
    cond: Tensor | None = None,
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> Posterior:
    """Draws from p(x0 | counts) by one sweep for each noise level, as `gibbs.annealed_gibbs`, with heavy tails.

    tails: degrees of freedom of p(x0 | x), a Student t on patches of `window` pixels; None for a Gaussian. D is nearly
    certain that a place has no lesion until it sees one, so a Gaussian with the variance of D lets the counts raise a
    lesion only a little, the next level of noise hides that little, and the chain stays where it began for good. A
    t is a Gaussian of unknown width: given the clean image z of the last sweep its variance is that of D times
    (tails + sum of (z - D)^2 / variance) / (tails + pixels) over the patch, so wherever counts contradict D, D is
    believed less, and elsewhere nothing changes. With a denoiser that states its variance only, a table of its real
    error (`Recalibrated`, `Measured`) is part of the recipe. averaged: over how many of the last sweeps the mean is
    averaged, each of which costs a solution by CG more. Other arguments as for `annealed_gibbs`.
    [lange1989] (robust t); [zhang2024] for the sweeps.
    """

    def sweep(data: poisson_mean, z: Tensor, step: int, sigma: float, draws, cond) -> tuple[Tensor, Tensor | None]:
        x = z + sigma * randn(z.shape[1:], z.dtype, draws, z.device)
        level = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        seen = moved(D, draws)
        seen = Widened(seen, z, tails, window) if tails is not None and step else seen
        x0_hat, C = data.covariance(seen, x, level, cond)
        near = data.near(x0_hat)
        z = near.draw(x0_hat, C, draws)
        if step >= len(levels) - averaged:
            means.append(near.mean(x0_hat, C))
        if step < len(levels) - 1:
            return z, None
        mean = torch.stack(means).mean(0)
        means.clear()  # the next batch has its own
        return z, mean

    means: list[Tensor] = []
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    levels = levels[:-1] if levels[-1] == 0 else levels
    samples = chain(sweep, D, levels, G, 1, seeds, G.y.dtype, device, cond, None, callback, progress, start)
    assert samples.mean is not None  # of the last sweep
    return Posterior(samples.x, samples.mean, samples.bill)


@dataclass(frozen=True, eq=False)
class Widened:
    """D with moments whose variance is that of a Student t given the clean image z: see `poisson_gibbs`."""

    D: Denoiser
    z: Tensor
    tails: float
    window: int

    def moments(self, x: Tensor, sigma: Tensor, cond=None) -> tuple[Tensor, Tensor]:
        x0_hat, v = pixel_moments(self.D, x, sigma, cond, Isotropic.prior_std)
        pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[x.ndim - 2]
        excess = (self.z - x0_hat).square() / v.clamp(min=torch.finfo(v.dtype).tiny)
        excess = pool(excess, self.window, 1, self.window // 2, count_include_pad=False)
        pixels = self.window ** (x.ndim - 2)
        return x0_hat, v * (self.tails + pixels * excess) / (self.tails + pixels)


@dataclass(frozen=True, eq=False)
class poisson_dps(Counts):
    """x0_hat + step_size sigma^2 / s^2 J^T A^T (y / expected - 1): a step along the gradient of log p(y | D(x)).

    J: the Jacobian of D. s^2: the mean squared whitened residual, at least 1, holds the step back while D(x) is still
    far from the data, as in `dps`. [chung2023dps] for the Poisson likelihood; [singh2024], PET-DPS.
    """

    step_size: float = 1.0

    def estimate(self, D, x, sigma, cond=None):
        x0_hat, vjp = with_vjp(D, x, sigma, cond)
        A, y = self.whitened(x0_hat)
        r = y - A(x0_hat)
        s2 = r.square().flatten(1).mean(1).clamp_min(1)
        return x0_hat + self.step_size * column(sigma.square() / s2, x) * vjp(A.H(r))

    @property
    def denoiser_calls(self):
        return 2

    @property
    def operator_calls(self):
        return 3


@dataclass(frozen=True, eq=False)
class poisson_pigdm(Counts):
    """x0_hat + sigma^2 J^T A^T (r^2 A A^T + 1 / W)^-1 (y - expected), r^2 the `Isotropic` guess of the variance.

    [song2023], with the counts' own variance, 1 / W, in the place of white noise.
    """

    prior_std: float = 0.5
    iterations: int = 10

    def estimate(self, D, x, sigma, cond=None):
        x0_hat, vjp = with_vjp(D, x, sigma, cond)
        whitened = pigdm(*self.whitened(x0_hat), self.noise_std, self.prior_std, self.iterations)
        return whitened.step(x0_hat, vjp, sigma)

    @property
    def denoiser_calls(self):
        return 2

    @property
    def operator_calls(self):
        return 3 + 2 * self.iterations


@dataclass(frozen=True, eq=False)
class em_steps(Counts):
    """D(x) after `iterations` of `anchored_em`, anchored with `trust` times the variance that D states.

    prior_std: for a D that states none, as in `Isotropic`. Never negative. PET-DDS [singh2024], with the
    variance of D in the place of a constant weight.
    """

    iterations: int = 5
    trust: float = 1.0
    prior_std: float = 0.5

    def estimate(self, D, x, sigma, cond=None):
        x0_hat, variance = pixel_moments(D, x, sigma, cond, self.prior_std)
        return anchored_em(x0_hat, self.trust * variance, self.y, self.A, self.background, self.iterations)

    @property
    def operator_calls(self):
        return 1 + 2 * self.iterations


def anchored_em(
    anchor: Tensor,
    variance: Tensor,
    y: Tensor,
    A: LinearOperator,
    background: Tensor | None = None,
    iterations: int = 5,
) -> Tensor:
    """MAP-EM steps for the prior N(anchor, variance) of independent pixels, from the anchor: (batch, ...), positive.

    Each step solves s x - e + x (x - anchor) / variance = 0 for x > 0, with s = A^T 1 and e the EM numerator, and
    raises the posterior. No variance leaves the anchor, an infinite one gives MLEM. [depierro1995].
    """
    s = sensitivity(A, anchor.dtype, anchor.device)
    x = torch.maximum(anchor, 1e-3 * anchor.clamp(min=0).mean(tuple(range(1, anchor.ndim)), keepdim=True) + 1e-12)
    half = (anchor - s * variance) / 2
    for _ in range(iterations):
        e = x * A.H(counts_ratio(y, expected_counts(A, x, background)))
        root = (half.square() + variance * e).sqrt()
        x = torch.where(half > 0, half + root, variance * e / (root - half).clamp(min=1e-30))  # no cancellation
    return x
