"""An image in contrasts that nobody has seen: its grey values under a random map, for training without pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from companion.data.shading import AIR, local_mean
from companion.information.pairs import grey
from companion.randomness import randn

KNOTS = (4, 7)  # fewest and most knots of a map of intensities
WINDOW = 3  # side of the neighbourhood in which partial volumes are mixed linearly


APART = 0.7  # share of the images whose lesions have a map of their own


def remapped(x0: Tensor, generator: Generator, share: float = 1.0, lesion: Tensor | None = None) -> Tensor:
    """Sources (batch, 1, y, x) in [0, 1] with the anatomy of x0 in contrasts that nobody has seen.

    A random map of intensities, continuous and seldom monotone, with 4 to 7 knots: air, the brightest value, and in
    between the means of clusters of values, so that every tissue may take any height, or else random levels. Its air
    stays dark nine times of ten, and the contrast among tissues is often low. More than half the images are first freed
    from a part of their own shading. Then a new shading, and in a part of the images blur and noise. share: of the
    images that are remapped; the others stay. lesion: shares (batch, 1, y, x) of lesions, which have a map of their own
    in most images: no curve leads from one contrast to another in healthy tissue and in lesions alike. All draws come
    from `generator`; no other contrast is known here.
    """

    def rand(*shape: int) -> Tensor:
        return torch.rand((len(x0), *shape), generator=generator, device=generator.device).to(x0.device)

    image = grey(x0)
    one = (1, 1, 1)
    x = image / local_mean(image) ** ((1.5 * rand(*one)).clamp(max=1) * (rand(*one) < 0.6))
    knots = int(torch.randint(KNOTS[0], KNOTS[1] + 1, (), generator=generator, device=generator.device))
    clustered = rand(1) < 0.7
    at, heights = _knots(x, rand(knots - 2), clustered), rand(knots)
    heights[:, -1:] = torch.where(clustered, heights[:, -2:-1], heights[:, -1:])  # flat beyond the last cluster
    heights = heights + (1 - heights) * 0.85 * rand(1) * (rand(1) < 0.5)  # lower contrast
    heights = _odd_ones(heights, rand(2), rand(2))
    heights[:, :1] *= rand(1) < 0.1  # air
    mixed = rand(*one) < 0.7
    y = _transfer(x, at, heights, mixed)
    if lesion is not None:
        own = _transfer(x, at, rand(knots) * (0.3 + 0.9 * rand(1)), mixed)
        y = torch.lerp(y, own, lesion.to(y) * (rand(*one) < APART))
    shading = F.interpolate(2 * rand(1, 4, 4) - 1, size=y.shape[2:], mode="bicubic", align_corners=True)
    y = y * (0.3 * rand(*one) ** 2 * shading).exp()
    y = torch.where(rand(*one) < 0.15, F.avg_pool2d(F.pad(y, [1] * 4, mode="replicate"), 3, 1), y)
    std = 0.04 * rand(*one) * (rand(*one) < 0.4)
    y = (y + std * randn(y.shape, y.dtype, generator, y.device)).clamp(min=0)
    top = y.flatten(1).kthvalue(max(1, round(0.995 * y[0].numel())), 1).values.clamp(min=1e-3).view(-1, *one)
    y = (y / top * (0.75 + 0.3 * rand(*one))).clamp(0, 1)
    return torch.where(rand(*one) < share, y, image)


def _odd_ones(heights: Tensor, chance: Tensor, which: Tensor) -> Tensor:
    """Heights (batch, knot) where now and then one is as dark as air, and two that follow one another are alike."""
    knots = heights.shape[1]
    dark, later = ((first + which[:, i : i + 1] * (knots - first)).long() for i, first in enumerate((1, 2)))
    dim = heights.scatter(1, dark, 0.06 * chance[:, :1] / 0.2)
    heights = torch.where(chance[:, :1] < 0.2, dim, heights)
    alike = heights.scatter(1, later, heights.gather(1, later - 1))
    return torch.where(chance[:, 1:] < 0.2, alike, heights)


def _knots(x: Tensor, levels: Tensor, clustered: Tensor) -> Tensor:
    """Positions (batch, knot), increasing from 0 to the largest value; `clustered`: at means of clusters of the tissue.

    levels: where the inner knots lie between 0 and 1, or at which shares of the tissue the clusters begin to be sought.
    """
    values = x.flatten(1).sort(1).values
    tissue = values > AIR
    levels, top = levels.sort(1).values, values[:, -1:]
    index = values.shape[1] - 1 - (1 - levels) * (tissue.sum(1, keepdim=True) - 1).clamp(min=0)
    centres = values.gather(1, index.round().long())
    for _ in range(6):  # Lloyd's algorithm
        of = torch.searchsorted((centres[:, 1:] + centres[:, :-1]).contiguous() / 2, values)
        count = torch.zeros_like(centres).scatter_add(1, of, tissue.to(x))
        total = torch.zeros_like(centres).scatter_add(1, of, values * tissue)
        centres = torch.where(count > 0, total / count.clamp(min=1), centres)
    inner = torch.where(clustered, centres, levels * top)
    at = torch.cat([torch.zeros_like(top), inner, top], 1)
    return at + 1e-4 * torch.arange(at.shape[1], device=x.device)  # apart, also where clusters coincide


def _transfer(x: Tensor, at: Tensor, heights: Tensor, mixed: Tensor) -> Tensor:
    """x (batch, 1, y, x) under maps that reach `heights` at the knots `at`, flat there, as tissues have one value.

    A pixel between two tissues has not the map's value at the value in between, but that share of both tissues:
    where `mixed`, the map is linear between the least and the largest value nearby.
    """

    def g(v: Tensor) -> Tensor:
        flat = v.flatten(1).contiguous()
        i = torch.searchsorted(at, flat).clamp(1, at.shape[1] - 1)
        (a, b), (low, high) = ((t.gather(1, i - 1), t.gather(1, i)) for t in (at, heights))
        s = ((flat - a) / (b - a)).clamp(0, 1)
        return (low + (high - low) * s**2 * (3 - 2 * s)).view_as(v)

    padded = F.pad(x, [WINDOW // 2] * 4, mode="replicate")
    least, most = -F.max_pool2d(-padded, WINDOW, 1), F.max_pool2d(padded, WINDOW, 1)
    ends = g(torch.cat([least, most, x], 1)) if len(x) else x
    low, high, direct = ends.split(1, 1)
    share = (x - least) / (most - least).clamp(min=1e-6)
    return torch.where(mixed, low + (high - low) * share, direct)
