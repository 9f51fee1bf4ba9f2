"""Records of the intake: what a file is, whose it is, what became of it; and the one error of all readers.

A reader is two functions. `sniff(path)` returns the `Description` of a file from its header alone, None where the file
is of another format, and raises `Unreadable` where it is of this format but damaged or of a kind that nobody here can
use. `read(files, ...)` returns the values: an image as a `Volume`, other kinds as their module says.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_KEY = secrets.token_bytes(32)  # of this process, never stored: without it no guess of an identity can be checked
_NOBODY = re.compile(r"x+|0+|-+|anon\w*|unknown|none|null|n/?a|no[ _^]?name|deidentified|removed", re.IGNORECASE)
KINDS = ("image", "labels", "mask", "probability", "k-space", "sinogram", "list mode", "picture")


class Unreadable(ValueError):
    """A file or folder that cannot be used: which, why, and what to do. `path` and `reason` are its parts."""

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason

    def __reduce__(self):
        return type(self), (self.path, self.reason)


def reason(error: Exception) -> str:
    """Return why a file cannot be used without the path to it, which may name a patient."""
    return error.reason if isinstance(error, Unreadable) else str(error)


@dataclass(frozen=True, eq=False)
class Volume:
    """`array` (z, y, x) and its 4 x 4 `affine` from voxel indices (x, y, z) to mm."""

    array: np.ndarray
    affine: np.ndarray

    @property
    def voxel_mm(self) -> tuple[float, float, float]:
        """Voxel size in mm, (z, y, x)."""
        x, y, z = (float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))
        return z, y, x


@dataclass(frozen=True)
class Description:
    """What a file says of itself, read from its header.

    kind      one of `KINDS`; an image is anything that shows anatomy or activity, in 2, 3 or 4 dimensions
    format    in words: "NIfTI-1", "DICOM", "fastMRI HDF5"
    axes      names of the axes as read: ("z", "y", "x"), ("t", "z", "y", "x"), ("slice", "coil", "y", "x")
    shape     their lengths
    voxel_mm  (z, y, x), or None where the file does not say
    dtype     of NumPy, as read: "int16", "complex64"
    units     "Bq/mL", "HU", "" where the file does not say
    contrast  "T1w", "FLAIR", "PET", "" where neither name nor header says
    person    whom the content belongs to, as the content says ("" where it is silent): never a name, see `pseudonym`
    session   which visit, as the content says, likewise
    series    files of equal, non-empty series are one item: the slices of a DICOM series
    parts     files beside this one that belong to it: the .img of a .hdr, the .cfl of a .hdr
    about     anything else worth printing: coils, lines, acceleration, echo position, decay, ...
    secrets   words of the patient's name, number and birth date, which must not be written anywhere
    """

    kind: str
    format: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    voxel_mm: tuple[float, float, float] | None = None
    dtype: str = ""
    units: str = ""
    contrast: str = ""
    person: str = ""
    session: str = ""
    series: str = ""
    parts: tuple[Path, ...] = ()
    about: Mapping[str, object] = field(default_factory=dict)
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}")
        if len(self.axes) != len(self.shape):
            raise ValueError(f"axes {self.axes} do not name the axes of shape {self.shape}")


@dataclass(frozen=True)
class Reader:
    """A format: its name, the endings of its files in lower case, its two functions, and where several files make one
    item (`Description.series`) a third, that tells from all of them what they are together.

    The ending "" stands for any name that no other reader has an ending for: DICOM files are called IM0001 or 1.2.840.
    """

    name: str
    suffixes: tuple[str, ...]
    sniff: Callable[[Path], Description | None]
    read: Callable
    join: Callable[[Sequence[Path]], Description] | None = None


@dataclass(frozen=True)
class Item:
    """One image, scan or series of a folder, whatever the number of its files; `name` is unique in the folder.

    told: how the person is known: "table", "BIDS", "content", "name" or "folder".
    """

    name: str
    files: tuple[Path, ...]
    what: Description
    reader: Reader = field(repr=False)
    person: str = ""
    session: str = ""
    told: str = ""

    @property
    def path(self) -> Path:
        """The first file."""
        return self.files[0]

    def read(self, **options):
        """What the reader makes of the files; raises Unreadable."""
        return self.reader.read(self.files, **options)


@dataclass(frozen=True)
class Found:
    """What a folder holds, and what became of every file.

    items in the order of their names; left: name -> why it is not used; notes: names that are no data (README, JSON);
    unclear: why nobody can tell whose the files are, "" if it is known; split: person -> part, where a table says it.
    """

    root: Path
    items: tuple[Item, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unclear: str = ""
    split: Mapping[str, str] = field(default_factory=dict)

    @property
    def people(self) -> dict[str, list[Item]]:
        """Person -> items, in the order of the items."""
        people: dict[str, list[Item]] = {}
        for item in self.items:
            people.setdefault(item.person, []).append(item)
        return people


def pseudonym(*identities: str) -> str:
    """Return a code for the first identity that names somebody ("" if none does), which nobody can turn back.

    Equal identities have equal codes within a process, and other ones in the next: `look` calls the people of a folder
    person#1, person#2, in the order of their files, so that its result depends on no code. "anonymous", "xxxx", "000"
    and the like name nobody.
    """
    known = (str(identity or "").strip().strip("^ ") for identity in identities)
    first = next((one for one in known if one and not _NOBODY.fullmatch(one)), "")
    return "p" + hmac.new(_KEY, first.encode(), hashlib.sha256).hexdigest()[:16] if first else ""
