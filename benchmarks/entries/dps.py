"""DPS with a step of 1: a gradient through the prior is counted as another evaluation."""

from companion.diffusion.guidance import dps

NAME = "DPS"


def guidance(A, y, noise_std):
    return dps(A, y, noise_std)
