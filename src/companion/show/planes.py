"""Volumes (1, z, y, x) as rows of pictures for `figures.image_grid`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def planes(x: Tensor) -> dict[str, Tensor]:
    """The middle axial, coronal and sagittal slice of a volume (1, z, y, x), head up; an image as it is."""
    if x.ndim == 3:
        return {"image": x}
    k, j, i = (n // 2 for n in x.shape[1:])
    return {"axial": x[:, k], "coronal": x[:, :, j].flip(1), "sagittal": x[..., i].flip(1)}


def by_plane(volumes: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A row for each plane, a column for each named volume (1, z, y, x)."""
    shown = {name: planes(x) for name, x in volumes.items()}
    return {plane: {name: images[plane] for name, images in shown.items()} for plane in next(iter(shown.values()))}


def sheet(volumes: Tensor, columns: int = 8) -> dict[str, dict[str, Tensor]]:
    """Volumes (draw, 1, z, y, x) in three planes, many in several blocks."""
    rows = {}
    for start in range(0, len(volumes), columns):
        part = [planes(x) for x in volumes[start : start + columns]]
        blank = {plane: torch.full_like(image, torch.nan) for plane, image in part[0].items()}
        part += [blank] * (columns - len(part) if len(volumes) > columns else 0)
        label = f"{start + 1}-{start + columns}\n" if len(volumes) > columns else ""
        for plane in part[0]:
            rows[label + plane] = {str(i + 1): images[plane] for i, images in enumerate(part)}
    return rows
