"""Grids: what a file means, what is refused before anything starts, what is known to be done, and what comes out."""

import json
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import chaos
import pytest
import yaml

from companion.files import shipped
from companion.show import grid_page
from companion.show.grid_page import write_grid
from companion.workbench import again, attempts, batch, cell, estimate, grid_run, progress
from companion.workbench.export import CRATE, export
from companion.workbench.grid import make_plan, read_grid
from companion.workbench.run import Run

GRIDS = sorted((shipped("workflow") / "grids").glob("*.yaml"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A project with chaos' notebook and its grid of 2 x 2 x 1 cells."""
    chaos.lay_out(tmp_path, (2, 2, 1), 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    return tmp_path


def grid_of(here, **changes):
    given = yaml.safe_load((here / "grid.yaml").read_text()) | changes
    (here / "grid.yaml").write_text(yaml.safe_dump({k: v for k, v in given.items() if v is not None}))
    return read_grid(here / "grid.yaml", here)


def finish(plan, name, value=1.0):
    """The cell's results as its notebook would leave them, without a kernel."""
    run = Run(plan.folder / name, {"start": "2026-01-01T00:00:00+00:00", "parameters": {}, "packages": {}})
    run.folder.mkdir(parents=True)
    run._record |= {"origin": plan.origin(name), "stage": "tiny", "paper": "none", "inputs": {}, "device": {}}
    run.metrics({"value": value, "mean": [value, 0.5], "seconds": 3.0})
    run.finish()
    attempts.begin(run.folder)
    attempts.end(run.folder)


# ----------------------------------------------------------------------------------------------------------
# What a file means


def test_axes_exclusions_and_seeds_make_cells(here):
    grid = grid_of(here, seeds=[3, 5], exclude=[{"scale": 2, "shift": [0, 1], "seed": 5}])
    names = [c.name for c in grid.cells]
    assert len(names) == 6 and grid.excluded == 2 and names[0] == "scale=1_shift=0_seed=3"
    assert dict(grid.cells[-1].values) == {"scale": 2.0, "shift": 1, "seed": 3}


def test_an_axis_may_set_several_parameters(here):
    grid = grid_of(here, axes={"how": {"low": {"scale": 0.5, "shift": 1}, "high": {"scale": 2}}}, seeds=None)
    assert {c.name: dict(c.values) for c in grid.cells} == {
        "how=low": {"scale": 0.5, "shift": 1},
        "how=high": {"scale": 2.0},
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axis": {}}, "unknown parameter axis: grid.yaml"),
        ({"axes": {"scael": [1]}}, "unknown parameter scael: tiny.ipynb .* did you mean scale?"),
        ({"axes": {"scale": [1, "many"]}}, "scale must be a number, got 'many'"),
        ({"axes": {"scale": []}}, "axis scale: it has no value"),
        ({"axes": {"scale": [1, 1]}}, "has 1 twice"),
        ({"axes": {"scale": [1, 1.0]}}, "has 1.0 twice"),
        ({"axes": {"scale": 3}}, "give a list of values"),
        ({"axes": ["scale"]}, "axes must be names and values, .* got \\['scale'\\]"),
        ({"axes": {"scale": {"people": "."}}}, "holds no scan; `companion look .` says"),
        ({"axes": {"scale": {"poeple": "."}}}, "say {people: FOLDER}"),
        ({"seeds": 0}, "seeds is 0; say how many"),
        ({"exclude": {"scale": 1}}, "exclude must be a list"),
        ({"exclude": [{"scale": [1, 2]}]}, "no cell: all are excluded"),
        ({"resources": {"minutes": "1h"}}, "minutes of grid.yaml, resources, must be a whole number"),
        ({"figure": {"x": "scael"}}, "x is 'scael'; choose one of quantity, scale, shift, seed"),
        ({"inputs": "checkpoints/*"}, "inputs must be a list"),
        ({"gather": {"notebook": "tiny.ipynb"}}, "gather does not say out"),
        ({"notebook": "tinny.ipynb"}, "did you mean tiny.ipynb?"),
        ({"axes": {"out": ["a"]}}, "sets out"),
        ({"fixed": {"scale": 2}}, "scale is set by fixed and by the axis scale"),
        ({"fixed": {"weit": 2}}, "fixed parameters: unknown parameter weit"),
        ({"exclude": [{"scale": 9}]}, "scale has no value 9; it has 1, 2"),
        ({"exclude": [{"scael": 1}]}, "did you mean scale?"),
        ({"resources": {"cpus": 2}}, "unknown parameter cpus"),
        ({"out": None}, "does not say out"),
        ({"notebook": "none.ipynb"}, "names none.ipynb, which is neither here"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(here, changes, words):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=words):
        grid_of(here, **changes)


def test_every_cell_is_asked_of_the_form(here, monkeypatch):
    Path("forms.py").write_text(
        "from dataclasses import dataclass\nfrom companion.parameters import Parameters, param\n"
        "@dataclass(frozen=True)\nclass Tiny(Parameters):\n"
        "    scale: float = param(1.0, 'a factor', minimum=0)\n    shift: int = param(0, 'a summand')\n"
        "    wait: float = param(0.0, 'seconds', minimum=0)\n"
        "    def before_start(self):\n        if self.scale < self.shift:\n            raise ValueError('too small')\n"
    )
    monkeypatch.syspath_prepend(".")
    notebook = json.loads(Path("tiny.ipynb").read_text())
    notebook["metadata"]["companion"] = {"parameters": "forms:Tiny"}
    Path("tiny.ipynb").write_text(json.dumps(notebook))
    with pytest.raises(ValueError, match="1 of 4 cells cannot be run; scale=1_shift=2_seed=0: too small"):
        grid_of(here, axes={"scale": [1, 2], "shift": [0, 2]})


def test_people_of_a_folder_are_cells_and_who_cannot_be_used_is_said(here):
    import nibabel
    import numpy as np

    Path("people").mkdir()
    for i in range(4):
        image = nibabel.Nifti1Image(np.random.default_rng(i).random((4, 4, 4), np.float32), np.eye(4))
        nibabel.save(image, f"people/sub-{i:02}_T1w.nii.gz")
    nibabel.save(image, "people/sub-03_T2w.nii.gz")
    Path("people/sub-01_T1w.nii.gz").write_bytes(b"rubbish")
    notebook = json.loads(Path("tiny.ipynb").read_text())
    notebook["cells"][0]["source"] = "".join(notebook["cells"][0]["source"]) + 'source = ""\n'
    Path("tiny.ipynb").write_text(json.dumps(notebook))
    grid = grid_of(here, axes={"source": {"people": "people"}}, seeds=None)
    assert [dict(c.values) for c in grid.cells] == [
        {"source": "people/sub-00_T1w.nii.gz"},
        {"source": "people/sub-02_T1w.nii.gz"},
    ]
    assert len(grid.missing) == 2 and any("2 scans" in why for why in grid.missing.values())
    assert any("01" in name for name in grid.missing)
    grid = grid_of(here, axes={"source": {"people": "people", "contrast": "T1w"}}, seeds=None)
    assert len(grid.cells) == 3 and list(grid.missing) == ["sub-01_T1w.nii.gz"]


@pytest.mark.parametrize("file", GRIDS, ids=lambda path: path.stem)
def test_the_grids_that_come_with_the_package_are_right(file, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    if "people:" in file.read_text():
        (tmp_path / "data/cohort").mkdir(parents=True)  # empty: nothing to run, and that is said
        with pytest.raises(ValueError, match="holds no scan"):
            read_grid(file, tmp_path)
        return
    grid = read_grid(file, tmp_path)
    assert {"aid_grid": 12, "aid_grid_equal_lines": 12, "pet_dose_ladder": 7, "lmi_directions": 6}[grid.name] == len(
        grid.cells
    )
    assert set(grid.figure.get(k) for k in ("x", "lines", "panels")) <= {*grid.axes, "quantity", None}
    assert make_plan(grid, tmp_path).todo == [c.name for c in grid.cells]


# ----------------------------------------------------------------------------------------------------------
# What is done


def test_only_what_is_new_or_no_longer_true_is_to_do(here):
    grid = grid_of(here)
    plan = make_plan(grid, here)
    for name in plan.todo:
        finish(plan, name)
    assert make_plan(grid, here).todo == []
    assert make_plan(grid_of(here, axes={"scale": [1, 2, 3], "shift": [0, 1]}), here).todo == [
        "scale=3_shift=0_seed=0",
        "scale=3_shift=1_seed=0",
    ]
    (plan.folder / "scale=1_shift=0_seed=0" / "metrics.json").write_text("{}")
    plan = make_plan(grid, here)
    assert plan.stale == {"scale=1_shift=0_seed=0": "metrics.json is not the file that the run wrote"}
    assert set(make_plan(grid_of(here, fixed={"wait": 0.1}), here).stale.values()) >= {
        "parameters, notebook or inputs have changed"
    }


def test_other_code_makes_results_stale_unless_they_are_kept(here, monkeypatch):
    grid = grid_of(here)
    plan = make_plan(grid, here)
    finish(plan, plan.todo[0])
    monkeypatch.setattr("companion.workbench.grid.code_hash", lambda: "another")
    assert make_plan(grid, here).stale == {plan.todo[0]: "the code has changed"}
    assert make_plan(grid, here, any_code=True).done == {plan.todo[0]}


def test_two_grids_in_one_folder_are_refused_or_merged_knowingly(here):
    plan = make_plan(grid_of(here), here)
    plan.folder.mkdir(parents=True)
    grid_run._write(plan, plan.todo, {}, False)
    other = make_plan(grid_of(here, name="other", axes={"scale": [7], "shift": [0]}), here)
    with pytest.raises(ValueError, match="holds the grid grid, and this one is other; .* --merge"):
        grid_run._former(other, merge=False)
    grid_run._write(other, other.todo, grid_run._former(other, merge=True), False)
    merged = json.loads((plan.folder / "grid.json").read_text())
    assert len(merged["cells"]) == 5 and merged["todo"] == ["scale=7_shift=0_seed=0"]
    changed = make_plan(grid_of(here, name="other", fixed={"wait": 2.0}), here)
    with pytest.raises(ValueError, match="differs: fixed wait: 0.0 there, 2.0 here"):
        grid_run._former(changed, merge=True)


def test_a_second_attempt_is_made_only_where_it_can_help(here, monkeypatch):
    plan = make_plan(grid_of(here), here)
    plan.folder.mkdir(parents=True)
    grid_run._write(plan, plan.todo, {}, False)
    name, called = plan.todo[0], []
    monkeypatch.setattr(cell, "run_notebook", lambda *a: called.append(a) or Path("x"))
    (plan.folder / name).mkdir()
    attempts.begin(plan.folder / name)
    cell.run_cell(plan.folder / "grid.json", name, attempt=2)  # the first was killed
    attempts.end(plan.folder / name, "cell [3] failed: ValueError: no", again=False)
    with pytest.raises(cell.RunFailed, match="not tried again, .* ValueError: no"):
        cell.run_cell(plan.folder / "grid.json", name, attempt=2)
    cell.run_cell(plan.folder / "grid.json", name)  # a new driver does
    assert len(called) == 2 and called[0][3]["fingerprint"] == plan.fingerprints[name]
    with pytest.raises(ValueError, match="has no cell none"):
        cell.run_cell(plan.folder / "grid.json", "none")


def test_a_gpu_has_one_job_at_a_time(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    other = cell._taken("0")
    with cell._own_gpus(1):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1" and cell._taken("1") is None
    other.close()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with cell._own_gpus(0):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # none was asked for, none is seen
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ValueError, match="wants 3 GPUs and this machine has 2"), cell._own_gpus(3):
        pass


def test_what_a_dead_driver_left_in_the_queue_is_withdrawn_and_nothing_else(tmp_path, monkeypatch):
    uuid = "2564a0e8-5e87-44ea-aff7-56f95bd5e8c2"
    jobs = [
        (1, uuid, tmp_path, "rule_cell_wildcards_shift=1"),
        (2, uuid, tmp_path / "other", "rule_cell_wildcards_a=1"),
    ]
    jobs += [(3, "train", tmp_path, ""), (4, uuid, tmp_path, "mine"), (5, uuid, tmp_path, "rule_gather")]
    said = "\n".join("|".join(map(str, job)) for job in jobs)
    for name, body in (("squeue", f"cat <<'E'\n{said}\nE"), ("scancel", f'echo "$@" > {tmp_path}/cancelled')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    batch._withdraw(tmp_path)
    assert (tmp_path / "cancelled").read_text().split() == ["--state=PENDING", "1", "5"]


# ----------------------------------------------------------------------------------------------------------
# What comes out


def test_the_figure_of_a_cohort_shows_how_its_people_are_spread():
    people = [f"sub-{i:02}" for i in range(20)]
    plan = {"axes": {"source": {name: {"source": name} for name in people}}, "figure": {}}
    numbers = {"TV: PSNR (dB)": 30.0, "image: PSNR (dB)": 33.0, "image: SSIM": 0.9}
    rows = [{"source": p, "quantity": q, "value": v + i} for i, p in enumerate(people) for q, v in numbers.items()]
    fig, alt = grid_page.figure(plan, rows)
    (ax,) = fig.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["TV", "image"] and ax.get_ylabel() == "PSNR (dB)"
    assert sorted(len(line.get_ydata()) for line in ax.lines)[-2:] == [20, 20] and "over source" in alt
    _, alt = grid_page.figure(plan | {"figure": {"quantity": "image: SSIM"}}, rows)
    assert alt == "image: median and quartiles over source"
    both = plan | {"axes": plan["axes"] | {"R": {"R=4": {"R": 4}, "R=8": {"R": 8}}}, "figure": {"x": "source"}}
    fig, _ = grid_page.figure(both, [row | {"R": R} for row in rows for R in (4, 8)])
    shown = [label.get_text() for label in fig.axes[0].get_xticklabels()]
    assert shown == ["TV, R 4", "TV, R 8", "image, R 4", "image, R 8"], "nothing is mixed"


def test_table_figure_and_page(here):
    plan = make_plan(grid_of(here, seeds=2, quantities={"the value": "value"}), here)
    plan.folder.mkdir(parents=True)
    grid_run._write(plan, plan.todo, {}, False)
    for i, name in enumerate(plan.todo[:-1]):
        finish(plan, name, float(i))
    failed = plan.folder / plan.todo[-1]
    failed.mkdir()
    attempts.begin(failed)
    attempts.end(failed, "cell [3] failed: ValueError: <no>", again=False)
    written = write_grid(plan.folder)
    lines = written["table"].read_text().splitlines()
    assert lines[0] == "cell,scale,shift,seed,state,reason,quantity,value,error" and len(lines) == 9
    assert lines[2] == "scale=1_shift=0_seed=1,1.0,0,1,done,,the value,1.0,"
    assert lines[-1].endswith(",failed,cell [3] failed: ValueError: <no>,,,")
    assert "&lt;no&gt;" in written["page"].read_text() and written["figure"].stat().st_size > 5000
    if "parquet" in written:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(written["parquet"])
        assert table.num_rows == 8 and table["value"].to_pylist()[:2] == [0.0, 1.0]
    before = written["table"].read_bytes()
    assert write_grid(plan.folder)["table"].read_bytes() == before


def test_a_forecast_is_made_of_recorded_runs(here):
    plan = make_plan(grid_of(here), here)
    assert "no run of this notebook is recorded" in estimate.forecast(plan, estimate.cost_of(plan, [here]), 2)
    finish(plan, plan.todo[0])
    plan = make_plan(plan.grid, here)
    cost = estimate.cost_of(plan, [plan.folder, here])
    assert cost.runs == 1 and cost.memory > 10**7 and cost.disk > 20
    assert "1 done, 3 to run" in estimate.forecast(plan, cost, 2)
    assert list(estimate.objections(plan, cost)) == []
    full = estimate.Cost(1.0, 0, 10**18, 1)
    assert any("make room first" in reason for reason in estimate.objections(plan, full))


def test_status_tells_what_failed_and_why(here):
    plan = make_plan(grid_of(here), here)
    plan.folder.mkdir(parents=True)
    grid_run._write(plan, plan.todo, {}, False)
    finish(plan, plan.todo[0])
    for name, reason in ((plan.todo[1], "cell [3] failed: ValueError: no"), (plan.todo[2], None)):
        (plan.folder / name).mkdir()
        attempts.begin(plan.folder / name)
        if reason:
            attempts.end(plan.folder / name, reason)
    said = progress.report(progress.statuses(here / "runs"))
    assert said.startswith("1 failed, 1 killed, 1 waiting, 1 done")
    assert "failed   grid/scale=1_shift=1_seed=0  cell [3] failed: ValueError: no" in said

    lock = open(plan.folder / plan.todo[2] / attempts.LOCK, "w")  # noqa: SIM115
    import fcntl

    fcntl.flock(lock, fcntl.LOCK_EX)
    said = progress.report(progress.statuses(here / "runs"))
    assert "1 running" in said and "to go" in said
    assert list(progress.leftovers(here / "runs", failed=True)) == [  # what is at work is left alone
        plan.folder / plan.todo[1] / attempts.FILE
    ]
    lock.close()


def test_clean_removes_what_kills_left_and_no_result(here):
    plan = make_plan(grid_of(here), here)
    finish(plan, plan.todo[0])
    done = plan.folder / plan.todo[0]
    before = sorted(done.iterdir())
    (done / ".metrics.0123abcd.json").write_text("half")
    (done / ".notebook.ipynb").write_text("half")
    assert progress.clean(here / "runs") == (2, 8)
    assert sorted(done.iterdir()) == before and make_plan(plan.grid, here).done == {plan.todo[0]}


def test_numbers_are_compared_within_the_tolerance():
    then = {"a": {"b": [1.0, 2.0]}, "text": "x", "seconds": 3.0}
    assert dict(again.leaves(then)) == {"a.b[0]": 1.0, "a.b[1]": 2.0, "text": "x", "seconds": 3.0}
    assert again._close(1.0, 1.0 + 1e-9, 1e-6) and not again._close(1.0, 1.0 + 1e-9, 0.0)
    assert not again._close(1.0, None, 0.1) and not again._close(True, 1, 0.1) and again._close("x", "x", 0.0)


def test_an_exported_run_describes_itself(here):
    import zipfile

    plan = make_plan(grid_of(here), here)
    finish(plan, plan.todo[0])
    path = export(plan.folder / plan.todo[0])
    first = path.read_bytes()
    assert export(plan.folder / plan.todo[0]).read_bytes() == first
    with zipfile.ZipFile(path) as archive:
        crate = json.loads(archive.read(CRATE))
        names = set(archive.namelist())
    entities = {entity["@id"]: entity for entity in crate["@graph"]}
    assert len(entities) == len(crate["@graph"])
    parts = {part["@id"] for part in entities["./"]["hasPart"]}
    assert parts == names - {CRATE} and entities[CRATE]["about"] == {"@id": "./"}
    action = entities["#run"]
    linked = [action["instrument"], action["agent"], *action["object"], *action["result"], *entities["./"]["hasPart"]]
    assert all(link["@id"] in entities for link in linked)
    assert action["result"] == [{"@id": "metrics.json"}] and entities["metrics.json"]["sha256"]
    # What RO-Crate 1.1 and Process Run Crate 0.5 say MUST be
    head, root = entities[CRATE], entities["./"]
    assert head["@type"] == "CreativeWork" and head["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"}
    assert root["@type"] == "Dataset" and root["name"] and root["description"]
    assert datetime.fromisoformat(root["datePublished"]) and root["license"]["@id"] in entities
    assert root["conformsTo"]["@id"] in entities and root["mentions"] == {"@id": action["@id"]}
    assert action["@type"] == "CreateAction" and datetime.fromisoformat(action["endTime"])
    kinds = entities[action["instrument"]["@id"]]["@type"]
    assert kinds == "SoftwareApplication" or "SoftwareSourceCode" in kinds
    for name, entity in entities.items():  # flat, each with a type and an identifier that is a URI
        assert entity["@type"] and not re.search(r"[\s<>]|^/|\.\.", name)
        values = [v for value in entity.values() for v in (value if isinstance(value, list) else [value])]
        assert all(set(v) == {"@id"} for v in values if isinstance(v, dict))
        assert "File" not in entity["@type"] or name in parts
    with pytest.raises(ValueError, match="cannot be exported"):
        export(here)


# ----------------------------------------------------------------------------------------------------------
# For real


@pytest.mark.slow
def test_a_killed_grid_ends_as_if_nothing_had_been(tmp_path):
    """Two cells, a driver and a kernel killed; tests/chaos.py does more of it."""
    import random

    chaos.lay_out(tmp_path, (2, 1, 1), 0.0)
    dice = random.Random(1)
    dice.shuffle = lambda wanted: wanted.__setitem__(slice(None), ["driver", "kernel"])
    told = chaos.disturbed(tmp_path, 2, 1, dice, full_disk=False)
    assert told["driver"] == 1
    expected = [s * 2 + random.Random(0).random() for s in (1, 2)]
    rows = [line.split(",") for line in (tmp_path / "runs/grid/table.csv").read_text().splitlines()[1:]]
    assert [float(row[-2]) for row in rows] == expected


@pytest.mark.slow
def test_a_run_repeats_itself_bit_for_bit(here):
    from companion.workbench.runner import run_notebook

    folder = run_notebook("tiny.ipynb", {"scale": 2.0}, out="runs/one")
    done = subprocess.run(
        [sys.executable, "-m", "companion.cli", "rerun", str(folder)], capture_output=True, text=True, cwd=here
    )
    assert done.returncode == 0 and "bit for bit" in done.stdout, done.stdout + done.stderr
    assert "1 of 1 results have the same bytes" in done.stdout
