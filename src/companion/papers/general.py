"""The general prior: complex images of heads, and of anything else, of any size and pixel size.

A second one of the same kind learns from large pixels only (`pixels_from_mm`): a network so small cannot know both as
well as either. `companion.models.general` says which serves a scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor

from companion.data.head_tissues import fat_suppressed
from companion.data.heads import Head, dead_leaves, draw_pixel_mm, head_image
from companion.data.heads_download import load_heads
from companion.data.phase import add_phase
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.losses import edm_loss
from companion.files import project_root
from companion.operators.mri import centre_crop, fft, ifft
from companion.papers.crops import Bank, TrainOnCrops, complete, train_on_crops, unet
from companion.parameters import param
from companion.randomness import randn
from companion.training.loop import TrainResult
from companion.training.recipe import begin, main

SIGMA_DATA = 0.32  # standard deviation of the real components of the training images
SCALE = "1 is the 99th percentile of the magnitude inside the object"
GAIN = 0.25  # standard deviation of ln of the gain that each image gets, so that errors of scale do not hurt
BANK_SIZE = 128  # pixels along y and x of an image of the bank
PART = 250  # images in a file of the bank
NOISY, NOISE = 0.7, (0.002, 0.03)  # share of images with noise, and its standard deviation per real component
LEAVES, BRAIN = 0.2, 0.07  # shares of the bank: dead leaves, and brains without a head
NO_FAT = 0.3  # share of the whole heads whose fat is suppressed
LARGE_MM = 1.5  # pixels from which heads of larger voxels are sharp enough


@dataclass(frozen=True)
class TrainGeneral(TrainOnCrops, bank="data/head_images", steps=20000):
    """Parameters of general/train.ipynb."""

    pixels_from_mm: float = param(0.0, "smallest pixels to learn from, mm; below 4 (0: all sizes)", minimum=0)

    @property
    def large_pixels(self) -> bool:
        return self.pixels_from_mm >= LARGE_MM


def prior_config(
    model_channels: int, channel_mult: tuple[float, ...], patch: int, images: int, pixels_from_mm: float = 0.0
) -> dict:
    """Return what `build` makes the denoiser from: complex images of any size, one channel for the error's variance."""
    return {
        "network": unet(2, model_channels, channel_mult, patch),
        "denoiser": {
            "name": "EDMDenoiser",
            "complex": True,
            "sigma_data": SIGMA_DATA,
            "learned_variance": True,
            "variance_channels": 1,
            "symmetries": ["mirror", "turn", "phase"],  # of the crops, and of their phase
        },
        "data": {
            "source": "warped and recoloured real heads and dead leaves of companion.data.heads",
            "images": images,
            "pixel_mm": f"{max(pixels_from_mm, 0.6):g} to 4",
            "scale": SCALE,
        },
    }


def bank_part(heads: Sequence[Head], chosen: Sequence[int], part: int, seed: int = 17) -> np.ndarray:
    """Return the images (PART, BANK_SIZE, BANK_SIZE) float16 of one file of those chosen; image i depends on seed and i
    alone."""
    made = [bank_image(heads, np.random.default_rng([seed, i])) for i in chosen[part * PART : (part + 1) * PART]]
    return np.stack(made).astype(np.float16)


def bank_image(heads: Sequence[Head], rng: np.random.Generator) -> np.ndarray:
    """Return one image (BANK_SIZE, BANK_SIZE): dead leaves, a brain alone, or one of the whole heads."""
    shown = bank_head([head.name for head in heads], rng)
    if shown is None:
        return dead_leaves(rng, BANK_SIZE)
    return head_image(next(head for head in heads if head.name == shown), rng, BANK_SIZE)


def bank_head(names: Sequence[str], rng: np.random.Generator) -> str | None:
    """Return the name of the head that an image of the bank shows, None for dead leaves."""
    brains, dark = ([name for name in names if name.endswith(kind)] for kind in ("_brain", "_no_fat"))
    whole = [name for name in names if not name.endswith(("_brain", "_no_fat"))]
    kind = rng.random()
    if kind < LEAVES or not whole:
        return None
    if brains and kind < LEAVES + BRAIN:
        return brains[0]
    some = dark if dark and rng.random() < NO_FAT else whole
    return some[int(rng.integers(len(some)))]


def of_large_pixels(names: Sequence[str], images: int, from_mm: float, seed: int = 17) -> list[int]:
    """Return which of so many images have pixels of at least `from_mm`, and as large a share of the dead leaves."""
    found = []
    for i in range(images):
        rng = np.random.default_rng([seed, i])
        bank_head(names, rng)
        if draw_pixel_mm(rng) >= from_mm:  # the first thing that `head_image` draws
            found.append(i)
    return found


def crop(image: Tensor, generator: Generator, size: int) -> Tensor:
    """Return a random part (1, size, size) of an image, mirrored and turned by quarters at random, with a new gain.

    Of two random places that with more signal: much of an image is air. A stack (slice, 1, y, x) counts as one.
    """
    room = [n - size + 1 for n in image.shape[-2:]]

    def place() -> Tensor:
        top, left = (int(torch.randint(n, (), generator=generator)) for n in room)
        return image[..., top : top + size, left : left + size]

    part = max(place(), place(), key=lambda part: part.sum().item())
    turns, flip = (int(torch.randint(n, (), generator=generator)) for n in (4, 2))
    part = part.rot90(turns, (-2, -1)).float()
    part = part.flip(-1) if flip else part
    return (part * (GAIN * torch.randn((), generator=generator)).exp()).contiguous()


def prior_loss(
    D: Denoiser, image: Tensor, generator: Generator, P_mean: float, P_std: float, variance_weight: float
) -> Tensor:
    """Return the EDM loss (batch,) of real images (batch, 1, y, x), each given a new phase."""
    x0 = scanned(image, generator)
    return edm_loss(D, x0, generator, P_mean, P_std, variance_weight=variance_weight)


def scanned(image: Tensor, generator: Generator) -> Tensor:
    """Return complex images (batch, 1, y, x) of real ones: a new phase, and the noise of a scan in most of them.

    Stacks of slices (batch, slice, 1, y, x) get one amount of noise and phases that change slowly, see `add_phase`.

    Half of the noisy ones got it as magnitudes (Rician, in phase with the signal), the others as complex k-space.
    """
    on = {"generator": generator, "device": generator.device}
    shape = (len(image), *[1] * (image.ndim - 1))
    low, high = (math.log(v) for v in NOISE)
    std = (low + (high - low) * torch.rand(shape, **on)).exp() * (torch.rand(shape, **on) < NOISY)
    magnitude = (torch.rand(shape, **on) < 0.5).to(image.device)
    noise = std * randn(image.shape, torch.complex64, generator, generator.device)
    noise = noise.to(image.device)
    image = torch.where(magnitude, (image + noise).abs(), image)
    return add_phase(image, generator) + torch.where(magnitude, 0, noise)


def train_general(p: TrainGeneral, progress: bool = True) -> TrainResult:
    """Return the trained prior; continues what `p.out` holds. The same call serves torchrun's processes."""
    config = prior_config(**p.pick("model_channels", "channel_mult", "patch", "images", "pixels_from_mm"))
    D = begin(config, p.seed, p.start_from, p.autocast, p.device)
    return train_on_crops(D, prior_loss, prepare_bank(p), p, config | {"crop": p.crop}, crop, progress)


def prepare_bank(p: TrainGeneral) -> Bank:
    """Return the images to learn from; those that the bank lacks are made of the real heads first.

    Those of large pixels have a folder of their own. Raises ValueError where they do not fill a file.
    """

    def source() -> Callable[[int], np.ndarray]:
        found = p.training_heads()
        found += [fat_suppressed(head) for head in found if not head.name.endswith("_brain")]
        return partial(bank_part, found, chosen)

    folder, chosen = p.bank_folder, list(range(-(-p.images // PART) * PART))
    if p.pixels_from_mm:
        folder = folder.with_name(f"{folder.name}_{p.pixels_from_mm:g}_mm")
        names = list(p.head_paths())
        names += [f"{name}_no_fat" for name in names if not name.endswith("_brain")]
        chosen = of_large_pixels(names, p.images, p.pixels_from_mm)
        chosen = chosen[: len(chosen) // PART * PART]  # whole files: with more images, the first ones stay
        if not chosen:
            raise ValueError(
                f"pixels_from_mm={p.pixels_from_mm:g}: of {p.images} images fewer than {PART} have pixels so large; "
                "give less, or more images"
            )
    images = min(p.images, len(chosen))
    return complete(folder, images, PART, source)


def validation_slices(heads: str | None, count: int = 4, size: int = 240, seed: int = 1, coarser: int = 1) -> Tensor:
    """Return axial slices (count, 1, size, size) of the head held for validation, complex, 1 mm; else dead leaves.

    coarser: pixels are so many times as large, and as many times fewer: k-space is cut off.

    Its own signal, nothing warped or recoloured but for a phase of `add_phase`; 1 is bright tissue.
    """
    if heads is None:
        leaves = np.stack([dead_leaves(np.random.default_rng([seed, i]), size) for i in range(count)])
        return cut_off(add_phase(torch.from_numpy(leaves)[:, None], torch.Generator().manual_seed(seed)), coarser)
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
    return cut_off(add_phase(canvas, torch.Generator().manual_seed(seed)), coarser)


def cut_off(x: Tensor, coarser: int) -> Tensor:
    """Return images (batch, 1, y, x) of `coarser` times larger pixels: only the centre of k-space is kept."""
    y_x = x.shape[-2] // coarser, x.shape[-1] // coarser
    return ifft(centre_crop(fft(x), y_x)) / coarser


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.general params.yaml
    main(TrainGeneral, train_general)
