"""The MR of a head beside its activity: a random one to learn from, and any one as a network is given it.

    mr = mr_image(signal, rng, spacing_mm, levels)  # of the T1-weighted signal on fine points
    given = mr_condition(mr)  # (slice, 2, y, x): the MR in a scale of its own, and 1 where it is known

Scanners differ in contrast, shading and noise, and a PET scan lies where the patient lay by then: half of the random
MR images are a few millimetres and degrees off.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.ndimage import affine_transform
from torch import Tensor

from companion.data.heads import bias_field, draw_contrast
from companion.operators.linear import check_finite

SHIFT_MM, TURN_DEG = 2.0, 1.5  # standard deviations of how an MR lies off, where it does
OFF = 0.5  # share of the MR images that lie off
OTHER = 0.25  # share of other contrasts than T1-weighted
GAMMA = 0.15  # standard deviation of ln of the exponent that one T1-weighted contrast differs from another by
NOISE = 0.03  # scale of the noise, of bright tissue
BRIGHT = 95.0  # percentile of the tissue's signal that becomes 1
TISSUE = 0.1  # of the largest value, above which a pixel is tissue


def mr_image(signal: np.ndarray, rng: np.random.Generator, spacing_mm: float, levels: np.ndarray) -> np.ndarray:
    """Return an MR (n, n) float32 of points `spacing_mm` apart, from their T1-weighted signal (1 is bright).

    levels: signals of tissue, which a contrast is scaled by.
    """
    if rng.random() < OTHER:
        image = draw_contrast(levels, rng)(signal)
    else:
        image = signal ** math.exp(rng.normal(0, GAMMA))
    if rng.random() < OFF:
        image = moved(image, rng.normal(0, SHIFT_MM, 2) / spacing_mm, math.radians(rng.normal(0, TURN_DEG)))
    return (image * bias_field(len(image), rng)).astype(np.float32)


def moved(image: np.ndarray, shift: np.ndarray, turn: float) -> np.ndarray:
    """Return the image (n, n) turned about its middle by `turn` rad and shifted by `shift` pixels, 0 from outside."""
    cos, sin = math.cos(turn), math.sin(turn)
    matrix, middle = np.array([[cos, -sin], [sin, cos]]), (np.array(image.shape) - 1) / 2
    return affine_transform(image, matrix, (middle - matrix @ (middle + shift)).tolist(), order=1)


def noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the image with noise of a random strength in both parts of a complex one, as a magnitude."""
    sigma = abs(rng.normal(0, NOISE))
    return np.hypot(image + sigma * rng.normal(size=image.shape), sigma * rng.normal(size=image.shape))


def mr_condition(mr: Tensor, known: Tensor | None = None) -> Tensor:
    """Return what a prior is given of MR slices (slice, 1, y, x): (slice, 2, y, x), scaled, and where they are known.

    Each slice is divided by the 95th percentile of its own tissue, so the unit does not matter. known: (slice, 1, y,
    x), 1 where the MR has been measured; by default everywhere but in slices of one value, which it does not reach.
    Raises ValueError for another shape and for values that are not finite.
    """
    if mr.ndim != 4 or mr.shape[1] != 1:
        raise ValueError(f"MR slices of shape {tuple(mr.shape)}; expected (slice, 1, y, x)")
    check_finite(mr, "the MR image")
    if known is None:
        known = (mr.amax((1, 2, 3), keepdim=True) > mr.amin((1, 2, 3), keepdim=True)).to(mr).expand(mr.shape)
    known = known.to(mr)
    image = (mr * known).clamp(min=0)
    return torch.cat([image / torch.stack([bright(one) for one in image])[:, None, None, None], known], 1)


def bright(image: Tensor) -> Tensor:
    """The value that becomes 1: the percentile `BRIGHT` of what is tissue; 1 for an empty image."""
    tissue = image[image > TISSUE * image.max()]
    return torch.quantile(tissue.float(), BRIGHT / 100).to(image) if len(tissue) else image.new_ones(())
