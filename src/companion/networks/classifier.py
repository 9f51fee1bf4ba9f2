"""A small convolutional classifier of images: (batch, channel, y, x) -> logits (batch,)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Convolutions, every other one with stride 2; mean and maximum over space; one logit.

    widths: channels of the layers. Group normalisation makes the layers blind to the scale of what they are given.
    """

    def __init__(self, in_channels: int = 1, widths: Sequence[int] = (12, 16, 24, 24, 36, 36, 48), groups: int = 4):
        super().__init__()
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            kernel, stride = (5 if i == 0 else 3), 2 - i % 2
            before = in_channels if i == 0 else widths[i - 1]
            layers += [nn.Conv2d(before, width, kernel, stride, kernel // 2), nn.GroupNorm(groups, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(2 * widths[-1], 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return self.out(torch.cat([x.mean((-2, -1)), x.amax((-2, -1))], 1))[:, 0]
