"""Attenuation from a transmission scan: y ~ Poisson(blank exp(-A mu) + background), mu in 1/mm.

    found = map_transmission(y, P, blank, strength=0.1, x0=fbp(transmission_integrals(y, blank), beam, "hann"))
    factors = attenuation_factors(P, found.x)  # of an emission scan

y counts `(batch, 1, [z,] angle, bin)`, blank the expected counts without a body, P the projector. An item's result does
not depend on the others in its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from companion.acquisition.pet import acquire, scanner
from companion.data.scan_geometry import Geometry
from companion.data.thorax import Thorax, away_from_edges
from companion.evaluation import metrics
from companion.operators.counts import expected_deviance, poisson_counts, poisson_deviance
from companion.operators.linear import Diagonal, LinearOperator, check_finite
from companion.operators.pet import ParallelBeam, attenuation_factors, sensitivity
from companion.operators.solve import conjugate_gradient
from companion.randomness import randn
from companion.reconstruction.fbp import fbp, transmission_integrals
from companion.reconstruction.pet import Reconstruction, _data, _like, _norm, mlem, relative_difference

TOGETHER = 32  # draws that are solved for in one batch; each alone comes out the same, to rounding
SHORT = 1e-2  # line integrals below this have the curvature of 0, which is its limit


def expected_transmission(A: LinearOperator, mu: Tensor, blank: Tensor, background: Tensor | None = None) -> Tensor:
    """blank exp(-A mu) + background, the expected counts."""
    through = blank * (-A(mu)).exp()
    return through if background is None else through + background


@torch.no_grad()
def map_transmission(
    y: Tensor,
    A: LinearOperator,
    blank: Tensor,
    background: Tensor | None = None,
    *,
    strength: float = 0.0,
    gamma: float = 2.0,
    iterations: int = 200,
    x0: Tensor | None = None,
    tol: float = 1e-4,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Reconstruction:
    """The maximum of log likelihood - strength * mean(A^T y) * relative difference prior; of the likelihood with 0.

    Separable paraboloidal surrogates with optimal curvatures, of which each step climbs (Erdogan and Fessler, Phys Med
    Biol 1999), the prior's curvature added to theirs; steps are lengthened where that goes well, and halved where the
    objective would fall, so it never does. Scaled by the counts, `strength` means the same at every dose. An item stops
    once |change| <= tol |x|. x0: a start, not negative; by default uniform. Raises ValueError for data that are no
    counts, of another geometry, or counted where blank and background are 0.
    """
    y, background = _data(y, A, background, False)
    blank = _blank(y, blank, background)
    if not strength >= 0 or not gamma >= 0:
        raise ValueError(f"strength and gamma must not be negative, got {strength} and {gamma}")
    ndim, reach = len(A.domain_shape) - 1, A(y.new_ones(1, *A.domain_shape))
    seen = sensitivity(A, y.dtype, y.device) > 0
    weight = strength * A.H(y).mean(tuple(range(1, ndim + 2)), keepdim=True)
    x = _uniform(y, A, blank, reach) if x0 is None else x0.to(y).clamp(min=0)
    x = x.expand(len(y), *A.domain_shape) * seen

    def objective(x: Tensor, through: Tensor):
        expected = through if background is None else through + background
        prior, slope, curvature = relative_difference(x, gamma, ndim)
        fit = (torch.xlogy(y, expected) - expected).double().flatten(1).sum(1)
        return fit - weight.double().flatten() * prior, slope, curvature, expected

    lengths = A(x)
    through = blank * (-lengths).exp()
    value, slope, curvature, expected = objective(x, through)
    active = torch.ones(len(y), dtype=torch.bool, device=y.device)
    taken = torch.zeros(len(y), dtype=torch.int64, device=y.device)
    step = torch.ones(len(y), dtype=y.dtype, device=y.device)
    for k in range(1, iterations + 1):
        gradient = torch.where(seen, A.H(through * (1 - y / expected.clamp(min=1e-20))) - weight * slope, 0.0)
        bend = A.H(surrogate_curvature(y, lengths, blank, background) * reach) + 2 * weight * curvature
        direction = gradient / bend.clamp(min=1e-20)
        step = torch.where(active, (1.5 * step).clamp(max=4.0), 0.0)
        tries = 0
        while True:
            tries += 1
            new = (x + _like(step, x) * direction).clamp(min=0)
            new_lengths = A(new)
            new_through = blank * (-new_lengths).exp()
            new_value, new_slope, new_curvature, new_expected = objective(new, new_through)
            failed = active & ~(new_value >= value)
            if tries == 12 or not failed.any():
                break
            step = torch.where(failed, step / 2, step)
        better = active & ~failed
        taken += better
        active = better & (_norm(new - x) > tol * _norm(x))
        keep, kept = _like(better, x), _like(better, y)
        x, lengths, through = torch.where(keep, new, x), torch.where(kept, new_lengths, lengths), torch.where(
            kept, new_through, through
        )  # fmt: skip
        slope, curvature = torch.where(keep, new_slope, slope), torch.where(keep, new_curvature, curvature)
        expected, value = torch.where(kept, new_expected, expected), torch.where(better, new_value, value)
        if callback is not None:
            callback(k, x)
        if not active.any():
            break
    return Reconstruction(x, taken)


def surrogate_curvature(y: Tensor, lengths: Tensor, blank: Tensor, background: Tensor | None = None) -> Tensor:
    """The least curvature of a parabola in each line integral that lies below the likelihood and touches it, like y.

    2 (f(0) - f(l) + l f'(l)) / l^2 of f(l) = blank exp(-l) + r - y log(blank exp(-l) + r), not negative; f''(0) at
    l = 0. Erdogan and Fessler, IEEE TMI 1999, eq. (28).
    """
    y, lengths, blank = y.double(), lengths.double(), blank.double()
    r = torch.zeros_like(y) if background is None else background.double()

    def cost(through: Tensor) -> Tensor:
        return through + r - torch.xlogy(y, through + r)

    through = blank * (-lengths).exp()
    slope = through * (y / (through + r).clamp(min=1e-20) - 1)
    parabola = 2 * (cost(blank) - cost(through) + lengths * slope) / lengths.clamp(min=SHORT).square()
    at_zero = blank * (1 - y * r / (blank + r).clamp(min=1e-20).square())
    return torch.where(lengths > SHORT, parabola, at_zero).clamp(min=0).to(torch.float32)


@torch.no_grad()
def laplace_draws(
    mu: Tensor,
    y: Tensor,
    A: LinearOperator,
    blank: Tensor,
    background: Tensor | None = None,
    *,
    strength: float,
    seeds: Sequence[int],
    gamma: float = 2.0,
    iterations: int = 60,
) -> Tensor:
    """Draws (draw, 1, y, x) from the Gaussian that the posterior of one slice looks like around its maximum mu.

    Its precision is A^T W A, W the information of the counts on each line, and the prior's pairwise curvatures at mu:
    what `map_transmission` assumes, and no more. It knows no anatomy, and values are not held above 0. A draw solves
    precision * z = A^T W^(1/2) e + D^T w^(1/2) e' by conjugate gradients (perturb and optimise: Papandreou and Yuille
    2010). Raises ValueError for more than one slice.
    """
    if len(mu) != 1 or mu.ndim != 4:
        raise ValueError(f"one slice (1, 1, y, x) at a time, got {tuple(mu.shape)}")
    y, background = _data(y, A, background, False)
    through = _blank(y, blank, background) * (-A(mu)).exp()
    information = through.square() / (through if background is None else through + background).clamp(min=1e-20)
    weight = strength * A.H(y).mean()
    pairs = _pairs(mu, gamma)

    def precision(z: Tensor) -> Tensor:
        out = A.H(information * A(z))
        for here, there, curvature in pairs:
            pull = weight * curvature * (z[here] - z[there])
            out[here] += pull
            out[there] -= pull
        return out

    rights = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(int(seed))
        right = A.H(information.sqrt() * randn(y.shape, torch.float32, generator).to(y))
        for here, there, curvature in pairs:
            push = (weight * curvature).sqrt() * randn(curvature.shape, torch.float32, generator).to(y)
            right[here] += push
            right[there] -= push
        rights.append(right)
    draws = [
        conjugate_gradient(precision, b, iterations=iterations, tol=1e-3) for b in torch.cat(rights).split(TOGETHER)
    ]
    return mu + torch.cat(draws)


def _pairs(x: Tensor, gamma: float) -> list[tuple]:
    """Slices of both neighbours, and the relative difference prior's curvature in their difference, right and below."""
    tiny, pairs = 1e-2 * x.mean() + 1e-30, []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        height, width = x.shape[-2:]
        here = (..., slice(0, height - dy), slice(max(0, -dx), width - max(0, dx)))
        there = (..., slice(dy, height), slice(max(0, dx), width - max(0, -dx)))
        a, b = x[here], x[there]
        scale = a + b + gamma * (a - b).abs() + tiny
        pairs.append((here, there, 2 * (dy * dy + dx * dx) ** -0.5 * (a + b + tiny) ** 2 / scale**3))
    return pairs


def _blank(y: Tensor, blank: Tensor, background: Tensor | None) -> Tensor:
    check_finite(blank, "blank")
    if (blank < 0).any():
        raise ValueError(f"the blank scan must not be negative, got {blank.min():.4g} expected counts")
    blank = torch.as_tensor(blank).to(y).expand(y.shape)
    allowed = blank if background is None else blank + background
    if wrong := int(((y > 0) & (allowed <= 0)).sum()):
        raise ValueError(f"counts in {wrong} bins where blank and background are 0; set them to 0 if the bins are dead")
    return blank


def _uniform(y: Tensor, A: LinearOperator, blank: Tensor, reach: Tensor) -> Tensor:
    """The uniform mu that lets through about as many counts as were measured."""
    ratio = (blank.flatten(1).sum(1) / y.flatten(1).sum(1).clamp(min=1)).log().clamp(min=1e-3)
    level = ratio / reach.mean()
    return _like(level, y.new_empty(len(y), *A.domain_shape)).expand(len(y), *A.domain_shape)


ECAT = Geometry(192, 160, 3.375, 0.5, 412.5, 15.0, -180.0)  # the CTI ECAT EXACT: 384 detectors on a ring of 825 mm
SOFT = (0.0072, 0.0122)  # 1/mm: what is taken for water in a reconstruction


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


def simulated_transmission(
    beam: ParallelBeam, truth: Thorax, blank_counts: float, background: float = 0.0, seed: int = 0
) -> TransmissionScan:
    """A scan of a virtual thorax: detectors of uneven efficiency without it (blank), and the counts behind it.

    blank_counts, background: mean counts of a bin without the body, and those of photons that went another way.
    """
    P = scanner(beam.shape, beam.pixel_mm, beam=beam)
    uneven = torch.rand(beam.bins, generator=torch.Generator().manual_seed(seed))
    blank = blank_counts * (0.7 + 0.6 * uneven).expand(1, 1, *beam.sinogram_shape[-2:])
    known = torch.full_like(blank, background) if background else None
    y = poisson_counts(expected_transmission(P, truth.mu, blank, known), [seed])
    return TransmissionScan(y, blank, known, P, beam, truth)


def water_of(mu: Tensor, pixel_mm: float) -> Tensor:
    """The mask (1, 1, y, x) of what a reconstruction shows as water, its edges peeled off."""
    return away_from_edges((mu > SOFT[0]) & (mu < SOFT[1]), pixel_mm)


def transmission_table(scan: TransmissionScan, images: Mapping[str, Tensor], water: Tensor) -> list[dict]:
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
    if truth is None:
        raise ValueError("an emission scan needs a virtual thorax: this transmission scan has no truth")
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
