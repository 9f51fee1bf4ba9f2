"""Activity from counts: posterior draws, a conditional network, and tuned methods to compare with.

    scan = acquire(people.image, people.mu, 2.5e5, seeds, pixel_mm=people.pixel_mm)
    prior = Prior.load("pet/prior", held_out("validation", 16, lesions=1).image)
    found = posterior(prior, scan, Sampler(draws=8))        # draws and their mean, kBq/mL

All images are in kBq/mL. Whatever is tuned is tuned on validation people, at each dose for itself.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from companion.acquisition.pet import Scan
from companion.data.head_mr import mr_condition
from companion.diffusion.covariance import FIT_SIGMAS, Isotropic, Measured, pixel_moments
from companion.diffusion.denoisers import AnySize, Denoiser
from companion.diffusion.noise import karras
from companion.diffusion.poisson import (
    Counts,
    Posterior,
    anchored_em,
    em_steps,
    poisson_dps,
    poisson_gibbs,
    poisson_mean,
    poisson_pigdm,
)
from companion.diffusion.recalibration import ErrorModel, Recalibrated
from companion.diffusion.sampling import sample
from companion.diffusion.sets import EachSlice
from companion.evaluation import metrics
from companion.models import checkpoint
from companion.models.architectures import network_of
from companion.models.errors import load_errors
from companion.parameters import param
from companion.randomness import randn
from companion.reconstruction import trust_counts
from companion.reconstruction.condition import BLIND_SIGMA, condition
from companion.reconstruction.mr_guided import map_bowsher
from companion.reconstruction.pet import GRIDS, METHODS, mlem, oracle_stop, tune

NEAR = 2.0  # pixels from slice to slice, up to which the slices beside one help it
ORACLE, GUESS, ANCHORED = "MLEM, oracle stop", "network", "network + likelihood"
WITH_MR = "MR-guided MAP"


def trusted(
    priors: Mapping[str, Prior],
    scan: Scan,
    by_map: trust_counts.Classical,
    sampler: Sampler,
    seed: int = 0,
    at_hand: Mapping[str, Posterior] | None = None,
) -> trust_counts.Trusted:
    """Each scan as its own counts ask: by one of the priors, or by a classical method.

    The trial sees two thirds of the counts, in few and short draws; see `reconstruction.trust_counts`. at_hand: of some
    priors the `posterior` of the scan, one, with this sampler and seed, which is then not drawn again. ValueError for
    that of several.
    """
    if at_hand and len(scan.y) != 1:
        raise ValueError(f"posteriors at hand are those of one scan, got {len(scan.y)}; draw those of several anew")
    few = 3 if len(scan.A.domain_shape) == 3 else 2  # so many bins say of two how far draws vary
    short = Sampler(min(few, sampler.draws), min(12, sampler.evaluations), sampler.last_noise)
    trial = {name: on_trial(one, short, seed) for name, one in priors.items()}
    trusts = trust_counts.assess(scan, trial, by_map, seed=seed)
    whole = {name: drawer(one, sampler, seed) for name, one in priors.items()}
    whole |= {name: kept(whole[name], found) for name, found in (at_hand or {}).items()}
    return trust_counts.reconstruct(scan, trusts, whole, by_map)


def kept(draw: trust_counts.Draw, found: Posterior) -> trust_counts.Draw:
    """The same draws, those of the error at face value already `found`."""
    return lambda part, scale: found if scale == 1 else draw(part, scale)


def drawer(prior: Prior, sampler: Sampler, seed: int = 0) -> trust_counts.Draw:
    """Draws of a prior, its error scaled, of any scans."""
    return lambda part, scale: posterior(prior.times(scale), part, sampler, seed)


def on_trial(prior: Prior, sampler: Sampler, seed: int = 0) -> trust_counts.Draw:
    """The same for a trial: without the `widening` that stands for errors too fine for counts to see.

    With it the prior would be blamed for expecting them.
    """
    return drawer(replace(prior, widening=1.0), sampler, seed)


def leaning(scan: Scan, strength: float, seed: int = 0) -> tuple[trust_counts.Classical, float]:
    """The MAP that the result of one's own scan may lean on, and its strength.

    The MR of the scan guides it (Bowsher), as strongly as the counts themselves ask for; without one: `strength`.
    """
    if scan.mr is None:
        return lambda part: METHODS["MAP"](part.y, part.A, part.background, strength), strength

    best = trust_counts.best_setting(scan, bowsher, GRIDS["MAP"], seed)
    return lambda part: bowsher(part, best), best


def bowsher(scan: Scan, strength: float) -> Tensor:
    """MAP guided by the MR of the scans, (slice, 1, y, x): slices that closely follow one another as one volume.

    In a volume a pixel has neighbours of its own tissue above and below, too, whose counts are independent of its own.
    """
    mr = scan.mr
    if mr is None:
        raise ValueError("these scans have no MR to be guided by")
    if scan.step is None or scan.step > NEAR or len(scan.y) == 1:
        return map_bowsher(scan.y, scan.A, mr, scan.background, strength=strength).x
    one = scan.volume()
    assert one.mr is not None
    x = map_bowsher(one.y, one.A, one.mr, one.background, strength=strength, step=scan.step).x
    return x[0].transpose(0, 1)


def classical(scan: Scan, validation: Scan) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The images of all methods without a network by name, and the setting that each was tuned to."""
    tuned = {name: tune(name, validation.y, validation.A, validation.background, validation.truth) for name in METHODS}
    images = {name: METHODS[name](scan.y, scan.A, scan.background, setting) for name, setting in tuned.items()}
    if scan.x is not None:
        images[ORACLE] = oracle_stop(scan.y, scan.A, scan.background, scan.x)
    return images, tuned


def enhanced(network: Network, scan: Scan, validation: Scan, seed: int = 0) -> tuple[dict[str, Tensor], float, Tensor]:
    """What a conditional network makes of a scan, alone and with the likelihood; the trust tuned; its variance."""
    guess, other = network.guess(scan, seed), network.guess(validation, seed)
    errors = {t: metrics.nrmse(with_likelihood(other, validation, t), validation.truth).mean().item() for t in TRUSTS}
    trust = min(errors, key=lambda t: errors[t])
    return {GUESS: guess[0], ANCHORED: with_likelihood(guess, scan, trust)}, trust, guess[1]


MR_GIVEN = ", MR given"  # ends the name of an error that was measured with the MR given

PRIOR, HEADS, NETWORK = "pet/prior", "pet/heads", "pet/enhance"

FIRST_SIGMA = 10.0  # network units: noise level at which draws begin, an image is invisible in it

LAST_GUIDED = 0.01  # last noise level of guided samplers, which do not draw from what is left at the end

CONVERGED = {"iterations": 16, "tol": 3e-5}  # of conjugate gradients: draws to 0.2 %, far less than they differ by

LEAST_ROWS = 32  # of a volume along each axis, from which slices in any plane show enough of a head to be judged
WARM, SEEN = 1.0, 10  # noise level, network units, at which draws of volumes begin, and from which iteration of MLEM
LAST_WARM = 0.3  # where they end, if not above: in less noise they harden what is open, and the mean gets worse
TIES = 1.2  # of neighbouring slices a pixel apart, 1 / network unit, see `poisson_mean`

RESIDUAL = 1e-2  # of volumes, relative, of conjugate gradients, within the same number of steps: no worse draws

HELD = 12, 40  # sinograms and volumes that a draw of a volume holds at a time

LEVEL_STEP = math.log(1.1)  # last noise levels are rounded to 10 %, so that many slices share one


@dataclass(frozen=True)
class Sampler:
    """The part of a form that says how posterior draws are made."""

    draws: int = param(8, "posterior draws a slice", minimum=2)
    evaluations: int = param(25, "network evaluations a draw", minimum=2)
    last_noise: float = param(
        4.0,
        "noise level of the last evaluation, in counting errors of a mean pixel, see `Scan.counting_error`",
        minimum=1e-2,
    )

    def last_levels(self, scan: Scan) -> Tensor:
        """The noise level (slice,), kBq/mL, at which the sweeps of each slice end; its own counts decide alone."""
        return ((self.last_noise * scan.counting_error()).log().div(LEVEL_STEP).round() * LEVEL_STEP).exp()


@dataclass(frozen=True, eq=False)
class Prior:
    """A denoiser, the kBq/mL that are 1 for it, and what is known about its error.

    with_mr: it is given the MR of the scans that it is asked about. widening: factor on the variance of its draws about
    their mean, of slices, see `ErrorModel`.
    """

    D: Denoiser
    scale_kbq: float
    error: Measured
    device: str = "cpu"
    with_mr: bool = False
    widening: float = 1.0

    @classmethod
    def load(cls, name: str, people: Tensor, device: str = "cpu", autocast: str | None = None, seed: int = 0) -> Prior:
        """The prior of a checkpoint, its error measured on activity (slice, 1, y, x) of people it never saw."""
        found = checkpoint.find(name, PRIOR)
        scale = found.config["data"]["scale_kbq"]
        images = people.to(device) / scale
        D = Recalibrated.fit(found.denoiser(device, autocast), images, FIT_SIGMAS, seed=seed)
        return cls(D, scale, Measured.fit(D, images, FIT_SIGMAS, seed=seed), device)

    @classmethod
    def known(
        cls, name: str, error: ErrorModel, device: str = "cpu", autocast: str | None = None, with_mr: bool = False
    ) -> Prior:
        """The prior of a checkpoint with an error that was measured before, see `models.errors`."""
        found = checkpoint.find(name, PRIOR)
        D = found.denoiser(device, autocast)
        D = AnySize(D, network_of(D).total_stride)
        D = D if error.table is None else Recalibrated(D, *error.table)
        return cls(D, found.config["data"]["scale_kbq"], error.measured, device, with_mr, error.widening)

    @classmethod
    def every(cls, name: str, mr: bool, device: str = "cpu", autocast: str | None = None) -> dict[str, Prior]:
        """The priors of a checkpoint by name, one for each error that was measured.

        mr: the scans have an MR. Those that are given it come first then, and the others may still be preferred: it
        may lie elsewhere, or show somebody else.
        """
        kinds = {kind: (error, kind.endswith(MR_GIVEN)) for kind, error in load_errors(name, PRIOR).items()}
        wanted = sorted((k for k in kinds if mr or not kinds[k][1]), key=lambda k: not kinds[k][1])
        return {f"{name} ({k})": cls.known(name, kinds[k][0], device, autocast, kinds[k][1]) for k in wanted}

    def condition(self, scan: Scan) -> Tensor | None:
        """What D is given of scans beside noisy images; ValueError where it is to have an MR that they lack."""
        if not self.with_mr:
            return None
        if scan.mr is None:
            raise ValueError("this prior is given the person's MR, and the scan has none; use one without (with_mr)")
        if scan.mr.ndim == 5:  # of volumes
            return torch.stack([mr_condition(z.transpose(0, 1)).transpose(0, 1) for z in scan.mr]).to(self.device)
        return mr_condition(scan.mr).to(self.device)

    def times(self, factor: float) -> Prior:
        """The same prior with the variance of its error multiplied."""
        return replace(self, error=replace(self.error, spectrum=factor * self.error.spectrum))


GIBBS = "Gibbs"

GUIDED: dict[str, Callable[..., Counts]] = {  # samplers to compare with: of A, y, background and the exact mean
    "EM steps": lambda A, y, b, exact: em_steps(A, y, background=b, iterations=20, trust=3.0),
    "one mean": lambda A, y, b, exact: exact,
    "DPS": lambda A, y, b, exact: poisson_dps(A, y, background=b, step_size=0.1),  # larger steps diverge
    "PiGDM": lambda A, y, b, exact: poisson_pigdm(A, y, background=b, prior_std=0.35),
}


def posterior(
    prior: Prior,
    scan: Scan,
    sampler: Sampler,
    seed: int = 0,
    rule: str = GIBBS,
    draws: int | None = None,
    warm: float | None = WARM,
) -> Posterior:
    """Posterior draws of all scans by annealed Gibbs sweeps, or by one of the GUIDED samplers.

    x (draw, slice, 1, y, x) and their mean (slice, 1, y, x) in kBq/mL, not cut at 0. Draw k of slice i has the seed
    `seed` + 10,000 i + k. Slices that end at the same noise level are drawn together, which changes nothing for each.
    Scans of volumes alike, x (draw, scan, 1, z, y, x): the prior is one of independent slices then, which A, such as
    that of oblique planes, and TIES between neighbours hold together, those of a known `step` up to NEAR; where voxels
    are cubes (a `step` of 1), LEAST_ROWS of them or more along each axis, sweeps cut them across z, y, x in turn. Draws
    of volumes are not widened: `Prior.widening` is that of slices by themselves. `cost` says what they will take.
    warm: Gibbs sweeps of volumes begin at this noise level, network units, from SEEN iterations of MLEM, with those of
    the `evaluations` that are left below it, and end at LAST_WARM or above: noise drowns what that image gets wrong, as
    far as the counts do not say it anyway. The mean is then that of all sweeps. None: from noise that drowns everything
    to the last level, as slices do. [zhang2024] (sweeps forget where they began).
    """
    draws, levels = draws or sampler.draws, sampler.last_levels(scan)
    begin = None
    if warm is not None and rule == GIBBS and len(scan.A.domain_shape) == 4:
        begin = mlem(scan.y, scan.A, scan.background, iterations=SEEN).x
    shape = len(scan.y), *scan.A.domain_shape
    x, mean, bills = torch.empty(draws, *shape), torch.empty(shape), []
    for level in levels.unique().tolist():
        index = (levels == level).nonzero().flatten()
        seeds = [seed + 10_000 * i + k for k in range(draws) for i in index.tolist()]
        start = None if begin is None or warm is None else (begin[index.repeat(draws)], warm)
        some = scan.some(index.repeat(draws), prior.device)
        found = draw(prior, some, sampler.evaluations, level, seeds, rule, start)
        x[:, index], means = (v.unflatten(0, (draws, len(index))) for v in (found.x, found.mean))
        mean[index] = means.mean(0)
        if prior.widening != 1 and len(scan.A.domain_shape) == 3:
            middle = x[:, index].mean(0)
            x[:, index] = middle + prior.widening**0.5 * (x[:, index] - middle)
        bills.append(found.bill)
    return Posterior(x, mean, replace(bills[0], seconds=sum(bill.seconds for bill in bills) / len(bills)))


def draw(
    prior: Prior,
    scan: Scan,
    evaluations: int,
    last_level: float,
    seeds: Sequence[int],
    rule: str = GIBBS,
    start: tuple[Tensor, float] | None = None,
) -> Posterior:
    """One draw for each scan, and its mean given the step before, kBq/mL; sweeps end at the noise `last_level`.

    start: images of the scans, kBq/mL, and the noise level, network units, at which sweeps begin with them.
    """
    A, cond = prior.scale_kbq * scan.A, prior.condition(scan)
    turning = scan.step == 1 and min(A.domain_shape[1:]) >= LEAST_ROWS
    D = prior.D if len(A.domain_shape) == 3 else EachSlice(prior.D, turning)
    G = poisson_mean(A, scan.y, background=scan.background, covariance=prior.error, **CONVERGED)
    if len(A.domain_shape) == 4:
        near = scan.step is not None and scan.step <= NEAR
        G = replace(G, tol=RESIDUAL, ties=TIES / scan.step if near and scan.step else 0.0)
    if rule == GIBBS:
        image, warm = (None, None) if start is None else (start[0] / prior.scale_kbq, start[1])
        levels = schedule(evaluations, last_level / prior.scale_kbq, warm)
        averaged = 1 if warm is None else len(levels)
        result = poisson_gibbs(
            D, G, levels, seeds=seeds, start=image, averaged=averaged, device=prior.device, cond=cond
        )
        mean = result.mean
    else:
        G = GUIDED[rule](A, scan.y, scan.background, G)
        levels = karras(evaluations // G.denoiser_calls, LAST_GUIDED, FIRST_SIGMA)
        result = sample(
            G(D),
            levels,
            shape=tuple(A.domain_shape),
            seeds=seeds,
            solver="dpmpp_2m",
            device=prior.device,
            cond=cond,
        )
        mean = result.x
    return Posterior(prior.scale_kbq * result.x.cpu(), prior.scale_kbq * mean.cpu(), result.bill)


def schedule(evaluations: int, last: float, warm: float | None) -> Tensor:
    """Noise levels, network units, of so many sweeps that end at `last`, and their 0.

    warm: those of them that are as low as that or the last, of a schedule that ends at LAST_WARM or above.
    """
    if warm is None:
        return karras(evaluations, last, FIRST_SIGMA)
    levels = karras(evaluations, max(last, LAST_WARM), FIRST_SIGMA)
    return levels[levels <= max(warm, levels[-2].item())]


class Cost(NamedTuple):
    """What draws will take: seconds of processor time of all of them, and GiB of memory at most."""

    seconds: float
    gib: float

    def __str__(self) -> str:
        return f"about {self.seconds / 60:.1f} min of processor time and {self.gib:.1f} GiB"


def cost(prior: Prior, scan: Scan, sampler: Sampler, draws: int | None = None, warm: float | None = WARM) -> Cost:
    """The `Cost` of `posterior` of volumes here, at most: from one projection with its adjoint, and a few slices.

    The trial makes the tables of the projector, which are kept. Counted are the steps of conjugate gradients, one
    solution for every evaluation and one for each mean, and the arrays that they hold at a time, beside the most that
    the process has held so far. Raises ValueError for slices.
    """
    if len(scan.A.domain_shape) != 4:
        raise ValueError(
            f"images of shape {tuple(scan.A.domain_shape)}; what is foreseen is the cost of volumes, 4 axes"
        )
    A, cond = scan.A, prior.condition(scan)
    draws, volume = draws or sampler.draws, torch.ones(1, *A.domain_shape)
    level = sampler.last_levels(scan).min().item() / prior.scale_kbq
    sweeps = len(schedule(sampler.evaluations, level, warm)) - 1
    few = min(4, A.domain_shape[1])
    x, cond = volume[:, :, :few].to(prior.device), None if cond is None else cond[:1, :, :few]
    sigma = torch.ones(1, device=prior.device)
    spent = {}
    for name, trial in {
        "projections": lambda: A.normal(volume),
        "slices": lambda: EachSlice(prior.D).moments(x, sigma, cond),
    }.items():
        for _ in range(2):  # the first prepares
            start = time.process_time()
            trial()
            spent[name] = time.process_time() - start
    solutions = sweeps + 1 if warm is None else 2 * sweeps
    steps = solutions * (CONVERGED["iterations"] + 2)
    each = steps * spent["projections"] + sweeps * spent["slices"] * A.domain_shape[1] / few
    held = HELD[0] * math.prod(A.range_shape) + HELD[1] * math.prod(A.domain_shape)
    count, mlem_too = draws * len(scan.y), len(scan.y) * (SEEN + 1) * spent["projections"]
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Cost(count * each + mlem_too, (peak + 4 * count * held) / 2**30)


@dataclass(frozen=True, eq=False)
class Network:
    """A conditional network: activity given the MLEM images of a scan and its dose."""

    D: Denoiser
    data: Mapping

    @classmethod
    def load(cls, name: str, device: str = "cpu", autocast: str | None = None) -> Network:
        """That of a checkpoint of 2_train."""
        found = checkpoint.find(name, NETWORK)
        return cls(found.denoiser(device, autocast), found.config["data"])

    @torch.no_grad()
    def guess(self, scan: Scan, seed: int = 0) -> tuple[Tensor, Tensor]:
        """E[activity | MLEM images], kBq/mL, and the variance that the network states, both (slice, 1, y, x).

        One evaluation: in noise of BLIND_SIGMA nothing is seen but the condition. A network that states no variance, as
        the published one, has one number for all pixels.
        """
        device, scale = next(network_of(self.D).parameters()).device, self.data["scale_kbq"]
        cond = condition(scan, self.data["iterations"], scale)
        cond = cond if self.data.get("dose_channel", True) else cond[:, :-1]
        shape = len(scan.y), *scan.A.domain_shape
        x = BLIND_SIGMA * randn(shape, torch.float32, torch.Generator().manual_seed(seed))
        sigma = torch.full((len(x),), BLIND_SIGMA, device=device)
        mean, variance = pixel_moments(self.D, x.to(device), sigma, cond.to(device), Isotropic.prior_std)
        return scale * mean.float().cpu(), scale**2 * variance.float().cpu().expand(shape)


EM_ITERATIONS = 5

TRUSTS = (0.1, 0.3, 1.0, 3.0)  # searched: how much of the network's stated variance the likelihood may use


def with_likelihood(guess: tuple[Tensor, Tensor], scan: Scan, trust: float) -> Tensor:
    """The network's guess after a few EM steps anchored to it: the counts have the last word on the level."""
    mean, variance = guess
    return anchored_em(mean, trust * variance, scan.y, scan.A, scan.background, EM_ITERATIONS)
