"""pyproject.toml, constraints.txt, environment.yml and the installer tell one story."""

import importlib.util
import os
import re
import runpy
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import companion

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in "#"]
DECLARED = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
]


def locked(name: str, python: str = "3.11") -> list[Version]:
    """The versions that the lock gives a package on Linux with a Python version."""
    machine = default_environment() | {"python_version": python, "python_full_version": f"{python}.7"}
    machine |= {"sys_platform": "linux", "platform_machine": "x86_64"}
    lines = [r for r in LOCK if canonicalize_name(r.name) == canonicalize_name(name)]
    lines = [r for r in lines if r.marker is None or r.marker.evaluate(machine)]
    return [Version(next(iter(r.specifier)).version) for r in lines]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("requirement", DECLARED, ids=lambda r: r.name)
def test_lock_holds_one_version_in_bounds(requirement, python):
    versions = locked(requirement.name, python)
    assert len(versions) == 1, f"{requirement.name}: run make lock"
    assert versions[0] in requirement.specifier
    assert ">=" in str(requirement.specifier), "pyproject.toml states lower bounds"


def test_lock_pins_torch_for_cpu_and_cuda_alike():
    assert locked("torch") == [Version("2.13.0")]
    assert Version("2.13.0+cpu") in next(r.specifier for r in LOCK if r.name == "torch")


def test_lock_names_no_host_and_no_option():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.match(r"[a-z0-9._-]+==", line), line
        assert "://" not in line and " @ " not in line


def test_conda_and_make_install_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, section = environment["dependencies"]
    options = section["pip"]
    installer = runpy.run_path(str(ROOT / "tools" / "install.py"))
    assert python == "python=3.11" and pip == "pip"
    assert Version("3.11") in Requirement(f"python{PROJECT['requires-python']}").specifier
    assert options == ["-c constraints.txt", "-e .[notebooks,batch,mri-extra,formats,docs,test]"]
    assert " ".join(installer["WANTED"]) == " ".join(options)
    extras = re.search(r"\[(.*)\]", options[1])[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])


def test_version_is_said_once():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == companion.__version__
    assert PROJECT["dynamic"] == ["version"]
    assert len(citation["references"]) >= 4


def test_a_killed_installation_is_started_afresh(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
    install = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(install)
    monkeypatch.chdir(tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        Path(name).touch()
    monkeypatch.setattr(install, "has_uv", lambda: True)
    monkeypatch.setattr(install, "with_uv", lambda torch: [["mkdir", ".venv"]])
    install.main("")
    install.main("")  # nothing to do: mkdir would fail
    assert Path(".venv/.companion-installed").exists() and not Path(".venv-busy").exists()

    os.utime(".venv/.companion-installed", (0, 0))  # the sources are newer, and the installer fails
    with pytest.raises(SystemExit, match="failed in: mkdir"):
        install.main("")
    assert Path(".venv-busy").exists()
    install.main("")
    assert "starting afresh" in capsys.readouterr().out and not Path(".venv-busy").exists()
    with pytest.raises(SystemExit, match="choose cpu or auto"):
        install.main("gpu")
