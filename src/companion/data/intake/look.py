"""The intake itself: what a file or folder holds, whose each scan is, and what became of every file."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from companion.data.dicom.series import series_of
from companion.data.intake import kinds
from companion.data.intake.persons import Unclear, Whose, whose
from companion.data.intake.readers import sniff
from companion.data.intake.records import Description, Found, Item, Reader, Unreadable
from companion.data.intake.tables import SPLIT_WORDS, Table, own_table, read_table
from companion.data.intake.walk import natural, walk

STRANGE = "nobody can tell whose it is; name it as the others are, or give a table of files and subjects"
CODE = re.compile(r"p[0-9a-f]{16}")  # of `records.pseudonym`
SPLIT_FOLDER = re.compile(
    r"(?:[a-z0-9]+_)?(train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?)(?:_[a-z0-9]+)?|(?:images|labels)(tr|ts)"
)
HEADERS = (".hdr", ".hdr.gz", ".mhd", ".nhdr")  # read before the files that they describe


def look(path: str | os.PathLike, table: str | os.PathLike | None = None) -> Found:
    """Return what a file or folder holds, from the headers alone: no values are read.

    One file of a DICOM series stands for those of its series that lie beside it.

    table: a CSV or TSV that says whose the files are, see `tables.read_table`; by default the folder's own
    participants.tsv, if it does. Where nobody can tell whose the files are, `Found.unclear` says so and what to do.
    Raises FileNotFoundError, or ValueError for a table that is wrong.
    """
    walked = walk(path)
    items, left = _sniffed(walked.files, walked.left)
    if walked.root.is_file() and items and items[0].what.series:  # one file of a series stands for all of it
        items, left = _sniffed({p.name: p for p in series_of(walked.root)}, walked.left)
    rows = read_table(table) if table else own_table(walked.root) if walked.root.is_dir() else None
    unclear, split = "", {}
    try:
        items, strangers, split = _assigned(items, rows, _folder_name(walked.root))
        left |= strangers
    except Unclear as error:
        unclear = str(error)
    order = sorted(items, key=lambda item: natural(item.name))
    left = dict(sorted(left.items(), key=lambda e: natural(e[0])))
    return _without_secrets(Found(walked.root, tuple(order), left, walked.notes, unclear, split))


def find(path: str | os.PathLike, table: str | os.PathLike | None = None, kinds: Sequence[str] = ("image",)) -> Found:
    """Return `look`, with the items of these kinds only and the others among `left`, for a preparation to use.

    Raises Unclear where it cannot be told whose the files are, Unreadable where nothing of these kinds is there, or as
    `look`.
    """
    found = look(path, table)
    if found.unclear:
        raise Unclear(f"{found.root}: {found.unclear}")
    items = tuple(item for item in found.items if item.what.kind in kinds)
    other = {item.name: f"{item.what.kind}, not {' or '.join(kinds)}" for item in found.items if item not in items}
    found = replace(found, items=items, left=dict(found.left) | other)
    if not items:
        raise Unreadable(found.root, f"nothing to use there ({' or '.join(kinds)}){_reasons(found.left)}")
    return found


def _without_secrets(found: Found) -> Found:
    """Return what was found without the patients' names and numbers, of which DICOM exports make folders and files.

    They are replaced by the person's label; names that become equal are numbered.
    """
    labels = {word.lower(): item.person or "person" for item in reversed(found.items) for word in item.what.secrets}
    if not labels:
        return found
    words = "(" + "|".join(map(re.escape, sorted(labels, key=len, reverse=True))) + ")"
    form, taken = re.compile(rf"(?<![^\W_]){words}(?:[\W_]{words})*(?![^\W_])", re.IGNORECASE), set()

    def clean(text: str) -> str:
        return form.sub(lambda match: labels[match[1].lower()], text)

    def unique(name: str) -> str:
        name = clean(name)
        new = next(n for n in itertools.chain((name,), (f"{name} ({i})" for i in itertools.count(2))) if n not in taken)
        taken.add(new)
        return new

    items = tuple(replace(item, name=unique(item.name)) for item in found.items)
    left = {unique(name): clean(why) for name, why in found.left.items()}
    return replace(found, items=items, left=left, notes=tuple(map(clean, found.notes)), unclear=clean(found.unclear))


def _reasons(left: Mapping[str, str], most: int = 20) -> str:
    lines = [f"\n  {name}: {why}" for name, why in list(left.items())[:most]]
    return ":" + "".join(lines) + (f"\n  and {len(left) - most} more" if len(left) > most else "") if lines else ""


def _folder_name(root: Path) -> str:
    return root.resolve().name if root.is_dir() else ""


def _sniffed(files: Mapping[str, Path], left: Mapping[str, str]) -> tuple[list[Item], dict[str, str]]:
    items, left, taken = [], dict(left), set()
    series: dict[tuple, list[tuple[str, Path, Description, Reader]]] = {}
    for name in sorted(files, key=lambda n: not n.lower().endswith(HEADERS)):
        path = files[name]
        if path in taken:
            continue
        try:
            what, reader = sniff(path)
        except (Unreadable, OSError) as error:
            left[name] = error.reason if isinstance(error, Unreadable) else str(error).removeprefix(f"{path}: ")
            continue
        taken.update(what.parts)
        if what.kind == "image" and (kind := kinds.kind_of(name)):
            what = replace(what, kind=kind)
        if not what.contrast:
            what = replace(what, contrast=kinds.contrast_of(name))
        if what.series:
            series.setdefault((reader.name, what.series), []).append((name, path, what, reader))
        else:
            items.append(Item(name, (path, *what.parts), what, reader))
    joined, broken = _series(series)
    left |= broken
    return items + joined, {name: why for name, why in left.items() if files.get(name) not in taken}


def _series(series: Mapping[tuple, list]) -> tuple[list[Item], dict[str, str]]:
    """One item for each DICOM series, called by its first file, and why others make none."""
    items, left = [], {}
    for members in series.values():
        members = sorted(members, key=lambda m: natural(m[0]))
        name, _, what, reader = members[0]
        files = tuple(path for _, path, _, _ in members)
        try:
            what = replace(reader.join(files), kind=what.kind, contrast=what.contrast) if reader.join else what
        except Unreadable as error:
            left |= {other: f"{error.reason} (a series of {len(files)} files)" for other, *_ in members}
            continue
        items.append(Item(name, files, what, reader))
    return items, left


def _assigned(items: list[Item], table: Table | None, folder: str) -> tuple[list[Item], dict[str, str], dict[str, str]]:
    """The items with their people, why others have none in the table, and the split that the table gives."""
    split, strangers = dict(table.split) if table else {}, {}
    if table and table.files:
        if unmet := table.unmet([n for item in items for n in (item.name,)]):
            raise ValueError(f"{table.path} names {', '.join(unmet[:4])}, which is not below the folder or no data; "
                             "give paths below the folder")  # fmt: skip
        told = {item.name: table.of(item.name) for item in items}
        strangers = {name: f"not in {table.path.name}" for name, who in told.items() if who is None}
    else:
        told = _told(items, folder)
        strangers = {n: STRANGE for n, who in told.items() if not who.person}
        told = {n: who for n, who in told.items() if who.person}
    named = [replace(i, person=w.person, session=w.session, told=w.told) for i in items if (w := told.get(i.name))]
    split = split or _by_folders(named)
    if (
        table is not None
        and split
        and (unknown := {i.person for i in named} - set(split))
        and set(split).isdisjoint({i.person for i in named})
    ):
        raise ValueError(f"{table.path} has the split of {', '.join(list(split)[:3])}, but the people here are "
                         f"{', '.join(sorted(unknown, key=natural)[:3])}; use the same names")  # fmt: skip
    return named, strangers, split


def _by_folders(items: Iterable[Item]) -> dict[str, str]:
    """Who is for validation and tests by the folders train, val and test, where people lie in one of these each.

    Those of train are not said, so that somebody can be drawn to validate on.
    """
    parts: dict[str, set[str]] = {}
    for item in items:
        found = [m for folder in item.name.split("/")[:-1] if (m := SPLIT_FOLDER.fullmatch(folder.lower()))]
        parts.setdefault(item.person, set()).add(SPLIT_WORDS[found[-1][1] or found[-1][2]] if found else "")
    there = set().union(*parts.values()) if parts else set()
    if "train" not in there or "" in there or any(len(own) > 1 for own in parts.values()):
        return {}
    return {person: part for person, (part,) in parts.items() if part != "train"}


def _told(items: Iterable[Item], folder: str) -> dict[str, Whose]:
    said = _said(items)
    try:
        return whose(list(said), said, folder)
    except Unclear:
        scans = [i.name for i in items if i.what.kind not in ("labels", "probability")]
        if len(scans) == len(said):
            raise
        return whose(scans, said, folder) | {n: Whose("", "", "") for n in said if n not in scans}


def _said(items: Iterable[Item]) -> dict[str, tuple[str, str]]:
    """Person and session of every item as its content says, the codes of a process numbered in the order of names."""
    numbers: dict[str, dict[str, int]] = {"person": {}, "visit": {}}

    def numbered(kind: str, code: str) -> str:
        known = numbers[kind]
        return f"{kind}#{known.setdefault(code, len(known) + 1)}" if CODE.fullmatch(code) else code

    ordered = sorted(items, key=lambda item: natural(item.name))
    return {i.name: (numbered("person", i.what.person), numbered("visit", i.what.session)) for i in ordered}
