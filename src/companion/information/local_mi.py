"""Local mutual information (LMI): how well one image predicts another inside small patches, pixel by pixel.

The map conditions the translation networks of [wang2024]: it
sees which structures two images share and, to a good part, not the contrast in which either shows them.

    lmi = LocalMI(patch=3)                  # true shifts, clamped, differentiable
    source = lmi.prepare(image)             # once per image: its entropies and where it is flat
    cross = lmi(source, x)                  # each sampling step, (batch, 1, *space)
    condition = torch.cat([cross, source.self_map.expand_as(cross)], dim=1)

    lmi = LocalMI(mode="published", patch=3, normalise=False)    # the map exactly as released

Grey levels are 255 * image for images in [0, 1]. Every pixel of a patch spreads a Gaussian of standard
deviation `width` grey levels over `bins` centres from 0 to 255; patches are compared pixel by pixel, so the
joint histogram is a sum of outer products. The value at a pixel is the largest mutual information, in bits,
of its source patch with several candidate patches of the target around it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from operator import add
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from companion.information.grid import Grid, by_size, extremes, pick, window
from companion.information.pairs import (
    AVERAGE_POOL,
    ENOUGH,
    EPS,
    JOINT,
    MODES,
    TABLE,
    TINY,
    entropy,
    grey_levels,
    joint,
    kernels,
    marginal,
    normalised,
    p_log_p,
)


def mutual_information(
    levels1: Tensor, levels2: Tensor, bins: int = 27, width: float = 8.0, normalise: bool = True
) -> Tensor:
    """Mutual information (...) of paired grey levels (..., sample), in bits or, normalised, between 0 and 1.

    The definition, without any economy: whole images, and the reference for LocalMI.
    """
    k1, k2 = kernels(levels1, bins, width), kernels(levels2, bins, width)
    h1, h2 = entropy(marginal(k1)), entropy(marginal(k2))
    information = h1 + h2 - entropy(joint(k1, k2), dims=2)
    return normalised(information, h1, h2) if normalise else information


# ------------------------------------------------------------------------------------- of images, pixel by pixel


unset: Any = None  # the default of a field that __post_init__ fills in


@dataclass(frozen=True)
class LocalMI:
    """The map lmi(source, target) -> (batch, 1, *space), for images in 1, 2 or 3 dimensions of any size.

    patch: odd side of the patches.
    bins: of the histograms; by default 27, in mode "published" patch^3.
    width: standard deviation of the kernels in grey levels; by default 8 (published: 2 * MIsigma^2, with
        MIsigma = 2), or 0.8 of the distance between bins where that is more.
    mode: which target patches are candidates for a pixel.
        "shifts": the patch^n patches centred at most patch // 2 pixels away; images continue beyond their
        border with their last value. "centre": the one at the pixel itself. "published": as released, where
        all but the centre one mix pixels of two neighbourhoods, and beyond the border lie zeros.
    normalise: 2 I / (H1 + H2) rather than bits.
    clamp: grey levels into 0..255. Without it noise far out of range has no kernel mass, and the published
        map takes the entropy of the source for information. Default: as the mode is, so is `quantise`.
    quantise: integer grey levels: no gradient.
    compiled: let torch.compile fuse joint histogram and logarithm, which then never reach memory: for GPUs.

    Differentiable with respect to source and target unless `quantise`; gradients are recomputed chunk by
    chunk, so that memory stays bounded. Sources that are prepared may be used any number of times.
    """

    patch: int = 3
    bins: int = unset
    width: float = unset
    mode: str = "shifts"
    normalise: bool = True
    clamp: bool = unset
    quantise: bool = unset
    compiled: bool = False

    def __post_init__(self):
        published = self.mode == "published"
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; choose one of {', '.join(MODES)}")
        if not isinstance(self.patch, int) or self.patch < 3 or self.patch % 2 == 0:
            raise ValueError(f"patch is {self.patch}; it must be an odd number of pixels, 3 or more")
        bins = (self.patch**3 if published else 27) if self.bins is None else self.bins
        if not isinstance(bins, int) or bins < 2:
            raise ValueError(f"bins is {bins}; a histogram needs 2 or more")
        spacing = 255 / (bins - 1)
        width = (8.0 if published else max(8.0, 0.8 * spacing)) if self.width is None else float(self.width)
        if not width > 0 or (not published and width < spacing / 2):
            raise ValueError(
                f"width is {width:g} grey levels with bins {spacing:.3g} apart: levels between two bins would be lost; "
                f"take a width of {spacing / 2:.3g} or more, or more bins"
            )
        resolved = {"bins": bins, "width": width, "clamp": self.clamp, "quantise": self.quantise}
        resolved["clamp"] = not published if self.clamp is None else self.clamp
        resolved["quantise"] = published if self.quantise is None else self.quantise
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

    def prepare(self, image: Tensor, allow_constant: bool = False) -> Source:
        """The source side of the map of `image` (batch, 1, *space), in [0, 1]; see __call__ for errors.

        Also raises ValueError for a constant image, which has nothing to translate, unless `allow_constant`
        (its maps are 0) or mode "published".
        """
        self._check(image, "source")
        if not (allow_constant or self.mode == "published"):
            flat = (image.flatten(1).amax(1) == image.flatten(1).amin(1)).nonzero().flatten().tolist()
            if flat:
                raise ValueError(
                    f"source image {flat[0]} of the batch is constant ({image[flat[0]].flatten()[0]:g}): it has no "
                    "structure to translate; leave empty slices out, or allow_constant=True for a map of zeros"
                )
        return Source.of(self, image)

    def __call__(self, source: Tensor | Source, target: Tensor) -> Tensor:
        """The map (batch, 1, *space) of a source, prepared or not, and a target (batch, 1, *space).

        A source of batch 1 serves a target of any batch. Raises ValueError for NaN, for sizes that differ,
        for images with several channels, and for a Source prepared with other settings.
        """
        return self._best(source, target)[0]

    def align(self, source: Tensor | Source, target: Tensor) -> tuple[Tensor, Tensor]:
        """The map, and the target's value at the centre of the best candidate; both (batch, 1, *space)."""
        score, winner = self._best(source, target)
        grid = self._grid(target)
        place, winner = grid.position, winner.flatten(1)
        for stride in reversed(grid.strides):  # the last axis runs fastest through the candidates
            place = place + (winner % grid.search - grid.search // 2) * stride
            winner = winner // grid.search
        return score, self._pad(target).flatten(1).gather(1, place).view_as(target)

    def _best(self, source: Tensor | Source, target: Tensor) -> tuple[Tensor, Tensor]:
        """The largest information over the candidates, and which it is, (batch, 1, *space) each."""
        self._check(target, "target")
        source = source if isinstance(source, Source) else self.prepare(source)
        source.check(self, target)
        levels = self._pad(grey_levels(target, self.clamp, self.quantise))
        parts = [self._slab(source, levels, *slab) for slab in self._slabs(target.shape)]
        score, winner = (torch.cat(part).view_as(target) for part in zip(*parts, strict=True))
        return score, winner

    def _slab(self, source: Source, levels: Tensor, images: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """_best for some rows of some images, flattened; levels (batch, 1, *padded) are those of the target."""
        pairs = Pairs.of(source, levels, images, rows)
        differentiable = torch.is_grad_enabled() and (pairs.k1.requires_grad or pairs.k2.requires_grad)
        with torch.no_grad():
            score, winner = pairs.search()
        # Only the best candidate has a gradient, so only that one is computed again.
        return (pairs.score_of(winner) if differentiable else score), winner

    def _slabs(self, shape: Sequence[int]) -> Iterator[tuple[slice, slice]]:
        """(images, rows), in order, of which the kernel tables are small."""
        batch, _, rows, *rest = shape
        limit, per_row = TABLE, self.bins * math.prod(rest)
        many = max(1, limit // (per_row * rows))
        height = min(rows, max(1, limit // per_row))
        for i, r in itertools.product(range(0, batch, many), range(0, rows, height)):
            yield slice(i, min(i + many, batch)), slice(r, min(r + height, rows))

    def _grid(self, image: Tensor) -> Grid:
        return Grid.of(self.mode, self.patch, tuple(image.shape[2:]), image.device)

    def _pad(self, image: Tensor) -> Tensor:
        pad = [self._grid(image).pad] * 2 * (image.ndim - 2)
        return F.pad(image, pad) if self.mode == "published" else F.pad(image, pad, mode="replicate")

    def _check(self, image: Tensor, name: str) -> None:
        """Raises unless `image` (batch, 1, *space) is one that the map is defined for."""
        if not isinstance(image, Tensor) or not image.is_floating_point():
            kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"the {name} is {kind}; expected a floating-point tensor in [0, 1], such as image / 255")
        if image.ndim not in (3, 4, 5) or not image.numel():
            raise ValueError(
                f"the {name} has shape {tuple(image.shape)}; expected (batch, 1, *space) with 1 to 3 axes of space"
            )
        if image.shape[1] != 1:
            raise ValueError(
                f"the {name} has {image.shape[1]} channels; the map compares grey images: take luma(rgb), or "
                "one channel at a time, image.flatten(0, 1)[:, None]"
            )
        if not torch.isfinite(image).all():
            raise ValueError(f"the {name} holds NaN or infinity; mask or repair it first")


@dataclass(frozen=True, eq=False)
class Source:
    """The source side of the map, made by LocalMI.prepare: what does not change while the target does.

    image (batch, 1, *space); levels: its padded grey levels; per pixel, of the patch around it: entropy of the
    histogram in bits, whether it is flat, lowest and highest level.
    """

    lmi: LocalMI
    image: Tensor
    levels: Tensor
    entropy: Tensor
    flat: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, lmi: LocalMI, image: Tensor) -> Source:
        levels = lmi._pad(grey_levels(image, lmi.clamp, lmi.quantise))
        n, extra = image.ndim - 2, lmi._grid(image).pad - lmi.patch // 2
        inner = F.pad(levels, [-extra] * 2 * n)
        parts = []
        for images, rows in lmi._slabs(image.shape):
            k = kernels(inner[images, 0, rows.start : rows.stop + lmi.patch - 1], lmi.bins, lmi.width).movedim(-1, 1)
            m = AVERAGE_POOL[n](k, lmi.patch, 1)
            parts.append(entropy((m / (m.sum(1, keepdim=True) + EPS)).movedim(1, -1)).flatten())
        low, high = extremes(inner.detach(), lmi.patch)
        return cls(lmi, image, levels, torch.cat(parts).view_as(image), low == high, low, high)

    @cached_property
    def self_map(self) -> Tensor:
        """The map of the image with itself (batch, 1, *space), computed once."""
        return self.lmi(self, self.image)

    def check(self, lmi: LocalMI, target: Tensor) -> None:
        """Raises ValueError unless lmi may compare this source with `target` (batch, 1, *space)."""
        if lmi != self.lmi:
            raise ValueError(f"the source was prepared by {self.lmi}, not by {lmi}; prepare it again")
        if target.shape[2:] != self.image.shape[2:]:
            raise ValueError(
                f"source of size {tuple(self.image.shape[2:])}, target of size {tuple(target.shape[2:])}: the map "
                "compares aligned images; resample one to the other"
            )
        if len(self.image) not in (1, len(target)):
            raise ValueError(f"{len(self.image)} source images for {len(target)} targets; give one, or one each")
        if (target.device, target.dtype) != (self.image.device, self.image.dtype):
            raise ValueError(
                f"source is {self.image.dtype} on {self.image.device}, target {target.dtype} on {target.device}; "
                "bring them together with .to()"
            )


# ------------------------------------------------------------------------------- information of many patches


@dataclass(frozen=True, eq=False)
class Pairs:
    """The pixels of some rows of some images, and what is compared there; as many tensors as pixels.

    k1, k2 (place, bin): kernels of all padded pixels of source and target; mass1, mass2 (place, 1): their sums.
    at1, at2: places of the pixels.
    border: see Grid. flat, h1: of the source patches, whether they are flat and their entropy in bits.
    range1, range2: lowest and highest levels of source patch and candidates.
    """

    lmi: LocalMI
    grid: Grid
    k1: Tensor
    k2: Tensor
    mass1: Tensor
    mass2: Tensor
    at1: Tensor
    at2: Tensor
    border: Tensor
    flat: Tensor
    h1: Tensor
    range1: tuple[Tensor, Tensor]
    range2: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, source: Source, levels: Tensor, images: slice, rows: slice) -> Pairs:
        lmi, grid = source.lmi, source.lmi._grid(source.image)
        halo = slice(rows.start, rows.stop + 2 * grid.pad)
        ours = images if len(source.image) > 1 else slice(0, 1)
        levels1, levels2 = source.levels[ours, :, halo], levels[images, :, halo]

        def here(x: Tensor) -> Tensor:
            x = x[ours if len(x) > 1 else slice(0, 1), :, rows]
            return x.flatten(1).expand(len(levels2), -1).flatten()

        k1, k2 = (kernels(x.flatten(), lmi.bins, lmi.width) for x in (levels1, levels2))
        mass1, mass2 = (k.sum(-1, keepdim=True) for k in (k1, k2))
        at1, at2 = (grid.positions(x, len(levels2)) for x in (levels1, levels2))
        border, flat, h1 = (here(x) for x in (grid.border, source.flat, source.entropy))
        low, high = extremes(levels2.detach(), 2 * grid.pad + 1)
        range1, range2 = (here(source.low), here(source.high)), (low.flatten(), high.flatten())
        return cls(lmi, grid, k1, k2, mass1, mass2, at1, at2, border, flat, h1, range1, range2)

    def search(self) -> tuple[Tensor, Tensor]:
        """Information (pixel,) with the best candidate, and which one that is; without gradient."""
        bins, count, device = self.lmi.bins, self.grid.candidates.shape[-1], self.h1.device
        score, winner = torch.zeros_like(self.h1), torch.full_like(self.at1, count // 2)
        budget, left = JOINT[device.type], [self.structured()]
        if device.type == "cpu" and not self.lmi.compiled:
            (start1, sizes1), (start2, sizes2) = (window(*r, bins, self.lmi.width) for r in (self.range1, self.range2))
            floor1, floor2 = (k.clamp(min=TINY) for k in (self.k1, self.k2))
            entropies = Economical(self.h1, max(budget, bins**2 * count))
            for group, size1, size2 in by_size(left.pop(), sizes1, sizes2):
                for p in group.split(max(1, budget // (size1 * size2 * count))):
                    near1, near2 = self.places(p)
                    total, mass = self.masses(near1, near2)
                    enough = mass.amin(1) > ENOUGH
                    if not enough.all():
                        left.append(p[~enough])
                        p, near1, near2, total, mass = (x[enough] for x in (p, near1, near2, total, mass))
                    k1, k2 = pick(floor1, near1, start1[p], size1), pick(floor2, near2, start2[p], size2)
                    score[p], winner[p] = self.information(*entropies(k1, k2, total, mass), p).max(1)
        for p in torch.cat([winner[:0], *left]).split(max(1, budget // (bins**2 * count))):
            near1, near2 = self.places(p)
            k1, k2 = pick(self.k1, near1), pick(self.k2, near2)
            score[p], winner[p] = self.information(*self.exact_entropies(k1, k2, *self.masses(near1, near2)), p).max(1)
        return score, winner

    def score_of(self, winner: Tensor) -> Tensor:
        """Information (pixel,) with the candidates `winner`, with gradients, which are made chunk by chunk."""

        def score(p: Tensor) -> Tensor:
            near1, near2 = self.places(p)
            near2 = near2.gather(2, winner[p, None, None].expand(-1, near2.shape[1], 1))
            k1, k2 = (pick(k, near) for k, near in ((self.k1, near1), (self.k2, near2)))
            h2, h12 = self.exact_entropies(k1, k2, *self.masses(near1, near2))
            return self.information(h2, h12, p)[:, 0]

        pixels = self.structured()
        chunks = pixels.split(max(1, JOINT[pixels.device.type] // self.lmi.bins**2))
        scores = [self.h1[:0], *(checkpoint(score, p, use_reentrant=False) for p in chunks)]
        return torch.zeros_like(self.h1).index_copy(0, pixels, torch.cat(scores))

    def structured(self) -> Tensor:
        """The pixels where the map may be other than 0.

        A flat source patch knows nothing: the joint histogram is the product of the marginals. Only where
        there is hardly any mass the published EPS say something else.
        """
        flat = self.flat.nonzero().flatten()
        few = JOINT[flat.device.type] // self.grid.candidates[0].numel()
        odd = [p[self.masses(*self.places(p))[1].amin(1) < ENOUGH] for p in flat.split(max(1, few))]
        return torch.cat([(~self.flat).nonzero().flatten(), *odd])

    def places(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """The places of the samples of pixels p, (pixel, sample) and (pixel, sample, candidate)."""
        return self.at1[p, None] + self.grid.patch, self.at2[p, None, None] + self.grid.candidates[self.border[p]]

    def masses(self, near1: Tensor, near2: Tensor) -> tuple[Tensor, Tensor]:
        """Sums (pixel, candidate) of the histograms of the candidates, and of the joint ones."""
        mass1, mass2 = (pick(m, near)[..., 0] for m, near in ((self.mass1, near1), (self.mass2, near2)))
        return mass2.sum(1), (mass1[..., None] * mass2).sum(1)

    def exact_entropies(self, k1: Tensor, k2: Tensor, total: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Entropies (pixel, candidate) in bits, of the candidates and joint with the source, as published."""
        h2 = entropy(k2.sum(1) / (total + k2.shape[1] * EPS)[..., None])
        k2 = k2 / (mass + EPS)[:, None, :, None]  # what the joint histogram will sum to
        if self.lmi.compiled:
            return h2, fused_joint_entropy()(k1, k2)
        p = torch.bmm(k1.mT, k2.flatten(2))  # (pixel, bin, candidate * bin): one product for all candidates
        return h2, -p_log_p(p).sum(1).unflatten(-1, k2.shape[2:]).sum(-1) / math.log(2)

    def information(self, h2: Tensor, h12: Tensor, p: Tensor) -> Tensor:
        h1 = self.h1[p, None]
        return normalised(h1 + h2 - h12, h1, h2) if self.lmi.normalise else h1 + h2 - h12


class Economical:
    """The same entropies from kernels that are nowhere 0, with few passes over memory that is used again.

    Of counts c with sum S: H = log S - sum(c log c) / S. Without the EPS, for histograms with enough mass.
    """

    def __init__(self, like: Tensor, size: int):
        self.memory = like.new_empty(2, size)

    def __call__(self, k1: Tensor, k2: Tensor, total: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        size, shape = (len(k1), k1.shape[2], math.prod(k2.shape[2:])), k2.shape[2:]
        counts, work = (x[: math.prod(size)].view(size) for x in self.memory)
        torch.bmm(k1.mT, k2.flatten(2), out=counts)
        logs = c_log_c(counts, work).sum(1).unflatten(-1, shape).sum(-1)
        h12 = mass.log() - logs / mass
        counts = k2.sum(1)
        h2 = total.log() - c_log_c(counts, torch.empty_like(counts)).sum(-1) / total
        return h2 / math.log(2), h12 / math.log(2)


def c_log_c(c: Tensor, out: Tensor) -> Tensor:
    """c ln c of positive numbers."""
    np.log(c.numpy(), out=out.numpy())
    return out.mul_(c)


def unrolled_joint_entropy(k1: Tensor, k2: Tensor) -> Tensor:
    """The joint entropy as a pointwise expression, which a compiler keeps in registers on its way into the sum."""
    p = reduce(add, (k1[:, n, None, :, None] * k2[:, n, :, None, :] for n in range(k1.shape[1])))
    return -(p * torch.log2(p + EPS)).sum((-2, -1))


@lru_cache
def fused_joint_entropy() -> Callable:
    return torch.compile(unrolled_joint_entropy)
