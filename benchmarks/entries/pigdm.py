"""Pseudo-inverse guidance; what it believes the prior's standard deviation to be, in those of the validation images."""

from companion.diffusion.guidance import pigdm

NAME, GRID = "PiGDM", {"share": (0.3, 1.0, 3.0, 10.0)}


def guidance(A, y, noise_std, images, share=1.0):
    spread = (images - images.mean(0)).abs().square().mean().div(2).sqrt().item()
    return pigdm(A, y, noise_std, prior_std=share * spread)
