"""MAP with ordered subsets: the maximum of `pet.map_rdp` for a fraction of its projections, for scans of volumes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from companion.operators.counts import counts_ratio, expected_counts
from companion.operators.linear import LinearOperator
from companion.operators.pet import sensitivity
from companion.reconstruction.pet import (
    Reconstruction,
    _data,
    _faded,
    _inverse,
    _mean,
    _start,
    ordered_subsets,
    osem,
    prior_weight,
    relative_difference,
)

FALL = 0.01  # share of the log posterior gained: more than iterations near the maximum fluctuate by


@torch.no_grad()
def bsrem(
    y: Tensor,
    A: LinearOperator,
    background: Tensor | None = None,
    *,
    strength: float = 0.1,
    gamma: float = 2.0,
    alike: Tensor | None = None,
    iterations: int = 10,
    subsets: int = 16,
    relaxation: float = 0.02,
    memory: bool = True,
    x0: Tensor | None = None,
    noise_free: bool = False,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Reconstruction:
    """The maximum that `map_rdp` has, with its strength, gamma and alike, by relaxed steps of ordered subsets.

    One iteration goes once through all subsets of the angles, each with its share of the prior, and so takes one
    projection and one backprojection of the scan. Steps are preconditioned by EM and the curvature of the prior, cut
    at 0, and 1 / (1 + relaxation (k - 1)) long in iteration k: subsets contradict each other, and only if steps shrink
    does the image settle at the maximum (BSREM [depierro2001], in the form of [ahn2003]). memory: each subset's last
    gradient stands in for it while the others step, so that little of the contradiction is left (SAGA [defazio2014];
    for this prior [twyman2023]). It takes an image for each subset; without it relaxation must be larger, the more so
    the more subsets. Kept gradients make steps unstable where a subset sees little (few angles, few counts), so two
    things guard them: the preconditioner stays as it is at the beginning of an iteration, or else a gradient kept from
    a bad image makes a voxel grow exponentially until its subset's turn comes; and an item whose log posterior, added
    up over the subsets on the way, falls by more than FALL of what it has gained takes steps of half the length then.
    The start is one iteration of OSEM. An item's result does not depend on the others.
    Raises ValueError as `osem` and `map_rdp`, and for a negative relaxation.
    """
    if not relaxation >= 0:
        raise ValueError(f"relaxation must not be negative, got {relaxation}")
    y, background = _data(y, A, background, noise_free)
    parts = ordered_subsets(y, A, background, subsets)
    total, ndim = sensitivity(A, y.dtype, y.device), len(A.domain_shape) - 1
    weight, seen = prior_weight(strength, gamma, total, ndim), total > 0
    if x0 is None:
        x = osem(y, A, background, iterations=1, subsets=subsets, noise_free=noise_free).x
    else:
        x = _start(y, A, x0, _inverse(total))
    floor = 1e-6 * _mean(x) + 1e-30
    kept, whole = [torch.zeros_like(x) for _ in parts] if memory else [], torch.zeros_like(x)
    pace = torch.ones_like(floor)
    first = before = best = torch.zeros(len(x), dtype=torch.float64, device=x.device)  # heights of the log posterior
    for k in range(1, iterations + 1):
        start, height = x, torch.zeros_like(first)
        for i, part in enumerate(parts):
            penalty, slope, curvature = relative_difference(x, gamma, ndim, alike)
            expected = expected_counts(part.A, x, part.background)
            own = part.A.H(counts_ratio(part.y, expected)) - part.total
            fit = (torch.xlogy(part.y, expected) - expected).double().flatten(1).sum(1)
            height = height + fit - weight.flatten().double() * penalty / subsets
            gradient = subsets * own
            if memory:
                gradient = gradient if k == 1 else gradient - subsets * kept[i] + whole
                kept[i], whole = own, whole + own - kept[i]
            step = pace * torch.where(seen, gradient - weight * slope, 0.0) / (1 + relaxation * (k - 1))
            at = start if memory and k > 1 else x
            x = _faded((x + step / (total / (at + floor) + 2 * weight * curvature).clamp(min=1e-30)).clamp(min=0))
        if memory and k > 1:
            fallen = before - height > FALL * (best - first)
            pace = torch.where(fallen.reshape(pace.shape), pace / 2, pace)
        first, before, best = (height,) * 3 if k == 1 else (first, height, torch.maximum(best, height))
        if callback is not None:
            callback(k, x)
    return Reconstruction(x, torch.full((len(y),), iterations, device=y.device))
