"""Emission reconstructions without a learned prior: MLEM, OSEM and MAP, what a diffusion posterior has to beat.

All are called alike, `method(y, A, background, ...)`: y counts `(batch, 1, [z,] angle, bin)`, A the model of the scan
(`operators.pet.emission_model`), background the expected counts of randoms and scatter. All return a
`Reconstruction`: activity in the units of A, and how many iterations each item took. An item's result does not depend
on the others in its batch. Counts of zero, empty slices and any number of iterations are safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

from companion.evaluation import metrics
from companion.operators.counts import (
    _check_geometry,
    check_counts,
    counts_ratio,
    expected_counts,
    expected_deviance,
    poisson_deviance,
)
from companion.operators.linear import LinearOperator, check_finite
from companion.operators.pet import Blur, sensitivity, subset

FADED = 1e-25  # activity below this share of the mean is set to 0: denormal numbers are slow, and mean nothing


@dataclass(frozen=True)
class Reconstruction:
    """`x` (batch, 1, *space), not negative; `iterations` (batch,) that each item took before it stopped."""

    x: Tensor
    iterations: Tensor


@torch.no_grad()
def mlem(
    y: Tensor,
    A: LinearOperator,
    background: Tensor | None = None,
    *,
    iterations: int = 50,
    x0: Tensor | None = None,
    tol: float = 0.0,
    discrepancy: bool = False,
    noise_free: bool = False,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Reconstruction:
    """Maximum likelihood by expectation maximisation: x <- x / A^T 1 * A^T (y / (A x + background)).

    Every iteration raises the Poisson likelihood; without background it also keeps the counts, sum(A^T 1 x) = sum(y).
    Many iterations fit the noise, so stop early: an item stops after `iterations`, or once |change of x| <= tol |x|,
    or (`discrepancy`) once its deviance is no more than counting noise explains, which needs no tuning.
    x0: a positive start, by default uniform. noise_free: accept expected counts, which need not be whole.
    callback(k, x) sees every iterate. Raises ValueError for data that are not counts, or of another geometry.
    [shepp1982]; Lange and Carson 1984.
    """
    y, background = _data(y, A, background, noise_free)
    gain = _inverse(sensitivity(A, y.dtype, y.device))
    x = _start(y, A, x0, gain)
    active = torch.ones(len(y), dtype=torch.bool, device=y.device)
    taken = torch.zeros(len(y), dtype=torch.int64, device=y.device)
    for k in range(1, iterations + 1):
        expected = expected_counts(A, x, background)
        if discrepancy:
            active &= poisson_deviance(y, expected) > expected_deviance(expected)
        new = em_update(x, y, A, gain, background, expected)
        new = _faded(new) if k % 8 == 0 else new
        if tol > 0 or discrepancy:
            taken += active
            new = torch.where(_like(active, x), new, x)
            active &= _norm(new - x) > tol * _norm(x)
        else:
            taken += 1
        x = new
        if callback is not None:
            callback(k, x)
        if (tol > 0 or discrepancy) and not active.any():
            break
    return Reconstruction(x, taken)


def em_update(
    x: Tensor,
    y: Tensor,
    A: LinearOperator,
    gain: Tensor,
    background: Tensor | None = None,
    expected: Tensor | None = None,
) -> Tensor:
    """One EM step from x; `gain` is 1 / A^T 1, `expected` the expected counts of x where they are known already."""
    expected = expected_counts(A, x, background) if expected is None else expected
    return x * gain * A.H(counts_ratio(y, expected))


@torch.no_grad()
def osem(
    y: Tensor,
    A: LinearOperator,
    background: Tensor | None = None,
    *,
    iterations: int = 5,
    subsets: int = 8,
    x0: Tensor | None = None,
    noise_free: bool = False,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Reconstruction:
    """MLEM that takes the angles in `subsets` turns: about `subsets` times faster at first, and no limit point.

    One iteration goes through all subsets, each of every `subsets`-th angle, far ones after one another. A must be
    made of a Projector. Raises ValueError for more subsets than angles. [hudson1994].
    """
    y, background = _data(y, A, background, noise_free)
    parts = ordered_subsets(y, A, background, subsets)
    x = _start(y, A, x0, _inverse(sensitivity(A, y.dtype, y.device)))
    gains = [_inverse(part.total) for part in parts]
    for k in range(1, iterations + 1):
        for part, gain in zip(parts, gains, strict=True):
            new = em_update(x, part.y, part.A, gain, part.background)
            x = _faded(torch.where(gain > 0, new, x))  # what this subset does not see stays
        if callback is not None:
            callback(k, x)
    return Reconstruction(x, torch.full((len(y),), iterations, device=y.device))


@dataclass(frozen=True, eq=False)
class Part:
    """Some angles of a scan: counts, model, background or None, and the sensitivity `total` = A^T 1."""

    y: Tensor
    A: LinearOperator
    background: Tensor | None
    total: Tensor


def ordered_subsets(y: Tensor, A: LinearOperator, background: Tensor | None, subsets: int) -> list[Part]:
    """A scan in parts of every `subsets`-th angle, far ones after one another. ValueError for more than angles."""
    angles, parts = A.range_shape[-2], []
    if not 1 <= subsets <= angles:
        raise ValueError(f"{subsets} subsets of {angles} angles; use 1 to {angles}")
    for first in sorted(range(subsets), key=lambda k: f"{k:012b}"[::-1]):  # bit-reversed: far angles in turn
        some = slice(first, None, subsets)
        model, kept = subset(A, some), None if background is None else background[..., some, :]
        parts.append(Part(y[..., some, :], model, kept, sensitivity(model, y.dtype, y.device)))
    return parts


@torch.no_grad()
def map_rdp(
    y: Tensor,
    A: LinearOperator,
    background: Tensor | None = None,
    *,
    strength: float = 0.1,
    gamma: float = 2.0,
    alike: Tensor | None = None,
    iterations: int = 100,
    x0: Tensor | None = None,
    tol: float = 1e-4,
    noise_free: bool = False,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Reconstruction:
    """The maximum of log likelihood - strength * mean sensitivity * relative difference prior.

    The prior (`relative_difference`) smooths small relative differences of neighbours and lets edges be. Scaled by
    the sensitivity, `strength` has no units and means the same at every dose and calibration; tune it at each dose.
    alike: which neighbours are smoothed with which, of another image of the person (`mr_guided.bowsher_weights`).
    Projected gradient steps, preconditioned by EM and the curvature of the prior, each item with a line search of its
    own, so the objective never falls. An item stops once |change of x| <= tol |x|. The start is 10 MLEM iterations.
    `bsrem.bsrem` comes to the same maximum with fewer projections, for volumes.
    [nuyts2002]; Mumcuoglu et al. 1994 for the projected preconditioned gradient.
    """
    y, background = _data(y, A, background, noise_free)
    total, ndim = sensitivity(A, y.dtype, y.device), len(A.domain_shape) - 1
    weight, seen = prior_weight(strength, gamma, total, ndim), total > 0
    x = (
        _start(y, A, x0, _inverse(total))
        if x0 is not None
        else mlem(y, A, background, iterations=10, noise_free=noise_free).x
    )
    floor = 1e-6 * _mean(x) + 1e-30

    def objective(x, expected):
        prior, slope, curvature = relative_difference(x, gamma, ndim, alike)
        fit = (torch.xlogy(y, expected) - expected).double().flatten(1).sum(1)
        return fit - weight.double().flatten() * prior, slope, curvature

    expected = expected_counts(A, x, background)
    value, slope, curvature = objective(x, expected)
    active = torch.ones(len(y), dtype=torch.bool, device=y.device)
    taken = torch.zeros(len(y), dtype=torch.int64, device=y.device)
    step = torch.ones(len(y), dtype=y.dtype, device=y.device)
    for k in range(1, iterations + 1):
        gradient = torch.where(seen, A.H(counts_ratio(y, expected)) - total - weight * slope, 0.0)
        direction = gradient / (total / (x + floor) + 2 * weight * curvature).clamp(min=1e-30)
        step = torch.where(active, (2 * step).clamp(max=4.0), 0.0)
        halvings = 0
        while True:  # halve the steps of items that do not improve, twelve times at most (Armijo)
            new = _faded((x + _like(step, x) * direction).clamp(min=0))
            new_expected = expected_counts(A, new, background)
            new_value, new_slope, new_curvature = objective(new, new_expected)
            gain = (gradient * (new - x)).double().flatten(1).sum(1)
            failed = active & ~(new_value >= value + 1e-4 * gain)
            if not failed.any():
                break
            step, halvings = torch.where(failed, step / 2, step), halvings + 1
            if halvings == 12:
                break
        better = active & ~failed
        keep = _like(better, x)
        taken += better
        active = better & (_norm(new - x) > tol * _norm(x))
        x, expected = torch.where(keep, new, x), torch.where(_like(better, y), new_expected, expected)
        slope, curvature = torch.where(keep, new_slope, slope), torch.where(keep, new_curvature, curvature)
        value = torch.where(better, new_value, value)
        if callback is not None:
            callback(k, x)
        if not active.any():
            break
    return Reconstruction(x, taken)


@torch.no_grad()
def region_levels(
    y: Tensor,
    A: LinearOperator,
    shapes: Tensor,
    background: Tensor | None = None,
    *,
    iterations: int = 8,
    noise_free: bool = False,
) -> tuple[Tensor, Tensor]:
    """The maximum-likelihood level of each region and its covariance, (batch, region) and (batch, region, region).

    y ~ Poisson(A sum_r level_r shape_r + background), for shapes (batch or 1, region, *A.domain_shape): regions, or
    the share of each tissue in each pixel. No image is reconstructed: the counts decide over a handful of numbers, so
    there is no blur between regions, and noise only of the size of the covariance, which knows nothing of wrong shapes.
    Levels may be negative where they are uncertain, so that their mean over scans is right; those of regions that
    nothing sees are 0. By Fisher scoring, float64. Huesman 1984; Carson, J Comput Assist Tomogr 1986.
    """
    y, background = _data(y, A, background, noise_free)
    if shapes.ndim < 3 or tuple(shapes.shape[2:]) != tuple(A.domain_shape) or shapes.shape[0] not in (1, len(y)):
        wanted = ", ".join(map(str, A.domain_shape))
        raise ValueError(f"shapes must be (1 or {len(y)}, region, {wanted}), got {tuple(shapes.shape)}")
    check_finite(shapes, "shapes")
    shapes = shapes.to(y).expand(len(y), *shapes.shape[1:])
    columns = torch.stack([A(shape).flatten(1) for shape in shapes.unbind(1)], 1).double()  # (batch, region, bin)
    counts = y.flatten(1).double()
    known = torch.zeros_like(counts) if background is None else background.flatten(1).double()
    level = ((counts - known).sum(1) / columns.sum((1, 2)).clamp(min=1e-30)).clamp(min=0)
    levels = level[:, None].expand(columns.shape[:2])
    covariance = level.new_zeros(*columns.shape[:2], columns.shape[1])
    for _ in range(iterations):
        expected = torch.einsum("nrb,nr->nb", columns, levels) + known
        weight = 1 / torch.maximum(expected, 0.05 * expected.mean(1, keepdim=True).clamp(min=1e-30))
        information = torch.einsum("nrb,nb,nsb->nrs", columns, weight, columns)
        covariance = torch.linalg.pinv(information, hermitian=True)
        levels = levels + torch.einsum("nrs,nsb,nb->nr", covariance, columns, weight * (counts - expected))
    seen = columns.sum(2) > 0
    return torch.where(seen, levels, 0.0), covariance


# ------------------------------------------------------------------------------------------------------------- tuning

Method = Callable[[Tensor, LinearOperator, Tensor | None, float], Tensor]  # of y, A, background and a setting

METHODS: dict[str, Method] = {
    "MLEM": lambda y, A, b, iterations: mlem(y, A, b, iterations=int(iterations)).x,
    "filtered MLEM": lambda y, A, b, fwhm: filtered(mlem(y, A, b, iterations=50).x, fwhm),
    "OSEM": lambda y, A, b, iterations: osem(y, A, b, iterations=int(iterations), subsets=8).x,
    "MAP": lambda y, A, b, strength: map_rdp(y, A, b, strength=strength).x,
}
GRIDS = {  # iterations; FWHM in pixels; iterations; strength of the relative difference prior
    "MLEM": (1, 2, 3, 4, 5, 7, 10, 14, 20, 28, 40, 60),
    "filtered MLEM": (0.0, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0),
    "OSEM": (1, 2, 3, 4, 5, 6, 8),
    "MAP": (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
}


def filtered(x: Tensor, fwhm_pixels: float) -> Tensor:
    """x after a Gaussian of this width, in pixels."""
    return Blur(x.shape[-2:], 1.0, fwhm_pixels)(x)


def tune(name: str, y: Tensor, A: LinearOperator, background: Tensor | None, truth: Tensor) -> float:
    """The setting of one of METHODS with the least mean NRMSE over scans of known truth: downhill from mid-grid."""

    @cache
    def error(i: int) -> float:
        if not 0 <= i < len(GRIDS[name]):
            return float("inf")
        return metrics.nrmse(METHODS[name](y, A, background, GRIDS[name][i]), truth).mean().item()

    at = len(GRIDS[name]) // 2
    while (best := min((at, at - 1, at + 1), key=error)) != at:
        at = best
    return GRIDS[name][at]


def oracle_stop(y: Tensor, A: LinearOperator, background: Tensor | None, truth: Tensor) -> Tensor:
    """The MLEM image of each scan at the iteration that is best for *its* truth: what no one can do."""
    best, least = torch.zeros_like(truth), torch.full((len(y),), torch.inf, dtype=torch.float64)

    def keep(k: int, x: Tensor) -> None:
        error = metrics.nrmse(x, truth)
        better = error < least
        best[better], least[better] = x[better], error[better]

    mlem(y, A, background, iterations=max(GRIDS["MLEM"]), callback=keep)
    return best


# -------------------------------------------------------------------------------------------------------------- parts


def pairs(shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple, tuple]]:
    """The offset of each kind of neighbour, each pair once, and where both stand in images (..., *shape)."""
    for offset in product((-1, 0, 1), repeat=len(shape)):
        if offset > (0,) * len(shape):
            here = (..., *(slice(max(0, -o), n - max(0, o)) for o, n in zip(offset, shape, strict=True)))
            there = (..., *(slice(max(0, o), n - max(0, -o)) for o, n in zip(offset, shape, strict=True)))
            yield offset, here, there


def relative_difference(
    x: Tensor, gamma: float = 2.0, ndim: int = 2, alike: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The relative difference prior of x (batch, 1, *space), >= 0: value (batch,), gradient and curvature like x.

    Sum over pairs of neighbours (8 in a plane, 26 in a stack), weighted by 1 / distance in pixels, of
    (a - b)^2 / (a + b + gamma |a - b|); it scales with x. The curvature is the diagonal of the Hessian. alike (pair,
    batch or 1, 1, *space): further weights of the pairs of each kind, in the order of `pairs`, kept at the first one.
    [nuyts2002].
    """
    value = x.new_zeros(len(x), dtype=torch.float64)
    gradient, curvature = torch.zeros_like(x), torch.zeros_like(x)
    tiny = 1e-6 * _mean(x) + 1e-30
    for kind, (offset, here, there) in enumerate(pairs(x.shape[-ndim:])):
        a, b, weight = x[here], x[there], sum(o * o for o in offset) ** -0.5
        weight = weight if alike is None else weight * alike[kind][here].to(x)
        difference = a - b
        scale = a + b + gamma * difference.abs() + tiny
        slope = weight * difference / scale**2
        value += (slope * difference * scale).double().flatten(1).sum(1)
        gradient[here] += slope * (a + 3 * b + gamma * difference.abs() + 2 * tiny)
        gradient[there] -= slope * (b + 3 * a + gamma * difference.abs() + 2 * tiny)
        curvature[here] += 2 * weight * (2 * b + tiny) ** 2 / scale**3
        curvature[there] += 2 * weight * (2 * a + tiny) ** 2 / scale**3
    return value, gradient, curvature


def prior_weight(strength: float, gamma: float, total: Tensor, ndim: int) -> Tensor:
    """What MAP multiplies the prior with: strength times the mean sensitivity of each item where anything is seen.

    Raises ValueError where strength or gamma is negative.
    """
    if not strength >= 0 or not gamma >= 0:
        raise ValueError(f"strength and gamma must not be negative, got {strength} and {gamma}")
    axes = tuple(range(-ndim - 1, 0))
    return strength * total.sum(axes, keepdim=True) / (total > 0).sum(axes, keepdim=True).clamp(min=1)


def _data(y: Tensor, A: LinearOperator, background, noise_free: bool) -> tuple[Tensor, Tensor | None]:
    """Counts as floating point and the background in their shape, checked."""
    _check_geometry(y, A)
    if noise_free:
        check_finite(y, "expected counts")
        if (y < 0).any():
            raise ValueError(f"expected counts must not be negative, got {y.min():.4g}")
    else:
        check_counts(y)
    y = y if y.is_floating_point() else y.to(torch.float32)
    if background is None:
        return y, None
    check_finite(background, "background")
    if (background < 0).any():
        raise ValueError(f"the background must not be negative, got {background.min():.4g} expected counts")
    return y, torch.as_tensor(background).to(y).expand(y.shape)


def _start(y: Tensor, A: LinearOperator, x0: Tensor | None, gain: Tensor) -> Tensor:
    """A positive image (batch, ...), 0 where nothing is seen: x0, or uniform with about the measured counts."""
    if x0 is not None:
        check_finite(x0, "x0")
        if tuple(x0.shape) != (len(y), *A.domain_shape) or (x0 < 0).any():
            raise ValueError(f"x0 must be (batch, {A.domain_shape}) and not negative, got {tuple(x0.shape)}")
        return x0.to(y) * (gain > 0)
    total = torch.where(gain > 0, 1 / gain.clamp(min=1e-30), 0.0)
    per_unit = total.sum(tuple(range(-len(A.domain_shape), 0))).double()
    level = y.double().flatten(1).sum(1) / per_unit.clamp(min=1e-30)
    level = torch.where(level > 0, level, 1.0).to(y.dtype)
    return _like(level, y.new_empty(len(y), *A.domain_shape)) * (gain > 0).to(y.dtype).expand(len(y), *A.domain_shape)


def _inverse(total: Tensor) -> Tensor:
    """1 / sensitivity, 0 for pixels that nothing sees."""
    seen = total > 1e-6 * total.amax()
    return torch.where(seen, 1 / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)


def _faded(x: Tensor) -> Tensor:
    return torch.where(x > FADED * _mean(x), x, 0.0)


def _mean(x: Tensor) -> Tensor:
    return x.mean(tuple(range(1, x.ndim)), keepdim=True)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """One value per item, to broadcast with x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))
