"""Where patches lie: the grid of pixels, their windows, and the candidates of each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from companion.information.pairs import (
    CROP,
    MAX_POOL,
    REACH,
)


def pick(table: Tensor, at: Tensor, start: Tensor | None = None, size: int | None = None) -> Tensor:
    """Of a table (row, bins) the rows `at` (pixel, ...), whole, or `size` bins from `start` (pixel,) on."""
    bins = table.shape[1]
    if start is None or size is None or size == bins:
        return table.index_select(0, at.flatten()).view(*at.shape, bins)
    start = start.view(-1, *[1] * (at.ndim - 1))
    pieces = table.as_strided((table.numel() - size + 1, size), (1, 1))
    return pieces.index_select(0, (at * bins + start).flatten()).view(*at.shape, size)


def window(low: Tensor, high: Tensor, bins: int, width: float) -> tuple[Tensor, Tensor]:
    """First bin and number of bins, (pixel,) each, where samples from level `low` to `high` have any kernel."""
    per_level = (bins - 1) / 255
    first = ((low.clamp(0, 255) - REACH * width) * per_level).floor().clamp(min=0).long()
    last = ((high.clamp(0, 255) + REACH * width) * per_level).ceil().clamp(max=bins - 1).long()
    size = ((last - first) // CROP * CROP + CROP).clamp(max=bins)
    return torch.minimum(first, bins - size), size


def by_size(pixels: Tensor, size1: Tensor, size2: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """The pixels, in groups for which size1 and size2 (of every pixel of the slab) are the same."""
    radix = int(size2.max()) + 1
    both, order = (size1 * radix + size2)[pixels].sort(stable=True)
    sizes, counts = both.unique_consecutive(return_counts=True)
    for size, part in zip(sizes.tolist(), pixels[order].split(counts.tolist()), strict=True):
        of1, of2 = divmod(size, radix)
        yield part, of1, of2


def extremes(levels: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest level of the side^n neighbourhoods that lie inside (batch, 1, *space)."""
    pool = MAX_POOL[levels.ndim - 2]
    return -pool(-levels, side, 1), pool(levels, side, 1)


# ---------------------------------------------------------------------------------------- geometry of patches


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the samples of patches lie in padded and flattened images.

    pad: pixels on every side. search: candidates along an axis. strides: of the axes, in the padded image.
    position (pixel,): of every pixel. patch (sample,): from a pixel to its patch. candidates (border, sample,
    candidate): from a pixel to the candidates of the target. border (1, 1, *space): which of the first axis
    of `candidates` holds for a pixel.
    """

    pad: int
    search: int
    strides: tuple[int, ...]
    position: Tensor
    patch: Tensor
    candidates: Tensor
    border: Tensor

    @classmethod
    @lru_cache(maxsize=32)
    @torch.inference_mode(False)  # the tensors are kept, and may later be needed for a gradient
    def of(cls, mode: str, patch: int, space: tuple[int, ...], device: torch.device) -> Grid:
        h = patch // 2
        pad = 2 * h if mode == "shifts" else h
        strides = tuple(math.prod(n + 2 * pad for n in space[axis + 1 :]) for axis in range(len(space)))
        position = candidates = border = around = torch.zeros(1, dtype=torch.long)
        candidates = candidates.view(1, 1, 1)
        for size, stride in zip(space, strides, strict=True):
            steps, kind = axis_offsets(mode, patch, size).unique(dim=0, return_inverse=True)
            position = (position[:, None] + (torch.arange(size) + pad) * stride).flatten()
            around = (around[:, None] + torch.arange(-h, h + 1) * stride).flatten()
            border = (border[:, None] * len(steps) + kind).flatten()
            candidates = candidates[:, None, :, None, :, None] + stride * steps[None, :, None, :, None, :]
            candidates = candidates.flatten(4).flatten(2, 3).flatten(0, 1)
        search = 1 if mode == "centre" else patch
        tensors = (position, around, candidates, border.view(1, 1, *space))
        return cls(pad, search, strides, *(x.to(device) for x in tensors))

    def positions(self, images: Tensor, batch: int) -> Tensor:
        """Where the pixels of `batch` images lie in padded images (batch or 1, 1, *padded), cut to some rows."""
        pixels = (images.shape[2] - 2 * self.pad) * (len(self.position) // self.border.shape[2])
        first = torch.arange(len(images), device=images.device) * images[0].numel()
        return (first[:, None] + self.position[:pixels]).expand(batch, -1).flatten()


def axis_offsets(mode: str, patch: int, size: int) -> Tensor:
    """Steps along an axis from every pixel to the samples of its candidates, (size, sample, candidate)."""
    h = patch // 2
    sample, candidate = torch.arange(-h, h + 1)[:, None], torch.arange(patch)[None]
    if mode == "centre":
        return sample.expand(size, patch, 1)
    if mode == "shifts":
        return (sample + candidate - h).expand(size, patch, patch)
    # Published: candidates are cut from an image in which every pixel is replaced by its neighbourhood, a
    # block of `patch` pixels. A sample outside its own block belongs to the neighbourhood of the next pixel;
    # beyond the first and last block lie zeros, as they do one pixel outside the image.
    row = sample + candidate
    block = row.div(patch, rounding_mode="floor")
    pixel = torch.arange(size)[:, None, None]
    outside = (pixel + block < 0) | (pixel + block >= size)
    return torch.where(outside, block, block + row - patch * block - h)
