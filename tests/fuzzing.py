"""Small files of every format that is read, ways to spoil them, and what the readers make of the spoilt ones.

A reader may refuse (its own error, or "not my format") or give the same values. Anything else is a finding: other
values, another error, a crash, more than `SECONDS`, or more memory than 4 times the file.

Every reading is done by a child that may die, forked from a server that is a clean process of one thread: a fork beside
other threads copies the locks that they hold, and a child that asks for one waits for ever.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import importlib
import importlib.util
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import nibabel
import numpy as np
import scipy.io

from companion.data.cfl import write_cfl
from companion.data.dicom.write import write_dicom
from companion.data.intake.readers import readers_for
from companion.data.intake.records import Unreadable
from companion.data.npz import read_npz
from companion.data.store import open_dataset, write_dataset

for module in (
    "PIL.PngImagePlugin",
    "SimpleITK",
    "twixtools",
    "petsird",
):  # here, or each child would load them for itself
    with contextlib.suppress(ImportError):
        importlib.import_module(module)

SECONDS = 10  # of computing
WALL = 180  # seconds in which a child must tell something, however busy the machine
SLACK = 96 << 20  # bytes that any reading may take: buffers of libraries, and modules that load at the first use
REAL = Path(__file__).parents[2] / "shared" / "real" / "kspace" / "gre.dat"


@dataclass(frozen=True)
class Sample:
    """One file of a format.

    make: writes it into an empty folder. checked: every value is under a checksum, so no flip may change one unnoticed.
    header: how many bytes in front are not, such as the text in front of MetaImage's compressed values.
    """

    name: str
    make: Callable[[Path], Path]
    checked: bool = False
    options: tuple = ()
    read: Callable | None = None
    header: Callable[[bytes], int] = lambda content: 0


def values(path: Path, sample: Sample) -> list[np.ndarray] | None:
    """The arrays that are read from a file, None where no reader takes it; raises what readers raise."""
    if sample.read:
        return sample.read(path)
    for reader in readers_for(path.name):
        what = reader.sniff(path)
        if what is not None:
            got = reader.read((path, *what.parts), **dict(sample.options))
            if hasattr(got, "kspace"):
                return [got.kspace.numpy(), got.mask.numpy()]
            return [got.array, got.affine] if hasattr(got, "affine") else [np.asarray(got)]
    return None


# ----------------------------------------------------------------------------------------------------------- samples


def _volume(shape=(6, 7, 8), kind=np.int16):
    return np.random.default_rng(0).integers(0, 1000, shape).astype(kind)


def _kspace(shape=(2, 3, 16, 12)):
    rng = np.random.default_rng(0)
    k = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    k[..., shape[-2] // 2, shape[-1] // 2] = 500
    return k.astype(np.complex64)


def _nifti(name):
    def make(folder):
        affine = np.diag([1.0, 2, 3, 1])
        kind = nibabel.MGHImage if name.endswith(".mgz") else nibabel.Nifti1Image
        nibabel.save(kind(_volume(), affine), folder / name)
        return folder / name

    return make


def _itk(name, compressed):
    def make(folder):
        import SimpleITK as sitk

        sitk.WriteImage(sitk.GetImageFromArray(_volume()), str(folder / name), compressed)
        return folder / name

    return make


def _minc2(folder):
    with h5py.File(folder / "a.mnc", "w") as file:
        root, values = file.create_group("minc-2.0"), _volume()
        for i, (name, length) in enumerate(zip(MINC_AXES, values.shape, strict=True)):
            axis = root.create_dataset(f"dimensions/{name}", data=0)
            axis.attrs.update({"step": 2.0, "start": -7.0, "length": length, "spacing": np.bytes_("regular__")})
            axis.attrs["direction_cosines"] = np.eye(3)[2 - i]
        image = root.create_dataset("image/0/image", data=values)
        image.attrs.update({"dimorder": np.bytes_(",".join(MINC_AXES)), "valid_range": np.array([0.0, 1000.0])})
        for name, value in (("image-min", 0.0), ("image-max", 1000.0)):
            root.create_dataset(f"image/0/{name}", data=value).attrs["dimorder"] = np.bytes_("")
    return folder / "a.mnc"


def _minc1(folder):
    values = _volume()
    with scipy.io.netcdf_file(folder / "a.mnc", "w") as file:
        for name, length in zip(MINC_AXES, values.shape, strict=True):
            file.createDimension(name, length)
            axis = file.createVariable(name, "i4", ())
            axis.spacing, axis.step, axis.start = b"regular__", 2.0, -7.0
        image = file.createVariable("image", "i2", MINC_AXES)
        image[:] = values
        image.signtype, image.valid_range = b"signed__", np.array([0.0, 1000.0])
        for name, value in (("image-min", 0.0), ("image-max", 1000.0)):
            file.createVariable(name, "f8", ()).data[()] = value
    (folder / "a.mnc.gz").write_bytes(gzip.compress((folder / "a.mnc").read_bytes(), mtime=0))
    return folder / "a.mnc.gz"


def _png(folder):
    from PIL import Image

    Image.fromarray(_volume((20, 22), np.uint8)).save(folder / "a.png")
    return folder / "a.png"


def _dicom(folder):
    return write_dicom(folder / "d", _volume((1, 12, 14)), np.diag([1.0, 2, 3, 1]), "fuzz")[0]


def _fastmri(checked):
    def make(folder):
        options = dict(chunks=(1, 3, 16, 12), fletcher32=True) if checked else {}
        with h5py.File(folder / "a.h5", "w", libver="latest" if checked else None) as file:
            file.create_dataset("kspace", data=_kspace(), **options)
            file.attrs["patient_id"] = "abcdef1234"
        return folder / "a.h5"

    return make


def _mrd(folder):
    """ISMRMRD's layout, written by h5py so that the sample needs no other package."""
    k = _kspace((1, 2, 16, 12))
    counters = [(n, "<u2") for n in ("kspace_encode_step_1", "kspace_encode_step_2", "average", "slice", "contrast",
                                     "phase", "repetition", "set", "segment")]  # fmt: skip
    head = np.dtype([("flags", "<u8"), ("number_of_samples", "<u2"), ("active_channels", "<u2"),
                     ("center_sample", "<u2"), ("sample_time_us", "<f4"), ("idx", counters)])  # fmt: skip
    rows = np.zeros(12, np.dtype([("head", head), ("data", h5py.vlen_dtype("<f4"))]))
    for x in range(12):
        rows["head"]["idx"]["kspace_encode_step_1"][x] = x
        rows["data"][x] = np.ascontiguousarray(k[0, :, :, x]).view(np.float32).ravel()
    for name, value in dict(number_of_samples=16, active_channels=2, center_sample=8, sample_time_us=4).items():
        rows["head"][name] = value
    space = (
        "<matrixSize><x>16</x><y>12</y><z>1</z></matrixSize><fieldOfView_mm><x>32</x><y>24</y><z>5</z></fieldOfView_mm>"
    )
    text = (
        f"<ismrmrdHeader><encoding><encodedSpace>{space}</encodedSpace><reconSpace>{space}</reconSpace>"
        "<trajectory>cartesian</trajectory></encoding></ismrmrdHeader>"
    )
    with h5py.File(folder / "a.h5", "w") as file:
        file["dataset/xml"], file["dataset/data"] = np.array([text], object), rows
    return folder / "a.h5"


def _mat(new):
    def make(folder):
        k = _kspace().transpose(2, 3, 1, 0)
        if new:
            with h5py.File(folder / "a.mat", "w") as file:
                pair = np.zeros(k.shape[::-1], [("real", "f4"), ("imag", "f4")])
                pair["real"], pair["imag"] = k.T.real, k.T.imag
                file["kspace_full"] = pair
        else:
            scipy.io.savemat(folder / "a.mat", {"kspace_full": k}, do_compression=True)
        return folder / "a.mat"

    return make


def _npy(folder):
    np.save(folder / "a.npy", _kspace())
    return folder / "a.npy"


def _npz(folder):
    np.savez_compressed(folder / "a.npz", counts=_volume(), factors=np.linspace(0, 1, 50))
    return folder / "a.npz"


def _cfl(part):
    def make(folder):
        write_cfl(folder / "a", _kspace((1, 3, 16, 12)).transpose(2, 3, 0, 1))
        return folder / f"a.{part}"

    return make


def _store(folder):
    return write_dataset(
        folder / "a.h5", {"image": _volume((3, 4, 1, 8, 8), np.float32), "labels": _volume((3, 4, 1, 8, 8), np.uint8)},
        units={"image": "1", "labels": "1"}, scale={"image": 1.0, "labels": 1.0}, source="fuzz", seed=0,
        split={"train": ["0", "1"], "test": ["2"]},
    )  # fmt: skip


def _read_store(path):
    prepared = open_dataset(path)
    return [prepared.read(name) for name in sorted(prepared.shapes)]


def _read_npz(path):
    return [array for _, array in sorted(read_npz(path).items())]


def _twix(folder):
    (folder / "a.dat").write_bytes(REAL.read_bytes())
    return folder / "a.dat"


def _petsird(folder):
    import listed

    events = np.random.default_rng(0).integers(0, 600, (400, 3)) % (600, 600, 5)
    return listed.write(
        folder / "a.petsird", listed.scanner(), np.sort(events)[:, [2, 1, 0]] % (600, 600, 5), events[:9]
    )


MINC_AXES = ("zspace", "yspace", "xspace")
AXES = (("axes", "slice coil y x"),)
SAMPLES = (
    Sample("NIfTI .nii.gz", _nifti("a.nii.gz"), True),
    Sample("NIfTI .nii", _nifti("a.nii")),
    Sample("FreeSurfer .mgz", _nifti("a.mgz"), True),
    Sample("MetaImage .mha, compressed", _itk("a.mha", True), True, header=lambda c: c.index(b"LOCAL\n") + 6),
    Sample("NRRD .nrrd, compressed", _itk("a.nrrd", True), True, header=lambda c: c.index(b"\n\n") + 2),
    Sample("MINC 1 .mnc.gz", _minc1, True),
    Sample("MINC 2 .mnc", _minc2),
    Sample("PNG", _png, True),
    Sample("DICOM", _dicom),
    Sample("fastMRI .h5", _fastmri(False)),
    Sample("fastMRI .h5, fletcher32", _fastmri(True), True),
    Sample("ISMRMRD .h5", _mrd),
    Sample("MATLAB 7 .mat", _mat(False), True),
    Sample("MATLAB 7.3 .mat", _mat(True)),
    Sample("NumPy .npy", _npy, options=AXES),
    Sample("NumPy .npz", _npz, True, read=_read_npz),
    Sample("BART .cfl", _cfl("cfl")),
    Sample("BART .hdr", _cfl("hdr")),
    *([Sample("PETSIRD", _petsird)] if importlib.util.find_spec("petsird") else []),
    Sample("prepared .h5", _store, True, read=_read_store),
    *([Sample("Siemens .dat", _twix)] if REAL.is_file() else []),
)


def _zeros(folder):
    (folder / "a.bin").write_bytes(bytes(64))
    return folder / "a.bin"


def _bad(how):
    def read(path):
        content = path.read_bytes()
        if any(content):
            how()
        return [np.frombuffer(content, np.uint8)]

    return read


def _compute():
    while True:
        time.process_time()


# What no reader may do, so that the harness can be shown to see it.
BAD = tuple(
    Sample(words, _zeros, True, read=_bad(how))
    for words, how in {
        "died, SIGABRT": os.abort,
        "KeyError": lambda: {}["x"],
        "memory": lambda: np.ones(2**28),
        "changed": lambda: None,
        "took over 1 s": _compute,
        "took over 3 s without computing": lambda: time.sleep(60),
    }.items()
)


# ------------------------------------------------------------------------------------------------------------ spoiling


def flip(content: bytes, rng: np.random.Generator) -> bytes:
    """One byte to another value."""
    spoilt = bytearray(content)
    spoilt[rng.integers(len(spoilt))] ^= int(rng.integers(1, 256))
    return bytes(spoilt)


def spoil(content: bytes, rng: np.random.Generator) -> bytes:
    """Some damage: a byte, mostly near the beginning, a cut, a block of zeros, noise or another part, more or less."""
    spoilt, kind = bytearray(content), rng.integers(7)
    at = int(rng.integers(min(len(spoilt), 2048 if rng.random() < 0.7 else len(spoilt))))
    width = int(min(2 ** rng.integers(1, 12), len(spoilt) - at))
    if kind <= 1:
        spoilt[at] ^= int(rng.integers(1, 256))
    elif kind == 2:
        del spoilt[int(rng.integers(len(spoilt))) :]
    elif kind == 3:
        spoilt[at : at + width] = bytes(width)
    elif kind == 4:
        spoilt[at : at + width] = rng.bytes(width)
    elif kind == 5:
        spoilt[at : at + min(width, 8)] = b"\xff" * min(width, 8)
    else:
        other = int(rng.integers(len(spoilt)))
        spoilt[at:at] = spoilt[other : other + width]
    return bytes(spoilt)


@dataclass(frozen=True)
class Finding:
    """What a reader did with the spoilt file number `case`."""

    sample: str
    case: int
    what: str


def try_all(
    sample: Sample, cases: range, change=spoil, seed: int = 0, seconds: float | None = None, limits=(SECONDS, WALL)
):
    """(how many of each outcome, findings) of one sample spoilt in many ways, each in a process that may die.

    sample, change: of this module. limits: seconds of computing and of waiting for one case.
    """
    server = _server()
    pickle.dump((sample.name, cases, change.__name__, seed, seconds, limits), server.stdin)
    server.stdin.flush()
    return pickle.load(server.stdout)


@functools.cache
def _server() -> subprocess.Popen:
    """A clean process that answers `try_all`; it ends when this one closes its standard input."""
    single = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
    return subprocess.Popen(
        [sys.executable, "-c", "import fuzzing; fuzzing.serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent,
        env=os.environ | single,
    )


def serve() -> None:
    """Answer every question of `try_all` on standard input, until it is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get among the answers
    while True:
        try:
            name, cases, change, *rest = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        sample = next(sample for sample in (*SAMPLES, *BAD) if sample.name == name)
        pickle.dump(_try_all(sample, cases, globals()[change], *rest), answers)
        answers.flush()


def _try_all(sample: Sample, cases: range, *how):
    outcomes, findings, start = Counter(), [], cases.start
    while start < cases.stop:
        last, what = start - 1, ""
        with tempfile.TemporaryDirectory() as folder:
            for last, what, finding in _children(sample, range(start, cases.stop), *how, folder):
                outcomes[what] += 1
                if finding:
                    findings.append(Finding(sample.name, last, finding))
        if what != "died":
            break
        start = last + 1
    return outcomes, findings


def _children(sample: Sample, cases: range, change, seed: int, seconds: float | None, limits, folder: str):
    """Yield (case, outcome, finding) as a child tells them; where it dies, that is the last outcome."""
    assert len(os.listdir("/proc/self/task")) == 1, "a library began a thread; forks beside threads may hang"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(sample, cases, change, seed, seconds, limits[0], write, Path(folder))
    os.close(write)
    last, waited = cases.start - 1, False
    with os.fdopen(read, "rb", buffering=0) as stream:
        while not (waited := not select.select([stream], [], [], limits[1])[0]):
            try:
                told = pickle.load(stream)
            except (EOFError, pickle.UnpicklingError):
                break
            last = told[0]
            yield told
        if waited:
            os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if waited:
        yield last + 1, "died", f"took over {limits[1]} s without computing"
    elif os.WIFSIGNALED(status):
        died = signal.Signals(os.WTERMSIG(status)).name
        yield last + 1, "died", f"took over {limits[0]} s" if died == "SIGPROF" else f"died, {died}"
    elif os.WEXITSTATUS(status):
        raise RuntimeError(f"the sample {sample.name} cannot be made or read undamaged")


def _child(
    sample: Sample, cases: range, change, seed: int, seconds: float | None, limit: float, write: int, folder: Path
) -> None:
    """Spoil and read one case after another, telling the parent; never returns."""
    began, code = time.monotonic(), 1
    try:
        with os.fdopen(write, "wb", buffering=0) as out:
            path = sample.make(folder)
            content, truth = path.read_bytes(), values(path, sample)
            size = max(len(content), sum(a.nbytes for a in truth))
            quiet = os.open(os.devnull, os.O_WRONLY)  # libraries in C complain on standard error
            os.dup2(quiet, 2)
            most = _address_space() + 4 * size + SLACK
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            kept = sample.header(content)
            begin = kept if change is flip else 0
            for case in cases:
                if seconds is not None and time.monotonic() - began > seconds:
                    break
                spoilt = content[:begin] + change(content[begin:], np.random.default_rng((seed, case)))
                path.write_bytes(spoilt)
                signal.setitimer(signal.ITIMER_PROF, limit)  # of the processor, so that a busy machine finds nothing
                what, finding = _outcome(path, sample, truth, sample.checked and spoilt[:kept] == content[:kept])
                signal.setitimer(signal.ITIMER_PROF, 0)
                out.write(pickle.dumps((case, what, finding)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _outcome(path: Path, sample: Sample, truth: list[np.ndarray], checked: bool) -> tuple[str, str]:
    try:
        got = values(path, sample)
    except Unreadable as error:
        return ("refused", "") if str(path.name.split(".")[0]) in str(error) else ("unnamed", f"names no file: {error}")
    except MemoryError:
        return "memory", "takes more than 4 times the memory of the file"
    except ValueError as error:
        if sample.read:  # of the package's own files
            return "refused", ""
        return "error", f"ValueError: {error}"
    except BaseException as error:
        return "error", f"{type(error).__name__}: {error}"
    if got is None:
        return "refused", ""
    same = len(got) == len(truth) and all(
        a.shape == b.shape and np.array_equal(a, b) for a, b in zip(got, truth, strict=True)
    )
    return ("same", "") if same else ("changed", "values changed unnoticed" if checked else "")


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
