"""real_scan: from files of several kinds to one measured slice, and what is refused."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch

from companion.acquisition.measurement import Measurement, prepare_scan
from companion.acquisition.slices import as_slices
from companion.data import anatomy
from companion.data.nifti import save_nifti
from companion.data.raw.scan import gapless, raw_scan
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, fft
from companion.papers.real_scan import RealScan, prepare, write
from companion.randomness import randn
from companion.reconstruction import held_out, regularised, trust

SIZE = 64


def form(tmp_path, source, **others) -> RealScan:
    return RealScan(source=str(source), out=str(tmp_path / "run"), acs=16, coils=4, device="cpu", **others)


def slices(count: int) -> torch.Tensor:
    """Slices (count, 1, y, x) of a virtual person."""
    person = anatomy.cohort("test", 1)[0]
    heights = anatomy.slice_heights(person, count)
    return anatomy.render(person, "T1w", (count, SIZE, SIZE), slices_mm=heights).image[:, None]


def kspace(x: torch.Tensor, noise_std: float = 0.01) -> torch.Tensor:
    """All of the noisy k-space (slice, coil, y, x) of slices."""
    k = fft(birdcage_maps(x.shape[-2:], 4) * x)
    return k + noise_std * randn(k.shape, k.dtype, torch.Generator().manual_seed(1))


def test_a_fully_sampled_file_is_undersampled_and_judged_by_the_rest(tmp_path):
    x = slices(3)
    np.save(tmp_path / "scan.npy", 700 * kspace(x).numpy())
    case = prepare(form(tmp_path, tmp_path / "scan.npy", axes="slice coil y x", slice=2, acceleration=4))
    assert isinstance(case.m, Measurement) and "slice 2" in case.name
    lines = cartesian_mask(SIZE, 4, acs=16).mask
    assert torch.equal(case.kept, (lines != 0).expand(SIZE, SIZE))
    assert torch.equal((case.m.y[0] != 0).any(0), case.kept), "nothing that was left out is looked at"
    truth, found = x[2:3].abs(), case.reference.abs()
    scale = (truth * found).sum() / found.square().sum()
    assert (scale * found - truth).square().mean().sqrt() < 0.02
    with pytest.raises(ValueError, match="slices 0 to 2"):
        prepare(form(tmp_path, tmp_path / "scan.npy", axes="slice coil y x", slice=3))


def test_what_a_scanner_left_out_stays_out_and_there_is_no_truth(tmp_path):
    lines = cartesian_mask(SIZE, 3, acs=16).mask
    np.save(tmp_path / "scan.npy", (kspace(slices(1)) * lines).numpy())
    case = prepare(form(tmp_path, tmp_path / "scan.npy", axes="slice coil y x", acceleration=8))
    assert case.reference is None and torch.equal(case.kept, (lines != 0).expand(SIZE, SIZE))


def test_a_head_is_scanned_here_nose_up_whatever_its_orientation(tmp_path):
    array = slices(12)[:, 0].abs().numpy()[:, ::-1].copy()  # (z, y, x) towards top, front, right
    save_nifti(tmp_path / "a" / "t1.nii.gz", array, voxel_mm=(5, 3.25, 3.25))
    image = nibabel.load(tmp_path / "a" / "t1.nii.gz")
    (tmp_path / "b").mkdir()
    wanted = nibabel.orientations.axcodes2ornt("PIR")
    turned = image.as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(image.affine), wanted)
    )
    nibabel.save(turned, tmp_path / "b" / "t1.nii.gz")
    one, other = (prepare(form(tmp_path, tmp_path / name, slice=7)) for name in "ab")
    assert one.scan.voxel_mm == other.scan.voxel_mm == (5, 3.25, 3.25), "of the slices, not of the stored axes"
    assert "scanned here" in one.name and torch.allclose(one.m.y, other.m.y, atol=1e-4)
    found, truth = one.reference[0, 0].abs(), torch.from_numpy(array[7, ::-1].copy())
    assert torch.corrcoef(torch.stack([found.flatten(), truth.flatten()]))[0, 1] > 0.99
    save_nifti(tmp_path / "a" / "other.nii.gz", array, voxel_mm=(5, 3.25, 3.25))
    with pytest.raises(ValueError, match="holds 2 scans.*Name one of them"):
        prepare(form(tmp_path, tmp_path / "a"))


def test_what_is_no_image_of_magnitudes_is_not_scanned(tmp_path):
    array = slices(12)[:, 0].abs().numpy()
    brain = array > 0.2
    cases = {
        "hu": (1000 * array - 1024, (5, 3.25, 3.25), "far below 0.*HU"),
        "standardised": (np.where(brain, (array - 0.5) / 0.2, 0), (5, 3.25, 3.25), "far below 0"),
        "long in every plane": (array, (3.25, 5.5, 9), "nearly square"),
        "empty": (0 * array, (5, 3.25, 3.25), "empty"),
        "regions": (brain.astype(np.uint8) + (array > 0.6), (5, 3.25, 3.25), "label map"),
        "head_seg": (brain.astype(np.uint8), (5, 3.25, 3.25), "no image or k-space"),
    }
    for name, (values, voxel_mm, words) in cases.items():
        save_nifti(tmp_path / f"{name}.nii.gz", values, voxel_mm=voxel_mm)
        with pytest.raises(ValueError, match=words):
            prepare(form(tmp_path, tmp_path / f"{name}.nii.gz"))
    series = nibabel.Nifti1Image(np.stack([array, 0.5 * array], -1).transpose(2, 1, 0, 3), np.diag([3.25, 3.25, 5, 1]))
    nibabel.save(series, tmp_path / "series.nii.gz")
    (tmp_path / "folder").mkdir()
    (tmp_path / "series.nii.gz").rename(tmp_path / "folder" / "series.nii.gz")
    (tmp_path / "folder" / "cut.nii.gz").write_bytes(b"")
    case = prepare(form(tmp_path, tmp_path / "folder"))
    assert "frame 0 of 2" in case.name and "left out: cut.nii.gz: empty" in str(case.scan)
    assert "frame 1 of 2" in prepare(form(tmp_path, tmp_path / "folder", which="frame 1")).name


def test_gaps_make_undersampled_and_oversampling_is_cut_before_anything_is_judged(tmp_path):
    k, lines = kspace(slices(1)), torch.zeros(SIZE)
    lines[::2], lines[SIZE // 2 - 12 : SIZE // 2 + 12] = 1, 1
    assert lines.mean() > 0.6 and not gapless(lines.expand(SIZE, SIZE)) and gapless((lines * 0 + 1)[None])
    np.save(tmp_path / "scan.npy", (k * lines).numpy())
    case = prepare(form(tmp_path, tmp_path / "scan.npy", axes="slice coil y x"))
    assert case.reference is None and torch.equal(case.kept, (lines != 0).expand(SIZE, SIZE)), "as it was measured"
    wide = torch.nn.functional.pad(slices(1), (0, 0, SIZE // 2, SIZE // 2))
    k = fft(birdcage_maps((2 * SIZE, SIZE), 4) * wide)
    calibration = k[..., SIZE - 24 : SIZE + 24, SIZE // 2 - 12 : SIZE // 2 + 12]
    scan = raw_scan("scan", k, oversampling=(2.0, 1.0), calibration=calibration)
    cut = as_slices(scan)
    assert (
        cut.kspace.shape[-2:] == (SIZE, SIZE) and cut.calibration.shape[-2:] == (24, 24) and cut.oversampling == (1, 1)
    )
    noise = torch.randn(4, 500, dtype=torch.complex64, generator=torch.Generator().manual_seed(2))
    for one in (scan, cut):
        m = prepare_scan(replace(one, noise=0.01 * noise))
        image = m.A.H(m.y)[0, 0].abs()
        assert torch.corrcoef(torch.stack([image.flatten(), slices(1).abs().flatten()]))[0, 1] > 0.98


def test_a_3d_scan_falls_into_slices_and_nothing_is_refused(tmp_path):
    k = fft(birdcage_maps((SIZE, SIZE), 4)[:, None] * slices(24).movedim(1, 0), 3)  # coil, z, y, x
    np.save(tmp_path / "scan.npy", k[None].numpy())
    case = prepare(form(tmp_path, tmp_path / "scan.npy", axes="slice coil z y x"))
    assert "along y" in case.scan.about["slices"] and case.m.y.shape[2:] == (24, SIZE)
    with pytest.raises(FileNotFoundError):
        prepare(form(tmp_path, tmp_path / "none.h5"))


def test_images_are_written_with_their_size_and_place(tmp_path):
    case = prepare(form(tmp_path, "virtual", image_size=SIZE))
    paths = write(case, tmp_path / "out", image=case.reference[0])
    image = nibabel.load(paths[0])
    assert image.shape == (SIZE, SIZE, 1) and np.allclose(image.header.get_zooms()[:2], 3.25)
    middle = image.affine @ [(SIZE - 1) / 2, (SIZE - 1) / 2, 0, 1]
    assert np.allclose(middle[:3], 0) and nibabel.aff2axcodes(image.affine)[:2] == ("R", "P")
    assert paths[1].suffix == ".dcm"


def test_a_scan_tunes_total_variation_for_itself(tmp_path):
    case = prepare(form(tmp_path, "virtual", image_size=SIZE))
    m = case.m.one(0)
    split = held_out.hold_out(m.A, m.y, acs=16)
    settings = [1e-5, 2e-3, 1.0]
    assert held_out.best_setting(split, regularised.tv, settings) == 2e-3


def test_levels_end_at_the_noise_and_begin_lower_with_an_image():
    cold, warm = (trust.levels_for(0.02, start, 10) for start in (False, True))
    assert cold[0] == pytest.approx(trust.COLD) and warm[0] == pytest.approx(trust.WARM)
    assert float(warm[9]) == pytest.approx(0.02) and float(cold[9]) == pytest.approx(0.02)
    assert trust.levels_for(0.0, True, 10)[9] > 0, "noiseless data have a last level too"
