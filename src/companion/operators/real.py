"""Real images in a complex measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from companion.operators.linear import LinearOperator, Shape, derived

# --------------------------------------------------------------------------------------------------------------- scans


@dataclass(frozen=True, eq=False, repr=False)
class RealImages(LinearOperator):
    """The real images among the complex ones: x -> x + 0i; its adjoint takes the real part."""

    shape: Shape

    domain_dtype = torch.float32
    range_dtype = torch.complex64
    domain_shape = derived(lambda self: tuple(self.shape))
    range_shape = derived(lambda self: tuple(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.complex64)

    def adjoint(self, y: Tensor) -> Tensor:
        return y.real
