"""The general prior: complex images of heads, and of anything else, at any size and pixel size."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from companion.data.phase import add_phase
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.losses import edm_loss
from companion.files import code_version, project_root
from companion.models.architectures import build
from companion.models.checkpoint import load
from companion.models.folder import save_checkpoint
from companion.parameters import Parameters, param
from companion.training.loop import TrainConfig, TrainResult, train

SIGMA_DATA = 0.32  # standard deviation of the real components of the training images
SCALE = "1 is the 99th percentile of the magnitude inside the object"
GAIN = 0.25  # standard deviation of ln of the gain that each image gets, so that errors of scale do not hurt


@dataclass(frozen=True)
class TrainGeneral(Parameters):
    """Parameters of notebooks/general/train.ipynb."""

    bank: str = param("data/heads_bank", "folder of the bank of images; made when missing")
    images: int = param(9000, "images in the bank", minimum=1)
    crop: int = param(80, "pixels along y and x that a step sees of an image", minimum=16)
    model_channels: int = param(32, "width of the network", minimum=32)
    channel_mult: tuple[float, ...] = param((1, 2, 3, 3), "relative width of each level, finest first")
    patch: int = param(2, "side of the pixel-unshuffle stem", minimum=1)
    variance_weight: float = param(0.05, "weight of the variance channel's likelihood in the loss", minimum=0)
    P_mean: float = param(-2.2, "mean of ln sigma in training")
    P_std: float = param(1.5, "standard deviation of ln sigma in training", minimum=0)
    start_from: str | None = param(None, "checkpoint whose weights to begin with; none: random weights")
    steps: int = param(6000, "optimiser steps", minimum=1)
    batch_size: int = param(12, "images a step", minimum=1)
    grad_accumulation: int = param(1, "pieces a batch is cut into; processes share them", minimum=1)
    learning_rate: float = param(6e-4, "highest learning rate", minimum=0)
    schedule: str = param("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    warmup: int = param(100, "steps of linear warm-up", minimum=0)
    ema_halflife: float = param(3000.0, "half-life of the averaged weights, images", minimum=0)
    autocast: str | None = param(None, "number format inside the network", choices=("bfloat16", None))
    seconds: float | None = param(None, "stop with a checkpoint after this long", minimum=1)
    checkpoint_every: int = param(100, "steps between checkpoints", minimum=1)


def prior_config(p: TrainGeneral) -> dict:
    """Return what `build` makes the denoiser from: complex images of any size, one channel for the error's variance."""
    return {
        "network": {
            "name": "UNet",
            "in_channels": 2,
            "model_channels": p.model_channels,
            "out_channels": 3,
            "num_res_blocks": 1,
            "channel_mult": list(p.channel_mult),
            "num_heads": 0,
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
            "source": "warped and recoloured real heads and dead leaves of companion.data.heads",
            "images": p.images,
            "pixel_mm": "0.6 to 3.5",
            "scale": SCALE,
        },
    }


class Bank(Dataset):
    """Images (1, y, x) float32 of the files of a folder, each (n, y, x) float16, in the order of their names."""

    def __init__(self, folder: Path, images: int):
        self.parts, self.count = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("[0-9]*.npy"))], images
        self.ends = np.cumsum([len(part) for part in self.parts])
        if not self.parts or self.ends[-1] < images:
            raise ValueError(f"{folder} holds {self.ends[-1] if self.parts else 0} images; expected {images}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Tensor:
        part = int(np.searchsorted(self.ends, i, side="right"))
        first = self.ends[part - 1] if part else 0
        return torch.from_numpy(self.parts[part][i - first].astype(np.float32))[None]


def crop(image: Tensor, generator: Generator, size: int) -> Tensor:
    """Return a random part (1, size, size) of an image, mirrored and turned by quarters at random, with a new gain."""
    top, left, turns, flip = (int(torch.randint(n, (), generator=generator)) for n in
                              (image.shape[1] - size + 1, image.shape[2] - size + 1, 4, 2))  # fmt: skip
    part = image[:, top : top + size, left : left + size].rot90(turns, (1, 2))
    part = part.flip(2) if flip else part
    return (part * (GAIN * torch.randn((), generator=generator)).exp()).contiguous()


def prior_loss(D: Denoiser, image: Tensor, generator: Generator, p: TrainGeneral) -> Tensor:
    """Return the EDM loss (batch,) of real images (batch, 1, y, x), each given a new phase."""
    phased = add_phase(image, generator)
    return edm_loss(D, phased, generator, p.P_mean, p.P_std, variance_weight=p.variance_weight)


def train_general(p: TrainGeneral, progress: bool = True) -> TrainResult:
    """Return the trained prior; continues what `p.out` holds. The same call serves torchrun's processes."""
    config = prior_config(p)
    torch.manual_seed(p.seed)
    D = build(config)
    if p.start_from:
        D.load_state_dict(load(p.start_from).state_dict())
    D.D.autocast = getattr(torch, p.autocast) if p.autocast else None
    options = TrainConfig(
        steps=p.steps,
        batch_size=p.batch_size,
        grad_accumulation=p.grad_accumulation,
        learning_rate=p.learning_rate,
        warmup=p.warmup,
        schedule=p.schedule,
        ema_halflife=p.ema_halflife,
        seed=p.seed,
        device=p.device,
        seconds=p.seconds,
        checkpoint_every=p.checkpoint_every,
        log_every=20,
    )
    about = config | {name: getattr(p, name) for name in ("crop", "P_mean", "P_std", "variance_weight", "start_from")}
    return train(
        D,
        lambda D, image, generator: prior_loss(D, image, generator, p),
        Bank(project_root() / p.bank, p.images),
        options,
        project_root() / p.out,
        augment=lambda image, generator: crop(image, generator, p.crop),
        about=about,
        progress=progress,
    )


def save_prior(result: TrainResult, p: TrainGeneral, errors: list[dict[str, float]]) -> Path:
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
