"""`companion rerun`: do a run again, beside it, and compare every number."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from companion.files import find_project, project_root, sha256
from companion.workbench.run import package_versions, processor, read_run
from companion.workbench.runner import read_signature, run_notebook, source_hash
from companion.workbench.sources import code_hash, located

ROUNDING = 1e-3  # relative tolerance where processor, packages or code differ
CLOCK = ("second", "time", "(s)", "per_second", "memory")  # names of numbers that no run has twice


@dataclass(frozen=True)
class Comparison:
    """A repeated run. differences: number -> (then, now), beyond the tolerance; why: what is not as it was."""

    folder: Path
    numbers: int
    files: int
    other_files: tuple[str, ...]
    differences: Mapping[str, tuple[Any, Any]]
    tolerance: float
    why: tuple[str, ...]

    def __str__(self):
        loose = f"to {self.tolerance:g}, since {', '.join(self.why)}" if self.why else f"to {self.tolerance:g}"
        exact = "bit for bit" if self.tolerance == 0 else loose
        lines = [f"{self.numbers - len(self.differences)} of {self.numbers} numbers are as they were, {exact}"]
        lines += [f"  {name}: {then} then, {now} now" for name, (then, now) in list(self.differences.items())[:20]]
        same = self.files - len(self.other_files)
        lines.append(f"{same} of {self.files} results have the same bytes" + (
            f"; not {', '.join(self.other_files[:5])}" if self.other_files else ""))  # fmt: skip
        return "\n".join([*lines, f"the repeated run is in {self.folder}"])


def rerun(run: str | os.PathLike, tolerance: float | None = None) -> Comparison:
    """Repeat a run with its parameters, in the folder <run>.again, and compare the metrics.

    tolerance: relative; by default 0 (bit for bit) on the same processor with the same packages, code and number of
    threads, else ROUNDING. Times are not compared. Raises ValueError when the run is not done, its notebook is not
    known or has changed, or a file that it read is not what it was.
    """
    run = Path(run).resolve()
    state = read_run(run)
    if state.state != "done":
        raise ValueError(f"{run} is {state.state}, so there is nothing to compare with: {state.reason}")
    record, notebook = state.record, _notebook(state.record)
    for name, digest in record.get("inputs", {}).items():
        path = next(
            (p for p in map(Path, (project_root() / name, *located(name, project_root()))) if p.is_file()), None
        )
        if path is None or sha256(path) != digest:
            raise ValueError(f"{name}, which the run read, is {'not here' if path is None else 'another file now'}")
    why = tuple(_unlike(record))
    if tolerance is None:
        tolerance = ROUNDING if why else 0.0
    known = read_signature(notebook).defaults
    values = {k: v for k, v in record["parameters"].items() if k in known and k != "out"}
    if threads := record.get("device", {}).get("threads"):
        os.environ["OMP_NUM_THREADS"] = str(threads)  # another number of threads sums in another order
    folder = run_notebook(notebook, values, str(run.with_name(f"{run.name}.again")))
    return compare(run, folder, record, tolerance, why)


def compare(run: Path, again: Path, record: Mapping, tolerance: float, why: tuple[str, ...] = ()) -> Comparison:
    """The numbers of metrics.json of two runs, and the bytes of their results."""
    then, now = (dict(leaves(_metrics(folder))) for folder in (run, again))
    names = [name for name in then | now if not any(word in name.lower() for word in CLOCK)]
    differences = {n: (then.get(n, "missing"), now.get(n, "missing"))
                   for n in names if not _close(then.get(n), now.get(n), tolerance)}  # fmt: skip
    results, made = record["results"], read_run(again).record["results"]
    other = tuple(name for name in results if results[name]["sha256"] != made.get(name, {}).get("sha256"))
    return Comparison(again, len(names), len(results), other, differences, tolerance, why)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of everything in nested mappings and lists that is neither."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{name}[{i}]")
    else:
        yield name, value


def _close(then: Any, now: Any, tolerance: float) -> bool:
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (then, now))
    if numbers and tolerance > 0:
        return math.isclose(then, now, rel_tol=tolerance, abs_tol=1e-12)
    return type(then) is type(now) and then == now


def _metrics(folder: Path) -> Any:
    path = folder / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _notebook(record: Mapping) -> Path:
    """The notebook of a run: as it says, else, in Jupyter, by its paper and stage."""
    origin = record.get("origin") or {}
    names = [origin["notebook"]] if origin.get("notebook") else [
        f"notebooks/{record.get('paper')}/{record.get('stage')}.ipynb", f"notebooks/{record.get('stage')}.ipynb"
    ]  # fmt: skip
    for name in names:
        path = Path(located(name, find_project() or project_root())[0])
        path = path if path.is_file() else project_root() / name
        if path.is_file():
            if origin.get("notebook_sha256") not in (None, source_hash(path)):
                raise ValueError(f"{name} has changed since the run; check out {record.get('code')} to repeat it")
            return path
    raise ValueError(f"the run's notebook, {' or '.join(names)}, is not here")


def _unlike(record: Mapping) -> Iterator[str]:
    """What is not as it was when the run was made, and may change the last bits."""
    if record.get("platform", {}).get("cpu") != processor():
        yield "the processor is another or not recorded"
    then, now = record.get("packages", {}), package_versions()
    if changed := [name for name in then if then[name] != now.get(name)]:
        yield f"packages changed ({', '.join(changed[:4])})"
    if (record.get("origin") or {}).get("code") != code_hash():
        yield f"the code was {record.get('code')}"
