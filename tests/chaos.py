"""A grid that is killed at random must end as one that was left in peace, and do nothing twice.

    python tests/chaos.py FOLDER [--kills 20] [--axes 2 3 4] [--cores 2] [--seed 0]

It kills drivers, Snakemake, the processes of cells (papermill) and kernels, fills the disk, and corrupts results; the
same command goes on each time. At the end the table is the undisturbed one's, and no result that stood was made again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import nbformat.v4 as nb
import psutil
import yaml

PARAMETERS = """\
seed = 0
device = "cpu"
out = "runs/tiny"
scale = 1.0
shift = 0
wait = 0.0
"""
BODY = """\
import random, time
from dataclasses import dataclass
from companion.parameters import Parameters, param, resolve
from companion.workbench.run import Run

@dataclass(frozen=True)
class Tiny(Parameters):
    scale: float = param(1.0, "a factor", minimum=0)
    shift: int = param(0, "a summand")
    wait: float = param(0.0, "seconds of work", minimum=0)

p = resolve(Tiny, globals(), quiet=True)
run = Run.start(p, paper="none", stage="tiny")
time.sleep(p.wait)
run.metrics({"value": p.scale * 2 + p.shift + random.Random(p.seed).random(), "filler": [0.0] * 2000})
run.finish()
"""
VICTIMS = ("driver", "snakemake", "cell", "kernel")
LIMIT = 1000  # bytes a file, on the full disk


def lay_out(folder: Path, axes: tuple[int, int, int], wait: float) -> None:
    """A project with a notebook of next to no work and a grid of it."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = [nb.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}, id="0"), nb.new_code_cell(BODY, id="1")]
    nbformat.write(nb.new_notebook(cells=cells), folder / "tiny.ipynb")
    grid = {
        "notebook": "tiny.ipynb",
        "fixed": {"wait": wait},
        "axes": {"scale": list(range(1, axes[0] + 1)), "shift": list(range(axes[1]))},
        "seeds": axes[2],
        "out": "runs/grid",
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))


def start(folder: Path, cores: int = 1, full: bool = False, profile: Path | None = None) -> subprocess.Popen:
    """The command that begins a grid, and goes on with it; on a full disk, files end at LIMIT bytes."""
    command = [sys.executable, "-m", "companion.cli", "grid", "grid.yaml"]
    command += ["--profile", str(profile)] if profile else ["--cores", str(cores)]
    limit = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))) if full else None
    with open(folder / "said.txt", "a") as said:  # not a pipe: orphans would keep it open
        return subprocess.Popen(
            command, cwd=folder, stdout=said if not full else subprocess.DEVNULL, stderr=subprocess.STDOUT,
            env=os.environ | {"COMPANION_HOME": str(folder)}, start_new_session=True, preexec_fn=limit,
        )  # fmt: skip


def processes(folder: Path) -> dict[str, list[psutil.Process]]:
    """What is at work for a folder, orphans too, by kind."""
    found: dict[str, list[psutil.Process]] = {kind: [] for kind in VICTIMS}
    for process in psutil.process_iter():
        try:
            if process.environ().get("COMPANION_HOME") != str(folder):
                continue
            words = process.cmdline()
        except psutil.Error:
            continue
        for kind, mark in zip(VICTIMS, ("grid.yaml", "snakemake", "cell", "ipykernel_launcher"), strict=True):
            if mark in words and "tee" not in words and not words[0].endswith("bash"):
                found[kind].append(process)
    return found


def begun(folder: Path) -> int:
    """How many attempts have begun."""
    return sum(path.read_text().count('"start"') for path in folder.glob("runs/grid/*/.attempts.jsonl"))


def done(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("runs/grid/*/run.json"))


def disturbed(folder: Path, kills: int, cores: int, dice: random.Random, full_disk: bool = True) -> dict[str, int]:
    """Do the grid of a folder, with so many disturbances; returns what was done to it."""
    told = dict.fromkeys((*VICTIMS, "full disk", "corrupted"), 0)
    corrupted: dict[str, int] = {}
    process = start(folder, cores)
    wanted = [VICTIMS[i % len(VICTIMS)] for i in range(kills)]
    dice.shuffle(wanted)
    for i, victim in enumerate(wanted):
        until = begun(folder) + dice.randint(0, 1)
        while process.poll() is None and begun(folder) < until:
            time.sleep(0.05)
        time.sleep(dice.uniform(0, 1.5))
        if process.poll() is not None and not processes(folder)["cell"]:
            told["corrupted"] += corrupt(folder, corrupted, dice)  # else there is nothing left to disturb
            process = start(folder, cores)
        for _ in range(2400):  # as long as the kind takes to appear
            if (there := processes(folder)[victim]) or process.poll() is not None:
                break
            time.sleep(0.05)
        for member in there[:1]:
            try:
                member.send_signal(signal.SIGKILL)
                told[victim] += 1
            except psutil.NoSuchProcess:
                pass
        if victim in ("driver", "snakemake"):
            process.wait()
        if full_disk and i == kills // 2:
            stop(folder, process)
            start(folder, cores, full=True).wait()
            told["full disk"] += 1
        if i % 5 == 4:
            stop(folder, process)
            told["corrupted"] += corrupt(folder, corrupted, dice)
        if process.poll() is not None:
            process = start(folder, cores)
    code = process.wait()
    for _ in range(3):  # what a cell's one more attempt did not outlive
        if code == 0:
            break
        code = start(folder, cores).wait()
    assert code == 0, (folder / "said.txt").read_text()[-3000:]
    twice = {cell.name: n for cell in done(folder) if (n := finished(cell)) > 1 + corrupted.get(cell.name, 0)}
    assert not twice, f"done again although it was done: {twice}"
    return told


def stop(folder: Path, process: subprocess.Popen) -> None:
    """Kill all that is at work, so that what follows meets nobody."""
    for members in processes(folder).values():
        for member in members:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                pass
    process.wait()


def corrupt(folder: Path, corrupted: dict[str, int], dice: random.Random) -> int:
    """Damage one finished result."""
    if not (cells := done(folder)):
        return 0
    cell = dice.choice(cells)
    file = cell / dice.choice(["metrics.json", "run.json"])
    if dice.random() < 0.3:
        file.unlink(missing_ok=True)
    elif file.exists():
        with open(file, "r+b") as content:
            content.truncate(20)
    corrupted[cell.name] = corrupted.get(cell.name, 0) + 1
    return 1


def finished(cell: Path) -> int:
    """How often a cell was done to its end."""
    lines = [json.loads(line) for line in (cell / ".attempts.jsonl").read_text().splitlines()]
    return sum("end" in line and not line["reason"] for line in lines)


def chaos(folder: Path, kills: int, axes: tuple[int, int, int], cores: int, seed: int, wait: float = 0.5) -> dict:
    """What was done to the grid, whose table then is that of one in peace. Raises AssertionError otherwise."""
    quiet, wild = folder / "quiet", folder / "wild"
    for place in (quiet, wild):
        lay_out(place, axes, wait)
    assert start(quiet, cores).wait() == 0, (quiet / "said.txt").read_text()[-3000:]
    told = disturbed(wild, kills, cores, random.Random(seed))
    tables = [(place / "runs/grid/table.csv").read_bytes() for place in (quiet, wild)]
    assert tables[0] == tables[1] and tables[0].count(b"done") == axes[0] * axes[1] * axes[2]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--axes", type=int, nargs=3, default=(2, 3, 4))
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(chaos(given.folder.resolve(), given.kills, tuple(given.axes), given.cores, given.seed))


if __name__ == "__main__":
    main()
