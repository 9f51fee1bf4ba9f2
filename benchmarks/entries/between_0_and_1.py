"""For the entries of deepinv, whose samplers expect images between 0 and 1: u = (x / WIDE + 1) / 2 in both channels."""

import torch

from companion.diffusion.complexify import to_channels, to_complex
from companion.models.deepinv import to_deepinv, to_physics

WIDE, SHIFT = 1.3, 1 + 1j  # real and imaginary parts lie between - and + WIDE


class Channels(torch.nn.Module):
    """D for the two channels of u: E[u0 | u]."""

    def __init__(self, D):
        super().__init__()
        self.inner = D

    def forward(self, u, sigma):
        return to_channels((self.inner(image(u), 2 * WIDE * sigma) / WIDE + SHIFT) / 2)


def image(u):
    """The complex image of channels u."""
    return WIDE * (2 * to_complex(u.float()) - SHIFT)


def each_seed(make, D, A, y, seeds):
    """The draws of make(denoiser, physics)(data, physics, seed=...), each with the random numbers of its own seed.

    The noise goes to those samplers that ask for it: physics has none of its own.
    """
    physics = to_physics(2 * WIDE * A)
    model = make(to_deepinv(Channels(D)), physics)
    shift = A(WIDE * SHIFT * torch.ones(1, *A.domain_shape, dtype=y.dtype))
    data = torch.view_as_real(y + shift).movedim(-1, 1)
    found = []
    for i, seed in enumerate(seeds):
        with torch.random.fork_rng([]):
            u = model(data[i : i + 1] if len(data) > 1 else data, physics, seed=1 + seed)
        found.append(image(u.detach()))
    return torch.cat(found)
