"""Intervals of pixels, regions and PSNR from posterior draws: how many truths they hold, as drawn and made conformal.

    found = intervals(calibrated, tested)       # Drawn slices of other people, and of new ones
    found["region"].coverage, found["region"].raw, found["region"].factor
    interval_table(calibrated, tested)          # the same as a table
    interval_table(drawn)                       # of people who are parted in many ways into both

Regions are squares of an eighth of the field of view inside the person, cut along no tissue. `over_splits` says what
the coverage is on average over ways to part slices into calibration and test: what the guarantee is about.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from companion.evaluation import conformal, metrics

KINDS = ("pixel", "region", "PSNR")
SQUARES, SIDE = 8, 4  # along a side of the field of view; pixels along a side of a square, at least
LEAST = 6  # pixels of a region that counts


@dataclass(frozen=True, eq=False)
class Drawn:
    """Slices and what was drawn of them: truth (slice, 1, y, x), draws (draw, slice, 1, y, x), mask of the person.

    paired: the draws are antithetic, see `metrics.spread`.
    """

    truth: Tensor
    draws: Tensor
    mask: Tensor
    paired: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """KINDS that so many draws can say something of: two know nothing of their own PSNR."""
        return KINDS if len(self.draws) > 2 else KINDS[:2]

    def some(self, index: Tensor) -> Drawn:
        """The slices `index` (n,)."""
        return Drawn(self.truth[index], self.draws[:, index], self.mask[index], self.paired)

    def numbers(self, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Mean and standard deviation that draws give, the truth, and which count, of each number (slice, ...)."""
        if kind == "PSNR":
            peak = self.truth.abs().flatten(1).amax(1)
            predicted = conformal.predicted_psnr(self.draws, peak, self.paired)
            return *predicted, metrics.psnr(self.draws.mean(0), self.truth), None
        if kind == "pixel":
            parts = 2 if self.draws.is_complex() else 1
            std = (metrics.spread(self.draws, self.paired).variance / parts).sqrt().clamp_min(1e-6)
            return self.draws.mean(0), std, self.truth, self.mask
        (true, known), draws = self.regions(self.truth), self.regions(self.draws)[0]
        return draws.mean(0), metrics.spread(draws, self.paired).deviation.clamp_min(1e-6), true, known

    def regions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of |x| (..., slice, region) in squares of the person, and which squares have enough pixels."""
        x = x.abs() if x.is_complex() else x
        squares = max(1, min(SQUARES, min(x.shape[-2:]) // SIDE))
        at = [torch.arange(n) * squares // n for n in x.shape[-2:]]
        index = (squares * at[0][:, None] + at[1]).flatten()
        inside = self.mask.flatten(1).to(x.dtype)

        def sums(v: Tensor) -> Tensor:
            return v.new_zeros(*v.shape[:-1], squares**2).index_add_(-1, index, v)

        count = sums(inside)
        return sums(x.flatten(-3) * inside) / count.clamp_min(1), count >= LEAST

    def student(self, kind: str) -> float:
        """The factor of the standard deviation for 90 % of truths that are one more draw."""
        if kind == "PSNR":
            return 1.645
        n = len(self.draws)
        freedom = n // 2 if self.paired else n - 1
        freedom *= 2 if kind == "pixel" and self.draws.is_complex() else 1
        return float(stdtrit(freedom, 0.95)) * (1 if self.paired else math.sqrt(1 + 1 / n))


@dataclass(frozen=True)
class Held:
    """Shares of truths inside 90 % intervals: as drawn, and of the conformal factor; the mean width of those.

    each: the conformal share of each slice; of PSNR, 0 or 1.
    """

    raw: float
    factor: float
    coverage: float
    width: float
    each: tuple[float, ...]


def intervals(calibrated: Drawn, tested: Drawn) -> dict[str, Held]:
    """What 90 % intervals hold of the tested slices, by KINDS; conformal by the calibrated ones, nine or more."""
    found = {}
    for kind in calibrated.kinds:
        factor = _factor(*calibrated.numbers(kind))
        mean, std, truth, mask = tested.numbers(kind)
        raw = _shares(mean, std, truth, mask, tested.student(kind))
        each = _shares(mean, std, truth, mask, factor)
        spread = std if mask is None else std[mask]
        width = 2 * factor * spread.mean().item()
        found[kind] = Held(raw.mean().item(), factor, each.mean().item(), width, tuple(each.tolist()))
    return found


def over_splits(drawn: Drawn, calibration: int, repeats: int = 100, seed: int = 0) -> dict[str, float]:
    """The conformal coverage, by KINDS, averaged over random ways to take `calibration` of the slices to calibrate."""
    total: dict[str, float] = dict.fromkeys(drawn.kinds, 0.0)
    generator = torch.Generator().manual_seed(seed)
    numbers = {kind: drawn.numbers(kind) for kind in drawn.kinds}
    for _ in range(repeats):
        order = torch.randperm(len(drawn.truth), generator=generator)
        own, new = order[:calibration], order[calibration:]
        for kind, (mean, std, truth, mask) in numbers.items():
            inside, outside = (None, None) if mask is None else (mask[own], mask[new])
            factor = _factor(mean[own], std[own], truth[own], inside)
            total[kind] += _shares(mean[new], std[new], truth[new], outside, factor).mean().item() / repeats
    return total


LEAST_SLICES = 9  # to calibrate on, for 90 %
NAMES = {"pixel": "a pixel", "region": "the mean of a square", "PSNR": "PSNR of the mean (dB)"}


def interval_table(calibrated: Drawn, tested: Drawn | None = None) -> list[dict[str, object]]:
    """A table of what 90 % intervals hold of `tested` slices: a row for each of `Drawn.kinds`.

    tested: none: the slices of `calibrated` are parted in 100 ways, three of four to calibrate (or 9); the factor and
    the width are those of all of them. Raises ValueError for too few slices to calibrate on, or to test then.
    """
    n = len(calibrated.truth)
    if n < LEAST_SLICES + (tested is None):
        raise ValueError(f"{n} slices to calibrate 90 % intervals on; {LEAST_SLICES} are the least, and one to test")
    held = intervals(calibrated, calibrated if tested is None else tested)
    shares = {kind: held[kind].coverage for kind in held}
    if tested is None:
        shares = over_splits(calibrated, max(LEAST_SLICES, round(0.75 * n)))
    return [
        {
            "90 % interval of": NAMES[kind],
            "holds, as drawn (%)": round(100 * held[kind].raw, 1),
            "factor": round(held[kind].factor, 2),
            "holds, conformal (%)": round(100 * shares[kind], 1),
            "width": held[kind].width,
        }
        for kind in held
    ]


def _factor(mean: Tensor, std: Tensor, truth: Tensor, mask: Tensor | None) -> float:
    return conformal.number_factor(mean, std, truth) if mask is None else conformal.pixel_factor(mean, std, truth, mask)


def _shares(mean: Tensor, std: Tensor, truth: Tensor, mask: Tensor | None, factor: float) -> Tensor:
    """The share (slice,) of each slice's numbers inside mean +- factor std."""
    if mask is None:
        return ((truth - mean).abs() <= factor * std).double()
    return conformal.pixel_coverage(mean, std, truth, factor, mask)
