"""DDS: a constant weight of the data, few conjugate gradients; the solver of its paper's stochastic runs."""

from companion.diffusion.guidance import dds
from companion.diffusion.solvers import ddim

NAME, SOLVER = "DDS", ddim(eta=0.85)
GRID = {"gamma": (5.0, 25.0, 125.0)}


def guidance(A, y, gamma=5.0):
    return dds(A, y, gamma=gamma)
