"""The study of 4_enhance: all methods at all doses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from companion.acquisition.own_pet import OwnScan, Placing, check_pixels
from companion.acquisition.pet import FIELD_MM, Physics, Scan
from companion.data.pet import Slices, tissue_shares
from companion.diffusion.sampling import Bill
from companion.evaluation import metrics
from companion.evaluation.activity import TISSUES, count_linearity, healthy, score
from companion.evaluation.tables import average, check_unique, column, grouped
from companion.files import project_root
from companion.models import checkpoint
from companion.models.errors import load_errors
from companion.operators.pet import ParallelBeam
from companion.papers.pet.data import held_out
from companion.papers.pet.reconstruct import (
    GUIDED,
    HEADS,
    NETWORK,
    PRIOR,
    TRUSTS,
    Network,
    Prior,
    Sampler,
    posterior,
    with_likelihood,
)
from companion.parameters import Parameters, param
from companion.reconstruction import trust_counts
from companion.reconstruction.pet import METHODS, oracle_stop, tune
from companion.reconstruction.regions import decided, misplaced, regional

ORACLE, GUESS, ANCHORED = "MLEM, oracle stop", "network", "network + likelihood"
MEAN, ONE, TRUSTED = "posterior mean", "one draw", "trusted"
MAPS = {"none": None, "exact": lambda shares: shares, "half a pixel off": misplaced, "labels only": decided}


@dataclass(frozen=True)
class Doses:
    """The part of a form that says at which doses people are scanned."""

    full_counts: float = param(1e6, "true counts of a slice at full dose; 1e6 as published", minimum=1)
    fractions: tuple[float, ...] = param(
        (0.05, 0.25, 1.0), "of the full dose, by thinning; 0.25 as published", minimum=1e-4, maximum=1
    )
    factors: tuple[float, ...] = param((2.5, 10.0), "further doses, as true counts per pixel with activity", minimum=0)


@dataclass(frozen=True)
class Enhance(Doses, Physics, Sampler, Placing, Parameters):
    """Parameters of pet/4_enhance.ipynb."""

    scan: str | None = param(
        None, "your own counts: .npz, .json or .hs, see `data.sinograms`; none: held-out people, simulated"
    )
    prior: str = param(PRIOR, "checkpoint of the unconditional prior: an embedded name or a folder")
    general: str | None = param(
        HEADS, "of your own scan: a prior of any head, tried beside `prior` on part of the counts; none: not tried"
    )
    network: str | None = param(NETWORK, "checkpoint of the conditional network; none: leave its rows out")
    image_size: int = param(64, "pixels along y and x", minimum=16)
    subjects: int = param(8, "held-out people, one slice each, with a lesion in it", minimum=2)
    validation_subjects: int = param(
        16, "other people: every method is tuned on them, and the prior's error measured", minimum=2
    )
    samplers: tuple[str, ...] = param(
        (), "other samplers to compare at the levels of `fractions`", choices=tuple(GUIDED)
    )
    autocast: str | None = param("auto", "number format inside the networks", choices=("auto", "bfloat16", None))


# ------------------------------------------------------------------------------------------------------------ the doses


@dataclass(frozen=True, eq=False)
class Level:
    """A dose: its name, the mean true counts of a slice, everybody's scan, and its share of the full dose."""

    name: str
    counts: float
    scan: Scan
    fraction: float | None = None


def dose_name(fraction: float) -> str:
    """The name of a fraction of the full dose, in per cent with all its digits: what tables are keyed by."""
    return f"{100 * fraction:g}% dose"


def ladder(people: Slices, doses: Doses, physics: Physics, seed: int = 0) -> list[Level]:
    """The scans of the people at every dose, lowest counts first.

    Doses of `fractions` are one full-dose scan, thinned; those of `factors` are scans of their own. Raises ValueError
    for no dose, or for two that tables could not tell apart.
    """
    seeds = [seed * 1000 + int(person) * 100 for person in people.subject]
    levels = []
    if doses.fractions:
        full = physics.acquire(people.image, people.mu, doses.full_counts, seeds, pixel_mm=people.pixel_mm)
        levels += [
            Level(dose_name(f), f * doses.full_counts, full if f == 1 else full.thinned(f, seeds), f)
            for f in doses.fractions
        ]
    for k, factor in enumerate(doses.factors):
        counts = factor * (people.image > 0.5).flatten(1).sum(1).double()
        scan = physics.acquire(people.image, people.mu, counts, [s + k + 1 for s in seeds], pixel_mm=people.pixel_mm)
        levels.append(Level(f"{factor:g} per pixel", counts.mean().item(), scan))
    if not levels:
        raise ValueError("no dose to study; give fractions of the full dose, or factors, counts per pixel")
    check_unique([level.name for level in levels], "doses")
    return sorted(levels, key=lambda level: level.counts)


@dataclass(frozen=True, eq=False)
class Cases:
    """What is reconstructed: scans at each dose, and whose they are.

    people: None of your own scan, which `own` is then. validation: people that every method is tuned on, all virtual,
    one slice each with a lesion in it. beam: the lines of all scans.
    """

    levels: list[Level]
    people: Slices | None
    validation: Slices
    own: OwnScan | None = None

    @property
    def beam(self) -> ParallelBeam | None:
        """The lines of one's own scan; None: those of `scanner`."""
        return self.own and self.own.beam


def prepare(p: Enhance) -> Cases:
    """The scans to reconstruct. Raises ValueError where the weights are of other pixels, or a scan cannot be used."""
    pixel_mm = FIELD_MM / p.image_size if p.pixel_mm is None else p.pixel_mm
    for name, default in ((p.prior, PRIOR), (p.network, NETWORK)):
        if name and (stated := checkpoint.find(name, default).config.get("data", {}).get("pixel_mm")):
            check_pixels(stated, pixel_mm, name)
    validation = held_out("validation", p.validation_subjects, p.image_size, lesions=1, pixel_mm=pixel_mm)
    if not p.scan:
        people = held_out("test", p.subjects, p.image_size, lesions=1, pixel_mm=pixel_mm)
        return Cases(ladder(people, p, p, p.seed), people, validation)
    path, about = project_root() / p.scan, p.geometry and project_root() / p.geometry
    own = OwnScan.read(path, p.image_size, p.pixel_mm, about=about, placed=p.placed, units=p.units)
    if not own.calibrated:
        raise ValueError(
            f"{path.name}: its factors are not calibrated (units: counts), and the prior knows kBq/mL; calibrate them, "
            "or reconstruct it with `companion.reconstruction.pet`, which needs no units"
        )
    if p.result_units == "SUV":
        own.kbq_per_suv()
    return Cases([Level(path.stem, own.scan.y.sum().item() / len(own.scan.y), own.scan)], None, validation, own)


# ------------------------------------------------------------------------------------------------------------ the study


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
    trusts: dict[str, list[trust_counts.Trust]] = field(default_factory=dict)


def study(
    p: Enhance,
    levels: Sequence[Level],
    people: Slices | None,
    validation: Slices,
    prior: Prior,
    network: Network | None,
    progress: bool = True,
    beam: ParallelBeam | None = None,
) -> Study:
    """Every method's images at every level, scored where the truth is known (`people` not None).

    beam: the lines of the scans, in which validation people are scanned too; by default those of `scanner`.
    """
    found = Study()
    for level in tqdm(levels, desc="doses", disable=not progress):
        seeds = [p.seed + 5000 + i for i in range(len(validation.image))]
        other = p.acquire(validation.image, validation.mu, level.counts, seeds, pixel_mm=validation.pixel_mm, beam=beam)
        images, tuned = classical(level.scan, other)
        spread, stated = {}, {}
        if network is not None:
            learned, tuned[ANCHORED], variance = enhanced(network, level.scan, other, p.seed)
            images |= learned
            if people is not None and hasattr(network.D, "moments"):
                stated = {GUESS: (variance.sum() / (images[GUESS] - people.image).square().sum()).item()}
        result = posterior(prior, level.scan, p, p.seed)
        images |= {MEAN: result.mean, ONE: result.x[0]}
        spread[MEAN], found.bills["posterior"], found.draws[level.name] = result.x, result.bill, result.x
        for name in p.samplers if level.fraction else ():
            guided = posterior(prior, level.scan, p, p.seed, name)
            images[f"{name}, mean"], spread[f"{name}, mean"] = guided.mean, guided.x
            found.bills[name] = guided.bill
        if people is None and p.general:
            done = study_trusted(p, prior, level.scan, tuned["MAP"])
            images[TRUSTED], found.draws[level.name], found.trusts[level.name] = done.image, done.x, done.trusts
        found.tuned[level.name], found.images[level.name] = tuned, images
        if people is not None:
            about = {"level": level.name, "counts": round(level.counts)}
            found.rows += [about | row for name, x in images.items() for row in rows_of(name, x, people)]
            found.regions += [about | row for row in region_rows(images, people, level.scan)]
            found.calibration.append(
                about | {n: metrics.pooled_calibration(x, people.image) for n, x in spread.items()} | stated
            )
    return found


def study_trusted(p: Enhance, prior: Prior, scan: Scan, strength: float) -> trust_counts.Trusted:
    """Each scan as its own counts ask: by `prior`, by that of any head with either of its errors, or by MAP.

    The trial sees two thirds of the counts, in few and short draws; see `reconstruction.trust_counts`.
    """
    errors = load_errors(p.general)
    priors = {f"{p.general} ({kind})": Prior.known(p.general, e, p.device, p.autocast) for kind, e in errors.items()}
    priors[p.prior] = prior

    def drawer(one: Prior, sampler: Sampler) -> trust_counts.Draw:
        return lambda part, scale: posterior(one.times(scale), part, sampler, p.seed)

    def by_map(part: Scan) -> Tensor:
        return METHODS["MAP"](part.y, part.A, part.background, strength)

    short = Sampler(min(3, p.draws), min(12, p.evaluations), p.last_noise)
    trusts = trust_counts.assess(scan, {n: drawer(one, short) for n, one in priors.items()}, by_map, seed=p.seed)
    return trust_counts.reconstruct(scan, trusts, {n: drawer(one, p) for n, one in priors.items()}, by_map)


def classical(scan: Scan, validation: Scan) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The images of all methods without a network by name, and the setting that each was tuned to."""
    tuned = {name: tune(name, validation.y, validation.A, validation.background, validation.x) for name in METHODS}
    images = {name: METHODS[name](scan.y, scan.A, scan.background, setting) for name, setting in tuned.items()}
    if scan.x is not None:
        images[ORACLE] = oracle_stop(scan.y, scan.A, scan.background, scan.x)
    return images, tuned


def enhanced(network: Network, scan: Scan, validation: Scan, seed: int = 0) -> tuple[dict[str, Tensor], float, Tensor]:
    """What a conditional network makes of a scan, alone and with the likelihood; the trust tuned; its variance."""
    guess, other = network.guess(scan, seed), network.guess(validation, seed)
    errors = {t: metrics.nrmse(with_likelihood(other, validation, t), validation.x).mean().item() for t in TRUSTS}
    trust = min(errors, key=errors.get)
    return {GUESS: guess[0], ANCHORED: with_likelihood(guess, scan, trust)}, trust, guess[1]


def rows_of(name: str, x: Tensor, people: Slices) -> list[dict]:
    """A row of plain numbers for each slice of one method's images."""
    figures = score(x, people)
    return [
        {"method": name, "person": int(people.subject[i])} | {key: values[i].item() for key, values in figures.items()}
        for i in range(len(x))
    ]


def region_rows(images: Mapping[str, Tensor], people: Slices, scan: Scan) -> list[dict]:
    """The bias of each tissue's mean, a row for each method, kind of anatomical maps, and slice."""
    shares, labels, rows = tissue_shares(people), healthy(people), []
    for name in ("MLEM", "MAP", MEAN):
        for kind, change in MAPS.items():
            x = images[name]
            x = x if change is None else regional(x, scan.y, scan.A, scan.background, change(shares))
            bias = metrics.region_bias(x, people.image, labels, tuple(TISSUES.values()))
            rows += [
                {"method": name, "maps": kind, "person": int(people.subject[i])}
                | dict(zip(TISSUES, b.tolist(), strict=True))
                for i, b in enumerate(bias)
            ]
    return rows


# ----------------------------------------------------------------------------------------------------------- the tables


def table(rows: Sequence[Mapping], level: str, versus: str = MEAN) -> list[dict]:
    """One line per method at a level: means over people and their standard errors.

    "gain": by how much the NRMSE of `versus` is lower on the same people, in per cent of the method's.
    """
    methods = grouped([row for row in rows if row["level"] == level], "method")
    ours, lines = column(methods[versus], "NRMSE", torch.float64), []
    for name, mine in methods.items():
        values = {key: column(mine, key, torch.float64) for key in mine[0] if key not in ("level", "method")}
        lines.append(
            {
                "method": name,
                "NRMSE": mean_and_error(values["NRMSE"]),
                "gain (%)": mean_and_error(100 * (1 - ours / values["NRMSE"])),
                "PSNR (dB)": mean_and_error(values["PSNR"]),
                "SSIM": mean_and_error(values["SSIM"]),
                **{f"{k} (%)": mean_and_error(100 * v) for k, v in values.items() if k.startswith(("bias", "noise"))},
                "lesion recovery": mean_and_error(values["recovery"]),
            }
        )
    return lines


def region_table(rows: Sequence[Mapping], level: str) -> list[dict]:
    """The bias of tissue means at a level, %: mean and standard error, a line for each method and maps."""
    groups = grouped([row for row in rows if row["level"] == level], "method", "maps")
    return [
        {"method": method, "anatomical maps": maps}
        | {f"bias, {t} (%)": mean_and_error(column([{t: 100 * r[t]} for r in mine], t, torch.float64)) for t in TISSUES}
        for (method, maps), mine in groups.items()
    ]


def curves(rows: Sequence[Mapping], methods: Sequence[str], figure: str = "NRMSE") -> dict[str, tuple]:
    """For each method (counts, mean of a figure, its standard error), as `figures.curves` takes them."""
    lines = {}
    for name in methods:
        groups = grouped([row for row in rows if row["method"] == name], "counts")
        if groups:
            pairs = [mean_and_error(column(mine, figure, torch.float64)) for _, mine in sorted(groups.items())]
            lines[name] = (sorted(groups), [a for a, _ in pairs], [b for _, b in pairs])
    return lines


def same_quality(rows: Sequence[Mapping], method: str, versus: str = MEAN) -> list[dict]:
    """How many counts `versus` needs for the NRMSE that a method has at each level, and how many times fewer.

    By interpolation of log NRMSE over log counts; None below the lowest level that was measured.
    """
    (counts, ours, _), (_, theirs, _) = (curves(rows, [name])[name] for name in (versus, method))
    x, y = np.log(counts), np.log(ours)
    lines = []
    for n, error in zip(counts, theirs, strict=True):
        reached = y.min() <= np.log(error) <= y.max()
        needed = float(np.exp(np.interp(np.log(error), y[::-1], x[::-1]))) if reached else None
        lines.append(
            {
                "counts": n,
                f"NRMSE of {method}": error,
                f"counts for it with {versus}": needed and round(needed),
                "times fewer": needed and n / needed,
            }
        )
    return lines


def linearity(images: Mapping[str, Mapping[str, Tensor]], people: Slices, methods: Sequence[str]) -> list[dict]:
    """`count_linearity` of methods over all levels."""
    return count_linearity({name: [level[name] for level in images.values()] for name in methods}, people)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error of the values that are not NaN; the error of a single one is NaN."""
    cell = average(values)
    return cell if isinstance(cell, tuple) else (cell, float("nan"))
