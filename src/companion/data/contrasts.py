"""Virtual people in several contrasts: the same anatomy, shading and heights in each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from companion.data import anatomy
from companion.data.intensity import scaled

CONTRASTS = ("T1w", "T2w", "PDw")
MAPS = ("labels", "lesion")  # arrays beside the contrasts, which are no images
SCALE = (
    "percentiles 0.5 of all values and 99.5 of the foreground of a subject's slices are 0 and 1 "
    "(data.paired.percentile_scale); clipped"
)


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
                image = torch.from_numpy(scaled(image.numpy(), name=contrast)[0])
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
