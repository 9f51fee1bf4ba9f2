"""Zero-shot translation between contrasts by local mutual information (Wang et al. 2024, doi 10.1109/TMI.2024.3382043).

A diffusion model learns images of one contrast, the target, given what a source of unknown contrast shares with them:

    cross    the local mutual information of the source with the noisy image, at one or more patch sizes
    self     that of the source with itself: where it has structure at all
    source   the source itself, an extension by us: in training the target under a random map of intensities

Training never sees another contrast. Its source is the clean target, as published, or that target under a random map
(`remapped`), and is seen as ranks of its tissue (`equalised`), however faint its contrast. `conditions` makes the
network's input from a source, in training and in sampling alike.
Data, training and export of the notebooks under notebooks/lmi; translation is in `lmi_translate`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import isotonic_regression
from torch import Generator, Tensor
from tqdm.auto import tqdm

from companion import metrics
from companion.data import anatomy, paired
from companion.data.store import Prepared, open_dataset, write_dataset
from companion.diffusion.denoisers import Denoiser, EDMDenoiser
from companion.diffusion.losses import discrete_loss, edm_loss
from companion.diffusion.noise import randn
from companion.networks.box_mi import BoxMI
from companion.networks.local_mi import LocalMI, luma
from companion.parameters import Parameters, param, read_yaml
from companion.runs import code_version, project_root
from companion.training import TrainConfig, TrainResult, train
from companion.weights import build, describe, load, save_checkpoint

CONTRASTS = ("T1w", "T2w", "PDw")
MAPS = ("cross", "self", "source")
AIR = 0.02  # values up to this are air
FAINT = 0.05  # in sources, which may be noisy, up to this
DARKEST = 0.1  # tissue, in equalised sources
COND_SCALE = 2.0  # brings conditions to the size of images in the network

# -------------------------------------------------------------------------------------------------- the conditions


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

    @classmethod
    def of(cls, weights: str | Path) -> Conditioning:
        """The conditioning that a checkpoint was trained with. ValueError if it is not one of this paper's."""
        found = describe(weights).get("data", {}).get("conditioning")
        if found is None:
            raise ValueError(f"{weights} says nothing of conditions on a source; choose one such as lmi/t2w")
        return cls(**found)

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of channels of each of the maps."""
        return tuple(1 if name == "source" else len(self.patches) for name in self.maps)

    @property
    def channels(self) -> int:
        return sum(self.widths)

    @cached_property
    def comparisons(self) -> list[BoxMI | LocalMI]:
        """What makes the channels of cross and self."""
        if self.mode == "centre":
            return [BoxMI(self.patches, LocalMI(bins=self.bins).bins)]
        return [LocalMI(patch=p, bins=self.bins, mode=self.mode, normalise=self.normalise) for p in self.patches]


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
        return torch.cat([compare(source, source if x is self.image and self.conditioning.mode == "centre" else x)
                          for compare, source in compared], 1)

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
        raise ValueError(f"the source has values from {low.min():.3g} to {high.max():.3g}; expected 0 to 1, such as "
                         "paired.scaled gives")
    if not allow_constant and (flat := (low == high).nonzero().flatten().tolist()):
        raise ValueError(f"source {flat[0]} of the batch is constant ({low[flat[0]]:g}): it has no structure to "
                         "translate; leave empty slices out, or allow_constant=True to draw from the prior")
    return SourceSide(equalised(image) if conditioning.equalised else image, conditioning)


def equalised(image: Tensor) -> Tensor:
    """Images (batch, 1, y, x) as ranks of their tissue, freed from slow shading: 0 in air, DARKEST to 1 in tissue.

    Does not change with the gain, nor, but for the shading, with any rising map of grey levels: as little as mutual
    information does. So the bins of the histograms hold equal shares of the tissue, however faint the contrast.
    """
    tissue = (image > FAINT).flatten(1)
    values = (image / local_mean(image)).flatten(1).masked_fill(~tissue, -1)
    ordered = values.sort(1).values
    below, upto = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    count = tissue.sum(1, keepdim=True)
    rank = ((below + upto) / 2 - (values.shape[1] - count)) / count.clamp(min=1)
    return torch.where(tissue, DARKEST + (1 - DARKEST) * rank, 0).view_as(image).to(image)


def conditions(x: Tensor, sigma: Tensor, source: Tensor | SourceSide | None, conditioning: Conditioning,
               keep: Sequence[str] | Tensor | None = None) -> Tensor:
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
        raise ValueError(f"sources {tuple(side.image.shape)} for images {tuple(x.shape)}: expected the same size, and "
                         "one source or one for each image; resample one to the other")
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)
    noisy = (grey(x) * (1 + sigma**2).rsqrt() if c.scaled else grey(x)).to(side.image.dtype)
    parts = []
    for name, width, told in zip(c.maps, c.widths, keep.T, strict=True):
        at = told.nonzero().flatten()
        found = x.new_zeros(len(x), width, *x.shape[2:])
        if len(at):
            here = side.rows(at)
            value = {"cross": lambda h, at: h.cross(noisy[at]), "self": lambda h, _: h.self_map,
                     "source": lambda h, _: h.image}[name](here, at)
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


def grey(image: Tensor) -> Tensor:
    """Images (batch, 1, *space), of colours (batch, 3, *space) their luma."""
    return luma(image) if image.ndim > 2 and image.shape[1] == 3 else image


class Informed:
    """A denoiser that has seen the source: the same protocol as D, for every sampler and guidance.

    D: a denoiser of this paper. source, keep: as for `conditions`. guidance w: D told + (w - 1) (D told - D untold).
    """

    def __init__(self, D: Denoiser, source: Tensor | SourceSide | None, conditioning: Conditioning,
                 keep: Sequence[str] | None = None, guidance: float = 1.0):
        ready = source is None or isinstance(source, SourceSide)
        self.D, self.conditioning, self.keep, self.guidance = D, conditioning, keep, guidance
        self.source = source if ready else prepare_source(source, conditioning)

    def __call__(self, x: Tensor, sigma: Tensor, cond: None = None) -> Tensor:
        told = self.D(x, sigma, conditions(x, sigma, self.source, self.conditioning, self.keep))
        if self.guidance == 1:
            return told
        return told + (self.guidance - 1) * (told - self.D(x, sigma, conditions(x, sigma, None, self.conditioning)))


# ------------------------------------------------------------------------------------------------- remapped sources

KNOTS = (4, 7)  # fewest and most knots of a map of intensities
WINDOW = 3  # side of the neighbourhood in which partial volumes are mixed linearly


def remapped(x0: Tensor, generator: Generator, share: float = 1.0) -> Tensor:
    """Sources (batch, 1, y, x) in [0, 1] with the anatomy of x0 in contrasts that nobody has seen.

    A random map of intensities, continuous and seldom monotone, with 4 to 7 knots: air, the brightest value, and in
    between the means of clusters of values, so that every tissue may take any height, or else random levels. Its air
    stays dark nine times of ten, and the contrast among tissues is often low. More than half the images are first freed
    from a part of their own shading. Then a new shading, and in a part of the images blur and noise. share: of the
    images that are remapped; the others stay. All draws come from `generator`; no other contrast is known here.
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
    y = _transfer(x, at, heights, mixed=rand(*one) < 0.7)
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


def local_mean(x: Tensor) -> Tensor:
    """The mean of the tissue around each pixel (Gaussian, std a tenth of the image), its brightest made 1; 1 in air."""
    tissue = (x > AIR).to(x)
    std = x.shape[-1] / 10
    at = torch.arange(-round(2.5 * std), round(2.5 * std) + 1, device=x.device)
    weight = torch.exp(-0.5 * (at / std) ** 2).to(x)

    def blurred(v: Tensor) -> Tensor:
        rows = F.conv2d(v, weight.view(1, 1, 1, -1), padding=(0, len(weight) // 2))
        return F.conv2d(rows, weight.view(1, 1, -1, 1), padding=(len(weight) // 2, 0))

    mean = torch.where(tissue > 0, blurred(x * tissue) / blurred(tissue).clamp(min=1e-6), 0)
    top = mean.amax((1, 2, 3), keepdim=True).clamp(min=AIR)
    return torch.where(tissue > 0, (mean / top).clamp(min=0.1), 1)


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


# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class PrepareData(Parameters):
    """Parameters of lmi/1_data.ipynb."""

    source: str = param("brain", "brain: the embedded cohort; else a folder of NIfTI volumes, or one with a sub-folder "
                                 "of slice images for each contrast")
    data: str = param("data/lmi_brain_64.h5", "where the prepared slices go; kept when it is there already")
    contrasts: tuple[str, ...] = param(CONTRASTS, "of the embedded cohort; of NIfTI: names in the layout; of slice "
                                                  "images: the sub-folders")
    image_size: int = param(64, "pixels along y and x", minimum=16)
    slices_per_subject: int = param(12, "axial slices of each subject; of slice images there is no such number",
                                    minimum=1)
    subjects: int = param(1000, "virtual people to train on, or at most so many of a folder", minimum=1)
    validation_subjects: int = param(16, "virtual people to validate on", minimum=1)
    test_subjects: int = param(32, "virtual people to test on", minimum=1)
    layout: str | None = param(None, "of NIfTI files: how they are named; none: slice images",
                               choices=(None, *paired.LAYOUTS))
    plane: str = param("axial", "of NIfTI volumes: orientation of the slices", choices=tuple(paired.PLANES))
    reference: str | None = param(None, "contrast whose grid the others are resampled to; none: grids must agree")
    channels: int = param(1, "of slice images: 1 grey, 3 colours", choices=(1, 3))
    validation_share: float = param(0.1, "of a folder: share of the subjects to validate on", minimum=0, maximum=1)
    test_share: float = param(0.1, "of a folder: share of the subjects kept for tests", minimum=0, maximum=1)


SCALE = ("percentiles 0.5 of all values and 99.5 of the foreground of a subject's slices are 0 and 1 "
         "(data.paired.percentile_scale); clipped")


def prepare(p: PrepareData, progress: bool = True) -> Prepared:
    """The prepared slices, an array (subject, slice, channel, y, x) for each contrast, made and stored once as HDF5.

    The embedded cohort also has "labels" (`anatomy.LABELS`). Raises FileNotFoundError or ValueError as `paired` does
    for what cannot be prepared, and ValueError when `p.data` holds something else than the parameters ask for.
    """
    path = project_root() / p.data
    names = [f for f in asdict(p) if f not in ("device", "out", "data")]
    wanted = {name: list(v) if isinstance(v := getattr(p, name), tuple) else v for name in names}
    if not path.exists():
        make = prepare_cohort if p.source == "brain" else prepare_images if p.layout is None else prepare_volumes
        arrays, about = make(p, progress)
        write_dataset(path, arrays, units={name: "1" for name in arrays}, seed=p.seed, **about["store"],
                      scale={name: "label values" if name == "labels" else about["scale"] for name in arrays},
                      attrs=about["attrs"] | {"parameters": wanted})
    prepared = open_dataset(path)
    made = prepared.attrs.get("parameters")
    if made != wanted:
        other = "something else" if made is None else ", ".join(
            f"{k} = {made.get(k)} (now {v})" for k, v in wanted.items() if made.get(k) != v)
        raise ValueError(f"{path} was prepared from {other}; delete the file, or give another data file")
    return prepared


def cohort_slices(split: str, subjects: int, per_subject: int, contrasts: Sequence[str] = CONTRASTS,
                  image_size: int = 64, progress: bool = False) -> dict[str, Tensor]:
    """Slices (subject, slice, 1, y, x) of the embedded cohort: each contrast in [0, 1], and "labels", uint8.

    Anatomy, shading and heights are the same in all contrasts; the scale is `SCALE` of each subject and contrast.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in (*contrasts, "labels")}
    for subject in tqdm(anatomy.cohort(split, subjects), desc=f"{split} subjects", disable=not progress):
        heights = anatomy.slice_heights(subject, per_subject)
        for contrast, image in magnitudes(subject, contrasts, heights, image_size).items():
            if contrast != "labels":
                image = torch.from_numpy(paired.scaled(image.numpy(), name=contrast)[0])
            found[contrast].append(image[:, None])
    return {name: torch.stack(stacks) for name, stacks in found.items()}


def magnitudes(subject: anatomy.Subject, contrasts: Sequence[str], heights: Tensor,
               image_size: int) -> dict[str, Tensor]:
    """|anatomy.render| (slice, y, x) of several contrasts at once, and "labels": the tissue is worked out once."""
    shape = (len(heights), image_size, image_size)
    voxel_mm = anatomy.FIELD_OF_VIEW_MM / image_size
    points = anatomy.grid_mm(shape, voxel_mm, heights)
    maps = anatomy.tissue_maps(subject, points, voxel_mm)
    shading = (0.08 * anatomy.smooth_field(points, subject.generator("bias"))).exp()
    images = {c: (anatomy.image_from_tissue(subject, maps, c) * shading).abs() for c in contrasts}
    return images | {"labels": anatomy.labels_from_tissue(maps)}


def prepare_cohort(p: PrepareData, progress: bool = True) -> tuple[dict, dict]:
    """Arrays of all splits of the embedded cohort, and what is to be said of them."""
    counts = {"train": p.subjects, "validation": p.validation_subjects, "test": p.test_subjects}
    parts = {split: cohort_slices(split, n, p.slices_per_subject, p.contrasts, p.image_size, progress)
             for split, n in counts.items()}
    arrays = {name: torch.cat([part[name] for part in parts.values()]).numpy() for name in (*p.contrasts, "labels")}
    split = {name: [f"{name} {i}" for i in range(n)] for name, n in counts.items()}
    store = {"source": "virtual cohort of companion.data.anatomy (ICBM 152), axial slices",
             "subjects": [s for members in split.values() for s in members], "split": split}
    return arrays, {"scale": SCALE, "store": store, "attrs": {}}


def prepare_images(p: PrepareData, progress: bool = True) -> tuple[dict, dict]:
    """Arrays (image, 1, channel, y, x) of paired slice images, split by subject; see `paired.SlicePairs`."""
    folder = project_root() / p.source
    pairs = paired.SlicePairs({c: folder / c for c in p.contrasts}, channels=p.channels, size=(p.image_size,) * 2)
    if bad := pairs.misaligned():
        told = "; ".join(f"{name} {fit}" for name, fit in list(bad.items())[:4])
        raise ValueError(f"{len(bad)} of {len(pairs)} pairs do not fit each other: {told}; register them")
    images = zip(*tqdm(pairs, desc="images", total=len(pairs), disable=not progress), strict=True)
    arrays = {c: torch.stack(stack)[:, None].numpy() for c, stack in zip(p.contrasts, images, strict=True)}
    members = paired.split_subjects(pairs.subjects, _fractions(p), p.seed)
    split = {part: [n for n, s in zip(pairs.names, pairs.subjects, strict=True) if s in set(people)]
             for part, people in members.items()}
    store = {"source": f"images of {Path(p.source).name}", "subjects": pairs.names, "split": split}
    return arrays, {"scale": "as in the files, 0 and 1 the ends of their range", "store": store, "attrs": {}}


def prepare_volumes(p: PrepareData, progress: bool = True) -> tuple[dict, dict]:
    """Arrays of NIfTI volumes cut into slices, by `paired.prepare` into a file that is read back; its attributes."""
    path = (project_root() / p.data).with_suffix(".cut.h5")
    folder = project_root() / p.source
    cohort = paired.find_subjects(folder, {c: paired.LAYOUTS[p.layout][c] for c in p.contrasts}, complete_only=True)
    cohort = paired.Cohort(dict(list(cohort.files.items())[: p.subjects]), cohort.left_out)
    try:
        cut = paired.prepare(path, cohort, contrasts=p.contrasts, per_subject=p.slices_per_subject, plane=p.plane,
                             size=(p.image_size,) * 2, reference=p.reference, source=f"NIfTI files, {p.layout}",
                             split=paired.split_subjects(cohort.files, _fractions(p), p.seed),
                             scales={"CT": paired.ct_window()} if "CT" in p.contrasts else None)
        arrays = {name: cut.read(name) for name in cut.shapes}
    finally:
        path.unlink(missing_ok=True)
    store = {"source": cut.source, "subjects": list(cut.subjects), "split": dict(cut.split)}
    return arrays, {"scale": SCALE, "store": store, "attrs": dict(cut.attrs)}


def _fractions(p: PrepareData) -> tuple[float, float, float]:
    return (1 - p.validation_share - p.test_share, p.validation_share, p.test_share)


def some_slices(prepared: Prepared, count: int, split: str = "validation") -> dict[str, Tensor]:
    """Up to `count` slices (slice, channel, y, x) of each contrast, evenly spread over the subjects of a split.

    A file without subjects in that split gives an empty dict.
    """
    if not prepared.rows(split):
        return {}
    stacks = {name: torch.from_numpy(prepared.read(name, split)).flatten(0, 1) for name in prepared.shapes}
    total = len(next(iter(stacks.values())))
    at = torch.linspace(0, total - 1, min(count, total)).round().long()
    return {name: x[at] for name, x in stacks.items()}


def intensity_rules(stacks: dict[str, Tensor], bins: int = 128) -> list[dict]:
    """How well any rule of intensities alone could translate: PSNR (mean, standard error over slices), every direction.

    stacks: paired slices (slice, 1, y, x) in [0, 1] of each contrast. "as it is": no translation. "best rising map":
    the rising map with the smallest squared error on these very slices, more than histogram matching can reach. "best
    map": the mean target value of each source value. The maps are fitted to the truth: limits, not methods.
    """
    table = []
    for a, b in itertools.permutations([name for name in stacks if name != "labels"], 2):
        x, y = grey(stacks[a]), grey(stacks[b])
        index = (x * (bins - 1)).round().long().flatten().numpy()
        counts = np.bincount(index, minlength=bins)
        mean = np.bincount(index, weights=y.flatten().double().numpy(), minlength=bins) / counts.clip(1)
        rising = isotonic_regression(mean, weights=counts + 1e-9).x
        row = {"from": a, "to": b, "as it is": metrics.mean_and_error(metrics.psnr(x, y, data_range=1.0))}
        for name, rule in (("best rising map", rising), ("best map", mean)):
            found = torch.from_numpy(rule[index]).to(x.dtype).view_as(x)
            row[name] = metrics.mean_and_error(metrics.psnr(found, y, data_range=1.0))
        table.append(row)
    return table


def invariance(stacks: dict[str, Tensor], target: str, conditioning: Conditioning, sigma: float, seed: int = 0) -> list:
    """How much of each map survives another contrast: its correlation with that of the target, inside the head.

    Mean and standard error over slices, for every other contrast as the source; the noisy image is the target's.
    """
    x0 = grey(stacks[target])
    x = x0 + sigma * randn(x0.shape, x0.dtype, torch.Generator().manual_seed(seed))
    head, ours = (x0 > AIR)[:, 0], conditions(x, sigma, x0, conditioning)
    names = [f"{name} {patch}" for name in conditioning.maps if name != "source" for patch in conditioning.patches]
    table = []
    for other in (name for name in stacks if name not in (target, "labels")):
        theirs, row = conditions(x, sigma, grey(stacks[other]), conditioning), {"source": other}
        for i, name in enumerate(names + ["source"] * ("source" in conditioning.maps)):
            values = [torch.corrcoef(torch.stack([a[i][m], b[i][m]]))[0, 1] for a, b, m in
                      zip(ours, theirs, head, strict=True) if m.sum() > 10]
            row[name] = metrics.mean_and_error(torch.stack(values))
        table.append(row)
    return table


# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class TrainTranslator(Parameters):
    """Parameters of lmi/2_train.ipynb."""

    data: str = param("data/lmi_brain_64.h5", "prepared slices, made by 1_data")
    target: str = param("T2w", "the contrast to learn; no other is read")
    maps: tuple[str, ...] = param(MAPS, "what the network is told: some of cross, self, source", choices=MAPS)
    patches: tuple[int, ...] = param((3, 7), "odd sides of the patches of cross and self", minimum=3)
    bins: int | None = param(10, "of the histograms; none: the map's own number", minimum=2)
    mode: str = param("centre", "of the maps: centre, shifts, or published", choices=("centre", "shifts", "published"))
    equalised: bool = param(True, "sources are seen as ranks of their tissue, freed from shading")
    remapped_share: float = param(0.85, "share of the sources that are remapped; the others are the target itself",
                                  minimum=0, maximum=1)
    dropout: float = param(0.5, "share of the images that are told only some of the maps, or none", minimum=0,
                           maximum=1)
    diffusion: str = param("edm", "edm: Karras et al. 2022; ddpm: 1000 steps, epsilon, as published",
                           choices=("edm", "ddpm"))
    look_ahead: bool = param(False, "of ddpm: the cross map is that of the next, noisier step, as published")
    network: str = param("UNet", "UNet: guided-diffusion; DDIMUNet: the one that the published recipe trains",
                         choices=("UNet", "DDIMUNet"))
    model_channels: int = param(32, "width of the network", minimum=32)
    channel_mult: tuple[float, ...] = param((1, 2, 4), "relative width of each level, finest first")
    num_res_blocks: int = param(1, "residual blocks a level", minimum=1)
    attention_resolutions: tuple[int, ...] = param((), "strides at which the network attends, besides the bottom")
    dropout_rate: float = param(0.0, "dropout inside the network", minimum=0, maximum=0.9)
    patch: int = param(2, "side of the pixel-unshuffle stem", minimum=1)
    sigma_data: float | None = param(None, "root mean square of the images (edm); none: measured", minimum=1e-3)
    P_mean: float = param(-0.6, "mean of ln sigma in training (edm)")
    P_std: float = param(1.4, "standard deviation of ln sigma in training (edm)", minimum=0)
    mirror: bool = param(True, "mirror images left to right at random")
    start_from: str | None = param(None, "checkpoint whose weights to begin with; none: random weights")
    steps: int = param(3600, "optimiser steps", minimum=1)
    batch_size: int = param(16, "images a step", minimum=1)
    grad_accumulation: int = param(1, "pieces a batch is cut into; processes share them", minimum=1)
    learning_rate: float = param(8e-4, "highest learning rate", minimum=0)
    schedule: str = param("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    warmup: int = param(100, "steps of linear warm-up", minimum=0)
    ema_decay: float = param(0.995, "decay of the averaged weights", minimum=0, maximum=1)
    autocast: str | None = param("bfloat16", "number format inside the network", choices=("bfloat16", None))
    seconds: float | None = param(None, "stop with a checkpoint after this long", minimum=1)
    checkpoint_every: int = param(100, "steps between checkpoints", minimum=1)

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(self.maps, self.patches, self.bins, self.mode, equalised=self.equalised)


def training_slices(p: TrainTranslator):
    """The training set: slices (channel, y, x) of the target's training subjects. No other contrast is opened."""
    return open_dataset(project_root() / p.data, require=[p.target]).slices(p.target, "train")


def translator_config(p: TrainTranslator) -> dict:
    """What `weights.build` makes the denoiser from."""
    prepared = open_dataset(project_root() / p.data, require=[p.target])
    shape = prepared.shapes[p.target]
    images, channels = training_slices(p), shape[2]
    sigma_data = p.sigma_data
    if sigma_data is None:
        shown = range(0, len(images), max(1, len(images) // 200))
        sigma_data = round(sum(images[i].square().mean().item() for i in shown) ** 0.5 / len(shown) ** 0.5, 3)
    network = {"name": p.network, "in_channels": channels + p.conditioning.channels, "out_channels": channels,
               "model_channels": p.model_channels, "num_res_blocks": p.num_res_blocks,
               "channel_mult": list(p.channel_mult), "attention_resolutions": list(p.attention_resolutions),
               "dropout": p.dropout_rate, "num_heads": 1 if p.network == "DDIMUNet" else 4,
               "use_scale_shift_norm": p.network == "UNet", "patch": p.patch}
    denoiser = {"name": "DiscreteDenoiser", "schedule": {"name": "linear", "steps": 1000}, "prediction": "epsilon"}
    if p.diffusion == "edm":
        denoiser = {"name": "EDMDenoiser", "sigma_data": sigma_data, "cond_scale": COND_SCALE}
    return {"network": network, "denoiser": denoiser, "data": {
        "source": f"{prepared.source}, {p.target} only", "scale": prepared.scale[p.target], "contrast": p.target,
        "subjects": len(prepared.rows("train")), "slices_per_subject": shape[1], "image_size": list(shape[-2:]),
        "conditioning": asdict(p.conditioning)}}


def train_translator(p: TrainTranslator, progress: bool = True) -> TrainResult:
    """The trained model; continues what `p.out` holds. The same call serves torchrun's processes."""
    config = translator_config(p)
    torch.manual_seed(p.seed)
    D = build(config)
    if p.start_from:
        D.load_state_dict(load(p.start_from).state_dict())
    D.autocast = getattr(torch, p.autocast) if p.autocast else None
    options = TrainConfig(steps=p.steps, batch_size=p.batch_size, grad_accumulation=p.grad_accumulation,
                          learning_rate=p.learning_rate, warmup=p.warmup, schedule=p.schedule, ema_decay=p.ema_decay,
                          channels_last=True, seed=p.seed, device=p.device, seconds=p.seconds,
                          checkpoint_every=p.checkpoint_every, log_every=20)

    def loss(D: Denoiser, x0: Tensor, generator: Generator) -> Tensor:
        return translation_loss(D, x0, generator, p)

    names = ("remapped_share", "dropout", "look_ahead", "P_mean", "P_std", "mirror", "start_from")
    about = config | {name: getattr(p, name) for name in names}
    return train(D, loss, training_slices(p), options, project_root() / p.out, about=about, progress=progress)


def translation_loss(D: Denoiser, x0: Tensor, generator: Generator, p: TrainTranslator) -> Tensor:
    """The loss (batch,) of target images x0 (batch, channel, y, x), told of a source made from x0 itself."""
    options = {"generator": generator, "device": generator.device}
    c, batch = p.conditioning, len(x0)
    if p.mirror:
        x0 = torch.where((torch.rand(batch, 1, 1, 1, **options) < 0.5).to(x0.device), x0.flip(-1), x0)
    source = remapped(x0, generator, p.remapped_share) if p.remapped_share else grey(x0)
    keep = told(batch, len(c.maps), p.dropout, generator)
    noise = randn(x0.shape, x0.dtype, generator, x0.device)
    if p.diffusion == "edm":
        sigma = (p.P_mean + p.P_std * randn((batch,), x0.dtype, generator, x0.device)).exp()
        cond = conditions(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma, source, c, keep)
        return edm_loss(D, x0, cond=cond, sigma=sigma, noise=noise)
    t = torch.randint(len(D.schedule), (batch,), **options).to(x0.device)
    seen = (t + p.look_ahead).clamp(max=len(D.schedule) - 1)
    sigma = D.schedule.sigmas.to(x0.device)[seen].to(x0.dtype)
    cond = conditions(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma, source, c, keep)
    return discrete_loss(D, x0, cond=cond, t=t, noise=noise)


def told(batch: int, maps: int, dropout: float, generator: Generator) -> Tensor:
    """Which maps each image is told of, (batch, map) bool: all, or with probability `dropout` any smaller set."""
    options = {"generator": generator, "device": generator.device}
    subset = torch.randint(2**maps - 1, (batch,), **options)  # of all sets but the whole one
    some = (subset[:, None] >> torch.arange(maps, device=generator.device)) % 2 == 1
    return some | (torch.rand(batch, 1, **options) >= dropout)


@torch.no_grad()
def denoising_errors(D: EDMDenoiser, p: TrainTranslator, sigmas: Sequence[float], count: int = 48) -> list[dict]:
    """For each sigma the root mean squared error of D on validation slices, told of sources of each kind of contrast.

    "nothing", "itself" (the clean target), "remapped", and every other contrast that the prepared file has. The others
    are looked at here for the first time: to measure, not to learn.
    """
    stacks = some_slices(open_dataset(project_root() / p.data), count)
    stacks = {name: grey(x).to(p.device) for name, x in stacks.items() if name != "labels"}
    if not stacks:
        return []
    generator = torch.Generator().manual_seed(p.seed)
    x0 = stacks.pop(p.target)
    sources = {"nothing": None, "itself": x0, "remapped": remapped(x0, generator), **stacks}
    noise, table = randn(x0.shape, x0.dtype, generator).to(x0.device), []
    for sigma in sigmas:
        level, x, row = torch.full((len(x0),), sigma, device=x0.device), x0 + sigma * noise, {"sigma": sigma}
        for name, source in sources.items():
            told = conditions(x, level, source, p.conditioning)
            row[name] = round((D(x, level, told) - x0).square().mean().sqrt().item(), 4)
        table.append(row)
    return table


def save_translator(result: TrainResult, p: TrainTranslator, errors: list[dict]) -> Path:
    """The folder <out>/checkpoint with the averaged weights in half precision, their config, record and card."""
    record = {"parameters": asdict(p), "steps": result.step, "images": result.step * p.batch_size,
              "seconds": round(result.seconds), "loss": result.loss, "validation": errors, "code": code_version()}
    return save_checkpoint(project_root() / p.out / "checkpoint", result.ema.half(), translator_config(p), record)


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.lmi params.yaml
    train_translator(TrainTranslator(**read_yaml(sys.argv[1])))
