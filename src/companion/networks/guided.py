"""A U-Net that is shown what a second image says about the noisy one: local means over pixels of like value.

How a second image of the same place (an MR beside a PET) and the clean one go together is new in every person: another
contrast, another tracer. A convolution would have to learn to regress one on the other; here that is worked out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from companion.networks.unet import UNet

BINS = 12  # values of the guide that are told apart
TOP = 1.25  # the largest of them; what is above belongs to it


class GuidedUNet(UNet):
    """A `UNet` of x, of `guided_means` of x by the guide, one for each `reach` (pixels), and of the condition itself.

    cond (batch or 1, 2, y, x): the guide, tissue about 0 to 1, and where it is known; x has one channel, so in_channels
    is 3. Other options are those of `UNet`.
    """

    def __init__(self, in_channels: int = 3, *, reach: tuple[float, ...] = (1.5, 4.0, 12.0), **options):
        super().__init__(in_channels=in_channels + len(reach), **options)
        self.in_channels, self.reach = in_channels, tuple(reach)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """F of shape (batch, out_channels, y, x)."""
        if cond is None or cond.shape[1] != 2 or x.shape[1] != 1:
            raise ValueError(
                "a GuidedUNet takes images of one channel, and a condition of two: a guide, and where it is"
            )
        cond = cond.to(x.dtype).expand(x.shape[0], *cond.shape[1:])
        self.check(torch.cat([x, cond], 1), t)
        means = guided_means(x, cond[:, :1], cond[:, 1:], self.reach)
        return self.run(torch.cat([x, means, cond], 1), self.embed(t.expand(x.shape[0]), y))


def guided_means(x: Tensor, guide: Tensor, known: Tensor, reach: tuple[float, ...]) -> Tensor:
    """The means (batch, reach, y, x) of x over pixels nearby whose guide has a like value; 0 where it is not known.

    x, guide, known (batch, 1, y, x). Pixels are weighted by a Gaussian of standard deviation `reach` pixels and by
    hat functions of the value: linear in x, with the noise of x divided by the square root of how many pixels count.
    [paris2006] (bilateral grid); [petschnigg2004] (joint bilateral filter).
    """
    level = (guide / TOP).clamp(0, 1) * (BINS - 1)
    centres = torch.arange(BINS, device=x.device, dtype=x.dtype)[:, None, None]
    share = (1 - (level - centres).abs()).clamp(min=0) * known  # (batch, bin, y, x)
    found = []
    for width in reach:
        both = blur(torch.cat([share * x, share], 1), width)
        mean = both[:, :BINS] / both[:, BINS:].clamp(min=1e-3)
        found.append((share * mean).sum(1, keepdim=True))
    return torch.cat(found, 1)


def blur(x: Tensor, width: float) -> Tensor:
    """x (batch, channel, y, x) convolved with a Gaussian of standard deviation `width` pixels, 0 outside."""
    down, across = (gaussian(n, width, x) for n in x.shape[-2:])
    return down @ x @ across.T


def gaussian(n: int, width: float, like: Tensor) -> Tensor:
    """The matrix (n, n) of that convolution along one axis."""
    line = torch.arange(n, dtype=like.dtype, device=like.device)
    kernel = torch.exp(-0.5 * ((line[:, None] - line) / width) ** 2)
    return kernel / (width * math.sqrt(2 * math.pi))
