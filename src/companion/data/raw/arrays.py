"""k-space in files that name no axes (.npy), little of them (.mat), or BART's (.cfl): the user states the axes.

`axes` names every axis of the array as NumPy, MATLAB or BART shows it, of "slice", "coil", "z", "y", "x" (y the
readout, x and z the phase encodings) and any other word for what is to be chosen with `which`: axes="coil y x",
axes="x y coil slice frame". CMRxRecon's .mat files are recognised by the name of their variable.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from companion.data.cfl import cfl_dimensions, read_cfl
from companion.data.intake import streams
from companion.data.intake.records import Description, Unreadable
from companion.data.raw.mrd import open_hdf5
from companion.data.raw.scan import Choice, RawScan, choose, describe, looks_like_kspace, raw_scan

SPACE = ("z", "y", "x")
KNOWN = ("slice", "coil", *SPACE)
# CMRxRecon (Wang et al. 2023): readout kx, phase encoding ky, coil (not in single-coil files), slice, time or weighting
CMRXRECON = {5: ("y", "x", "coil", "slice", "frame"), 4: ("y", "x", "coil", "slice"), 3: ("y", "x", "slice")}
CMRX_SINGLE = {4: ("y", "x", "slice", "frame"), 3: ("y", "x", "slice")}
BART = ("y", "x", "z", "coil", "map", "echo", *(f"dim{i}" for i in range(6, 10)), "time", "time2", "dim12", "slice")


def sniff_npy(path: str | os.PathLike) -> Description | None:
    """What a NumPy array is: k-space or an image, by its look; what its axes are, only the user knows."""
    array = _npy(Path(path))
    if array.ndim < 2:
        return None
    return _unnamed("k-space" if looks_like_kspace(array) else "image", "NumPy", array.shape, array.dtype.name)


def read_npy(files: Sequence[Path], axes: str | None = None, which: Choice = None, frame: int | None = None) -> RawScan:
    """The scan in a NumPy array of complex numbers with stated axes; frame is for images, which have none here."""
    path = Path(files[0])
    return _scan(path, _npy(path), axes, which)


def sniff_mat(path: str | os.PathLike) -> Description | None:
    """The k-space of a MATLAB file, None if it holds no complex array; the axes of CMRxRecon's are known."""
    path = Path(path)
    with streams.guarded(path, "MATLAB file"):
        name, shape, dtype = _variable(path, None)
    if name is None:
        return None
    axes = _cmrxrecon(name, shape)
    if axes is None:
        return _unnamed("k-space", "MATLAB", shape, dtype, variable=name)
    order = {axis: n for axis, n in zip(axes, shape, strict=True)}
    counts = {"frame": order["frame"]} if "frame" in order else {}
    shape = (order.get("slice", 1), order.get("coil", 1), order["y"], order["x"])
    return describe("CMRxRecon", shape, about={"variable": name, "counts": counts})


def read_mat(
    files: Sequence[Path],
    axes: str | None = None,
    which: Choice = None,
    variable: str | None = None,
) -> RawScan:
    """The scan in a MATLAB file, of either version. variable: its name, where there are several complex arrays."""
    path = Path(files[0])
    with streams.guarded(path, "MATLAB file"):
        name, shape, _ = _variable(path, variable)
    if name is None:
        raise Unreadable(path, "holds no complex array with three axes or more: no k-space")
    known = _cmrxrecon(name, shape)
    axes = " ".join(known) if axes is None and known else axes
    return _scan(path, _mat(path, name), axes, which, {"variable": name})


def sniff_cfl(path: str | os.PathLike) -> Description | None:
    """What a BART pair holds by its dimensions and its look: k-space or an image; None for another kind of .hdr."""
    path = Path(path)
    if path.suffix.lower() == ".hdr" and b"imensions" not in streams.head(path, 1 << 16):
        return None
    try:
        data, header, dims = cfl_dimensions(path)
    except (ValueError, OSError) as error:
        raise Unreadable(path, _reason(error)) from error
    names = _bart_axes(dims)
    order = {axis: n for axis, n in zip(names, dims, strict=True) if axis}
    parts = tuple(p for p in (data, header) if p != path)
    values = np.memmap(data, "<c8", "r", shape=dims, order="F")
    if not looks_like_kspace(values):
        shown = {axis: n for axis, n in order.items() if n > 1} or {"y": 1}
        return Description("image", "BART", tuple(shown), tuple(shown.values()), dtype="complex64", parts=parts)
    space = [order[axis] for axis in SPACE if axis in order]
    counts = {a: n for a, n in order.items() if a not in KNOWN}
    description = describe("BART", (order.get("slice", 1), order["coil"], *space), about={"counts": counts})
    return replace(description, parts=parts)


def read_cfl_scan(
    files: Sequence[Path], axes: str | None = None, which: Choice = None, frame: int | None = None
) -> RawScan:
    """The scan in a BART pair, whose axes BART defines: readout, two phase encodings, coil, ..., slice.

    axes: others, as BART shows the array; needed for k-space that looks like an image. frame: as in `read_npy`.
    """
    path = Path(files[0])
    try:
        array = read_cfl(path).numpy()
    except (ValueError, OSError) as error:
        raise Unreadable(path, _reason(error)) from error
    if axes is None:
        if not looks_like_kspace(array):
            raise Unreadable(
                path, "looks like an image and not like k-space; if it is, state its axes: axes='y x coil'"
            )
        names = _bart_axes(array.shape)
        array = array.reshape([n for n, axis in zip(array.shape, names, strict=True) if axis])
        axes = " ".join(axis for axis in names if axis)
    return _scan(path, array, axes, which)


def _reason(error: Exception) -> str:
    """The text of a reader's error without the name of the file before it."""
    text = str(error)
    return text.partition(": ")[2] if "/" in text.partition(": ")[0] and ": " in text else text


def _bart_axes(dims: Sequence[int]) -> list[str]:
    """The name of each of BART's dimensions, "" for those of length 1.

    A slice of a 3D scan has a readout of length 1 and two phase encodings, which are y and x then.
    """
    names = [*BART, *(f"dim{i}" for i in range(len(BART), len(dims)))][: len(dims)]
    if dims[0] == 1 and len(dims) > 2 and min(dims[1:3]) > 1:
        names[:3] = ["", "y", "x"]
    return [axis if n > 1 or axis in ("y", "x", "coil") else "" for axis, n in zip(names, dims, strict=True)]


def _scan(path: Path, array: np.ndarray, axes: str | None, which, about=None) -> RawScan:
    """The record of an array whose axes are named."""
    if axes is None:
        raise Unreadable(path, f"its axes {array.shape} are not stated; give them, as in axes='coil y x'")
    names = axes.replace(",", " ").split()
    if len(names) != array.ndim or len(set(names)) != len(names):
        raise Unreadable(path, f"axes='{axes}' names {len(names)} axes, the array has {array.shape}")
    if missing := [a for a in ("y", "x") if a not in names]:
        raise Unreadable(path, f"axes='{axes}' has no {' and '.join(missing)}; y is the readout, x the phase encoding")
    if array.dtype.kind != "c":
        raise Unreadable(path, f"holds {array.dtype}, k-space is complex")
    chosen = choose(path, {n: size for n, size in zip(names, array.shape, strict=True) if n not in KNOWN}, which)
    array = array[tuple(chosen.get(n, slice(None)) for n in names)]
    names = [n for n in names if n not in chosen]
    wanted = [n for n in KNOWN if n in names]
    array = array.transpose([names.index(n) for n in wanted])
    for at, name in enumerate(("slice", "coil")):
        array = array if name in wanted else np.expand_dims(array, at)
    return raw_scan(path, np.ascontiguousarray(array, np.complex64), about=about or {})


def _unnamed(kind: str, form: str, shape: tuple[int, ...], dtype: str, **about) -> Description:
    axes = tuple(f"axis {i}" for i in range(len(shape)))
    about["axes"] = "not stated; give them, as in axes='coil y x'"
    return Description(kind, form, axes, tuple(shape), dtype=dtype, about=about)


def _npy(path: Path) -> np.ndarray:
    if reason := streams.instead(path):
        raise Unreadable(path, reason)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy's header parser raises many kinds
        raise Unreadable(path, f"not a readable array of numbers ({error}); save it again") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fciub":
        raise Unreadable(path, "not an array of numbers; save it again with np.save")
    header = path.stat().st_size - array.nbytes
    if not 0 < header < 2**16 or array.ndim > 32:
        raise Unreadable(path, f"{path.stat().st_size} bytes for an array of {array.nbytes}: damaged")
    return array


def _cmrxrecon(name: str, shape: tuple[int, ...]) -> tuple[str, ...] | None:
    if not (name.startswith("kspace") and len(shape) in CMRXRECON):
        return None
    return (CMRX_SINGLE if "single" in name else CMRXRECON).get(len(shape))


def _variable(path: Path, wanted: str | None) -> tuple[str | None, tuple[int, ...], str]:
    """Name, shape as MATLAB has it, and type of the k-space in a .mat file: what is wanted, or the only complex one."""
    if reason := streams.instead(path):
        raise Unreadable(path, reason)
    found = _hdf5_variables(path) if h5py.is_hdf5(path) else _old_variables(path)
    if wanted is not None:
        if wanted not in found:
            raise Unreadable(path, f"has no complex array {wanted}; it has {', '.join(found) or 'none'}")
        return (wanted, *found[wanted])
    k = [n for n in found if n.lower().startswith(("kspace", "kdata", "ksp"))]
    names = k if len(k) == 1 else list(found)
    if len(names) > 1:
        raise Unreadable(path, f"has several complex arrays, {', '.join(names)}; choose one with variable=...")
    return (names[0], *found[names[0]]) if names else (None, (), "")


def _hdf5_variables(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    with open_hdf5(path) as file:
        try:
            items = {n: d for n, d in file.items() if isinstance(d, h5py.Dataset) and d.ndim >= 3 and _complex(d.dtype)}
            return {n: (tuple(int(s) for s in d.shape[::-1]), "complex64") for n, d in items.items()}
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise Unreadable(path, f"damaged ({error}); copy it again") from error


def _complex(dtype: np.dtype) -> bool:
    return dtype.kind == "c" or set(dtype.names or ()) == {"real", "imag"}


def _old_variables(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Complex arrays of a MATLAB file before version 7.3; every compressed part is read to its end and checked."""
    import scipy.io

    _check_parts(path)
    try:
        names = [
            name for name, shape, kind in scipy.io.whosmat(path) if len(shape) >= 3 and kind in ("double", "single")
        ]
        arrays = scipy.io.loadmat(path, variable_names=names) if names else {}
    except Exception as error:  # scipy's reader raises many kinds for damaged files
        raise Unreadable(path, f"not a readable MATLAB file ({error}); save it again") from error
    return {n: (arrays[n].shape, arrays[n].dtype.name) for n in names if n in arrays and arrays[n].dtype.kind == "c"}


def _check_parts(path: Path) -> None:
    """Raise Unreadable unless every part of a MATLAB 5 file is whole: compressed ones end in an Adler-32."""
    content = path.read_bytes()
    if len(content) < 136 or content[126:128] not in (b"IM", b"MI"):
        raise Unreadable(path, "not a MATLAB file of version 5 to 7; save it with -v7 or -v7.3")
    order = "little" if content[126:128] == b"IM" else "big"
    at, compressed = 128, 15
    while at + 8 <= len(content):
        kind, size = (int.from_bytes(content[i : i + 4], order) for i in (at, at + 4))
        if at + 8 + size > len(content):
            raise Unreadable(path, f"ends within a variable, {len(content)} bytes: truncated or damaged; copy it again")
        if kind == compressed:
            stream, left = zlib.decompressobj(), content[at + 8 : at + 8 + size]
            try:
                while left and not stream.eof:
                    stream.decompress(left, 1 << 22)
                    left = stream.unconsumed_tail
            except zlib.error as error:
                raise Unreadable(path, f"a variable is damaged ({error}); copy it again") from error
            if not stream.eof:
                raise Unreadable(path, "a variable ends early: truncated or damaged; copy it again")
        elif kind != 14:
            raise Unreadable(path, f"a part of unknown kind {kind}: damaged; copy it again")
        at += 8 + size


def _mat(path: Path, name: str) -> np.ndarray:
    """The array as MATLAB has it."""
    try:
        if h5py.is_hdf5(path):
            with open_hdf5(path) as file:
                stored: Any = file[name]
                if stored.size * 8 > 64 * path.stat().st_size + 2**20:
                    raise Unreadable(path, f"{name} {stored.shape} is far larger than the file: damaged")
                value = stored[()]
                if value.dtype.names:
                    pair = np.empty(value.shape, np.complex64)
                    pair.real, pair.imag = value["real"], value["imag"]
                    value = pair
                return value.transpose()
        import scipy.io

        return scipy.io.loadmat(path, variable_names=[name])[name]
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(path, f"{name} is damaged ({error}); copy it again") from error
