"""The brain prior and the study of start_here: complex T1w slices, a small diffusion prior, multi-coil MRI."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from companion.data import anatomy
from companion.diffusion.denoisers import ComplexDenoiser, EDMDenoiser
from companion.diffusion.losses import edm_loss
from companion.networks.unet import UNet

CONTRAST = "T1w"
SIGMA_DATA = 0.34  # of the real components of the cohort's slices


def new_prior(network: dict, seed: int, autocast: torch.dtype | None = None) -> ComplexDenoiser:
    """Return an untrained denoiser of complex images whose network also predicts the variance of its error."""
    torch.manual_seed(seed)
    return ComplexDenoiser(EDMDenoiser(UNet(**network), SIGMA_DATA, learned_variance=True, variance_channels=1,
                                       autocast=autocast))


def prior_loss(D: ComplexDenoiser, magnitude: Tensor, generator: Generator, P_mean: float, P_std: float) -> Tensor:
    """Return the EDM loss (batch,) of magnitudes (batch, 1, y, x), each mirrored at random and given a new phase."""
    mirrored = torch.rand(len(magnitude), 1, 1, 1, generator=generator, device=generator.device) < 0.5
    magnitude = torch.where(mirrored, magnitude.flip(-1), magnitude)
    return edm_loss(D, anatomy.random_phase(magnitude, generator), generator, P_mean, P_std)
