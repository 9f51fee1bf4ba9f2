"""Companion: four diffusion-model papers in medical imaging, as notebooks that run."""

__version__ = "0.1.0"
