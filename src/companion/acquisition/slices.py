"""One slice of a head scanned here: k-space as receive coils would see it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor

from companion.data import anatomy
from companion.data.axial import canonical
from companion.data.intake.records import Volume
from companion.data.raw.scan import RawScan, raw_scan
from companion.operators.mri import birdcage_maps, fft
from companion.randomness import randn


def head(volume: Volume) -> Tensor:
    """Complex axial slices (slice, 1, y, x) of a volume from below up, nose up, sides of a multiple of 8 pixels.

    1 is the 99th percentile of the tissue; the phase is smooth.
    """
    signal, _ = canonical(volume.array, volume.affine)
    bright = np.percentile(signal[signal > 0.08 * np.percentile(signal, 99.9)], 99)
    x = torch.from_numpy((signal / bright).astype(np.float32)).permute(2, 1, 0).flip(1)[:, None]
    height, width = (-n % 8 for n in x.shape[-2:])
    x = torch.nn.functional.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
    return anatomy.random_phase(x, Generator().manual_seed(0))


def simulated(x: Tensor, coils: int, noise_std: float, voxel_mm: tuple[float, float, float], seed: int = 0) -> RawScan:
    """All of the k-space of a complex slice x (1, 1, y, x), as receive coils see it, with noise."""
    k = fft(birdcage_maps(x.shape[-2:], coils) * x)
    noise = randn(k.shape, k.dtype, Generator().manual_seed(seed))
    return raw_scan("simulated", k + noise_std * noise, voxel_mm=voxel_mm)


def centred_affine(voxel_mm: tuple[float, float, float] | None, shape) -> np.ndarray:
    """The affine of a slice of `shape` (y, x), y downwards, its middle at 0; voxels of 1 mm where none are known."""
    z, y, x = voxel_mm or (1.0, 1.0, 1.0)
    affine = np.diag([x, -y, z, 1.0])
    affine[:2, 3] = -x * (shape[1] - 1) / 2, y * (shape[0] - 1) / 2
    return affine
