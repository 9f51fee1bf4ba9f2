"""Autoregressive image diffusion (AID)."""
