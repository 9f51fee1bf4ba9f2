"""How good are generated volumes? As a population: likeness, diversity, memory, anatomy.

Each question has a number and a yardstick, the same number for people who were not trained on:

    likeness    Frechet distance of slices in three planes           other people
    diversity   MS-SSIM between pairs of volumes                     pairs of people
    memory      distance to the nearest training volume              that of held-out people
    anatomy     volumes of the tissues, by a segmenter               those of held-out people

Volumes are real, (batch, 1, z, y, x), all on one grid.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.diffusion.denoisers import AnySize, ComplexDenoiser
from companion.evaluation import metrics
from companion.evaluation.segmenter import Segmenter
from companion.models.architectures import network_of
from companion.models.checkpoint import describe, load
from companion.networks.unet import UNet
from companion.operators.linear import check_finite

PLANES = {"axial": 2, "coronal": 3, "sagittal": 4}  # name -> axis of (batch, channel, z, y, x) that counts slices
FEATURE_SIGMA = 0.05  # noise level that a denoiser is told when its inner view of a clean slice is asked for
TISSUES = ("CSF", "grey", "white")
SIGNAL = 0.05  # less is background; 1 is about the brightest tissue


def check_volumes(x: Tensor, name: str = "volumes") -> Tensor:
    """x itself. Raises ValueError unless it is real, finite, (batch, 1, z, y, x) and not empty."""
    if x.ndim != 5 or x.shape[1] != 1 or x.is_complex() or not len(x):
        raise ValueError(f"{name}: expected real volumes (batch, 1, z, y, x), got {x.dtype} {tuple(x.shape)}")
    return check_finite(x, name)


# ----------------------------------------------------------------------------------------------------
# Likeness


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """What a 2D U-Net sees in slices (n, 1, y, x): its bottom activations averaged over space, (n, d).

    name: the checkpoint, to be stated with every Frechet distance.
    """

    name: str
    network: Any  # an nn.Module whose `middle_block` is watched
    run: Callable[[Tensor], Tensor]  # slices -> anything, through the network

    @torch.no_grad()
    def __call__(self, slices: Tensor, batch: int = 64) -> Tensor:
        seen = []
        with self.network.middle_block.register_forward_hook(lambda *args: seen.append(args[-1].mean((-2, -1)))):
            for part in slices.split(batch):
                self.run(part)
        return torch.cat(seen).float()


def load_features(name: str | os.PathLike, device: str = "cpu", autocast: str | None = None) -> FeatureNetwork:
    """The feature network of a checkpoint of 2D slices: a denoiser such as brain/t1w, or a segmenter.

    A denoiser of complex images gets real ones as they are, at the noise level 0.05. Raises ValueError for networks
    of another kind.
    """
    model = load(name, device, autocast)
    network = network_of(model)
    if type(network) is not UNet or network.dims != 2:
        raise ValueError(f"{name} holds a {type(network).__name__}; features come from a 2D UNet such as brain/t1w")
    if describe(name).get("denoiser") is None:
        D = AnySize(lambda x, sigma, cond=None: network(x, torch.zeros_like(sigma)), network.total_stride)
    else:
        D = AnySize(model, network.total_stride)
    dtype = torch.complex64 if isinstance(model, ComplexDenoiser) else torch.float32
    return FeatureNetwork(str(name), network, lambda x: D(x.to(device, dtype), x.new_full((len(x),), FEATURE_SIGMA)))


def plane_slices(x: Tensor, plane: str, per_volume: int = 16) -> Tensor:
    """Slices (batch * per_volume, 1, height, width) of volumes: evenly spaced over the middle half of the axis."""
    n = x.shape[PLANES[plane]]
    index = torch.linspace(n / 4, 3 * n / 4 - 1, min(per_volume, n // 2)).round().long().to(x.device)
    return x.index_select(PLANES[plane], index).movedim(PLANES[plane], 1).flatten(0, 1)


def frechet_by_plane(features: Callable, a: Tensor, b: Tensor, per_volume: int = 16) -> dict[str, float]:
    """Frechet distance between slices of volumes a and b in each plane, and their mean.

    Finite samples bias it upwards, the more the fewer there are: compare distances between sets of one size.
    """
    check_volumes(a, "a")
    check_volumes(b, "b")
    values = {}
    for plane in PLANES:
        seen = [features(plane_slices(x, plane, per_volume)) for x in (a, b)]
        values[plane] = metrics.frechet_distance(*seen)
    return values | {"mean": sum(values.values()) / len(values)}


def power_spectrum(x: Tensor, bins: int = 24) -> tuple[Tensor, Tensor]:
    """Frequencies (bins,) in cycles a voxel and the mean power of volumes (n, 1, z, y, x) there, up to 0.5."""
    power = torch.fft.fftn(x.float(), dim=(-3, -2, -1), norm="ortho").abs().square().mean((0, 1))
    axes = torch.meshgrid(*[torch.fft.fftfreq(n) for n in x.shape[-3:]], indexing="ij")
    which = (reduce(torch.add, [k.square() for k in axes]).sqrt() / 0.5 * bins).long()
    inside = which < bins
    total = torch.zeros(bins).index_add_(0, which[inside], power.cpu()[inside])
    return (torch.arange(bins) + 0.5) * 0.5 / bins, total / torch.bincount(which[inside], minlength=bins).clamp(min=1)


# ----------------------------------------------------------------------------------------------------
# Diversity


def pairwise_ms_ssim(x: Tensor, pairs: int | None = None, seed: int = 0, data_range: float = 1.0) -> Tensor:
    """MS-SSIM of pairs of volumes, (pairs,), float64, in 3D: all pairs, or so many of them at random.

    Alike volumes are close to 1. A value above that of real pairs means that samples repeat one another.
    """
    check_volumes(x)
    if len(x) < 2:
        raise ValueError("pairs need at least two volumes, got one")
    every = list(itertools.combinations(range(len(x)), 2))
    if pairs is not None and pairs < len(every):
        chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:pairs]
        every = [every[i] for i in sorted(chosen.tolist())]
    return torch.cat([metrics.ms_ssim(x[i : i + 1], x[j : j + 1], data_range) for i, j in every])


# ----------------------------------------------------------------------------------------------------
# Memory


@dataclass(frozen=True, eq=False)
class Nearest:
    """For each volume: the distance (batch,) to the nearest training volume, and its number (batch,)."""

    distance: Tensor
    index: Tensor


def relative_distance(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| / sqrt((|a|^2 + |b|^2) / 2) of all rows a (..., n, d) and b (m, d), (..., n, m).

    0 is the same, 1.4 has nothing in common.
    """
    power = (a.square().sum(-1)[..., None] + b.square().sum(1)) / 2
    return torch.cdist(a, b) / power.sqrt().clamp(min=1e-12)


def coarse(x: Tensor) -> Tensor:
    """Means over 2 x 2 x 2 voxels as rows (batch, cells): to compare without their grain."""
    return F.avg_pool3d(x.float(), 2).flatten(1)


def nearest(x: Tensor, training: Iterable[Tensor], mirror: bool = True) -> Nearest:
    """The nearest of all training volumes, which come in batches (batch, 1, z, y, x), to each of the volumes x.

    `relative_distance` of means over 2^3 voxels. mirror: training volumes mirrored left to right count too, as networks
    see them. Blur brings anything nearer to everything, so compare with held-out people seen through the same
    autoencoder.
    """
    check_volumes(x)
    own = torch.stack([coarse(x), coarse(x.flip(-1))] if mirror else [coarse(x)])  # (view, batch, cells)
    best = torch.full((len(x),), torch.inf)
    index, seen = torch.full((len(x),), -1), 0
    for batch in training:
        other = coarse(check_volumes(batch, "training volumes")).to(own)
        relative = relative_distance(own, other).amin(0)
        value, at = (v.cpu() for v in relative.min(1))
        index = torch.where(value < best, at + seen, index)
        best, seen = torch.minimum(value, best), seen + len(batch)
    if not seen:
        raise ValueError("no training volumes were given")
    return Nearest(best, index)


# ----------------------------------------------------------------------------------------------------
# Anatomy


def tissue_volumes(x: Tensor, segmenter: Segmenter, voxel_mm: Sequence[float]) -> Tensor:
    """Millilitres of CSF, grey and white matter in each volume, (batch, 3), by the segmenter's shares of each voxel.

    Counted where a voxel or a neighbour of it has signal: of slices without any, which a segmenter of brains was never
    shown, its norms make brains of nothing.
    """
    check_volumes(x)
    ml = torch.tensor(voxel_mm, dtype=torch.float64).prod() / 1000
    rows = []
    for one in x.float().clamp(min=0):
        there = F.max_pool3d(one[None], 3, 1, 1) > SIGNAL
        rows.append((there * segmenter.fractions(one[None])).flatten(2).sum(2))
    return torch.cat(rows).double() * ml


def tissue_fractions(volumes: Tensor) -> Tensor:
    """Shares (batch, 3) of the three tissues in the brain, of their volumes (batch, 3)."""
    return volumes / volumes.sum(1, keepdim=True)


def left_right(x: Tensor) -> Tensor:
    """How alike the hemispheres are, (batch,): correlation of each volume, coarse, with its mirror image."""
    a, b = coarse(check_volumes(x)), coarse(x.flip(-1))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)


# ----------------------------------------------------------------------------------------------------
# Tables


def likeness_table(
    features: FeatureNetwork, reference: Tensor, sets: Mapping[str, Tensor], per_volume: int = 16
) -> list[dict[str, object]]:
    """Frechet distances of named sets of volumes to a reference set, plane by plane, with the counts."""
    rows = []
    for name, x in sets.items():
        values = frechet_by_plane(features, x, reference, per_volume)
        n = len(plane_slices(x, "axial", per_volume))
        rows.append(
            {"volumes": name, "slices a plane": f"{n} and {len(plane_slices(reference, 'axial', per_volume))}"}
            | {plane: round(value, 4) for plane, value in values.items()}
        )
    return rows


def diversity_table(sets: Mapping[str, Tensor], pairs: int, seed: int = 0) -> list[dict[str, object]]:
    """`pairwise_ms_ssim` of so many pairs of each set of volumes: mean and standard deviation."""
    rows = []
    for name, x in sets.items():
        values = pairwise_ms_ssim(x, pairs, seed)
        spread = values.std().item() if len(values) > 1 else 0.0
        row = {"volumes": name, "pairs": len(values), "MS-SSIM": values.mean().item(), "standard deviation": spread}
        rows.append(row)
    return rows


def memory_table(
    sets: Mapping[str, Tensor], training: Iterable[Tensor], count: int
) -> tuple[list[dict[str, object]], dict[str, Nearest]]:
    """Distances of sets of volumes to the `nearest` of `count` training volumes, and which those are."""
    near, rows, found, at = nearest(torch.cat(list(sets.values())), training), [], {}, 0
    for name, x in sets.items():
        d, index = (v[at : at + len(x)] for v in (near.distance, near.index))
        found[name], at = Nearest(d, index), at + len(x)
        about = {"volumes": name, "n": len(x), "training volumes": count}
        spread = {"to the nearest": d.mean().item(), "standard deviation": d.std().item(), "smallest": d.min().item()}
        rows.append(about | spread)
    return rows, found


def tissue_table(sets: Mapping[str, Tensor], reference: str) -> list[dict[str, object]]:
    """Mean and standard deviation (ml) of tissue volumes (batch, 3), shares relative to those of a reference."""
    real = tissue_fractions(sets[reference]).mean(0)
    rows = []
    for name, volumes in sets.items():
        share = tissue_fractions(volumes).mean(0) / real
        row = {"volumes": name, "n": len(volumes)}
        for i, tissue in enumerate(TISSUES):
            spread = f" ± {volumes[:, i].std():.0f}" if len(volumes) > 1 else ""
            row[f"{tissue} (ml)"] = f"{volumes[:, i].mean():.0f}{spread}"
        rows.append(row | {f"{tissue} share": f"{value:.3f} x" for tissue, value in zip(TISSUES, share, strict=True)})
    return rows
