"""Latent diffusion of 3D brains (latent3d)."""
