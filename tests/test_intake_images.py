"""Image files of every odd kind: read rightly, or refused by name with the reason."""

import gzip
import struct

import nibabel
import numpy as np
import pytest
from nibabel import orientations

from companion.data.intake.readers import read_image, sniff
from companion.data.intake.records import Unreadable

AFFINE = np.array([[-4.0, 0, 0, 80], [0, 4, 0, -80], [0, 0, 4, -60], [0, 0, 0, 1]])


def head(n=24, seed=0):
    """Two tissues with texture in an ellipsoid, int16; 0 outside."""
    g = np.stack(np.meshgrid(*[np.linspace(-1, 1, n)] * 3, indexing="ij"))
    centre = np.random.default_rng(seed).uniform(-0.1, 0.1, 3)[:, None, None, None]
    d = (((g - centre) / np.array([0.75, 0.85, 0.7])[:, None, None, None]) ** 2).sum(0)
    return np.where(d < 1, 600 + 300 * (d < 0.45) + 40 * np.sin(9 * g[0]) * np.cos(7 * g[1]), 0).astype(np.int16)


def save(path, x, affine=AFFINE, kind=nibabel.Nifti1Image):
    image = kind(x, affine)
    if hasattr(image, "set_sform"):
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
    nibabel.save(image, path)
    return path


def patched(path, offset, content):
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(bytes(raw))
    return path


def centre_mm(volume):
    """Where the bright part lies in the world."""
    at = np.argwhere(volume.array > 0).mean(0)[::-1]
    return (volume.affine @ [*at, 1])[:3]


def same(volume, x):
    np.testing.assert_array_equal(volume.array.transpose(2, 1, 0), x)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-3)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nii.bz2", "UPPER.NII.GZ", "nämé 1.nii.gz"])
def test_names_and_compressions(tmp_path, name):
    path = save(tmp_path / name, head())
    same(read_image(path), head())
    assert sniff(path)[0].shape == (24, 24, 24)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image, nibabel.MGHImage, nibabel.Nifti1Pair])
def test_nibabels_formats(tmp_path, kind):
    ending = {nibabel.MGHImage: "mgz", nibabel.Nifti1Pair: "img"}.get(kind, "nii.gz")
    path = save(tmp_path / f"a.{ending}", head().astype(np.float32), kind=kind)
    same(read_image(path), head().astype(np.float32))
    if ending == "img":
        same(read_image(tmp_path / "a.hdr"), head().astype(np.float32))
        path.unlink()
        with pytest.raises(Unreadable, match="a.img, is missing"):
            read_image(tmp_path / "a.hdr")


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "ASL", "IPL"])
def test_the_order_of_axes_does_not_move_anything(tmp_path, codes):
    image = nibabel.load(save(tmp_path / "ref.nii.gz", head(seed=3)))
    turn = orientations.ornt_transform(orientations.io_orientation(image.affine), orientations.axcodes2ornt(codes))
    nibabel.save(image.as_reoriented(turn), tmp_path / "turned.nii.gz")
    here, there = read_image(tmp_path / "ref.nii.gz"), read_image(tmp_path / "turned.nii.gz")
    np.testing.assert_allclose(centre_mm(here), centre_mm(there), atol=1e-3)


@pytest.mark.parametrize("ending", ["mha", "mhd", "nrrd"])
def test_itk_formats_lie_where_the_nifti_lies(tmp_path, ending):
    sitk = pytest.importorskip("SimpleITK")
    oblique = AFFINE.copy()
    turn, _ = np.linalg.qr(np.array([[1.0, 0.2, 0.1], [-0.2, 1.0, 0.05], [-0.1, 0.0, 1.0]]))
    oblique[:3, :3] = turn @ AFFINE[:3, :3]
    save(tmp_path / "a.nii.gz", head(), oblique)
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")), str(tmp_path / f"b.{ending}"), True)
    nifti, other = read_image(tmp_path / "a.nii.gz"), read_image(tmp_path / f"b.{ending}")
    np.testing.assert_allclose(other.affine, nifti.affine, atol=0.01)
    np.testing.assert_array_equal(other.array, nifti.array)


def test_a_header_may_not_lead_to_files_elsewhere(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "secret.raw").write_bytes(bytes(8))
    text = "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = ../secret.raw\n"
    (tmp_path / "deep/a.mhd").write_text(text)
    with pytest.raises(Unreadable, match="not beside it"):
        read_image(tmp_path / "deep/a.mhd")


@pytest.mark.parametrize("dtype", [">i2", ">f4", "u1", "u2", "i4", "f8", "i1", "u4", "i8"])
def test_types_and_byte_orders(tmp_path, dtype):
    x = (head() // (8 if dtype in ("u1", "i1") else 1)).astype(dtype)
    image = nibabel.Nifti1Image(
        x, AFFINE, nibabel.Nifti1Header(endianness=">" if dtype[0] == ">" else "<"), dtype=x.dtype
    )
    image.set_data_dtype(np.dtype(dtype))
    image.header.set_xyzt_units("mm")
    image.set_sform(AFFINE, 1)
    nibabel.save(image, tmp_path / "a.nii")
    volume = read_image(tmp_path / "a.nii")
    same(volume, x)
    assert volume.array.dtype.isnative


@pytest.mark.parametrize("slope, expected", [(0.0, 1.0), (float("nan"), 1.0), (2.5, 2.5), (0.001, 0.001)], ids=str)
def test_scaling_as_the_standard_has_it(tmp_path, slope, expected):
    path = patched(save(tmp_path / "a.nii", head()), 112, struct.pack("<ff", slope, 0.0))
    np.testing.assert_allclose(read_image(path).array, expected * head().transpose(2, 1, 0), rtol=1e-6)


@pytest.mark.parametrize("unit, factor", [("meter", 0.001), ("micron", 1000.0), ("mm", 1.0)])
def test_lengths_become_millimetres(tmp_path, unit, factor):
    image = nibabel.Nifti1Image(head(), np.diag([4 * factor] * 3 + [1]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_allclose(read_image(tmp_path / "a.nii.gz").voxel_mm, 4.0, rtol=1e-5)


def test_complex_values_keep_their_phase(tmp_path):
    x = head().astype(np.complex64) * np.exp(1j * np.linspace(-3, 3, 24))[:, None, None]
    volume = read_image(save(tmp_path / "a.nii.gz", x.astype(np.complex64)))
    np.testing.assert_allclose(np.abs(volume.array).transpose(2, 1, 0), head(), atol=1e-3)
    assert volume.array.dtype == np.complex64


@pytest.mark.parametrize(
    "shape, read", [((24, 24, 24, 1), (24, 24, 24)), ((24, 24), (1, 24, 24)), ((24, 24, 1), (1, 24, 24))]
)
def test_axes_of_length_one(tmp_path, shape, read):
    x = head()[:, :, : shape[2] if len(shape) > 2 else 1].reshape(shape)
    assert read_image(save(tmp_path / "a.nii.gz", x)).array.shape == read


def test_one_frame_of_many(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.stack([head(), 2 * head()], -1))
    assert sniff(path)[0].axes == ("t", "z", "y", "x")
    with pytest.raises(Unreadable, match="4D, 2 volumes"):
        read_image(path)
    same(read_image(path, frame=1), 2 * head())


BAD = {
    "empty, 0 bytes": lambda p: p.write_bytes(b""),
    "Git LFS pointer": lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "web page": lambda p: p.write_text("<!DOCTYPE html><html>not found</html>"),
    "AppleDouble": lambda p: p.write_bytes(b"\0\5\26\7" + bytes(90)),
    "Zstandard": lambda p: p.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(range(90))),
    "RGB colour": lambda p: save(p, np.zeros((9, 9, 9), [(c, "u1") for c in "RGB"])),
    "displacement field": lambda p: save(p, np.zeros((9, 9, 9, 1, 3), np.float32)),
    "Analyze": lambda p: p.write_bytes(
        gzip.compress(nibabel.AnalyzeImage(head(), AFFINE).header.binaryblock + bytes(200))
    ),
    "NaN or infinite": lambda p: save(p, np.where(head() == 0, np.nan, head()).astype(np.float32)),
    "more than 32-bit floats": lambda p: save(p, head() * 1e300),
    "has no affine": lambda p: nibabel.save(nibabel.Nifti1Image(head(), None), p),
    "statistical map": lambda p: nibabel.save(_intent(head(), "t test"), p),
}


def _intent(x, intent):
    image = nibabel.Nifti1Image(x, AFFINE)
    image.header.set_intent(intent, (3,))
    return image


@pytest.mark.parametrize("reason", BAD)
def test_bad_files_are_refused_by_name(tmp_path, reason):
    path = tmp_path / "q9_T1w.nii.gz"
    BAD[reason](path)
    with pytest.raises(Unreadable, match=reason) as error:
        read_image(path)
    assert "q9_T1w.nii.gz" in str(error.value)


@pytest.mark.parametrize(
    "offset, content, reason",
    [
        (70, struct.pack("<h", 1234), "unknown type of values"),
        (112, struct.pack("<f", float("inf")), "scaled by inf"),
        (123, b"\x05", "unknown unit of length"),
        (280, bytes(48), "voxel size 0 x 0 x 0"),  # sform
        (42, struct.pack("<h", -3), "dimensions"),
        (108, struct.pack("<f", 7.0), "at byte 7"),
    ],
    ids=lambda v: v if isinstance(v, str) and " " in v else "",
)
def test_damaged_headers_are_refused(tmp_path, offset, content, reason):
    with pytest.raises(Unreadable, match=reason):
        read_image(patched(save(tmp_path / "a.nii", head()), offset, content))


def test_a_voxel_size_of_zero_or_two_sides_are_refused(tmp_path):
    image = nibabel.Nifti1Image(head(), AFFINE)
    image.set_sform(None, 0)
    image.set_qform(AFFINE, 1)
    nibabel.save(image, tmp_path / "q.nii")
    same(read_image(tmp_path / "q.nii"), head())
    with pytest.raises(Unreadable, match="voxel size 0 x 4 x 4"):
        read_image(patched(tmp_path / "q.nii", 80, struct.pack("<f", 0.0)))
    image.set_sform(np.diag([-1, 1, 1, 1]) @ AFFINE, 1)
    nibabel.save(image, tmp_path / "s.nii")
    with pytest.raises(Unreadable, match="left and right"):
        read_image(tmp_path / "s.nii")
    with pytest.raises(Unreadable, match="singular"):
        flat = AFFINE.copy()
        flat[:3, 2] = flat[:3, 1]
        read_image(patched(save(tmp_path / "f.nii", head()), 280, flat[:3].astype("<f4").tobytes()))


@pytest.mark.parametrize("cut", [0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("ending", ["nii", "nii.gz", "mgz"])
def test_truncated_files_are_refused(tmp_path, cut, ending):
    path = save(tmp_path / f"a.{ending}", head(), kind=nibabel.MGHImage if ending == "mgz" else nibabel.Nifti1Image)
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    with pytest.raises(Unreadable, match="truncated|damaged"):
        read_image(path)


def test_every_flipped_byte_of_a_compressed_file_is_noticed(tmp_path):
    """Flips of what says nothing about voxels, such as the time in the header of gzip, may pass: nothing changes."""
    path = save(tmp_path / "a.nii.gz", head(12, seed=1))
    good, expected = path.read_bytes(), read_image(path)
    rng, refused = np.random.default_rng(0), 0
    for at in rng.integers(0, len(good), 200):
        bad = bytearray(good)
        bad[at] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(bad))
        try:
            volume = read_image(path)
        except Unreadable:
            refused += 1
        else:
            np.testing.assert_array_equal(volume.array, expected.array)
            np.testing.assert_array_equal(volume.affine, expected.affine)
            assert at < 10
    assert refused > 190


def test_a_file_that_is_not_compressed_after_all_is_read(tmp_path):
    save(tmp_path / "a.nii", head())
    (tmp_path / "b.nii.gz").write_bytes((tmp_path / "a.nii").read_bytes())
    same(read_image(tmp_path / "b.nii.gz"), head())


def test_links_to_nothing_say_what_to_fetch(tmp_path):
    (tmp_path / "a.nii.gz").symlink_to("../.git/annex/objects/xx/MD5E-s1")
    with pytest.raises(FileNotFoundError, match="datalad get"):
        read_image(tmp_path / "a.nii.gz")
