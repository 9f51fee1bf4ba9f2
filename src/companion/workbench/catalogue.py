"""All runs below a folder, as entries that can be searched by parameters and numbers."""

from __future__ import annotations

import json
import operator
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from companion.files import sha256
from companion.workbench.index import find_runs
from companion.workbench.run import RunState

ARRAYS = (".npz", ".npy", ".h5", ".hdf5", ".nii", ".nii.gz", ".cfl", ".hdr")  # endings of results that a viewer opens
OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Entry:
    """One run as the table shows it."""

    state: RunState
    name: str  # the folder, relative to where the search began
    metrics: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.state.folder

    @property
    def record(self) -> dict[str, Any]:
        """What run.json says; empty when there is none."""
        return self.state.record

    @property
    def done(self) -> bool:
        """Whether its results can be trusted and shown."""
        return self.state.state == "done"

    @cached_property
    def values(self) -> dict[str, float]:
        """Every single number of its metrics by name: see `flatten`."""
        return {name: number for name, number, _ in flatten(self.metrics)}

    def get(self, key: str) -> str:
        """A text of its record, or nothing."""
        return str(self.record.get(key, ""))

    @property
    def parameters(self) -> Mapping[str, Any]:
        """Its parameters, as far as they are known."""
        given = self.record.get("parameters")
        return given if isinstance(given, Mapping) else {}

    def files(self) -> list[str]:
        """Names of its results that a viewer can open; what `Run.images` wrote, truth beside draws, first."""
        names = [name for name in self.record.get("results", {}) if name.endswith(ARRAYS)]
        return sorted(names, key=lambda name: not name.endswith(".h5"))

    def changed(self, name: str) -> str | None:
        """Why a result is not what the run wrote, or None. Listing compares sizes; opening compares hashes."""
        about, path = self.record["results"][name], self.folder / name
        same = path.is_file() and sha256(path) == about["sha256"]
        return None if same else f"{name} is not the file that the run wrote"


def find_entries(runs: str | os.PathLike) -> list[Entry]:
    """All runs below a folder, the newest first. Files are compared by size, not by hash, to be fast."""
    runs = Path(runs)
    entries = []
    for state in find_runs(runs, hashes=False):
        metrics = {}
        if state.state == "done" and (state.folder / "metrics.json").is_file():
            try:
                metrics = json.loads((state.folder / "metrics.json").read_text(encoding="utf-8"))
            except ValueError:
                state = RunState(state.folder, "corrupt", "metrics.json cannot be read", state.record)
        entries.append(Entry(state, state.folder.relative_to(runs).as_posix(), metrics))
    return sorted(entries, key=lambda entry: entry.get("end"), reverse=True)


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, float, float | None]]:
    """(name, number, error) of every single number in metrics: nested mappings, tables of rows, means with errors.

    A row of a table is named by its words and whole numbers: {"R": 4, "method": "TV", "PSNR": (27.8, 0.2)} gives
    "R 4, TV: PSNR", 27.8, 0.2. Where these do not tell rows apart, the first number that does is in the name too, as
    in "errors, sigma 0.5: blank", else their place, as in "errors, row 2: blank". Other lists are curves, and left out.
    """
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, (int, float)):
        yield name, float(value), None
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flatten(inner, f"{name}: {key}" if name else str(key))
    elif isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        within = name.split(": ")[1:]  # tables lie at the top, or one for each of several cases
        labels = [_label(row) for row in value]
        alike = len(set(labels)) < len(labels)
        apart = _apart(value) if alike else None
        for place, (row, keys) in enumerate(zip(value, labels, strict=True), 1):
            rest = {k: v for k, v in row.items() if not isinstance(v, (str, int)) and k != apart}
            number = [f"{apart} {row[apart]:g}" if apart else f"row {place}"] if alike else []
            title = within if keys else within or [name]
            yield from flatten(rest, ", ".join(filter(None, [*title, *keys, *number])))
    elif isinstance(value, list) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value):
        yield name, float(value[0]), float(value[1])


def _label(row: Mapping) -> tuple[str, ...]:
    """The words and whole numbers of a table's row."""
    words = {k: v for k, v in row.items() if isinstance(v, (str, int)) and not isinstance(v, bool)}
    return tuple(str(v) if isinstance(v, str) else f"{k} {v}" for k, v in words.items() if v not in ("", "-"))


def _apart(rows: list[Mapping]) -> str | None:
    """The first column of numbers that differs in all rows."""
    for name in rows[0]:
        column = [row.get(name) for row in rows]
        if all(isinstance(value, float) for value in column) and len(set(column)) == len(rows):
            return name
    return None


def conditions(text: str) -> list[tuple[str, str, str]]:
    """(name, operator, value) of "acceleration >= 8, mask = random"; words alone must occur in the run's name.

    Raises ValueError for a condition without a name or a value.
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        ((name, sign, value),) = re.findall(r"^([^<>=!]*)(>=|<=|!=|==|=|>|<|)(.*)", part)
        name, sign, value = name.strip(), sign.strip(), value.strip()
        if sign and not (name and value):
            raise ValueError(f"'{part}' needs a name and a value, as in acceleration >= 8")
        found.append((name, "=" if sign == "==" else sign, value))
    return found


def fulfils(entry: Entry, name: str, sign: str, value: str) -> bool:
    """Whether a run's parameter of that name, else any metric whose name contains it, compares so with the value."""
    if not sign:
        return name.lower() in entry.name.lower()
    known = {k.lower(): v for k, v in entry.parameters.items()}
    given = (
        [known[name.lower()]]
        if name.lower() in known
        else [number for metric, number in entry.values.items() if name.lower() in metric.lower()]
    )
    return any(_compare(item, sign, value) for item in given)


def _compare(given: Any, sign: str, value: str) -> bool:
    try:
        return OPERATORS[sign](float(given), float(value))
    except (TypeError, ValueError):
        return sign in ("=", "!=") and OPERATORS[sign](str(given).lower(), value.lower())
