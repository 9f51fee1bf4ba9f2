"""DiffPIR with the weight of its paper, zeta as DDIM's eta."""

from companion.diffusion.guidance import diffpir
from companion.diffusion.solvers import ddim

NAME, SOLVER = "DiffPIR", ddim(eta=1.0)


def guidance(A, y, noise_std):
    return diffpir(A, y, noise_std)
