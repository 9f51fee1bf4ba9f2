"""Denoisers that are told of another image by local mutual information.

[wang2024].

A diffusion model learns images of one contrast, the target, given what a source of unknown contrast shares with them:

    cross    the local mutual information of the source with the noisy image, at one or more patch sizes
    self     that of the source with itself: where it has structure at all
    source   the source itself, an extension by us: in training the target under a random map of intensities

`conditions` makes the network's input from a source, in training and in sampling alike:

    side = prepare_source(source, conditioning)           # once a source
    D_s = Informed(D, side, conditioning)                 # a denoiser like any other, for every sampler and guidance
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from companion.data.shading import equalised
from companion.diffusion.denoisers import Denoiser
from companion.information.box_mi import BoxMI
from companion.information.local_mi import LocalMI
from companion.information.pairs import grey

MAPS = ("cross", "self", "source")


@dataclass(frozen=True)
class Conditioning:
    """What the network is told of a source. Part of a checkpoint: config["data"]["conditioning"].

    maps     which of cross, self and source there are, in the order of the channels
    patches  odd sides of the patches of cross and self, a channel each
    bins     of the histograms; none: the map's own number
    mode     centre: patches at the pixel itself (fast, smooth); shifts: the best of true shifts; published: the best of
             the released candidates, on integer grey levels that are not clamped
    normalise  mutual information over the mean entropy, rather than bits
    scaled   the noisy image x enters as x / sqrt(1 + sigma^2), which for the published process is its x_t
    equalised  sources are seen as `equalised` makes them, in all maps
    """

    maps: tuple[str, ...] = MAPS
    patches: tuple[int, ...] = (3, 7)
    bins: int | None = 10
    mode: str = "centre"
    normalise: bool = True
    scaled: bool = True
    equalised: bool = False

    def __post_init__(self):
        object.__setattr__(self, "maps", tuple(self.maps))
        object.__setattr__(self, "patches", tuple(self.patches))
        if not self.maps or len(set(self.maps)) < len(self.maps) or set(self.maps) - set(MAPS):
            raise ValueError(f"maps is {self.maps}; expected some of {', '.join(MAPS)}, each once")
        if self.mode == "centre" and not self.normalise:
            raise ValueError("mode centre is always normalised; choose shifts or published for bits")
        _ = self.comparisons  # its errors

    @classmethod
    def published(cls) -> Conditioning:
        """As released for training: one malformed, unclamped, normalised map of 3 x 3 patches, cross and self."""
        return cls(("cross", "self"), (3,), None, "published")

    def mismatched(self) -> Conditioning:
        """What the released code samples with in four of its five configurations, having trained with `published`."""
        return replace(self, normalise=False)

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of channels of each of the maps."""
        return tuple(1 if name == "source" else len(self.patches) for name in self.maps)

    @property
    def channels(self) -> int:
        return sum(self.widths)

    @cached_property
    def comparisons(self) -> Sequence[BoxMI | LocalMI]:
        """What makes the channels of cross and self."""
        given: dict[str, Any] = {} if self.bins is None else {"bins": self.bins}
        if self.mode == "centre":
            return [BoxMI(self.patches, LocalMI(**given).bins)]
        return [LocalMI(patch=p, mode=self.mode, normalise=self.normalise, **given) for p in self.patches]


@dataclass(frozen=True, eq=False)
class SourceSide:
    """A source made ready: image (batch, 1, y, x), and what of the conditions does not change with the noisy image."""

    image: Tensor
    conditioning: Conditioning

    @cached_property
    def ready(self) -> list:
        options = {} if self.conditioning.mode == "centre" else {"allow_constant": True}
        return [compare.prepare(self.image, **options) for compare in self.conditioning.comparisons]

    @cached_property
    def self_map(self) -> Tensor:
        """(batch, patch, y, x), worked out once."""
        return self.cross(self.image)

    def cross(self, x: Tensor) -> Tensor:
        """The information (batch, patch, y, x) that images x share with the source; one source serves all of them."""
        compared = zip(self.conditioning.comparisons, self.ready, strict=True)
        return torch.cat(
            [
                compare(source, source if x is self.image and self.conditioning.mode == "centre" else x)
                for compare, source in compared
            ],
            1,
        )

    def rows(self, at: Tensor) -> SourceSide:
        """The sources `at`; the only one, if it serves all images."""
        return self if len(self.image) == 1 or len(at) == len(self.image) else replace(self, image=self.image[at])


def prepare_source(source: Tensor, conditioning: Conditioning, allow_constant: bool = False) -> SourceSide:
    """The source side of the conditions, once per image, of a source (batch, 1 or 3, y, x) in [0, 1]; colours as luma.

    Raises TypeError or ValueError for NaN, other shapes, values beyond [0, 1], and constant images, which have nothing
    to translate, unless `allow_constant`.
    """
    image = grey(source)
    LocalMI()._check(image, "source")
    low, high = image.flatten(1).amin(1), image.flatten(1).amax(1)
    if low.min() < -1e-3 or high.max() > 1 + 1e-3:
        raise ValueError(
            f"the source has values from {low.min():.3g} to {high.max():.3g}; expected 0 to 1, such as "
            "intensity.scaled gives"
        )
    if not allow_constant and (flat := (low == high).nonzero().flatten().tolist()):
        raise ValueError(
            f"source {flat[0]} of the batch is constant ({low[flat[0]]:g}): it has no structure to "
            "translate; leave empty slices out, or allow_constant=True to draw from the prior"
        )
    return SourceSide(equalised(image) if conditioning.equalised else image, conditioning)


def conditions(
    x: Tensor,
    sigma: Tensor | float,
    source: Tensor | SourceSide | None,
    conditioning: Conditioning,
    keep: Sequence[str] | Tensor | None = None,
) -> Tensor:
    """What the network is told, (batch, conditioning.channels, y, x), of noisy images x (batch, 1 or 3, y, x).

    The one such function: the training loss and every sampler call it.
    sigma   noise level (batch,) or a number, of x = x0 + sigma n
    source  images in [0, 1], one or one for each x, or made ready by `prepare_source`; none: nothing is known
    keep    names of the maps that are told, or which of them for each image, (batch, map) bool; by default all. Maps
            that are not told are 0, as in a part of the training: one network serves every ablation.
    Raises ValueError for sources of other sizes or numbers, or prepared for another conditioning, and unknown maps.
    """
    c = conditioning
    keep = _kept(keep, c.maps, x)
    if source is None:
        return x.new_zeros(len(x), c.channels, *x.shape[2:])
    side = source if isinstance(source, SourceSide) else prepare_source(source, c, allow_constant=True)
    if side.conditioning != c:
        raise ValueError(f"the source was prepared for {side.conditioning}, not for {c}; prepare it again")
    if side.image.shape[2:] != x.shape[2:] or len(side.image) not in (1, len(x)):
        raise ValueError(
            f"sources {tuple(side.image.shape)} for images {tuple(x.shape)}: expected the same size, and "
            "one source or one for each image; resample one to the other"
        )
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
    noisy = (grey(x) * (1 + sigma**2).rsqrt() if c.scaled else grey(x)).to(side.image.dtype)
    parts = []
    for name, width, told in zip(c.maps, c.widths, keep.T, strict=True):
        at = told.nonzero().flatten()
        found = x.new_zeros(len(x), width, *x.shape[2:])
        if len(at):
            here = side.rows(at)
            value = {
                "cross": lambda h, at: h.cross(noisy[at]),
                "self": lambda h, _: h.self_map,
                "source": lambda h, _: h.image,
            }[name](here, at)
            found = found.index_copy(0, at, value.expand(len(at), -1, -1, -1).to(x.dtype))
        parts.append(found)
    return torch.cat(parts, 1)


def _kept(keep: Sequence[str] | Tensor | None, maps: tuple[str, ...], x: Tensor) -> Tensor:
    if isinstance(keep, Tensor):
        if keep.shape != (len(x), len(maps)):
            raise ValueError(f"keep has shape {tuple(keep.shape)}; expected {(len(x), len(maps))}, (image, map)")
        return keep.to(x.device, torch.bool)
    names = maps if keep is None else tuple(keep)
    if unknown := set(names) - set(maps):
        raise ValueError(f"no map {', '.join(sorted(unknown))} here; the network was told {', '.join(maps)}")
    return torch.tensor([name in names for name in maps], device=x.device).expand(len(x), -1)


class Informed:
    """A denoiser that has seen the source: the same protocol as D, for every sampler and guidance.

    D: a denoiser of this paper. source, keep: as for `conditions`. guidance w: D told + (w - 1) (D told - D untold).
    """

    def __init__(
        self,
        D: Denoiser,
        source: Tensor | SourceSide | None,
        conditioning: Conditioning,
        keep: Sequence[str] | None = None,
        guidance: float = 1.0,
    ):
        self.D, self.conditioning, self.keep, self.guidance = D, conditioning, keep, guidance
        self.source = prepare_source(source, conditioning) if isinstance(source, Tensor) else source

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        told = self.D(x, sigma, conditions(x, sigma, self.source, self.conditioning, self.keep))
        if self.guidance == 1:
            return told
        return told + (self.guidance - 1) * (told - self.D(x, sigma, conditions(x, sigma, None, self.conditioning)))


def told(batch: int, maps: int, dropout: float, generator: Generator) -> Tensor:
    """Which maps each image is told of, (batch, map) bool: all, or with probability `dropout` any smaller set."""
    options = {"generator": generator, "device": generator.device}
    subset = torch.randint(2**maps - 1, (batch,), **options)  # of all sets but the whole one
    some = (subset[:, None] >> torch.arange(maps, device=generator.device)) % 2 == 1
    return some | (torch.rand(batch, 1, **options) >= dropout)
