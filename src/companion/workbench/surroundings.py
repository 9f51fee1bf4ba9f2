"""What a process needs around it, a home that can be written to; and what it need not load."""

from __future__ import annotations

import os
import pwd
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def settle() -> Path | None:
    """The temporary folder that from now on stands for the home, None where there is one that can be written to.

    Containers run as a user without an entry in passwd, without HOME or with HOME=/; then the caches of numba,
    matplotlib, Jupyter and the hub have no place, and each fails in its own way. HOME is set for this process and
    those that it starts. Nothing is changed where HOME is usable; where it is not set but the user has a home, it is
    that.
    """
    if _usable(os.environ.get("HOME", "")):
        return None
    try:
        entry = pwd.getpwuid(os.getuid())
    except KeyError:
        entry = None
        os.environ.setdefault("LOGNAME", f"uid{os.getuid()}")  # getpass.getuser, which finds no name either
    if entry and _usable(entry.pw_dir):
        os.environ["HOME"] = entry.pw_dir
        return None
    home = _own_folder()
    os.environ["HOME"] = str(home)
    return home


def _usable(home: str) -> bool:
    return bool(home) and os.path.isabs(home) and os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK)


def _own_folder() -> Path:
    """A folder in the temporary one that only this user can write to, the same at every start."""
    folder = Path(tempfile.gettempdir()) / f"companion-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
        if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="companion-"))  # somebody else has a folder of that name


@contextmanager
def without_grammar() -> Iterator[None]:
    """While nbformat is imported: its schema checker would compile a grammar of web addresses, in three seconds.

    jsonschema takes the package, where it is installed, for the formats "iri" and "iri-reference", which notebooks
    do not have.
    """
    name = "rfc3987_syntax"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # pyright: ignore[reportArgumentType]  # Python's way to say that there is none
    try:
        yield
    finally:
        del sys.modules[name]
