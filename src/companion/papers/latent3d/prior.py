"""Training of the latent prior. On several GPUs or nodes, with the parameters of a notebook whose stage is prior:

torchrun --nproc_per_node=4 -m companion.papers.latent3d.prior FILE
"""

from __future__ import annotations

from functools import partial

import torch

from companion.data.store import open_dataset
from companion.diffusion.latent import LatentSpace
from companion.files import project_root
from companion.models.latent import load_autoencoder
from companion.papers.latent3d.autoencoder import TrainLatent
from companion.parameters import resolve_device
from companion.training.latents import (
    LatentItems,
    cache_latents,
    check_levels,
    condition,
    covariates,
    prior_config,
    prior_loss,
)
from companion.training.loop import TrainResult
from companion.training.recipe import begin, fit, main


def train_prior(p: TrainLatent, progress: bool = True) -> tuple[TrainResult, LatentSpace, dict]:
    """The trained prior, which continues what <out>/prior holds, the space of its latents, and its config.

    Latents are cached in <out>/latents.h5. Raises ValueError for latents of another autoencoder, and for a schedule
    that leaves signal at its end.
    """
    prepared, out = open_dataset(project_root() / p.data, require=["image"]), project_root() / p.out
    device, cond = resolve_device(p.device), None
    codec = load_autoencoder(p.codec, device)
    space, cached = cache_latents(codec, prepared, out / "latents.h5", p.mirror, device, p.autocast, progress)
    config = prior_config(p, space, prepared, p.codec)
    D = begin(config, p.seed, p.start_from, p.autocast, p.device)
    check_levels(D)
    if p.covariates:
        values = covariates(torch.from_numpy(prepared.read("tissue_ml", "train")), p.covariates)
        cond = condition(values, config["covariates"], cached.shapes["z"][3:])
    about = {name: config[name] for name in ("network", "denoiser", "covariates", "latent")}
    loss = partial(prior_loss, covariates=len(p.covariates))
    data, options = LatentItems(cached, cond), p.pick("P_mean", "P_std")
    result = fit(D, loss, data, p, about, options, folder=out / "prior", progress=progress, schedule=p.rate)
    return result, space, config


if __name__ == "__main__":
    main(TrainLatent, train_prior)
