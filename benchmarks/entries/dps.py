"""DPS: a gradient through the prior is counted as another evaluation."""

from companion.diffusion.guidance import dps

NAME, GRID = "DPS", {"step_size": (0.03, 0.1, 0.3, 1.0, 3.0)}


def guidance(A, y, noise_std, step_size=1.0):
    return dps(A, y, noise_std, step_size)
