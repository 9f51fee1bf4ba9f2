"""Filtered back projection of line integrals, and the line integrals of emission and transmission counts.

    p = transmission_integrals(y, blank)        # (batch, 1, angle, bin), of mu
    mu = fbp(p, beam, "hann", cutoff=0.8)       # (batch, 1, y, x), 1/mm

Linear, fast, and blind to how certain each line is: where a statistical reconstruction starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from companion.operators.pet import ParallelBeam

FILTERS: dict[str, Callable[[Tensor], Tensor]] = {  # windows on the ramp, of the frequency over the cutoff, 0 to 1
    "ramp": torch.ones_like,
    "shepp-logan": lambda f: torch.sinc(f / 2),
    "cosine": lambda f: (math.pi / 2 * f).cos(),
    "hamming": lambda f: 0.54 + 0.46 * (math.pi * f).cos(),
    "hann": lambda f: 0.5 + 0.5 * (math.pi * f).cos(),
}
FEWEST = 0.5  # counts that a transmission bin with less is taken to have: the logarithm of 0 has none


def fbp(p: Tensor, beam: ParallelBeam, window: str = "ramp", cutoff: float = 1.0) -> Tensor:
    """The image (..., 1, y, x) whose line integrals are p (..., 1, angle, bin), in the units of p per mm.

    window: of FILTERS, on a ramp made of its samples in space, so that the level is right (Kak, Slaney 1988, eq. 61);
    cutoff: where it ends, as a share of the bins' Nyquist frequency. Rings without arc correction are brought to even
    bins first. Raises ValueError for an unknown window, a cutoff that is not in (0, 1], and another shape.
    """
    if window not in FILTERS or not 0 < cutoff <= 1:
        raise ValueError(f"window {window!r}, cutoff {cutoff}; use one of {', '.join(FILTERS)}, and a cutoff of 0 to 1")
    angles = np.asarray(beam.theta)
    if tuple(p.shape[-2:]) != (len(angles), beam.bins):
        raise ValueError(f"line integrals {tuple(p.shape)}, but the lines are {len(angles)} angles x {beam.bins} bins")
    lead = p.shape[:-2]
    rows = p.reshape(-1, len(angles), beam.bins)
    centre = (beam.bins - 1) / 2 + beam.bin_offset
    if beam.radius_mm is not None:  # to even bins around the axis
        even = torch.from_numpy((np.arange(beam.bins) - centre) * beam.bin_mm)
        rows = _between(rows, beam.bin_at(even).to(p).expand(len(angles), -1))
    rows = _filtered(rows, beam.bin_mm, window, cutoff)
    height, width = beam.slice_shape
    y = ((height - 1) / 2 - torch.arange(height, dtype=torch.float64)) * beam.pixel_mm
    x = (torch.arange(width, dtype=torch.float64) - (width - 1) / 2) * beam.pixel_mm
    image = rows.new_zeros(len(rows), height * width)
    for k, (angle, weight) in enumerate(zip(angles, _weights(angles), strict=True)):
        shift = (x * math.cos(angle) + y[:, None] * math.sin(angle)).flatten()
        image += weight * _between(rows[:, k : k + 1], (shift / beam.bin_mm + centre).to(p)[None])[:, 0]
    return image.reshape(*lead, height, width)


def emission_integrals(y: Tensor, factors: Tensor, background: Tensor | None = None) -> Tensor:
    """The line integrals of activity, (y - background) / factors like y; dead bins (factors of 0) are interpolated."""
    trues = y if background is None else y - background
    return _filled(trues / factors.clamp(min=1e-30), (factors > 0).expand(y.shape))


def transmission_integrals(y: Tensor, blank: Tensor, background: Tensor | None = None) -> Tensor:
    """The line integrals of mu, log(blank / (y - background)) like y; dead bins (a blank of 0) are interpolated.

    Bins with less than FEWEST counts above the background count as such, which biases dark lines: few counts need
    `transmission.map_transmission`.
    """
    trues = (y if background is None else y - background).clamp(min=FEWEST)
    return _filled((blank.clamp(min=1e-30) / trues).log(), (blank > 0).expand(y.shape))


def _filtered(rows: Tensor, bin_mm: float, window: str, cutoff: float) -> Tensor:
    """Each row convolved with the windowed ramp, along the last axis."""
    n = 2 ** math.ceil(math.log2(2 * rows.shape[-1]))
    k = torch.arange(n, dtype=torch.float64)
    k = torch.minimum(k, n - k)
    kernel = torch.where(k % 2 == 1, -1 / (math.pi * k.clamp(min=1) * bin_mm) ** 2, 0.0)
    kernel[0] = 1 / (4 * bin_mm**2)
    share = torch.fft.rfftfreq(n, dtype=torch.float64) * 2 / cutoff  # of the cutoff
    ramp = torch.fft.rfft(kernel).real * bin_mm * torch.where(share <= 1, FILTERS[window](share), 0.0)
    return torch.fft.irfft(torch.fft.rfft(rows, n) * ramp.to(rows), n)[..., : rows.shape[-1]]


def _weights(angles: np.ndarray) -> list[float]:
    """The share of half a turn that each angle stands for, radians."""
    order = np.argsort(angles % np.pi)
    ordered = (angles % np.pi)[order]
    gaps = np.diff(ordered, append=ordered[0] + np.pi)
    weights = np.empty(len(angles))
    weights[order] = (gaps + np.roll(gaps, 1)) / 2
    return weights.tolist()


def _between(rows: Tensor, at: Tensor) -> Tensor:
    """Rows (item, angle, bin) at bins with fractions (angle, point), linearly; 0 outside."""
    last = rows.shape[-1] - 1
    inside = (at >= 0) & (at <= last)
    first = at.floor().clamp(0, max(0, last - 1))
    share = at - first
    first = first.long()[None].expand(len(rows), *first.shape)
    low, high = rows.gather(2, first), rows.gather(2, (first + 1).clamp(max=last))
    return torch.where(inside, low + share * (high - low), 0.0)


def _filled(p: Tensor, known: Tensor) -> Tensor:
    """p with what is not known interpolated along the bins; 0 in rows of which nothing is known."""
    if known.all():
        return p
    rows, alive = p.reshape(-1, p.shape[-1]).cpu().double().numpy(), known.reshape(-1, p.shape[-1]).cpu().numpy()
    bins = np.arange(p.shape[-1])
    filled = [np.interp(bins, bins[a], r[a]) if a.any() else 0 * r for r, a in zip(rows, alive, strict=True)]
    return torch.from_numpy(np.stack(filled)).to(p).reshape(p.shape)
