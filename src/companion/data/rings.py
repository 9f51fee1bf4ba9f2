"""Regular rings of detectors, found from where the detectors are, and the line of each of their pairs.

    rings = Rings.of(centres)  # (detector, 3), mm
    angle, bin, turned = rings.lines(rings.place[i], rings.place[j], bins)

A pair of places i > j of n around a ring lies on the line of angle first + pi (i + j) / n at R cos(pi (i - j) / n) from
the axis. So there are n angles over half a turn and bins of half a place, of which every angle has every other one:
each line has its own bin, where a sinogram of n / 2 angles interleaves two and turns each line by pi / 2n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from companion.data.scan_geometry import Geometry
from companion.operators.cylinder import Cylinder

OFF = 1 / 3  # of the distance of neighbours: a detector may lie so far from its place on a regular ring
SAME_MM = 0.01  # positions closer than this are one
EMPTY = 2  # there may be so many places for each detector: gaps between blocks


@dataclass(frozen=True, eq=False)
class Rings:
    """`rings` circles, ring_mm apart and around the z axis, of `places` each, anticlockwise as seen from +z.

    ring, place (detector,): where each detector is; places without one are gaps. radius_mm: of the middles of the
    detectors. first_rad: the angle of place 0, x to y. off_mm: how far the worst detector lies from its place.
    """

    ring: np.ndarray = field(repr=False)
    place: np.ndarray = field(repr=False)
    rings: int
    places: int
    radius_mm: float
    ring_mm: float
    first_rad: float
    off_mm: float

    @classmethod
    def of(cls, centres: np.ndarray, length_mm: float = 1.0) -> Rings:
        """The rings of detectors with these middles (detector, 3) in mm; length_mm: along the axis, if there is one.

        Raises ValueError, with what was found, for detectors that are no regular rings around the z axis.
        """
        x, y, z = np.asarray(centres, np.float64).T
        from_axis = np.hypot(x, y)
        low, high = from_axis.min(), from_axis.max()
        radius = (low + high) / 2
        if not np.isfinite(centres).all() or not low > 0:
            raise ValueError("detectors in the axis, or nowhere; expected rings around the z axis")
        around, columns = _distinct(np.arctan2(y, x), 2 * math.pi, SAME_MM / radius)
        heights, levels = _distinct(z, math.inf, SAME_MM)
        places, first, place = _around(around)
        rings, ring = _along(heights)
        pitch = 2 * radius * math.sin(math.pi / places)
        ring_mm = (heights[-1] - heights[0]) / (rings - 1) if rings > 1 else length_mm
        ring, place = ring[levels], place[columns]
        angle = first + 2 * math.pi * place / places
        ideal = np.stack([radius * np.cos(angle), radius * np.sin(angle), heights[0] + ring * ring_mm], 1)
        off = float(np.linalg.norm(centres - ideal, axis=1).max())
        allowed = OFF * min(pitch, ring_mm)
        found = (
            f"{len(x)} detectors {low:.4g} to {high:.4g} mm from the axis, at {len(around)} angles and {len(heights)} "
            "heights"
        )
        if off > allowed:
            raise ValueError(
                f"{found}, are no regular rings: of {rings} rings of {places} places, which fit best, the worst "
                f"detector is {off:.3g} mm off, and {allowed:.3g} mm are allowed"
            )
        if len(np.unique(ring * places + place)) < len(x):
            raise ValueError(f"{found}, are no regular rings: some share a place (layers of depth, or listed twice)")
        return cls(ring, place, rings, places, float(radius), float(ring_mm), float(first), off)

    def __str__(self) -> str:
        gaps = self.rings * self.places - len(self.ring)
        return (
            f"{self.rings} rings of {self.places} places ({len(self.ring)} detectors"
            + (f", {gaps} gaps" if gaps else "")
            + f"), radius {self.radius_mm:.4g} mm, {self.ring_mm:.4g} mm apart"
            + (f", up to {self.off_mm:.2g} mm off their places" if self.off_mm > SAME_MM else "")
        )

    @property
    def bin_mm(self) -> float:
        """The distance of bins along the ring: half a place."""
        return math.pi * self.radius_mm / self.places

    @property
    def angles(self) -> tuple[float, ...]:
        """Those of the lines, in radians."""
        return tuple(map(float, self.first_rad + math.pi * np.arange(self.places) / self.places))

    @property
    def at(self) -> np.ndarray:
        """The detector (ring, place) at each place, -1 in gaps."""
        at = np.full((self.rings, self.places), -1)
        at[self.ring, self.place] = np.arange(len(self.ring))
        return at

    def check_bins(self, bins: int) -> int:
        """bins itself; ValueError unless they are centred on lines that there are: places - 1, or 2, 4, ... fewer."""
        if not 0 < bins < self.places or (self.places - bins) % 2 == 0:
            raise ValueError(
                f"{bins} bins of a ring of {self.places} places; use {self.places - 1}, or fewer by an even number"
            )
        return bins

    def geometry(self, bins: int) -> Geometry:
        """Angles and bins of the slices, without arc correction; x and y are those of the detectors."""
        return Geometry(
            self.places,
            self.check_bins(bins),
            self.bin_mm,
            radius_mm=self.radius_mm,
            first_angle_deg=math.degrees(self.first_rad),
        )

    def cylinder(
        self,
        shape: tuple[int, int, int],
        voxel_mm: tuple[float, float],
        bins: int,
        *,
        max_difference: int | None = None,
        span: int = 1,
        tof: tuple[int, float, float] = (1, 0.0, 0.0),
    ) -> Cylinder:
        """The scanner around a volume of `shape`; tof: bins, their width and the resolution in mm."""
        return Cylinder(
            shape, voxel_mm, self.angles, self.check_bins(bins), self.bin_mm, self.rings, self.ring_mm, self.radius_mm,
            self.rings - 1 if max_difference is None else max_difference, span, *tof, arc_corrected=False,
        )  # fmt: skip

    def lines(self, first: np.ndarray, second: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Angle and bin of pairs of places, and whether the first is the lower end; bin -1 where the pair has none.

        The lower end of the line x cos + y sin = s is the one on the side of (sin, -cos), as in `Cylinder`.
        """
        n = self.places
        total, apart = first + second, np.abs(first - second)
        half = n - 2 * apart  # twice the bins from the axis
        wrapped = total >= n  # the same line, seen from the other side
        at = np.where(wrapped, -half, half) + bins - 1
        inside = (apart > 0) & (at >= 0) & (at <= 2 * (bins - 1))
        return total % n, np.where(inside, at // 2, -1), (first < second) ^ wrapped


# --------------------------------------------------------------------------------------------------------------- parts


def _distinct(values: np.ndarray, period: float, same: float) -> tuple[np.ndarray, np.ndarray]:
    """The different values in order, and which of them each is; those closer than `same` are one."""
    if math.isfinite(period):
        values = (values + same) % period - same  # so that rounding does not part the first from itself
    order = np.argsort(values)
    new = np.diff(values[order], prepend=-math.inf) > same
    which = np.empty(len(values), int)
    which[order] = np.cumsum(new) - 1
    return values[order][new], which


def _fit(count: int, tried: Callable[[int], tuple[float, float, np.ndarray]]) -> tuple[int, float, np.ndarray]:
    """Of so many to EMPTY times as many places those that fit best: their number, the first, the place of each."""
    fits = {n: tried(n) for n in range(count, EMPTY * count + 1)}
    least = min(worst for worst, _, _ in fits.values())
    best = next(n for n, (worst, _, _) in fits.items() if worst <= least + 1e-2)
    return best, *fits[best][1:]


def _around(angles: np.ndarray) -> tuple[int, float, np.ndarray]:
    def tried(n: int) -> tuple[float, float, np.ndarray]:
        first = np.angle(np.exp(1j * n * angles).sum()) / n % (2 * math.pi / n)
        at = (angles - first) * n / (2 * math.pi)
        return float(np.abs(at - np.rint(at)).max()), float(first), np.rint(at).astype(int) % n

    return _fit(len(angles), tried)


def _along(heights: np.ndarray) -> tuple[int, np.ndarray]:
    def tried(n: int) -> tuple[float, float, np.ndarray]:
        at = (heights - heights[0]) / max(heights[-1] - heights[0], SAME_MM) * (n - 1)
        return float(np.abs(at - np.rint(at)).max()), 0.0, np.rint(at).astype(int)

    rings, _, ring = _fit(len(heights), tried) if len(heights) > 1 else (1, 0.0, np.zeros(1, int))
    return rings, ring
