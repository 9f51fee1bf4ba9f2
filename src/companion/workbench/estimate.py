"""What a grid will take: time, memory and disk, from the runs of its notebook that are recorded."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from companion.workbench import attempts
from companion.workbench.grid import Plan
from companion.workbench.index import duration
from companion.workbench.run import MANIFEST

FREE = {"out", "seed", "device"}  # parameters that cost nothing
START = 6.0  # seconds: processes, imports and a kernel, before a run begins, where nobody noted them


@dataclass(frozen=True)
class Cost:
    """Of one cell, by the recorded runs most like it; zeros where there is none.

    unlike: the parameters in which those differ from the grid's.
    """

    seconds: float
    memory: int  # bytes, the most
    disk: int  # bytes
    runs: int
    unlike: tuple[str, ...] = ()


def cost_of(plan: Plan, runs: Sequence[Path]) -> Cost:
    """What a cell costs, by the finished runs of its notebook below the folders `runs`."""
    varied = {name for axis in plan.grid.axes.values() for name in axis.parameters} | FREE
    groups: dict[tuple[str, ...], list[Mapping]] = {}
    for record in _records(plan.grid.notebook, runs):
        had = record.get("parameters", {})
        unlike = [k for k, v in plan.grid.fixed.items() if k not in varied and had.get(k) != v]
        groups.setdefault(tuple(unlike), []).append(record)
    if not groups:
        return Cost(0, 0, 0, 0)
    unlike = min(groups, key=len)
    alike = groups[unlike]
    return Cost(
        seconds=statistics.median(record["took"] for record in alike),
        memory=max(record.get("memory_bytes", 0) for record in alike),
        disk=int(statistics.median(sum(r["bytes"] for r in record["results"].values()) for record in alike)),
        runs=len(alike),
        unlike=unlike,
    )


def took(folder: Path, record: Mapping[str, Any]) -> float | None:
    """Seconds of a done run with all that it needs before it begins; None where its record does not say."""
    if (last := attempts.last(folder)) and last.outcome == "done" and last.seconds is not None:
        return last.seconds
    return None if record.get("seconds") is None else record["seconds"] + START


def forecast(plan: Plan, cost: Cost, cores: int) -> str:
    """What `companion grid --dry-run` prints: how many cells, and what they will take on so many cores."""
    grid, todo = plan.grid, len(plan.todo)
    shape = " x ".join(f"{len(axis.points)} {name}" for name, axis in grid.axes.items())
    out = f", {grid.excluded} excluded" if grid.excluded else ""
    lines = [f"{grid.name}: {len(grid.cells)} cells ({shape}{out}); {len(plan.done)} done, {todo} to run"]
    if plan.stale:
        reasons = sorted(set(plan.stale.values()))
        lines.append(f"{len(plan.stale)} of them again: " + "; ".join(reasons[:3]))
    if grid.missing:
        lines.append(f"{len(grid.missing)} people cannot be used: " + "; ".join(_pairs(grid.missing, 3)))
    if not cost.runs:
        return "\n".join([*lines, "no run of this notebook is recorded: `--limit 1` does one cell, then time is known"])
    at_once = max(1, min(cores // int(grid.resources["threads"]), todo))
    work = todo * cost.seconds
    by = f"{cost.runs} recorded runs" + (f" that differ in {', '.join(cost.unlike[:5])}" if cost.unlike else "")
    free = shutil.disk_usage(_there(plan.folder)).free
    lines.append(f"time    {duration(work)} of work, {duration(work / at_once)} with {at_once} at once; by {by}")
    if cost.memory:
        lines.append(f"memory  {_size(cost.memory)} a cell, {_size(cost.memory * at_once)} at once")
    lines.append(f"disk    {_size(todo * cost.disk)}; {_size(free)} are free")
    return "\n".join(lines)


def objections(plan: Plan, cost: Cost) -> Iterator[str]:
    """Why a grid had better not start: a disk too small, a clock that is not the file system's."""
    there = _there(plan.folder)
    needed, free = len(plan.todo) * cost.disk, shutil.disk_usage(there).free
    if needed > free:
        yield f"{len(plan.todo)} cells need {_size(needed)} and {_size(free)} are free in {there}; make room first"
    probe = there / f".clock-{os.getpid()}"
    try:
        probe.touch()
        late = probe.stat().st_mtime - time.time()
    finally:
        probe.unlink(missing_ok=True)
    if abs(late) > 5:
        yield (
            f"the clock of the file system at {there} is {late:+.0f} s from this machine's; Snakemake compares times "
            "of files, so set the clocks (ntp) first"
        )


def _records(notebook: Path, runs: Sequence[Path]) -> Iterator[Mapping[str, Any]]:
    """run.json of all finished runs of a notebook, each folder once."""
    seen = set()
    for top in runs:
        for folder, inside, files in os.walk(top):
            inside[:] = [name for name in inside if not name.startswith(".")]
            if MANIFEST not in files or (path := Path(folder).resolve()) in seen:
                continue
            seen.add(path)
            try:
                record = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
                known = (record.get("origin") or {}).get("notebook", "")
                mine = Path(known).name == notebook.name if known else record.get("stage") == notebook.stem
                if mine and record["seconds"] >= 0 and isinstance(record["results"], dict):
                    yield record | {"took": took(path, record)}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue


def _there(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _pairs(values: Mapping[str, str], most: int) -> list[str]:
    shown = [f"{name}: {why}" for name, why in list(values.items())[:most]]
    return shown + ([f"and {len(values) - most} more"] if len(values) > most else [])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
