"""Fixtures for every test: no window, no network, seeded draws, and a tiny notebook to run."""

import os
import random
import sys

import numpy as np
import pytest

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# begun first, so that no worker waits at the end
LONGEST = ("test_notebooks.py", "test_workflow.py", "test_browser.py", "test_types.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


PARAMETERS = """\
seed = 0
device = "cpu"
out = "runs/tiny"
scale = 1.0
mode = "ok"
"""

BODY = """\
import os, time
from dataclasses import dataclass
from pathlib import Path
from companion.parameters import Parameters, param, resolve
from companion.workbench.run import Run

@dataclass(frozen=True)
class Tiny(Parameters):
    scale: float = param(1.0, "a factor", minimum=0)
    mode: str = param("ok", "how it ends", choices=("ok", "raise", "die", "forget", "lie", "wait"))

p = resolve(Tiny, globals())
run = Run.start(p, paper="none", stage="tiny")
run.metrics({"double": 2 * p.scale})
if p.mode == "raise":
    raise ValueError("mask has 320 columns but the maps have 384")
if p.mode == "die":
    os.kill(os.getpid(), 9)
if p.mode == "wait":
    Path("started").touch()
    while not Path("go").exists():
        time.sleep(0.05)
if p.mode != "forget":
    run.finish()
if p.mode == "lie":
    (run.folder / "metrics.json").write_text("{}")
"""


def seed() -> None:
    """Seed every global generator; torch's where a test has loaded it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def seeded_module():
    """What fixtures of a module draw is the same alone and after any other module."""
    seed()


@pytest.fixture(autouse=True)
def seeded_test():
    """What a test draws is the same alone and after any other test."""
    seed()


@pytest.fixture
def tiny_notebook(tmp_path, monkeypatch):
    """The path of a notebook that ends as its parameter `mode` says; data and runs go beside it."""
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    import nbformat
    import nbformat.v4 as nb

    cells = [nb.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), nb.new_code_cell(BODY)]
    path = tmp_path / "tiny.ipynb"
    nbformat.write(nb.new_notebook(cells=cells), path)
    return path


@pytest.fixture(scope="module")
def head():
    """A ball of 60 mm radius with shells, on voxels of 4 x 4 x 5 mm."""
    from companion.data.heads import prepare_head

    axes = [(np.arange(n) - (n - 1) / 2) * v for n, v in zip((40, 44, 36), (4, 4, 5), strict=True)]
    radius = np.sqrt(sum(a**2 for a in np.meshgrid(*axes, indexing="ij")))
    return prepare_head("ball", np.where(radius < 60, 0.6 + 0.4 * np.cos(radius / 8), 0), (4, 4, 5))
