"""The sdist makes a wheel; the wheel, alone in an empty environment and folder, does what the README says."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytest.importorskip("build", reason="the package `build` is not installed: pip install companion[test]")

ROOT = Path(__file__).parents[1]
(EXAMPLE,) = re.findall(r"```python\n(import companion as c\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
CHECKED = f"""
import sys, companion
assert "torch" not in sys.modules
{EXAMPLE}
import torch
gain = c.metrics.psnr(draws.x.mean(0, keepdim=True), x[:1])
assert gain > c.metrics.psnr(A.H(y), x[:1]) + 8 and draws.x.dtype == torch.complex64
from companion.models import checkpoint
names = checkpoint.embedded()
assert len(names) >= 10 and all(checkpoint.load(name) is not None for name in names)
print(companion.__file__)
"""


def call(*command, cwd) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "COMPANION_HOME")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The Python of an environment that holds the wheel made of the sdist; dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT, cwd=folder)
    (wheel,), (sdist,) = (list((folder / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    most = 100 * 2**20  # what PyPI takes without asking
    assert sdist.stat().st_size < most and wheel.stat().st_size < most, "what a package index takes"
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    if importlib.util.find_spec("pip"):
        install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-compile"]
    else:
        install = [shutil.which("uv") or pytest.skip("neither pip nor uv"), "pip", "install", "--python", python]
    call(*install, "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # a plain path: the editable install of this environment, which hooks imports, does not come along
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


@pytest.mark.slow
def test_the_wheel_alone_does_what_the_readme_says(installed, tmp_path):
    empty, project = tmp_path / "empty", tmp_path / "project"
    empty.mkdir()
    package = installed.parents[1] / "lib"
    files = sorted(p for p in package.rglob("companion/**/*") if p.suffix != ".pyc" and p.is_file())
    assert str(package) in call(installed, "-c", CHECKED, cwd=empty).splitlines()[-1]
    command = installed.with_name("companion")
    call(command, "init", project, cwd=empty)
    planned = call(command, "batch", "--config", "workflow/smoke.yaml", "--dry-run", cwd=project)
    assert "start_here" in planned and (project / "notebooks" / "start_here.ipynb").exists()
    assert not list(empty.iterdir()), "nothing is written where one happens to stand"
    assert files == sorted(p for p in package.rglob("companion/**/*") if p.suffix != ".pyc" and p.is_file())
