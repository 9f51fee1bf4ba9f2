"""Prepared files and NIfTI: what is written is what is read, and damage is named."""

import pickle
from dataclasses import replace

import h5py
import nibabel
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from companion.data.nifti import centred_affine, load_nifti, save_nifti
from companion.data.store import open_dataset, write_dataset

SPLIT = {"train": ["0", "3"], "validation": ["1"], "test": ["2"]}


def arrays() -> dict:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((4, 3, 1, 8, 6)) + 1j * rng.standard_normal((4, 3, 1, 8, 6))
    return {
        "image": images.astype(np.complex64),
        "label": rng.integers(0, 4, (4, 3, 1, 8, 6), dtype=np.uint8),
        "age": np.arange(4.0),
    }


def write(path, data=None, **changes):
    data = arrays() if data is None else data
    names = dict.fromkeys(data, "1")
    options = {"units": names, "scale": names, "source": "a test", "seed": 7, "split": SPLIT} | changes
    return write_dataset(path, data, **options)


@pytest.fixture
def prepared(tmp_path):
    return open_dataset(write(tmp_path / "cohort.h5", attrs={"voxel_mm": [3.0, 3.0]}))


def test_round_trip(prepared):
    for name, value in arrays().items():
        assert np.array_equal(prepared.read(name), value) and prepared.read(name).dtype == value.dtype
    assert np.array_equal(prepared.read("image", "train"), arrays()["image"][[0, 3]])
    assert (prepared.seed, prepared.source, prepared.attrs["voxel_mm"]) == (7, "a test", [3.0, 3.0])
    assert prepared.units["image"] == "1" and prepared.split["test"] == ("2",)


def test_slices_are_lazy_and_ordered(prepared):
    dataset = prepared.slices(["image", "label"], "train")
    assert len(dataset) == 6
    image, label = dataset[4]
    assert np.array_equal(image, arrays()["image"][3, 1]) and np.array_equal(label, arrays()["label"][3, 1])
    assert dataset.subject(4) == "3"
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[4][0], image)
    with pytest.raises(IndexError):
        dataset[6]


def test_workers_read_what_the_parent_reads(prepared):
    dataset = prepared.slices("image", "train")
    alone = torch.stack([dataset[i] for i in range(len(dataset))])  # opens the file in the parent first
    loaded = torch.cat(list(DataLoader(dataset, batch_size=2, num_workers=1)))
    assert torch.equal(alone, loaded)


def test_a_failed_write_leaves_nothing(tmp_path):
    data = arrays()
    data["image"][1, 2, 0, 3, 4] = np.nan
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        write(tmp_path / "bad.h5", data)
    with pytest.raises(TypeError):
        write(tmp_path / "bad.h5", attrs={"set": {1}})  # JSON cannot hold it
    with pytest.raises(ValueError, match="no units"):
        write(tmp_path / "bad.h5", units={})
    with pytest.raises(ValueError, match="first axis"):
        write(tmp_path / "bad.h5", arrays() | {"age": np.arange(3.0)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"train": ["0", "1"], "test": ["1"]}, "both 'train' and 'test'"),
        ({"train": ["9"]}, "not in the file"),
        ({"training": ["0"]}, "unknown split"),
    ],
)
def test_splits_are_by_subject(tmp_path, split, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "bad.h5", split=split)


def test_truncated_foreign_and_missing_files(tmp_path, prepared):
    content = prepared.path.read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 1):
        short = tmp_path / "short.h5"
        short.write_bytes(content[:size])
        with pytest.raises(ValueError, match="truncated or of another kind"):
            open_dataset(short)
    with pytest.raises(FileNotFoundError, match="run the data notebook"):
        open_dataset(tmp_path / "none.h5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["kspace"] = np.zeros(3)
    with pytest.raises(ValueError, match="not prepared by this package"):
        open_dataset(tmp_path / "foreign.h5")
    with pytest.raises(ValueError, match="no array t2w; it has"):
        open_dataset(prepared.path, require=["t2w"])
    with pytest.raises(ValueError, match="no array 'flair'"):
        prepared.read("flair")
    with pytest.raises(ValueError, match="no split 'tset'"):
        prepared.slices("image", "tset")


def test_what_is_shown_is_of_a_split_that_has_somebody(prepared):
    assert prepared.shown() == "train" and prepared.shown("validation", "test") == "validation"
    one = replace(prepared, split={"train": [], "validation": [], "test": prepared.subjects[:1]})
    assert one.shown() == one.shown("validation", "train", "test") == "test"
    assert replace(one, split={"train": []}).shown() == "train", "nobody at all"


def test_damage_inside_an_array_is_found(prepared):
    content = bytearray(prepared.path.read_bytes())
    start = content.find(arrays()["image"][2, 1].tobytes())
    content[start + 5] ^= 255
    prepared.path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="'image' is damaged"):
        open_dataset(prepared.path).read("image")


def test_nan_in_a_file_made_elsewhere_is_found(prepared):
    with h5py.File(prepared.path, "a") as file:
        file["age"][2] = np.nan
    with pytest.raises(ValueError, match="'age' has 1 NaN"):
        open_dataset(prepared.path).read("age")


def oblique() -> np.ndarray:
    a, b = 0.3, -0.2
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ tilt @ np.diag([1.0, 1.5, 3.0])
    affine[:3, 3] = [-10, 20, 5]
    return affine


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64, np.int16, np.uint8, bool])
def test_nifti_round_trip_with_an_oblique_affine(tmp_path, suffix, dtype):
    array = (np.random.default_rng(0).standard_normal((4, 5, 6)) * 50).clip(0).astype(dtype)
    path = save_nifti(tmp_path / f"v{suffix}", array, affine=oblique())
    volume = load_nifti(path)
    assert np.array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, oblique(), atol=1e-5)
    np.testing.assert_allclose(volume.voxel_mm, (3.0, 1.5, 1.0), atol=1e-5)
    image = nibabel.load(path)  # as any other reader sees it: (x, y, z), the same voxel at the same place
    assert image.shape == (6, 5, 4) and np.asarray(image.dataobj)[1, 2, 3] == array[3, 2, 1]


def test_voxel_size_gives_a_centred_affine(tmp_path):
    volume = load_nifti(save_nifti(tmp_path / "v.nii", np.ones((4, 5, 6)), voxel_mm=(3, 2, 1)))
    np.testing.assert_allclose(volume.voxel_mm, (3, 2, 1))
    np.testing.assert_allclose(volume.affine @ [2.5, 2, 1.5, 1], [0, 0, 0, 1])


def test_nifti_errors(tmp_path):
    ones, path = np.ones((3, 4, 5), np.float32), tmp_path / "v.nii"
    with pytest.raises(ValueError, match="NaN"):
        save_nifti(path, ones * np.nan, voxel_mm=1)
    with pytest.raises(ValueError, match="one of them"):
        save_nifti(path, ones)
    with pytest.raises(ValueError, match="expected a volume"):
        save_nifti(path, ones[None], voxel_mm=1)
    with pytest.raises(ValueError, match="invertible"):
        save_nifti(path, ones, affine=np.zeros((4, 4)))
    with pytest.raises(ValueError, match="ends in .nii"):
        save_nifti(tmp_path / "v.img", ones, voxel_mm=1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_nifti(path)
    path.write_bytes(b"not an image")
    with pytest.raises(ValueError, match="not a readable NIfTI"):
        load_nifti(path)
    save_nifti(tmp_path / "whole.nii", ones, voxel_mm=1)
    path.write_bytes((tmp_path / "whole.nii").read_bytes()[:400])
    with pytest.raises(ValueError, match="truncated"):
        load_nifti(path)


def test_nifti_series_and_missing_affine(tmp_path):
    series = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    path = tmp_path / "series.nii"
    nibabel.save(nibabel.Nifti1Image(series, oblique()), path)
    with pytest.raises(ValueError, match="5 volumes.*frame=0"):
        load_nifti(path)
    with pytest.raises(ValueError, match="frame 5"):
        load_nifti(path, frame=5)
    assert np.array_equal(load_nifti(path, frame=1).array, series[..., 1].T)
    bare = nibabel.Nifti1Image(series[..., 0], None)
    nibabel.save(bare, tmp_path / "bare.nii")
    with pytest.raises(ValueError, match="has no affine"):
        load_nifti(tmp_path / "bare.nii")
    given = load_nifti(tmp_path / "bare.nii", affine=centred_affine((4, 3, 2), 2.0))
    assert given.voxel_mm == (2.0, 2.0, 2.0)
