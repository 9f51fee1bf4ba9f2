"""Prepared volumes: virtual people, digits to check the code in 2D, and folders of brains; who is held out.

Synthetic brain volumes by latent diffusion follow DIPY's VQ-VAE and diffusion project of 2023, which ended in noise;
`failures.mistakes` shows why, by experiment. Here latents have mean 0 and standard deviation 1 in every channel over
the whole training set, these numbers travel with the prior, and a noise schedule that leaves part of the signal at its
end is refused before training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from companion.data import anatomy, volumes
from companion.data.intake.records import reason
from companion.data.intake.splits import split_people, split_table
from companion.data.rows import Rows
from companion.data.store import Prepared, SequenceDataset, open_dataset, prepare_once
from companion.extras import extra
from companion.files import project_root
from companion.models.latent import LatentPrior
from companion.parameters import Parameters, param

COHORT = "virtual cohort of companion.data.anatomy (ICBM 152), T1w"
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
    people: str | None = param(None, "of files: table (CSV, TSV) with file, subject, session, split; none: by names")


@dataclass(frozen=True)
class PrepareData(Reading, Parameters):
    """Parameters of latent3d/1_data.ipynb."""

    source: str = param(
        "cohort",
        "cohort: the embedded one; digits: small 2D images, to check the code; else a folder "
        "of NIfTI volumes, such as NFBS or CC359",
    )
    data: str = param("data/latent3d_64.h5", "where the prepared volumes go; kept when it is there already")


def prepare(p: PrepareData, progress: bool = True) -> Prepared:
    """The prepared volumes, made and stored once as HDF5.

    Arrays: image (person, 1, z, y, x) float16 on the scale of `data.volumes`; tissue_ml (person, 3) CSF, grey and white
    matter of virtual people; affine (person, 4, 4), scale (person,). Files that cannot be used are named with the
    reason in attrs["skipped"]. Raises ValueError when no file can be used, or `p.data` holds other volumes than the
    parameters ask for.
    """
    path, wanted = project_root() / p.data, p.pick("source", "shape", "subjects")
    if p.source == "digits" and tuple(p.shape) != (16, 16):
        raise ValueError(f"digits have the shape (16, 16), not {p.shape}; set shape to it")
    if p.source != "digits" and (len(p.shape) != 3 or (p.voxel_mm and len(p.voxel_mm) != 3)):
        raise ValueError(f"shape {p.shape} and voxel_mm {p.voxel_mm} must have three numbers each, for z, y and x")
    if p.source not in ("cohort", "digits"):
        wanted |= p.pick("validation_share", "test_share", "contrast", "people", "seed")
        wanted["voxel_mm"] = p.voxel_mm or volumes.spacing(p.shape)

    def make() -> dict:
        if p.source == "digits":
            made = digits(p.subjects)
        elif p.source == "cohort":
            made = virtual_people(p.subjects, p.shape, progress)
        else:
            made = read_folder(project_root() / p.source, path.parent, p, p.seed, progress)
        names = made["arrays"]
        scale = {name: volumes.SCALE if name == "image" else "1" for name in names}
        return made | {"units": {name: UNITS[name] for name in names}, "scale": scale, "seed": p.seed}

    return prepare_once(path, wanted, make, ["image"])


def virtual_people(subjects: int, shape: tuple[int, ...], progress: bool = False) -> dict:
    """What `write_dataset` takes of virtual people, all for training: others are drawn when needed."""
    image, tissue = np.empty((subjects, 1, *shape), np.float16), np.empty((subjects, 3), np.float32)
    people = anatomy.cohort("train", subjects)
    for i, subject in enumerate(tqdm(people, desc="people", disable=not progress)):
        person = volumes.virtual(subject, shape)
        image[i, 0], tissue[i], affine = person.image, person.tissue_ml, person.affine
    seeds = [str(subject.seed) for subject in people]
    return {
        "arrays": {"image": image, "tissue_ml": tissue, "affine": np.repeat(affine[None], subjects, 0)},
        "subjects": seeds,
        "split": {"train": seeds},
        "source": COHORT,
        "attrs": {"voxel_mm": list(volumes.spacing(shape))},
    }


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
            volume, scale = volumes.load_scan(scan, r.shape, voxel_mm)
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
    people = split_people([scan.subject for scan in used.values()], shares, seed, scans.split)
    split = {part: [name for name, scan in used.items() if scan.subject in who] for part, who in people.items()}
    if progress:
        files = {who: [n for n, s in used.items() if s.subject == who] for part in people.values() for who in part}
        print(split_table(people, files))
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

    images = torch.from_numpy(load_digits().images / 16).float()[:, None]
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

    Of the cohort they are drawn now. Of files, where the split is empty: of the other held-out one. Raises ValueError
    where both are empty: people of the training set are never taken for others.
    """
    if prepared.source == COHORT:
        shape = prepared.shapes["image"][2:]
        return torch.stack([volumes.virtual(one, shape).image[None] for one in anatomy.cohort(split, count)])
    others = [name for name in (split, "test", "validation") if prepared.split.get(name)]
    if not others:
        raise ValueError(
            f"{prepared.path.name} holds nobody for validation or tests; prepare it again with a validation_share or "
            "test_share above 0"
        )
    items = prepared.sequences("image", others[0], 1)
    return torch.stack([items[i].float() for i in range(min(count, len(items)))])


def unseen(prior: LatentPrior, data: str, split: str, count: int) -> Tensor:
    """Volumes (person, 1, z, y, x) of people the prior never saw, on its grid: of the prepared file `data`.

    Without that file, of the embedded cohort. Raises ValueError for a file on another grid.
    """
    path = project_root() / data
    if not path.exists():
        return torch.stack([volumes.virtual(one, prior.shape).image[None] for one in anatomy.cohort(split, count)])
    prepared = open_dataset(path, require=["image"])
    check_grid(prepared, prior)
    return held_out(prepared, split, count)


def check_grid(prepared: Prepared, prior: LatentPrior) -> None:
    """Raise ValueError unless prepared volumes are of the shape, voxel size and kind that the prior was trained on.

    Of priors on the embedded cohort: whether the file shows brains in its place. Whole heads fill more, other crops
    other voxels, and both would be taken for odd brains in silence.
    """
    shape = tuple(prepared.shapes["image"][-3:])
    if shape != prior.shape:
        raise ValueError(
            f"{prepared.path} holds volumes of {shape} voxels, the prior was trained on {prior.shape}; "
            "give its own data, or a name that does not exist to draw the embedded cohort anew"
        )
    found, known = prepared.attrs.get("voxel_mm"), prior.config["data"].get("voxel_mm")
    if found and known and any(abs(a / b - 1) > SAME for a, b in zip(found, known, strict=True)):
        raise ValueError(
            f"{prepared.path} has voxels of {' x '.join(f'{v:.3g}' for v in found)} mm, the prior was trained on "
            f"{' x '.join(f'{v:.3g}' for v in known)} mm; prepare it again with voxel_mm={tuple(known)}"
        )
    if prior.config["data"].get("source", COHORT) == COHORT != prepared.source:
        check_content(prepared)


def check_content(prepared: Prepared) -> None:
    """Raise ValueError unless the volumes show stripped brains where the embedded cohort has them."""
    part = next((name for name in ("train", "validation", "test") if prepared.split.get(name)), None)
    if part is None:
        return
    items = prepared.sequences("image", part, 1)
    mean = torch.stack([items[i].float().flatten() for i in range(min(4, len(items)))]).mean(0)
    brain = volumes.virtual(anatomy.cohort("train", 1)[0], tuple(prepared.shapes["image"][-3:])).image.flatten() > 0.1
    filled = mean > 0.1
    inside, outside = (filled & brain).sum() / brain.sum(), (filled & ~brain).sum() / filled.sum().clamp(min=1)
    if inside < FILLS or outside > SPILLS:
        raise ValueError(
            f"{prepared.path}: its volumes fill {inside:.0%} of where the prior's brains lie, and {outside:.0%} of what"
            " they show lies elsewhere; the prior knows stripped brains in MNI: strip and register, or train anew"
        )


SAME = 0.02  # relative difference of voxel sizes that are one
FILLS, SPILLS = 0.6, 0.4  # of the place of brains, least filled; of what is shown, most elsewhere


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The first `count` volumes (1, z, y, x) that a prior learned from: read from a prepared file, or made anew.

    own: whether they are the prior's own, all of them; what they are stands in `what`.
    """

    count: int
    shape: tuple[int, int, int]
    stored: SequenceDataset | None
    own: bool = True
    what: str = ""

    @classmethod
    def of(cls, prior: LatentPrior, data: str, most: int) -> TrainingSet:
        """At most so many: virtual people made anew for a prior on the cohort, else those of the prepared file `data`.

        Another file than the prior was trained on is searched, too, but nobody is called unmemorised by it: `own`.
        """
        path, known = project_root() / data, prior.config["data"]
        prepared = open_dataset(path, require=["image"]) if path.exists() else None
        if prepared is not None:
            check_grid(prepared, prior)
        if known.get("source", COHORT) == COHORT:
            count = min(most, known["volumes"])
            return cls(count, prior.shape, None, count == known["volumes"], f"{count} of its {known['volumes']} people")
        if prepared is None:
            raise FileNotFoundError(f"{path} does not exist; the prior's training volumes are searched: give its data")
        stored = prepared.sequences("image", "train", 1)
        count = min(most, len(stored))
        own = known.get("source") == prepared.source and count == known.get("volumes")
        return cls(count, prior.shape, stored, own, f"{count} volumes of {path.name}")

    def __getitem__(self, i: int) -> Tensor:
        if self.stored is not None:
            return self.stored[i].reshape(1, *self.shape).float()
        return volumes.virtual(anatomy.Subject(anatomy.FIRST_SEED["train"] + i), self.shape).image[None]

    def batches(self, size: int = 50) -> Iterator[Tensor]:
        """Yield all of them, (batch, 1, z, y, x)."""
        for i in range(0, self.count, size):
            yield torch.stack([self[j] for j in range(i, min(i + size, self.count))])


def histograms(x: list[Tensor], bins: int = 30) -> dict[str, tuple[list, list]]:
    """For `figures.curves`, the histogram of the values above 0 of each volume, in shares of them."""
    edges = torch.linspace(0.02, volumes.CEILING, bins + 1)
    curves = {}
    for i, one in enumerate(x):
        counts = torch.histogram(one[one > 0.02].flatten(), edges).hist
        curves[f"person {i + 1}"] = ((edges[1:] + edges[:-1]) / 2).tolist(), (counts / counts.sum()).tolist()
    return curves


def mean_and_spread(prepared: Prepared, most: int = 100) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, z, y, x), voxel by voxel, of the first training volumes."""
    items = prepared.sequences("image", "train", 1)
    x = torch.stack([items[i].float() for i in range(min(most, len(items)))])
    return x.mean(0), x.std(0, correction=0)
