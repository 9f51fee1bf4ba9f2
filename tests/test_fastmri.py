"""fastMRI files of an independent writer: odd, non-square, oversampled, one coil or twelve, whole or damaged."""

import h5py
import numpy as np
import pytest
import torch

from companion.data.fastmri import open_volume, parse_header
from companion.data.intake.look import look
from companion.evaluation import metrics
from companion.operators.masks import cartesian_mask
from companion.operators.mri import ifft
from companion.reconstruction import mri as baselines

SLICES, ROWS, COLUMNS = 3, 45, 37  # of the image; the readout is oversampled to 90
HEADER = """<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>
 <encodedSpace><matrixSize><x>90</x><y>37</y><z>1</z></matrixSize>
  <fieldOfView_mm><x>270</x><y>148</y><z>5.5</z></fieldOfView_mm></encodedSpace>
 <reconSpace><matrixSize><x>45</x><y>37</y><z>1</z></matrixSize>
  <fieldOfView_mm><x>135</x><y>148</y><z>5</z></fieldOfView_mm></reconSpace>
 <encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{maximum}</maximum><center>{center}</center>
 </kspace_encoding_step_1></encodingLimits><trajectory>cartesian</trajectory></encoding></ismrmrdHeader>"""
FULL = HEADER.format(maximum=36, center=18)
PARTIAL = HEADER.format(maximum=32, center=16)  # 33 lines, of which line 16 is the centre: columns 2 to 34


def dft(n):
    """The centred orthonormal transform, as its definition says."""
    k = np.arange(n) - n // 2
    return np.exp(-2j * np.pi * np.outer(k, k) / n) / np.sqrt(n)


def scanner(coils, seed=0):
    """Coil images (slice, coil, 90, 37) of an ellipse with spots in the middle half of the readout, and k-space."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.arange(90) - 45, np.arange(COLUMNS) - COLUMNS // 2, indexing="ij")
    inside = ((y / 20) ** 2 + (x / 15) ** 2 < 1).astype(float)
    spots = np.exp(-((y - rng.uniform(-9, 9, (SLICES, 1, 1))) ** 2 + (x - rng.uniform(-9, 9, (SLICES, 1, 1))) ** 2) / 8)
    images = inside * (1 + spots) * np.exp(1j * y / 20)
    angle = 2 * np.pi * np.arange(coils) / coils
    maps = [np.exp(-((y / 25 - np.sin(a)) ** 2 + (x / 20 - np.cos(a)) ** 2) / 4 + 1j * a) for a in angle]
    coil_images = images[:, None] * np.array(maps)
    return coil_images, dft(90) @ coil_images @ dft(COLUMNS).T


def write(path, kspace, header=FULL, reference=None, mask=None, name="reconstruction_rss", **attrs):
    with h5py.File(path, "w") as file:
        file["kspace"] = kspace.astype(np.complex64)
        if header is not None:
            file.create_dataset("ismrmrd_header", data=header, dtype=h5py.string_dtype())
        if reference is not None:
            file[name] = reference.astype(np.float32)
        if mask is not None:
            file["mask"] = mask
        file.attrs.update({"acquisition": "AXT1", "patient_id": "abc", "max": 3.0, "norm": 40.0} | attrs)
    return path


@pytest.mark.parametrize("coils", [1, 12])
def test_k_space_and_header_come_back_and_crop_gives_the_scanners_image(tmp_path, coils):
    images, kspace = scanner(coils)
    rss = np.sqrt((np.abs(images[:, :, 23:68]) ** 2).sum(1))  # 45 - 45 // 2 = 23: the centre stays the centre
    volume = open_volume(write(tmp_path / "file_brain_AXT1_201.h5", kspace, reference=rss))
    assert volume.shape == (SLICES, coils, 90, COLUMNS) and volume.slices == len(volume) == 3
    assert volume.recon_shape == volume.crop_shape == (ROWS, COLUMNS)
    assert volume.voxel_mm == pytest.approx((5.5, 3.0, 4.0)) and volume.lines == (0, 37) and volume.mask is None
    assert (volume.name, volume.acquisition, volume.patient) == ("file_brain_AXT1_201", "AXT1", "abc")
    assert volume.attrs["max"] == 3.0 and volume.attrs["norm"] == 40.0
    assert np.allclose(volume.read(1), kspace[1], atol=1e-5) and volume.read(1).dtype == torch.complex64
    assert torch.equal(volume.read(slice(1, 3)), torch.stack([volume.read(1), volume.read(-1)]))
    assert torch.equal(torch.stack(list(volume)), volume.read())
    found = ifft(volume.crop(volume.read())).abs().square().sum(1).sqrt()
    assert torch.allclose(found, volume.reference(slice(None)), atol=1e-4)
    assert torch.equal(volume.reference(2), volume.reference(slice(None))[2])
    with pytest.raises(IndexError, match="slice 3 of a volume with 3"):
        volume.read(3)


def test_single_coil_files_get_a_coil_axis(tmp_path):
    _, kspace = scanner(1)
    esc = np.ones((SLICES, ROWS, COLUMNS))
    path = write(tmp_path / "knee.h5", kspace[:, 0], reference=esc, name="reconstruction_esc")
    volume = open_volume(path)
    assert volume.shape == (SLICES, 1, 90, COLUMNS) and volume.reference_name == "reconstruction_esc"
    assert np.allclose(volume.read(0), kspace[0], atol=1e-5)


def test_lines_never_acquired_are_put_back_so_that_the_centre_is_in_the_middle(tmp_path):
    _, kspace = scanner(2)
    padded = np.zeros_like(kspace)
    padded[..., 2:35] = kspace[..., 2:35]
    for name, stored in (("padded", padded), ("narrow", kspace[..., 2:35])):
        volume = open_volume(write(tmp_path / f"{name}.h5", stored, PARTIAL))
        assert volume.shape[-1] == COLUMNS and volume.lines == (2, 35)
        assert np.allclose(volume.read(), padded, atol=1e-5)


def test_without_a_header_the_reference_or_the_matrix_decides(tmp_path):
    _, kspace = scanner(2)
    plain = open_volume(write(tmp_path / "plain.h5", kspace, header=None))
    assert plain.recon_shape == plain.crop_shape == (90, COLUMNS) and plain.voxel_mm is None
    assert plain.reference(0) is None
    other = open_volume(write(tmp_path / "other.h5", kspace, header=None, reference=np.ones((3, 44, 50))))
    assert other.recon_shape == (44, 50) and other.crop_shape == (44, COLUMNS)


def test_field_of_view_not_matrix_decides_the_crop_when_the_scanner_interpolates(tmp_path):
    _, kspace = scanner(1)
    header = FULL.replace("<x>45</x><y>37</y>", "<x>128</x><y>140</y>")
    volume = open_volume(write(tmp_path / "a.h5", kspace, header))
    assert volume.recon_shape == (128, 140) and volume.crop_shape == (ROWS, COLUMNS)


def test_undersampled_files_keep_their_columns(tmp_path):
    _, kspace = scanner(2)
    mask = np.zeros(COLUMNS, bool)
    mask[::3] = True
    volume = open_volume(write(tmp_path / "test.h5", kspace * mask, mask=mask))
    assert torch.equal(volume.mask, torch.from_numpy(mask).float())
    cropped = volume.crop(volume.read(0))
    assert cropped.shape == (2, ROWS, COLUMNS) and cropped[..., ~mask].abs().max() == 0
    narrow = mask[2:35]
    volume = open_volume(write(tmp_path / "narrow.h5", kspace[..., 2:35] * narrow, PARTIAL, mask=narrow))
    assert torch.equal(volume.mask[2:35], torch.from_numpy(narrow).float()) and volume.mask.sum() == narrow.sum()
    with pytest.raises(ValueError, match="expected 37 zeros and ones"):
        open_volume(write(tmp_path / "wrong.h5", kspace, mask=mask[:-1]))


def test_from_file_to_metrics_without_a_constant(tmp_path):
    _, kspace = scanner(12)
    volume = open_volume(write(tmp_path / "v.h5", kspace, reference=np.ones((3, ROWS, COLUMNS))))
    full = volume.crop(volume.read())
    coil_images = ifft(full[1])
    maps = coil_images / coil_images.abs().square().sum(0).sqrt().clamp(min=1e-3)
    truth = baselines.zero_filled(full, maps, torch.ones(full.shape[-1]))
    mask = cartesian_mask(full.shape[-1], 3, acs=8)
    result = baselines.zero_filled(full * mask.mask, maps, mask)
    score = metrics.psnr(result.abs(), truth.abs())
    assert score.shape == (3,) and (score > 10).all() and torch.isfinite(score).all()


def test_a_folder_is_read_and_what_is_wrong_in_it_reported(tmp_path):
    _, kspace = scanner(4)
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    whole = write(folder / "good.h5", kspace)
    write(folder / "more" / "good_too.h5", kspace[:, 0])
    content = whole.read_bytes()
    (folder / "half.h5").write_bytes(content[: len(content) // 2])
    (folder / "notes.h5").write_text("this is text")
    (folder / "empty.h5").write_bytes(b"")
    (folder / ".hidden").write_text("passed over")
    nan = kspace.copy()
    nan[1, 0, 3, 4] = np.nan
    write(folder / "nan.h5", nan)
    write(folder / "flat.h5", kspace[0, 0])
    write(folder / "xml.h5", kspace, header="<broken")
    with h5py.File(folder / "other.h5", "w") as file:
        file["image"] = np.ones((2, 3))
    with h5py.File(folder / "magnitude.h5", "w") as file:
        file["kspace"] = np.abs(kspace)
    found = look(folder)
    assert [item.name for item in found.items] == ["good.h5", "more/good_too.h5", "nan.h5"]  # NaN: seen by reading only
    with pytest.raises(ValueError, match="1 NaN"):
        found.items[2].read()
    expected = {
        "half.h5": "truncated",
        "notes.h5": "not an HDF5",
        "empty.h5": "not an HDF5",
        "flat.h5": "(slice, coil, y, x)",
        "xml.h5": "ismrmrd_header is damaged",
        "other.h5": "not a readable fastMRI or ISMRMRD file",
        "magnitude.h5": "expected complex",
    }
    assert found.left.keys() == expected.keys()
    for name, words in expected.items():
        assert words in found.left[name] and str(folder) not in found.left[name], found.left[name]


def test_damage_inside_a_slice_is_named(tmp_path):
    _, kspace = scanner(1)
    path = tmp_path / "damaged.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("kspace", data=kspace.astype(np.complex64), chunks=(1, 1, 90, 37), fletcher32=True)
    content = bytearray(path.read_bytes())
    at = content.find(kspace.astype(np.complex64)[1].tobytes()[:64])
    content[at + 8 : at + 16] = b"\x01" * 8
    path.write_bytes(content)
    volume = open_volume(path)
    assert np.allclose(volume.read(0), kspace[0], atol=1e-5)
    with pytest.raises(ValueError, match="slice 1 is damaged"):
        volume.read(1)


def test_reading_a_volume_takes_the_memory_of_the_result_and_a_slice(tmp_path):
    import tracemalloc

    kspace = np.ones((8, 4, 96, 95), np.complex64)
    volume = open_volume(write(tmp_path / "v.h5", kspace, header=None))
    volume.read(0)
    tracemalloc.start()
    volume.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.4 * kspace.nbytes


@pytest.mark.parametrize(
    "text, words",
    [
        ("<!DOCTYPE a [<!ENTITY b 'c'>]>" + FULL.split("?>")[1], "refused"),
        ("<a/>", "incomplete"),
        (FULL[:300], "damaged"),
        (FULL.replace("<x>90</x>", "<x>0</x>"), "is 0, 37, 1"),
        (FULL.replace("<x>90</x>", "<x>many</x>"), "damaged"),
        (FULL.replace("matrixSize", "size"), "incomplete .no encodedSpace matrixSize"),
        (FULL.replace("encoding>", "coding>"), "incomplete .no encoding"),
    ],
)
def test_headers_that_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_header(text)


def test_what_is_missing_or_damaged_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="check the path"):
        open_volume(tmp_path / "missing.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(ValueError, match="not an HDF5 file"):
        open_volume(tmp_path / "text.h5")
