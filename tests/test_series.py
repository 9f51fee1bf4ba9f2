"""Sequences from files: the right frames first, the phase kept, the aspect ratio too, and no window across volumes."""

import nibabel
import numpy as np
import pytest
import torch

from companion.data.cfl import write_cfl
from companion.data.series import load_series, windows


def ramp(*shape):
    return np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)


def nifti(path, array, mm):
    """array in the order of the file, (x, y, z) or (x, y, z, time)."""
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*mm, 1.0])), path)
    return path


def test_nifti_volume_slices_along_any_axis(tmp_path):
    stored = ramp(5, 7, 9)  # (x, y, z)
    path = nifti(tmp_path / "sub-1_T1w.nii.gz", stored, (1.0, 2.0, 3.0))
    s = load_series(path)
    assert s.name == "sub-1_T1w" and s.frames.shape == (9, 1, 7, 5) and s.frames.dtype == torch.float32
    assert np.allclose(s.frames[4, 0] * s.scale, stored[:, :, 4].T) and s.frames.max() == 1
    assert s.pixel_mm == (2.0, 1.0) and s.step_mm == 3.0
    sagittal = load_series(path, axis=2, frames=slice(1, -2))
    assert sagittal.frames.shape == (2, 1, 9, 7) and sagittal.pixel_mm == (3.0, 2.0) and sagittal.step_mm == 1.0
    assert np.allclose(sagittal.frames[0, 0] * sagittal.scale, stored[1].T)
    assert sagittal.scale == stored[1:3].max()  # the largest of what is kept


def test_nifti_cine_is_one_slice_over_time(tmp_path):
    stored = ramp(4, 6, 3, 8)  # (x, y, z, time)
    s = load_series(nifti(tmp_path / "cine.nii", stored, (1.5, 1.5, 8.0)), position=1)
    assert s.frames.shape == (8, 1, 6, 4) and s.step_mm is None and s.pixel_mm == (1.5, 1.5)
    assert np.allclose(s.frames[5, 0] * s.scale, stored[:, :, 1, 5].T)
    across = load_series(tmp_path / "cine.nii", position=1, axis=1, shape=(8, 8))  # frames (time, x): no size in mm
    assert across.frames.shape == (6, 1, 8, 8) and across.step_mm == 1.5 and across.pixel_mm is None
    with pytest.raises(ValueError, match="4D"):
        load_series(tmp_path / "cine.nii")
    with pytest.raises(ValueError, match="position 3 of a series with 3"):
        load_series(tmp_path / "cine.nii", position=3)
    nifti(tmp_path / "volume.nii", stored[..., 0], (1, 1, 1))
    with pytest.raises(ValueError, match="position is for"):
        load_series(tmp_path / "volume.nii", position=1)


def test_complex_series_keep_their_phase(tmp_path):
    z = np.array([[[1 + 1j, -4j], [2, -3]]] * 3)  # the largest magnitude is at -4j, the largest real part at 2
    np.save(tmp_path / "z.npy", z)
    s = load_series(tmp_path / "z.npy")
    assert s.frames.shape == (3, 1, 2, 2) and s.frames.dtype == torch.complex64 and s.scale == 4
    assert np.allclose(s.frames[:, 0] * s.scale, z) and s.frames.abs().max() == 1
    assert torch.allclose(load_series(tmp_path / "z.npy", magnitude=True).frames, s.frames.abs())


def test_npy_with_a_channel_axis_and_other_types(tmp_path):
    np.save(tmp_path / "a.npy", ramp(3, 1, 4, 5).astype(">f8"))
    np.save(tmp_path / "b.npy", ramp(3, 4, 5).astype(np.uint16))
    a, b = (load_series(tmp_path / f"{n}.npy").frames for n in "ab")
    assert torch.equal(a, b) and a.shape == (3, 1, 4, 5)


def test_cfl_counts_frames_along_its_last_axis(tmp_path):
    stored = ramp(6, 4, 3) * 1j  # (row, column, slice), as the published preparation writes
    write_cfl(tmp_path / "fastMRI_AXT1", stored.reshape(6, 4, *(1,) * 11, 3))
    s = load_series(tmp_path / "fastMRI_AXT1.cfl")
    assert s.frames.shape == (3, 1, 6, 4) and np.allclose(s.frames[2, 0] * s.scale, stored[..., 2])


def test_resizing_keeps_the_aspect_ratio_in_mm_and_pads_with_zeros(tmp_path):
    x, y = np.meshgrid(np.arange(40), np.arange(60), indexing="ij")
    disc = ((x - 19.5) ** 2 + (2 * (y - 29.5)) ** 2 < 15**2).astype(np.float32)  # round where y is 2 mm
    path = nifti(tmp_path / "disc.nii", np.repeat(disc[:, :, None], 2, 2), (1.0, 2.0, 5.0))
    s = load_series(path, shape=(33, 33))
    assert s.frames.shape == (2, 1, 33, 33) and s.pixel_mm == pytest.approx((120 / 33,) * 2)
    image = s.frames[0, 0]
    assert image[:, :10].abs().max() == 0 and image[:, 23:].abs().max() == 0  # 40 mm of 120 mm in the middle
    spread = [(image.sum(1 - a) * (torch.arange(33.0) - 16) ** 2).sum() / image.sum() for a in (0, 1)]
    assert spread[0] == pytest.approx(float(spread[1]), rel=0.1)
    area = image.sum() * s.pixel_mm[0] * s.pixel_mm[1]
    assert area == pytest.approx(disc.sum() * 2, rel=0.03)


def test_resizing_complex_equals_resizing_its_parts(tmp_path):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 9, 7)) + 1j * rng.standard_normal((2, 9, 7))
    np.save(tmp_path / "z.npy", z)
    np.save(tmp_path / "re.npy", z.real)
    s, re = (load_series(tmp_path / f"{n}.npy", shape=(12, 5)) for n in ("z", "re"))
    assert s.frames.shape == (2, 1, 12, 5)
    assert torch.allclose(s.frames.real * s.scale, re.frames * re.scale, atol=1e-5)
    same = load_series(tmp_path / "z.npy", shape=(9, 7))
    assert torch.allclose(same.frames, load_series(tmp_path / "z.npy").frames, atol=1e-6)


@pytest.mark.parametrize(
    "frames, length, count, left", [(16, 11, 1, 5), (22, 11, 2, 0), (5, 11, 0, 5), (3, 1, 3, 0), (0, 4, 0, 0)]
)
def test_windows_lose_nothing_silently(frames, length, count, left):
    cut, dropped = windows(frames, length)
    assert len(cut) == count and dropped == left
    held = [i for window in cut for i in range(frames)[window]]
    assert held == list(range(count * length)) and len(held) + dropped == frames
    assert all(window.stop - window.start == length for window in cut)


def test_windows_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="length of at least 1"):
        windows(10, 0)


def test_what_cannot_be_read_says_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_series(tmp_path / "missing.npy")
    (tmp_path / "a.npy").write_text("text")
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("a.npy", "object.npy"):
        with pytest.raises(ValueError, match="not a readable array"):
            load_series(tmp_path / name)
    (tmp_path / "b.dat").write_text("text")
    with pytest.raises(ValueError, match="expected .nii"):
        load_series(tmp_path / "b.dat")
    np.save(tmp_path / "flat.npy", ramp(3, 4))
    with pytest.raises(ValueError, match="three axes"):
        load_series(tmp_path / "flat.npy")
    np.save(tmp_path / "c.npy", ramp(3, 4, 5))
    with pytest.raises(ValueError, match="leaves no frames"):
        load_series(tmp_path / "c.npy", frames=slice(5, -3))
    with pytest.raises(ValueError, match="choose 0, 1 or 2"):
        load_series(tmp_path / "c.npy", axis=3)
    with pytest.raises(ValueError, match="positive sizes"):
        load_series(tmp_path / "c.npy", shape=(0, 3))
    np.save(tmp_path / "nan.npy", np.full((2, 3, 4), np.nan))
    with pytest.raises(ValueError, match="(?i)nan"):
        load_series(tmp_path / "nan.npy")
