"""An array (subject, ...) that grows subject by subject on disk, so that a preparation holds one of them at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np


class Rows:
    """Rows of one shape and type, appended one by one; what `store.write_dataset` takes in place of an array.

    They lie in an unnamed file in `folder` (made if it is not there) that is gone with this object.
    """

    def __init__(self, folder: str | os.PathLike):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)
        self._row: np.ndarray | None = None  # the last one
        self._count = 0

    def append(self, row: np.ndarray | np.generic) -> None:
        """Add a row; raises ValueError for NaN, infinity, or another shape or type than the first."""
        row = np.asarray(row, order="C")
        first = row if self._row is None else self._row
        if (row.shape, row.dtype) != (first.shape, first.dtype):
            raise ValueError(f"a row of {row.dtype} {row.shape} among rows of {first.dtype} {first.shape}")
        if row.dtype.kind in "fc" and not np.isfinite(row).all():
            bad = int((~np.isfinite(row)).sum())
            raise ValueError(f"{bad} NaN or infinite values of {row.size}; mask or repair them first")
        self._row = row
        self._file.write(row.tobytes())
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> np.ndarray:
        last = self._row
        if last is None or not -self._count <= index < self._count:
            raise IndexError(f"row {index} of {self._count}")
        size = last.nbytes
        self._file.seek((index % self._count) * size)
        row = np.frombuffer(self._file.read(size), last.dtype).reshape(last.shape)
        self._file.seek(0, os.SEEK_END)
        return row

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(self._count))

    @property
    def shape(self) -> tuple[int, ...]:
        """(subject, ...)."""
        return (self._count, *(() if self._row is None else self._row.shape))

    @property
    def ndim(self) -> int:
        """Number of axes, the subject's included."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))

    @property
    def dtype(self) -> np.dtype:
        """The type of the values."""
        return np.dtype(float) if self._row is None else self._row.dtype
