"""Brain volumes on one grid and one intensity scale: NFBS, CC359, any folder of NIfTI files, the embedded cohort.

The grid: (z, y, x), z from inferior to superior, y from anterior to posterior, x from left to right, voxels in mm. The
scale, one rule for every source: outside the brain 0; inside, 1 is the 99.5th percentile of the brain, brighter voxels
keep their value up to 1.2. `affine` says where each voxel lies, in the world of the file that it came from.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import affine_transform, gaussian_filter
from scipy.spatial.transform import Rotation
from torch import Tensor

from companion.data import anatomy
from companion.data.head_tissues import even_brain
from companion.data.intake.kinds import (
    contrast_of,
    mask_of,
    one_contrast,
    one_each,
    refuse_labels,
    stem,
    without_copies,
)
from companion.data.intake.look import find
from companion.data.intake.readers import read_image
from companion.data.intake.records import Item, Unreadable, Volume
from companion.data.intensity import magnitudes
from companion.data.patients import Anatomy, scanned
from companion.data.upright import refuse_sheared

PERCENTILE, CEILING = 99.5, 1.2
SCALE = f"1 is the {PERCENTILE}th percentile of the brain, values end at {CEILING}; outside the brain 0"
# Grids for virtual heads, mm. Along y, 192 mm, the longest of them lose a slice of their rim in front or behind.
SPACING = {(64, 64, 64): (3.0, 3.0, 3.0), (64, 96, 96): (2.6, 2.0, 2.0)}
POSE_DEG = (5.0, 3.0, 3.0)  # standard deviation of how far a patient's head nods, tilts and turns
SIZE = 0.96  # of patients to the template: its brain of 1.9 L is larger than most people's
CC359_NAME = re.compile(r"(?P<subject>CC\d{4})_(?P<vendor>[a-z]+)_(?P<field>15|3)_(?P<age>\d+)_(?P<sex>[MF])")


# ----------------------------------------------------------------------------------------------------
# One scale, one grid


def normalise_percentile(array: np.ndarray, mask: np.ndarray, name: str = "volume") -> tuple[np.ndarray, float]:
    """Return float32 values on the scale of this module, and the number that multiplies them back.

    array, mask (z, y, x). Raises ValueError for NaN, a mask of another shape or without voxels, or a dark brain.
    """
    mask = np.asarray(mask) > 0
    if array.shape != mask.shape:
        raise ValueError(f"{name}: the mask has shape {mask.shape}, the volume {array.shape}; they must agree")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: {int((~np.isfinite(array)).sum())} voxels are NaN or infinite; repair them first")
    if not mask.any():
        raise ValueError(f"{name}: the mask is empty; give a brain mask, or a volume whose background is 0")
    scale = float(np.percentile(array[mask], PERCENTILE))
    if not scale > 0:
        raise ValueError(f"{name}: the brain has no positive signal ({PERCENTILE}th percentile {scale:g})")
    return np.where(mask, np.clip(array / scale, 0, CEILING), 0).astype(np.float32), scale


def grid_affine(shape: Sequence[int], voxel_mm: Sequence[float], centre_mm: Sequence[float]) -> np.ndarray:
    """Return the affine of a grid (z, y, x) of this module whose middle lies at centre_mm (x, y, z)."""
    steps = np.array([1.0, -1.0, 1.0]) * np.array(voxel_mm, float)[::-1]
    matrix = np.diag([*steps, 1.0])
    matrix[:3, 3] = np.array(centre_mm, float) - steps * (np.array(shape[::-1]) - 1) / 2
    return matrix


def resample(volume: Volume, affine: np.ndarray, shape: Sequence[int], order: int = 1) -> np.ndarray:
    """Return the values (z, y, x), float32, of a volume at the voxels of another grid; outside of it 0.

    Both affines lead to the same world, so a rotated or oblique volume comes out straight. It is low-passed first along
    each axis on which the new voxels are larger (Gaussian), so that nothing aliases. order: 1 linear, 0 nearest.
    """
    to_old = np.linalg.inv(volume.affine) @ affine  # new voxel (x, y, z) -> old voxel (x, y, z)
    step = np.abs(to_old[:3, :3]).max(1)  # old voxels a new one spans, along each old axis
    array = np.asarray(volume.array, np.float32)
    if order and (step > 1).any():  # widths add in squares: a voxel of the new grid is one of the old, blurred
        array = gaussian_filter(array, (np.sqrt(np.maximum(step**2 - 1, 0)) / 2.355)[::-1])
    matrix, offset = to_old[:3, :3][::-1, ::-1], to_old[:3, 3][::-1].tolist()  # SciPy wants the order (z, y, x)
    return affine_transform(array, matrix, offset, tuple(shape), order=order)


# ----------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class Scan:
    """A volume on disk, its mask if there is one, whose it is, what its name says, and its name in the folder."""

    subject: str
    image: Path
    mask: Path | None = None
    about: dict[str, object] = field(default_factory=dict)
    name: str = ""
    item: Item | None = field(default=None, repr=False)

    def read(self) -> Volume:
        """The whole volume, whatever the number of its files: `image` is the first slice only of a DICOM series."""
        return self.item.read() if self.item and len(self.item.files) > 1 else read_image(self.image)


class Scans(tuple):
    """The scans of a folder, in the order of their names; `left`: name -> why a file is not among them; `split`: person
    -> part, where a table says it."""

    left: dict[str, str]
    split: dict[str, str]


def find_scans(folder: str | os.PathLike, contrast: str | None = None, table: str | os.PathLike | None = None) -> Scans:
    """Return the scans below a folder, by `data.intake`: one image each of NFBS, CC359, BIDS, fMRIPrep or any other.

    The mask of NAME.nii.gz is NAME_brainmask (NFBS), NAME_ss or NAME_staple (CC359), NAME_mask, or BIDS's brain mask.
    Of a volume and its skull-stripped copy (NAME_brain), the copy is left out where there is a mask, the volume where
    there is none. contrast: as in "T1w"; by default T1w where there are several. table: whose the files are, see
    `intake.tables`. Of CC359's names age, sex, vendor and field strength are read. Raises FileNotFoundError,
    `intake.persons.Unclear` where nobody can tell the people apart, and ValueError if there is nothing.
    """
    found = find(folder, table, ("image", "mask"))
    masks = [item for item in found.items if item.what.kind == "mask"]
    images, left = one_contrast([item for item in found.items if item.what.kind == "image"], contrast)
    images, versions = one_each(images)
    mask = {item.name: mask_of(item, masks) for item in images}
    images, copies = without_copies(images, mask)
    used = {found_mask.name for i in images if (found_mask := mask[i.name])}
    left = dict(found.left) | left | versions | copies
    left |= {m.name: "a mask of no image that is used" for m in masks if m.name not in used}
    if not images:
        raise Unreadable(folder, "no image volumes there or below; check the path")
    scans = Scans(
        Scan(i.person, i.path, own.path if (own := mask[i.name]) else None, _cc359(i.path.name), i.name, i)
        for i in images
    )
    scans.left, scans.split = left, dict(found.split)
    return scans


def _cc359(name: str) -> dict[str, object]:
    named = CC359_NAME.match(name)
    if not named:
        return {}
    tesla = 1.5 if named["field"] == "15" else 3.0
    return {"age": int(named["age"]), "sex": named["sex"], "vendor": named["vendor"], "tesla": tesla}


def load_scan(scan: Scan, shape: Sequence[int], voxel_mm: Sequence[float], strip: bool = False) -> tuple[Volume, float]:
    """Return a scan on the grid `shape`, `voxel_mm` (z, y, x) around its brain's middle, and its intensity scale.

    Of complex volumes the magnitude. Without a mask the brain is where the volume is above 0, as in skull-stripped
    files, or, of whole heads with `strip`, what `head_tissues.even_brain` finds. Spacing is kept: nothing is stretched
    to fit, and the affine leads to the world of the file. Raises ValueError for 4D files, NaN, labels, values below 0
    (`intensity.magnitudes`), an empty mask, an affine that cannot be right, a head in which no brain is found, and a
    brain that the grid does not hold.
    """
    volume = scan.read()
    check_affine(volume, scan.image)
    series = scan.item is not None and len(scan.item.files) > 1  # DICOM says what is a segmentation
    if not (contrast_of(scan.image.name) or series):  # a name that tells the contrast is believed
        refuse_labels(volume.array, scan.image)
    volume = Volume(magnitudes(volume.array, scan.image.name), volume.affine)
    if scan.mask is None:
        mask = volume.array > 0
        if strip:
            mask = found_brain(volume, scan.image.name)
        elif mask.mean() > 0.9:
            raise ValueError(
                f"{scan.image.name}: has no mask file and no background of 0, so the brain is not marked; "
                f"strip the skull, add {stem(scan.image.name)}_mask.nii.gz, or of a T1w head give strip=True and look "
                "at the pictures"
            )
    else:
        given = read_image(scan.mask)
        if given.array.shape != volume.array.shape or not np.allclose(given.affine, volume.affine, atol=1e-2):
            raise ValueError(
                f"{scan.mask.name}: shape or affine differ from those of {scan.image.name}; a mask must "
                "lie on the grid of its volume"
            )
        mask = given.array > 0
    array, scale = normalise_percentile(np.asarray(volume.array, np.float32), mask, scan.image.name)
    ends = np.array([(axis.min(), axis.max()) for axis in np.nonzero(mask)], float)[::-1]  # (x, y, z)
    centre = volume.affine[:3, :3] @ ends.mean(1) + volume.affine[:3, 3]
    affine = grid_affine(shape, voxel_mm, centre)
    size = np.abs(volume.affine[:3, :3]) @ (ends[:, 1] - ends[:, 0])
    room = np.array(shape[::-1]) * np.array(voxel_mm)[::-1]
    if (size > room * 1.05).any():
        raise ValueError(
            f"{scan.image.name}: the brain measures {_mm(size)} mm (x, y, z), the grid {_mm(room)} mm; "
            "give more or larger voxels"
        )
    return Volume(resample(Volume(array, volume.affine), affine, shape), affine), scale


def found_brain(volume: Volume, name: str) -> np.ndarray:
    """Return where the brain of a T1-weighted head is, (z, y, x) bool, by classical steps.

    Raises ValueError for a file that is named as another contrast, and where no brain is found.
    """
    if (contrast_of(name) or "T1w") != "T1w":
        raise ValueError(f"{name}: the brain is found in T1w heads only, this is {contrast_of(name)}; give a mask")
    try:
        return even_brain(np.asarray(volume.array, np.float32), volume.voxel_mm)[0] > 0.5
    except ValueError as error:
        raise ValueError(f"{name}: {error}; give a mask") from error


def check_affine(volume: Volume, name: str | os.PathLike) -> None:
    """Raise ValueError for an affine that no head was ever scanned with: voxels or a field of view of absurd size.

    The usual causes are metres or micrometres in place of mm, and headers that a conversion has lost.
    """
    voxel = volume.voxel_mm
    extent = [n * mm for n, mm in zip(volume.array.shape, voxel, strict=True)]
    if min(voxel) < 0.1 or max(voxel) > 20 or max(extent) < 60 or max(extent) > 1000:
        raise ValueError(
            f"{Path(name).name}: the affine gives voxels of {_mm(voxel)} mm and a field of view of "
            f"{_mm(extent)} mm (z, y, x), which is no head; correct the header (units of mm?)"
        )
    refuse_sheared(volume.affine, Path(name).name)


def _mm(values: Iterable[float]) -> str:
    return " x ".join(f"{v:.4g}" for v in values)


# ----------------------------------------------------------------------------------------------------
# The embedded cohort


def spacing(shape: Sequence[int]) -> tuple[float, float, float]:
    """Return the voxel size in mm (z, y, x) of a grid for the embedded cohort; see SPACING."""
    depth, height, width = shape
    pixel_mm = round(192 / min(height, width), 4)
    return SPACING.get((depth, height, width)) or (round(166.4 / depth, 4), pixel_mm, pixel_mm)


@dataclass(frozen=True)
class Person:
    """A virtual person on the grid: `image` (z, y, x) in the scale of this module; labels; tissue volumes in ml."""

    image: Tensor
    labels: Tensor
    tissue_ml: Tensor
    affine: np.ndarray


def virtual(subject: anatomy.Subject, shape: Sequence[int] = (64, 64, 64), contrast: str = "T1w") -> Person:
    """Return a virtual person as magnitudes on a grid: 64^3 voxels of 3 mm, or 64 x 96 x 96 of 2.6 x 2 x 2 mm.

    Heads lie in MNI space. tissue_ml (3,): CSF, grey and white matter.
    """
    voxel_mm = spacing(shape)
    heights = anatomy.CENTRE_MM[2] + voxel_mm[0] * (torch.arange(shape[0]) - (shape[0] - 1) / 2)
    depth, height, width = shape
    drawn = anatomy.render(subject, contrast, (depth, height, width), voxel_mm[1], heights)
    return _person(drawn.image.abs(), drawn.tissue, shape, subject)


def patient(
    source: Anatomy, subject: anatomy.Subject, shape: Sequence[int] = (64, 64, 64), contrast: str = "T1w"
) -> Person:
    """Return a person of `data.patients` on the grid of `virtual`; lesions count as the tissue they lie in.

    source: the anatomy that is warped, see `patients.anatomies`. The head is turned by a few degrees, as people lie.
    """
    depth, height, width = shape
    voxel_mm = spacing(shape)
    centre = torch.tensor(anatomy.CENTRE_MM)
    heights = centre[2] + voxel_mm[0] * (torch.arange(depth) - (depth - 1) / 2)
    turn = Rotation.from_euler("xyz", np.random.default_rng([subject.seed, 0x7042]).normal(0, POSE_DEG), degrees=True)
    points = anatomy.grid_mm((depth, height, width), voxel_mm[1], heights) - centre
    points = points @ torch.from_numpy(turn.as_matrix()).float() / SIZE + centre
    images, maps, _ = scanned(source, subject, (contrast,), points)
    return _person(images[contrast], maps[:3], shape, subject)


def _person(image: Tensor, tissue: Tensor, shape: Sequence[int], subject: anatomy.Subject) -> Person:
    brain = tissue.sum(0) > 0.05  # voxels that the brain fills in part belong to it
    image = torch.from_numpy(normalise_percentile(image.numpy(), brain.numpy(), f"subject {subject.seed}")[0])
    voxel_mm = spacing(shape)
    volume_ml = tissue.sum((1, 2, 3)) * float(np.prod(voxel_mm)) / 1000
    affine = grid_affine(shape, voxel_mm, anatomy.CENTRE_MM)
    return Person(image, anatomy.labels_from_tissue(tissue), volume_ml, affine)
