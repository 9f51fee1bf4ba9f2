"""What comes with the package, where it is laid down, and that a missing extra says how to install it."""

import builtins

import pytest

from companion.extras import extra
from companion.files import find_project, shipped
from companion.workbench.project import lay_down
from companion.workbench.sources import located


def test_a_project_is_laid_down_whole_and_never_over_other_files(tmp_path):
    folder = tmp_path / "mine"
    written = lay_down(folder)
    assert find_project(folder / "notebooks" / "aid") == folder.resolve()
    assert (folder / "notebooks/params/start_here/smoke.yaml").is_file() and (folder / "workflow/smoke.yaml").is_file()
    assert len(written) == sum(path.is_file() for path in folder.rglob("*"))
    assert lay_down(folder) == []  # again: nothing to do

    (folder / "workflow/config.yaml").write_text("changed")
    (folder / "workflow/smoke.yaml").unlink()
    with pytest.raises(ValueError, match="other versions of 1 files .*workflow/config.yaml"):
        lay_down(folder)
    assert not (folder / "workflow/smoke.yaml").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; name a folder"):
        lay_down(tmp_path / "file")


def test_files_of_the_workflow_are_found_here_in_the_project_or_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "a.txt").touch()
    assert located("a.txt", tmp_path / "project") == [str(tmp_path / "project" / "a.txt")]
    (tmp_path / "a.txt").touch()
    assert located("a.txt", tmp_path / "project") == ["a.txt"]
    assert located("absent/*", tmp_path) == ["absent/*"]
    (weights,) = located("checkpoints/brain/t1w/model.safetensors", tmp_path)
    assert weights == str(shipped("checkpoints") / "brain/t1w/model.safetensors")
    assert any(path.endswith("operators/mri.py") for path in located("src/companion/**/*.py", tmp_path))


def test_a_missing_extra_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("finufft"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ModuleNotFoundError, match=r'finufft is not installed.*pip install "companion\[mri-extra\]"'):
        with extra("mri-extra"):
            import finufft  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match="companion.absent"):  # a fault of ours stays itself
        with extra("mri-extra"):
            import companion.absent  # noqa: F401
