"""What a measurement says and what it leaves open: the parts of an image that data fix, and that a prior fills in.

For y = A x0 + noise_std n and prior standard deviation p, the measured part of x is P x with

    P = (A^H A + w)^-1 A^H A,      w = (noise_std / prior_std)^2,

the projection onto the range of A^H as w goes to 0; a direction that the data determine worse than the prior counts as
not measured. The rest, x - P x, is inferred.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from companion.evaluation.metrics import spread
from companion.operators.linear import LinearOperator, check_finite
from companion.operators.solve import conjugate_gradient
from companion.randomness import randn


def measured_part(A: LinearOperator, x: Tensor, weight: float, iterations: int = 300, tol: float = 1e-5) -> Tensor:
    """P x for images x (batch, *A.domain_shape); weight = (noise_std / prior_std)^2, positive.

    By conjugate gradients until the residual is below `tol`; eight coils at a weight of 1e-3 need 80 iterations, at
    1e-4 160. Raises ValueError for another weight and for NaN in x.
    """
    if not 0 < weight < math.inf:
        raise ValueError(f"weight is {weight}; expected (noise_std / prior_std)^2, finite and above 0")
    check_finite(x, "x")
    return conjugate_gradient(lambda u: A.normal(u) + weight * u, A.normal(x), iterations=iterations, tol=tol)


def measured_fraction(A: LinearOperator, weight: float, probes: int = 32, seed: int = 0) -> Tensor:
    """How much of each pixel was measured, (*A.domain_shape) between 0 and 1: the diagonal of P.

    Its mean is the number of measured directions per pixel, at most 1 / acceleration times the number of coils.
    Estimated with random signs ([hutchinson1990]; Bekas et al. 2007): the error falls as 1 / sqrt(probes).
    """
    if probes < 1:
        raise ValueError(f"probes={probes}: expected how many random images to average over, at least 1")
    z = randn((probes, *A.domain_shape), A.domain_dtype, torch.Generator().manual_seed(seed)).real.sign()
    return (z * measured_part(A, z.to(A.domain_dtype), weight, tol=1e-4).real).mean(0).clamp(0, 1)


def agreement(draws: Tensor, paired: bool = False) -> Tensor:
    """How far draws (draw, *shape) agree, (*shape) between 0 and 1: |mean|^2 / (|mean|^2 + variance), unbiased parts.

    Of the inferred parts of posterior draws: 1 where the prior is sure of what it fills in, 0 where it guesses.
    paired: draws are antithetic, see `metrics.spread`.
    """
    if len(draws) < 2:
        raise ValueError(f"agreement needs at least two draws, got {len(draws)}")
    check_finite(draws, "draws")
    found = spread(draws, paired)
    common = (draws.mean(0).abs().square() - found.of_mean).clamp_min(0)
    return common / (common + found.variance).clamp_min(torch.finfo(found.variance.dtype).tiny)
