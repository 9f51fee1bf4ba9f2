"""A cohort of virtual people through `companion grid`: a k-space file each, some damaged, all others reconstructed.

    python benchmarks/cohort.py FOLDER [--people 40] [--damaged 3] [--cores 2] [--size 64]

Each person is a pair of BART files, one slice of fully sampled k-space from four coils, in a folder of its own; of the
last, one is cut short, one holds rubbish, one has NaN in it. The notebook is real_scan with few evaluations. It ends
with an error unless the table has every person once: a result, or the reason why there is none. Prints how many, how
long, and the memory of the driver (this grid's command and Snakemake) and of the cells over time. Go on after a stop
with the same command.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import yaml

from companion.acquisition.slices import simulated
from companion.data import anatomy
from companion.data.cfl import write_cfl
from companion.data.virtual import slices
from companion.files import shipped

NOISE = 0.01  # of a component of k-space; bright tissue is 1
EVERY = 2.0  # seconds between looks at the memory


def write_people(folder: Path, people: int, damaged: int, size: int) -> None:
    """The files of so many virtual people, of whom the last cannot be read, each in another way."""
    voxel = (anatomy.FIELD_OF_VIEW_MM / size,) * 3
    for i, x in enumerate(slices("test", people, size)):
        k = simulated(x[None], 4, NOISE, voxel, seed=i).kspace[0]  # (coil, y, x)
        file = folder / f"sub-{i + 1:02}" / "kspace.cfl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_cfl(file, k.permute(2, 1, 0)[:, :, None])  # readout, phase encoding, its second, coil
        if i >= people - damaged:
            damage(file, (people - 1 - i) % 3)


def damage(file: Path, how: int) -> None:
    """Cut a file short, write rubbish into its header, or a NaN into its data."""
    if how == 0:
        os.truncate(file, file.stat().st_size // 2)
    elif how == 1:
        file.with_suffix(".hdr").write_text("rubbish\n")
    else:
        with open(file, "r+b") as data:
            data.write(np.array([np.nan], "<c8").tobytes())


def watched(command: list[str], folder: Path) -> tuple[int, list[tuple[float, int, int]]]:
    """(exit code, (seconds, bytes of the driver, bytes of all cells) over time) of a grid's command."""
    env = os.environ | {"COMPANION_HOME": str(folder)}
    process, began, seen = subprocess.Popen(command, cwd=folder, env=env), time.monotonic(), []
    driver = psutil.Process(process.pid)
    while process.poll() is None:
        own = cells = 0
        try:
            for member in [driver, *driver.children(recursive=True)]:
                words = member.cmdline()
                job = "cell" in words or "ipykernel_launcher" in words
                own, cells = own + member.memory_info().rss * (not job), cells + member.memory_info().rss * job
        except psutil.Error:
            continue  # one of them ended meanwhile
        seen.append((time.monotonic() - began, own, cells))
        time.sleep(EVERY)
    return process.returncode, seen


def counted(table: Path) -> dict[str, str]:
    """Each person of a grid's table -> "done", or state and reason."""
    with open(table, newline="", encoding="utf-8") as file:
        return {
            row["cell"]: row["state"] + (f": {row['reason']}" if row["reason"] else "") for row in csv.DictReader(file)
        }


def thirds(seen: list[tuple[float, int, int]], column: int) -> str:
    """The largest and the median of the first, second and last third of what was seen, in MB."""
    parts = [[row[column] / 1e6 for row in seen[i * len(seen) // 3 : (i + 1) * len(seen) // 3]] for i in range(3)]
    return ", ".join(f"{max(part):.0f} (median {statistics.median(part):.0f})" for part in parts if part)


def main() -> None:
    """Make the people, do the grid, say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--people", type=int, default=40)
    parser.add_argument("--damaged", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--size", type=int, default=64)
    given = parser.parse_args()
    folder = given.folder.resolve()
    if not (folder / "cohort").exists():
        write_people(folder / "cohort", given.people, given.damaged, given.size)
    grid = {
        "notebook": str(shipped("notebooks") / "real_scan.ipynb"),
        "fixed": {"acs": 16, "draws": 2, "evaluations": 8, "device": "cpu", "autocast": None},
        "axes": {"source": {"people": "cohort"}},
        "quantities": ["*: PSNR (dB)", "held out.*"],
        "out": "runs/cohort",
        "resources": {"threads": 1, "mem_mb": 2000, "minutes": 30},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
    began = time.monotonic()
    command = [sys.executable, "-m", "companion.cli", "grid", "grid.yaml", "--cores", str(given.cores)]
    code, seen = watched(command, folder)
    found = counted(folder / "runs/cohort/table.csv")
    without = {name: why for name, why in found.items() if why != "done"}
    print(f"{len(found) - len(without)} results, {len(without)} reasons, {time.monotonic() - began:.0f} s, rc {code}")
    for name, why in without.items():
        print(f"  {name}: {why}")
    print(f"driver, MB, largest in each third: {thirds(seen, 1)}")
    print(f"cells, MB, largest in each third:  {thirds(seen, 2)}")
    if len(found) != given.people or len(without) != given.damaged:
        raise SystemExit(f"expected {given.people - given.damaged} results and {given.damaged} reasons")


if __name__ == "__main__":
    main()
