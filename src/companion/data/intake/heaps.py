"""The heaps of texts and lists in HDF5 files, which the library reads without end where a length in them is damaged."""

from __future__ import annotations

import mmap
from pathlib import Path

from companion.data.intake.records import Unreadable

SEARCHED = 16 << 20  # bytes at each end of a file: heaps lie beside the attributes and lists that they belong to
MARK = b"GCOL\x01\0\0\0"


def check_heaps(path: Path) -> None:
    """Raise Unreadable for a heap whose free space has a length of 0, at which libhdf5 (2.0) stands for ever.

    HDF5 file format, III.E: a collection is its mark, its size, and objects of index, count, size and content; index 0
    is the free space, of which the size is all of it.
    """
    size = path.stat().st_size
    if size < 4096:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for start, end in {(0, min(size, SEARCHED)), (max(0, size - SEARCHED), size)}:
            at = content.find(MARK, start, end)
            while at >= 0:
                if _endless(content, at, size):
                    raise Unreadable(path, f"damaged HDF5 (the heap at byte {at}); copy or download it again")
                at = content.find(MARK, at + 8, end)


def _endless(content: mmap.mmap, begin: int, size: int) -> bool:
    end = min(begin + int.from_bytes(content[begin + 8 : begin + 16], "little"), size)
    at = begin + 16
    while at + 16 <= end:
        index = int.from_bytes(content[at : at + 2], "little")
        length = int.from_bytes(content[at + 8 : at + 16], "little")
        step = 16 + -(-length // 8) * 8 if index else length
        if not step:
            return True
        at += step
    return False
