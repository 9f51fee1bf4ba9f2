"""A scan of one's own: any geometry in and out, units that are asked for, one clear error each."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from companion.acquisition.own_pet import OwnScan, check_pixels, example_people, write_example, write_example_mr
from companion.cli import app
from companion.data.dicom.series import choose_series
from companion.data.dicom.suv import suv_of
from companion.data.intake.readers import read_image, sniff
from companion.data.interfile import read_interfile, read_sinogram
from companion.data.nifti import load_nifti, save_nifti
from companion.data.scan_geometry import Dosage, Geometry
from companion.data.sinograms import read_sinograms, write_sinograms
from companion.operators.pet import Projector, sensitivity
from companion.reconstruction.pet import mlem

GEOMETRY = Geometry(20, 26, 3.0, bin_offset=0.5, first_angle_deg=-15)
SHAPE = (GEOMETRY.angles, GEOMETRY.bins)


@pytest.fixture
def scan(tmp_path):
    """Two slices of a smooth blob with many counts, in a geometry that is not the default one, and its activity."""
    axis = torch.linspace(-1, 1, 16)
    x = (
        20
        * torch.exp(-4 * (axis[:, None] ** 2 + (axis - 0.2) ** 2))[None, None]
        * torch.tensor([1.0, 0.5])[:, None, None, None]
    )
    expected = 0.5 * Projector(GEOMETRY.beam(16, 4.0))(x)
    path = write_sinograms(
        tmp_path / "mine.npz",
        np.random.default_rng(0).poisson(100 * expected[:, 0].numpy()),
        factors=np.float32(50.0),
        geometry=GEOMETRY,
        units="kBq/mL",
        slice_mm=5.0,
        dosage=Dosage(70, 200, 60, 109.77),
    )
    return path, x


def test_a_scan_in_another_geometry_comes_back_in_suv(scan, tmp_path):
    path, truth = scan
    own = OwnScan.read(path, 16, 4.0)
    assert own.scan.y.shape == (2, 1, *SHAPE) and own.beam.bin_offset == 0.5 and own.beam.bins == 26
    x = mlem(own.scan.y, own.scan.A, iterations=60).x
    total = (sensitivity(own.scan.A) * x).sum() / own.scan.y.sum()
    assert total.item() == pytest.approx(1, abs=1e-4)
    assert (x.sum() / truth.sum()).item() == pytest.approx(1, abs=0.01)
    suv = x[:, 0].double().numpy() * 70 / (200 * 2 ** (-60 / 109.77))
    files = own.write(tmp_path / "out", "mlem", x, "SUV")
    nifti, series = load_nifti(files[0]), choose_series(files[1].parent)
    dicom = series.read()
    assert series.what.units == "g/mL" and suv_of(files[1:]).factor == 1.0 and suv_of(files[1:]).unit == "g/mL"
    np.testing.assert_allclose(nifti.array, suv, rtol=1e-5)
    assert nifti.voxel_mm == (5.0, 4.0, 4.0)
    at = np.linalg.inv(dicom.affine) @ nifti.affine  # where each voxel of one lies in the other
    z, y, x_ = np.indices(suv.shape)
    ix, iy, iz = (np.rint(at[i, 0] * x_ + at[i, 1] * y + at[i, 2] * z + at[i, 3]).astype(int) for i in range(3))
    np.testing.assert_allclose(dicom.array[iz, iy, ix], suv, atol=1e-3 * suv.max())
    bq = own.write(tmp_path / "bq", "mlem", x, "Bq/mL")
    assert choose_series(bq[1].parent).what.units == "Bq/mL"
    assert load_nifti(bq[0]).array.max() == pytest.approx(1000 * x.max().item(), rel=1e-5)


def test_a_geometry_may_be_given_by_parameters(scan):
    path, _ = scan
    whole = OwnScan.read(path, 16, 6.0).beam
    path.with_suffix(".json").unlink()
    placed = {"angles": 20, "bins": 26, "bin_mm": 3.0, "bin_offset": 0.5, "radius_mm": None}
    given = OwnScan.read(path, 16, 6.0, placed=placed, units="kBq/mL").beam
    assert given.shifts_mm.tolist() == whole.shifts_mm.tolist() and given.angles[0] == 0
    with pytest.raises(ValueError, match="bin_mm missing"):
        OwnScan.read(path, 16, 6.0, placed={"angles": 20, "bins": 26}, units="kBq/mL")
    with pytest.raises(ValueError, match="which units of activity"):
        OwnScan.read(path, 16, 6.0, placed=placed)
    with pytest.raises(ValueError, match="measures 32 angles x 16 bins"):
        OwnScan.read(path, 16, 6.0, units="kBq/mL")


def test_units_are_factors_of_the_activity(scan):
    path, _ = scan
    about = json.loads(path.with_suffix(".json").read_text())
    x = torch.ones(2, 1, 16, 16)
    expected = {}
    for units in ("kBq/mL", "Bq/mL", "SUV", "counts"):
        path.with_suffix(".json").write_text(json.dumps(about | {"units": units}))
        own = OwnScan.read(path, 16, 4.0)
        expected[units] = own.scan.A(x).sum().item()
        assert own.calibrated == (units != "counts")
    per_suv = 200 * 2 ** (-60 / 109.77) / 70
    assert expected["Bq/mL"] == pytest.approx(1000 * expected["kBq/mL"])
    assert expected["SUV"] == pytest.approx(expected["kBq/mL"] / per_suv)
    with pytest.raises(ValueError, match="is in counts, but units='kBq/mL'"):
        OwnScan.read(path, 16, 4.0, units="kBq/mL")
    path.with_suffix(".json").write_text(json.dumps({k: v for k, v in about.items() if k != "weight_kg"}))
    with pytest.raises(ValueError, match="weight_kg"):
        OwnScan.read(path, 16, 4.0).write(path.parent / "none", "x", x, "SUV")
    assert not (path.parent / "none").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, 'no "format"'),
        ({"unit": "Bq/mL"}, "unit unknown; it takes format"),
        ({"units": "mCi"}, "units 'mCi' are unknown"),
        ({"geometry": {"angles": 20, "bins": 26}}, "bin_mm missing"),
        ({"geometry": {"angles": 20, "bins": 26, "bin_mm": 3, "tilt": 1}}, "tilt unknown"),
        ({"geometry": {"angles": "20", "bins": 26, "bin_mm": 3}}, "angles must be a number"),
        ({"geometry": {"angles": 20, "bins": 26, "bin_mm": 3, "radius_mm": 20}}, "circumference"),
        ({"geometry": {"angles": 20, "bins": 26, "bin_mm": 3, "tof_bins": 13}}, "time-of-flight"),
        ({"geometry": {"angles": 26, "bins": 20, "bin_mm": 3}}, "angles and bins are exchanged"),
        ({"slice_mm": "thin"}, "slice_mm must be a number"),
        ({"weight_kg": 7000}, "weight_kg must lie between"),
    ],
)
def test_what_a_geometry_file_cannot_say(scan, change, message):
    path, _ = scan
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        OwnScan.read(path, 16, 4.0)


def test_tof_counts_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "tof.npz", counts=np.ones((2, 13, *SHAPE)), factors=1.0)
    with pytest.raises(ValueError, match="neither TOF bins nor oblique planes"):
        OwnScan.read(tmp_path / "tof.npz", 16, 4.0, placed={"angles": 20, "bins": 26, "bin_mm": 3.0}, units="kBq/mL")


def test_raw_arrays_are_read_where_a_geometry_file_names_them(tmp_path):
    counts = np.random.default_rng(0).poisson(9, SHAPE)
    counts.astype(">i2").tofile(tmp_path / "trans.raw")
    np.full(SHAPE, 20, ">f4").tofile(tmp_path / "blank.raw")
    about = {"format": "companion-pet-scan-1", "geometry": {"angles": 20, "bins": 26, "bin_mm": 3.0}}
    files = {"counts": {"file": "trans.raw", "dtype": ">i2"}, "blank": {"file": "blank.raw", "dtype": ">f4"}}

    def read(arrays):
        (tmp_path / "scan.json").write_text(json.dumps(about | {"arrays": arrays}))
        return read_sinograms(tmp_path / "scan.json")

    found = read(files)
    y, blank, _ = found.transmission(Projector(found.geometry.beam(16, 4.0)))
    assert torch.equal(y[0, 0], torch.from_numpy(counts).float()) and (blank == 20).all()
    with pytest.raises(ValueError, match="no emission scan"):
        found.emission(Projector(found.geometry.beam(16, 4.0)))
    for wrong, message in (
        ({"counts": {"file": "trans.raw"}}, "need a dtype"),
        ({"counts": {"file": "trans.raw", "dtype": ">f8"}}, "no whole number of 20 x 26"),
        ({"counts": {"file": "trans.raw", "dtype": "O"}}, "need a dtype"),
        ({"counts": {"file": "../trans.raw", "dtype": ">i2"}}, "only files beside"),
        ({"counts": {"file": "nowhere.npy"}}, "not there"),
        ({"counts": 7}, "expected a file's name"),
        ({}, 'names no "arrays"'),
    ):
        with pytest.raises(ValueError, match=message):
            read(wrong)


def test_networks_know_their_pixels():
    check_pixels(3.5, 3.5, "prior")
    check_pixels([1.0, 4.0], 2.0, "prior")
    check_pixels("1 to 4", 3.5, "prior")
    with pytest.raises(ValueError, match="pixels of 3.5 mm, and the image has 1.75 mm"):
        check_pixels(3.5, 1.75, "pet/prior")
    with pytest.raises(ValueError, match="pixels of 1 to 4 mm"):
        check_pixels([1.0, 4.0], 7.0, "pet/any")
    with pytest.raises(ValueError, match="pixels of 1 to 4 mm"):
        check_pixels("1 to 4", 0.5, "pet/any")


def test_the_command_writes_an_example_that_look_knows(tmp_path, monkeypatch):
    monkeypatch.setattr("companion.acquisition.own_pet.example_people", lambda *_: Discs(14.0))
    path = tmp_path / "example.npz"
    write_example(path, Geometry(24, 30, 9.0), image_size=16)
    own = OwnScan.read(path, 16)
    truth = Discs(14.0).image
    assert torch.allclose(own.scan.A(truth).sum((1, 2, 3)), torch.full((2,), 1e6), rtol=1e-4)
    expected = own.scan.A(truth) + own.scan.background
    assert ((own.scan.y - expected).square().sum() / expected.sum()).item() == pytest.approx(1, abs=0.15)
    found = CliRunner().invoke(app, ["look", str(path)])
    assert found.exit_code == 0 and "2 x 24 x 30" in found.output and "kBq/mL" in found.output
    monkeypatch.chdir(tmp_path)
    drawn = CliRunner().invoke(app, ["look", str(path), "--picture"])
    assert drawn.exit_code == 0 and (tmp_path / "look-example.npz.png").is_file()
    path.with_suffix(".json").rename(tmp_path / "elsewhere.json")
    assert "units not said" in CliRunner().invoke(app, ["look", str(path)]).output
    apart = CliRunner().invoke(app, ["look", str(path), "--geometry", str(tmp_path / "elsewhere.json")])
    assert "24 angles over 180 degrees from 0, 30 bins of 9 mm" in apart.output


def test_an_mr_of_the_same_person_comes_to_the_grid_of_the_scan(tmp_path, monkeypatch):
    monkeypatch.setattr("companion.acquisition.own_pet.example_people", lambda *_: Discs(14.0))
    own = OwnScan.read(write_example(tmp_path / "scan.npz", Geometry(24, 30, 9.0), image_size=16), 16)
    fine = np.random.default_rng(0).random((2, 16, 16)).astype(np.float32)
    save_nifti(tmp_path / "mr.nii.gz", fine, affine=own.affine)
    found = own.mr(tmp_path / "mr.nii.gz")
    assert found.shape == (2, 1, 16, 16) and np.allclose(found[:, 0], fine, atol=1e-5)
    turned = np.diag([-1.0, 1.0, 1.0, 1.0]) @ own.affine  # stored from the other side: the same image, mirrored
    save_nifti(tmp_path / "other.nii.gz", fine, affine=turned)
    assert np.allclose(own.mr(tmp_path / "other.nii.gz")[:, 0], fine[..., ::-1], atol=1e-5)
    away = own.affine.copy()
    away[0, 3] += 500
    save_nifti(tmp_path / "away.nii.gz", fine, affine=away)
    with pytest.raises(ValueError, match="does not lie where the scan does.*register it"):
        own.mr(tmp_path / "away.nii.gz")
    with pytest.raises(FileNotFoundError):
        own.mr(tmp_path / "none.nii.gz")
    both = own.with_mr(tmp_path / "mr.nii.gz").scan
    assert torch.equal(both.mr, found) and own.scan.mr is None
    assert torch.equal(both.thinned(0.5, [0, 1]).mr, found) and torch.equal(both.some([1, 1]).mr, found[[1, 1]])


def test_the_mr_of_the_example_lies_where_its_activity_does(tmp_path):
    path = write_example(tmp_path / "scan.npz", Geometry(24, 30, 9.0), image_size=16, slices=3)
    own = OwnScan.read(path, 16).with_mr(write_example_mr(path, 3, 16))
    people = example_people(3, 16)
    assert own.file.slice_mm == people.pixel_mm == pytest.approx(people.height_mm.diff().mean().item())
    assert own.scan.step == 1, "slices follow one another"
    assert own.scan.mr.shape == people.image.shape
    for mr, labels in zip(own.scan.mr, people.labels, strict=True):
        inside = labels > 0
        assert mr[inside].mean() > 4 * mr[~inside].mean(), "the brain is where it is bright"
        assert mr[labels == 3].mean() > 1.1 * mr[labels == 2].mean(), "white matter is brighter than grey"


class Discs:
    """Two slices of a disc of activity in a disc of water."""

    def __init__(self, pixel_mm):
        axis = torch.linspace(-1, 1, 16)
        disc = ((axis[:, None] ** 2 + axis**2) < 0.6).float().expand(2, 1, 16, 16)
        self.image, self.mu, self.pixel_mm = 20 * disc, 0.0096 * disc, pixel_mm


# --- Interfile

IMAGE = """!INTERFILE :=
name of data file := pet.v
imagedata byte order := LITTLEENDIAN
!PET STUDY (General) :=
!PET data type := Image
!number format := float
!number of bytes per pixel := 4
number of dimensions := 3
!matrix size [1] := 4
scaling factor (mm/pixel) [1] := 2
!matrix size [2] := 5
scaling factor (mm/pixel) [2] := 2
!matrix size [3] := 3
scaling factor (mm/pixel) [3] := 3.5
patient orientation := head_in
patient rotation := supine
!END OF INTERFILE :=
"""
SINOGRAM = """!INTERFILE  :=
!imaging modality := PT
name of data file := pet.s
imagedata byte order := BIGENDIAN
!PET data type := Emission
!number format := signed integer
!number of bytes per pixel := 2
number of dimensions := 4
matrix axis label [4] := segment
!matrix size [4] := 1
matrix axis label [3] := view
!matrix size [3] := 20
matrix axis label [2] := axial coordinate
!matrix size [2] := { 2}
matrix axis label [1] := tangential coordinate
!matrix size [1] := 26
Scanner parameters:=
Number of detectors per ring := 200
Inner ring diameter (cm) := 40
Average depth of interaction (cm) := 1
Default bin size (cm) := 0.3
View offset (degrees) := 0
end scanner parameters:=
number of time frames := 1
!END OF INTERFILE :=
"""


def test_interfile_images_lie_where_they_say(tmp_path):
    values = np.random.default_rng(0).random((3, 5, 4)).astype("<f4")
    values.tofile(tmp_path / "pet.v")
    (tmp_path / "pet.hv").write_text(IMAGE)
    volume = read_image(tmp_path / "pet.hv")
    np.testing.assert_array_equal(volume.array, values)
    np.testing.assert_allclose(volume.affine @ [0, 0, 0, 1], [3, 4, -3.5, 1])  # first voxel: right? no, left and front
    assert volume.voxel_mm == (3.5, 2.0, 2.0)
    said = "quantification units := BQ/ML\nimage scaling factor[1] := 2\n!END"
    (tmp_path / "siemens.hv").write_text(IMAGE.replace("!END", said))
    np.testing.assert_array_equal(read_image(tmp_path / "siemens.hv").array, 2 * values)
    assert sniff(tmp_path / "siemens.hv")[0].units == "Bq/mL" and sniff(tmp_path / "pet.hv")[0].units == ""
    for change, message in (
        (("pet.v", "../pet.v"), "only a file beside"),
        (("pet.v", "other.v"), "not there"),
        (("[3] := 3\n", "[3] := 4\n"), "damaged"),
        (("float", "complex"), "not known here"),
        (("[1] := 4", "[1] := four"), "no list of numbers"),
        (("(mm/pixel) [1] := 2", "(mm/pixel) [1] := x"), "no number"),
        (("head_in", "feet_in"), "lies feet_in supine; only head_in"),
        (("supine", "prone"), "lies head_in prone"),
    ):
        (tmp_path / "bad.hv").write_text(IMAGE.replace(*change))
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / "bad.hv")


def test_interfile_sinograms_have_their_geometry(tmp_path):
    values = np.random.default_rng(0).poisson(5, (20, 2, 26))  # by view
    values.astype(">i2").tofile(tmp_path / "pet.s")
    (tmp_path / "pet.hs").write_text(SINOGRAM)
    counts, geometry = read_sinogram(tmp_path / "pet.hs")
    np.testing.assert_array_equal(counts, values.transpose(1, 0, 2))
    assert geometry.radius_mm == 210 and geometry.bin_mm == pytest.approx(np.pi * 210 / 200)
    assert geometry.beam(16, 4.0).shifts_mm[13] == 0  # STIR's bin 0 of -13 to 12
    (tmp_path / "corrected.hs").write_text(
        SINOGRAM.replace("Scanner p", "applied corrections := {arc correction}\nScanner p")
    )
    corrected = read_sinogram(tmp_path / "corrected.hs")[1]
    assert corrected.radius_mm is None and corrected.bin_mm == 3.0
    about = {"format": "companion-pet-scan-1", "units": "Bq/mL", "arrays": {"factors": "factors.npy"}}
    np.save(tmp_path / "factors.npy", np.full((20, 26), 2e-3))
    (tmp_path / "pet.json").write_text(json.dumps(about))
    own = OwnScan.read(tmp_path / "pet.hs", 16, 6.0)
    assert own.scan.y.shape == (2, 1, 20, 26)
    assert own.scan.A(torch.ones(2, 1, 16, 16)).max() == pytest.approx(
        2 * Projector(own.beam)(torch.ones(1, 1, 16, 16)).max()
    )
    assert "counts" in read_interfile([tmp_path / "pet.hs"])
    for change, message in (
        (("[4] := 1", "[4] := 3"), "3D sinograms"),
        (("end scanner", "patient orientation := feet_in\nend scanner"), "lies feet_in"),
        (("number of time frames", "Number of TOF time bins := 5\nnumber of time frames"), "time-of-flight"),
        (("axial coordinate", "z"), "expected view and axial"),
        (("detectors per ring := 200", "detectors per ring := 20"), "circumference"),
    ):
        (tmp_path / "bad.hs").write_text(SINOGRAM.replace(*change))
        with pytest.raises(ValueError, match=message):
            read_sinogram(tmp_path / "bad.hs")


def test_an_interfile_that_is_none_is_left_to_others(tmp_path):
    (tmp_path / "a.hv").write_text("hello")
    with pytest.raises(ValueError, match="Interfile"):
        read_image(tmp_path / "a.hv")
    save_nifti(tmp_path / "b.nii", np.ones((2, 2, 2), np.float32), voxel_mm=1.0)
    assert read_image(tmp_path / "b.nii").array.shape == (2, 2, 2)
