"""Neural networks: they know images, times and conditions, and nothing of diffusion."""

from companion.networks.unet import UNet, default_channel_mult

__all__ = ["UNet", "default_channel_mult"]
