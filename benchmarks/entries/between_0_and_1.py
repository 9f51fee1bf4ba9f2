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


def exact_prox(A):
    """prox(z, y, gamma) = argmin_u |A u - y|^2 / 2 + |u - z|^2 / (2 gamma), exact, in deepinv's channels.

    deepinv solves it by up to 50 conjugate gradients. Where a mask changes along x only, A^H A mixes pixels of one row
    only: one small matrix a row, whose eigenvectors solve it for every gamma. Raises ValueError for other operators.
    """
    space = A.domain_shape[-2:]
    columns = torch.eye(space[1], dtype=A.domain_dtype)[:, None, None].expand(-1, 1, *space)
    s, V = torch.linalg.eigh(A.normal(columns)[:, 0].permute(1, 2, 0).to(torch.complex128))

    def apply(f, u):
        return (V @ (f * (V.mH @ u.to(V.dtype)[..., None]).squeeze(-1))[..., None]).squeeze(-1).to(u.dtype)

    probe = torch.complex(*torch.randn(2, 1, *A.domain_shape, generator=torch.Generator().manual_seed(0)))
    if not (apply(s, probe) - A.normal(probe)).norm() < 1e-4 * s.max() * probe.norm():
        raise ValueError(f"{A!r} mixes pixels of several rows; expected a mask that changes along x only")

    def prox(z, y, gamma, **_):
        b = A.H(torch.view_as_complex(y.movedim(1, -1).contiguous())) + to_complex(z) / gamma
        return to_channels(apply(1 / (s + 1 / gamma), b))

    return prox


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
