"""Slices of activity and their scans at doses of their own, prepared once.

The system of Cecchini 2023 on the preconditioning of Karras et al. 2022 (arXiv 2206.00364), made quantitative: scans
are those of `companion.acquisition.pet`, in kBq/mL from the phantom to the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from companion.acquisition.pet import FIELD_MM, Physics, Scan, acquire, mean_sensitivity
from companion.data import anatomy
from companion.data import pet as cohort
from companion.data.activity_maps import Person, read_people
from companion.data.intake.splits import split_people, split_table
from companion.data.rows import Rows
from companion.data.store import Prepared, prepare_once
from companion.evaluation import metrics
from companion.files import project_root
from companion.operators.counts import poisson_counts, thin
from companion.parameters import Parameters, param
from companion.reconstruction.condition import iterates

PEOPLE = "virtual cohort of companion.data.pet (ICBM 152), FDG-like axial slices"


@dataclass(frozen=True)
class Protocol(Physics):
    """The part of a form that says how each slice is scanned, at a dose of its own, and reconstructed."""

    counts: tuple[float, ...] = param(
        (2e3, 2e6), "true counts of a slice at full dose: one number, or a range", minimum=1
    )
    fraction: float = param(
        1.0,
        "of the counts that the low-dose scan keeps; below 1 the full dose is kept as a target too",
        minimum=1e-4,
        maximum=1,
    )
    iterations: tuple[int, ...] = param((5, 15, 50), "MLEM iterates of the low dose to learn from", minimum=1)
    fwhm_mm: float = param(0.0, "resolution of the scanner, known to the model", minimum=0)


@dataclass(frozen=True)
class PrepareData(Protocol, Parameters):
    """Parameters of pet/1_data.ipynb."""

    source: str = param(
        "cohort",
        "cohort: the embedded FDG-like people; else a phantoms .npz as published, or a "
        "folder of BrainWeb (.mnc, .raws) or NIfTI activity files",
    )
    data: str = param("data/pet_64.h5", "where the prepared slices go; kept when it is there already")
    image_size: int = param(64, "pixels along y and x", minimum=16)
    subjects: int = param(1400, "virtual people, or at most so many of the source", minimum=1)
    slices_per_subject: int = param(8, "axial slices of each", minimum=1)
    lesions: int = param(3, "of each virtual person who has any", minimum=0)
    lesion_share: float = param(0.5, "of the virtual people who have lesions", minimum=0, maximum=1)
    classes: int = param(8, "class labels: the height of a slice, in so many steps", minimum=1)
    held_out_share: float = param(0.1, "of the subjects of files, kept for tests", minimum=0, maximum=1)
    units: str | None = param(
        None,
        "of the activity in NIfTI files that do not say it; none: such files are left out",
        choices=("kBq/mL", "Bq/mL", "MBq/mL", "SUV", "relative", None),
    )
    kbq_per_suv: float | None = param(
        None, "of files in SUV: injected dose at the time of the scan over body weight, MBq/kg", minimum=1e-6
    )
    people: str | None = param(None, "of files: table (CSV, TSV) with file, subject, session, split; none: by names")


def prepare(p: PrepareData, progress: bool = True) -> Prepared:
    """The prepared slices, made and stored once as HDF5; arrays (subject, slice, ...).

    activity (1, y, x) and mlem (iterate, y, x) of a scan of its own dose; sensitivity, its `mean_sensitivity`; counts
    that it measured; label, the class of its height. With a fraction below 1 also high (1, y, x), the last iterate of
    the full dose. Images are in kBq/mL (or relative, as the source). attrs: parameters, pixel_mm, rms of the activity.
    Raises FileNotFoundError or ValueError for a source that cannot be used, and ValueError when `p.data` was prepared
    with other parameters.
    """
    path = project_root() / p.source

    def make() -> dict:
        skipped: dict[str, str] = {}
        if p.source == "cohort":
            people = virtual_people(p.subjects, p.slices_per_subject, p.image_size, p.lesions, p.lesion_share)
        else:
            table = p.people and project_root() / p.people
            people = read_people(
                path, p.subjects, p.slices_per_subject, p.image_size, table, skipped, p.units, p.kbq_per_suv
            )
        names, arrays, pixel_mm, whose, given = [], {}, set(), {}, {}
        for person in tqdm(people, "subjects", total=p.subjects, disable=not progress):
            for name, row in scanned(person, p, p.classes, p.seed * 10**6 + len(names)).items():
                arrays.setdefault(name, Rows((project_root() / p.data).parent)).append(row)
            names.append(person.name)
            whose[person.name] = person.who or person.name
            given |= {person.who: person.part} if person.part else {}
            pixel_mm.add(round(person.pixel_mm, 4))
        if not names:
            told = "".join(f"\n  {name}: {why}" for name, why in skipped.items())
            raise ValueError(f"no file of {p.source} can be used:{told}")
        if len(pixel_mm) > 1:
            raise ValueError(f"pixels of {sorted(pixel_mm)} mm in one folder; resample them to one size first")
        share = p.held_out_share if p.source != "cohort" else 0.0
        split = split_people(whose.values(), (1 - share, 0.0, share), p.seed, given)
        if progress and share:
            print(split_table(split, {who: [n for n in names if whose[n] == who] for who in whose.values()}))
        activity = "relative" if path.suffix == ".npz" or p.units == "relative" else "kBq/mL"
        units = {"counts": "1", "label": "1", "sensitivity": f"1/({activity})"}
        return {
            "arrays": arrays,
            "units": {name: units.get(name, activity) for name in arrays},
            "scale": dict.fromkeys(arrays, 1.0),
            "seed": p.seed,
            "source": PEOPLE if p.source == "cohort" else Path(p.source).name,
            "subjects": names,
            "split": {part: [n for n in names if whose[n] in split[part]] for part in ("train", "test")},
            "attrs": {
                "pixel_mm": pixel_mm.pop(),
                "rms": math.sqrt(np.mean([np.square(x, dtype=np.float64).mean() for x in arrays["activity"]])),
                "people": whose,
                "skipped": skipped,
            },
        }

    wanted = p.pick(*(name for name in PrepareData.__dataclass_fields__ if name not in ("data", "device", "out")))
    return prepare_once(project_root() / p.data, wanted, make, ["activity", "mlem", "sensitivity"])


def virtual_people(
    subjects: int, per_subject: int, image_size: int, lesions: int = 0, lesion_share: float = 1.0
) -> Iterator[Person]:
    """Yield training people of the embedded cohort one by one; activity in kBq/mL."""
    low, high = anatomy.SLAB_MM
    for i in range(subjects):
        pixel_mm = FIELD_MM / image_size
        s = cohort.cohort_slices("train", 1, image_size, per_subject, lesions, pixel_mm, lesion_share, first=i)
        yield Person(str(int(s.subject[0])), s.image, s.mu, (s.height_mm - low) / (high - low), s.pixel_mm)


def held_out(
    split: str,
    subjects: int,
    image_size: int = 64,
    per_subject: int = 1,
    lesions: int = 0,
    pixel_mm: float | None = None,
) -> cohort.Slices:
    """Slices of the first people of "validation" or "test", by default FIELD_MM wide as for the embedded weights.

    With one slice each, the slices of successive people sweep the slab, so that few people show all of it.
    """
    pixel_mm = FIELD_MM / image_size if pixel_mm is None else pixel_mm
    if per_subject > 1 or subjects == 1:
        return cohort.cohort_slices(split, subjects, image_size, per_subject, lesions, pixel_mm)
    low, high = anatomy.SLAB_MM
    parts = []
    for i, subject in enumerate(anatomy.cohort(split, subjects)):
        height = torch.tensor([low + (high - low) * (i + 0.5) / subjects])
        found = cohort.place_lesions(subject, lesions, height) if lesions else []
        one = cohort.render(subject, (1, image_size, image_size), pixel_mm, height, found)
        images = (one.slices(name) for name in ("image", "labels", "lesions", "mu"))
        parts.append((*images, torch.tensor([subject.seed]), height))
    return cohort.Slices(*(torch.cat(column) for column in zip(*parts, strict=True)), pixel_mm=pixel_mm)


def scanned(person: Person, protocol: Protocol, classes: int, seed: int) -> dict[str, np.ndarray]:
    """The arrays that `prepare` stores of one subject, its scans simulated and reconstructed."""
    seeds = [seed * 1000 + i for i in range(len(person.image))]
    low, high = math.log(protocol.counts[0]), math.log(protocol.counts[-1])
    where = torch.rand(len(seeds), generator=torch.Generator().manual_seed(seeds[0]), dtype=torch.float64)
    counts = (low + (high - low) * where).exp()
    full = protocol.acquire(person.image, person.mu, counts, seeds, pixel_mm=person.pixel_mm, fwhm_mm=protocol.fwhm_mm)
    scan = full if protocol.fraction == 1 else full.thinned(protocol.fraction, seeds)
    arrays = {
        "activity": person.image,
        "mlem": iterates(scan, protocol.iterations),
        "counts": scan.y.flatten(1).sum(1),
        "sensitivity": mean_sensitivity(scan.A),
        "label": (person.place * classes).long().clamp(0, classes - 1),
    }
    if protocol.fraction < 1:
        arrays["high"] = iterates(full, protocol.iterations[-1:])
    return {name: v.to(torch.uint8 if name == "label" else torch.float32).numpy() for name, v in arrays.items()}


def dose_ladder(
    slices: cohort.Slices, counts: Sequence[float], iterations: Sequence[int], seed: int = 0
) -> dict[float, tuple[Scan, Tensor]]:
    """Return, for each number of true counts, the scans of slices and their MLEM iterates (slice, iterate, y, x)."""
    seeds, ladder = range(seed, seed + len(slices.image)), {}
    for total in counts:
        scan = acquire(slices.image, slices.mu, total, seeds, pixel_mm=slices.pixel_mm)
        ladder[total] = scan, iterates(scan, iterations)
    return ladder


def stopping_table(ladder: dict[float, tuple[Scan, Tensor]], iterations: Sequence[int]) -> list[dict[str, object]]:
    """The NRMSE of each MLEM iterate at each number of counts, mean and standard error over slices."""
    return [
        {"counts": f"{total:.3g}"}
        | {
            f"{k} iterations": metrics.mean_and_error(metrics.nrmse(images[:, i : i + 1], scan.x))
            for i, k in enumerate(iterations)
        }
        for total, (scan, images) in ladder.items()
    ]


def maximum_table(ladder: dict[float, tuple[Scan, Tensor]]) -> list[dict[str, object]]:
    """What dividing each image by its own maximum, as published, does to activity: mean and standard error.

    The level of the head (last iterate, relative to the truth) after the counts give the scale, and after the maximum
    does, the true image being divided by its own maximum too.
    """
    rows = []
    for total, (scan, images) in ladder.items():
        x, truth = images[:, -1:], scan.x
        head = truth > 1
        level = torch.stack([a[m].mean() / b[m].mean() for a, b, m in zip(x, truth, head, strict=True)])
        peaks = truth.flatten(1).amax(1) / x.flatten(1).amax(1)
        rows.append(
            {
                "counts": f"{total:.3g}",
                "level, scale from counts": metrics.mean_and_error(level),
                "level, divided by maxima": metrics.mean_and_error(level * peaks),
            }
        )
    return rows


def thinning_table(scan: Scan, fractions: Sequence[float], repeats: int = 50) -> list[dict[str, object]]:
    """Mean and variance of thinned counts over their expectation, over bins and repeats: 1 and 1 if Poisson."""
    expected, rows = scan.A(scan.x), []
    full = [poisson_counts(expected, [repeat * 1000 + i for i in range(len(expected))]) for repeat in range(repeats)]
    for fraction in fractions:
        y = torch.stack(
            [thin(one, fraction, [repeat * 1000 + i for i in range(len(one))]) for repeat, one in enumerate(full)]
        ).double()
        wanted = fraction * expected.double().sum()
        rows.append(
            {
                "fraction": fraction,
                "mean / expected": (y.mean(0).sum() / wanted).item(),
                "variance / expected": (y.var(0).sum() / wanted).item(),
            }
        )
    return rows
