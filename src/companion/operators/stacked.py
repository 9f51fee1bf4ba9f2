"""Slices as volumes: an operator of images that acts on each slice of a volume by itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from companion.operators.linear import LinearOperator, derived


@dataclass(frozen=True, eq=False, repr=False)
class Stacked(LinearOperator):
    """An operator of slices as one of volumes: (..., 1, z, y, x) to (..., 1, z, *rest), each slice by itself.

    of_slices: from (1, y, x) to (1, *rest), the same for all slices or one for each, `batch_shape` () or (z,). Raises
    ValueError for operators of several channels or another number of slices.
    """

    of_slices: LinearOperator
    depth: int

    def __post_init__(self):
        A = self.of_slices
        if (A.domain_shape[0], A.range_shape[0]) != (1, 1) or A.batch_shape not in ((), (1,), (self.depth,)):
            raise ValueError(
                f"{type(A).__name__} maps {A.domain_shape} to {A.range_shape} in a batch of {A.batch_shape}; expected "
                f"one channel, and one operator or one for each of {self.depth} slices"
            )

    domain_shape = derived(lambda self: (1, self.depth, *self.of_slices.domain_shape[1:]))
    range_shape = derived(lambda self: (1, self.depth, *self.of_slices.range_shape[1:]))
    domain_dtype = derived(lambda self: self.of_slices.domain_dtype)
    range_dtype = derived(lambda self: self.of_slices.range_dtype)

    def forward(self, x: Tensor) -> Tensor:
        n, m = len(self.domain_shape), len(self.range_shape)
        return self.of_slices.forward(x.transpose(-n, 1 - n)).transpose(-m, 1 - m)

    def adjoint(self, y: Tensor) -> Tensor:
        n, m = len(self.domain_shape), len(self.range_shape)
        return self.of_slices.adjoint(y.transpose(-m, 1 - m)).transpose(-n, 1 - n)
