"""PET scans of slices: the scanner, the counts, what a network is told of them.

    scan = acquire(x, mu, counts, seeds, pixel_mm=3.5)     # y ~ Poisson(A x + background), A calibrated to counts
    low = scan.thinned(0.25, seeds)                        # exactly the scan of a quarter of the dose
    cond = condition(scan, iterations, scale_kbq)          # (slice, iterate + 1, y, x)

Activity is in kBq/mL from the phantom to the posterior; a network sees activity / SCALE_KBQ, one constant for
everybody, so that no image is ever divided by its own maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from companion.operators.counts import poisson_counts, thin
from companion.operators.linear import Composition, Diagonal, LinearOperator, Scaled
from companion.operators.pet import (
    ParallelBeam,
    attenuation_factors,
    background,
    emission_model,
    mean_activity,
    sensitivity,
    with_counts,
)
from companion.operators.stacked import Stacked
from companion.parameters import param

SCALE_KBQ = 25.0  # kBq/mL that are 1 for the network; grey matter is about 22
BRIGHTEST = 4.0  # of a condition, in network units: 100 kBq/mL, almost twice the hottest lesion

# ------------------------------------------------------------------------------------------------------------ scans


@dataclass(frozen=True, eq=False)
class Scan:
    """Scans of slices: y ~ Poisson(A x + background). x (slice, 1, y, x) in kBq/mL, y (slice, 1, angle, bin) counts.

    x: the truth, None of a patient. background: expected counts of randoms and scatter, as y. mr (slice, 1, y, x): an
    MR of the same person on the same pixels, in any unit; None: there is none. step: distance from each slice to the
    next, in pixels, where they are those of one volume from one end to the other; None: nothing is known of that.
    Scans of volumes, `volume` or of oblique planes, alike: x (scan, 1, z, y, x), y (scan, *A.range_shape); with a step
    of 1 their voxels are cubes.
    """

    x: Tensor | None
    y: Tensor
    A: LinearOperator
    background: Tensor | None = None
    mr: Tensor | None = None
    step: float | None = None

    @property
    def truth(self) -> Tensor:
        """x, where it is known; ValueError for a scan of a patient."""
        if self.x is None:
            raise ValueError("the true activity of this scan is not known; scan a virtual person to compare")
        return self.x

    def thinned(self, fraction: float, seeds: Sequence[int]) -> Scan:
        """The scans that `fraction` of the dose would have given: each count is kept with this probability."""
        less = None if self.background is None else fraction * self.background
        return replace(self, y=thin(self.y, fraction, seeds), A=fraction * self.A, background=less)

    def some(self, index: Tensor | Sequence[int], device: str | torch.device = "cpu") -> Scan:
        """The scans `index` (n,), as often as they are named, on a device."""
        index = torch.as_tensor(index)
        x, b, mr = (
            None if v is None else v.expand(len(self.y), *v.shape[1:])[index].to(device)
            for v in (self.x, self.background, self.mr)
        )
        step = self.step if len(self.A.domain_shape) == 4 else None  # a selection of slices has none
        return Scan(x, self.y[index].to(device), _rows(self.A, index).to(device), b, mr, step)

    def volume(self) -> Scan:
        """The same slices as one scan of a volume, x (1, 1, z, y, x), y (1, 1, z, angle, bin)."""
        n = len(self.y)
        x, b, mr = (
            None if v is None else v.expand(n, *v.shape[1:]).transpose(0, 1)[None]
            for v in (self.x, self.background, self.mr)
        )
        return Scan(x, self.y.transpose(0, 1)[None], Stacked(self.A, n), b, mr)

    def counting_error(self) -> Tensor:
        """The standard deviation (slice,), kBq/mL, of a mean pixel's activity if its own counts were known.

        What the noise of an image is in MRI: known from the counts alone, and as 1 / sqrt(dose).
        """
        per_kbq = mean_sensitivity(self.A).expand(len(self.y))
        return (mean_activity(self.y, self.A, self.background).flatten().cpu() / per_kbq.cpu()).sqrt()


def _rows(A: LinearOperator, index: Tensor) -> LinearOperator:
    """The model of the scans `index`, as often as they are named, of a model of several scans."""
    match A:
        case Diagonal() if A.batch_shape and A.batch_shape[0] > 1:
            return Diagonal(A.weights[index], A.domain_shape, A.domain_dtype)
        case Composition():
            return _rows(A.outer, index) @ _rows(A.inner, index)
        case Scaled():
            return Scaled(A.scalar, _rows(A.operator, index))
    return A


@lru_cache(maxsize=8)
def _model(beam: ParallelBeam, fwhm_mm: float) -> LinearOperator:
    return emission_model(beam, fwhm_mm=fwhm_mm)


def scanner(
    shape: Sequence[int],
    pixel_mm: float,
    mu: Tensor | None = None,
    fwhm_mm: float = 0.0,
    beam: ParallelBeam | None = None,
) -> LinearOperator:
    """Return A of slices (y, x) before calibration, with attenuation.

    mu (slice, 1, y, x): attenuation coefficients, 1/mm; none: no attenuation. beam: the lines; by default twice as many
    angles as pixels, and a bin a pixel, as published. Tables are made once per geometry. Raises ValueError for a beam
    through other pixels.
    """
    beam = ParallelBeam(tuple(shape), pixel_mm=float(pixel_mm)) if beam is None else beam
    if tuple(beam.shape) != tuple(shape) or abs(beam.pixel_mm - pixel_mm) > 1e-6 * pixel_mm:
        raise ValueError(
            f"images {tuple(shape)} with pixels of {pixel_mm:.6g} mm, but the scanner's lines go through {beam.shape} "
            f"of {beam.pixel_mm:.6g} mm; build both for the same grid"
        )
    A = _model(beam, float(fwhm_mm))
    if mu is None:
        return A
    P = _model(beam, 0.0)
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
    beam: ParallelBeam | None = None,
) -> Scan:
    """Return scans of activity x (slice, 1, y, x), each calibrated so that `counts` true counts are expected.

    counts: a number or one per slice. randoms, scatter: as a share of the true counts. beam: as for `scanner`. An item
    depends on its own seed only. Raises ValueError for slices without activity.
    """
    A = with_counts(scanner(x.shape[-2:], pixel_mm, mu, fwhm_mm, beam), x, counts)
    expected = A(x)
    extra = background(expected, randoms, scatter) if randoms or scatter else None
    return Scan(x, poisson_counts(expected if extra is None else expected + extra, seeds), A, extra)


@dataclass(frozen=True)
class Physics:
    """What disturbs a scan, and the model of the scan knows; a form of parameters may inherit from it."""

    attenuation: bool = param(True, "the head attenuates, and the model of the scan knows")
    randoms: float = param(0.0, "of the true counts", minimum=0)
    scatter: float = param(0.0, "of the true counts", minimum=0)

    def acquire(
        self,
        x: Tensor,
        mu: Tensor | None,
        counts: float | Tensor,
        seeds: Sequence[int],
        *,
        pixel_mm: float,
        fwhm_mm: float = 0.0,
        beam: ParallelBeam | None = None,
    ) -> Scan:
        """`acquire` under these conditions."""
        return acquire(
            x,
            mu if self.attenuation else None,
            counts,
            seeds,
            pixel_mm=pixel_mm,
            fwhm_mm=fwhm_mm,
            randoms=self.randoms,
            scatter=self.scatter,
            beam=beam,
        )


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
