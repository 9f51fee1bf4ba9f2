"""LMI's way in: any folder, any names, any place and size of a head; one person is enough; errors come first."""

import json
from dataclasses import asdict, replace

import numpy as np
import pydicom
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from companion.data import anatomy, contrast_folder
from companion.data.cohort import called, standard
from companion.data.contrast_people import People
from companion.data.dicom.write import write_dicom
from companion.data.nifti import Volume, load_nifti, save_nifti
from companion.data.registration import REACH_MM, Registration, register, template, to_template
from companion.data.template import OnTemplate, slab_heights
from companion.evaluation import metrics
from companion.evaluation.translation import summary, verdict
from companion.papers.lmi import data as lmi_data
from companion.papers.lmi.people import Translate, study


def whole_brain(contrast: str, size: float = 1.0, voxel: float = 4.0) -> Volume:
    """A virtual person (z, y, x), `size` times as large as they are, in the scanner's world."""
    (person,) = anatomy.cohort("test", 1)
    shape = tuple(round(v * max(1, size) / voxel) for v in (170, 210, 170))
    centre = torch.tensor(anatomy.CENTRE_MM)
    points = (anatomy.grid_mm(shape, voxel) - centre) / size + centre
    maps = anatomy.tissue_maps(person, points, voxel / size)
    return Volume(anatomy.image_from_tissue(person, maps, contrast).numpy(), anatomy.affine(shape, voxel))


def as_pair(folder, turn):
    """MPRAGE.nii.gz and T2.nii.gz of one person; T2 moved in its world by a 4 x 4 matrix."""
    for contrast, name in (("T1w", "MPRAGE"), ("T2w", "T2")):
        v = whole_brain(contrast)
        save_nifti(folder / f"{name}.nii.gz", 900 * v.array, affine=turn @ v.affine if name == "T2" else v.affine)


def test_contrasts_have_common_names():
    assert [standard(n) for n in ("T1", "T1w", "t1w", "MPRAGE", "T2", "PD", "flair")] == [
        "T1w", "T1w", "T1w", "T1w", "T2w", "PDw", "FLAIR",
    ]  # fmt: skip
    assert standard("stain") == "stain" and called(["A", "T1", "T1w"], "T1w") == "T1w"
    assert called(["PD", "T2"], "T2w") == "T2" and called(["PD"], "T2w") is None


def test_one_person_in_a_folder_meets_the_embedded_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.09), -np.sin(0.09)], [np.sin(0.09), np.cos(0.09)]]
    turn[:3, 3] = 6, -4, 3
    as_pair(tmp_path / "scans" / "anna", turn)
    p = lmi_data.PrepareData(source="scans", data="d.h5", contrasts=("T1", "T2"), slices_per_subject=4)
    p.before_start()
    data = lmi_data.prepare(p, progress=False)
    assert data.shapes["T1w"] == (1, 4, 1, 64, 64) and data.split["test"] == data.subjects
    about = data.attrs["subjects"][data.subjects[0]]
    found = Registration(**about["registered"]["T2w"])
    assert found.kind == "rigid" and np.abs(found.array - turn).max() < 0.7
    assert max(abs(v) for v in about["alignment"]["T2w"]["shift"]) < 0.5

    asked = Translate(
        device="cpu", people="d.h5", targets=("T2",), sources=("T1",), subjects=1, slices=1, evaluations=1, draws=2
    )
    asked.before_start()
    (direction,) = study(asked, People.of("d.h5", "test", 1, 1, ("T1w", "T2w")), progress=False)
    assert direction.name == "T1w to T2w"
    rows = {row["method"]: row for row in summary(direction.rows)}
    assert isinstance(rows["recommended"]["PSNR"], float) and rows["constant grey"]["PSNR"] > 5
    (gain,) = verdict(direction.rows)
    assert isinstance(gain["PSNR over constant"], float)

    with pytest.raises(ValueError, match="d.h5 has no PDw; it has T1w, T2w"):
        replace(asked, targets=("PD",)).before_start()
    with pytest.raises(ValueError, match="nobody for validation"):
        replace(asked, split="validation").before_start()
    with pytest.raises(FileNotFoundError, match="no.nii"):
        replace(asked, volume="no.nii").before_start()
    volume = tmp_path / "scans" / "anna" / "T2.nii.gz"
    replace(asked, volume=str(volume.with_name("MPRAGE.nii.gz"))).before_start()
    with pytest.raises(ValueError, match="T2.nii.gz is T2w by its name"):
        replace(asked, volume=str(volume)).before_start()
    save_nifti(tmp_path / "seg.nii.gz", (load_nifti(volume).array > 100).astype(np.uint8), voxel_mm=4.0)
    with pytest.raises(ValueError, match="a mask: its values"):
        replace(asked, volume="seg.nii.gz").before_start()
    with pytest.raises(ValueError, match="brain shows heads on 128 x 128 pixels.*learnt them on 64 x 64"):
        replace(asked, people="brain", image_size=128).before_start()
    with monkeypatch.context() as other:
        larger = {"data": {"contrast": "T2w", "image_size": [128, 128]}}
        other.setattr("companion.papers.lmi.people.describe", lambda name: larger)
        with pytest.raises(ValueError, match="d.h5 shows heads on 64 x 64 pixels.*use image_size=128, or"):
            asked.before_start()

    with pytest.raises(ValueError, match="both T1w"):
        replace(asked, targets=("MPRAGE",)).before_start()


def test_a_whole_head_beside_a_stripped_one_is_cut_to_the_brain(tmp_path):
    one, other = whole_brain("T1w"), whole_brain("T2w")
    far = distance_transform_edt(one.array == 0) * 4.0
    other.array[(far > 8) & (far < 25)] = other.array.max()  # a scalp
    for name, v in (("T1w", one), ("T2w", other)):
        save_nifti(tmp_path / "anna" / f"{name}.nii.gz", 900 * v.array, affine=v.affine)
    p = lmi_data.PrepareData(
        source=str(tmp_path), data=str(tmp_path / "d.h5"), contrasts=("T1", "T2"), slices_per_subject=4
    )
    data = lmi_data.prepare(p, progress=False)
    assert data.attrs["subjects"][data.subjects[0]]["slicing"]["stripped"]
    t1, t2 = (data.read(name) > 0.1 for name in ("T1w", "T2w"))
    assert (t2 & ~t1).mean() < 0.05 * t1.mean() + 0.05 and (t1 & t2).mean() > 0.8 * t1.mean()


def test_contrasts_that_do_not_fit_are_refused_with_their_shift(tmp_path):
    turn = np.eye(4)
    turn[1, 3] = 8.0
    as_pair(tmp_path / "anna", turn)
    p = lmi_data.PrepareData(
        source=str(tmp_path), data=str(tmp_path / "d.h5"), contrasts=("T1", "T2"), slices_per_subject=4
    )
    with pytest.raises(ValueError, match="do not fit T1w: .*: T2w shifted by .*pixels"):
        lmi_data.prepare(replace(p, unaligned="refuse", reference="T1"), progress=False)


def test_dicom_of_one_person_is_read_series_by_series(tmp_path):
    for number, (contrast, name) in enumerate((("T1w", "t1_mprage_sag"), ("T2w", "t2_tse_tra")), 1):
        v = whole_brain(contrast, voxel=8.0)
        for path in write_dicom(tmp_path / f"series{number}", 900 * v.array, v.affine, name, number=number):
            one = pydicom.dcmread(path)
            one.PatientID = "A17"
            one.save_as(path)
    cohort = contrast_folder.cohort_of(tmp_path, lmi_data.PrepareData(contrasts=("T1", "T2")))
    ((_, files),) = cohort.files.items()
    assert set(files) == {"T1w", "T2w"}
    assert cohort.read(files["T2w"]).array.shape == whole_brain("T2w", voxel=8.0).array.shape


@pytest.mark.parametrize("size", [0.8, 1.2])
def test_a_head_of_any_size_lies_on_the_template_and_back(size):
    head, usual = (whole_brain("T1w", s) for s in (size, 1.0))
    place, other = (OnTemplate.of(v, (64, 64), heights=slab_heights(4)) for v in (head, usual))
    assert place.found.scale / other.found.scale == pytest.approx(size, rel=0.02) and not place.stripped
    assert metrics.ssim(place.cut(head.array), other.cut(usual.array), 1.0).mean() > 0.93
    assert OnTemplate(**json.loads(json.dumps(asdict(place)))) == place
    whole = OnTemplate.of(head, (64, 64), found=place.found)
    back = whole.assemble(whole.cut(head.array))
    inside = head.array > 0.1
    assert back.shape == head.array.shape and np.corrcoef(back[inside], head.array[inside])[0, 1] > 0.95


def whole_head(size: float, step: float = 2.5) -> Volume:
    """The template with a dark skull, a bright scalp and a neck, `size` times as large."""
    shape = (100, 100, 84)
    points = anatomy.grid_mm(shape, step)
    maps = anatomy.tissue_maps(None, points, step)
    brain = anatomy.image_from_tissue(anatomy.cohort("test", 1)[0], maps, "T1w").numpy().clip(0)
    far = distance_transform_edt(maps[:3].sum(0).numpy() < 0.5, sampling=step)
    x, y, z = points.numpy().transpose(3, 0, 1, 2)
    image = np.where((far > 9) & (far <= 16), 1.3 * brain.max(), brain)
    image = np.where((z < -60) & (np.hypot(x, y + 20) < 55) & (far > 8), 0.7 * brain.max(), image)
    return Volume(image.astype(np.float32), np.diag([size, size, size, 1]) @ anatomy.affine(shape, step))


def test_the_scalp_of_a_whole_head_is_not_taken_for_the_end_of_its_brain():
    head, (fixed, far) = whole_head(0.9), template()
    outline = register(head, fixed, "affine", inside=far <= REACH_MM, centred=True)
    assert outline.scale > 1.1, "mutual information alone shrinks the whole head"
    place = OnTemplate.of(head, (64, 64), heights=slab_heights(4))
    assert place.found.scale == pytest.approx(0.9, rel=0.03) and place.stripped
    slices, _ = place.scaled(place.cut(head.array))
    assert np.percentile(slices[slices > 0.1], 50) > 0.5, "what is left of the scalp does not say what is bright"
    huge = Volume(head.array, np.diag([1.7, 1.7, 1.7, 1]) @ head.affine)
    with pytest.raises(ValueError, match="this brain would have .* mL, expected 500 to 3400"):
        to_template(huge)
