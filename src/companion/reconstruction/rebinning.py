"""3D sinograms to slices, so that 2D methods and 2D priors can have them: single-slice and Fourier rebinning.

    slices = ssrb(y, scanner)                         # of counts: still counts, blurred along z off the axis
    p = emission_integrals(y, factors, background)    # line integrals; then, of a ring without arc correction,
    slices = fore(*arc_corrected(p, scanner))         # not blurred, but no counts any more

Slices lie half a ring apart; `rebinned_model` is the model of both.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from companion.operators.cylinder import Cylinder
from companion.operators.linear import Diagonal, LinearOperator
from companion.operators.pet import ParallelBeam, Projector

LOW = 2  # samples of either frequency, bins twice padded, up to which transforms come from nowhere in particular
NEAR = 2.0  # slices by which lines may rise up to the rim of the field where low frequencies are taken from them
COARSE = 2.0  # bins by which lines at the rim of the field may lie apart from angle to angle


def ssrb(y: Tensor, scanner: Cylinder) -> Tensor:
    """Slices (..., 1, 2 rings - 1, angle, bin) of 3D counts (..., 1, [tof,] plane, angle, bin): sums, so Poisson still.

    A line between two rings counts for the slice half-way (Daube-Witherspoon and Muehllehner 1987), which blurs what is
    far from the axis along z; the slices are half a ring apart. TOF bins are added up.
    """
    _check_shape(y, scanner)
    y = y.sum(-4) if scanner.tof_bins > 1 else y
    middles = torch.tensor([sum(plane[0]) for plane in scanner.planes], device=y.device)
    slices = y.new_zeros(*y.shape[:-3], 2 * scanner.rings - 1, *y.shape[-2:])
    return slices.index_add_(-3, middles, y)


def arc_corrected(p: Tensor, scanner: Cylinder) -> tuple[Tensor, Cylinder]:
    """Line integrals (..., angle, bin) at even bins, linear in between, and the scanner that measures there.

    Bins of the width of the middle ones, as far out as there are lines. Not for counts: bins that share lines are not
    independent, and the model of a scan knows uneven bins.
    """
    if scanner.arc_corrected:
        return p, scanner
    lines = scanner.shifts_mm
    missing = max(0, math.ceil((scanner.bins - 1) / 2 - lines[-1] / scanner.bin_mm - 1e-6))
    even = replace(scanner, bins=scanner.bins - 2 * missing, arc_corrected=True)
    at = np.interp(even.shifts_mm, lines, np.arange(scanner.bins))
    first = np.floor(at).astype(np.int64).clip(0, max(0, scanner.bins - 2))
    low, high = (torch.from_numpy(first + i).to(p.device).clamp(max=scanner.bins - 1) for i in (0, 1))
    share = torch.from_numpy(at - first).to(p)
    return (1 - share) * p[..., low] + share * p[..., high], even


def fore(p: Tensor, scanner: Cylinder, *, field_mm: float | None = None) -> Tensor:
    """Slices (..., 1, 2 rings - 1, angle, bin) of 3D line integrals p (..., 1, plane, angle, bin): Fourier rebinning.

    p: activity mm, summed over the pairs of rings of each plane, as of `Projector3D`: randoms and scatter subtracted,
    attenuation and calibration divided out (`fbp.emission_integrals`), bins even (`arc_corrected`). The result has the
    units of `rebinned_model` of the activity. It is no longer Poisson distributed, and may be negative.

    Where the Fourier transform of a sinogram over bins (omega, 1/mm) and a whole turn (k) is large, it comes from
    t = -k / omega mm along the lines, from their middle. There lines of ring difference d have risen by
    t d ring_mm / (2 radius_mm), and so far is the transform of each plane moved; a slice is the mean of what arrives.
    Frequencies up to LOW samples stay half-way, as in `ssrb`, and are taken from lines that rise by little (NEAR).
    Those from beyond field_mm of the axis, |k| > |omega| field_mm, are 0; by default it is as wide as the bins.
    Angles: even, over half a turn or a whole one, in either direction. Raises ValueError for TOF, bins that are not arc
    corrected, uneven angles, too few of them for the field, and another shape. [defrise1997]
    """
    if scanner.tof_bins > 1:
        raise ValueError(f"{scanner.tof_bins} TOF bins: add them up first, and give the scanner without (tof_bins=1)")
    if not scanner.arc_corrected:
        raise ValueError("bins that are not even (arc_corrected=False): rebin with fore(*arc_corrected(p, scanner))")
    _check_shape(p, scanner)
    field_mm = scanner.bins / 2 * scanner.bin_mm if field_mm is None else field_mm
    step, half = _even_angles(scanner, field_mm)
    padded, slices = 2 * scanner.bins, 2 * scanner.rings - 1
    k = 2 * math.pi * torch.fft.fftfreq(2 * half, step, dtype=torch.float64)[:, None]
    omega = 2 * math.pi * torch.fft.rfftfreq(padded, scanner.bin_mm, dtype=torch.float64)
    low = (k.abs() < LOW + 0.5) & (torch.arange(len(omega)) <= LOW)
    inside = k.abs() <= omega * field_mm + LOW + 0.5
    t = torch.where(low, 0.0, -k / omega.clamp(min=1e-9)).clamp(-field_mm, field_mm).to(p)
    low, inside = low.to(p.device), inside.to(p.device)

    planes = p.reshape(-1, *p.shape[-3:])
    total = torch.zeros(len(planes), slices, *t.shape, dtype=p.dtype.to_complex(), device=p.device)
    arrived = p.new_zeros(slices, *t.shape)
    for difference, planes_of in _opposites(scanner).items():
        rise = difference * scanner.ring_mm / (2 * np.sqrt(scanner.radius_mm**2 - scanner.shifts_mm**2))
        cosine = torch.from_numpy(1 / np.sqrt(1 + rise**2)).to(p)
        shift = t * (difference / scanner.radius_mm)  # in slices, which are half a ring apart
        share = 1.0 if difference else 0.5  # a direct plane is its own opposite
        used = share * (~low if difference > max(1.0, NEAR * scanner.radius_mm / field_mm) else torch.ones_like(low))
        offsets = range(math.floor(shift.min().item()), math.ceil(shift.max().item()) + 1)
        weights = [used * (1 - (shift - offset).abs()).clamp(min=0) for offset in offsets]
        for middle, pairs, here, opposite in planes_of:
            one, other = cosine * planes[:, here], (cosine * planes[:, opposite]).flip(-1)
            turn = torch.cat([one, other], -2) if half == len(scanner.theta) else (one + other.roll(half, -2)) / 2
            transform = torch.fft.fft(torch.fft.rfft(turn, padded), dim=-2)
            for offset, weight in zip(offsets, weights, strict=True):
                if 0 <= middle + offset < slices:
                    total[:, middle + offset] += weight * transform
                    arrived[middle + offset] += weight * pairs
    mean = torch.where(inside & (arrived > 1e-6), total / arrived.clamp(min=1e-6), 0)
    turn = torch.fft.irfft(torch.fft.ifft(mean, dim=-2), padded)[..., : scanner.bins]
    turn = (turn + turn.flip(-1).roll(half, -2)) / 2  # a line is seen from both sides
    found = _pairs(scanner).to(p)[:, None, None] * turn[..., : len(scanner.theta), :]
    return found.reshape(*p.shape[:-3], *found.shape[1:])


def rebinned_model(scanner: Cylinder) -> LinearOperator:
    """The model of `ssrb` and `fore` of a scan: pairs of rings per slice times a stack of slices (2 rings - 1, y, x).

    As if all lines lay in the slices; attenuation and calibration are further factors.
    """
    shape = (2 * scanner.rings - 1, *scanner.shape[1:])
    ring = None if scanner.arc_corrected else scanner.radius_mm
    beam = ParallelBeam(shape, scanner.angles, scanner.bins, scanner.voxel_mm[1], scanner.bin_mm, radius_mm=ring)
    return Diagonal(_pairs(scanner)[:, None, None], beam.sinogram_shape) @ Projector(beam)


# --------------------------------------------------------------------------------------------------------------- parts


def _check_shape(y: Tensor, scanner: Cylinder) -> None:
    if tuple(y.shape[-len(scanner.sinogram_shape) :]) != scanner.sinogram_shape:
        raise ValueError(f"counts {tuple(y.shape)}, but the scanner measures (..., {scanner.sinogram_shape})")


def _pairs(scanner: Cylinder) -> Tensor:
    """How many pairs of rings have their middle in each slice, (2 rings - 1,)."""
    pairs = torch.zeros(2 * scanner.rings - 1)
    for plane in scanner.planes:
        pairs[sum(plane[0])] += len(plane)
    return pairs


def _even_angles(scanner: Cylinder, field_mm: float) -> tuple[float, int]:
    """The step of the angles in radians, signed, and how many fill half a turn. Raises ValueError, see `fore`."""
    theta = np.asarray(scanner.theta)
    n, step = len(theta), float(np.diff(theta).mean()) if len(theta) > 1 else math.pi
    turns = 2 if n * abs(step) > 1.5 * math.pi else 1
    off = np.abs(np.append(theta, theta[0] + math.copysign(turns * math.pi, step)) - theta[0] - step * np.arange(n + 1))
    if off.max() > 1e-2 * abs(step) or n % turns:
        raise ValueError(
            f"{n} angles from {math.degrees(theta[0]):.5g} to {math.degrees(theta[-1]):.5g} degrees: Fourier rebinning "
            "takes even ones over half a turn, or an even number over a whole one"
        )
    needed = math.ceil(math.pi * field_mm / (COARSE * scanner.bin_mm) - 1e-6)
    if not field_mm > 0 or n // turns < needed:
        raise ValueError(
            f"{n // turns} angles in half a turn, and a field up to field_mm={field_mm:.5g} mm from the axis takes "
            f"{needed} for bins of {scanner.bin_mm:.4g} mm; give the radius of the object, or add up bins"
        )
    return step, n // turns


def _opposites(scanner: Cylinder) -> dict[float, list[tuple[int, int, int, int]]]:
    """By mean ring difference, not negative: middle, pairs, and number of the planes and of their opposite ones."""
    found = {}
    for i, plane in enumerate(scanner.planes):
        difference = round(sum(last - first for first, last in plane) / len(plane), 6)
        found[sum(plane[0]), difference] = i
    grouped: dict[float, list[tuple[int, int, int, int]]] = {}
    for (middle, difference), i in found.items():
        if difference >= 0:
            opposite = found[middle, -difference]
            grouped.setdefault(difference, []).append((middle, len(scanner.planes[i]), i, opposite))
    return grouped
