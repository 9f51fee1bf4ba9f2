"""DICOM series as volumes: chosen by description, in the right place to a hundredth of a millimetre, in real values.

An array is (z, y, x) with z along the normal of the slices, y and x their rows and columns; the affine leads from
(x, y, z) indices to mm, RAS+. DICOM's own world is LPS+: x and y change sign.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from companion.data.dicom.headers import FileHeader, Frame, dataset, read_header
from companion.data.intake import kinds
from companion.data.intake.records import Description, Unreadable, Volume
from companion.data.intake.walk import is_hidden, walk

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
UNEVEN = 0.02  # mm by which distances of slices may differ, beside 1 % of the distance
CONTRASTS = {"PT": "PET", "CT": "CT", "NM": "SPECT"}


def sniff_dicom(path: str | os.PathLike) -> Description | None:
    """What one DICOM file is; files of equal `series` make a volume together, see `join_dicom`."""
    path = Path(path)
    header = read_header(path)
    if header is None:
        return None
    return _describe((path,), [header])


def join_dicom(files: Sequence[Path]) -> Description:
    """What the files of one series are together: slices, times, voxel size. Raises Unreadable for missing slices."""
    return _describe(tuple(files), [_header(Path(f)) for f in files])


def read_dicom(files: Sequence[Path], frame: int | None = None, part: str = "") -> Volume:
    """The volume of the files of one series, float32 in the file's units, or stored integers where nothing scales them.

    frame: which time of a dynamic series. part: words of `parts_of` a series that holds several ("phase", "echo 2");
    by default the only one, or the only magnitude. Raises Unreadable for missing or doubled slices, gantry tilt, and
    whatever `headers.read_header` refuses.
    """
    files = [Path(f) for f in files]
    stack = _stack(files, [_header(f) for f in files], part)
    if frame is None and len(stack.times) > 1:
        raise Unreadable(
            files[0],
            f"4D, {len(stack.times)} times of {len(stack.times[0])} slices; choose one with frame=0, or write it as a "
            "file of its own",
        )
    if not 0 <= (frame or 0) < len(stack.times):
        raise Unreadable(files[0], f"frame {frame} of a series with {len(stack.times)}")
    planes = _planes(stack.times[frame or 0])
    array = np.stack(planes)
    if not np.isfinite(array).all():
        raise Unreadable(files[0], f"{int((~np.isfinite(array)).sum())} NaN or infinite voxels; export it again")
    return Volume(array, stack.affine)


def parts_of(files: Sequence[Path]) -> dict[str, int]:
    """The parts of a series, "magnitude echo 1" -> how many images, where components or echoes share it."""
    return {name: len(frames) for name, frames in _parts([_header(Path(f)) for f in files]).items()}


def series_of(path: str | os.PathLike) -> tuple[Path, ...]:
    """The files of one folder that belong to the series of a DICOM file, this one among them."""
    path = Path(path)
    own = _header(path)
    files = []
    for entry in sorted(path.parent.iterdir()):
        if is_hidden(entry.name) or not entry.is_file():
            continue
        try:
            other = read_header(entry)
        except (Unreadable, OSError):  # of another file than the one that was asked for
            continue
        if other is not None and (other.series, _key(other)) == (own.series, _key(own)):
            files.append(entry)
    return tuple(files) if own.series else (path,)


# ------------------------------------------------------------------------------------------------- a folder of series


@dataclass(frozen=True)
class Series:
    """One series of a folder: `what` it is, and `trouble`, why it cannot be read ("" if it can)."""

    number: int
    description: str
    files: tuple[Path, ...] = field(repr=False)
    what: Description
    trouble: str = ""

    def read(self, frame: int | None = None, part: str = "") -> Volume:
        """The volume; see `read_dicom`."""
        return read_dicom(self.files, frame, part)


def find_series(folder: str | os.PathLike) -> tuple[Series, ...]:
    """The image series in a folder and below, in the order of their files; raises Unreadable if there are none."""
    groups: dict[tuple, list[tuple[Path, FileHeader]]] = {}
    reasons = {}
    for name, path in walk(folder).files.items():
        try:
            header = read_header(path)
        except Unreadable as error:
            reasons[name] = error.reason
            continue
        if header is not None:
            groups.setdefault((header.series, _key(header)), []).append((path, header))
    if not groups:
        said = "".join(f"\n  {name}: {reason}" for name, reason in list(reasons.items())[:10])
        raise Unreadable(folder, f"no DICOM images{':' if said else ''}{said}")
    found = []
    for number, members in enumerate(groups.values(), 1):
        files, headers = tuple(p for p, _ in members), [h for _, h in members]
        try:
            what, trouble = _describe(files, headers), ""
        except Unreadable as error:
            what, trouble = _describe(files[:1], headers[:1], whole=False), error.reason
        found.append(Series(number, headers[0].description, files, what, trouble))
    return tuple(found)


def series_table(series: Sequence[Series]) -> str:
    """The series as aligned lines: number, description, kind, shape, voxel size, and what is wrong with it."""
    rows = [("no", "description", "what", "shape", "mm (z, y, x)", "files", "")]
    for one in series:
        mm = " x ".join(f"{v:.3g}" for v in one.what.voxel_mm or ())
        kind = " ".join(str(w) for w in (one.what.contrast, *one.what.about.values()) if w)
        shape = " x ".join(map(str, one.what.shape))
        rows.append((str(one.number), one.description, kind, shape, mm, str(len(one.files)), one.trouble))
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, wide, strict=True)).rstrip() for row in rows)


def choose_series(folder: str | os.PathLike, description: str | int = "") -> Series:
    """The series of a folder whose description holds these words, or of this number; the only one by default.

    Raises Unreadable with the table of all where none or several fit.
    """
    series = find_series(folder)
    if isinstance(description, int):
        fits = [s for s in series if s.number == description]
    else:
        said = {s.number: " ".join(map(str, (s.description, *s.what.about.values()))).lower() for s in series}
        fits = [s for s in series if all(word in said[s.number] for word in description.lower().split())]
    if len(fits) > 1:  # a description in full comes before one that holds it
        fits = [s for s in fits if s.description.lower() == str(description).lower()] or fits
    if len(fits) != 1:
        many = f"{len(fits)} series fit {description!r}" if fits else f"no series fits {description!r}"
        raise Unreadable(folder, f"{many}; choose one by its description or number:\n{series_table(series)}")
    return fits[0]


# --------------------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True, eq=False)
class _Stack:
    times: tuple[tuple[Frame, ...], ...]
    affine: np.ndarray
    parts: dict[str, int]


def _key(header: FileHeader) -> tuple:
    first = header.frames[0]
    one = len(header.frames) == 1
    return (first.component, first.echo, first.shape, tuple(round(v, 3) for v in first.orientation)) if one else ()


def _header(path: Path) -> FileHeader:
    header = read_header(path)
    if header is None:
        raise Unreadable(path, "not a DICOM file")
    return header


def _describe(files: tuple[Path, ...], headers: Sequence[FileHeader], whole: bool = True) -> Description:
    first = headers[0]
    copies = len(headers) - len(headers := _once(headers))
    single = len(headers) == 1 and len(first.frames) == 1
    if single or not whole:
        frame = first.frames[0]
        times, slices, component = 1, 1 if single else len(first.frames), frame.component
        voxel = (frame.thickness, *frame.pixel_mm) if frame.thickness else None
        parts = {}
    else:
        stack = _stack(files, headers, "")
        frame, times, slices = stack.times[0][0], len(stack.times), len(stack.times[0])
        z, y, x = (float(v) for v in np.linalg.norm(stack.affine[:3, 2::-1], axis=0))
        voxel, component, parts = (z, y, x), frame.component, stack.parts
    shape, axes = (slices, *frame.shape), ("z", "y", "x")
    shape, axes = ((times, *shape), ("t", *axes)) if times > 1 else (shape, axes)
    about = {
        "series": first.description,
        "component": component if component != "magnitude" else "",
        "echo": frame.echo if len({h.frames[0].echo for h in headers}) > 1 else "",
        "not corrected for": first.uncorrected,
        "other parts": ", ".join(list(parts)[1:]),
        "copies of the same images, left out": copies,
    }
    return Description(
        "image", "DICOM", axes, shape, voxel, "float32" if frame.slope != 1 or frame.factor != 1 else first.dtype,
        first.units, CONTRASTS.get(first.modality) or kinds.contrast_of(first.description) or first.modality,
        first.person, first.session, "|".join([first.series, *map(str, _key(first))]),
        about={name: value for name, value in about.items() if value}, secrets=first.secrets,
    )  # fmt: skip


def _once(headers: Sequence[FileHeader]) -> list[FileHeader]:
    """The headers without copies: files of one instance UID that say the same of every frame, as of two exports."""

    def key(header: FileHeader) -> object:
        said = tuple(replace(frame, path=Path()) for frame in header.frames)
        return (header.instance, said) if header.instance else header.frames[0].path

    return list({key(header): header for header in reversed(headers)}.values())[::-1]


def _parts(headers: Sequence[FileHeader]) -> dict[str, list[Frame]]:
    frames = [frame for header in headers for frame in header.frames]
    echoes, turns = {f.echo for f in frames}, {tuple(round(v, 2) for v in f.orientation) for f in frames}
    parts: dict[str, list[Frame]] = {}
    for frame in frames:
        name = frame.component + (f" echo {frame.echo}" if len(echoes) > 1 else "")
        turn = tuple(round(v, 2) for v in frame.orientation)
        name += f" orientation {sorted(turns).index(turn) + 1}" if len(turns) > 1 else ""
        parts.setdefault(name, []).append(frame)
    return parts


def _stack(files: Sequence[Path], headers: Sequence[FileHeader], part: str) -> _Stack:
    path = files[0]
    parts = _parts(_once(headers))
    fits = [name for name in parts if all(word in name for word in part.lower().split())]
    if not part and len(fits) > 1:
        fits = [name for name in fits if name.startswith("magnitude")]
    if len(fits) != 1:
        listed = "; ".join(f"{name} ({len(frames)} images)" for name, frames in parts.items())
        raise Unreadable(path, f"a series of several parts: {listed}; choose one with part={list(parts)[0]!r}")
    frames = parts[fits[0]]
    times, affine = _geometry(path, frames)
    order = [fits[0], *(n for n in parts if n != fits[0])]
    return _Stack(times, affine, {name: len(parts[name]) for name in order})


def _geometry(path: Path, frames: list[Frame]) -> tuple[tuple[tuple[Frame, ...], ...], np.ndarray]:
    """Frames by time and slice, the slices along their normal, and the affine; raises Unreadable if they do not fit."""
    first = frames[0]
    for name in ("shape", "pixel_mm", "orientation"):
        values = np.array([getattr(f, name) for f in frames], float)
        if np.abs(values - values[0]).max() > 1e-3:
            raise Unreadable(path, f"images of one series differ in {name}; they make no volume")
    along = np.array([np.dot(f.normal, f.position) for f in frames])
    order = np.argsort(along, kind="stable")
    groups: list[list[Frame]] = []
    for i in order:
        if groups and abs(along[i] - np.dot(groups[-1][0].normal, groups[-1][0].position)) < UNEVEN:
            groups[-1].append(frames[i])
        else:
            groups.append([frames[i]])
    counts = {len(g) for g in groups}
    if len(counts) > 1:
        most = max(counts)
        short = [i + 1 for i, g in enumerate(groups) if len(g) < most]
        raise Unreadable(
            path, f"{most} images at most places, fewer in slices {_some(short)} of {len(groups)}: missing"
        )
    places = np.array([g[0].position for g in groups])
    step = _step(path, places, first)
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.orientation[:3]) * first.pixel_mm[1]
    affine[:3, 1] = np.array(first.orientation[3:]) * first.pixel_mm[0]
    affine[:3, 2], affine[:3, 3] = step, places[0]
    by_time = [sorted(g, key=lambda f: f.order) for g in groups]
    return tuple(zip(*by_time, strict=True)), LPS @ affine


def _step(path: Path, places: np.ndarray, first: Frame) -> np.ndarray:
    """The vector from slice to slice, (3,)."""
    if len(places) == 1:
        return first.normal * (first.thickness or 1.0)
    step = (places[-1] - places[0]) / (len(places) - 1)
    steps = np.diff(places, axis=0)
    size = np.linalg.norm(np.median(steps, axis=0))
    uneven = np.linalg.norm(steps - np.median(steps, axis=0), axis=1)
    if uneven.max() > max(UNEVEN, 0.01 * size):
        where = [int(i) + 1 for i in np.flatnonzero(uneven > max(UNEVEN, 0.01 * size))]
        raise Unreadable(
            path,
            f"slices are missing or not evenly spaced: {size:.3g} mm apart, but not after slice {_some(where)} "
            f"of {len(places)}",
        )
    if np.linalg.norm(np.cross(step, first.normal)) > 2e-3 * np.linalg.norm(step):
        raise Unreadable(path, "its slices are sheared (gantry tilt); resample it to an upright grid first")
    return step


def _some(numbers: Sequence[int], most: int = 5) -> str:
    return ", ".join(map(str, numbers[:most])) + (f" and {len(numbers) - most} more" if len(numbers) > most else "")


# ------------------------------------------------------------------------------------------------------------ values


def _planes(frames: Sequence[Frame]) -> list[np.ndarray]:
    """The values (y, x) of each frame; a file of many frames is opened once."""
    opened: dict[Path, np.ndarray] = {}
    plain = all((f.slope, f.intercept, f.factor) == (1.0, 0.0, 1.0) for f in frames)
    planes = []
    for frame in frames:
        if frame.path not in opened:
            opened = {frame.path: _pixels(frame)}
        stored = opened[frame.path]
        stored = stored[frame.index] if stored.ndim == 3 else stored
        if stored.shape != frame.shape:
            raise Unreadable(frame.path, f"pixels {stored.shape}, its header says {frame.shape}: damaged")
        value = (stored * np.float64(frame.slope) + frame.intercept) * frame.factor
        planes.append(stored if plain else value.astype(np.float32))
    return planes


def _pixels(frame: Frame) -> np.ndarray:
    """Stored numbers (y, x) or (frame, y, x), decompressed by pydicom or, where it cannot, by SimpleITK (GDCM)."""
    d = dataset(frame.path, pixels=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(d.pixel_array)
    except Exception as error:  # pydicom raises many kinds, for damage and for missing decoders
        syntax = getattr(getattr(d, "file_meta", None), "TransferSyntaxUID", None)
        if syntax is None or not syntax.is_compressed:
            raise Unreadable(frame.path, f"its pixels cannot be read ({_short(error)}); copy it again") from error
        return _by_itk(frame, syntax.name)


def _by_itk(frame: Frame, name: str) -> np.ndarray:
    import SimpleITK as sitk

    try:
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        values = sitk.GetArrayFromImage(sitk.ReadImage(str(frame.path), imageIO="GDCMImageIO"))
    except RuntimeError as error:
        raise Unreadable(frame.path, f"its pixels ({name}) cannot be read ({_short(error)}); decompress it") from error
    values = values[0] if values.shape[0] == 1 else values
    return np.rint((values - frame.intercept) / frame.slope)  # GDCM applies the scaling; take it back


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[-160:] or type(error).__name__
