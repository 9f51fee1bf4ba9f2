"""Prepared contrasts for LMI: virtual people and folders of pairs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor
from tqdm.auto import tqdm

from companion.data import anatomy, intensity, paired, slicing
from companion.data.alignment import MAX_SHIFT
from companion.data.cohort import ANY, LAYOUTS, find_contrasts, find_subjects, some
from companion.data.intake.persons import certain
from companion.data.intake.splits import split_people, split_table
from companion.data.rows import Rows
from companion.data.store import Prepared, open_dataset, write_dataset
from companion.evaluation import metrics
from companion.files import project_root
from companion.papers.lmi.conditions import AIR, CONTRASTS, Conditioning, conditions, grey
from companion.parameters import Parameters, param
from companion.randomness import randn

# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class PrepareData(Parameters):
    """Parameters of lmi/1_data.ipynb."""

    source: str = param(
        "brain",
        "brain: the embedded cohort; else a folder of NIfTI volumes, or one with a sub-folder "
        "of slice images for each contrast",
    )
    data: str = param("data/lmi_brain_64.h5", "where the prepared slices go; kept when it is there already")
    contrasts: tuple[str, ...] = param(
        CONTRASTS, "of the embedded cohort; of NIfTI: names in the layout; of slice images: the sub-folders"
    )
    image_size: int = param(64, "pixels along y and x", minimum=16)
    slices_per_subject: int = param(
        12, "axial slices of each subject; of slice images there is no such number", minimum=1
    )
    subjects: int = param(1000, "virtual people to train on, or at most so many of a folder", minimum=1)
    validation_subjects: int = param(16, "virtual people to validate on", minimum=1)
    test_subjects: int = param(32, "virtual people to test on", minimum=1)
    layout: str | None = param(
        None,
        "of image volumes: how they are named, any: people and contrasts by the names; none: slice images",
        choices=(None, ANY, *LAYOUTS),
    )
    plane: str = param("axial", "of NIfTI volumes: orientation of the slices", choices=tuple(slicing.PLANES))
    reference: str | None = param(None, "contrast whose grid the others are resampled to; none: grids must agree")
    channels: int = param(1, "of slice images: 1 grey, 3 colours", choices=(1, 3))
    validation_share: float = param(0.1, "of a folder: share of the subjects to validate on", minimum=0, maximum=1)
    test_share: float = param(0.1, "of a folder: share of the subjects kept for tests", minimum=0, maximum=1)
    people: str | None = param(None, "of layout any: table with file, subject, session, split; none: by names")


SCALE = (
    "percentiles 0.5 of all values and 99.5 of the foreground of a subject's slices are 0 and 1 "
    "(data.paired.percentile_scale); clipped"
)


def prepare(p: PrepareData, progress: bool = True) -> Prepared:
    """The prepared slices, an array (subject, slice, channel, y, x) for each contrast, made and stored once as HDF5.

    The embedded cohort also has "labels" (`anatomy.LABELS`). Raises FileNotFoundError or ValueError as `paired` does
    for what cannot be prepared, and ValueError when `p.data` holds something else than the parameters ask for.
    """
    path = project_root() / p.data
    names = [f for f in asdict(p) if f not in ("device", "out", "data")]
    wanted = {name: list(v) if isinstance(v := getattr(p, name), tuple) else v for name in names}
    if not path.exists():
        make = prepare_cohort if p.source == "brain" else prepare_images if p.layout is None else prepare_volumes
        arrays, about = make(p, progress)
        write_dataset(
            path,
            arrays,
            units={name: "1" for name in arrays},
            seed=p.seed,
            **about["store"],
            scale={name: "label values" if name == "labels" else about["scale"] for name in arrays},
            attrs=about["attrs"] | {"parameters": wanted},
        )
    prepared = open_dataset(path)
    made = prepared.attrs.get("parameters")
    if made != wanted:
        other = (
            "something else"
            if made is None
            else ", ".join(f"{k} = {made.get(k)} (now {v})" for k, v in wanted.items() if made.get(k) != v)
        )
        raise ValueError(f"{path} was prepared from {other}; delete the file, or give another data file")
    return prepared


def cohort_slices(
    split: str,
    subjects: int,
    per_subject: int,
    contrasts: Sequence[str] = CONTRASTS,
    image_size: int = 64,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Slices (subject, slice, 1, y, x) of the embedded cohort: each contrast in [0, 1], and "labels", uint8.

    Anatomy, shading and heights are the same in all contrasts; the scale is `SCALE` of each subject and contrast.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in (*contrasts, "labels")}
    for subject in tqdm(anatomy.cohort(split, subjects), desc=f"{split} subjects", disable=not progress):
        heights = anatomy.slice_heights(subject, per_subject)
        for contrast, image in magnitudes(subject, contrasts, heights, image_size).items():
            if contrast != "labels":
                image = torch.from_numpy(paired.scaled(image.numpy(), name=contrast)[0])
            found[contrast].append(image[:, None])
    return {name: torch.stack(stacks) for name, stacks in found.items()}


def magnitudes(
    subject: anatomy.Subject, contrasts: Sequence[str], heights: Tensor, image_size: int
) -> dict[str, Tensor]:
    """|anatomy.render| (slice, y, x) of several contrasts at once, and "labels": the tissue is worked out once."""
    shape = (len(heights), image_size, image_size)
    voxel_mm = anatomy.FIELD_OF_VIEW_MM / image_size
    points = anatomy.grid_mm(shape, voxel_mm, heights)
    maps = anatomy.tissue_maps(subject, points, voxel_mm)
    shading = (0.08 * anatomy.smooth_field(points, subject.generator("bias"))).exp()
    images = {c: (anatomy.image_from_tissue(subject, maps, c) * shading).abs() for c in contrasts}
    return images | {"labels": anatomy.labels_from_tissue(maps)}


def prepare_cohort(p: PrepareData, progress: bool = True) -> tuple[dict, dict]:
    """Arrays of all splits of the embedded cohort, and what is to be said of them."""
    counts = {"train": p.subjects, "validation": p.validation_subjects, "test": p.test_subjects}
    parts = {
        split: cohort_slices(split, n, p.slices_per_subject, p.contrasts, p.image_size, progress)
        for split, n in counts.items()
    }
    arrays = {name: torch.cat([part[name] for part in parts.values()]).numpy() for name in (*p.contrasts, "labels")}
    split = {name: [f"{name} {i}" for i in range(n)] for name, n in counts.items()}
    store = {
        "source": "virtual cohort of companion.data.anatomy (ICBM 152), axial slices",
        "subjects": [s for members in split.values() for s in members],
        "split": split,
    }
    return arrays, {"scale": SCALE, "store": store, "attrs": {}}


def prepare_images(p: PrepareData, progress: bool = True) -> tuple[dict, dict]:
    """Arrays (image, 1, channel, y, x) of paired slice images, split by person; see `paired.SlicePairs`."""
    source = project_root() / p.source
    pairs = paired.SlicePairs(
        {c: source / c for c in p.contrasts}, channels=p.channels, size=(p.image_size,) * 2, refuse=False
    )
    arrays, used, left = {c: Rows((project_root() / p.data).parent) for c in p.contrasts}, [], dict(pairs.refused)
    bad = []
    for i, name in enumerate(tqdm(pairs.names, desc="images", disable=not progress)):
        try:
            images = pairs[i]
        except (ValueError, OSError) as error:
            left[name] = str(error)
            continue
        if (fit := paired.worst_alignment(images)) and fit.distance > MAX_SHIFT:
            bad.append(f"{name} {fit}")
        for contrast, image in zip(p.contrasts, images, strict=True):
            arrays[contrast].append(image[None].numpy())
        used.append(i)
    if not used:
        raise ValueError(f"no pair of images can be used: {some([f'{n}: {why}' for n, why in left.items()])}")
    if bad:
        raise ValueError(f"{len(bad)} of {len(used)} pairs do not fit each other: {'; '.join(bad[:4])}; register them")
    whose = {pairs.names[i]: certain(pairs.subjects[i]) or pairs.subjects[i] for i in used}
    people = _people(p, whose, {}, progress)
    split = {part: [name for name in whose if whose[name] in who] for part, who in people.items()}
    store = {"source": f"images of {Path(p.source).name}", "subjects": list(whose), "split": split}
    return arrays, {
        "scale": "as in the files, 0 and 1 the ends of their range",
        "store": store,
        "attrs": {"left_out": left, "people": whose},
    }


def prepare_volumes(p: PrepareData, progress: bool = True) -> tuple[dict, dict]:
    """Arrays of NIfTI volumes cut into slices, by `paired.prepare` into a file that is read back; its attributes."""
    path = (project_root() / p.data).with_suffix(".cut.h5")
    folder = project_root() / p.source
    if p.layout == ANY:
        cohort = find_contrasts(folder, p.contrasts, p.people and project_root() / p.people)
    else:
        cohort = find_subjects(folder, {c: LAYOUTS[p.layout][c] for c in p.contrasts}, complete_only=True)

    def split(subjects: Sequence[str]) -> dict[str, list[str]]:
        whose = {subject: cohort.person(subject) for subject in subjects}
        people = _people(p, whose, cohort.split, progress)
        return {part: [s for s in subjects if whose[s] in who] for part, who in people.items()}

    try:
        cut = paired.prepare(
            path,
            cohort,
            contrasts=p.contrasts,
            per_subject=p.slices_per_subject,
            subjects=p.subjects,
            plane=p.plane,
            size=(p.image_size,) * 2,
            reference=p.reference,
            source=f"NIfTI files, {p.layout}",
            split=split,
            scales={"CT": intensity.ct_window()} if "CT" in p.contrasts else None,
        )
        arrays = {name: cut.read(name) for name in cut.shapes}
    finally:
        path.unlink(missing_ok=True)
    store = {"source": cut.source, "subjects": list(cut.subjects), "split": dict(cut.split)}
    people = {subject: cohort.person(subject) for subject in cut.subjects}
    return arrays, {"scale": SCALE, "store": store, "attrs": dict(cut.attrs) | {"people": people}}


def _people(p: PrepareData, whose: dict[str, str], given: Mapping[str, str], progress: bool) -> dict[str, list[str]]:
    """Which people are in which split, printed with the number of their subjects."""
    shares = (1 - p.validation_share - p.test_share, p.validation_share, p.test_share)
    people = split_people(whose.values(), shares, p.seed, given)
    if progress:
        print(split_table(people, {who: [s for s in whose if whose[s] == who] for who in whose.values()}))
    return people


def some_slices(prepared: Prepared, count: int, split: str = "validation") -> dict[str, Tensor]:
    """Up to `count` slices (slice, channel, y, x) of each contrast, evenly spread over the subjects of a split.

    A file without subjects in that split gives an empty dict.
    """
    if not prepared.rows(split):
        return {}
    stacks = {name: torch.from_numpy(prepared.read(name, split)).flatten(0, 1) for name in prepared.shapes}
    total = len(next(iter(stacks.values())))
    at = torch.linspace(0, total - 1, min(count, total)).round().long()
    return {name: x[at] for name, x in stacks.items()}


def intensity_rules(stacks: dict[str, Tensor], bins: int = 128) -> list[dict]:
    """How well any rule of intensities alone could translate: PSNR (mean, standard error over slices), every direction.

    stacks: paired slices (slice, 1, y, x) in [0, 1] of each contrast. "as it is": no translation. "best rising map":
    the rising map with the smallest squared error on these very slices, more than histogram matching can reach. "best
    map": the mean target value of each source value. The maps are fitted to the truth: limits, not methods.
    """
    table = []
    for a, b in itertools.permutations([name for name in stacks if name != "labels"], 2):
        x, y = grey(stacks[a]), grey(stacks[b])
        index = (x * (bins - 1)).round().long().flatten().numpy()
        counts = np.bincount(index, minlength=bins)
        mean = np.bincount(index, weights=y.flatten().double().numpy(), minlength=bins) / counts.clip(1)
        rising = isotonic_regression(mean, weights=counts + 1e-9).x
        row = {"from": a, "to": b, "as it is": metrics.mean_and_error(metrics.psnr(x, y, data_range=1.0))}
        for name, rule in (("best rising map", rising), ("best map", mean)):
            found = torch.from_numpy(rule[index]).to(x.dtype).view_as(x)
            row[name] = metrics.mean_and_error(metrics.psnr(found, y, data_range=1.0))
        table.append(row)
    return table


def invariance(stacks: dict[str, Tensor], target: str, conditioning: Conditioning, sigma: float, seed: int = 0) -> list:
    """How much of each map survives another contrast: its correlation with that of the target, inside the head.

    Mean and standard error over slices, for every other contrast as the source; the noisy image is the target's.
    """
    x0 = grey(stacks[target])
    x = x0 + sigma * randn(x0.shape, x0.dtype, torch.Generator().manual_seed(seed))
    head, ours = (x0 > AIR)[:, 0], conditions(x, sigma, x0, conditioning)
    names = [f"{name} {patch}" for name in conditioning.maps if name != "source" for patch in conditioning.patches]
    table = []
    for other in (name for name in stacks if name not in (target, "labels")):
        theirs, row = conditions(x, sigma, grey(stacks[other]), conditioning), {"source": other}
        for i, name in enumerate(names + ["source"] * ("source" in conditioning.maps)):
            values = [
                torch.corrcoef(torch.stack([a[i][m], b[i][m]]))[0, 1]
                for a, b, m in zip(ours, theirs, head, strict=True)
                if m.sum() > 10
            ]
            row[name] = metrics.mean_and_error(torch.stack(values))
        table.append(row)
    return table
