"""PET dose enhancement with EDM diffusion: scans of activity, data preparation, training, export.

The system of Cecchini 2023 on the preconditioning of Karras et al. 2022 (arXiv 2206.00364), made quantitative. Activity
is in kBq/mL from the phantom to the posterior; a network sees activity / SCALE_KBQ, one constant for everybody, so that
no image is ever divided by its own maximum.

What samplers and reconstructions need:

    scan = acquire(x, mu, counts, seeds, pixel_mm=3.5)     # y ~ Poisson(A x + background), A calibrated to counts
    cond = condition(scan, iterations, scale_kbq)          # (batch, iterate + 1, y, x): what pet/enhance is given
    people = held_out("test", 8)                           # slices of people who were not trained on, with labels

Checkpoints: `pet/prior`, unconditional, and `pet/enhance`, activity given a scan of any dose. Both say under "data" in
their config: `scale_kbq`, the kBq/mL that are 1 for the network; `pixel_mm`; `pet/enhance` also `iterations`, the MLEM
iterates in its condition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from companion.acquisition.pet import FIELD_MM, Scan, acquire, iterates, mean_sensitivity
from companion.data import anatomy
from companion.data import pet as cohort
from companion.data.store import Prepared, open_dataset, write_dataset
from companion.evaluation import metrics
from companion.files import project_root
from companion.operators.counts import poisson_counts, thin
from companion.parameters import Parameters, param

PEOPLE = "virtual cohort of companion.data.pet (ICBM 152), FDG-like axial slices"


def held_out(split: str, subjects: int, image_size: int = 64, per_subject: int = 1, lesions: int = 0) -> cohort.Slices:
    """Return slices of the first people of "validation" or "test" in the geometry of the embedded weights.

    With one slice each, the slices of successive people sweep the slab, so that few people show all of it.
    """
    pixel_mm = FIELD_MM / image_size
    if per_subject > 1 or subjects == 1:
        return cohort.cohort_slices(split, subjects, image_size, per_subject, lesions, pixel_mm)
    low, high = anatomy.SLAB_MM
    parts = []
    for i, subject in enumerate(anatomy.cohort(split, subjects)):
        height = torch.tensor([low + (high - low) * (i + 0.5) / subjects])
        found = cohort.place_lesions(subject, lesions, height) if lesions else []
        one = cohort.render(subject, (1, image_size, image_size), pixel_mm, height, found)
        parts.append(
            (
                one.slices(),
                one.slices("labels"),
                one.slices("lesions"),
                one.slices("mu"),
                torch.tensor([subject.seed]),
                height,
            )
        )
    return cohort.Slices(*(torch.cat(column) for column in zip(*parts, strict=True)), pixel_mm=pixel_mm)


# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class PrepareData(Parameters):
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
    attenuation: bool = param(True, "the head attenuates, and the model of the scan knows")
    fwhm_mm: float = param(0.0, "resolution of the scanner, known to the model", minimum=0)
    randoms: float = param(0.0, "of the true counts", minimum=0)
    scatter: float = param(0.0, "of the true counts", minimum=0)
    classes: int = param(8, "class labels: the height of a slice, in so many steps", minimum=1)
    held_out_share: float = param(0.1, "of the subjects of files, kept for tests", minimum=0, maximum=1)


@dataclass(frozen=True)
class Person:
    """What a source gives of one subject: image (slice, 1, y, x), mu or none, and its place (slice,) from 0 to 1."""

    name: str
    image: Tensor
    mu: Tensor | None
    place: Tensor
    pixel_mm: float


def people(p: PrepareData) -> Iterator[Person]:
    """Yield the subjects of the source one by one; activity in kBq/mL, or relative for the published phantoms."""
    path = project_root() / p.source
    if p.source == "cohort":
        low, high = anatomy.SLAB_MM
        for i in range(p.subjects):
            s = cohort.cohort_slices(
                "train",
                1,
                p.image_size,
                p.slices_per_subject,
                p.lesions,
                FIELD_MM / p.image_size,
                p.lesion_share,
                first=i,
            )
            yield Person(str(int(s.subject[0])), s.image, s.mu, (s.height_mm - low) / (high - low), s.pixel_mm)
    elif path.suffix == ".npz":
        for i, volume in enumerate(cohort.load_phantoms(path)[: p.subjects]):
            yield _chosen(str(i), cohort.Activity(volume[:, 0], FIELD_MM / volume.shape[-1], np.eye(4)), p)
    elif path.is_dir():
        files = [f for f in sorted(path.iterdir()) if f.name.endswith(tuple(_READERS))]
        if not files:
            raise ValueError(f"{p.source} holds no {', '.join(_READERS)} files; give a folder that does")
        for file in files[: p.subjects]:
            read = next(r for ending, r in _READERS.items() if file.name.endswith(ending))
            yield _chosen(file.name, read(file, p), p)
    else:
        raise FileNotFoundError(f"{p.source} is neither a phantoms .npz nor a folder; give one, or source: cohort")


def _brainweb(file: Path, p: PrepareData) -> cohort.Activity:
    return cohort.activity_from_labels(cohort.load_brainweb(file), p.image_size)


_READERS = {
    ".mnc": _brainweb,
    ".mnc.gz": _brainweb,
    ".raws": _brainweb,
    ".raws.gz": _brainweb,
    ".rawb": _brainweb,
    ".rawb.gz": _brainweb,
    ".nii": lambda file, p: cohort.load_activity(file),
    ".nii.gz": lambda file, p: cohort.load_activity(file),
}


def _chosen(name: str, a: cohort.Activity, p: PrepareData) -> Person:
    """Evenly spaced slices that are not empty, brought to the wanted size by averaging."""
    filled = torch.nonzero(a.image.flatten(1).sum(1) > 0)[:, 0]
    at = filled[torch.linspace(0, len(filled) - 1, min(p.slices_per_subject, len(filled))).round().long()]

    side = max(a.image.shape[-2:])
    shares = _area_shares(side, p.image_size)

    def resized(stack: Tensor | None) -> Tensor | None:
        if stack is None:
            return None
        x = stack[at][:, None]
        height, width = x.shape[-2:]
        low, left = (side - height) // 2, (side - width) // 2
        x = F.pad(x, (left, side - width - left, low, side - height - low))
        return shares @ x @ shares.T

    mm = a.pixel_mm * side / p.image_size
    return Person(name, resized(a.image), resized(a.mu), at / max(1, len(a.image) - 1), mm)


def _area_shares(n: int, size: int) -> Tensor:
    """What each of n pixels contributes to the mean over each of `size` larger or smaller ones, (size, n)."""
    old, new = torch.arange(n + 1) / n, torch.arange(size + 1) / size
    low, high = torch.maximum(old[:-1], new[:-1, None]), torch.minimum(old[1:], new[1:, None])
    return (high - low).clamp(min=0) * size


def prepare(p: PrepareData, progress: bool = True) -> Prepared:
    """Return the prepared slices, made and stored once as HDF5; arrays (subject, slice, ...).

    activity (1, y, x) and mlem (iterate, y, x) of a scan of its own dose; sensitivity, its `mean_sensitivity`; counts
    that it measured; label, the class of its height. With a fraction below 1 also high (1, y, x), the last iterate of
    the full dose. Images are in kBq/mL (or relative, as the source). attrs: parameters, pixel_mm, rms of the activity.
    Raises FileNotFoundError or ValueError for a source that cannot be used, and ValueError when `p.data` was prepared
    with other parameters.
    """
    path = project_root() / p.data
    wanted = {
        name: list(v) if isinstance(v := getattr(p, name), tuple) else v
        for name in PrepareData.__dataclass_fields__
        if name not in ("data", "device", "out")
    }
    if not path.exists():
        names, rows, pixel_mm = [], [], set()
        for person in tqdm(people(p), "subjects", total=p.subjects, disable=not progress):
            rows.append(scanned(person, p, len(names)))
            names.append(person.name)
            pixel_mm.add(round(person.pixel_mm, 4))
        if len({len(row["label"]) for row in rows}) > 1:
            raise ValueError(
                f"subjects have {sorted({len(r['label']) for r in rows})} slices with activity; lower "
                "slices_per_subject to the smallest"
            )
        if len(pixel_mm) > 1:
            raise ValueError(f"pixels of {sorted(pixel_mm)} mm in one folder; resample them to one size first")
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        tests = round(p.held_out_share * len(names)) if p.source != "cohort" else 0
        activity = "relative" if p.source.endswith(".npz") else "kBq/mL"
        units = {
            "activity": activity,
            "mlem": activity,
            "high": activity,
            "counts": "1",
            "label": "1",
            "sensitivity": f"1/({activity})",
        }
        write_dataset(
            path,
            arrays,
            units={n: units[n] for n in arrays},
            scale=dict.fromkeys(arrays, 1.0),
            seed=p.seed,
            source=PEOPLE if p.source == "cohort" else Path(p.source).name,
            subjects=names,
            split={"train": names[: len(names) - tests], "test": names[len(names) - tests :]},
            attrs={
                "parameters": wanted,
                "pixel_mm": pixel_mm.pop(),
                "rms": math.sqrt(np.square(arrays["activity"], dtype=np.float64).mean()),
            },
        )
    prepared = open_dataset(path, require=["activity", "mlem", "sensitivity"])
    made = prepared.attrs.get("parameters", {})
    if made != wanted:
        other = ", ".join(f"{k} = {made.get(k)} (now {v})" for k, v in wanted.items() if made.get(k) != v)
        raise ValueError(f"{path} was prepared with {other}; delete the file, or give another data file")
    return prepared


def scanned(person: Person, p: PrepareData, number: int) -> dict[str, np.ndarray]:
    """Return the arrays that `prepare` stores of one subject, its scans simulated and reconstructed."""
    seeds = [(p.seed * 10**6 + number) * 1000 + i for i in range(len(person.image))]
    low, high = math.log(p.counts[0]), math.log(p.counts[-1])
    where = torch.rand(len(seeds), generator=torch.Generator().manual_seed(seeds[0]), dtype=torch.float64)
    full = acquire(
        person.image,
        person.mu if p.attenuation else None,
        (low + (high - low) * where).exp(),
        seeds,
        pixel_mm=person.pixel_mm,
        fwhm_mm=p.fwhm_mm,
        randoms=p.randoms,
        scatter=p.scatter,
    )
    scan = full if p.fraction == 1 else full.thinned(p.fraction, seeds)
    arrays = {
        "activity": person.image,
        "mlem": iterates(scan, p.iterations),
        "counts": scan.y.flatten(1).sum(1),
        "sensitivity": mean_sensitivity(scan.A),
        "label": (person.place * p.classes).long().clamp(0, p.classes - 1),
    }
    if p.fraction < 1:
        arrays["high"] = iterates(full, p.iterations[-1:])
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
    """Return the NRMSE of each MLEM iterate at each number of counts, mean and standard error over slices."""
    return [
        {"counts": f"{total:.3g}"}
        | {
            f"{k} iterations": metrics.mean_and_error(metrics.nrmse(images[:, i : i + 1], scan.x))
            for i, k in enumerate(iterations)
        }
        for total, (scan, images) in ladder.items()
    ]


def maximum_table(ladder: dict[float, tuple[Scan, Tensor]]) -> list[dict[str, object]]:
    """Return what dividing each image by its own maximum, as published, does to activity: mean and standard error.

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
    """Return mean and variance of thinned counts over their expectation, over bins and repeats: 1 and 1 if Poisson."""
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
