"""DiffPIR; zeta, its share of fresh noise, as DDIM's eta."""

from companion.diffusion.guidance import diffpir
from companion.diffusion.solvers import ddim

NAME, SOLVER = "DiffPIR", ddim(eta=1.0)
GRID = {"weight": (0.3, 1.0, 3.0, 10.0)}


def guidance(A, y, noise_std, weight=1.0):
    return diffpir(A, y, noise_std, weight)
