"""Files: written whole or not at all, their hashes, the project folder and its code version."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import companion


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`; on leaving the block it is flushed to disk and renamed to `path`.

    The temporary name keeps the suffix of `path`, since many writers choose the format by it. On any error
    the temporary file is removed and `path` stays as it was. Parent folders are created.

        with atomic_write("runs/x.npz") as aside:
            np.savez(aside, x=x)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = "the disk is full: nothing was changed; free some space and run again"
        raise OSError(error.errno, advice, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def alone(lock: str | os.PathLike, waiting: str = "") -> Iterator[IO]:
    """The open file `lock`, held by no other process meanwhile; says `waiting` and waits where one holds it.

    Its holder's death opens it.
    """
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                print(waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def project_root() -> Path:
    """The folder that data/ and runs/ lie in: COMPANION_HOME if it is set, else the project around here.

    Jupyter starts a kernel in the notebook's folder, the runner in the project's: both must file alike.
    Raises FileNotFoundError where there is neither.
    """
    if home := os.environ.get("COMPANION_HOME"):
        return Path(home).expanduser().resolve()
    if project := find_project():
        return project
    raise FileNotFoundError(
        f"{Path.cwd()} is in no companion project, so there is no place for data and runs; make one with "
        "`companion init FOLDER` and work in it, or set COMPANION_HOME to a folder"
    )


def find_project(start: str | os.PathLike | None = None) -> Path | None:
    """The nearest folder from `start` (default: here) upwards that holds notebooks and workflow, if there is one."""
    start = Path(start or Path.cwd()).resolve()
    return next((f for f in (start, *start.parents) if (f / "workflow" / "Snakefile").is_file()), None)


def shipped(name: str) -> Path:
    """The folder `name` that comes with the package: "checkpoints", "notebooks" or "workflow".

    It lies inside an installed package, and in a checkout beside src/. Read it; nothing is ever written there.
    """
    inside = Path(companion.__file__).parent / "share" / name
    return inside if inside.is_dir() else Path(companion.__file__).parents[2] / name


def code_version() -> str:
    """`git describe` of the checkout this code runs from ("-dirty" when edited), else the package version."""
    source = Path(__file__).parents[2]
    if (source / ".git").exists():
        try:
            command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--tags"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
            return done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return companion.__version__
