"""How far a prior may be trusted with a scan, asked of the scan itself.

A few measured samples are held out. Draws made from the rest predict them; how well they do says, without a truth,

- which model of the prior's error fits this scan, and on which scale (log score),
- whether the error bars are right (chi-square per sample, 1 for the right law) and by how much to widen them,
- whether the posterior mean or a classical image comes closer, and in which mixture of both the error is least.

What no sample says is whether the prior ever saw such anatomy: a prior of heads helps with knees, by their edges. A
readout of the prior's features (`evaluation.organ.known_to`) looks at the classical image; only the verdict changes.

Then the image is drawn from all data. `reconstruction.held_out` splits scans and scores images and draws; docs/trust.md
has the formulas, the thresholds and how they were set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from companion.diffusion.denoisers import Denoiser
from companion.diffusion.gibbs import annealed_gibbs
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.noise import karras
from companion.diffusion.recalibration import ErrorModel
from companion.diffusion.response import Response
from companion.diffusion.sampling import Bill, Samples
from companion.evaluation.organ import Look, Organ
from companion.operators.linear import LinearOperator
from companion.randomness import antithetic
from companion.reconstruction.held_out import (
    Classical,
    Score,
    Split,
    hold_out,
    predictive_score,
    share_and_bias,
    share_beyond,
)

SCALES = (1.0, 2.0, 4.0)  # of the variance of an error model
COLD, WARM = 5.0, 0.5  # first noise level of draws that begin with nothing, and with a classical image
WARM_LOSS = 1.5  # true variance / that of draws that begin with an image, where the error model says nothing of it
LAST, LEAST = 1.0, 0.002  # last noise level, in deviations of the noise of the data, and at least
KNOWN = 2.0  # chi-square per held-out sample above which the prior does not know the scan
BETTER = 0.05  # log score by which another error model has to beat that of the prior's own people
EXTRA = 0.5  # work of a trial, as a part of that of the draws
LEAST_CALLS = 4  # evaluations of a chain, below which its draws are too rough to judge by
LEAST_SHARE = 0.2  # of the posterior mean in the mixture, below which it does not help


# --------------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Candidate:
    """A model of the prior's error that was tried: `name`, the factor on its variance, and its score."""

    name: str
    scale: float
    score: Score


@dataclass(frozen=True, eq=False)
class Trust:
    """What a scan says of a prior.

    error: the model of its error to draw with. share: of the posterior mean in the image, the rest is classical; of a
    trial (`assess`) that for which held-out samples ask, of an image (`of`) what follows from it for all that was not
    measured. held_share, bias: what held-out samples said, see `held_out.share_beyond`; bias is None where whole
    readouts were held out, which tell of that themselves. widening: factor on the variance of the draws around the
    image. chosen: the candidate that `error` is; tried: all.
    first: the candidate of the prior's own people at scale 1, by which the prior is judged to know the scan or not.
    classical: squared error of the classical image on held-out samples, less the noise; bill: the cost of the trial.
    look: what a readout of the prior's features said of the classical image; None where nothing was asked.
    """

    error: ErrorModel
    share: float
    widening: float
    chosen: Candidate
    tried: tuple[Candidate, ...]
    classical: float | None
    bill: Bill
    known_below: float = field(default=KNOWN, repr=False)
    look: Look | None = None
    held_share: float = 1.0
    bias: float | None = None

    @property
    def first(self) -> Candidate:
        return self.tried[0]

    @property
    def fits(self) -> bool:
        """Whether the prior's own error model predicts the held-out samples, no surer of itself than it may be."""
        return self.first.score.chi2 <= self.known_below

    @property
    def helps(self) -> bool:
        """Whether held-out samples ask for the posterior mean in the image; True where it has no classical rival."""
        return self.share >= LEAST_SHARE

    @property
    def knows(self) -> bool:
        """Whether the prior's error model fits and its image helps. Of anatomy it says nothing (docs/trust.md)."""
        return self.fits and self.helps

    @property
    def accepted(self) -> bool:
        """Whether the prior knows the scan, and it looks like what the prior learnt from, where that was asked."""
        return self.knows and (self.look is None or self.look.like)

    @property
    def verdict(self) -> str:
        """In words and numbers, with the thresholds."""
        says = ("knows" if self.helps else "helps little with") if self.fits else "does not know"
        yet = ", yet helps" if self.helps and not self.fits and self.classical is not None else ""
        text = f"the prior {says} this scan{yet}"
        if self.look is not None and not self.look.like:
            says = ("fits" if self.helps else "fits, and helps little") if self.fits else f"does not fit{yet}"
            text = (
                f"this {self.look}, from which the prior learnt: what it adds here is edges, not anatomy; "
                f"its error model {says}"
            )
        text += f": held-out chi-square {self.first.score.chi2:.2f}, {'at most' if self.fits else 'above'} "
        text += f"{self.known_below:g}"
        details = [f"it {self.look}"] if self.look is not None and self.look.like else []
        if (self.chosen.name, self.chosen.scale) != (self.first.name, self.first.scale):
            times = "" if self.chosen.scale == 1 else f", variance times {self.chosen.scale:g}"
            details.append(f"errors as measured on {self.chosen.name}{times}")
        if self.widening > 1:
            details.append(f"error bars widened by {self.widening**0.5:.2f}")
        if self.classical is not None and self.share < LEAST_SHARE:
            details.append(f"classical reconstruction preferred ({1 - self.share:.0%} of the image)")
        elif self.classical is not None and self.share < 0.99:
            details.append(f"{1 - self.share:.0%} of the image is classical")
        return "; ".join([text, *details])

    def of(self, A: LinearOperator, samples: Samples, classical: Tensor | None = None) -> Trust:
        """The same for an image of all data: `share` is that of the mean of these draws beside the classical image."""
        if classical is None or self.bias is None:
            return self
        return replace(
            self, share=share_beyond(A, samples.centres, classical, self.held_share, self.bias, samples.paired)
        )

    def apply(self, samples: Samples, classical: Tensor | None = None) -> Samples:
        """Draws and mean of all data, leaning on the classical image (1, *shape) as far as the scan asks.

        `mean` becomes the one image (1, *shape); the draws scatter about it, as they did about their mean, wider by
        `widening`.
        """
        image = samples.centres.mean(0, keepdim=True)
        if classical is not None:
            image = self.share * image + (1 - self.share) * classical
        x = image + self.widening**0.5 * (samples.x - samples.x.mean(0))
        return replace(samples, x=x, mean=image)


def assess(
    D: Denoiser,
    split: Split,
    noise_std: float,
    errors: Mapping[str, ErrorModel],
    *,
    levels: tuple[float, float] | None = None,
    evaluations: int = 60,
    draws: int = 2,
    tries: int = 4,
    seed: int = 0,
    classical: Classical | None = None,
    iterations: int = 30,
    final: int | None = None,
    beside: bool = True,
    organ: Organ | None = None,
) -> Trust:
    """What a scan, in two parts, says of the prior D, for at most `evaluations` of it.

    errors: models of the error of D by name, the first measured on people like its training set, others on anything
    else. levels: noise of the last and the first evaluation, by default those of `levels_for`. Each candidate gets
    `draws` chains, antithetic if even, as long as `evaluations` allow for `tries` candidates. First all models as they
    are; then the best one with twice and four times the variance, while that scores better. classical: the method to
    compare with, tuned elsewhere; the chains begin with its image. final: draws of the image to come, of which more
    scatter less.
    beside: held-out samples lie beside measured ones, and say too little of what lies between measured lines; False
    where whole readouts were held out: then bars are not widened for it, and the share is that of the image. Else they
    are by the `ErrorModel.widening` of the first of `errors`, by WARM_LOSS where it states none (docs/trust.md).
    organ: the readout of what D learnt from; it looks at the classical image, and at nothing where there is none.
    At most half of the evaluations are for candidates, fewer of which are tried where those do not suffice; what
    is left prolongs the chains of the best one. Raises ValueError when there are too few for one candidate.
    """
    if evaluations < LEAST_CALLS * draws:
        raise ValueError(f"{evaluations} evaluations are too few for {draws} chains of {LEAST_CALLS}; allow for more")
    most = evaluations // 2  # for all candidates together
    tries = max(1, min(tries, most // (LEAST_CALLS * draws)))
    calls = max(LEAST_CALLS, most // (tries * draws))
    image = None if classical is None else classical(split.A, split.y)
    found: list[tuple[Candidate, Samples]] = []
    bills: list[Bill] = []

    def chains(error: ErrorModel, sigmas: Tensor, start: Tensor | None) -> Samples:
        G = problem(split.A, split.y, noise_std, error, iterations)
        on = {"dtype": kind_of(split.A, split.y), "device": split.y.device}
        samples = annealed_gibbs(D, G, sigmas, seeds=antithetic(range(seed, seed + draws)), start=start, **on)
        bills.append(samples.bill)
        return samples

    def attempt(name: str, scale: float) -> None:
        samples = chains(errors[name].times(scale), levels_for(noise_std, image is not None, calls, levels), image)
        found.append((Candidate(name, scale, predictive_score(split, samples, noise_std)), samples))

    for name in list(errors)[:tries]:
        attempt(name, SCALES[0])

    def merit(pair: tuple[Candidate, Samples]) -> float:
        own = pair[0] is found[0][0]
        return pair[0].score.log_score - (0 if own else BETTER)

    for scale in SCALES[1:]:
        best = max(found, key=merit)[0]
        if len(found) >= tries or best.score.chi2 < 1 or best.scale != SCALES[SCALES.index(scale) - 1]:
            break
        attempt(best.name, scale)
    best, samples = max(found, key=merit)
    error, score = errors[best.name].times(best.scale), best.score
    left = evaluations // draws - calls * len(found)
    if left >= LEAST_CALLS:  # longer, as the draws of the image will be: short chains would make the prior look worse
        low, high = levels or (None, WARM)
        low = low or levels_for(noise_std, True, 2)[1].item()
        samples = chains(error, levels_for(noise_std, True, left, (low, min(high, WARM))), samples.x)
        score = predictive_score(split, samples, noise_std)
    share, bias, other = 1.0, None, None
    if image is not None:
        centres = samples.centres
        mean = centres.mean(0, keepdim=True)
        to_come = final if final is None or not samples.paired else final // 2
        share, bias = share_and_bias(split, centres, image, to_come)
        other = predictive_score(split, samples, noise_std, image).excess
        score = predictive_score(split, samples, noise_std, share * mean + (1 - share) * image)
    bill = Bill(*(draws * sum(getattr(b, n) for b in bills) for n in ("denoiser_calls", "operator_calls", "seconds")))
    tried = tuple(candidate for candidate, _ in found)
    stated = next(iter(errors.values())).widening
    loss = WARM_LOSS if stated == 1 else stated
    widening = max(1.0, score.widening) * (loss if beside and image is not None else 1.0)
    look = None if organ is None or image is None else organ.look(D, image)
    held = {"held_share": share, "bias": bias if beside else None}
    return Trust(error, share, widening, best, tried, other, bill, look=look, **held)


def reconstruct(
    D: Denoiser,
    A: LinearOperator,
    y: Tensor,
    noise_std: float,
    errors: Mapping[str, ErrorModel],
    *,
    acs: int,
    seeds: Sequence[int],
    evaluations: int = 30,
    levels: tuple[float, float] | None = None,
    trust: Trust | None = None,
    classical: Classical | None = None,
    extra: float = EXTRA,
    iterations: int = 30,
    organ: Organ | None = None,
) -> tuple[Samples, Trust]:
    """Draws of a slice from all its data, after a trial by the slice itself, and what the trial found.

    trust: of another slice of the same scan, whose trial then serves this one too. extra: work of the trial, as a part
    of that of the draws. iterations: conjugate-gradient steps of each evaluation. organ: as in `assess`. The result is
    `Trust.apply`'s.
    """
    if trust is None:
        split = hold_out(A, y, acs, seed=seeds[0])
        allowed = int(extra * evaluations * len(seeds))
        trust = assess(
            D, split, noise_std, errors, levels=levels, evaluations=allowed, seed=seeds[0], classical=classical,
            final=len(seeds), iterations=iterations, organ=organ,
        )  # fmt: skip
    how = {"evaluations": evaluations, "levels": levels, "classical": classical, "iterations": iterations}
    return draw(D, A, y, noise_std, trust, seeds=seeds, **how)


def draw(
    D: Denoiser,
    A: LinearOperator,
    y: Tensor,
    noise_std: float,
    trust: Trust,
    *,
    seeds: Sequence[int] | Sequence[Generator],
    evaluations: int = 30,
    levels: tuple[float, float] | None = None,
    classical: Classical | None = None,
    iterations: int = 30,
    cond: Tensor | None = None,
    batch_size: int | None = None,
) -> tuple[Samples, Trust]:
    """Draws of a slice from all its data, as far as a trial trusts the prior (`Trust.apply`), and what it is of them.

    seeds: an even number of them gives antithetic draws in pairs. cond, batch_size: of the draws, as for
    `annealed_gibbs`.
    """
    image = None if classical is None else classical(A, y)
    sigmas = levels_for(noise_std, classical is not None, evaluations, levels)
    G = problem(A, y, noise_std, trust.error, iterations)
    options = {"cond": cond, "batch_size": batch_size, "dtype": kind_of(A, y), "device": y.device}
    samples = annealed_gibbs(D, G, sigmas, seeds=antithetic(seeds), start=image, **options)
    trust = trust.of(A, samples, image)
    return trust.apply(samples, image), trust


def problem(A: LinearOperator, y: Tensor, noise_std: float, error: ErrorModel, iterations: int) -> posterior_mean:
    """The Gaussian problem of a sweep, preconditioned: if complex by its diagonal, if real by a `Response`."""
    if A.domain_dtype.is_complex:
        return posterior_mean(A, y, noise_std, error, iterations, balance=True)
    return posterior_mean(A, y, noise_std, error, iterations, response=Response.of(A, y.real))


def kind_of(A: LinearOperator, y: Tensor) -> torch.dtype:
    """The dtype of images of A whose data are y: complex ones, or real ones of the same precision."""
    return y.dtype if A.domain_dtype.is_complex else y.dtype.to_real()


def levels_for(noise_std: float, warm: bool, evaluations: int, levels: tuple[float, float] | None = None) -> Tensor:
    """The noise levels (evaluations,) of draws that begin with a classical image (`warm`) or with nothing.

    levels: of the last and the first, if others are wanted. A classical image errs by far less than WARM, so that its
    errors drown there; the evaluations saved go to low noise, where detail is decided. docs/trust.md has numbers.
    """
    low, high = levels or (max(LAST * noise_std, LEAST), WARM if warm else COLD)
    return karras(evaluations, sigma_min=low, sigma_max=max(high, 2 * low))
