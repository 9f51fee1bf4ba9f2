"""PET scans of slices: the scanner, the counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from companion.operators.counts import poisson_counts, thin
from companion.operators.linear import Diagonal, LinearOperator
from companion.operators.pet import (
    ParallelBeam,
    attenuation_factors,
    background,
    emission_model,
    sensitivity,
    with_counts,
)
from companion.reconstruction.pet import mlem

FIELD_MM = 224.0  # side of the image and width of the scanner's view: heads fit, scalp included
SCALE_KBQ = 25.0  # kBq/mL that are 1 for the network; grey matter is about 22
BRIGHTEST = 4.0  # of a condition, in network units: 100 kBq/mL, almost twice the hottest lesion

# ------------------------------------------------------------------------------------------------------------ scans


@dataclass(frozen=True, eq=False)
class Scan:
    """Scans of slices: y ~ Poisson(A x + background). x (slice, 1, y, x) in kBq/mL, y (slice, 1, angle, bin) counts."""

    x: Tensor
    y: Tensor
    A: LinearOperator
    background: Tensor | None = None

    def thinned(self, fraction: float, seeds: Sequence[int]) -> Scan:
        """The scans that `fraction` of the dose would have given: each count is kept with this probability."""
        less = None if self.background is None else fraction * self.background
        return Scan(self.x, thin(self.y, fraction, seeds), fraction * self.A, less)


@lru_cache(maxsize=8)
def _model(shape: tuple[int, ...], pixel_mm: float, fwhm_mm: float) -> LinearOperator:
    return emission_model(ParallelBeam(shape, pixel_mm=pixel_mm), fwhm_mm=fwhm_mm)


def scanner(shape: Sequence[int], pixel_mm: float, mu: Tensor | None = None, fwhm_mm: float = 0.0) -> LinearOperator:
    """Return A of slices (y, x) before calibration: twice as many angles as pixels, as published, and attenuation.

    mu (slice, 1, y, x): attenuation coefficients, 1/mm; none: no attenuation. Tables are made once per geometry.
    """
    A = _model(tuple(shape), float(pixel_mm), float(fwhm_mm))
    if mu is None:
        return A
    P = _model(tuple(shape), float(pixel_mm), 0.0)
    return Diagonal(attenuation_factors(P, mu), A.range_shape) @ A


def acquire(
    x: Tensor,
    mu: Tensor | None,
    counts: float | Tensor,
    seeds: Sequence[int],
    *,
    pixel_mm: float,
    fwhm_mm: float = 0.0,
    randoms: float = 0.0,
    scatter: float = 0.0,
) -> Scan:
    """Return scans of activity x (slice, 1, y, x), each calibrated so that `counts` true counts are expected.

    counts: a number or one per slice. randoms, scatter: as a share of the true counts. An item depends on its own seed
    only. Raises ValueError for slices without activity.
    """
    A = with_counts(scanner(x.shape[-2:], pixel_mm, mu, fwhm_mm), x, counts)
    expected = A(x)
    extra = background(expected, randoms, scatter) if randoms or scatter else None
    return Scan(x, poisson_counts(expected if extra is None else expected + extra, seeds), A, extra)


def iterates(scan: Scan, iterations: Sequence[int]) -> Tensor:
    """Return the MLEM images (slice, iterate, y, x) of a scan after each number of iterations, kBq/mL."""
    kept = {}
    mlem(
        scan.y,
        scan.A,
        scan.background,
        iterations=max(iterations),
        callback=lambda k, x: kept.update({k: x}) if k in iterations else None,
    )
    return torch.cat([kept[k] for k in iterations], 1)


def mean_sensitivity(A: LinearOperator) -> Tensor:
    """Return the counts that 1 kBq/mL gives in a pixel, mean over pixels, one per slice: what the dose is, in A."""
    return sensitivity(A).mean((-3, -2, -1)).reshape(-1)


def dose_channel(counts_per_kbq: Tensor, scale_kbq: float) -> Tensor:
    """Return the dose as a network sees it, about -0.5 to 0.5 for 2 10^3 to 2 10^6 counts a slice of 64 x 64.

    counts_per_kbq (slice,): `mean_sensitivity`. It is known before anything is measured.
    """
    return ((counts_per_kbq * scale_kbq).log() - 4.15) / 7


def as_condition(images: Tensor, counts_per_kbq: Tensor, scale_kbq: float) -> Tensor:
    """Return conditions (slice, iterate + 1, y, x) of MLEM iterates in kBq/mL: scaled, and a channel with the dose.

    Values are held below BRIGHTEST: iterates of few counts have brighter pixels, all noise.
    """
    dose = dose_channel(counts_per_kbq.to(images), scale_kbq)[:, None, None, None]
    return torch.cat([(images / scale_kbq).clamp(max=BRIGHTEST), dose.expand(-1, 1, *images.shape[-2:])], 1)


def condition(scan: Scan, iterations: Sequence[int], scale_kbq: float = SCALE_KBQ) -> Tensor:
    """Return what a conditional network is given of a scan, (slice, iterate + 1, y, x).

    Its scale comes from the calibration of the scan, counts to kBq/mL, and never from the image.
    """
    counts_per_kbq = mean_sensitivity(scan.A).expand(len(scan.y))
    return as_condition(iterates(scan, iterations), counts_per_kbq, scale_kbq)
