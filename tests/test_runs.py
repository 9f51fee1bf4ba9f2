"""Files appear whole or not at all; parameters are what they say; run.json proves a run."""

import errno
import json
import resource
from dataclasses import dataclass

import numpy as np
import pytest

from companion.files import atomic_write, project_root, sha256
from companion.parameters import Parameters, check, param, read_yaml, resolve
from companion.workbench.run import Run, clear, read_run


@dataclass(frozen=True)
class Example(Parameters):
    steps: int = param(18, "number of levels", minimum=1)
    rate: float = param(1e-3, "learning rate", minimum=0, maximum=1)
    weights: str | None = param(None, "checkpoint")
    factors: tuple[int, ...] = param((4, 8), "accelerations", minimum=1)
    solver: str = param("heun", "solver", choices=("heun", "euler"))
    verbose: bool = param(False, "talk")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    return Run.start(Example(out="runs/a", device="cpu"), paper="brain", stage="test")


# --- files ---------------------------------------------------------------------------------------------


def test_atomic_write_replaces_whole(tmp_path):
    path = tmp_path / "deep" / "x.txt"
    for text in ("first", "second"):
        with atomic_write(path) as aside:
            aside.write_text(text)
            assert aside.suffix == path.suffix
        assert path.read_text() == text
    assert [f.name for f in path.parent.iterdir()] == ["x.txt"]


def test_atomic_write_keeps_the_old_file_on_any_error(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), atomic_write(path) as aside:
            aside.write_text("half")
            raise error
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass  # nothing was written
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_full_disk_leaves_no_half_file(run):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(run.folder.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError) as caught:
            run.arrays("big", x=np.random.default_rng(0).random(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert sorted(run.folder.iterdir()) == before


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_data_and_runs_go_to_the_project_or_to_companion_home_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.delenv("COMPANION_HOME", raising=False)
    (tmp_path / "workflow").mkdir()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    with pytest.raises(FileNotFoundError, match="in no companion project.*companion init FOLDER.*COMPANION_HOME"):
        project_root()
    (tmp_path / "workflow" / "Snakefile").touch()
    assert project_root() == tmp_path.resolve()  # Jupyter starts a kernel in the notebook's folder
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path / "elsewhere"))
    assert project_root() == (tmp_path / "elsewhere").resolve()


# --- parameters ----------------------------------------------------------------------------------------


def test_values_are_coerced_to_their_types():
    p = Example(seed="3", steps="1e3", rate="1e-3", weights="none", factors="2, 4", verbose="yes")
    assert (p.seed, p.steps, p.rate, p.weights, p.factors, p.verbose) == (3, 1000, 0.001, None, (2, 4), True)
    assert Example(seed=2**60 + 1).seed == 2**60 + 1 and Example(seed=str(2**60 + 1)).seed == 2**60 + 1
    assert check(Example, {"weights": "brain/t1w", "factors": [8]}) == {
        "weights": "brain/t1w",
        "factors": (8,),
    }


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"steps": 1.5}, TypeError, "steps must be a whole number, got 1.5"),
        ({"steps": True}, TypeError, "whole number"),
        ({"steps": 0}, ValueError, "at least 1"),
        ({"rate": "fast"}, TypeError, "rate must be a number, got 'fast'"),
        ({"rate": float("nan")}, TypeError, "rate must be a number"),
        ({"rate": 2}, ValueError, "at most 1"),
        ({"factors": [4, "x"]}, TypeError, r"factors\[1\]"),
        ({"factors": "4,0"}, ValueError, "at least 1"),
        ({"verbose": 1}, TypeError, "true or false"),
        ({"solver": "huen"}, ValueError, "choose one of heun, euler"),
        ({"step": 3}, ValueError, "did you mean steps"),
        ({"zzzzzz": 3}, ValueError, "it has seed, device"),
    ],
)
def test_bad_values_are_refused_by_name(values, error, words):
    with pytest.raises(error, match=words):
        check(Example, values)


def test_yaml_reads_exponents_as_numbers(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("a: 1e-3\nb: -2E+4\nc: 1.5\nd: 7\ne: 1e3x\nf: [1e-2]\n")
    assert read_yaml(path) == {"a": 1e-3, "b": -2e4, "c": 1.5, "d": 7, "e": "1e3x", "f": [0.01]}
    for text, words in (("a: 1\na: 2\n", "given twice"), ("- 1\n", "name: value"), ("a: [", "not YAML")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_yaml(path)
    with pytest.raises(FileNotFoundError, match="no parameter file"):
        read_yaml(tmp_path / "none.yaml")


def test_resolve_takes_the_notebook_globals(capsys):
    cell = {"seed": 1, "device": "auto", "out": "runs/x", "steps": "20", "rate": "1e-2", "weights": None}
    cell |= {"factors": [4], "solver": "euler", "verbose": False, "unrelated": object()}
    p = resolve(Example, cell)
    assert p.steps == 20 and p.device in ("cpu", "cuda") and p.factors == (4,)
    assert "number of levels" in capsys.readouterr().out
    del cell["rate"]
    with pytest.raises(ValueError, match="does not set rate"):
        resolve(Example, cell)


def test_missing_cuda_is_said(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    values = {name: getattr(Example(), name) for name in Example.__dataclass_fields__}
    with pytest.raises(ValueError, match="use auto or cpu"):
        resolve(Example, values | {"device": "cuda"}, quiet=True)
    with pytest.raises(ValueError, match="choose auto, cpu"):
        resolve(Example, values | {"device": "gpu"}, quiet=True)


# --- runs ----------------------------------------------------------------------------------------------


def test_a_run_is_done_when_its_manifest_says_so(run, tmp_path):
    import matplotlib.pyplot as plt
    import torch

    weights = tmp_path / "w.bin"
    weights.write_bytes(b"w")
    fig, axis = plt.subplots()
    axis.plot([0, 1])
    run.figure(fig, "line", alt="a rising line", caption="A line.")
    plt.close(fig)
    run.metrics({"psnr_db": torch.tensor(31.25), "table": {"tv": {"nan": float("nan")}}})
    run.metrics({"more": np.float32(0.5)})
    run.arrays("images", x=torch.ones(2, 3, dtype=torch.complex64))
    run.uses(weights)
    run.bill("draws", denoiser_calls=40, seconds=1.5)
    assert read_run(run.folder).state == "incomplete"
    run.finish()

    state = read_run(run.folder)
    assert state.state == "done"
    assert set(state.record["results"]) == {"line.png", "metrics.json", "images.npz"}
    assert state.record["results"]["line.png"]["alt"] == "a rising line"
    assert state.record["inputs"] == {"w.bin": sha256(weights)}
    assert state.record["parameters"]["factors"] == [4, 8]
    assert state.record["packages"]["torch"] == torch.__version__
    metrics = json.loads((run.folder / "metrics.json").read_text())
    assert metrics == {"psnr_db": 31.25, "table": {"tv": {"nan": "nan"}}, "more": 0.5}
    assert np.load(run.folder / "images.npz")["x"].dtype == np.complex64


def test_same_numbers_give_the_same_bytes(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    hashes = []
    for name in "ab":
        run = Run.start(Example(out=name, device="cpu"), paper="brain", stage="test")
        fig, axis = plt.subplots()
        axis.plot([0, 1])
        files = [run.figure(fig, "f", alt="x"), run.arrays("a", x=np.arange(9)), run.metrics({"m": 0.1})]
        plt.close(fig)
        hashes.append([sha256(f) for f in files])
    assert hashes[0] == hashes[1]


def test_damage_is_found(run):
    run.metrics({"a": 1})
    manifest = run.finish()
    (run.folder / "metrics.json").write_text('{"a": 2}')
    assert read_run(run.folder).state == "corrupt" and "metrics.json" in read_run(run.folder).reason
    (run.folder / "metrics.json").unlink()
    assert "missing" in read_run(run.folder).reason
    manifest.write_text(manifest.read_text()[:50])
    assert read_run(run.folder).reason == "run.json cannot be read"
    clear(run.folder)
    assert read_run(run.folder).state == "incomplete"


def test_a_new_run_takes_back_the_former_one(run):
    run.arrays("old", x=np.ones(1))
    (run.folder / "checkpoint.txt").write_text("not listed, so kept")
    run.finish()
    again = Run.start(Example(out="runs/a", device="cpu"), paper="brain", stage="test")
    assert sorted(f.name for f in again.folder.iterdir()) == ["checkpoint.txt"]


def test_results_stay_in_their_folder(run, tmp_path):
    (tmp_path / "elsewhere.txt").write_text("x")
    with pytest.raises(ValueError, match="outside the run's folder"):
        run.add(tmp_path / "elsewhere.txt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run.add("never.npz")
    with pytest.raises(ValueError, match="result name"):
        run.arrays("../up", x=np.ones(1))
    with pytest.raises(ValueError, match="no alt text"):
        run.figure(None, "f", alt=" ")
    with pytest.raises(ValueError, match="is a file"):
        Run.start(Example(out="elsewhere.txt", device="cpu"), paper="brain", stage="test")
