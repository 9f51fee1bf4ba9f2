"""Images of virtual people as the notebooks use them: slices, and sequences of slices or of frames of a heart beat."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from companion.data import anatomy, heart

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
    subject = cohorts(source).cohort(split, index + 1)[index]
    if source == "heart":
        cycles = (frames + beyond) / frames
        return heart.render(subject, frames + beyond, shape, HEART_VIEW_MM / image_size, cycles=cycles).image[:, None]
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
