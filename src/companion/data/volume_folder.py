"""Volumes to prepare: virtual people, a folder of scans, or digits to check the code in 2D."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from companion.data import anatomy, volumes
from companion.data.head_volumes import head_volume
from companion.data.heads import Head
from companion.data.heads_download import load_heads
from companion.data.intake.records import reason
from companion.data.intake.splits import split_people, split_table
from companion.data.patients import anatomies
from companion.data.rows import Rows
from companion.data.store import Prepared
from companion.data.volumes import Person
from companion.extras import extra
from companion.files import project_root
from companion.parameters import param

COHORT = "virtual cohort of companion.data.anatomy (ICBM 152), T1w"
PATIENTS = "virtual patients of companion.data.patients (ICBM 152 and real heads), T1w"
TEMPLATES = "virtual patients of companion.data.patients (ICBM 152), T1w"
VIRTUAL = (COHORT, PATIENTS, TEMPLATES)  # sources whose people are made anew when needed
UNITS = {"image": "1", "tissue_ml": "mL", "affine": "mm", "scale": "as in the file"}


@dataclass(frozen=True)
class Reading:
    """The part of a form that says what is read of a folder, onto which grid, and who is for what."""

    shape: tuple[int, ...] = param((64, 64, 64), "voxels along z, y and x (of digits: 16 16)", minimum=16)
    voxel_mm: tuple[float, ...] | None = param(
        None, "of files: voxel size along z, y and x; none: as for the cohort", minimum=0.1
    )
    subjects: int = param(1500, "virtual people to learn from, or at most so many files", minimum=1)
    validation_share: float = param(0.1, "of files: share of the people to validate on", minimum=0, maximum=1)
    test_share: float = param(0.1, "of files: share of the people kept for tests", minimum=0, maximum=1)
    contrast: str | None = param(None, "of files: the one to take, as in T1w; none: T1w where there are several")
    strip: bool = param(False, "of T1w heads without a mask: find the brain by classical steps; look at the pictures")
    people: str | None = param(None, "of files: table (CSV, TSV) with file, subject, session, split; none: by names")


def people(
    source: str, split: str, shape: Sequence[int], heads: Path | None = None, more: bool = False
) -> Callable[[int], Person]:
    """Who makes person i of a split, always the same one: of `COHORT`, or of `PATIENTS`.

    Patients' anatomies take turns (`patients.anatomies`): the template and the split's heads in a folder; none: the
    template alone. more: with those of `more-heads`. Raises FileNotFoundError where a head is missing.
    """
    found = anatomies(heads, split, volumes.spacing(shape)[1], more) if source != COHORT else []

    def make(i: int) -> Person:
        subject = anatomy.Subject(anatomy.FIRST_SEED[split] + i)
        return volumes.patient(found[i % len(found)], subject, shape) if found else volumes.virtual(subject, shape)

    return make


def others(source: str, split: str, count: int, shape: Sequence[int]) -> Tensor:
    """Volumes (person, 1, z, y, x) of virtual people that training never sees; patients are of the template alone."""
    make = people(source, split, shape)
    return torch.stack([make(i).image[None] for i in range(count)])


def virtual_people(
    source: str,
    subjects: int,
    shape: tuple[int, ...],
    heads: Path | None = None,
    progress: bool = False,
    more: bool = False,
    whole: float = 0.0,
) -> dict:
    """What `write_dataset` takes of virtual people, all for training: others are drawn when needed. See `people`.

    whole: share of them who are shown as whole heads instead, in any contrast and position (`head_volumes`), of cubes
    of voxels; of them no tissue is known, 0 mL.
    """
    image, tissue = np.empty((subjects, 1, *shape), np.float16), np.empty((subjects, 3), np.float32)
    affine, spacing = np.empty((subjects, 4, 4)), volumes.spacing(shape)
    make = people(source, "train", shape, heads, more)
    known = whole_heads(heads, more) if whole else []
    for i in tqdm(range(subjects), desc="people", disable=not progress):
        if int((i + 1) * whole) > int(i * whole):
            rng = np.random.default_rng([anatomy.FIRST_SEED["train"] + i, 0x3EAD])
            head = head_volume(known[int(rng.integers(len(known)))], rng, shape[0], spacing[0])
            image[i, 0], tissue[i] = head.clip(0, volumes.CEILING), 0
            affine[i] = anatomy.affine((shape[0], shape[1], shape[2]), spacing[0])
            continue
        person = make(i)
        image[i, 0], tissue[i], affine[i] = person.image, person.tissue_ml, person.affine
    seeds = [str(subject.seed) for subject in anatomy.cohort("train", subjects)]
    return {
        "arrays": {"image": image, "tissue_ml": tissue, "affine": affine},
        "subjects": seeds,
        "split": {"train": seeds},
        "source": source,
        "attrs": {"voxel_mm": list(volumes.spacing(shape))},
    }


def whole_heads(folder: Path | None, more: bool) -> list[Head]:
    """The heads to train on of a folder. Raises ValueError for none."""
    if folder is None:
        raise ValueError("whole heads need real ones; give their folder (companion data get heads)")
    found = load_heads(folder, "train") + (load_heads(folder, "more") if more else [])
    return [head for head in found if not head.name.endswith("_brain")]


def read_folder(source: Path, beside: Path, r: Reading, seed: int, progress: bool = True) -> dict:
    """What `write_dataset` takes of the volumes of a folder that can be used, read one at a time.

    beside: a folder with room for the arrays while they are read.
    """
    voxel_mm = r.voxel_mm or volumes.spacing(r.shape)
    scans = volumes.find_scans(source, r.contrast, r.people and project_root() / r.people)
    arrays, used, skipped = {name: Rows(beside) for name in ("image", "affine", "scale")}, {}, dict(scans.left)
    for scan in tqdm(scans, desc="files", disable=not progress):
        if len(used) == r.subjects:
            break
        try:
            volume, scale = volumes.load_scan(scan, r.shape, voxel_mm, r.strip)
        except (ValueError, OSError) as error:
            skipped[scan.name] = reason(error)
            continue
        arrays["image"].append(volume.array[None].astype(np.float16))
        arrays["affine"].append(volume.affine)
        arrays["scale"].append(np.float32(scale))
        used[scan.name] = scan
    if not used:
        raise ValueError("\n  ".join([f"no file of {source.name} can be used:", *skipped.values()]))
    shares = (1 - r.validation_share - r.test_share, r.validation_share, r.test_share)
    persons = split_people([scan.subject for scan in used.values()], shares, seed, scans.split)
    split = {part: [name for name, scan in used.items() if scan.subject in who] for part, who in persons.items()}
    if progress:
        files = {who: [n for n, s in used.items() if s.subject == who] for part in persons.values() for who in part}
        print(split_table(persons, files))
    return {
        "arrays": arrays,
        "subjects": list(used),
        "split": split,
        "source": f"NIfTI volumes of {source.name}",
        "attrs": {
            "voxel_mm": list(voxel_mm),
            "skipped": skipped,
            "people": {name: scan.subject for name, scan in used.items()},
            "about": {name: scan.about for name, scan in used.items()},
        },
    }


def digits(subjects: int) -> dict:
    """What `write_dataset` takes of the 1797 digits of scikit-learn, enlarged to 16 x 16; the last 297 for tests."""
    with extra("notebooks"):
        from sklearn.datasets import load_digits  # comes with nilearn

    found: Any = load_digits()
    images = torch.from_numpy(found.images / 16).float()[:, None]
    images = F.interpolate(images, scale_factor=2.0, mode="bilinear").clamp(0, 1).numpy().astype(np.float16)
    names = [str(i) for i in range(len(images))]
    return {
        "arrays": {"image": images},
        "subjects": names,
        "split": {"train": names[:1500][:subjects], "test": names[1500:]},
        "source": "handwritten digits of scikit-learn (UCI, Alpaydin and Kaynak 1998)",
        "attrs": {"voxel_mm": [1.0, 1.0]},
    }


def held_out(prepared: Prepared, split: str, count: int) -> Tensor:
    """Volumes (person, 1, z, y, x) of people that training never sees, the first `count` of a split.

    Virtual ones are drawn now. Of files, of `held_out_split`, which raises ValueError where there is nobody.
    """
    if prepared.source in VIRTUAL:
        return others(prepared.source, split, count, prepared.shapes["image"][2:])
    items = prepared.sequences("image", held_out_split(prepared, split), 1)
    return torch.stack([items[i].float() for i in range(min(count, len(items)))])


def held_out_split(prepared: Prepared, split: str) -> str:
    """A split of files that training never sees: this one, or the other where it is empty.

    Raises ValueError where both are empty: people of the training set are never taken for others.
    """
    held = [name for name in (split, "test", "validation") if prepared.split.get(name)]
    if not held:
        raise ValueError(
            f"{prepared.path.name} holds nobody for validation or tests; prepare it again with a validation_share or "
            "test_share above 0"
        )
    return held[0]


def histograms(x: list[Tensor], bins: int = 30) -> dict[str, tuple[list, list]]:
    """For `figures.curves`, the histogram of the values above 0 of each volume, in shares of them."""
    edges = torch.linspace(0.02, volumes.CEILING, bins + 1)
    curves = {}
    for i, one in enumerate(x):
        counts = torch.histogram(one[one > 0.02].flatten(), edges).hist
        curves[f"person {i + 1}"] = ((edges[1:] + edges[:-1]) / 2).tolist(), (counts / counts.sum()).tolist()
    return curves


def mean_and_spread(prepared: Prepared, most: int = 100) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, z, y, x), voxel by voxel, of the first volumes (`Prepared.shown`)."""
    items = prepared.sequences("image", prepared.shown(), 1)
    x = torch.stack([items[i].float() for i in range(min(most, len(items)))])
    return x.mean(0), x.std(0, correction=0)
