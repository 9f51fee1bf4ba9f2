"""Slices as volumes: an operator of images that acts on each slice of a volume by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.operators.linear import Diagonal, LinearOperator, derived


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


@dataclass(frozen=True, eq=False, repr=False)
class Tied(LinearOperator):
    """A x and, in the same row, root (x[z + 1] - x[z]): data of a volume with ties between neighbouring slices.

    of_volumes: A, from (1, z, y, x). root ([batch,] 1, z - 1, y, x) or broadcastable to it: of the weights of the
    penalty |root (x[z + 1] - x[z])|^2 / 2, which rows of unit noise and zeros in the place of data stand for. Ranges
    are flat. Raises ValueError for a domain that is no volume, or other roots.
    """

    of_volumes: LinearOperator
    root: Tensor

    def __post_init__(self):
        if len(self.of_volumes.domain_shape) != 4:
            raise ValueError(f"images of shape {tuple(self.of_volumes.domain_shape)}; slices of (1, z, y, x) are tied")
        Diagonal(self.root, self._between)  # says what is wrong with it

    @property
    def _between(self) -> tuple[int, ...]:
        channel, z, *plane = self.domain_shape
        return channel, z - 1, *plane

    domain_shape = derived(lambda self: self.of_volumes.domain_shape)
    range_shape = derived(lambda self: (math.prod(self.of_volumes.range_shape) + math.prod(self._between),))
    domain_dtype = derived(lambda self: self.of_volumes.domain_dtype)
    range_dtype = derived(lambda self: self.of_volumes.range_dtype)
    batch_shape = derived(lambda self: self.of_volumes.batch_shape or tuple(self.root.shape[:-4]))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.of_volumes.forward(x).flatten(-len(self.of_volumes.range_shape))
        return torch.cat([rows, (self.root * x.diff(dim=-3)).flatten(-4)], -1)

    def adjoint(self, y: Tensor) -> Tensor:
        rows, ties = y.split([math.prod(self.of_volumes.range_shape), math.prod(self._between)], -1)
        x = self.of_volumes.adjoint(rows.unflatten(-1, self.of_volumes.range_shape))
        return x + _undiff(self.root * ties.unflatten(-1, self._between))

    def normal(self, x: Tensor) -> Tensor:
        return self.of_volumes.normal(x) + _undiff(self.root.square() * x.diff(dim=-3))


def _undiff(d: Tensor) -> Tensor:
    """The adjoint of differences along z."""
    return -F.pad(d, (0, 0, 0, 0, 1, 1)).diff(dim=-3)
