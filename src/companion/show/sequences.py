"""Drawn sequences beside true ones: rows of frames, and animations in step."""

from __future__ import annotations

import torch
from torch import Tensor

from companion.models.sequences import Drawn


def strips(true: Tensor, drawn: list[Drawn], i: int = 0) -> dict[str, dict[str, Tensor]]:
    """Rows of frames for `figures.image_grid`: sequence i of each, under the true one it continues.

    Modes without a person of their own begin at the left; places without a frame stay white.
    """
    sequences = {"truth": (true[i], 0)} | {d.name: (d.x[i], d.first) for d in drawn}
    count = max(first + len(x) for x, first in sequences.values())
    blank = torch.full(true.shape[2:], float("nan"))
    rows = {}
    for name, (x, first) in sequences.items():
        label = name.replace("retro", "retro-\n").replace(",", "").replace(" ", "\n")
        rows[label] = {str(n + 1): x[n - first] if 0 <= n - first < len(x) else blank for n in range(count)}
    return rows


def played(true: Tensor, drawn: list[Drawn], i: int = 0) -> dict[str, Tensor]:
    """Sequence i of each mode for `figures.animation`, all as long as the truth and in step with it.

    The frames that a mode was given come first, at half their brightness; where it has no more frames it is black.
    """

    def whole(d: Drawn) -> Tensor:
        x = torch.cat([true[i, : d.first] / 2, d.x[i]])[:count]
        return torch.cat([x, x.new_zeros(count - len(x), *x.shape[1:])])

    count = true.shape[1]
    return {"truth": true[i]} | {d.name: whole(d) for d in drawn}
