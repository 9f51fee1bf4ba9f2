"""Prepared contrasts for LMI: virtual people and folders of pairs."""

from __future__ import annotations

from dataclasses import dataclass

from companion.data import anatomy
from companion.data.cohort import standards
from companion.data.contrast_folder import (
    Reading,
    cohort_of,
    layout_of,
    read_images,
    read_volumes,
    virtual_patients,
    virtual_people,
)
from companion.data.heads_download import head_files
from companion.data.store import Prepared, open_dataset, prepare_once
from companion.files import project_root
from companion.parameters import Parameters, param


@dataclass(frozen=True)
class PrepareData(Reading, Parameters):
    """Parameters of lmi/1_data.ipynb."""

    source: str = param(
        "brain",
        "brain: the embedded cohort; patients: brains of several anatomies, most with lesions; else a folder of NIfTI "
        "volumes, or one with a sub-folder of slice images for each contrast",
    )
    data: str = param("data/lmi_brain_64.h5", "where the prepared slices go; kept when it is there already")
    heads: str | None = param(
        None, "of patients: folder of real heads (companion data get heads); none: the template alone"
    )
    validation_subjects: int = param(16, "virtual people to validate on", minimum=1)
    test_subjects: int = param(32, "virtual people to test on", minimum=1)

    def before_start(self) -> None:
        """Raise for contrasts named twice, a folder that is not there, or one without anything of these contrasts."""
        standards(self.contrasts)
        path = project_root() / self.data
        if path.exists():
            open_dataset(path)
        elif self.source in ("brain", "patients"):
            if self.source == "patients" and self.heads is not None:
                for split in ("train", "validation"):
                    head_files(project_root() / self.heads, split)
            if unknown := [c for c in standards(self.contrasts) if c not in anatomy.SEQUENCES]:
                raise ValueError(f"the cohort has no {', '.join(unknown)}; it has {', '.join(anatomy.SEQUENCES)}")
        elif layout_of(project_root() / self.source, self) is not None:
            cohort_of(project_root() / self.source, self)


def prepare(p: PrepareData, progress: bool = True) -> Prepared:
    """The prepared slices, an array (subject, slice, channel, y, x) for each contrast, made and stored once as HDF5.

    The embedded cohort also has "labels" (`anatomy.LABELS`). Raises FileNotFoundError or ValueError as `paired` does
    for what cannot be prepared, and ValueError when `p.data` holds something else than the parameters ask for.
    """
    path = project_root() / p.data

    def make() -> dict:
        counts = {"train": p.subjects, "validation": p.validation_subjects, "test": p.test_subjects}
        if p.source == "brain":
            made = virtual_people(counts, p.slices_per_subject, p.contrasts, p.image_size, progress)
        elif p.source == "patients":
            heads = None if p.heads is None else project_root() / p.heads
            made = virtual_patients(heads, counts, p.slices_per_subject, p.contrasts, p.image_size, progress)
        else:
            read = read_images if layout_of(project_root() / p.source, p) is None else read_volumes
            made = read(project_root() / p.source, path.parent, p, p.seed, progress)
        return made | {"seed": p.seed, "units": dict.fromkeys(made["arrays"], "1")}

    without = {"device", "out", "data"} | (set() if p.source == "patients" else {"heads"})
    wanted = p.pick(*(name for name in PrepareData.__dataclass_fields__ if name not in without))
    return prepare_once(path, wanted, make)
