"""Every file below a folder, once: links followed and loops noticed, hidden files and systems' litter passed over."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Litter of systems and archives, beside everything that begins with a dot.
LITTER = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"}
NOTES = set(
    ".json .tsv .csv .txt .md .rst .html .htm .pdf .log .yaml .yml .xml .ini .cfg .toml .py .m .r .sh .ipynb .bib .cff "
    ".bval .bvec .bvals .bvecs .css .js .svg .docx .doc .xlsx .xls .pptx .lock .sha256 .md5".split()
)
NOTE_NAMES = {"readme", "changes", "changelog", "license", "licence", "copying", "authors", "citation", "dicomdir"}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".rar", ".7z")


@dataclass(frozen=True)
class Walked:
    """`files` by their name below the root, in natural order; `notes`, names that are no data; `left` name -> why."""

    root: Path
    files: dict[str, Path]
    notes: tuple[str, ...] = ()
    left: dict[str, str] = field(default_factory=dict)


def walk(root: str | os.PathLike) -> Walked:
    """Return the files at and below a path, each once, in an order that the file system does not change.

    Hidden files and folders never count. Links are followed; a file that several names lead to has the name that needs
    no link, or else the first; the others are left, with that name. Raises FileNotFoundError for a path that is not
    there.
    """
    root = Path(root).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist; check the path")
    if not root.is_dir():
        return Walked(root, {root.name: root})
    files, notes, left, seen = {}, [], {}, {}
    for name, path, trouble in _entries(root):
        if trouble:
            left[name] = trouble
        elif _is_note(path.name):
            notes.append(name)
        elif path.name.lower().endswith(ARCHIVES):
            left[name] = "an archive; unpack it, and give the folder"
        elif (same := seen.setdefault(_identity(path), name)) != name:
            left[name] = f"the same file as {same}"
        else:
            files[name] = path
    order = sorted(files, key=natural)
    return Walked(
        root,
        {n: files[n] for n in order},
        tuple(sorted(notes, key=natural)),
        {n: left[n] for n in sorted(left, key=natural)},
    )


def natural(name: str) -> tuple:
    """Return a key that sorts Case2 before Case10, and never ties different names."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdigit() else (1, 0, p.lower()) for p in parts], name


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is never data: dot files, AppleDouble, litter of systems."""
    return name.startswith(".") or name.lower() in LITTER


def _is_note(name: str) -> bool:
    lower = name.lower()
    return Path(lower).suffix in NOTES or lower.split(".")[0] in NOTE_NAMES


def _entries(root: Path) -> Iterator[tuple[str, Path, str]]:
    """Name, path and trouble ("" for a good file) of all entries: what needs no link first, then link by link."""
    above = {_identity(p) for p in root.resolve().parents}
    walked = {_identity(root): "."}
    folders, files, links = deque([("", root)]), deque(), deque()  # files: those behind links
    while folders or files or links:
        if folders:
            for name, path, trouble, linked in _inside(*folders.popleft()):
                if trouble:
                    yield name, path, trouble
                elif not path.is_dir():
                    if linked:
                        files.append((name, path, ""))
                    else:
                        yield name, path, ""
                elif linked:
                    links.append((name, path))
                else:
                    walked[_identity(path)] = name
                    folders.append((name + "/", path))
        elif files:
            yield files.popleft()
        else:
            name, path = links.popleft()
            identity = _identity(path)
            if identity in above:
                yield name, path, "a link to a folder that holds this one: a loop, not followed"
            elif identity in walked:
                yield name, path, f"a link to the folder {walked[identity]}, which is read already"
            else:
                walked[identity] = name
                folders.append((name + "/", path))


def _inside(prefix: str, folder: Path) -> Iterator[tuple[str, Path, str, bool]]:
    """Name, path, trouble, and whether it is a link, of what a folder holds that is not hidden."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: natural(entry.name))
    except OSError as error:
        yield prefix.rstrip("/"), folder, f"cannot be opened ({error.strerror})", False
        return
    for entry in entries:
        if is_hidden(entry.name):
            continue
        path, trouble = folder / entry.name, ""
        try:
            if not path.exists():
                trouble = dangling(path)
            elif not (path.is_dir() or path.is_file()):
                trouble = "neither a file nor a folder"
        except OSError as error:  # links in a circle
            trouble = f"cannot be opened ({error.strerror})"
        yield prefix + entry.name, path, trouble, entry.is_symlink()


def _identity(path: Path) -> tuple:
    stat = path.stat()
    return (stat.st_dev, stat.st_ino) if stat.st_ino else (str(path.resolve()),)


def dangling(path: Path) -> str:
    """Return why a link leads to nothing, and what to do."""
    target = os.readlink(path) if path.is_symlink() else ""
    if ".git/annex" in target.replace("\\", "/"):
        return "its content is not here, only git-annex's link; fetch it with `datalad get` or `git annex get`"
    return f"a link to {target or 'something'} that is not there; restore the file"
