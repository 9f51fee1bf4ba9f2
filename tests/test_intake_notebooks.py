"""DICOM series and raw k-space of every format through the preparations of the notebooks."""

from pathlib import Path

import fuzzing
import numpy as np
import pytest
import scipy.io
import torch
from test_dicom import known, write
from test_intake_images import head
from test_raw import write_mrd

from companion.data import volumes
from companion.data.cfl import write_cfl
from companion.data.intake.look import look
from companion.data.nifti import save_nifti
from companion.operators.mri import birdcage_maps, fft
from companion.papers.aid import data as aid
from companion.papers.latent3d import data as latent3d
from companion.parameters import read_yaml
from companion.workbench.runner import run_notebook

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PEOPLE = {"Lovelace^Augusta": "MRN-0815", "Turing^Mathison": "MRN-0816", "Hopper^Brewster": "MRN-0817"}
PLANES = ("axial", "sagittal", "coronal")


def series(folder, array, affine, person="Lovelace^Augusta", **more):
    """A DICOM series of a person, in a folder called after them, as exports are."""
    uid = f"1.2.{list(PEOPLE).index(person)}"
    described = dict(series=f"{uid}.1", PatientName=person, PatientID=PEOPLE[person], StudyInstanceUID=uid)
    return write(
        folder / f"{person.replace('^', '_').upper()}_{PEOPLE[person]}" / "t1", array, affine, **described, **more
    )


def sequences(source, out, **options):
    """Prepare a folder as aid/1_data does."""
    options = {"image_size": 24, "frames": 4, "validation_share": 0.0, "test_share": 0.0, "acs": 12} | options
    return aid.prepare(aid.PrepareData(source=str(source), data=str(out), **options), progress=False)


# -------------------------------------------------------------------------------------------------------------- DICOM


@pytest.mark.parametrize("plane", PLANES)
def test_a_dicom_series_of_any_plane_gives_axial_sequences(tmp_path, plane):
    array, affine = known(plane, (14, 15, 16), (1, 1, 1))
    series(tmp_path / "d", array, affine)
    made = sequences(tmp_path / "d", tmp_path / "a.h5", image_size=16, frames=14)
    shown = made.read("magnitude")[:, :, 0] * made.read("scale")[:, None, None, None]
    to_world = np.eye(4)
    to_world[:3, :3] = np.diag([-1.0, -1, 1])  # columns to the right of the reader are the person's left
    world = affine[:3, :3] @ np.stack(np.meshgrid(*map(np.arange, array.shape[::-1]), indexing="ij")).reshape(3, -1)
    at = np.round(world - world.min(1, keepdims=True)).astype(int)  # R, A, S from the corner
    size = at.max(1) + 1
    expected = np.zeros(size)
    expected[tuple(at)] = array.transpose(2, 1, 0).reshape(-1)
    expected = expected.transpose(2, 1, 0)[:, ::-1]  # slices to S, rows to P, columns to R
    before = [(16 // 2 - n // 2) for n in expected.shape[1:]]
    inner = (slice(None), *(slice(b, b + n) for b, n in zip(before, expected.shape[1:], strict=True)))
    assert np.allclose(shown[0][inner], expected[:14], atol=1e-3 * array.max())


def test_stored_slices_and_axes_are_kept_where_asked(tmp_path):
    array, affine = known("sagittal", (6, 15, 16), (1, 1, 1))
    series(tmp_path / "d", array, affine)
    for number, options in enumerate(({"plane": "stored"}, {"axis": 0}, {"plane": "sagittal"})):
        made = sequences(tmp_path / "d", tmp_path / f"{number}.h5", image_size=16, frames=6, **options)
        assert made.shapes["magnitude"] == (1, 6, 1, 16, 16), options


def test_a_cine_in_dicom_is_its_frames_in_time(tmp_path):
    array, affine = known("axial", (1, 20, 20), (1.5, 1.5, 8))
    for t in range(5):
        write(tmp_path / "d", array + 100 * t, affine, prefix=f"T{t}", start=t, TemporalPositionIdentifier=t + 1)
    made = sequences(tmp_path / "d", tmp_path / "a.h5", image_size=20, frames=5)
    frames = made.read("magnitude")[0, :, 0] * made.read("scale")[0]
    assert np.allclose(frames, array + 100 * np.arange(5)[:, None, None], rtol=1e-3)


def test_a_stripped_dicom_series_is_the_volume_that_its_nifti_file_is(tmp_path, monkeypatch):
    monkeypatch.setattr(volumes, "check_affine", lambda volume, name: None)  # 96 mm, which no head measures
    options = {"shape": (16, 16, 16), "voxel_mm": (8, 8, 8), "validation_share": 0.0, "test_share": 0.0}
    affine = known("sagittal", (24, 24, 24), (4, 4, 4))[1]
    for i, person in enumerate(PEOPLE):
        series(tmp_path / "dicom", head(seed=i).astype(np.uint16), affine, person)
        save_nifti(tmp_path / f"nifti/p{i}_T1w.nii.gz", head(seed=i).astype(np.uint16), affine=affine)
    made = []
    for kind in ("dicom", "nifti"):
        p = latent3d.PrepareData(source=str(tmp_path / kind), data=str(tmp_path / f"{kind}.h5"), **options)
        made.append(latent3d.prepare(p, progress=False))
    order = np.argsort(list(PEOPLE))  # of their folders
    assert np.array_equal(made[0].read("image"), made[1].read("image")[order])
    assert np.allclose(made[0].read("affine"), made[1].read("affine")[order], atol=0.01)


def test_a_run_folder_holds_nothing_of_the_patient(tmp_path):
    """The notebook itself: names of folders, tables, skipped files, parameters, outputs."""
    for i, person in enumerate(PEOPLE):
        files = series(tmp_path / "export", *known("oblique", (6, 30, 28), (2 + i, 2, 3)), person)
    content = files[-1].read_bytes()
    files[-1].write_bytes(content[: len(content) // 2])
    values = read_yaml(NOTEBOOKS / "params" / "aid" / "1_data" / "smoke.yaml") | {
        "device": "cpu", "source": str(tmp_path / "export"), "data": str(tmp_path / "out" / "data.h5"),
        "validation_share": 0.0, "test_share": 0.0, "frames": 4,
    }  # fmt: skip
    run_notebook(NOTEBOOKS / "aid" / "1_data.ipynb", values, out=str(tmp_path / "out" / "run"))
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) > 4
    words = {word for name in PEOPLE for word in name.split("^")} | set(PEOPLE.values()) | {"18151210"}
    for path in written:
        text = f"{path.name} ".encode() + path.read_bytes()
        for word in words:
            for spelled in (word, word.upper(), word.lower()):
                assert spelled.encode() not in text, f"{spelled} in {path.name}"


def test_codes_of_people_cannot_be_guessed_and_agree_within_a_folder(tmp_path):
    import hashlib
    import subprocess
    import sys

    for person in list(PEOPLE)[:2]:
        for visit in (1, 2):
            array, affine = known()
            uid = f"1.2.{list(PEOPLE).index(person)}.{visit}"
            write(tmp_path / "d" / f"{uid}", array, affine, series=uid, PatientName=person, PatientID=PEOPLE[person])
    program = "import sys; from companion.data.intake.look import look; print(look(sys.argv[1]))"
    told = [subprocess.run([sys.executable, "-c", program, str(tmp_path / "d")], capture_output=True, text=True).stdout
            for _ in range(2)]  # fmt: skip
    people = [item.person for item in look(tmp_path / "d").items]
    assert people == ["person#1", "person#1", "person#2", "person#2"]
    assert all(t.count("person='person#1'") == 2 for t in told)
    for secret in (*PEOPLE.values(), *PEOPLE, "Lovelace"):
        for digest in (hashlib.sha256, hashlib.md5, hashlib.sha1):
            assert digest(secret.encode()).hexdigest()[:8] not in told[0]
    assert told[0] != told[1]  # what is kept of an identity inside differs from process to process


def test_people_are_known_by_names_where_dicom_is_anonymous(tmp_path):
    for i, who in enumerate(("ANONYMOUS", "xxxx", "")):
        array, affine = known()
        write(tmp_path / f"d/subject{i}/t1", array, affine, series=f"1.2.{i}", PatientName=who, PatientID=who)
    assert [item.person for item in look(tmp_path / "d").items] == ["subject0", "subject1", "subject2"]


# --------------------------------------------------------------------------------------------------------- raw k-space


def scanned(slices=4, coils=3, shape=(32, 24)):
    """Images (slice, y, x) of magnitude 1 at most, and k-space (slice, coil, y, x) of them."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, shape[0]), torch.linspace(-1, 1, shape[1]), indexing="ij")
    images = torch.stack([((y / 0.4) ** 2 + (x / (0.5 + 0.1 * s)) ** 2 < 1) * (0.8 + 0.2 * y) for s in range(slices)])
    maps = birdcage_maps(shape, coils)
    return images.numpy(), fft(maps * images[:, None]).numpy().astype(np.complex64)


WRITERS = {
    "ISMRMRD": (lambda f, k: write_mrd(f / "s0.h5", k), {}),
    "BART": (lambda f, k: write_cfl(f / "s0", k.transpose(2, 3, 1, 0)[:, :, None, :, *[None] * 9]), {}),
    "NumPy": (lambda f, k: np.save(f / "s0.npy", k), {"axes": "slice coil y x"}),
    "MATLAB": (lambda f, k: scipy.io.savemat(f / "s0.mat", {"data": k.transpose(2, 3, 0, 1)}),
               {"axes": "y x slice coil"}),
    "CMRxRecon": (lambda f, k: scipy.io.savemat(
        f / "s0.mat", {"kspace_full": np.stack([k.transpose(2, 3, 1, 0), 2 * k.transpose(2, 3, 1, 0)], -1)}),
        {"which": "frame 1"}),
}  # fmt: skip


@pytest.mark.parametrize("form", WRITERS)
def test_kspace_of_every_format_gives_the_images(tmp_path, form):
    images, k = scanned()
    folder = tmp_path / "raw"
    folder.mkdir()
    write_it, options = WRITERS[form]
    write_it(folder, k)
    over = 2 if form == "ISMRMRD" else 1  # whose header says that the readout is oversampled
    made = sequences(folder, tmp_path / "a.h5", image_size=32, magnitude=True, **options)
    found = made.read("magnitude")[0, :, 0]
    rows = images[:, 8:24] if over == 2 else images
    rows = rows / rows.max()
    at = tuple(slice((32 - n) // 2, (32 - n) // 2 + n) for n in rows.shape[1:])
    if over == 1:
        assert np.sqrt(np.mean((found[:, at[0], at[1]] - rows) ** 2)) < 0.06
    assert found.shape == (4, 32, 32) and 0.9 < found.max() < 1.001


def test_what_must_be_chosen_or_is_undersampled_is_said(tmp_path):
    _, k = scanned()
    for name, value in {"several": np.stack([k, k], -1), "holes": k * (np.arange(24) % 2 == 0)}.items():
        folder = tmp_path / name
        folder.mkdir()
        np.save(folder / "s0.npy", value)
    with pytest.raises(ValueError, match="holds 2 of echo; choose"):
        sequences(tmp_path / "several", tmp_path / "a.h5", axes="slice coil y x echo")
    with pytest.raises(ValueError, match="axes .* are not stated"):
        sequences(tmp_path / "several", tmp_path / "a.h5")
    with pytest.raises(ValueError, match="undersampled"):
        sequences(tmp_path / "holes", tmp_path / "a.h5", axes="slice coil y x")
    with pytest.raises(ValueError, match="write names and numbers"):
        sequences(tmp_path / "several", tmp_path / "a.h5", axes="slice coil y x echo", which="echo first")
    made = sequences(tmp_path / "several", tmp_path / "a.h5", axes="slice coil y x echo", which="echo 1")
    assert made.shapes["image"] == (1, 4, 1, 24, 24)


def test_a_3d_scan_is_slices_along_its_second_phase_encoding(tmp_path):
    images, k = scanned(8)
    along = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(k, 0), axis=0, norm="ortho"), 0)  # (z, coil, y, x)
    (tmp_path / "raw").mkdir()
    np.save(tmp_path / "raw/s0.npy", along.astype(np.complex64))
    made = sequences(tmp_path / "raw", tmp_path / "a.h5", image_size=32, frames=8, magnitude=True, axes="z coil y x")
    found, rows = made.read("magnitude")[0, :, 0, :, 4:28], images / images.max()
    assert np.sqrt(np.mean((found - rows) ** 2)) < 0.06


@pytest.mark.skipif(not fuzzing.REAL.is_file(), reason="needs the real file gre.dat")
def test_a_real_siemens_file_becomes_a_sequence(tmp_path):
    pytest.importorskip("twixtools", reason="needs the extra formats")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/s0.dat").write_bytes(fuzzing.REAL.read_bytes())
    with pytest.raises(ValueError, match="1 frames, fewer than a sequence of 2"):
        sequences(tmp_path / "raw", tmp_path / "a.h5", frames=2)
