"""PET from counts: how low can the dose go? Posterior draws against tuned reconstructions, over a ladder of doses.

    p = Enhance(fractions=(0.25,), factors=())
    people = test_people(p)
    levels = ladder(people, p)                         # one `pet.Scan` of everybody for each dose
    study = run_study(p, people, levels)               # rows, images, draws, calibration

All images are in kBq/mL. Whatever is tuned is tuned on validation people, at each dose for itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from companion.acquisition.pet import FIELD_MM, Scan, acquire, condition, mean_sensitivity, scanner
from companion.data.pet import Slices
from companion.data.sinograms import read_sinograms
from companion.diffusion.covariance import Isotropic, Measured, pixel_moments
from companion.diffusion.denoisers import Denoiser
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
from companion.diffusion.recalibration import Recalibrated
from companion.diffusion.sampling import Bill, sample
from companion.evaluation import metrics
from companion.files import project_root
from companion.models.checkpoint import describe, load_denoiser
from companion.operators.linear import Composition, Diagonal, LinearOperator, Scaled
from companion.operators.pet import Blur, mean_activity
from companion.papers.pet.data import held_out
from companion.parameters import Parameters, param
from companion.randomness import randn
from companion.reconstruction.pet import map_rdp, mlem, osem

PRIOR, NETWORK = "pet/prior", "pet/enhance"
FIRST_SIGMA = 10.0  # network units: noise level at which draws begin, an image is invisible in it
FIT_SIGMAS = torch.logspace(-2, 1.3, 12)  # noise levels at which the error of a prior is measured
BLIND_SIGMA = 40.0  # noise in which a conditional network sees nothing but its condition


@dataclass(frozen=True)
class Enhance(Parameters):
    """Parameters of pet/4_enhance.ipynb."""

    scan: str | None = param(None, "an .npz with your own counts, see `open_scan`; none: held-out people, simulated")
    prior: str = param(PRIOR, "checkpoint of the unconditional prior: an embedded name or a folder")
    network: str | None = param(NETWORK, "checkpoint of the conditional network; none: leave its rows out")
    image_size: int = param(64, "pixels along y and x", minimum=16)
    subjects: int = param(8, "held-out people, one slice each, with a lesion in it", minimum=2)
    validation_subjects: int = param(
        16, "other people: every method is tuned on them, and the prior's error measured", minimum=2
    )
    full_counts: float = param(1e6, "true counts of a slice at full dose; 1e6 as published", minimum=1)
    fractions: tuple[float, ...] = param(
        (0.05, 0.25, 1.0), "of the full dose, by thinning; 0.25 as published", minimum=1e-4, maximum=1
    )
    factors: tuple[float, ...] = param((2.5, 10.0), "further doses, as true counts per pixel with activity", minimum=0)
    attenuation: bool = param(True, "the head attenuates, and the model of the scan knows")
    randoms: float = param(0.0, "of the true counts", minimum=0)
    scatter: float = param(0.0, "of the true counts", minimum=0)
    draws: int = param(8, "posterior draws a slice", minimum=2)
    evaluations: int = param(25, "network evaluations a draw", minimum=2)
    last_noise: float = param(
        4.0,
        "noise level of the last evaluation, in counting errors of a mean pixel, see `counting_error`",
        minimum=1e-2,
    )
    samplers: tuple[str, ...] = param(
        (), "other samplers to compare at the levels of `fractions`", choices=("EM steps", "DPS", "PiGDM", "one mean")
    )
    autocast: str | None = param("auto", "number format inside the networks", choices=("auto", "bfloat16", None))


# ------------------------------------------------------------------------------------------------------- the scans


@dataclass(frozen=True, eq=False)
class Level:
    """A dose: its name, the mean true counts of a slice, and everybody's scan."""

    name: str
    counts: float
    scan: Scan


def test_people(p: Enhance) -> Slices:
    """Return one slice of each held-out person, with a lesion in it."""
    return held_out("test", p.subjects, p.image_size, lesions=1)


@lru_cache(maxsize=2)
def validation_people(count: int, image_size: int) -> Slices:
    """Return the same of other people, on whom everything is tuned."""
    return held_out("validation", count, image_size, lesions=1)


def ladder(people: Slices, p: Enhance) -> list[Level]:
    """Return the scans of the people at every dose of `p`, lowest counts first.

    Doses of `fractions` are one full-dose scan, thinned; those of `factors` are scans of their own.
    """
    n, mu = len(people.image), people.mu if p.attenuation else None
    seeds = [p.seed * 1000 + int(person) * 100 for person in people.subject]
    options = {"pixel_mm": people.pixel_mm, "randoms": p.randoms, "scatter": p.scatter}
    levels = []
    if p.fractions:
        full = acquire(people.image, mu, p.full_counts, seeds, **options)
        levels += [
            Level(f"{f:.0%} dose", f * p.full_counts, full if f == 1 else full.thinned(f, seeds)) for f in p.fractions
        ]
    for k, factor in enumerate(p.factors):
        counts = factor * (people.image > 0.5).flatten(1).sum(1).double()
        scan = acquire(people.image, mu, counts, [s + k + 1 for s in seeds[:n]], **options)
        levels.append(Level(f"{factor:g} per pixel", counts.mean().item(), scan))
    if not levels:
        raise ValueError("no dose to study; give fractions of the full dose, or factors, counts per pixel")
    return sorted(levels, key=lambda level: level.counts)


def open_scan(path: str | Path, p: Enhance) -> Level:
    """Return your own scan as a level without truth, from an .npz of plain arrays.

    counts (slice, angle, bin): raw, whole numbers. factors, broadcastable to them: the counts that 1 kBq/mL gives per
    mm of a line, so calibration times attenuation. background (optional): expected counts of randoms and scatter.
    Geometry: p.image_size pixels across 224 mm, twice as many angles over half a turn, one bin a pixel.
    Raises FileNotFoundError, or ValueError for what cannot be used; see `data.sinograms`.
    """
    path = project_root() / path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give an .npz with counts and factors, or scan: null")
    P = scanner((p.image_size, p.image_size), FIELD_MM / p.image_size)
    y, A, background = read_sinograms(path, P)
    return Level(path.stem, y.sum().item() / len(y), Scan(None, y, A, background))


def items(A: LinearOperator, index: Tensor) -> LinearOperator:
    """Return the model of the scans `index`, as often as they are named, of a model of several scans."""
    match A:
        case Diagonal() if A.batch_shape and A.batch_shape[0] > 1:
            return Diagonal(A.weights[index], A.domain_shape, A.domain_dtype)
        case Composition():
            return items(A.outer, index) @ items(A.inner, index)
        case Scaled():
            return Scaled(A.scalar, items(A.operator, index))
    return A


def some(scan: Scan, index: Tensor, device: str = "cpu") -> Scan:
    """Return the scans `index`, as often as they are named."""
    x, b = (
        None if v is None else v.expand(len(scan.y), *v.shape[1:])[index].to(device) for v in (scan.x, scan.background)
    )
    return Scan(x, scan.y[index].to(device), items(scan.A, index).to(device), b)


# ----------------------------------------------------------------------------------------------- what there was before

METHODS: dict[str, Callable[[Scan, float], Tensor]] = {
    "MLEM": lambda s, iterations: mlem(s.y, s.A, s.background, iterations=iterations).x,
    "filtered MLEM": lambda s, fwhm: filtered(mlem(s.y, s.A, s.background, iterations=50).x, fwhm),
    "OSEM": lambda s, iterations: osem(s.y, s.A, s.background, iterations=iterations, subsets=8).x,
    "MAP": lambda s, strength: map_rdp(s.y, s.A, s.background, strength=strength).x,
}
GRIDS = {  # iterations; FWHM in pixels; iterations; strength of the relative difference prior
    "MLEM": (1, 2, 3, 4, 5, 7, 10, 14, 20, 28, 40, 60),
    "filtered MLEM": (0.0, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0),
    "OSEM": (1, 2, 3, 4, 5, 6, 8),
    "MAP": (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
}


def filtered(x: Tensor, fwhm_pixels: float) -> Tensor:
    """Return x after a Gaussian of this width, in pixels."""
    return Blur(x.shape[-2:], 1.0, fwhm_pixels)(x)


def tune(name: str, validation: Scan) -> float:
    """Return the setting of a method with the least mean NRMSE over validation scans: downhill from mid-grid."""

    @cache
    def error(i: int) -> float:
        inside = 0 <= i < len(GRIDS[name])
        x = METHODS[name](validation, GRIDS[name][i]) if inside else None
        return metrics.nrmse(x, validation.x).mean().item() if inside else float("inf")

    at = len(GRIDS[name]) // 2
    while (best := min((at, at - 1, at + 1), key=error)) != at:
        at = best
    return GRIDS[name][at]


def oracle_stop(scan: Scan) -> Tensor:
    """Return the MLEM image of each scan at the iteration that is best for *its* truth: what no one can do."""
    best, least = torch.zeros_like(scan.x), torch.full((len(scan.y),), torch.inf, dtype=torch.float64)

    def keep(k: int, x: Tensor) -> None:
        error = metrics.nrmse(x, scan.x)
        better = error < least
        best[better], least[better] = x[better], error[better]

    mlem(scan.y, scan.A, scan.background, iterations=max(GRIDS["MLEM"]), callback=keep)
    return best


# ------------------------------------------------------------------------------------------------------- the posterior


@dataclass(frozen=True, eq=False)
class Prior:
    """A denoiser, the kBq/mL that are 1 for it, and what is known about its error."""

    D: Denoiser
    scale_kbq: float
    error: Measured

    @classmethod
    def load(cls, p: Enhance) -> Prior:
        """Return the prior of `p`, its error measured on the slices of the validation people."""
        return _load_prior(p.prior, p.device, p.autocast, p.image_size, p.seed, p.validation_subjects)


@lru_cache(maxsize=2)
def _load_prior(name: str, device: str, autocast: str | None, size: int, seed: int, people: int) -> Prior:
    scale = describe(name, PRIOR)["data"]["scale_kbq"]
    images = validation_people(people, size).image.to(device) / scale
    D = Recalibrated.fit(load_denoiser(name, device, autocast, default=PRIOR), images, FIT_SIGMAS, seed=seed)
    return Prior(D, scale, Measured.fit(D, images, FIT_SIGMAS, seed=seed))


def posterior(prior: Prior, scan: Scan, p: Enhance, sampler: str = "Gibbs", draws: int | None = None) -> Posterior:
    """Return posterior draws of all scans by annealed Gibbs sweeps ("Gibbs"), or by one of the other samplers.

    x (draw, slice, 1, y, x) and their mean (slice, 1, y, x) in kBq/mL, not cut at 0. Draw k of slice i has the seed
    p.seed + 10,000 i + k. Slices that end at the same noise level are drawn together, which changes nothing for each.
    """
    draws, levels = draws or p.draws, last_levels(scan, p)
    shape = len(scan.y), *scan.A.domain_shape
    x, mean, bills = torch.empty(draws, *shape), torch.empty(shape), []
    for level in levels.unique().tolist():
        index = (levels == level).nonzero().flatten()
        seeds = [p.seed + 10_000 * i + k for k in range(draws) for i in index.tolist()]
        found = draw(prior, some(scan, index.repeat(draws), p.device), p, sampler, seeds, level)
        x[:, index], means = (v.unflatten(0, (draws, len(index))) for v in (found.x, found.mean))
        mean[index] = means.mean(0)
        bills.append(found.bill)
    return Posterior(x, mean, replace(bills[0], seconds=sum(bill.seconds for bill in bills) / len(bills)))


def draw(prior: Prior, scan: Scan, p: Enhance, sampler: str, seeds: Sequence[int], level: float) -> Posterior:
    """Return one draw for each scan, and its mean given the step before, kBq/mL; sweeps end at the noise `level`."""
    A, data = prior.scale_kbq * scan.A, {"background": scan.background}
    G = poisson_mean(A, scan.y, **data, covariance=prior.error, iterations=30, tol=1e-4)
    if sampler == "Gibbs":
        levels = karras(p.evaluations, level / prior.scale_kbq, FIRST_SIGMA)
        result = poisson_gibbs(prior.D, G, levels, seeds=seeds, device=p.device)
        mean = result.mean
    else:
        rule: dict[str, Callable[[], Counts]] = {
            "EM steps": lambda: em_steps(A, scan.y, **data, iterations=20, trust=3.0),
            "one mean": lambda: G,
            "DPS": lambda: poisson_dps(A, scan.y, **data, step_size=0.1),  # larger steps diverge
            "PiGDM": lambda: poisson_pigdm(A, scan.y, **data, prior_std=0.35),
        }
        G = rule[sampler]()
        levels = karras(p.evaluations // G.denoiser_calls, LAST_GUIDED, FIRST_SIGMA)
        result = sample(
            G(prior.D), levels, shape=tuple(A.domain_shape), seeds=seeds, solver="dpmpp_2m", device=p.device
        )
        mean = result.x
    return Posterior(prior.scale_kbq * result.x.cpu(), prior.scale_kbq * mean.cpu(), result.bill)


LAST_GUIDED = 0.01  # last noise level of guided samplers, which do not draw from what is left at the end
LEVEL_STEP = math.log(1.1)  # last noise levels are rounded to 10 %, so that many slices share one


def last_levels(scan: Scan, p: Enhance) -> Tensor:
    """Return the noise level (slice,), kBq/mL, at which the sweeps of each slice end; its own counts decide alone."""
    return ((p.last_noise * counting_error(scan)).log().div(LEVEL_STEP).round() * LEVEL_STEP).exp()


def counting_error(scan: Scan) -> Tensor:
    """Return the standard deviation (slice,), kBq/mL, of a mean pixel's activity if its own counts were known.

    What the noise of an image is in MRI: known from the counts alone, and as 1 / sqrt(dose).
    """
    per_kbq = mean_sensitivity(scan.A).expand(len(scan.y))
    return (mean_activity(scan.y, scan.A, scan.background).flatten().cpu() / per_kbq.cpu()).sqrt()


@dataclass(frozen=True, eq=False)
class Network:
    """A conditional network: activity given the MLEM images of a scan and its dose."""

    D: Denoiser
    data: Mapping

    @classmethod
    def load(cls, p: Enhance) -> Network:
        return cls(
            load_denoiser(p.network, p.device, p.autocast, default=NETWORK), describe(p.network, NETWORK)["data"]
        )

    @torch.no_grad()
    def guess(self, scan: Scan, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Return E[activity | MLEM images], kBq/mL, and the variance that the network states, both (slice, 1, y, x).

        One evaluation: in noise of BLIND_SIGMA nothing is seen but the condition. A network that states no variance, as
        the published one, has one number for all pixels.
        """
        device, scale = next(self.D.parameters()).device, self.data["scale_kbq"]
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
    """Return the network's guess after a few EM steps anchored to it: the counts have the last word on the level."""
    mean, variance = guess
    return anchored_em(mean, trust * variance, scan.y, scan.A, scan.background, EM_ITERATIONS)


# ----------------------------------------------------------------------------------------------------------- the study


@dataclass(eq=False)
class Study:
    """What came out: `rows`, one for each level, method and person; images (slice, 1, y, x) and draws of each level.

    regions: the same for the tissues' means with anatomical maps of every kind, see `regional`.
    """

    rows: list[dict] = field(default_factory=list)
    regions: list[dict] = field(default_factory=list)
    calibration: list[dict] = field(default_factory=list)
    tuned: dict[str, dict] = field(default_factory=dict)
    images: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    draws: dict[str, Tensor] = field(default_factory=dict)
    bills: dict[str, Bill] = field(default_factory=dict)
