"""Measurements off the grid: noise, coil maps, units and, for radial scans, the delay of the gradients.

Samples are (coil, ...) with a trajectory (..., axis) in cycles per field of view, see `operators.noncartesian`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from companion.acquisition.maps import espirit, low_resolution
from companion.acquisition.measurement import Found, Measurement, bright, compression
from companion.acquisition.noise import Noise, mix, noise_of_samples, noise_of_scan
from companion.operators.mri import Shape, fft
from companion.operators.noncartesian import NUFFT, density_compensation, noncartesian_sense, radial_trajectory
from companion.operators.solve import conjugate_gradient

CENTRE = 24  # samples of the gridded centre that coil maps come from


def prepare_trajectory(
    samples: Tensor,
    trajectory: Tensor,
    shape: Shape,
    *,
    noise: Noise | Tensor | None = None,
    coils: int | None = None,
    sets: int | None = None,
    centre: int = CENTRE,
    brightness: float | None = 1.0,
) -> Measurement:
    """The measurement that samples `(coil, ...)` along a trajectory `(..., axis)` are, for images of `shape`.

    trajectory: cycles per field of view of `shape`, axes (y, x) or (z, y, x); samples beyond what `shape` resolves are
    left out. noise, coils, sets, brightness: as for `prepare_kspace`; the edges are the samples furthest out. Coil
    maps come from the centre of k-space, gridded by least squares to `centre` samples along each axis.
    Raises ValueError as `prepare_kspace` does.
    """
    ndim = len(shape)
    k, y = trajectory.reshape(-1, ndim).float(), samples.reshape(len(samples), -1).to(torch.complex64)
    if len(k) != y.shape[1]:
        raise ValueError(f"{y.shape[1]} samples but a trajectory of {len(k)}; give one position a sample")
    inside = (k.abs() <= torch.tensor(shape) / 2).all(1)
    k, y = k[inside], y[:, inside]
    if not isinstance(noise, Noise):
        noise = noise_of_samples(y, (k / torch.tensor(shape)).norm(dim=1)) if noise is None else noise_of_scan(noise)
    matrix, kept = compression(y, noise, coils, 1)
    y = mix(matrix, y, 1)
    box = gridded_centre(y, k, shape, centre)
    found = espirit(box, shape, sets, noise_std=1.0)
    image = (found.maps[0].conj() * low_resolution(box, shape, None)).sum(0)
    scale = 1.0 if brightness is None else brightness / bright(image)
    A = noncartesian_sense(found.maps, k, ndim)
    measured = len(k) / torch.tensor(shape).prod().item()
    told = Found(noise, len(samples), len(matrix), kept, None, None, found.folded, len(found.maps), measured, matrix)
    return Measurement(scale * y[None], A, scale, scale, found.maps[None], told)


def gridded_centre(y: Tensor, trajectory: Tensor, shape: Shape, width: int = CENTRE, iterations: int = 20) -> Tensor:
    """The centre (coil, *width) of Cartesian k-space that samples y (coil, sample) have, by density-weighted CG."""
    box = tuple(min(width, n) for n in shape)
    near = (trajectory.abs() <= torch.tensor(box) / 2).all(1)
    k, data = trajectory[near], y[:, near]
    w = density_compensation(k, box)
    F = NUFFT(k, (len(y), *box))
    b = F.adjoint(w * data)
    images = conjugate_gradient(
        lambda x: F.adjoint(w * F.forward(x)) + 1e-3 * x, b, iterations=iterations, item_ndim=len(box)
    )
    return fft(images, len(box))


def gradient_delay(
    samples: Tensor, angles: Tensor, reach: float = 1.5, step: float = 0.02, partners: int = 8
) -> Tensor:
    """The delay S (2, 2), symmetric, axes (y, x), in samples, of radial spokes `(coil, spoke, sample)`; see
    `radial_trajectory`.

    Two spokes of directions n and m meet where t n + S n = u m + S m, and there they measured the same, but
    for a phase that eddy currents may give a whole spoke: for pairs at
    wide angles, (t, u) is the pair of positions within `reach` samples of the centre at which all coils agree best, on
    a grid of `step`; S is the least-squares fit to all meetings, without the worst fifth.
    angles: (spoke,) radians. Rosenzweig, Holme & Uecker 2019 (RING).
    """
    direction = torch.stack([angles.sin(), angles.cos()], -1).double()
    count = round(reach / step)
    t = torch.arange(-count, count + 1) * step
    near = _interpolated(samples, t)  # (spoke, coil, position)
    rows, values, misfits = [], [], []
    for a, b in _pairs(direction, partners):
        u, v = near[a], near[b]
        difference = u.abs().square().sum(0)[:, None] + v.abs().square().sum(0) - 2 * (u.mH @ v).abs()
        best = torch.argmin(difference)
        i, j = best // len(t), best % len(t)
        turn = direction[b] - direction[a]  # S turn = t_i n_a - t_j n_b, S = ((p, q), (q, r))
        rows.append(torch.stack([torch.stack([turn[0], turn[1], 0 * turn[0]]), torch.stack([0 * turn[0], *turn])]))
        values.append(t[i] * direction[a] - t[j] * direction[b])
        misfits.append(difference[i, j] / difference.mean())
    rows, values = torch.stack(rows), torch.stack(values)  # (pair, 2, 3), (pair, 2)
    kept = torch.ones(len(rows), dtype=torch.bool)
    fit = rows.new_zeros(3)
    for _ in range(3):
        fit = torch.linalg.lstsq(rows[kept].flatten(0, 1), values[kept].flatten()[:, None]).solution[:, 0]
        error = (rows @ fit - values).norm(dim=1)
        kept = error <= torch.quantile(error, 0.8)
    p, q, r = fit.tolist()
    return torch.tensor([[p, q], [q, r]])


def _pairs(direction: Tensor, partners: int) -> list[tuple[int, int]]:
    """Pairs of spokes that cross at 60 degrees or more, `partners` for each spoke, spread over all others."""
    wide = (direction @ direction.mT).abs() <= 0.5
    pairs = []
    for a in range(len(direction)):
        others = wide[a].nonzero()[:, 0].tolist()
        chosen = others[:: max(1, len(others) // partners)][:partners]
        pairs += [(a, b) for b in chosen]
    return pairs


def _interpolated(samples: Tensor, positions: Tensor) -> Tensor:
    """Spokes (coil, spoke, sample) at positions in samples from the centre, band-limited: (spoke, coil, position)."""
    n = samples.shape[-1]
    r = torch.arange(n) - n // 2
    waves = torch.exp(-2j * torch.pi * torch.outer(r, positions.double()) / n).to(samples.dtype) / n
    profile = torch.fft.fftshift(torch.fft.ifft(torch.fft.ifftshift(samples, -1), dim=-1), -1) * n
    return (profile @ waves).movedim(1, 0)


def radial_angles(spokes: int, turn: float = 2 * torch.pi) -> Tensor:
    """Angles (spoke,) that divide a turn evenly: 2 pi for a full circle, pi for a half."""
    return turn * torch.arange(spokes) / spokes


def prepare_radial(samples: Tensor, angles: Tensor, shape: Shape, oversampling: float = 2.0, **options) -> tuple:
    """The measurement of radial spokes `(coil, spoke, sample)`, delays corrected, and the delay S that was found.

    oversampling: field of view of the readout / that of `shape`, square. options: of `prepare_trajectory`.
    """
    width = samples.shape[-1] / oversampling
    delay = gradient_delay(samples, angles)
    k = radial_trajectory(angles, samples.shape[-1], width, delay)
    return prepare_trajectory(samples, k, shape, **options), delay
