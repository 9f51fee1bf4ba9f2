"""Neural networks: they know images, times and conditions, and nothing of diffusion."""

from companion.networks.autoencoder import AutoencoderKL, VQModel
from companion.networks.causal_unet import CausalUNet
from companion.networks.ddim_unet import DDIMUNet
from companion.networks.diffusion_unet import DiffusionUNet
from companion.networks.edm_unet import EDMUNet
from companion.networks.unet import UNet, default_channel_mult
from companion.networks.vqvae import VQVAE, PlainVQVAE

__all__ = [
    "AutoencoderKL",
    "CausalUNet",
    "DDIMUNet",
    "DiffusionUNet",
    "EDMUNet",
    "PlainVQVAE",
    "UNet",
    "VQModel",
    "VQVAE",
    "default_channel_mult",
]
