"""Do the images of a sequence hang together? Measures of what neighbouring frames share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from companion.evaluation import metrics

Line = tuple[list[float], list[float], list[float]]  # x, mean, standard error, as `figures.curves` takes it


def strangers(x: Tensor) -> Tensor:
    """Sequences whose every frame is of another person: frame n of sequence i is that of person i + n.

    What neighbours have in common when nothing but their place in the sequence is.
    """
    return torch.stack([x[:, n].roll(-n, 0) for n in range(x.shape[1])], 1)


def change(a: Tensor, b: Tensor) -> Tensor:
    """||a| - |b|| / sqrt((|a|^2 + |b|^2) / 2) of images (..., 1, y, x): 0 the same, 1.4 nothing in common."""
    a, b = a.abs().flatten(-3).double(), b.abs().flatten(-3).double()
    return (a - b).norm(dim=-1) / ((a.square() + b.square()).sum(-1) / 2).sqrt().clamp(min=1e-12)


def frame_change(x: Tensor, lag: int = 1) -> Tensor:
    """The mean change between frames `lag` apart of sequences x (sequence, frame, 1, y, x), (sequence,)."""
    return change(x[:, lag:], x[:, : x.shape[1] - lag]).mean(1)


def phase_agreement(x: Tensor) -> Tensor:
    """How well the phases of neighbouring frames agree, (sequence,): 1 the same, 0 at random.

    Re sum conj(x_n) x_n+1 / sum |x_n| |x_n+1|, mean over neighbours.
    """
    a, b = x[:, :-1].flatten(2), x[:, 1:].flatten(2)
    return ((a.conj() * b).sum(2).real / (a.abs() * b.abs()).sum(2).clamp(min=1e-12)).mean(1)


def line(x: Sequence[float], values: Iterable[Tensor]) -> Line:
    """The mean and standard error of the values (sequence,) at each x."""
    pairs = [metrics.mean_and_error(v) for v in values]
    return list(x), [mean for mean, _ in pairs], [error for _, error in pairs]
