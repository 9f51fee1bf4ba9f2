"""Pictures of drawn and enhanced activity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from companion.reconstruction.enhancement import Cases, Drawn
from companion.show import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = {"noise": "noise (kBq/mL)", "left after denoising": "error (kBq/mL)", "expected": "expected"}


def errors_figure(errors: list[dict]) -> Figure:
    """What `validation_errors` says as curves: against the noise level, or against the counts."""
    options = {"logx": True, "logy": True, "size": (4.2, 3.4)}
    if "sigma" in errors[0]:
        sigmas = [row["sigma"] for row in errors]
        lines = {name: (sigmas, [row[key] for row in errors]) for name, key in LINES.items()}
        return figures.curves(lines, xlabel="noise level sigma", ylabel="kBq/mL", **options)
    counts, names = [row["counts"] for row in errors], [name for name in errors[0] if name != "counts"]
    lines = {name: (counts, *map(list, zip(*(row[name] for row in errors), strict=True))) for name in names}
    return figures.curves(lines, xlabel="counts of a slice", ylabel="NRMSE", **options)


def overview(drawn: Drawn, cases: Cases, most: int = 8) -> dict[str, dict[str, Tensor]]:
    """Rows of images: draws under held-out people, or each case with its MLEM image and draws."""
    if drawn.cases is None:
        columns = range(min(most, len(drawn.seeds), len(cases.truth)))
        rows = {"held out": {str(i + 1): cases.truth[i] for i in columns}}
        several = range(0, min(len(drawn.seeds), 3 * len(columns)) - len(columns) + 1, len(columns))
        return rows | {
            f"seeds {drawn.seeds[at]} on": {str(i + 1): drawn.x[0, at + i] for i in columns} for at in several
        }
    middle = cases.mlem.shape[1] // 2
    return {
        _short(name): {"truth": cases.truth[i], "MLEM": cases.mlem[i, middle : middle + 1]}
        | {f"seed {seed}": drawn.x[i, j] for j, seed in enumerate(drawn.seeds[: most - 3])}
        | {"mean": drawn.x[i].mean(0)}
        for i, name in enumerate(cases.name[:6])
    }


def uncertainty(drawn: Drawn, most: int = 4) -> dict[str, dict[str, Tensor]]:
    """Rows of images of conditional draws: truth, mean, its error and the standard deviation of draws."""
    rows, cases = {}, drawn.cases
    if cases is None:
        raise ValueError("these draws are unconditional: there is no truth to show beside them")
    for i, name in enumerate(cases.name[:most]):
        truth, mean, deviation = cases.truth[i], drawn.x[i].mean(0), drawn.x[i].std(0)
        rows[_short(name)] = {"truth": truth, "mean": mean, "error": (mean - truth).abs(), "std of draws": deviation}
    return rows


def _short(name: str) -> str:
    """The name of a case as a figure has room for it."""
    return name.removeprefix("subject ").replace(", ", "\n")
