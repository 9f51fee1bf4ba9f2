"""Whether the model of one's own scan can explain its counts at all, asked before anything long starts.

    found = misfit(own.scan)  # a few steps of MLEM, and as many for counts drawn from what they lead to expect
    found.check("my_scan.npz")  # ValueError where no image explains the counts

Angles and bins in another place, dead detectors, factors turned upside down and counts that wrapped leave what no image
explains; smoothed, interpolated and scaled counts scatter less or more than counts do. Mirrored and turned images
explain counts as well as upright ones: a scan cannot say where the patient's right hand is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import avg_pool2d

from companion.acquisition.pet import Scan
from companion.data.pet import LEAST_KBQ, MOST_KBQ
from companion.operators.counts import expected_counts, expected_deviance, poisson_counts, poisson_deviance
from companion.reconstruction.pet import mlem

ITERATIONS = 20  # of MLEM: leaves 1 % of the counts unexplained where the model is right (64 and 128 pixels)
TOLD, REFUSED = 0.03, 0.15  # relative error of expected counts that is said, and beyond which a scan is refused
LEAST_SCATTER = 0.8  # of counting noise: what is below was averaged or scaled
SQUARE = 5  # pixels along each side
CHANCE = 4.0  # standard errors that chance may do


@dataclass(frozen=True)
class Misfit:
    """How a scan and its model disagree, of the worst slice.

    error: relative, of the expected counts, beyond counting noise (root mean square). scatter: deviance of the counts
    over that of counts drawn from the fitted law and fitted in turn, 1 for counts; the most that chance allows.
    peak_kbq: of the image that explains the counts best, of means over SQUARE pixels: single ones follow the noise.
    """

    error: float
    scatter: float
    peak_kbq: float

    @property
    def verdict(self) -> str:
        """In words and numbers."""
        if self.error < TOLD:
            return f"the model explains the counts but for {self.error:.1%}"
        return (
            f"expected counts are off by {self.error:.0%} beyond counting noise: look at the angles, bins and offset "
            "of the geometry, at dead bins, factors and background"
        )

    def check(self, name: str) -> None:
        """Raise ValueError where counts are none, no image explains them, or the image that does is nobody's."""
        if self.scatter < LEAST_SCATTER:
            raise ValueError(
                f"{name}: its counts scatter by {self.scatter:.2f} of what counting does, so they were smoothed, "
                "interpolated or scaled down; give the raw counts, and the corrections as factors"
            )
        if self.error > REFUSED:
            raise ValueError(f"{name}: no image explains its counts, {self.verdict}")
        if not LEAST_KBQ <= self.peak_kbq <= MOST_KBQ:
            raise ValueError(
                f"{name}: up to {self.peak_kbq:.3g} kBq/mL, and scans of people show {LEAST_KBQ:g} to {MOST_KBQ:g}; "
                "check units and calibration of the factors, and whether they are per mm"
            )


@torch.no_grad()
def misfit(scan: Scan, seed: int = 0) -> Misfit:
    """The `Misfit` of scans of slices in kBq/mL. seed: of the counts drawn to compare with."""

    def fitted(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = mlem(y, scan.A, scan.background, iterations=ITERATIONS).x
        expected = expected_counts(scan.A, x, scan.background).double()
        return x, expected, poisson_deviance(y, expected) / expected_deviance(expected)

    x, e, deviance = fitted(scan.y)
    drawn = poisson_counts(e, [seed + i for i in range(len(e))]).to(scan.y)
    scatter = deviance / fitted(drawn)[2]
    e, square = (v.flatten(1) for v in (e, (scan.y.double() - e).square()))
    excess = (square - e).sum(1) - CHANCE * (2 * e.square() + e).sum(1).sqrt()  # the variance of a squared residual
    error = (excess.clamp(min=0) / e.square().sum(1)).sqrt()
    chance = CHANCE * 2 / e.shape[1] ** 0.5
    return Misfit(error.max().item(), scatter.min().item() + chance, avg_pool2d(x, SQUARE, 1).max().item())
