"""Prepared contrasts for LMI: virtual people and folders of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from companion.data import anatomy, intensity, paired, slicing
from companion.data.alignment import MAX_SHIFT
from companion.data.cohort import ANY, LAYOUTS, Cohort, called, find_contrasts, find_subjects, some, standard, standards
from companion.data.contrasts import CONTRASTS, SCALE, cohort_slices
from companion.data.intake.persons import certain
from companion.data.intake.splits import split_people, split_table
from companion.data.rows import Rows
from companion.data.shading import AIR
from companion.data.store import Prepared, open_dataset, prepare_once
from companion.diffusion.local_information import Conditioning, conditions
from companion.evaluation.tables import average
from companion.files import project_root
from companion.information.pairs import grey
from companion.parameters import Parameters, param
from companion.randomness import randn

SLICES = 8  # of each person of the embedded cohort, whose scale is found from all of them


@dataclass(frozen=True)
class Reading:
    """The part of a form that says what is read of a folder, and who is for what."""

    contrasts: tuple[str, ...] = param(
        CONTRASTS, "by any common name (T1, T1w, MPRAGE, T2, PD, FLAIR); of slice images: the sub-folders"
    )
    image_size: int = param(64, "pixels along y and x", minimum=16)
    slices_per_subject: int = param(
        12, "axial slices of each subject; of slice images there is no such number", minimum=1
    )
    subjects: int = param(1000, "virtual people to train on, or at most so many of a folder", minimum=1)
    layout: str | None = param(
        None,
        "of image volumes: how they are named, any: people and contrasts by the names (a folder each, BIDS, flat "
        "pairs, DICOM); none: slice images if the folder has a sub-folder of them for each contrast, else any",
        choices=(None, ANY, *LAYOUTS),
    )
    plane: str = param("axial", "of NIfTI volumes: orientation of the slices", choices=tuple(slicing.PLANES))
    reference: str | None = param(None, "contrast whose grid the others are resampled to; none: the first")
    grid: str = param(
        "template",
        "of image volumes: template, the cohort's, to which each person is registered (affine), as the embedded "
        "weights need it; own: the person's, the field of view filling the image",
        choices=("template", "own"),
    )
    unaligned: str = param(
        "register", "contrasts of a person that do not fit: register (rigid) or refuse", choices=("register", "refuse")
    )
    channels: int = param(1, "of slice images: 1 grey, 3 colours", choices=(1, 3))
    validation_share: float = param(0.1, "of a folder: share of the subjects to validate on", minimum=0, maximum=1)
    test_share: float = param(0.1, "of a folder: share of the subjects kept for tests", minimum=0, maximum=1)
    people: str | None = param(None, "of layout any: table with file, subject, session, split; none: by names")


@dataclass(frozen=True)
class PrepareData(Reading, Parameters):
    """Parameters of lmi/1_data.ipynb."""

    source: str = param(
        "brain",
        "brain: the embedded cohort; else a folder of NIfTI volumes, or one with a sub-folder "
        "of slice images for each contrast",
    )
    data: str = param("data/lmi_brain_64.h5", "where the prepared slices go; kept when it is there already")
    validation_subjects: int = param(16, "virtual people to validate on", minimum=1)
    test_subjects: int = param(32, "virtual people to test on", minimum=1)

    def before_start(self) -> None:
        """Raise for contrasts named twice, a folder that is not there, or one without anything of these contrasts."""
        standards(self.contrasts)
        path = project_root() / self.data
        if path.exists():
            open_dataset(path)
        elif self.source == "brain":
            if unknown := [c for c in standards(self.contrasts) if c not in anatomy.SEQUENCES]:
                raise ValueError(f"the cohort has no {', '.join(unknown)}; it has {', '.join(anatomy.SEQUENCES)}")
        elif layout_of(project_root() / self.source, self) is not None:
            cohort_of(project_root() / self.source, self)


def prepare(p: PrepareData, progress: bool = True) -> Prepared:
    """The prepared slices, an array (subject, slice, channel, y, x) for each contrast, made and stored once as HDF5.

    The embedded cohort also has "labels" (`anatomy.LABELS`). Raises FileNotFoundError or ValueError as `paired` does
    for what cannot be prepared, and ValueError when `p.data` holds something else than the parameters ask for.
    """
    path = project_root() / p.data

    def make() -> dict:
        if p.source == "brain":
            counts = {"train": p.subjects, "validation": p.validation_subjects, "test": p.test_subjects}
            made = virtual_people(counts, p.slices_per_subject, p.contrasts, p.image_size, progress)
        else:
            read = read_images if layout_of(project_root() / p.source, p) is None else read_volumes
            made = read(project_root() / p.source, path.parent, p, p.seed, progress)
        return made | {"seed": p.seed, "units": dict.fromkeys(made["arrays"], "1")}

    wanted = p.pick(*(name for name in PrepareData.__dataclass_fields__ if name not in ("device", "out", "data")))
    return prepare_once(path, wanted, make)


def virtual_people(
    counts: Mapping[str, int], per_subject: int, contrasts: Sequence[str], image_size: int, progress: bool = False
) -> dict:
    """What `write_dataset` takes of so many people of each split of the embedded cohort."""
    contrasts = standards(contrasts)
    parts = {
        split: cohort_slices(split, n, per_subject, contrasts, image_size, progress) for split, n in counts.items()
    }
    arrays = {name: torch.cat([part[name] for part in parts.values()]).numpy() for name in (*contrasts, "labels")}
    split = {name: [f"{name} {i}" for i in range(n)] for name, n in counts.items()}
    return {
        "arrays": arrays,
        "scale": dict.fromkeys(arrays, SCALE) | {"labels": "label values"},
        "source": "virtual cohort of companion.data.anatomy (ICBM 152), axial slices",
        "subjects": [s for members in split.values() for s in members],
        "split": split,
    }


def read_images(source: Path, beside: Path, r: Reading, seed: int, progress: bool = True) -> dict:
    """What `write_dataset` takes of paired slice images, arrays (image, 1, channel, y, x), split by person.

    See `paired.SlicePairs`. beside: a folder with room for the arrays while they are read.
    """
    pairs = paired.SlicePairs(
        {c: source / c for c in r.contrasts}, channels=r.channels, size=(r.image_size,) * 2, refuse=False
    )
    names = standards(r.contrasts)
    arrays, used, left = {c: Rows(beside) for c in names}, [], dict(pairs.refused)
    bad = []
    for i, name in enumerate(tqdm(pairs.names, desc="images", disable=not progress)):
        try:
            images = pairs[i]
        except (ValueError, OSError) as error:
            left[name] = str(error)
            continue
        if (fit := paired.worst_alignment(images)) and fit.distance > MAX_SHIFT:
            bad.append(f"{name} {fit}")
        for contrast, image in zip(names, images, strict=True):
            arrays[contrast].append(image[None].numpy())
        used.append(i)
    if not used:
        raise ValueError(f"no pair of images can be used: {some([f'{n}: {why}' for n, why in left.items()])}")
    if bad:
        raise ValueError(f"{len(bad)} of {len(used)} pairs do not fit each other: {'; '.join(bad[:4])}; register them")
    whose = {pairs.names[i]: certain(pairs.subjects[i]) or pairs.subjects[i] for i in used}
    people = _people(r, whose, {}, seed, progress)
    split = {part: [name for name in whose if whose[name] in who] for part, who in people.items()}
    return {
        "arrays": arrays,
        "scale": dict.fromkeys(arrays, "as in the files, 0 and 1 the ends of their range"),
        "source": f"images of {source.name}",
        "subjects": list(whose),
        "split": split,
        "attrs": {"left_out": left, "people": whose},
    }


def layout_of(source: Path, r: Reading) -> str | None:
    """How the volumes of a folder are named, None if it has a sub-folder of slice images for each contrast."""
    if r.layout is not None:
        return r.layout
    folders = [source / c for c in r.contrasts]
    pictures = [any(f.suffix.lower() in slicing.SUFFIXES for f in d.iterdir()) for d in folders if d.is_dir()]
    return None if len(pictures) == len(folders) and all(pictures) else ANY


def cohort_of(source: Path, r: Reading) -> Cohort:
    """Who has which contrasts, by their standard names; FileNotFoundError or ValueError as `find_contrasts`."""
    names, layout = standards(r.contrasts), layout_of(source, r)
    if layout == ANY:
        return find_contrasts(source, names, r.people and project_root() / r.people)
    known = {standard(c): ends for c, ends in LAYOUTS[layout].items()}
    if lacking := [c for c in names if c not in known]:
        raise ValueError(f"layout {layout} has {', '.join(known)}, not {', '.join(lacking)}; use layout any")
    return find_subjects(source, {c: known[c] for c in names}, complete_only=True)


def read_volumes(source: Path, beside: Path, r: Reading, seed: int, progress: bool = True) -> dict:
    """What `write_dataset` takes of volumes cut into slices, by `paired.prepare` into a file that is read back."""
    path = beside / "lmi.cut.h5"
    cohort, names = cohort_of(source, r), standards(r.contrasts)

    def split(subjects: Sequence[str]) -> dict[str, list[str]]:
        whose = {subject: cohort.person(subject) for subject in subjects}
        people = _people(r, whose, cohort.split, seed, progress)
        return {part: [s for s in subjects if whose[s] in who] for part, who in people.items()}

    try:
        cut = paired.prepare(
            path,
            cohort,
            contrasts=names,
            per_subject=r.slices_per_subject,
            subjects=r.subjects,
            plane=r.plane,
            size=(r.image_size,) * 2,
            reference=standard(r.reference) if r.reference else None,
            registered=r.unaligned == "register",
            template=r.grid == "template",
            source=f"image volumes of {source.name}",
            split=split,
            scales={"CT": intensity.ct_window()} if "CT" in names else None,
        )
        arrays = {name: cut.read(name) for name in cut.shapes}
    finally:
        path.unlink(missing_ok=True)
    return {
        "arrays": arrays,
        "scale": dict.fromkeys(arrays, SCALE),
        "source": cut.source,
        "subjects": list(cut.subjects),
        "split": dict(cut.split),
        "attrs": dict(cut.attrs) | {"people": {subject: cohort.person(subject) for subject in cut.subjects}},
    }


def _people(
    r: Reading, whose: Mapping[str, str], given: Mapping[str, str], seed: int, progress: bool
) -> dict[str, list[str]]:
    """Which people are in which split, printed with the number of their subjects; too few: all are for tests."""
    shares = (1 - r.validation_share - r.test_share, r.validation_share, r.test_share)
    few = len(set(whose.values())) < sum(share > 0 for share in shares) and not given
    people = split_people(whose.values(), (0, 0, 1) if few else shares, seed, given)
    if few and progress:
        print("too few people to train on some and to test on others: all are kept for tests")
    if progress:
        print(split_table(people, {who: [s for s in whose if whose[s] == who] for who in whose.values()}))
    return people


def stacks(people: str, split: str, subjects: int, contrasts: Sequence[str], image_size: int) -> dict[str, Tensor]:
    """Slices (subject, slice, 1, y, x) of contrasts and, if known, "labels", of the first people of a split.

    people: "brain", the embedded cohort, or a prepared file, which `image_size` does not concern. Raises ValueError for
    a file that lacks a contrast, or people in this split.
    """
    if people == "brain":
        return cohort_slices(split, subjects, SLICES, tuple(dict.fromkeys(contrasts)), image_size)
    prepared = open_dataset(project_root() / people)
    names = {c: array_of(prepared, c) for c in dict.fromkeys(contrasts)}
    names |= {"labels": "labels"} if "labels" in prepared.shapes else {}
    count, depth = min(subjects, len(prepared.rows(split))), prepared.shapes[names[contrasts[0]]][1]
    if not count:
        have = ", ".join(f"{len(who)} for {part}" for part, who in prepared.split.items())
        raise ValueError(f"{prepared.path.name} has nobody for {split} ({have}); choose another split")
    slices = {c: prepared.slices(name, split) for c, name in names.items()}
    return {
        n: torch.stack([s[i] for i in range(count * depth)]).unflatten(0, (count, depth)) for n, s in slices.items()
    }


def array_of(prepared: Prepared, contrast: str) -> str:
    """The name of the array of a contrast, however either is called; ValueError if there is none."""
    images = [name for name in prepared.shapes if name != "labels"]
    if (found := called(images, contrast)) is None:
        raise ValueError(f"{prepared.path.name} has no {contrast}; it has {', '.join(images)}")
    return found


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
            row[name] = average(torch.stack(values)) if values else float("nan")
        table.append(row)
    return table
