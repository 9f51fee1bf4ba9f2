"""Attenuation from a transmission scan, and what it does to an emission scan: 5_transmission.

scan = prepare(Transmission())                          # a virtual thorax, or blank and transmission of one's own
found = map_transmission(scan.y, scan.P, scan.blank, scan.background, strength=0.01, x0=scan.fbp("hann", 0.6))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from companion.acquisition.own_pet import Lines, placing
from companion.acquisition.pet import scanner
from companion.data.sinograms import read_sinograms
from companion.data.thorax import thorax
from companion.files import project_root
from companion.parameters import Parameters, param
from companion.reconstruction.fbp import FILTERS
from companion.reconstruction.transmission import ECAT, TransmissionScan, simulated_transmission


@dataclass(frozen=True)
class Transmission(Lines, Parameters):
    """Parameters of pet/5_transmission.ipynb."""

    scan: str | None = param(
        None, "counts and blank scan: .npz, or a .json that names raw arrays; none: a virtual thorax, simulated"
    )
    image_size: int = param(128, "pixels along y and x", minimum=16)
    pixel_mm: float | None = param(4.21875, "of the image; none: 540 mm over image_size", minimum=1e-2)
    blank_counts: float = param(57.0, "of the virtual scan: mean counts of a bin without the body", minimum=1)
    background: float = param(
        0.0, "counts of a bin that went another way (scatter, randoms), uniform, known to the model", minimum=0
    )
    window: str = param("hann", "on the ramp of the filtered back projection", choices=tuple(FILTERS))
    cutoff: float = param(0.6, "of that window, of the bins' Nyquist frequency", minimum=0.05, maximum=1)
    strengths: tuple[float, ...] = param((0.003, 0.01, 0.03), "of the relative difference prior, each tried", minimum=0)
    chosen: float = param(0.01, "strength that the posterior and the attenuation factors are of", minimum=1e-6)
    iterations: int = param(60, "of each reconstruction, at most", minimum=1)
    draws: int = param(8, "of the posterior", minimum=2)
    emission_counts: float = param(1e6, "of the emission scan of the virtual thorax", minimum=1)


def prepare(p: Transmission) -> TransmissionScan:
    """One's own transmission scan, or one of the virtual thorax in the geometry of an ECAT EXACT."""
    pixel_mm = 540 / p.image_size if p.pixel_mm is None else p.pixel_mm
    if p.scan is None:
        beam = ECAT.changed(p.placed).beam(p.image_size, pixel_mm)
        return simulated_transmission(beam, thorax(p.image_size, pixel_mm), p.blank_counts, p.background, p.seed)
    file = read_sinograms(project_root() / p.scan, p.geometry and project_root() / p.geometry)
    beam = placing(file, p.image_size, pixel_mm, p.placed).beam(p.image_size, pixel_mm)
    P = scanner(beam.shape, beam.pixel_mm, beam=beam)
    y, blank, background = file.transmission(P)
    if p.background:
        background = torch.full_like(y, p.background) if background is None else background + p.background
    return TransmissionScan(y, blank, background, P, beam)
