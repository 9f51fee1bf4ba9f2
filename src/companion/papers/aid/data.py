"""Sequences for AID: prepared once from virtual people or a folder of files, with every decision stored beside them.

A sequence of images (slices of a volume, frames of a cine) is drawn one after the other, each by diffusion given those
before it (Luo, Huang, Uecker 2024, arXiv 2405.14327).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from companion.data import anatomy
from companion.data.sequences import Reading, folder
from companion.data.store import Prepared, open_dataset, prepare_once, write_dataset
from companion.data.virtual import SOURCES, cohorts, volumes
from companion.diffusion.latent import LatentSpace
from companion.files import project_root
from companion.parameters import Parameters, param


@dataclass(frozen=True)
class PrepareData(Reading, Parameters):
    """Parameters of aid/1_data.ipynb."""

    source: str = param(
        "brain",
        "brain or heart: the embedded cohorts; else a folder of fastMRI (.h5), NIfTI, .npy or BART (.cfl) files",
    )
    data: str = param("data/aid_brain_64.h5", "where the prepared sequences go; kept when it is there already")
    spacing_mm: float = param(3.25, "distance of neighbouring slices of virtual people", minimum=0.1)
    subjects: int = param(1500, "virtual people, or at most so many files", minimum=1)
    window: int = param(8, "frames of context, to count the windows that training will see", minimum=1)
    validation_share: float = param(0.1, "of files: share of the patients to validate on", minimum=0, maximum=1)
    test_share: float = param(0.1, "of files: share of the patients kept for tests", minimum=0, maximum=1)
    codec: str | None = param(
        None,
        "autoencoder whose latents of the magnitudes are stored too, for a prior on them: "
        "a published or embedded name, a folder; none: images only",
    )
    codec_range: tuple[float, float] = param((-1.0, 1.0), "what 0 and 1 of an image are for the autoencoder")


def prepare(p: PrepareData, progress: bool = True) -> Prepared:
    """The prepared sequences (sequence, frame, 1, y, x), made and stored once as HDF5.

    See `cohort` and `folder`. Raises FileNotFoundError or ValueError when there is nothing to prepare, and ValueError
    when `p.data` holds other sequences than the parameters ask for.
    """
    path, common = project_root() / p.data, ("source", "image_size", "frames", "subjects")
    if p.source in SOURCES:
        wanted = p.pick(*common, "spacing_mm")
        return prepare_once(path, wanted, lambda: cohort(**wanted, progress=progress), ["magnitude"])
    shares = (1 - p.validation_share - p.test_share, p.validation_share, p.test_share)
    wanted = p.pick(*common, *(field.name for field in fields(Reading)), "validation_share", "test_share", "seed")
    return prepare_once(path, wanted, lambda: folder(p.source, p, p.subjects, shares, p.seed, path.parent, progress))


def cohort(
    source: str, image_size: int, frames: int, subjects: int, spacing_mm: float, progress: bool = True
) -> dict[str, object]:
    """What `write_dataset` stores of an embedded cohort: magnitudes (subject, frame, 1, y, x) float32.

    Phases are not stored: `sequence_loss` draws a new one each time a window is shown.
    """
    images = volumes(source, "train", subjects, frames, image_size, spacing_mm, progress)
    scale, about = SOURCES[source]
    return {
        "arrays": {"magnitude": images.abs().numpy()},
        "units": {"magnitude": "1"},
        "scale": {"magnitude": scale},
        "seed": cohorts(source).cohort("train", 1)[0].seed,
        "source": about,
        "split": {"train": range(subjects)},
        "attrs": {"spacing_mm": spacing_mm},
    }


@torch.no_grad()
def encode(
    codec: nn.Module, intensity: tuple[float, float], prepared: Prepared, progress: bool = True
) -> tuple[Prepared, LatentSpace]:
    """The latents (sequence, frame, channel, y, x) of prepared sequences and their space, beside the images' file.

    Of magnitudes, by an autoencoder for which 0 and 1 are `intensity`; mean 0 and standard deviation 1 over the
    training sequences. attrs["latent"] says which autoencoder and normalisation, and goes into the checkpoint of a
    prior. Raises ValueError when the file is there with latents of another autoencoder or of other images.
    """
    name = image_name(prepared)
    path = prepared.path.with_name(f"{prepared.path.stem}_latents.h5")
    if not path.exists():
        images = prepared.read(name)

        def batches(rows: Sequence[int], what: str) -> Iterator[Tensor]:
            for i in tqdm(rows, desc=what, disable=not progress):
                yield torch.from_numpy(images[i]).abs()

        space = LatentSpace.fit(codec, batches(prepared.rows("train"), "statistics"), intensity=intensity)
        z = torch.stack([space.encode(x) for x in batches(range(len(images)), "latents")])
        write_dataset(
            path,
            {"latent": z.numpy()},
            units={"latent": "1"},
            seed=prepared.seed,
            source=prepared.source,
            scale={"latent": "mean 0, standard deviation 1 over the training sequences, channel by channel"},
            subjects=prepared.subjects,
            split=prepared.split,
            attrs={"latent": space.describe(), "images": prepared.path.name}
            | {key: value for key, value in prepared.attrs.items() if key == "spacing_mm"},
        )
    latents = open_dataset(path, require=["latent"])
    space = LatentSpace.described(codec, latents.attrs["latent"])
    if latents.subjects != prepared.subjects or space.intensity != intensity:
        raise ValueError(
            f"{path} holds latents of other images than {prepared.path.name}, or of another codec_range; delete it"
        )
    return latents, space


def windows_table(prepared: Prepared, window: int) -> list[dict[str, object]]:
    """For each split of prepared sequences, how many there are and what training with a window sees of them."""
    name, rows = image_name(prepared), []
    for split in prepared.split:
        if not prepared.split[split]:
            continue
        seen = prepared.sequences(name, split, window + 1)
        rows.append(
            {
                "split": split,
                "sequences": len(prepared.rows(split)),
                "frames of each": prepared.shapes[name][1],
                "windows": len(seen),
                "frames in no window": seen.dropped * len(prepared.rows(split)),
            }
        )
    return rows


def image_name(prepared: Prepared) -> str:
    """The name of the array of frames in a prepared file: "image", "magnitude" or "latent"."""
    return next(iter(prepared.shapes))


def shown_sequences(prepared: Prepared, count: int, spacing_mm: float, seed: int) -> Tensor:
    """Complex sequences (sequence, frame, 1, y, x) as training would show them: magnitudes with a new phase."""
    name = image_name(prepared)
    whole = prepared.sequences(name, "train", prepared.shapes[name][1])
    x = torch.stack([whole[i] for i in range(min(count, len(whole)))])
    if x.is_complex():
        return x
    return anatomy.random_sequence_phase(x, spacing_mm, torch.Generator().manual_seed(seed))


def published_blocks(frames: list[int], length: int) -> list[list[tuple[int, int]]]:
    """The windows, as (volume, frame), that the released loader cuts from volumes of so many frames.

    Volumes end to end, cut every `length` frames wherever volumes end; the last block is withheld even when it is full.
    """
    stream = [(volume, frame) for volume, count in enumerate(frames) for frame in range(count)]
    return [stream[i : i + length] for i in range(0, len(stream) - length, length)]


def straddles(block: list[tuple[int, int]]) -> bool:
    """Whether a block of (volume, frame) holds frames of two volumes."""
    return block[0][0] != block[-1][0]


def published_maximum(x: Tensor) -> Tensor:
    """What the released reader divides complex images by: np.max, the value with the largest real part."""
    return torch.from_numpy(np.asarray(np.max(x.numpy())))
