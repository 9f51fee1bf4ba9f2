"""`companion status` and `companion clean`: what runs, what failed and why, until when; and what is left over."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from companion.workbench import attempts
from companion.workbench.estimate import took
from companion.workbench.grid import PLAN
from companion.workbench.index import duration
from companion.workbench.run import MANIFEST, NOTEBOOK, read_run

ORDER = ("running", "failed", "killed", "corrupt", "waiting", "done")
ASIDE = re.compile(r"\..+\.[0-9a-f]{8}(\.\w+)*")  # of files.atomic_write, left by a kill


@dataclass(frozen=True)
class Status:
    """One run: its state, the reason where it failed, how often it was tried, and how long it took or is at work."""

    name: str
    state: str
    reason: str = ""
    tries: int = 0
    seconds: float | None = None
    where: str = ""


def statuses(folder: str | os.PathLike) -> list[Status]:
    """The state of every run below a folder: of the cells of a grid, waiting ones too, or of what was ever tried.

    Sizes are compared, not hashes. Raises FileNotFoundError when there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; name a folder of runs or of a grid")
    found = []
    for top, inside, files in os.walk(folder):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        top = Path(top)
        if PLAN in files:
            cells = json.loads((top / PLAN).read_text(encoding="utf-8"))["cells"]
            found += [_status(top / cell, folder) for cell in cells]
            inside[:] = [name for name in inside if name not in cells]
        elif {MANIFEST, NOTEBOOK, attempts.FILE} & set(files):
            found.append(_status(top, folder))
    return found


def _status(run: Path, folder: Path) -> Status:
    name, state, last = run.relative_to(folder).as_posix(), read_run(run, hashes=False), attempts.last(run)
    tries = last.number if last else 0
    if state.state == "done":
        return Status(name, "done", tries=tries, seconds=took(run, state.record))
    if last is not None and last.outcome == "running":
        began = (datetime.now(UTC) - datetime.fromisoformat(last.start)).total_seconds()
        where = last.host + (f", job {last.job}" if last.job else "")
        return Status(name, "running", tries=tries, seconds=began, where=where)
    if last is None:
        return Status(name, "waiting" if state.state == "incomplete" else state.state, state.reason)
    outcome = state.state if state.state == "corrupt" else "waiting" if last.outcome == "done" else last.outcome
    return Status(name, outcome, last.reason or state.reason, tries)


def report(found: list[Status], most: int = 20) -> str:
    """What `companion status` prints: counts, when it will be over, what runs, what failed with the last error."""
    counts = {state: [s for s in found if s.state == state] for state in ORDER}
    lines = [", ".join(f"{len(runs)} {state}" for state, runs in counts.items() if runs) or "no runs"]
    times = [s.seconds for s in counts["done"] if s.seconds is not None]
    left = counts["waiting"] + counts["running"]
    if times and left and counts["running"]:
        one = statistics.median(times)
        begun = sum(min(s.seconds or 0, one) for s in counts["running"])
        lines.append(f"about {duration(max(0.0, (one * len(left) - begun) / len(counts['running'])))} to go, "
                     f"as one took {duration(one)} and {len(counts['running'])} are at work")  # fmt: skip
    lines += [f"running  {s.name}  for {duration(s.seconds)} on {s.where}" for s in counts["running"][:most]]
    for state in ("failed", "killed", "corrupt"):
        for s in counts[state][:most]:
            lines.append(f"{state:8} {s.name}  {s.reason}" + (f" ({s.tries} tries)" if s.tries > 1 else ""))
        if len(counts[state]) > most:
            lines.append(f"and {len(counts[state]) - most} more {state}")
    return "\n".join(lines)


def leftovers(folder: str | os.PathLike, failed: bool = False) -> Iterator[Path]:
    """Files below a folder that a kill left, and, if `failed`, all files of runs that are not done.

    Neither files of a run at work nor results of a done one, whole or corrupt, are among them.
    """
    for top, inside, files in os.walk(folder):
        inside[:] = sorted(name for name in inside if name != ".snakemake")
        top = Path(top)
        ran = bool({attempts.FILE, attempts.LOCK, NOTEBOOK, f".{NOTEBOOK}"} & set(files))
        if ran and (attempts.locked(top) or (last := attempts.last(top)) and last.outcome == "running"):
            continue
        undone = failed and ran and MANIFEST not in files
        for name in sorted(files):
            if undone or ASIDE.fullmatch(name) or name == f".{NOTEBOOK}":
                yield top / name


def clean(folder: str | os.PathLike, failed: bool = False) -> tuple[int, int]:
    """(files, bytes) removed: `leftovers`, and the folders that they alone filled."""
    count = size = 0
    for path in list(leftovers(folder, failed)):
        size += path.stat().st_size
        count += 1
        path.unlink()
        for parent in path.parents:
            if parent == Path(folder) or any(parent.iterdir()):
                break
            parent.rmdir()
    return count, size
