"""The ISMRMRD XML header, which fastMRI, M4Raw and ISMRMRD files carry: what it says of the first encoding.

Inati et al., ISMRM raw data format, MRM 2017. The header calls the readout x and the phase encodings y and z; its
numbers are turned around on reading, to (z, y, x) = (slice or second phase encoding, readout, first phase encoding).
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Header:
    """What an ISMRMRD header says of a scan, in the order (z, y, x).

    Matrix sizes of the encoded and the reconstructed space, their fields of view in mm, and the range of phase
    encoding lines `[first, last)` that were acquired, as positions in the encoded matrix; None where it does not say.
    centre: the counters (second, first) phase encoding of the zero frequency, None where it does not say.
    """

    encoded: tuple[int, int, int]
    recon: tuple[int, int, int]
    encoded_mm: tuple[float, float, float] | None
    recon_mm: tuple[float, float, float] | None
    lines: tuple[int, int] | None
    centre: tuple[int | None, int | None] = (None, None)
    trajectory: str = ""
    patient: str = ""
    protocol: str = ""


def decode_header(value) -> str:
    """The text of a header as HDF5 gives it: bytes or str, UTF-8 or Latin-1, padded with NUL or not."""
    value = np.ravel(np.asarray(value, dtype=object))[0] if not isinstance(value, bytes | str | np.void) else value
    if isinstance(value, np.void):
        value = value.tobytes()
    if isinstance(value, bytes):
        try:
            value = value.rstrip(b"\0").decode("utf-8-sig")
        except UnicodeDecodeError:
            value = value.rstrip(b"\0").decode("latin-1")
    return str(value).rstrip("\0").lstrip("\ufeff").strip()


def parse_header(text: str) -> Header:
    """What the first encoding of an ISMRMRD XML header says, whatever its namespace; see `Header`.

    Raises ValueError for XML that is damaged, declares a document type or entities (never expanded), or lacks the
    matrix sizes.
    """
    if "<!DOCTYPE" in text.upper() or "<!ENTITY" in text.upper():
        raise ValueError("ismrmrd_header declares a document type or entities, which a header never needs: refused")
    if text.startswith("<?xml"):  # the text is decoded already, whatever encoding it declares
        text = text[text.find("?>") + 2 :]
    try:
        root = ElementTree.fromstring(text)
        for element in root.iter():
            element.tag = str(element.tag).rpartition("}")[2]
        encoding = root.find("encoding")
        if encoding is None:
            raise ValueError("no encoding")
        encoded, recon = (_triple(encoding, space, "matrixSize", int) for space in ("encodedSpace", "reconSpace"))
        encoded_mm, recon_mm = (
            _triple(encoding, space, "fieldOfView_mm", float)
            if encoding.find(f"{space}/fieldOfView_mm") is not None
            else None
            for space in ("encodedSpace", "reconSpace")
        )
        limits = encoding.find("encodingLimits/kspace_encoding_step_1")
        lines, centre = None, None
        if limits is not None:
            low, centre, high = (int(limits.findtext(n) or "") for n in ("minimum", "center", "maximum"))
            first = encoded[2] // 2 - centre
            lines = (first + low, first + high + 1)
        second = (encoding.findtext("encodingLimits/kspace_encoding_step_2/center") or "").strip()
    except (ElementTree.ParseError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"ismrmrd_header is damaged or incomplete ({error}); convert the scan again") from error
    patient, protocol = (
        (root.findtext(p, "") or "").strip()
        for p in ("subjectInformation/patientID", "measurementInformation/protocolName")
    )
    trajectory = (encoding.findtext("trajectory", "") or "").strip().lower()
    second_centre = int(second) if second.isdigit() else None
    return Header(encoded, recon, encoded_mm, recon_mm, lines, (second_centre, centre), trajectory, patient, protocol)


def _triple(
    encoding: ElementTree.Element, space: str, name: str, kind: Callable[[str], Number]
) -> tuple[Number, Number, Number]:
    """A positive triple of the header as (z, readout, phase encoding). ValueError where it is missing."""
    at = encoding.find(f"{space}/{name}")
    if at is None:
        raise ValueError(f"no {space} {name}")
    readout, phase, depth = (kind(at.findtext(axis) or "") for axis in "xyz")
    if not (readout > 0 and phase > 0 and depth > 0 and np.isfinite([readout, phase, depth]).all()):
        raise ValueError(f"{space} {name} is {readout}, {phase}, {depth}")
    return depth, readout, phase
