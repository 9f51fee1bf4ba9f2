"""What a DICOM file says of itself, by the standard's attributes: of whom, which series, and where each frame lies.

Names, birth dates and record numbers are not kept: a person is a code (`intake.records.pseudonym`).
"""

from __future__ import annotations

import itertools
import os
import re
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pydicom
from pydicom import uid

from companion.data.intake import streams
from companion.data.intake.records import Unreadable, pseudonym

NO_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation", "1.2.840.10008.5.1.4.1.1.481.3": "contours for radiotherapy",
    "1.2.840.10008.5.1.4.1.1.4.2": "a spectrum", "1.2.840.10008.1.3.10": "a directory of other files",
    "1.2.840.10008.5.1.4.1.1.66": "raw data of a vendor",
}  # fmt: skip
COMPONENTS = {
    "magnitude": ("M", "MAGNITUDE", "M_FFE", "M_SE", "M_IR"), "phase": ("P", "PHASE", "PHASE MAP"),
    "real": ("R", "REAL"), "imaginary": ("I", "IMAGINARY"),
}  # fmt: skip
UNITS = {"BQML": "Bq/mL", "GML": "g/mL", "CNTS": "counts", "HU": "HU"}
UCUM = {"Bq/ml": "BQML", "g/ml{SUVbw}": "GML", "{counts}": "CNTS"}  # of enhanced PET, the one to prefer first
CORRECTIONS = {"ATTN": "attenuation", "DECY": "decay"}  # without which the values of PET are not activity at one time
GE_COMPONENT = {0: "magnitude", 1: "phase", 2: "real", 3: "imaginary"}
WORLD = "RealWorldValueMappingSequence"
MOST = 2**36  # bytes of pixels in a file that cannot be right


@dataclass(frozen=True)
class Frame:
    """One image of a file: its place in the patient (LPS, mm) and what its numbers mean.

    values = (stored * slope + intercept) * factor. `order` sorts frames of the same place in time.
    """

    path: Path
    index: int
    shape: tuple[int, int]
    pixel_mm: tuple[float, float]  # between rows, between columns
    orientation: tuple[float, ...]  # direction of a row, direction of a column
    position: tuple[float, float, float]
    thickness: float | None
    slope: float
    intercept: float
    factor: float
    component: str
    echo: str
    order: tuple
    units: str = ""

    @property
    def normal(self) -> np.ndarray:
        """The direction across the slice: row direction x column direction."""
        return np.cross(self.orientation[:3], self.orientation[3:])


@dataclass(frozen=True)
class FileHeader:
    """A DICOM file: `person` and `session` as codes, `series` and `instance` its UIDs, `frames` its images.

    uncorrected: for what its PET is said not to be corrected, of `CORRECTIONS`.
    """

    person: str
    session: str
    series: str
    description: str
    modality: str
    units: str
    dtype: str
    frames: tuple[Frame, ...] = field(repr=False)
    instance: str = ""
    uncorrected: str = ""
    secrets: tuple[str, ...] = field(default=(), repr=False)


def read_header(path: str | os.PathLike) -> FileHeader | None:
    """The header of a DICOM image, None for a file of another kind; no pixels are read.

    Raises Unreadable for a DICOM file that is damaged, no image, colour, a mosaic or a localizer.
    """
    path = Path(path)
    stat = path.stat()
    return _read_header(path, stat.st_mtime_ns, stat.st_size)


def dataset(path: Path, pixels: bool = False) -> pydicom.Dataset:
    """The data set of a DICOM file, with its pixels or without; raises Unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            d = pydicom.dcmread(path, stop_before_pixels=not pixels, force=True)
            if "TransferSyntaxUID" not in d.file_meta:  # a bare data set, as of old archives: never compressed
                d.file_meta.TransferSyntaxUID = _syntax(*d.original_encoding)
            return d
    except Exception as error:  # pydicom raises many kinds for damaged files
        raise Unreadable(path, f"damaged DICOM file ({error}); export it again") from error


def _syntax(implicit: bool | None, little_endian: bool | None) -> uid.UID:
    """The transfer syntax of a data set that names none, by how its elements are written."""
    if not little_endian:
        return uid.ExplicitVRBigEndian
    return uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM: by its mark after the preamble, or by its first tag if it has none."""
    start = streams.head(path, 132)
    if start[128:132] == b"DICM":
        return True
    return path.suffix.lower() in (".dcm", ".ima", ".dicom") and start[:4] in (
        b"\x08\0\0\0",
        b"\x08\0\x05\0",
        b"\x08\0\x08\0",
    )


@lru_cache(maxsize=8192)
def _read_header(path: Path, modified: int, size: int) -> FileHeader | None:
    if reason := streams.instead(path):
        if path.suffix.lower() not in (".dcm", ".ima", ".dicom") and not reason.startswith("empty"):
            if not reason.startswith("begins with zeros"):
                return None
        elif not reason.startswith("begins with zeros"):
            raise Unreadable(path, reason)
    if not is_dicom(path):
        return None
    d = dataset(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _parsed(path, d, size)
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(path, f"its DICOM attributes cannot be read ({error}); export it again") from error


def _parsed(path: Path, d: pydicom.Dataset, size: int) -> FileHeader:
    sop = str(d.get("SOPClassUID", ""))
    kinds = [str(k).upper() for k in d.get("ImageType", None) or ()]
    if sop in NO_IMAGES:
        raise Unreadable(path, f"DICOM, {NO_IMAGES[sop]}, not an image")
    if "Rows" not in d or "Columns" not in d:
        name = uid.UID(sop).name if sop else "no class"
        raise Unreadable(path, f"DICOM without an image ({name})")
    if "MOSAIC" in kinds:
        raise Unreadable(path, "a Siemens mosaic, all slices in one picture; convert it to NIfTI with dcm2niix")
    if "LOCALIZER" in kinds:
        raise Unreadable(path, "a localizer, not a scan")
    if int(d.get("SamplesPerPixel", 1)) != 1 or str(d.get("PhotometricInterpretation", "")) not in ("MONOCHROME2",):
        how = d.get("PhotometricInterpretation", "unknown")
        raise Unreadable(path, f"DICOM in {how}: colour or an inverted picture for the eye; give the scan itself")
    rows, columns, frames = int(d.Rows), int(d.Columns), int(d.get("NumberOfFrames", 1) or 1)
    bits = int(d.get("BitsAllocated", 16))
    if min(rows, columns, frames) < 1 or bits not in (8, 16, 32, 64) or rows * columns * frames * bits // 8 > MOST:
        raise Unreadable(path, f"{frames} frames of {rows} x {columns} with {bits} bits: its header is damaged")
    if not d.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian).is_compressed:
        if rows * columns * frames * bits // 8 > size:
            raise Unreadable(path, f"{size} bytes, too few for its {rows} x {columns} pixels: truncated; copy it again")
    dtype = ("float" if "FloatPixelData" in d else "int" if int(d.get("PixelRepresentation", 0)) else "uint") + str(
        bits
    )
    made = _enhanced(path, d, frames) if "PerFrameFunctionalGroupsSequence" in d else _classic(path, d, frames)
    return FileHeader(
        pseudonym(d.get("PatientID", ""), d.get("PatientName", "")),
        pseudonym(d.get("StudyInstanceUID", "")),
        str(d.get("SeriesInstanceUID", "")),
        str(d.get("SeriesDescription", "") or d.get("ProtocolName", "") or "").strip(),
        str(d.get("Modality", "")),
        _units(d, made[0]),
        dtype,
        made,
        str(d.get("SOPInstanceUID", "")),
        _uncorrected(d),
        _secrets(d),
    )


def _units(d: pydicom.Dataset, first: Frame) -> str:
    """The units of the values; those of PET as they are said where they have no name here, such as PROPCPS."""
    said = str(d.get("Units", "") or first.units or d.get("RescaleType", "") or "")
    kind = str(d.get("SUVType", "") or "BW")
    if said == "GML" and kind != "BW":
        return f"g/mL by {kind}"
    if said in UNITS or d.get("Modality") != "PT":
        return UNITS.get(said, "HU" if d.get("Modality") == "CT" else "")
    return "" if said == "US" else said  # unspecified


def _uncorrected(d: pydicom.Dataset) -> str:
    """What PET says not to be corrected for, "" where it is silent."""
    done = {str(c) for c in d.get("CorrectedImage", None) or ()}
    if d.get("Modality") != "PT" or not done:
        return ""
    return ", ".join(name for code, name in CORRECTIONS.items() if code not in done)


def _secrets(d: pydicom.Dataset) -> tuple[str, ...]:
    """The words of a patient's name, numbers and birth date, the longest first, as names of folders have them."""
    names = [word for word in re.split(r"[\^=\s,._-]+", str(d.get("PatientName", ""))) if len(word) > 2]
    pairs = ["".join(pair) for pair in itertools.permutations(names[:4], 2)]
    others = ("PatientID", "PatientBirthDate", "AccessionNumber", "OtherPatientIDs", "PatientBirthName")
    numbers = [str(d.get(name, "") or "").strip() for name in others]
    return tuple(sorted({w for w in (*names, *pairs, *numbers) if len(w) > 2 and pseudonym(w)}, key=len, reverse=True))


def _classic(path: Path, d: pydicom.Dataset, frames: int) -> tuple[Frame, ...]:
    if frames > 1:
        raise Unreadable(path, f"{frames} frames without a place for each (not enhanced DICOM); convert with dcm2niix")
    return (_frame(path, 0, d, d, d, d, d, d),)


def _enhanced(path: Path, d: pydicom.Dataset, frames: int) -> tuple[Frame, ...]:
    shared = (d.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0]
    each = d.PerFrameFunctionalGroupsSequence
    if len(each) != frames:
        raise Unreadable(path, f"{frames} frames, but places for {len(each)}: damaged; export it again")

    def group(one: pydicom.Dataset, name: str) -> pydicom.Dataset:
        found = one.get(name) or shared.get(name)
        return found[0] if found else pydicom.Dataset()

    made = []
    for i, one in enumerate(each):
        kind = group(one, "MRImageFrameTypeSequence")
        content = group(one, "FrameContentSequence")
        echo = group(one, "MREchoSequence")
        private = group(one, "PrivatePerFrameSq") if "PrivatePerFrameSq" in one else _philips(one)
        times = pydicom.Dataset()
        for name in ("TemporalPositionIndex", "FrameAcquisitionDateTime", "DimensionIndexValues"):
            if name in content:
                times[name] = content[name]
        if "EffectiveEchoTime" in echo:
            times.EchoTime = str(float(echo.EffectiveEchoTime))
        for name in ("ComplexImageComponent", "FrameType"):
            source = kind if name in kind else d
            if name in source:
                times[name] = source[name]
        values = group(one, "PixelValueTransformationSequence")
        if d.get("Modality") == "PT":
            values = _real_world(path, one.get(WORLD) or shared.get(WORLD) or ()) or values
        made.append(
            _frame(path, i, d, group(one, "PixelMeasuresSequence"), group(one, "PlaneOrientationSequence"),
                   group(one, "PlanePositionSequence"), values, times, private)
        )  # fmt: skip
    if len({frame.units for frame in made}) > 1:
        raise Unreadable(path, "its frames have several units; export it again")
    return tuple(made)


def _real_world(path: Path, maps) -> pydicom.Dataset | None:
    """What turns stored numbers of enhanced PET into activity, written as rescaling; None where nothing does.

    The other transformation, of pixel values, may be in numbers of the vendor's own, with a scale for each slice.
    """
    found = {}
    for one in maps:
        unit = (one.get("MeasurementUnitsCodeSequence") or [pydicom.Dataset()])[0].get("CodeValue", "")
        found[UCUM.get(str(unit), str(unit))] = one
    for unit in (*UCUM.values(), *found):
        if unit in found and "RealWorldValueSlope" in found[unit]:
            values = pydicom.Dataset()
            values.RescaleSlope = str(float(found[unit].RealWorldValueSlope))
            values.RescaleIntercept = str(float(found[unit].get("RealWorldValueIntercept", 0)))
            values.RescaleType = unit
            return values
    if found:
        raise Unreadable(path, f"its values in {', '.join(found)} are in a table; export them with a slope")
    return None


def _philips(one: pydicom.Dataset) -> pydicom.Dataset | None:
    """Philips' private per-frame sequence, if there is one."""
    element = one.get((0x2005, 0x140F))
    return element.value[0] if element is not None and element.value else None


def _frame(path, index, d, measures, orientation, position, transformation, times, private=None) -> Frame:
    missing = [name for name, source in (("PixelSpacing", measures), ("ImageOrientationPatient", orientation),
                                         ("ImagePositionPatient", position)) if not source.get(name)]  # fmt: skip
    if missing:
        raise Unreadable(path, f"does not say where its pixels lie (no {', '.join(missing)}): a picture, not a scan")
    pixel = tuple(float(v) for v in measures.PixelSpacing)
    axes = tuple(float(v) for v in orientation.ImageOrientationPatient)
    place = tuple(float(v) for v in position.ImagePositionPatient)
    gram = np.array([[np.dot(axes[:3], axes[:3]), np.dot(axes[:3], axes[3:])], [0, np.dot(axes[3:], axes[3:])]])
    if len(pixel) != 2 or len(axes) != 6 or len(place) != 3 or not np.isfinite([*pixel, *axes, *place]).all():
        raise Unreadable(path, f"its geometry {pixel}, {axes}, {place} is damaged; export it again")
    if min(pixel) <= 0 or np.abs(gram - np.eye(2)).max() > 1e-3:
        raise Unreadable(path, f"pixels of {pixel} mm along {axes}: its geometry cannot be right; export it again")
    slope, intercept = (
        default if (said := transformation.get(name)) is None else float(said)  # a slope of 0 is said, too
        for name, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
    )
    scale = (private if private is not None else d).get((0x2005, 0x100E))
    scale = float(scale.value) if scale is not None and _is_number(scale.value) else 0.0
    philips = scale > 0 and "philips" in str(d.get("Manufacturer", "")).lower() and d.get("Modality") == "MR"
    if not np.isfinite([slope, intercept]).all() or slope == 0:
        raise Unreadable(path, f"values scaled by {slope} and {intercept}: its header is damaged")
    thickness = measures.get("SliceThickness")
    return Frame(
        path, index, (int(d.Rows), int(d.Columns)), pixel, axes, place,
        float(thickness) if _is_number(thickness) else None,
        slope, intercept, 1 / (slope * scale) if philips else 1.0,
        _component(d, times), str(times.get("EchoNumbers", "") or times.get("EchoTime", "") or ""),
        _order(d, times, index), str(transformation.get("RescaleType", "") or "") if transformation is not d else "",
    )  # fmt: skip


def _component(d: pydicom.Dataset, times: pydicom.Dataset) -> str:
    ge = d.get((0x0043, 0x102F))
    if ge is not None and _is_number(ge.value) and int(ge.value) in GE_COMPONENT:
        return GE_COMPONENT[int(ge.value)]
    said = [
        str(times.get("ComplexImageComponent", "")),
        *map(str, (times.get("FrameType") or d.get("ImageType") or ())[2:]),
    ]
    for word in said:
        for component, words in COMPONENTS.items():
            if word.upper() in words:
                return component
    return "magnitude"


def _number_of(value) -> float:
    return float(value) if _is_number(value) else 0.0


def _order(d: pydicom.Dataset, times: pydicom.Dataset, index: int) -> tuple:
    number = [times.get(n) for n in ("TemporalPositionIdentifier", "TemporalPositionIndex", "TriggerTime")]
    time = next((str(v) for n in ("FrameAcquisitionDateTime", "AcquisitionDateTime") if (v := times.get(n))), "")
    time = time or str(times.get("AcquisitionDate", "") or "") + str(times.get("AcquisitionTime", "") or "")
    instance = d.get("InstanceNumber") if times is d else None
    numbers = [_number_of(v) for v in (*number, times.get("AcquisitionNumber"))]
    return (*numbers, time, _number_of(instance), index)


def _is_number(value) -> bool:
    try:
        return value is not None and np.isfinite(float(value))
    except (TypeError, ValueError):
        return False
