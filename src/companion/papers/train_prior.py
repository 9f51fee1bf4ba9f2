"""The brain prior of train_prior.ipynb: complex T1w slices, a small diffusion network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from companion.data import anatomy, virtual
from companion.data.store import Prepared, prepare_once
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.losses import edm_loss
from companion.files import project_root
from companion.parameters import param
from companion.training.loop import TrainResult
from companion.training.recipe import Training, UNetSize, begin, fit, main

SIGMA_DATA = 0.34  # standard deviation of the real components of the cohort's slices
DENOISER = {
    "name": "EDMDenoiser",
    "complex": True,
    "sigma_data": SIGMA_DATA,
    "learned_variance": True,
    "variance_channels": 1,
}


@dataclass(frozen=True)
class TrainPrior(
    UNetSize,
    Training,
    steps=20000,
    batch_size=32,
    grad_accumulation=2,
    warmup=200,
    ema_decay=0.9993,
    checkpoint_every=500,
):
    """Parameters of train_prior.ipynb."""

    data: str = param("data/brain_t1w_64.h5", "prepared slices; made when missing")
    image_size: int = param(64, "pixels along y and x", minimum=16)
    subjects: int = param(2400, "virtual people to learn from", minimum=1)
    slices_per_subject: int = param(16, "axial slices of each", minimum=1)
    variance_weight: float = param(0.05, "weight of the variance channel's likelihood in the loss", minimum=0)
    P_mean: float = param(-1.4, "mean of ln sigma in training")
    P_std: float = param(1.3, "standard deviation of ln sigma in training", minimum=0)


def train(p: TrainPrior, progress: bool = True) -> tuple[TrainResult, dict]:
    """The trained prior, which continues what `p.out` holds, and its config; torchrun's processes share the work."""
    prepared = prepare(p.data, p.subjects, p.slices_per_subject, p.image_size)
    about = p.pick("subjects", "slices_per_subject", "image_size")
    config = prior_config(p, about)
    D = begin(config, p.seed, p.start_from, p.autocast, p.device)
    options = p.pick("P_mean", "P_std", "variance_weight")
    slices = prepared.slices("magnitude", "train")
    return fit(D, prior_loss, slices, p, config, options, progress=progress, log_every=50), config


def prior_config(size: UNetSize, about: dict) -> dict:
    """What `architectures.build` takes: complex images, and a channel for the error's variance. about: the data."""
    source = f"virtual cohort of companion.data.anatomy (ICBM 152), {virtual.CONTRAST} axial slices"
    return {
        "network": size.unet(in_channels=2, out_channels=3),
        "denoiser": DENOISER,
        "data": {"source": source} | about | {"scale": virtual.SCALE},
    }


def prior_loss(
    D: Denoiser, magnitude: Tensor, generator: Generator, P_mean: float, P_std: float, variance_weight: float
) -> Tensor:
    """The EDM loss (batch,) of magnitudes (batch, 1, y, x), each mirrored at random and given a new phase."""
    mirrored = torch.rand(len(magnitude), 1, 1, 1, generator=generator, device=generator.device) < 0.5
    magnitude = torch.where(mirrored, magnitude.flip(-1), magnitude)
    x0 = anatomy.random_phase(magnitude, generator)
    return edm_loss(D, x0, generator, P_mean, P_std, variance_weight=variance_weight)


def prepare(data: str, subjects: int, per_subject: int, image_size: int) -> Prepared:
    """The training slices' magnitudes, (subject, slice, 1, y, x) float32, made and stored once in the file `data`.

    Phases are not stored: `prior_loss` draws a new one each time a slice is shown.
    """

    def make() -> dict:
        magnitude = virtual.slices("train", subjects, image_size, per_subject, progress=True).abs()
        return {
            "arrays": {"magnitude": magnitude.unflatten(0, (subjects, -1)).numpy()},
            "units": {"magnitude": "1"},
            "scale": {"magnitude": virtual.SCALE},
            "seed": anatomy.FIRST_SEED["train"],
            "source": "companion.data.anatomy (ICBM 152), " + virtual.CONTRAST,
            "split": {"train": range(subjects)},
        }

    wanted = {"subjects": subjects, "slices_per_subject": per_subject, "image_size": image_size}
    return prepare_once(project_root() / data, wanted, make, ["magnitude"])


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.train_prior params.yaml
    main(TrainPrior, train)
