"""Axes of a grid: a parameter's values, named groups of parameters, or every person of a folder."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from companion.parameters import unknown_names
from companion.workbench.runner import Signature

if TYPE_CHECKING:
    from companion.data.intake.records import Found, Item

CHOICES = ("kind", "contrast", "session")  # which of a person's scans


@dataclass(frozen=True)
class Axis:
    """label -> the parameters that it sets; missing: people that cannot be used, and why."""

    name: str
    points: Mapping[str, Mapping[str, Any]]
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters that the axis sets."""
        return list(dict.fromkeys(name for values in self.points.values() for name in values))

    def labels_of(self, said: Any, where: str) -> set[str]:
        """The labels of one value, or of a list of them. Raises ValueError for one that the axis has not."""
        labels = {label(value) for value in (said if isinstance(said, list) else [said])}
        if strange := labels - set(self.points):
            raise ValueError(
                f"{where}: {self.name} has no value {', '.join(sorted(strange))}; it has {', '.join(self.points)}"
            )
        return labels


def read_axis(name: str, said: Any, signature: Signature, root: Path) -> Axis:
    """The axis of a grid file's line; values are coerced and checked as the notebook's form wants.

    Raises ValueError or TypeError with the name at fault.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError("its name may have letters, digits and _ . - only")
    if isinstance(said, Mapping) and "people" in said:
        unknown_names(said, ("people", "table", *CHOICES), "it")
        files, missing = people(said, root)
        if not files and not missing:
            raise ValueError(f"{said['people']} holds no scan; `companion look {said['people']}` says what is there")
        return Axis(name, {who: _checked({name: path}, signature) for who, path in files.items()}, missing)
    if isinstance(said, Mapping):
        if wrong := [k for k, v in said.items() if not isinstance(v, Mapping)]:
            hint = "; for every person of a folder say {people: FOLDER}" if isinstance(said[wrong[0]], str) else ""
            raise ValueError(f"{wrong[0]} must say parameters, as in {wrong[0]}: {{draws: 4}}{hint}")
        given = [(label(key), dict(values)) for key, values in said.items()]
    elif isinstance(said, list):
        given = [(label(value), {name: value}) for value in said]
    else:
        raise ValueError(f"it is {said!r}; give a list of values, or {{name: {{parameter: value}}}}")
    if not given:
        raise ValueError("it has no value; give one, or leave the axis out")
    points: dict[str, Mapping[str, Any]] = {}
    seen = set()
    for key, values in given:
        checked = _checked(values, signature)
        if (same := json.dumps(checked, sort_keys=True)) in seen:
            raise ValueError(f"it has {key} twice; leave one out")
        if key in points:
            raise ValueError(f"two values are {key} as a folder's name; name them: {name}: {{a: {{{name}: ...}}, ...}}")
        points[key] = checked
        seen.add(same)
    return Axis(name, points)


def label(value: Any) -> str:
    """A value as a folder's name can hold it."""
    text = "+".join(map(label, value)) if isinstance(value, (list, tuple)) else str(value)
    return re.sub(r"[^\w.+-]+", "_", "none" if value is None else text) or "_"


def people(said: Mapping[str, Any], root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(person -> path of the scan, what cannot be used -> why) of a folder of people.

    said: `people`, the folder; `table`, who is who, where names do not tell; and which of a person's scans: `kind`
    ("image", "k-space", ...), `contrast`, `session`. Who has no such scan, or several, is missing, as is every file
    that cannot be read: nothing is chosen silently. Raises what `intake.look.look` does, ValueError where nobody can
    tell whose the scans are.
    """
    from companion.data.intake.look import look  # here: all readers, which a grid without people does not need

    folder = root / Path(str(said["people"])).expanduser()
    found = look(folder, root / said["table"] if said.get("table") else None)
    if found.unclear:
        raise ValueError(f"{folder}: {found.unclear}")
    wanted = {key: str(said[key]) for key in CHOICES if said.get(key)}
    scans = defaultdict(list)
    for item in found.items:
        scans[item.person] += [item] if _suits(item, wanted) else []
    points, missing = {}, _unreadable(found.left)
    for person, items in scans.items():
        told = " ".join(wanted.values())
        if len(items) != 1:
            names = ", ".join(item.name for item in items[:3]) + (", ..." if len(items) > 3 else "")
            missing[label(person)] = (
                f"{len(items)} scans ({names}); say which: kind, contrast or session" if items else f"no scan {told}"
            )
            continue
        path = _path(items[0], found)
        if path is None:
            missing[label(person)] = "its files lie among those of others; give each person a folder"
        else:
            points[label(person)] = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
    return points, missing


def _unreadable(left: Mapping[str, str]) -> dict[str, str]:
    """The reasons why files cannot be read; files that differ in their suffix alone are parts of one scan."""
    scans = defaultdict(list)
    for name in left:
        scans[name.removesuffix(Path(name).suffix)].append(name)
    return {label(scan if len(names) > 1 else names[0]): left[names[0]] for scan, names in scans.items()}


def _suits(item: Item, wanted: Mapping[str, str]) -> bool:
    has = {"kind": item.what.kind, "contrast": item.what.contrast, "session": item.session}
    return all(has[key].lower() == value.lower() for key, value in wanted.items())


def _path(item: Item, found: Found) -> Path | None:
    """What a notebook is given to read an item: its file, or the folder that holds its files and no other scan's."""
    own = {path.resolve() for path in item.files}
    if len(own) == 1 or item.what.parts:
        return item.path.resolve()
    folder = item.path.resolve().parent
    others = {path.resolve() for other in found.items if other is not item for path in other.files}
    alone = all(path.parent == folder for path in own) and not any(folder in path.parents for path in others)
    return folder if alone else None


def _checked(values: Mapping[str, Any], signature: Signature) -> dict[str, Any]:
    if "out" in values:
        raise ValueError("it sets out, which the grid does; leave it out")
    checked = signature.check(values)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in checked.items()}
