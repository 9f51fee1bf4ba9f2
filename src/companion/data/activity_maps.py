"""Activity of people from files, as slices of one size: published phantoms, BrainWeb models, NIfTI maps."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from companion.data import anatomy
from companion.data import pet as cohort
from companion.data.dicom.headers import UNITS as CODES
from companion.data.intake.look import find
from companion.data.intake.records import Item
from companion.data.pet import (
    FIELD_MM,
    Activity,
    activity_from_labels,
    activity_from_volume,
    load_brainweb,
    load_phantoms,
)

PHANTOMS_MM = 224.0  # side of the published phantoms' images
ACTIVE = ("PET", "SPECT", "")  # contrasts of images that may hold activity; "": nothing says what they are
NAMED = ("angio", "bold")  # and those that files are given for "tof" and "rest" in their names, which PET has, too


@dataclass(frozen=True)
class Person:
    """What a source gives of one subject: image (slice, 1, y, x), mu or none, and its place (slice,) from 0 to 1.

    who: the person, where names of files are not those of people; part: "train" or "test", where a table says it.
    """

    name: str
    image: Tensor
    mu: Tensor | None
    place: Tensor
    pixel_mm: float
    who: str = ""
    part: str = ""


def read_people(
    path: Path,
    most: int,
    per_subject: int,
    image_size: int,
    table: Path | None = None,
    skipped: dict[str, str] | None = None,
    units: str | None = None,
    kbq_per_suv: float | None = None,
) -> Iterator[Person]:
    """Yield the subjects of a phantoms .npz (relative activity) or of a folder of files (kBq/mL), `most` at most.

    Folders are read by `data.intake`: PET images of any format, and BrainWeb models. units, kbq_per_suv: of the images,
    as `load_activity` takes them, where neither file nor the JSON file of its name (BIDS) says them; an image whose
    units nobody says is not used. table: whose the files are. skipped: takes the names of files that cannot be used,
    and why. Raises FileNotFoundError or ValueError for what is neither, or holds none.
    """
    if path.suffix == ".npz":
        for i, volume in enumerate(load_phantoms(path)[:most]):
            activity = Activity(volume[:, 0], PHANTOMS_MM / volume.shape[-1], np.eye(4))
            yield chosen_slices(str(i), activity, per_subject, image_size)
        return
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is neither a phantoms .npz nor a folder; give one, or source: cohort")
    found, count, skipped = find(path, table, ("image", "labels")), 0, {} if skipped is None else skipped
    skipped |= found.left
    for item in found.items:
        if count == most:
            return
        try:
            if item.reader.name in ("MINC", "BrainWeb"):
                activity = activity_from_labels(load_brainweb(item.path), image_size)
            elif item.what.kind == "labels":
                raise ValueError("labels of no BrainWeb model; give activity")
            else:
                activity = _activity(item, units, kbq_per_suv)
            person = chosen_slices(item.name, activity, per_subject, image_size)
        except (ValueError, OSError) as error:
            skipped[item.name] = str(error).removeprefix(f"{item.path}: ")
            continue
        count += 1
        yield replace(person, who=item.person, part=found.split.get(item.person, ""))


def _activity(item: Item, units: str | None, kbq_per_suv: float | None) -> Activity:
    """The activity of a PET image in kBq/mL; DICOM says its units and, for SUV, dose and weight."""
    if item.what.contrast not in (ACTIVE if item.what.format == "DICOM" else ACTIVE + NAMED):
        raise ValueError(f"{item.what.contrast} by its name or header, which shows no activity; give PET")
    if item.what.axes[0] == "t":
        raise ValueError(f"{item.what.shape[0]} frames; write the one to use, or their mean, as a file of its own")
    if "attenuation" in str(item.what.about.get("not corrected for", "")):
        raise ValueError("not corrected for attenuation, so its values are no activity; give the corrected series")
    said = item.what.units or _sidecar(item.path)
    said = {"g/mL": "SUV"}.get(said, said)
    if units and said and said != units:
        raise ValueError(f"it says {said}, but units are given as {units}; give the file's, or none")
    return activity_from_volume(item.read(), said or units or "", item.path, kbq_per_suv)


def _sidecar(path: Path) -> str:
    """The units that the JSON file of the same name says (BIDS, or DICOM's codes), "" if there is none."""
    beside = path.with_name(re.sub(r"\.nii(\.gz)?$", "", path.name) + ".json")
    if beside == path or not beside.is_file():
        return ""
    try:
        said = str(json.loads(beside.read_text(encoding="utf-8")).get("Units", ""))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{beside.name} beside it is no readable JSON ({error}); repair or remove it") from error
    return CODES.get(said, said.replace("/ml", "/mL"))


def chosen_slices(name: str, a: Activity, per_subject: int, image_size: int) -> Person:
    """Evenly spaced slices that are not empty, brought to the wanted size by averaging; ValueError for too few."""
    filled = torch.nonzero(a.image.flatten(1).sum(1) > 0)[:, 0]
    if len(filled) < per_subject:
        raise ValueError(f"{len(filled)} slices with activity, fewer than slices_per_subject={per_subject}")
    at = filled[torch.linspace(0, len(filled) - 1, per_subject).round().long()]
    side = max(a.image.shape[-2:])
    shares = _area_shares(side, image_size)

    def resized(stack: Tensor) -> Tensor:
        x = stack[at][:, None]
        height, width = x.shape[-2:]
        low, left = (side - height) // 2, (side - width) // 2
        x = F.pad(x, (left, side - width - left, low, side - height - low))
        return shares @ x @ shares.T

    place = at / max(1, len(a.image) - 1)
    mu = None if a.mu is None else resized(a.mu)
    return Person(name, resized(a.image), mu, place, a.pixel_mm * side / image_size)


def _area_shares(n: int, size: int) -> Tensor:
    """What each of n pixels contributes to the mean over each of `size` larger or smaller ones, (size, n)."""
    old, new = torch.arange(n + 1) / n, torch.arange(size + 1) / size
    low, high = torch.maximum(old[:-1], new[:-1, None]), torch.minimum(old[1:], new[1:, None])
    return (high - low).clamp(min=0) * size


def virtual_people(
    subjects: int, per_subject: int, image_size: int, lesions: int = 0, lesion_share: float = 1.0
) -> Iterator[Person]:
    """Yield training people of the embedded cohort one by one; activity in kBq/mL."""
    low, high = anatomy.SLAB_MM
    for i in range(subjects):
        pixel_mm = FIELD_MM / image_size
        s = cohort.cohort_slices("train", 1, image_size, per_subject, lesions, pixel_mm, lesion_share, first=i)
        yield Person(str(int(s.subject[0])), s.image, s.mu, (s.height_mm - low) / (high - low), s.pixel_mm)
