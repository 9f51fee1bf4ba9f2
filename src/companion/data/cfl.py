"""BART's pair of files: `name.hdr`, the dimensions as text, and `name.cfl`, complex64 in column-major order.

Axis i of an array here is BART's dimension i: 0 readout, 1 and 2 phase encoding, 3 coil, 4 maps, 5 echo, ... 10 time,
13 slice.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from companion.files import atomic_write

DIMENSIONS = 16


def read_cfl(path: str | os.PathLike, squeeze: bool = False) -> Tensor:
    """The array, complex64, with all dimensions of the header, or without those of length 1 (squeeze).

    path: with or without `.cfl` or `.hdr`. Raises FileNotFoundError when one of the two files is missing, ValueError
    for a header that is damaged or does not fit the data, NaN or infinity.
    """
    data, _, dims = cfl_dimensions(path)
    array = np.fromfile(data, dtype="<c8").astype(np.complex64, copy=False)
    if not np.isfinite(array).all():
        raise ValueError(f"{data}: {int((~np.isfinite(array)).sum())} NaN or infinite values of {array.size}")
    array = torch.from_numpy(array).reshape(dims[::-1]).permute(*range(len(dims) - 1, -1, -1))
    return (array.squeeze() if squeeze else array).contiguous()


def cfl_dimensions(path: str | os.PathLike) -> tuple[Path, Path, tuple[int, ...]]:
    """The .cfl and .hdr of a pair and the dimensions, checked against the size of the data, which are not read.

    Raises as `read_cfl`.
    """
    data, header = _pair(path)
    for file, other in ((header, data), (data, header)):
        if not file.is_file():
            beside = f" (there is {other.name})" if other.is_file() else ""
            raise FileNotFoundError(f"{file} does not exist{beside}; a cfl needs both its .hdr and its .cfl")
    dims = _dimensions(header)
    expected, found = 8 * math.prod(dims), data.stat().st_size
    if expected != found:
        raise ValueError(
            f"{data}: {found} bytes, but the dimensions {_short(dims)} of {header.name} need {expected}; the file is "
            "truncated or belongs to another header"
        )
    return data, header, dims


def write_cfl(path: str | os.PathLike, array) -> Path:
    """The path of the .cfl written with its .hdr, from an array or tensor, real or complex, of up to 16 axes.

    Both files appear, whole, or none: while they change places there is no header, so nothing reads a mixed pair.
    Raises ValueError for NaN, infinity (also from rounding to complex64), no values or too many axes.
    """
    data, header = _pair(path)
    array = array.detach().cpu().resolve_conj().numpy() if isinstance(array, Tensor) else np.asarray(array)
    if array.dtype.kind not in "fciub" or array.ndim > DIMENSIONS or not array.size:
        raise ValueError(
            f"{data.name}: cannot store {array.dtype} {array.shape}; expected numbers with up to {DIMENSIONS} axes"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        array = array.astype("<c8")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{data.name}: {bad} NaN or infinite values of {array.size}; mask or repair them first")
    dims = array.shape + (1,) * (DIMENSIONS - array.ndim)
    with atomic_write(header) as header_aside, atomic_write(data) as data_aside:
        _store(data_aside, array.tobytes(order="F"))
        _store(header_aside, f"# Dimensions\n{' '.join(map(str, dims))}\n".encode())
        header.unlink(missing_ok=True)
    return data


def _pair(path: str | os.PathLike) -> tuple[Path, Path]:
    path = Path(path)
    base = path.name.removesuffix(".cfl") if path.suffix == ".cfl" else path.name.removesuffix(".hdr")
    return path.with_name(base + ".cfl"), path.with_name(base + ".hdr")


def _store(path: Path, content: bytes) -> None:
    """Write and flush to disk, so that a full disk is noticed before anything old is given up."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _dimensions(header: Path) -> tuple[int, ...]:
    """The line after "# Dimensions"; other sections of the header are comments here."""
    try:
        if header.stat().st_size > 1 << 20:
            raise ValueError("longer than 1 MiB")
        lines = [line.strip() for line in header.read_text("utf-8-sig").splitlines()]
        titles = ["".join(line.lower().split()) for line in lines]
        following = lines[titles.index("#dimensions") + 1 :]
        dims = tuple(int(n) for n in next(line for line in following if line).split())
    except (ValueError, StopIteration) as error:
        raise ValueError(f"{header}: no line of integers after '# Dimensions'; not a BART header") from error
    if not dims or min(dims) < 1 or len(dims) > 64:
        raise ValueError(f"{header}: dimensions {_short(dims)} are not all positive")
    return dims


def _short(dims: tuple[int, ...]) -> str:
    used = max((i for i, n in enumerate(dims) if n != 1), default=0) + 1
    return " x ".join(map(str, dims[:used]))
