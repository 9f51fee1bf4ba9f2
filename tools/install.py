"""Build or refresh .venv: by uv when there is one, else by pip. Called by make; standard library only.

An installation that was killed is started afresh, and two at once wait for each other.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

VENV = Path(".venv")
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".companion-installed"  # newer than these sources: nothing to do
SOURCES = [Path("pyproject.toml"), Path("constraints.txt")]
BUSY = Path(".venv-busy")  # there while an installation runs, and after one that was killed
WANTED = ["-c", "constraints.txt", "-e", ".[notebooks,batch,mri-extra,formats,docs,test]"]


def main(torch):
    if sys.version_info < (3, 11):  # noqa: UP036 (this file is run by whatever python3 is)
        version = sys.version.split()[0]
        sys.exit(f"Python 3.11 or newer is needed and this is {version}: make PYTHON=python3.12 ...")
    if torch not in ("", "cpu", "auto"):
        sys.exit(f"TORCH is {torch}; choose cpu or auto, or leave it out")
    with open(".venv-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # inherited below, so that an orphaned installer still holds it
        if STAMP.exists() and all(STAMP.stat().st_mtime >= source.stat().st_mtime for source in SOURCES):
            return
        if BUSY.exists() and VENV.exists():
            print("the last installation did not finish; starting afresh", flush=True)
            shutil.rmtree(VENV)
        BUSY.touch()
        for command in with_uv(torch) if has_uv() else with_pip(torch):
            if subprocess.run(command, pass_fds=[lock.fileno()], env=environment()).returncode:
                sys.exit(f"the installation failed in: {' '.join(map(str, command))}")
        STAMP.touch()
        BUSY.unlink()


def has_uv():
    """Whether a uv that works is on the path (a version manager's shim may not)."""
    try:
        return subprocess.run(["uv", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def with_uv(torch):
    if not PYTHON.exists():
        yield ["uv", "venv", "--quiet", "--python", sys.executable, VENV]
    backend = [f"--torch-backend={torch}"] if torch else []
    yield ["uv", "pip", "install", "--python", PYTHON] + backend + WANTED


def with_pip(torch):
    if not PYTHON.exists():
        yield [sys.executable, "-m", "venv", VENV]
    if not (VENV / "bin" / "pip").exists():  # a .venv that uv made
        yield [PYTHON, "-m", "ensurepip"]
    if torch:  # only uv can choose a build of torch
        yield [PYTHON, "-m", "pip", "install", "uv"]
        yield [VENV / "bin" / "uv", "pip", "install", "--python", PYTHON, f"--torch-backend={torch}"] + WANTED
    else:
        # what is imported is compiled then; all of it at once would be a third of the installation
        yield [PYTHON, "-m", "pip", "install", "--no-compile"] + WANTED


def environment():
    """The caller's environment; uv does not read pip's settings, so pip's find-links are passed on to it."""
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS") or pip_find_links()
    return {**os.environ, "UV_FIND_LINKS": ",".join(links.split())} if links else dict(os.environ)


def pip_find_links():
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    return subprocess.run(command, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main(os.environ.get("TORCH", ""))
