"""What a grid gave: one tidy table, one figure, one page, from what its folder holds, finished or not."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from companion.evaluation.tables import write_csv
from companion.files import atomic_write
from companion.show import figures
from companion.workbench import attempts
from companion.workbench.catalogue import flatten
from companion.workbench.grid import PLAN
from companion.workbench.index import SORT, STYLE
from companion.workbench.run import NOTEBOOK, read_run

COLUMNS = 8  # quantities on the page, at most; the table has all
PANELS, LINES = 12, 8  # of the figure, at most
TICKS = 12  # words along an axis, at most: of more, people of a cohort say, the spread is shown


def write_grid(folder: str | Path) -> dict[str, Path]:
    """The files written into a grid's folder: table.csv, table.parquet (with pyarrow), figure.png, index.html.

    Raises FileNotFoundError where no grid has been started.
    """
    folder = Path(folder)
    if not (folder / PLAN).is_file():
        raise FileNotFoundError(f"there is no {folder / PLAN}: no grid has been started there (companion grid FILE)")
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    rows = table(plan, folder)
    written = {"table": write_csv(folder / "table.csv", rows)}
    if parquet := _write_parquet(folder / "table.parquet", rows):
        written["parquet"] = parquet
    alt = ""
    drawn = figure(plan, rows)
    if drawn:
        fig, alt = drawn
        with atomic_write(folder / "figure.png") as aside:
            fig.savefig(aside, dpi=150, bbox_inches="tight", metadata={"Software": None})
        written["figure"] = folder / "figure.png"
    else:
        (folder / "figure.png").unlink(missing_ok=True)
    with atomic_write(folder / "index.html") as aside:
        aside.write_text(page(plan, rows, folder, alt), encoding="utf-8")
    return written | {"page": folder / "index.html"}


def table(plan: Mapping, folder: Path) -> list[dict[str, Any]]:
    """Tidy rows: cell, where each axis stands, state, reason, quantity, value, error (of a mean; none elsewhere).

    A done cell has a row for each number of its metrics, another one row with the reason, and so has each person of a
    cohort who cannot be used. Nothing in it depends on when, where or how often a cell was run.
    """
    rows = []
    for name, entry in plan["cells"].items():
        state = read_run(folder / name)
        head = {"cell": name} | {axis: _value(plan, axis, label) for axis, label in entry["at"].items()}
        origin = state.record.get("origin") or {}
        if state.state != "done" or origin.get("fingerprint") != entry["fingerprint"]:
            last = attempts.last(folder / name)
            kind, why = _failed(state.state, last)
            rows.append(head | _row(kind, why or state.reason))
            continue
        found = [head | _row("done", "", *number) for number in _chosen(flatten(_metrics(folder / name)), plan)]
        rows += found or [head | _row("done")]
    empty = dict.fromkeys(plan["axes"], "")
    for person, why in plan["missing"].items():
        rows.append({"cell": person} | empty | _row("unusable", why))
    return rows


def _chosen(numbers: Iterable[tuple], plan: Mapping) -> list[tuple[str, float, float | None]]:
    """The numbers of a cell that the grid's `quantities` ask for: patterns, or names with the pattern of one each."""
    numbers, wanted = list(numbers), plan["quantities"]
    if isinstance(wanted, list):
        return [n for n in numbers if not wanted or any(fnmatchcase(n[0], pattern) for pattern in wanted)]
    chosen = []
    for name, pattern in wanted.items():
        found = [number for number in numbers if fnmatchcase(number[0], pattern)]
        chosen += [(name, *found[0][1:])] if len(found) == 1 else found
    return chosen


def _failed(state: str, last: attempts.Attempt | None) -> tuple[str, str]:
    if last is None:
        return "waiting", "not run yet"
    if state == "incomplete":
        return {"done": "outdated", "killed": "killed"}.get(last.outcome, last.outcome), last.reason
    return ("corrupt", "") if state == "corrupt" else ("outdated", "the grid has changed since")


def _row(state: str, reason: str = "", quantity: str = "", value: float | None = None, error: float | None = None):
    return {"state": state, "reason": reason, "quantity": quantity, "value": value, "error": error}


def _metrics(folder: Path) -> dict:
    path = folder / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _value(plan: Mapping, axis: str, label: str) -> Any:
    """Where a cell stands on an axis: the parameter's number where it is one, else the label."""
    values = plan["axes"][axis][label]
    given = values.get(axis) if list(values) == [axis] else None
    return given if isinstance(given, (int, float)) and not isinstance(given, bool) else label


def _write_parquet(path: Path, rows: Sequence[Mapping]) -> Path | None:
    """The table as Parquet, None where pyarrow (the extra `tables`) is not installed."""
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]  # of the extra `tables`
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        return None
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for name, values in columns.items():
        if len({isinstance(value, str) for value in values if value is not None}) > 1:
            columns[name] = [None if value is None else str(value) for value in values]
    with atomic_write(path) as aside:
        pyarrow.parquet.write_table(pyarrow.table(columns), aside)
    return path


# ----------------------------------------------------------------------------------------------------------
# The figure


def figure(plan: Mapping, rows: Sequence[Mapping]) -> tuple[Any, str] | None:
    """(figure, what it shows) of a grid's quantities against an axis, None where no cell has a number.

    plan["figure"] may say `quantity` (a pattern), and which axes are `x`, `lines` and `panels`; "quantity" is an axis
    too. All other axes, seeds among them, are averaged, with the standard error of the mean.
    """
    said, done = plan["figure"], [row for row in rows if row["value"] is not None and math.isfinite(row["value"])]
    names = list(dict.fromkeys(row["quantity"] for row in done))
    if not names:
        return None
    chosen = [name for name in names if fnmatchcase(name, said.get("quantity", names[0].replace("[", "[[]")))]
    x, lines, panels = _roles(plan, said, len(chosen))
    ticks = list(dict.fromkeys(_value(plan, x, label) for label in plan["axes"][x]))
    numeric = all(isinstance(tick, (int, float)) for tick in ticks)
    if not numeric and len(ticks) > TICKS:
        unit = names[0].rpartition(": ")[2]
        chosen = chosen if "quantity" in said else [name for name in names if name.rpartition(": ")[2] == unit]
        return _spread([row for row in done if row["quantity"] in chosen], chosen, x, (lines, panels))
    done = [row for row in done if row["quantity"] in chosen]
    if not done:
        return None
    groups: dict[str, dict[str, dict[Any, list[float]]]] = {}
    for row in done:
        line = str(row[lines]) if lines == "quantity" else f"{lines} {row[lines]}" if lines else chosen[0]
        panel = str(row[panels]) if panels == "quantity" else f"{panels} {row[panels]}" if panels else ""
        at = row[x] if numeric else ticks.index(row[x])
        groups.setdefault(panel, {}).setdefault(line, {}).setdefault(at, []).append(row["value"])
    shown = {
        panel: {line: _points(points) for line, points in list(inner.items())[:LINES]}
        for panel, inner in list(groups.items())[:PANELS]
    }
    ylabel = chosen[0] if len(chosen) == 1 else "value"
    fig = figures.panels(shown, xlabel=x, ylabel=ylabel)
    if not numeric:
        for ax in fig.axes:
            ax.set_xticks(range(len(ticks)), labels=[str(tick)[:16] for tick in ticks], rotation=45, ha="right")
    return fig, f"{', '.join(chosen[:3])} against {x}" + (f", a line for each {lines}" if lines else "")


def _spread(
    rows: Sequence[Mapping], chosen: Sequence[str], x: str, others: Sequence[str | None]
) -> tuple[Any, str] | None:
    """(figure, what it shows): each quantity, at each place along the other axes, over all values of the axis x."""
    units = {name.rpartition(": ")[2] for name in chosen}
    groups: dict[str, list[float]] = {}
    for row in rows:
        quantity = (row["quantity"].rpartition(": ")[0] if len(units) == 1 else "") or row["quantity"]
        along = [f"{axis} {row[axis]}" for axis in others if axis and axis != "quantity"]
        groups.setdefault(", ".join([quantity] * (len(chosen) > 1 or not along) + along), []).append(row["value"])
    if not groups:
        return None
    shown = dict(list(groups.items())[: 2 * LINES])
    fig = figures.spreads(shown, ylabel=units.pop() if len(units) == 1 else "value")
    return fig, f"{', '.join(list(shown)[:3])}{', ...' if len(shown) > 3 else ''}: median and quartiles over {x}"


def _roles(plan: Mapping, said: Mapping[str, str], quantities: int) -> tuple[str, str | None, str | None]:
    """Which axes are x, lines and panels: as said, else the longest of numbers, and the others in order."""
    axes = {name: points for name, points in plan["axes"].items() if len(points) > 1} or dict(plan["axes"])
    for role in ("x", "lines", "panels"):
        if (given := said.get(role)) and given not in (*plan["axes"], "quantity"):
            raise ValueError(f"figure: {role} is {given!r}; the axes are quantity, {', '.join(plan['axes'])}")
    numbers = [n for n in axes if n != "seed" and all(isinstance(_value(plan, n, k), (int, float)) for k in axes[n])]
    x = said.get("x") or max(numbers or axes, key=lambda name: len(axes[name]))
    rest = [name for name in axes if name not in (x, "seed", *said.values())]
    rest = (["quantity"] if quantities > 1 and "quantity" not in said.values() else []) + rest
    lines = said.get("lines") or (rest.pop(0) if rest else None)
    return x, lines, said.get("panels") or (rest.pop(0) if rest else None)


def _points(points: Mapping[Any, Sequence[float]]) -> tuple[list, list[float], list[float]]:
    """x, mean and standard error of the mean (0 of one value)."""
    at = sorted(points)
    errors = [statistics.stdev(points[i]) / len(points[i]) ** 0.5 if len(points[i]) > 1 else 0.0 for i in at]
    return at, [statistics.fmean(points[i]) for i in at], errors


# ----------------------------------------------------------------------------------------------------------
# The page


def page(plan: Mapping, rows: Sequence[Mapping], folder: Path, alt: str) -> str:
    """The HTML of a grid: how many cells are done, the figure, what failed and why, a line for each cell."""
    cells: dict[str, dict] = {}
    names: list[str] = []
    for row in rows:
        cell = cells.setdefault(row["cell"], {"row": row, "values": {}})
        if row["value"] is not None:
            cell["values"][row["quantity"]] = row["value"]
            if row["quantity"] not in names and len(names) < COLUMNS:
                names.append(row["quantity"])
    counts = [cell["row"]["state"] for cell in cells.values()]
    summary = ", ".join(f"{counts.count(state)} {state}" for state in dict.fromkeys(sorted(counts)))
    head = "".join(f'<th scope="col"><button type="button">{escape(c)}</button></th>'
                   for c in ("cell", "state", *names))  # fmt: skip
    lines = "".join(_line(name, cell, names, folder) for name, cell in cells.items())
    wrong = [cell["row"] for cell in cells.values() if cell["row"]["reason"] and cell["row"]["state"] != "waiting"]
    listed = "".join(f"<li><strong>{escape(r['cell'])}</strong>: {escape(r['reason'])}</li>" for r in wrong)
    links = [name for name in ("table.csv", "table.parquet", PLAN) if (folder / name).exists()]
    picture = f'<figure><img src="figure.png" alt="{escape(alt)}"><figcaption>{escape(alt)}</figcaption></figure>'
    title = escape(plan["name"])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header><h1>{title}</h1>\n"
        f"<p>{len(cells)} cells: {summary}. {' · '.join(f'<a href={name}>{name}</a>' for name in links)}</p></header>\n"
        f"<main>{picture if alt else ''}\n{f'<h2>Not done</h2><ul>{listed}</ul>' if listed else ''}\n"
        f'<div class="scroll"><table id="runs"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
        f"</main>\n<script>{SORT}</script>\n</body>\n</html>\n"
    )


def _line(name: str, cell: Mapping, names: Sequence[str], folder: Path) -> str:
    row, log = cell["row"], folder / name / NOTEBOOK
    link = f'<a href="{escape(quote(name))}/{NOTEBOOK}">{escape(name)}</a>' if log.exists() else escape(name)
    values = "".join(f"<td>{'' if (v := cell['values'].get(n)) is None else f'{v:.4g}'}</td>" for n in names)
    state = row["state"]
    return f'<tr class="{state}"><td>{link}</td><td><span class="{state}">{state}</span></td>{values}</tr>\n'
