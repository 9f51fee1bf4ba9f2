"""The formats that the intake knows, in the order in which they are tried. A new format is one line here."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from companion.data import fastmri, interfile, petsird, sinograms
from companion.data.dicom.series import join_dicom, read_dicom, series_of, sniff_dicom
from companion.data.intake import images, others, streams
from companion.data.intake.records import Description, Reader, Unreadable, Volume
from companion.data.intake.walk import dangling
from companion.data.raw import arrays, mrd, twix

READERS: tuple[Reader, ...] = (
    Reader("NIfTI", images.NIFTI, images.sniff_nifti, images.read_nifti),
    Reader("FreeSurfer", others.MGH, others.sniff_mgh, others.read_mgh),
    Reader("MINC", others.MINC, others.sniff_minc, others.read_minc),
    Reader("ITK", others.ITK, others.sniff_itk, others.read_itk),
    Reader("fastMRI", (".h5", ".hdf5"), fastmri.sniff_fastmri, fastmri.read_fastmri),
    Reader("ISMRMRD", (".h5", ".hdf5", ".mrd"), mrd.sniff_mrd, mrd.read_mrd),
    Reader("MATLAB", (".mat",), arrays.sniff_mat, arrays.read_mat),
    Reader("Siemens raw data", (".dat",), twix.sniff_twix, twix.read_twix),
    Reader("BART", (".cfl", ".hdr"), arrays.sniff_cfl, arrays.read_cfl_scan),
    Reader("NumPy", (".npy",), arrays.sniff_npy, arrays.read_npy),
    Reader("PET sinograms", (".npz", ".json"), sinograms.sniff_sinograms, sinograms.read_item),
    Reader("PETSIRD", petsird.SUFFIXES, petsird.sniff_petsird, petsird.read_item),
    Reader("Interfile", interfile.SUFFIXES, interfile.sniff_interfile, interfile.read_interfile),
    Reader("DICOM", (".dcm", ".ima", ".dicom", ""), sniff_dicom, read_dicom, join_dicom),
    Reader("BrainWeb", others.BRAINWEB, others.sniff_brainweb, others.read_brainweb),
    Reader("picture", others.PICTURES, others.sniff_picture, others.read_picture),
)

IMAGES = (*images.NIFTI, *others.MGH, *others.MINC, *others.ITK)


def is_image(path: str | os.PathLike) -> bool:
    """Whether a file's name is that of an image volume; .hdr is BART's too, and then has a .cfl beside it."""
    path = Path(path)
    bart = path.suffix.lower() == ".hdr" and path.with_suffix(".cfl").exists()
    return path.name.lower().endswith(IMAGES) and not bart


def readers_for(name: str) -> list[Reader]:
    """Return the readers whose endings a file's name has, the longest ending first; case does not matter."""
    lower = name.lower()
    fits = [(max(map(len, ends)), r) for r in READERS if (ends := [s for s in r.suffixes if lower.endswith(s)])]
    longest = max((length for length, _ in fits), default=0)
    return [r for length, r in sorted(fits, key=lambda fit: -fit[0]) if length or not longest]


def sniff(path: str | os.PathLike) -> tuple[Description, Reader]:
    """Return what one file is and who reads it, from its header; raises FileNotFoundError, or Unreadable with why."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: {dangling(path)}" if path.is_symlink() else f"{path} does not exist")
    if path.is_dir():
        raise Unreadable(path, "a folder; give a file in it, or look at what it holds with `companion look`")
    readers = readers_for(path.name)
    for reader in readers:
        if (what := reader.sniff(path)) is not None:
            return what, reader
    # a reader of files without an ending was only asked, not named by this file
    claimed = [r.name for r in readers if path.name.lower().endswith(tuple(filter(None, r.suffixes)))]
    named = f"not a readable {' or '.join(claimed)} file; download or export it again" if claimed else ""
    raise Unreadable(
        path, streams.instead(path) or named or f"of no format that is known here ({path.suffix or 'none'})"
    )


def read_image(path: str | os.PathLike, frame: int | None = None, affine=None) -> Volume:
    """Return the volume of an image file of any format, complex values kept; of a DICOM file that of its series.

    frame: of a 4D file. affine: for a NIfTI file that carries none. Raises FileNotFoundError, or Unreadable for a file
    that is damaged, or no image.
    """
    path = Path(path).expanduser()
    if affine is not None and path.name.lower().endswith(images.NIFTI):
        return images.read_nifti((path,), frame, affine)
    what, reader = sniff(path)
    if what.kind in ("k-space", "sinogram", "list mode", "picture"):
        raise Unreadable(path, f"{what.kind} ({what.format}), not an image volume")
    files = series_of(path) if what.series else (path, *what.parts)
    return reader.read(files, frame=frame)


def read_frames(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Return all volumes of an image file, (t, z, y, x), and the affine; raises as `read_image`."""
    path = Path(path).expanduser()
    what, reader = sniff(path)
    if reader.sniff is images.sniff_nifti:
        return images.read_frames(path)
    count = what.shape[0] if what.axes[0] == "t" else 1
    volumes = [read_image(path, frame=i if count > 1 else None) for i in range(count)]
    return np.stack([v.array for v in volumes]), volumes[0].affine
