"""Intervals with a guarantee: split conformal calibration on people whose truth is known.

    k = pixel_factor(means, stds, truths)                   # calibration slices, posterior mean and std of each
    low, high = mean - k * std, mean + k * std              # of a new slice: 90 % of its pixels inside, on average

A sampler says how uncertain it is *relatively*; calibration says by which factor. The promise needs no right model:
it holds on average over calibration and new people alike, if those are drawn from one population. Pixels of a slice are
not independent, so slices are what is counted: a pixel's factor is that of conformal risk control [angelopoulos2024],
whose risk is the share of a slice's pixels outside; single numbers, such as a region's mean or a PSNR, are those of
split conformal prediction [vovk2005].
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

COVERAGE = 0.9


def quantile(scores: Tensor | Sequence[float], coverage: float = COVERAGE) -> float:
    """The ceil((n + 1) coverage)-th smallest of n scores: a new score is below it with that probability or more.

    Raises ValueError for NaN, and for fewer scores than that takes: coverage / (1 - coverage), 9 for 90 %.
    """
    values = torch.as_tensor(scores, dtype=torch.float64).flatten()
    rank = math.ceil((len(values) + 1) * coverage - 1e-9)
    if values.isnan().any() or not 0 < coverage < 1:
        raise ValueError(f"scores with NaN, or coverage={coverage}; expected finite scores and a share between 0 and 1")
    if rank > len(values):
        least = math.ceil(coverage / (1 - coverage) - 1e-9)
        raise ValueError(f"{len(values)} calibration cases cannot promise {coverage:.0%}; give {least} or more")
    return values.sort().values[rank - 1].item()


def number_factor(
    mean: Tensor | Sequence[float], std: Tensor | Sequence[float], truth: Tensor | Sequence[float],
    coverage: float = COVERAGE,
) -> float:  # fmt: skip
    """k for mean +- k std of one number a case (case,): a region's mean, an amount, a PSNR.

    Raises ValueError as `quantile`, and where a std is not above 0.
    """
    mean, std, truth = (torch.as_tensor(v, dtype=torch.float64) for v in (mean, std, truth))
    if not (std > 0).all():
        raise ValueError("a standard deviation is 0 or below: no factor can scale it")
    return quantile((truth - mean).abs() / std, coverage)


def pixel_factor(
    mean: Tensor, std: Tensor, truth: Tensor, mask: Tensor | None = None, coverage: float = COVERAGE
) -> float:
    """k for mean +- k std of every pixel: on average a share `coverage` of a new slice's pixels lies inside.

    mean, truth: (slice, ...) real or complex; std: the same shape, per real component. mask: of the pixels that count,
    (slice, ...) or of one slice. The smallest k with n/(n+1) R(k) + 1/(n+1) <= 1 - coverage, R(k) the mean over the n
    slices of the share outside. Raises ValueError for too few slices, and a std or a mask without pixels.
    """
    n = len(mean)
    allowed = (1 - coverage) - coverage / n
    if allowed < -1e-12:
        least = math.ceil(coverage / (1 - coverage) - 1e-9)
        raise ValueError(f"{n} calibration slices cannot promise {coverage:.0%}; give {least} or more")
    inside = torch.ones(mean.shape, dtype=torch.bool) if mask is None else mask.expand(mean.shape)
    if not inside.flatten(1).any(1).all() or not (std[inside] > 0).all():
        raise ValueError("a slice without pixels, or a standard deviation that is not above 0")
    ratios, weights = [], []
    for i in range(n):
        error = (truth[i] - mean[i])[inside[i]]
        parts = torch.stack([error.real, error.imag]) if error.is_complex() else error[None]
        ratio = (parts.double().abs() / std[i][inside[i]].double()).flatten()
        ratios.append(ratio)
        weights.append(torch.full_like(ratio, 1 / (n * len(ratio))))
    ratio, order = torch.cat(ratios).sort()
    outside = 1 - torch.cat(weights)[order].cumsum(0)  # the risk when k is this ratio
    return ratio[(outside <= allowed + 1e-9).nonzero()[0, 0]].item()


def pixel_coverage(mean: Tensor, std: Tensor, truth: Tensor, factor: float, mask: Tensor | None = None) -> Tensor:
    """The share (slice,) of each slice's pixels (real components) inside mean +- factor * std."""
    inside = torch.ones(mean.shape, dtype=torch.bool) if mask is None else mask.expand(mean.shape)
    shares = []
    for i in range(len(mean)):
        error = (truth[i] - mean[i])[inside[i]]
        parts = torch.stack([error.real, error.imag]) if error.is_complex() else error[None]
        shares.append((parts.abs() <= factor * std[i][inside[i]]).double().mean())
    return torch.stack(shares)


def number_coverage(mean, std, truth, factor: float) -> float:
    """The share of cases whose number lies inside mean +- factor * std."""
    mean, std, truth = (torch.as_tensor(v, dtype=torch.float64) for v in (mean, std, truth))
    return ((truth - mean).abs() <= factor * std).double().mean().item()


def predicted_psnr(draws: Tensor, peak: Tensor | Sequence[float], paired: bool = False) -> tuple[Tensor, Tensor]:
    """What draws (draw, slice, ...) say of the PSNR of their own mean: its mean and std (slice,), dB.

    Each draw stands for the truth in turn and is compared with the mean of the others. peak: (slice,) values that PSNR
    refers to. paired: draws are antithetic (`metrics.spread`), and the mean is that of all, known as well without any
    of them. Calibrate with `number_factor`; at least three draws.
    """
    count = len(draws)
    if count < 3:
        raise ValueError(f"{count} draws cannot predict a PSNR; give three or more")
    others = draws.mean(0) if paired else (draws.sum(0) - draws) / (count - 1)
    correction = 1.0 if paired else ((count - 1) / count) * (1 + 1 / count)
    error = (draws - others).abs().square().flatten(2).mean(2) * correction
    peak = torch.as_tensor(peak, dtype=error.dtype)
    psnr = 10 * torch.log10(peak.square() / error)
    return psnr.mean(0), psnr.std(0)
