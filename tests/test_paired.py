"""Paired contrasts: what comes back is on the source's grid, misfits are seen, and errors name the culprit."""

import json
from dataclasses import asdict

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, rotate

from companion.data.alignment import alignment, grid_distance_mm, resample
from companion.data.cohort import LAYOUTS, find_contrasts, find_subjects
from companion.data.intake.splits import split_people
from companion.data.intensity import Scale, ct_window, percentile_scale, scaled
from companion.data.nifti import Volume, centred_affine, load_nifti, save_nifti
from companion.data.paired import SlicePairs, prepare, read_subject, stored_scale, stored_slicing
from companion.data.slicing import PLANES, Slicing, cut_file, read_image, save_translation
from companion.data.store import open_dataset

SHAPE = (9, 23, 17)  # odd everywhere


def oblique(mm=(1.1, 0.9, 3.0), turn=(0.2, -0.3, 0.15)):
    """An affine, (x, y, z) to mm, of voxels `mm` turned by angles about all three axes."""
    matrix = np.eye(3)
    for axis, angle in enumerate(turn):
        c, s, (i, j) = np.cos(angle), np.sin(angle), [k for k in range(3) if k != axis]
        step = np.eye(3)
        step[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
        matrix = matrix @ step
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix * mm, (-11.0, 7.0, 30.0)
    return affine


def head(shape=SHAPE, seed=0):
    """Smooth structure inside an ellipse, positive there and 0 around it."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    inside = grid[-1] ** 2 + grid[-2] ** 2 < 0.8
    texture = gaussian_filter(rng.standard_normal(shape), 1.2)
    return np.where(inside, 60 + 400 * (texture - texture.min()), 0).astype(np.float32)


def other_contrast(image):
    """A contrast in which the order of the tissues is another one."""
    return np.where(image > 0, 300 + 200 * np.sin(image / 40), 0).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- intensity


def test_scale_can_be_undone_and_says_what_it_clipped():
    image = head()
    values, scale = scaled(image)
    assert values.dtype == np.float32 and values.min() == 0 and values.max() == 1
    inside = (image >= scale.low) & (image <= scale.high)
    assert np.allclose(scale.undo(values)[inside], image[inside], atol=1e-3)
    assert scale.clipped(image) == pytest.approx(1 - inside.mean()) and 0 < scale.clipped(image) < 0.02
    x = torch.tensor([-500.0, -160.0, 40.0, 240.0, 900.0])
    window = ct_window(40, 400)
    assert window.apply(x).tolist() == [0, 0, 0.5, 1, 1] and window.units == "HU"


def test_air_around_a_head_does_not_change_its_brightness():
    image = head((5, 40, 40))
    padded = np.pad(image, ((0, 0), (30, 30), (30, 30)))
    assert percentile_scale(padded).high == pytest.approx(percentile_scale(image).high, rel=0.03)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (np.full((4, 4), 3.0), "constant, 3.0"),
        (np.array([[0.0, np.nan], [1, 2]]), "1 NaN"),
        (np.ones((2, 2), complex), "real numbers"),
    ],
)
def test_images_nothing_can_be_done_with(bad, match):
    with pytest.raises(ValueError, match=match):
        scaled(bad)


def test_a_window_that_shows_nothing():
    with pytest.raises(ValueError, match="rescale intercept"):
        scaled(np.linspace(900, 2000, 50).reshape(5, 10), ct_window())
    with pytest.raises(ValueError, match="low < high"):
        Scale(1.0, 1.0)


# ------------------------------------------------------------------------------------------ slices and the way back


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_slices_come_back_exactly_where_nothing_was_resampled(plane, order):
    affine = oblique((1.0, 1.0, 1.0))[:, [*order, 3]]  # the file's axes in another order
    affine[:3, 0] *= -1
    volume = Volume(np.random.default_rng(0).random(SHAPE).astype(np.float32), affine)
    slicing = Slicing.of(volume, (31, 28), pixel_mm=1.0, plane=plane)
    slices = slicing.cut(volume.array)
    assert slices.shape == (slicing.oriented[0], 1, 31, 28)
    assert np.array_equal(slicing.assemble(slices), volume.array)
    directions = nibabel.aff2axcodes(slicing.canvas_affine)
    assert "".join(directions[::-1]) == PLANES[plane]  # axial: the nose up, whatever the file's order
    # The affine of the canvas says where its pixels are: every voxel is found at its place in mm.
    position = slicing.canvas_affine @ np.array([15, 14, 4, 1])
    x, y, z = np.rint(np.linalg.inv(affine) @ position).astype(int)[:3]
    assert slices[4, 0, 14, 15] == volume.array[z, y, x]


def test_resampled_canvas_keeps_positions():
    affine = oblique()
    shape = (5, 37, 29)
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    world = (affine @ np.stack([x, y, z, np.ones_like(x)]).reshape(4, -1)).reshape(4, *shape)
    volume = Volume(world[0].astype(np.float32), affine)  # an image whose values are its positions
    slicing = Slicing.of(volume, (20, 20))
    slices, at = slicing.cut(volume.array), slicing.canvas_affine
    assert slicing.inner[0] < 37 and "resampled" in str(slicing) and "zeros added" in str(slicing)
    for k, i, j in ((0, 10, 10), (3, 6, 9), (4, 14, 12)):
        assert float(slices[k, 0, i, j]) == pytest.approx((at @ [j, i, k, 1])[0], abs=0.05)
    back = slicing.assemble(slices)
    assert np.allclose(back[:, 4:-4, 4:-4], volume.array[:, 4:-4, 4:-4], atol=0.05)


def test_cropped_margin_is_filled_and_told():
    volume = Volume(head() + 1, oblique((1.0, 1.0, 3.0)))
    slicing = Slicing.of(volume, (16, 12), pixel_mm=1.0)
    back = slicing.assemble(slicing.cut(volume.array), fill=-7.0)
    kept = back != -7
    assert "7 rows cropped" in str(slicing) and "5 columns cropped" in str(slicing)
    assert np.array_equal(back[kept], volume.array[kept]) and kept.sum() == 9 * 16 * 12


def test_translation_is_written_with_shape_and_affine_of_the_source(tmp_path):
    affine = oblique()
    save_nifti(tmp_path / "source.nii.gz", head(), affine=affine)
    cut = cut_file(tmp_path / "source.nii.gz", size=(32, 32))
    assert cut.slices.shape == (9, 1, 32, 32) and 0 <= cut.slices.min() and cut.slices.max() <= 1
    path = save_translation(tmp_path / "out.nii.gz", 1 - cut.slices, cut.slicing, ct_window())
    got = load_nifti(path)
    assert got.array.shape == SHAPE and np.allclose(got.affine, affine, atol=1e-5)
    expected = ct_window().undo(1 - scaled(head())[0])
    assert np.abs(got.array - expected).mean() < 0.05 * 400
    with pytest.raises(ValueError, match="of the whole volume"):
        save_translation(path, cut.slices[1:], cut.slicing, cut.scale)
    with pytest.raises(ValueError, match="NaN"):
        save_translation(path, cut.slices * torch.nan, cut.slicing, cut.scale)
    with pytest.raises(ValueError, match="make another"):
        cut.slicing.cut(np.zeros((2, 3, 4)))


def test_labels_do_not_mix():
    labels = (head() > 150).astype(np.uint8) * 3
    slicing = Slicing.of(Volume(labels, oblique()), (50, 50))
    cut = slicing.cut(labels, nearest=True)
    assert set(cut.unique().tolist()) == {0, 3}
    assert np.array_equal(slicing.assemble(cut, nearest=True), labels)


# ---------------------------------------------------------------------------------------------- geometry and alignment


def test_resampling_follows_the_affines():
    fine = Volume(head((20, 24, 22)), oblique((1.0, 1.0, 1.0)))
    shifted = fine.affine @ np.array([[1, 0, 0, 2], [0, 1, 0, -1], [0, 0, 1, 3], [0, 0, 0, 1]])
    moved = resample(fine, Volume(np.zeros((10, 12, 14)), shifted))
    assert np.allclose(moved.array[:, 1:], fine.array[3:13, 0:11, 2:16], atol=1e-2)
    assert not moved.array[:, 0].any()  # outside: air
    with pytest.raises(ValueError, match="do not overlap"):
        resample(fine, Volume(np.zeros((4, 4, 4)), centred_affine((4, 4, 4), 1.0) + 500 * np.eye(4, k=3)))


def test_grids_are_compared_in_mm():
    a = Volume(np.zeros(SHAPE), oblique())
    nudged = a.affine.copy()
    nudged[0, 3] += 0.4
    assert grid_distance_mm(a, Volume(a.array, nudged)) == pytest.approx(0.4)
    assert grid_distance_mm(a, Volume(np.zeros((9, 23, 16)), a.affine)) == np.inf


@pytest.mark.parametrize("shift", [(0, 0, 0), (0, 2, 0), (0, 0, -1), (1, 0, 0), (0, 1, -2)])
def test_alignment_measures_the_shift_between_contrasts(shift):
    big = head((14, 48, 44), seed=3)
    a, b = big, other_contrast(np.roll(big, shift, (0, 1, 2)))
    fit = alignment(a, b)
    # The second image must move back by what it was moved.
    assert np.allclose(fit.shift, [-s for s in shift], atol=0.5)
    assert (fit.distance > 0.75) == any(shift) and (fit.best > fit.information) == any(shift)


def test_alignment_sees_rotations_and_neighbouring_slices():
    rng = np.random.default_rng(0)
    a = head((6, 110, 100), seed=2)
    b = other_contrast(a)
    noisy = [np.hypot(x + 0.05 * x.max() * rng.standard_normal(x.shape), 0.05 * x.max()) for x in (a, b)]
    assert alignment(*noisy).distance < 0.5
    turned = alignment(a, rotate(b, 4, axes=(1, 2), reshape=False, order=1))
    assert turned.local > 1 and max(map(abs, turned.shift)) < 0.5
    # With reach for one slice only, a whole slice is the end of the reach.
    assert alignment(a[1:], b[:-1]).distance == np.inf


def test_alignment_flags_the_far_and_the_unrelated():
    a = head((40, 40), seed=1)
    far = alignment(a, other_contrast(np.roll(a, 9, 1)))
    assert far.distance > 1
    with pytest.raises(ValueError, match="one shape"):
        alignment(a, a[1:])
    with pytest.raises(ValueError, match="second image: constant"):
        alignment(a, np.ones_like(a))


# ------------------------------------------------------------------------------------------------- subjects and splits


def ixi(folder, subjects=4, shift=0, affines=True):
    """A folder like IXI: PD and T1 of each; T1 on a grid of its own unless `affines` is False."""
    for i in range(subjects):
        pd = head((9, 40, 32), seed=i)
        name = f"IXI{i + 8:03d}-Guys-{i + 700:04d}"
        affine = oblique((1.0, 1.0, 3.0), (0.05, 0.02, -0.03))
        t1 = np.roll(other_contrast(pd), shift if i == 1 else 0, 2)
        if affines:  # stored with x reversed, a margin added: the same world
            t1 = np.pad(t1, ((1, 1), (2, 0), (0, 3)))[:, :, ::-1]
            affine1 = affine @ np.array([[-1, 0, 0, 34], [0, 1, 0, -2], [0, 0, 1, -1], [0, 0, 0, 1]])
        for contrast, array, where in (("PD", pd, affine), ("T1", t1, affine1 if affines else affine)):
            (folder / f"IXI-{contrast}").mkdir(parents=True, exist_ok=True)
            save_nifti(folder / f"IXI-{contrast}" / f"{name}-{contrast}.nii.gz", array, affine=where)
    return {c: LAYOUTS["IXI"][c] for c in ("T1", "PD")}


def test_prepare_writes_pairs_split_by_subject(tmp_path):
    patterns = ixi(tmp_path / "IXI")
    cohort = find_subjects(tmp_path / "IXI", patterns)
    assert list(cohort.files)[0] == "IXI008-Guys-0700" and len(cohort.files) == 4
    with pytest.raises(ValueError, match="different grids: shapes .* reference='T1'"):
        read_subject(next(iter(cohort.files.values())))
    split = split_people(cohort.files, (0.5, 0.25, 0.25), seed=1)
    data = prepare(
        tmp_path / "ixi.h5",
        cohort,
        contrasts=("PD", "T1"),
        reference="PD",
        per_subject=3,
        size=(32, 32),
        split=split,
        scales={"T1": Scale(0.0, 600.0)},
    )
    assert data.shapes["T1"] == (4, 3, 1, 32, 32) and len(data.slices(("PD", "T1"), "train")) == 6
    subject = split["test"][0]
    pd, t1 = data.slices(("PD", "T1"), "test")[0]
    assert pd.shape == t1.shape == (1, 32, 32) and alignment(pd[0].numpy(), t1[0].numpy()).distance < 0.5
    # What was stored leads back to the file.
    slicing, positions = stored_slicing(open_dataset(data.path), subject)
    again = slicing.cut(scaled(load_nifti(cohort.files[subject]["PD"]).array, stored_scale(data, "PD", subject))[0])
    assert torch.allclose(again[positions], torch.from_numpy(data.read("PD", "test")[0]), atol=1e-6)
    assert Slicing(**json.loads(json.dumps(asdict(slicing)))) == slicing
    assert stored_scale(data, "T1") == Scale(0.0, 600.0)
    with pytest.raises(ValueError, match="no subject can be used.*smaller per_subject"):
        prepare(tmp_path / "no.h5", cohort, contrasts=("PD",), per_subject=30, split=split)
    with pytest.raises(ValueError, match="no scale of 'FLAIR'"):
        stored_scale(data, "FLAIR")


def test_prepare_names_the_misregistered_subject_and_keeps_labels(tmp_path):
    ixi(tmp_path, subjects=3, shift=3, affines=False)
    for path in (tmp_path / "IXI-PD").iterdir():
        pd = load_nifti(path)
        save_nifti(tmp_path / path.name.replace("-PD", "-seg"), (pd.array > 150).astype(np.uint8), affine=pd.affine)
    cohort = find_subjects(tmp_path, {"T1": "{subject}-T1", "PD": "IXI-PD/{subject}-PD", "seg": "{subject}-seg"})
    options = {"contrasts": ("PD", "T1"), "per_subject": 2, "size": (40, 40), "labels": "seg"}
    with pytest.raises(ValueError, match="1 of 3 pairs do not fit PD: IXI009-Guys-0701: T1 shifted by") as caught:
        prepare(tmp_path / "no.h5", cohort, split={"test": []}, **options)
    assert "-3.0 pixels or more" in str(caught.value) and not (tmp_path / "no.h5").exists()
    rest = cohort.without({"IXI009-Guys-0701": "shifted"})
    data = prepare(tmp_path / "yes.h5", rest, split={"train": list(rest.files)}, **options)
    assert data.attrs["left_out"] == {"IXI009-Guys-0701": "shifted"}
    assert data.read("labels").dtype == np.uint8 and set(np.unique(data.read("labels"))) == {0, 1}


def test_missing_contrasts_are_named(tmp_path):
    patterns = ixi(tmp_path, affines=False)
    next((tmp_path / "IXI-T1").glob("IXI010*")).unlink()
    with pytest.raises(ValueError, match=r"1 of 4 subjects lack a contrast: IXI010-Guys-0702 \(no T1\)"):
        find_subjects(tmp_path, patterns)
    assert find_subjects(tmp_path, patterns, complete_only=True).left_out == {"IXI010-Guys-0702": "no T1"}
    with pytest.raises(ValueError, match="no FLAIR, expected files like .*there is IXI-PD/IXI008"):
        find_subjects(tmp_path, {"FLAIR": "{subject}-FLAIR"})
    with pytest.raises(ValueError, match="where the subject stands"):
        find_subjects(tmp_path, {"T1": "T1"})
    with pytest.raises(FileNotFoundError, match="not a folder"):
        find_subjects(tmp_path / "nowhere", patterns)


def test_one_damaged_file_and_litter_do_not_end_the_preparation(tmp_path):
    patterns = ixi(tmp_path, affines=False)
    for path in list((tmp_path / "IXI-T1").iterdir()):
        path.with_name("._" + path.name).write_bytes(b"\0\5\26\7" + bytes(90))
    bad = next((tmp_path / "IXI-T1").glob("IXI010*"))
    bad.write_bytes(bad.read_bytes()[:400])
    cohort = find_subjects(tmp_path, patterns)
    assert len(cohort.files) == 4 and cohort.person("IXI010-Guys-0702") == "IXI010"
    data = prepare(tmp_path / "a.h5", cohort, contrasts=("PD", "T1"), per_subject=2, size=(32, 32), subjects=2,
                   split=lambda names: {"train": names}, max_shift=float("inf"))  # fmt: skip
    assert len(data.subjects) == 2
    data = prepare(tmp_path / "b.h5", cohort, contrasts=("PD", "T1"), per_subject=2, size=(32, 32),
                   split={"train": list(cohort.files)}, max_shift=float("inf"))  # fmt: skip
    assert len(data.subjects) == 3 and bad.name in data.attrs["left_out"]["IXI010-Guys-0702"]


def test_folders_of_any_names_give_their_contrasts(tmp_path):
    for i in (1, 2, 3):
        for visit in (1, 2):
            for name in ("T1w", "T2w", "T1w_mask", "dseg"):
                if (i, visit, name) != (3, 2, "T2w"):
                    save_nifti(tmp_path / f"subj{i}/visit{visit}/{name}.nii.gz", head((2, 3, 4)), voxel_mm=1)
    cohort = find_contrasts(tmp_path, ("T1", "T2"))
    assert list(cohort.files) == [f"subj{i} visit{v}" for i, v in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 1))]
    assert {cohort.person(s) for s in cohort.files} == {"subj1", "subj2", "subj3"}
    assert cohort.left_out["subj3 visit2"] == "no T2" and "mask" in cohort.left_out["subj1/visit1/T1w_mask.nii.gz"]
    with pytest.raises(ValueError, match="nobody has all of T1, FLAIR"):
        find_contrasts(tmp_path, ("T1", "FLAIR"))


def test_layouts_find_their_files(tmp_path):
    for name in (
        "Case2/MRI/Case2-T1",
        "Case2/MRI/Case2-FLAIR",
        "Case10/MRI/Case10-T1",
        "Case10/MRI/Case10-FLAIR",
        "Case2/US/Case2-US-before",
    ):
        save_nifti(tmp_path / "RESECT" / f"{name}.nii.gz", head((2, 3, 4)), voxel_mm=1)
    assert list(find_subjects(tmp_path, LAYOUTS["CuRIOUS"]).files) == ["Case2", "Case10"]
    for name in ("1_01_P/CT", "1_01_P/MR"):
        save_nifti(tmp_path / "gold" / f"{name}.nii", head((2, 3, 4)), voxel_mm=1)
    assert set(find_subjects(tmp_path, LAYOUTS["GoldAtlas"]).files["1_01_P"]) == {"CT", "MR"}


# ---------------------------------------------------------------------------------------------------- folders of slices


def folders(root, count=6, shape=(21, 18)):
    """Two folders of paired grey slices, 8 bits in T1 and 16 in PD, three slices a subject."""
    for contrast in ("T1", "PD"):
        (root / contrast).mkdir(parents=True)
    for i in range(count):
        image = head(shape, seed=i)
        name = f"IXI{i // 3:03d}-Guys_{i % 3}.png"
        Image.fromarray((scaled(image)[0] * 255).astype(np.uint8)).save(root / "T1" / name)
        Image.fromarray((scaled(other_contrast(image))[0] * 65535).astype(np.uint16)).save(root / "PD" / name)
    return {"T1": root / "T1", "PD": root / "PD"}


def test_folders_of_slices(tmp_path):
    pairs = SlicePairs(folders(tmp_path))
    t1, pd = pairs[4]
    assert len(pairs) == 6 and t1.shape == pd.shape == (1, 21, 18) and t1.dtype == torch.float32
    expected = scaled(head((21, 18), seed=4))[0]
    assert np.allclose(t1[0], expected, atol=1 / 255) and pd.max() == 1
    assert pairs.subjects[2:4] == ["IXI000-Guys", "IXI001-Guys"]
    parts = pairs.split((0.5, 0.5, 0.0), seed=0)
    assert len(parts["train"]) == len(parts["validation"]) == 3
    assert {i // 3 for i in parts["train"].indices}.isdisjoint({i // 3 for i in parts["validation"].indices})
    assert SlicePairs(folders(tmp_path / "more"), size=(32, 32))[0][1].shape == (1, 32, 32)


def test_misaligned_slices_are_found(tmp_path):
    where = folders(tmp_path, 3, (64, 60))
    assert SlicePairs(where).misaligned() == {}
    path = where["PD"] / "IXI000-Guys_1.png"
    moved = np.roll(np.array(Image.open(path)), 2, axis=1)
    Image.fromarray(moved).save(path)
    found = SlicePairs(where).misaligned()
    assert list(found) == ["IXI000-Guys_1"] and found["IXI000-Guys_1"].shift[1] == pytest.approx(-2, abs=0.5)


def test_unpaired_folders_list_the_names(tmp_path):
    where = folders(tmp_path)
    (where["PD"] / "IXI001-Guys_2.png").rename(where["PD"] / "IXI007-Guys_0.png")
    with pytest.raises(ValueError, match="only IXI001-Guys_2 in .*T1; only IXI007-Guys_0 in .*PD.*complete_only"):
        SlicePairs(where)
    pairs = SlicePairs(where, complete_only=True)
    assert len(pairs) == 5 and pairs.left_out["PD"] == ["IXI007-Guys_0"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        SlicePairs({"T1": where["T1"], "PD": tmp_path / "empty"})


def test_wrong_sizes_and_modes(tmp_path):
    where = folders(tmp_path)
    path = where["PD"] / "IXI000-Guys_1.png"
    Image.fromarray(np.arange(30, dtype=np.uint8).reshape(5, 6)).save(path)
    with pytest.raises(ValueError, match=r"IXI000-Guys_1 have different sizes: 21 x 18 \(T1\), 5 x 6 \(PD\)"):
        SlicePairs(where)
    Image.fromarray(np.arange(30, dtype=np.uint8).reshape(5, 6)).save(where["T1"] / path.name)
    with pytest.raises(ValueError, match=r"21 x 18 .* and 5 x 6 .*size="):
        SlicePairs(where)
    colour = np.random.default_rng(0).integers(0, 255, (21, 18, 3), dtype=np.uint8)
    Image.fromarray(colour).save(path)
    with pytest.raises(ValueError, match="mode RGB where grey was expected; .*channels=3"):
        SlicePairs(where)
    assert np.allclose(read_image(path, channels=3), colour.transpose(2, 0, 1) / 255)
    with pytest.raises(ValueError, match="mode L where RGB"):
        read_image(where["T1"] / path.name, channels=3)


def test_images_that_cannot_be_used(tmp_path):
    path = tmp_path / "image.tif"
    for array, match in (
        (np.full((4, 5), 7, np.uint8), "constant, 7"),
        (np.array([[0, np.nan], [1, 0.5]], np.float32), "1 NaN"),
        (np.array([[0, 300.0]], np.float32), "scale them first"),
    ):
        Image.fromarray(array).save(path)
        with pytest.raises(ValueError, match=match):
            read_image(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a readable image"):
        read_image(path)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")


def test_subjects_that_names_do_not_tell(tmp_path):
    for contrast in ("a", "b"):
        (tmp_path / contrast).mkdir()
        for i in range(3):
            Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5)).save(tmp_path / contrast / f"{i}.png")
    where = {c: tmp_path / c for c in "ab"}
    with pytest.raises(ValueError, match="cannot tell the subject"):
        SlicePairs(where).split()
    assert SlicePairs(where, subject=r"(?P<subject>\d)").subjects == ["0", "1", "2"]
