"""The sequence prior of AID: parameters, training, validation."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from companion.data import anatomy
from companion.data.store import Prepared, open_dataset
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.losses import discrete_loss, edm_loss
from companion.files import code_version, project_root
from companion.models.architectures import build, network_of
from companion.models.checkpoint import load
from companion.models.folder import save_checkpoint
from companion.papers.aid.data import volumes
from companion.parameters import Parameters, autocast_dtype, param, read_yaml
from companion.randomness import randn
from companion.training.loop import TrainConfig, TrainResult, train

# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class TrainSequence(Parameters):
    """Parameters of aid/2_train.ipynb."""

    data: str = param("data/aid_brain_64.h5", "prepared sequences, made by 1_data")
    validation: str = param("brain", "embedded cohort to validate on", choices=("brain", "heart", "none"))
    model: str = param(
        "sequence", "sequence: a frame given those before; single: each image by itself", choices=("sequence", "single")
    )
    stage: str = param(
        "one",
        "one: all at once; first: plain frames, context ignored; second: context branch only",
        choices=("one", "first", "second"),
    )
    start_from: str | None = param(
        None, "checkpoint to begin with: a sequence network, or a single-image network that becomes the main branch"
    )
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
    diffusion: str = param(
        "edm",
        "edm: Karras et al. 2022; ddpm: 1000 steps, epsilon, learned range, as published",
        choices=("edm", "ddpm"),
    )
    sigma_data: float = param(0.34, "standard deviation of the data's real components (edm)", minimum=1e-3)
    variance_weight: float = param(0.05, "weight of the variance channel's likelihood (edm)", minimum=0)
    P_mean: float = param(-1.2, "mean of ln sigma in training (edm)")
    P_std: float = param(1.4, "standard deviation of ln sigma in training (edm)", minimum=0)
    start_dropout: float = param(
        0.0, "share of windows that begin with a blank frame, for cold starts", minimum=0, maximum=1
    )
    context_noise: float = param(
        0.0, "noise of random deviation up to this on context frames: drawn ones have errors", minimum=0
    )
    phase_spacing_mm: float | None = param(
        3.25, "magnitudes get a new smooth phase, of frames so far apart; none: data are used as they are"
    )
    mirror: bool = param(True, "mirror sequences left to right at random")
    steps: int = param(2000, "optimiser steps", minimum=1)
    batch_size: int = param(8, "sequences a step", minimum=1)
    grad_accumulation: int = param(1, "pieces a batch is cut into; processes share them", minimum=1)
    learning_rate: float = param(5e-4, "highest learning rate", minimum=0)
    schedule: str = param("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    warmup: int = param(100, "steps of linear warm-up", minimum=0)
    ema_decay: float = param(0.998, "decay of the averaged weights", minimum=0, maximum=1)
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))
    seconds: float | None = param(None, "stop with a checkpoint after this long", minimum=1)
    checkpoint_every: int = param(100, "steps between checkpoints", minimum=1)


def sequence_config(p: TrainSequence, prepared: Prepared) -> dict:
    """Return what `weights.build` makes the denoiser from, for the sequences of a prepared file.

    Raises ValueError for parameters of images where the file holds latents.
    """
    name, shape = next(iter(prepared.shapes.items()))
    if name == "latent" and (
        p.phase_spacing_mm is not None
        or p.validation != "none"
        or p.mirror
        or (p.diffusion == "edm" and p.sigma_data != 1)
    ):
        raise ValueError(
            f"{prepared.path.name} holds latents, which have no phase, no mirror image and deviation 1; "
            "set phase_spacing_mm: null, mirror: false, sigma_data: 1 and validation: none"
        )
    as_complex = p.phase_spacing_mm is not None or prepared.sequences(name, "train", 1)[0].is_complex()
    frames, channels = shape[1], shape[2] * (1 + as_complex)
    single, edm = p.model == "single", p.diffusion == "edm"
    sequence = {
        "name": "CausalUNet",
        "seq_len": p.window,
        "concat_cond": p.concat_cond,
        "pos_emb": p.pos_emb,
        "complicated_x0": p.num_complicated >= 0,
        "num_complicated": max(p.num_complicated, 0),
    }
    network = ({"name": "UNet"} if single else sequence) | {
        "in_channels": channels,
        "model_channels": p.model_channels,
        "out_channels": channels + 1 if edm else 2 * channels,
        "num_res_blocks": p.num_res_blocks,
        "channel_mult": list(p.channel_mult),
        "attention_resolutions": list(p.attention_resolutions),
        "num_heads": p.num_heads,
        "use_scale_shift_norm": True,
        "patch": p.patch,
    }
    denoiser = (
        {
            "name": "EDMDenoiser",
            "sigma_data": p.sigma_data,
            "variance_channels": 1,
            "cond_scale": round(1 / p.sigma_data, 3),
        }
        if edm
        else {"name": "DiscreteDenoiser", "schedule": {"name": "linear", "steps": 1000}, "prediction": "epsilon"}
    )
    data = {
        "source": prepared.source,
        "scale": prepared.scale[name],
        "subjects": len(prepared.rows("train")),
        "frames": frames,
        "image_size": list(shape[-2:]),
    }
    data |= {key: value for key, value in prepared.attrs.items() if isinstance(value, str | int | float)}
    return {
        "network": network,
        "data": data,
        "denoiser": denoiser | {"complex": as_complex, "learned_variance": True, "channel_axis": 1 if single else -3},
    } | {key: prepared.attrs[key] for key in ("latent",) if key in prepared.attrs}


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
    inner_denoiser(D).autocast = autocast_dtype(p.autocast, p.device)
    options = TrainConfig(
        steps=p.steps,
        batch_size=p.batch_size,
        grad_accumulation=p.grad_accumulation,
        learning_rate=p.learning_rate,
        warmup=p.warmup,
        schedule=p.schedule,
        ema_decay=p.ema_decay,
        channels_last=True,
        seed=p.seed,
        device=p.device,
        seconds=p.seconds,
        checkpoint_every=p.checkpoint_every,
        log_every=10,
    )
    length = 1 if p.model == "single" else p.window + (p.stage != "first")
    windows = prepared.sequences(next(iter(prepared.shapes)), "train", length)

    def loss(D: Denoiser, sequence: Tensor, generator: Generator) -> Tensor:
        return sequence_loss(D, sequence, generator, p)

    losses = (
        "stage",
        "diffusion",
        "P_mean",
        "P_std",
        "variance_weight",
        "start_dropout",
        "context_noise",
        "phase_spacing_mm",
        "mirror",
        "start_from",
    )
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
def context_errors(
    D: Denoiser, x: Tensor, sigmas: list[float], window: int, start: str | None, seed: int = 0
) -> list[dict]:
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
        for name, mode, cond in (
            ("no context", "full", blank),
            ("newest frame only", "last", context),
            (f"{window} frames", "full", context),
        ):
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
    record = {
        "parameters": asdict(p),
        "steps": result.step,
        "sequences": result.step * p.batch_size,
        "seconds": round(result.seconds),
        "loss": result.loss,
        "validation": errors,
        "code": code_version(),
    }
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
