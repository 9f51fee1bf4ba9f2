"""Results written back as a DICOM series of their own: derived, secondary, and not for diagnostic use."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
    generate_uid,
)

from companion.data.dicom.headers import dataset
from companion.data.intake.records import pseudonym

WARNING = "NOT FOR DIAGNOSTIC USE"
KEPT = ("Modality", "Units", "DecayCorrection", "CorrectedImage", "SUVType", "BodyPartExamined", "PatientPosition",
        "MagneticFieldStrength", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "FrameOfReferenceUID",
        "StudyInstanceUID")  # fmt: skip
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "PatientAge", "PatientWeight")
DATES = ("StudyDate", "StudyTime", "StudyID", "AccessionNumber")
PIXELS = 65535


def write_dicom(
    folder: str | os.PathLike,
    array,
    affine,
    description: str,
    source: Sequence[str | os.PathLike] = (),
    *,
    identity: bool = False,
    units: str = "",
    number: int = 9001,
    modality: str = "",
) -> list[Path]:
    """The files of a new DICOM series in `folder`, one a slice, of `array` (z, y, x) with `affine` as in NIfTI.

    source: the series that it was made from; its study, frame of reference and modality are taken over. identity: the
    patient's name, number and dates too, which a hospital's archive needs to file it; never do that in a run folder.
    By default the person is a code, and the UIDs of the study are new. All files say "NOT FOR DIAGNOSTIC USE". Values
    are stored in 16 bits with a scale, so to 1 / 65,535 of their range. The same arguments give the same UIDs.
    units: of PET, "Bq/mL" or "g/mL" (SUV by body weight). modality: "PT" or "MR" where no source says it.
    Raises ValueError for NaN, a sheared affine, or a folder that holds files already.
    """
    folder, array, affine = Path(folder), np.asarray(array, np.float64), np.asarray(affine, np.float64)
    if array.ndim != 3 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{folder.name}: expected finite values (z, y, x), got {array.shape}")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files already; name a new folder")
    orientation, pixel, step, origin = _geometry(folder, affine)
    template = dataset(Path(source[0])) if source else pydicom.Dataset()
    stored, slope, intercept = _stored(array)
    seed = [
        description,
        repr(affine.tolist()),
        stored.tobytes().hex()[:4096],
        str(template.get("SeriesInstanceUID", "")),
    ]
    if modality and template.get("Modality", modality) != modality:
        raise ValueError(f"{folder.name}: modality {modality}, but its source is {template.Modality}; give one of them")
    if modality:
        template.Modality = modality
    common = _common(template, description, identity, seed, number, units, len(array))
    aside = Path(tempfile.mkdtemp(prefix=".dicom-", dir=_made(folder.parent)))
    try:
        names = []
        for i, plane in enumerate(stored):
            one = common(i)
            one.Rows, one.Columns = plane.shape
            one.PixelSpacing = [_ds(pixel[1]), _ds(pixel[0])]
            one.ImageOrientationPatient = [_ds(v) for v in orientation]
            one.ImagePositionPatient = [_ds(v) for v in origin + i * step]
            one.SliceThickness = one.SpacingBetweenSlices = _ds(float(np.linalg.norm(step)))
            one.RescaleSlope, one.RescaleIntercept = _ds(slope), _ds(intercept)
            one.PixelData = plane.tobytes()
            names.append(f"IM{i + 1:04d}.dcm")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                one.save_as(aside / names[-1], enforce_file_format=True)
        if folder.exists():
            folder.rmdir()
        os.replace(aside, folder)
        folder.chmod(0o755)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [folder / name for name in names]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _common(
    template: pydicom.Dataset, description: str, identity: bool, seed: list[str], number: int, units: str, slices: int
):
    """A function that gives the data set of slice i without its geometry and pixels."""
    modality = str(template.get("Modality", "") or "MR")
    usual = PositronEmissionTomographyImageStorage if modality == "PT" else MRImageStorage
    sop = str(template.get("SOPClassUID", "")) if "." in str(template.get("SOPClassUID", "")) else usual
    enhanced = {"1.2.840.10008.5.1.4.1.1.4.1": "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.2.1":
                "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.130": "1.2.840.10008.5.1.4.1.1.128"}  # fmt: skip
    sop = enhanced.get(sop, sop)
    series = generate_uid(entropy_srcs=["series", *seed])
    person = pseudonym(str(template.get("PatientID", "") or template.get("PatientName", "") or "anonymous"))

    def make(i: int) -> pydicom.Dataset:
        d = pydicom.Dataset()
        d.file_meta = FileMetaDataset()
        d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = UID(sop)
        uid = generate_uid(entropy_srcs=["image", str(i), *seed])
        d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = uid
        for name in (*KEPT, *(PATIENT if identity else ())):
            if name in template and (identity or name not in DATES):
                d[name] = template[name]
        if identity:
            d.PatientName, d.PatientID = template.get("PatientName", ""), template.get("PatientID", "")
        else:
            d.PatientName = d.PatientID = person
            d.PatientIdentityRemoved = "YES"
            for name in ("StudyInstanceUID", "FrameOfReferenceUID"):
                setattr(d, name, generate_uid(entropy_srcs=[name, str(template.get(name, "")), "companion"]))
        for name in ("StudyInstanceUID", "FrameOfReferenceUID"):
            if name not in d:
                setattr(d, name, generate_uid(entropy_srcs=[name, *seed]))
        d.Modality = modality
        d.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
        d.SeriesInstanceUID, d.SeriesNumber, d.InstanceNumber = series, number, i + 1
        d.SeriesDescription = f"{description[: 63 - len(WARNING)]} {WARNING}"
        d.DerivationDescription = f"{description}; computed by companion. {WARNING}"[:1024]
        d.ImageComments = WARNING
        d.BurnedInAnnotation = "NO"
        d.Manufacturer = "companion"
        if units:
            d.Units = {"Bq/mL": "BQML", "g/mL": "GML"}.get(units, units)
            if d.Units == "GML":
                d.SUVType = "BW"
        if modality == "PT":  # what a PET series has to say; of the scan itself only what its source says
            d.SeriesType, d.CountsSource = ["STATIC", "IMAGE"], "EMISSION"
            d.NumberOfSlices, d.ImageIndex = slices, i + 1
        d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 0
        return d

    return make


def _geometry(folder: Path, affine: np.ndarray):
    """Directions, pixel sizes (x, y), step between slices and origin in DICOM's LPS."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(f"{folder.name}: the affine must be finite and invertible, got {affine.tolist()}")
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    axes = lps[:3, :3] / sizes
    if np.abs(axes.T @ axes - np.eye(3)).max() > 1e-3:
        raise ValueError(f"{folder.name}: the affine is sheared, which DICOM slices cannot be; resample first")
    return np.concatenate([axes[:, 0], axes[:, 1]]), sizes[:2], lps[:3, 2], lps[:3, 3]


def _stored(array: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Unsigned 16-bit numbers, and slope and intercept that lead back; whole numbers that fit stay as they are."""
    low, high = float(array.min()), float(array.max())
    if low >= 0 and high <= PIXELS and np.array_equal(array, np.rint(array)):
        return array.astype("<u2"), 1.0, 0.0
    slope = float(_ds((high - low) / PIXELS)) if high > low else 1.0
    intercept = float(_ds(low))
    return np.clip(np.rint((array - intercept) / slope), 0, PIXELS).astype("<u2"), slope, intercept


def _ds(value: float) -> str:
    """A decimal string of at most 16 characters, DICOM's, as exact as these allow."""
    for digits in range(16, 0, -1):
        text = f"{float(value):.{digits}g}"
        if len(text) <= 16:
            return text
    raise ValueError(f"{value} has no decimal string of 16 characters")
