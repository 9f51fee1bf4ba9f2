"""A declared grid: a YAML file says a notebook, what is fixed and what varies; here it becomes cells, all checked.

    name: aid_grid
    notebook: notebooks/aid/4_reconstruct.ipynb
    params: notebooks/params/aid/4_reconstruct/grid.yaml     # fixed parameters, from a file
    fixed: {draws: 2}                                        # and from here, which win
    axes:
      acceleration: [4, 8, 12]                               # a parameter and its values
      dose: {low: {fractions: [0.05]}, full: {fractions: [1.0]}}      # a name of its own: several parameters at once
      source: {people: data/cohort, contrast: T1w}           # every person of a folder, see `axes.people`
    seeds: 3                                                 # or a list: the axis `seed`
    exclude: [{mask: random, acs: [0, 8]}]
    out: runs/aid/grid
    resources: {threads: 1, mem_mb: 4000, minutes: 60, gpu: 0}
    gather: {notebook: ..., params: ..., out: ...}           # a notebook that reads all cells, once they are done
    quantities: ["*: PSNR (dB)"]                             # of the table: patterns, or {name: pattern of one}
    figure: {quantity: "AID: PSNR (dB)", x: acceleration, lines: mask, panels: acs}

Snakemake does the work (workflow/grid.smk); what is done is known by fingerprints: hashes of all that decides a result.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from companion.files import find_project, sha256, shipped
from companion.parameters import read_yaml, unknown_names
from companion.workbench.axes import Axis, read_axis
from companion.workbench.declared import check_figure, like, read_declaration
from companion.workbench.run import RunState, read_run
from companion.workbench.runner import Signature, read_signature, source_hash
from companion.workbench.sources import code_hash, located

PLAN = "grid.json"
LONGEST = 200  # letters of a folder's name


@dataclass(frozen=True)
class Cell:
    """One combination: where each axis stands, and the parameters that the notebook gets."""

    name: str
    at: Mapping[str, str]  # axis -> label
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """A grid file, read and checked. missing: who of a cohort cannot be used, and why."""

    name: str
    notebook: Path
    fixed: Mapping[str, Any]
    axes: Mapping[str, Axis]
    cells: tuple[Cell, ...]
    excluded: int
    out: str
    resources: Mapping[str, Any]
    inputs: tuple[str, ...] = ()
    gather: Mapping[str, Any] | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    quantities: Sequence[str] | Mapping[str, str] = ()
    figure: Mapping[str, str] = field(default_factory=dict)


def read_grid(file: str | Path, root: Path) -> Grid:
    """The grid of a YAML file, every parameter of every cell checked against the notebook's form.

    root: the folder of data and runs, from which relative folders count. Raises FileNotFoundError, or ValueError with
    the names at fault: of the file's keys, of axes, exclusions and folders, and of the cells that the form refuses.
    """
    file = Path(file)
    given = read_declaration(file)
    notebook = _found(given["notebook"], file)
    signature = read_signature(notebook)
    fixed = _fixed(given, signature, file)
    axes = {name: _axis(name, said, signature, root, file) for name, said in _said(given, file).items()}
    _apart(axes, given.get("fixed") or {}, file)
    cells, excluded = _cells(axes, given.get("exclude") or [], file)
    _check(signature, fixed, cells, file)
    check_figure(given.get("figure", {}), axes, file.name)
    return Grid(
        name=str(given.get("name") or file.stem),
        notebook=notebook,
        fixed=fixed,
        axes=axes,
        cells=cells,
        excluded=excluded,
        out=str(given["out"]),
        resources=given["resources"],
        inputs=tuple(given.get("inputs") or ()),
        gather=given.get("gather"),
        missing={person: why for axis in axes.values() for person, why in axis.missing.items()},
        quantities=given.get("quantities") or (),
        figure=dict(given.get("figure") or {}),
    )


def _found(name: str, file: Path) -> Path:
    """A file that a grid names: from here, from the project, or as it comes with the package."""
    path = Path(located(name, find_project() or Path.cwd())[0])
    if not path.is_file():
        hint = like(name, (Path(), find_project() or Path.cwd(), shipped("notebooks").parent))
        raise FileNotFoundError(
            f"{file} names {name}, which is neither here nor in the project nor in the package{hint}"
        )
    return path


def _fixed(given: Mapping, signature: Signature, file: Path) -> dict[str, Any]:
    values = read_yaml(_found(given["params"], file)) if given.get("params") else {}
    values = {k: v for k, v in (values | (given.get("fixed") or {})).items() if k != "out"}
    try:
        return _plain(signature.check(values))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}, fixed parameters: {error}") from None


def _said(given: Mapping, file: Path) -> dict[str, Any]:
    """The axes as the file says them, seeds among them."""
    axes = dict(given["axes"])
    if "seeds" in given:
        if "seed" in axes:
            raise ValueError(f"{file} gives seeds twice: as seeds and as the axis seed; leave one out")
        axes["seed"] = given["seeds"]
    return axes


def _axis(name: str, said: Any, signature: Signature, root: Path, file: Path) -> Axis:
    try:
        return read_axis(name, said, signature, root)
    except (ValueError, TypeError, OSError) as error:
        raise type(error)(f"{file.name}, axis {name}: {error}") from None


def _apart(axes: Mapping[str, Axis], fixed: Mapping, file: Path) -> None:
    """Refuse a parameter that two axes set, or an axis and `fixed`."""
    owner: dict[str, str] = dict.fromkeys(fixed, "fixed")
    for name, axis in axes.items():
        for parameter in axis.parameters:
            if parameter in owner:
                raise ValueError(f"{file}: {parameter} is set by {owner[parameter]} and by the axis {name}; leave one")
            owner[parameter] = name


def _cells(axes: Mapping[str, Axis], exclude: Sequence[Mapping], file: Path) -> tuple[tuple[Cell, ...], int]:
    """All combinations that are not excluded, and how many are."""
    rules = []
    for rule in exclude:
        unknown_names(rule, axes, f"{file.name}, exclude")
        rules.append({axis: axes[axis].labels_of(said, f"{file}, exclude") for axis, said in rule.items()})
    cells, excluded = [], 0
    for labels in itertools.product(*(axis.points for axis in axes.values())):
        at = dict(zip(axes, labels, strict=True))
        if any(all(at[axis] in labels for axis, labels in rule.items()) for rule in rules):
            excluded += 1
            continue
        values = {k: v for axis, label in at.items() for k, v in axes[axis].points[label].items()}
        cells.append(Cell(_folder(at), at, values))
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{file}: two cells would share the folder {twice}; name the values: axis: {{name: {{...}}}}")
    if not cells:
        why = "; ".join(f"{who}: {why}" for axis in axes.values() for who, why in list(axis.missing.items())[:5])
        raise ValueError(
            f"{file}: the grid has no cell{f', as nobody can be used: {why}' if why else ': all are excluded'}"
        )
    return tuple(cells), excluded


def _folder(at: Mapping[str, str]) -> str:
    name = "_".join(f"{axis}={label}" for axis, label in at.items())  # no comma: Snakemake separates wildcards by it
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 13]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _check(signature: Signature, fixed: Mapping, cells: Sequence[Cell], file: Path) -> None:
    """Ask the notebook's form about every cell; its objections, of all cells, in one error."""
    wrong = {}
    for cell in cells:
        try:
            if signature.parameters is None:
                signature.check({**fixed, **cell.values})
            else:
                signature.parameters(**{**signature.defaults, **fixed, **cell.values}).before_start()
        except (ValueError, TypeError, OSError) as error:
            wrong[cell.name] = " ".join(str(error).split())
    if wrong:
        shown = "; ".join(f"{name}: {why}" for name, why in list(wrong.items())[:5])
        raise ValueError(f"{file}: {len(wrong)} of {len(cells)} cells cannot be run; {shown}")


# ----------------------------------------------------------------------------------------------------------
# The plan: cells with their fingerprints, and which of them are done


@dataclass(frozen=True)
class Plan:
    """What there is to do. done: cells whose results are whole and of this grid; stale: why others run again."""

    grid: Grid
    folder: Path  # of the grid's results
    code: str
    fingerprints: Mapping[str, str]
    done: frozenset[str]
    stale: Mapping[str, str]

    @property
    def todo(self) -> list[str]:
        """The cells to run, in the order of the grid."""
        return [cell.name for cell in self.grid.cells if cell.name not in self.done]

    def origin(self, name: str) -> dict[str, str]:
        """What run.json of a cell says of the grid."""
        return {"cell": name, "fingerprint": self.fingerprints[name], "code": self.code}


def make_plan(grid: Grid, root: Path, any_code: bool = False) -> Plan:
    """The plan of a grid whose results lie below `root`; reads what is there, writes nothing.

    any_code: results of other versions of the code count as done.
    """
    common = [source_hash(grid.notebook), _contents(grid.inputs)]
    fingerprints = {c.name: _hash([*common, dict(grid.fixed) | dict(c.values)]) for c in grid.cells}
    if grid.gather:
        notebook, values = gathering(grid)
        fingerprints["gather"] = _hash([source_hash(notebook), values, sorted(fingerprints.values())])
    code, folder, done, stale = code_hash(), root / grid.out, set(), {}
    for cell in grid.cells:
        state = read_run(folder / cell.name)
        why = _why(state, fingerprints[cell.name], None if any_code else code)
        if why is None:
            done.add(cell.name)
        elif why:
            stale[cell.name] = why
    return Plan(grid, folder, code, fingerprints, frozenset(done), stale)


def gathering(grid: Grid) -> tuple[Path, dict[str, Any]]:
    """The notebook that reads all cells, and its parameters. Raises as `read_grid` does."""
    given = grid.gather or {}
    unknown_names(given, ("notebook", "params", "fixed", "out"), "gather")
    notebook = _found(given["notebook"], Path(f"{grid.name}, gather"))
    return notebook, _fixed(given, read_signature(notebook), Path(f"{grid.name}, gather")) | {"out": given["out"]}


def _why(state: RunState, fingerprint: str, code: str | None) -> str | None:
    """Why a cell has to run although there are results: "" where there are none, None where they stand."""
    if state.state == "incomplete":
        return ""
    origin = state.record.get("origin") or {}
    if state.state != "done":
        return state.reason
    if origin.get("fingerprint") != fingerprint:
        return "parameters, notebook or inputs have changed" if origin.get("fingerprint") else "not of a grid"
    return None if code in (None, origin.get("code")) else "the code has changed"


def _contents(patterns: Sequence[str]) -> list[str]:
    project = find_project() or shipped("workflow").parent
    files = [Path(file) for pattern in patterns for file in located(pattern, project)]
    if lost := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(f"the grid's inputs name {', '.join(lost[:3])}, which is not there")
    return [sha256(file) for file in files]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
