"""`companion look`: what is printed of any file or folder, and the picture."""

import nibabel
import numpy as np
import pytest
from test_intake_images import head, save
from typer.testing import CliRunner

from companion.cli import app
from companion.data.intake.look import look
from companion.data.intake.records import Volume
from companion.data.intake.report import report
from companion.show.look import _planes, picture


def folder(path):
    for i in range(1, 4):
        for name, x in (("T1w", head(seed=i)), ("desc-brain_mask", (head(seed=i) > 0).astype("u1"))):
            (path / f"sub-{i}").mkdir(parents=True, exist_ok=True)
            save(path / f"sub-{i}/sub-{i}_{name}.nii.gz", x)
    (path / "sub-2/sub-2_T2w.nii.gz").write_bytes(b"<html>")
    (path / "README").write_text("hello")
    return path


def test_a_folder_is_told_with_people_split_and_what_is_wrong(tmp_path):
    told = report(look(folder(tmp_path / "data")))
    assert "6 scans of 3 people, 1 file left out, 1 note" in told
    assert "T1w image" in told and "24 x 24 x 24 (z, y, x)" in told and "4 x 4 x 4" in told
    assert "split proposed" in told and "train          1 person, 2 files" in told
    assert "sub-2/sub-2_T2w.nii.gz: a web page" in told


def test_a_single_file_is_read(tmp_path):
    told = report(look(save(tmp_path / "a.nii.gz", head())))
    assert f"numbers from 0 to {head().max()}" in told and "affine [[-4.0" in told
    labels = (head() > 0).astype(np.uint8) + (head() > 700)
    assert "wrong: a label map" in report(look(save(tmp_path / "b.nii.gz", labels)))


def test_people_that_cannot_be_told_are_said_with_what_to_do(tmp_path):
    for i in (1, 2):
        save(tmp_path / f"scan{i}.nii.gz", head(seed=i))
    assert "who is who: cannot tell" in report(look(tmp_path)) and "give a table" in report(look(tmp_path))


def test_the_command_prints_draws_and_fails_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, ["look", str(folder(tmp_path / "data")), "--picture"])
    assert run.exit_code == 0 and "6 scans" in run.output and (tmp_path / "look-data.png").stat().st_size > 5000
    assert CliRunner().invoke(app, ["look", str(tmp_path / "nothing")]).exit_code == 1


@pytest.mark.parametrize("codes", ["RAS", "LPI", "ASL", "IPR"])
def test_a_picture_is_upright_whatever_the_order_of_axes(codes):
    """Of a bright bar in front and above, to the person's right, in every order: above, and on the right."""
    world = np.zeros((9, 10, 11), np.float32)  # (x, y, z) to the right, front and head
    world[4:8, 5:9, 5:10] = 1
    straight = nibabel.Nifti1Image(world, np.eye(4))
    codes_to = nibabel.orientations.axcodes2ornt
    turned = straight.as_reoriented(nibabel.orientations.ornt_transform(codes_to("RAS"), codes_to(codes)))
    shown = _planes(Volume(np.asarray(turned.dataobj).transpose(2, 1, 0), turned.affine))
    axial, coronal, sagittal = shown[:10, :9], shown[:11, 11:20], shown[:11, 22:32]
    assert np.array_equal(axial, world[:, ::-1, 5].T)  # rows from the nose back, columns to the right
    assert np.array_equal(coronal, world[:, 4, ::-1].T) and np.array_equal(sagittal, world[4, ::-1, ::-1].T)


def test_scans_that_cannot_be_read_are_pictured_with_the_reason(tmp_path):
    path = save(tmp_path / "s1_T1w.nii.gz", head())
    path.write_bytes(path.read_bytes()[:-9])
    assert picture(look(tmp_path), tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("count", [1, 5])
def test_pictures_of_few_and_many(tmp_path, count):
    for i in range(count):
        save(tmp_path / f"s{i}_T1w.nii.gz", head(seed=i))
    assert picture(look(tmp_path), tmp_path / "out.png", most=4).stat().st_size > 1000
