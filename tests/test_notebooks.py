"""Every notebook runs with its smoke parameters, and all its parameter files are valid."""

import ast
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from companion.papers import start_here
from companion.papers.aid import reconstruct
from companion.parameters import check, read_yaml
from companion.reconstruction import mri as classical
from companion.workbench.run import read_run
from companion.workbench.runner import read_signature, run_notebook

ROOT = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path for path in ROOT.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def profiles(notebook: Path) -> dict[str, Path]:
    """The parameter files of a notebook by name: notebooks/params/<notebook>/<name>.yaml."""
    return {path.stem: path for path in (ROOT / "params" / notebook.relative_to(ROOT).with_suffix("")).glob("*.yaml")}


def test_there_are_notebooks():
    assert ROOT / "start_here.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameter_files_are_valid(notebook):
    signature = read_signature(notebook)
    assert signature.parameters is not None, "name the Parameters class in the notebook's metadata"
    assert "smoke" in profiles(notebook)
    outs = [signature.check(read_yaml(path))["out"] for path in profiles(notebook).values()]
    assert len(set(outs)) == len(outs), "two profiles would write into one folder"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_defaults_are_those_of_the_class(notebook):
    """All of them: what a notebook does when opened, and what its form does when made in Python."""
    signature = read_signature(notebook)
    written = check(signature.parameters, signature.defaults)
    made = asdict(signature.parameters())
    assert {n: v for n, v in written.items() if n != "out"} == {n: v for n, v in made.items() if n != "out"}


def test_every_classical_method_is_called_by_its_name():
    """Names in grids and notebooks are those of reconstruction.mri, or a comparison is left out without a word."""
    assert len(set(classical.NAMES)) == len(classical.NAMES)
    for grids in (reconstruct.GRIDS, start_here.GRIDS):
        assert set(grids) < set(classical.NAMES)
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        names = {n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        first = {name.split(" ")[0].upper() for name in classical.NAMES}
        near = {name for name in names if len(name) < 20 and name.split(" ")[0].upper() in first}
        shown = near - set(classical.NAMES)
        assert not shown, f"{path.name} names {shown}; the methods are {', '.join(classical.NAMES)}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_defines_nothing(notebook):
    """No library code in cells: functions and classes belong to the package, where they are tested."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = [line for c in cells if c["cell_type"] == "code" for line in "".join(c["source"]).splitlines()]
    assert not [line for line in lines if line.lstrip().startswith(("def ", "class ", "lambda "))]


def smoke(notebook: Path, **others) -> dict:
    return read_yaml(profiles(notebook)["smoke"]) | {"device": "cpu"} | others


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a notebook's run with its smoke parameters, one run whoever asks for it."""
    folders = {}

    def run(notebook: Path) -> Path:
        if notebook not in folders:
            at = tmp_path_factory.mktemp(notebook.stem)
            values = smoke(notebook)
            if "data" in values:
                values["data"] = str(at / "data.h5")
            if notebook.stem == "2_train":  # what it learns from is made by the notebook before
                values["data"] = str(run(notebook.with_name("1_data.ipynb")).parent / "data.h5")
            if notebook.stem == "5_grid":
                values["runs"] = str(run(notebook.with_name("4_reconstruct.ipynb")).parent)
            if notebook.stem == "start_here":  # enough for what it promises
                values |= {"evaluations": 12, "draws": 4}
            folders[notebook] = run_notebook(notebook, values, out=str(at / "run"))
        return folders[notebook]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, ran):
    folder = ran(notebook)
    run = read_run(folder)
    assert run.state == "done", run.reason
    figures = [about for about in run.record["results"].values() if about["kind"] == "figure"]
    assert figures and all(about["alt"] for about in figures)
    assert run.record["results"]["metrics.json"]["bytes"] > 50


@pytest.mark.slow
def test_start_here_reports_what_it_promises(ran):
    metrics = json.loads((ran(ROOT / "start_here.ipynb") / "metrics.json").read_text())
    gain = {row["method"]: row["gain over TV (dB)"][0] for row in metrics["table"]}
    assert gain["zero-filled"] < -5 and gain["diffusion, mean of 4"] > 2.5
    assert 0.5 < metrics["calibration_ratio"]["R = 4"] < 2
