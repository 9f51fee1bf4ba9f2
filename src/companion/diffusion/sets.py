"""Denoisers of single images for several images that share their data: sets of maps, and slices of a volume."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from companion.diffusion.denoisers import Denoiser, moments_of

AT_ONCE = 64  # slices of volumes that go through a network together


class EachSet(nn.Module):
    """D for x `(batch, set, *space)`: every set is an image of its own, as in soft SENSE of folded fields of view.

    The prior is then the product of D's prior over sets; the data tie them together. One call takes batch * set images.
    """

    def __init__(self, D: Denoiser):
        super().__init__()
        self.D = D

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """x0_hat, the shape and dtype of x."""
        return self._each(lambda *args: (self.D(*args),), x, sigma, cond)[0]

    def _each(self, f: Callable, x: Tensor, sigma: Tensor, cond: Tensor | None) -> tuple[Tensor, ...]:
        sets = x.shape[1]
        sigma = torch.as_tensor(sigma, device=x.device, dtype=x.real.dtype).expand(len(x)).repeat_interleave(sets)
        cond = cond if cond is None or len(cond) == 1 else cond.repeat_interleave(sets, 0)
        results = f(x.flatten(0, 1)[:, None], sigma, cond)
        return tuple(r.expand(len(sigma), *r.shape[1:])[:, 0].unflatten(0, (len(x), sets)) for r in results)

    def _moments(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x0_hat, variance = self._each(moments_of(self.D), x, sigma, cond)
        return x0_hat, variance

    @property
    def moments(self) -> Callable:
        """moments(x, sigma, cond) -> (x0_hat, variance); exists if D has it."""
        if not hasattr(self.D, "moments"):
            raise AttributeError("the wrapped denoiser has no moments")
        return self._moments


class EachSlice(EachSet):
    """D for volumes x `(batch, 1, z, y, x)`: every slice is an image of its own; cond `(batch or 1, c, z, y, x)`.

    The prior is then the product of D's prior over slices, which knows nothing of what is above and below; the lines of
    oblique planes tie slices together. D never takes more than AT_ONCE of them.

    turning: each call cuts across the next axis in turn, z, y, x, z, ..., the top of a head (z upwards) in the first
    row of coronal and sagittal slices. For voxels that are cubes, and a D of slices in any plane: a prior of axial
    slices alone lets neighbours drift apart where data do not resolve them, which the other planes show as stripes.
    [lee2023] for two perpendicular planes.
    """

    def __init__(self, D: Denoiser, turning: bool = False):
        super().__init__(D)
        self.turning, self.calls = turning, 0

    def _each(self, f: Callable, x: Tensor, sigma: Tensor, cond: Tensor | None) -> tuple[Tensor, ...]:
        axis = self.calls % 3 if self.turning else 0
        self.calls += 1
        cond = None if cond is None else _across(cond, axis)
        return tuple(_axial(r, axis) for r in self._cut(f, _across(x, axis), sigma, cond))

    def _cut(self, f: Callable, x: Tensor, sigma: Tensor, cond: Tensor | None) -> tuple[Tensor, ...]:
        """The results of f for slices along the third axis."""
        batch, depth = len(x), x.shape[2]
        sigma = torch.as_tensor(sigma, device=x.device, dtype=x.real.dtype).expand(batch).repeat_interleave(depth)
        cond = cond if cond is None else _slices(cond.expand(batch, *cond.shape[1:]))
        slices, parts = _slices(x), []
        for i in range(0, len(slices), AT_ONCE):
            some = slice(i, i + AT_ONCE)
            found = f(slices[some], sigma[some], None if cond is None else cond[some])
            parts.append([r.expand(len(slices[some]), *r.shape[1:]) for r in found])
        return tuple(torch.cat(r).unflatten(0, (batch, depth)).transpose(1, 2) for r in zip(*parts, strict=True))


def _across(volumes: Tensor, axis: int) -> Tensor:
    """(batch, c, z, y, x) as (batch, c, slice, row, column) of slices across z, y or x: upright where rows were z."""
    order = ((2, 3, 4), (3, 2, 4), (4, 2, 3))[axis]
    cut = volumes.permute(0, 1, *order)
    return cut.flip(3) if axis else cut


def _axial(slices: Tensor, axis: int) -> Tensor:
    """The volumes of `_across`."""
    back = ((2, 3, 4), (3, 2, 4), (3, 4, 2))[axis]
    return (slices.flip(3) if axis else slices).permute(0, 1, *back)


def _slices(volumes: Tensor) -> Tensor:
    """(batch, c, z, y, x) as (batch * z, c, y, x)."""
    return volumes.transpose(1, 2).flatten(0, 1)
