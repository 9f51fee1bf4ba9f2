"""Interfile headers of PET (.hv images, .hs sinograms, as STIR writes them; Siemens' .v.hdr and .s.hdr).

A header is lines of `key := value`; nothing in it is run, and the data file must lie beside it. Cooper et al. 1992
(Interfile 3.3); STIR's extensions for PET (Thielemans et al. 2012).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from companion.data.intake.images import finite
from companion.data.intake.records import Description, Unreadable, Volume
from companion.data.scan_geometry import Geometry

SUFFIXES = (".hv", ".hs", ".v.hdr", ".s.hdr")
LARGEST = 2**20  # bytes of a header that cannot be right
TYPES = {"float": "f", "short float": "f", "long float": "f", "signed integer": "i", "unsigned integer": "u"}


def sniff_interfile(path: str | os.PathLike) -> Description | None:
    """What an Interfile header describes; None for another file."""
    path = Path(path)
    header = read_header(path)
    if header is None:
        return None
    shape, data = _shape(path, header), _data(path, header)
    _bytes(path, header, shape, data)
    if _is_image(header):
        affine = _affine(path, header, shape)
        z, y, x = (float(v) for v in np.linalg.norm(affine[:3, 2::-1], axis=0))
        about = {"orientation": _orientation(path, header)}
        return Description("image", "Interfile", ("z", "y", "x"), shape, (z, y, x), str(_dtype(path, header)),
                           _units(header), contrast="PET", parts=(data,), about=about)  # fmt: skip
    geometry = geometry_of(path, header)
    return Description("sinogram", "Interfile", ("slice", "angle", "bin"), _sorted_shape(path, header),
                       None, str(_dtype(path, header)), contrast="PET", parts=(data,),
                       about={"geometry": str(geometry)})  # fmt: skip


def read_interfile(files: Sequence[Path], frame: int | None = None) -> Volume | str:
    """The volume of an image header, or what the values of a sinogram say (for `companion look`)."""
    path = Path(files[0])
    header = read_header(path)
    if header is None:
        raise Unreadable(path, "not an Interfile header")
    if not _is_image(header):
        counts, _ = read_sinogram(path)
        return f"{counts.sum():.6g} counts, {counts.max():g} in the fullest bin"
    shape = _shape(path, header)
    return Volume(finite(_values(path, header, shape), path), _affine(path, header, shape))


def read_sinogram(path: str | os.PathLike) -> tuple[np.ndarray, Geometry]:
    """Values (slice, angle, bin) of a .hs header, and their geometry. Raises Unreadable for 3D, TOF and images."""
    path = Path(path)
    header = read_header(path)
    if header is None or _is_image(header):
        raise Unreadable(path, "not an Interfile header of sinograms")
    geometry = geometry_of(path, header)
    values = _values(path, header, _shape(path, header))
    return (values.transpose(1, 0, 2) if _axes(header)[0] == "view" else values), geometry


def read_header(path: Path) -> dict[str, str] | None:
    """The keys, in lower case, and values of an Interfile header, None for another file; Unreadable if damaged."""
    if path.stat().st_size > LARGEST:
        return None
    try:
        text = path.read_bytes().decode("latin-1")
    except OSError as error:
        raise Unreadable(path, f"cannot be read ({error})") from error
    if not re.match(r"\s*!?\s*interfile\s*:=", text, re.IGNORECASE):
        return None
    header: dict[str, str] = {}
    for line in text.splitlines():
        key, mark, value = line.partition(":=")
        if mark:
            key = re.sub(r"\s+", " ", key.strip().lstrip("!%;").strip().lower())
            header[re.sub(r"\s*\[\s*(\d+)\s*\]", r" [\1]", key)] = value.strip()
    return header


def geometry_of(path: Path, header: dict[str, str]) -> Geometry:
    """The geometry of 2D sinograms of a cylindrical scanner; Unreadable for 3D or TOF data and for missing keys."""
    if int(_number(path, header, "number of tof time bins", 1)) > 1:
        raise Unreadable(path, "time-of-flight sinograms; sum over the TOF bins first")
    segments = header.get("matrix size [4]", "1")
    if _list(path, segments)[:1] != [1]:
        raise Unreadable(
            path, f"3D sinograms of {segments} segments; write segment 0, or rebin them (STIR's SSRB) first"
        )
    _orientation(path, header)
    angles, bins = _sorted_shape(path, header)[1:]
    first = _number(path, header, "view offset (degrees)", 0.0)
    corrected = "arc" in header.get("applied corrections", "").lower()
    size = header.get("effective central bin size (cm)") or header.get("default bin size (cm)")
    size = size if corrected or "inner ring diameter (cm)" not in header else None
    if size is not None:
        radius, bin_mm = None, 10 * float(_list(path, size)[0])
    else:
        diameter = _number(path, header, "inner ring diameter (cm)")
        depth = _number(path, header, "average depth of interaction (cm)", 0.0)
        radius = 10 * (diameter / 2 + depth)
        bin_mm = math.pi * radius / _number(path, header, "number of detectors per ring")
    try:
        return Geometry(angles, bins, bin_mm, 0.0 if bins % 2 else 0.5, radius, -first, -180.0)  # y downwards
    except ValueError as error:
        raise Unreadable(path, f"its geometry cannot be ({error})") from error


# --------------------------------------------------------------------------------------------------------------- parts


def _is_image(header: dict[str, str]) -> bool:
    kind = header.get("pet data type", "").lower()
    return kind == "image" or (not kind and "scaling factor (mm/pixel) [3]" in header)


def _axes(header: dict[str, str]) -> list[str]:
    """The names of the last three axes, slowest first."""
    return [header.get(f"matrix axis label [{i}]", "").lower() for i in (3, 2, 1)]


def _shape(path: Path, header: dict[str, str]) -> tuple[int, int, int]:
    sizes = [_list(path, header.get(f"matrix size [{i}]", "1" if i == 3 else ""))[:1] for i in (3, 2, 1)]
    if not all(sizes) or min(s[0] for s in sizes) < 1 or any(s[0] != int(s[0]) for s in sizes):
        raise Unreadable(path, "its matrix sizes are missing or no whole numbers; write it again")
    if int(_number(path, header, "number of time frames", 1)) > 1:
        raise Unreadable(path, "a dynamic series of several time frames; write one of them")
    z, y, x = (int(s[0]) for s in sizes)
    return z, y, x


def _sorted_shape(path: Path, header: dict[str, str]) -> tuple[int, int, int]:
    """(slice, angle, bin), whatever the order in the file."""
    first, second, third = _shape(path, header)
    axes = _axes(header)
    if axes[:2] == ["view", "axial coordinate"]:
        return second, first, third
    if axes[:2] == ["axial coordinate", "view"]:
        return first, second, third
    raise Unreadable(path, f"axes {', '.join(axes)}; expected view and axial coordinate, then tangential coordinate")


def _data(path: Path, header: dict[str, str]) -> Path:
    name = header.get("name of data file", "")
    if not name or Path(name).name != name or name in (".", ".."):
        raise Unreadable(path, f"its data file is {name or 'not named'!r}; only a file beside the header is read")
    if not (path.parent / name).is_file():
        raise Unreadable(path, f"its data file {name} is not there")
    return path.parent / name


def _dtype(path: Path, header: dict[str, str]) -> np.dtype:
    form, size = header.get("number format", "").lower(), int(_number(path, header, "number of bytes per pixel", 0))
    try:
        order = {"bigendian": ">", "littleendian": "<"}[header.get("imagedata byte order", "bigendian").lower()]
        return np.dtype(f"{order}{TYPES[form]}{size}")
    except (KeyError, TypeError) as error:
        raise Unreadable(path, f"numbers of format {form!r}, {size} bytes, are not known here ({error})") from error


def _bytes(path: Path, header: dict[str, str], shape: Sequence[int], data: Path) -> int:
    """Where the numbers begin in the data file; Unreadable unless it has room for them."""
    if header.get("compression", "off").lower() not in ("off", "") or data.suffix in (".gz", ".Z"):
        raise Unreadable(path, "its data are compressed; write them uncompressed")
    start = int(_number(path, header, "data offset in bytes [1]", _number(path, header, "data offset in bytes", 0)))
    needed, size = math.prod(shape) * _dtype(path, header).itemsize, data.stat().st_size
    if start < 0 or size - start != needed:
        raise Unreadable(path, f"{data.name} has {size - start} bytes, its header describes {needed}: damaged")
    return start


def _values(path: Path, header: dict[str, str], shape: tuple[int, ...]) -> np.ndarray:
    data = _data(path, header)
    start = _bytes(path, header, shape, data)
    values = np.fromfile(data, _dtype(path, header), offset=start).reshape(shape)
    factor = 1.0 if _units(header) else _number(path, header, "quantification units", 1.0)
    scale = _number(path, header, "image scaling factor [1]", factor)
    if scale != 1:
        return values.astype(np.float32) * np.float32(scale)
    return values.astype(values.dtype.newbyteorder("="))


def _affine(path: Path, header: dict[str, str], shape: Sequence[int]) -> np.ndarray:
    """From (x, y, z) indices to mm, RAS+; Interfile's x and y run to the left and back of a patient on the back."""
    _orientation(path, header)
    step = [_number(path, header, f"scaling factor (mm/pixel) [{i}]") for i in (1, 2, 3)]
    if min(step) <= 0:
        raise Unreadable(path, f"voxels of {step} mm")
    centred = [-s * (n - 1) / 2 for s, n in zip(step, reversed(shape), strict=True)]
    first = [_number(path, header, f"first pixel offset (mm) [{i + 1}]", centred[i]) for i in range(3)]
    affine = np.diag([*step, 1.0])
    affine[:3, 3] = first
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _units(header: dict[str, str]) -> str:
    """The units that a header says in words, as Siemens does where STIR has a factor; "" for none."""
    said = header.get("quantification units", "")
    known = {"bq/ml": "Bq/mL", "kbq/ml": "kBq/mL", "g/ml": "g/mL", "suv": "SUV"}
    return known.get(said.lower(), said) if re.match(r"[a-zA-Z]", said) else ""


def _orientation(path: Path, header: dict[str, str]) -> str:
    """How the patient lies; Unreadable where it is said to be another way than the one that is read here."""
    said = [header.get(name, "").lower() for name in ("patient orientation", "patient rotation")]
    if any(s not in ("", "head_in", "supine", "unknown", "other") for s in said):
        raise Unreadable(
            path,
            f"the patient lies {' '.join(filter(None, said))}; only head_in and supine are read: turn it, and say so",
        )
    return "head first, supine" + ("" if all(said) else " (not said, but taken so)")


def _number(path: Path, header: dict[str, str], key: str, default: float | None = None) -> float:
    text = header.get(key, "")
    if not text and default is not None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise Unreadable(path, f"{key!r} is {text or 'missing'!r}, no number")
    return value


def _list(path: Path, text: str) -> list[float]:
    try:
        return [float(part) for part in re.sub(r"[{}]", " ", text).replace(",", " ").split()]
    except ValueError as error:
        raise Unreadable(path, f"{text!r} is no list of numbers") from error
