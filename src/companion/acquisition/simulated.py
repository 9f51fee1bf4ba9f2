"""Scans to test with: made by another projector, of finer images, than those that the model of the scan knows.

    scan = simulate(fine, mu, 2.5e5, seeds, pixel_mm=3.5, fine=4)     # scan.x: averages over the pixels, scan.A: lines

What the model has only nearly right, as with patients: lines for strips, pixels for structure, a blur of the image for
that of the detectors, attenuation of coarse pixels, a scatter estimate that is broader than the scatter and some per
cent off. What is left out: motion, dead time, normalisation, depth of interaction, the third dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.acquisition.pet import Scan, scanner
from companion.operators.counts import poisson_counts
from companion.operators.linear import Diagonal
from companion.operators.pet import ParallelBeam, background
from companion.operators.strips import Strips
from companion.randomness import randn


@dataclass(frozen=True)
class Detector:
    """What happens to a scan: `fwhm_mm` of the detectors; scatter and randoms as shares of the true counts.

    scatter_error: relative standard deviation of the level of the scatter estimate, one draw a scan.
    scatter_bins: width of the scatter, and of its estimate, in bins of 3.5 mm.
    """

    fwhm_mm: float = 4.0
    scatter: float = 0.2
    randoms: float = 0.1
    scatter_error: float = 0.1
    scatter_bins: tuple[float, float] = (20.0, 26.0)


def simulate(
    x: Tensor,
    mu: Tensor | None,
    counts: float | Tensor,
    seeds: Sequence[int],
    *,
    pixel_mm: float,
    fine: int,
    detector: Detector | None = None,
) -> Scan:
    """Return scans of activity x (slice, 1, fine y, fine x), kBq/mL, `counts` true counts each, with a model to invert.

    mu: attenuation on the same fine pixels, 1/mm, or none. pixel_mm: of the coarse image, whose pixels are `fine` wide.
    An item depends on its own seed only. Raises ValueError for sizes that `fine` does not divide and empty slices.
    """
    detector = Detector() if detector is None else detector
    shape = tuple(n // fine for n in x.shape[-2:])
    if any(n % fine for n in x.shape[-2:]) or shape[0] != shape[1]:
        raise ValueError(f"images of {tuple(x.shape[-2:])} pixels; expected squares of a multiple of fine={fine}")
    beam = ParallelBeam(shape, pixel_mm=pixel_mm)
    lines = Strips(beam, fine)
    trues = lines(x) if mu is None else lines(x) * torch.exp(-lines(mu))
    total = trues.flatten(1).sum(1)
    if not (total > 0).all():
        raise ValueError(f"slices {(total <= 0).nonzero().flatten().tolist()} have no activity in view; leave them out")
    gain = (torch.as_tensor(counts, dtype=torch.float64) / total.double()).to(x.dtype).reshape(-1, 1, 1, 1)
    trues = gain * Strips(beam, fine, detector.fwhm_mm).detected(trues)
    width = 3.5 / pixel_mm
    extra = background(trues, detector.randoms, detector.scatter, detector.scatter_bins[0] * width)
    y = poisson_counts(trues + extra, seeds)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    level = 1 + detector.scatter_error * randn((1, 1, 1), torch.float32, generators).clamp(-2, 2)
    model = scanner(shape, pixel_mm, None if mu is None else F.avg_pool2d(mu, fine), detector.fwhm_mm)
    estimate = background(trues, 0.0, detector.scatter, detector.scatter_bins[1] * width) * level
    estimate = estimate + background(trues, detector.randoms)
    known = estimate if detector.scatter or detector.randoms else None
    return Scan(F.avg_pool2d(x, fine), y, Diagonal(gain.expand(len(x), 1, 1, 1), model.range_shape) @ model, known)
