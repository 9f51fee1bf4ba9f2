"""The house: imports point one way, no room is a circle's, files can be read in a sitting."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "companion"
# From the ground up: a room imports from rooms of lower floors only. Rooms of one floor do not know each other.
FLOORS = [
    {"files", "extras", "randomness", "parameters"},
    {"operators", "networks", "information"},
    {"data"},
    {"diffusion"},
    {"models"},
    {"training"},
    {"evaluation"},
    {"acquisition"},
    {"reconstruction"},
    {"workbench"},
    {"show"},
    {"papers"},
    {"cli"},
]
LONG = {"operators/pet.py", "training/loop.py"}  # one geometry; one loop, to be read top to bottom


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def arrows() -> dict[tuple[str, str], list[str]]:
    """(room, room that it imports) -> the places that do."""
    found = defaultdict(list)
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno} has a relative import"
                package, _, rest = (node.module or "").partition(".")
                if package == "companion":
                    modules = [rest.split(".")[0]] if rest else [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                modules = [a.name.split(".")[1] for a in node.names if a.name.startswith("companion.")]
            for module in modules:
                if module != room(path) and room(path) != "__init__":
                    found[room(path), module].append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    return found


def test_every_import_points_down():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    upward = {
        f"{above} -> {below}": places for (above, below), places in arrows().items() if floor[below] >= floor[above]
    }
    assert len(arrows()) > 30 and not upward


def test_there_are_few_rooms():
    rooms = {room(path) for path in SOURCE.rglob("*.py")} - {"__init__"}
    assert rooms == set().union(*FLOORS) and len(rooms) <= 18


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_file_can_be_read_in_a_sitting(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 450 or path.relative_to(SOURCE).as_posix() in LONG
