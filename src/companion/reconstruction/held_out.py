"""Measured samples held out of a scan, and what they say of images and draws made from the rest.

Everything is judged by linear predictions of samples, so any operator will do: a `Split` says how data fall in two
parts, `hold_out` makes one for MRI on and off the grid, and scoring knows nothing of either. No truth is needed to tune
a classical method (`best_setting`), to mix two images (`best_share`, `share_beyond`, `Blend`), or to ask whether error
bars are right (`predictive_score`). docs/trust.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from companion.diffusion.sampling import Samples
from companion.evaluation.metrics import spread
from companion.operators.linear import Composition, Diagonal, LinearOperator
from companion.operators.mri import Mask, Sense, fft
from companion.operators.noncartesian import NUFFT

Classical = Callable[[LinearOperator, Tensor], Tensor]  # (A, y) -> image (batch, *A.domain_shape)

BANDS = 6  # rings of k-space in which predicted variances are pooled


# ------------------------------------------------------------------------------------------------------- splitting


@dataclass(frozen=True, eq=False)
class Split:
    """A scan in two parts: y = A x + noise is what draws see, held_y = held_A x + noise judges them.

    held: the samples of held_y that count, True, shaped to broadcast to it. group: for each of them which pool of
    predicted variances it belongs to, integers from 0, shaped like `held`.
    """

    A: LinearOperator
    y: Tensor
    held_A: LinearOperator
    held_y: Tensor
    held: Tensor
    group: Tensor


def hold_out(A: LinearOperator, y: Tensor, acs: int = 0, share: float = 0.1, seed: int = 0) -> Split:
    """The split of data y (1, coil, *space), 0 where not measured, that holds out `share` of the samples, at random.

    The `acs` central samples along every axis that is undersampled stay with the draws (off the grid those within
    acs / 2 cycles per field of view), so that maps made from them are not touched. Single samples, of all coils at
    once: their neighbours on a measured line tell much of them, and a prior that is surer of itself than it should be
    is found out by not listening. Off the grid, y (1, coil, sample), each part has its own trajectory and data.
    Raises ValueError where nothing is left to hold out, and for more than one slice.
    """
    if len(y) != 1:
        raise ValueError(f"got data of {len(y)} slices; hold out of one, (1, coil, *space): it speaks for the others")
    measured = (y[0] != 0).any(0)
    F = A.outer if isinstance(A, Composition) and isinstance(A.outer, NUFFT) else None
    radius = radii(measured) if F is None else F.trajectory.norm(dim=-1)
    free = measured.clone()
    if acs and F is not None:
        free &= radius > acs / 2
    elif acs:
        free[centre_of(measured, acs)] = False
    places = free.flatten().nonzero()[:, 0]
    if not len(places):
        raise ValueError(f"all measured samples lie in the centre of {acs} lines; nothing can be held out")
    number = min(max(1, round(share * measured.sum().item())), len(places))
    chosen = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:number]
    held = torch.zeros_like(measured).flatten()
    held[places[chosen.to(places.device)]] = True
    held = held.reshape(measured.shape)
    if F is not None and isinstance(A, Composition):
        seen, other = (replace(A, outer=replace(F, trajectory=F.trajectory[m])) for m in (~held, held))
        return Split(seen, y[..., ~held], other, y[..., held], torch.ones_like(held[held]), bands(radius[held]))
    seen, other = (masked(A, part) for part in (measured & ~held, held))
    group = torch.zeros(held.shape, dtype=torch.long, device=held.device)
    group[held] = bands(radius[held])
    return Split(seen, torch.where(held, 0, y), other, torch.where(held, y, 0), held, group)


def masked(A: LinearOperator, part: Tensor) -> LinearOperator:
    """A for some of its samples, `part` (*space) True, and zeros for the others."""
    if isinstance(A, Sense):
        return replace(A, mask=Mask(part.to(A.mask.mask.dtype), A.range_shape))
    return Diagonal(part.to(A.domain_dtype.to_real()), A.range_shape, A.range_dtype) @ A


def centre_of(measured: Tensor, acs: int) -> tuple[slice, ...]:
    """The slices of the calibration centre: `acs` wide along axes on which the mask depends, whole along the others."""
    axes = range(measured.ndim)
    depends = [not torch.equal(measured, measured.narrow(axis, 0, 1).expand_as(measured)) for axis in axes]
    return tuple(
        slice(n // 2 - acs // 2, n // 2 - acs // 2 + acs) if changes else slice(0, n)
        for n, changes in zip(measured.shape, depends, strict=True)
    )


def radii(measured: Tensor) -> Tensor:
    """The distance (*space) of samples from the middle of k-space, as a share of its width."""
    grids = torch.meshgrid(*[(torch.arange(n) - n // 2) / n for n in measured.shape], indexing="ij")
    return reduce(torch.add, [g.square() for g in grids]).sqrt().to(measured.device)


def bands(radius: Tensor, among: Tensor | None = None, count: int = BANDS) -> Tensor:
    """For each sample, given its radius, the ring of k-space that it lies in; rings hold equally many of `among`.

    among: radii, by default those of the samples themselves.
    """
    edges = torch.quantile(
        radius if among is None else among, torch.linspace(0, 1, count + 1, device=radius.device)[1:-1]
    )
    return torch.bucketize(radius, edges)


# --------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Score:
    """How held-out samples fell under a predictive law, per complex sample.

    log_score: mean log density, higher is better. chi2: mean squared residual over its predicted variance, 1 for the
    right law. excess: mean squared residual less the noise, what the image misses. spread: the predicted part of it.
    """

    log_score: float
    chi2: float
    excess: float
    spread: float

    @property
    def widening(self) -> float:
        """The factor that makes the predicted spread the found one, as a ratio of variances."""
        return max(self.excess, 0.0) / max(self.spread, 1e-30)


def predictive_score(split: Split, samples: Samples, noise_std: float, image: Tensor | None = None) -> Score:
    """The score of held-out data under N(mean, variance of the draws + noise), variances pooled in groups.

    The mean is `image` (1, *shape), by default the average of the conditional means; to its own predicted error, the
    variance of the posterior, that of an average over few draws is added.
    """
    draws, centres = (pick(split.held_A(x), split.held) for x in (samples.x, samples.centres))
    mean = centres.mean(0) if image is None else pick(split.held_A(image), split.held)[0]
    power = spread(draws, samples.paired).variance
    if len(centres) > 1:  # of one pair, whose mean is known well, nothing tells how well
        power = power + spread(centres).of_mean
    group = split.group[split.held].expand_as(power)
    predicted = pooled(power, group)
    return gaussian_score(pick(split.held_y, split.held)[0] - mean, predicted, 2 * noise_std**2)


def gaussian_score(residual: Tensor, spread: Tensor, noise: float) -> Score:
    """The score of complex residuals under N_C(0, spread + noise), both E|.|^2 of a complex sample."""
    power, variance = residual.abs().square().double(), spread.double() + noise
    chi2 = power / variance
    log_score = -((torch.pi * variance).log() + chi2).mean().item()
    return Score(log_score, chi2.mean().item(), power.mean().item() - noise, spread.double().mean().item())


def pick(values: Tensor, held: Tensor) -> Tensor:
    """The held-out samples (batch, coil, sample) of data (batch, coil, *space)."""
    return values.flatten(-held.ndim)[..., held.flatten()]


def pooled(power: Tensor, group: Tensor) -> Tensor:
    """`power` with each value replaced by the mean of its group."""
    size = int(group.max()) + 1
    total = torch.zeros(size, dtype=torch.float64, device=power.device)
    total.index_add_(0, group.flatten(), power.flatten().double())
    count = torch.bincount(group.flatten(), minlength=size).clamp_min(1)
    return (total / count)[group]


def best_share(split: Split, means: Tensor, other: Tensor, draws: int | None = None) -> float:
    """The share of the mean of `means` (n, *shape) in its mixture with `other` (1, *shape), 0 to 1, that predicts
    held-out data best.

    draws: of so many such means, by default of the n; what their scatter adds to the error of few is taken off.
    """
    return share_and_bias(split, means, other, draws)[0]


def share_and_bias(split: Split, means: Tensor, other: Tensor, draws: int | None = None) -> tuple[float, float]:
    """`best_share`, and by how much the mean of so many draws errs at a held-out place, all coils together, beyond what
    an image made of the data could explain: (1 - share) times its squared difference from `other`."""
    ours, theirs, wanted = (
        pick(split.held_A(means), split.held),
        *(pick(x, split.held) for x in (split.held_A(other), split.held_y)),
    )
    n, mean = len(ours), ours.mean(0, keepdim=True)
    step = mean - theirs
    power = step.abs().square().sum()
    if draws is not None and n > 1:
        power = power - (ours - mean).abs().square().sum() / (n - 1) * (1 / n - 1 / draws)
    if power <= 0:
        return 1.0, 0.0
    share = (step.conj() * (wanted - theirs)).real.sum() / power  # below 0 where the mean is worse than nothing
    return share.clamp(0, 1).item(), ((1 - share).clamp(min=0) * power / split.held.sum()).item()


def share_beyond(
    A: LinearOperator, means: Tensor, other: Tensor, share: float, bias: float, settled: bool = False
) -> float:
    """The share of the mean of `means` (n, *shape) in its mixture with `other` for all of k-space, at least `share`,
    given share and bias of single held-out samples, which lie beside measured ones.

    A mean of draws from the right posterior leaves an error that no image made of the data explains, and its best share
    is 1. Held-out samples ask for less as far as it errs beyond that, by its bias. Where nothing was measured it is
    taken to err so by as much at each place, and by the scatter of the few draws. But there both images differ by far
    more, since the classical one has nothing to go by, so that the best share, 1 - error / squared difference, is
    larger. Measured places ask for `share`. It is `share` itself where all was measured, for one draw, whose scatter
    nobody knows, unless it is `settled`, as the mean of a pair is, and for an A that is no Cartesian scan.
    """
    n = len(means)
    if not isinstance(A, Sense) or (n < 2 and not settled) or share == 1:
        return share
    open_places = A.mask.mask == 0

    def power(x: Tensor) -> tuple[Tensor, Tensor]:  # where nothing was measured, and where something was
        k = fft(A.coils.forward(x), A.coils.ndim).abs().square()
        return torch.where(open_places, k, 0).sum(), torch.where(open_places, 0, k).sum()

    mean = means.mean(0, keepdim=True)
    places = open_places.expand(*A.range_shape)[0].sum()
    missed, seen = power(mean - other)
    wrong = bias * places + power(means - mean)[0] / (max(n - 1, 1) * n)
    return max(share, (1 - (wrong + (1 - share) * seen) / (missed + seen).clamp(min=1e-30)).item())


# ------------------------------------------------------------------------------------------- classical images


def best_setting(
    split: Split, method: Callable[[LinearOperator, Tensor, float], Tensor], settings: Sequence[float]
) -> float:
    """The setting of method(A, y, setting) -> image whose image of the first part predicts the held-out samples best.

    No truth and no other people are needed: every scan tunes its classical reconstruction for itself.
    """

    def residual(setting: float) -> float:
        image = method(split.A, split.y, setting)
        return (pick(split.held_y, split.held) - pick(split.held_A(image), split.held)).abs().square().mean().item()

    return min(settings, key=residual)


def tuned(
    split: Split, method: Callable[[LinearOperator, Tensor, float], Tensor], settings: Sequence[float]
) -> Classical:
    """The method with its `best_setting`."""
    best = best_setting(split, method, settings)
    return lambda A, y: method(A, y, best)


@dataclass(frozen=True, eq=False)
class Blend:
    """A classical method made of two: `share` of the image of `first`, the rest of that of `second`.

    `Blend.of` asks held-out samples for the share. Which penalty suits a scan, that of total variation or that of
    wavelets, changes with what is scanned and how; the mixture comes near the better one, or is better than both.
    """

    first: Classical
    second: Classical
    share: float

    @classmethod
    def of(cls, split: Split, first: Classical, second: Classical) -> Blend:
        """The mixture whose image of the first part predicts the held-out samples best."""
        return cls(first, second, best_share(split, first(split.A, split.y), second(split.A, split.y)))

    def __call__(self, A: LinearOperator, y: Tensor) -> Tensor:
        if self.share in (0, 1):
            return (self.first if self.share else self.second)(A, y)
        return self.share * self.first(A, y) + (1 - self.share) * self.second(A, y)
