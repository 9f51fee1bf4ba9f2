"""Standardised uptake values of PET from DICOM's attributes: activity per injected dose and body weight.

SUV = activity concentration [Bq/mL] x body weight [g] / dose at the time that the activity is given for [Bq]; tissue
counts as 1 g/mL. After QIBA's vendor-neutral calculation from DICOM (Kinahan & Fletcher 2010; QIBA FDG-PET profile).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from pydicom import Dataset

from companion.data.dicom.headers import dataset
from companion.data.intake.records import Unreadable

LONGEST = 24 * 3600  # s between injection and scan beyond which a date must be wrong


@dataclass(frozen=True)
class Suv:
    """What turns the values of a PET series into body-weight SUV (g/mL): SUV = factor * value.

    unit: of the values, "Bq/mL", "g/mL" or "counts". weight_kg, dose_MBq (as injected), half_life_s, uptake_s from
    injection to the time that the values are given for (0 where they are decay corrected to the injection).
    """

    factor: float
    unit: str
    weight_kg: float | None = None
    dose_MBq: float | None = None
    half_life_s: float | None = None
    uptake_s: float | None = None


def suv_of(files: Sequence[str | os.PathLike]) -> Suv:
    """The SUV factor of the files of a PET series.

    Raises Unreadable where weight, dose, half-life or times are missing or impossible, where attenuation or decay are
    not corrected, and for other units than Bq/mL, SUV by weight, or Philips' counts with their factors.
    """
    path = Path(files[0])
    d = dataset(path)
    try:
        return _suv(path, d, [path, *map(Path, files[1:])])
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        raise Unreadable(path, f"its PET attributes cannot be read ({error}); no SUV") from error


def _suv(path: Path, d: Dataset, files: Sequence[Path]) -> Suv:
    if d.get("Modality") != "PT":
        raise Unreadable(path, f"modality {d.get('Modality', 'unknown')}, not PET: it has no SUV")
    units, kind = str(d.get("Units", "")), str(d.get("SUVType", "") or "BW")
    if units == "GML":
        if kind != "BW":
            raise Unreadable(path, f"SUV by {kind} (lean mass or surface), not by body weight; export it in Bq/mL")
        return Suv(1.0, "g/mL")
    if units == "CNTS":
        factor = d.get((0x7053, 0x1000))
        if factor is None or not float(factor.value) > 0:
            raise Unreadable(path, "counts without Philips' SUV factor (7053,1000); export it in Bq/mL")
        return Suv(float(factor.value), "counts")
    if units != "BQML":
        raise Unreadable(path, f"units {units or 'unknown'}; expected BQML (Bq/mL)")
    corrected = {str(c) for c in d.get("CorrectedImage", None) or ()}
    if missing := {"ATTN", "DECY"} - corrected:
        raise Unreadable(path, f"not corrected for {' and '.join(sorted(missing))} (CorrectedImage): it has no SUV")
    if not d.get("RadiopharmaceuticalInformationSequence"):
        raise Unreadable(path, "does not say what was injected (no RadiopharmaceuticalInformationSequence): no SUV")
    info = d.RadiopharmaceuticalInformationSequence[0]
    weight = _positive(path, d, "PatientWeight", "body weight", 1000)
    dose = _positive(path, info, "RadionuclideTotalDose", "injected dose", 1e12)
    half_life = _positive(path, info, "RadionuclideHalfLife", "half-life", 1e9)
    if dose < 1e4:
        raise Unreadable(path, f"an injected dose of {dose:g} Bq; it seems to be in MBq, DICOM wants Bq: correct it")
    how = str(d.get("DecayCorrection", ""))
    if how == "ADMIN":
        uptake = 0.0
    elif how == "START":
        uptake = (_reference(path, d, files, half_life) - _injection(path, d, info)).total_seconds()
        if uptake < 0 and not info.get("RadiopharmaceuticalStartDateTime"):
            uptake += 24 * 3600  # injected before midnight; only the hour is stored
        if not 0 <= uptake < LONGEST:
            raise Unreadable(path, f"an injection {uptake / 3600:.1f} h before the scan; a date or time is wrong")
    else:
        raise Unreadable(path, f"decay correction {how or 'unknown'}; expected START or ADMIN")
    decayed = dose * 2 ** (-uptake / half_life)
    return Suv(1000 * weight / decayed, "Bq/mL", weight, dose / 1e6, half_life, uptake)


def _positive(path: Path, d: Dataset, name: str, what: str, most: float) -> float:
    value = float(d.get(name) or 0)
    if not 0 < value < most:
        raise Unreadable(path, f"{what} ({name}) is {'missing' if not value else value}: no SUV without it")
    return value


def _injection(path: Path, d: Dataset, info: Dataset) -> datetime:
    whole = str(info.get("RadiopharmaceuticalStartDateTime", "") or "")
    if whole:
        return _moment(path, whole[:8], whole[8:], "RadiopharmaceuticalStartDateTime")
    time = str(info.get("RadiopharmaceuticalStartTime", "") or "")
    day = str(d.get("SeriesDate", "") or d.get("AcquisitionDate", "") or "")
    return _moment(path, day, time, "RadiopharmaceuticalStartTime")


def _reference(path: Path, d: Dataset, files: Sequence[Path], half_life: float) -> datetime:
    """The time that the values are decay corrected to: the start of the series, unless it was written afterwards."""
    acquired = []
    for one in (d, *(dataset(f) for f in files[1:])):
        day = str(one.get("AcquisitionDate", "") or d.get("SeriesDate", ""))
        acquired.append((_moment(path, day, str(one.get("AcquisitionTime", "")), "AcquisitionTime"), one))
    first, of_first = min(acquired, key=lambda pair: pair[0])
    series = _moment(path, str(d.get("SeriesDate", "")), str(d.get("SeriesTime", "")), "SeriesTime")
    if series <= first:
        return series
    ge = d.get((0x0009, 0x100D))
    if ge is not None and str(ge.value or ""):
        whole = ge.value.decode() if isinstance(ge.value, bytes) else str(ge.value)
        return _moment(path, whole[:8], whole[8:], "GE's scan date")
    reference, duration = (float(of_first.get(n) or 0) / 1000 for n in ("FrameReferenceTime", "ActualFrameDuration"))
    if reference <= 0 or duration <= 0:
        raise Unreadable(path, "its series was written after the scan, and nothing says when the scan began: no SUV")
    decay = math.log(2) / half_life
    average = math.log(decay * duration / -math.expm1(-decay * duration)) / decay  # when counts are average
    return first + timedelta(seconds=average - reference)


def _moment(path: Path, day: str, time: str, name: str) -> datetime:
    time = time.split("+")[0].split("-")[0].strip()
    whole, _, fraction = time.partition(".")
    try:
        if len(whole) < 4:
            raise ValueError("no hour and minute")
        moment = datetime.strptime(f"{day.strip()} {whole.ljust(6, '0')}", "%Y%m%d %H%M%S")
        return moment + timedelta(seconds=float(f"0.{fraction or 0}"))
    except ValueError as error:
        raise Unreadable(path, f"{name} is {day!r} {time!r}, no date and time: no SUV") from error
