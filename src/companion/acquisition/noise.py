"""The noise of receive coils: its covariance, from a noise scan or from the edges of k-space, and prewhitening.

Raw data are y = A x + n with complex Gaussian n of covariance 2 Sigma between coils: Sigma = E[n n^H] / 2 is the
covariance *per real component*, so that Sigma = 1 means a deviation of 1 per real component. After W with W Sigma
W^H = 1 the noise is white: |A x - y|^2 is then the log-likelihood, and sums over coils are optimal. Pruessmann et al.
2001, Kellman & McVeigh 2005.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce

import torch
from scipy.stats import chi2
from torch import Tensor

from companion.operators.linear import check_finite
from companion.operators.mri import Shape, ifft

EDGE = 0.1  # share of the measured samples, furthest from the echo, that is taken for noise
BAND = (0.02, 0.08)  # part of the field of view at either end of a fully sampled axis that may be air
KEPT = 0.75  # share that a concentration step keeps: up to a quarter of the samples may carry signal


@dataclass(frozen=True, eq=False)
class Noise:
    """The noise of a scan.

    covariance: (coil, coil) complex128, per real component, in the units of the data squared.
    samples: how many k-space samples it was measured on. source: where they were.
    slope: variance of the outer half of the edges of k-space / of their inner half, 1 when no signal is left.
    """

    covariance: Tensor = field(repr=False)
    samples: int
    source: str
    slope: float | None = None

    @property
    def std(self) -> Tensor:
        """Deviation per real component of each coil, (coil,), in the units of the data."""
        return self.covariance.diagonal().real.sqrt()

    @property
    def correlation(self) -> float:
        """The largest correlation between two coils, 0 to 1."""
        inverse = 1 / self.std
        normalised = (inverse[:, None] * self.covariance * inverse).abs()
        return normalised.fill_diagonal_(0).max().item()

    @property
    def whitening(self) -> Tensor:
        """W (coil, coil) complex128, Hermitian, with W Sigma W^H = 1: of all such W the one that mixes least.

        Raises ValueError for a coil without noise: it was switched off.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        if not values[0] > 1e-9 * values[-1]:
            quiet = int(self.std.argmin())
            raise ValueError(
                f"the noise covariance of {len(values)} coils is singular (coil {quiet} has the least noise, "
                f"{self.std[quiet]:.3g}); leave out coils that were switched off or are sums of others"
            )
        return (vectors * values.rsqrt()) @ vectors.mH


def whiten(kspace: Tensor, noise: Noise, ndim: int = 2) -> Tensor:
    """k-space `(..., coil, *space)` whose noise has deviation 1 per real component and no correlation between coils."""
    return mix(noise.whitening, kspace, ndim)


def mix(matrix: Tensor, x: Tensor, ndim: int = 2) -> Tensor:
    """`(..., virtual coil, *space)` = matrix (virtual coil, coil) times x `(..., coil, *space)`; ndim space axes."""
    flat = x.flatten(-ndim)
    return (matrix.to(x.dtype).to(x.device) @ flat).unflatten(-1, x.shape[-ndim:])


def noise_of_scan(scan: Tensor) -> Noise:
    """The noise that a noise scan `(coil, ...)` measured: no excitation, so all of it is noise.

    Raises ValueError for NaN, and for fewer than 5 samples a coil.
    """
    samples = check_finite(scan, "the noise scan").flatten(1).to(torch.complex128).cpu()
    _enough(samples, "the noise scan")
    return Noise(_covariance(samples), samples.shape[1], "noise scan")


def noise_of_edges(kspace: Tensor, ndim: int = 2, echo: Shape | None = None, share: float = EDGE) -> Noise:
    """The noise of k-space `(..., coil, *space)`, from where the image has least: the quietest of

    - the edges of k-space: the `share` of the measured samples furthest from the echo (index of the zero frequency,
      by default the middle); fine detail may reach them;
    - the edges of the field of view along each fully sampled axis, BAND of it at either end after an inverse
      transform: air, unless the object fills them. The outermost part is left out, where receive filters fall off.

    A sample counts as measured when any coil is not exactly zero there. All items in front share one noise. Robust:
    the covariance of the most central three quarters of the samples in its own metric, found by concentration steps
    and scaled to a Gaussian (minimum covariance determinant, Rousseeuw & Van Driessen 1999), so that signal in up to a
    quarter of them does little.

    Raises ValueError for NaN and when there are fewer than 5 samples a coil. `Noise.slope` says whether signal is left.
    """
    check_finite(kspace, "kspace")
    space = kspace.shape[-ndim:]
    echo = tuple(n // 2 for n in space) if echo is None else echo
    axes = [(torch.arange(n) - e) / n for n, e in zip(space, echo, strict=True)]
    radius = reduce(torch.add, [g.square() for g in torch.meshgrid(*axes, indexing="ij")]).to(kspace.device)
    samples = kspace.movedim(-ndim - 1, 0)  # (coil, ..., *space)
    radii = radius.expand(samples.shape[1:]).flatten()
    found = [noise_of_samples(samples.flatten(1), radii, share)]
    measured = (samples != 0).any(0)
    for axis in range(-ndim, 0):
        n = samples.shape[axis]
        if n >= 32 and torch.equal(measured, measured.narrow(axis, 0, 1).expand_as(measured)):
            image = ifft(samples.movedim(axis, -1), 1)
            near, far = (round(n * b) for b in BAND)
            found += [_noise_of_air(end.flatten(1)) for end in (image[..., near:far], image[..., n - far : n - near])]
    return min((f for f in found if f is not None), key=lambda f: f.std.log().mean().item())


def _noise_of_air(samples: Tensor, most: int = 2**16) -> Noise | None:
    """The noise of samples (coil, n) of air, zero where not measured; None when they are too few."""
    samples = samples[:, (samples != 0).any(0)]
    samples = samples[:, :: 1 + samples.shape[1] // most].to(torch.complex128).cpu()
    if samples.shape[1] < 5 * len(samples):
        return None
    return Noise(_robust_covariance(samples), samples.shape[1], "edges of the field of view")


def noise_of_samples(samples: Tensor, radius: Tensor, share: float = EDGE) -> Noise:
    """The noise of samples (coil, n), measured at a distance radius (n,) from the zero frequency; `noise_of_edges`."""
    measured = (samples != 0).any(0)
    if not measured.any():
        raise ValueError("all of k-space is zero; check the file and its mask")
    radius = torch.where(measured, radius, -1.0)
    count = int(share * measured.sum())
    order = radius.argsort(descending=True, stable=True)[:count]
    edge = samples[:, order].to(torch.complex128).cpu()  # furthest first
    _enough(edge, f"the outer {share:.0%} of k-space")
    outer, inner = (edge[:, part].abs().square().mean(1) for part in (slice(count // 2), slice(count // 2, None)))
    return Noise(_robust_covariance(edge), count, "edges of k-space", (outer / inner).mean().item())


def _covariance(z: Tensor) -> Tensor:
    """E[z z^H] / 2 of zero-mean samples z (coil, n)."""
    return z @ z.mH / (2 * z.shape[1])


def _robust_covariance(z: Tensor, steps: int = 30) -> Tensor:
    coils, count = z.shape
    parts = torch.view_as_real(z).abs().flatten(1)
    covariance = torch.diag((1.4826 * parts.median(1).values).square()).to(z.dtype)
    kept = int(KEPT * count)
    # |z|^2 in the metric of the covariance follows chi^2 with 2 coils degrees of freedom; cut at its quantile KEPT
    # it loses the following part of its variance
    lost = float(chi2.cdf(chi2.ppf(KEPT, 2 * coils), 2 * coils + 2)) / KEPT
    for _ in range(steps):
        solved, failed = torch.linalg.solve_ex(covariance, z)
        if failed:  # coils that are sums of others; `Noise.whitening` says so
            return covariance
        distance = (z.conj() * solved).sum(0).real
        new = _covariance(z[:, distance.argsort()[:kept]]) / lost
        change = ((new - covariance).norm() / covariance.norm()).item()
        covariance = new
        if change < 1e-6:
            break
    return covariance


def _enough(samples: Tensor, where: str) -> None:
    coils, count = samples.shape
    if count < 5 * coils:
        raise ValueError(f"{where} has {count} samples for {coils} coils; need 5 a coil: give a noise scan")
    silent = [c for c in range(coils) if not samples[c].any()]
    if silent:
        raise ValueError(f"coils {silent} of {coils} hold only zeros in {where}; leave them out")
