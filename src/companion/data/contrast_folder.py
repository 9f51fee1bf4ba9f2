"""Contrasts of the same people, read from folders of volumes or of slice images, or rendered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from companion.data import intensity, paired, slicing
from companion.data.alignment import MAX_SHIFT
from companion.data.cohort import ANY, LAYOUTS, Cohort, find_contrasts, find_subjects, some, standard, standards
from companion.data.contrasts import CONTRASTS, SCALE, cohort_slices
from companion.data.intake.persons import certain
from companion.data.intake.splits import split_people, split_table
from companion.data.patients import patients
from companion.data.rows import Rows
from companion.files import project_root
from companion.parameters import param


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


def virtual_people(
    counts: Mapping[str, int], per_subject: int, contrasts: Sequence[str], image_size: int, progress: bool = False
) -> dict:
    """What `write_dataset` takes of so many people of each split of the embedded cohort."""
    contrasts = standards(contrasts)
    parts = [cohort_slices(split, n, per_subject, contrasts, image_size, progress) for split, n in counts.items()]
    found = {name: torch.cat([part[name] for part in parts]) for name in (*contrasts, "labels")}
    return rendered(found, counts, "virtual cohort of companion.data.anatomy (ICBM 152), axial slices")


def virtual_patients(
    heads: Path | None,
    counts: Mapping[str, int],
    per_subject: int,
    contrasts: Sequence[str],
    image_size: int,
    progress: bool = False,
) -> dict:
    """What `write_dataset` takes of so many patients of each split (`data.patients`); of heads: a folder of them."""
    found = patients(heads, counts, per_subject, standards(contrasts), image_size, progress)
    of = "ICBM 152" if heads is None else "ICBM 152 and real heads"
    return rendered(found, counts, f"virtual patients of companion.data.patients ({of}), axial slices")


def rendered(found: Mapping[str, torch.Tensor], counts: Mapping[str, int], source: str) -> dict:
    """What `write_dataset` takes of arrays (subject, ...) of virtual people, so many of each split in turn."""
    split = {name: [f"{name} {i}" for i in range(n)] for name, n in counts.items()}
    return {
        "arrays": {name: x.numpy() for name, x in found.items()},
        "scale": dict.fromkeys(found, SCALE) | {"labels": "label values", "lesion": "share of the pixel"},
        "source": source,
        "subjects": [s for members in split.values() for s in members],
        "split": split,
    }


def read_images(source: Path, beside: Path, r: Reading, seed: int, progress: bool = True) -> dict:
    """What `write_dataset` takes of paired slice images, arrays (image, 1, channel, y, x), split by person.

    See `paired.SlicePairs`. beside: a folder with room for the arrays while they are read.
    """
    pairs = paired.SlicePairs(
        {c: source / c for c in r.contrasts}, channels=r.channels, size=(r.image_size, r.image_size), refuse=False
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
    if layout is None or layout == ANY:
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
            size=(r.image_size, r.image_size),
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
