"""`companion run`: bad input is refused before a kernel starts, and only run.json proves success."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from companion.workbench import attempts, runner
from companion.workbench.run import read_run
from companion.workbench.runner import RunFailed, merge, read_signature, run_notebook

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").rglob("*.ipynb"))
NOTEBOOKS = [path for path in NOTEBOOKS if ".ipynb_checkpoints" not in path.parts]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(runner, "_execute", lambda *a: pytest.fail("a kernel was started"))


def companion(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "companion.cli", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"scal": 2}, ValueError, "unknown parameter scal: tiny.ipynb .* did you mean scale?"),
        ({"scale": "big"}, TypeError, "scale must be a number, got 'big'"),
        ({"seed": 0.5}, TypeError, "seed must be a whole number"),
    ],
)
def test_bad_parameters_are_refused_before_the_start(tiny_notebook, no_kernel, values, error, words):
    with pytest.raises(error, match=words):
        run_notebook(tiny_notebook, values)
    assert not Path("runs").exists()


def test_the_declared_class_gives_ranges_and_choices(tiny_notebook, no_kernel, monkeypatch):
    Path("settings.py").write_text(
        "from dataclasses import dataclass\nfrom companion.parameters import Parameters, param\n"
        "@dataclass(frozen=True)\nclass Tiny(Parameters):\n"
        "    scale: float = param(1.0, 'a factor', minimum=0)\n"
        "    mode: str = param('ok', 'how it ends', choices=('ok', 'raise'))\n"
    )
    monkeypatch.syspath_prepend(".")
    notebook = json.loads(tiny_notebook.read_text())
    notebook["metadata"]["companion"] = {"parameters": "settings:Tiny"}
    tiny_notebook.write_text(json.dumps(notebook))
    with pytest.raises(ValueError, match="at least 0"):
        run_notebook(tiny_notebook, {"scale": "-1e-3"})
    with pytest.raises(ValueError, match="choose one of ok, raise"):
        run_notebook(tiny_notebook, {"mode": "rise"})

    notebook["cells"][0]["source"] = 'seed = 0\ndevice = "cpu"\nout = "x"\nscale = 1.0\nmod = "ok"'
    tiny_notebook.write_text(json.dumps(notebook))
    with pytest.raises(ValueError, match="differ in mod, mode"):
        read_signature(tiny_notebook)
    notebook["metadata"]["companion"] = {"parameters": "settings:Missing"}
    tiny_notebook.write_text(json.dumps(notebook))
    with pytest.raises(ValueError, match="fails to load"):
        read_signature(tiny_notebook)


def test_odd_notebooks_are_refused(tiny_notebook):
    with pytest.raises(FileNotFoundError, match="no notebook"):
        read_signature("none.ipynb")
    notebook = json.loads(tiny_notebook.read_text())
    notebook["cells"][0]["source"] = "seed = int(3)"
    tiny_notebook.write_text(json.dumps(notebook))
    with pytest.raises(ValueError, match="parameters cell"):
        read_signature(tiny_notebook)
    notebook["cells"][0]["metadata"]["tags"] = []
    tiny_notebook.write_text(json.dumps(notebook))
    with pytest.raises(ValueError, match="0 cells tagged"):
        read_signature(tiny_notebook)
    tiny_notebook.write_text("{")
    with pytest.raises(ValueError, match="not a Jupyter notebook"):
        read_signature(tiny_notebook)


def test_command_line_values_win_over_the_file():
    Path("p.yaml").write_text("scale: 1e-3\nseed: 4\n")
    assert merge("p.yaml", ["scale=2e-3", "out=a=b"]) == {"scale": "2e-3", "seed": 4, "out": "a=b"}
    with pytest.raises(ValueError, match="name=value"):
        merge(None, ["scale"])


def test_errors_are_one_line_without_traceback(tiny_notebook):
    done = companion("run", str(tiny_notebook), "-p", "scael=2")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("companion: unknown parameter scael") and done.stderr.count("\n") == 1
    assert companion("run", "none.ipynb").returncode == 1


def test_a_run_files_its_results(tiny_notebook):
    folder = run_notebook(tiny_notebook, {"scale": "1e-3"}, out="elsewhere/a")
    state = read_run(folder)
    assert state.state == "done" and state.record["parameters"]["out"] == "elsewhere/a"
    assert json.loads((folder / "metrics.json").read_text()) == {"double": 0.002}
    tags = [c["metadata"].get("tags") for c in json.loads((folder / "notebook.ipynb").read_text())["cells"]]
    assert ["injected-parameters"] in tags


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("raise", r"cell \[3\] failed: ValueError: mask has 320 columns but the maps have 384"),
        ("die", "the notebook's process ended early"),
        ("forget", "ended without run.json"),
        ("lie", "metrics.json is not the file"),
    ],
)
def test_a_failed_run_keeps_its_notebook_and_is_not_done(tiny_notebook, mode, words):
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/run.json").write_text('{"results": {}}')  # a former run that was done
    with pytest.raises(RunFailed, match=words):
        run_notebook(tiny_notebook, {"mode": mode})
    names = sorted(os.listdir("runs/tiny"))
    assert names == [".attempts.jsonl", ".lock", "metrics.json", "notebook.ipynb"]
    attempt = attempts.last("runs/tiny")
    assert attempt.outcome == "failed" and re.search(words, attempt.reason)
    assert attempt.again == (mode in ("die", "lie"))  # an error of the notebook would come again
    assert len(json.loads(Path("runs/tiny/notebook.ipynb").read_text())["cells"]) >= 3


def fake_papermill(monkeypatch, errors):
    """Replace the execution by one that raises `errors` in turn, then succeeds."""
    import papermill

    calls = []

    def execute(source, output, *args, **kwargs):
        calls.append(source)
        if len(calls) <= len(errors):
            raise errors[len(calls) - 1]

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.setattr(runner.time, "sleep", lambda seconds: None)
    return calls


def test_the_port_race_is_retried_and_user_errors_are_not(tiny_notebook, monkeypatch):
    race = RuntimeError("Kernel died before replying to kernel_info")
    calls = fake_papermill(monkeypatch, [race, race])
    with pytest.raises(RunFailed, match="without run.json"):  # the third start "ran" but wrote nothing
        run_notebook(tiny_notebook, {})
    assert len(calls) == 3
    calls = fake_papermill(monkeypatch, [race] * 9)
    with pytest.raises(RunFailed, match="ended early"):
        run_notebook(tiny_notebook, {})
    assert len(calls) == runner.STARTS
    calls = fake_papermill(monkeypatch, [RuntimeError("Kernel died")] * 9)
    with pytest.raises(RunFailed, match="ended early"):
        run_notebook(tiny_notebook, {})
    assert len(calls) == 1


def test_a_manifest_of_another_run_does_not_count(tiny_notebook, monkeypatch):
    def orphan(notebook, output, values, root, marks):
        (output.parent / "run.json").write_text('{"execution": "another", "results": {}}')

    monkeypatch.setattr(runner, "_execute", orphan)
    with pytest.raises(RunFailed, match="another run"):
        run_notebook(tiny_notebook, {})
    assert not Path("runs/tiny/run.json").exists()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_declares_its_parameters(notebook):
    signature = read_signature(notebook)
    assert {"seed", "device", "out"} <= set(signature.defaults)
    signature.check(signature.defaults)
    for file in notebook.parent.joinpath("params", notebook.stem).glob("*.yaml"):
        signature.check(merge(file, []))
