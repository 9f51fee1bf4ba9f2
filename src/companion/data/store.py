"""Prepared data in one HDF5 file: arrays by subject, with units, scale, source, seed and a split by subject.

Each array has the subject as its first axis, `(subject, ...)`; stacks of slices are `(subject, slice,
channel, y, x)`. The file appears whole or not at all, chunks carry checksums, and everything is checked when
it is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset

from companion.data.intake.heaps import check_heaps
from companion.data.rows import Rows
from companion.files import atomic_write

FORMAT = "companion-prepared-1"
HEADER = "header"
SPLITS = ("train", "validation", "test")


def write_dataset(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray | Rows],
    *,
    units: Mapping[str, str],
    scale: Mapping[str, str | float],
    source: str,
    seed: int | None,
    split: Mapping[str, Sequence],
    subjects: Sequence | None = None,
    attrs: Mapping[str, object] | None = None,
) -> Path:
    """The path of the file written, atomically, with everything a reader needs to trust it.

    arrays: name -> `(subject, ...)`, finite; `Rows` are copied one by one. units: name -> "1", "mm",
    "kBq/mL". scale: name -> how the values were scaled, in words or as the factor that multiplies them back to the
    source. source: where the data come from. split: "train", "validation", "test" -> subject identifiers; disjoint.
    subjects: identifiers in the order of the first axis, by default 0, 1, ... attrs: anything else that JSON can hold.
    Raises ValueError for NaN, arrays of different lengths, missing units or scale, or overlapping splits.
    """
    path = Path(path)
    arrays = {name: v if isinstance(v, Rows) else np.asarray(v) for name, v in arrays.items()}
    _check_arrays(arrays, units, scale)
    count = len(next(iter(arrays.values())))
    subjects = [str(s) for s in (range(count) if subjects is None else subjects)]
    split = {name: [str(s) for s in members] for name, members in split.items()}
    if len(subjects) != count:
        raise ValueError(f"{path.name}: {len(subjects)} subject names for arrays of {count} subjects")
    _check_split(path.name, subjects, split)
    header = {
        "source": source,
        "seed": seed,
        "subjects": subjects,
        "split": split,
        "attrs": dict(attrs or {}),
        "arrays": sorted(arrays),
        "units": {name: units[name] for name in arrays},
        "scale": {name: scale[name] for name in arrays},
    }
    # This version of the format has checksums over its own structures; those over values are asked for below.
    with atomic_write(path) as aside, h5py.File(aside, "w", libver=("v110", "v110")) as file:
        for name, value in arrays.items():
            # One chunk per subject and slice, what training asks for. Labels compress, images hardly.
            lead = min(value.ndim - 1, 2) if value.ndim > 3 else min(value.ndim, 1)
            chunks = tuple(1 if axis < lead else max(1, n) for axis, n in enumerate(value.shape))
            options = {"chunks": chunks, "fletcher32": True} if value.size else {}
            if value.size and value.dtype.kind in "iub":
                options |= {"compression": "gzip", "compression_opts": 1, "shuffle": True}
            stored = file.create_dataset(name, value.shape, value.dtype, **options)
            if isinstance(value, Rows):
                for i, row in enumerate(value):
                    stored[i] = row
            elif value.size:
                stored[...] = value
            stored.attrs["units"] = units[name]
            stored.attrs["scale"] = scale[name]
        text = np.frombuffer(json.dumps(header).encode(), np.uint8)
        file.create_dataset(HEADER, data=text, chunks=text.shape, fletcher32=True)  # attributes end at 64 KiB
        file.attrs["format"] = FORMAT
    return path


_NOTHING = "nothing"


def prepare_once(
    path: str | os.PathLike,
    parameters: Mapping[str, object],
    make: Callable[[], Mapping[str, Any]],
    require: Sequence[str] = (),
) -> Prepared:
    """The prepared file at `path`; `make()` gives the arguments of `write_dataset` when it is not there yet.

    parameters: what the contents depend on, JSON-able, kept as attrs["parameters"]. require: as for `open_dataset`.
    Raises ValueError for a file that was prepared with others, and what `make` and `open_dataset` raise.
    """
    path, wanted = Path(path), json.loads(json.dumps(dict(parameters)))
    if not path.exists():
        made = dict(make())
        made["attrs"] = dict(made.get("attrs") or {}) | {"parameters": wanted}
        write_dataset(path, **made)
    prepared = open_dataset(path, require)
    found = prepared.attrs.get("parameters")
    if found != wanted:
        found = found or {}
        names = [name for name in found | wanted if found.get(name, _NOTHING) != wanted.get(name, _NOTHING)]
        says, asked = (
            ", ".join(f"{name} = {these.get(name, _NOTHING)}" for name in names) for these in (found, wanted)
        )
        raise ValueError(
            f"{path} was prepared with {says} where the parameters ask for {asked}; "
            "delete the file, or give another data file"
        )
    return prepared


@dataclass(frozen=True)
class Prepared:
    """What a prepared file holds; the arrays stay on disk until `read` or `slices`."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    units: Mapping[str, str]
    scale: Mapping[str, str | float]
    source: str
    seed: int | None
    subjects: tuple[str, ...]
    split: Mapping[str, tuple[str, ...]]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def read(self, name: str, split: str | None = None) -> np.ndarray:
        """The array `name`, `(subject, ...)`, of all subjects or of one split; ValueError if damaged or not
        finite."""
        self._check_name(name)
        with _open(self.path) as file:
            value = _read(file, self.path, name, slice(None))
        return value if split is None else value[self.rows(split)]

    def rows(self, split: str) -> list[int]:
        """Positions along the subject axis of one split."""
        if split not in self.split:
            raise ValueError(f"{self.path.name} has no split {split!r}; it has {', '.join(self.split)}")
        position = {subject: row for row, subject in enumerate(self.subjects)}
        return [position[subject] for subject in self.split[split]]

    def shown(self, *splits: str) -> str:
        """The first of these splits, by default train, validation, test, that has somebody: one to show images of.

        A folder of one person may be in any of them.
        """
        splits = splits or ("train", "validation", "test")
        return next((split for split in splits if self.split.get(split)), splits[0])

    def slices(self, names: str | Sequence[str], split: str, transform: Callable | None = None) -> SliceDataset:
        """A torch Dataset over (subject, slice) of one split; see `SliceDataset`."""
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            self._check_name(name)
        return SliceDataset(self, names, split, transform)

    def sequences(self, name: str, split: str, length: int, stride: int = 1) -> SequenceDataset:
        """A torch Dataset of `length` consecutive slices of one subject of a split; see `SequenceDataset`."""
        self._check_name(name)
        return SequenceDataset(SliceDataset(self, (name,), split), length, stride)

    def _check_name(self, name: str) -> None:
        if name not in self.shapes:
            raise ValueError(f"{self.path.name} has no array {name!r}; it has {', '.join(self.shapes)}")


def open_dataset(path: str | os.PathLike, require: Sequence[str] = ()) -> Prepared:
    """The description of a prepared file, checked: format, arrays, subjects and split.

    require: names of arrays that must be there. Raises FileNotFoundError, or ValueError with one clear
    message for a truncated, damaged or foreign file, a missing array, or a split that is not by subject.
    """
    path = Path(path)
    with _open(path) as file:
        found = _format(file)
        if found != FORMAT:
            raise ValueError(
                f"{path}: not prepared by this package (format {found}, expected {FORMAT}); prepare it again"
            )
        try:
            text = cast(h5py.Dataset, file[HEADER])[()]
            header = json.loads(text.tobytes() if isinstance(text, np.ndarray) else text)
            stored = {name: cast(h5py.Dataset, file[name]) for name in header["arrays"]}
            shapes = {name: tuple(value.shape) for name, value in stored.items()}
            units = header.get("units") or {name: str(value.attrs["units"]) for name, value in stored.items()}
            scale = header.get("scale") or {name: _plain(value.attrs["scale"]) for name, value in stored.items()}
            subjects, split = header["subjects"], header["split"]
        except (KeyError, ValueError, OSError, RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: incomplete ({error}); prepare it again") from error
    missing = [name for name in require if name not in shapes]
    if missing:
        raise ValueError(f"{path}: no array {', '.join(missing)}; it has {', '.join(shapes)}")
    _check_split(path.name, subjects, split)
    return Prepared(
        path=path,
        shapes=shapes,
        units=units,
        scale=scale,
        source=header["source"],
        seed=header["seed"],
        subjects=tuple(subjects),
        split={name: tuple(members) for name, members in split.items()},
        attrs=header["attrs"],
    )


class SliceDataset(Dataset):
    """One tensor (or a tuple, for several names) per (subject, slice): arrays `(subject, slice, ...)` without
    them.

    Reads lazily. Every process opens the file for itself at the first access, so worker processes are safe,
    forked or spawned. `transform`, if given, is applied to the tensor or the tuple.
    """

    def __init__(self, prepared: Prepared, names: Sequence[str], split: str, transform: Callable | None = None):
        self.prepared, self.names, self.transform = prepared, tuple(names), transform
        self.rows = prepared.rows(split)
        shapes = {name: prepared.shapes[name] for name in self.names}
        depths = {shape[1] if len(shape) > 1 else 0 for shape in shapes.values()}
        if len(depths) != 1 or 0 in depths:
            raise ValueError(f"slices need arrays (subject, slice, ...) with the same number of slices, got {shapes}")
        self.depth = depths.pop()
        self._file, self._owner = None, None

    def __len__(self) -> int:
        return len(self.rows) * self.depth

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"slice {index} of {len(self)}")
        row, position = divmod(index % len(self), self.depth)
        key = (self.rows[row], position)
        values = tuple(torch.from_numpy(_read(self._handle(), self.prepared.path, name, key)) for name in self.names)
        value = values[0] if len(values) == 1 else values
        return value if self.transform is None else self.transform(value)

    def subject(self, index: int) -> str:
        """The identifier of the subject that item `index` belongs to."""
        return self.prepared.subjects[self.rows[index // self.depth]]

    def span(self, row: int, start: int, stop: int) -> torch.Tensor:
        """Slices start .. stop of the row-th subject of the split, of the first array: one read."""
        key = (self.rows[row], slice(start, stop))
        return torch.from_numpy(_read(self._handle(), self.prepared.path, self.names[0], key))

    def _handle(self) -> h5py.File:
        if self._owner != os.getpid():  # HDF5 handles must not cross a fork
            self._file, self._owner = _open(self.prepared.path), os.getpid()
        return cast(h5py.File, self._file)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None, "_owner": None}


class SequenceDataset(Dataset):
    """Windows `(length, ...)` of consecutive slices (or frames), never across two subjects.

    stride: slices between the starts of neighbouring windows; 1 gives every window there is. `dropped` counts
    the slices at the end of each subject that no window holds. Raises ValueError for volumes shorter than a window.
    """

    def __init__(self, slices: SliceDataset, length: int, stride: int = 1):
        if not 1 <= length <= slices.depth or stride < 1:
            raise ValueError(
                f"windows of {length} slices every {stride} cannot be cut from volumes of {slices.depth}; choose "
                f"1 to {slices.depth} slices and a stride of at least 1"
            )
        self.slices, self.length, self.stride = slices, length, stride
        self.per_subject = (slices.depth - length) // stride + 1
        self.dropped = slices.depth - length - (self.per_subject - 1) * stride

    def __len__(self) -> int:
        return len(self.slices.rows) * self.per_subject

    def __getitem__(self, index: int) -> torch.Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        row, position = divmod(index % len(self), self.per_subject)
        start = position * self.stride
        return self.slices.span(row, start, start + self.length)


def _format(file: h5py.File) -> str:
    """What a file says of its format: "none" if nothing, or nothing that can be read."""
    try:
        return str(file.attrs.get("format", "none"))
    except (OSError, RuntimeError, KeyError, ValueError):
        return "none"


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run the data notebook that prepares it, or check the path")
    check_heaps(path)
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(
            f"{path}: not a readable HDF5 file, truncated or of another kind ({error}); prepare it again"
        ) from error


def _read(file: h5py.File, path: Path, name: str, key) -> np.ndarray:
    try:
        value = np.asarray(cast(h5py.Dataset, file[name])[key])
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: array {name!r} is damaged ({error}); prepare or download it again") from error
    return _finite(value, f"{path}: array {name!r}")


def _finite(value: np.ndarray, name: str) -> np.ndarray:
    if value.dtype.kind in "fc" and not np.isfinite(value).all():
        bad = int((~np.isfinite(value)).sum())
        raise ValueError(f"{name} has {bad} NaN or infinite values of {value.size}; mask or repair them first")
    return value


def _check_arrays(arrays: Mapping[str, np.ndarray | Rows], units: Mapping, scale: Mapping) -> None:
    if not arrays:
        raise ValueError("there are no arrays to write")
    if HEADER in arrays:
        raise ValueError(f"an array cannot be called {HEADER!r}; choose another name")
    lengths = {name: value.shape[0] if value.ndim else None for name, value in arrays.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(f"arrays must share their first axis, the subjects; lengths are {lengths}")
    for name, value in arrays.items():
        if value.dtype.kind not in "fciub":
            raise ValueError(f"array {name!r} has type {value.dtype}; store numbers")
        if not isinstance(value, Rows):  # which has checked each
            _finite(value, f"array {name!r}")
        for what, given in (("units", units), ("scale", scale)):
            if name not in given:
                raise ValueError(f"array {name!r} has no {what}; give {what}={{{name!r}: ...}} ('1' if it has none)")


def _check_split(where: str, subjects: Sequence[str], split: Mapping[str, Sequence[str]]) -> None:
    if len(set(subjects)) != len(subjects):
        raise ValueError(f"{where}: subject names are not unique")
    if unknown := set(split) - set(SPLITS):
        raise ValueError(f"{where}: unknown split {', '.join(sorted(unknown))}; use {', '.join(SPLITS)}")
    seen: dict[str, str] = {}
    for name, members in split.items():
        for member in members:
            if member not in subjects:
                raise ValueError(f"{where}: split {name!r} names subject {member!r}, which is not in the file")
            if member in seen:
                raise ValueError(f"{where}: {member!r} is in both {seen[member]!r} and {name!r}; split by subject")
            seen[member] = name


def _plain(value):
    return value.item() if isinstance(value, np.generic) else str(value)
