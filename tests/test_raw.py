"""Raw MRI of every format as one record: independent writers, real files, and what must be refused."""

import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch

from companion.data import fastmri
from companion.data.cfl import write_cfl
from companion.data.intake.records import Unreadable
from companion.data.raw.arrays import read_cfl_scan, read_mat, read_npy, sniff_cfl, sniff_mat, sniff_npy
from companion.data.raw.mrd import read_mrd, sniff_mrd
from companion.data.raw.scan import raw_scan, recentred
from companion.data.raw.twix import read_twix, sniff_twix
from companion.operators.mri import ifft

SHARED = Path(__file__).parents[2] / "shared"
needs_real = pytest.mark.skipif(not (SHARED / "real").is_dir(), reason="needs shared/real beside the checkout")
needs_cases = pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="needs shared/cases beside the checkout")


def kspace(slices=2, coils=3, shape=(32, 24), seed=0):
    """k-space (slice, coil, *shape) of ellipses seen by smooth coils, echo in the middle, with a little noise."""
    rng = np.random.default_rng(seed)
    grids = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    radius = sum((g / 0.7) ** 2 for g in grids)
    head = (radius < 1) * (0.7 + 0.3 * (radius < 0.3)) * np.exp(0.3j * grids[-1])
    coil = [np.exp(-((grids[-1] - np.cos(a)) ** 2 + (grids[-2] - np.sin(a)) ** 2)) for a in range(coils)]
    images = np.stack([[(1 + 0.1 * s) * head * c for c in coil] for s in range(slices)])
    axes = tuple(range(-len(shape), 0))
    k = np.fft.fftshift(np.fft.fftn(np.fft.ifftshift(images, axes), axes=axes, norm="ortho"), axes)
    return (k + 1e-3 * (rng.normal(size=k.shape) + 1j * rng.normal(size=k.shape))).astype(np.complex64)


def magnitude(kspace):
    return ifft(torch.as_tensor(kspace)).abs()


# -------------------------------------------------------------------------------------------------------- one record


@pytest.mark.parametrize("by", [(0, 0), (8, 0), (-5, 7), (1, -1)])
def test_an_echo_off_the_middle_is_found_and_turning_to_it_leaves_the_magnitude(by):
    k = torch.from_numpy(kspace(shape=(64, 48)))
    turned, shift = recentred(k.roll(by, (-2, -1)))
    expected = tuple(0 if abs(b) <= 1 else -b for b in by)
    assert shift == expected
    assert torch.allclose(magnitude(turned), magnitude(k), atol=1e-5)


def test_row_136_of_256_moves_data_and_mask_alike(tmp_path):
    k = kspace(1, 2, (256, 32))
    partial = np.zeros_like(k)
    partial[:, :, 8:] = k[:, :, :-8]  # the echo in row 136, the first 8 rows never acquired
    scan = raw_scan("a", partial)
    assert scan.shift == (-8, 0)
    assert torch.equal(scan.mask[0, 0, :, 0] == 0, torch.arange(256) >= 248)  # what lay before row 8
    assert int(scan.kspace.abs().square().sum((0, 1, 3)).argmax()) == 128
    kept = np.zeros_like(k)
    kept[:, :, :-8] = k[:, :, :-8]
    assert torch.allclose(magnitude(scan.kspace), magnitude(kept), atol=1e-5)


def test_samples_that_are_zero_in_all_coils_were_not_measured_whatever_a_mask_says():
    k = kspace()
    k[..., :4] = 0
    scan = raw_scan("a", k, np.ones(24))
    assert scan.mask.shape == (1, 1, 32, 24) and not scan.mask[..., :4].any() and scan.mask[..., 4:].all()
    assert scan.acceleration == pytest.approx(24 / 20)
    assert not raw_scan("a", kspace(), np.arange(24) % 2).kspace[..., ::2].any()


def test_coils_that_were_switched_off_are_left_out_with_a_word():
    k = kspace()
    k[:, 1] = 0
    noise = torch.ones(k.shape[1], 7) * torch.arange(k.shape[1])[:, None]
    scan = raw_scan("a", k, noise=noise)
    kept = [c for c in range(k.shape[1]) if c != 1]
    assert torch.equal(scan.kspace, torch.from_numpy(k[:, kept])) and scan.noise[:, 0].tolist() == kept
    assert "left out: [1]" in str(scan)


@pytest.mark.parametrize(
    ("given", "mask", "words"),
    [
        (np.full((1, 1, 4, 4), np.nan, np.complex64), None, "NaN"),
        (np.zeros((1, 1, 4, 4), np.complex64), None, "zero everywhere"),
        (np.ones((1, 1, 4, 4), np.float32), None, "complex"),
        (np.ones((4, 4), np.complex64), None, "slice, coil"),
        (kspace(), np.ones(7), "differ"),
    ],
)
def test_what_is_no_kspace_is_refused(given, mask, words):
    with pytest.raises(Unreadable, match=words):
        raw_scan("file", given, mask)


# ------------------------------------------------------------------------------------------------------------ ISMRMRD

HEADER = """<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
<subjectInformation><patientName>DOE^JANE</patientName><patientID>MRN-4711</patientID></subjectInformation>
<measurementInformation><protocolName>t1_tse</protocolName></measurementInformation>
<experimentalConditions><H1resonanceFrequency_Hz>63500000</H1resonanceFrequency_Hz></experimentalConditions>
<encoding><encodedSpace><matrixSize><x>{x}</x><y>{y}</y><z>{z}</z></matrixSize>
<fieldOfView_mm><x>400</x><y>240</y><z>{mm}</z></fieldOfView_mm></encodedSpace>
<reconSpace><matrixSize><x>{half}</x><y>{y}</y><z>{z}</z></matrixSize>
<fieldOfView_mm><x>200</x><y>240</y><z>{mm}</z></fieldOfView_mm></reconSpace>
<encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum><center>{centre}</center>
</kspace_encoding_step_1><kspace_encoding_step_2><minimum>0</minimum><maximum>{zlast}</maximum><center>{zc}</center>
</kspace_encoding_step_2></encodingLimits><trajectory>{trajectory}</trajectory></encoding></ismrmrdHeader>"""


def write_mrd(path, k, lines=None, centre=None, skip=0, trajectory="cartesian", noise=None, calibration=(), repeat=1,
              average=1, gap=5.0):  # fmt: skip
    """Write k (slice, coil, [z,] y, x) by the format's own package, one line after the other."""
    ismrmrd = pytest.importorskip("ismrmrd", reason="needs the package ismrmrd to write")
    k = k if k.ndim == 5 else k[:, :, None]
    slices, coils, depth, rows, width = k.shape
    lines = range(width) if lines is None else lines
    centre = width // 2 if centre is None else centre
    text = HEADER.format(x=rows, half=rows // 2, y=width, z=depth, mm=5 if depth == 1 else 2 * depth, last=width - 1,
                         centre=centre, zlast=depth - 1, zc=depth // 2, trajectory=trajectory)  # fmt: skip
    data = ismrmrd.Dataset(str(path), "dataset", create_if_needed=True)
    data.write_xml_header(text.encode())

    def add(values, flag=None, dwell=4.0, **counters):
        one = ismrmrd.Acquisition.from_array(np.ascontiguousarray(values))
        one.sample_time_us, one.center_sample = dwell, counters.pop("middle", values.shape[1] // 2)
        for name, value in counters.items():
            setattr(one.idx, name, value)
        one.position[:] = (0, 0, gap * counters.get("slice", 0))
        one.slice_dir[:] = (0, 0, 1)
        if flag:
            one.set_flag(flag)
        data.append_acquisition(one)

    if noise is not None:
        add(noise, ismrmrd.ACQ_IS_NOISE_MEASUREMENT, dwell=8.0)
    for r in range(repeat):
        for s in range(slices):
            for z in range(depth):
                for x in calibration:
                    add(k[s, :, z, :, x], ismrmrd.ACQ_IS_PARALLEL_CALIBRATION, slice=s, kspace_encode_step_2=z,
                        kspace_encode_step_1=x - width // 2 + centre)  # fmt: skip
                for x in lines:
                    for a in range(average):
                        add((1 + r) * (1 + (0.5 - a) * (average > 1)) * k[s, :, z, skip:, x], slice=s, repetition=r,
                            average=a, kspace_encode_step_2=z, kspace_encode_step_1=x - width // 2 + centre,
                            middle=rows // 2 - skip)  # fmt: skip
    add(k[0, :, 0, :, 0], ismrmrd.ACQ_IS_NAVIGATION_DATA)
    data.close()
    return path


def test_ismrmrd_slices_noise_and_oversampling(tmp_path):
    k = kspace(3, 4, (32, 24))
    noise = np.random.default_rng(1).normal(size=(4, 500)).astype(np.complex64)
    path = write_mrd(tmp_path / "a.h5", k, noise=noise, gap=6.5)
    what = sniff_mrd(path)
    assert what.shape == (3, 4, 32, 24) and what.axes == ("slice", "coil", "y", "x") and what.kind == "k-space"
    assert what.person.startswith("p") and "MRN" not in repr(what) and "DOE" not in repr(what)
    assert what.about["navigators, left out"] == 1
    scan = read_mrd([path])
    assert torch.allclose(scan.kspace, torch.from_numpy(k)) and scan.mask.all() and scan.shift == (0, 0)
    assert scan.voxel_mm == pytest.approx((6.5, 12.5, 10)) and scan.oversampling == (2, 1)
    assert torch.allclose(scan.noise, 2**0.5 * torch.from_numpy(noise))  # half the bandwidth of the image's lines
    assert "DOE" not in str(scan) and "MRN" not in str(scan)


def test_ismrmrd_partial_fourier_partial_echo_and_undersampling_land_at_their_place(tmp_path):
    k = kspace(1, 2, (32, 24))
    lines = [*range(6, 24, 2), 11, 13]
    path = write_mrd(tmp_path / "a.h5", k, lines=lines, centre=6, skip=8, calibration=range(8, 16))
    scan = read_mrd([path])
    measured = torch.zeros(32, 24)
    measured[8:, lines] = 1
    assert torch.equal(scan.mask[0, 0], measured)
    assert torch.allclose(scan.kspace, torch.from_numpy(k) * measured)
    assert torch.allclose(scan.calibration, torch.from_numpy(k[..., 8:16]))


def test_ismrmrd_three_dimensions_averages_and_repetitions(tmp_path):
    k = kspace(1, 2, (6, 16, 12))
    path = write_mrd(tmp_path / "a.h5", k, repeat=2, average=2)
    assert sniff_mrd(path).about["counts"] == {"repetition": 2}
    with pytest.raises(Unreadable, match="2 of repetition; choose with which='repetition 0'"):
        read_mrd([path])
    for r in (0, 1):
        scan = read_mrd([path], which={"repetition": r} if r else "repetition 0")
        assert scan.ndim == 3 and torch.allclose(scan.kspace, (1 + r) * torch.from_numpy(k), atol=1e-5)
    assert scan.voxel_mm == pytest.approx((2, 25, 20)) and scan.oversampling == (1, 2, 1)
    with pytest.raises(Unreadable, match="choose 0 to 1"):
        read_mrd([path], which={"repetition": 2})


def test_ismrmrd_that_does_not_fit_is_refused(tmp_path):
    k = kspace(1, 2, (16, 12))
    with pytest.raises(Unreadable, match="trajectory is radial"):
        read_mrd([write_mrd(tmp_path / "a.h5", k, trajectory="radial")])
    with pytest.raises(Unreadable, match="first phase encoding at"):
        read_mrd([write_mrd(tmp_path / "b.h5", k, centre=0)] if False else [_moved(tmp_path / "b.h5", k)])
    (tmp_path / "c.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:3000])
    with pytest.raises(Unreadable, match="truncated"):
        sniff_mrd(tmp_path / "c.h5")


def _moved(path, k):
    """A scan whose header says that line 40 is the middle of 12."""
    write_mrd(path, k)
    with h5py.File(path, "r+") as file:
        text = file["dataset/xml"][0]
        file["dataset/xml"][0] = text.replace(b"<center>6</center>", b"<center>40</center>")
    return path


# ------------------------------------------------------------------------------------------------------------ fastMRI


@pytest.fixture
def case():
    sys.path.insert(0, str(SHARED / "cases" / "04-fastmri-variants"))
    try:
        import fm

        yield fm
    finally:
        sys.path.pop(0)


@needs_cases
def test_what_was_not_acquired_is_not_in_the_mask(tmp_path, case):
    lim, k, mask = (0, 24, 47), case.kspace(lines=(8, 56)), np.zeros(64, bool)
    mask[::4], mask[28:36] = True, True
    path = case.write(str(tmp_path / "a.h5"), k * mask, case.header((128, 64, 1), (64, 64, 1), lim), mask=mask)
    volume = fastmri.open_volume(path)
    mask[:8] = mask[56:] = False
    assert torch.equal(volume.mask, torch.from_numpy(mask).float()) and volume.lines == (8, 53)
    scan = fastmri.read_fastmri([path])
    assert torch.equal(scan.mask[0, 0, 0], volume.mask)


@needs_cases
def test_undersampled_without_a_mask_is_known_by_its_zero_columns(tmp_path, case):
    k = case.kspace()
    mask = np.zeros(64, bool)
    mask[1::3], mask[28:36] = True, True
    path = case.write(str(tmp_path / "a.h5"), k * mask)
    assert torch.equal(fastmri.open_volume(path).mask, torch.from_numpy(mask).float())
    assert fastmri.sniff_fastmri(path).about["fully sampled"] is False
    padded = k.copy()
    padded[..., :8] = padded[..., 60:] = 0
    volume = fastmri.open_volume(case.write(str(tmp_path / "b.h5"), padded))
    assert volume.mask is None and volume.lines == (8, 60) and volume.columns.sum() == 52
    assert not volume.crop(volume.read(0))[..., :8].any()


@needs_cases
@pytest.mark.parametrize("kind", ["nolim", "otherns", "empty", "bom", "latin", "nul"])
def test_headers_of_all_writers_are_read(tmp_path, case, kind):
    text = case.header((128, 64, 1), (64, 64, 1))
    latin = text.replace("<encoding>", "<institutionName>Zürich</institutionName><encoding>").encode("latin-1")
    head = {
        "nolim": text,
        "otherns": case.header((128, 64, 1), (64, 64, 1), ns="urn:x"),
        "empty": b"",
        "bom": ("\ufeff" + text).encode(),
        "latin": latin,
        "nul": np.void(text.encode() + b"\x00"),
    }
    volume = fastmri.open_volume(case.write(str(tmp_path / "a.h5"), case.kspace(), head[kind]))
    assert volume.lines == (0, 64) and volume.mask is None
    assert volume.crop_shape == ((64, 64) if kind == "empty" else (32, 64))  # the readout is 128 mm of 440
    assert (volume.voxel_mm is None) == (kind == "empty")


@needs_cases
@pytest.mark.parametrize("by", [(8, 0), (0, -6), (20, 3)])
def test_echo_mask_and_lines_move_together(tmp_path, case, by):
    k, mask = case.kspace(), np.zeros(64, bool)
    mask[::4], mask[28:36] = True, True
    plain = fastmri.open_volume(case.write(str(tmp_path / "a.h5"), k * mask))
    path = case.write(str(tmp_path / "b.h5"), np.roll(k * mask, by, (-2, -1)), mask=np.roll(mask, by[1]))
    moved = fastmri.open_volume(path)
    assert moved.shift == (-by[0], -by[1]) and torch.equal(moved.mask, plain.mask)
    assert torch.allclose(moved.read(0), plain.read(0))
    scan = fastmri.read_fastmri([path])
    assert scan.shift == moved.shift and torch.equal(scan.mask[0, 0, 0], plain.mask)


def test_names_in_fastmri_attributes_become_codes(tmp_path):
    for patient, code in (("Doe^Jane", False), ("2022061003", False), ("a1b2c3d4e5" * 6, True), ("", True)):
        path = tmp_path / "a.h5"
        with h5py.File(path, "w") as file:
            file["kspace"] = kspace()
            file.attrs["patient_id"] = patient
        person = fastmri.sniff_fastmri(path).person
        assert person == patient if code else person and not {"Doe", patient} & {person, person[:3], person[1:]}


# ------------------------------------------------------------------------------------------------- arrays and BART


def test_arrays_need_stated_axes(tmp_path):
    k = kspace(3, 2)
    np.save(tmp_path / "k.npy", k.transpose(3, 2, 1, 0))
    assert sniff_npy(tmp_path / "k.npy").kind == "k-space"
    assert torch.allclose(read_npy([tmp_path / "k.npy"], axes="x y coil slice").kspace, torch.from_numpy(k))
    with pytest.raises(Unreadable, match="not stated"):
        read_npy([tmp_path / "k.npy"])
    with pytest.raises(Unreadable, match="names 2 axes"):
        read_npy([tmp_path / "k.npy"], axes="y x")
    with pytest.raises(Unreadable, match="has no y"):
        read_npy([tmp_path / "k.npy"], axes="x a coil slice")
    one = read_npy([tmp_path / "k.npy"], axes="x y coil t", which={"t": 1})
    assert torch.allclose(one.kspace, torch.from_numpy(k[1:2]))
    for name, images in (("real", magnitude(k)), ("complex", ifft(torch.from_numpy(k)))):
        np.save(tmp_path / f"{name}.npy", images.numpy())
        assert sniff_npy(tmp_path / f"{name}.npy").kind == "image"


@pytest.mark.parametrize("new", [True, False])
def test_cmrxrecon_and_other_matlab_files(tmp_path, new):
    k = np.stack([(1 + t) * kspace(2, 3) for t in range(4)])  # (frame, slice, coil, y, x)
    path, matlab = tmp_path / "cine_sax.mat", k.transpose(3, 4, 2, 1, 0)  # kx, ky, coil, slice, frame
    if new:
        with h5py.File(path, "w") as file:
            pair = np.zeros(matlab.shape[::-1], [("real", "f4"), ("imag", "f4")])
            pair["real"], pair["imag"] = matlab.T.real, matlab.T.imag
            file["kspace_full"] = pair
    else:
        scipy.io.savemat(path, {"kspace_full": matlab, "info": "x"}, do_compression=True)
    what = sniff_mat(path)
    assert what.shape == (2, 3, 32, 24) and what.about["counts"] == {"frame": 4} and what.format == "CMRxRecon"
    scan = read_mat([path], which={"frame": 2})
    assert torch.allclose(scan.kspace, torch.from_numpy(k[2])) and scan.mask.all()
    with pytest.raises(Unreadable, match="4 of frame"):
        read_mat([path])
    other = tmp_path / "mine.mat"
    scipy.io.savemat(other, {"data": kspace(1, 3)[0].transpose(1, 2, 0)})
    assert "not stated" in sniff_mat(other).about["axes"]
    assert torch.allclose(read_mat([other], axes="y x coil").kspace, torch.from_numpy(kspace(1, 3)))


def test_bart_kspace_by_its_dimensions(tmp_path):
    k = kspace(1, 3)[0].transpose(1, 2, 0)[:, :, None]  # readout, phase, phase2, coil
    write_cfl(tmp_path / "a", k)
    assert sniff_cfl(tmp_path / "a.cfl").shape == (1, 3, 32, 24)
    assert torch.allclose(read_cfl_scan([tmp_path / "a.cfl"]).kspace, torch.from_numpy(kspace(1, 3)))
    volume = kspace(1, 2, (6, 16, 12))[0]
    write_cfl(tmp_path / "b", volume.transpose(2, 3, 1, 0))
    assert torch.allclose(read_cfl_scan([tmp_path / "b.hdr"]).kspace, torch.from_numpy(volume[None]))
    write_cfl(tmp_path / "c", np.stack([k, 2 * k], -1).reshape(*k.shape, 1, 1, 1, 1, 1, 1, 2))
    assert sniff_cfl(tmp_path / "c.cfl").about["counts"] == {"time": 2}
    assert torch.allclose(read_cfl_scan([tmp_path / "c"], which={"time": 1}).kspace, torch.from_numpy(2 * kspace(1, 3)))
    write_cfl(tmp_path / "single", k[..., 0])
    assert sniff_cfl(tmp_path / "single.cfl").kind == "k-space"
    write_cfl(tmp_path / "image", ifft(torch.from_numpy(kspace(1, 1)))[0, 0])
    assert sniff_cfl(tmp_path / "image.cfl").kind == "image"
    (tmp_path / "other.hdr").write_text("ENVI\nsamples = 3\n")
    assert sniff_cfl(tmp_path / "other.hdr") is None


# --------------------------------------------------------------------------------------------------------- real files


@needs_real
def test_a_real_siemens_file():
    pytest.importorskip("twixtools", reason="needs the extra formats")
    path = SHARED / "real" / "kspace" / "gre.dat"
    what = sniff_twix(path)
    assert what.shape == (1, 2, 320, 160) and what.voxel_mm == pytest.approx((4, 1.25, 1.25))
    scan = read_twix([path])
    assert scan.oversampling == (2, 1) and scan.mask.all() and scan.kspace.shape == (1, 2, 320, 160)
    image = magnitude(scan.kspace).square().sum(1).sqrt()[0]
    inside, outside = image[80:240].mean(), torch.cat([image[:60], image[-60:]]).mean()
    assert inside > 8 * outside  # the phantom lies in the middle half of the oversampled readout


@needs_real
def test_no_length_or_count_of_a_siemens_file_makes_its_reading_endless(tmp_path):
    """Each of these made twixtools go round for ever, or to fill the memory."""
    pytest.importorskip("twixtools", reason="needs the extra formats")
    content = (SHARED / "real" / "kspace" / "gre.dat").read_bytes()
    line = 10240 + int.from_bytes(content[10240:10244], "little")  # where the first line begins
    flags = int.from_bytes(content[line + 40 : line + 48], "little")
    at = content.index(b"[0]", content.index(b"ASCCONV BEGIN", content.index(b"MeasYaps")))
    spoilt = {
        "0 bytes": [(line, bytes(3)), (line + 40, (flags | 32).to_bytes(8, "little"))],  # a block of others, length 0
        "no readable header": [(16, (2**60).to_bytes(8, "little"))],  # begins behind the end
        "truncated": [(len(content) - 20000, None)],
        "part MeasYaps of its header is damaged": [(at, b"[999999999]")],
        "part Config of its header is damaged": [(content.index(b"Config") + 200, b" " * 30000)],
    }
    for number, (words, changes) in enumerate(spoilt.items()):
        damaged = bytearray(content)
        for place, new in changes:
            damaged[place : None if new is None else place + len(new)] = new or b""
        path = tmp_path / f"{number}.dat"
        path.write_bytes(damaged)
        for read in (sniff_twix, lambda p: read_twix([p])):
            with pytest.raises(Unreadable, match=words):
                read(path)


@needs_real
def test_real_bart_and_numpy_kspace():
    folder = SHARED / "real" / "kspace"
    full = read_cfl_scan([folder / "full.cfl"])
    assert full.kspace.shape == (1, 8, 230, 180) and full.shift == (0, 0) and full.mask.all()
    few = read_npy([folder / "cartesian_ksp.npy"], axes="coil y x")
    assert few.kspace.shape == (1, 8, 230, 180) and few.acceleration == pytest.approx(1 / 0.124, rel=0.02)
    assert sniff_cfl(folder / "full.cfl").shape == (1, 8, 230, 180)
