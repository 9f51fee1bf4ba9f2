"""What of a translation its source speaks for, and where the prior insists: told without a truth.

A prior that has never seen a lesion draws healthy tissue in its place, crisp and alike in every draw, so neither its
look nor the spread of the draws betrays it. The source does: it has grey levels there that no draw explains.

    found = supported(source, draws)       # (slice, 1, y, x) in [0, 1], (draw, slice, 1, y, x)
    found.unsupported                      # True where the source holds what the draws have not
    found.marked                           # the same, and with sides=True where the source is unlike its other side
    found.own                              # what this person's own relation of draws to source would put there
    found.verdict                          # in words and numbers

The source is regressed on each draw: value there, mean and extremes nearby, all slices of the person together, by least
squares with Cauchy weights, so that a lesion does not bend the curve that it is judged by. What is left, in robust
standard deviations, averaged over neighbours and draws, is large where source and draw do not tell of the same tissue.

What is as dark as fluid in the source may be fluid or a lesion. A prior that draws fluid contradicts nothing, and no
such comparison tells. But heads have two sides: a lesion that one of them has shows in the source itself (`lopsided`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from companion.data.shading import FAINT, local_mean
from companion.evaluation import metrics
from companion.information.box_mi import BoxMI
from companion.information.pairs import grey

KNOTS, NEARBY, ROUNDS = 9, 5, 6  # of the curve at a pixel, of that of its neighbourhood; of reweighting
LIMIT = 1.2  # standard deviations from which a pixel's neighbourhood is unsupported, see docs/lmi.md
LEAST_WIDTH = 0.04  # of bright tissue, of what is left: good draws are not held to their own noise
LEAST = 6  # pixels of a region that is marked
LOPSIDED = 0.03  # of bright tissue, what the other side must lack nearby for a pixel to be marked, see docs/lmi.md
REACH = 2  # pixels within which the other side is searched: real heads are not symmetric
LOW = (
    0.65  # of the information usual between translations and sources, below which a slice is doubtful; strangers: 0.56
)
USUAL = 0.135  # that information: normalised LMI of 7 x 7 patches, mean over tissue, of validation people


@dataclass(frozen=True, eq=False)
class Support:
    """All (slice, 1, y, x): `residual`, signed, what draws leave of the source in standard deviations; `unsupported`,
    True where it is too large; `lopsided`, True where the source is unlike its other side, nowhere if that was not
    asked; `spread`, standard deviation of the draws; `own`, the translation that this person's own
    relation of draws to source gives. information (slice,): mean LMI of source and translation in the tissue, or NaN.
    """

    residual: Tensor
    unsupported: Tensor
    lopsided: Tensor
    spread: Tensor
    own: Tensor
    information: Tensor
    tissue: Tensor

    @property
    def marked(self) -> Tensor:
        """Where a translation is not to be believed, for either reason, (slice, 1, y, x), bool."""
        return self.unsupported | self.lopsided

    @property
    def share(self) -> Tensor:
        """Of each slice's tissue what is unsupported, (slice,)."""
        return (self.unsupported & self.tissue).flatten(1).sum(1) / self.tissue.flatten(1).sum(1).clamp(min=1)

    @property
    def doubtful(self) -> Tensor:
        """Slices (slice,), bool, whose translation shares too little with the source, or has much unsupported."""
        return (self.information < LOW * USUAL) | (self.share > 0.25)

    @property
    def verdict(self) -> str:
        """In words and numbers, for all slices together."""
        tissue = self.tissue.sum().item()
        share = (self.unsupported & self.tissue).sum().item() / max(1, tissue)
        bad, known = int(self.doubtful.sum()), int(self.information.isfinite().sum())
        told = f"{share:.1%} of the tissue is not supported by the source: the prior insists there"
        if (more := (self.lopsided & ~self.unsupported).sum().item() / max(1, tissue)) > 0:
            told += f"; {more:.1%} more is unlike the other side of the head: what is drawn there may not be"
        if bad:
            told += f"; {bad} of {known} slices are doubtful as a whole"
        shared = self.information[self.information.isfinite()].mean().item() / USUAL if known else float("nan")
        return f"{told}; source and translation share {shared:.0%} of the information usual for virtual people"

    def mended(self, x: Tensor) -> Tensor:
        """A translation (slice, 1, y, x) with `own` where it is unsupported, the border blended over a pixel."""
        weight = F.avg_pool2d(F.max_pool2d(self.unsupported.to(x), 3, 1, 1), 3, 1, 1)
        return x + weight * (self.own - x)


def supported(
    source: Tensor, draws: Tensor, limit: float = LIMIT, sides: bool = False, paired: bool = False
) -> Support:
    """What the source (slice, 1 or 3, y, x) in [0, 1] says of its translations (draw, slice, 1 or 3, y, x).

    sides: compare the sides of the source too; the middle of the head must lie in the middle of x, as on the template.
    paired: draws are antithetic, as `metrics.spread` asks.
    """
    given = grey(source).double()
    images = torch.stack([grey(d).double() for d in draws])
    mean, tissue = images.mean(0), head(given)
    flat, seen = level(given), [level(d) for d in images]
    marked, smooth = torch.zeros_like(tissue), given
    for _ in range(2):  # what is marked does not take part in the curve that it is judged by again
        trusted = tissue & (F.max_pool2d(marked.to(given), 3, 1, 1) == 0)
        left = torch.stack([residual(flat, d, tissue, trusted) for d in seen]).mean(0)
        smooth = _nearby(left, tissue)
        marked = _regions((smooth.abs() > limit) & tissue)
    own = fitted(mean, flat, tissue & (F.max_pool2d(marked.to(given), 3, 1, 1) == 0))
    shared = BoxMI((7,), 10)(given.clamp(0, 1).float(), mean.clamp(0, 1).float())
    count = tissue.flatten(1).sum(1)
    information = torch.where(count > 50, (shared * tissue).flatten(1).sum(1) / count.clamp(min=1), torch.nan)
    spread = metrics.spread(images, paired).deviation if len(images) > 1 else torch.zeros_like(mean)
    smooth, spread, own = (v.to(source.dtype) for v in (smooth, spread, torch.where(tissue, own, mean)))
    unlike = lopsided(flat, tissue) if sides else torch.zeros_like(tissue)
    return Support(smooth, marked, unlike, spread, own, information.to(source.dtype), tissue)


def lopsided(image: Tensor, tissue: Tensor, limit: float = LOPSIDED) -> Tensor:
    """Where images (slice, 1, y, x) of even brightness are unlike their other side, bool: regions of `LEAST` pixels.

    A pixel's value, mean of 3 x 3, is compared with the range of values that the mirror image has within `REACH`
    pixels; what it lies beyond that range is averaged over its neighbours again. tissue: bool, as the images.
    """
    other = tissue.flip(-1)
    mine, theirs = _nearby(image, tissue, 3), _nearby(image.flip(-1), other, 3)
    width = 2 * REACH + 1
    high = F.max_pool2d(torch.where(other, theirs, -torch.inf), width, 1, REACH)
    low = -F.max_pool2d(torch.where(other, -theirs, -torch.inf), width, 1, REACH)
    beyond = (mine - high).clamp(min=0) - (low - mine).clamp(min=0)
    beyond = _nearby(torch.where(tissue & other, beyond, 0), tissue, 3)
    return _regions((beyond.abs() > limit) & tissue)


def head(image: Tensor) -> Tensor:
    """Where a head is in images (slice, 1, y, x), bool: what is brighter than air, and what that encloses."""
    from scipy.ndimage import binary_fill_holes

    filled = [torch.from_numpy(binary_fill_holes(one)) for one in (image[:, 0] > FAINT).cpu().numpy()]
    return torch.stack(filled)[:, None].to(image.device)


def level(image: Tensor) -> Tensor:
    """Images (slice, 1, y, x) freed from slow shading, their bright tissue 1."""
    flat = image.clamp(min=0) / local_mean(image)
    values = flat[flat > FAINT]
    return flat / values.kthvalue(max(1, round(0.99 * len(values)))).values if len(values) else flat


def residual(y: Tensor, x: Tensor, inside: Tensor, trusted: Tensor) -> Tensor:
    """What x does not tell of y, (slice, 1, y, x), in robust standard deviations; 0 outside. trusted: fitted."""
    left = y - fitted(y, x, trusted)
    if not trusted.any():
        return torch.zeros_like(y)
    width = 1.48 * left[trusted].abs().median().clamp(min=LEAST_WIDTH)
    return torch.where(inside, (left / width).clamp(-6, 6), 0)


def fitted(y: Tensor, x: Tensor, inside: Tensor) -> Tensor:
    """y as x tells it, (slice, 1, y, x): piecewise linear in x, its mean and extremes nearby; Cauchy weights."""
    M = torch.cat(
        [
            hats(x, KNOTS),
            hats(F.avg_pool2d(F.pad(x, [1] * 4, mode="replicate"), 3, 1), NEARBY),
            hats(F.max_pool2d(x, 3, 1, 1), NEARBY),
            hats(-F.max_pool2d(-x, 3, 1, 1), NEARBY),
        ],
        1,
    ).movedim(1, -1)
    A, v = M[inside[:, 0]], y[:, 0][inside[:, 0]]
    if not len(v):
        return torch.zeros_like(y)
    ridge = 1e-4 * len(v) * torch.eye(A.shape[1]).to(A)
    weight, found = torch.ones_like(v), torch.zeros_like(A[0])
    for _ in range(ROUNDS):
        weighted = A.T * weight
        found = torch.linalg.solve(weighted @ A + ridge, weighted @ v)
        left = v - A @ found
        weight = 1 / (1 + (left / (3 * left.abs().median()).clamp(min=1e-6)).square())
    return (M @ found)[:, None]


def hats(x: Tensor, knots: int) -> Tensor:
    """Values (slice, 1, y, x) as weights (slice, knots, y, x) of corners of a piecewise linear curve over [0, 1]."""
    at = x.clamp(0, 1) * (knots - 1)
    return (1 - (at - torch.arange(knots).to(x).view(1, -1, 1, 1)).abs()).clamp(min=0)


def _nearby(x: Tensor, inside: Tensor, width: int = 5) -> Tensor:
    """Mean of x (slice, 1, y, x) over the tissue of width x width pixels; errors of borders, of both signs, cancel."""
    pool = partial(F.avg_pool2d, kernel_size=width, stride=1, padding=width // 2)
    return torch.where(inside, pool(torch.where(inside, x, 0)) / pool(inside.to(x)).clamp(min=1e-6), 0)


def _regions(marked: Tensor) -> Tensor:
    """Marked pixels (slice, 1, y, x) of regions of at least `LEAST`."""
    from scipy.ndimage import label, sum_labels

    kept = []
    for one in marked[:, 0].cpu().numpy():
        found: Any = label(one)  # scipy's type says that it may be a number
        names, count = found
        sizes = np.asarray(sum_labels(one, names, range(count + 1)))
        kept.append(torch.from_numpy((sizes >= LEAST)[names] & one))
    return torch.stack(kept)[:, None].to(marked.device)
