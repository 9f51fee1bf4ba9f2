"""Where the files lie that a workflow names, and one hash of the code that computes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import companion
from companion.files import shipped

PACKAGE = Path(companion.__file__).parent
# What does not compute is told by its folder: a better index page is no reason to run the notebooks again.
SHELL = {"workbench", "show", "cli.py"}


def located(pattern: str, project: Path) -> list[str]:
    """The files that a pattern names, sorted: here, else in the project, else in the package.

    A pattern without any file stays as it is, so that Snakemake reports it missing.
    """
    within = pattern.removeprefix("src/companion/")
    places = [(Path(), pattern), (project, pattern), (shipped("checkpoints").parent, pattern)]
    if within != pattern:
        places.append((PACKAGE, within))
    for folder, glob in places:
        if Path(glob).is_absolute():
            return [glob]
        if found := sorted(str(file) for file in folder.glob(glob) if file.is_file()):
            return found
    return [pattern]


def code_hash(files: Iterable[str] | None = None) -> str:
    """One hash of the content of sources, by default the package's: an edit changes it, a fresh checkout does not."""
    files = sorted(map(str, PACKAGE.rglob("*.py"))) if files is None else files
    computing = [Path(file) for file in files if not SHELL & set(Path(file).parts[-3:])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in computing)).hexdigest()[:12]
