"""The page that says what runs here: every remedy it prints is a command that exists, for a thing that is missing."""

import nbformat
import nbformat.v4 as nb
import pytest

from companion.cli import app
from companion.models import checkpoint as weights
from companion.workbench import doctor


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one paper's notebooks; nothing downloaded, nothing prepared."""
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(doctor, "project_root", lambda: tmp_path)

    def write(name, cell):
        path = tmp_path / "notebooks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb.new_notebook(cells=[nb.new_code_cell(cell, metadata={"tags": ["parameters"]})]), path)
        return path

    write("aid/1_data.ipynb", 'data = "data/a.h5"')
    write("aid/2_train.ipynb", 'data = "data/a.h5"\nstart_from = None')
    write("aid/3_sample.ipynb", 'weights = "aid/abide"\ncodec = "aid/mine"')
    write("pet/4_enhance.ipynb", 'weights = "pet/dose-enhancement"')
    return tmp_path


def lacking(project, name):
    return dict(doctor.lacks(project / "notebooks" / name))


def test_what_notebooks_lack_and_the_command_that_gets_it(project):
    assert lacking(project, "aid/1_data.ipynb") == {}
    assert lacking(project, "aid/2_train.ipynb") == {"data = data/a.h5": "companion run notebooks/aid/1_data.ipynb"}
    assert lacking(project, "aid/3_sample.ipynb") == {
        "weights = aid/abide": "companion weights pull aid/abide",
        "codec = aid/mine": "companion run notebooks/aid/2_train.ipynb",
    }
    assert "nobody" not in lacking(project, "pet/4_enhance.ipynb")["weights = pet/dose-enhancement"]
    (project / "data").mkdir()
    (project / "data" / "a.h5").write_bytes(b"")
    assert lacking(project, "aid/2_train.ipynb") == {}
    (project / "notebooks" / "aid" / "9.ipynb").write_text("{")
    assert "is not a Jupyter notebook" in lacking(project, "aid/9.ipynb")["a readable parameters cell"]


def test_the_page(project):
    page = doctor.report()
    for word in ("Python", "torch", "device", "memory", "cores", "disk", *weights.embedded()):
        assert word in page
    assert "runs now: companion run notebooks/aid/1_data.ipynb" in page
    assert "published, not here: fastmri-320-cplx, normal-fastmri-320-cplx" in page
    assert "lmi: LMI-guided translation\n  no notebooks" in page
    assert "data/a.h5" in page
    assert max(map(len, page.splitlines())) < 250 and len(page.splitlines()) < 100


def test_embedded_checkpoints_are_verified(project):
    found = dict(doctor.verified())
    assert found.keys() == set(weights.embedded()) and not any(found.values())


def test_commands_in_the_page_exist():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    (group,) = (group for group in app.registered_groups if group.name == "weights")
    inner = {command.name or command.callback.__name__ for command in group.typer_instance.registered_commands}
    assert {"run", "doctor", "init", "batch"} <= commands
    assert {"list", "pull", "verify", "convert", "export", "push", "where"} == inner
