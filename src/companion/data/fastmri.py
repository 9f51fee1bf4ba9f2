"""fastMRI files: k-space volumes read slice by slice, with what their ISMRMRD header says of them.

Stored k-space is `(slice, coil, row, column)` or, single-coil, `(slice, row, column)`; rows are the readout, with its
oversampling, columns the phase encoding. This is the order used here, `(slice, coil, y, x)`: lines are undersampled
along x. The header calls the readout x and the phase encoding y; its numbers are turned around on reading. M4Raw's
files have the same form.

What was measured is read off the data as well as the header: a column that is zero was not acquired, whatever a mask
says, and an echo off the middle is brought there (see `raw.scan.recentred`).

Zbontar et al., fastMRI, arXiv 1811.08839; Inati et al., ISMRM raw data format, MRM 2017.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from companion.data.intake import streams
from companion.data.intake.heaps import check_heaps
from companion.data.intake.records import Description, pseudonym
from companion.data.raw.header import Header, decode_header, parse_header
from companion.data.raw.scan import RawScan, describe, echo_offset, raw_scan
from companion.operators.mri import crop_kspace

REFERENCES = ("reconstruction_rss", "reconstruction_esc")
PROBED = 4  # coils of one slice that show what was acquired


@dataclass(frozen=True, eq=False)
class Volume:
    """One scan; the k-space stays on disk until `read`.

    shape        (slice, coil, y, x) of the k-space
    recon_shape  (y, x) of the image that the scanner made: the header's, else the reference's, else the k-space's
    crop_shape   (y, x) of the same field of view at the acquired resolution; see `crop`
    voxel_mm     (z, y, x), acquired; None without a header
    lines        [first, last) columns acquired; the others are zero
    mask         (x,) zeros and ones, zero where nothing was acquired, for files that are undersampled; else None
    shift        (y, x) by how many samples `read` turns k-space to bring its echo to the middle
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
    shift: tuple[int, int] = (0, 0)
    offset: int = field(default=0, repr=False)  # of the first stored column
    attrs: Mapping[str, str | float | int] = field(default_factory=dict, repr=False)

    @property
    def slices(self) -> int:
        """How many slices there are."""
        return self.shape[0]

    @property
    def columns(self) -> Tensor:
        """The columns (x,) that were acquired, as ones: the mask of an undersampled file, else its lines."""
        if self.mask is not None:
            return self.mask
        columns = torch.zeros(self.shape[-1])
        columns[self.lines[0] : self.lines[1]] = 1
        return columns

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
            for place, i in zip(out, chosen, strict=True):
                one = _slice(stored, self.path, i).reshape(*self.shape[1:3], -1)
                place[..., self.offset : self.offset + one.shape[-1]] = one
        kspace = torch.from_numpy(out if isinstance(index, slice) else out[0])
        return kspace.roll(self.shift, (-2, -1)) if any(self.shift) else kspace

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

        The readout oversampling goes, the resolution stays. Where not all columns were acquired only the readout is
        cropped: columns must stay what was measured, so the result is `(..., crop_shape[0], x)`.
        """
        if self.columns.all():
            return crop_kspace(kspace, self.crop_shape)
        return crop_kspace(kspace.mT, self.crop_shape[:1]).mT


def open_volume(path: str | os.PathLike) -> Volume:
    """The description of a fastMRI file, multi-coil or single-coil, checked; of the k-space it reads one slice of a few
    coils, which shows what was acquired and where the echo lies.

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
        header = _header(file, path)
        width, lines = _columns(header, shape[3])
        offset = lines[0] if width != shape[3] else 0
        peak, acquired = _probe(stored, width, offset)
        acquired[: lines[0]] = acquired[lines[1] :] = False
        given = _mask(file, path, width, offset, shape[3])
        shift = (-peak[0], -peak[1])
        columns = torch.from_numpy(np.roll(acquired if given is None else acquired & given, shift[1])).float()
        span = columns.nonzero().flatten()
        if not len(span):
            raise ValueError(f"{path}: its k-space is zero everywhere, or everywhere that its mask says was measured")
        lines = (int(span[0]), int(span[-1]) + 1)
        undersampled = given is not None or len(span) < lines[1] - lines[0]
        shape = int(shape[0]), int(shape[1]), int(shape[2]), width
        recon = header.recon[1:] if header else tuple(reference[1:]) if reference else shape[2:]
        attrs = {k: v.item() if isinstance(v, np.generic) else v for k, v in file.attrs.items()}
        attrs = {k: v for k, v in attrs.items() if isinstance(v, str | int | float)}
        return Volume(
            path=path,
            name=path.stem,
            shape=shape,
            recon_shape=(int(recon[0]), int(recon[1])),
            crop_shape=_crop_shape(header, shape[2:], recon),
            voxel_mm=_voxel_mm(header, shape),
            lines=lines,
            mask=columns if undersampled else None,
            acquisition=str(attrs.get("acquisition", "")),
            patient=str(attrs.get("patient_id", "")),
            reference_name=names[0] if names else None,
            shift=shift,
            offset=offset,
            attrs=attrs,
        )


def sniff_fastmri(path: str | os.PathLike) -> Description | None:
    """What a fastMRI or M4Raw file holds; None for another kind of HDF5 file."""
    path = Path(path)
    with streams.guarded(path, "HDF5 file"):
        with _open(path) as file:
            if not isinstance(file.get("kspace"), h5py.Dataset) or _is_mrd(file):
                return None
        volume = open_volume(path)
    about = {
        "lines": f"{int(volume.columns.sum())} of {volume.shape[-1]}",
        "acceleration": round(volume.shape[-1] / int(volume.columns.sum()), 2),
        "fully sampled": volume.mask is None,
        "image": f"{volume.recon_shape[0]} x {volume.recon_shape[1]}",
        "echo off the middle (y, x)": tuple(-s for s in volume.shift) if any(volume.shift) else None,
    }
    return describe(
        "fastMRI HDF5",
        volume.shape,
        voxel_mm=volume.voxel_mm,
        contrast=volume.acquisition,
        person=_person(volume.patient),
        about={name: value for name, value in about.items() if value is not None},
    )


def read_fastmri(files, slices: slice = slice(None)) -> RawScan:
    """The scan of a fastMRI or M4Raw file, or of some of its slices, as one record; raises Unreadable."""
    path = Path(files[0])
    with streams.guarded(path, "HDF5 file"):
        volume = open_volume(path)
        kspace = volume.read(slices)
    over = tuple(n / m for n, m in zip(volume.shape[2:], volume.crop_shape, strict=True))
    scan = raw_scan(path, kspace, volume.columns, voxel_mm=volume.voxel_mm, oversampling=over)
    return replace(scan, shift=tuple(a + b for a, b in zip(scan.shift, volume.shift, strict=True)))


def _person(patient: str) -> str:
    """The hashes of the public set as they are, equal in all its folders; anything else might be a name or a number."""
    return patient if re.fullmatch(r"[0-9a-f]{32,}", patient) else pseudonym(patient)


def _is_mrd(file: h5py.File) -> bool:
    group = file.get("dataset")
    return isinstance(group, h5py.Group) and "xml" in group


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
        rows, columns = (max(1, min(n, round(n * share))) for n, share in zip(space, shares, strict=True))
    else:
        rows, columns = (min(n, int(m)) for n, m in zip(space, recon, strict=True))
    return rows, columns


def _voxel_mm(header: Header | None, shape) -> tuple[float, float, float] | None:
    if header is None or header.encoded_mm is None:
        return None
    depth, height, width = header.encoded_mm
    return depth / header.encoded[0], height / shape[2], width / shape[3]


def _mask(file: h5py.File, path: Path, width: int, offset: int, stored: int) -> np.ndarray | None:
    """What the file's mask says, (x,) bool, None if it has none."""
    if "mask" not in file:
        return None
    mask = np.asarray(_dataset(file, path, "mask")[()]).squeeze()
    if mask.ndim != 1 or len(mask) not in (width, stored) or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"{path}: mask is {mask.dtype} {mask.shape}; expected {stored} zeros and ones, one a column")
    out = np.zeros(width, bool)
    first = offset if len(mask) != width else 0
    out[first : first + len(mask)] = mask != 0
    return out


def _probe(stored: h5py.Dataset, width: int, offset: int) -> tuple[tuple[int, int], np.ndarray]:
    """How far the echo lies off the middle, (y, x), and which columns (x,) hold anything but zeros.

    Read off the middle slice, or the first that is not empty; of all columns stored where no slice can be read.
    """
    acquired = np.zeros(width, bool)
    acquired[offset : offset + stored.shape[-1]] = True
    slices = [len(stored) // 2, *range(min(len(stored), 64))]
    for i in dict.fromkeys(slices):
        for coils in (slice(0, PROBED), slice(None)):  # more than a few only if these were switched off
            try:
                one = np.nan_to_num(stored[i, coils] if stored.ndim == 4 else stored[i : i + 1])
            except OSError:
                return (0, 0), acquired  # `read` will say so
            if one.any():
                placed = np.zeros((*one.shape[:-1], width), np.complex64)
                placed[..., offset : offset + one.shape[-1]] = one
                rows, columns = echo_offset(torch.from_numpy(placed))
                return (rows, columns), (placed != 0).any((0, 1))
    return (0, 0), np.zeros(width, bool)


def _header(file: h5py.File, path: Path) -> Header | None:
    """The header of a file, None if it has none or an empty one."""
    if "ismrmrd_header" not in file:
        return None
    text = decode_header(_dataset(file, path, "ismrmrd_header")[()])
    try:
        return parse_header(text) if text else None
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
    check_heaps(path)
    try:
        return h5py.File(path, "r")
    except OSError as error:
        kind = "truncated or damaged HDF5" if h5py.is_hdf5(path) else "not an HDF5 file"
        raise ValueError(f"{path}: {kind} ({error}); download it again") from error
