"""The parameters of tables.ipynb; what it shows is `companion.show.reported`."""

from __future__ import annotations

from dataclasses import dataclass

from companion.parameters import Parameters, param
from companion.show.reported import PAPERS


@dataclass(frozen=True)
class Tables(Parameters):
    """Parameters of tables.ipynb."""

    runs: str = param("runs", "folder that holds the runs")
    papers: tuple[str, ...] = param(tuple(PAPERS), "papers whose numbers to show", choices=PAPERS)
