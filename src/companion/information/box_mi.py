"""Local mutual information at several patch sizes at once, fast enough to be worked out in every training step.

The maps of `local_mi.LocalMI(mode="centre")`, for 2D images: the joint histogram of the patches around a pixel is a box
filter of the outer product of both images' kernels (the smooth view of Wang et al. 2024), which all patch sizes share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from companion.information.grid import extremes
from companion.information.local_mi import LocalMI
from companion.information.pairs import grey_levels, kernels, normalised

FLOOR = 1e-12  # added to counts, so that c ln c is defined


@dataclass(frozen=True)
class BoxMI:
    """The map mi(source, target) -> (batch, len(patches), y, x), normalised, of images (batch, 1, y, x) in [0, 1].

    patches: odd sides of the patches, 3 or more, increasing. bins: of the histograms; the kernels are as wide as those
    of `LocalMI`, whose checks apply. Images continue beyond their border with their last value, levels are clamped.
    """

    patches: tuple[int, ...] = (3, 7)
    bins: int = 10

    def __post_init__(self):
        if not self.patches or list(self.patches) != sorted(set(self.patches)):
            raise ValueError(f"patches is {self.patches}; expected one or more different sizes, smallest first")
        for lmi in self.like:
            lmi.__post_init__()  # its errors

    @property
    def like(self) -> list[LocalMI]:
        """The maps that this one equals, one for each patch size."""
        return [LocalMI(patch=p, bins=self.bins, mode="centre") for p in self.patches]

    def prepare(self, image: Tensor) -> BoxSource:
        """The source side of the map: kernels and entropies of the patches of `image` (batch, 1, y, x)."""
        if image.ndim != 4:
            raise ValueError(f"the image has shape {tuple(image.shape)}; these maps are for 2D ones, (batch, 1, y, x)")
        lmi, pad = self.like[-1], self.patches[-1] // 2
        lmi._check(image, "image")
        levels = F.pad(grey_levels(image), [pad] * 4, mode="replicate")
        k = kernels(levels[:, 0], self.bins, lmi.width).movedim(-1, 1).flatten(2)  # (batch, bin, padded pixel)
        boxes = [self.boxes(one, levels.shape[-2:]) for one in k]
        entropies = torch.stack([torch.stack([entropy_of_counts(c) for c in sizes]) for sizes in boxes])
        return BoxSource(self, image, k.unflatten(2, levels.shape[2:]), entropies, self.rectangles(levels))

    def __call__(self, source: Tensor | BoxSource, target: Tensor | BoxSource) -> Tensor:
        """The map; a source of batch 1 serves a target of any batch. ValueError as `LocalMI`."""
        source, target = (x if isinstance(x, BoxSource) else self.prepare(x) for x in (source, target))
        if source.mi != self or target.mi != self:
            raise ValueError(f"the images were prepared by {source.mi} and {target.mi}, not by {self}; prepare again")
        if source.image.shape[2:] != target.image.shape[2:] or len(source.image) not in (1, len(target.image)):
            raise ValueError(
                f"source {tuple(source.image.shape)} and target {tuple(target.image.shape)}: expected one "
                "size, and one source or one for each target"
            )
        ours = range(len(target.image)) if len(source.image) > 1 else [0] * len(target.image)
        return torch.stack([self.one(source, i, target, j) for j, i in enumerate(ours)])

    def one(self, source: BoxSource, i: int, target: BoxSource, j: int) -> Tensor:
        """The maps (patch, y, x) of image i of the source with image j of the target; 0 where the source is flat."""
        found = source.image.new_zeros(len(self.patches), *source.image.shape[2:])
        busy = source.busy[i]
        if busy is None:
            return found
        rows, columns = busy
        (k1, mass1), (k2, mass2) = source.cut(i, rows, columns), target.cut(j, rows, columns)
        shape = k1.shape[1:]
        products, times = (k1[:, None] * k2[None]).flatten(0, 1), None
        if source is target and i == j:  # the joint histogram is symmetric: half of it will do
            a, b = torch.triu_indices(len(k1), len(k1), device=k1.device)
            products, times = k1[a] * k1[b], 2.0 - (a == b).to(k1)
        joint = self.boxes(products.flatten(1), shape)
        mass = self.boxes((mass1 * mass2).reshape(1, -1), shape)
        h1, h2 = (
            x.entropies[at].unflatten(1, found.shape[1:])[:, rows, columns].flatten(1)
            for x, at in ((source, i), (target, j))
        )
        h12 = torch.stack([entropy_of_counts(c, m[0], times) for c, m in zip(joint, mass, strict=True)])
        inside = normalised(h1 + h2 - h12, h1, h2).unflatten(1, (rows.stop - rows.start, columns.stop - columns.start))
        around = (columns.start, found.shape[2] - columns.stop, rows.start, found.shape[1] - rows.stop)
        return F.pad(inside, around)

    def rectangles(self, levels: Tensor) -> list[tuple[slice, slice] | None]:
        """Rows and columns outside which the largest patches of padded levels (batch, 1, y, x) are flat; none: all."""
        low, high = extremes(levels, self.patches[-1])
        found = []
        for flat in (low == high)[:, 0]:
            rows, columns = ((~flat).any(axis).nonzero().flatten().tolist() for axis in (1, 0))
            found.append((slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)) if rows else None)
        return found

    def boxes(self, f: Tensor, shape: Sequence[int]) -> list[Tensor]:
        """Sums of f (channel, padded pixel) over the patch around each pixel, (channel, pixel) for each patch size.

        Shifts of the flattened image: along x by 1, along y by a row. What wraps around lies in the margin.
        """
        (height, width), pad, found = shape, self.patches[-1] // 2, []
        rows, reach = f[:, pad * width : f.shape[1] - pad * width], 0  # sums over 2 reach + 1 rows
        for patch in self.patches:
            h, n = patch // 2, f.shape[1]
            for step in range(reach + 1, h + 1):
                above, below = (f[:, (pad + s) * width : n + (s - pad) * width] for s in (-step, step))
                rows = rows + above if step == 1 else rows.add_(above)
                rows.add_(below)
            reach, m = h, rows.shape[1]
            total = rows[:, pad : m - pad].clone()
            for step in range(1, h + 1):
                total.add_(rows[:, pad - step : m - pad - step]).add_(rows[:, pad + step : m - pad + step])
            total = F.pad(total, (0, 2 * pad)).unflatten(1, (height - 2 * pad, width))
            found.append(total[..., : width - 2 * pad].flatten(1))
        return found


@dataclass(frozen=True, eq=False)
class BoxSource:
    """An image made ready by `BoxMI.prepare`, to be source or target of any number of maps.

    image (batch, 1, y, x); k (batch, bin, *padded): its kernels; entropies (batch, patch, pixel) in bits; busy: of
    each image the rows and columns outside which it is flat.
    """

    mi: BoxMI
    image: Tensor
    k: Tensor
    entropies: Tensor
    busy: list[tuple[slice, slice] | None]

    def cut(self, i: int, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Kernels (bin, y, x) and their sums (y, x) of a part of image i and its margin."""
        margin = self.mi.patches[-1] - 1
        k = self.k[i, :, rows.start : rows.stop + margin, columns.start : columns.stop + margin]
        return k, k.sum(0)


def entropy_of_counts(c: Tensor, total: Tensor | None = None, times: Tensor | None = None) -> Tensor:
    """Entropy in bits (pixel,) of counts c (bin, pixel) with sums `total`: ln S - sum c ln c / S.

    times: how often each count occurs, (bin,); by default once.
    """
    total = c.sum(0) if total is None else total
    if c.device.type == "cpu" and not (torch.is_grad_enabled() and c.requires_grad):
        log = c + FLOOR
        np.log(log.numpy(), out=log.numpy())  # several times faster than torch.log on a CPU
        terms = log.mul_(c)
    else:
        terms = c * (c + FLOOR).log()
    logs = terms.sum(0) if times is None else times @ terms
    return ((total + FLOOR).log() - logs / (total + FLOOR)) / math.log(2)
