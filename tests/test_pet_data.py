"""The FDG cohort has the stated uptake, lesions and units; files are read in the right order or refused."""

import gzip

import h5py
import numpy as np
import pydicom
import pytest
import torch
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from companion.data import anatomy, pet, slicing
from companion.data.activity_maps import read_people
from companion.data.dicom.write import write_dicom
from companion.data.intake import others
from companion.data.nifti import Volume, save_nifti
from companion.data.pet import (
    Lesion,
    activity_from_labels,
    cohort_slices,
    load_activity,
    load_brainweb,
    load_phantoms,
    place_lesions,
    render,
    uptake,
)


def test_uptake_is_fdg_like_and_personal():
    values = [uptake(subject) for subject in anatomy.cohort("train", 200)]
    ratio = np.array([v["grey"] / v["white"] for v in values])
    assert np.median(ratio) == pytest.approx(4, rel=0.05) and 0.05 < ratio.std() / ratio.mean() < 0.2
    assert all(v["csf"] < v["white"] < v["grey"] for v in values)
    assert uptake(anatomy.Subject(3)) == uptake(anatomy.Subject(3))


@pytest.fixture(scope="module")
def slices():
    return cohort_slices("validation", 2, size=48, per_subject=3, lesions=1)


def test_cohort_slices_are_activity_with_labels_lesions_and_attenuation(slices):
    assert slices.image.shape == slices.labels.shape == slices.mu.shape == (6, 1, 48, 48)
    assert (slices.image >= 0).all() and slices.pixel_mm == pytest.approx(208 / 48)
    assert (slices.image.flatten(1).sum(1) > 0).all()
    grey, white = (slices.image[slices.labels == anatomy.LABELS[name]].mean() for name in ("grey", "white"))
    assert grey > 1.5 * white  # partial volume at 4 mm; pure tissue is 4 to 1
    assert slices.subject.tolist() == [1_000_000] * 3 + [1_000_001] * 3
    assert slices.mu.max() == pytest.approx(pet.MU_SKULL)
    brain = slices.labels > 0
    assert torch.allclose(slices.mu[brain], torch.tensor(pet.MU_WATER))
    assert (slices.lesions.flatten(1).amax(1).reshape(2, 3).sum(1) >= 1).all()


def test_tissue_shares_are_what_the_slices_were_made_of(slices):
    shares = pet.tissue_shares(slices)
    assert shares.shape == (6, 3, 1, 48, 48)
    assert torch.equal(torch.stack([anatomy.labels_from_tissue(one[:, 0])[None] for one in shares]), slices.labels)


def test_a_lesion_is_where_and_as_hot_as_stated():
    subject = anatomy.Subject(5)
    lesion = Lesion((20.0, -20.0, 30.0), 8.0, 2.0)
    without, with_one = (render(subject, (1, 104, 104), 2.0, torch.tensor([30.0]), found) for found in ((), [lesion]))
    inside = with_one.lesions == 1
    points = anatomy.grid_mm((1, 104, 104), 2.0, torch.tensor([30.0]))
    assert torch.allclose(points[inside].mean(0), torch.tensor(lesion.position_mm), atol=0.3)
    assert inside.sum().item() * 4 == pytest.approx(np.pi * 64, rel=0.1)
    deep = (points - torch.tensor(lesion.position_mm)).norm(dim=-1) < 6
    assert torch.allclose(with_one.image[deep], torch.tensor(2.0 * uptake(subject)["grey"]))
    assert torch.equal(with_one.image[:, :20], without.image[:, :20])
    found = place_lesions(subject, 3)
    assert len(found) == 3 and found == place_lesions(subject, 3)
    assert all(1.5 <= one.contrast <= 2.5 and 5 <= one.radius_mm <= 10 for one in found)


# --- the published phantoms


def volumes(slices=25, side=6):
    """Two subjects whose slices change slowly, (2, slices, side * side) uint8."""
    height = np.arange(slices)[:, None]
    base = 6 + 5 * np.sin(height / 6 + np.arange(side * side) / 3)
    return np.stack([base, base[::-1]]).astype(np.uint8)


@pytest.fixture
def phantom_file(tmp_path):
    def write(array, name="phantoms.npz", key="phantoms"):
        np.savez_compressed(tmp_path / name, **{key: array})
        return tmp_path / name

    return write


def test_the_lexicographic_order_is_undone(phantom_file):
    true = volumes()
    order = sorted(range(25), key=str)
    path = phantom_file(true[:, order].reshape(50, 36))
    read = load_phantoms(path, slices=25)
    assert read.shape == (2, 25, 1, 6, 6)
    np.testing.assert_array_equal(read.reshape(2, 25, 36).numpy(), true)
    with pytest.raises(ValueError, match="order='lexicographic'"):
        load_phantoms(path, slices=25, order="numeric")


def test_unsorted_and_foreign_phantoms_are_refused(phantom_file, tmp_path):
    numeric = phantom_file(volumes().reshape(50, 36))
    with pytest.raises(ValueError, match="order='numeric'"):
        load_phantoms(numeric, slices=25)
    np.testing.assert_array_equal(load_phantoms(numeric, 25, "numeric").reshape(2, 25, 36).numpy(), volumes())
    for array, key, message in (
        (volumes().reshape(50, 36), "images", "foreign"),
        (volumes().reshape(50, 36)[:49], "phantoms", "slices each"),
        (volumes().reshape(50, 36)[:, :35], "phantoms", "square"),
        (-volumes().reshape(50, 36).astype(float), "phantoms", "negative"),
        (np.zeros((50, 36)), "phantoms", "empty scan"),
        (np.full((50, 36), np.nan), "phantoms", "NaN"),
        (np.array([["a"] * 36] * 50), "phantoms", "expected numbers"),
        (np.array([[{}] * 36] * 50, dtype=object), "phantoms", "plain arrays"),
    ):
        with pytest.raises(ValueError, match=message):
            load_phantoms(phantom_file(array, "bad.npz", key), slices=25)
    (tmp_path / "text.npz").write_text("not a zip")
    with pytest.raises(ValueError, match="npz"):
        load_phantoms(tmp_path / "text.npz")
    with pytest.raises(FileNotFoundError):
        load_phantoms(tmp_path / "missing.npz")


# --- BrainWeb


def head(shape=(20, 24, 22)) -> np.ndarray:
    """Nested boxes of skin, skull, CSF, grey and white matter, open at the front; labels (z, y, x), y to anterior."""
    labels = np.zeros(shape, np.uint8)
    for inset, label in ((1, 6), (2, 7), (3, 1), (4, 2), (6, 3)):
        labels[tuple(slice(inset, n - inset) for n in shape)] = label
    labels[:, -4:] = 0
    return labels


def write_minc(path, labels, scale=1.0):
    """A MINC 2 label volume of 0.5 mm voxels."""
    with h5py.File(path, "w") as file:
        root = file.create_group("minc-2.0")
        dimensions = root.create_group("dimensions")
        for name, length, start in zip(("zspace", "yspace", "xspace"), labels.shape, (-5.0, -6.0, -5.5), strict=True):
            axis = dimensions.create_dataset(name, data=0)
            axis.attrs.update({"step": 0.5, "start": start, "length": length, "spacing": np.bytes_("regular__")})
            direction = np.zeros(3)
            direction["zyx"[::-1].index(name[0])] = 1
            axis.attrs["direction_cosines"] = direction
        group = root.create_group("image/0")
        image = group.create_dataset("image", data=labels)
        image.attrs.update({"dimorder": np.bytes_("zspace,yspace,xspace"), "valid_range": np.array([0.0, 255.0])})
        low = group.create_dataset("image-min", data=np.float64(0.0))
        high = group.create_dataset("image-max", data=np.float64(255.0 * scale))
        for value in (low, high):
            value.attrs["dimorder"] = np.bytes_("")


def test_brainweb_minc(tmp_path):
    write_minc(tmp_path / "subject.mnc", head())
    volume = load_brainweb(tmp_path / "subject.mnc")
    np.testing.assert_array_equal(volume.array, head()[:, ::-1])  # anterior rows first
    assert volume.voxel_mm == pytest.approx((0.5, 0.5, 0.5))
    np.testing.assert_allclose(volume.affine @ [0, 0, 0, 1], [-5.5, -6.0 + 23 * 0.5, -5.0, 1])
    write_minc(tmp_path / "fuzzy.mnc", head(), scale=0.3)
    with pytest.raises(ValueError, match="discrete"):
        load_brainweb(tmp_path / "fuzzy.mnc")
    (tmp_path / "broken.mnc").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="MINC"):
        load_brainweb(tmp_path / "broken.mnc")
    with pytest.raises(ValueError, match=".raws"):
        load_brainweb(save_nifti(tmp_path / "x.nii", head(), voxel_mm=1.0))


def test_brainweb_raw(tmp_path, monkeypatch):
    monkeypatch.setattr(others, "BRAINWEB_SHAPE", head().shape)
    shorts = (head().astype("<u2") * 16 + 1).tobytes()
    (tmp_path / "subject04.raws.gz").write_bytes(gzip.compress(shorts))
    (tmp_path / "subject04.rawb").write_bytes(head().tobytes())
    for name in ("subject04.raws.gz", "subject04.rawb"):
        np.testing.assert_array_equal(load_brainweb(tmp_path / name).array, head()[:, ::-1])
    (tmp_path / "short.raws").write_bytes(shorts[:-2])
    with pytest.raises(ValueError, match="bytes"):
        load_brainweb(tmp_path / "short.raws")
    (tmp_path / "strange.rawb").write_bytes(bytes([255]) * head().size)
    with pytest.raises(ValueError, match="labels"):
        load_brainweb(tmp_path / "strange.rawb")


def test_activity_of_brainweb_labels():
    labels = np.zeros((20, 24, 20), np.uint8)  # narrower than long: zeros are added on both sides
    labels[:, 4:20, 2:16] = 2
    labels[:, 8:16, 6:12] = 3
    one = activity_from_labels(Volume(labels, np.diag([0.5, 0.5, 0.5, 1.0])), size=12)
    assert one.image.shape == (10, 12, 12) and one.pixel_mm == 1.0
    assert one.image.unique().tolist() == [0.0, 5.5, 22.0]
    assert one.image.sum().item() == pytest.approx(pet.UPTAKE["grey"] * 560 - 16.5 * 120)  # voxels of 1 mm
    assert one.mu.max().item() == pytest.approx(pet.MU_WATER) and one.slices().shape == (10, 1, 12, 12)
    assert set(one.labels.unique().tolist()) == {0, 2, 3}


# --- NIfTI


def test_nifti_activity(tmp_path):
    array = np.random.default_rng(0).random((3, 5, 4)).astype(np.float32) * 1e4
    path = save_nifti(tmp_path / "pet.nii.gz", array, voxel_mm=(3.0, 2.0, 2.0))
    one = load_activity(path, units="Bq/mL")
    np.testing.assert_allclose(one.image.numpy(), array[:, ::-1] / 1000, rtol=1e-6)  # the nose up
    assert one.pixel_mm == 2.0
    np.testing.assert_allclose(load_activity(path, "SUV", kbq_per_suv=1e-3).image, one.image, rtol=1e-6)
    with pytest.raises(ValueError, match="came without"):
        one.slices("labels")
    with pytest.raises(ValueError, match="kbq_per_suv"):
        load_activity(path, units="SUV")
    with pytest.raises(ValueError, match="not said, and are not guessed"):
        load_activity(path, units="")
    for bad, voxel, message in (
        (array - 5e3, 2.0, "negative"),
        (array, (1.0, 2.0, 3.0), "square"),
        (0 * array, 2.0, "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            load_activity(save_nifti(tmp_path / "bad.nii", bad, voxel_mm=voxel), "kBq/mL")


def test_numbers_that_are_no_activity_of_a_person_are_refused(tmp_path):
    array = np.random.default_rng(0).random((3, 5, 4)).astype(np.float32) * 40
    array[0, 0, 0] = -1e-3  # rounding
    path = save_nifti(tmp_path / "pet.nii.gz", array, voxel_mm=2.0)
    assert load_activity(path, "kBq/mL").image.min() == 0
    for units, words in (("Bq/mL", "less than a scan"), ("MBq/mL", "more than any tissue"), ("SUV", "and kbq_per_suv")):
        with pytest.raises(ValueError, match=words):
            load_activity(path, units, kbq_per_suv=1e3)
    assert load_activity(path, "relative").image.max() == array.max()


def test_of_a_folder_only_what_is_activity_is_taken(tmp_path):
    array = np.random.default_rng(0).random((2, 16, 16)).astype(np.float32) * 4e4
    for name, said in (("1_pet", "BQML"), ("2_tof", "Bq/ml"), ("3_pet", "CNTS"), ("1_T1w", "Bq/mL"), ("1_ct", "Bq/mL")):
        save_nifti(tmp_path / f"sub-{name}.nii.gz", array, voxel_mm=2.0)
        (tmp_path / f"sub-{name}.json").write_text(f'{{"Units": "{said}"}}')
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    for name, done in (("sub-4/ac", ["ATTN", "DECY"]), ("sub-4/nac", ["DECY"])):
        for file in write_dicom(tmp_path / name, array, affine, name, units="Bq/mL", modality="PT"):
            d = pydicom.dcmread(file)
            d.CorrectedImage = done
            d.save_as(file)
    skipped = {}
    people = list(read_people(tmp_path, 9, 2, 16, skipped=skipped, units="Bq/mL"))
    assert len(people) == 3 and all(one.image.max() == pytest.approx(40, rel=0.01) for one in people)
    why = {name.removesuffix(".nii.gz").removesuffix("/IM0001.dcm"): reason for name, reason in skipped.items()}
    assert "shows no activity" in why["sub-1_T1w"] and "shows no activity" in why["sub-1_ct"]
    assert "says counts" in why["sub-3_pet"] and "not corrected for attenuation" in why["sub-4/nac"]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "RPI", "PIR", "SRA"])
def test_volumes_of_any_orientation_become_upright(codes):
    """The nose, the right hand and the crown are where `anatomy` has them, and every voxel keeps its place."""
    shape = (6, 7, 8)  # along the axes of the file, x first
    affine = inv_ornt_aff(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes)), shape)
    affine = np.diag([2.0, 2.0, 2.0, 1.0]) @ affine
    place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    for axis, (start, end) in enumerate(((0, -1), (-1, 0), (0, -1))):  # x to the right, rows from the nose, z upwards
        turned = slicing.turned(Volume(np.ascontiguousarray(place[..., axis].T), affine), "axial")
        index = [slice(None)] * 3
        first, last = ((*index[: 2 - axis], end_, *index[3 - axis :]) for end_ in (start, end))
        assert turned.array[first].max() < turned.array[last].min()
        z, y, x = np.indices(turned.array.shape)
        np.testing.assert_allclose(
            turned.affine[axis, 0] * x
            + turned.affine[axis, 1] * y
            + turned.affine[axis, 2] * z
            + turned.affine[axis, 3],
            turned.array,
        )
