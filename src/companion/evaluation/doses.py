"""Tables and curves over doses: rows are one for each level, method and person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from companion.data.pet import Slices
from companion.evaluation.activity import TISSUES, count_linearity, score
from companion.evaluation.tables import average, column, grouped

MEAN, ONE, TRUSTED = "posterior mean", "one draw", "trusted"


def rows_of(name: str, x: Tensor, people: Slices) -> list[dict]:
    """A row of plain numbers for each slice of one method's images."""
    figures = score(x, people)
    return [
        {"method": name, "person": int(people.subject[i])} | {key: values[i].item() for key, values in figures.items()}
        for i in range(len(x))
    ]


def dose_table(rows: Sequence[Mapping], level: str, versus: str = MEAN) -> list[dict]:
    """One line per method at a level: means over people and their standard errors.

    "gain": by how much the NRMSE of `versus` is lower on the same people, in per cent of the method's.
    """
    methods = grouped([row for row in rows if row["level"] == level], "method")
    ours, lines = column(methods[versus], "NRMSE", torch.float64), []
    for name, mine in methods.items():
        values = {key: column(mine, key, torch.float64) for key in mine[0] if key not in ("level", "method")}
        lines.append(
            {
                "method": name,
                "NRMSE": mean_and_error(values["NRMSE"]),
                "gain (%)": mean_and_error(100 * (1 - ours / values["NRMSE"])),
                "PSNR (dB)": mean_and_error(values["PSNR"]),
                "SSIM": mean_and_error(values["SSIM"]),
                **{f"{k} (%)": mean_and_error(100 * v) for k, v in values.items() if k.startswith(("bias", "noise"))},
                "lesion recovery": mean_and_error(values["recovery"]),
            }
        )
    return lines


def region_table(rows: Sequence[Mapping], level: str) -> list[dict]:
    """The bias of tissue means at a level, %: mean and standard error, a line for each method and maps."""
    groups = grouped([row for row in rows if row["level"] == level], "method", "maps")
    return [
        {"method": method, "anatomical maps": maps}
        | {f"bias, {t} (%)": mean_and_error(column([{t: 100 * r[t]} for r in mine], t, torch.float64)) for t in TISSUES}
        for (method, maps), mine in groups.items()
    ]


def curves(rows: Sequence[Mapping], methods: Sequence[str], figure: str = "NRMSE") -> dict[str, tuple]:
    """For each method (counts, mean of a figure, its standard error), as `figures.curves` takes them."""
    lines = {}
    for name in methods:
        groups = grouped([row for row in rows if row["method"] == name], "counts")
        if groups:
            pairs = [mean_and_error(column(mine, figure, torch.float64)) for _, mine in sorted(groups.items())]
            lines[name] = (sorted(groups), [a for a, _ in pairs], [b for _, b in pairs])
    return lines


def same_quality(rows: Sequence[Mapping], method: str, versus: str = MEAN) -> list[dict]:
    """How many counts `versus` needs for the NRMSE that a method has at each level, and how many times fewer.

    By interpolation of log NRMSE over log counts; None below the lowest level that was measured.
    """
    (counts, ours, _), (_, theirs, _) = (curves(rows, [name])[name] for name in (versus, method))
    x, y = np.log(counts), np.log(ours)
    lines = []
    for n, error in zip(counts, theirs, strict=True):
        reached = y.min() <= np.log(error) <= y.max()
        needed = float(np.exp(np.interp(np.log(error), y[::-1], x[::-1]))) if reached else None
        lines.append(
            {
                "counts": n,
                f"NRMSE of {method}": error,
                f"counts for it with {versus}": needed and round(needed),
                "times fewer": needed and n / needed,
            }
        )
    return lines


def linearity(images: Mapping[str, Mapping[str, Tensor]], people: Slices, methods: Sequence[str]) -> list[dict]:
    """`count_linearity` of methods over all levels."""
    return count_linearity({name: [level[name] for level in images.values()] for name in methods}, people)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error of the values that are not NaN; the error of a single one is NaN."""
    cell = average(values)
    return cell if isinstance(cell, tuple) else (cell, float("nan"))
