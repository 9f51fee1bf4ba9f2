"""What the intake sees, as text: kinds, shapes, people, sessions, a proposed split, and what is wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from companion.data.intake import kinds
from companion.data.intake.records import Found, Item, Unreadable, Volume
from companion.data.intake.splits import split_people, split_table

ROWS, LEFT = 60, 40  # of a folder, at most so many are printed


def report(found: Found, shares: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0) -> str:
    """Return what a file or folder holds: a line for each scan, people and their proposed split, what is left out.

    Headers only, but for a single file, whose values are read too. shares, seed: of the split, as `split_people`.
    """
    items, people = found.items, {p: i for p, i in found.people.items() if p}
    parts = [_counted(len(items), "scan") + (f" of {_counted(len(people), 'person', 'people')}" if people else "")]
    if found.left:
        parts.append(f"{_counted(len(found.left), 'file')} left out")
    if found.notes:
        parts.append(f"{_counted(len(found.notes), 'note')} (README, JSON, tables)")
    lines = [f"{found.root}: {', '.join(parts)}", ""]
    lines += _table([_row(item) for item in items[:ROWS]])
    if len(items) > ROWS:
        lines.append(f"and {len(items) - ROWS} more: {_kinds(items[ROWS:])}")
    if len(items) == 1:
        lines += ["", values(items[0])]
    if found.unclear:
        lines += ["", f"who is who: {found.unclear}"]
    elif len(people) > 1:
        lines += ["", f"split proposed, seed {seed}:", _split(found, shares, seed)]
    if found.left:
        lines += ["", "left out:"]
        lines += [f"  {name}: {why}" for name, why in list(found.left.items())[:LEFT]]
        lines += [f"  and {len(found.left) - LEFT} more"] if len(found.left) > LEFT else []
    return "\n".join(lines)


def values(item: Item) -> str:
    """Return what the values of a scan say, read from the file; of k-space, what its reader found."""
    try:
        frame = 0 if item.what.axes[:1] == ("t",) else None
        read = item.read() if item.what.kind in ("k-space", "picture") else item.read(frame=frame)
        if not isinstance(read, Volume):
            return f"values: {read.min()} to {read.max()}" if isinstance(read, np.ndarray) else str(read)
        text = _numbers(read.array)
        if item.what.kind == "image":
            kinds.refuse_labels(read.array, item.path)
    except Unreadable as error:
        return f"wrong: {error.reason}"
    return f"values{' of frame 0' if frame == 0 else ''}: {text}; affine {np.round(read.affine, 3).tolist()}"


def _numbers(array: np.ndarray) -> str:
    size = np.abs(array) if np.iscomplexobj(array) else array
    what = "magnitudes" if np.iscomplexobj(array) else "numbers"
    percent = 100 * float((array == 0).mean())
    return f"{what} from {size.min():.5g} to {size.max():.5g}, median {np.median(size):.5g}, {percent:.0f} % are 0"


def _row(item: Item) -> dict[str, str]:
    what = item.what
    voxel = " x ".join(f"{v:.4g}" for v in what.voxel_mm) if what.voxel_mm else ""
    about = ", ".join(f"{name} {_plain(value)}" for name, value in what.about.items() if value not in ({}, "", None))
    return {
        "person": item.person,
        "session": item.session,
        "kind": " ".join(filter(None, (what.contrast, what.kind))),
        "format": what.format,
        "shape": f"{' x '.join(map(str, what.shape))} ({', '.join(what.axes)})",
        "mm (z y x)": voxel,
        "type": " ".join(filter(None, (what.dtype, what.units))),
        "told by": item.told,
        "file": item.name + (f" and {len(item.files) - 1} more" if len(item.files) > 1 else ""),
        "about": about,
    }


def _plain(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[dict[str, str]]) -> list[str]:
    """Columns of equal width, empty ones left out."""
    names = [name for name in (rows[0] if rows else ()) if any(row[name] for row in rows)]
    width = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = [{name: name for name in names}, *rows]
    return ["  ".join(line[name].ljust(width[name]) for name in names).rstrip() for line in lines]


def _split(found: Found, shares: tuple[float, float, float], seed: int) -> str:
    files = {person: [item.name for item in items] for person, items in found.people.items()}
    try:
        return split_table(split_people(files, shares, seed, found.split), files)
    except ValueError as error:
        return str(error)


def _kinds(items: Sequence[Item]) -> str:
    counts = Counter(" ".join(filter(None, (i.what.contrast, i.what.kind))) for i in items)
    return ", ".join(f"{n} {kind}" for kind, n in counts.most_common())


def _counted(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"
