"""The image of a network that looks once: a baseline to put beside every posterior.

    x = one_pass(A, y, noise_std)          # any Cartesian or other operator, size, number of coils

The weights are `general/unrolled`, an unrolled network of `companion.models.unrolled`, or any folder of another or of
RAM or DIRECT (`companion.models.deepinv`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from companion.models.checkpoint import load
from companion.models.deepinv import DIRECT, RAM
from companion.models.unrolled import Unrolled
from companion.operators.linear import LinearOperator

NAME, WEIGHTS = "one pass (unrolled)", "general/unrolled"


@torch.no_grad()
def one_pass(
    A: LinearOperator, y: Tensor, noise_std: float, weights: str = WEIGHTS, iterations: int | None = None
) -> Tensor:
    """The image (batch, *A.domain_shape) of data y (batch, *A.range_shape), in units in which bright tissue is 1.

    noise_std: of each real component of y. iterations: of conjugate gradients a stage of an unrolled network; none: as
    trained. Raises ValueError for weights that are no reconstruction, and as `load` does.
    """
    R = load(weights, device=y.device)
    if isinstance(R, RAM | DIRECT) and iterations is None:
        return R(A, y, noise_std)
    if not isinstance(R, Unrolled):
        raise ValueError(f"{weights} holds a {type(R).__name__}; expected an unrolled network, such as {WEIGHTS}")
    return R(A, y, noise_std, iterations)
