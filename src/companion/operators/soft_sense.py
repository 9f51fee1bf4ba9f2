"""SENSE with several sets of coil maps, for fields of view that fold: A x = M F sum_s S_s x_s."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from companion.operators.linear import derived
from companion.operators.masks import CartesianMask
from companion.operators.mri import CoilMaps, Coils, Mask, Sense, _check_maps


@dataclass(frozen=True, eq=False, repr=False)
class CoilSets(CoilMaps):
    """S: images `(..., set, *space)` to coil images `(..., coil, *space)`, sum_s S_s x_s, by maps `(set, coil, *space)`
    or `(batch, set, coil, *space)`.

    Each pixel holds as many values as there are sets: where tissue folds onto other tissue, both have a coil vector
    of their own. `ndim` is the number of space axes, 2 or 3. [uecker2014], soft SENSE.
    """

    maps: Tensor
    ndim: int = 2

    def __post_init__(self):
        _check_maps(self.maps, self.ndim)
        if self.maps.ndim < self.ndim + 2:
            raise ValueError(f"maps have shape {tuple(self.maps.shape)}; expected (set, coil, *space)")

    domain_shape = derived(lambda self: (self.maps.shape[-self.ndim - 2], *self.maps.shape[-self.ndim :]))
    range_shape = derived(lambda self: tuple(self.maps.shape[-self.ndim - 1 :]))
    batch_shape = derived(lambda self: tuple(self.maps.shape[: -self.ndim - 2]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.maps * x.unsqueeze(-self.ndim - 1)).sum(-self.ndim - 2)

    def adjoint(self, y: Tensor) -> Tensor:
        return (self.maps.conj() * y.unsqueeze(-self.ndim - 2)).sum(-self.ndim - 1)


def coils_of(maps: Tensor, ndim: int = 2) -> Coils | CoilSets:
    """S of maps `([batch,] set, coil, *space)`: `Coils` for one set, `CoilSets` for more."""
    return Coils(maps.squeeze(-ndim - 2), ndim) if maps.shape[-ndim - 2] == 1 else CoilSets(maps, ndim)


def soft_sense(maps: Tensor, mask: Tensor | CartesianMask, ndim: int = 2) -> Sense:
    """A = M F S from images `(..., set, *space)` to k-space `(..., coil, *space)`, maps `([batch,] set, coil, *space)`.

    mask: as for `sense`. With one set it is `sense`. Raises ValueError when maps and mask do not fit.
    """
    coils = coils_of(maps, ndim)
    mask = mask.mask if isinstance(mask, CartesianMask) else mask
    return Sense(coils, Mask(mask.to(maps.device), coils.range_shape))
