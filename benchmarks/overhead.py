"""What a notebook run costs above papermill's own time, and what the plan of a large grid takes.

    python benchmarks/overhead.py [--repeats 5] [--cells 6] [--plan 10000]

One notebook of next to no work, alternately: by papermill alone (without and with companion's lines in it), by
`companion run`, and as cells of `companion grid` on one core, of which the driver's own start is told apart. Wall and
processor time of all processes, medians; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import nbformat.v4 as nb
import yaml

PARAMETERS = 'seed = 0\ndevice = "cpu"\nout = "runs/tiny"\nscale = 1.0\nshift = 0\n'
BARE = 'import json, pathlib\npathlib.Path("value.json").write_text(json.dumps({"value": scale * 2 + shift}))\n'
OURS = """\
from dataclasses import dataclass
from companion.parameters import Parameters, param
from companion.workbench.run import begin

@dataclass(frozen=True)
class Tiny(Parameters):
    scale: float = param(1.0, "a factor", minimum=0)
    shift: int = param(0, "a summand", minimum=0)

p, run = begin(Tiny, globals(), paper="none", stage="tiny")
run.metrics({"value": p.scale * 2 + p.shift})
run.finish()
"""


def lay_out(folder: Path) -> None:
    """The notebook, with and without companion."""
    for name, body in (("bare", BARE), ("tiny", OURS)):
        cells = [
            nb.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}, id="0"),
            nb.new_code_cell(body, id="1"),
        ]
        nbformat.write(nb.new_notebook(cells=cells), folder / f"{name}.ipynb")


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """(wall, processor) seconds of a command and all that it started. Raises RuntimeError where it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"COMPANION_HOME": str(folder)}, capture_output=True, text=True
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def grid(folder: Path, name: str, cells: int) -> list[str]:
    """The command of a grid of so many cells."""
    said = {"notebook": "tiny.ipynb", "axes": {"shift": list(range(cells))}, "out": f"runs/{name}"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(said))
    return ["-m", "companion.cli", "grid", f"{name}.yaml"]


def measured(folder: Path, repeats: int, cells: int) -> dict[str, tuple[float, float]]:
    """Median seconds of one run by each way; a grid's are those of a cell more, and of a grid of one cell less that."""
    lay_out(folder)
    papermill = ["-m", "papermill", "-k", "python3", "--no-progress-bar"]
    ways = {
        "papermill": lambda i: [*papermill, "bare.ipynb", "bare.out.ipynb"],
        "papermill, companion in the notebook": lambda i: [*papermill, "tiny.ipynb", "tiny.out.ipynb"],
        "companion run": lambda i: ["-m", "companion.cli", "run", "tiny.ipynb", "--out", "runs/one"],
        "one": lambda i: [*grid(folder, f"one{i}", 1), "--cores", "1"],
        "many": lambda i: [*grid(folder, f"many{i}", 1 + cells), "--cores", "1"],
    }
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for i in range(repeats):
        for way, command in ways.items():
            taken[way].append(timed([sys.executable, *command(i)], folder))
    wall = {way: [statistics.median(column) for column in zip(*values, strict=True)] for way, values in taken.items()}
    one, many = wall.pop("one"), wall.pop("many")
    found = {way: (w, c) for way, (w, c) in wall.items()}
    each = [(m - o) / cells for m, o in zip(many, one, strict=True)]
    found["a cell of companion grid"] = (each[0], each[1])
    found["its driver, once a grid"] = (one[0] - each[0], one[1] - each[1])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cells", type=int, default=6)
    parser.add_argument("--plan", type=int, default=10_000, help="cells of a grid that is only planned; 0: none")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        found = measured(folder, given.repeats, given.cells)
        wall, processor = found["papermill"]
        print(f"{'':40}{'wall s':>8}{'above':>8}{'cpu s':>8}{'above':>8}")
        for way, (w, c) in found.items():
            print(f"{way:40}{w:8.2f}{w - wall:8.2f}{c:8.2f}{c - processor:8.2f}")
        if given.plan:
            seconds, _ = timed([sys.executable, *grid(folder, "large", given.plan), "--dry-run"], folder)
            print(f"plan of {given.plan} cells: {seconds:.1f} s")


if __name__ == "__main__":
    main()
