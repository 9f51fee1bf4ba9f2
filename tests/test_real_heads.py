"""The benchmark on real heads: orientation, resuming and the table, without a network."""

import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from companion.acquisition.slices import scan_of
from companion.data.nifti import save_nifti

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import real_heads as bench  # noqa: E402


def phantom() -> tuple[np.ndarray, np.ndarray]:
    """A lopsided ellipsoid (z, y, x) of 3 mm voxels, and its affine towards right, front and top."""
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in (64, 60, 50)], indexing="ij")
    array = np.where(x**2 + y**2 + z**2 < 0.8, 1 + 0.3 * x + 0.2 * y - 0.1 * z, 0).astype(np.float32)
    return array, np.diag([3.0, 3.0, 3.0, 1.0])


@pytest.mark.parametrize("size, width", [("64", 64), ("native", 80)])
def test_any_orientation_gives_the_same_slices_nose_up(size, width):
    array, affine = phantom()
    straight = bench.head_slices(array, affine, size, 3)
    assert straight.shape == (3, 1, width, width) and 0.9 < straight.max() < 1.4
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affine)
    for codes in ("LPI", "PIR", "SAL"):
        turned = image.as_reoriented(
            nibabel.orientations.ornt_transform(
                nibabel.orientations.io_orientation(affine), nibabel.orientations.axcodes2ornt(codes)
            )
        )
        again = bench.head_slices(np.asarray(turned.dataobj).transpose(2, 1, 0), turned.affine, size, 3)
        assert torch.allclose(again, straight, atol=1e-4), codes
    rows = straight[0, 0].sum(1)
    half = width // 2
    assert rows[:half].sum() > rows[half:].sum(), "the front is brighter and lies on top"
    stored = np.eye(4)[[2, 0, 1, 3]] @ np.diag([2.5, 0.5, 2, 1])  # along y, z and x, 2.5, 0.5 and 2 mm
    assert bench.pixel_mm(size, np.zeros((40, 40, 40)), stored) == (3.25 if size == "64" else 2)
    with pytest.raises(ValueError, match="empty"):
        bench.head_slices(np.zeros((20, 20, 20)), affine, size, 3)


@pytest.mark.parametrize("name, thick, bright", [("sagittal", (6, 1, 1), 0), ("coronal", (1, 5, 1), 1)])
def test_slices_that_are_thick_are_cut_as_they_were_acquired(tmp_path, name, thick, bright):
    axes = [np.linspace(-1, 1, round(180 / v)) for v in thick]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    array = np.where(x**2 + y**2 + z**2 < 0.9, 1 + 0.4 * y + 0.2 * z, 0).astype(np.float32)
    image = nibabel.Nifti1Image(array, np.diag([*thick, 1.0])).as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    flat = np.asarray(image.dataobj).transpose(2, 1, 0)
    for size, width in (("64", 64), ("native", 240)):
        shown = bench.head_slices(flat, image.affine, size, 3)
        assert shown.shape == (3, 1, width, width)
        there = shown[1, 0] > 0.3
        assert abs(there.any(0).sum() - there.any(1).sum()) <= 2, "a ball stays round"
        half = width // 2
        assert shown[1, 0, :half].sum() > shown[1, 0, half:].sum(), "the top lies on top"
        left, right = shown[1, 0, :, :half].sum(), shown[1, 0, :, half:].sum()
        assert left > right * (1.1 if name == "sagittal" else 0.95), "the nose points left"
    nibabel.save(image, tmp_path / "head.nii.gz")
    told, scan, _ = scan_of(tmp_path / "head.nii.gz", None, None, 2, 0.01)
    assert f"{name} slice {len(axes[bright]) // 2}" in told
    assert scan.voxel_mm == (max(thick), 1, 1) and scan.kspace.shape[2:] == (184, 184)


def test_voxels_of_a_head_that_is_scanned_here_are_those_of_its_axial_slices(tmp_path):
    array = np.random.default_rng(0).uniform(0.5, 1, (40, 32, 24)).astype(np.float32)
    image = nibabel.Nifti1Image(array, np.diag([2.0, 3.0, 4.0, 1.0]))
    nibabel.save(image.as_reoriented(np.array([[2, 1], [0, 1], [1, 1]])), tmp_path / "head.nii")
    told, scan, _ = scan_of(tmp_path / "head.nii", None, 5, 2, 0.01)
    assert "axial slice 5" in told and scan.voxel_mm == (4, 3, 2)


@pytest.mark.parametrize("radial", [False, True])
def test_a_scan_measures_what_it_says(radial):
    if radial:
        pytest.importorskip("finufft")
    x = torch.complex(*torch.randn(2, 1, 1, 24, 16, generator=torch.Generator().manual_seed(0)))
    A, y = bench.scan(x, 4, 4, 0, radial)
    other = bench.scan(x, 4, 4, 1, radial)[1]
    assert y.shape == (1, bench.COILS, *((9 * 48,) if radial else (24, 16)))
    measured = torch.ones_like(y[0, 0], dtype=torch.bool) if radial else y[0, 0] != 0
    apart = (y - other)[:, :, measured.expand(y.shape[2:])]
    assert apart.abs().square().mean().sqrt() == pytest.approx(2 * bench.NOISE, rel=0.1), "noise alone differs"
    assert (A.H(y) - A.normal(x)).norm() < 0.1 * A.normal(x).norm()


def test_a_finished_head_is_not_redone_and_the_table_counts_heads(tmp_path, monkeypatch, capsys):
    array, affine = phantom()
    for name in ("one", "two"):
        save_nifti(tmp_path / "in" / f"{name}.nii.gz", array, affine=affine)
    save_nifti(tmp_path / "in" / "flat.nii.gz", array[:4], affine=affine)
    calls = []

    def study(name, load, settings, args):
        calls.append(name)
        assert load()[0].shape == array.shape
        psnr = 30.0 + len(calls)
        row = bench.Row(name, "64", 4, "TV", psnr, 0.9, 0.1, None, None, None, "", 1.0, 0.5)
        ours = bench.Row(name, "64", 4, bench.OURS[2], 33.0, 0.9, 0.1, 1.0, 0.9, 1.1, "the prior knows", 1.0, 0.5)
        return [row, ours], {"64 R=4": dict(zip(("truth", "TV", "ours"), torch.rand(3, 8, 8), strict=True))}

    monkeypatch.setattr(bench, "study", study)
    tuned = tmp_path / "tuned.json"
    tuned.write_text(json.dumps({"settings": {"64 R=4": {"TV": 1e-3}}}))
    options = ["--out", str(tmp_path / "out"), "--tuned", str(tuned), "--sizes", "64", "--R", "4"]
    lines = bench.main([str(tmp_path / "in"), *options])
    assert sorted(calls) == ["one.nii.gz", "two.nii.gz"] and "left out: flat.nii.gz" in capsys.readouterr().out
    tv, ours = lines
    assert tv["heads"] == 2 and tv["psnr"] == 31.5 and abs(tv["psnr error"] - 0.5) < 1e-9 and tv["known"] is None
    assert ours["calibration"] == 1 and ours["known"] == 1
    assert bench.main([str(tmp_path / "in"), *options]) == lines and len(calls) == 2, "nothing is redone"
    for name in ("table.md", "table.csv", "results.json", "sheet_64_R4.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert "31.5 +- 0.5" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(SystemExit, match="no settings of classical methods for 64 R=8"):
        bench.main([str(tmp_path / "in"), *options[:-1], "8"])
