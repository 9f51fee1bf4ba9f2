"""The batch engine for real: a graph of two notebooks, resumed after any kill, idle when up to date."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from companion.files import shipped
from companion.workbench.batch import all_runs, run_batch
from companion.workbench.run import read_run

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path, tiny_notebook, monkeypatch):
    """A folder with two runs, `second` needing `first`; its config path."""
    monkeypatch.chdir(tmp_path)
    Path("code.py").touch()
    Path("first.yaml").write_text("scale: 1e-3\n")
    runs = [
        {
            "name": "first",
            "notebook": "tiny.ipynb",
            "params": "first.yaml",
            "out": "runs/first",
            "threads": 1,
        },
        {"name": "second", "notebook": "tiny.ipynb", "out": "runs/second", "needs": ["first"], "threads": 1},
    ]
    Path("config.yaml").write_text(yaml.safe_dump({"code": ["*.py"], "runs": runs}))
    return tmp_path


def batch(project: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "companion.cli", "batch", "--config", "config.yaml"]
    command += ["--folder", str(project), *options, "--cores", "1"]
    with open(project / "said.txt", "w") as said:  # not a pipe: the orphans of a kill would keep it open
        return subprocess.Popen(command, cwd=project, stdout=said, stderr=said, start_new_session=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    assert process.wait(timeout=500) == code, Path("said.txt").read_text()
    return Path("said.txt").read_text()


def stamps(project: Path) -> dict[str, int]:
    return {name: (project / "runs" / name / "run.json").stat().st_mtime_ns for name in ("first", "second")}


def test_graph_runs_once_then_only_what_is_stale(project):
    named = finish(batch(project, "first", "--dry-run"))  # the name comes first
    assert "first" in named and "second" not in named

    assert "done: open runs/index.html" in finish(batch(project))
    assert all(read_run(project / "runs" / name).state == "done" for name in ("first", "second"))
    assert "2 runs, all done" in (project / "runs/index.html").read_text()
    before = stamps(project)

    assert "everything is up to date: open runs/index.html" in finish(batch(project))
    assert stamps(project) == before

    (project / "second.py").write_text("# new code makes every run stale")
    reasons = finish(batch(project, "--dry-run"))
    assert "Params have changed" in reasons and "first" in reasons
    (project / "second.py").unlink()

    (project / "runs/second/metrics.json").unlink()
    said = finish(batch(project))
    assert "runs/second will be run again: metrics.json is missing" in said
    after = stamps(project)
    assert after["first"] == before["first"] and after["second"] > before["second"]


@pytest.mark.parametrize("orphan", [False, True], ids=["everything killed", "only the driver killed"])
def test_kill_and_resume(project, orphan):
    (project / "first.yaml").write_text("scale: 1e-3\nmode: wait\n")
    process = batch(project)
    deadline = time.monotonic() + 120
    while not (project / "started").exists():
        assert process.poll() is None and time.monotonic() < deadline, Path("said.txt").read_text()
        time.sleep(0.1)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    driver = [p for p in family if p.pid == process.pid or "snakemake" in p.cmdline()]
    for member in driver if orphan else family:
        member.send_signal(signal.SIGKILL)
    process.wait()
    assert read_run(project / "runs/first").state == "incomplete"

    (project / "go").touch()
    assert "done: open runs/index.html" in finish(batch(project))
    assert json.loads((project / "runs/first/metrics.json").read_text()) == {"double": 0.002}
    assert all(read_run(project / "runs" / name).state == "done" for name in ("first", "second"))
    hidden = [f for f in os.listdir(project / "runs/first") if f.startswith(".")]
    assert sorted(hidden) == [".attempts.jsonl", ".lock"]


def test_a_failure_is_reported_and_indexed(project):
    (project / "first.yaml").write_text("mode: raise\n")
    said = finish(batch(project, "--retries", "0"), code=1)
    assert "ValueError: mask has 320 columns" in said
    assert (project / "runs/first/notebook.ipynb").is_file()
    assert "Incomplete" in (project / "runs/index.html").read_text()


def test_two_runs_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two runs alike"):
        all_runs({"runs": [{"name": "a", "out": "x"}, {"name": "a", "out": "y"}]})


def test_slurm_profile_and_config_are_understood(project, capfd):
    assert run_batch("slurm", project / "config.yaml", project, ["--dry-run"]) == 0
    assert "first" in capfd.readouterr().out
    for run in all_runs(yaml.safe_load((shipped("workflow") / "config.yaml").read_text())).values():
        assert {"name", "notebook", "out"} <= set(run), run
        assert (shipped("workflow").parent / run["notebook"]).is_file(), run
        assert (shipped("workflow").parent / run.get("params", run["notebook"])).is_file(), run
