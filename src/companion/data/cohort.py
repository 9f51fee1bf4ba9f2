"""Who has which contrasts: folders of image volumes by the layouts of well-known collections, or by any names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from companion.data.intake.kinds import contrast_of, one_each
from companion.data.intake.look import find
from companion.data.intake.persons import certain
from companion.data.intake.records import Item
from companion.data.intake.walk import natural, walk
from companion.data.nifti import Volume, load_nifti

# Ends of paths without .nii or .nii.gz: "{subject}" and "*" stand for part of a name. IXI and RESECT (CuRIOUS) as they
# are distributed; Gold Atlas comes as DICOM, so these are the names to convert it to.
LAYOUTS = {
    "IXI": {"T1": "{subject}-T1", "T2": "{subject}-T2", "PD": "{subject}-PD"},
    "CuRIOUS": {"T1": "{subject}-T1", "FLAIR": "{subject}-FLAIR"},
    "GoldAtlas": {"CT": "{subject}/CT", "MR": "{subject}/MR"},
}
ANY = "any"  # no layout: people and contrasts by the names, see `find_contrasts`


def standard(contrast: str) -> str:
    """The contrast as BIDS and the embedded weights call it: T1w for T1, t1w or MPRAGE; T2w, PDw, FLAIR.

    Names that say nothing known ("stain") stay as they are.
    """
    return contrast_of(contrast) or contrast


def standards(contrasts: Iterable[str]) -> tuple[str, ...]:
    """The standard names of several contrasts; ValueError for two that are one."""
    asked = tuple(contrasts)
    found = tuple(map(standard, asked))
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise ValueError(f"{', '.join(asked)}: more than one of them is {', '.join(twice)}; name each contrast once")
    return found


def called(names: Iterable[str], contrast: str) -> str | None:
    """Which of `names` is this contrast, whatever either is called: itself first, else one of its standard name."""
    names = list(names)
    if contrast in names:
        return contrast
    return next((name for name in names if standard(name) == standard(contrast)), None)


@dataclass(frozen=True)
class Cohort:
    """`files`: subject -> contrast -> path. `left_out`: subject or file -> why it is not used. `people`: subject ->
    person, where one person has several, such as two sessions; `split`: person -> part, where a table says it; `items`:
    path -> item, of images that are more than one file, such as a DICOM series."""

    files: Mapping[str, Mapping[str, Path]]
    left_out: Mapping[str, str] = field(default_factory=dict)
    people: Mapping[str, str] = field(default_factory=dict)
    split: Mapping[str, str] = field(default_factory=dict)
    items: Mapping[Path, Item] = field(default_factory=dict, repr=False)

    def read(self, path: Path) -> Volume:
        """The volume of one of the files, with those that belong to it. Raises as `load_nifti`."""
        return self.items[path].read() if path in self.items else load_nifti(path)

    def person(self, subject: str) -> str:
        """Whose a subject's images are."""
        return self.people.get(subject, subject)

    def without(self, reasons: Mapping[str, str]) -> Cohort:
        """The cohort without these subjects; reasons: subject -> why."""
        if unknown := sorted(set(reasons) - set(self.files)):
            raise ValueError(f"no subject {some(unknown)} in this cohort")
        files = {s: f for s, f in self.files.items() if s not in reasons}
        return Cohort(files, {**self.left_out, **reasons}, self.people, self.split, self.items)


def find_subjects(folder: str | os.PathLike, patterns: Mapping[str, str], *, complete_only: bool = False) -> Cohort:
    """The subjects of a folder, in natural order, with the NIfTI file of each contrast.

    patterns: contrast -> end of the path below `folder`, without .nii or .nii.gz, as in `LAYOUTS`. complete_only:
    leave subjects out that miss a contrast (IXI has some) rather than stop. Raises FileNotFoundError for a missing
    folder, ValueError for contrasts without files, subjects that miss one (named), or two files for the same.
    """
    folder = existing_folder(folder)
    walked = walk(folder)
    paths = {name: path for name, path in walked.files.items() if name.lower().endswith((".nii", ".nii.gz"))}
    files: dict[str, dict[str, Path]] = {}
    for contrast, pattern in patterns.items():
        form, count = _pattern(pattern), 0
        for name, path in paths.items():
            if not (match := form.fullmatch(name)):
                continue
            count += 1
            mine = files.setdefault(match["subject"], {})
            if contrast in mine:
                raise ValueError(f"two files of {match['subject']}, {contrast}: {mine[contrast]} and {path}; keep one")
            mine[contrast] = path
        if not count:
            found = some(paths) if paths else "no NIfTI files at all"
            raise ValueError(f"{folder}: no {contrast}, expected files like {pattern}.nii.gz; there is {found}")
    missing = {s: ", ".join(c for c in patterns if c not in mine) for s, mine in files.items()}
    missing = {s: f"no {missing[s]}" for s in sorted(missing, key=natural) if missing[s]}
    if missing and not complete_only:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(files)} subjects lack a contrast: "
            f"{some([f'{s} ({why})' for s, why in missing.items()])}; add the files or leave these "
            f"subjects out with complete_only=True"
        )
    complete = {s: files[s] for s in sorted(files, key=natural) if s not in missing}
    if not complete:
        raise ValueError(f"{folder}: none of {len(files)} subjects has all of {', '.join(patterns)}")
    people = {subject: certain(subject) or subject for subject in complete}
    left = {name: why for name, why in walked.left.items() if name.lower().endswith((".nii", ".nii.gz"))}
    return Cohort(complete, missing | left, people)


def find_contrasts(
    folder: str | os.PathLike, contrasts: Sequence[str], table: str | os.PathLike | None = None
) -> Cohort:
    """The subjects of a folder of any names, by `data.intake`, with the image file of each contrast.

    A subject is one session of one person. contrasts: as in "T1", "T1w" or "MPRAGE"; where a session has several images
    of one, the first is taken. Those who miss a contrast are left out. table: whose the files are, see `intake.tables`.
    Raises FileNotFoundError, `intake.persons.Unclear`, or ValueError where nobody has all contrasts.
    """
    found = find(existing_folder(folder), table)
    images, left = one_each(found.items)
    files: dict[str, dict[str, Path]] = {}
    people, left = {}, dict(found.left) | left
    for item in images:
        subject = f"{item.person} {item.session}".strip()
        contrast = called(contrasts, item.what.contrast) if item.what.contrast else None
        mine = files.setdefault(subject, {})
        people[subject] = item.person
        if contrast is None:
            left[item.name] = f"{item.what.contrast or 'of unknown contrast'}, not {', '.join(contrasts)}"
        elif contrast in mine:
            left[item.name] = f"another {contrast} of {subject}, {mine[contrast].name} is used"
        else:
            mine[contrast] = item.path
    missing = {
        s: f"no {', '.join(c for c in contrasts if c not in mine)}"
        for s, mine in files.items()
        if len(mine) < len(contrasts)
    }
    complete = {s: files[s] for s in sorted(files, key=natural) if s not in missing}
    if not complete:
        told = "".join(f"\n  {name}: {why}" for name, why in list((missing | left).items())[:20])
        raise ValueError(f"{folder}: nobody has all of {', '.join(contrasts)}:{told}")
    several = {item.path: item for item in images if len(item.files) > 1}
    return Cohort(complete, left | missing, people, dict(found.split), several)


def _pattern(pattern: str) -> re.Pattern:
    if "{subject}" not in pattern:
        raise ValueError(f"pattern {pattern!r} must say where the subject stands, as in '{{subject}}-T1'")
    first = iter(("(?P<subject>[^/]+)",))
    parts = {"{subject}": lambda: next(first, "(?P=subject)"), "*": lambda: "[^/]*"}
    body = "".join(parts.get(p, lambda p=p: re.escape(p))() for p in re.split(r"(\{subject\}|\*)", pattern))
    return re.compile(rf"(?:.*/)?{body}\.nii(?:\.gz)?")


def existing_folder(folder: str | os.PathLike) -> Path:
    """The folder; FileNotFoundError for another path."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; check the path")
    return folder


def some(names: Iterable[str], most: int = 8) -> str:
    """The first names and how many more there are, as text."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
