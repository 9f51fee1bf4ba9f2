"""Latent priors on disk: the prior with the fingerprint of its autoencoder.

prior = load_latent("latent3d/prior")
z = sample(prior.D, karras(20), shape=prior.latent_shape, seeds="0-15").x
volumes = prior.decode(z)                    # (16, 1, z, y, x) at prior.affine
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from companion.diffusion.latent import LatentDenoiser, LatentSpace
from companion.models import checkpoint
from companion.models.folder import save_checkpoint
from companion.networks.codec import Codec

AUTOENCODER, PRIOR = "latent3d/autoencoder", "latent3d/prior"  # what the name "embedded" stands for


@dataclass(frozen=True, eq=False)
class LatentPrior:
    """A prior on the latents of an autoencoder, with all that is needed to draw volumes from it.

    D: denoiser of normalised latents (batch, *latent_shape), the prior's network inside. space: encode and decode.
    shape, voxel_mm: (z, y, x) of the volumes that it was trained on; affine: from their voxels (x, y, z) to mm.
    config["covariates"]: what D takes as cond, if anything.
    """

    D: LatentDenoiser
    config: Mapping

    @property
    def space(self) -> LatentSpace:
        return self.D.space

    @property
    def device(self) -> torch.device:
        return self.space.mean.device

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.config["data"]["shape"])

    @property
    def voxel_mm(self) -> tuple[float, float, float]:
        z, y, x = self.config["data"]["voxel_mm"]
        return z, y, x

    @property
    def affine(self) -> np.ndarray:
        return np.array(self.config["data"]["affine"])

    @property
    def latent_shape(self) -> tuple[int, ...]:
        codec = self.space.codec
        return codec.latent_channels, *(n // codec.factor for n in self.shape)

    def encode(self, x: Tensor, tile: int | None = None) -> Tensor:
        """Normalised latents (batch, *latent_shape) of volumes (batch, 1, z, y, x) in [0, 1]."""
        return self.space.encode(x, tile=tile)

    def decode(self, z: Tensor, tile: int | None = None, batch: int = 4) -> Tensor:
        """Volumes (batch, 1, z, y, x) of normalised latents, `batch` at a time; nothing is clipped."""
        return self.space.decode_in_parts(z, tile=tile, batch=batch)


def save_prior(folder: str | os.PathLike, prior: LatentDenoiser, config: Mapping, record: Mapping) -> Path:
    """The folder of a checkpoint of prior.D whose config says under "latent" what its latents are."""
    config = dict(config) | {"latent": prior.space.describe()}
    return save_checkpoint(folder, cast(nn.Module, prior.D), config, record)


def load_prior(name: str | os.PathLike, codec: Codec, device="cpu", autocast: str | None = None) -> LatentDenoiser:
    """The prior of a checkpoint on the latents of `codec`; raises ValueError if it was trained on others."""
    return _on_latents(checkpoint.find(name, PRIOR), codec, device, autocast)


def load_latent(
    name: str | os.PathLike = PRIOR,
    autoencoder: str | os.PathLike | None = None,
    device="cpu",
    autocast: str | None = "auto",
) -> LatentPrior:
    """The prior of a checkpoint together with its autoencoder; raises ValueError if they do not belong together.

    autoencoder: its checkpoint, by default the one that the prior's config names.
    """
    found = checkpoint.find(name, PRIOR)
    codec = load_autoencoder(autoencoder or found.config.get("autoencoder", AUTOENCODER), device)
    return LatentPrior(_on_latents(found, codec, device, autocast), found.config)


def load_autoencoder(name: str | os.PathLike = AUTOENCODER, device="cpu") -> Codec:
    """The autoencoder of a checkpoint; raises ValueError for a checkpoint of something else."""
    codec = checkpoint.load(name, device, default=AUTOENCODER)
    if not isinstance(codec, Codec):
        raise ValueError(f"{name} holds a {type(codec).__name__}, no autoencoder; give one such as {AUTOENCODER}")
    return codec


def with_decoder(prior: LatentPrior, codec: Codec) -> LatentDenoiser:
    """The prior with another decoder for the same latents, to be saved; ValueError if the latents are others."""
    halves = [
        {k: v for k, v in c.state_dict().items() if not k.startswith(("decoder.", "post_quant_conv."))}
        for c in (prior.space.codec, codec)
    ]
    if halves[0].keys() != halves[1].keys() or not all(torch.equal(v, halves[1][k]) for k, v in halves[0].items()):
        raise ValueError("the encoders differ, so the latents do; train the prior on those of the new autoencoder")
    space = LatentSpace(codec, prior.space.mean, prior.space.std, prior.space.latents, prior.space.intensity)
    return LatentDenoiser(prior.D.D, space)


def _on_latents(found: checkpoint.Checkpoint, codec: Codec, device, autocast: str | None) -> LatentDenoiser:
    description = found.config.get("latent")
    if description is None:
        raise ValueError(f'{found.name} is no prior on latents: its config has no "latent"; use checkpoint.load')
    space = LatentSpace.described(codec, description).to(device).requires_grad_(False)
    return LatentDenoiser(found.denoiser(device, autocast), space)
