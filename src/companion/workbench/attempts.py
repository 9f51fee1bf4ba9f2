"""What was tried in a run's folder, and how it ended: one line a beginning, one an end, kept over retries and kills.

run.json says only that a run is done. When it is not, this says which cell failed and why, whether a further attempt
could help, and, by a beginning without an end, that the runner was killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

FILE = ".attempts.jsonl"
LOCK = ".lock"


@dataclass(frozen=True)
class Attempt:
    """The last attempt in a folder.

    reason: of a failure, in one line; "killed" where the runner left none. again: whether the same could succeed, as
    after a kill or on a full disk, but not after an error of the notebook. job: Slurm's number, "" elsewhere. seconds:
    of an attempt that ended, with the start of its processes and their imports, which run.json does not count.
    """

    number: int
    start: str
    host: str
    job: str
    outcome: str  # done | failed | killed | running
    reason: str = ""
    again: bool = True
    seconds: float | None = None


def begin(folder: Path) -> None:
    """Note that an attempt begins."""
    job = os.environ.get("SLURM_JOB_ID", "")
    _append(folder, {"start": _now(), "host": socket.gethostname(), "pid": os.getpid(), "job": job})


def end(folder: Path, reason: str = "", again: bool = True) -> None:
    """Note how the attempt ended: well, if there is no reason for the contrary."""
    _append(folder, {"end": _now(), "reason": reason, "again": again})


def last(folder: str | os.PathLike) -> Attempt | None:
    """The last attempt in a folder, None where there was none."""
    lines = _lines(Path(folder) / FILE)
    starts = [i for i, line in enumerate(lines) if "start" in line]
    if not starts:
        return None
    begun, after = lines[starts[-1]], [line for line in lines[starts[-1] :] if "end" in line]
    known = {"number": len(starts), "start": begun["start"], "host": begun.get("host", ""), "job": begun.get("job", "")}
    if not after:
        if locked(folder) or begun.get("host") != socket.gethostname():
            return Attempt(**known, outcome="running")
        return Attempt(**known, outcome="killed", reason="killed: the runner left no reason")
    ended = after[-1]
    took = (datetime.fromisoformat(ended["end"]) - datetime.fromisoformat(begun["start"])).total_seconds()
    return Attempt(**known, outcome="failed" if ended.get("reason") else "done",
                   reason=ended.get("reason", ""), again=ended.get("again", True), seconds=took)  # fmt: skip


def locked(folder: str | os.PathLike) -> bool:
    """Whether a runner of this machine is at work in a folder: it holds the lock, which its death would have opened."""
    try:
        with open(Path(folder) / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _append(folder: Path, line: dict) -> None:
    try:
        with open(folder / FILE, "ab", buffering=0) as file:
            file.write((json.dumps(line) + "\n").encode())
    except OSError:
        pass  # a full disk has a reason of its own, which must not be hidden by this one


def _lines(path: Path) -> list[dict]:
    found = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut by a kill
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
