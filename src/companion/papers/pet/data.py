"""Slices of activity and their scans at doses of their own, prepared once.

The system of Cecchini 2023 on the preconditioning of Karras et al. 2022 (arXiv 2206.00364), made quantitative: scans
are those of `companion.acquisition.pet`, in kBq/mL from the phantom to the posterior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from companion.data.activity_maps import read_people, virtual_people
from companion.data.intake.splits import split_people, split_table
from companion.data.pet import PEOPLE
from companion.data.rows import Rows
from companion.data.store import Prepared, prepare_once
from companion.files import project_root
from companion.parameters import Parameters, param
from companion.reconstruction.condition import Protocol, scanned


@dataclass(frozen=True)
class PrepareData(Protocol, Parameters):
    """Parameters of pet/1_data.ipynb."""

    source: str = param(
        "cohort",
        "cohort: the embedded FDG-like people; else a phantoms .npz as published, or a "
        "folder of BrainWeb (.mnc, .raws) or NIfTI activity files",
    )
    data: str = param("data/pet_64.h5", "where the prepared slices go; kept when it is there already")
    image_size: int = param(64, "pixels along y and x", minimum=16)
    subjects: int = param(1400, "virtual people, or at most so many of the source", minimum=1)
    slices_per_subject: int = param(8, "axial slices of each", minimum=1)
    lesions: int = param(3, "of each virtual person who has any", minimum=0)
    lesion_share: float = param(0.5, "of the virtual people who have lesions", minimum=0, maximum=1)
    classes: int = param(8, "class labels: the height of a slice, in so many steps", minimum=1)
    held_out_share: float = param(0.1, "of the subjects of files, kept for tests", minimum=0, maximum=1)
    units: str | None = param(
        None,
        "of the activity in NIfTI files that do not say it; none: such files are left out",
        choices=("kBq/mL", "Bq/mL", "MBq/mL", "SUV", "relative", None),
    )
    kbq_per_suv: float | None = param(
        None, "of files in SUV: injected dose at the time of the scan over body weight, MBq/kg", minimum=1e-6
    )
    people: str | None = param(None, "of files: table (CSV, TSV) with file, subject, session, split; none: by names")


def prepare(p: PrepareData, progress: bool = True) -> Prepared:
    """The prepared slices, made and stored once as HDF5; arrays (subject, slice, ...).

    activity (1, y, x) and mlem (iterate, y, x) of a scan of its own dose; sensitivity, its `mean_sensitivity`; counts
    that it measured; label, the class of its height. With a fraction below 1 also high (1, y, x), the last iterate of
    the full dose. Images are in kBq/mL (or relative, as the source). attrs: parameters, pixel_mm, rms of the activity.
    Raises FileNotFoundError or ValueError for a source that cannot be used, and ValueError when `p.data` was prepared
    with other parameters.
    """
    path = project_root() / p.source

    def make() -> dict:
        skipped: dict[str, str] = {}
        if p.source == "cohort":
            people = virtual_people(p.subjects, p.slices_per_subject, p.image_size, p.lesions, p.lesion_share)
        else:
            table = project_root() / p.people if p.people else None
            people = read_people(
                path, p.subjects, p.slices_per_subject, p.image_size, table, skipped, p.units, p.kbq_per_suv
            )
        names, arrays, pixel_mm, whose, given = [], {}, {}, {}, {}
        for person in tqdm(people, "subjects", total=p.subjects, disable=not progress):
            pixel_mm.setdefault(round(person.pixel_mm, 4), person.name)
            if len(pixel_mm) > 1:
                said = ", ".join(f"{mm:g} mm ({name})" for mm, name in pixel_mm.items())
                raise ValueError(
                    f"pixels of {said} in one folder, brought to {p.image_size} along each side; give all images one "
                    "field of view first, or one folder for each"
                )
            for name, row in scanned(person, p, p.classes, p.seed * 10**6 + len(names)).items():
                arrays.setdefault(name, Rows((project_root() / p.data).parent)).append(row)
            names.append(person.name)
            whose[person.name] = person.who or person.name
            given |= {person.who: person.part} if person.part else {}
        if not names:
            told = "".join(f"\n  {name}: {why}" for name, why in skipped.items())
            raise ValueError(f"no file of {p.source} can be used:{told}")
        share = p.held_out_share if p.source != "cohort" else 0.0
        split = split_people(whose.values(), (1 - share, 0.0, share), p.seed, given)
        if progress and share:
            print(split_table(split, {who: [n for n in names if whose[n] == who] for who in whose.values()}))
        activity = "relative" if path.suffix == ".npz" or p.units == "relative" else "kBq/mL"
        units = {"counts": "1", "label": "1", "sensitivity": f"1/({activity})"}
        return {
            "arrays": arrays,
            "units": {name: units.get(name, activity) for name in arrays},
            "scale": dict.fromkeys(arrays, 1.0),
            "seed": p.seed,
            "source": PEOPLE if p.source == "cohort" else Path(p.source).name,
            "subjects": names,
            "split": {part: [n for n in names if whose[n] in split[part]] for part in ("train", "test")},
            "attrs": {
                "pixel_mm": next(iter(pixel_mm)),
                "rms": math.sqrt(np.mean([np.square(x, dtype=np.float64).mean() for x in arrays["activity"]])),
                "people": whose,
                "skipped": skipped,
            },
        }

    wanted = p.pick(*(name for name in PrepareData.__dataclass_fields__ if name not in ("data", "device", "out")))
    return prepare_once(project_root() / p.data, wanted, make, ["activity", "mlem", "sensitivity"])
