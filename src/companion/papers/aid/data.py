"""Sequences for AID: prepared once from virtual people or a folder of files, with every decision stored beside them.

A sequence of images (slices of a volume, frames of a cine) is drawn one after the other, each by diffusion given those
before it (Luo, Huang, Uecker 2024, arXiv 2405.14327).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from companion.data import head_sequences
from companion.data.sequences import Reading, folder
from companion.data.store import Prepared, prepare_once
from companion.data.virtual import SOURCES, sequence_arrays
from companion.files import project_root
from companion.parameters import Parameters, param

HEADS = "heads"  # source: stacks of slices of real heads


@dataclass(frozen=True)
class PrepareData(Reading, Parameters):
    """Parameters of aid/1_data.ipynb."""

    source: str = param(
        "brain",
        "brain or heart: the embedded cohorts; heads: stacks of slices of real heads, warped and recoloured; else a "
        "folder of fastMRI (.h5), NIfTI, .npy or BART (.cfl) files",
    )
    data: str = param("data/aid_brain_64.h5", "where the prepared sequences go; kept when it is there already")
    spacing_mm: float = param(3.25, "distance of neighbouring slices of virtual people", minimum=0.1)
    heads: str = param("data/heads", "source heads: folder of the real heads")
    subjects: int = param(1500, "virtual people, stacks of heads, or at most so many files", minimum=1)
    window: int = param(8, "frames of context, to count the windows that training will see", minimum=1)
    validation_share: float = param(
        0.1,
        "of files: share of the patients to validate on; of heads: so many more stacks of the one held for it",
        minimum=0,
        maximum=1,
    )
    test_share: float = param(0.1, "of files: share of the patients kept for tests", minimum=0, maximum=1)
    codec: str | None = param(
        None,
        "autoencoder whose latents of the magnitudes are stored too, for a prior on them: "
        "a published or embedded name, a folder; none: images only",
    )
    codec_range: tuple[float, float] = param((-1.0, 1.0), "what 0 and 1 of an image are for the autoencoder")


def prepare(p: PrepareData, progress: bool = True) -> Prepared:
    """The prepared sequences (sequence, frame, 1, y, x), made and stored once as HDF5.

    See `sequence_arrays` and `folder`. Raises FileNotFoundError or ValueError when there is nothing to prepare, and
    ValueError when `p.data` holds other sequences than the parameters ask for.
    """
    path, common = project_root() / p.data, ("source", "image_size", "frames", "subjects")
    if p.source in SOURCES:
        wanted = p.pick(*common, "spacing_mm")
        return prepare_once(path, wanted, lambda: sequence_arrays(**wanted, progress=progress), ["magnitude"])
    if p.source == HEADS:
        options = p.pick(*common[1:], "validation_share", "seed")
        folder_of_heads, scratch = project_root() / p.heads, path.parent
        return prepare_once(
            path,
            {"source": HEADS} | options,
            lambda: head_sequences.sequence_arrays(folder_of_heads, **options, scratch=scratch, progress=progress),
            ["signal"],
        )
    shares = (1 - p.validation_share - p.test_share, p.validation_share, p.test_share)
    wanted = p.pick(*common, *(field.name for field in fields(Reading)), "validation_share", "test_share", "seed")
    return prepare_once(path, wanted, lambda: folder(p.source, p, p.subjects, shares, p.seed, path.parent, progress))
