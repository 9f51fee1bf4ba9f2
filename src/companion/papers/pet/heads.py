"""Training of a prior of activity in any head: real heads with random uptake, dead leaves, and the virtual people.

One fully convolutional network for any size and for pixels of 1 to 4 mm, with or without the person's MR: two more
channels of its input hold the MR and where it is known (`companion.data.head_mr`). It may begin with the weights of the
general prior of complex images, whose real half it takes over, or of a prior of activity that knows no MR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor, nn

from companion.data.head_activity import (
    SCALE_KBQ,
    ActiveHead,
    active_head,
    activity_and_mr,
    leaves_pair,
    virtual_pairs,
)
from companion.data.heads_download import load_heads
from companion.data.pet import held_out
from companion.diffusion.denoisers import Denoiser, inner_denoiser
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
CONDITION = 2  # channels: the MR, and where it is known
NO_MR, PART_OF_MR = 0.35, 0.08  # shares of the crops that are shown without the MR, or with a part of it alone


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

    @property
    def large_pixels(self) -> bool:
        return True


def prior_config(model_channels: int, channel_mult: tuple[float, ...], patch: int, images: int) -> dict:
    """Return what `build` makes the denoiser from: activity of any size, one channel for the error's variance."""
    return {
        "network": unet(1, model_channels, channel_mult, patch) | {"name": "GuidedUNet", "in_channels": 1 + CONDITION},
        "denoiser": {
            "name": "EDMDenoiser",
            "sigma_data": SIGMA_DATA,
            "learned_variance": True,
            "cond_channels": CONDITION,
            "symmetries": ["mirror", "shift"],  # of the crops
        },
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
            "condition": "MR of any contrast, scaled by companion.data.head_mr, and 1 where it is known; zeros: none",
        },
    }


def real_half(config: dict, name: str) -> nn.Module:
    """Return the denoiser of `config` with the weights of another prior: of complex images, those of its real channel.

    What the other is not given, the new one begins to be given with weights of 0.

    Raises ValueError when the two networks differ in more than the channels of their images.
    """
    D, general = build(config), inner_denoiser(load(name))  # without the layer that makes channels of complex images
    given, cut = general.state_dict(), {}
    for key, value in D.state_dict().items():
        other = given.get(key, torch.empty(0))
        if key.endswith("input_blocks.0.0.weight") and other.shape[::2] == value.shape[::2]:  # of its real part
            own = config["network"]["patch"] ** 2
            other = torch.cat([other[:, :own], torch.zeros_like(value[:, own:])], 1)
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
    """Return activity and MR (PART, 2, BANK_SIZE, BANK_SIZE) float16 of one file: people, leaves, real heads."""
    persons, leaves = round(PART * PEOPLE / PERSON), round(PART * LEAVES)
    rngs = [np.random.default_rng([seed, part, i]) for i in range(PART)]
    made = [virtual_pairs(part * persons + i, rngs.pop(), BANK_SIZE, PERSON) for i in range(persons)]
    made += [leaves_pair(rngs.pop(), BANK_SIZE)[None] for _ in range(leaves)]
    for i in range(PART - persons * PERSON - leaves):
        rng = rngs.pop()
        made.append(
            (activity_and_mr(heads[i % len(heads)], rng, BANK_SIZE) if heads else leaves_pair(rng, BANK_SIZE))[None]
        )
    return np.concatenate(made).astype(np.float16)


def crop(image: Tensor, generator: Generator, size: int) -> Tensor:
    """Return a random part (3, size, size) of activity and MR (2, y, x), and where the MR is known.

    Half of them are mirrored left to right; each has a new gain. A third are shown without the MR.
    """
    top, left, flip = (int(torch.randint(n, (), generator=generator)) for n in
                       (image.shape[1] - size + 1, image.shape[2] - size + 1, 2))  # fmt: skip
    part = image[:, top : top + size, left : left + size]
    part = part.flip(2) if flip else part
    part = part * (GAIN * torch.randn(2, 1, 1, generator=generator)).exp()
    shown, known = torch.rand((), generator=generator), torch.ones_like(part[:1])
    if shown < NO_MR:
        known = torch.zeros_like(known)
    elif shown < NO_MR + PART_OF_MR:
        known[:, : int(torch.randint(size, (), generator=generator))] = 0
    return torch.cat([part[:1], part[1:] * known, known]).contiguous()


def prior_loss(
    D: Denoiser, image: Tensor, generator: Generator, P_mean: float, P_std: float, variance_weight: float
) -> Tensor:
    """Return the EDM loss (batch,) of activity, given its MR, of a batch (batch, 3, y, x) of `crop`."""
    x0, cond = image[:, :1], image[:, 1:]
    return edm_loss(D, x0, generator, P_mean, P_std, cond, variance_weight=variance_weight)


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
        return partial(bank_part, [active_head(head) for head in p.training_heads()])

    return complete(p.bank_folder, p.images, PART, source)


def validation_errors(D: Denoiser, heads: str | None, count: int = 6, size: int = 64) -> list[dict]:
    """The error of D at several noise levels, kBq/mL, on activity nobody trained on, and the error that it states.

    Warped activity of the head held for validation (none: dead leaves), alone and given its MR, and slices of virtual
    validation people.
    """
    rngs = [np.random.default_rng([31, i]) for i in range(count)]
    if heads:
        found = [active_head(head) for head in load_heads(project_root() / heads, "validation")]
        pairs = [activity_and_mr(found[i % len(found)], rng, size) for i, rng in enumerate(rngs)]
    else:
        pairs = [leaves_pair(rng, size) for rng in rngs]
    foreign = torch.from_numpy(np.stack(pairs))
    given = torch.cat([foreign[:, 1:], torch.ones_like(foreign[:, 1:])], 1)
    people = held_out("validation", count, size, lesions=1).image / SCALE_KBQ
    device, rows, kind = next(network_of(D).parameters()).device, [], "a head" if heads else "dead leaves"
    for name, x0, cond in (
        (kind, foreign[:, :1], None),
        (f"{kind}, its MR given", foreign[:, :1], given.to(device)),
        ("virtual", people, None),
    ):
        errors = expected_errors(D, x0.to(device), SIGMAS, cond=cond, seed=0, digits=None)
        rows += [
            {"images": name, "sigma": r["sigma"]} | {k: SCALE_KBQ * r[k] for k in ("error", "expected")} for r in errors
        ]
    return rows


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.pet.heads params.yaml
    main(TrainHeads, train_heads)
