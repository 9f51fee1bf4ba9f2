"""Training of a prior of activity in any head: real heads with random uptake, dead leaves, and the virtual people.

One fully convolutional network for any size and for pixels of 1 to 4 mm. It may begin with the weights of the general
prior of complex images, whose real half it takes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Generator, Tensor, nn

from companion.data.head_activity import (
    SCALE_KBQ,
    ActiveHead,
    active_head,
    activity_image,
    leaves_image,
    virtual_images,
)
from companion.data.heads_download import load_heads
from companion.data.pet import held_out
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.losses import edm_loss
from companion.evaluation.denoising import expected_errors
from companion.files import project_root
from companion.models.architectures import build, network_of
from companion.models.checkpoint import load
from companion.papers.crops import Bank, TrainOnCrops, complete, train_on_crops, unet
from companion.parameters import param
from companion.training.loop import TrainResult
from companion.training.recipe import begin, main

SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0)  # noise at which a prior is looked at
SIGMA_DATA = 0.35  # rms of the training images
GAIN = 0.15  # standard deviation of ln of the gain that each image gets
BANK_SIZE = 80  # pixels along y and x of an image of the bank
PART, PERSON = 250, 8  # images in a file of the bank; slices of a virtual person
LEAVES, PEOPLE = 0.12, 0.256  # shares of the bank: dead leaves, and virtual people


@dataclass(frozen=True)
class TrainHeads(
    TrainOnCrops,
    bank="data/pet_heads_bank",
    images=4000,
    crop=64,
    variance_weight=0.2,
    P_mean=-1.3,
    steps=6000,
    ema_halflife=2000.0,
):
    """Parameters of pet/2_train_heads.ipynb."""

    general: str | None = param("general/2d", "prior of complex images whose weights to begin with; none: random")


def prior_config(model_channels: int, channel_mult: tuple[float, ...], patch: int, images: int) -> dict:
    """Return what `build` makes the denoiser from: activity of any size, one channel for the error's variance."""
    return {
        "network": unet(1, model_channels, channel_mult, patch),
        "denoiser": {"name": "EDMDenoiser", "sigma_data": SIGMA_DATA, "learned_variance": True},
        "data": {
            "source": "real heads with random uptake, dead leaves and virtual people of companion.data.head_activity",
            "scale": f"1 is {SCALE_KBQ:g} kBq/mL, for every image",
            "scale_kbq": SCALE_KBQ,
            "units": "kBq/mL",
            "task": "unconditional",
            "target": "phantom",
            "images": images,
            "image_size": "any",
            "pixel_mm": [1.0, 4.0],
        },
    }


def real_half(config: dict, name: str) -> nn.Module:
    """Return the denoiser of `config` with the weights of a prior of complex images, those of its real channel.

    Raises ValueError when the two networks differ in more than the channels of their images.
    """
    D, general = build(config), cast(nn.Module, load(name).D)  # without the layer that makes channels of complex images
    given, cut = general.state_dict(), {}
    for key, value in D.state_dict().items():
        other = given.get(key, torch.empty(0))
        if key.endswith("input_blocks.0.0.weight"):  # of the real part of the input
            other = other[:, : value.shape[1]]
        elif key.endswith(("out.2.weight", "out.2.bias")):  # of the real part of the mean, and of the variance
            other = torch.cat([other[: len(value) // 2], other[-len(value) // 2 :]])
        if other.shape != value.shape:
            raise ValueError(
                f"{name}: {key} has shape {tuple(other.shape)}, expected {tuple(value.shape)}; give a network of the "
                "same size"
            )
        cut[key] = other
    D.load_state_dict(cut)
    return D


def bank_part(heads: Sequence[ActiveHead], part: int, seed: int = 23) -> np.ndarray:
    """Return the images (PART, BANK_SIZE, BANK_SIZE) float16 of one file: virtual people, dead leaves, real heads."""
    persons, leaves = round(PART * PEOPLE / PERSON), round(PART * LEAVES)
    rngs = [np.random.default_rng([seed, part, i]) for i in range(PART)]
    made = [virtual_images(part * persons + i, rngs.pop(), BANK_SIZE, PERSON) for i in range(persons)]
    made += [leaves_image(rngs.pop(), BANK_SIZE)[None] for _ in range(leaves)]
    for i in range(PART - persons * PERSON - leaves):
        rng = rngs.pop()
        made.append(
            (activity_image(heads[i % len(heads)], rng, BANK_SIZE) if heads else leaves_image(rng, BANK_SIZE))[None]
        )
    return np.concatenate(made).astype(np.float16)


def crop(image: Tensor, generator: Generator, size: int) -> Tensor:
    """Return a random part (1, size, size) of an image, half of them mirrored left to right, with a new gain."""
    top, left, flip = (int(torch.randint(n, (), generator=generator)) for n in
                       (image.shape[1] - size + 1, image.shape[2] - size + 1, 2))  # fmt: skip
    part = image[:, top : top + size, left : left + size]
    part = part.flip(2) if flip else part
    return (part * (GAIN * torch.randn((), generator=generator)).exp()).contiguous()


def prior_loss(
    D: Denoiser, image: Tensor, generator: Generator, P_mean: float, P_std: float, variance_weight: float
) -> Tensor:
    """Return the EDM loss (batch,) of activity (batch, 1, y, x) in network units."""
    return edm_loss(D, image, generator, P_mean, P_std, variance_weight=variance_weight)


def train_heads(p: TrainHeads, progress: bool = True) -> TrainResult:
    """Return the trained prior; continues what `p.out` holds. The same call serves torchrun's processes."""
    config = prior_config(**p.pick("model_channels", "channel_mult", "patch", "images"))
    start = p.start_from or (real_half(config, p.general) if p.general else None)
    D = begin(config, p.seed, start, p.autocast, p.device)
    about = config | {"crop": p.crop, "general": p.general}
    return train_on_crops(D, prior_loss, prepare_bank(p), p, about, crop, progress)


def prepare_bank(p: TrainHeads) -> Bank:
    """Return the images to learn from; those that the bank lacks are made first."""

    def source():
        heads = load_heads(project_root() / p.heads, "train") if p.heads else []
        return partial(bank_part, [active_head(head) for head in heads])

    return complete(project_root() / p.bank, p.images, PART, source)


def validation_errors(D: Denoiser, heads: str | None, count: int = 6, size: int = 64) -> list[dict]:
    """The error of D at several noise levels, kBq/mL, on activity nobody trained on, and the error that it states.

    Warped activity of the head held for validation (none: dead leaves), and slices of virtual validation people.
    """
    if heads:
        found = [active_head(head) for head in load_heads(project_root() / heads, "validation")]
        rngs = [np.random.default_rng([31, i]) for i in range(count)]
        foreign = np.stack([activity_image(found[i % len(found)], rng, size) for i, rng in enumerate(rngs)])
    else:
        foreign = np.stack([leaves_image(np.random.default_rng([31, i]), size) for i in range(count)])
    people = held_out("validation", count, size, lesions=1).image / SCALE_KBQ
    device, rows = next(network_of(D).parameters()).device, []
    for name, x0 in (("a head" if heads else "dead leaves", torch.from_numpy(foreign)[:, None]), ("virtual", people)):
        found = expected_errors(D, x0.to(device), SIGMAS, seed=0, digits=None)
        rows += [
            {"images": name, "sigma": r["sigma"]} | {k: SCALE_KBQ * r[k] for k in ("error", "expected")} for r in found
        ]
    return rows


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.pet.heads params.yaml
    main(TrainHeads, train_heads)
