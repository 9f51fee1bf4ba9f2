"""Intensity scales of images: percentiles, windows, typical values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

Array = TypeVar("Array", np.ndarray, Tensor)
Size = tuple[int, int]
FOREGROUND = 0.1  # scaled values above this are foreground when slices are chosen
BELOW = 0.1, 0.01  # ringing and noise put no more than this share of an image this far below 0, of its brightest part


# ------------------------------------------------------------------------------------------------------- intensity


@dataclass(frozen=True)
class Scale:
    """The linear map that takes `low` to 0 and `high` to 1, in `units`; values beyond are clipped."""

    low: float
    high: float
    units: str = ""

    def __post_init__(self):
        if not (np.isfinite([self.low, self.high]).all() and self.low < self.high):
            raise ValueError(f"a scale needs finite low < high, got {self.low} and {self.high}")

    def apply(self, x: Array) -> Array:
        """`x` (any shape) in [0, 1]."""
        return ((x - self.low) / (self.high - self.low)).clip(0, 1)

    def undo(self, x: Array) -> Array:
        """`x` (any shape) in the units of the file: exact where `apply` did not clip."""
        return x * (self.high - self.low) + self.low

    def clipped(self, x: Array) -> float:
        """The fraction of `x` that `apply` changes for good."""
        return float(((x < self.low) | (x > self.high)).sum()) / np.prod(x.shape)


def percentile_scale(array: np.ndarray, low: float = 0.5, high: float = 99.5) -> Scale:
    """The scale from percentile `low` of all values to percentile `high` of the foreground, those above the mean.

    The mean lies between air and tissue, so that the amount of air around a head does not change its brightness.
    Raises ValueError for NaN and constant images.
    """
    _check_values(array, "the image")
    if not 0 <= low < high <= 100:
        raise ValueError(f"percentiles must satisfy 0 <= low < high <= 100, got {low} and {high}")
    bottom = float(np.percentile(array, low))
    return Scale(bottom, float(np.percentile(array[array > array.mean(dtype=np.float64)], high)))


def ct_window(centre: float = 40.0, width: float = 400.0) -> Scale:
    """The scale of a CT window, Hounsfield units; by default soft tissue, bone clipped (300 and 2000 keep it)."""
    return Scale(centre - width / 2, centre + width / 2, "HU")


def scaled(array: np.ndarray, scale: Scale | None = None, name: str = "the image") -> tuple[np.ndarray, Scale]:
    """`array` in [0, 1], float32, and its scale, by default `percentile_scale`.

    Raises ValueError for NaN, complex values, constant images, and windows in which nothing is to be seen.
    """
    _check_values(array, name)
    scale = percentile_scale(array) if scale is None else scale
    values = scale.apply(array.astype(np.float32))
    if values.min() == values.max():
        raise ValueError(
            f"{name}: values from {array.min():.4g} to {array.max():.4g} all lie outside the window {scale.low:.4g} "
            f"to {scale.high:.4g} {scale.units}; is the image in these units (a CT with its rescale intercept)?"
        )
    return values, scale


def typical_scale(scales: Iterable[Scale]) -> Scale:
    """The median scale of several subjects: what a translated image, whose own scale nobody knows, is written with."""
    scales = list(scales)
    if not scales:
        raise ValueError("no scales to take the median of")
    low, high = (float(np.median([getattr(s, end) for s in scales])) for end in ("low", "high"))
    return Scale(low, high, scales[0].units)


def magnitudes(array: np.ndarray, name: str = "the image") -> np.ndarray:
    """What an image (any shape) of magnitudes shows, float32: |x| of complex values, and real ones, at least 0.

    Ringing and interpolation leave a little below 0, which is cut. Raises ValueError for NaN, empty and constant
    images, and for images in which air is not 0, as in CT (HU), standardised values or stored numbers without their
    offset: cut or turned over, they would be another image.
    """
    array = np.abs(array) if np.iscomplexobj(array) else array
    if not array.any():
        raise ValueError(f"{name} is empty: 0 everywhere")
    _check_values(array, name)
    array = array.astype(np.float32)
    bright = float(np.percentile(np.abs(array), 99.9)) or float(np.abs(array).max())
    if (below := float((array < -BELOW[0] * bright).mean())) > BELOW[1]:
        raise ValueError(
            f"{name}: values from {array.min():.4g} to {array.max():.4g}, {below:.0%} of them far below 0; expected "
            "magnitudes, 0 in air: undo what moved them (HU, standardisation, an offset)"
        )
    return array.clip(0)


# ------------------------------------------------------------------------------------------------------------ helpers


def _check_values(array: np.ndarray, name: str) -> None:
    if array.dtype.kind not in "iuf" or not array.size:
        raise ValueError(f"{name}: expected real numbers, got {array.dtype} of shape {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name}: {int((~np.isfinite(array)).sum())} NaN or infinite values; mask or repair them")
    if array.min() == array.max():
        raise ValueError(f"{name}: constant, {array.min()} everywhere: nothing to learn or translate; remove it")
