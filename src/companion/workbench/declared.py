"""What a grid file says, key by key, before anybody asks what it means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from companion.parameters import coerce, read_yaml, unknown_names

KINDS: dict[str, tuple[type, ...]] = {
    "name": (str, int), "notebook": (str,), "params": (str,), "out": (str,), "fixed": (dict,), "axes": (dict,),
    "seeds": (int, list), "exclude": (list,), "resources": (dict,), "inputs": (list,), "gather": (dict,),
    "quantities": (list, dict), "figure": (dict,),
}  # fmt: skip
WORDS = {str: "text", int: "a whole number", list: "a list, as in [a, b]", dict: "names and values, as in {a: 1}"}
NEEDED = ("notebook", "axes", "out")
RESOURCES = {"threads": 1, "mem_mb": 4000, "minutes": 60, "gpu": 0}
ROLES = ("quantity", "x", "lines", "panels")


def read_declaration(file: Path) -> dict[str, Any]:
    """The keys of a grid file that are set, each of its kind; `resources` are whole, seeds a list.

    Raises FileNotFoundError, ValueError or TypeError that name file and key.
    """
    given = {key: value for key, value in read_yaml(file).items() if value is not None}
    unknown_names(given, KINDS, file.name)
    _check_kinds(given, KINDS, file.name)
    if lacks := [key for key in NEEDED if not given.get(key)]:
        raise ValueError(f"{file} does not say {', '.join(lacks)}; a grid needs {', '.join(NEEDED)}")
    if wrong := [rule for rule in given.get("exclude", []) if not isinstance(rule, dict)]:
        raise ValueError(f"{file.name}, exclude: {wrong[0]!r} must say axes and values, as in {{mask: random, acs: 0}}")
    if (seeds := given.get("seeds")) is not None:
        if not seeds or isinstance(seeds, int) and seeds < 0:
            raise ValueError(f"{file.name}: seeds is {seeds}; say how many, or which in a list")
        given["seeds"] = list(range(seeds)) if isinstance(seeds, int) else seeds
    given["resources"] = _resources(given.get("resources", {}), file.name)
    if "gather" in given:
        _check_kinds(
            given["gather"], {k: KINDS[k] for k in ("notebook", "params", "fixed", "out")}, f"{file.name}, gather"
        )
        if lacks := [key for key in ("notebook", "out") if not given["gather"].get(key)]:
            raise ValueError(f"{file.name}, gather does not say {', '.join(lacks)}")
    return given


def check_figure(figure: Mapping[str, Any], axes: Iterable[str], where: str) -> None:
    """Refuse a figure of axes that the grid has not: better now than after a night."""
    unknown_names(figure, ROLES, f"{where}, figure")
    for role in ROLES[1:]:
        if role in figure and figure[role] not in (known := ("quantity", *axes)):
            raise ValueError(f"{where}, figure: {role} is {figure[role]!r}; choose one of {', '.join(known)}")


def like(name: str, folders: Iterable[Path]) -> str:
    """A file's name much like `name`, in its place below one of the folders, as a question; "" where there is none."""
    for folder in folders:
        near = sorted(path.name for path in (folder / name).parent.glob(f"*{Path(name).suffix}"))
        if found := difflib.get_close_matches(Path(name).name, near, n=1):
            return f"; did you mean {Path(name).with_name(found[0])}?"
    return ""


def _check_kinds(given: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], where: str) -> None:
    unknown_names(given, kinds, where)
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, kinds[key]):
            wanted = " or ".join(WORDS[kind] for kind in kinds[key])
            raise TypeError(f"{where}: {key} must be {wanted}, got {value!r}")


def _resources(said: Mapping[str, Any], where: str) -> dict[str, Any]:
    unknown_names(said, (*RESOURCES, "gres"), f"{where}, resources")
    resources: dict[str, Any] = RESOURCES | dict(said)
    for name, least in (("threads", 1), ("mem_mb", 1), ("minutes", 1), ("gpu", 0)):
        resources[name] = coerce(f"{name} of {where}, resources,", resources[name], int)
        if resources[name] < least:
            raise ValueError(f"{where}, resources: {name} is {resources[name]}; it must be at least {least}")
    return resources
