"""Images of virtual people as the notebooks use them: slices, and sequences of slices or of frames of a heart beat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from companion.data import anatomy, heart
from companion.data.contrasts import CONTRASTS
from companion.data.nifti import save_nifti
from companion.data.store import Prepared

CONTRAST = "T1w"
HEART_VIEW_MM = 160.0  # side of the square of the chest around the heart that cine sequences show
SCALE = "1 is the signal of the subject's brightest pure tissue"
SOURCES = {  # embedded cohorts of sequences: scale of their images, and where they come from
    "brain": (SCALE, f"virtual cohort of companion.data.anatomy (ICBM 152), {CONTRAST} axial slices"),
    "heart": ("1 is the signal of blood", "virtual cohort of companion.data.heart, short-axis cine"),
}


def slices(split: str, subjects: int, image_size: int, per_subject: int = 1, progress: bool = False) -> Tensor:
    """Complex slices (subject * slice, 1, y, x) of the first subjects of a split of the brain cohort.

    With one slice each, the heights of successive subjects sweep the slab, so that few subjects show all of it.
    """
    images = []
    for i, subject in enumerate(tqdm(anatomy.cohort(split, subjects), desc="subjects", disable=not progress)):
        heights = anatomy.slice_heights(subject, per_subject if per_subject > 1 else subjects)
        heights = heights if per_subject > 1 else heights[i : i + 1]
        images.append(
            anatomy.render(subject, CONTRAST, (len(heights), image_size, image_size), slices_mm=heights).image
        )
    return torch.cat(images)[:, None]


def cohorts(source: str):
    """The module of an embedded cohort: anatomy or heart."""
    return heart if source == "heart" else anatomy


def volume_heights(subject: anatomy.Subject, frames: int, spacing_mm: float) -> Tensor:
    """MNI heights (frame,) of evenly spaced slices from the lowest up, in the middle of the slab, jittered."""
    low, high = anatomy.SLAB_MM
    jitter = torch.rand((), generator=subject.generator("volume")) - 0.5
    return (low + high) / 2 + spacing_mm * (torch.arange(frames) - (frames - 1) / 2 + jitter)


def volume(
    source: str, split: str, index: int, frames: int, image_size: int, spacing_mm: float, beyond: int = 0
) -> Tensor:
    """The complex sequence (frame, 1, y, x) of one person of an embedded cohort.

    beyond: so many frames more, as the sequence would go on: slices further up, or the next heart beat.
    """
    shape = (image_size, image_size)
    if source == "heart":
        cycles = (frames + beyond) / frames
        patient = heart.cohort(split, index + 1)[index]
        return heart.render(patient, frames + beyond, shape, HEART_VIEW_MM / image_size, cycles=cycles).image[:, None]
    subject = anatomy.cohort(split, index + 1)[index]
    heights = volume_heights(subject, frames, spacing_mm)
    heights = torch.cat([heights, heights[-1] + spacing_mm * torch.arange(1, beyond + 1)])
    return anatomy.render(subject, CONTRAST, (len(heights), *shape), slices_mm=heights).image[:, None]


def volumes(
    source: str,
    split: str,
    subjects: int,
    frames: int,
    image_size: int,
    spacing_mm: float,
    progress: bool = False,
    beyond: int = 0,
) -> Tensor:
    """Complex sequences (subject, frame, 1, y, x) of the first people of a split of an embedded cohort."""
    if source not in SOURCES:
        raise ValueError(f"there is no embedded cohort {source!r}; expected one of {', '.join(SOURCES)}")
    people = tqdm(range(subjects), desc="subjects", disable=not progress)
    return torch.stack([volume(source, split, i, frames, image_size, spacing_mm, beyond) for i in people])


def sequence_arrays(
    source: str, image_size: int, frames: int, subjects: int, spacing_mm: float, progress: bool = True
) -> dict[str, object]:
    """What `write_dataset` stores of an embedded cohort: magnitudes (subject, frame, 1, y, x) float32.

    Phases are not stored: `sequence_loss` draws a new one each time a window is shown.
    """
    images = volumes(source, "train", subjects, frames, image_size, spacing_mm, progress)
    scale, about = SOURCES[source]
    return {
        "arrays": {"magnitude": images.abs().numpy()},
        "units": {"magnitude": "1"},
        "scale": {"magnitude": scale},
        "seed": cohorts(source).cohort("train", 1)[0].seed,
        "source": about,
        "split": {"train": range(subjects)},
        "attrs": {"spacing_mm": spacing_mm},
    }


SPACING_MM = 3.25  # of the slices of virtual people whose file does not say


def validation_sequences(source: str, prepared: Prepared, window: int, people: int = 16) -> Tensor:
    """Validation people (person, window + 1, 1, y, x) of an embedded cohort, spaced and sized as a prepared file's."""
    side = next(iter(prepared.shapes.values()))[-1]
    spacing = float(prepared.attrs.get("spacing_mm", SPACING_MM))
    return volumes(source, "validation", people, window + 1, side, spacing)


def example_volume(path: Path, sources: Sequence[str], target: str, split: str = "test") -> Path:
    """The path of a NIfTI volume of a held-out person in another contrast: odd in size, lying oblique."""
    from scipy.spatial.transform import Rotation  # takes a second to import

    source = next(c for c in (*sources, *CONTRASTS) if c != target)
    shape, voxel, spacing = (11, 81, 71), 2.5, 8.0
    heights = anatomy.SLAB_MM[0] + spacing * torch.arange(shape[0])  # the slab that the cohort's slices come from
    image = anatomy.render(anatomy.cohort(split, 1)[0], source, shape, voxel, heights).image.abs()
    upright = anatomy.affine(shape, voxel)
    upright[2, 2:] = spacing, heights[0].item()
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("xyz", (12, -9, 15), degrees=True).as_matrix()
    return save_nifti(path, 1000 * image.numpy(), affine=turned @ upright, units="made up")
