"""A virtual thorax: attenuation and FDG-like activity of ellipses, for transmission scans. Not a person's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import binary_erosion
from torch import Tensor

from companion.data.pet import MU_WATER

AWAY = 8.0  # mm from edges, which every reconstruction blurs
FINE = 4  # points along each axis of a pixel, over which edges are averaged
# Centre (x, y), half axes (mm), what it is; later ones lie on top. y points to the front.
ELLIPSES = (
    ((0, -118), (190, 14), "couch"),
    ((0, 0), (170, 115), "body"),
    ((-82, 8), (55, 80), "lung"),
    ((82, 8), (55, 80), "lung"),
    ((22, 30), (42, 36), "heart"),
    ((26, 30), (22, 18), "blood"),
    ((0, -62), (20, 24), "spine"),
    ((95, 45), (9, 9), "lesion"),
)
MU = {"couch": 0.0018, "body": MU_WATER, "lung": 0.0027, "heart": MU_WATER, "blood": MU_WATER, "spine": 0.0150,
      "lesion": MU_WATER}  # 1/mm at 511 keV  # fmt: skip
UPTAKE = {"couch": 0.0, "body": 3.0, "lung": 1.5, "heart": 20.0, "blood": 4.0, "spine": 5.0, "lesion": 15.0}  # kBq/mL


@dataclass(frozen=True, eq=False)
class Thorax:
    """mu (1, 1, y, x) in 1/mm, activity in kBq/mL, and a mask of water, AWAY mm from anything else."""

    mu: Tensor
    activity: Tensor
    water: Tensor


def thorax(image_size: int, pixel_mm: float) -> Thorax:
    """The virtual thorax on a grid; every pixel holds the mean over itself."""
    side = FINE * image_size
    axis = (np.arange(side) - (side - 1) / 2) * pixel_mm / FINE
    x, y = axis[None], -axis[:, None]
    mu, activity, tissue = np.zeros((side, side)), np.zeros((side, side)), np.zeros((side, side), bool)
    for (cx, cy), (rx, ry), name in ELLIPSES:
        inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
        mu[inside], activity[inside], tissue[inside] = MU[name], UPTAKE[name], MU[name] == MU_WATER
    pooled = [v.reshape(image_size, FINE, image_size, FINE).mean((1, 3)) for v in (mu, activity, tissue)]
    mu, activity, water = (torch.from_numpy(v).float()[None, None] for v in pooled)
    return Thorax(mu, activity, away_from_edges(water > 0.999, pixel_mm))


def away_from_edges(mask: Tensor, pixel_mm: float) -> Tensor:
    """The mask (1, 1, y, x) without what lies within AWAY mm of its edge."""
    return torch.from_numpy(binary_erosion(mask[0, 0].numpy(), iterations=max(1, round(AWAY / pixel_mm))))[None, None]
