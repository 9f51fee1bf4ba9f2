"""Autoregressive image diffusion (Luo, Huang, Uecker 2024, arXiv 2405.14327): what belongs to it alone."""

import numpy as np
import torch
from torch import Tensor

# The published code sets NumPy's global generator to these seeds; here it stays untouched.
MASK_SEEDS = {"random": 1234, "high": 42}


def published_columns(width: int, acceleration: int, kind: str = "equal") -> Tensor:
    """Sorted indices of the k-space columns that the published experiments measure, without centre lines.

    equal: every acceleration-th from column 0. random: width // acceleration columns, uniform. high: as many,
    meant to be of variable density, but a condition that is always true makes it uniform. The same columns as
    in the published code; for new experiments use `operators.mri.cartesian_mask`.
    """
    if kind == "equal":
        return torch.arange(0, width, acceleration)
    if kind not in MASK_SEEDS:
        raise ValueError(f'published masks are "equal", "random" and "high", not "{kind}"')
    density = np.full(width, 1 / width) if kind == "high" else None
    draw = np.random.RandomState(MASK_SEEDS[kind])
    return torch.from_numpy(np.sort(draw.choice(width, width // acceleration, replace=False, p=density)))
