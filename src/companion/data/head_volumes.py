"""Volumes of heads and brains that nobody has, for priors of voxels: what `companion.data.heads` does to slices, in 3D.

heads = load_heads("data/heads", "train")
volume = head_volume(heads[0], np.random.default_rng(0), size=48)     # (48, 48, 48), 1 is bright tissue
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from companion.data.heads import Head, draw_centre, draw_contrast, rotation, spline_matrix

VOXEL_MM = (1.5, 4.0)  # range of voxel sizes
USUAL_MM = (2.5, 3.5)  # of most of them
FINE_MM = 1.7  # points lie at most so far apart before they are averaged to voxels
WAVES = ((60.0, 3.0), (25.0, 1.0))  # lengths and amplitudes of displacements, mm


def head_volume(head: Head, rng: np.random.Generator, size: int = 48, voxel_mm: float | None = None) -> np.ndarray:
    """Return a volume (size, size, size) float32 of a warped head in a new contrast, position and voxel size.

    1 is the 99th percentile of the tissue's signal. Noise-free, but for what noise the head's own scan had.
    """
    low, high = USUAL_MM if rng.random() < 0.7 else VOXEL_MM
    voxel = float(np.exp(rng.uniform(math.log(low), math.log(high)))) if voxel_mm is None else voxel_mm
    fine = math.ceil(voxel / FINE_MM)  # points along a voxel
    n = size * fine
    axes = torch.from_numpy((rotation(rng) / np.exp(rng.normal(0, 0.08) + rng.normal(0, 0.05, 3))).astype(np.float32))
    line = (torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * voxel / fine
    grid = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1)
    points = draw_centre(head, rng, size * voxel) + grid @ axes
    for length, amplitude in WAVES:
        fields = smooth_noise(n, rng, max(4, round(size * voxel / length) + 3), 3)
        points += amplitude * abs(rng.normal()) * fields.movedim(0, -1)
    tone = draw_contrast(head.levels.numpy(), rng)
    image = torch.from_numpy(tone(head.at(points).numpy()))
    for _ in range(int(rng.integers(4)) if rng.random() < 0.4 else 0):
        image = _with_lesion(image, rng, grid)
    image = image * (abs(rng.normal(0, 0.2)) * smooth_noise(n, rng, 4)[0]).exp().clamp(0.3, 2)
    image = F.avg_pool3d(image[None, None], fine)[0, 0].numpy()
    return gaussian_filter(image, rng.uniform(0.25, 0.7)) if rng.random() < 0.3 else image


def smooth_noise(n: int, rng: np.random.Generator, controls: int, channels: int = 1) -> Tensor:
    """Return fields (channels, n, n, n) of about unit variance, smooth between `controls` random values a side."""
    noise = torch.from_numpy(rng.normal(size=(channels, controls, controls, controls)).astype(np.float32))
    between = spline_matrix(controls, n)
    for axis in (1, 2, 3):
        noise = (noise.movedim(axis, -1) @ between.T).movedim(-1, axis)
    return noise


def _with_lesion(image: Tensor, rng: np.random.Generator, grid: Tensor) -> Tensor:
    """The image with one more round region, of another signal or of a changed one."""
    n = len(image)
    middle = grid[tuple(int(i) for i in rng.integers(n, size=3))]
    stretch = torch.from_numpy(np.exp(rng.normal(0, 0.3, 3)).astype(np.float32))
    far = ((grid - middle) * stretch).norm(dim=-1) / rng.uniform(2, 25)
    weight = torch.sigmoid((1 - far) / rng.uniform(0.02, 0.2)) * (image / 0.1).clamp(0, 1)
    other = rng.uniform(0, 1.2) if rng.random() < 0.7 else image * rng.uniform(0.4, 1.6)
    return image * (1 - weight) + weight * other
