"""Multi-coil MRI scans: simulated, or undersampled from measured k-space, in the intensity units of a prior.

Honest unless a `Protocol` says otherwise: coil maps come from a calibration scan or the centre lines, never from fully
sampled data, and the intensity scale is found from the data, not set.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from companion.data import fastmri
from companion.operators.linear import LinearOperator
from companion.operators.masks import CartesianMask, cartesian_mask, centre_lines
from companion.operators.mri import (
    birdcage_maps,
    coil_maps,
    combine,
    estimate_maps,
    estimate_noise,
    fft,
    ifft,
    low_pass,
    sense,
)
from companion.operators.real import RealImages
from companion.operators.solve import conjugate_gradient
from companion.parameters import param
from companion.randomness import randn

LEAST_CENTRE = 12  # lines of a k-space centre whose low-resolution image tells the brightness
AS_MEASURED = "as measured"  # kind of the mask of a file that is undersampled already
REFERENCE_ACS = 24  # centre of fully sampled data from which the maps of the reference image come

# (frames, y, x) -> images (person, frame, 1, y, x) in the units of a prior: how bright people are there
Examples = Callable[[tuple[int, int, int]], Tensor]


@dataclass(frozen=True, eq=False)
class Scan:
    """y = A x + noise, slice by slice; a 3D scan is one slice with three axes of space."""

    y: Tensor  # (slice, coil, *space), zero where not measured
    maps: Tensor  # (coil, *space) for all slices, or (slice, coil, *space)
    mask: CartesianMask  # (*space) or its last axes, or (slice, 1, *space)
    noise_std: float  # per real component
    x: Tensor | None = None  # truth (slice, 1, *space), if known, in the units of y
    name: str = ""
    scale: float = 1.0  # multiplied raw data
    voxel_mm: tuple[float, ...] | None = None  # (z, y, x)
    real: bool = False  # x is real: its phase is in the maps

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one slice: (1, *space)."""
        return (1, *self.y.shape[2:])

    @property
    def truth(self) -> Tensor:
        """x, where it is known; ValueError for a scan of somebody."""
        if self.x is None:
            raise ValueError(
                f"the true image of {self.name or 'this scan'} is not known; scan a virtual person to compare"
            )
        return self.x

    @property
    def A(self) -> LinearOperator:
        """From all slices at once, (slice, 1, *space), to k-space."""
        return self._operator(self.maps, self.mask.mask)

    def operator(self, i: int) -> LinearOperator:
        """From slice i alone, (1, 1, *space), to its k-space."""
        maps, lines = self.maps, self.mask.mask
        return self._operator(
            maps[i] if maps.ndim == self.y.ndim else maps, lines[i, 0] if lines.ndim == self.y.ndim else lines
        )

    def _operator(self, maps: Tensor, lines: Tensor) -> LinearOperator:
        A = sense(maps, lines, ndim=self.y.ndim - 2)
        return A @ RealImages(self.shape) if self.real else A

    def one(self, i: int) -> Scan:
        """The scan of slice i alone."""
        maps, lines = self.maps, self.mask.mask
        return replace(
            self,
            y=self.y[i : i + 1],
            maps=maps[i : i + 1] if maps.ndim == self.y.ndim else maps,
            mask=replace(self.mask, mask=lines[i : i + 1]) if lines.ndim == self.y.ndim else self.mask,
            x=None if self.x is None else self.x[i : i + 1],
        )

    def to(self, device: str | torch.device) -> Scan:
        """The same with its tensors on another device."""
        x = None if self.x is None else self.x.to(device)
        return replace(self, y=self.y.to(device), maps=self.maps.to(device), x=x)


def acquire(x: Tensor, maps: Tensor, mask: CartesianMask, noise_std: float, seed: int) -> Scan:
    """The scan of slices x (slice, 1, *space) in their own units, with the true coil maps."""
    A = sense(maps, mask, ndim=x.ndim - 2)
    noise = randn((len(x), *A.range_shape), x.dtype, torch.Generator().manual_seed(seed), x.device)
    return Scan(A(x) + noise_std * A.mask(noise), maps, mask, noise_std, x)


def with_estimated_maps(scan: Scan) -> Scan:
    """The scan with ESPIRiT maps from its own centre lines instead of those it has."""
    return replace(scan, maps=estimate_maps(scan.y, scan.mask.acs))


@dataclass(frozen=True)
class Protocol:
    """What is measured of each slice, and how maps and scale are found; a form of parameters may inherit from it."""

    acceleration: float = param(8, "nominal acceleration R", minimum=1)
    mask: str = param("equispaced", "lines that are measured", choices=("equispaced", "random", "variable_density"))
    interleave: bool = param(True, "neighbouring slices measure different lines: context brings what is missing")
    acs: int = param(0, "fully sampled centre lines", minimum=0)
    maps: str = param(
        "calibration",
        "coil maps: from a low-resolution calibration scan; from the acs lines; oracle, the true ones, as in the paper",
        choices=("calibration", "acs", "oracle"),
    )
    calibration: int = param(16, "width of the calibration scan, samples", minimum=12)
    scale: float | None = param(
        None,
        "peak of the zero-filled image in units of the prior, by hand as in the paper; none: found from the data",
        minimum=1e-6,
    )

    def lines(self, width: int, frames: int, seed: int) -> CartesianMask:
        """Which lines are measured: (x,) for all slices, or interleaved (frame, 1, 1, x), others in each.

        Equispaced lines move on by about 0.38 R from slice to slice, so that neighbours share none and a few slices
        together measure all; those of the first slice hold the centre of k-space, without which contrast is anybody's
        guess. Random ones are drawn anew. The centre lines stay.
        """
        one = cartesian_mask(width, self.acceleration, self.mask, acs=self.acs, seed=seed)
        if not self.interleave or frames == 1:
            return one
        period = max(1, round(self.acceleration))
        step = next(s for s in range(round(0.38 * period) or 1, period + 1) if math.gcd(s, period) == 1)
        centre = slice(width // 2 - self.acs // 2, width // 2 - self.acs // 2 + self.acs)
        rows = []
        for n in range(frames):
            row = cartesian_mask(width, self.acceleration, self.mask, seed=seed + n).mask
            row = row.roll((width // 2 + n * step) % period) if self.mask == "equispaced" else row
            row[centre] = 1
            rows.append(row)
        masks = torch.stack(rows)[:, None, None]
        return replace(one, mask=masks, acceleration=masks.numel() / masks.sum().item(), lines=int(rows[0].sum()))


def simulate(
    x: Tensor,
    protocol: Protocol,
    mask: CartesianMask,
    like: Examples | None,
    *,
    coils: int,
    noise_std: float,
    generator: torch.Generator,
    name: str = "",
    voxel_mm: tuple[float, ...] | None = None,
) -> Scan:
    """The scan of slices x (frame, 1, y, x) in raw units nobody knows, prepared as measured data are by `undersampled`.

    noise_std: of k-space, per real component, in the units of x.
    """
    S = birdcage_maps(x.shape[-2:], coils)
    gain = 10 ** (-3 - 3 * torch.rand((), generator=generator).item())
    kspace, calibration = (
        gain * (fft(S * x) + noise_std * randn((len(x), *S.shape), x.dtype, generator)) for _ in range(2)
    )
    oracle = S.expand(len(x), *S.shape) if protocol.maps == "oracle" else None
    found = undersampled(
        name, kspace, protocol, mask, like, calibration, gain * noise_std, x=gain * x, oracle=oracle, voxel_mm=voxel_mm
    )
    return replace(found, x=found.truth * phase_alignment(S, found.maps))


def phase_alignment(true: Tensor, found: Tensor) -> Tensor:
    """The phase factor, magnitude 1, by which images that belong to found maps differ from those of true maps.

    The phase of an image and that of its maps are exchangeable; ESPIRiT gives the first coil none.
    """
    common = (found.conj() * true).sum(-3, keepdim=True)
    return torch.where(common == 0, 1, common.sgn())


def undersampled(
    name: str,
    kspace: Tensor,
    protocol: Protocol,
    mask: CartesianMask,
    like: Examples | None,
    calibration: Tensor,
    noise_std: float,
    *,
    x: Tensor | None = None,
    oracle: Tensor | None = None,
    voxel_mm: tuple[float, ...] | None = None,
) -> Scan:
    """The scan that raw k-space (frame, coil, y, x) is, undersampled by `mask`, with maps and in units of a prior.

    calibration: k-space of the calibration scan, of which only the centre is read. oracle: maps to use as they are.
    like: people in the units of the prior; needed unless the protocol sets the scale. Raises ValueError, with `name`,
    for data without signal and for a centre too small for maps.
    """
    y = kspace * mask.mask
    if not y.any():
        raise ValueError(f"{name}: all measured samples are zero; check the file and its mask")
    centre, width = (calibration, protocol.calibration) if protocol.maps == "calibration" else (y, protocol.acs)
    width = min(width, *kspace.shape[-2:])
    try:
        maps = coil_maps(centre, width) if oracle is None else oracle
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if protocol.scale is not None:
        scale = protocol.scale / peak(sense(maps, mask).H(y))
    elif like is None:
        raise ValueError(f"{name}: give a scale, or `like`, images of the scale that the prior knows, to find it by")
    else:
        scale = _found_scale(y, maps, mask, centre, width, like((len(y[::3]), y.shape[-2], y.shape[-1])))
    return Scan(y=scale * y, maps=maps, mask=mask, noise_std=scale * noise_std, x=None if x is None else scale * x,
                name=name, scale=scale, voxel_mm=voxel_mm)  # fmt: skip


def _found_scale(y: Tensor, maps: Tensor, mask: CartesianMask, centre: Tensor, width: int, people: Tensor) -> float:
    """The factor that brings y to the units of `people`, who are seen as blurred or as folded as y is."""
    if width >= LEAST_CENTRE:
        return intensity_scale(combine(low_pass(centre, width), maps), ifft(low_pass(fft(people), width)))
    some = mask.mask if mask.mask.ndim == 1 else mask.mask[::3]
    seen = torch.cat([_least_squares(fft(maps[::3] * x) * some, maps[::3], some) for x in people])
    return intensity_scale(_least_squares(y[::3] / peak(y), maps[::3], some), seen) / peak(y)


def _least_squares(y: Tensor, maps: Tensor, mask: Tensor) -> Tensor:
    A = sense(maps, mask)
    return conjugate_gradient(lambda x: A.normal(x) + 0.01 * x, A.H(y), iterations=50, tol=1e-6)


def peak(x: Tensor) -> float:
    """The largest magnitude of a volume."""
    return x.abs().max().item()


def intensity_scale(x: Tensor, like: Tensor) -> float:
    """The factor that makes images x as bright as images `like`: 99 % of the pixels are below the same value.

    `like` are other people in the units of the prior, seen with the same blur or folding as x, which cost brightness.
    """
    level, wanted = (torch.quantile(images.abs().flatten()[: 2**24], 0.99).item() for images in (x, like))
    if not level > 0:
        raise ValueError("the calibration image is empty, so the intensity scale cannot be found; give scale")
    return wanted / level


def read_fastmri(
    path: str | os.PathLike, protocol: Protocol, like: Examples | None, *, frames: int | None = None, seed: int = 0
) -> Scan:
    """The scan of a fastMRI file, its first `frames` slices: fully sampled files are undersampled by the protocol.

    Others are taken as they are, with maps from their centre lines. The truth of a fully sampled file is its coil
    combination with maps from the centre of all the data.
    """
    file = fastmri.open_volume(path)
    raw = file.read(slice(0, frames))
    noise_std = estimate_noise(raw)
    kspace, name = file.crop(raw), file.path.stem
    width = kspace.shape[-1]
    if file.mask is not None:
        acs, lines = centre_lines(file.mask), int(file.mask.sum())
        mask = CartesianMask(file.mask, width / lines, width / lines, lines, acs, AS_MEASURED, seed)
        measured = Protocol(maps="acs", acs=acs, scale=protocol.scale)
        return undersampled(name, kspace, measured, mask, like, kspace, noise_std, voxel_mm=file.voxel_mm)
    best = coil_maps(kspace, min(REFERENCE_ACS, *kspace.shape[-2:]))
    return undersampled(
        name,
        kspace,
        protocol,
        protocol.lines(width, len(kspace), seed),
        like,
        kspace,
        noise_std,
        x=combine(kspace, best),
        oracle=best if protocol.maps == "oracle" else None,
        voxel_mm=file.voxel_mm,
    )
