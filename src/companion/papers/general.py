"""The general prior: complex images of heads, and of anything else, of any size and pixel size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from companion.data.heads import Head, dead_leaves, head_image
from companion.data.heads_download import load_heads
from companion.data.phase import add_phase
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.losses import edm_loss
from companion.files import atomic_write, project_root
from companion.parameters import param
from companion.randomness import randn
from companion.training.loop import TrainResult
from companion.training.recipe import Training, begin, fit, main

SIGMA_DATA = 0.32  # standard deviation of the real components of the training images
SCALE = "1 is the 99th percentile of the magnitude inside the object"
GAIN = 0.25  # standard deviation of ln of the gain that each image gets, so that errors of scale do not hurt
BANK_SIZE = 128  # pixels along y and x of an image of the bank
PART = 250  # images in a file of the bank
NOISY, NOISE = 0.7, (0.002, 0.03)  # share of images with noise, and its standard deviation per real component
LEAVES, BRAIN = 0.2, 0.07  # shares of the bank: dead leaves, and brains without a head


@dataclass(frozen=True)
class TrainGeneral(Training):
    """Parameters of general_prior.ipynb."""

    heads: str | None = param("data/heads", "folder of the real heads; none: dead leaves alone")
    bank: str = param("data/heads_bank", "folder of the images to learn from; completed when too few")
    images: int = param(15000, "images to learn from", minimum=1)
    crop: int = param(96, "pixels along y and x that a step sees of an image", minimum=16)
    model_channels: int = param(32, "width of the network", minimum=32)
    channel_mult: tuple[float, ...] = param((1, 2, 3, 3), "relative width of each level, finest first")
    patch: int = param(2, "side of the pixel-unshuffle stem", minimum=1)
    variance_weight: float = param(0.3, "weight of the variance channel's likelihood in the loss", minimum=0)
    P_mean: float = param(-2.2, "mean of ln sigma in training")
    P_std: float = param(1.4, "standard deviation of ln sigma in training", minimum=0)
    steps: int = param(20000, "optimiser steps", minimum=1)
    batch_size: int = param(8, "images a step", minimum=1)
    learning_rate: float = param(6e-4, "highest learning rate", minimum=0)
    schedule: str = param("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    ema_halflife: float = param(3000.0, "half-life of the averaged weights, images; short at first", minimum=0)


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
            "pixel_mm": "0.6 to 4",
            "scale": SCALE,
        },
    }


def make_bank(heads: Sequence[Head], folder: Path, images: int, seed: int = 17) -> None:
    """Complete a bank of images in a folder, in files of `PART`; image i depends on seed and i alone."""
    for part in tqdm(range(-(-images // PART)), desc="images, files"):
        path = folder / f"{part:03d}.npy"
        if not path.exists():
            made = [bank_image(heads, np.random.default_rng([seed, i])) for i in range(part * PART, (part + 1) * PART)]
            with atomic_write(path) as aside:
                np.save(aside, np.stack(made).astype(np.float16))


def bank_image(heads: Sequence[Head], rng: np.random.Generator) -> np.ndarray:
    """Return one image (BANK_SIZE, BANK_SIZE): dead leaves, a brain alone, or one of the whole heads."""
    brains = [head for head in heads if head.name.endswith("_brain")]
    whole = [head for head in heads if not head.name.endswith("_brain")]
    kind = rng.random()
    if kind < LEAVES or not whole:
        return dead_leaves(rng, BANK_SIZE)
    if brains and kind < LEAVES + BRAIN:
        return head_image(brains[0], rng, BANK_SIZE)
    return head_image(whole[int(rng.integers(len(whole)))], rng, BANK_SIZE)


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


def prior_loss(
    D: Denoiser, image: Tensor, generator: Generator, P_mean: float, P_std: float, variance_weight: float
) -> Tensor:
    """Return the EDM loss (batch,) of real images (batch, 1, y, x), each given a new phase."""
    x0 = scanned(image, generator)
    return edm_loss(D, x0, generator, P_mean, P_std, variance_weight=variance_weight)


def scanned(image: Tensor, generator: Generator) -> Tensor:
    """Return complex images (batch, 1, y, x) of real ones: a new phase, and the noise of a scan in most of them.

    Half of the noisy ones got it as magnitudes (Rician, in phase with the signal), the others as complex k-space.
    """
    on = {"generator": generator, "device": generator.device}
    shape = (len(image), 1, 1, 1)
    low, high = (math.log(v) for v in NOISE)
    std = (low + (high - low) * torch.rand(shape, **on)).exp() * (torch.rand(shape, **on) < NOISY)
    magnitude = (torch.rand(shape, **on) < 0.5).to(image.device)
    noise = std * randn(image.shape, torch.complex64, generator, generator.device)
    noise = noise.to(image.device)
    image = torch.where(magnitude, (image + noise).abs(), image)
    return add_phase(image, generator) + torch.where(magnitude, 0, noise)


def train_general(p: TrainGeneral, progress: bool = True) -> TrainResult:
    """Return the trained prior; continues what `p.out` holds. The same call serves torchrun's processes."""
    config = prior_config(p)
    return fit(
        begin(config, p.seed, p.start_from, p.autocast, p.device),
        prior_loss,
        training_set(p),
        p,
        config | {"crop": p.crop},
        p.pick("P_mean", "P_std", "variance_weight"),
        augment=partial(crop, size=p.crop),
        progress=progress,
        schedule=p.schedule,
        ema_halflife=p.ema_halflife,
        channels_last=False,
        log_every=20,
    )


def training_set(p: TrainGeneral) -> Bank:
    """Return the images to learn from; those that the bank lacks are made of the real heads first."""
    folder = project_root() / p.bank
    if len(list(folder.glob("[0-9]*.npy"))) * PART < p.images:
        heads = load_heads(project_root() / p.heads, "train") if p.heads else []
        make_bank(heads, folder, p.images)
    return Bank(folder, p.images)


def validation_slices(heads: str | None, count: int = 4, size: int = 240, seed: int = 1) -> Tensor:
    """Return axial slices (count, 1, size, size) of the head held for validation, complex, 1 mm; else dead leaves.

    Its own signal, nothing warped or recoloured but for a phase of `add_phase`; 1 is bright tissue.
    """
    if heads is None:
        leaves = np.stack([dead_leaves(np.random.default_rng([seed, i]), size) for i in range(count)])
        return add_phase(torch.from_numpy(leaves)[:, None], torch.Generator().manual_seed(seed))
    (head,) = load_heads(project_root() / heads, "validation")
    signal = head.signal[::2, ::2, ::2]
    first, last = round(0.5 * signal.shape[2]), round(0.85 * signal.shape[2])
    canvas = torch.zeros(count, 1, size, size)
    for i, z in enumerate(np.linspace(first, last, count).round().astype(int)):
        image = signal[:, :, z].T.flip(0)
        centre = [(n - size) // 2 for n in image.shape]
        rows, columns = (slice(max(c, 0), max(c, 0) + size) for c in centre)
        part = image[rows, columns]
        top, left = ((size - n) // 2 for n in part.shape)
        canvas[i, 0, top : top + part.shape[0], left : left + part.shape[1]] = part
    return add_phase(canvas, torch.Generator().manual_seed(seed))


@torch.no_grad()
def denoising_errors(D: Denoiser, x0: Tensor, sigmas: Sequence[float], seed: int = 0) -> list[dict[str, float]]:
    """Return, for each sigma, the error of D on images x0 and the error that its variance channel states.

    Root mean square per real component, over all pixels.
    """
    noise = randn(x0.shape, x0.dtype, torch.Generator().manual_seed(seed)).to(x0.device)
    rows = []
    for sigma in sigmas:
        mean, variance = D.moments(x0 + sigma * noise, torch.full((len(x0),), sigma, device=x0.device))
        error = ((mean - x0).abs().square().mean() / 2).sqrt().item()
        rows.append({"sigma": sigma, "error": round(error, 4), "stated": round(variance.mean().sqrt().item(), 4)})
    return rows


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.general params.yaml
    main(TrainGeneral, train_general)
