"""Autoregressive image diffusion (Luo, Huang, Uecker 2024, arXiv 2405.14327): what belongs to it alone.

A sequence of images (slices of a volume, frames of a cine) is drawn one after the other, each by diffusion given those
before it. Parameters, data and training of the notebooks under notebooks/aid.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from companion.data import anatomy, fastmri, heart
from companion.data.series import Series, load_series
from companion.data.store import Prepared, open_dataset, write_dataset
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.losses import discrete_loss, edm_loss
from companion.diffusion.noise import randn
from companion.latent import LatentSpace
from companion.operators.mri import estimate_maps, ifft, normalise
from companion.parameters import Parameters, param, read_yaml
from companion.runs import code_version, project_root
from companion.training import TrainConfig, TrainResult, train
from companion.weights import build, load, network_of, save_checkpoint

CONTRAST = "T1w"
HEART_VIEW_MM = 160.0  # side of the square of the chest around the heart that cine sequences show

# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class PrepareData(Parameters):
    """Parameters of aid/1_data.ipynb."""

    source: str = param("brain", "brain or heart: the embedded cohorts; else a folder of fastMRI (.h5), NIfTI, .npy or "
                                 "BART (.cfl) files")
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
    codec: str | None = param(None, "autoencoder whose latents of the magnitudes are stored too, for a prior on them: "
                                    "a published or embedded name, a folder; none: images only")
    codec_range: tuple[float, float] = param((-1.0, 1.0), "what 0 and 1 of an image are for the autoencoder")


SOURCES = {
    "brain": ("1 is the signal of the subject's brightest pure tissue",
              f"virtual cohort of companion.data.anatomy (ICBM 152), {CONTRAST} axial slices"),
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


def volume(source: str, split: str, index: int, frames: int, image_size: int, spacing_mm: float,
           beyond: int = 0) -> Tensor:
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


def volumes(source: str, split: str, subjects: int, frames: int, image_size: int, spacing_mm: float,
            progress: bool = False, beyond: int = 0) -> Tensor:
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
        write_dataset(path, {"magnitude": images.abs().numpy()}, units={"magnitude": "1"}, scale={"magnitude": scale},
                      seed=cohorts(p.source).cohort("train", 1)[0].seed, source=source,
                      split={"train": range(p.subjects)}, attrs={"spacing_mm": p.spacing_mm})
    prepared = open_dataset(path, require=["magnitude"])
    expected = (p.subjects, p.frames, 1, p.image_size, p.image_size)
    if prepared.shapes["magnitude"] != expected:
        raise ValueError(f"{path} holds sequences of shape {prepared.shapes['magnitude']} but the parameters ask for "
                         f"{expected}; delete the file, or give another data file")
    return prepared


def prepare_folder(p: PrepareData, progress: bool = True) -> Prepared:
    """Return the sequences of all files of a folder, (sequence, frame, 1, y, x), made and stored once as HDF5.

    "image", complex64, or "magnitude", float32, when no file has a phase: each file divided by its largest magnitude,
    phase untouched, resized. "scale", (sequence,), multiplies back to the file's values. A file longer than `p.frames`
    is cut into sequences that overlap rather than leave frames out; shorter ones are skipped, not padded. A patient is
    in one split only. attrs["files"] and attrs["skipped"] tell what became of each file, attrs["first_frame"] where
    each sequence begins. All sequences are held in memory once.
    """
    path = project_root() / p.data
    names = ("source", "image_size", "frames", "subjects", "axis", "leave_out", "magnitude", "acs", "validation_share",
             "test_share", "seed")
    wanted = {name: list(v) if isinstance(v := getattr(p, name), tuple) else v for name in names}
    if not path.exists():
        read, skipped = read_folder(p, progress)
        parts = [(name, patient, series, first) for name, patient, series in read
                 for first in pieces(len(series.frames), p.frames)]
        images = torch.stack([series.frames[first : first + p.frames] for _, _, series, first in parts]).numpy()
        subjects = [f"{name}/{first}" for name, _, _, first in parts]
        split = split_patients(list(dict.fromkeys(patient for _, patient, _ in read)), p)
        kind = "image" if np.iscomplexobj(images) else "magnitude"
        step = [series.step_mm for _, _, series in read if series.step_mm]
        write_dataset(
            path, {kind: images, "scale": np.array([series.scale for _, _, series, _ in parts], np.float32)},
            units={kind: "1", "scale": "as in the file"}, seed=p.seed, source=f"files of {Path(p.source).name}",
            scale={kind: "1 is the largest magnitude of a file; the array scale multiplies back",
                   "scale": "multiplies images back to the values of the file"},
            subjects=subjects,
            split={part: [s for s, (_, patient, _, _) in zip(subjects, parts, strict=True) if patient in people]
                   for part, people in split.items()},
            attrs={"files": {name: len(series.frames) for name, _, series in read}, "skipped": skipped,
                   "first_frame": [first for _, _, _, first in parts], "parameters": wanted}
            | ({"spacing_mm": float(np.median(step))} if step else {}))
    prepared = open_dataset(path)
    made = prepared.attrs.get("parameters")
    if made != wanted:
        other = "an embedded cohort" if made is None else ", ".join(
            f"{k} = {made.get(k)} (now {v})" for k, v in wanted.items() if made.get(k) != v)
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
        write_dataset(path, {"latent": z.numpy()}, units={"latent": "1"}, seed=prepared.seed, source=prepared.source,
                      scale={"latent": "mean 0, standard deviation 1 over the training sequences, channel by channel"},
                      subjects=prepared.subjects, split=prepared.split,
                      attrs={"latent": space.describe(), "images": prepared.path.name}
                      | {key: value for key, value in prepared.attrs.items() if key == "spacing_mm"})
    latents = open_dataset(path, require=["latent"])
    space = LatentSpace.described(codec, latents.attrs["latent"])
    if latents.subjects != prepared.subjects or space.intensity != p.codec_range:
        raise ValueError(f"{path} holds latents of other images than {prepared.path.name}, or of another codec_range; "
                         "delete it")
    return latents, space


def read_folder(p: PrepareData, progress: bool = True) -> tuple[list[tuple[str, str, Series]], dict[str, str]]:
    """Return (name, patient, series) of each file of a folder and below that can be used, and why others cannot.

    Magnitudes among complex files are skipped too: their phase would teach that there is none.
    Raises FileNotFoundError for a folder that does not exist, ValueError with all reasons when no file can be used.
    """
    folder = project_root() / p.source
    if not folder.is_dir():
        raise FileNotFoundError(f"{p.source} is not a folder; give one with fastMRI, NIfTI, .npy or .cfl files, or the "
                                f"name of an embedded cohort: {', '.join(SOURCES)}")
    read, skipped = [], {}
    paths = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".") and f.suffix != ".hdr")
    for path in tqdm(paths[: p.subjects], desc="files", disable=not progress):
        name = path.relative_to(folder).as_posix()
        try:
            patient, series = read_file(path, p)
            pieces(len(series.frames), p.frames)
        except (ValueError, OSError) as error:
            skipped[name] = str(error).removeprefix(f"{path}: ")
        else:
            read.append((name, patient or name, series))
    if any(series.frames.is_complex() for _, _, series in read):
        for name, _, series in read:
            if not series.frames.is_complex():
                skipped[name] = "has no phase, unlike other files; magnitude=True drops that of all"
        read = [one for one in read if one[0] not in skipped]
    if not read:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items()) or " it is empty"
        raise ValueError(f"no file of {p.source} can be used:{reasons}")
    return read, skipped


def read_file(path: Path, p: PrepareData) -> tuple[str, Series]:
    """Return the patient ("" where the file does not say) and the frames of one file, at `p.image_size`.

    Raises ValueError or OSError with the reason for a file that cannot be used.
    """
    shape, (before, after) = (p.image_size, p.image_size), p.leave_out
    part = slice(before, -after or None)
    if path.suffix != ".h5":
        return "", load_series(path, axis=p.axis, frames=part, shape=shape, magnitude=p.magnitude)
    file = fastmri.open_volume(path)
    if file.mask is not None:
        raise ValueError("is undersampled; only fully sampled k-space shows what images look like")
    slices = [coil_combined(file.crop(file.read(i)), p.acs) for i in range(file.slices)[part]]
    if not slices:
        raise ValueError(f"has {file.slices} slices, of which leave_out={p.leave_out} keeps none")
    image, scale = normalise(torch.stack(slices))
    mm = file.voxel_mm
    series = Series(file.name, image.abs() if p.magnitude else image, float(scale), mm and mm[1:], mm and mm[0])
    return file.patient, series.resized(shape)


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


def split_patients(patients: list[str], p: PrepareData) -> dict[str, set[str]]:
    """Return who is in which split, drawn with `p.seed`; training keeps at least one patient."""
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(p.seed)).tolist()
    tests = min(round(p.test_share * len(patients)), len(patients) - 1)
    checks = min(round(p.validation_share * len(patients)), len(patients) - 1 - tests)
    ends = {"test": (0, tests), "validation": (tests, tests + checks), "train": (tests + checks, len(patients))}
    return {name: {patients[i] for i in order[a:b]} for name, (a, b) in ends.items()}


def windows_table(prepared: Prepared, window: int) -> list[dict[str, object]]:
    """Return, for each split of prepared sequences, how many there are and what training with a window sees of them."""
    name, rows = image_name(prepared), []
    for split in prepared.split:
        if not prepared.split[split]:
            continue
        seen = prepared.sequences(name, split, window + 1)
        rows.append({"split": split, "sequences": len(prepared.rows(split)), "frames of each": prepared.shapes[name][1],
                     "windows": len(seen), "frames in no window": seen.dropped * len(prepared.rows(split))})
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


# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class TrainSequence(Parameters):
    """Parameters of aid/2_train.ipynb."""

    data: str = param("data/aid_brain_64.h5", "prepared sequences, made by 1_data")
    validation: str = param("brain", "embedded cohort to validate on", choices=("brain", "heart", "none"))
    model: str = param("sequence", "sequence: a frame given those before; single: each image by itself",
                       choices=("sequence", "single"))
    stage: str = param("one", "one: all at once; first: plain frames, context ignored; second: context branch only",
                       choices=("one", "first", "second"))
    start_from: str | None = param(None, "checkpoint to begin with: a sequence network, or a single-image network that "
                                         "becomes the main branch")
    window: int = param(8, "frames of context, seq_len", minimum=1)
    model_channels: int = param(64, "width of the network", minimum=32)
    channel_mult: tuple[float, ...] = param((1, 2, 2), "relative width of each level, finest first")
    num_res_blocks: int = param(1, "residual blocks a level", minimum=1)
    attention_resolutions: tuple[int, ...] = param((), "strides at which the main branch attends over pixels")
    num_heads: int = param(4, "attention heads", minimum=1)
    patch: int = param(2, "side of the pixel-unshuffle stem", minimum=1)
    concat_cond: bool = param(False, "context joins by concatenation, as published; else by connectors")
    num_complicated: int = param(-1, "further pairs of blocks a context group; -1: simple groups", minimum=-1)
    pos_emb: bool = param(False, "further pairs know the position in the window")
    diffusion: str = param("edm", "edm: Karras et al. 2022; ddpm: 1000 steps, epsilon, learned range, as published",
                           choices=("edm", "ddpm"))
    sigma_data: float = param(0.34, "standard deviation of the data's real components (edm)", minimum=1e-3)
    variance_weight: float = param(0.05, "weight of the variance channel's likelihood (edm)", minimum=0)
    P_mean: float = param(-1.2, "mean of ln sigma in training (edm)")
    P_std: float = param(1.4, "standard deviation of ln sigma in training (edm)", minimum=0)
    start_dropout: float = param(0.0, "share of windows that begin with a blank frame, for cold starts",
                                 minimum=0, maximum=1)
    context_noise: float = param(0.0, "noise of random deviation up to this on context frames: drawn ones have errors",
                                 minimum=0)
    phase_spacing_mm: float | None = param(3.25, "magnitudes get a new smooth phase, of frames so far apart; none: "
                                                 "data are used as they are")
    mirror: bool = param(True, "mirror sequences left to right at random")
    steps: int = param(2000, "optimiser steps", minimum=1)
    batch_size: int = param(8, "sequences a step", minimum=1)
    grad_accumulation: int = param(1, "pieces a batch is cut into; processes share them", minimum=1)
    learning_rate: float = param(5e-4, "highest learning rate", minimum=0)
    schedule: str = param("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    warmup: int = param(100, "steps of linear warm-up", minimum=0)
    ema_decay: float = param(0.998, "decay of the averaged weights", minimum=0, maximum=1)
    autocast: str | None = param("bfloat16", "number format inside the network", choices=("bfloat16", None))
    seconds: float | None = param(None, "stop with a checkpoint after this long", minimum=1)
    checkpoint_every: int = param(100, "steps between checkpoints", minimum=1)


def sequence_config(p: TrainSequence, prepared: Prepared) -> dict:
    """Return what `weights.build` makes the denoiser from, for the sequences of a prepared file.

    Raises ValueError for parameters of images where the file holds latents.
    """
    name, shape = next(iter(prepared.shapes.items()))
    if name == "latent" and (p.phase_spacing_mm is not None or p.validation != "none" or p.mirror
                             or (p.diffusion == "edm" and p.sigma_data != 1)):
        raise ValueError(f"{prepared.path.name} holds latents, which have no phase, no mirror image and deviation 1; "
                         "set phase_spacing_mm: null, mirror: false, sigma_data: 1 and validation: none")
    as_complex = p.phase_spacing_mm is not None or prepared.sequences(name, "train", 1)[0].is_complex()
    frames, channels = shape[1], shape[2] * (1 + as_complex)
    single, edm = p.model == "single", p.diffusion == "edm"
    sequence = {"name": "CausalUNet", "seq_len": p.window, "concat_cond": p.concat_cond, "pos_emb": p.pos_emb,
                "complicated_x0": p.num_complicated >= 0, "num_complicated": max(p.num_complicated, 0)}
    network = ({"name": "UNet"} if single else sequence) | {
        "in_channels": channels, "model_channels": p.model_channels,
        "out_channels": channels + 1 if edm else 2 * channels, "num_res_blocks": p.num_res_blocks,
        "channel_mult": list(p.channel_mult), "attention_resolutions": list(p.attention_resolutions),
        "num_heads": p.num_heads, "use_scale_shift_norm": True, "patch": p.patch}
    denoiser = {"name": "EDMDenoiser", "sigma_data": p.sigma_data, "variance_channels": 1,
                "cond_scale": round(1 / p.sigma_data, 3)} if edm else {
                "name": "DiscreteDenoiser", "schedule": {"name": "linear", "steps": 1000}, "prediction": "epsilon"}
    data = {"source": prepared.source, "scale": prepared.scale[name], "subjects": len(prepared.rows("train")),
            "frames": frames, "image_size": list(shape[-2:])}
    data |= {key: value for key, value in prepared.attrs.items() if isinstance(value, str | int | float)}
    return {"network": network, "data": data, "denoiser": denoiser | {
        "complex": as_complex, "learned_variance": True, "channel_axis": 1 if single else -3}} | {
        key: prepared.attrs[key] for key in ("latent",) if key in prepared.attrs}


def train_sequence(p: TrainSequence, progress: bool = True) -> TrainResult:
    """Return the trained model; continues what `p.out` holds. The same call serves torchrun's processes."""
    prepared = open_dataset(project_root() / p.data)
    config = sequence_config(p, prepared)
    torch.manual_seed(p.seed)
    D = build(config)
    network = network_of(D)
    if p.start_from:
        start = network_of(load(p.start_from))
        if p.model == "sequence" and not hasattr(start, "x0_blocks"):
            network.start_from_main(start.state_dict())
        else:
            network.load_state_dict(start.state_dict())
    if p.stage == "second":
        network.freeze_main()
    inner_denoiser(D).autocast = getattr(torch, p.autocast) if p.autocast else None
    options = TrainConfig(steps=p.steps, batch_size=p.batch_size, grad_accumulation=p.grad_accumulation,
                          learning_rate=p.learning_rate, warmup=p.warmup, schedule=p.schedule, ema_decay=p.ema_decay,
                          channels_last=True, seed=p.seed, device=p.device, seconds=p.seconds,
                          checkpoint_every=p.checkpoint_every, log_every=10)
    length = 1 if p.model == "single" else p.window + (p.stage != "first")
    windows = prepared.sequences(next(iter(prepared.shapes)), "train", length)

    def loss(D: Denoiser, sequence: Tensor, generator: Generator) -> Tensor:
        return sequence_loss(D, sequence, generator, p)

    losses = ("stage", "diffusion", "P_mean", "P_std", "variance_weight", "start_dropout", "context_noise",
              "phase_spacing_mm", "mirror", "start_from")
    about = config | {name: getattr(p, name) for name in losses}
    return train(D, loss, windows, options, project_root() / p.out, about=about, progress=progress)


def inner_denoiser(D: Denoiser) -> Denoiser:
    """Return the denoiser that holds the network, below a ComplexDenoiser."""
    return getattr(D, "D", D)


def sequence_loss(D: Denoiser, sequence: Tensor, generator: Generator, p: TrainSequence) -> Tensor:
    """Return the loss (batch,) of windows (batch, window + 1, channel, y, x): frame n + 1 given frames 0 .. n.

    All frames of a window share one noise level (the paper's Eq. for p(x_0 .. x_N), teacher forcing). A window that
    begins with a blank frame, `p.start_dropout` of them, teaches how a sequence starts.
    """
    options = {"device": generator.device, "generator": generator}
    batch = len(sequence)
    if p.mirror:
        sequence = torch.where(torch.rand(batch, 1, 1, 1, 1, **options) < 0.5, sequence.flip(-1), sequence)
    if p.phase_spacing_mm is not None:
        sequence = anatomy.random_sequence_phase(sequence, p.phase_spacing_mm, generator)
    context, x0 = sequence[:, :-1], sequence[:, 1:]
    if p.model == "single":
        context, x0 = None, sequence[:, 0]
    elif p.stage == "first":
        context, x0 = None, sequence
    elif p.start_dropout:
        begins = torch.rand(batch, 1, 1, 1, 1, **options) < p.start_dropout
        shifted = torch.cat([torch.zeros_like(context[:, :1]), context[:, :-1]], 1)
        context, x0 = torch.where(begins, shifted, context), torch.where(begins, context, x0)
    if context is not None and p.context_noise:
        std = p.context_noise * torch.rand(batch, 1, 1, 1, 1, **options)
        context = context + std.to(x0.device) * randn(context.shape, context.dtype, generator, x0.device)
    if p.diffusion == "ddpm":
        return discrete_loss(D, x0, generator, cond=context)
    return edm_loss(D, x0, generator, p.P_mean, p.P_std, context, variance_weight=p.variance_weight)


@torch.no_grad()
def context_errors(D: Denoiser, x: Tensor, sigmas: list[float], window: int, start: str | None,
                   seed: int = 0) -> list[dict]:
    """Return, for each sigma, the error of D on the last frame of sequences x (batch, frame, channel, y, x).

    Root mean squared error per real component, with all of the last `window` frames as context, with the published
    sampling's context (the newest frame only), and with none.
    """
    network, x0 = network_of(D), x[:, -1]
    context = x[:, -1 - window : -1]
    blank = torch.zeros_like(context[:, :1]) if start == "blank" else None
    noise = randn(x0.shape, x0.dtype, torch.Generator().manual_seed(seed)).to(x0.device)
    rows = []
    for sigma in sigmas:
        level, row = torch.full((len(x0),), sigma, device=x0.device), {"sigma": sigma}
        for name, mode, cond in (("no context", "full", blank), ("newest frame only", "last", context),
                                 (f"{window} frames", "full", context)):
            network.context = mode
            error = D(x0 + sigma * noise, level, cond) - x0
            row[name] = round((error.abs().square().mean() / (1 + x0.is_complex())).sqrt().item(), 4)
        network.context = "full"
        rows.append(row)
    return rows


def validation_errors(D: Denoiser, p: TrainSequence, sigmas: list[float], people: int = 16) -> list[dict]:
    """Return `context_errors` on validation people of the embedded cohort; nothing for single images or no cohort."""
    if p.model == "single" or p.validation == "none":
        return []
    prepared = open_dataset(project_root() / p.data)
    side = next(iter(prepared.shapes.values()))[-1]
    x = volumes(p.validation, "validation", people, p.window + 1, side, float(prepared.attrs.get("spacing_mm", 3.25)))
    return context_errors(D, x.to(p.device), sigmas, p.window, "blank" if p.concat_cond else None, p.seed)


def brightness(prepared: Prepared, count: int = 64) -> float:
    """Return the magnitude that 99 % of a training volume's pixels do not exceed, mean over the first volumes.

    Reconstruction brings data of unknown units to the prior's by it.
    """
    name, shape = next(iter(prepared.shapes.items()))
    whole = prepared.sequences(name, "train", shape[1])
    levels = [torch.quantile(whole[i].abs().flatten(), 0.99).item() for i in range(min(count, len(whole)))]
    return round(sum(levels) / len(levels), 4)


def save_sequence(result: TrainResult, p: TrainSequence, errors: list[dict]) -> Path:
    """Return the folder <out>/checkpoint with the averaged weights in half precision, their config, record and card."""
    record = {"parameters": asdict(p), "steps": result.step, "sequences": result.step * p.batch_size,
              "seconds": round(result.seconds), "loss": result.loss, "validation": errors, "code": code_version()}
    prepared = open_dataset(project_root() / p.data)
    config = sequence_config(p, prepared)
    if "latent" not in config:
        config["data"]["magnitude_q99"] = brightness(prepared)
    return save_checkpoint(project_root() / p.out / "checkpoint", result.ema.half(), config, record)


# ------------------------------------------------------------------------------------------------- published numbers

# The published code sets NumPy's global generator to these seeds; here it stays untouched.
MASK_SEEDS = {"random": 1234, "high": 42}


def published_columns(width: int, acceleration: int, kind: str = "equal") -> Tensor:
    """Sorted indices of the k-space columns that the published experiments measure, without centre lines.

    equal: every acceleration-th from column 0. random: width // acceleration columns, uniform. high: as many,
    meant to be of variable density, but a condition that is always true makes it uniform. The same columns as
    in the published code; for new experiments use `operators.mri.cartesian_mask`.
    """
    if kind == "equal":
        return torch.arange(0, width, acceleration)
    if kind not in MASK_SEEDS:
        raise ValueError(f'published masks are "equal", "random" and "high", not "{kind}"')
    density = np.full(width, 1 / width) if kind == "high" else None
    draw = np.random.RandomState(MASK_SEEDS[kind])
    return torch.from_numpy(np.sort(draw.choice(width, width // acceleration, replace=False, p=density)))


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.aid params.yaml
    train_sequence(TrainSequence(**read_yaml(sys.argv[1])))
