"""Simulated 3D MRI of real volumes: few readouts along z, maps and phase from the centre of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from companion.acquisition.mri import Scan
from companion.data import anatomy
from companion.data.volumes import spacing
from companion.operators.masks import CartesianMask
from companion.operators.mri import birdcage_maps, fft, ifft, low_pass
from companion.parameters import param
from companion.randomness import randn

SUPPORT = 0.05  # share of the brightest low-resolution voxel below which coil maps are not believed
WIDE = 6.0  # voxels, standard deviation of the Gaussian that continues them


@dataclass(frozen=True)
class VolumeProtocol:
    """How a volume is scanned; a form of parameters may inherit from it."""

    coils: int = param(8, "receive coils", minimum=1)
    noise_std: float = param(0.02, "k-space noise per real component, in image units", minimum=0)
    acceleration: float = param(8, "readouts along z are made at one in so many places (y, x)", minimum=1)
    acs: int = param(12, "fully sampled centre along y and x", minimum=8)
    maps: str = param(
        "calibration",
        "coil maps and phase: from the centre of the data, or oracle, the true ones",
        choices=("calibration", "oracle"),
    )

    def acquire(self, x: Tensor, index: int, seed: int = 0) -> Scan:
        """The scan of person `index`, x (1, z, y, x): smooth phase, birdcage coils, noise, and few readouts.

        Its maps carry the phase, so that x is real.
        """
        shape, generator = tuple(x.shape[1:]), torch.Generator().manual_seed(seed + 7919 * index)
        voxel = spacing(shape)
        heights = anatomy.CENTRE_MM[2] + voxel[0] * (torch.arange(shape[0]) - (shape[0] - 1) / 2)
        phase = anatomy.PHASE_RAD * anatomy.smooth_field(anatomy.grid_mm(shape, voxel[1], heights), generator)
        true = birdcage_maps(shape, self.coils) * torch.polar(torch.ones(shape), phase)
        mask = plane_mask(shape, self.acceleration, self.acs, seed + index)
        full = fft(true * x, 3)
        y = mask.mask * (full + self.noise_std * randn(full.shape, full.dtype, generator))
        maps = true if self.maps == "oracle" else centre_maps(y, self.acs)
        return Scan(y[None], maps, mask, self.noise_std, x[None], voxel_mm=voxel, real=True)


def plane_mask(shape: Sequence[int], acceleration: float, acs: int, seed: int) -> CartesianMask:
    """A mask (z, y, x) of readouts along z at random places (y, x), the denser the nearer to the centre.

    The density falls as (1 - |k| / k_max)^2; the fully sampled square of `acs` in the centre counts towards the
    acceleration, which is reached exactly. Raises ValueError when the square alone has more samples.
    """
    height, width = shape[-2:]
    count = round(height * width / acceleration)
    distance = [((torch.arange(n) - n // 2) / (n // 2)).abs() for n in (height, width)]
    k = (distance[0][:, None].square() + distance[1].square()).sqrt() / 2**0.5
    centre = [(torch.arange(n) - n // 2 + acs // 2).clamp(-1, acs).remainder(acs + 1) < acs for n in (height, width)]
    inside = centre[0][:, None] & centre[1]
    if not inside.sum() <= count:
        raise ValueError(
            f"acceleration {acceleration} leaves {count} of {height} x {width} places, the centre alone "
            f"has {int(inside.sum())}; lower acs or the acceleration"
        )
    density = torch.where(inside, 0, (1 - k).square() + 1e-6).flatten()
    plane, more = inside.float(), count - int(inside.sum())
    if more:
        chosen = torch.multinomial(density, more, generator=torch.Generator().manual_seed(seed))
        plane.view(-1)[chosen] = 1
    return CartesianMask(
        plane.expand(shape).clone(),
        height * width / count,
        acceleration,
        count,
        acs,
        "variable density, two axes",
        seed,
    )


def centre_maps(y: Tensor, acs: int) -> Tensor:
    """Coil maps (coil, z, y, x) from the centre of k-space: low-resolution coil images, unit sum of squares.

    They carry the phase of the image, which is smooth, so that the image they leave is real. Where there is no signal
    they go on smoothly, for the data to say that there is none.
    """
    blurred = ifft(low_pass(y, acs), 3)
    size = blurred.abs().square().sum(0).sqrt()
    maps = torch.where(size > SUPPORT * size.max(), blurred / size.clamp(min=1e-12), 0)
    axes = torch.meshgrid(*[torch.fft.fftfreq(n) for n in y.shape[1:]], indexing="ij")
    distance = reduce(torch.add, [k.square() for k in axes])
    wide = torch.exp(-2 * (torch.pi * WIDE) ** 2 * distance).to(y.device)
    smooth = torch.fft.ifftn(wide * torch.fft.fftn(maps, dim=(1, 2, 3)), dim=(1, 2, 3))
    smooth = smooth / smooth.abs().square().sum(0).sqrt().clamp(min=1e-12)
    return torch.where(size > SUPPORT * size.max(), maps, smooth)
