"""real_scan: from files of several kinds to one measured slice, and what is refused."""

import nibabel
import numpy as np
import pytest
import torch

from companion.acquisition.measurement import Measurement
from companion.data import anatomy
from companion.data.nifti import save_nifti
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
    assert "scanned here" in one.name and torch.allclose(one.m.y, other.m.y, atol=1e-4)
    found, truth = one.reference[0, 0].abs(), torch.from_numpy(array[7, ::-1].copy())
    assert torch.corrcoef(torch.stack([found.flatten(), truth.flatten()]))[0, 1] > 0.99
    save_nifti(tmp_path / "a" / "other.nii.gz", array, voxel_mm=(5, 3.25, 3.25))
    with pytest.raises(ValueError, match="holds 2 scans.*Name one of them"):
        prepare(form(tmp_path, tmp_path / "a"))


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
