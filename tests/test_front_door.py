"""`import companion as c`: nothing is loaded before it is asked for, and the README's example runs as it stands."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import companion

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_loads_no_torch_and_little_else():
    before = "import sys; before = set(sys.modules); import companion; new = set(sys.modules) - before; "
    loaded = set(python(before + "print(*new)").split())
    assert not loaded & {"torch", "numpy", "scipy", "matplotlib", "typer"} and len(loaded) < 40


@pytest.mark.parametrize("given, expected", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_without_spinning_unless_told_otherwise(monkeypatch, given, expected):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert python("import companion, os; print(os.environ['OMP_WAIT_POLICY'])").strip() == expected


def test_every_name_is_there_and_is_the_thing_itself():
    for name in companion.__all__:
        assert name in dir(companion) and getattr(companion, name) is not None
    assert companion.metrics.__name__ == "companion.evaluation.metrics"
    assert companion.sense.__module__ == "companion.operators.mri"
    with pytest.raises(AttributeError, match="no attribute 'sence'; it has .*sense"):
        companion.sence  # noqa: B018


def test_the_type_checker_is_told_the_same_names():
    tree = ast.parse(Path(companion.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.asname: f"{line.module}.{alias.name}".removeprefix("companion.")
        for line in block.body
        for alias in line.names
    }
    real = {n: home if home.endswith(f".{n}") else f"{home}.{n}" for n, home in companion._HOME.items()}
    assert told == real


def test_the_example_of_the_readme_is_short():
    """tests/test_install.py runs it, from the wheel."""
    (example,) = re.findall(r"```python\n(import companion as c\n.*?)```", README, re.DOTALL)
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) < 10 and example.count("import") == 1
