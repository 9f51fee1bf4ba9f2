"""The papers' numbers are all there, and ours are found in runs, never typed."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from companion.parameters import Parameters, param
from companion.show.reported import NONE, PAPERS, Reported, balance, compare, counts, ours, read_reported
from companion.workbench.catalogue import find_entries
from companion.workbench.index import write_index
from companion.workbench.run import Run


@dataclass(frozen=True)
class Setting(Parameters):
    acceleration: int = param(4, "R")
    interleave: bool = param(False, "other lines in each slice")
    mask: str = param("equispaced", "kind of mask")
    acs: int = param(0, "centre lines")


@pytest.fixture
def entries(tmp_path):
    for acceleration in (4, 12):
        out = tmp_path / "runs" / f"R={acceleration}"
        p = Setting(out=str(out), device="cpu", acceleration=acceleration)
        run = Run.start(p, paper="aid", stage="4_reconstruct")
        run.metrics({"summary": [{"method": "AID", "PSNR (dB)": [30.0 + acceleration, 0.25], "NRMSE": [0.05, 0.002]}]})
        run.finish()
    return find_entries(tmp_path / "runs")


def test_every_paper_is_listed_and_every_pattern_is_valid():
    rows = read_reported()
    assert {row.paper for row in rows} == set(PAPERS)
    for row in rows:
        re.compile(row.metric)
        assert row.quantity and row.reported
        assert not (row.metric or row.parameter) or (row.stage and row.make), f"{row} cannot be found or made"
    assert sum(row.reported == NONE for row in rows) > 40 and sum(row.reported != NONE for row in rows) > 40


def test_ours_come_from_the_run_that_fits(entries):
    row = Reported(
        "aid",
        "PSNR",
        stage="4_reconstruct",
        where="acceleration = 12, interleave = false",
        metric="^AID: PSNR",
        make="companion batch x",
    )
    assert ours(row, entries)[0] == "42.00 ± 0.25" and ours(row, entries)[1].name == "R=12"
    setting = Reported("aid", "R", stage="4_reconstruct", where="acceleration = 4", parameter="acceleration")
    assert ours(setting, entries)[0] == "4"
    assert ours(Reported("aid", "error", stage="4_reconstruct", metric="NRMSE"), entries)[0] == "0.0500 ± 0.0020"
    absent = Reported(
        "aid", "PSNR", stage="4_reconstruct", where="acceleration = 8", metric="PSNR", make="companion batch x"
    )
    assert ours(absent, entries) == ("no run yet: `companion batch x`", None)
    assert ours(Reported("aid", "FID", stage="4_reconstruct", metric="FID"), entries)[0] == "the run does not give it"
    assert ours(Reported("aid", "GPU"), entries) == ("no counterpart", None)


def test_tables_link_to_runs_and_count(entries, tmp_path):
    runs = tmp_path / "runs"
    table = compare("aid", entries, runs, runs / "tables" / "demo")
    first = table[0]
    assert first["here"] == "42.00 ± 0.25" and first["run"] == "[R=12](<../../R%3D12/notebook.ipynb>)"
    tables = {"aid": table, "pet": compare("pet", entries, runs, runs)}
    assert counts(tables)["pet"]["given here"] == 0 and counts(tables)["aid"]["given here"] >= 2
    assert len(balance(tables).axes[0].patches) == 6
    assert isinstance(write_index(runs), Path)
