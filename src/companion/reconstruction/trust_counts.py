"""How far a prior of activity may be trusted with a scan, asked of its counts.

Thinning splits counts into two independent scans of lower dose. Draws made from one predict the other, and how well
they do says, without a truth and for every scan of a batch alone,

- which prior, which model of its error and which scale of it fits (log score),
- whether the draws vary as much as they should (chi-square per bin), and by how much to widen them,
- in which mixture of the posterior mean and a classical image the other counts are predicted best.

Then the image is drawn from all counts. The same questions as in `reconstruction.trust`, put to counts: the noise is
their own, known and independent between the parts, so no bin has to be left out.

    trusts = assess(scan, {"heads": draw, "people": other}, classical)      # draw(scan, scale) -> Posterior
    found = reconstruct(scan, trusts, {"heads": draw, "people": other}, classical)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from companion.acquisition.pet import Scan
from companion.diffusion.poisson import Posterior
from companion.operators.counts import expected_counts

Draw = Callable[[Scan, float], Posterior]  # of scans and of the factor on the variance of the prior's error
Classical = Callable[[Scan], Tensor]  # of scans: images (slice, 1, y, x)

KEPT = 2 / 3  # of the counts: what draws see in the trial
SCALES = (1.0, 2.0, 4.0)  # of the variance of an error model
GROUPS = 8  # of bins by their expected counts, in which predicted variances are pooled
LEAST_SHARE = 0.5  # of the posterior mean in the mixture, below which the classical image is preferred
OUTSIDE = 0.5  # of the background: expected trues below which a bin's line misses the body, or nearly so
SIGNIFICANT = 3.0  # standard errors of chi-square by which a scan contradicts a prior
KNOWN = 1.05  # chi-square per bin up to which a prior knows a scan in any case


@dataclass(frozen=True)
class Score:
    """How held-out counts of a scan fell under a predictive law, per bin.

    log_score: mean log density, higher is better. chi2: mean squared residual over its variance, 1 for the right law.
    excess: mean squared residual over expected counts, less 1: what the image misses. spread: the predicted part of it.
    bins: how many there are.
    """

    log_score: float
    chi2: float
    excess: float
    spread: float
    bins: int

    @property
    def widening(self) -> float:
        """The factor that makes the predicted spread the found one, of variances; less chance, at least 1."""
        return max(1.0, (self.excess - self.chance) / max(self.spread, 1e-12))

    @property
    def chance(self) -> float:
        """The standard error of chi-square and excess."""
        return (2 / self.bins) ** 0.5

    @property
    def fits(self) -> bool:
        """Whether chi-square is 1 up to chance."""
        return self.chi2 <= max(KNOWN, 1 + SIGNIFICANT * self.chance)


def split(scan: Scan, seeds: Sequence[int], kept: float = KEPT) -> tuple[Scan, Scan]:
    """The scan as two independent ones, of `kept` of its dose and of the rest, their models scaled accordingly."""
    seen = scan.thinned(kept, seeds)
    rest = None if scan.background is None else (1 - kept) * scan.background
    return seen, replace(scan, y=scan.y - seen.y, A=(1 - kept) * scan.A, background=rest)


def predicted_counts(held: Scan, x: Tensor) -> Tensor:
    """The counts (slice, 1, angle, bin) that images lead to expect, float64.

    Negative activity counts as such: draws scatter about 0 in air, and what is cut off there would come on top of
    everything, one or two per cent of all counts, and speak against every prior.
    """
    return expected_counts(held.A, x, held.background).double()


def scores(held: Scan, draws: Tensor, mean: Tensor) -> list[Score]:
    """The score of each held-out scan under its predictive law: Poisson noise, and draws (draw, slice, ...) about a
    mean (slice, ...) that is known as well as that of so many draws."""
    n = len(draws)
    expected = predicted_counts(held, mean)
    parts = torch.stack([held.A(x) for x in draws]).double()
    power = (parts - parts.mean(0)).square().sum(0) / (n - 1) * (1 + 1 / n)
    floor = 0.05 * expected.mean((-2, -1), keepdim=True) + 1e-6
    noise = torch.maximum(expected, floor)
    return [one_score(held.y[i].double() - expected[i], noise[i], power[i]) for i in range(len(held.y))]


def one_score(residual: Tensor, noise: Tensor, power: Tensor) -> Score:
    """The score of residuals whose variances are `noise` + `power`, the latter pooled over bins of like `noise`."""
    share = power / noise
    order = noise.flatten().argsort()
    pooled = torch.empty_like(share).flatten()
    for group in order.tensor_split(GROUPS):
        pooled[group] = share.flatten()[group].mean()
    spread = noise * pooled.reshape(noise.shape)
    variance = noise + spread
    chi2 = residual.square() / variance
    log_score = -0.5 * ((2 * torch.pi * variance).log() + chi2).mean().item()
    excess = (residual.square() / noise).mean().item() - 1
    return Score(log_score, chi2.mean().item(), excess, pooled.mean().item(), residual.numel())


def best_share(held: Scan, mean: Tensor, other: Tensor) -> Tensor:
    """The share (slice,), 0 to 1, of `mean` in its mixture with `other` that predicts held-out counts best.

    Of volumes bins with fewer expected trues than OUTSIDE times their background are left out. An estimate of scatter
    that is some per cent off shows nearly alone there, in both parts of the counts alike: a posterior mean follows it
    with negative activity in air, and what cannot be negative does not, so that the share would be that of the error.
    """
    ours, theirs = (predicted_counts(held, x) for x in (mean, other))
    weight = 1 / torch.maximum(theirs, 0.05 * theirs.mean((-2, -1), keepdim=True) + 1e-6)
    if held.background is not None and len(held.A.domain_shape) == 4:
        weight = weight * (theirs > (1 + OUTSIDE) * held.background.double())
    step = ours - theirs
    found = (weight * step * (held.y.double() - theirs)).flatten(1).sum(1)
    power = (weight * step.square()).flatten(1).sum(1)
    return torch.where(power > 0, found / power.clamp(min=1e-30), 1.0).clamp(0, 1)


def best_setting(
    scan: Scan, method: Callable[[Scan, float], Tensor], settings: Sequence[float], seed: int = 0
) -> float:
    """The setting of method(scan, setting) -> image whose image of part of the counts predicts the others best.

    By the Poisson log-likelihood of all slices together. Neither a truth nor other people are needed: every scan tunes
    its classical reconstruction for itself, for the dose of the part, two thirds of its own.
    """
    seen, held = split(scan, [seed + i for i in range(len(scan.y))])

    def likelihood(setting: float) -> float:
        expected = expected_counts(held.A, method(seen, setting), held.background).double().clamp(min=1e-9)
        return (torch.xlogy(held.y.double(), expected) - expected).sum().item()

    return max(settings, key=likelihood)


# ---------------------------------------------------------------------------------------------------------- the trial


@dataclass(frozen=True)
class Candidate:
    """A prior that was tried on a scan: its name, the factor on the variance of its error, and the score."""

    name: str
    scale: float
    score: Score


@dataclass(frozen=True)
class Trust:
    """What a scan says of the priors: which one to draw with, and what share of the image is its posterior mean.

    widening: factor on the variance of the draws about the image. tried: all candidates, in the order of trial.
    """

    chosen: Candidate
    share: float
    widening: float
    tried: tuple[Candidate, ...]

    @property
    def knows(self) -> bool:
        """Whether the chosen prior, its error at face value, predicts the held-out counts and is preferred."""
        plain = next(c for c in self.tried if c.name == self.chosen.name)
        return plain.score.fits and self.share >= LEAST_SHARE

    @property
    def verdict(self) -> str:
        """In words and numbers."""
        plain = next(c for c in self.tried if c.name == self.chosen.name)
        says = "does not know" if not plain.score.fits else "knows" if self.knows else "helps little with"
        details = [f"{self.chosen.name} {says} this scan: held-out chi-square {plain.score.chi2:.3f}"]
        if self.chosen.scale != 1:
            details.append(f"its error taken {self.chosen.scale:g} times as large")
        if self.widening > 1.01:
            details.append(f"error bars widened by {self.widening**0.5:.2f}")
        if self.share < LEAST_SHARE:
            details.append(f"classical reconstruction preferred ({1 - self.share:.0%} of the image)")
        elif self.share < 0.99:
            details.append(f"{1 - self.share:.0%} of the image is classical")
        return "; ".join(details)


WIDEST = 16.0  # factor on the variance beyond which draws are not widened: the counts of one scan say no more


def assess(
    scan: Scan,
    draws: Mapping[str, Draw],
    classical: Classical | None = None,
    *,
    kept: float = KEPT,
    seed: int = 0,
    scales: Sequence[float] = SCALES,
) -> list[Trust]:
    """What each scan of a batch says of the priors `draws`, by name: a few short draws from `kept` of its counts.

    First all priors with their error at face value; then, for scans that contradict the best, it alone with its error
    taken larger, while that scores better. classical: the method to mix with, tuned elsewhere. seed: of the splits.
    """
    n = len(scan.y)
    seen, held = split(scan, [seed + 7919 * i for i in range(n)], kept)
    tried: list[list[Candidate]] = [[] for _ in range(n)]
    means: list[dict] = [{} for _ in range(n)]

    def attempt(name: str, scale: float, index: list[int]) -> None:
        found = draws[name](seen.some(index), scale)
        for i, one, mean, score in zip(
            index, range(len(index)), found.mean, scores(held.some(index), found.x, found.mean), strict=True
        ):
            tried[i].append(Candidate(name, scale, score))
            means[i][name, scale] = mean[None], found.x[:, one : one + 1]

    def best(i: int) -> Candidate:
        return max(tried[i], key=lambda c: c.score.log_score)

    for name in draws:
        attempt(name, 1.0, list(range(n)))
    for before, scale in zip(scales, scales[1:], strict=False):
        wanted = [i for i in range(n) if best(i).scale == before and best(i).score.chi2 > 1 + best(i).score.chance]
        for name in draws:
            if index := [i for i in wanted if best(i).name == name]:
                attempt(name, scale, index)
    other = None if classical is None else classical(seen)
    trusts = []
    for i in range(n):
        chosen, one = best(i), held.some([i])
        mean, x = means[i][chosen.name, chosen.scale]
        share, score = 1.0, chosen.score
        if other is not None:
            share = best_share(one, mean, other[i : i + 1]).item()
            mixed = share * mean + (1 - share) * other[i : i + 1]
            score = scores(one, x, mixed)[0]
        trusts.append(Trust(chosen, share, min(score.widening, WIDEST), tuple(tried[i])))
    return trusts


@dataclass(frozen=True, eq=False)
class Trusted:
    """One image of each scan, `image` (slice, 1, y, x), draws that scatter about it (draw, slice, ...), and why."""

    image: Tensor
    x: Tensor
    trusts: list[Trust]


def reconstruct(
    scan: Scan, trusts: Sequence[Trust], draws: Mapping[str, Draw], classical: Classical | None = None
) -> Trusted:
    """Draws of all scans from all their counts as their trials ask: prior, error, mixture and width."""
    other = None if classical is None else classical(scan)
    image, x = torch.empty(0), torch.empty(0)
    for name, scale in dict.fromkeys((t.chosen.name, t.chosen.scale) for t in trusts):
        index = [i for i, t in enumerate(trusts) if (t.chosen.name, t.chosen.scale) == (name, scale)]
        found = draws[name](scan.some(index), scale)
        if not len(image):
            image = found.mean.new_empty(len(trusts), *found.mean.shape[1:])
            x = found.x.new_empty(len(found.x), *image.shape)
        for k, i in enumerate(index):
            share = trusts[i].share if other is not None else 1.0
            image[i] = share * found.mean[k] + ((1 - share) * other[i] if other is not None and share < 1 else 0)
            x[:, i] = image[i] + trusts[i].widening ** 0.5 * (found.x[:, k] - found.x[:, k].mean(0))
    return Trusted(image, x, list(trusts))
