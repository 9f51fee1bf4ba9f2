"""Neural networks: they know images, times and conditions, and nothing of diffusion."""

from companion.networks.causal_unet import CausalUNet
from companion.networks.edm_unet import EDMUNet
from companion.networks.unet import UNet, default_channel_mult

__all__ = ["CausalUNet", "EDMUNet", "UNet", "default_channel_mult"]
