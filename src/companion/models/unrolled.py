"""A reconstruction in one pass: a few steps of data consistency, a small network between them.

    R = load("general/unrolled")
    x = R(A, y, noise_std)          # (batch, 1, y, x), complex: any Cartesian or other operator, size, number of coils

Each of the K stages proposes z = x + CNN(x) and then asks the data again,

    x = argmin_x |A x - y|^2 / (2 noise_std^2) + |x - z|^2 / (2 tau_k^2),

by conjugate gradients, with a learned tau_k, the error that z is taken to have: MoDL [aggarwal2019], with a U-Net as in
[sriram2020]. All stages share its weights; an embedding tells it the stage and the noise. The network knows nothing of
the operator but `A.H` and `A.normal`, so masks and coils may be any. The last step is one of data consistency. It gives
one image, an estimate of the middle of the posterior, without error bars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from companion.diffusion.denoisers import AnySize
from companion.networks.unet import UNet
from companion.operators.linear import LinearOperator
from companion.operators.solve import conjugate_gradient

SCALE = 0.32  # standard deviation of the real components of the images, as for the general prior
NOISE, LEAST = 0.01, 0.001  # a common noise_std, to which the learned errors refer; one below which data are exact


class Unrolled(nn.Module):
    """The unrolled network: R(A, y, noise_std) -> images (batch, 1, y, x).

    stages: networks and data consistencies after the first solution. memory: channels that a stage hands to the next
    beside the image. iterations: of conjugate gradients a stage. cnn: options of the U-Net.
    """

    def __init__(self, stages: int = 5, memory: int = 4, iterations: int = 5, cnn: Mapping | None = None):
        super().__init__()
        self.memory, self.iterations = memory, iterations
        options = {"model_channels": 32, "channel_mult": (1, 2, 2), "num_res_blocks": 1, "patch": 2}
        options |= {"num_heads": 0, "use_scale_shift_norm": True} | dict(cnn or {})
        self.cnn = UNet(4 + memory, out_channels=2 + memory, num_classes=stages, **options)
        self.log_error = nn.Parameter(torch.linspace(math.log(0.3), math.log(0.05), stages + 1))
        self.slope = nn.Parameter(torch.full((stages + 1,), 0.3))  # of ln tau against ln noise_std

    @property
    def stages(self) -> int:
        """How many networks are applied."""
        return len(self.log_error) - 1

    def forward(self, A: LinearOperator, y: Tensor, noise_std: float | Tensor, iterations: int | None = None) -> Tensor:
        """The image (batch, *A.domain_shape), a set of maps or several, (y, x), of data y (batch, *A.range_shape).

        noise_std: one, or (batch,), of each real component; bright tissue is 1. iterations: of conjugate gradients,
        more than was trained where A is ill-conditioned, as spokes are. Raises ValueError for a negative noise_std.
        """
        return self.images(A, y, noise_std, iterations)[-1]

    def images(
        self, A: LinearOperator, y: Tensor, noise_std: float | Tensor, iterations: int | None = None
    ) -> list[Tensor]:
        """The image after the first solution and after each stage."""
        std = torch.as_tensor(noise_std, dtype=torch.float32, device=y.device).expand(len(y))
        if not (std >= 0).all():
            raise ValueError(f"noise_std is {std.tolist()}; expected 0 or more, which says how far to trust the data")
        std, sets = std.clamp_min(LEAST), A.domain_shape[0]
        many, iterations = std.repeat_interleave(sets), iterations or self.iterations
        b, z = A.H(y), y.new_zeros(len(y), *A.domain_shape)
        found = [self.consistent(A, b, z, std, 0, iterations)]
        fit, memory = AnySize(nn.Identity(), self.cnn.total_stride), None
        for k in range(self.stages):
            x = found[-1]
            features = fit.extend(torch.cat([channels(x), channels(x - z)], 1)) / SCALE
            memory = features.new_zeros(len(many), self.memory, *features.shape[2:]) if memory is None else memory
            stage = torch.full((len(many),), k, device=x.device)
            out = self.cnn(torch.cat([features, memory], 1), (many / NOISE).log() / 4, y=stage)
            change, memory = out.split([2, self.memory], 1)
            change = fit.crop(change * SCALE, x)
            z = x + torch.complex(change[:, 0], change[:, 1]).reshape(x.shape)
            found.append(self.consistent(A, b, z, std, k + 1, iterations))
        return found

    def consistent(self, A: LinearOperator, b: Tensor, z: Tensor, std: Tensor, k: int, iterations: int) -> Tensor:
        """z and the data together, weighted by their errors: (A^H A + w) x = b + w z with w = (noise_std / tau_k)^2."""
        tau = (self.log_error[k] + self.slope[k] * (std / NOISE).log()).exp()
        w = (std / tau).square().reshape(-1, 1, 1, 1)
        return z + conjugate_gradient(lambda v: A.normal(v) + w * v, b - A.normal(z), iterations=iterations)


def channels(x: Tensor) -> Tensor:
    """The real and the imaginary part of complex images (batch, set, y, x) as channels (batch * set, 2, y, x)."""
    x = x.flatten(0, 1)
    return torch.stack([x.real, x.imag], 1)
