"""Simulation-based calibration: draw a truth from the prior, its data, and posterior draws; the truth is one of them.

If a sampler is right, the rank of a number of the truth (a pixel, a region's mean, a projection) among that of L draws
is uniform on 0..L, whatever the prior and the operator [talts2018]. A U-shaped histogram tells of draws that are too
narrow, a hump of draws too wide, a slope of a bias.
"""

from collections.abc import Sequence

import torch
from scipy.special import chdtrc
from torch import Generator, Tensor


def rank(truth: Tensor, draws: Tensor, generator: Generator | None = None) -> Tensor:
    """How many of the draws (draw, ...) lie below the truth (...), 0 to L; ties at random, or up without."""
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    if generator is None or not equal.any():
        return below
    return below + (torch.rand(equal.shape, generator=generator) * (equal + 1)).floor().long().clamp(max=equal)


def uniformity(ranks: Tensor | Sequence[int], draws: int, bins: int | None = None) -> float:
    """The p-value of ranks (case,) among L = `draws` draws being uniform on 0..L: Pearson's chi-squared test.

    bins: of the L + 1 ranks, evenly wide; must divide L + 1. By default as many as leave five cases or more in each.
    Raises ValueError for ranks outside 0..L or fewer than ten cases.
    """
    ranks = torch.as_tensor(ranks).flatten()
    if len(ranks) < 10 or ranks.min() < 0 or ranks.max() > draws:
        raise ValueError(f"{len(ranks)} ranks up to {ranks.max()}; expected ten or more from 0 to {draws}")
    if bins is None:
        bins = max(b for b in range(1, draws + 2) if (draws + 1) % b == 0 and (b <= 2 or b * 5 <= len(ranks)))
    if bins < 2 or (draws + 1) % bins:
        raise ValueError(f"{draws + 1} ranks do not fall into {bins} even bins")
    counts = torch.bincount(ranks * bins // (draws + 1), minlength=bins).double()
    expected = len(ranks) / bins
    return float(chdtrc(bins - 1, ((counts - expected) ** 2 / expected).sum().item()))


def all_uniform(ranks: Tensor, draws: int) -> float:
    """The p-value of several quantities' ranks (case, quantity): the smallest times their number, at most 1."""
    p = [uniformity(column, draws) for column in ranks.T]
    return min(1.0, len(p) * min(p))


def projections(shape: Sequence[int], count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Fixed random directions (count, *shape) of norm 1 to take numbers of images along: <direction, image>."""
    w = torch.randn((count, *shape), dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return w / w.flatten(1).norm(dim=1).reshape(-1, *[1] * len(shape))


def along(images: Tensor, directions: Tensor) -> Tensor:
    """The numbers (..., quantity) of images (..., *shape): the real part of the product with each direction."""
    flat = images.flatten(images.ndim - directions.ndim + 1)
    return (flat @ directions.flatten(1).mH.to(flat.dtype)).real
