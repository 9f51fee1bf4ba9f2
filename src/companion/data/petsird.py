"""List mode of PET in the format PETSIRD: its scanner, its events, and what `companion look` says of it.

    pip install "companion[formats]"  # for the package petsird, which reads the files

`data.list_mode` sorts the events into sinograms. Files of scanners with regular rings are read (`data.rings`), binary
ones and those of lines of JSON.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from companion.data.efficiencies import Efficiencies
from companion.data.intake.records import Description, Unreadable, pseudonym
from companion.data.intake.streams import guarded, instead
from companion.data.rings import Rings
from companion.operators.cylinder import Cylinder

SUFFIXES = (".petsird", ".ndjson")
MAGIC, LINES = b"yardl", b'{"yardl"'
STILL = 1e-3  # mm, and of a rotation: smaller movements are none
GLANCE = 200_000  # events that `companion look` reads


@dataclass(frozen=True, eq=False)
class Scanner:
    """What a file says of its scanner: rings, how well each pair detects, and its bins of time of flight.

    tof: bins, their width and the resolution (FWHM) along a line in mm, (1, 0, 0) without time of flight.
    """

    path: Path
    name: str
    rings: Rings
    efficiencies: Efficiencies = field(repr=False)
    tof: tuple[int, float, float] = (1, 0.0, 0.0)

    def cylinder(
        self,
        shape: tuple[int, int, int],
        voxel_mm: tuple[float, float],
        *,
        bins: int | None = None,
        max_difference: int | None = None,
        span: int = 1,
        tof: bool = False,
    ) -> Cylinder:
        """The scanner around a volume of `shape` (z, y, x), for `Projector3D`; their middles are one.

        bins: by default as many as hold every pair that the file has in coincidence. Raises ValueError, also for `tof`
        where the file has none.
        """
        if tof and self.tof[0] == 1:
            raise ValueError(f"{self.path} has no time of flight; use tof=False")
        bins, times = self.widest if bins is None else bins, self.tof if tof else (1, 0.0, 0.0)
        return self.rings.cylinder(shape, voxel_mm, bins, max_difference=max_difference, span=span, tof=times)

    @property
    def widest(self) -> int:
        """The bins that hold every pair of detectors whose modules are in coincidence."""
        alive = self.efficiencies.alive
        covers = np.zeros((len(alive), self.rings.places))
        covers[self.efficiencies.module, self.rings.place] = 1
        first, second = np.nonzero(covers.T @ alive @ covers)
        apart = np.abs(first - second)[first != second]
        if not len(apart):
            raise Unreadable(self.path, "has no pair of modules in coincidence, so nothing could be counted")
        return int(np.abs(self.rings.places - 2 * apart).max()) + 1


def read_scanner(path: str | os.PathLike) -> Scanner:
    """The scanner of a file, from its header. Raises FileNotFoundError, or Unreadable where it is no regular rings."""
    with opened(path) as (scanner, _, _):
        return scanner


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[tuple[Scanner, Any, Iterator[Any]]]:
    """Scanner, header and the blocks of time of a file, which are read as they are asked for.

    Raises FileNotFoundError, or Unreadable: without the package, for damaged files, scanners that are no regular rings.
    """
    path = Path(path)
    try:
        import petsird
    except ImportError as error:
        raise Unreadable(path, 'needs the package petsird: pip install "companion[formats]"') from error
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a PETSIRD file")
    if reason := instead(path):
        raise Unreadable(path, reason)
    with open(path, "rb") as binary, open(path, encoding="utf-8") as lines:
        start = binary.read(64)
        binary.seek(0)
        if not _ours(start):
            raise Unreadable(path, "not a PETSIRD file; export it again")
        with _reading(path):
            packed = start.startswith(MAGIC)
            reader = petsird.BinaryPETSIRDReader(binary) if packed else petsird.NDJsonPETSIRDReader(lines)
            header = reader.read_header()
            scanner = _scanner(path, header)
        yield scanner, header, _blocks(path, reader)


def events_of(scanner: Scanner, blocks: Iterator[Any], seen: Counter[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Kind and (event, 3) the two detection bins and the TOF bin of coincidences, block of time after block.

    kind: "prompt" or "delayed". All else is counted in `seen`, which also gets the time, "ms". Raises Unreadable for
    detection and TOF bins that there are not, and where the bed moves between events, or the gantry at all.
    """
    most, path = len(scanner.rings.ring) * scanner.efficiencies.energies, scanner.path
    bed, bed_of_events = np.eye(3, 4), None
    for block in blocks:
        kind, value = type(block).__name__.rpartition(".")[2].removesuffix("TimeBlock"), block.value
        if kind == "BedMovement":
            bed = np.asarray(value.transform.matrix, np.float64)
        elif kind == "GantryMovement" and any(np.abs(t.matrix - np.eye(3, 4)).max() > STILL for t in value.transforms):
            raise Unreadable(path, "its gantry moves; scans of a gantry at rest are read")
        if kind != "Event":
            seen[f"blocks of {kind}, not used"] += 1
            continue
        bed_of_events = bed if bed_of_events is None else bed_of_events
        if np.abs(bed - bed_of_events).max() > STILL:
            by = (bed - bed_of_events)[:, 3].round(1).tolist()
            raise Unreadable(path, f"its bed moves by {by} mm between events; write one file for each position")
        seen["ms"] += value.time_interval.stop - value.time_interval.start
        for name, listed in (("single", value.single_events), ("triple", value.triple_events),
                             ("quadruple", value.quadruple_events)):  # fmt: skip
            seen[f"{name} events, not used"] += _count(listed)
        for name, listed in (("prompt", value.prompt_events), ("delayed", value.delayed_events)):
            for events in (one for row in listed for one in row):
                numbers = (n for e in events for n in (*e.detection_bins, e.tof_idx))
                found = np.fromiter(numbers, np.int64, 3 * len(events)).reshape(-1, 3)
                if (found >= (most, most, scanner.tof[0])).any():
                    raise Unreadable(
                        path,
                        f"damaged: an event in detection bin {found[:, :2].max()} of {most} and TOF bin "
                        f"{found[:, 2].max()} of {scanner.tof[0]}",
                    )
                yield name, found


def sniff_petsird(path: str | os.PathLike) -> Description | None:
    """What a PETSIRD file is, for `companion look`, from its header; None for another file."""
    path = Path(path)
    with open(path, "rb") as file:
        if not _ours(file.read(64)):
            return None
    with opened(path) as (scanner, header, _):
        patient = header.exam.patient.patient_id if header.exam else ""
    bins, width, resolution = scanner.tof
    about = {
        "scanner": f"{scanner.name}, {scanner.rings}".lstrip(", "),
        "TOF bins": f"{bins} of {width:.3g} mm, resolution {resolution:.3g} mm" if bins > 1 else "none",
        "energy windows": scanner.efficiencies.energies,
        "efficiencies of": scanner.efficiencies.said,
    }
    secrets = (patient,) if len(patient) > 2 and pseudonym(patient) else ()
    shape = scanner.rings.rings, scanner.rings.places
    return Description("list mode", "PETSIRD", ("ring", "place"), shape, contrast="PET", person=pseudonym(patient),
                       about=about, secrets=secrets)  # fmt: skip


def read_item(files, frame: int | None = None) -> str:
    """What the first blocks of time of a file hold, for `companion look`."""
    seen: Counter[str] = Counter()
    counted, stopped = 0, False
    with opened(files[0]) as (scanner, _, blocks):
        for kind, events in events_of(scanner, blocks, seen):
            seen[f"{kind} events"] += len(events)
            counted += len(events)
            if stopped := counted >= GLANCE:
                break
    text = ", ".join(f"{n} {what}" for what, n in seen.items() if n) or "no events"
    return f"{text}{' (more was not looked at)' if stopped else ''}; `companion data petsird` makes sinograms of them"


# --------------------------------------------------------------------------------------------------------------- parts


def _ours(start: bytes) -> bool:
    return start.startswith(MAGIC) or start.replace(b" ", b"").startswith(LINES)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors of the package as Unreadable."""
    with guarded(path, "PETSIRD file"):
        try:
            yield
        except (EOFError, BufferError) as error:  # the package's buffer says the latter of files of few bytes
            raise Unreadable(path, "ends in the middle: truncated; copy it again") from error
        except MemoryError as error:  # for a length that the file states
            raise Unreadable(path, "damaged PETSIRD file (a length that cannot be); copy it again") from error
        except RuntimeError as error:
            if "schema" not in str(error):
                raise
            raise Unreadable(path, "of another version of the format than the package petsird here reads") from error


def _blocks(path: Path, reader) -> Iterator[Any]:
    with _reading(path):
        blocks = iter(reader.read_time_blocks())
    while True:
        with _reading(path):
            block = next(blocks, None)
        if block is None:
            return
        yield block


def _scanner(path: Path, header) -> Scanner:
    """The scanner of a header; Unreadable where it is no regular rings."""
    info = header.scanner
    types = info.scanner_geometry.replicated_modules
    if len(types) != 1:
        raise Unreadable(path, f"its scanner has {len(types)} types of modules; scanners of one are read")
    elements = types[0].object.detecting_elements
    inner, outer = (np.array([t.matrix for t in o.transforms], np.float64) for o in (elements, types[0]))
    corners = np.array([corner.c for corner in elements.object.shape.corners], np.float64)
    if not (len(inner) and len(outer)):
        raise Unreadable(path, f"its scanner has {len(outer)} modules of {len(inner)} detectors")
    in_module = inner[:, :, :3] @ corners.mean(0) + inner[:, :, 3]
    centres = np.einsum("mij,ej->mei", outer[:, :, :3], in_module) + outer[:, None, :, 3]
    length = float(np.ptp((outer[0, :, :3] @ inner[0, :, :3] @ corners.T)[2]))
    try:
        rings = Rings.of(centres.reshape(-1, 3), length)
    except ValueError as error:
        raise Unreadable(path, f"its scanner cannot be used: {error}") from error
    energies = max(1, len(_edges(info.event_energy_bin_edges)) - 1)
    efficiencies = Efficiencies.of(path, info.detection_efficiencies, len(outer), len(inner), energies)
    edges = _edges(info.tof_bin_edges[0] if info.tof_bin_edges else [])
    if len(edges) < 3:
        return Scanner(path, info.model_name, rings, efficiencies)
    width = np.diff(edges)
    if np.ptp(width) > 0.01 * width.mean() or abs(edges[0] + edges[-1]) > 0.02 * width.mean():
        raise Unreadable(path, f"its TOF bins have edges {edges.tolist()} mm; even and centred ones are read")
    tof = len(width), float(width.mean()), float(info.tof_resolution[0][0])
    return Scanner(path, info.model_name, rings, efficiencies, tof)


def _edges(listed) -> np.ndarray:
    return np.asarray(listed[0].edges, np.float64) if listed else np.zeros(0)


def _count(listed) -> int:
    """The events in lists of lists, as deep as they are."""
    return sum(map(_count, listed)) if isinstance(listed, list) else 1
