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
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Generator, Tensor
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from companion import figures, metrics
from companion.augmentation import AugmentPipe
from companion.data import anatomy
from companion.data import pet as cohort
from companion.data.store import Prepared, open_dataset, write_dataset
from companion.diffusion.denoisers import EDMDenoiser
from companion.diffusion.losses import edm_loss
from companion.diffusion.noise import randn
from companion.emission import mlem
from companion.operators.linear import Diagonal, LinearOperator
from companion.operators.pet import (
    ParallelBeam,
    attenuation_factors,
    background,
    emission_model,
    poisson_counts,
    sensitivity,
    thin,
    with_counts,
)
from companion.parameters import Parameters, param, read_yaml
from companion.runs import code_version, project_root
from companion.training import TrainConfig, TrainResult, train
from companion.weights import build, load, save_checkpoint

FIELD_MM = 224.0  # side of the image and width of the scanner's view: heads fit, scalp included
SCALE_KBQ = 25.0  # kBq/mL that are 1 for the network; grey matter is about 22
PEOPLE = "virtual cohort of companion.data.pet (ICBM 152), FDG-like axial slices"
BRIGHTEST = 4.0  # of a condition, in network units: 100 kBq/mL, almost twice the hottest lesion

# ------------------------------------------------------------------------------------------------------------ scans


@dataclass(frozen=True, eq=False)
class Scan:
    """Scans of slices: y ~ Poisson(A x + background). x (slice, 1, y, x) in kBq/mL, y (slice, 1, angle, bin) counts."""

    x: Tensor
    y: Tensor
    A: LinearOperator
    background: Tensor | None = None

    def thinned(self, fraction: float, seeds: Sequence[int]) -> Scan:
        """The scans that `fraction` of the dose would have given: each count is kept with this probability."""
        less = None if self.background is None else fraction * self.background
        return Scan(self.x, thin(self.y, fraction, seeds), fraction * self.A, less)


@lru_cache(maxsize=8)
def _model(shape: tuple[int, ...], pixel_mm: float, fwhm_mm: float) -> LinearOperator:
    return emission_model(ParallelBeam(shape, pixel_mm=pixel_mm), fwhm_mm=fwhm_mm)


def scanner(shape: Sequence[int], pixel_mm: float, mu: Tensor | None = None, fwhm_mm: float = 0.0) -> LinearOperator:
    """Return A of slices (y, x) before calibration: twice as many angles as pixels, as published, and attenuation.

    mu (slice, 1, y, x): attenuation coefficients, 1/mm; none: no attenuation. Tables are made once per geometry.
    """
    A = _model(tuple(shape), float(pixel_mm), float(fwhm_mm))
    if mu is None:
        return A
    P = _model(tuple(shape), float(pixel_mm), 0.0)
    return Diagonal(attenuation_factors(P, mu), A.range_shape) @ A


def acquire(x: Tensor, mu: Tensor | None, counts: float | Tensor, seeds: Sequence[int], *, pixel_mm: float,
            fwhm_mm: float = 0.0, randoms: float = 0.0, scatter: float = 0.0) -> Scan:
    """Return scans of activity x (slice, 1, y, x), each calibrated so that `counts` true counts are expected.

    counts: a number or one per slice. randoms, scatter: as a share of the true counts. An item depends on its own seed
    only. Raises ValueError for slices without activity.
    """
    A = with_counts(scanner(x.shape[-2:], pixel_mm, mu, fwhm_mm), x, counts)
    expected = A(x)
    extra = background(expected, randoms, scatter) if randoms or scatter else None
    return Scan(x, poisson_counts(expected if extra is None else expected + extra, seeds), A, extra)


def iterates(scan: Scan, iterations: Sequence[int]) -> Tensor:
    """Return the MLEM images (slice, iterate, y, x) of a scan after each number of iterations, kBq/mL."""
    kept = {}
    mlem(scan.y, scan.A, scan.background, iterations=max(iterations),
         callback=lambda k, x: kept.update({k: x}) if k in iterations else None)
    return torch.cat([kept[k] for k in iterations], 1)


def mean_sensitivity(A: LinearOperator) -> Tensor:
    """Return the counts that 1 kBq/mL gives in a pixel, mean over pixels, one per slice: what the dose is, in A."""
    return sensitivity(A).mean((-3, -2, -1)).reshape(-1)


def dose_channel(counts_per_kbq: Tensor, scale_kbq: float) -> Tensor:
    """Return the dose as a network sees it, about -0.5 to 0.5 for 2 10^3 to 2 10^6 counts a slice of 64 x 64.

    counts_per_kbq (slice,): `mean_sensitivity`. It is known before anything is measured.
    """
    return ((counts_per_kbq * scale_kbq).log() - 4.15) / 7


def as_condition(images: Tensor, counts_per_kbq: Tensor, scale_kbq: float) -> Tensor:
    """Return conditions (slice, iterate + 1, y, x) of MLEM iterates in kBq/mL: scaled, and a channel with the dose.

    Values are held below BRIGHTEST: iterates of few counts have brighter pixels, all noise.
    """
    dose = dose_channel(counts_per_kbq.to(images), scale_kbq)[:, None, None, None]
    return torch.cat([(images / scale_kbq).clamp(max=BRIGHTEST), dose.expand(-1, 1, *images.shape[-2:])], 1)


def condition(scan: Scan, iterations: Sequence[int], scale_kbq: float = SCALE_KBQ) -> Tensor:
    """Return what a conditional network is given of a scan, (slice, iterate + 1, y, x).

    Its scale comes from the calibration of the scan, counts to kBq/mL, and never from the image.
    """
    counts_per_kbq = mean_sensitivity(scan.A).expand(len(scan.y))
    return as_condition(iterates(scan, iterations), counts_per_kbq, scale_kbq)


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
        parts.append((one.slices(), one.slices("labels"), one.slices("lesions"), one.slices("mu"),
                      torch.tensor([subject.seed]), height))
    return cohort.Slices(*(torch.cat(column) for column in zip(*parts, strict=True)), pixel_mm=pixel_mm)


# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class PrepareData(Parameters):
    """Parameters of pet/1_data.ipynb."""

    source: str = param("cohort", "cohort: the embedded FDG-like people; else a phantoms .npz as published, or a "
                                  "folder of BrainWeb (.mnc, .raws) or NIfTI activity files")
    data: str = param("data/pet_64.h5", "where the prepared slices go; kept when it is there already")
    image_size: int = param(64, "pixels along y and x", minimum=16)
    subjects: int = param(1400, "virtual people, or at most so many of the source", minimum=1)
    slices_per_subject: int = param(8, "axial slices of each", minimum=1)
    lesions: int = param(3, "of each virtual person who has any", minimum=0)
    lesion_share: float = param(0.5, "of the virtual people who have lesions", minimum=0, maximum=1)
    counts: tuple[float, ...] = param((2e3, 2e6), "true counts of a slice at full dose: one number, or a range",
                                      minimum=1)
    fraction: float = param(1.0, "of the counts that the low-dose scan keeps; below 1 the full dose is kept as a "
                                 "target too", minimum=1e-4, maximum=1)
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
            s = cohort.cohort_slices("train", 1, p.image_size, p.slices_per_subject, p.lesions,
                                     FIELD_MM / p.image_size, p.lesion_share, first=i)
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


_READERS = {".mnc": _brainweb, ".mnc.gz": _brainweb, ".raws": _brainweb, ".raws.gz": _brainweb, ".rawb": _brainweb,
            ".rawb.gz": _brainweb, ".nii": lambda file, p: cohort.load_activity(file),
            ".nii.gz": lambda file, p: cohort.load_activity(file)}


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
    wanted = {name: list(v) if isinstance(v := getattr(p, name), tuple) else v
              for name in PrepareData.__dataclass_fields__ if name not in ("data", "device", "out")}
    if not path.exists():
        names, rows, pixel_mm = [], [], set()
        for person in tqdm(people(p), "subjects", total=p.subjects, disable=not progress):
            rows.append(scanned(person, p, len(names)))
            names.append(person.name)
            pixel_mm.add(round(person.pixel_mm, 4))
        if len({len(row["label"]) for row in rows}) > 1:
            raise ValueError(f"subjects have {sorted({len(r['label']) for r in rows})} slices with activity; lower "
                             "slices_per_subject to the smallest")
        if len(pixel_mm) > 1:
            raise ValueError(f"pixels of {sorted(pixel_mm)} mm in one folder; resample them to one size first")
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        tests = round(p.held_out_share * len(names)) if p.source != "cohort" else 0
        activity = "relative" if p.source.endswith(".npz") else "kBq/mL"
        units = {"activity": activity, "mlem": activity, "high": activity, "counts": "1", "label": "1",
                 "sensitivity": f"1/({activity})"}
        write_dataset(path, arrays, units={n: units[n] for n in arrays}, scale=dict.fromkeys(arrays, 1.0), seed=p.seed,
                      source=PEOPLE if p.source == "cohort" else Path(p.source).name, subjects=names,
                      split={"train": names[: len(names) - tests], "test": names[len(names) - tests :]},
                      attrs={"parameters": wanted, "pixel_mm": pixel_mm.pop(),
                             "rms": math.sqrt(np.square(arrays["activity"], dtype=np.float64).mean())})
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
    full = acquire(person.image, person.mu if p.attenuation else None, (low + (high - low) * where).exp(), seeds,
                   pixel_mm=person.pixel_mm, fwhm_mm=p.fwhm_mm, randoms=p.randoms, scatter=p.scatter)
    scan = full if p.fraction == 1 else full.thinned(p.fraction, seeds)
    arrays = {"activity": person.image, "mlem": iterates(scan, p.iterations), "counts": scan.y.flatten(1).sum(1),
              "sensitivity": mean_sensitivity(scan.A),
              "label": (person.place * p.classes).long().clamp(0, p.classes - 1)}
    if p.fraction < 1:
        arrays["high"] = iterates(full, p.iterations[-1:])
    return {name: v.to(torch.uint8 if name == "label" else torch.float32).numpy() for name, v in arrays.items()}


def dose_ladder(slices: cohort.Slices, counts: Sequence[float], iterations: Sequence[int],
                seed: int = 0) -> dict[float, tuple[Scan, Tensor]]:
    """Return, for each number of true counts, the scans of slices and their MLEM iterates (slice, iterate, y, x)."""
    seeds, ladder = range(seed, seed + len(slices.image)), {}
    for total in counts:
        scan = acquire(slices.image, slices.mu, total, seeds, pixel_mm=slices.pixel_mm)
        ladder[total] = scan, iterates(scan, iterations)
    return ladder


def stopping_table(ladder: dict[float, tuple[Scan, Tensor]], iterations: Sequence[int]) -> list[dict[str, object]]:
    """Return the NRMSE of each MLEM iterate at each number of counts, mean and standard error over slices."""
    return [{"counts": f"{total:.3g}"} | {
        f"{k} iterations": metrics.mean_and_error(metrics.nrmse(images[:, i : i + 1], scan.x))
        for i, k in enumerate(iterations)} for total, (scan, images) in ladder.items()]


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
        rows.append({"counts": f"{total:.3g}", "level, scale from counts": metrics.mean_and_error(level),
                     "level, divided by maxima": metrics.mean_and_error(level * peaks)})
    return rows


def thinning_table(scan: Scan, fractions: Sequence[float], repeats: int = 50) -> list[dict[str, object]]:
    """Return mean and variance of thinned counts over their expectation, over bins and repeats: 1 and 1 if Poisson."""
    expected, rows = scan.A(scan.x), []
    full = [poisson_counts(expected, [repeat * 1000 + i for i in range(len(expected))]) for repeat in range(repeats)]
    for fraction in fractions:
        y = torch.stack([thin(one, fraction, [repeat * 1000 + i for i in range(len(one))])
                         for repeat, one in enumerate(full)]).double()
        wanted = fraction * expected.double().sum()
        rows.append({"fraction": fraction, "mean / expected": (y.mean(0).sum() / wanted).item(),
                     "variance / expected": (y.var(0).sum() / wanted).item()})
    return rows


# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class TrainModel(Parameters):
    """Parameters of pet/2_train.ipynb."""

    data: str = param("data/pet_64.h5", "prepared slices, made by 1_data")
    task: str = param("unconditional", "unconditional: a prior; conditional: given the MLEM images of a low-dose scan",
                      choices=("unconditional", "conditional"))
    target: str = param("phantom", "what is learned: phantom, the true activity; high_dose, the MLEM image of the full "
                                   "dose, as published", choices=("phantom", "high_dose"))
    class_labels: bool = param(False, "the network is told the height of a slice")
    label_dropout: float = param(0.1, "of class labels: how often it is not told, for guidance", minimum=0, maximum=1)
    dose_channel: bool = param(True, "of conditional networks: the dose of the scan as one more constant image")
    start_from: str | None = param(None, "checkpoint whose weights to begin with; none: random weights")
    network: str = param("UNet", "UNet: small and fast; EDMUNet: the published one, needed for labels and augmentation",
                         choices=("UNet", "EDMUNet"))
    model_channels: int = param(64, "width of the network", minimum=32)
    channel_mult: tuple[float, ...] = param((1, 2, 2), "relative width of each level, finest first")
    num_res_blocks: int = param(1, "residual blocks a level", minimum=1)
    attention_resolutions: tuple[int, ...] = param((), "strides of the levels with attention; the bottom has it anyway")
    dropout: float = param(0.0, "inside residual blocks", minimum=0, maximum=1)
    patch: int = param(2, "side of the pixel-unshuffle stem (UNet)", minimum=1)
    scale_kbq: float = param(SCALE_KBQ, "kBq/mL that are 1 for the network; one constant for all", minimum=1e-6)
    sigma_data: float | None = param(None, "size of the data for the network; none: measured, their rms", minimum=1e-3)
    variance_weight: float = param(0.05, "weight of the variance channel's likelihood; 0: no such channel, as "
                                         "published", minimum=0)
    P_mean: float = param(-1.4, "mean of ln sigma in training")
    P_std: float = param(1.3, "standard deviation of ln sigma in training", minimum=0)
    mirror: bool = param(True, "mirror slices left to right at random")
    augment: float = param(0.0, "probability of each move of the augmentation pipe (EDMUNet); published: 0.05",
                           minimum=0, maximum=1)
    stretch_label: str = param("double_angle", "how the pipe labels a stretch: unambiguously, or as published",
                               choices=("double_angle", "published"))
    steps: int = param(4800, "optimiser steps", minimum=1)
    batch_size: int = param(16, "slices a step", minimum=1)
    grad_accumulation: int = param(1, "pieces a batch is cut into; processes share them", minimum=1)
    learning_rate: float = param(4e-4, "highest learning rate, after the warm-up; then half a cosine", minimum=0)
    warmup: int = param(200, "steps of linear warm-up", minimum=0)
    clip_norm: float | None = param(1.0, "longer gradients are shortened to it; none: never, as published", minimum=0)
    ema_decay: float = param(0.999, "decay of the averaged weights", minimum=0, maximum=1)
    ema_halflife: float | None = param(None, "of the averaged weights, in slices, ramped up; replaces ema_decay",
                                       minimum=1)
    autocast: str | None = param("bfloat16", "number format inside the network", choices=("bfloat16", None))
    seconds: float | None = param(None, "stop with a checkpoint after this long", minimum=1)
    checkpoint_every: int = param(250, "steps between checkpoints", minimum=1)
    validation_people: int = param(0, "whose errors go to stats.jsonl with every checkpoint (embedded cohort)",
                                   minimum=0)


def model_config(p: TrainModel, prepared: Prepared) -> dict:
    """Return what `weights.build` makes the denoiser from, for prepared slices.

    Raises ValueError for labels or augmentation with a network that cannot be told.
    """
    made, conditional = prepared.attrs["parameters"], p.task == "conditional"
    if p.network == "UNet" and (p.class_labels or p.augment):
        raise ValueError("a UNet cannot be told class labels or augmentation; set network: EDMUNet")
    if p.target == "high_dose" and "high" not in prepared.shapes:
        raise ValueError(f"{prepared.path.name} has no full-dose images to learn; prepare it with a fraction below 1")
    learned_variance = p.variance_weight > 0
    network = {"name": p.network, "in_channels": 1 + conditional * (len(made["iterations"]) + p.dose_channel),
               "model_channels": p.model_channels, "out_channels": 1 + learned_variance,
               "num_res_blocks": p.num_res_blocks, "channel_mult": list(p.channel_mult), "dropout": p.dropout,
               "attention_resolutions": list(p.attention_resolutions)}
    if p.network == "UNet":
        network |= {"num_heads": 4, "use_scale_shift_norm": True, "patch": p.patch}
    elif p.augment:
        network |= {"augment_dim": 9}
    if p.class_labels:
        network |= {"num_classes": made["classes"], "label_dropout": p.label_dropout}
    sigma_data = p.sigma_data or round(prepared.attrs["rms"] / p.scale_kbq, 3)
    denoiser = {"name": "EDMDenoiser", "sigma_data": sigma_data, "learned_variance": learned_variance,
                "cond_scale": round(1 / sigma_data, 3)}
    shape = prepared.shapes["activity"]
    units = prepared.units["activity"]
    data = {"source": prepared.source, "scale": f"1 is {p.scale_kbq:g} {units}, for every image",
            "scale_kbq": p.scale_kbq, "units": units, "task": p.task, "target": p.target,
            "subjects": len(prepared.rows("train")), "slices_per_subject": shape[1], "image_size": list(shape[-2:]),
            "pixel_mm": prepared.attrs["pixel_mm"]}
    if conditional:
        data |= {"iterations": made["iterations"], "dose_channel": p.dose_channel, "counts": made["counts"],
                 "fraction": made["fraction"], "attenuation": made["attenuation"]}
    return {"network": network, "denoiser": denoiser, "data": data}


def training_slices(p: TrainModel, prepared: Prepared):
    """Return the dataset of training: dicts of arrays (see `prepare`) of one slice each."""
    names = ["high" if p.target == "high_dose" else "activity"]
    names += ["mlem", "sensitivity"] * (p.task == "conditional") + ["label"] * p.class_labels
    return prepared.slices(names, "train", partial(_named, names))


def _named(names: Sequence[str], values) -> dict[str, Tensor]:
    return dict(zip(names, values if len(names) > 1 else (values,), strict=True))


def train_model(p: TrainModel, progress: bool = True) -> TrainResult:
    """Return the trained model; continues what `p.out` holds. The same call serves torchrun's processes."""
    prepared = open_dataset(project_root() / p.data, require=["activity", "mlem", "sensitivity"])
    config = model_config(p, prepared)
    torch.manual_seed(p.seed)
    D = build(config)
    if p.start_from:
        D.load_state_dict(load(p.start_from).state_dict())
    D.autocast = getattr(torch, p.autocast) if p.autocast else None
    options = TrainConfig(steps=p.steps, batch_size=p.batch_size, grad_accumulation=p.grad_accumulation,
                          learning_rate=p.learning_rate, warmup=p.warmup, schedule="cosine", clip_norm=p.clip_norm,
                          ema_decay=p.ema_decay, ema_halflife=p.ema_halflife, channels_last=True, seed=p.seed,
                          device=p.device, seconds=p.seconds, checkpoint_every=p.checkpoint_every, log_every=25)

    def loss(D: EDMDenoiser, batch: dict[str, Tensor], generator: Generator) -> Tensor:
        return model_loss(D, batch, generator, p)

    def validate(ema: EDMDenoiser) -> dict[str, float]:
        return logged_errors(validation_errors(ema, p, p.validation_people))

    losses = ("P_mean", "P_std", "variance_weight", "mirror", "augment", "stretch_label", "start_from")
    about = config | {name: getattr(p, name) for name in losses}
    return train(D, loss, training_slices(p, prepared), options, project_root() / p.out, about=about, progress=progress,
                 validate=validate if p.validation_people else None)


def model_loss(D: EDMDenoiser, batch: dict[str, Tensor], generator: Generator, p: TrainModel) -> Tensor:
    """Return the EDM loss (batch,) of slices as `training_slices` gives them, in kBq/mL.

    Target and condition move together: they are one image of several channels while they are augmented.
    """
    target = batch["high" if p.target == "high_dose" else "activity"]
    images = target if p.task == "unconditional" else torch.cat([target, batch["mlem"]], 1)
    labels = {"y": batch["label"].long()} if p.class_labels else {}
    if p.augment:
        pipe = AugmentPipe(p.augment, flip_x=1e8 * p.mirror, stretch_label=p.stretch_label)
        images, labels["augment"] = pipe(images, generator)
    elif p.mirror:
        turned = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device) < 0.5
        images = torch.where(turned, images.flip(-1), images)
    cond = None
    if p.task == "conditional":
        cond = as_condition(images[:, 1:], batch["sensitivity"], p.scale_kbq)
        cond = cond if p.dose_channel else cond[:, :-1]
    return edm_loss(D, images[:, :1] / p.scale_kbq, generator, p.P_mean, p.P_std, cond,
                    variance_weight=p.variance_weight, **labels)


@torch.no_grad()
def denoising_errors(D: EDMDenoiser, scale_kbq: float, sigmas: Sequence[float], people: int = 16, image_size: int = 64,
                     seed: int = 0) -> list[dict[str, float]]:
    """Return, for each sigma (network units), the error of an unconditional D on slices of validation people.

    Root mean squared error in kBq/mL, beside the one that the variance channel expects and the noise it was given.
    """
    x0 = (held_out("validation", people, image_size).image / scale_kbq).to(next(D.parameters()).device)
    noise = randn(x0.shape, x0.dtype, torch.Generator().manual_seed(seed)).to(x0.device)
    rows = []
    for sigma in sigmas:
        at = x0 + sigma * noise, torch.full((len(x0),), sigma, device=x0.device)
        mean, variance = D.moments(*at) if D.learned_variance else (D(*at), torch.full_like(x0, torch.nan))
        rows.append({"sigma": sigma, "noise (kBq/mL)": sigma * scale_kbq,
                     "error (kBq/mL)": (mean - x0).square().mean().sqrt().item() * scale_kbq,
                     "expected": variance.mean().sqrt().item() * scale_kbq})
    return rows


@torch.no_grad()
def enhancement_errors(D: EDMDenoiser, data: dict, counts: Sequence[float], people: int = 16, seed: int = 0) -> list:
    """Return, for each number of counts, the NRMSE of D's best guess from a scan alone and of its MLEM images.

    Slices of validation people with a lesion each; mean and standard error over people. D looks at pure noise of
    sigma 40, so the guess is the posterior mean, in one evaluation. data: of the checkpoint's config.
    """
    slices = held_out("validation", people, data["image_size"][-1], lesions=1)
    device, rows = next(D.parameters()).device, []
    noise = 40 * randn(slices.image.shape, torch.float32, torch.Generator().manual_seed(seed))
    for total in counts:
        mu = slices.mu if data["attenuation"] else None
        scan = acquire(slices.image, mu, total, range(seed, seed + people), pixel_mm=slices.pixel_mm)
        cond = condition(scan, data["iterations"], data["scale_kbq"])
        given = cond if data["dose_channel"] else cond[:, :-1]
        guess = D(noise.to(device), torch.full((people,), 40.0, device=device), given.to(device)).cpu()
        images = iterates(scan, data["iterations"]) / data["scale_kbq"]
        mlems = {f"MLEM, {k} iterations": images[:, i : i + 1] for i, k in enumerate(data["iterations"])}
        rows.append({"counts": total} | {
            name: metrics.mean_and_error(metrics.nrmse(x * data["scale_kbq"], slices.image))
            for name, x in ({"network": guess} | mlems).items()})
    return rows


def validation_errors(D: EDMDenoiser, p: TrainModel, people: int = 16) -> list[dict]:
    """Return `denoising_errors` or `enhancement_errors`, whichever fits the task; nothing without embedded people."""
    prepared = open_dataset(project_root() / p.data)
    data = model_config(p, prepared)["data"]
    if prepared.source != PEOPLE:
        return []
    if p.task == "conditional":
        return enhancement_errors(D, data, (2.5e3, 1e4, 5e4, 2.5e5, 1e6), people, p.seed)
    return denoising_errors(D, p.scale_kbq, (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0), people, data["image_size"][-1],
                            p.seed)


def first_batch(p: TrainModel, prepared: Prepared, count: int) -> dict[str, Tensor]:
    """Return what the network sees of training slices, by name: target and condition images (slice, 1, y, x)."""
    slices = training_slices(p, prepared)
    names = {"high": "full-dose MLEM", "activity": "activity"}
    at = [round(i * (len(slices) - 1) / max(1, count - 1)) for i in range(count)]
    batch = default_collate([slices[i] for i in at])
    shown = {label: batch[name] / p.scale_kbq for name, label in names.items() if name in batch}
    if p.task == "conditional":
        made = prepared.attrs["parameters"]["iterations"]
        cond = as_condition(batch["mlem"], batch["sensitivity"], p.scale_kbq)
        shown |= {f"MLEM, {k}": cond[:, i : i + 1] for i, k in enumerate(made)}
        shown |= {"dose": cond[:, -1:]} if p.dose_channel else {}
    return shown


def errors_figure(errors: list[dict]) -> Figure:
    """Return what `validation_errors` says as curves: against the noise level, or against the counts."""
    if "sigma" in errors[0]:
        sigmas = [row["sigma"] for row in errors]
        lines = {name: (sigmas, [row[key] for row in errors]) for name, key in
                 (("noise", "noise (kBq/mL)"), ("left after denoising", "error (kBq/mL)"), ("expected", "expected"))}
        return figures.curves(lines, xlabel="noise level sigma", ylabel="kBq/mL", logx=True, logy=True, size=(4.2, 3.4))
    counts = [row["counts"] for row in errors]
    lines = {name: (counts, *map(list, zip(*(row[name] for row in errors), strict=True)))
             for name in errors[0] if name != "counts"}
    return figures.curves(lines, xlabel="counts of a slice", ylabel="NRMSE", logx=True, logy=True, size=(4.2, 3.4))


def logged_errors(errors: list[dict]) -> dict[str, float]:
    """Return what `validation_errors` says of the network as single numbers by name, for stats.jsonl."""
    return {f"NRMSE at {row['counts']:g} counts": row["network"][0] for row in errors if "counts" in row} | {
        f"error at sigma {row['sigma']:g}": row["error (kBq/mL)"] for row in errors if "sigma" in row}


def save_model(result: TrainResult, p: TrainModel, errors: list[dict]) -> Path:
    """Return the folder <out>/checkpoint with the averaged weights in half precision, their config, record and card."""
    record = {"parameters": asdict(p), "steps": result.step, "slices": result.step * p.batch_size,
              "seconds": round(result.seconds), "loss": result.loss, "validation": errors, "code": code_version()}
    config = model_config(p, open_dataset(project_root() / p.data))
    return save_checkpoint(project_root() / p.out / "checkpoint", result.ema.half(), config, record)


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.pet params.yaml
    train_model(TrainModel(**read_yaml(sys.argv[1])))
