"""What a conditional PET network is given: MLEM iterates of the counts, and how they were made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from companion.acquisition.pet import SCALE_KBQ, Scan, as_condition, mean_sensitivity
from companion.reconstruction.pet import mlem


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


def condition(scan: Scan, iterations: Sequence[int], scale_kbq: float = SCALE_KBQ) -> Tensor:
    """Return what a conditional network is given of a scan, (slice, iterate + 1, y, x).

    Its scale comes from the calibration of the scan, counts to kBq/mL, and never from the image.
    """
    counts_per_kbq = mean_sensitivity(scan.A).expand(len(scan.y))
    return as_condition(iterates(scan, iterations), counts_per_kbq, scale_kbq)
