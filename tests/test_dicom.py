"""DICOM series: places against an independent converter, values, PET's SUV, what is refused, and writing back."""

import datetime
import shutil
import subprocess

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

from companion.data.dicom.series import choose_series, find_series, join_dicom, read_dicom, series_table, sniff_dicom
from companion.data.dicom.suv import suv_of
from companion.data.dicom.write import WARNING, write_dicom
from companion.data.intake.look import look
from companion.data.intake.readers import read_image
from companion.data.intake.records import Unreadable

MR, ENHANCED, PET = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.128"
NAME, RECORD = "Lovelace^Ada", "MRN-0815"


def rotation(*degrees):
    x, y, z = np.radians(degrees)
    a = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    b = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    c = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return a @ b @ c


AXIAL = np.diag([-1.0, -1, 1])
PLANES = {  # columns: directions of x, y, z indices in RAS
    "axial": AXIAL,
    "sagittal": np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]),
    "coronal": np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "oblique": rotation(17, -23, 8) @ AXIAL,
    "feet first": AXIAL @ np.diag([1, 1, -1.0]),
}


def known(plane="axial", shape=(5, 12, 9), size=(0.9, 1.3, 3.7)):
    """Whole numbers (z, y, x), all different, and an affine."""
    affine = np.eye(4)
    affine[:3, :3] = PLANES[plane] * size
    affine[:3, 3] = (-31.25, 44.5, -17.125)
    return np.arange(np.prod(shape), dtype=np.uint16).reshape(shape), affine


def base(i=0, **more):
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = more.pop("sop", MR)
    d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(i), repr(more)])
    d.PatientName, d.PatientID, d.PatientBirthDate = NAME, RECORD, "18151210"
    d.StudyInstanceUID, d.SeriesInstanceUID = "1.2.3.4", more.pop("series", "1.2.3.4.5")
    d.FrameOfReferenceUID, d.StudyID, d.StudyDate, d.StudyTime = "1.2.3.9", "1", "20260102", "101112"
    d.SeriesDate, d.SeriesTime, d.AcquisitionDate, d.AcquisitionTime = "20260102", "101500", "20260102", "101500"
    d.Modality, d.SeriesDescription, d.SeriesNumber, d.InstanceNumber = "MR", "t1_mprage", 3, i + 1
    d.ImageType, d.Manufacturer = ["ORIGINAL", "PRIMARY", "M", "ND"], "companion's tests"
    d.SamplesPerPixel, d.PhotometricInterpretation, d.BitsAllocated, d.BitsStored, d.HighBit = (
        1,
        "MONOCHROME2",
        16,
        16,
        15,
    )
    d.PixelRepresentation, d.EchoTime, d.RepetitionTime, d.PatientPosition = 0, 3.0, 2000, "HFS"
    for name, value in more.items():
        setattr(d, name, value)
    return d


def place(d, affine, i):
    """The standard's geometry of slice i, from a NIfTI affine (C.7.6.2.1.1)."""
    lps = np.diag([-1, -1, 1, 1]) @ affine
    size = np.linalg.norm(lps[:3, :3], axis=0)
    d.ImageOrientationPatient = [f"{v:.12g}" for v in (lps[:3, :2] / size[:2]).T.ravel()]
    d.ImagePositionPatient = [f"{v:.10g}" for v in lps[:3, 3] + i * lps[:3, 2]]
    d.PixelSpacing, d.SliceThickness = [f"{size[1]:.10g}", f"{size[0]:.10g}"], f"{size[2]:.10g}"
    return d


def write(folder, array, affine, order=None, prefix="IM", **more):
    """Slices in files called in no good order, by the standard and nothing of the package."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for k, i in enumerate(order or range(len(array))):
        each = {n: v[i] if isinstance(v, list | np.ndarray) and n != "ImageType" else v for n, v in more.items()}
        d = place(base(i, **each), affine, i)
        d.Rows, d.Columns = array.shape[1:]
        d.PixelData = array[i].tobytes()
        files.append(folder / f"{prefix}{k:03d}")
        d.save_as(files[-1], enforce_file_format=True)
    return files


def same_voxels(volume, array, affine):
    """Every voxel's value and its place in mm, whatever the order of axes and slices."""

    def placed(a, m):
        image = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.asarray(a, np.float64).transpose(2, 1, 0), m))
        return image.get_fdata(), image.affine

    (a, m), (b, n) = placed(volume[0], volume[1]), placed(array, affine)
    corners = np.array(np.meshgrid(*[(0, s - 1) for s in a.shape])).reshape(3, -1)
    assert a.shape == b.shape and np.abs((m - n)[:3, :3] @ corners + (m - n)[:3, 3:]).max() < 0.01  # mm
    return np.abs(a - b).max()


@pytest.mark.parametrize("plane", PLANES)
def test_the_affine_is_right_in_every_plane(tmp_path, plane):
    array, affine = known(plane)
    write(tmp_path / "d", array, affine, order=[3, 0, 4, 1, 2])
    series = choose_series(tmp_path / "d", "mprage")
    assert series.what.shape == (5, 12, 9) and series.what.voxel_mm == pytest.approx((3.7, 1.3, 0.9))
    volume = series.read()
    assert volume.array.dtype == np.uint16 and same_voxels((volume.array, volume.affine), array, affine) == 0


@pytest.mark.parametrize("plane", PLANES)
def test_the_affine_agrees_with_dcm2niix(tmp_path, plane):
    program = shutil.which("dcm2niix") or _packaged("dcm2niix")
    array, affine = known(plane, size=(0.9, 1.3, 3.7))
    files = write(tmp_path / "d", array, affine)
    (tmp_path / "o").mkdir()
    done = subprocess.run(
        [program, "-z", "n", "-b", "n", "-o", tmp_path / "o", tmp_path / "d"], capture_output=True, text=True
    )
    made = sorted((tmp_path / "o").glob("*.nii"))
    assert made, done.stdout + done.stderr
    theirs = nibabel.load(made[0])
    volume = read_dicom(files)
    values = np.asarray(theirs.dataobj).transpose(2, 1, 0)
    assert same_voxels((volume.array, volume.affine), values, theirs.affine) == 0


def _packaged(name):
    try:
        import dcm2niix

        return dcm2niix.bin
    except (ImportError, AttributeError):
        pytest.skip("needs the converter dcm2niix, of Debian or PyPI")


def test_a_written_series_comes_back_and_agrees_with_dcm2niix(tmp_path):
    rng = np.random.default_rng(0)
    for plane in PLANES:
        _, affine = known(plane)
        array = rng.normal(size=(5, 12, 9))
        files = write_dicom(tmp_path / plane, array, affine, "AID posterior mean")
        volume = read_dicom(files)
        assert same_voxels((volume.array, volume.affine), array, affine) < np.ptp(array) / 65535
        first = pydicom.dcmread(files[0])
        assert first.ImageType[:2] == ["DERIVED", "SECONDARY"] and first.SeriesDescription.endswith(WARNING)
        assert WARNING in first.DerivationDescription and first.ImageComments == WARNING
        program = shutil.which("dcm2niix") or _packaged("dcm2niix")
        (tmp_path / f"o {plane}").mkdir()
        subprocess.run(
            [program, "-z", "n", "-b", "n", "-o", tmp_path / f"o {plane}", tmp_path / plane], capture_output=True
        )
        theirs = nibabel.load(next((tmp_path / f"o {plane}").glob("*.nii")))
        values = np.asarray(theirs.dataobj).transpose(2, 1, 0)
        assert same_voxels((values, theirs.affine), array, affine) < np.ptp(array) / 60000


def test_writing_from_a_series_takes_new_uids_and_no_name(tmp_path):
    array, affine = known("oblique")
    source = write(tmp_path / "d", array, affine)
    made = write_dicom(tmp_path / "run" / "dicom", array, affine, "result", source)
    again = write_dicom(tmp_path / "again", array, affine, "result", source)
    old, new, same = (pydicom.dcmread(files[0]) for files in (source, made, again))
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert old[name].value != new[name].value == same[name].value
    content = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    for secret in (NAME, RECORD, "18151210", "1.2.3.4", "Lovelace"):
        assert secret.encode() not in content
    known_to_archive = pydicom.dcmread(
        write_dicom(tmp_path / "pacs", array, affine, "result", source, identity=True)[0]
    )
    assert known_to_archive.PatientID == RECORD and known_to_archive.StudyInstanceUID == "1.2.3.4"
    assert known_to_archive.SeriesInstanceUID != old.SeriesInstanceUID
    with pytest.raises(ValueError, match="holds files already"):
        write_dicom(tmp_path / "pacs", array, affine, "result")
    sheared = affine.copy()
    sheared[:3, 2] += affine[:3, 1]
    with pytest.raises(ValueError, match="sheared"):
        write_dicom(tmp_path / "x", array, sheared, "result")
    assert not (tmp_path / "x").exists()


def test_names_never_leave_the_reader(tmp_path):
    array, affine = known()
    write(tmp_path / "d", array, affine)
    found = look(tmp_path / "d")
    text = repr(found) + series_table(find_series(tmp_path / "d")) + repr(find_series(tmp_path / "d"))
    assert found.items[0].person == "person#1" and len(found.items) == 1 and len(found.items[0].files) == 5
    assert found.items[0].what.shape == (5, 12, 9) and found.items[0].read().array.shape == (5, 12, 9)
    for secret in ("Lovelace", RECORD, "18151210"):
        assert secret not in text


def test_a_folder_of_several_series_shows_a_table(tmp_path):
    array, affine = known()
    write(tmp_path / "d", array, affine, series="1.1", SeriesDescription="t1_mprage")
    write(tmp_path / "d", array, affine, prefix="B", series="1.2", SeriesDescription="t2_space_flair")
    phase = dict(ImageType=["ORIGINAL", "PRIMARY", "P", "ND"], SeriesDescription="swi")
    write(tmp_path / "d", array, affine, prefix="C", series="1.3", **phase)
    write(tmp_path / "d", array + 1, affine, prefix="D", series="1.3", SeriesDescription="swi")
    (tmp_path / "d" / "README").write_text("no image")
    assert len(find_series(tmp_path / "d")) == 4
    assert choose_series(tmp_path / "d", "flair").description == "t2_space_flair"
    assert choose_series(tmp_path / "d", "swi phase").what.about["component"] == "phase"
    with pytest.raises(
        Unreadable, match="4 series fit ''; choose one by its description or number:\n(.|\n)*t2_space_flair"
    ):
        choose_series(tmp_path / "d")
    with pytest.raises(Unreadable, match="no series fits 'dwi'"):
        choose_series(tmp_path / "d", "dwi")


def test_time_series_have_frames(tmp_path):
    array, affine = known()
    for t in range(3):
        write(
            tmp_path / "d",
            array + t,
            affine,
            prefix=f"T{t}_",
            TemporalPositionIdentifier=t + 1,
            AcquisitionTime=f"10150{t}",
        )
    files = sorted((tmp_path / "d").iterdir())
    assert join_dicom(files).shape == (3, 5, 12, 9) and join_dicom(files).axes == ("t", "z", "y", "x")
    assert np.array_equal(read_dicom(files, frame=2).array, array + 2)
    with pytest.raises(Unreadable, match="4D, 3 times of 5 slices"):
        read_dicom(files)
    with pytest.raises(Unreadable, match="fewer in slices"):
        read_dicom(files[:-1], frame=0)


def test_copies_count_once_and_one_file_stands_for_its_series(tmp_path):
    array, affine = known()
    files = write(tmp_path / "d", array, affine)
    for i, file in enumerate(files[:2]):
        (tmp_path / "d" / f"copy {i}").write_bytes(file.read_bytes())
    (item,) = look(tmp_path / "d").items
    assert item.what.shape == array.shape and item.what.about["copies of the same images, left out"] == 2
    assert np.array_equal(item.read().array, read_image(files[3]).array)
    assert look(files[3]).items[0].what.shape == array.shape
    same = write(tmp_path / "e", array, affine, SOPInstanceUID="1.2.3")  # of a careless anonymiser
    assert np.array_equal(read_dicom(same).array, read_dicom(files).array)


def test_a_data_set_without_a_file_header_is_read(tmp_path):
    array, affine = known()
    for implicit in (True, False):
        folder = tmp_path / str(implicit)
        for file in write(folder, array, affine):
            d = pydicom.dcmread(file)
            del d.file_meta
            pydicom.dcmwrite(
                file.with_suffix(".dcm"), d, implicit_vr=implicit, little_endian=True, enforce_file_format=False
            )
            file.unlink()
        assert np.array_equal(read_image(next(folder.iterdir())).array, read_dicom(sorted(folder.iterdir())).array)


def enhanced(path, array, affine, components=("MAGNITUDE",), echoes=(3.0,), slope=1.0, intercept=0.0):
    """An enhanced multi-frame file, all components and echoes in it, slices innermost."""
    d = base(sop=ENHANCED)
    d.Rows, d.Columns = array.shape[1:]
    groups, planes = [], []
    for c, component in enumerate(components):
        for e, echo in enumerate(echoes):
            for i in range(len(array)):
                one, where = Dataset(), place(Dataset(), affine, i)
                parts = {
                    "PlanePositionSequence": ("ImagePositionPatient",),
                    "PlaneOrientationSequence": ("ImageOrientationPatient",),
                    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
                }
                for sequence, names in parts.items():
                    item = Dataset()
                    for name in names:
                        item[name] = where[name]
                    setattr(one, sequence, Sequence([item]))
                kind, times, scale = Dataset(), Dataset(), Dataset()
                kind.ComplexImageComponent, times.EffectiveEchoTime = component, echo
                scale.RescaleSlope, scale.RescaleIntercept, scale.RescaleType = str(slope), str(intercept), "US"
                one.MRImageFrameTypeSequence, one.MREchoSequence = Sequence([kind]), Sequence([times])
                one.PixelValueTransformationSequence = Sequence([scale])
                groups.append(one)
                planes.append(array[i] + 1000 * c + 100 * e)
    d.NumberOfFrames = len(planes)
    d.PerFrameFunctionalGroupsSequence, d.SharedFunctionalGroupsSequence = Sequence(groups), Sequence([Dataset()])
    d.PixelData = np.stack(planes).astype("<u2").tobytes()
    d.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("plane", ["axial", "oblique", "sagittal"])
def test_enhanced_multi_frame_files(tmp_path, plane):
    array, affine = known(plane)
    volume = read_dicom([enhanced(tmp_path / "a.dcm", array, affine, slope=0.5, intercept=-3)])
    assert same_voxels((volume.array, volume.affine), 0.5 * array - 3.0, affine) < 1e-4
    path = enhanced(tmp_path / "b.dcm", array, affine, ("MAGNITUDE", "PHASE"))
    assert np.array_equal(read_dicom([path]).array, read_dicom([path], part="magnitude").array)
    assert read_dicom([path], part="phase").array.min() == 1000
    assert sniff_dicom(path).about["other parts"] == "phase"
    path = enhanced(tmp_path / "c.dcm", array, affine, echoes=(3.0, 6.0))
    with pytest.raises(Unreadable, match=r"several parts: magnitude echo 3.0 \(5 images\)"):
        read_dicom([path])
    assert read_dicom([path], part="echo 6.0").array.min() == 100


def test_philips_scaling(tmp_path):
    array, affine = known()
    folder = tmp_path / "d"
    files = write(
        folder, array, affine, Manufacturer="Philips Medical Systems", RescaleSlope="2.5", RescaleIntercept="4"
    )
    for file in files:
        d = pydicom.dcmread(file)
        block = d.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
        block.add_new(0x0E, "FL", 0.125)
        d.save_as(file)
    assert np.allclose(read_dicom(files).array, (2.5 * array + 4) / (2.5 * 0.125))


def test_compressed_pixels(tmp_path):
    array, affine = known()
    files = write(tmp_path / "d", array, affine, RescaleSlope="2", RescaleIntercept="1")
    for file in files:
        d = pydicom.dcmread(file)
        d.compress(RLELossless)
        d.save_as(file)
    assert np.array_equal(read_dicom(files).array, 2 * array + 1.0)


# -------------------------------------------------------------------------------------------------------------- PET


def pet(folder, uptake_s=3600, **more):
    """Two slices of 10 kBq/mL, each with a slope of its own; 300 MBq of F-18 into 75 kg."""
    array, affine = np.full((2, 4, 4), 1000, np.uint16), known()[1]
    info = Dataset()
    info.RadionuclideTotalDose, info.RadionuclideHalfLife = "3.0e8", "6586.2"
    start = datetime.datetime(2026, 1, 2, 10, 15) - datetime.timedelta(seconds=uptake_s)
    info.RadiopharmaceuticalStartTime = start.strftime("%H%M%S")
    for name in list(more):
        if name.startswith("Radio"):
            setattr(info, name, more.pop(name))
    array[1] *= 2
    values = dict(sop=PET, Modality="PT", Units="BQML", DecayCorrection="START",
                  CorrectedImage=["DECY", "ATTN", "SCAT"], PatientWeight="75", RescaleIntercept="0",
                  SeriesDescription="FDG", ImageType=["ORIGINAL", "PRIMARY"],
                  RescaleSlope=["10", "5"], RadiopharmaceuticalInformationSequence=Sequence([info])) | more  # fmt: skip
    files = []
    for i, slope in enumerate(("10", "5")):
        each = values | ({"RescaleSlope": slope} if isinstance(values["RescaleSlope"], list) else {})
        d = place(base(i, **each), affine, i)
        d.Rows, d.Columns, d.PixelData = 4, 4, array[i].tobytes()
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"P{i}.dcm")
        d.save_as(files[-1], enforce_file_format=True)
    return files


def test_pet_in_becquerel_and_suv(tmp_path):
    files = pet(tmp_path / "a")
    assert np.allclose(read_dicom(files).array, 1e4) and sniff_dicom(files[0]).units == "Bq/mL"
    assert sniff_dicom(files[0]).contrast == "PET"
    suv = suv_of(files)
    decayed = 300e6 * 2 ** (-3600 / 6586.2)
    assert suv.uptake_s == 3600 and suv.dose_MBq == 300 and suv.weight_kg == 75
    assert 1e4 * suv.factor == pytest.approx(1e4 * 75e3 / decayed)
    assert suv_of(pet(tmp_path / "b", DecayCorrection="ADMIN")).factor == pytest.approx(75e3 / 300e6)
    assert suv_of(pet(tmp_path / "c", Units="GML")).factor == 1
    whole = suv_of(pet(tmp_path / "d", RadiopharmaceuticalStartDateTime="20260102091500.00"))
    assert whole.uptake_s == 3600


@pytest.mark.parametrize(
    ("more", "units", "uncorrected"),
    [
        (dict(Units="PROPCPS"), "PROPCPS", ""),
        (dict(Units="GML", SUVType="LBM"), "g/mL by LBM", ""),
        (dict(CorrectedImage=["NORM", "DECY"]), "Bq/mL", "attenuation"),
        (dict(CorrectedImage=["NORM"], DecayCorrection="NONE"), "Bq/mL", "attenuation, decay"),
        (dict(CorrectedImage=None), "Bq/mL", ""),
    ],
)
def test_pet_says_its_units_and_what_it_lacks(tmp_path, more, units, uncorrected):
    what = sniff_dicom(pet(tmp_path / "a", **more)[0])
    assert what.units == units and what.about.get("not corrected for", "") == uncorrected


def test_enhanced_pet_is_in_the_units_of_its_real_world_values(tmp_path):
    array, affine = known()
    path = enhanced(tmp_path / "a.dcm", array, affine)
    d = pydicom.dcmread(path)
    d.Modality = "PT"
    for i, one in enumerate(d.PerFrameFunctionalGroupsSequence):
        maps = []
        for code, slope in (("g/ml{SUVbw}", 0.001), ("Bq/ml", 2.0 + i)):
            unit, scale = Dataset(), Dataset()
            unit.CodeValue, scale.RealWorldValueSlope, scale.RealWorldValueIntercept = code, slope, 1.0
            scale.MeasurementUnitsCodeSequence = Sequence([unit])
            maps.append(scale)
        one.RealWorldValueMappingSequence = Sequence(maps)
    d.save_as(path)
    assert sniff_dicom(path).units == "Bq/mL"
    slope = 2.0 + np.arange(len(array))[:, None, None]
    assert same_voxels((read_dicom([path]).array, read_dicom([path]).affine), slope * array + 1.0, affine) < 1e-4
    del d.PerFrameFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    d.save_as(path)
    with pytest.raises(Unreadable, match="several units"):
        sniff_dicom(path)


def test_a_slope_of_0_is_not_taken_for_none(tmp_path):
    with pytest.raises(Unreadable, match="values scaled by 0"):
        read_dicom(pet(tmp_path / "a", RescaleSlope="0"))


def test_suv_across_midnight_and_of_series_written_afterwards(tmp_path):
    night = pet(tmp_path / "a", SeriesTime="003000", AcquisitionTime="003000", RadiopharmaceuticalStartTime="233000")
    assert suv_of(night).uptake_s == 3600
    late = dict(SeriesTime="120000", AcquisitionTime="101500", FrameReferenceTime="60000", ActualFrameDuration="120000")
    decay, duration = np.log(2) / 6586.2, 120.0
    average = np.log(decay * duration / (1 - np.exp(-decay * duration))) / decay
    assert suv_of(pet(tmp_path / "b", **late)).uptake_s == pytest.approx(3600 + average - 60)
    with pytest.raises(Unreadable, match="written after the scan"):
        suv_of(pet(tmp_path / "c", SeriesTime="120000"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (dict(PatientWeight=None), "body weight .* is missing"),
        (dict(RadionuclideTotalDose="300"), "seems to be in MBq"),
        (dict(CorrectedImage=["DECY"]), "not corrected for ATTN"),
        (dict(Units="CNTS"), "without Philips' SUV factor"),
        (dict(Units="GML", SUVType="LBM"), "not by body weight"),
        (dict(DecayCorrection="NONE"), "decay correction NONE"),
        (dict(RadiopharmaceuticalStartDateTime="20260105091500"), "date or time is wrong"),
        (dict(RadiopharmaceuticalStartTime=""), "no date and time"),
    ],
)
def test_suv_is_refused_where_it_would_be_a_guess(tmp_path, more, words):
    with pytest.raises(Unreadable, match=words):
        suv_of(pet(tmp_path / "a", **more))


# ------------------------------------------------------------------------------------------------- what is refused


def test_what_makes_no_volume_is_refused_by_name(tmp_path):
    array, affine = known()
    for name, more, words in (
        ("mosaic", dict(ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]), "mosaic.*dcm2niix"),
        ("localizer", dict(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "a localizer"),
        ("colour", dict(PhotometricInterpretation="RGB", SamplesPerPixel=3), "colour"),
        ("segmentation", dict(sop="1.2.840.10008.5.1.4.1.1.66.4"), "a segmentation"),
    ):
        files = write(tmp_path / name, array, affine, **more)
        with pytest.raises(Unreadable, match=words):
            sniff_dicom(files[0])
    files = write(tmp_path / "gap", array, affine)
    with pytest.raises(Unreadable, match="not evenly spaced.*after slice 2 of 4"):
        read_dicom(files[:2] + files[3:])
    tilted = affine.copy()
    tilted[:3, 2] += 0.2 * affine[:3, 1]
    files = []
    for i in range(5):
        d = place(base(i), affine, i)
        d.ImagePositionPatient = [f"{v:.8g}" for v in (np.diag([-1, -1, 1, 1]) @ tilted)[:3] @ [0, 0, i, 1]]
        d.Rows, d.Columns, d.PixelData = 12, 9, array[i].tobytes()
        (tmp_path / "tilt").mkdir(exist_ok=True)
        files.append(tmp_path / "tilt" / f"{i}.dcm")
        d.save_as(files[-1], enforce_file_format=True)
    with pytest.raises(Unreadable, match="gantry tilt"):
        read_dicom(files)
    (tmp_path / "cut.dcm").write_bytes(files[0].read_bytes()[:-50])
    with pytest.raises(Unreadable, match="cut.dcm"):
        read_dicom([tmp_path / "cut.dcm"])
    (tmp_path / "note").write_text("hello")
    assert sniff_dicom(tmp_path / "note") is None
    with pytest.raises(Unreadable, match="no DICOM images"):
        find_series(tmp_path / "note")
