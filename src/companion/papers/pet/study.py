"""The study of 4_enhance: all methods at all doses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from tqdm.auto import tqdm

from companion.acquisition.doses import Doses, Level, ladder
from companion.acquisition.own_pet import OwnScan, Placing, check_pixels
from companion.acquisition.pet import Physics
from companion.data.pet import FIELD_MM, Slices, held_out
from companion.diffusion.sampling import Bill
from companion.evaluation import metrics
from companion.evaluation.doses import MEAN, ONE, TRUSTED, rows_of
from companion.evaluation.intervals import LEAST_SLICES, Drawn, interval_table
from companion.files import project_root
from companion.models import checkpoint
from companion.operators.pet import ParallelBeam
from companion.parameters import Parameters, param
from companion.reconstruction import trust_counts
from companion.reconstruction.activity import (
    ANCHORED,
    GUESS,
    GUIDED,
    HEADS,
    NETWORK,
    PRIOR,
    WITH_MR,
    Network,
    Prior,
    Sampler,
    classical,
    enhanced,
    leaning,
    posterior,
    trusted,
)
from companion.reconstruction.misfit import Misfit, misfit
from companion.reconstruction.regions import region_rows


@dataclass(frozen=True)
class Enhance(Doses, Physics, Sampler, Placing, Parameters):
    """Parameters of pet/4_enhance.ipynb."""

    scan: str | None = param(
        None, "your own counts: .npz, .json or .hs, see `data.sinograms`; none: held-out people, simulated"
    )
    mr: str | None = param(
        None, "of your own scan: an MR of the same person, registered to the result; none: do without"
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
    calibration_subjects: int = param(
        12, "further validation people whose draws make 90 % intervals conformal, 9 or more; 0: none", minimum=0
    )
    samplers: tuple[str, ...] = param(
        (), "other samplers to compare at the levels of `fractions`", choices=tuple(GUIDED)
    )
    autocast: str | None = param("auto", "number format inside the networks", choices=("auto", "bfloat16", None))


@dataclass(frozen=True, eq=False)
class Cases:
    """What is reconstructed: scans at each dose, and whose they are.

    people: None of your own scan, which `own` is then. validation: people that every method is tuned on, all virtual,
    one slice each with a lesion in it. calibration: further such people, None where there are to be none. beam: the
    lines of all scans. misfit: of your own scan, how far its model explains its counts.
    """

    levels: list[Level]
    people: Slices | None
    validation: Slices
    own: OwnScan | None = None
    calibration: Slices | None = None
    misfit: Misfit | None = None

    @property
    def beam(self) -> ParallelBeam | None:
        """The lines of one's own scan; None: those of `scanner`."""
        return self.own and self.own.beam


def prepare(p: Enhance) -> Cases:
    """The scans to reconstruct.

    Raises ValueError where the weights are of other pixels, or a scan cannot be used, as where no image explains it.
    """
    pixel_mm = FIELD_MM / p.image_size if p.pixel_mm is None else p.pixel_mm
    for name, default in ((p.prior, PRIOR), (p.network, NETWORK)):
        if name and (stated := checkpoint.find(name, default).config.get("data", {}).get("pixel_mm")):
            check_pixels(stated, pixel_mm, name)
    if 0 < p.calibration_subjects < LEAST_SLICES:
        raise ValueError(
            f"calibration_subjects={p.calibration_subjects}: 90 % intervals take {LEAST_SLICES}, or give 0"
        )
    shown = {"image_size": p.image_size, "lesions": 1, "pixel_mm": pixel_mm}
    validation = held_out("validation", p.validation_subjects, **shown)
    if not p.scan:
        people, count = held_out("test", p.subjects, **shown), p.calibration_subjects
        further = held_out("validation", count, first=p.validation_subjects, **shown) if count else None
        return Cases(ladder(people, p, p, p.seed), people, validation, calibration=further)
    path, about = project_root() / p.scan, p.geometry and project_root() / p.geometry
    own = OwnScan.read(path, p.image_size, p.pixel_mm, about=about, placed=p.placed, units=p.units)
    if not own.calibrated:
        raise ValueError(
            f"{path.name}: its factors are not calibrated (units: counts), and the prior knows kBq/mL; calibrate them, "
            "or reconstruct it with `companion.reconstruction.pet`, which needs no units"
        )
    if p.result_units == "SUV":
        own.kbq_per_suv()
    if p.mr:
        own = own.with_mr(project_root() / p.mr)
    found = misfit(own.scan, p.seed)
    found.check(path.name)
    level = Level(path.stem, own.scan.y.sum().item() / len(own.scan.y), own.scan)
    return Cases([level], None, validation, own, misfit=found)


@dataclass(eq=False)
class Study:
    """What came out: `rows`, one for each level, method and person; images (slice, 1, y, x) and draws of each level.

    regions: the same for the tissues' means with anatomical maps of every kind, see `regional`.
    """

    rows: list[dict] = field(default_factory=list)
    regions: list[dict] = field(default_factory=list)
    calibration: list[dict] = field(default_factory=list)
    intervals: dict[str, list[dict]] = field(default_factory=dict)
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
    calibration: Slices | None = None,
) -> Study:
    """Every method's images at every level, scored where the truth is known (`people` not None).

    beam: the lines of the scans, in which validation people are scanned too; by default those of `scanner`. Where your
    own scan has an MR, MAP guided by it is as strong as the counts themselves ask for, and the result may lean on it.
    calibration: people whose draws make intervals conformal, at the levels of `fractions`.
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
        if people is None:
            by_map, strength = leaning(level.scan, tuned["MAP"], p.seed)
            if level.scan.mr is not None:
                images[WITH_MR], tuned[WITH_MR] = by_map(level.scan), strength
            if p.general:
                others = Prior.every(p.general, level.scan.mr is not None, p.device, p.autocast)
                done = trusted(others | {p.prior: prior}, level.scan, by_map, p, p.seed)
                images[TRUSTED], found.draws[level.name], found.trusts[level.name] = done.image, done.x, done.trusts
        if people is not None and calibration is not None and level.fraction:
            tested = Drawn(people.image, result.x, people.labels > 0)
            found.intervals[level.name] = interval_table(
                drawn(prior, calibration, level.counts, p, p, p.seed + 7000, beam), tested
            )
        found.tuned[level.name], found.images[level.name] = tuned, images
        if people is not None:
            about = {"level": level.name, "counts": round(level.counts)}
            found.rows += [about | row for name, x in images.items() for row in rows_of(name, x, people)]
            found.regions += [about | row for row in region_rows(images, people, level.scan)]
            found.calibration.append(
                about | {n: metrics.pooled_calibration(x, people.image) for n, x in spread.items()} | stated
            )
    return found


def drawn(
    prior: Prior,
    people: Slices,
    counts: float,
    physics: Physics,
    sampler: Sampler,
    seed: int = 0,
    beam: ParallelBeam | None = None,
) -> Drawn:
    """Posterior draws of people who are scanned with so many true counts, to calibrate intervals on."""
    seeds = [seed + i for i in range(len(people.image))]
    scan = physics.acquire(people.image, people.mu, counts, seeds, pixel_mm=people.pixel_mm, beam=beam)
    return Drawn(people.image, posterior(prior, scan, sampler, seed).x, people.labels > 0)
