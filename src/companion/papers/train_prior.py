"""The brain prior of train_prior.ipynb: complex T1w slices, a small diffusion network."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from companion.data import anatomy
from companion.data.store import Prepared, open_dataset, write_dataset
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.losses import edm_loss
from companion.files import code_version, project_root
from companion.models.architectures import build
from companion.models.checkpoint import load
from companion.models.folder import save_checkpoint
from companion.parameters import Parameters, autocast_dtype, param, read_yaml
from companion.randomness import randn
from companion.training.loop import TrainConfig, TrainResult, train

CONTRAST = "T1w"
SIGMA_DATA = 0.34  # standard deviation of the real components of the cohort's slices
SCALE = "1 is the signal of the subject's brightest pure tissue"


@dataclass(frozen=True)
class TrainPrior(Parameters):
    """Parameters of train_prior.ipynb."""

    data: str = param("data/brain_t1w_64.h5", "prepared slices; made when missing")
    image_size: int = param(64, "pixels along y and x", minimum=16)
    subjects: int = param(2400, "virtual people to learn from", minimum=1)
    slices_per_subject: int = param(16, "axial slices of each", minimum=1)
    model_channels: int = param(64, "width of the network", minimum=32)
    channel_mult: tuple[float, ...] = param((1, 2, 2), "relative width of each level, finest first")
    num_res_blocks: int = param(1, "residual blocks a level", minimum=1)
    patch: int = param(2, "side of the pixel-unshuffle stem", minimum=1)
    variance_weight: float = param(0.05, "weight of the variance channel's likelihood in the loss", minimum=0)
    P_mean: float = param(-1.4, "mean of ln sigma in training")
    P_std: float = param(1.3, "standard deviation of ln sigma in training", minimum=0)
    start_from: str | None = param(None, "checkpoint whose weights to begin with; none: random weights")
    steps: int = param(14000, "optimiser steps", minimum=1)
    batch_size: int = param(32, "images a step", minimum=1)
    grad_accumulation: int = param(2, "pieces a batch is cut into; processes share them", minimum=1)
    learning_rate: float = param(5e-4, "highest learning rate", minimum=0)
    warmup: int = param(200, "steps of linear warm-up", minimum=0)
    ema_decay: float = param(0.999, "decay of the averaged weights", minimum=0, maximum=1)
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))
    seconds: float | None = param(None, "stop with a checkpoint after this long", minimum=1)
    checkpoint_every: int = param(250, "steps between checkpoints", minimum=1)


def prior_config(p: TrainPrior) -> dict:
    """Return what `weights.build` makes the denoiser from: complex images, and a channel for the error's variance."""
    return {
        "network": {
            "name": "UNet",
            "in_channels": 2,
            "model_channels": p.model_channels,
            "out_channels": 3,
            "num_res_blocks": p.num_res_blocks,
            "channel_mult": list(p.channel_mult),
            "num_heads": 4,
            "use_scale_shift_norm": True,
            "patch": p.patch,
        },
        "denoiser": {
            "name": "EDMDenoiser",
            "complex": True,
            "sigma_data": SIGMA_DATA,
            "learned_variance": True,
            "variance_channels": 1,
        },
        "data": {
            "source": f"virtual cohort of companion.data.anatomy (ICBM 152), {CONTRAST} axial slices",
            "subjects": p.subjects,
            "slices_per_subject": p.slices_per_subject,
            "image_size": p.image_size,
            "scale": SCALE,
        },
    }


def train_prior(p: TrainPrior, progress: bool = True) -> TrainResult:
    """Return the trained prior; continues what `p.out` holds. The same call serves torchrun's processes."""
    config = prior_config(p)
    torch.manual_seed(p.seed)
    D = build(config)
    if p.start_from:
        D.load_state_dict(load(p.start_from).state_dict())
    D.D.autocast = autocast_dtype(p.autocast, p.device)
    options = TrainConfig(
        steps=p.steps,
        batch_size=p.batch_size,
        grad_accumulation=p.grad_accumulation,
        learning_rate=p.learning_rate,
        warmup=p.warmup,
        schedule="cosine",
        ema_decay=p.ema_decay,
        channels_last=True,
        seed=p.seed,
        device=p.device,
        seconds=p.seconds,
        checkpoint_every=p.checkpoint_every,
        log_every=50,
    )
    data = prepare_training_set(p, project_root() / p.data).slices("magnitude", "train")

    def loss(D: Denoiser, magnitude: Tensor, generator: Generator) -> Tensor:
        return prior_loss(D, magnitude, generator, p)

    about = config | {name: getattr(p, name) for name in ("P_mean", "P_std", "variance_weight", "start_from")}
    return train(D, loss, data, options, project_root() / p.out, about=about, progress=progress)


def prior_loss(D: Denoiser, magnitude: Tensor, generator: Generator, p: TrainPrior) -> Tensor:
    """Return the EDM loss (batch,) of magnitudes (batch, 1, y, x), each mirrored at random and given a new phase."""
    mirrored = torch.rand(len(magnitude), 1, 1, 1, generator=generator, device=generator.device) < 0.5
    magnitude = torch.where(mirrored, magnitude.flip(-1), magnitude)
    return edm_loss(
        D, anatomy.random_phase(magnitude, generator), generator, p.P_mean, p.P_std, variance_weight=p.variance_weight
    )


def slices(split: str, subjects: int, image_size: int, per_subject: int = 1, progress: bool = False) -> Tensor:
    """Return complex slices (subject * slice, 1, y, x) of the first subjects of a split.

    With one slice each, the heights of successive subjects sweep the slab, so that few subjects show all of it.
    """
    images = []
    for i, subject in enumerate(tqdm(anatomy.cohort(split, subjects), desc="subjects", disable=not progress)):
        heights = anatomy.slice_heights(subject, per_subject if per_subject > 1 else subjects)
        heights = heights if per_subject > 1 else heights[i : i + 1]
        images.append(
            anatomy.render(subject, CONTRAST, (len(heights), image_size, image_size), slices_mm=heights).image
        )
    return torch.cat(images)[:, None]


def prepare_training_set(p: TrainPrior, path: str | os.PathLike) -> Prepared:
    """Return the training slices' magnitudes, (subject, slice, 1, y, x) float32, made and stored once as HDF5.

    Phases are not stored: `prior_loss` draws a new one each time a slice is shown.
    """
    if not Path(path).exists():
        magnitude = slices("train", p.subjects, p.image_size, p.slices_per_subject, progress=True).abs()
        write_dataset(
            path,
            {"magnitude": magnitude.unflatten(0, (p.subjects, -1)).numpy()},
            units={"magnitude": "1"},
            scale={"magnitude": SCALE},
            seed=anatomy.FIRST_SEED["train"],
            source="companion.data.anatomy (ICBM 152), " + CONTRAST,
            split={"train": range(p.subjects)},
        )
    prepared = open_dataset(path, require=["magnitude"])
    expected = (p.subjects, p.slices_per_subject, 1, p.image_size, p.image_size)
    if prepared.shapes["magnitude"] != expected:
        raise ValueError(
            f"{path} holds slices of shape {prepared.shapes['magnitude']} but the parameters ask for "
            f"{expected}; delete the file, or give another data file"
        )
    return prepared


@torch.no_grad()
def denoising_errors(D: Denoiser, p: TrainPrior, sigmas: list[float], subjects: int = 16) -> list[dict[str, float]]:
    """Return, for each sigma, the error of D on validation slices and the error that its variance channel expects."""
    x0 = slices("validation", subjects, p.image_size).to(p.device)
    noise = randn(x0.shape, x0.dtype, torch.Generator().manual_seed(p.seed)).to(p.device)
    rows = []
    for sigma in sigmas:
        mean, variance = D.moments(x0 + sigma * noise, torch.full((len(x0),), sigma, device=p.device))
        error = ((mean - x0).abs().square().mean() / 2).sqrt().item()
        rows.append({"sigma": sigma, "error": round(error, 4), "expected": round(variance.mean().sqrt().item(), 4)})
    return rows


def save_prior(result: TrainResult, p: TrainPrior, errors: list[dict[str, float]]) -> Path:
    """Return the folder <out>/checkpoint with the averaged weights in half precision, their config, record and card."""
    record = {
        "parameters": asdict(p),
        "steps": result.step,
        "images": result.step * p.batch_size,
        "seconds": round(result.seconds),
        "loss": result.loss,
        "validation": errors,
        "code": code_version(),
    }
    return save_checkpoint(project_root() / p.out / "checkpoint", result.ema.half(), prior_config(p), record)


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.brain params.yaml
    train_prior(TrainPrior(**read_yaml(sys.argv[1])))
