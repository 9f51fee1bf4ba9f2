"""Drive the workflow: take over from a killed driver, hand the work to Snakemake, say how it ended."""

from __future__ import annotations

import fcntl
import itertools
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

import companion
from companion.extras import extra
from companion.files import find_project, project_root, shipped
from companion.workbench.run import MANIFEST, read_run

PACKAGE = Path(companion.__file__).parent
INDEX = Path("runs/index.html")


def run_batch(profile: str, config: Path | None, folder: Path | None, options: Sequence[str] = ()) -> int:
    """Snakemake's exit code after doing every run that is not up to date.

    profile: "local", "slurm" or a profile's folder. config: the YAML file that lists the runs, by default the
    project's. folder: where runs/ goes, by default `project_root()`. options: passed on to Snakemake.
    Raises ModuleNotFoundError when Snakemake is not installed, FileNotFoundError outside of any project.
    """
    with extra("batch"):
        import snakemake  # noqa: F401 (run as a program, below)
    folder = (folder or project_root()).resolve()
    project = find_project()
    workflow = project / "workflow" if project else shipped("workflow")
    config = (config or workflow / "config.yaml").resolve()
    known = workflow / "profiles" / profile
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(workflow / "Snakefile")]
    command += ["--directory", str(folder), "--configfile", str(config)]
    command += ["--profile", str(known if known.is_dir() else Path(profile).resolve())]
    with _only_driver(folder) as lock:
        _forget_corrupt(folder, config)
        if any((folder / ".snakemake" / "locks").glob("*")):  # ours to open: no driver is alive
            subprocess.run([*command, "--unlock", "--quiet"], check=True, capture_output=True)
        before = _written(folder / INDEX)
        # Snakemake keeps the lock even when this process is killed.
        code = subprocess.run([*command, *options], cwd=folder, pass_fds=[lock]).returncode
        after = _written(folder / INDEX)
    if {"-n", "--dry-run"} & set(options):
        return code
    if code == 0 and after is not None:
        print(f"{'everything is up to date' if after == before else 'done'}: open {INDEX}")
    elif code:
        seen = f"; what there is: open {INDEX}" if after is not None else ""
        print(f"the workflow did not finish{seen}", file=sys.stderr)
    return code


def located(pattern: str, project: Path) -> list[str]:
    """The files that a pattern of config.yaml names, sorted: here, else in the project, else in the package.

    A pattern without any file stays as it is, so that Snakemake reports it missing.
    """
    within = pattern.removeprefix("src/companion/")
    places = [(Path(), pattern), (project, pattern), (shipped("checkpoints").parent, pattern)]
    if within != pattern:
        places.append((PACKAGE, within))
    for folder, glob in places:
        if found := sorted(str(file) for file in folder.glob(glob) if file.is_file()):
            return found
    return [pattern]


def all_runs(config: Mapping) -> dict[str, dict]:
    """Return the runs of a configuration by name, grids written out: one run a combination, and the gathering one.

    Raises ValueError when two runs have the same name.
    """
    runs = list(config.get("runs") or [])
    for grid in config.get("grids") or []:
        common = {k: v for k, v in grid.items() if k not in ("name", "vary", "gather", "out")}
        members = []
        for values in itertools.product(*grid["vary"].values()):
            set_ = [f"{name}={value}" for name, value in zip(grid["vary"], values, strict=True)]
            name = "_".join([grid["name"], *map(str, values)]).replace(".", "p").replace("-", "m")
            members.append(common | {"name": name, "out": "/".join([grid["out"], ",".join(set_)]), "set": set_})
        runs += [*members, grid["gather"] | {"name": grid["name"], "needs": [run["name"] for run in members]}]
    named = {run["name"]: run for run in runs}
    if len(named) < len(runs):
        raise ValueError("the workflow's configuration names two runs alike")
    return named


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


@contextmanager
def _only_driver(folder: Path) -> Iterator[int]:
    """Wait until no other driver works in `folder`; yields the descriptor that holds the lock."""
    (folder / ".snakemake").mkdir(parents=True, exist_ok=True)
    with open(folder / ".snakemake" / "driver.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("the workflow is already running here; waiting for it to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _forget_corrupt(folder: Path, config: Path) -> None:
    """Take the done mark from runs whose results are not what they were, so that they are run again."""
    for run in all_runs(yaml.safe_load(config.read_text(encoding="utf-8")) or {}).values():
        state = read_run(folder / run["out"])
        if state.state == "corrupt":
            print(f"{run['out']} will be run again: {state.reason}", flush=True)
            (folder / run["out"] / MANIFEST).unlink()
