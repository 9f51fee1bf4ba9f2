"""The one-pass reconstruction: an unrolled network, trained on the general prior's images in scans of every kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from companion.data.random_scans import random_scan
from companion.models.unrolled import Unrolled
from companion.papers.crops import train_on_crops
from companion.papers.general import SCALE, TrainGeneral, crop, prepare_bank, scanned
from companion.parameters import param
from companion.training.loop import TrainResult
from companion.training.recipe import begin, main

SIZES = ("model_channels", "channel_mult", "patch", "stages", "memory", "iterations", "images")  # of the network
EARLIER = 0.1  # weight of the images before the last one in the loss


@dataclass(frozen=True)
class TrainOnePass(TrainGeneral):
    """Parameters of the training; the bank of images is that of the general prior."""

    crop: int = param(80, "pixels along y and x that a step sees of an image", minimum=16)
    channel_mult: tuple[float, ...] = param((1, 1, 2), "relative width of each level, finest first")
    stages: int = param(4, "networks between data consistencies", minimum=1)
    memory: int = param(4, "channels that a stage hands to the next", minimum=0)
    iterations: int = param(5, "conjugate gradients of a data consistency", minimum=1)
    steps: int = param(2000, "optimiser steps", minimum=1)
    batch_size: int = param(4, "images a step", minimum=1)
    learning_rate: float = param(1e-3, "highest learning rate", minimum=0)
    ema_halflife: float = param(500.0, "half-life of the averaged weights, images; short at first", minimum=0)


def one_pass_config(
    model_channels: int,
    channel_mult: tuple[float, ...],
    patch: int,
    stages: int,
    memory: int,
    iterations: int,
    images: int,
) -> dict:
    """Return what `build` makes the network from; the arguments are the form's `SIZES`."""
    cnn = {"model_channels": model_channels, "channel_mult": list(channel_mult), "patch": patch}
    unrolled = {"stages": stages, "memory": memory, "iterations": iterations}
    return {
        "network": {"name": "Unrolled", **unrolled, "cnn": cnn},
        "data": {
            "source": "warped and recoloured real heads and dead leaves of companion.data.heads, scanned at random",
            "images": images,
            "pixel_mm": "0.6 to 4",
            "scale": SCALE,
        },
    }


def one_pass_loss(R: Unrolled, image: Tensor, generator: Generator) -> Tensor:
    """Return the root mean squared error (batch,) of real images (batch, 1, y, x), each in a new scan; a tenth of the
    earlier stages' is added, so that each learns something.
    """
    x0, A, y, std = random_scan(scanned(image, generator), generator)
    errors = [(x - x0).abs().square().flatten(1).mean(1).add(1e-8).sqrt() for x in R.images(A, y, std)[1:]]
    return errors[-1] + EARLIER * torch.stack(errors[:-1]).sum(0) if len(errors) > 1 else errors[-1]


def train_one_pass(p: TrainOnePass, progress: bool = True) -> TrainResult:
    """Return the trained network; continues what `p.out` holds. The same call serves torchrun's processes."""
    config = one_pass_config(**p.pick(*SIZES))
    R = begin(config, p.seed, p.start_from, p.autocast, p.device)
    about = config | {"crop": p.crop}
    return train_on_crops(R, one_pass_loss, prepare_bank(p), p, about, crop, progress, options=())


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.one_pass params.yaml
    main(TrainOnePass, train_one_pass)
