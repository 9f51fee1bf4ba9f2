"""Sequences of images from the files of a folder: slices of volumes, frames of cines, combined from their coils."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from companion.data import anatomy, fastmri
from companion.data.intake.kinds import one_contrast, one_each, stem
from companion.data.intake.look import find
from companion.data.intake.records import Item, reason
from companion.data.intake.splits import split_people, split_table
from companion.data.raw.scan import read_kspace
from companion.data.rows import Rows
from companion.data.series import Series, load_series
from companion.data.slicing import PLANES
from companion.data.store import Prepared
from companion.data.virtual import SOURCES
from companion.files import project_root
from companion.operators.mri import crop_kspace, estimate_maps, ifft, normalise
from companion.parameters import param

STORED = "stored"


@dataclass(frozen=True)
class Reading:
    """The part of a form that says what is read of each file of a folder, at which size."""

    image_size: int = param(64, "pixels along y and x", minimum=16)
    frames: int = param(16, "slices of a volume or frames of a cine; longer files are cut", minimum=2)
    plane: str = param(
        "axial",
        "of image volumes: orientation of the slices, whatever the order in the file; stored: as `axis` says",
        choices=(*PLANES, STORED),
    )
    axis: int | None = param(None, "of stored slices, .npy, .cfl: the axis that counts frames, whatever plane says")
    leave_out: tuple[int, ...] = param((0, 0), "of files: frames left out at the start and at the end", minimum=0)
    magnitude: bool = param(False, "of files: drop the phase")
    acs: int = param(24, "of k-space: width of its centre that coil maps come from", minimum=12)
    axes: str | None = param(None, "of k-space in .npy, .mat, .cfl: names of its axes, y the readout: slice coil y x")
    which: str | None = param(None, "of k-space with several: which of them, as in repetition 0, frame 3")
    contrast: str | None = param(None, "of image files: the one to take, as in T1w; none: T1w where there are several")
    people: str | None = param(None, "of files: table (CSV, TSV) with file, subject, session, split; none: by names")


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
            skipped[item.name] = reason(error).removeprefix(f"{item.path}: ")
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
        plane = None if reading.plane == STORED or reading.axis is not None else reading.plane
        return load_series(item, axis=reading.axis, plane=plane, frames=part, shape=shape, magnitude=reading.magnitude)
    count, kspaces, mm = _fastmri(item) if item.reader.name == "fastMRI" else _raw(item, reading)
    slices = [coil_combined(kspaces(i), reading.acs) for i in range(count)[part]]
    if not slices:
        raise ValueError(f"has {count} slices, of which leave_out={reading.leave_out} keeps none")
    image, scale = normalise(torch.stack(slices))
    image = image.abs() if reading.magnitude else image
    return Series(stem(item.path.name), image, float(scale), mm and mm[1:], mm and mm[0]).resized(shape)


UNDERSAMPLED = "is undersampled; only fully sampled k-space shows what images look like"


def _fastmri(item: Item) -> tuple[int, Callable[[int], Tensor], tuple[float, float, float] | None]:
    """How many slices a file has, its k-space (coil, y, x) slice by slice, and voxels in mm; one slice is in memory."""
    file = fastmri.open_volume(item.path)
    if file.mask is not None:
        raise ValueError(UNDERSAMPLED)
    return file.slices, lambda i: file.crop(file.read(i)), file.voxel_mm


def _raw(item: Item, reading: Reading) -> tuple[int, Callable[[int], Tensor], tuple[float, float, float] | None]:
    """As `_fastmri`, of any other k-space; that of a 3D scan is made slices along its second phase encoding."""
    scan = read_kspace(item, reading.axes, reading.which)
    measured = scan.mask.amin((0, 1)) > 0  # *space
    spans = [measured.any(tuple(a for a in range(scan.ndim) if a != axis)).nonzero() for axis in range(scan.ndim)]
    box = tuple(slice(int(span[0]), int(span[-1]) + 1) for span in spans if len(span))
    partial = [(s.stop - s.start) / n for s, n in zip(box, measured.shape, strict=False)]
    if len(box) < scan.ndim or not measured[box].all() or min(partial) <= 0.5:  # partial Fourier has more than half
        raise ValueError(UNDERSAMPLED)
    kspace, over = scan.kspace, scan.oversampling
    if scan.ndim == 3:  # (slab, coil, z, y, x)
        kspace = ifft(kspace.movedim(2, -1), 1).movedim(-1, 1).flatten(0, 1)
    size = [max(1, round(n / o)) for n, o in zip(kspace.shape[-2:], over[-2:], strict=True)]
    size[1] = size[1] if partial[-1] == 1 else kspace.shape[-1]  # columns must stay what was measured
    return len(kspace), lambda i: crop_kspace(kspace[i], tuple(size)), scan.voxel_mm


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
    """The name of the array of frames in a prepared file: "image", "magnitude", "signal" or "latent"."""
    return next(iter(prepared.shapes))


def shown_sequences(prepared: Prepared, count: int, spacing_mm: float, seed: int) -> Tensor:
    """Complex sequences (sequence, frame, 1, y, x) as training would show them: magnitudes with a new phase."""
    name = image_name(prepared)
    whole = prepared.sequences(name, prepared.shown(), prepared.shapes[name][1])
    x = torch.stack([whole[i] for i in range(min(count, len(whole)))])
    if x.is_complex():
        return x
    return anatomy.random_sequence_phase(x.float(), spacing_mm, torch.Generator().manual_seed(seed))


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


def brightness(prepared: Prepared, count: int = 64) -> float:
    """The magnitude that 99 % of a training volume's pixels do not exceed, mean over the first volumes.

    Reconstruction brings data of unknown units to the prior's by it.
    """
    name, shape = next(iter(prepared.shapes.items()))
    whole = prepared.sequences(name, "train", shape[1])
    levels = [torch.quantile(whole[i].abs().float().flatten(), 0.99).item() for i in range(min(count, len(whole)))]
    return round(sum(levels) / len(levels), 4)
