"""Tables of results: rows are dicts of plain numbers, one for each person and method; what is shown are their means."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from companion.evaluation import metrics
from companion.files import atomic_write

Row = Mapping[str, object]


def grouped(rows: Iterable[Row], *names: str) -> dict:
    """The rows by the value of one column, or by the tuple of several, in the order in which they first appear."""
    groups: dict = {}
    for row in rows:
        key = tuple(row[name] for name in names)
        groups.setdefault(key if len(names) > 1 else key[0], []).append(row)
    return groups


def check_unique(names: Sequence[str], what: str) -> None:
    """Raise ValueError for names of which two are the same: rows of a table are keyed by them."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"two {what} are both called {', '.join(twice)}, so no table could tell them apart; leave one out"
        )


def column(rows: Iterable[Row], name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers (row,) of one column; NaN where a row has none."""
    return torch.tensor([row.get(name, float("nan")) for row in rows], dtype=dtype)


def average(values: Tensor | Sequence[float], paired_with: Tensor | Sequence[float] | None = None):
    """(mean, standard error) of one number per person, of the paired differences if given; NaN is left out.

    Of a single value, the value alone: it has no error. Of none, NaN.
    """
    values = torch.as_tensor(values).flatten()
    if paired_with is not None:
        other = torch.as_tensor(paired_with).flatten()
        if len(other) != len(values):
            raise ValueError(f"paired values need the same people, got {len(values)} and {len(other)}")
        values = values.double() - other.double() if len(values) > 1 else values - other
    known = values[~values.isnan()]
    if len(known) > 1:
        return metrics.mean_and_error(known)
    return known.item() if len(known) else float("nan")


def summary(
    rows: Sequence[Row],
    columns: Mapping[str, str],
    *,
    by: str = "method",
    versus: str | None = None,
    gains: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, object]]:
    """A row for each value of `by`: the average of columns {name: heading}, and what `versus` gains, {name: heading}.

    Gains are paired: the rows of every group must be of the same people in the same order. No row without rows.
    """
    groups = grouped(rows, by)
    table = []
    for name, members in groups.items():
        row: dict[str, object] = {by: name}
        row |= {heading: average(column(members, key, dtype)) for key, heading in columns.items()}
        if versus in groups:
            row |= {
                heading: average(column(groups[versus], key, dtype), column(members, key, dtype))
                for key, heading in (gains or {}).items()
            }
        table.append(row)
    return table


def mean_of(cell: float | tuple[float, float]) -> float:
    """The mean of a cell that `average` made, with or without its standard error."""
    return cell[0] if isinstance(cell, tuple) else cell


def write_csv(path: str | os.PathLike, rows: Sequence[Row]) -> Path:
    """The path of a CSV file of the rows, written whole; its columns are those of the first."""
    with atomic_write(path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return Path(path)


class Markdown(str):
    """Text that a notebook shows formatted."""

    def _repr_markdown_(self) -> str:
        return str(self)


def markdown(rows: Sequence[Row]) -> Markdown:
    """A Markdown table with one line per row, columns in the order of the first row; a notebook shows it formatted.

    A pair of numbers is shown as mean ± standard error, floats with three significant decimals at most.
    """
    if not rows:
        raise ValueError("a table needs at least one row")
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return Markdown("\n".join(lines + ["| " + " | ".join(_cell(row[n]) for n in names) + " |" for row in rows]))


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        digits = 2 if abs(value[0]) >= 1 else 3
        return " ± ".join(f"{number:.{digits}f}" for number in value)
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
