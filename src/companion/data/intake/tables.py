"""The user's table of files: whose each is, and in which split, where names and contents do not say."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from companion.data.intake.persons import Whose

COLUMNS = {
    "file": ("file", "filename", "path", "name", "image", "scan"),
    "subject": ("subject", "person", "participant", "participant_id", "patient", "patient_id", "subject_id", "sub"),
    "session": ("session", "session_id", "ses", "visit", "timepoint"),
    "split": ("split", "set", "partition", "fold"),
}
SPLIT_WORDS = {
    "train": "train",
    "tr": "train",
    "ts": "test",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Table:
    """`files`: name or folder below the root -> whose it is, empty if the table lists people only; `split`: person ->
    "train", "validation" or "test", for those of whom it says so."""

    path: Path
    files: Mapping[str, Whose] = field(default_factory=dict)
    split: Mapping[str, str] = field(default_factory=dict)

    def of(self, name: str) -> Whose | None:
        """Whose a file is: by its own line, or that of the nearest folder above it; None if there is none."""
        while name:
            if name in self.files:
                return self.files[name]
            name = name.rpartition("/")[0]
        return None

    def unmet(self, names: Iterable[str]) -> list[str]:
        """The lines whose file or folder is not among these names."""
        there = set(names)
        there |= {name[:i] for name in there for i, c in enumerate(name) if c == "/"}
        return [line for line in self.files if line not in there]


def read_table(path: str | os.PathLike) -> Table:
    """Return a CSV or TSV with a header: columns subject and file, or subject and split, and session where wanted.

    Other usual names of these columns do too (participant_id, path, ...). Raises FileNotFoundError, or ValueError for a
    table without these columns, with an empty subject, an unknown split, or a person in two splits.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a CSV or TSV file with the columns file and subject")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error}); save the table as CSV") from error
    separator = (
        "\t"
        if path.suffix.lower() == ".tsv" or "\t" in (lines or [""])[0]
        else ";"
        if ";" in (lines or [""])[0]
        else ","
    )
    rows = list(csv.DictReader(lines, delimiter=separator))
    names = {(n or "").strip().lower(): n for n in (rows[0] if rows else ())}
    column = {what: next((names[n] for n in usual if n in names), None) for what, usual in COLUMNS.items()}
    if not column["subject"] or not (column["file"] or column["split"]):
        raise ValueError(
            f"{path}: columns {', '.join(names) or 'none'}; expected subject with file (and session, split), or "
            "subject with split"
        )
    files, split = {}, {}
    for number, row in enumerate(rows, start=2):
        cell = {what: (row[name] or "").strip() if name else "" for what, name in column.items()}
        if not cell["subject"]:
            raise ValueError(f"{path}, line {number}: no subject; name the person of every file")
        if cell["file"]:
            files[cell["file"].removeprefix("./").strip("/")] = Whose(cell["subject"], cell["session"], "table")
        if cell["split"] and cell["split"].lower() not in ("n/a", "none"):
            part = SPLIT_WORDS.get(cell["split"].lower())
            if part is None:
                raise ValueError(f"{path}, line {number}: split {cell['split']!r}; use train, validation or test")
            if split.setdefault(cell["subject"], part) != part:
                raise ValueError(
                    f"{path}, line {number}: {cell['subject']} is in {split[cell['subject']]} and in {part}; a person "
                    "belongs to one split"
                )
    return Table(path, files, split)


def own_table(root: Path) -> Table | None:
    """The table participants.tsv or participants.csv of a folder itself, if it says whose files are or a split."""
    for name in ("participants.tsv", "participants.csv"):
        path = root / name
        if path.is_file():
            try:
                return read_table(path)
            except ValueError:  # BIDS's own participants.tsv: ages and the like
                continue
    return None
