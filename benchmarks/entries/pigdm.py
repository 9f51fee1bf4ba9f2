"""Pseudo-inverse guidance, its prior's standard deviation that of the validation images."""

from companion.diffusion.guidance import pigdm

NAME = "PiGDM"


def guidance(A, y, noise_std, images):
    return pigdm(A, y, noise_std, prior_std=(images - images.mean(0)).abs().square().mean().div(2).sqrt().item())
