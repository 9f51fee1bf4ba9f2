"""Activity of people from files, as slices of one size: published phantoms, BrainWeb models, NIfTI maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from companion.data.pet import Activity, activity_from_labels, load_activity, load_brainweb, load_phantoms

PHANTOMS_MM = 224.0  # side of the published phantoms' images
BRAINWEB, NIFTI = (".mnc", ".mnc.gz", ".raws", ".raws.gz", ".rawb", ".rawb.gz"), (".nii", ".nii.gz")


@dataclass(frozen=True)
class Person:
    """What a source gives of one subject: image (slice, 1, y, x), mu or none, and its place (slice,) from 0 to 1."""

    name: str
    image: Tensor
    mu: Tensor | None
    place: Tensor
    pixel_mm: float


def read_people(path: Path, most: int, per_subject: int, image_size: int) -> Iterator[Person]:
    """Yield the subjects of a phantoms .npz (relative activity) or of a folder of files (kBq/mL), `most` at most.

    Raises FileNotFoundError or ValueError for what is neither, or holds none.
    """
    if path.suffix == ".npz":
        for i, volume in enumerate(load_phantoms(path)[:most]):
            activity = Activity(volume[:, 0], PHANTOMS_MM / volume.shape[-1], np.eye(4))
            yield chosen_slices(str(i), activity, per_subject, image_size)
    elif path.is_dir():
        files = [f for f in sorted(path.iterdir()) if f.name.endswith(BRAINWEB + NIFTI)]
        if not files:
            raise ValueError(f"{path} holds no {', '.join(BRAINWEB + NIFTI)} files; give a folder that does")
        for file in files[:most]:
            labels = file.name.endswith(BRAINWEB)
            activity = activity_from_labels(load_brainweb(file), image_size) if labels else load_activity(file)
            yield chosen_slices(file.name, activity, per_subject, image_size)
    else:
        raise FileNotFoundError(f"{path} is neither a phantoms .npz nor a folder; give one, or source: cohort")


def chosen_slices(name: str, a: Activity, per_subject: int, image_size: int) -> Person:
    """Evenly spaced slices that are not empty, brought to the wanted size by averaging."""
    filled = torch.nonzero(a.image.flatten(1).sum(1) > 0)[:, 0]
    at = filled[torch.linspace(0, len(filled) - 1, min(per_subject, len(filled))).round().long()]
    side = max(a.image.shape[-2:])
    shares = _area_shares(side, image_size)

    def resized(stack: Tensor | None) -> Tensor | None:
        if stack is None:
            return None
        x = stack[at][:, None]
        height, width = x.shape[-2:]
        low, left = (side - height) // 2, (side - width) // 2
        x = F.pad(x, (left, side - width - left, low, side - height - low))
        return shares @ x @ shares.T

    place = at / max(1, len(a.image) - 1)
    return Person(name, resized(a.image), resized(a.mu), place, a.pixel_mm * side / image_size)


def _area_shares(n: int, size: int) -> Tensor:
    """What each of n pixels contributes to the mean over each of `size` larger or smaller ones, (size, n)."""
    old, new = torch.arange(n + 1) / n, torch.arange(size + 1) / size
    low, high = torch.maximum(old[:-1], new[:-1, None]), torch.minimum(old[1:], new[1:, None])
    return (high - low).clamp(min=0) * size
