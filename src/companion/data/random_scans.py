"""Scans of every kind to learn a reconstruction from: coils, masks and noise that change from image to image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from companion.operators.masks import cartesian_mask
from companion.operators.mri import Sense, sense
from companion.randomness import randn

COILS = 8  # at most
ACCELERATIONS = (2.0, 8.0)
CENTRE = (0.04, 0.12)  # fully sampled centre, of the width
NOISE = (0.002, 0.05)  # per real component; bright tissue is 1
KINDS = ("equispaced", "random", "variable_density")


def random_scan(x0: Tensor, generator: Generator) -> tuple[Tensor, Sense, Tensor, Tensor]:
    """The images (batch, 1, y, x) that can be known, an operator, their data, the noise_std (batch,) of each.

    1 to 8 coils, the same number for all; maps, masks (lines along y or points), R of 2 to 8 and noise of each image.
    A quarter of the maps are 0 where there is no signal, as maps from a scan's centre are; so is the image there.
    """
    batch, _, height, width = x0.shape
    coils = int(torch.randint(1, COILS + 1, (), generator=generator))
    maps = random_maps(batch, coils, (height, width), generator)
    signal = F.max_pool2d((x0.abs() > 0.06).float(), 5, 1, 2)
    maps = maps * torch.where(torch.rand(batch, 1, 1, 1, generator=generator) < 0.25, signal, 1.0)
    masks = torch.stack([random_mask((height, width), generator) for _ in range(batch)])[:, None]
    low, high = (math.log(v) for v in NOISE)
    std = (low + (high - low) * torch.rand(batch, generator=generator)).exp()
    x0 = x0 * (maps.abs().sum(1, keepdim=True) > 0)
    A = sense(maps, masks)
    y = A(x0)
    return x0, A, y + A.mask(std[:, None, None, None] * randn(y.shape, y.dtype, generator)), std


def random_maps(batch: int, coils: int, shape: tuple[int, int], generator: Generator) -> Tensor:
    """Smooth complex maps (batch, coil, y, x), of unit sum of squares: coils around the object, at any distance."""

    def uniform(low: float, high: float, *count: int) -> Tensor:
        return (low + (high - low) * torch.rand(batch, *count, 1, 1, generator=generator)).float()

    y = torch.linspace(-1, 1, shape[0])[:, None]
    x = torch.linspace(-1, 1, shape[1])
    around = torch.arange(coils)[:, None, None] + uniform(-0.3, 0.3, coils)
    angle = 2 * math.pi * around / coils + uniform(0, 2 * math.pi, 1)
    away, reach, power = uniform(0.9, 1.8, coils), uniform(0.4, 1.2, 1), uniform(0.8, 1.8, 1)
    distance = (y - away * angle.sin()).square() + (x - away * angle.cos()).square()
    slope = uniform(-2, 2, coils), uniform(-2, 2, coils)
    phase = uniform(-math.pi, math.pi, coils) + slope[0] * y + slope[1] * x
    maps = torch.polar((1 + distance / reach**2) ** -power, phase.expand(batch, coils, *shape))
    return maps / maps.abs().square().sum(1, keepdim=True).sqrt()


def random_mask(shape: tuple[int, int], generator: Generator) -> Tensor:
    """A mask (y, x) of zeros and ones: lines of one of three kinds, or, one time of five, single points."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    R, centre = uniform(*ACCELERATIONS), uniform(*CENTRE)
    if uniform(0, 1) > 0.2:
        kind = KINDS[int(torch.randint(len(KINDS), (), generator=generator))]
        seed = int(torch.randint(2**31, (), generator=generator))
        return cartesian_mask(shape, R, kind, acs=max(2, round(centre * shape[1])), seed=seed).mask
    y, x = (torch.linspace(-1, 1, n) for n in shape)
    radius = (y[:, None].square() + x.square()).sqrt() / 2**0.5
    rank = torch.rand(shape, generator=generator) / (1 - radius + 0.05) ** 2  # the least are taken
    rank[(y.abs()[:, None] < centre) & (x.abs() < centre)] = -1
    chosen = rank.flatten().argsort()[: round(rank.numel() / R)]
    return torch.zeros(rank.numel()).index_fill(0, chosen, 1.0).reshape(shape)
