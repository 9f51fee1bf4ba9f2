"""fastMRI files: k-space volumes read slice by slice, with what their ISMRMRD header says of them.

Stored k-space is `(slice, coil, row, column)` or, single-coil, `(slice, row, column)`; rows are the readout, with its
oversampling, columns the phase encoding. This is the order used here, `(slice, coil, y, x)`: lines are undersampled
along x. The header calls the readout x and the phase encoding y; its numbers are turned around on reading.

Zbontar et al., fastMRI, arXiv 1811.08839; Inati et al., ISMRM raw data format, MRM 2017.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from companion.operators.mri import crop_kspace

NAMESPACE = "{http://www.ismrm.org/ISMRMRD}"
REFERENCES = ("reconstruction_rss", "reconstruction_esc")


@dataclass(frozen=True)
class Header:
    """What an ISMRMRD header says of a Cartesian scan, in the order (z, y, x) = (slice, readout, phase encoding).

    Matrix sizes of the encoded and the reconstructed space, their fields of view in mm, and the range of phase
    encoding lines `[first, last)` that were acquired, as positions in the encoded matrix; None where it does not say.
    """

    encoded: tuple[int, int, int]
    recon: tuple[int, int, int]
    encoded_mm: tuple[float, float, float] | None
    recon_mm: tuple[float, float, float] | None
    lines: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Volume:
    """One scan; the k-space stays on disk until `read`.

    shape        (slice, coil, y, x) of the k-space
    recon_shape  (y, x) of the image that the scanner made: the header's, else the reference's, else the k-space's
    crop_shape   (y, x) of the same field of view at the acquired resolution; see `crop`
    voxel_mm     (z, y, x), acquired; None without a header
    lines        [first, last) columns acquired; the others are zero
    mask         (x,) zeros and ones, for files that are undersampled; else None
    """

    path: Path
    name: str
    shape: tuple[int, int, int, int]
    recon_shape: tuple[int, int]
    crop_shape: tuple[int, int]
    voxel_mm: tuple[float, float, float] | None
    lines: tuple[int, int]
    mask: Tensor | None = field(repr=False)
    acquisition: str
    patient: str
    reference_name: str | None
    attrs: Mapping[str, str | float | int] = field(default_factory=dict, repr=False)

    @property
    def slices(self) -> int:
        """How many slices there are."""
        return self.shape[0]

    def __len__(self) -> int:
        return self.slices

    def __iter__(self) -> Iterator[Tensor]:
        """The k-space `(coil, y, x)` of one slice after another."""
        return (self.read(i) for i in range(self.slices))

    def read(self, index: int | slice = slice(None)) -> Tensor:
        """k-space, complex64, unmeasured lines zero: `(coil, y, x)` of a slice, `(slice, coil, y, x)` of a range.

        A range takes the memory of its result and of one slice. Raises IndexError for a slice that is not there,
        ValueError for damaged data, NaN or infinity.
        """
        chosen = _positions(index, self.slices)
        out = np.zeros((len(chosen), *self.shape[1:]), np.complex64)
        with _open(self.path) as file:
            stored = _dataset(file, self.path, "kspace")
            first = self.lines[0] if stored.shape[-1] != self.shape[-1] else 0
            for place, i in zip(out, chosen, strict=True):
                one = _slice(stored, self.path, i).reshape(*self.shape[1:3], -1)
                place[..., first : first + one.shape[-1]] = one
        return torch.from_numpy(out if isinstance(index, slice) else out[0])

    def reference(self, index: int | slice = slice(None)) -> Tensor | None:
        """The scanner's magnitude image, float32: `(y, x)` of a slice, `(slice, y, x)` of a range; None if absent."""
        if self.reference_name is None:
            return None
        with _open(self.path) as file:
            stored = _dataset(file, self.path, self.reference_name)
            images = [_slice(stored, self.path, i).astype(np.float32) for i in _positions(index, len(stored))]
        return torch.from_numpy(np.stack(images) if isinstance(index, slice) else images[0])

    def crop(self, kspace: Tensor) -> Tensor:
        """k-space `(..., *crop_shape)` of the reconstructed field of view, from k-space `(..., y, x)` of the encoded.

        The readout oversampling goes, the resolution stays. In an undersampled file only the readout is cropped:
        its columns must stay what was measured, so the result is `(..., crop_shape[0], x)`.
        """
        if self.mask is None:
            return crop_kspace(kspace, self.crop_shape)
        return crop_kspace(kspace.mT, self.crop_shape[:1]).mT


@dataclass(frozen=True)
class Scan:
    """What a folder holds: the good volumes, and why each other file was skipped."""

    folder: Path
    volumes: tuple[Volume, ...]
    skipped: Mapping[Path, str]

    def __str__(self) -> str:
        lines = [f"{self.folder}: {len(self.volumes)} volumes, {len(self.skipped)} files skipped"]
        return "\n".join(lines + [f"  {path.name}: {reason}" for path, reason in self.skipped.items()])


def open_volume(path: str | os.PathLike) -> Volume:
    """The description of a fastMRI file, multi-coil or single-coil, checked; reads no k-space.

    Raises FileNotFoundError, or ValueError with the reason for a file that is no HDF5, is truncated, has no k-space,
    a k-space of another kind, or a header that is damaged or contradicts it.
    """
    path = Path(path)
    with _open(path) as file:
        stored = _dataset(file, path, "kspace")
        if stored.ndim not in (3, 4) or stored.dtype.kind != "c" or not stored.size:
            raise ValueError(
                f"{path}: kspace is {stored.dtype} {stored.shape}; expected complex numbers (slice, coil, y, x) or, "
                "of one coil, (slice, y, x)"
            )
        shape = stored.shape if stored.ndim == 4 else (stored.shape[0], 1, *stored.shape[1:])
        names = [name for name in REFERENCES if name in file]
        reference = _dataset(file, path, names[0]).shape if names else None
        if reference is not None and (len(reference) != 3 or reference[0] != shape[0]):
            raise ValueError(f"{path}: {names[0]} has shape {reference}; expected ({shape[0]}, y, x)")
        header = _header(file, path) if "ismrmrd_header" in file else None
        width, lines = _columns(header, shape[3])
        shape = (*(int(n) for n in shape[:3]), width)
        recon = header.recon[1:] if header else tuple(reference[1:]) if reference else shape[2:]
        attrs = {k: v.item() if isinstance(v, np.generic) else v for k, v in file.attrs.items()}
        attrs = {k: v for k, v in attrs.items() if isinstance(v, str | int | float)}
        return Volume(
            path=path,
            name=path.stem,
            shape=shape,
            recon_shape=tuple(int(n) for n in recon),
            crop_shape=_crop_shape(header, shape[2:], recon),
            voxel_mm=_voxel_mm(header, shape),
            lines=lines,
            mask=_mask(file, path, shape[3], lines, stored.shape[-1]),
            acquisition=str(attrs.get("acquisition", "")),
            patient=str(attrs.get("patient_id", "")),
            reference_name=names[0] if names else None,
            attrs=attrs,
        )


def scan(folder: str | os.PathLike, thorough: bool = True) -> Scan:
    """The volumes in a folder and below, in the order of their names, and the files skipped with the reason for each.

    thorough: read all k-space once, so that damage and NaN inside are found now and not in the middle of a run;
    otherwise only the description of each file is checked. Hidden files are passed over in silence.
    Raises FileNotFoundError for a folder that does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the one that holds the .h5 files")
    volumes, skipped = [], {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        try:
            volume = open_volume(path)
            for i in range(volume.slices if thorough else 0):
                volume.read(i)
        except (ValueError, OSError) as error:
            skipped[path] = str(error).removeprefix(f"{path}: ")
        else:
            volumes.append(volume)
    return Scan(folder, tuple(volumes), skipped)


def parse_header(text: str) -> Header:
    """What the first encoding of an ISMRMRD XML header says; see `Header`.

    Raises ValueError for XML that is damaged, declares a document type or entities (never expanded), or lacks the
    matrix sizes.
    """
    if "<!DOCTYPE" in text.upper() or "<!ENTITY" in text.upper():
        raise ValueError("ismrmrd_header declares a document type or entities, which a header never needs: refused")
    try:
        encoding = ElementTree.fromstring(text).find(NAMESPACE + "encoding")
        encoded, recon = (_triple(encoding, space, "matrixSize", int) for space in ("encodedSpace", "reconSpace"))
        sizes = [_triple(encoding, s, "fieldOfView_mm", float, False) for s in ("encodedSpace", "reconSpace")]
        limits = encoding.find(f"{NAMESPACE}encodingLimits/{NAMESPACE}kspace_encoding_step_1")
        lines = None
        if limits is not None:
            low, centre, high = (int(limits.find(NAMESPACE + n).text) for n in ("minimum", "center", "maximum"))
            first = encoded[2] // 2 - centre
            lines = (first + low, first + high + 1)
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"ismrmrd_header is damaged or incomplete ({error}); convert the scan again") from error
    return Header(encoded, recon, *sizes, lines)


def _triple(encoding, space: str, name: str, kind, required: bool = True):
    """A positive triple of the header as (z, readout, phase encoding)."""
    at = encoding.find(f"{NAMESPACE}{space}/{NAMESPACE}{name}")
    if at is None and not required:
        return None
    readout, phase, depth = (kind(at.find(NAMESPACE + axis).text) for axis in "xyz")
    if not (readout > 0 and phase > 0 and depth > 0 and np.isfinite([readout, phase, depth]).all()):
        raise ValueError(f"{space} {name} is {readout}, {phase}, {depth}")
    return depth, readout, phase


def _columns(header: Header | None, stored: int) -> tuple[int, tuple[int, int]]:
    """The number of columns of the k-space, and the acquired ones among them, for files with `stored` columns.

    Lines are stored in their place in the encoded matrix, as fastMRI does, or without the lines never acquired at
    the sides; those are put back as zeros, or the centre of k-space would not be in the middle.
    """
    if header is None or header.lines is None:
        return stored, (0, stored)
    width, (first, last) = header.encoded[2], header.lines
    if not 0 <= first < last <= width or stored not in (width, last - first):
        return stored, (0, stored)  # the header is about another matrix: what is stored counts
    return width, (first, last)


def _crop_shape(header: Header | None, space: tuple[int, int], recon) -> tuple[int, int]:
    if header and header.encoded_mm and header.recon_mm:
        shares = [r / e for r, e in zip(header.recon_mm[1:], header.encoded_mm[1:], strict=True)]
        return tuple(max(1, min(n, round(n * share))) for n, share in zip(space, shares, strict=True))
    return tuple(min(n, int(m)) for n, m in zip(space, recon, strict=True))


def _voxel_mm(header: Header | None, shape) -> tuple[float, float, float] | None:
    if header is None or header.encoded_mm is None:
        return None
    depth, height, width = header.encoded_mm
    return depth / header.encoded[0], height / shape[2], width / shape[3]


def _mask(file: h5py.File, path: Path, width: int, lines: tuple[int, int], stored: int) -> Tensor | None:
    """The mask (x,), zero where nothing was acquired."""
    if "mask" not in file:
        return None
    mask = np.asarray(_dataset(file, path, "mask")[()]).squeeze()
    if mask.ndim != 1 or len(mask) not in (width, stored) or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"{path}: mask is {mask.dtype} {mask.shape}; expected {stored} zeros and ones, one a column")
    out = np.zeros(width, np.float32)
    first = lines[0] if len(mask) != width else 0
    out[first : first + len(mask)] = mask
    return torch.from_numpy(out)


def _header(file: h5py.File, path: Path) -> Header:
    value = np.ravel(_dataset(file, path, "ismrmrd_header")[()])[0]
    try:
        return parse_header(value.decode("utf-8") if isinstance(value, bytes) else str(value))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _positions(index: int | slice, count: int) -> range:
    if isinstance(index, slice):
        return range(*index.indices(count))
    if not -count <= index < count:
        raise IndexError(f"slice {index} of a volume with {count}")
    return range(index % count, index % count + 1)


def _slice(stored: h5py.Dataset, path: Path, i: int) -> np.ndarray:
    try:
        value = stored[i]
    except OSError as error:
        raise ValueError(f"{path}: slice {i} is damaged ({error}); download the file again") from error
    if not np.isfinite(value).all():
        bad = int((~np.isfinite(value)).sum())
        raise ValueError(f"{path}: slice {i} of {stored.name} has {bad} NaN or infinite values of {value.size}")
    return value


def _dataset(file: h5py.File, path: Path, name: str) -> h5py.Dataset:
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise ValueError(f"{path}: no dataset {name!r}; it has {', '.join(file) or 'none'}: not a fastMRI file")
    return found


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        kind = "truncated or damaged HDF5" if h5py.is_hdf5(path) else "not an HDF5 file"
        raise ValueError(f"{path}: {kind} ({error}); download it again") from error
