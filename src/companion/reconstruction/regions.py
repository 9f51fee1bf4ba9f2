"""Images whose tissues have the level that the counts give them, where a segmented MR scan says what is where."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.acquisition.pet import Scan
from companion.data.pet import Slices, tissue_shares
from companion.evaluation import metrics
from companion.evaluation.activity import TISSUES, healthy
from companion.evaluation.doses import MEAN
from companion.operators.linear import LinearOperator
from companion.reconstruction.pet import region_levels

HOT = 0.4  # of the most active tissue: what stands out of the tissues by more is a lesion, and a region of its own


def regional(
    x: Tensor, y: Tensor, A: LinearOperator, background: Tensor | None, shares: Tensor, rounds: int = 4
) -> Tensor:
    """Images (slice, 1, y, x) of tissues and lesions whose levels the counts decide, given what is where.

    shares (slice, tissue, 1, y, x): of each tissue in each pixel, from a segmented MR scan. Lesions are in no such
    scan: they are what stands out of the tissues in the reconstruction x. `region_levels` has the sources.
    """
    image, hot = x, torch.zeros_like(x)[:, None]
    for _ in range(rounds):
        shapes = torch.cat([shares, hot], 1)
        levels = region_levels(y, A, shapes, background)[0].float()[..., None, None, None]
        tissue = (levels[:, :-1] * shares).sum(1)
        excess = x - tissue
        image = tissue + levels[:, -1] * hot[:, 0]
        hot = torch.where(excess > HOT * levels[:, :-1].amax(1), excess, 0.0)[:, None]
    return image


def misplaced(shares: Tensor, pixels: float = 0.5) -> Tensor:
    """Shares that lie `pixels` to the right of where they should, as after an imperfect registration."""
    return torch.lerp(shares, shares.roll(1, -1), pixels)


def decided(shares: Tensor) -> Tensor:
    """1 for the tissue that fills most of each pixel and 0 for others: labels, without partial volume."""
    filled = shares.sum(1, keepdim=True) > 0.5
    return (F.one_hot(shares.argmax(1), shares.shape[1]).movedim(-1, 1) * filled).to(shares)


MAPS = {"none": None, "exact": lambda shares: shares, "half a pixel off": misplaced, "labels only": decided}


def region_rows(images: Mapping[str, Tensor], people: Slices, scan: Scan) -> list[dict]:
    """The bias of each tissue's mean, a row for each method, kind of anatomical maps, and slice."""
    shares, labels, rows = tissue_shares(people), healthy(people), []
    for name in ("MLEM", "MAP", MEAN):
        for kind, change in MAPS.items():
            x = images[name]
            x = x if change is None else regional(x, scan.y, scan.A, scan.background, change(shares))
            bias = metrics.region_bias(x, people.image, labels, tuple(TISSUES.values()))
            rows += [
                {"method": name, "maps": kind, "person": int(people.subject[i])}
                | dict(zip(TISSUES, b.tolist(), strict=True))
                for i, b in enumerate(bias)
            ]
    return rows
