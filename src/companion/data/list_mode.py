"""List mode of PET sorted into sinograms: slices for 2D methods, or the planes of a `Cylinder`.

    histogram("scan.petsird").write("my_scan.npz", units="kBq/mL")  # slices
    cylinder = read_scanner("scan.petsird").cylinder((48, 96, 96), (2.5, 2.5), bins=121)
    listed = histogram("scan.petsird", cylinder)
    x = osem(*listed.emission(Projector3D(cylinder))).x

Every pair of detectors keeps its own line: bins are not arc corrected, angles not interleaved (`data.rings`). x, y and
z are those of the file; which way they point is not settled in the format.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from companion.data.efficiencies import singles_of
from companion.data.petsird import Scanner, events_of, opened
from companion.data.scan_geometry import Dosage
from companion.data.sinograms import UNKNOWN, write_sinograms
from companion.operators.cylinder import Cylinder
from companion.operators.linear import Diagonal, LinearOperator

LARGEST = 2**32  # bytes of a sinogram


@dataclass(frozen=True, eq=False)
class Listed:
    """The sorted events of a file: arrays (slice, angle, bin), or (1, [tof,] plane, angle, bin) of a `Cylinder`.

    counts: prompts. factors: what the model multiplies line integrals (mm) with, calibration times efficiencies;
    without attenuation, which is not in such files. background: the expected randoms, None without delayed events.
    seen: what became of everything in the file, in words and numbers.
    """

    scanner: Scanner
    bins: int
    counts: np.ndarray
    factors: np.ndarray
    background: np.ndarray | None
    seen: Mapping[str, int]

    def __str__(self) -> str:
        return ", ".join(f"{n} {what}" for what, n in self.seen.items() if n)

    def emission(
        self, P: LinearOperator, attenuation: Tensor | float = 1.0
    ) -> tuple[Tensor, LinearOperator, Tensor | None]:
        """Counts (1, ...), the model and the background, as `osem` and the like take them.

        P: the projector, into the shape of the counts. attenuation: factors that fit it, exp(-integral of mu).
        """
        y = torch.from_numpy(self.counts.astype(np.float32))[None]
        r = None if self.background is None else torch.from_numpy(self.background)[None].expand(y.shape)
        return y, Diagonal(attenuation * torch.from_numpy(self.factors), P.range_shape) @ P, r

    def write(
        self,
        path: str | os.PathLike,
        *,
        units: str,
        slices: tuple[int, int] | None = None,
        attenuation: np.ndarray | float = 1.0,
        dosage: Dosage = UNKNOWN,
    ) -> Path:
        """The path of the .npz of the slices written, with its .json beside it: a scan as `read_sinograms` reads it.

        units: of the activity that the calibration is for, "counts" if it is not calibrated. slices: the first and the
        one after the last, by default all. attenuation: factors that fit these slices. Raises ValueError for planes of
        a cylinder, and for slices that counted nothing above the randoms, which no method can use.
        """
        if self.counts.ndim != 3:
            raise ValueError("planes of a cylinder are no slices; sort the file without a cylinder")
        first, last = slices or (0, len(self.counts))
        if not 0 <= first < last <= len(self.counts):
            raise ValueError(f"slices={slices} of {len(self.counts)}; give the first and the one after the last")
        counts, randoms = self.counts[first:last], self.background
        randoms = None if randoms is None else randoms[first:last]
        above = counts.sum((1, 2)) - (0 if randoms is None else randoms.sum((1, 2), dtype=np.float64))
        if empty := (first + np.flatnonzero(above <= 0)).tolist():
            raise ValueError(
                f"slices {', '.join(map(str, empty))} of {len(self.counts)} counted nothing above their randoms; give "
                "slices to leave them out"
            )
        rings, factors = self.scanner.rings, self.factors[first:last] * attenuation
        return write_sinograms(
            path, counts, geometry=rings.geometry(self.bins), units=units, factors=factors,
            background=randoms, slice_mm=rings.ring_mm / (2 if rings.rings > 1 else 1), dosage=dosage,
        )  # fmt: skip


def histogram(
    path: str | os.PathLike,
    cylinder: Cylinder | None = None,
    *,
    bins: int | None = None,
    max_difference: int | None = None,
    calibration: float | None = None,
) -> Listed:
    """The events of a PETSIRD file in the planes of a cylinder, or in slices; one block of time is held at a time.

    cylinder: of `Scanner.cylinder`. Without one, a pair counts for the slice half-way between its rings (Daube-
    Witherspoon and Muehllehner 1987), half a ring apart, with `bins` (all in coincidence) and ring differences up to
    `max_difference` (all); its factors are summed over pairs and know how much longer oblique lines are.
    calibration: counts that one unit of activity gives per mm of a line at efficiency 1, by default as the file says.
    The background is made of the singles rates that explain the delayed events best (`efficiencies.singles_of`).
    Raises FileNotFoundError, Unreadable for damaged files and scanners that are no regular rings, or ValueError.
    """
    with opened(path) as (scanner, _, blocks):
        efficiencies, layout = scanner.efficiencies, _layout(scanner, cylinder, bins, max_difference)
        scale = efficiencies.calibration if calibration is None else calibration
        if not 0 < scale < float("inf"):
            raise ValueError(f"{path}: a calibration of {scale:g}; give calibration, 1 for activity in units of counts")
        counts, fans = np.zeros(layout.shape, np.int32), np.zeros(len(scanner.rings.ring))
        seen: Counter[str] = Counter()
        for kind, events in events_of(scanner, blocks, seen):
            pairs, tof = events[:, :2] // efficiencies.energies, events[:, 2]
            alive = efficiencies(pairs[:, 0], pairs[:, 1]) > 0
            seen[f"{kind} events"] += len(pairs)
            seen[f"{kind} events of pairs with efficiency 0, left out"] += int((~alive).sum())
            if kind == "delayed":
                fans += np.bincount(pairs[alive].ravel(), minlength=len(fans))
                continue
            at = layout.index(pairs[alive, 0], pairs[alive, 1], tof[alive])
            seen["prompt events outside of the bins and ring differences, left out"] += int((at < 0).sum())
            np.add.at(counts.ravel(), at[at >= 0], 1)
    factors, randoms = layout.expected(singles_of(fans, efficiencies) if fans.any() else None)
    shape = layout.shape[1:]
    if cylinder is not None:
        shape, flat = cylinder.sinogram_shape, (1, *([1] if layout.tof_bins > 1 else []), *shape)
        factors, randoms = factors.reshape(flat), None if randoms is None else randoms.reshape(flat)
    return Listed(scanner, layout.bins, counts.reshape(shape), np.float32(scale) * factors, randoms, dict(seen))


# --------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where pairs of detectors go: plane (ring of the lower end, of the upper end), -1 for none."""

    scanner: Scanner
    bins: int
    plane: np.ndarray
    tof_bins: int = 1
    slices: bool = True

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.tof_bins, int(self.plane.max()) + 1, self.scanner.rings.places, self.bins)

    def index(self, first: np.ndarray, second: np.ndarray, tof: np.ndarray) -> np.ndarray:
        """The flat index (event,) of pairs of detectors with their TOF bins, -1 outside."""
        rings = self.scanner.rings
        angle, at, below = rings.lines(rings.place[first], rings.place[second], self.bins)
        low, high = np.where(below, first, second), np.where(below, second, first)
        plane = self.plane[rings.ring[low], rings.ring[high]]
        # TOF grows towards the second detector: upwards where the first is the lower end
        time = np.where(below, tof, self.tof_bins - 1 - tof) if self.tof_bins > 1 else 0
        _, planes, angles, bins = self.shape
        return np.where((at >= 0) & (plane >= 0), ((time * planes + plane) * angles + angle) * bins + at, -1)

    def expected(self, rates: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Efficiencies (plane, angle, bin) and the random events that singles rates (detector,) make, per TOF bin."""
        rings, efficiencies = self.scanner.rings, self.scanner.efficiencies
        first, second = np.tril_indices(rings.places, -1)
        angle, at, below = rings.lines(first, second, self.bins)
        first, second, angle, at, below = (v[at >= 0] for v in (first, second, angle, at, below))
        length = 2 * rings.radius_mm * np.sin(np.pi * (first - second) / rings.places)  # as seen along the axis
        factors, detectors = np.zeros(self.shape[1:], np.float32), rings.at
        randoms = None if rates is None else np.zeros(self.shape[1:], np.float32)
        # the model of planes adds up the lines of their pairs of rings, that of slices has one line for all
        share = np.ones(len(factors)) if self.slices else 1 / np.bincount(self.plane[self.plane >= 0])
        for one, other in product(range(rings.rings), repeat=2):
            plane = np.where(below, self.plane[one, other], self.plane[other, one])
            i, j = detectors[one, first], detectors[other, second]
            there = (plane >= 0) & (i >= 0) & (j >= 0)
            i, j, where = i[there], j[there], (plane[there], angle[there], at[there])
            found = efficiencies(i, j)
            longer = np.hypot(1, (one - other) * rings.ring_mm / length[there]) if self.slices else 1
            factors[where] += share[where[0]] * longer * found
            if rates is not None and randoms is not None:
                randoms[where] += np.where(found > 0, rates[i] * rates[j], 0) / self.tof_bins
        return factors, randoms


def _layout(scanner: Scanner, cylinder: Cylinder | None, bins: int | None, max_difference: int | None) -> _Layout:
    rings = scanner.rings
    plane = np.full((rings.rings, rings.rings), -1)
    if cylinder is None:
        most, ring = rings.rings - 1 if max_difference is None else max_difference, np.arange(rings.rings)
        if not 0 <= most < rings.rings:
            raise ValueError(f"ring differences up to {most} of {rings.rings} rings; use 0 to {rings.rings - 1}")
        plane = np.where(np.abs(ring[:, None] - ring) <= most, ring[:, None] + ring, -1)
        layout = _Layout(scanner, rings.check_bins(scanner.widest if bins is None else bins), plane)
    else:
        if bins is not None or max_difference is not None:
            raise ValueError("bins and max_difference are those of the cylinder; give them to Scanner.cylinder")
        tof = scanner.tof if cylinder.tof_bins > 1 else (1, 0.0, 0.0)
        given = cylinder.tof_bins, cylinder.tof_bin_mm, cylinder.tof_fwhm_mm
        if (rings.angles, rings.bin_mm, rings.rings, rings.ring_mm, rings.radius_mm, *tof, False) != (
            cylinder.theta, cylinder.bin_mm, cylinder.rings, cylinder.ring_mm, cylinder.radius_mm, *given,
            cylinder.arc_corrected,
        ):  # fmt: skip
            raise ValueError(f"the cylinder is not that of {scanner.path}; use read_scanner(...).cylinder(...)")
        rings.check_bins(cylinder.bins)
        for k, pairs in enumerate(cylinder.planes):
            plane[tuple(np.transpose(pairs))] = k
        layout = _Layout(scanner, cylinder.bins, plane, cylinder.tof_bins, False)
    if 4 * np.prod(layout.shape, dtype=float) > LARGEST:
        raise ValueError(
            f"sinograms of {' x '.join(map(str, layout.shape))} (TOF bins, planes, angles, bins) are over "
            f"{LARGEST >> 30} GiB; use fewer bins, a larger span, a smaller max_difference, or slices"
        )
    return layout
