"""Siemens raw data (.dat, "twix", software VA to XA) through the package twixtools, an extra.

    pip install "companion[formats]"

Noise adjustment, separate reference lines (PAT), averages, slices and repetitions are told apart by the measurement
data headers; navigators and phase correction are left out, by name. Readout is y here, line x, partition z.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from companion.data.intake import streams
from companion.data.intake.records import Description, Unreadable, pseudonym
from companion.data.raw.scan import Choice, RawScan, centred_box, choose, describe, raw_scan

LEFT_OUT = {
    "phase correction": "PHASCOR", "phase stabilisation": "PHASESTABSCAN", "its reference": "REFPHASESTABSCAN",
    "feedback": "RTFEEDBACK", "dummy scans": "RETRO_DUMMYSCAN",
}  # fmt: skip
COUNTERS = {"contrast": "Eco", "phase": "Phs", "repetition": "Rep", "set": "Set"}


def sniff_twix(path: str | os.PathLike) -> Description | None:
    """What a Siemens .dat file holds; None for another file."""
    path = Path(path)
    if not _is_twix(path):
        return None
    with open(path, "rb") as file:
        scan = _Measurement(path, file)
    return describe(
        "Siemens raw data",
        scan.shape,
        voxel_mm=scan.voxel_mm,
        person=pseudonym(*scan.patient),
        about={"counts": {n: c for n, c in scan.counts.items() if c > 1}, **scan.about},
    )


def read_twix(files: Sequence[Path], which: Choice = None) -> RawScan:
    """The last measurement of a Siemens .dat file. which: the contrast, phase, repetition, set to take of several.

    Lines measured several times are averaged. Raises Unreadable for damaged files, read-outs of a trajectory that is
    not Cartesian, and where twixtools is missing.
    """
    path = Path(files[0])
    if not _is_twix(path):
        raise Unreadable(path, "not a Siemens raw data file")
    with open(path, "rb") as file:
        scan = _Measurement(path, file)
        chosen = choose(path, scan.counts, which)
        imaging = [b for b in scan.imaging if all(getattr(b, "c" + COUNTERS[n]) == i for n, i in chosen.items())]
        if not imaging:
            raise Unreadable(path, f"no imaging data for {chosen}; choose others with which=...")
        sums, hits = scan.gridded(imaging)
        noise, calibration = scan.noise(), scan.calibration()
    np.divide(sums, np.maximum(hits, 1), out=sums)
    flat = len(scan.shape) == 4
    return raw_scan(
        path,
        sums[:, :, 0] if flat else sums,
        hits[:, :, 0] if flat else hits,
        voxel_mm=scan.voxel_mm,
        noise=noise,
        calibration=calibration if calibration is None or not flat else calibration[:, :, 0],
        oversampling=(scan.oversampling, 1.0) if flat else (1.0, scan.oversampling, 1.0),
        about=scan.about,
    )


def _is_twix(path: Path) -> bool:
    """Whether the first numbers are those of a raw data file: a header's length, or VD's table of measurements."""
    if reason := streams.instead(path):
        if reason.startswith("begins with zeros"):
            return False
        raise Unreadable(path, reason)
    size = path.stat().st_size
    first, second = (int.from_bytes(streams.head(path, 8)[i : i + 4], "little") for i in (0, 4))
    if first < 10000 and 0 < second <= 64:  # VD and later
        return size > 10240
    return 32 < first < size and 0 < second < 64  # VA, VB: length of the header, number of its parts


class _Measurement:
    """The last measurement of an open file, its lines sorted by kind."""

    def __init__(self, path: Path, file):
        self.path, self.about = path, {}
        with streams.guarded(path, "Siemens raw data"):
            self._sort(*_last_measurement(path, file))

    def _sort(self, blocks, header) -> None:
        config, yaps = header.get("Config", {}), header.get("MeasYaps", {})
        dicom = header.get("Dicom", {})
        self.patient = (config.get("PatientID"), dicom.get("tPatientID"))
        kinds = {"imaging": [], "noise": [], "calibration": []}
        for block in blocks:
            if block.is_flag_set("ACQEND") or block.is_flag_set("SYNCDATA"):
                continue
            left = next((name for name, flag in LEFT_OUT.items() if block.is_flag_set(flag)), None)
            if left:
                self.about[f"{left}, left out"] = self.about.get(f"{left}, left out", 0) + 1
            elif block.is_flag_set("NOISEADJSCAN"):
                kinds["noise"].append(block)
            elif block.is_flag_set("PATREFSCAN") and not block.is_flag_set("PATREFANDIMASCAN"):
                kinds["calibration"].append(block)
            else:
                kinds["imaging"].append(block)
        self.imaging, self._noise, self._calibration = kinds["imaging"], kinds["noise"], kinds["calibration"]
        if not self.imaging:
            raise Unreadable(self.path, "holds no imaging data, only noise, reference lines or navigators")
        kspace = yaps.get("sKSpace", {})
        if int(_number(kspace.get("ucTrajectory"), 1)) != 1:
            raise Unreadable(self.path, "its trajectory is radial, spiral or the like; expected cartesian k-space")
        used = self.imaging + self._calibration
        coils, samples = {b.mdh.UsedChannels for b in used}, {int(b.mdh.SamplesInScan) for b in used}
        if len(coils) != 1:
            raise Unreadable(self.path, f"lines with {sorted(coils)} coils; expected one number")
        base = int(_number(kspace.get("lBaseResolution"), 0))
        self.readout = max(*samples, 2 * base if 2 * base in range(max(samples), 2 * max(samples) + 1) else 0)
        self.oversampling = self.readout / base if 0 < base <= self.readout else 1.0
        lines = max(b.cLin for b in used) + 1
        centre = [int(np.median([getattr(b.mdh, n) for b in self.imaging])) for n in ("CenterLin", "CenterPar")]
        width = max(int(_number(config.get("NoOfFourierLines"), 0)), lines)
        width = max(width, 2 * centre[0]) if centre[0] < lines else width  # partial Fourier: the centre is the middle
        depth = max(b.cPar for b in used) + 1
        depth = max(int(_number(config.get("NoOfFourierPartitions"), 0)), depth) if depth > 1 else 1
        self.move = (depth // 2 - centre[1] if depth > 1 else 0, width // 2 - centre[0])
        ends = [(min(getattr(b, c) for b in used) + m, max(getattr(b, c) for b in used) + m, n)
                for c, m, n in (("cPar", self.move[0], depth), ("cLin", self.move[1], width))]  # fmt: skip
        if any(low < 0 or high >= n for low, high, n in ends) or width > 8192 or depth > 4096:
            self.move = (0, 0)  # the header's centre is that of another matrix; `raw_scan` looks for the echo
        slices = max(b.cSlc for b in used) + 1
        space = (depth, self.readout, width) if depth > 1 else (self.readout, width)
        self.shape = (slices, int(coils.pop()), *space)
        if np.prod(self.shape, dtype=float) * 8 > 64 * self.path.stat().st_size + 2**20:
            raise Unreadable(self.path, f"a matrix of {self.shape} is far larger than the file: damaged")
        self.counts = {name: max(getattr(b, "c" + c) for b in self.imaging) + 1 for name, c in COUNTERS.items()}
        self.voxel_mm = _voxel_mm(yaps, self.readout / self.oversampling, width, depth, slices)
        self.about["oversampling of the readout"] = round(self.oversampling, 3)
        for name, these in (("noise scan", self._noise), ("calibration", self._calibration)):
            if these:
                self.about[name] = f"{len(these)} lines"
        if protocol := str(yaps.get("tProtocolName", "")).strip('"'):
            self.about["protocol"] = protocol

    def gridded(self, blocks) -> tuple[np.ndarray, np.ndarray]:
        """Sums (slice, coil, z, y, x) of lines, and how many are in each (slice, 1, z, y, x)."""
        shape = self.shape if len(self.shape) == 5 else (*self.shape[:2], 1, *self.shape[2:])
        sums = np.zeros(shape, np.complex64)
        hits = np.zeros((shape[0], 1, *shape[2:]), np.float32)
        for block in blocks:
            try:
                data = np.asarray(block.data, np.complex64)
            except Exception as error:
                raise Unreadable(self.path, f"line {block.cLin} is damaged ({error}); export it again") from error
            n = data.shape[-1]
            if data.shape[0] != shape[1] or not 0 < n <= self.readout:
                raise Unreadable(self.path, f"line {block.cLin} holds {data.shape}, expected {shape[1]} coils: damaged")
            data = data[:, ::-1] if block.is_flag_set("REFLECT") else data
            centre = int(block.mdh.CenterCol) if 0 < int(block.mdh.CenterCol) < n else n // 2
            start = 0 if n == self.readout else min(max(self.readout // 2 - centre, 0), self.readout - n)
            at = (
                block.cSlc,
                slice(None),
                block.cPar + self.move[0],
                slice(start, start + n),
                block.cLin + self.move[1],
            )
            sums[at] += data
            hits[(at[0], 0, *at[2:])] += 1
        return sums, hits

    def noise(self) -> torch.Tensor | None:
        """Samples (coil, n) of the noise adjustment, scaled to the bandwidth of the imaging lines where it is known."""
        blocks = [b for b in self._noise if b.mdh.UsedChannels == self.shape[1]]
        if not blocks:
            return None
        values = np.concatenate([np.asarray(b.data, np.complex64) for b in blocks], 1)
        if not np.isfinite(values).all():
            raise Unreadable(self.path, "its noise scan holds NaN or infinite samples; export it again")
        return torch.from_numpy(values)

    def calibration(self) -> torch.Tensor | None:
        """(slice, coil, z, y, x) of separate reference lines, cut to the box around the centre that they fill."""
        if not self._calibration:
            return None
        sums, hits = self.gridded(self._calibration)
        return centred_box(sums / np.maximum(hits, 1), hits)


def _last_measurement(path: Path, file) -> tuple[list, dict]:
    """The lines and the header of the last measurement of an open file, whose values twixtools reads when asked.

    Each step is bounded by the size of the file: a damaged length, count or index ends the reading, not the memory.
    """
    try:
        import twixtools.hdr_def
        import twixtools.mdb
    except ImportError as error:
        raise Unreadable(
            path, 'Siemens raw data need the package twixtools: pip install "companion[formats]", or convert to ISMRMRD'
        ) from error
    size = path.stat().st_size
    first, count = (int(n) for n in np.fromfile(file, "<u4", 2))
    several = first < 10000 and count <= 64  # VD and later: a table of measurements
    start = 0
    if several:
        file.seek(0)
        start = int(np.fromfile(file, twixtools.hdr_def.MultiRaidFileHeader, 1)[0]["entry"][count - 1]["off_"])
    file.seek(start) if start < size else None
    length, parts = (int(n) for n in np.fromfile(file, "<u4", 2)) if start + 8 < size else (0, 0)
    if not (8 < length < size - start and 0 < parts < 64):
        raise Unreadable(path, "its measurement has no readable header; copy or export it again")
    blocks, at, least = [], start + length, 192 if several else 128  # bytes of a line's header
    while True:
        file.seek(at)
        try:
            block = twixtools.mdb.Mdb(file, several) if at + least <= size else None
        except ValueError:  # from ctypes: fewer bytes than its channels need
            block = None
        if block is None:
            raise Unreadable(path, "ends before its last line: truncated; copy or export it again")
        step = int(block.dma_len)
        if block.is_flag_set("ACQEND"):
            break
        if step < least or at + step > size:
            raise Unreadable(path, f"line {len(blocks)} says that it has {step} bytes: damaged; copy it again")
        blocks.append(block)
        at += step
    return blocks, _header(path, file, start, length, parts)


def _header(path: Path, file, start: int, length: int, parts: int) -> dict:
    """The parts of a measurement's header that are used here, name -> values, parsed by twixtools."""
    from twixtools.twixprot import parse_buffer

    file.seek(start + 8)
    text, found = file.read(length - 8), {}
    for _ in range(parts):
        named = re.match(rb"[\w]{0,40}(?=\0)", text)
        if not named:
            break
        name, text = named.group().decode("latin1"), text[named.end() + 1 :]
        one, text = text[4 : (end := 4 + int.from_bytes(text[:4], "little"))], text[end:]
        if name not in ("Config", "Dicom", "MeasYaps"):
            continue
        # twixtools' patterns take the square of the longest word or gap, and it grows lists up to any index
        longest = max((len(run) for run in re.findall(rb"\s+|\S+", one)), default=0)
        index = max((int(digits[:9]) for digits in re.findall(rb"\[(\d+)", one)), default=0)
        if longest > 20000 or index > 20000:
            raise Unreadable(path, f"part {name} of its header is damaged; copy or export it again")
        found[name] = parse_buffer(one.decode("latin1"))
    return found


def _number(value, default: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return default


def _voxel_mm(yaps, columns: float, lines: int, depth: int, slices: int):
    """Voxel size (z, y, x) from the protocol: fields of view and the distance of slices."""
    try:
        places = yaps["sSliceArray"]["asSlice"]
        first = places[0]
        y, x, z = first["dReadoutFOV"] / columns, first["dPhaseFOV"] / lines, first["dThickness"] / depth
        if slices > 1 and len(places) >= 2:
            normal, *positions = (
                np.array([float(vector.get(k, 0)) for k in ("dSag", "dCor", "dTra")])
                for vector in (first["sNormal"], *(p["sPosition"] for p in places))
            )
            along = [float(normal @ position) for position in positions]
            steps = np.abs(np.diff(sorted(along)))
            z = float(np.median(steps)) if steps.min() > 0.1 else z
        values = (float(z), float(y), float(x))
        return values if all(np.isfinite(values)) and min(values) > 0 else None
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
        return None
