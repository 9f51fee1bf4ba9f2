"""Synthetic brain volumes by latent diffusion (after the VQ-VAE and diffusion project of DIPY, 2023): data and training.

An autoencoder makes a volume of 64^3 voxels a small one of 16^3 cells with a few channels, a prior learns these latents,
and the decoder turns what the prior draws into brains:

    prior = load_latent("latent3d/prior")
    z = sample(prior.D, karras(20), shape=prior.latent_shape, seeds="0-15").x
    volumes = prior.decode(z)                    # (16, 1, z, y, x) at prior.affine

The original ended in noise; see papers/latent3d_sample.py for why, shown by experiment. Here the latents have mean 0 and
standard deviation 1 in every channel over the whole training set, these numbers travel with the prior, and a noise
schedule that leaves part of the signal at its end is refused before training.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from companion import latent, weights
from companion.data.store import Prepared, open_dataset, write_dataset
from companion.latent import LatentDenoiser, LatentSpace, check_terminal_signal, codec_loss
from companion.networks.vqvae import Codec
from companion.parameters import Parameters, param, read_yaml
from companion.runs import code_version, project_root
from companion.training import TrainConfig, TrainResult, train

AUTOENCODER, PRIOR = "latent3d/autoencoder", "latent3d/prior"


@dataclass(frozen=True, eq=False)
class LatentPrior:
    """A prior on the latents of an autoencoder, with all that is needed to draw volumes from it.

    D: denoiser of normalised latents (batch, *latent_shape), the prior's network inside. space: encode and decode.
    shape, voxel_mm: (z, y, x) of the volumes that it was trained on; affine: from their voxels (x, y, z) to mm.
    covariates: names of what D takes as cond, see `condition`; () for most priors.
    """

    D: LatentDenoiser
    config: dict

    @property
    def space(self) -> LatentSpace:
        return self.D.space

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.config["data"]["shape"])

    @property
    def voxel_mm(self) -> tuple[float, float, float]:
        return tuple(self.config["data"]["voxel_mm"])

    @property
    def affine(self) -> np.ndarray:
        return np.array(self.config["data"]["affine"])

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        codec = self.space.codec
        return codec.latent_channels, *(n // codec.factor for n in self.shape)

    def encode(self, x: Tensor, tile: int | None = None) -> Tensor:
        """Return normalised latents (batch, *latent_shape) of volumes (batch, 1, z, y, x) in [0, 1]."""
        return self.space.encode(x, tile=tile)

    def decode(self, z: Tensor, tile: int | None = None, batch: int = 4) -> Tensor:
        """Return volumes (batch, 1, z, y, x) of normalised latents, `batch` at a time; nothing is clipped."""
        return torch.cat([self.space.decode(part, tile=tile) for part in z.split(batch)])


def load_latent(name: str | os.PathLike = PRIOR, autoencoder: str | os.PathLike | None = None, device="cpu",
                autocast: str | None = "bfloat16") -> LatentPrior:
    """Return the prior of a checkpoint together with its autoencoder; raises ValueError if they do not belong together.

    autoencoder: its checkpoint, by default the one that the prior's config names.
    """
    config = weights.describe(name)
    codec = load_autoencoder(autoencoder or config.get("autoencoder", AUTOENCODER), device)
    return LatentPrior(latent.load_prior(name, codec, device, autocast), config)


def load_autoencoder(name: str | os.PathLike = AUTOENCODER, device="cpu") -> Codec:
    """Return the autoencoder of a checkpoint; raises ValueError for a checkpoint of something else."""
    codec = weights.load(name, device)
    if not isinstance(codec, Codec):
        raise ValueError(f"{name} holds a {type(codec).__name__}, no autoencoder; give a checkpoint such as {AUTOENCODER}")
    return codec
