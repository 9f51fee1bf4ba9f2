"""Drive the workflow: take over from a killed driver, hand the work to Snakemake, say how it ended."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from companion.extras import extra
from companion.files import alone, find_project, project_root, shipped
from companion.workbench.cell import gpus
from companion.workbench.run import MANIFEST, read_run

INDEX = Path("runs/index.html")


def run_batch(profile: str, config: Path | None, folder: Path | None, options: Sequence[str] = ()) -> int:
    """Snakemake's exit code after doing every run that is not up to date.

    profile: "local", "slurm" or a profile's folder. config: the YAML file that lists the runs, by default the
    project's. folder: where runs/ goes, by default `project_root()`. options: passed on to Snakemake.
    Raises ModuleNotFoundError when Snakemake is not installed, FileNotFoundError outside of any project.
    """
    folder = (folder or project_root()).resolve()
    config = (config or workflow_folder() / "config.yaml").resolve()
    with only_driver(folder) as lock:
        _forget_corrupt(folder, config)
        before = _written(folder / INDEX)
        code = snakemake("Snakefile", profile, folder, ["--configfile", str(config)], options, lock)
        after = _written(folder / INDEX)
    if {"-n", "--dry-run"} & set(options):
        return code
    if code == 0 and after is not None:
        print(f"{'everything is up to date' if after == before else 'done'}: open {INDEX}")
    elif code:
        seen = f"; what there is: open {INDEX}" if after is not None else ""
        print(f"the workflow did not finish{seen}", file=sys.stderr)
    return code


def snakemake(
    snakefile: str, profile: str, folder: Path, arguments: Sequence[str], options: Sequence[str], lock: int
) -> int:
    """Snakemake's exit code. lock: of `only_driver`, whose holder may open a lock that a killed driver left.

    Raises ModuleNotFoundError when it is not installed.
    """
    with extra("batch"):
        import snakemake  # noqa: F401 (run as a program, below)
    workflow = workflow_folder()
    known = workflow / "profiles" / profile
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(workflow / snakefile), "--directory", str(folder)]
    command += arguments
    if profile == "local" and not {"--resources", "--res"} & set(options):
        command += ["--resources", f"mem_mb={memory_mb()}", f"gpu={len(gpus())}"]
    # Last, for it takes one value: those before take any number, and would take the names of runs, too.
    command += ["--profile", str(known if known.is_dir() else Path(profile).resolve())]
    if any((folder / ".snakemake" / "locks").glob("*")):  # ours to open: no driver is alive
        subprocess.run([*command, "--unlock", "--quiet"], check=True, capture_output=True)
    _withdraw(folder)
    # Snakemake keeps the lock even when this process is killed.
    return subprocess.run([*command, *options], cwd=folder, pass_fds=[lock]).returncode


def _withdraw(folder: Path) -> None:
    """Take back what dead drivers left in Slurm's queue for this folder: else each start would queue it once more.

    What has begun goes on; a new job for the same cell waits for it and takes its result.
    """
    if not shutil.which("squeue"):
        return
    asked = ["squeue", "--me", "--noheader", "--states=PENDING", "--format=%i|%j|%Z|%k"]
    said = subprocess.run(asked, capture_output=True, text=True).stdout
    jobs = [line.split("|", 3) for line in said.splitlines() if line.count("|") >= 3]
    left = [job for job, name, where, about in jobs if Path(where) == folder and _ours(name, about)]
    if left and subprocess.run(["scancel", "--state=PENDING", *left]).returncode == 0:
        print(f"{len(left)} jobs that a killed driver left in the queue are withdrawn", flush=True)


def _ours(name: str, comment: str) -> bool:
    """Whether Snakemake's executor made a job: its name is a UUID, its comment the rule."""
    return bool(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", name)) and comment.startswith("rule_")


def workflow_folder() -> Path:
    """The project's workflow, else the one that comes with the package."""
    project = find_project()
    return project / "workflow" if project else shipped("workflow")


def memory_mb() -> int:
    """What this machine has to give to jobs, in MB: nine tenths of its memory."""
    return int(0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6)


def all_runs(config: Mapping) -> dict[str, dict]:
    """The runs of a configuration by name. Raises ValueError when two have the same name."""
    runs = list(config.get("runs") or [])
    named = {run["name"]: run for run in runs}
    if len(named) < len(runs):
        raise ValueError("the workflow's configuration names two runs alike")
    return named


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


@contextmanager
def only_driver(folder: Path) -> Iterator[int]:
    """Wait until no other driver works in `folder`; yields the descriptor that holds the lock."""
    (folder / ".snakemake").mkdir(parents=True, exist_ok=True)
    lock = folder / ".snakemake" / "driver.lock"
    with alone(lock, "the workflow is already running here; waiting for it to end") as file:
        yield file.fileno()


def _forget_corrupt(folder: Path, config: Path) -> None:
    """Take the done mark from runs whose results are not what they were, so that they are run again."""
    for run in all_runs(yaml.safe_load(config.read_text(encoding="utf-8")) or {}).values():
        state = read_run(folder / run["out"])
        if state.state == "corrupt":
            print(f"{run['out']} will be run again: {state.reason}", flush=True)
            (folder / run["out"] / MANIFEST).unlink()
