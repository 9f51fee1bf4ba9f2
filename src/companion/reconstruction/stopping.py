"""MLEM at several doses: when to stop, what a maximum does as a scale, whether thinned counts are Poisson."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from companion.acquisition.pet import Scan, acquire
from companion.data import pet as cohort
from companion.evaluation import metrics
from companion.operators.counts import poisson_counts, thin
from companion.reconstruction.condition import iterates


def dose_ladder(
    slices: cohort.Slices, counts: Sequence[float], iterations: Sequence[int], seed: int = 0
) -> dict[float, tuple[Scan, Tensor]]:
    """Return, for each number of true counts, the scans of slices and their MLEM iterates (slice, iterate, y, x)."""
    seeds, ladder = range(seed, seed + len(slices.image)), {}
    for total in counts:
        scan = acquire(slices.image, slices.mu, total, seeds, pixel_mm=slices.pixel_mm)
        ladder[total] = scan, iterates(scan, iterations)
    return ladder


def stopping_table(ladder: dict[float, tuple[Scan, Tensor]], iterations: Sequence[int]) -> list[dict[str, object]]:
    """The NRMSE of each MLEM iterate at each number of counts, mean and standard error over slices."""
    table: list[dict[str, object]] = []
    for total, (scan, images) in ladder.items():
        row: dict[str, object] = {"counts": f"{total:.3g}"}
        for i, k in enumerate(iterations):
            row[f"{k} iterations"] = metrics.mean_and_error(metrics.nrmse(images[:, i : i + 1], scan.truth))
        table.append(row)
    return table


def maximum_table(ladder: dict[float, tuple[Scan, Tensor]]) -> list[dict[str, object]]:
    """What dividing each image by its own maximum, as published, does to activity: mean and standard error.

    The level of the head (last iterate, relative to the truth) after the counts give the scale, and after the maximum
    does, the true image being divided by its own maximum too.
    """
    rows = []
    for total, (scan, images) in ladder.items():
        x, truth = images[:, -1:], scan.truth
        head = truth > 1
        level = torch.stack([a[m].mean() / b[m].mean() for a, b, m in zip(x, truth, head, strict=True)])
        peaks = truth.flatten(1).amax(1) / x.flatten(1).amax(1)
        rows.append(
            {
                "counts": f"{total:.3g}",
                "level, scale from counts": metrics.mean_and_error(level),
                "level, divided by maxima": metrics.mean_and_error(level * peaks),
            }
        )
    return rows


def thinning_table(scan: Scan, fractions: Sequence[float], repeats: int = 50) -> list[dict[str, object]]:
    """Mean and variance of thinned counts over their expectation, over bins and repeats: 1 and 1 if Poisson."""
    expected, rows = scan.A(scan.truth), []
    full = [poisson_counts(expected, [repeat * 1000 + i for i in range(len(expected))]) for repeat in range(repeats)]
    for fraction in fractions:
        y = torch.stack(
            [thin(one, fraction, [repeat * 1000 + i for i in range(len(one))]) for repeat, one in enumerate(full)]
        ).double()
        wanted = fraction * expected.double().sum()
        rows.append(
            {
                "fraction": fraction,
                "mean / expected": (y.mean(0).sum() / wanted).item(),
                "variance / expected": (y.var(0).sum() / wanted).item(),
            }
        )
    return rows
