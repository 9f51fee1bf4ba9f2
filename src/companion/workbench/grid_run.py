"""Run a grid: whose the folder is, what is done and what not, and Snakemake for the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from companion.files import atomic_write, find_project, project_root
from companion.workbench import attempts, batch, estimate
from companion.workbench.grid import PLAN, Plan, gathering, make_plan, read_grid
from companion.workbench.run import read_run
from companion.workbench.sources import located

DONE = ".done"
SAME = ("notebook", "fixed", "axes")  # what two grids of one folder must share


def run_grid(
    file: Path,
    profile: str = "local",
    *,
    dry: bool = False,
    limit: int | None = None,
    merge: bool = False,
    any_code: bool = False,
    options: Sequence[str] = (),
) -> tuple[int, Plan]:
    """(exit code, plan before the start) of a grid, of which every cell is done that was not.

    dry: say what there is to do and what it will take, and stop. limit: do so many cells at most. merge: join the
    cells of another grid of this notebook in the same folder. any_code: what other versions of the code made is done.
    Raises ValueError or FileNotFoundError before anything starts.
    """
    root = project_root()
    grid = read_grid(Path(located(str(file), find_project() or root)[0]), root)
    if dry:
        plan = make_plan(grid, root, any_code)
        print(estimate.forecast(plan, estimate.cost_of(plan, [root / "runs", plan.folder]), _cores(options)))
        _former(plan, merge)
        return 0, plan
    with batch.only_driver(root) as lock:
        plan = make_plan(grid, root, any_code)
        cost = estimate.cost_of(plan, [root / "runs", plan.folder])
        print(estimate.forecast(plan, cost, _cores(options)), flush=True)
        former = _former(plan, merge)
        plan.folder.mkdir(parents=True, exist_ok=True)
        if reasons := list(estimate.objections(plan, cost)):
            raise ValueError("; ".join(reasons))
        todo = plan.todo[:limit]
        _write(plan, todo, former, limit is not None)
        _mark(plan)
        if not todo and not grid.gather:
            return 0, plan
        where = os.path.relpath(plan.folder / PLAN, root)
        settings = ["--config", f"grid={where}", *([f"mem_mb={batch.memory_mb()}"] if profile == "local" else [])]
        return batch.snakemake("grid.smk", profile, root, settings, options, lock), plan


def _cores(options: Sequence[str]) -> int:
    given = [b for a, b in zip(options, options[1:], strict=False) if a in ("--cores", "-c", "--jobs", "-j")]
    return int(given[0]) if given and given[0].isdigit() else len(os.sched_getaffinity(0))


def _former(plan: Plan, merge: bool) -> dict[str, Any]:
    """The plan that the folder holds, {} if none. Raises ValueError where it is another grid's and not to be merged."""
    try:
        former = json.loads((plan.folder / PLAN).read_text(encoding="utf-8"))
        theirs = {key: former[key] for key in ("name", *SAME, "cells")}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        return {}  # cut by a full disk; the cells themselves say what they are
    ours = {"notebook": _notebook(plan), "fixed": dict(plan.grid.fixed), "axes": list(plan.grid.axes)}
    theirs["axes"] = list(theirs["axes"])
    if differ := [key for key in SAME if json.loads(json.dumps(ours[key])) != theirs[key]]:
        told = "; ".join(f"{key} {_short(theirs[key], ours[key])}" for key in differ)
        raise ValueError(
            f"{plan.folder} holds the grid {theirs['name']}, which differs: {told}. Give `out` another folder, or, to "
            f"do its cells again, remove {plan.folder / PLAN}"
        )
    if theirs["name"] != plan.grid.name and not merge:
        raise ValueError(
            f"{plan.folder} holds the grid {theirs['name']}, and this one is {plan.grid.name}; they could be one: say "
            "--merge, or give `out` another folder"
        )
    return former


def _short(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict):
        keys = [key for key in theirs | ours if theirs.get(key) != ours.get(key)]
        return ", ".join(f"{key}: {theirs.get(key)} there, {ours.get(key)} here" for key in keys[:4])
    return f"{theirs} there, {ours} here"


def _notebook(plan: Plan) -> str:
    return os.path.relpath(plan.grid.notebook, project_root())


def _write(plan: Plan, todo: Sequence[str], former: dict, limited: bool) -> None:
    """grid.json: what Snakemake and the jobs read, and what the folder's table is made of."""
    grid = plan.grid
    cells = {
        c.name: {"at": dict(c.at), "values": dict(c.values), "fingerprint": plan.fingerprints[c.name]}
        for c in grid.cells
    }
    gather = None
    if grid.gather and not limited:
        notebook, values = gathering(grid)
        there = os.path.relpath(notebook, project_root())
        gather = {"notebook": there, "values": values, "fingerprint": plan.fingerprints["gather"]}
    record = {
        "name": grid.name,
        "notebook": _notebook(plan),
        "fixed": dict(grid.fixed),
        "axes": {name: {k: dict(v) for k, v in axis.points.items()} for name, axis in grid.axes.items()},
        "resources": dict(grid.resources),
        "code": plan.code,
        "todo": list(todo),
        "gather": gather,
        "missing": dict(grid.missing),
        "quantities": grid.quantities if isinstance(grid.quantities, dict) else list(grid.quantities),
        "figure": dict(grid.figure),
    }
    if former and former["name"] != grid.name:  # merged: its cells stay in the table
        cells = former["cells"] | cells
        record["axes"] = {name: former["axes"][name] | points for name, points in record["axes"].items()}
        record["missing"] = former.get("missing", {}) | record["missing"]
    with atomic_write(plan.folder / PLAN) as aside:
        aside.write_text(json.dumps(record | {"cells": cells}) + "\n", encoding="utf-8")


def _mark(plan: Plan) -> None:
    """Make Snakemake's marks true: there where a cell is done, away where it is not."""
    for cell in plan.grid.cells:
        mark = plan.folder / cell.name / DONE
        if cell.name not in plan.done:
            mark.unlink(missing_ok=True)
            if cell.name in plan.stale:
                print(f"{cell.name} will be run again: {plan.stale[cell.name]}", flush=True)
        elif not mark.exists():
            mark.touch()
    if plan.grid.gather:
        notebook, values = gathering(plan.grid)
        state, mark = read_run(project_root() / values["out"]), plan.folder / ".gathered"
        wanted = plan.fingerprints["gather"]
        if state.state != "done" or (state.record.get("origin") or {}).get("fingerprint") != wanted:
            mark.unlink(missing_ok=True)


def failures(plan: Plan) -> dict[str, str]:
    """Cells that are not done -> why, as the last attempt said."""
    found = {}
    for cell in plan.grid.cells:
        state = read_run(plan.folder / cell.name, hashes=False)
        if state.state != "done":
            last = attempts.last(plan.folder / cell.name)
            found[cell.name] = last.reason if last and last.reason else state.reason
    return found
