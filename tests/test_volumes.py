"""Volumes of different files and of virtual people on one grid and one intensity scale."""

import nibabel
import numpy as np
import pytest
import torch

from companion.data import anatomy, volumes
from companion.data.nifti import Volume, save_nifti
from companion.data.patients import anatomies


def ball(shape=(40, 50, 44), radius=14.0, centre=(20, 24, 21)):
    """A smooth ball, brighter to its left, on background 0; and its mask."""
    at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) - np.array(centre)
    mask = np.linalg.norm(at, axis=-1) < radius
    return (mask * (100 + 2.0 * at[..., 2] + at[..., 0])).astype(np.float32), mask


def head(tmp_path, name="sub-01_T1w", shape=(40, 50, 44), mm=4.0, mask="_mask", **options):
    array, inside = ball(shape)
    save_nifti(tmp_path / f"{name}.nii.gz", array, **(options or {"voxel_mm": mm}))
    if mask:
        save_nifti(tmp_path / f"{name}{mask}.nii.gz", inside, **(options or {"voxel_mm": mm}))
    return array


# --- scale and grid


def test_percentile_scale_ignores_the_background_and_a_few_bright_voxels():
    array, mask = ball()
    scaled, scale = volumes.normalise_percentile(array, mask)
    assert np.percentile(scaled[mask], 99.5) == pytest.approx(1, abs=1e-5) and not scaled[~mask].any()
    np.testing.assert_allclose(scaled[mask] * scale, array[mask], rtol=1e-5)
    bright = array.copy()
    bright[20, 24, 21] = 1e5
    again, other = volumes.normalise_percentile(bright, mask)
    assert other == pytest.approx(scale, rel=1e-3) and again.max() == np.float32(volumes.CEILING)


@pytest.mark.parametrize(
    "case, message",
    [
        ("empty", "mask is empty"),
        ("nan", "1 voxels are NaN"),
        ("other", "they must agree"),
        ("dark", "no positive signal"),
    ],
)
def test_unusable_volumes_are_refused(case, message):
    array, mask = ball()
    if case == "nan":
        array[20, 20, 20] = np.nan
    mask = {"empty": mask & False, "other": mask[1:]}.get(case, mask)
    with pytest.raises(ValueError, match=message):
        volumes.normalise_percentile(array * (case != "dark"), mask)


@pytest.mark.parametrize("voxel_mm", [(3.0, 3.0, 3.0), (2.5, 1.0, 1.0)])
def test_resampling_keeps_positions_in_the_world(voxel_mm):
    """A linear ramp over world coordinates stays that ramp on any grid, also from an oblique one."""
    turn, _ = np.linalg.qr(np.array([[1.0, 0.2, 0.1], [-0.2, 1.0, 0.05], [-0.1, 0.0, 1.0]]))
    old = np.eye(4)
    old[:3, :3], old[:3, 3] = turn * np.array([1.0, 1.2, 0.8]), (-30.0, -20.0, -25.0)
    shape, coefficients = (70, 60, 64), np.array([0.3, -0.2, 0.5])

    def ramp(affine, size):
        index = np.stack(np.meshgrid(*map(np.arange, size[::-1]), indexing="ij"), -1)  # (x, y, z)
        return ((index @ affine[:3, :3].T + affine[:3, 3]) @ coefficients).transpose(2, 1, 0)

    middle = old[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2) + old[:3, 3]
    new = volumes.grid_affine((7, 9, 5), voxel_mm, middle)
    out = volumes.resample(Volume(ramp(old, shape).astype(np.float32), old), new, (7, 9, 5))
    np.testing.assert_allclose(out, ramp(new, (7, 9, 5)), atol=2e-3)
    assert (np.linalg.norm(new[:3, :3], axis=0)[::-1] == voxel_mm).all()


def test_resampling_to_larger_voxels_does_not_alias():
    """Stripes of two voxels vanish when voxels become four times larger."""
    stripes = np.zeros((8, 8, 64), np.float32)
    stripes[..., ::2] = 1
    old, new = (volumes.grid_affine((8, 8, n), (1, 1, mm), (0, 0, 0)) for n, mm in ((64, 1), (12, 4)))
    out = volumes.resample(Volume(stripes, old), new, (8, 8, 12))
    assert np.abs(out[2:-2, 2:-2] - 0.5).max() < 0.02


# --- files


def test_nfbs_and_cc359_layouts_are_found(tmp_path):
    nfbs = "NFBS/A00028185/sub-A00028185_ses-NFB3_T1w"
    cc = ("Original/CC0001_philips_15_55_M", "Silver-standard-machine-learning/CC0001_philips_15_55_M_ss",
          "Original/CC0300_ge_3_41_F", "Silver-standard-STAPLE/CC0300_ge_3_41_F_staple")  # fmt: skip
    for name in (*(nfbs + end for end in ("", "_brain", "_brainmask")), *(f"CC359/{part}" for part in cc)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        head(tmp_path, name, (4, 5, 6), mask="")
    (one,) = volumes.find_scans(tmp_path / "NFBS")
    assert one.subject == "sub-A00028185" and one.image.name.endswith("_T1w.nii.gz")
    assert one.mask.name.endswith("_brainmask.nii.gz")
    first, second = volumes.find_scans(tmp_path / "CC359")
    assert first.about == {"age": 55, "sex": "M", "vendor": "philips", "tesla": 1.5} and first.subject == "CC0001"
    assert first.mask.name.endswith("_ss.nii.gz") and second.mask.name.endswith("_staple.nii.gz")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        volumes.find_scans(tmp_path / "nothing")


def test_files_of_one_name_in_many_folders_are_different_people(tmp_path):
    for person in ("anna", "bert"):
        (tmp_path / person).mkdir()
        head(tmp_path / person, "t1", (4, 5, 6))
    scans = volumes.find_scans(tmp_path)
    assert [scan.subject for scan in scans] == ["anna", "bert"]
    assert all(scan.mask.parent == scan.image.parent for scan in scans)


def test_a_volume_and_its_stripped_copy_are_one_scan(tmp_path):
    for name in ("s1/T1w_restore", "s1/T1w_restore_brain", "s2/T1w_restore", "s2/T1w_restore_brain"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        head(tmp_path, name, (4, 5, 6), mask="_mask" if name == "s1/T1w_restore" else "")
    scans = volumes.find_scans(tmp_path)
    assert [scan.name for scan in scans] == ["s1/T1w_restore.nii.gz", "s2/T1w_restore_brain.nii.gz"]
    assert all("the same scan as" in why for why in scans.left.values()) and len(scans.left) == 2


def test_of_several_contrasts_t1w_is_taken_unless_another_is_asked_for(tmp_path):
    for name in ("sub-1_T1w", "sub-1_T2w", "sub-2_T1w", "sub-2_FLAIR"):
        head(tmp_path, name, (4, 5, 6), mask="")
    scans = volumes.find_scans(tmp_path)
    assert [s.name for s in scans] == ["sub-1_T1w.nii.gz", "sub-2_T1w.nii.gz"]
    assert scans.left["sub-1_T2w.nii.gz"] == "T2w, T1w is used"
    assert [s.name for s in volumes.find_scans(tmp_path, "FLAIR")] == ["sub-2_FLAIR.nii.gz"]
    with pytest.raises(ValueError, match="no PDw there"):
        volumes.find_scans(tmp_path, "PDw")


def test_complex_volumes_are_read_as_magnitudes_and_label_maps_refused(tmp_path):
    array, mask = ball()
    turned = array * np.exp(1j * np.linspace(-3, 3, array.shape[0]))[:, None, None]
    save_nifti(tmp_path / "a.nii.gz", array, voxel_mm=4.0)
    save_nifti(tmp_path / "b.nii.gz", turned.astype(np.complex64), voxel_mm=4.0)
    plain, other = (
        volumes.load_scan(volumes.Scan("s", tmp_path / n), (24,) * 3, (8.0,) * 3)[0].array
        for n in ("a.nii.gz", "b.nii.gz")
    )
    np.testing.assert_allclose(plain, other, atol=1e-5)
    for values, kind in ((mask, "a mask"), (mask.astype(int) + 1 * (array > 120), "a label map")):
        save_nifti(tmp_path / "c.nii.gz", values.astype(np.uint8), voxel_mm=4.0)
        with pytest.raises(ValueError, match=kind):
            volumes.load_scan(volumes.Scan("s", tmp_path / "c.nii.gz"), (24,) * 3, (8.0,) * 3)


def test_a_scan_comes_to_the_grid_around_its_brain(tmp_path):
    array = head(tmp_path)
    (scan,) = volumes.find_scans(tmp_path)
    volume, scale = volumes.load_scan(scan, (33, 31, 35), (5.0, 5.0, 5.0))
    assert volume.array.shape == (33, 31, 35) and volume.voxel_mm == (5.0, 5.0, 5.0)
    assert scale == pytest.approx(np.percentile(array[array > 0], 99.5), rel=1e-3)
    z, y, x = (
        np.average(np.arange(n), weights=volume.array.sum(axes))
        for n, axes in zip(volume.array.shape, [(1, 2), (0, 2), (0, 1)], strict=True)
    )
    where = volume.affine @ (x, y, z, 1)
    stored = nibabel.load(scan.image)
    old = stored.affine @ (
        *[
            np.average(np.arange(n), weights=array.sum(axes))
            for n, axes in zip(array.shape[::-1], [(0, 1), (0, 2), (1, 2)], strict=True)
        ],
        1,
    )
    np.testing.assert_allclose(where, old, atol=0.2)  # mm: the same place in the same world


@pytest.mark.parametrize(
    "case, message",
    [
        ("metres", "no head"),
        ("4d", "4D"),
        ("small grid", "the brain measures"),
        ("no affine", "has no affine"),
        ("mask elsewhere", "must lie on the grid"),
        ("no mask", "brain is not marked"),
        ("sheared", "sheared"),
    ],
)
def test_files_that_cannot_be_right_are_refused(tmp_path, case, message):
    shape, grid = (40, 50, 44), (32, 32, 32)
    affine = volumes.grid_affine(shape, (4, 4, 4), (0, 0, 0))
    if case == "metres":
        affine[:3] /= 1000
    if case == "sheared":
        affine[0, 1] = 3.0
    array, mask = ball(shape)
    path = tmp_path / "one_T1w.nii.gz"
    save_nifti(path, array + (case == "no mask"), affine=affine)
    if case == "4d":
        nibabel.save(nibabel.Nifti1Image(np.stack([array] * 2, -1), affine), path)
    if case == "no affine":
        image = nibabel.Nifti1Image(array, None)
        image.header.set_sform(None, 0)
        nibabel.save(image, path)
    if case == "mask elsewhere":
        save_nifti(tmp_path / "one_T1w_mask.nii.gz", mask, affine=affine + np.diag([0, 0, 0, 0]) + 3 * np.eye(4, k=3))
    with pytest.raises(ValueError, match=message):
        (scan,) = volumes.find_scans(tmp_path)
        volumes.load_scan(scan, (8, 8, 8) if case == "small grid" else grid, (4.0, 4.0, 4.0))


def test_the_brain_of_a_whole_head_is_found_when_asked_for(tmp_path):
    grid = np.stack(np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * 4 for n in (48, 58, 52)], indexing="ij"))
    away = np.sqrt((grid[0] / 72) ** 2 + (grid[1] / 88) ** 2 + (grid[2] / 70) ** 2)
    head = np.select([away < 0.15, away < 0.7, away < 1.0, away < 1.1, away < 1.25], [0.3, 1.0, 0.7, 0.05, 1.1], 0.0)
    head = head + 0.01 * np.random.default_rng(0).random(head.shape) + 0.001
    save_nifti(tmp_path / "sub-1_T1w.nii.gz", head, voxel_mm=4.0)
    save_nifti(tmp_path / "sub-2_FLAIR.nii.gz", head, voxel_mm=4.0)
    save_nifti(tmp_path / "sub-3_T1w.nii.gz", np.random.default_rng(0).random(head.shape) + 1, voxel_mm=4.0)
    scan = {path.name: volumes.Scan("s", path) for path in tmp_path.glob("*.nii.gz")}
    with pytest.raises(ValueError, match="strip=True"):
        volumes.load_scan(scan["sub-1_T1w.nii.gz"], (64,) * 3, (3.0,) * 3)
    found, _ = volumes.load_scan(scan["sub-1_T1w.nii.gz"], (64,) * 3, (3.0,) * 3, strip=True)
    brain = (found.array > 0.5).sum() * 0.027
    assert brain == pytest.approx(4 / 3 * np.pi * 7.2 * 8.8 * 7.0, rel=0.1), "not the scalp, mL"
    for name, match in (("sub-2_FLAIR.nii.gz", "T1w heads only, this is FLAIR"), ("sub-3_T1w.nii.gz", "give a mask")):
        with pytest.raises(ValueError, match=match):
            volumes.load_scan(scan[name], (64,) * 3, (3.0,) * 3, strip=True)


# --- the embedded cohort


@pytest.mark.parametrize("shape", [(64, 64, 64), (64, 96, 96)])
def test_virtual_heads_fit_their_grid_and_know_where_they_are(shape):
    person = volumes.virtual(anatomy.cohort("validation", 1)[0], shape)
    inside = person.image > 0
    for axis in range(3):
        ends = inside.movedim(axis, 0)[[0, -1]]
        assert not ends.any(), "the brain touches the border"
    assert 0.99 < torch.quantile(person.image[inside], 0.995) < 1.01
    voxel = np.prod(volumes.spacing(shape)) / 1000
    filled = inside.sum().item() * voxel  # counts partly filled voxels whole
    assert person.tissue_ml.sum() == pytest.approx(filled, rel=0.15)
    assert 1200 < person.tissue_ml.sum() < 2200  # mL
    centre = person.affine @ (*(np.array(shape[::-1]) - 1) / 2, 1)
    np.testing.assert_allclose(centre[:3], anatomy.CENTRE_MM, atol=1e-4)


def test_patients_differ_in_size_age_and_pose():
    (icbm,), shape = anatomies(None, "train", 6.0), (32, 32, 32)
    people = [volumes.patient(icbm, one, shape) for one in anatomy.cohort("train", 12)]
    healthy = [volumes.virtual(one, shape) for one in anatomy.cohort("train", 12)]
    assert torch.equal(people[5].image, volumes.patient(icbm, anatomy.Subject(5), shape).image)
    brain, usual = (torch.stack([one.tissue_ml for one in some]) for some in (people, healthy))
    assert 1200 < brain.sum(1).mean() < usual.sum(1).mean()
    share, same = (ml[:, 0] / ml.sum(1) for ml in (brain, usual))
    assert share.std() > 2 * same.std(), "some are older than others"
    top = [
        volumes.patient(icbm, one, shape).image.sum((1, 2)).gt(0).nonzero().max() for one in anatomy.cohort("test", 9)
    ]
    assert len({int(row) for row in top}) > 2
    for one in people:
        inside = one.image > 0
        assert 0.97 < torch.quantile(one.image[inside], 0.995) < 1.03
