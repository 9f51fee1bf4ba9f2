"""AID for MRI: multi-coil volumes reconstructed slice by slice, each given the slices before it.

Protocol, honest unless a parameter says otherwise: coil maps come from a calibration scan or the centre lines, never
from fully sampled data; the intensity scale is found, not set; no slice is known beforehand; classical methods are
tuned on other people, scanned as the volume was.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm.auto import tqdm

from companion.acquisition.mri import Protocol, Scan, read_fastmri
from companion.acquisition.virtual_volumes import Cohort, examples, fastmri_files
from companion.data.virtual import volumes
from companion.diffusion.sampling import Bill
from companion.diffusion.sequence import SequenceSamples
from companion.evaluation import metrics
from companion.evaluation.organ import known_to
from companion.files import project_root
from companion.models.checkpoint import describe
from companion.models.errors import load_errors
from companion.models.sequences import EMBEDDED
from companion.parameters import Parameters, param
from companion.reconstruction import mri as baselines
from companion.reconstruction import trusted_sequence
from companion.reconstruction.sequence import Prior, Sampler, csgm, reconstruct, score
from companion.reconstruction.trust import EXTRA, Trust

EMBEDDED_SINGLE, GENERAL = "brain/t1w", "general/2d"  # single-image priors of virtual people, and of anybody
EMBEDDED_HEADS = "aid/heads"  # sequence prior of anybody
KNOWN = (GENERAL, EMBEDDED_HEADS)  # their errors on real heads are kept beside the weights
MODELS = {"AID": "full", "AID, newest slice only": "last", "single image": None}  # name -> context
TRUSTED = {"AID, trusted": "AID", "single image, trusted": "single image"}  # the same as far as the scan trusts it
CSGM = "CSGM-Langevin"
TUNING_SLICES = 3  # of a volume: enough to tune the classical methods on
GRIDS = {  # searched on validation volumes
    "CG-SENSE": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "L1-wavelet": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "TV": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    baselines.BART: (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),  # where `bart` is installed
}


@dataclass(frozen=True)
class Reconstruct(Sampler, Protocol, Parameters):
    """Parameters of aid/4_reconstruct.ipynb."""

    source: str = param("brain", "brain: held-out virtual people; else a fastMRI HDF5 file or a folder of them")
    weights: str | None = param(
        None,
        "sequence prior: an embedded or published name, a folder, hf:owner/name; "
        f"none: {EMBEDDED} for virtual people, {EMBEDDED_HEADS} for scans",
    )
    single: str | None = param(
        None, f"single-image prior to compare with; none: {EMBEDDED_SINGLE} for virtual people, {GENERAL} for scans"
    )
    models: tuple[str, ...] | None = param(
        None,
        f"priors to use; none: {', '.join(MODELS)}; of scans, with priors whose errors are kept beside their weights, "
        "AID and single image as far as the scan trusts them, and AID",
        choices=(*MODELS, *TRUSTED),
    )
    image_size: int = param(64, "pixels along y and x of virtual people", minimum=16)
    frames: int = param(10, "slices of a volume, at most", minimum=1)
    spacing_mm: float = param(3.25, "distance of neighbouring slices of virtual people", minimum=0.1)
    subjects: int = param(2, "volumes to reconstruct", minimum=1)
    validation_subjects: int = param(2, "other volumes, to tune the classical methods", minimum=1)
    coils: int = param(8, "receive coils of virtual people", minimum=1)
    noise_std: float = param(0.01, "k-space noise per real component of virtual people, in image units", minimum=0)
    langevin_steps: int = param(3, "Langevin steps a level of the CSGM baseline; 0 leaves it out", minimum=0)
    classical: bool = param(True, "compare with tuned classical methods too")
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))


@dataclass(frozen=True, eq=False)
class Case:
    """Scans of one matrix and number of coils, and what they need: scans of other people, priors, a cohort to scan."""

    scans: list[Scan]
    validation: list[Scan]
    priors: dict[str, Prior]  # "AID" and "single image"
    people: Cohort


def prepare(p: Reconstruct) -> list[Case]:
    """What `study` works on: a case for each matrix and number of coils among the scans.

    Classical methods are tuned, and the errors of priors measured, on other people scanned or rendered at that matrix.
    Raises FileNotFoundError or ValueError when there is nothing to reconstruct, ValueError where the intensity scale
    can neither be found nor is given, and as `models_of`.
    """
    models_of(p.models, p.weights, p.single, p.source, p.method)  # raises before anything is read
    weights, single = weights_of(p.weights, p.source), single_of(p.single, p.source)
    like = examples(brightness_of(weights, required=p.scale is None), p.spacing_mm)
    people = Cohort(p.image_size, p.spacing_mm, p, like, p.seed)
    if p.source == "brain":
        scans = [people.scan("test", i, p.frames, p.coils, p.noise_std) for i in range(p.subjects)]
    else:
        paths = fastmri_files(project_root() / p.source, p.subjects)
        scans = [read_fastmri(path, p, like, frames=p.frames, seed=p.seed) for path in paths]
    loaded = {
        name: Prior.load(checkpoint, default, p.device, p.autocast)
        for name, checkpoint, default in (("AID", weights, EMBEDDED), ("single image", single, EMBEDDED_SINGLE))
    }
    groups: dict[tuple, list[Scan]] = {}
    for scan in scans:
        groups.setdefault(tuple(scan.y.shape[1:]), []).append(scan)
    cases = []
    for alike in groups.values():
        priors = loaded
        if p.method == "annealed_gibbs":  # the others do not ask how wrong the prior is
            size, voxel = max(alike[0].shape[1:]), alike[0].voxel_mm
            priors = {
                name: prior.known(load_errors(checkpoint), voxel[-1] if voxel else None, known_to(checkpoint))
                if checkpoint in KNOWN
                else measured(prior, size, p.spacing_mm, p.seed)
                for (name, prior), checkpoint in zip(loaded.items(), (weights, single), strict=True)
            }
        others, few = range(100, 100 + p.validation_subjects * p.classical), min(p.frames, TUNING_SLICES)
        if p.source == "brain":
            validation = [people.scan("validation", i, few, p.coils, p.noise_std) for i in others]
        else:
            validation = [people.like_scan(alike[0], i, few) for i in others]
        cases.append(Case(alike, validation, priors, people))
    return cases


def weights_of(weights: str | None, source: str) -> str:
    """The name of the sequence prior, where none is given the one that suits the source."""
    return weights or (EMBEDDED if source == "brain" else EMBEDDED_HEADS)


def single_of(single: str | None, source: str) -> str:
    """The name of the single-image prior, where none is given the one that suits the source."""
    return single or (EMBEDDED_SINGLE if source == "brain" else GENERAL)


def models_of(
    models: tuple[str, ...] | None, weights: str | None, single: str | None, source: str, method: str
) -> tuple[str, ...]:
    """The models, where none are given those that suit the priors.

    Raises ValueError for trusted ones of priors that a scan cannot judge.
    """
    needed = {"AID": weights_of(weights, source), "single image": single_of(single, source)}
    judged = {name for name, prior in needed.items() if prior in KNOWN and method == "annealed_gibbs"}
    if models is None:
        return ("AID, trusted", "AID", "single image, trusted") if len(judged) == len(needed) else tuple(MODELS)
    for name in models:
        if name in TRUSTED and TRUSTED[name] not in judged:
            raise ValueError(
                f"{name!r} needs method annealed_gibbs and a prior whose errors are kept beside its weights, one of "
                f"{', '.join(KNOWN)}; got {method} and {needed[TRUSTED[name]]}: take {TRUSTED[name]!r} instead"
            )
    return models


def measured(prior: Prior, image_size: int, spacing_mm: float, seed: int, people: int = 12) -> Prior:
    """The prior with its errors measured on virtual validation people of a size."""
    x = volumes("brain", "validation", people, prior.frames, image_size, spacing_mm)
    return prior.measured(x, seed)


def brightness_of(weights: str, required: bool = True) -> float:
    """The magnitude that 99 % of the pixels of the prior's training volumes do not exceed; 1 if it need not be known.

    Raises ValueError when the checkpoint does not say so, as published ones do not.
    """
    reference = describe(weights, EMBEDDED)["data"].get("magnitude_q99")
    if reference is None and required:
        raise ValueError(
            f"{weights} does not say how bright its training data are (data.magnitude_q99 in "
            "config.json), so no intensity scale can be found; give scale, or train with aid/2_train"
        )
    return reference or 1.0


@dataclass(frozen=True, eq=False)
class Study:
    """Every estimate of every volume: `rows` is a tidy table, `images` and `draws` hold the first volume's."""

    rows: list[dict]
    images: dict[str, Tensor]  # method -> (frame, 1, y, x)
    draws: dict[str, SequenceSamples]  # model -> draws (draw, frame, 1, y, x)
    bills: dict[str, Bill]  # of one draw of a volume
    calibration: dict[str, float]  # variance of the draws over squared error of their mean, all volumes
    found: dict[str, list[list[Trust]]]  # trusted model -> volume -> what the scan says of the prior, slice by slice
    names: list[str]  # of the volumes

    @property
    def verdicts(self) -> list[dict]:
        """A row for each volume and trusted model: the verdict in words, and its numbers."""
        rows = []
        for model, scans in self.found.items():
            for volume, slices in zip(self.names, scans, strict=True):
                one = trusted_sequence.of_volume(slices)
                row = {"volume": volume, "model": model, "verdict": one.verdict, "chi-square": one.first.score.chi2}
                rows.append(row | {"widening": one.widening**0.5, "shares": [s.share for s in slices]})
        return rows


def study(p: Reconstruct, cases: list[Case], progress: bool = True, keep: Path | None = None) -> Study:
    """The scores of all methods on all scans; a scan without truth is reconstructed and not scored.

    keep: folder for the slices drawn so far, from which the same call goes on after a stop; gone in the end.
    """
    result, spread = Study([], {}, {}, {}, {}, {}, []), {}
    models = models_of(p.models, p.weights, p.single, p.source, p.method)
    setting = {"mask": f"{p.mask}, interleaved" if p.interleave else p.mask, "ACS": p.acs, "R": p.acceleration}
    tuned = [baselines.tune_all([(s.y, s.maps, s.mask, s.x) for s in c.validation], GRIDS) if p.classical else {}
             for c in cases]  # fmt: skip
    todo = [(scan, case.priors, values) for case, values in zip(cases, tuned, strict=True) for scan in case.scans]
    for i, (scan, priors, values) in enumerate(tqdm(todo, desc="volumes", disable=not progress)):
        estimates = baselines.reconstruct_all(scan.y, scan.maps, scan.mask, values)
        seed = p.seed + i * p.draws
        runs = {}
        result.names.append(scan.name)
        for name, prior_name in asked(models, p.langevin_steps).items():
            file = keep and keep / f"{i}-{re.sub(r'[^a-z]+', '-', name.lower())}.safetensors"
            prior = priors[prior_name]
            if name == CSGM:
                runs[name] = csgm(prior, scan, p, p.langevin_steps, seed, file)
            elif name in TRUSTED:
                runs[name], found = trusted_sequence.reconstruct(prior, scan, p, context_of(name), seed, keep=file)
                result.found.setdefault(name, []).append(found)
            else:
                runs[name] = reconstruct(prior, scan, p, MODELS[name], seed, p.scale, keep=file)
        for name, samples in runs.items():
            estimates |= {name: samples.x.mean(0), f"{name}, one draw": samples.x[0]}
            result.bills[name] = samples.bill
            if scan.x is not None:
                terms = metrics.calibration_terms(samples.x.abs(), scan.x.abs(), samples.paired)
                spread.setdefault(name, []).append(terms)
        if i == 0:
            result.images.update(estimates)
            result.draws.update(runs)
        if scan.x is not None:
            about = {"volume": scan.name} | setting | {"exact R": round(scan.mask.acceleration, 3)}
            scores = {method: score(x, scan, p.start == "truth") for method, x in estimates.items()}
            result.rows.extend(about | {"method": method} | values for method, values in scores.items())
    result.calibration.update(
        (name, sum(a for a, _ in terms) / sum(b for _, b in terms)) for name, terms in spread.items()
    )
    if keep is not None:
        shutil.rmtree(keep, ignore_errors=True)
    return result


def asked(models: Iterable[str], langevin_steps: int) -> dict[str, str]:
    """Which prior, "AID" or "single image", each model that a study draws with needs, in the order of the study."""
    wanted = [*(name for name in (*TRUSTED, *MODELS) if name in models), *[CSGM] * (langevin_steps > 0)]
    return {name: "single image" if context_of(name) is None else "AID" for name in wanted}


def context_of(model: str) -> str | None:
    """What a model of `asked` sees of the slices before."""
    return MODELS.get(TRUSTED.get(model, model))


def cost(cases: list[Case], sampler: Sampler, models: Iterable[str], langevin_steps: int) -> list[dict]:
    """A row for each matrix and model: how many evaluations of a network a study takes, and about how many minutes.

    Each network is evaluated once to know, with the context that a late slice has: the first slices, which have less,
    take less. The trial of a trusted model is counted; conjugate gradients and classical images come on top.
    """
    rows = []
    for case in cases:
        slices, scan = sum(len(scan.y) for scan in case.scans), case.scans[0]
        for name, prior_name in asked(models, langevin_steps).items():
            evaluations = sampler.evaluations * (langevin_steps if name == CSGM else 1)
            at_once = sampler.draws if name == CSGM else min(sampler.at_once or sampler.draws, sampler.draws)
            seconds = math.ceil(sampler.draws / at_once) * case.priors[prior_name].seconds(
                at_once, scan.shape, context_of(name) is None
            )
            trials = EXTRA * len(case.scans) * (name in TRUSTED)  # in slices
            about = {"model": name, "matrix": "{} x {}".format(*scan.shape[1:]), "slices": slices}
            about |= {"draws": sampler.draws, "evaluations": evaluations}
            rows.append(about | {"about, minutes": (slices + trials) * evaluations * seconds / 60})
    return rows


def unfolding_scan(people: Cohort, noise_std: float, frame: int = 4, acceleration: int = 2) -> Scan:
    """The single-coil scan of a test person's slices up to `frame`, every second line, with its true coil map."""
    protocol = Protocol(acceleration=acceleration, interleave=False, maps="oracle")
    return replace(people, protocol=protocol).scan("test", 0, frame + 1, 1, noise_std)


@dataclass(frozen=True)
class Grid(Parameters, out="runs/aid/grid_table"):
    """Parameters of aid/5_grid.ipynb."""

    runs: str = param("runs/aid/grid", "folder with a run of 4_reconstruct for each setting")
    methods: tuple[str, ...] = param(
        ("L1-wavelet", "TV", "single image", "AID, newest slice only", "AID"),
        "methods that the figure shows; the table has all",
    )


SETTING = ("mask", "ACS", "R")


def gather(folder: Path) -> list[dict]:
    """The rows of all finished runs of 4_reconstruct below a folder: one tidy table, in the order of settings.

    Raises FileNotFoundError when there is none.
    """
    rows = [row for path in sorted(folder.glob("*/metrics.json")) for row in json.loads(path.read_text())["rows"]]
    if not rows:
        raise FileNotFoundError(f"{folder} holds no finished run of 4_reconstruct; do a grid first (workflow/grids)")
    return sorted(rows, key=lambda row: [row[name] for name in SETTING])
