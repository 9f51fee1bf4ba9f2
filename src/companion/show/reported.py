"""What the four papers report, beside what the runs here give.

reported.yaml lists every number of the papers, or says that there is none; this module finds ours among the runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import yaml

from companion.extras import extra
from companion.show import figures
from companion.workbench.catalogue import Entry, conditions, flatten, fulfils
from companion.workbench.run import EXECUTION, NOTEBOOK, Run

with extra("notebooks"):
    import matplotlib.pyplot as plt

PAPERS = {
    "aid": "Autoregressive image diffusion (AID)",
    "lmi": "Local-mutual-information-guided diffusion (LMI)",
    "latent3d": "Synthetic 3D MRI by VQ-VAE and latent diffusion (latent3d)",
    "pet": "PET dose enhancement (PET)",
}
NONE = "not reported"


@dataclass(frozen=True)
class Reported:
    """One number of a paper, or the fact that there is none, and where ours is to be found.

    paper, stage, where: our runs that count, the newest finished one first; where as in the gallery's filter.
    metric: a regular expression for its name among the run's numbers, or parameter: the name of a setting of the run.
    make: the command that makes such a run.
    """

    paper: str
    quantity: str
    setting: str = ""
    reported: str = NONE
    source: str = ""
    stage: str = ""
    where: str = ""
    metric: str = ""
    parameter: str = ""
    make: str = ""


def read_reported() -> list[Reported]:
    """All rows of reported.yaml. Rows of a list share what is given beside it."""
    content = yaml.safe_load((Path(__file__).parent / "reported.yaml").read_text(encoding="utf-8"))
    rows = []
    for group in content:
        common = {key: value for key, value in group.items() if key != "rows"}
        rows += [Reported(**{k: str(v).strip() for k, v in (common | row).items()}) for row in group["rows"]]
    return rows


def ours(row: Reported, entries: Sequence[Entry]) -> tuple[str, Entry | None]:
    """Our number as text, with its standard error if it has one, and the run it is from; or what is missing."""
    if not (row.metric or row.parameter):
        return "no counterpart", None
    wanted = conditions(row.where)
    # A smoke run shows that a notebook runs; its numbers mean nothing.
    done = [
        e
        for e in entries
        if e.done
        and e.folder.name != "smoke"
        and e.get("paper") == row.paper
        and e.get("stage") == row.stage
        and all(fulfils(e, *condition) for condition in wanted)
    ]
    for entry in done:
        if row.parameter in entry.parameters:
            return str(entry.parameters[row.parameter]), entry
        for name, number, error in flatten(entry.metrics):
            if row.metric and re.search(row.metric, name):
                digits = 2 if abs(number) >= 10 else 4 if abs(number) < 0.1 else 3
                return f"{number:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}"), entry
    return "the run does not give it" if done else f"no run yet: `{row.make}`", None


def compare(paper: str, entries: Sequence[Entry], runs: Path, base: Path) -> list[dict[str, str]]:
    """The table of a paper: what it reports, what we get, and a link from folder `base` to the run that made it."""
    table = []
    for row in read_reported():
        if row.paper != paper:
            continue
        text, entry = ours(row, entries)
        link = ""
        if entry is not None:
            target = os.path.relpath(entry.folder.resolve() / NOTEBOOK, base.resolve())
            link = f"[{entry.name}](<{quote(target)}>)"
        table.append(
            {
                "quantity": row.quantity,
                "setting": row.setting,
                "reported": row.reported,
                "where": row.source,
                "here": text,
                "run": link,
            }
        )
    return table


def link_base(run: Run) -> Path:
    """The folder from which links in the notebook count: that of its executed copy, or where it is open."""
    return run.folder if os.environ.get(EXECUTION) else Path.cwd()


def counts(tables: dict[str, list[dict[str, str]]]) -> dict[str, dict[str, int]]:
    """Paper -> how many quantities it reports, how many it does not, and how many we give."""
    return {
        paper: {
            "reported": sum(row["reported"] != NONE for row in table),
            NONE: sum(row["reported"] == NONE for row in table),
            "given here": sum(bool(row["run"]) for row in table),
        }
        for paper, table in tables.items()
    }


def balance(tables: dict[str, list[dict[str, str]]]):
    """A figure of `counts`, told apart by colour and hatching."""
    names, found = list(tables), counts(tables)
    with plt.rc_context(figures.STYLE):
        fig, ax = plt.subplots(figsize=(4.6, 0.5 + 0.75 * len(names)))
        for i, (label, hatch) in enumerate((("reported", ""), (NONE, "///"), ("given here", "..."))):
            places = [j + 0.27 * (i - 1) for j in range(len(names))]
            bars = ax.barh(
                places,
                [found[name][label] for name in names],
                height=0.25,
                label=label,
                hatch=hatch,
                color=figures.COLOURS[i],
                edgecolor="white",
            )
            ax.bar_label(bars, padding=3, fontsize=8)
        ax.set(yticks=range(len(names)), yticklabels=names, xlabel="quantities")
        ax.invert_yaxis()
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        fig.tight_layout()
    plt.close(fig)
    return fig
