"""Autoregressive image diffusion (Luo, Huang, Uecker 2024, arXiv 2405.14327): what belongs to it alone.

A sequence of images (slices of a volume, frames of a cine) is drawn one after the other, each by diffusion given those
before it. Parameters, data and training of the notebooks under notebooks/aid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from companion.data import anatomy, fastmri, heart
from companion.data.intake.kinds import one_contrast, one_each
from companion.data.intake.look import find
from companion.data.intake.records import Item
from companion.data.intake.splits import split_people, split_table
from companion.data.rows import Rows
from companion.data.series import Series, load_series
from companion.data.store import Prepared, open_dataset, write_dataset
from companion.diffusion.latent import LatentSpace
from companion.files import project_root
from companion.models.checkpoint import load
from companion.operators.mri import estimate_maps, ifft, normalise
from companion.parameters import Parameters, param

CONTRAST = "T1w"
HEART_VIEW_MM = 160.0  # side of the square of the chest around the heart that cine sequences show

# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class PrepareData(Parameters):
    """Parameters of aid/1_data.ipynb."""

    source: str = param(
        "brain",
        "brain or heart: the embedded cohorts; else a folder of fastMRI (.h5), NIfTI, .npy or BART (.cfl) files",
    )
    data: str = param("data/aid_brain_64.h5", "where the prepared sequences go; kept when it is there already")
    image_size: int = param(64, "pixels along y and x", minimum=16)
    frames: int = param(16, "slices of a volume or frames of a cine; longer files are cut", minimum=2)
    spacing_mm: float = param(3.25, "distance of neighbouring slices of virtual people", minimum=0.1)
    subjects: int = param(2400, "virtual people, or at most so many files", minimum=1)
    window: int = param(8, "frames of context, to count the windows that training will see", minimum=1)
    axis: int | None = param(None, "of NIfTI, .npy, .cfl: the axis that counts frames; none: the format's usual one")
    leave_out: tuple[int, ...] = param((0, 0), "of files: frames left out at the start and at the end", minimum=0)
    magnitude: bool = param(False, "of files: drop the phase")
    acs: int = param(24, "of fastMRI files: width of the k-space centre that coil maps come from", minimum=12)
    validation_share: float = param(0.1, "of files: share of the patients to validate on", minimum=0, maximum=1)
    test_share: float = param(0.1, "of files: share of the patients kept for tests", minimum=0, maximum=1)
    contrast: str | None = param(None, "of image files: the one to take, as in T1w; none: T1w where there are several")
    people: str | None = param(None, "of files: table (CSV, TSV) with file, subject, session, split; none: by names")
    codec: str | None = param(
        None,
        "autoencoder whose latents of the magnitudes are stored too, for a prior on them: "
        "a published or embedded name, a folder; none: images only",
    )
    codec_range: tuple[float, float] = param((-1.0, 1.0), "what 0 and 1 of an image are for the autoencoder")


SOURCES = {
    "brain": (
        "1 is the signal of the subject's brightest pure tissue",
        f"virtual cohort of companion.data.anatomy (ICBM 152), {CONTRAST} axial slices",
    ),
    "heart": ("1 is the signal of blood", "virtual cohort of companion.data.heart, short-axis cine"),
}


def cohorts(source: str):
    """Return the module of an embedded cohort: anatomy or heart."""
    return heart if source == "heart" else anatomy


def volume_heights(subject: anatomy.Subject, frames: int, spacing_mm: float) -> Tensor:
    """Return MNI heights (frame,) of evenly spaced slices from the lowest up, in the middle of the slab, jittered."""
    low, high = anatomy.SLAB_MM
    jitter = torch.rand((), generator=subject.generator("volume")) - 0.5
    return (low + high) / 2 + spacing_mm * (torch.arange(frames) - (frames - 1) / 2 + jitter)


def volume(
    source: str, split: str, index: int, frames: int, image_size: int, spacing_mm: float, beyond: int = 0
) -> Tensor:
    """Return the complex sequence (frame, 1, y, x) of one person of an embedded cohort.

    beyond: so many frames more, as the sequence would go on: slices further up, or the next heart beat.
    """
    shape = (image_size, image_size)
    subject = cohorts(source).cohort(split, index + 1)[index]
    if source == "heart":
        cycles = (frames + beyond) / frames
        return heart.render(subject, frames + beyond, shape, HEART_VIEW_MM / image_size, cycles=cycles).image[:, None]
    heights = volume_heights(subject, frames, spacing_mm)
    heights = torch.cat([heights, heights[-1] + spacing_mm * torch.arange(1, beyond + 1)])
    return anatomy.render(subject, CONTRAST, (len(heights), *shape), slices_mm=heights).image[:, None]


def volumes(
    source: str,
    split: str,
    subjects: int,
    frames: int,
    image_size: int,
    spacing_mm: float,
    progress: bool = False,
    beyond: int = 0,
) -> Tensor:
    """Return complex sequences (subject, frame, 1, y, x) of the first people of a split of an embedded cohort."""
    if source not in SOURCES:
        raise ValueError(f"there is no embedded cohort {source!r}; expected one of {', '.join(SOURCES)}")
    people = tqdm(range(subjects), desc="subjects", disable=not progress)
    return torch.stack([volume(source, split, i, frames, image_size, spacing_mm, beyond) for i in people])


def prepare(p: PrepareData, progress: bool = True) -> Prepared:
    """Return the prepared sequences (sequence, frame, 1, y, x), made and stored once as HDF5.

    See `prepare_cohort` and `prepare_folder`. Raises FileNotFoundError or ValueError when there is nothing to prepare,
    and ValueError when `p.data` holds other sequences than the parameters ask for.
    """
    return prepare_cohort(p, progress) if p.source in SOURCES else prepare_folder(p, progress)


def prepare_cohort(p: PrepareData, progress: bool = True) -> Prepared:
    """Return magnitudes of an embedded cohort, (subject, frame, 1, y, x) float32, made and stored once as HDF5.

    Phases are not stored: `sequence_loss` draws a new one each time a window is shown.
    """
    path = project_root() / p.data
    scale, source = SOURCES[p.source]
    if not path.exists():
        images = volumes(p.source, "train", p.subjects, p.frames, p.image_size, p.spacing_mm, progress)
        write_dataset(
            path,
            {"magnitude": images.abs().numpy()},
            units={"magnitude": "1"},
            scale={"magnitude": scale},
            seed=cohorts(p.source).cohort("train", 1)[0].seed,
            source=source,
            split={"train": range(p.subjects)},
            attrs={"spacing_mm": p.spacing_mm},
        )
    prepared = open_dataset(path, require=["magnitude"])
    expected = (p.subjects, p.frames, 1, p.image_size, p.image_size)
    if prepared.shapes["magnitude"] != expected:
        raise ValueError(
            f"{path} holds sequences of shape {prepared.shapes['magnitude']} but the parameters ask for "
            f"{expected}; delete the file, or give another data file"
        )
    return prepared


def prepare_folder(p: PrepareData, progress: bool = True) -> Prepared:
    """Return the sequences of all files of a folder, (sequence, frame, 1, y, x), made and stored once as HDF5.

    "image", complex64, or "magnitude", float32, when no file has a phase: each file divided by its largest magnitude,
    phase untouched, resized. "scale", (sequence,), multiplies back to the file's values. A file longer than `p.frames`
    is cut into sequences that overlap rather than leave frames out; shorter ones are skipped, not padded. A patient is
    in one split only. attrs["files"] and attrs["skipped"] tell what became of each file, attrs["people"] whose each
    is, attrs["first_frame"] where each sequence begins. One file is held in memory at a time.
    """
    path = project_root() / p.data
    names = (
        "source",
        "image_size",
        "frames",
        "subjects",
        "axis",
        "leave_out",
        "magnitude",
        "acs",
        "validation_share",
        "test_share",
        "contrast",
        "people",
        "seed",
    )
    wanted = {name: list(v) if isinstance(v := getattr(p, name), tuple) else v for name in names}
    if not path.exists():
        write_dataset(path, **_folder(p, path.parent, wanted, progress))
    prepared = open_dataset(path)
    made = prepared.attrs.get("parameters")
    if made != wanted:
        other = (
            "an embedded cohort"
            if made is None
            else ", ".join(f"{k} = {made.get(k)} (now {v})" for k, v in wanted.items() if made.get(k) != v)
        )
        raise ValueError(f"{path} was prepared from {other}; delete the file, or give another data file")
    return prepared


@torch.no_grad()
def encode(p: PrepareData, prepared: Prepared, progress: bool = True) -> tuple[Prepared, LatentSpace]:
    """Return latents (sequence, frame, channel, y, x) of prepared sequences and their space, beside the images' file.

    Of magnitudes, by `p.codec`; mean 0 and standard deviation 1 over the training sequences. attrs["latent"] says which
    autoencoder and normalisation, and goes into the checkpoint of a prior. Raises ValueError when the file is there
    with latents of another autoencoder or of other images.
    """
    codec, name = load(p.codec), image_name(prepared)
    path = prepared.path.with_name(f"{prepared.path.stem}_latents.h5")
    if not path.exists():
        images = prepared.read(name)

        def batches(rows: Sequence[int], what: str) -> Iterator[Tensor]:
            for i in tqdm(rows, desc=what, disable=not progress):
                yield torch.from_numpy(images[i]).abs()

        space = LatentSpace.fit(codec, batches(prepared.rows("train"), "statistics"), intensity=p.codec_range)
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
    if latents.subjects != prepared.subjects or space.intensity != p.codec_range:
        raise ValueError(
            f"{path} holds latents of other images than {prepared.path.name}, or of another codec_range; delete it"
        )
    return latents, space


def _folder(p: PrepareData, scratch: Path, wanted: dict, progress: bool) -> dict[str, object]:
    """What `write_dataset` stores of a folder: arrays, units, scale, source, seed, split, subjects, attrs."""
    items, skipped, given = find_files(p)
    phase = not p.magnitude and any(_has_phase(item) for item in items)
    kind, files, whose, steps, sequences = "image" if phase else "magnitude", {}, {}, [], []
    arrays = {name: Rows(scratch) for name in (kind, "scale")}
    for item in tqdm(items, desc="files", disable=not progress):
        if len(files) == p.subjects:
            break
        try:
            if phase and not _has_phase(item):
                raise ValueError("has no phase, unlike other files; magnitude=True drops that of all")
            series = read_file(item, p)
            starts = pieces(len(series.frames), p.frames)
        except (ValueError, OSError) as error:
            skipped[item.name] = str(error).removeprefix(f"{item.path}: ")
            continue
        for first in starts:
            arrays[kind].append(series.frames[first : first + p.frames].numpy())
            arrays["scale"].append(np.float32(series.scale))
            sequences.append((item.name, first))
        files[item.name], whose[item.name] = len(series.frames), item.person
        steps += [series.step_mm] if series.step_mm else []
    if not files:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items()) or " it is empty"
        raise ValueError(f"no file of {p.source} can be used:{reasons}")
    shares = (1 - p.validation_share - p.test_share, p.validation_share, p.test_share)
    people = split_people(whose.values(), shares, p.seed, given)
    if progress:
        print(split_table(people, {who: [n for n in whose if whose[n] == who] for who in whose.values()}))
    return {
        "arrays": arrays,
        "units": {kind: "1", "scale": "as in the file"},
        "seed": p.seed,
        "source": f"files of {Path(p.source).name}",
        "scale": {
            kind: "1 is the largest magnitude of a file; the array scale multiplies back",
            "scale": "multiplies images back to the values of the file",
        },
        "subjects": [f"{name}/{first}" for name, first in sequences],
        "split": {
            part: [f"{name}/{first}" for name, first in sequences if whose[name] in who] for part, who in people.items()
        },
        "attrs": {
            "files": files,
            "skipped": skipped,
            "people": whose,
            "first_frame": [first for _, first in sequences],
            "parameters": wanted,
        }
        | ({"spacing_mm": float(np.median(steps))} if steps else {}),
    }


def find_files(p: PrepareData) -> tuple[list[Item], dict[str, str], dict[str, str]]:
    """Return the images and the k-space of a folder, by `data.intake`, why others are not used, and a table's split.

    Of several contrasts of images one is taken, see `intake.kinds.one_contrast`. Raises FileNotFoundError for a folder
    that does not exist, and as `intake.look.find`.
    """
    folder = project_root() / p.source
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{p.source} is not a folder; give one with fastMRI, NIfTI, .npy or .cfl files, or the "
            f"name of an embedded cohort: {', '.join(SOURCES)}"
        )
    found = find(folder, p.people and project_root() / p.people, ("image", "k-space"))
    images, others = one_contrast([item for item in found.items if item.what.kind == "image"], p.contrast)
    images, versions = one_each(images)
    chosen = {item.name for item in images}
    items = [item for item in found.items if item.name in chosen or item.what.kind == "k-space"]
    return items, dict(found.left) | others | versions, dict(found.split)


def _has_phase(item: Item) -> bool:
    return item.what.kind == "k-space" or item.what.dtype.startswith("complex")


def read_file(item: Item, p: PrepareData) -> Series:
    """Return the frames of one file, at `p.image_size`.

    Raises ValueError or OSError with the reason for a file that cannot be used.
    """
    shape, (before, after) = (p.image_size, p.image_size), p.leave_out
    part = slice(before, -after or None)
    if item.what.kind == "image":
        return load_series(item.path, axis=p.axis, frames=part, shape=shape, magnitude=p.magnitude)
    if item.reader.name != "fastMRI":
        raise ValueError(f"k-space ({item.what.format}), of which images have to be made first; fastMRI files are read")
    file = fastmri.open_volume(item.path)
    if file.mask is not None:
        raise ValueError("is undersampled; only fully sampled k-space shows what images look like")
    slices = [coil_combined(file.crop(file.read(i)), p.acs) for i in range(file.slices)[part]]
    if not slices:
        raise ValueError(f"has {file.slices} slices, of which leave_out={p.leave_out} keeps none")
    image, scale = normalise(torch.stack(slices))
    mm = file.voxel_mm
    series = Series(file.name, image.abs() if p.magnitude else image, float(scale), mm and mm[1:], mm and mm[0])
    return series.resized(shape)


def coil_combined(kspace: Tensor, acs: int) -> Tensor:
    """Return the image (1, y, x) of fully sampled k-space (coil, y, x): sum_c conj(S_c) F^-1 y_c, S from the centre."""
    if len(kspace) == 1:
        return ifft(kspace)
    return (estimate_maps(kspace, min(acs, *kspace.shape[-2:])).conj() * ifft(kspace)).sum(0, keepdim=True)


def pieces(count: int, length: int) -> list[int]:
    """Return where sequences of `length` begin that together hold all of `count` frames, evenly overlapping.

    Raises ValueError for fewer frames than one sequence.
    """
    if count < length:
        raise ValueError(f"has {count} frames, fewer than a sequence of {length}; lower frames to use it")
    number = -(-count // length)
    return [round(i * (count - length) / max(number - 1, 1)) for i in range(number)]


def windows_table(prepared: Prepared, window: int) -> list[dict[str, object]]:
    """Return, for each split of prepared sequences, how many there are and what training with a window sees of them."""
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
    """Return the name of the array of frames in a prepared file: "image", "magnitude" or "latent"."""
    return next(iter(prepared.shapes))


def shown_sequences(prepared: Prepared, count: int, spacing_mm: float, seed: int) -> Tensor:
    """Return complex sequences (sequence, frame, 1, y, x) as training would show them: magnitudes with a new phase."""
    name = image_name(prepared)
    whole = prepared.sequences(name, "train", prepared.shapes[name][1])
    x = torch.stack([whole[i] for i in range(min(count, len(whole)))])
    if x.is_complex():
        return x
    return anatomy.random_sequence_phase(x, spacing_mm, torch.Generator().manual_seed(seed))


def published_blocks(frames: list[int], length: int) -> list[list[tuple[int, int]]]:
    """Return the windows, as (volume, frame), that the released loader cuts from volumes of so many frames.

    Volumes end to end, cut every `length` frames wherever volumes end; the last block is withheld even when it is full.
    """
    stream = [(volume, frame) for volume, count in enumerate(frames) for frame in range(count)]
    return [stream[i : i + length] for i in range(0, len(stream) - length, length)]


def straddles(block: list[tuple[int, int]]) -> bool:
    """Return whether a block of (volume, frame) holds frames of two volumes."""
    return block[0][0] != block[-1][0]


def published_maximum(x: Tensor) -> Tensor:
    """Return what the released reader divides complex images by: np.max, the value with the largest real part."""
    return torch.from_numpy(np.asarray(np.max(x.numpy())))
