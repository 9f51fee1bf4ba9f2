"""Which lines and points of k-space are measured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.operators.linear import Shape

MASKS = ("equispaced", "random", "variable_density", "poisson_disc")


@dataclass(frozen=True, eq=False)
class CartesianMask:
    """A sampling mask of zeros and ones with what it exactly does.

    `acceleration` is all samples / samples taken, `nominal` what was asked for; `lines` is the number of
    sampled positions along the undersampled axes, `acs` the width of the fully sampled centre.
    """

    mask: Tensor = field(repr=False)
    acceleration: float
    nominal: float
    lines: int
    acs: int
    kind: str
    seed: int

    def within(self, columns: Tensor) -> CartesianMask:
        """The mask without the columns (x,) that are zero, such as lines that a scanner never acquired.

        Raises ValueError when nothing is left.
        """
        mask = self.mask * (columns != 0).to(self.mask)
        if not mask.any():
            raise ValueError(f"a mask of {self.lines} lines and the {int((columns != 0).sum())} acquired share none")
        lines = int((mask.sum() / self.mask.sum() * self.lines).round())
        return replace(self, mask=mask, acceleration=mask.numel() / mask.sum().item(), lines=lines)


def cartesian_mask(
    shape: int | Shape,
    acceleration: float,
    kind: str = "equispaced",
    acs: int = 0,
    seed: int = 0,
) -> CartesianMask:
    """A mask of `shape`: (x,) or an int, (y, x), (z, y, x); undersampled along the last axis, x.

    equispaced: lines 0, R, 2R, ... (floor(k R) for a fractional R). random: width // R lines, uniform without
    replacement. variable_density: as many lines, drawn with a probability that falls as (1 - |k| / k_max)^2
    [lustig2007]. To these, `acs` centre lines (from width // 2 - acs // 2) are added, so the exact
    acceleration is lower than R: it is in `.acceleration`. poisson_disc: undersampled along the last *two*
    axes, variable density (sigpy), with a disc of no samples around each; the ACS square counts towards R,
    which is reached within 0.1 or 5 %, and the corners stay empty. The same arguments give the same mask; no
    global random state is read or changed. Raises ValueError for an unknown kind, R < 1, an ACS wider than
    the mask, or a Poisson disc that cannot be reached.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if kind not in MASKS:
        raise ValueError(f"mask kind {kind!r} is unknown; use one of {', '.join(MASKS)}")
    if not shape or min(shape) < 1 or not 1 <= acceleration <= shape[-1]:
        raise ValueError(f"mask of shape {shape} at acceleration {acceleration}: need 1 <= acceleration <= width")
    if not 0 <= acs <= shape[-1]:
        raise ValueError(f"{acs} ACS lines do not fit into a width of {shape[-1]}")
    if kind == "poisson_disc":
        pattern = _poisson_disc(shape, acceleration, acs, seed)
        lines = int(pattern.sum())
        exact = pattern.size / lines
    else:
        pattern = _lines(shape[-1], acceleration, kind, np.random.default_rng(seed))
        start = shape[-1] // 2 - acs // 2
        pattern[start : start + acs] = 1
        lines = int(pattern.sum())
        exact = shape[-1] / lines
    mask = torch.from_numpy(np.broadcast_to(pattern, shape).copy())
    return CartesianMask(mask, exact, float(acceleration), lines, acs, kind, seed)


def _lines(width: int, acceleration: float, kind: str, rng: np.random.Generator) -> np.ndarray:
    pattern = np.zeros(width, dtype=np.float32)
    if kind == "equispaced":
        chosen = np.arange(0, width, acceleration).astype(int)
    else:
        count = max(1, int(width // acceleration))
        density = np.ones(width)
        if kind == "variable_density":
            distance = np.abs(np.arange(width) - width // 2) / (width // 2 + 1)
            density = (1 - distance) ** 2
        chosen = rng.choice(width, count, replace=False, p=density / density.sum())
    pattern[chosen] = 1
    return pattern


def _poisson_disc(shape: Shape, acceleration: float, acs: int, seed: int) -> np.ndarray:
    from sigpy.mri import poisson  # compiles with numba at the first call, a few seconds

    if len(shape) < 2:
        raise ValueError(f"a Poisson disc needs two axes to undersample, got shape {shape}; use kind='random'")
    if acs > min(shape[-2:]):
        raise ValueError(f"an ACS of {acs} x {acs} does not fit into {shape[-2:]}")
    if acceleration == 1:
        return np.ones(shape[-2:], dtype=np.float32)
    try:
        tolerance = max(0.1, 0.05 * acceleration)
        single: Any = np.float32
        mask = poisson(shape[-2:], acceleration, calib=(acs, acs), dtype=single, seed=seed, tol=tolerance)
    except ValueError as error:
        raise ValueError(
            f"no Poisson disc of shape {shape[-2:]} with acceleration {acceleration} and ACS {acs}; the "
            "corners stay empty, so use an acceleration of 1.5 or more, or a smaller ACS"
        ) from error
    return mask


def centre_lines(columns: Tensor) -> int:
    """How many lines around the centre of a mask (x,) are measured without a gap: its `acs`, as `cartesian_mask` has
    it.
    """
    measured, centre = columns != 0, len(columns) // 2
    left = int(measured[:centre].flip(0).cumprod(0).sum())
    right = int(measured[centre:].cumprod(0).sum())
    return min(2 * left + 1, 2 * right)
