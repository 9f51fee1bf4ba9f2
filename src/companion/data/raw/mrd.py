"""ISMRMRD files (.h5): acquisitions one by one, sorted into k-space by their counters.

Inati et al., MRM 2017. Noise scans, separate calibration lines and averages are told apart by flags and counters;
navigators, phase correction and dummy scans are left out, by name. Readout is y here, first phase encoding x, second z.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import h5py
import numpy as np

from companion.data.intake import streams
from companion.data.intake.heaps import check_heaps
from companion.data.intake.records import Description, Unreadable, pseudonym
from companion.data.raw.header import Header, decode_header, parse_header
from companion.data.raw.scan import Choice, RawScan, centred_box, choose, describe, raw_scan

if TYPE_CHECKING:
    from torch import Tensor

NOISE, CALIBRATION, REVERSED = 1 << 18, 1 << 19, 1 << 21  # flag n of the standard is bit n - 1
LEFT_OUT = {
    "navigators": 1 << 22, "phase correction": 1 << 23, "feedback": 1 << 25 | 1 << 27, "dummy scans": 1 << 26,
    "surface coil correction": 1 << 28,
}  # fmt: skip
CHOSEN = ("contrast", "phase", "repetition", "set")
BLOCK = 512  # acquisitions read at once
MOST = 2**36  # samples of a file that cannot be right


def sniff_mrd(path: str | os.PathLike) -> Description | None:
    """What an ISMRMRD file holds, from its header and the acquisitions' own; None for another kind of HDF5 file."""
    path = Path(path)
    with streams.guarded(path, "ISMRMRD file"), open_hdf5(path) as file:
        group = group_of(file)
        if group is None:
            return None
        header, heads = _header(path, group), _heads(path, group)
        found = _sorted(path, header, heads)
        about = {"counts": {n: c for n, c in found.counts.items() if c > 1}, **found.about}
        return describe(
            "ISMRMRD",
            found.shape,
            voxel_mm=found.voxel_mm,
            person=pseudonym(header.patient),
            about={name: value for name, value in about.items() if value},
        )


def read_mrd(files: Sequence[Path], which: Choice = None) -> RawScan:
    """The scan of an ISMRMRD file. which: the contrast, phase, repetition, set to take where there are several.

    Lines measured several times are averaged. Raises Unreadable for trajectories that are not Cartesian, lines read
    backwards (EPI, which needs a phase correction first), and whatever does not fit the header.
    """
    path = Path(files[0])
    with streams.guarded(path, "ISMRMRD file"), open_hdf5(path) as file:
        group = group_of(file)
        if group is None:
            raise Unreadable(path, f"no ISMRMRD data; it has {', '.join(file) or 'nothing'}")
        header, heads = _header(path, group), _heads(path, group)
        found = _sorted(path, header, heads)
        chosen = choose(path, found.counts, which)
        imaging = found.imaging.copy()
        for name, i in chosen.items():
            imaging &= heads["idx"][name] == i
        if not imaging.any():
            raise Unreadable(path, f"no imaging data for {chosen}; choose others with which=...")
        data = cast(h5py.Dataset, group["data"])  # as _heads saw to
        sums, hits = _gridded(path, data, found, np.flatnonzero(imaging))
        np.divide(sums, np.maximum(hits, 1), out=sums)
        noise = _noise(path, data, heads, found)
        calibration = _calibration(path, data, found)
    flat = header.encoded[0] == 1  # 2D slices; the mask then has no z
    sums, hits = (sums[:, :, 0], hits[:, :, 0]) if flat else (sums, hits)
    if calibration is not None:
        calibration = calibration[:, :, 0] if flat else calibration
    return raw_scan(
        path,
        sums,
        hits,
        voxel_mm=found.voxel_mm,
        noise=noise,
        calibration=calibration,
        oversampling=_oversampling(header)[1 if flat else 0 :],
        about={"protocol": header.protocol, **found.about} if header.protocol else found.about,
    )


def open_hdf5(path: Path) -> h5py.File:
    """An HDF5 file, open; raises FileNotFoundError or Unreadable."""
    if reason := streams.instead(path):
        raise Unreadable(path, reason)
    check_heaps(path)
    try:
        return h5py.File(path, "r")
    except (OSError, RuntimeError, ValueError) as error:
        kind = "truncated or damaged HDF5" if h5py.is_hdf5(path) else "not an HDF5 file"
        raise Unreadable(path, f"{kind} ({error}); download it again") from error


def group_of(file: h5py.File) -> h5py.Group | None:
    """The group with the data of an ISMRMRD file: "dataset", or the only one of this form; None if there is none."""
    names = ["dataset", *sorted(file)] if "dataset" in file else sorted(file)
    groups = [g for n in names if isinstance(g := file.get(n), h5py.Group) and "xml" in g and "data" in g]
    return groups[0] if groups else None


class _Sorted:
    """Where every acquisition goes: `at` (acquisition, 3) = slice, z, x; masks of kinds; shape of the whole."""

    def __init__(self, path: Path, header: Header, heads: np.ndarray):
        flags, index = heads["flags"], heads["idx"]
        self.noise = (flags & NOISE) != 0
        skipped = np.zeros(len(heads), bool)
        self.about: dict[str, object] = {}
        for name, bits in LEFT_OUT.items():
            these = (flags & np.uint64(bits)) != 0
            skipped |= these
            if these.any():
                self.about[f"{name}, left out"] = int(these.sum())
        self.calibration = ((flags & CALIBRATION) != 0) & ~self.noise & ~skipped
        self.imaging = ~self.noise & ~skipped & ~self.calibration
        if not self.imaging.any():
            raise Unreadable(path, "holds no imaging data, only noise, calibration or navigators")
        used = self.imaging | self.calibration
        if ((flags & REVERSED) != 0)[used].any():
            raise Unreadable(path, "lines are read backwards (EPI), which needs a phase correction first")
        coils = np.unique(heads["active_channels"][used])
        if len(coils) != 1 or not 0 < coils[0] <= 1024:
            raise Unreadable(path, f"acquisitions with {', '.join(map(str, coils[:4]))} coils; expected one number")
        depth, readout, width = header.encoded
        centre = [c // 2 if h is None else h for c, h in zip((depth, width), header.centre, strict=True)]
        steps = [index["kspace_encode_step_2"].astype(int), index["kspace_encode_step_1"].astype(int)]
        z, x = (s - c + n // 2 for s, c, n in zip(steps, centre, (depth, width), strict=True))
        for axis, n, position in (("second", depth, z), ("first", width, x)):
            if n > 1 and used.any() and not (0 <= position[used].min() and position[used].max() < n):
                low, high = position[used].min(), position[used].max()
                raise Unreadable(
                    path,
                    f"{axis} phase encoding at {low} to {high} of a matrix of {n}; the header is about another scan",
                )
        z = z if depth > 1 else np.zeros_like(z)
        slices = int(index["slice"][used].max()) + 1
        self.at = np.stack([index["slice"].astype(int), z, x], 1)
        self.shape = (slices, int(coils[0]), depth, readout, width)
        if math.prod(self.shape) > max(64 * len(heads) * readout * self.shape[1], 2**20):
            raise Unreadable(path, f"a matrix of {self.shape} for {len(heads)} lines; the header is damaged")
        self.shape = self.shape if depth > 1 else (*self.shape[:2], readout, width)
        self.counts = {name: int(index[name][self.imaging].max()) + 1 for name in CHOSEN}
        self.voxel_mm = _voxel_mm(header, heads, self.imaging, slices)
        self.start = _starts(path, heads, readout, used)
        if self.noise.any():
            self.about["noise scan"] = f"{int(self.noise.sum())} acquisitions"
        if self.calibration.any():
            self.about["calibration"] = f"{int(self.calibration.sum())} lines"
        self.about["oversampling of the readout"] = round(_oversampling(header)[1], 3)


def _sorted(path: Path, header: Header, heads: np.ndarray) -> _Sorted:
    if header.trajectory not in ("", "cartesian"):
        raise Unreadable(path, f"its trajectory is {header.trajectory}; expected cartesian k-space")
    return _Sorted(path, header, heads)


def _header(path: Path, group: h5py.Group) -> Header:
    try:
        return parse_header(decode_header(cast(Any, group["xml"])[()]))
    except (ValueError, OSError, RuntimeError, KeyError, TypeError, IndexError) as error:
        raise Unreadable(path, str(error)) from error


def _heads(path: Path, group: h5py.Group) -> np.ndarray:
    data: Any = group["data"]
    names = getattr(getattr(data, "dtype", None), "names", None) or ()
    if not {"head", "data"} <= set(names) or data.ndim != 1 or not 0 < len(data) < 2**28:
        raise Unreadable(path, "its data are not ISMRMRD acquisitions; convert the scan again")
    kind = data.id.get_type()
    lists = kind.get_member_type(kind.get_member_index(b"data"))
    if lists.get_class() != h5py.h5t.VLEN or lists.encode()[3]:  # of a list, not a text, this byte is 0
        raise Unreadable(path, "the type of its data is damaged; download it again")  # libhdf5 would crash on it
    try:
        heads = data.fields("head")[()]
        for name in ("flags", "idx", "active_channels", "number_of_samples", "center_sample", "sample_time_us"):
            heads[name]
        for name in (*CHOSEN, "slice", "kspace_encode_step_1", "kspace_encode_step_2"):
            heads["idx"][name]
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, IndexError, MemoryError) as error:
        raise Unreadable(path, f"its acquisitions' headers cannot be read ({error}); download it again") from error
    return heads


def _starts(path: Path, heads: np.ndarray, readout: int, used: np.ndarray) -> np.ndarray:
    """The position of the first sample of every acquisition in the readout: partial echoes end at the right place."""
    samples, centre = heads["number_of_samples"].astype(int), heads["center_sample"].astype(int)
    centre = np.where((centre == 0) | (centre >= samples), samples // 2, centre)
    start = np.where(samples == readout, 0, readout // 2 - centre)
    wrong = used & ((start < 0) | (start + samples > readout) | (samples < 1))
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise Unreadable(
            path, f"acquisition {i} has {samples[i]} samples around {centre[i]}; the encoded matrix has {readout}"
        )
    return start


def _gridded(path: Path, data: h5py.Dataset, found: _Sorted, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums (slice, coil, z, y, x) of the chosen acquisitions, and how many are in each (slice, 1, z, y, x)."""
    shape = found.shape if len(found.shape) == 5 else (*found.shape[:2], 1, *found.shape[2:])
    sums = np.zeros(shape, np.complex64)
    hits = np.zeros((shape[0], 1, *shape[2:]), np.float32)
    for i, line in _lines(path, data, chosen, shape[1]):
        slice_, z, x = found.at[i]
        part = slice(found.start[i], found.start[i] + line.shape[1])
        sums[slice_, :, z, part, x] += line
        hits[slice_, 0, z, part, x] += 1
    return sums, hits


def _lines(path: Path, data: h5py.Dataset, chosen: np.ndarray, coils: int):
    """(position, samples (coil, sample)) of one acquisition after another."""
    for first in range(0, len(chosen), BLOCK):
        block = chosen[first : first + BLOCK]
        try:
            rows = data[block[0] : block[-1] + 1]
            rows = rows[block - block[0]]
        except (OSError, RuntimeError, ValueError, MemoryError) as error:
            raise Unreadable(path, f"acquisitions {block[0]} to {block[-1]} are damaged ({error})") from error
        for i, row in zip(block, rows, strict=True):
            samples, values = int(row["head"]["number_of_samples"]), row["data"]
            if len(values) != 2 * coils * samples:
                raise Unreadable(
                    path,
                    f"acquisition {i} holds {len(values) // 2} numbers, its header says {coils} x {samples}: damaged",
                )
            yield i, np.ascontiguousarray(values, np.float32).view(np.complex64).reshape(coils, samples)


def _noise(path: Path, data: h5py.Dataset, heads: np.ndarray, found: _Sorted) -> Tensor | None:
    """Noise (coil, sample) scaled to the bandwidth of the imaging data, whose variance is proportional to it."""
    chosen = np.flatnonzero(found.noise & (heads["active_channels"] == found.shape[1]))
    if not len(chosen):
        return None
    import torch

    values = np.concatenate([line for _, line in _lines(path, data, chosen, found.shape[1])], 1)
    of_noise = float(heads["sample_time_us"][chosen[0]])
    of_image = float(heads["sample_time_us"][np.flatnonzero(found.imaging)[0]])
    if of_noise > 0 and of_image > 0 and math.isfinite(of_noise / of_image):
        values = values * np.float32(math.sqrt(of_noise / of_image))
    if not np.isfinite(values).all():
        raise Unreadable(path, "its noise scan holds NaN or infinite samples; export it again")
    return torch.from_numpy(values)


def _calibration(path: Path, data: h5py.Dataset, found: _Sorted):
    """(slice, coil, z, y, x) of separate calibration lines, cut to the box around the centre that they fill."""
    if not found.calibration.any():
        return None
    sums, hits = _gridded(path, data, found, np.flatnonzero(found.calibration))
    return centred_box(sums / np.maximum(hits, 1), hits)


def _oversampling(header: Header) -> tuple[float, float, float]:
    """Encoded / reconstructed field of view, (z, y, x); 1 where the header is silent or the image is the larger one."""
    if header.encoded_mm and header.recon_mm:
        z, y, x = (max(1.0, e / r) for e, r in zip(header.encoded_mm, header.recon_mm, strict=True))
        return z, y, x
    return (1.0, max(1.0, header.encoded[1] / header.recon[1]), 1.0)


def _voxel_mm(header: Header, heads, imaging, slices: int) -> tuple[float, float, float] | None:
    """Voxel size (z, y, x); between slices the distance that their positions tell."""
    if header.encoded_mm is None:
        return None
    z, y, x = (mm / n for mm, n in zip(header.encoded_mm, header.encoded, strict=True))
    if slices > 1 and {"position", "slice_dir"} <= set(heads.dtype.names):
        along = (heads["position"] * heads["slice_dir"]).sum(-1)[imaging]
        number = heads["idx"]["slice"][imaging]
        places = [along[number == s] for s in range(slices)]
        if all(len(p) for p in places):
            steps = np.abs(np.diff(sorted(float(p[0]) for p in places)))
            if len(steps) and np.isfinite(steps).all() and steps.min() > 0.1:
                z = float(np.median(steps))
    return float(z), float(y), float(x)
