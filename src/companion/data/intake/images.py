"""Readers of images: NIfTI and its pairs here, by the standard and with every check; others by nibabel and SimpleITK.

An image is a `Volume`: values (z, y, x) as stored, or scaled to what the file says they mean, and the affine
from (x, y, z) indices to mm, RAS+, whatever the unit and the order of axes of the file. Complex values stay complex.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import nibabel
import numpy as np
from nibabel.nifti1 import data_type_codes, intent_codes

from companion.data.intake import kinds, streams
from companion.data.intake.records import Description, Unreadable, Volume

NIFTI = (".nii", ".nii.gz", ".nii.bz2", ".hdr", ".hdr.gz", ".img", ".img.gz")
UNITS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # mm of a unit of length, by NIfTI's code; 0, not said, is mm in practice
LARGEST = float(np.finfo(np.float32).max)
SPOKEN = {128: "RGB colour", 2304: "RGBA colour", 1: "bits", 1536: "128-bit floats", 2048: "256-bit complex numbers"}


@dataclass(frozen=True)
class _Nifti:
    """What a NIfTI header says, checked: where the values are, their type, shape (x, y, z, t) and scale."""

    data: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    affine: np.ndarray
    slope: float
    inter: float
    intent: str
    version: str
    parts: tuple[Path, ...]

    @property
    def frames(self) -> int:
        return self.shape[3]


def sniff_nifti(path: Path) -> Description | None:
    """What a NIfTI file is: one .nii, compressed or not, or a pair .hdr, .img; None for something else."""
    header = _nifti(Path(path), None)
    if header is None:
        return None
    kind = kinds.kind_of(path.name) or ("labels" if header.intent == "label" else "image")
    shape = header.shape[::-1] if header.frames > 1 else header.shape[2::-1]
    axes = ("t", "z", "y", "x")[-len(shape) :]
    return Description(
        kind,
        header.version,
        axes,
        shape,
        _voxel_mm(header.affine),
        header.dtype.name,
        contrast=kinds.contrast_of(path.name),
        parts=header.parts,
    )


def read_nifti(files: Sequence[Path], frame: int | None = None, affine=None) -> Volume:
    """The volume of a NIfTI file, or frame of a 4D one. affine: of a file that has none. Raises Unreadable."""
    path = Path(files[0])
    header = _nifti(path, affine)
    if header is None:
        raise Unreadable(path, streams.instead(path) or "not a NIfTI file; download or export it again")
    return Volume(_values(header, path, _frame(path, frame, header.frames)).transpose(2, 1, 0), header.affine)


def frames_of(path: Path) -> int:
    """How many volumes a NIfTI file holds, from its header."""
    header = _nifti(Path(path), np.eye(4))
    if header is None:
        raise Unreadable(path, streams.instead(path) or "not a NIfTI file; download or export it again")
    return header.frames


def read_frames(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All volumes of a NIfTI file, (t, z, y, x), and the affine; the file is read once."""
    header = _nifti(Path(path), None)
    if header is None:
        raise Unreadable(path, streams.instead(path) or "not a NIfTI file; download or export it again")
    return _values(header, path, None).transpose(3, 2, 1, 0), header.affine


def _frame(path: Path, frame: int | None, frames: int) -> int:
    if frame is None and frames > 1:
        raise Unreadable(path, f"4D, {frames} volumes; choose one with frame=0, or write it as a file of its own")
    if not 0 <= (frame or 0) < frames:
        raise Unreadable(path, f"frame {frame} of a file with {frames}")
    return frame or 0


def _values(header: _Nifti, path: Path, frame: int | None) -> np.ndarray:
    """Values (x, y, z) of a frame or (x, y, z, t) of all, finite, in the file's type or scaled to float."""
    size = int(np.prod(header.shape[:3])) * header.dtype.itemsize
    first, count = (0, header.frames) if frame is None else (frame, 1)
    content = streams.part(
        header.data, header.offset + first * size, count * size, header.offset + header.frames * size
    )
    stored = np.frombuffer(content, header.dtype)
    stored = stored.astype(header.dtype.newbyteorder("="), copy=False)
    if (header.slope, header.inter) != (1.0, 0.0):
        stored = stored.astype(np.float32) if stored.dtype.kind in "iub" else stored
        stored *= stored.dtype.type(header.slope)
        stored += stored.dtype.type(header.inter)
    shape = header.shape if frame is None else header.shape[:3]
    return finite(stored, path).reshape(shape, order="F")


def finite(array: np.ndarray, path: str | Path) -> np.ndarray:
    """Return the array; raise Unreadable for NaN, infinity, or values beyond those of 32-bit floats."""
    if array.dtype.kind not in "fc" or not array.size:
        return array
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise Unreadable(path, f"{bad} NaN or infinite voxels of {array.size}; mask or repair them first")
    if array.dtype.itemsize > (4 if array.dtype.kind == "f" else 8):
        real: np.ndarray = np.real(array)
        peak = max(abs(float(np.max(real))), abs(float(np.min(real))))
        if peak > LARGEST:
            raise Unreadable(path, f"values up to {peak:.3g}, more than 32-bit floats hold; scale them down")
    return array


# ----------------------------------------------------------------------------------------------------- NIfTI's header


def _nifti(path: Path, affine) -> _Nifti | None:
    lower = path.name.lower()
    data, header, parts = path, path, ()
    for here, there in ((".hdr", ".img"), (".img", ".hdr")):
        if lower.endswith((here, here + ".gz")):
            other = _partner(path, there)
            if other is None:
                if here == ".hdr" and not _is_header(streams.head(path, 540)):
                    return None
                raise Unreadable(path, f"its other half, {_base(path)}{there}, is missing; NIfTI pairs need both")
            header, data = (path, other) if here == ".hdr" else (other, path)
            parts = (other,)
    if reason := streams.instead(header):
        raise Unreadable(path, reason)
    raw = streams.head(header, 540)
    if not _is_header(raw):
        return None
    return _parsed(path, data, raw, affine, parts)


def _is_header(raw: bytes) -> bool:
    return raw[:4] in [n.to_bytes(4, order) for n in (348, 540) for order in ("little", "big")]


def _base(path: Path) -> str:
    return re.sub(r"\.(?:hdr|img)(?:\.gz)?$", "", path.name, flags=re.IGNORECASE)


def _partner(path: Path, ending: str) -> Path | None:
    """The other half of a pair, whatever the case of its ending, compressed or not."""
    wanted = [_base(path) + end for e in (ending, ending.upper()) for end in (e, e + ".gz", e + ".GZ")]
    return next((path.with_name(n) for n in wanted if path.with_name(n).is_file()), None)


def _parsed(path: Path, data: Path, raw: bytes, affine, parts) -> _Nifti:
    two = int.from_bytes(raw[:4], "little") == 540 or int.from_bytes(raw[:4], "big") == 540
    size, kind = (540, nibabel.Nifti2Header) if two else (348, nibabel.Nifti1Header)
    if len(raw) < size:
        raise Unreadable(path, f"{len(raw)} bytes, less than a header; download it again")
    magic = raw[4:8] if two else raw[344:348]
    if magic[:2] not in (b"n+", b"ni") or magic[3:4] != b"\0":
        raise Unreadable(
            path, "Analyze 7.5, which does not say what is left and right; convert it to NIfTI knowing that"
        )
    header = kind(raw[:size], check=False)
    if magic[:2] == b"ni" and data == path and not parts:
        raise Unreadable(path, "the header of a NIfTI pair without its .img; give both")
    shape = _shape(path, header)
    dtype = _dtype(path, header)
    offset = float(header["vox_offset"])
    single = magic[:2] == b"n+"
    if not (np.isfinite(offset) and 0 <= offset < 2**40 and (not single or offset == 0 or offset >= size)):
        raise Unreadable(path, f"values at byte {offset:g}, which cannot be; the header is damaged")
    offset = int(offset) or (size + 4 if single else 0)
    slope, inter = _scale(path, header)
    intent = _intent(path, header)
    frames = shape[3]
    stated = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if stated > 2**40:
        raise Unreadable(path, f"{shape[:3]} voxels and {frames} frames: the header is damaged")
    affine = _affine(path, header) if affine is None else check_affine(affine, path)
    version = ("NIfTI-2" if two else "NIfTI-1") + ("" if single else " pair")
    return _Nifti(data, offset, dtype, shape, affine, slope, inter, intent, version, parts)


def _shape(path: Path, header) -> tuple[int, int, int, int]:
    dim = [int(n) for n in header["dim"]]
    axes = dim[0]
    if not 1 <= axes <= 7 or min(dim[1 : axes + 1]) < 1:
        raise Unreadable(path, f"dimensions {dim}, which cannot be; the header is damaged")
    shape = dim[1 : axes + 1]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) > 4:
        what = "vectors, as of a displacement field" if shape[3] == 1 else f"{len(shape)} dimensions"
        raise Unreadable(path, f"shape {tuple(shape)}: {what}; expected a volume (x, y, z) or a series of them")
    if len(shape) < 2:
        raise Unreadable(path, f"shape {tuple(shape)}: a curve and not an image")
    x, y, z, t = shape + [1] * (4 - len(shape))
    return x, y, z, t


def _dtype(path: Path, header) -> np.dtype:
    code = int(header["datatype"])
    if code in SPOKEN:
        hint = "; a picture for the eye: give the scan itself" if "colour" in SPOKEN[code] else "; convert it"
        raise Unreadable(path, f"holds {SPOKEN[code]}{hint}")
    try:
        dtype = np.dtype(cast(Any, data_type_codes.dtype[code])).newbyteorder(header.endianness)
    except KeyError:
        raise Unreadable(path, f"unknown type of values (code {code}); the header is damaged") from None
    if not dtype.itemsize or dtype.kind not in "iufc" or int(header["bitpix"]) not in (0, 8 * dtype.itemsize):
        raise Unreadable(path, f"type of values {code} with {int(header['bitpix'])} bits: the header is damaged")
    return dtype


def _scale(path: Path, header) -> tuple[float, float]:
    """Slope and intercept; a slope of 0 or NaN means none, as the standard and its common writers have it."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if np.isnan(slope) or slope == 0:
        return 1.0, 0.0
    inter = 0.0 if np.isnan(inter) else inter
    if not (np.isfinite(slope) and np.isfinite(inter)):
        raise Unreadable(path, f"values scaled by {slope:g} and {inter:g}; the header is damaged")
    return slope, inter


def _intent(path: Path, header) -> str:
    code = int(header["intent_code"])
    name = str(intent_codes.label[code]) if code in intent_codes.label else ""
    if code in (1004, 1005, 1006, 1007, 1008, 1009, 1010):
        raise Unreadable(path, f"holds {name or 'vectors'} (a field or tensors), not an image")
    if 2 <= code <= 24:
        raise Unreadable(path, f"a statistical map ({name}), not an image; give the scan itself")
    return name


def _affine(path: Path, header) -> np.ndarray:
    """The affine in mm: the sform, or the qform where only that is given."""
    unit = int(header["xyzt_units"]) & 7
    if unit not in UNITS:
        raise Unreadable(path, f"unknown unit of length (code {unit}); write the header again in mm")
    s, q = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not (s or q):
        raise Unreadable(
            path,
            "has no affine (sform and qform codes are 0), so nobody knows left from right; give "
            "affine=centred_affine(shape, mm), or write one into the file",
        )
    steps = np.array([float(v) for v in header["pixdim"][1:4]])
    if not s and not (np.isfinite(steps).all() and (steps > 0).all()):
        raise Unreadable(path, f"voxel size {' x '.join(f'{v:g}' for v in steps)}; it must be positive")
    try:
        by_q = header.get_qform() if q and (steps > 0).all() else None
        affine = header.get_sform() if s else by_q
    except Exception as error:  # nibabel and NumPy raise several kinds for quaternions that are none
        raise Unreadable(path, f"its qform cannot be right ({error}); write the header again") from error
    affine = check_affine(affine, path)
    if s and by_q is not None and np.isfinite(by_q).all():
        both = np.linalg.det(affine[:3, :3]) * np.linalg.det(by_q[:3, :3])
        if both < 0 and int(header["qform_code"]) > 0:
            raise Unreadable(path, "its sform and qform disagree on left and right; correct one of them")
    return np.diag([UNITS[unit]] * 3 + [1.0]) @ affine


def check_affine(affine, path: str | Path) -> np.ndarray:
    """Return a 4 x 4 affine as floats; raise Unreadable unless it is finite and can be inverted."""
    affine = np.asarray(affine, dtype=float)
    lengths = np.linalg.norm(affine[:3, :3], axis=0) if affine.shape == (4, 4) else np.zeros(3)
    if not np.isfinite(affine).all() or not (lengths > 0).all():
        raise Unreadable(
            path,
            f"voxel size {' x '.join(f'{v:g}' for v in lengths)} mm, the affine is {affine.tolist()}; "
            "it must be finite and positive",
        )
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        raise Unreadable(path, f"its affine is singular, {affine.tolist()}; write the header again")
    return affine


def _voxel_mm(affine: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in np.linalg.norm(affine[:3, :3], axis=0))
    return z, y, x
