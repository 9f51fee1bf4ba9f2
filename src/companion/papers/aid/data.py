"""Sequences for AID: prepared once from virtual people or a folder of files, with every decision stored beside them.

A sequence of images (slices of a volume, frames of a cine) is drawn one after the other, each by diffusion given those
before it (Luo, Huang, Uecker 2024, arXiv 2405.14327).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from companion.data import anatomy, fastmri
from companion.data.intake.kinds import one_contrast, one_each
from companion.data.intake.look import find
from companion.data.intake.records import Item
from companion.data.intake.splits import split_people, split_table
from companion.data.rows import Rows
from companion.data.series import Series, load_series
from companion.data.store import Prepared, open_dataset, prepare_once, write_dataset
from companion.data.virtual import SOURCES, cohorts, volumes
from companion.diffusion.latent import LatentSpace
from companion.files import project_root
from companion.operators.mri import estimate_maps, ifft, normalise
from companion.parameters import Parameters, param


@dataclass(frozen=True)
class Reading:
    """The part of a form that says what is read of each file of a folder, at which size."""

    image_size: int = param(64, "pixels along y and x", minimum=16)
    frames: int = param(16, "slices of a volume or frames of a cine; longer files are cut", minimum=2)
    axis: int | None = param(None, "of NIfTI, .npy, .cfl: the axis that counts frames; none: the format's usual one")
    leave_out: tuple[int, ...] = param((0, 0), "of files: frames left out at the start and at the end", minimum=0)
    magnitude: bool = param(False, "of files: drop the phase")
    acs: int = param(24, "of fastMRI files: width of the k-space centre that coil maps come from", minimum=12)
    contrast: str | None = param(None, "of image files: the one to take, as in T1w; none: T1w where there are several")
    people: str | None = param(None, "of files: table (CSV, TSV) with file, subject, session, split; none: by names")


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


def folder(
    source: str,
    reading: Reading,
    most: int,
    shares: tuple[float, float, float],
    seed: int,
    scratch: Path,
    progress: bool = True,
) -> dict[str, object]:
    """What `write_dataset` stores of at most so many files of a folder: sequences (sequence, frame, 1, y, x).

    "image", complex64, or "magnitude", float32, when no file has a phase: each file divided by its largest magnitude,
    phase untouched, resized. "scale", (sequence,), multiplies back to the file's values. A file longer than `frames`
    is cut into sequences that overlap rather than leave frames out; shorter ones are skipped, not padded. A patient is
    in one split only. attrs["files"] and attrs["skipped"] tell what became of each file, attrs["people"] whose each
    is, attrs["first_frame"] where each sequence begins. One file is held in memory at a time.
    """
    items, skipped, given = find_files(source, reading)
    phase = not reading.magnitude and any(_has_phase(item) for item in items)
    kind, files, whose, steps, sequences = "image" if phase else "magnitude", {}, {}, [], []
    arrays = {name: Rows(scratch) for name in (kind, "scale")}
    for item in tqdm(items, desc="files", disable=not progress):
        if len(files) == most:
            break
        try:
            if phase and not _has_phase(item):
                raise ValueError("has no phase, unlike other files; magnitude=True drops that of all")
            series = read_file(item, reading)
            starts = pieces(len(series.frames), reading.frames)
        except (ValueError, OSError) as error:
            skipped[item.name] = str(error).removeprefix(f"{item.path}: ")
            continue
        for first in starts:
            arrays[kind].append(series.frames[first : first + reading.frames].numpy())
            arrays["scale"].append(np.float32(series.scale))
            sequences.append((item.name, first))
        files[item.name], whose[item.name] = len(series.frames), item.person
        steps += [series.step_mm] if series.step_mm else []
    if not files:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items()) or " it is empty"
        raise ValueError(f"no file of {source} can be used:{reasons}")
    people = split_people(whose.values(), shares, seed, given)
    if progress:
        print(split_table(people, {who: [n for n in whose if whose[n] == who] for who in whose.values()}))
    first_frames = [first for _, first in sequences]
    attrs = {"files": files, "skipped": skipped, "people": whose, "first_frame": first_frames}
    return {
        "arrays": arrays,
        "units": {kind: "1", "scale": "as in the file"},
        "scale": {
            kind: "1 is the largest magnitude of a file; the array scale multiplies back",
            "scale": "multiplies images back to the values of the file",
        },
        "seed": seed,
        "source": f"files of {Path(source).name}",
        "subjects": [f"{name}/{first}" for name, first in sequences],
        "split": {
            part: [f"{name}/{first}" for name, first in sequences if whose[name] in who] for part, who in people.items()
        },
        "attrs": attrs | ({"spacing_mm": float(np.median(steps))} if steps else {}),
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


def find_files(source: str, reading: Reading) -> tuple[list[Item], dict[str, str], dict[str, str]]:
    """The images and the k-space of a folder, by `data.intake`, why others are not used, and a table's split.

    Of several contrasts of images one is taken, see `intake.kinds.one_contrast`. Raises FileNotFoundError for a folder
    that does not exist, and as `intake.look.find`.
    """
    folder = project_root() / source
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{source} is not a folder; give one with fastMRI, NIfTI, .npy or .cfl files, or the "
            f"name of an embedded cohort: {', '.join(SOURCES)}"
        )
    found = find(folder, reading.people and project_root() / reading.people, ("image", "k-space"))
    images, others = one_contrast([item for item in found.items if item.what.kind == "image"], reading.contrast)
    images, versions = one_each(images)
    chosen = {item.name for item in images}
    items = [item for item in found.items if item.name in chosen or item.what.kind == "k-space"]
    return items, dict(found.left) | others | versions, dict(found.split)


def _has_phase(item: Item) -> bool:
    return item.what.kind == "k-space" or item.what.dtype.startswith("complex")


def read_file(item: Item, reading: Reading) -> Series:
    """The frames of one file. Raises ValueError or OSError with the reason for a file that cannot be used."""
    shape, (before, after) = (reading.image_size, reading.image_size), reading.leave_out
    part = slice(before, -after or None)
    if item.what.kind == "image":
        return load_series(item.path, axis=reading.axis, frames=part, shape=shape, magnitude=reading.magnitude)
    if item.reader.name != "fastMRI":
        raise ValueError(f"k-space ({item.what.format}), of which images have to be made first; fastMRI files are read")
    file = fastmri.open_volume(item.path)
    if file.mask is not None:
        raise ValueError("is undersampled; only fully sampled k-space shows what images look like")
    slices = [coil_combined(file.crop(file.read(i)), reading.acs) for i in range(file.slices)[part]]
    if not slices:
        raise ValueError(f"has {file.slices} slices, of which leave_out={reading.leave_out} keeps none")
    image, scale = normalise(torch.stack(slices))
    mm = file.voxel_mm
    series = Series(file.name, image.abs() if reading.magnitude else image, float(scale), mm and mm[1:], mm and mm[0])
    return series.resized(shape)


def coil_combined(kspace: Tensor, acs: int) -> Tensor:
    """The image (1, y, x) of fully sampled k-space (coil, y, x): sum_c conj(S_c) F^-1 y_c, S from the centre."""
    if len(kspace) == 1:
        return ifft(kspace)
    return (estimate_maps(kspace, min(acs, *kspace.shape[-2:])).conj() * ifft(kspace)).sum(0, keepdim=True)


def pieces(count: int, length: int) -> list[int]:
    """Where sequences of `length` begin that together hold all of `count` frames, evenly overlapping.

    Raises ValueError for fewer frames than one sequence.
    """
    if count < length:
        raise ValueError(f"has {count} frames, fewer than a sequence of {length}; lower frames to use it")
    number = -(-count // length)
    return [round(i * (count - length) / max(number - 1, 1)) for i in range(number)]


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
