"""One cell of a grid, as a job does it; kept apart from the rest of the grid, since every job waits for its imports."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from companion.files import project_root
from companion.workbench import attempts
from companion.workbench.runner import RunFailed, run_notebook


def run_cell(file: Path, name: str, attempt: int = 1) -> Path:
    """The folder of a finished cell of the plan `file`; what is done and of this plan stays as it is.

    attempt: of this driver. The second is not made where the first met an error that would come again.
    Raises ValueError for a cell that the plan has not, and what `run_notebook` raises.
    """
    plan = json.loads(file.read_text(encoding="utf-8"))
    if name == "gather" and plan["gather"]:
        entry, out = plan["gather"], project_root() / plan["gather"]["values"]["out"]
    elif name in plan["cells"]:
        entry, out = plan["cells"][name], file.resolve().parent / name
    else:
        raise ValueError(f"{file} has no cell {name}; the grid was changed since: start it again")
    notebook = entry.get("notebook", plan["notebook"])
    if attempt > 1 and (before := attempts.last(out)) and before.outcome == "failed" and not before.again:
        raise RunFailed(f"{name}: not tried again, for the same would come: {before.reason}", again=False)
    origin = {"cell": name, "fingerprint": entry["fingerprint"], "code": plan["code"]}
    values = plan["fixed"] | entry["values"] if name != "gather" else entry["values"]
    with _own_gpus(int(plan["resources"].get("gpu") or 0)):
        try:
            return run_notebook(notebook, values, str(out), origin)
        except (RunFailed, ValueError, OSError) as error:
            raise RunFailed(f"{name}: {error}", getattr(error, "again", True)) from error


def gpus() -> list[str]:
    """The GPUs that may be used here, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    if not shutil.which("nvidia-smi"):
        return []
    said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i, _ in enumerate(line for line in said.stdout.splitlines() if line.startswith("GPU "))]


@contextmanager
def _own_gpus(wanted: int) -> Iterator[None]:
    """So many GPUs for this process alone, of those that are here; one that asks for none sees none.

    On a cluster the scheduler has dealt them out, and nothing is changed.
    """
    if "SLURM_JOB_ID" in os.environ:
        yield
        return
    names, held = gpus(), {}
    if wanted > len(names) > 0:
        raise ValueError(f"the cell wants {wanted} GPUs and this machine has {len(names)}; lower resources: gpu")
    try:
        while names and len(held) < wanted:
            for name in names:
                if len(held) < wanted and name not in held and (lock := _taken(name)):
                    held[name] = lock
            if len(held) < wanted:
                time.sleep(2)
        if names:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(held)
        yield
    finally:
        for lock in held.values():
            lock.close()


def _taken(gpu: str) -> IO | None:
    """The lock of a GPU of this machine, None where another process of this user has it."""
    lock = open(Path(tempfile.gettempdir()) / f"companion-gpu-{os.getuid()}-{gpu}.lock", "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
