"""Whom a latent prior learned from, and whom it never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from companion.data import anatomy, volumes
from companion.data.heads_download import TRAINING
from companion.data.store import Prepared, open_dataset
from companion.data.volume_folder import COHORT, PATIENTS, VIRTUAL, held_out, held_out_split, others, people
from companion.files import project_root
from companion.models.latent import LatentPrior


def unseen(prior: LatentPrior, data: str, split: str, count: int) -> Tensor:
    """Volumes (person, 1, z, y, x) of people the prior never saw, on its grid: of the prepared file `data`.

    Without that file, and to validate where it has nobody for that, virtual people of the prior's kind. Raises
    ValueError for a file on another grid.
    """
    path, known = project_root() / data, prior.config["data"].get("source", COHORT)
    if not path.exists():
        return others(known if known in VIRTUAL else COHORT, split, count, prior.shape)
    prepared = open_dataset(path, require=["image"])
    check_grid(prepared, prior)
    if split == "validation" and known in VIRTUAL and not prepared.split.get(split):
        return others(known, split, count, prior.shape)
    return held_out(prepared, split, count)


def affine_of_first(prior: LatentPrior, data: str, split: str) -> np.ndarray:
    """From the voxels (x, y, z) of the first volume of `unseen` to mm in the world of the file that it came from."""
    path = project_root() / data
    prepared = open_dataset(path, require=["image"]) if path.exists() else None
    if prepared is None or prepared.source in VIRTUAL or "affine" not in prepared.shapes:
        return prior.affine
    return prepared.read("affine", held_out_split(prepared, split))[0]


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
    if prior.config["data"].get("source", COHORT) in VIRTUAL and prepared.source not in VIRTUAL:
        check_content(prepared)


def check_content(prepared: Prepared) -> None:
    """Raise ValueError unless the volumes show stripped brains where the embedded cohort has them, the same way up."""
    items = prepared.sequences("image", prepared.shown(), 1)
    if not len(items):
        return
    shape = tuple(prepared.shapes["image"][-3:])
    mean = torch.stack([items[i].float() for i in range(min(4, len(items)))]).mean(0).reshape(shape)
    brain = volumes.virtual(anatomy.cohort("train", 1)[0], shape).image > 0.1
    filled = mean > 0.1
    inside, outside = (filled & brain).sum() / brain.sum(), (filled & ~brain).sum() / filled.sum().clamp(min=1)
    if inside < FILLS or outside > SPILLS:
        raise ValueError(
            f"{prepared.path}: its volumes fill {inside:.0%} of where the prior's brains lie, and {outside:.0%} of what"
            " they show lies elsewhere; the prior knows stripped brains in MNI: strip and register, or train anew"
        )
    turns = {"upside down": (0,), "back to front": (1,), "upside down and back to front": (0, 1)}
    gain = {name: ((filled.flip(axes) & brain).sum() - (filled & brain).sum()).item() for name, axes in turns.items()}
    turn = max(gain, key=lambda name: gain[name])
    if 2 * gain[turn] > TURNED * (filled.sum() + brain.sum()).item():
        raise ValueError(
            f"{prepared.path}: its brains fit the prior's better {turn}, so their affines seem to be wrong; correct "
            "them in the files and prepare these again"
        )


SAME = 0.02  # relative difference of voxel sizes that are one
FILLS, SPILLS = 0.6, 0.4  # of the place of brains, least filled; of what is shown, most elsewhere
TURNED = 0.03  # Dice with the prior's brains by which another way up is better; of people as they lie it is worse


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The first `count` volumes (1, z, y, x) that a prior learned from: read from a prepared file, or made anew.

    own: whether they are the prior's own, all of them; what they are stands in `what`.
    """

    count: int
    shape: tuple[int, ...]
    volume: Callable[[int], Tensor]
    own: bool = True
    what: str = ""

    @classmethod
    def of(cls, prior: LatentPrior, data: str, most: int) -> TrainingSet:
        """At most so many of the prior's own where they are virtual or in the prepared file `data`, else of that file.

        Virtual people are made anew; of patients whose anatomy is a real head only where data/heads has it. Another
        file than the prior was trained on is searched, too, but nobody is called unmemorised by it: `own`.
        """
        path, known = project_root() / data, prior.config["data"]
        prepared = open_dataset(path, require=["image"]) if path.exists() else None
        if prepared is not None:
            check_grid(prepared, prior)
        source = known.get("source", COHORT)
        wanted = min(most, known.get("volumes", most))
        same = prepared is not None and prepared.source == source and len(prepared.rows("train")) >= wanted
        if source in VIRTUAL and not same:
            return cls._anew(source, prior.shape, known["volumes"], most)
        if prepared is None:
            raise FileNotFoundError(f"{path} does not exist; the prior's training volumes are searched: give its data")
        stored = prepared.sequences("image", "train", 1)
        count = min(most, len(stored))
        own = source == prepared.source and count == known.get("volumes")
        return cls(count, prior.shape, stored.__getitem__, own, f"{count} volumes of {path.name}")

    @classmethod
    def _anew(cls, source: str, shape: tuple[int, ...], volumes: int, most: int) -> TrainingSet:
        heads, each = project_root() / "data/heads", 1
        if source == PATIENTS:
            if not all((heads / f"{name}.nii.gz").exists() for name in TRAINING):
                heads, each = None, 1 + len([name for name in TRAINING if not name.endswith("_brain")])
        make = people(source, "train", shape, heads if source == PATIENTS else None)
        count = min(most, math.ceil(volumes / each))
        missing = "" if each == 1 else ", those of the template; companion data get heads brings the others"
        what = f"{count} of its {volumes} people{missing}"
        return cls(count, shape, lambda i: make(i * each).image, count == volumes, what)

    def __getitem__(self, i: int) -> Tensor:
        return self.volume(i).reshape(1, *self.shape).float()

    def batches(self, size: int = 50) -> Iterator[Tensor]:
        """Yield all of them, (batch, 1, z, y, x)."""
        for i in range(0, self.count, size):
            yield torch.stack([self[j] for j in range(i, min(i + size, self.count))])
