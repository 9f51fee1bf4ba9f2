"""How a scanner's sinogram lies in space, and what its numbers mean: from a JSON file beside it, or by parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np

from companion.operators.pet import ParallelBeam

UNITS = ("kBq/mL", "Bq/mL", "SUV", "counts")  # of the activity; "counts": not calibrated
BY_DOSE = "SUV needs weight_kg and dose_MBq; with uptake_min also half_life_min (F-18: 109.77)"


@dataclass(frozen=True)
class Geometry:
    """A sinogram's angles and bins: bin j of angle k holds the line x cos(theta_k) + y sin(theta_k) = s_j.

    theta_k = first_angle_deg + k span_deg / angles; a negative span turns clockwise. x points to the right of an image
    and y upwards. s_j = (j - (bins - 1) / 2 - bin_offset) bin_mm, or, with the radius_mm of a ring whose bins are not
    arc corrected, R sin of that over R. tof_bins: above 1 the counts have an axis of time of flight in front.
    Raises ValueError for numbers that cannot be.
    """

    angles: int
    bins: int
    bin_mm: float
    bin_offset: float = 0.0
    radius_mm: float | None = None
    first_angle_deg: float = 0.0
    span_deg: float = 180.0
    tof_bins: int = 1

    def __post_init__(self):
        for name in ("angles", "bins", "tof_bins"):
            value = getattr(self, name)
            if isinstance(value, bool) or value != int(value) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
            object.__setattr__(self, name, int(value))
        if not self.bin_mm > 0 or not self.span_deg or not math.isfinite(self.first_angle_deg + self.span_deg):
            raise ValueError(
                f"bin_mm must be positive and angles finite, got bins of {self.bin_mm} mm, first_angle_deg "
                f"{self.first_angle_deg}, span_deg {self.span_deg}"
            )
        self.beam(1, 1.0)

    @classmethod
    def of(cls, values: Mapping) -> Geometry:
        """The geometry of a mapping, as a geometry file holds it; ValueError for names that are unknown or missing."""
        known = [f.name for f in fields(cls)]
        if unknown := [name for name in values if name not in known]:
            raise ValueError(f"geometry: {', '.join(map(str, unknown))} unknown; it takes {', '.join(known)}")
        if missing := [name for name in ("angles", "bins", "bin_mm") if values.get(name) is None]:
            raise ValueError(f"geometry: {', '.join(missing)} missing; it needs angles, bins and bin_mm")
        given = {name: value for name, value in values.items() if value is not None}
        if wrong := [n for n, v in given.items() if isinstance(v, bool) or not isinstance(v, int | float)]:
            raise ValueError(f"geometry: {wrong[0]} must be a number, got {given[wrong[0]]!r}")
        return cls(**given)

    def changed(self, values: Mapping) -> Geometry:
        """The same with the values that are not None."""
        return Geometry.of(asdict(self) | {name: value for name, value in values.items() if value is not None})

    def beam(self, image_size: int, pixel_mm: float) -> ParallelBeam:
        """The lines through square images of `image_size` pixels of `pixel_mm`."""
        degrees = self.first_angle_deg + self.span_deg / self.angles * np.arange(self.angles)
        shape = (image_size, image_size)
        return ParallelBeam(
            shape, np.deg2rad(degrees).tolist(), self.bins, pixel_mm, self.bin_mm, self.bin_offset, self.radius_mm
        )

    @classmethod
    def published(cls, image_size: int, pixel_mm: float) -> Geometry:
        """Twice as many angles as pixels over half a turn, one bin a pixel: the default of the notebooks."""
        return cls(2 * image_size, image_size, pixel_mm)

    def __str__(self) -> str:
        ring = "" if self.radius_mm is None else f", ring of {self.radius_mm:g} mm without arc correction"
        off = f", axis {self.bin_offset:g} bins off the middle" if self.bin_offset else ""
        tof = f", {self.tof_bins} TOF bins" if self.tof_bins > 1 else ""
        return (
            f"{self.angles} angles over {self.span_deg:g} degrees from {self.first_angle_deg:g}, {self.bins} bins of "
            f"{self.bin_mm:g} mm{off}{ring}{tof}"
        )


@dataclass(frozen=True)
class Dosage:
    """What makes activity a standardised uptake value: body weight and injected dose, decayed over the uptake time.

    dose_MBq as injected, uptake_min from there to the time that the activity is given for; with 0 no half-life is
    needed. Raises ValueError for values that cannot be.
    """

    weight_kg: float | None = None
    dose_MBq: float | None = None
    uptake_min: float = 0.0
    half_life_min: float | None = None

    def __post_init__(self):
        for name, most in (("weight_kg", 1000), ("dose_MBq", 1e5), ("half_life_min", 1e7)):
            value = getattr(self, name)
            if value is not None and not 0 < value < most:
                raise ValueError(f"{name} must lie between 0 and {most:g}, got {value}")
        if not 0 <= self.uptake_min < 24 * 60:
            raise ValueError(f"uptake_min must lie between 0 and a day, got {self.uptake_min}")

    def kbq_per_suv(self) -> float:
        """The kBq/mL that are an SUV of 1 (g/mL): decayed dose over body weight. ValueError where it is not known."""
        if self.weight_kg is None or self.dose_MBq is None or (self.uptake_min and self.half_life_min is None):
            raise ValueError(f"the SUV is not known: {BY_DOSE}")
        left = 2 ** (-self.uptake_min / self.half_life_min) if self.uptake_min and self.half_life_min else 1.0
        return self.dose_MBq * left / self.weight_kg  # MBq/kg is kBq/g, and tissue has 1 g/mL

    def kbq(self, units: str) -> float:
        """The kBq/mL that are 1 in `units` of UNITS; 1 for "counts", which are not calibrated."""
        if units not in UNITS:
            raise ValueError(f"units {units!r} are unknown; use one of {', '.join(UNITS)}")
        return {"kBq/mL": 1.0, "Bq/mL": 1e-3, "counts": 1.0}.get(units) or self.kbq_per_suv()
