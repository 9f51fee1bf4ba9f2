"""Attenuation from a transmission scan, and what it does to an emission scan: 5_transmission.

scan = prepare(Transmission())                          # a virtual thorax, or blank and transmission of one's own
found = map_transmission(scan.y, scan.P, scan.blank, scan.background, strength=0.01, x0=scan.fbp("hann", 0.6))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.acquisition.own_pet import Lines, placing
from companion.acquisition.pet import acquire, scanner
from companion.data.scan_geometry import Geometry
from companion.data.sinograms import read_sinograms
from companion.data.thorax import Thorax, away_from_edges, thorax
from companion.evaluation import metrics
from companion.files import project_root
from companion.operators.counts import expected_deviance, poisson_counts, poisson_deviance
from companion.operators.linear import Diagonal, LinearOperator
from companion.operators.pet import ParallelBeam, attenuation_factors
from companion.parameters import Parameters, param
from companion.reconstruction.fbp import FILTERS, fbp, transmission_integrals
from companion.reconstruction.pet import mlem
from companion.reconstruction.transmission import expected_transmission

ECAT = Geometry(192, 160, 3.375, 0.5, 412.5, 15.0, -180.0)  # the CTI ECAT EXACT: 384 detectors on a ring of 825 mm
SOFT = (0.0072, 0.0122)  # 1/mm: what is taken for water in a reconstruction


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


@dataclass(frozen=True, eq=False)
class TransmissionScan:
    """Counts y (slice, 1, angle, bin), blank scan, background or None, and projector; the truth of a virtual thorax."""

    y: Tensor
    blank: Tensor
    background: Tensor | None
    P: LinearOperator
    beam: ParallelBeam
    truth: Thorax | None = None

    def fbp(self, window: str, cutoff: float) -> Tensor:
        """The filtered back projection, 1/mm, (slice, 1, y, x)."""
        return fbp(transmission_integrals(self.y, self.blank, self.background), self.beam, window, cutoff)

    def deviance(self, mu: Tensor) -> float:
        """The deviance of the counts from what mu lets through, over what counting noise alone gives: 1 is right."""
        expected = expected_transmission(self.P, mu, self.blank, self.background)
        return (poisson_deviance(self.y, expected) / expected_deviance(expected)).mean().item()


def prepare(p: Transmission) -> TransmissionScan:
    """One's own transmission scan, or one of the virtual thorax in the geometry of an ECAT EXACT."""
    pixel_mm = 540 / p.image_size if p.pixel_mm is None else p.pixel_mm
    if p.scan is None:
        beam = ECAT.changed(p.placed).beam(p.image_size, pixel_mm)
        return prepare_simulated(p, beam, thorax(p.image_size, pixel_mm))
    file = read_sinograms(project_root() / p.scan, p.geometry and project_root() / p.geometry)
    beam = placing(file, p.image_size, pixel_mm, p.placed).beam(p.image_size, pixel_mm)
    P = scanner(beam.shape, beam.pixel_mm, beam=beam)
    y, blank, background = file.transmission(P)
    if p.background:
        background = torch.full_like(y, p.background) if background is None else background + p.background
    return TransmissionScan(y, blank, background, P, beam)


def prepare_simulated(p: Transmission, beam: ParallelBeam, truth: Thorax) -> TransmissionScan:
    """A scan of the virtual thorax: detectors of uneven efficiency without it (blank), and the counts behind it."""
    P = scanner(beam.shape, beam.pixel_mm, beam=beam)
    uneven = torch.rand(beam.bins, generator=torch.Generator().manual_seed(p.seed))
    blank = p.blank_counts * (0.7 + 0.6 * uneven).expand(1, 1, len(beam.angles), beam.bins)
    background = torch.full_like(blank, p.background) if p.background else None
    y = poisson_counts(expected_transmission(P, truth.mu, blank, background), [p.seed])
    return TransmissionScan(y, blank, background, P, beam, truth)


def water_of(mu: Tensor, pixel_mm: float) -> Tensor:
    """The mask (1, 1, y, x) of what a reconstruction shows as water, its edges peeled off."""
    return away_from_edges((mu > SOFT[0]) & (mu < SOFT[1]), pixel_mm)


def table(scan: TransmissionScan, images: Mapping[str, Tensor], water: Tensor) -> list[dict]:
    """A line for each reconstruction: deviance, mean and spread of mu in water (1/cm), error if the truth is known."""
    lines = []
    for name, mu in images.items():
        inside = 10 * mu[water.expand_as(mu)]
        line = {
            "method": name,
            "deviance / expected": scan.deviance(mu.clamp(min=0)),
            "water (1/cm)": inside.mean().item(),
            "off 0.096 (%)": 100 * (inside.mean().item() / 0.096 - 1),
            "noise in water (%)": 100 * (inside.std() / inside.mean()).item(),
        }
        if scan.truth is not None:
            line["NRMSE"] = metrics.nrmse(mu, scan.truth.mu).item()
        lines.append(line)
    return lines


def emission_table(scan: TransmissionScan, maps: Mapping[str, Tensor], counts: float, seed: int = 0) -> list[dict]:
    """What attenuation maps do to an emission scan of the virtual thorax: bias of heart, lungs and body, %, by MLEM.

    All are of one scan, attenuated by the true map; "none" leaves attenuation out of the model.
    """
    truth, beam = scan.truth, scan.beam
    emission = acquire(truth.activity, truth.mu, counts, [seed + 1], pixel_mm=beam.pixel_mm, beam=beam)
    calibration = counts / scanner(beam.shape, beam.pixel_mm, truth.mu, beam=beam)(truth.activity).sum()
    regions = {
        name: (truth.activity - level).abs() < 1e-3  # pixels of one tissue
        for name, level in (("heart", 20.0), ("lungs", 1.5), ("body", 3.0))
    }
    lines = []
    for name, mu in maps.items():
        factors = calibration * (attenuation_factors(scan.P, mu.clamp(min=0)) if mu is not None else 1.0)
        A = Diagonal(torch.as_tensor(factors).expand(1, *scan.P.range_shape), scan.P.range_shape) @ scan.P
        x = mlem(emission.y, A, iterations=30).x
        bias = {f"{k} (%)": 100 * (x[m].mean() / truth.activity[m].mean() - 1).item() for k, m in regions.items()}
        lines.append({"attenuation from": name} | bias)
    return lines
