"""A project of one's own: the folder with notebooks, parameters and workflow, to be read, changed and run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from companion.files import atomic_write, shipped

PARTS = ("notebooks", "workflow")


def lay_down(folder: str | os.PathLike) -> list[Path]:
    """The files of a new project in `folder`: notebooks, their parameters and the workflow of this version.

    Files that are there already, unchanged, are left alone. Raises ValueError, before anything is written, when
    `folder` holds other versions of them, or is a file.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the project")
    new, other = {}, []
    for part in PARTS:
        for source in sorted(path for path in shipped(part).rglob("*") if path.is_file()):
            within = Path(part) / source.relative_to(shipped(part))
            if any(name.startswith(".") for name in within.parts):
                continue
            target = folder / within
            if not target.exists():
                new[target] = source
            elif target.read_bytes() != source.read_bytes():
                other.append(within)
    if other:
        shown = ", ".join(map(str, other[:3])) + (", ..." if len(other) > 3 else "")
        raise ValueError(
            f"{folder} holds other versions of {len(other)} files ({shown}); move them away or name another folder"
        )
    for target, source in new.items():
        with atomic_write(target) as aside:
            shutil.copyfile(source, aside)
    return list(new)
