"""Latent priors on disk: the prior with the fingerprint of its autoencoder."""

import os
from collections.abc import Mapping
from pathlib import Path

from companion.diffusion.latent import LatentDenoiser, LatentSpace
from companion.models import checkpoint as weights
from companion.models.folder import save_checkpoint
from companion.networks.codec import Codec


def save_prior(folder: str | os.PathLike, prior: LatentDenoiser, config: Mapping, record: Mapping) -> Path:
    """The folder of a checkpoint of prior.D whose config says under "latent" what its latents are."""
    config = dict(config) | {"latent": prior.space.describe()}
    return save_checkpoint(folder, prior.D, config, record)


def load_prior(name: str | os.PathLike, codec: Codec, device="cpu", autocast: str | None = None) -> LatentDenoiser:
    """The prior of a checkpoint on the latents of `codec`; raises ValueError if it was trained on others."""
    description = weights.describe(name).get("latent")
    if description is None:
        raise ValueError(f'{name} is no prior on latents: its config has no "latent"; use weights.load')
    space = LatentSpace.described(codec, description).to(device).requires_grad_(False)
    return LatentDenoiser(weights.load_denoiser(name, device, autocast), space)
