"""NumPy's .npz with every checksum checked: the archive holds a CRC-32 of each array, which only a whole read tests."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from companion.data.intake import streams
from companion.data.intake.records import Unreadable

MOST = 1032  # deflate expands no more, so an array that is larger for its place in the file is not what it says


def read_npz(path: str | os.PathLike, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a .npz by name, all or those of `names` that are there, each read to its end and checked.

    Raises FileNotFoundError, or Unreadable for a damaged file, Python objects (never loaded), and what is no .npz.
    """
    path, arrays = Path(path), {}
    if (reason := streams.instead(path)) and not reason.startswith("a zip archive"):
        raise Unreadable(path, reason)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if not members or min(m.header_offset for m in members) > 0 or len(members) != _stated(path):
                raise Unreadable(path, "its list of arrays is damaged or empty; save or download it again")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if names is not None and name not in names:
                    continue
                if member.file_size > MOST * max(member.compress_size, 1):
                    raise Unreadable(path, f"{name} of {member.file_size} bytes cannot be in there: damaged")
                arrays[name] = _array(path, name, archive.read(member))
    except Unreadable:
        raise
    except Exception as error:  # zipfile and zlib raise many kinds for damaged archives
        raise Unreadable(path, f"not a readable npz of plain arrays ({error}); save or download it again") from error
    return arrays


def _stated(path: Path) -> int:
    """How many members the end of a zip archive says there are: a damaged list may swallow some without an error."""
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - (1 << 16) - 22, 0))
        tail = file.read()
    at = tail.rfind(b"PK\5\6")
    return int.from_bytes(tail[at + 10 : at + 12], "little")


def _array(path: Path, name: str, content: bytes) -> np.ndarray:
    try:
        stream = io.BytesIO(content)
        array = np.load(stream, allow_pickle=False)
    except Exception as error:  # NumPy's header parser raises many kinds
        raise Unreadable(path, f"not a readable npz of plain arrays: {name} ({error}); save it again") from error
    if not isinstance(array, np.ndarray) or stream.read(1):
        raise Unreadable(path, f"{name} does not end where its header says: damaged")
    return array
