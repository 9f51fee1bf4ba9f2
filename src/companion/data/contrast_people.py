"""People in several contrasts, slice by slice: of the embedded cohort, or of a prepared file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.data.cohort import called
from companion.data.contrasts import MAPS, cohort_slices
from companion.data.shading import AIR
from companion.data.store import Prepared, open_dataset
from companion.files import project_root
from companion.information.pairs import grey

TRAINING_PEOPLE = 4  # whose tissue histogram matching aims at


@dataclass(frozen=True, eq=False)
class People:
    """Held-out people: contrast -> images (subject, slice, 1, y, x) in [0, 1].

    labels: in the same shape, if there are any. reference: contrast -> tissue of training people, (pixel,), of virtual
    ones where a file has none.
    """

    images: Mapping[str, Tensor]
    labels: Tensor | None
    reference: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, source: str, split: str, subjects: int, slices: int, contrasts: Sequence[str], image_size: int = 64
    ) -> People:
        """So many of a source ("brain" or a prepared file). Raises ValueError for a file that lacks them."""
        names = tuple(dict.fromkeys(contrasts))
        found = stacks(source, split, subjects, names, image_size)
        count, made = found[names[0]].shape[:2]
        if made < slices:
            raise ValueError(f"{slices} slices of each subject are wanted, {source} has {made}; lower slices")
        people = torch.arange(count)[:, None]  # the next person's slices lie a little higher, so that all heights occur
        at = ((torch.arange(slices) + (people + 0.5) / count) * made / slices).long()
        found = {n: x[people, at] for n, x in found.items()}
        known = source == "brain" or open_dataset(project_root() / source).rows("train")
        size = found[names[0]].shape[-1]
        train = stacks(source if known else "brain", "train", TRAINING_PEOPLE, names, image_size if known else size)
        reference = {n: train[n][train["labels"] > 0 if "labels" in train else train[n] > AIR] for n in names}
        return cls({n: found[n] for n in names}, found.get("labels"), reference)

    def inside(self, target: str) -> Tensor:
        """Where there is tissue, bool, in the shape of the images."""
        return self.images[target] > AIR if self.labels is None else self.labels > 0


SLICES = 8  # of each person of the embedded cohort, whose scale is found from all of them


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
    images = [name for name in prepared.shapes if name not in MAPS]
    if (found := called(images, contrast)) is None:
        raise ValueError(f"{prepared.path.name} has no {contrast}; it has {', '.join(images)}")
    return found


def some_slices(prepared: Prepared, count: int, split: str | None = None) -> dict[str, Tensor]:
    """Up to `count` slices (slice, channel, y, x) of each contrast, evenly spread over the subjects of a split.

    split: by default the first of validation, train and test that has somebody, as a file of one person has only one.
    A file without subjects in that split gives an empty dict.
    """
    split = split or prepared.shown("validation", "train", "test")
    if not prepared.rows(split):
        return {}
    stacks = {name: torch.from_numpy(prepared.read(name, split)).flatten(0, 1) for name in prepared.shapes}
    total = len(next(iter(stacks.values())))
    at = torch.linspace(0, total - 1, min(count, total)).round().long()
    return {name: x[at] for name, x in stacks.items()}


def held_out(
    people: str, split: str, subjects: int, source: str, target: str, image_size: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Sources, true targets and tissue masks (image, 1, y, x): a slice of each person, ever higher up."""
    if source == target:
        raise ValueError(f"source is {source}, which is what the translator makes; give another contrast")
    found = stacks(people, split, subjects, (source, target), image_size)
    count, slices = found[target].shape[:2]
    i = torch.arange(count)
    given, truth, *labels = (x[i, i * slices // count] for x in found.values())
    return given, truth, labels[0] > 0 if labels else grey(truth) > AIR
