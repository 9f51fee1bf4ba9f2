"""What a conditional PET network is given: MLEM iterates of the counts, and how they were made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from companion.acquisition.pet import SCALE_KBQ, Physics, Scan, as_condition, mean_sensitivity
from companion.data.activity_maps import Person
from companion.parameters import param
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


@dataclass(frozen=True)
class Protocol(Physics):
    """The part of a form that says how each slice is scanned, at a dose of its own, and reconstructed."""

    counts: tuple[float, ...] = param(
        (2e3, 2e6), "true counts of a slice at full dose: one number, or a range", minimum=1
    )
    fraction: float = param(
        1.0,
        "of the counts that the low-dose scan keeps; below 1 the full dose is kept as a target too",
        minimum=1e-4,
        maximum=1,
    )
    iterations: tuple[int, ...] = param((5, 15, 50), "MLEM iterates of the low dose to learn from", minimum=1)
    fwhm_mm: float = param(0.0, "resolution of the scanner, known to the model", minimum=0)


def scanned(person: Person, protocol: Protocol, classes: int, seed: int) -> dict[str, np.ndarray]:
    """The arrays that `prepare` stores of one subject, its scans simulated and reconstructed."""
    seeds = [seed * 1000 + i for i in range(len(person.image))]
    low, high = math.log(protocol.counts[0]), math.log(protocol.counts[-1])
    where = torch.rand(len(seeds), generator=torch.Generator().manual_seed(seeds[0]), dtype=torch.float64)
    counts = (low + (high - low) * where).exp()
    full = protocol.acquire(person.image, person.mu, counts, seeds, pixel_mm=person.pixel_mm, fwhm_mm=protocol.fwhm_mm)
    scan = full if protocol.fraction == 1 else full.thinned(protocol.fraction, seeds)
    arrays = {
        "activity": person.image,
        "mlem": iterates(scan, protocol.iterations),
        "counts": scan.y.flatten(1).sum(1),
        "sensitivity": mean_sensitivity(scan.A),
        "label": (person.place * classes).long().clamp(0, classes - 1),
    }
    if protocol.fraction < 1:
        arrays["high"] = iterates(full, protocol.iterations[-1:])
    return {name: v.to(torch.uint8 if name == "label" else torch.float32).numpy() for name, v in arrays.items()}


BLIND_SIGMA = 40.0  # noise in which a conditional network sees nothing but its condition
