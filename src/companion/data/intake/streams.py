"""Bytes of files, compressed or not: opened by content and not by name, read to the end, checksums checked.

A gzip stream ends in a CRC-32 of everything in it, a bzip2 block begins with one; both are checked only by reading on
to the end, which `part` does whatever it returns. Nothing is held but the part that was asked for.
"""

from __future__ import annotations

import bz2
import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from companion.data.intake.records import Unreadable

CHUNK, SLACK = 1 << 20, 1 << 20  # bytes; a file may be longer than its header says by SLACK
MAGIC = {
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard; decompress it first",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x00\x05\x16\x07": "macOS's note on another file (AppleDouble), not the file itself; delete it",
    b"version https://git-lfs": "a Git LFS pointer, its content is not here; fetch it with `git lfs pull`",
    b"/annex/objects/": "a git-annex pointer, its content is not here; fetch it with `git annex get`",
    b"<!doctype": "a web page, probably of a failed download; download the file again",
    b"<html": "a web page, probably of a failed download; download the file again",
}


def instead(path: Path, zeros: bool = False) -> str:
    """Return what a file is when it is certainly no data ("" otherwise), with what to do about it.

    zeros: whether it may begin with zeros, as raw values without a header do.
    """
    with _file(path) as file:
        start = file.read(64)
    if not start:
        return "empty, 0 bytes; download or copy it again"
    if not (zeros or start.strip(b"\0")):
        return "begins with zeros only, as interrupted copies do; copy it again"
    lower = start.lstrip().lower()
    return next((what for magic, what in MAGIC.items() if start.startswith(magic) or lower.startswith(magic)), "")


@contextmanager
def guarded(path: str | os.PathLike, kind: str) -> Iterator[None]:
    """Turn any error of a library inside into Unreadable: for damaged files they raise of every kind.

    Errors that say what is wrong already pass, and so does MemoryError, which a reader must not come to.
    """
    try:
        yield
    except (Unreadable, FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200].removeprefix(f"{path}: ") or type(error).__name__
        raise Unreadable(
            path, said if type(error) is ValueError else f"damaged {kind} ({said}); copy it again"
        ) from error


def head(path: Path, count: int) -> bytes:
    """Return the first `count` bytes, decompressed, fewer where the file is shorter; raises Unreadable."""
    try:
        with _opened(path) as stream:
            return stream.read(count)
    except (OSError, EOFError, zlib.error) as error:
        raise Unreadable(path, _damage(error)) from error


def part(path: Path, start: int, length: int, total: int | None = None) -> bytearray:
    """Return `length` bytes from `start` on, decompressed, having read the stream to its end and checked it.

    total: bytes that the header says there are, by default up to the end of the part. Raises Unreadable if the stream
    is damaged, ends before `total`, or is longer by more than SLACK.
    """
    total = start + length if total is None else total
    try:
        with _opened(path) as stream:
            packed = isinstance(stream, gzip.GzipFile | bz2.BZ2File)
            size = None if packed else stream.seek(0, 2)
            if size is not None and size < total:
                raise Unreadable(path, _short(size, total))
            kept = bytearray(length)
            if not packed:  # no checksum, so no need to read around it
                stream.seek(start)
                stream.readinto(kept)
                return kept
            at = 0
            while chunk := stream.read(CHUNK):
                low, high = max(start, at), min(start + length, at + len(chunk))
                if low < high:
                    kept[low - start : high - start] = chunk[low - at : high - at]
                at += len(chunk)
                if at > total + SLACK:
                    raise Unreadable(path, f"longer than the {total} bytes of its header: damaged, or not what it says")
    except Unreadable:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise Unreadable(path, _damage(error)) from error
    if at < total:
        raise Unreadable(path, _short(at, total))
    return kept


def check(path: Path) -> None:
    """Read a compressed file to its end, so that its checksum is checked, for libraries that do not; raises Unreadable.

    Of files without compression nothing is read.
    """
    try:
        with _opened(path) as stream:
            while isinstance(stream, gzip.GzipFile | bz2.BZ2File) and stream.read(CHUNK):
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise Unreadable(path, _damage(error)) from error


def _opened(path: Path):
    with _file(path) as file:
        start = file.read(3)
    if start[:2] == b"\x1f\x8b":
        return gzip.open(path)
    return bz2.open(path) if start == b"BZh" else _file(path)


def _file(path: Path):
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise Unreadable(path, f"cannot be opened ({error.strerror})") from error


def _short(size: int, total: int) -> str:
    return f"ends after {size} bytes where its header needs {total}: truncated; copy or download it again"


def _damage(error: Exception) -> str:
    kind = "truncated" if isinstance(error, EOFError) else "damaged"
    return f"{kind}, its compressed stream cannot be read to the end ({error}); copy or download it again"
