"""A denoiser of single images for several images that share their data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from companion.diffusion.denoisers import Denoiser, moments_of


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
