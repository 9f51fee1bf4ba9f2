"""Poisson counts: drawn, thinned, checked, and their log-likelihood and deviance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy.special import gammaln, xlogy
from torch import Tensor

from companion.operators.linear import LinearOperator, Shape, check_finite


# ------------------------------------------------------------------------------------------- counts and likelihood
def check_counts(y: Tensor, A: LinearOperator | None = None) -> Tensor:
    """y itself; ValueError unless it holds counts (finite, whole, not negative) in the geometry of A."""
    check_finite(y, "counts")
    if (y < 0).any():
        raise ValueError(
            f"counts must not be negative, got {y.min():.4g}: data with randoms or scatter subtracted are not Poisson; "
            "give the raw counts, and the corrections as `background`"
        )
    if y.is_floating_point() and not torch.equal(y, y.round()):
        raise ValueError(
            "counts must be whole numbers: scaled or corrected data are not Poisson; give the raw counts, and the "
            "corrections as `factors` of the model (noise_free=True accepts expected counts)"
        )
    if A is not None:
        _check_geometry(y, A)
    return y


def _check_geometry(y: Tensor, A: LinearOperator) -> None:
    axes = len(A.range_shape)
    if tuple(y.shape[-axes:]) != tuple(A.range_shape) or y.ndim != axes + 1:
        raise ValueError(
            f"the sinogram has shape {tuple(y.shape)}, but this geometry measures (batch, "
            f"{', '.join(map(str, A.range_shape))}); build ParallelBeam with the scan's angles and bins"
        )


def poisson_counts(expected: Tensor, seeds: Sequence[int]) -> Tensor:
    """Counts `(batch, ...)` drawn from Poisson laws of the expected ones; an item depends on its own seed only."""
    check_finite(expected, "expected counts")
    if (expected < 0).any():
        raise ValueError(f"expected counts must not be negative, got {expected.min():.4g}")
    rates = expected.detach().cpu().double().numpy()
    drawn = [rng.poisson(rate) for rng, rate in zip(_streams(seeds, expected, "counts"), rates, strict=True)]
    return _as_counts(drawn, expected)


def thin(y: Tensor, fraction: float | Tensor, seeds: Sequence[int]) -> Tensor:
    """The counts that a scan of `fraction` of the dose would have kept of y: Binomial(y, fraction), per count.

    Exact: if y is Poisson with mean m, the result is Poisson with mean fraction m, and y minus it is independent of
    it. fraction: a number or one per item, 0 to 1. Thinning and `poisson_counts` with the same seed are independent.
    """
    check_counts(y)
    fractions = torch.as_tensor(fraction, dtype=torch.float64).expand(len(y)).tolist()
    if not all(0 <= f <= 1 for f in fractions):
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}; thinning can only lower a dose")
    counts = y.detach().cpu().long().numpy()
    draws = zip(_streams(seeds, y, "thinning"), counts, fractions, strict=True)
    return _as_counts([rng.binomial(n, f) for rng, n, f in draws], y)


def _streams(seeds: Sequence[int], items: Tensor, purpose: str) -> list[np.random.Generator]:
    seeds = list(seeds)
    if len(seeds) != len(items):
        raise ValueError(f"{len(seeds)} seeds for {len(items)} items; give each item its own")
    return [np.random.default_rng([int(seed), *purpose.encode()]) for seed in seeds]


def _as_counts(drawn: list[np.ndarray], like: Tensor) -> Tensor:
    dtype = like.dtype if like.is_floating_point() else torch.float32
    largest = 1 / torch.finfo(dtype).eps
    stacked = np.stack(drawn)
    if stacked.size and stacked.max() > largest:
        raise ValueError(f"a bin holds {stacked.max()} counts, more than {dtype} counts exactly; use float64")
    return torch.from_numpy(stacked).to(dtype).to(like.device)


def poisson_log_likelihood(y: Tensor, expected: Tensor) -> Tensor:
    """log p(y | expected) of each item, (batch,), float64, constants included; -inf where counts cannot be.

    Differentiable in `expected`. Bins that expect nothing and hold nothing count 0.
    """
    y, expected = y.double(), expected.double()
    terms = torch.xlogy(y, expected) - expected - torch.lgamma(y + 1)
    return terms.flatten(1).sum(1)


def poisson_gradient(x: Tensor, y: Tensor, A: LinearOperator, background: Tensor | None = None) -> Tensor:
    """The gradient of log p(y | A x + background) with respect to x: A^T (y / expected - 1), shaped like x."""
    return A.H(counts_ratio(y, expected_counts(A, x, background)) - 1)


def expected_counts(A: LinearOperator, x: Tensor, background: Tensor | None = None) -> Tensor:
    """A x + background."""
    return A(x) if background is None else A(x) + background


def counts_ratio(y: Tensor, expected: Tensor) -> Tensor:
    """y / expected, 0 where y is 0, even where nothing is expected."""
    return y / expected.clamp(min=1e-20)


def poisson_deviance(y: Tensor, expected: Tensor) -> Tensor:
    """2 (log p(y | y) - log p(y | expected)), (batch,), float64: what chi squared is for Gaussian noise."""
    y, expected = y.double(), expected.double()
    return 2 * (torch.xlogy(y, y) - torch.xlogy(y, expected) - y + expected).flatten(1).sum(1)


def expected_deviance(expected: Tensor) -> Tensor:
    """The mean of `poisson_deviance` over counts y of the law that `expected` states, (batch,).

    About one per bin with many counts, less where few are expected; interpolated from exact sums.
    """
    rates, means = _deviance_table()
    flat = expected.detach().double().cpu().flatten(1).numpy()
    values = np.interp(np.log(np.maximum(flat, rates[0])), np.log(rates), means) * (flat > rates[0])
    return torch.from_numpy(values.sum(1)).to(expected.device)


@lru_cache
def _deviance_table() -> tuple[np.ndarray, np.ndarray]:
    rates = np.geomspace(1e-6, 200, 400)
    k = np.arange(400)[:, None]
    ratio = np.where(k > 0, np.maximum(k, 1) / rates, 1.0)
    return rates, (np.exp(xlogy(k, rates) - rates - gammaln(k + 1)) * 2 * (k * np.log(ratio) - k + rates)).sum(0)


def _per_item(x: Tensor, shape: Shape) -> Tensor:
    return x.flatten(x.ndim - len(shape))
