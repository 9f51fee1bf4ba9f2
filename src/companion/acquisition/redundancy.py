"""The noise that a measurement really has, from what several coils say of the same thing.

Coils measure more numbers than the image has pixels; what no image explains is noise, and errors of the coil maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from companion.acquisition.measurement import Measurement
from companion.operators.linear import LinearOperator
from companion.operators.solve import conjugate_gradient

LEAST_SPARE = 0.1  # share of the data that has to be redundant for their noise to be read off


@dataclass(frozen=True)
class Redundancy:
    """What the data contradict themselves by.

    noise_std: deviation per real component that explains it, in the units of y. spare: share of the data that is
    redundant, 0 to 1. ratio: noise_std / the stated one: above 1 there are errors of maps, motion or the model, or the
    noise was measured too low; below 1 it was measured too high, as signal at the edges of k-space makes it.
    """

    noise_std: float
    spare: float
    ratio: float


def redundancy(m: Measurement, prior_std: float = 0.3, iterations: int = 60, seed: int = 0) -> Redundancy:
    """The noise of a measurement from the redundancy of its coils; all slices together.

    With H = A (A^H A + lambda)^-1 A^H, lambda = (noise_std / prior_std)^2, E |(1 - H) y|^2 = 2 noise_std^2 |1 - H|^2
    for an image of deviation prior_std; the norm is estimated with one vector of random signs (Hutchinson 1990).
    Raises ValueError when less than LEAST_SPARE of the data is redundant: a single coil, or too high an acceleration.
    """
    spare = total = contradiction = 0.0
    for i in range(len(m)):
        one = m.one(i)
        measured = (one.y != 0).any(1, keepdim=True).expand_as(one.y).float()
        signs = torch.randint(0, 2, one.y.shape, generator=torch.Generator().manual_seed(seed + i)) * 2.0 - 1
        signs = (signs.to(one.y) * measured).to(one.y.dtype)
        weight = (m.noise_std / prior_std) ** 2
        contradiction += _unexplained(one.A, one.y, weight, iterations, measured)
        spare += _unexplained(one.A, signs, weight, iterations, measured)
        total += measured.sum().item()
    if spare < LEAST_SPARE * total:
        raise ValueError(
            f"only {spare / total:.0%} of the data is redundant, too little to read its noise off; use the stated noise"
        )
    noise_std = (contradiction / (2 * spare)) ** 0.5
    return Redundancy(noise_std, spare / total, noise_std / m.noise_std)


def _unexplained(A: LinearOperator, y: Tensor, weight: float, iterations: int, measured: Tensor) -> float:
    """|(1 - H) y|^2."""
    x = conjugate_gradient(lambda v: A.normal(v) + weight * v, A.H(y), iterations=iterations, tol=1e-4)
    return ((y - A(x)) * measured).abs().square().sum().item()


def with_real_noise(m: Measurement) -> Measurement:
    """m with the noise that its coils show by contradicting each other; as it is where they say too little."""
    try:
        return m.with_noise(redundancy(m).noise_std)
    except ValueError:
        return m
