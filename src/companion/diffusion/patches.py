"""Denoisers of patches that know where they are, as denoisers of whole images [hu2024padis]."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from companion.diffusion.denoisers import Denoiser
from companion.randomness import randn


class PatchDenoiser(nn.Module):
    """D(x, sigma) of whole images (batch, channel, y, x), from D(patch, sigma, position) of square patches.

    patch: side of a patch, in pixels. partitions: how many ways to cut the image are averaged; each is moved along both
    axes by another share of a patch, so that seams of one lie inside the patches of the others. The image lies in a
    border of zeros, one patch wide in all, whose noisy pixels are sigma times fixed noise, as in training; positions
    (batch, 2, y, x), first along x, then along y, go from -1 to 1 across the image with its border. Unlike in the paper
    the partitions are the same in every evaluation, so that D is a function and any solver samples with it.
    """

    def __init__(self, D: Denoiser, patch: int, partitions: int = 4, seed: int = 0):
        super().__init__()
        if patch < 1 or not 1 <= partitions <= patch:
            raise ValueError(f"patch={patch}, partitions={partitions}: expected 1 <= partitions <= patch")
        self.D, self.patch, self.partitions, self.seed = D, patch, partitions, seed

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """x0_hat, the shape and dtype of x."""
        if cond is not None:
            raise ValueError("the condition of a patch is its position; leave cond out")
        p, (rows, columns) = self.patch, x.shape[-2:]
        down, across = (-(-n // p) + 1 for n in (rows, columns))  # patches that cover the image wherever it lies
        canvas = torch.zeros_like(x)
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1).expand(x.shape[0])
        for i in range(self.partitions):
            at = round(i * p / self.partitions)  # of the image in its border
            whole = randn((x.shape[1], down * p, across * p), x.dtype, torch.Generator().manual_seed(self.seed))
            whole = sigma[:, None, None, None] * whole.to(x.device)
            whole[:, :, at : at + rows, at : at + columns] = x
            canvas = canvas + self.cut(whole, sigma)[:, :, at : at + rows, at : at + columns]
        return canvas / self.partitions

    def cut(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x0_hat of an image that patches tile."""
        p, (down, across) = self.patch, (n // self.patch for n in x.shape[-2:])
        n = down * across

        def tiles(image: Tensor) -> Tensor:  # (batch, c, y, x) -> (batch * tile, c, p, p)
            parts = image.unflatten(3, (across, p)).unflatten(2, (down, p))
            return parts.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

        where = tiles(positions(x.shape[-2:], x)).repeat(len(x), 1, 1, 1)
        out = self.D(tiles(x), sigma.repeat_interleave(n), where)
        parts = out.unflatten(0, (len(x), down, across)).permute(0, 3, 1, 4, 2, 5)
        return parts.flatten(4, 5).flatten(2, 3)


def positions(space: Sequence[int], like: Tensor) -> Tensor:
    """Where pixels are (1, 2, y, x), along x and along y, from -1 to 1 across an image of a size (y, x)."""
    y, x = (torch.linspace(-1, 1, n, dtype=like.dtype, device=like.device) for n in space)
    return torch.stack([x.expand(*space), y[:, None].expand(*space)])[None]
