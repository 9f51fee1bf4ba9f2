"""Our denoisers and operators as deepinv's, and deepinv's denoisers as ours, for those who have deepinv.

    D = to_deepinv(load("general/2d"))                  # a deepinv Denoiser: D(x, sigma), x (batch, 2, y, x)
    physics = to_physics(A, noise_std=0.02)             # a deepinv LinearPhysics: A, A_adjoint, prox_l2, ...
    model = deepinv.sampling.DPS(D, ...)                # anything of deepinv works with both
    D = from_deepinv(deepinv.models.DRUNet(2, 2))       # a denoiser for our samplers

deepinv has no complex images: (batch, C, *space) complex is (batch, 2 C, *space) there, re and im of each channel, and
measurements (batch, *range) are (batch, 2, *range), as those of its own MRI operators. Its noise levels are ours:
the standard deviation of each real number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from companion.diffusion.complexify import to_channels, to_complex
from companion.diffusion.denoisers import ComplexDenoiser, Denoiser
from companion.operators.linear import LinearOperator


def to_deepinv(D: Denoiser, device: str | torch.device = "cpu") -> nn.Module:
    """A deepinv `Denoiser` of real channels that gives what D gives.

    D: a denoiser (x, sigma) -> x0_hat; a `ComplexDenoiser` sees complex images, any other the channels themselves.
    """
    from deepinv.models.base import Denoiser as Base

    class Companion(Base):
        def __init__(self):
            super().__init__(device)
            self.D = D

        def forward(self, x: Tensor, sigma: float | Tensor, **_) -> Tensor:
            levels = self._handle_sigma(sigma, batch_size=x.shape[0], device=x.device, dtype=x.dtype)
            if isinstance(D, ComplexDenoiser):
                return to_channels(D(to_complex(x), levels))
            return D(x, levels)

    return Companion().eval()


def from_deepinv(denoiser: nn.Module, is_complex: bool = False) -> nn.Module:
    """A denoiser D(x, sigma) for our samplers, from a deepinv one that takes noise levels (batch,).

    is_complex: its pairs of channels are re and im; the result then takes complex images. Nothing says how far such a
    denoiser is a mean of the posterior: one that was trained to remove noise by least squares is.
    """

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.denoiser = denoiser

        def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
            if cond is not None:
                raise ValueError("denoisers of deepinv take no condition; leave cond out")
            return self.denoiser(x, sigma.reshape(-1).expand(x.shape[0]))

    return ComplexDenoiser(Theirs()) if is_complex else Theirs()


def to_physics(A: LinearOperator, noise_std: float = 0.0, seed: int = 0, **options) -> nn.Module:
    """A deepinv `LinearPhysics` of an operator without a batch of its own, with Gaussian noise of `noise_std`.

    Images (batch, 2 C, *space) for a complex domain (C, *space); measurements (batch, 2, *range) for a complex range.
    Its adjoint is ours, the true one of these real numbers. seed: of the noise that physics(x) adds. **options
    go to LinearPhysics. Raises ValueError for an operator with a batch of its own.
    """
    from deepinv.physics import GaussianNoise, LinearPhysics, ZeroNoise

    if A.batch_shape:
        raise ValueError(f"the operator has a batch of its own, {A.batch_shape}; give that of one item")
    images, data = A.domain_dtype.is_complex, A.range_dtype.is_complex
    noise = GaussianNoise(noise_std, rng=torch.Generator().manual_seed(seed)) if noise_std else ZeroNoise()

    def forward(x: Tensor, **_) -> Tensor:
        y = A(to_complex(x) if images else x)
        return torch.view_as_real(y).movedim(-1, 1) if data else y

    def adjoint(y: Tensor, **_) -> Tensor:
        x = A.H(torch.view_as_complex(y.movedim(1, -1).contiguous()) if data else y)
        return to_channels(x) if images else x

    channels, *space = A.domain_shape
    size = (2 * channels if images else channels, *space)
    return LinearPhysics(A=forward, A_adjoint=adjoint, img_size=size, noise_model=noise, **options)
