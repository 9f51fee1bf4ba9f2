"""Training of a prior of voxels: volumes of brains and heads of any size, without a code in between.

What an autoencoder cannot express no latent prior returns; a denoiser of voxels keeps everything, and sees no further
than its field of view. It learns from crops of virtual patients (`data.patients`) in several contrasts and of whole
real heads (`data.head_volumes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from companion.data import anatomy, volumes
from companion.data.head_volumes import head_volume
from companion.data.heads import Head
from companion.data.heads_download import load_heads
from companion.data.patients import PROTOCOLS, Anatomy, anatomies
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.losses import edm_loss
from companion.evaluation.denoising import expected_errors
from companion.files import project_root
from companion.models.architectures import network_of
from companion.papers.crops import Bank, TrainOnCrops, complete, train_on_crops, unet
from companion.parameters import param
from companion.training.loop import TrainResult
from companion.training.recipe import begin, main

SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # noise at which a prior is looked at
SIGMA_DATA = 0.35  # rms of the training volumes
GAIN = 0.2  # standard deviation of ln of the gain that each volume gets
SHAPE = (64, 64, 64)  # of patients, voxels of 3 mm
HEAD_SIZE = 48  # voxels along each axis of a volume of a whole head
PART = 50  # volumes in a file of the bank; every third file holds whole heads
NOISY, NOISE = 0.5, 0.03  # share of the crops with noise, and its largest standard deviation


@dataclass(frozen=True)
class TrainVoxels(
    TrainOnCrops,
    bank="data/voxels_bank",
    images=1000,
    crop=32,
    batch_size=4,
    channel_mult=(1, 1, 2),
    P_mean=-2.0,
    steps=10000,
    learning_rate=8e-4,
):
    """Parameters of latent3d/2_train_voxels.ipynb."""

    heads: str | None = param("data/heads", "folder of the real heads; none: patients of the template alone")


def prior_config(model_channels: int, channel_mult: tuple[float, ...], patch: int, images: int) -> dict:
    """Return what `build` makes the denoiser from: real volumes of any size, one channel for the error's variance."""
    return {
        "network": unet(1, model_channels, channel_mult, patch) | {"dims": 3},
        "denoiser": {
            "name": "EDMDenoiser",
            "sigma_data": SIGMA_DATA,
            "learned_variance": True,
            "variance_channels": 1,
            "symmetries": ["mirror", "turn"],  # of the crops
        },
        "data": {
            "source": "virtual patients (companion.data.patients) and warped real heads (companion.data.head_volumes)",
            "images": images,
            "voxel_mm": "1.5 to 4, mostly 3",
            "scale": "1 is bright tissue",
        },
    }


def bank_part(sources: Sequence[Anatomy], heads: Sequence[Head], part: int, seed: int = 29) -> np.ndarray:
    """Return the volumes (PART, 1, z, y, x) float16 of one file: patients of any contrast, or whole heads."""
    made = []
    for i in range(part * PART, (part + 1) * PART):
        rng = np.random.default_rng([seed, i])
        if part % 3 == 2 and heads:
            made.append(head_volume(heads[i % len(heads)], rng, HEAD_SIZE))
        else:
            contrast = "T1w" if rng.random() < 0.5 else str(rng.choice(list(PROTOCOLS)))
            made.append(volumes.patient(sources[i % len(sources)], anatomy.Subject(i), SHAPE, contrast).image.numpy())
    return np.stack(made)[:, None].astype(np.float16)


def crop(volume: Tensor, generator: Generator, size: int) -> Tensor:
    """Return a random part (1, size, size, size) of a volume (1, z, y, x) in which there is something.

    Axes change places and directions at random; each part has a new gain, and many have noise.
    """

    def somewhere() -> Tensor:
        corner = [int(torch.randint(n - size + 1, (), generator=generator)) for n in volume.shape[1:]]
        return volume[(slice(None), *(slice(c, c + size) for c in corner))]

    part = somewhere()
    for _ in range(7):  # volumes are half air, of which little is to be learnt
        if (part > 0.1).float().mean() > 0.1:
            break
        part = somewhere()
    part = part.permute(0, *(1 + torch.randperm(3, generator=generator)).tolist())
    part = part.flip([axis for axis in (1, 2, 3) if torch.rand((), generator=generator) < 0.5])
    part = part * (GAIN * torch.randn((), generator=generator)).exp()
    noise = NOISE * torch.rand((), generator=generator) * (torch.rand((), generator=generator) < NOISY)
    return (part + noise * torch.randn(part.shape, generator=generator)).contiguous()


def prior_loss(
    D: Denoiser, volume: Tensor, generator: Generator, P_mean: float, P_std: float, variance_weight: float
) -> Tensor:
    """Return the EDM loss (batch,) of volumes (batch, 1, z, y, x)."""
    return edm_loss(D, volume, generator, P_mean, P_std, variance_weight=variance_weight)


def train_voxels(p: TrainVoxels, progress: bool = True) -> TrainResult:
    """Return the trained prior; continues what `p.out` holds. The same call serves torchrun's processes."""
    config = prior_config(**p.pick("model_channels", "channel_mult", "patch", "images"))
    D = begin(config, p.seed, p.start_from, p.autocast, p.device)
    return train_on_crops(D, prior_loss, prepare_bank(p), p, config | {"crop": p.crop}, crop, progress)


def prepare_bank(p: TrainVoxels) -> Bank:
    """Return the volumes to learn from; those that the bank lacks are made first."""

    def source():
        folder = project_root() / p.heads if p.heads else None
        whole = [head for head in p.training_heads() if not head.name.endswith("_brain")]
        return partial(bank_part, anatomies(folder, "train", volumes.spacing(SHAPE)[1]), whole)

    return complete(p.bank_folder, p.images, PART, source)


def validation_volumes(heads: str | Path | None, count: int = 4) -> dict[str, Tensor]:
    """Return volumes (volume, 1, z, y, x) that nobody trained on: virtual patients, and the validation head, warped.

    heads: as of the form; none: no heads.
    """
    (icbm,) = anatomies(None, "validation", volumes.spacing(SHAPE)[1])
    people = [volumes.patient(icbm, one, SHAPE).image[None] for one in anatomy.cohort("validation", count)]
    found = {"virtual patients": torch.stack(people)}
    if heads:
        (head,) = load_heads(project_root() / heads, "validation")
        rngs = [np.random.default_rng([31, i]) for i in range(count)]
        found["a real head"] = torch.from_numpy(np.stack([head_volume(head, rng, HEAD_SIZE, 3.0) for rng in rngs]))[
            :, None
        ]
    return found


def validation_errors(D: Denoiser, heads: str | None, count: int = 4) -> list[dict]:
    """Return the error of D at several noise levels on `validation_volumes`, and the error that it states."""
    device = next(network_of(D).parameters()).device
    return [
        {"volumes": name} | row
        for name, x in validation_volumes(heads, count).items()
        for row in expected_errors(D, x.to(device), SIGMAS, seed=0)
    ]


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.latent3d.voxels params.yaml
    main(TrainVoxels, train_voxels)
