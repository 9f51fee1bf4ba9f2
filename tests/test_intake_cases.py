"""Folders as people have reported them, through the preparations of the notebooks."""

import gzip
import struct
import weakref
from dataclasses import replace

import h5py
import nibabel
import numpy as np
import pytest
from test_intake_images import AFFINE, head, save

from companion.data import volumes
from companion.data.intake.persons import Unclear
from companion.papers.aid import data as aid
from companion.papers.latent3d import data as latent3d


def latent(source, out, **options):
    """Prepare a folder as latent3d/1_data does, on a tiny grid."""
    options = {"validation_share": 0.2, "test_share": 0.2} | options
    p = latent3d.PrepareData(source=str(source), data=str(out), shape=(16, 16, 16), voxel_mm=(8, 8, 8), **options)
    return latent3d.prepare(p, progress=False)


def people_of(prepared):
    """Split -> people, for who comes once only."""
    whose = prepared.attrs["people"]
    split = {part: {whose[n.rsplit("/", 1)[0] if n not in whose else n] for n in names}
             for part, names in prepared.split.items()}  # fmt: skip
    assert not any(a & b for i, a in enumerate(split.values()) for b in list(split.values())[i + 1 :])
    return split


@pytest.fixture(autouse=True)
def small_heads(monkeypatch):
    """The volumes here measure 96 mm, which no head does."""
    monkeypatch.setattr(volumes, "check_affine", lambda volume, name: None)


def four(folder):
    folder.mkdir(parents=True)
    for i in range(4):
        save(folder / f"p{i}_T1w.nii.gz", head(seed=i))
    return folder


def damage_stream(content):
    content = bytearray(content)
    for at in range(len(content) // 2, len(content) // 2 + 40):
        content[at] ^= 0x5A
    return bytes(content)


def unknown_type(content):
    raw = bytearray(gzip.decompress(content))
    raw[70:72] = struct.pack("<h", 1234)
    return gzip.compress(bytes(raw))


ODD = {
    "corrupt": (damage_stream, "damaged"),
    "truncated": (lambda c: c[: len(c) // 2], "truncated"),
    "crc": (lambda c: c[:-6] + bytes([c[-6] ^ 0xFF]) + c[-5:], "damaged"),
    "unknown type": (unknown_type, "unknown type"),
    "LFS": (lambda c: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n", "Git LFS"),
    "empty": (lambda c: b"", "empty"),
    "web page": (lambda c: b"<html>404</html>", "web page"),
}


@pytest.mark.parametrize("kind", ODD)
def test_one_odd_file_does_not_end_the_preparation(tmp_path, kind):
    folder = four(tmp_path / "files")
    change, reason = ODD[kind]
    (folder / "q9_T1w.nii.gz").write_bytes(change((folder / "p0_T1w.nii.gz").read_bytes()))
    made = latent(folder, tmp_path / "out.h5")
    assert len(made.subjects) == 4 and reason in made.attrs["skipped"]["q9_T1w.nii.gz"]
    assert [len(v) for v in people_of(made).values()] == [2, 1, 1]


def test_odd_images_and_folders_called_like_files(tmp_path):
    folder = four(tmp_path / "files")
    rgb = np.zeros((24, 24, 24), [(c, "u1") for c in "RGB"])
    save(folder / "q9_T1w.nii.gz", rgb)
    save(folder / "q8_T1w.nii.gz", np.where(head() == 0, np.nan, head()).astype(np.float32))
    (folder / "q7_T1w.nii").mkdir()
    save(folder / "q7_T1w.nii/q7_T1w.nii", head(seed=9))
    save(folder / "q6_T1w.nii.gz", head(seed=8).astype(np.complex64) * 1j)  # its real part is 0
    (folder / "q5_T1w.nii.gz").write_bytes(gzip.compress(nibabel.Nifti1Image(head(seed=7), AFFINE).to_bytes())[:-4])
    (folder / "._p0_T1w.nii.gz").write_bytes(b"\0\5\26\7" + bytes(90))
    made = latent(folder, tmp_path / "out.h5")
    assert set(made.subjects) == {*(f"p{i}_T1w.nii.gz" for i in range(4)), "q6_T1w.nii.gz", "q7_T1w.nii/q7_T1w.nii"}
    assert "RGB" in made.attrs["skipped"]["q9_T1w.nii.gz"] and "NaN" in made.attrs["skipped"]["q8_T1w.nii.gz"]
    assert set(made.attrs["skipped"]) == {"q9_T1w.nii.gz", "q8_T1w.nii.gz", "q5_T1w.nii.gz"}
    assert made.read("image").max((1, 2, 3, 4)).min() > 0.9


def test_a_limit_counts_files_that_can_be_used(tmp_path):
    folder = four(tmp_path / "files")
    (folder / "a0_T1w.nii.gz").write_bytes(b"")
    made = latent(folder, tmp_path / "out.h5", subjects=3)
    assert made.subjects == ("p0_T1w.nii.gz", "p1_T1w.nii.gz", "p2_T1w.nii.gz")


@pytest.mark.parametrize(
    "naming", ["BRATS_{i:03d}.nii.gz", "10030{i}/T1w/T1w_restore_brain.nii.gz", "subj0{i}/T1w.nii.gz"]
)
def test_everybody_is_found_whatever_the_names(tmp_path, naming):
    for i in range(6):
        (tmp_path / "files" / naming.format(i=i)).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / "files" / naming.format(i=i), head(seed=i))
    made = latent(tmp_path / "files", tmp_path / "out.h5")
    assert len(made.subjects) == 6 and [len(v) for v in people_of(made).values()] == [4, 1, 1]


def test_a_bids_folder_with_sessions_and_links(tmp_path):
    root = tmp_path / "bids"
    for i in range(1, 4):
        for s in (1, 2):
            folder = root / f"sub-{i:02d}/ses-{s}/anat"
            folder.mkdir(parents=True)
            save(folder / f"sub-{i:02d}_ses-{s}_T1w.nii.gz", head(seed=i))
            (folder / f"sub-{i:02d}_ses-{s}_T1w.json").write_text("{}")
    for name in ("README", "dataset_description.json", "participants.tsv", ".git/HEAD", ".datalad/config"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("{}")
    made = latent(root, tmp_path / "out.h5")
    assert len(made.subjects) == 6 and not made.attrs["skipped"]
    assert [len(v) for v in people_of(made).values()] == [1, 1, 1]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/data").symlink_to(root)
    linked = latent(tmp_path / "linked", tmp_path / "linked.h5")
    assert len(linked.subjects) == 6


def test_fmriprep_gives_t1w_with_their_masks(tmp_path):
    for i in range(1, 4):
        folder, s, x = tmp_path / f"fmriprep/sub-{i:02d}/anat", f"sub-{i:02d}", head(seed=i)
        folder.mkdir(parents=True)
        save(folder / f"{s}_desc-preproc_T1w.nii.gz", x + 5)  # no background of 0: the mask is needed
        save(folder / f"{s}_T2w.nii.gz", np.where(x > 0, 1500 - x, 0).astype(x.dtype))
        save(folder / f"{s}_desc-brain_mask.nii.gz", (x > 0).astype("u1"))
        save(folder / f"{s}_dseg.nii.gz", ((x > 0).astype("u1") + (x > 800)).astype("u1"))
        save(folder / f"{s}_label-GM_probseg.nii.gz", (x > 800).astype("f4"))
    made = latent(tmp_path / "fmriprep", tmp_path / "out.h5")
    assert [n.rsplit("/", 1)[1] for n in made.subjects] == [f"sub-{i:02d}_desc-preproc_T1w.nii.gz" for i in (1, 2, 3)]
    left = made.attrs["skipped"]
    assert left["sub-01/anat/sub-01_T2w.nii.gz"] == "T2w, T1w is used"
    assert left["sub-01/anat/sub-01_dseg.nii.gz"].startswith("labels") and len(left) == 9
    other = latent(tmp_path / "fmriprep", tmp_path / "t2.h5", contrast="T2w")
    assert all("T2w" in name for name in other.subjects) and len(other.subjects) == 3


def test_one_volume_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """However many people there are: what was read of one is gone when the next is read."""
    tracked, most, read = [], [], volumes.read_image

    class Held(np.ndarray):
        """NumPy's own arrays cannot be in a WeakSet."""

    def held(*args, **options):
        volume = read(*args, **options)
        array = volume.array.view(Held)
        tracked.append(weakref.ref(array))
        most.append(sum(r() is not None for r in tracked))
        return replace(volume, array=array)

    monkeypatch.setattr(volumes, "read_image", held)
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(12):
        save(folder / f"p{i}_T1w.nii.gz", head(12, seed=i))
    latent(folder, tmp_path / "out.h5")
    assert len(most) == 12 and max(most) == 1


def kspace(path, seed, **attrs):
    rng = np.random.default_rng(seed)
    image = np.zeros((4, 2, 24, 24), complex)
    image[..., 6:18, 6:18] = 1 + rng.normal(size=(4, 2, 12, 12))
    with h5py.File(path, "w") as file:
        file["kspace"] = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image, (2, 3))), (2, 3)).astype(np.complex64)
        for name, value in attrs.items():
            file.attrs[name] = value


@pytest.mark.parametrize("stated", [True, False])
def test_repetitions_of_one_person_stay_together(tmp_path, stated):
    """M4Raw: several files a person, with and without a patient_id."""
    folder = tmp_path / "m4raw"
    folder.mkdir()
    for i in range(4):
        for r in (1, 2, 3):
            attrs = {"patient_id": f"20220610{i:02d}"} if stated else {}
            kspace(folder / f"20220610{i:02d}_T10{r}.h5", 10 * i + r, **attrs)
    p = aid.PrepareData(source=str(folder), data=str(tmp_path / "out.h5"), image_size=16, frames=4,
                        validation_share=0.2, test_share=0.2, acs=12)  # fmt: skip
    made = aid.prepare(p, progress=False)
    assert len(made.subjects) == 12 and [len(v) for v in people_of(made).values()] == [2, 1, 1]
    with pytest.raises(Unclear, match="give a table"):
        for path in folder.iterdir():
            with h5py.File(path, "r+") as file:
                file.attrs.pop("patient_id", None)
        for number, path in enumerate(sorted(folder.iterdir())):
            path.rename(folder / f"scan{number}.h5")
        aid.prepare(replace(p, data=str(tmp_path / "other.h5")), progress=False)
