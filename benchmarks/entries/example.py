"""An entry for `companion bench`: posterior sampling in twenty lines, with an isotropic guess of the prior's error."""

import torch

from companion.diffusion.noise import karras
from companion.randomness import generators, randn

NAME = "isotropic guess, ancestral"


def sample(D, A, y, noise_std, seeds, calls):
    draws, levels = generators(seeds), karras(calls, noise_std / 2, 5.0).tolist()
    x = levels[0] * randn(A.domain_shape, torch.complex64, draws)
    for sigma, lower in zip(levels[:-1], levels[1:], strict=True):
        x0 = D(x, torch.full((len(x),), sigma))
        variance = 0.3**2 * sigma**2 / (0.3**2 + sigma**2)  # what D(x) is believed to err by, in every pixel alike
        b, u = A.H(y - A(x0)), torch.zeros_like(x0)
        for _ in range(20):  # gradient steps on |y - A(x0 + u)|^2 / noise_std^2 + |u|^2 / variance
            u = u + (b - A.normal(u) - noise_std**2 / variance * u) / (1 + noise_std**2 / variance)
        x0, up = x0 + u, lower * (1 - (lower / sigma) ** 2) ** 0.5
        x = x0 + (lower**2 - up**2) ** 0.5 / sigma * (x - x0) + up * randn(A.domain_shape, torch.complex64, draws)
    return x
