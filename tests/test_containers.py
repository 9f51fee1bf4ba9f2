"""The containers' recipes: the same lock and files as the installer's, and built where an engine can."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from companion.files import shipped

ROOT = Path(__file__).parents[1]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, lines joined."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def apptainer() -> dict[str, list[str]]:
    """Section -> its lines; what comes before the first is the header."""
    sections: dict[str, list[str]] = {"": []}
    for line in (ROOT / "apptainer.def").read_text().splitlines():
        if line.startswith("%"):
            sections[name := line[1:].strip()] = []
        elif line.strip() and not line.startswith("#"):
            sections[name if len(sections) > 1 else ""].append(line.strip())
    return sections


def test_both_recipes_install_the_same_from_the_lock():
    docker, recipe = dockerfile(), apptainer()
    assert {word for word, _ in docker} == {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
    copied = {name for word, rest in docker if word == "COPY" for name in rest.split()[:-1]}
    assert copied == {line.split()[0] for line in recipe["files"]}
    assert all((ROOT / name).exists() for name in copied) and "constraints.txt" in copied
    runs = " ".join(rest for word, rest in docker if word == "RUN")
    built = " ".join(recipe["post"])
    for text in (runs, built):
        assert "-c constraints.txt" in text and "--torch-backend=" in text
    arguments = dict(rest.split("=") for word, rest in docker if word == "ARG")
    assert arguments == dict(line.split("=") for line in recipe["arguments"])
    assert set(arguments["EXTRAS"].split(",")) <= EXTRAS
    base = next(rest for word, rest in docker if word == "FROM")
    assert recipe[""] == ["Bootstrap: docker", f"From: {base}"] and "python:3.11" in base
    assert recipe["runscript"] == ['exec companion "$@"'] and ("ENTRYPOINT", '["companion"]') in docker


@pytest.mark.slow
def test_an_engine_builds_the_image():
    engine = next((name for name in ("docker", "podman") if shutil.which(name)), None)
    if engine is None or subprocess.run([engine, "info"], capture_output=True).returncode:
        pytest.skip("no container engine runs here")
    base = next(rest for word, rest in dockerfile() if word == "FROM")
    if subprocess.run([engine, "image", "inspect", base], capture_output=True).returncode:
        pytest.skip(f"the base image {base} is not on this machine ({engine} pull {base})")
    subprocess.run([engine, "build", "-t", "companion-test", str(ROOT)], check=True)
    said = subprocess.run([engine, "run", "--rm", "companion-test", "version"], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr


def test_profiles_say_how_and_where():
    profiles = {p.name: yaml.safe_load((p / "config.yaml").read_text())
                for p in (shipped("workflow") / "profiles").iterdir()}  # fmt: skip
    assert profiles["slurm"]["executor"] == "slurm" and profiles["slurm"]["slurm-status-command"] == "squeue"
    assert all(p["rerun-incomplete"] and p["keep-going"] and p["retries"] >= 1 for p in profiles.values())


def test_a_training_on_many_nodes_is_one_script():
    script = shipped("workflow") / "slurm_train.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text()
    assert "#SBATCH --ntasks-per-node=1" in text and "srun --kill-on-bad-exit=1 torchrun" in text
    assert {"--nnodes", "--nproc-per-node", "--max-restarts", "--rdzv-backend", "--rdzv-endpoint"} <= set(
        re.findall(r"--[a-z-]+", text)
    )
