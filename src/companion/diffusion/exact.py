"""Exact denoisers of Gaussian and Gaussian-mixture priors, for tests and benchmarks."""

from collections.abc import Sequence
from functools import cached_property, reduce
from typing import Protocol

import torch
from torch import Generator, Tensor

from companion.diffusion.denoisers import column
from companion.randomness import randn


class FourierBasis:
    """The orthonormal Fourier transform over the last `ndim` axes: the basis of stationary Gaussians."""

    flat = True  # all entries have the same magnitude, so the variance of a pixel is the mean of all variances

    def __init__(self, ndim: int, inverse: bool = False):
        self.axes, self.inverse = tuple(range(-ndim, 0)), inverse

    def __call__(self, x: Tensor) -> Tensor:
        transform = torch.fft.ifftn if self.inverse else torch.fft.fftn
        return transform(x, dim=self.axes, norm="ortho")

    @property
    def H(self) -> "FourierBasis":
        return FourierBasis(len(self.axes), not self.inverse)


class Basis(Protocol):
    """An orthonormal transform basis(x) of images (batch, *shape), and its inverse basis.H."""

    def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def H(self) -> "Basis": ...


class MatrixBasis:
    """Columns of a unitary matrix (n, n), n = pixels of an image, as a basis: basis(x) = U^H x."""

    flat = False

    def __init__(self, U: Tensor):
        self.U = U

    def __call__(self, x: Tensor) -> Tensor:
        U = self.U.to(x.device, x.dtype.to_complex() if self.U.is_complex() else x.dtype)
        return (x.flatten(1).to(U.dtype) @ U.conj()).reshape(x.shape)

    @property
    def H(self) -> "MatrixBasis":
        return MatrixBasis(self.U.mH)


class GaussianDenoiser:
    """The exact denoiser of a Gaussian prior: x0_hat = mean + C (C + sigma^2)^-1 (x - mean).

    mean: (*shape), the shape of one image, real or complex. covariance per real component (so E|x|^2 = 2 diag
    C for complex x, whose real and imaginary parts have equal laws), float64, as
    - a dense matrix (n, n) over the flattened image, Hermitian;
    - the variances (*shape) of independent pixels;
    - the variances (*shape) of the coefficients in an orthonormal `basis`, an operator with basis(x) and
      basis.H. For a real image in a complex basis the variances must have the symmetry that makes C real.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, basis: Basis | None = None):
        n, shape = mean.numel(), tuple(mean.shape)
        if basis is None and covariance.shape == (n, n) and (n, n) != shape:
            values, vectors = torch.linalg.eigh(covariance.to(torch.promote_types(covariance.dtype, torch.float64)))
            covariance, basis = values.reshape(shape), MatrixBasis(vectors)
        if covariance.shape != shape:
            raise ValueError(
                f"the covariance has shape {tuple(covariance.shape)}; expected {shape}, one variance for "
                f"each pixel or coefficient, or a matrix {(n, n)}"
            )
        if not (covariance > -1e-9 * covariance.abs().max()).all():
            raise ValueError(f"the covariance has a negative variance, {covariance.min():.3g}")
        self.mean, self.variances, self.basis = mean, covariance.double().clamp(min=0), basis

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """x0_hat, the shape and dtype of x (batch, *shape); cond is ignored."""
        return self.mean.to(x) + self.filter(x - self.mean.to(x), self.gain(x, sigma))

    def moments(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x0_hat, variance (batch or 1, *shape)): the diagonal of C sigma^2 (C + sigma^2)^-1, exact."""
        variance = self.diagonal(column64(sigma, x) ** 2 * self.gain(x, sigma))
        return self(x, sigma), variance.to(x.dtype.to_real())

    def gain(self, x: Tensor, sigma: Tensor) -> Tensor:
        """C (C + sigma^2)^-1 in the basis, float64 (batch, *shape)."""
        variances = self.variances.to(x.device)
        return variances / (variances + column64(sigma, x) ** 2)

    def filter(self, x: Tensor, gain: Tensor) -> Tensor:
        """The operator with these eigenvalues, applied to x."""
        gain = gain.to(x.dtype.to_real())
        if self.basis is None:
            return gain * x
        out = self.basis.H(gain * self.basis(x))
        return out.real.contiguous() if out.is_complex() and not x.is_complex() else out

    def diagonal(self, values: Tensor) -> Tensor:
        """The diagonal, in pixels, of the operator with eigenvalues `values` (batch, *shape)."""
        if self.basis is None:
            return values
        if getattr(self.basis, "flat", False):
            return values.flatten(1).mean(1).reshape(-1, *[1] * (values.ndim - 1)).expand_as(values)
        return (values.flatten(1) @ self.squared_basis.to(values.device)).reshape(values.shape)

    @cached_property
    def squared_basis(self) -> Tensor:
        """|basis|^2 as a matrix (coefficient, pixel), float64, from every pixel sent through the basis."""
        n = self.mean.numel()
        if n > 16384:
            raise ValueError(f"the exact variance needs a {n} x {n} matrix in this basis; use at most 16384 pixels")
        pixels = torch.eye(n, dtype=torch.promote_types(self.mean.dtype, torch.float64)).reshape(n, *self.mean.shape)
        basis = self.basis or (lambda x: x)
        return basis(pixels).flatten(1).abs().square().T.double()

    def draw(self, count: int, generator: Generator, dtype: torch.dtype | None = None) -> Tensor:
        """Exact draws from the prior, (count, *shape)."""
        noise = randn((count, *self.mean.shape), dtype or self.mean.dtype, generator)
        return self.mean.to(noise) + self.filter(noise, self.variances.sqrt())

    def log_evidence(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log p(x) at noise level sigma, (batch,), float64, without the constant (2 pi)^(-n/2)."""
        total = self.variances.to(x.device) + column64(sigma, x) ** 2
        parts = 2 if x.is_complex() else 1
        residual = x.to(torch.promote_types(x.dtype, torch.float64)) - self.mean.to(x.device)
        if self.basis is not None:
            residual = self.basis(residual)
        return -((residual.abs() ** 2 / total + parts * total.log()) / 2).flatten(1).sum(1)


class GaussianMixtureDenoiser:
    """The exact denoiser of a mixture of Gaussians: responsibilities times the components' own estimates.

    weights: positive, (k,), normalised here. components: k GaussianDenoisers of the same shape.
    """

    def __init__(self, weights: Tensor, components: Sequence[GaussianDenoiser]):
        weights = torch.as_tensor(weights, dtype=torch.float64)
        if weights.shape != (len(components),) or not (weights > 0).all():
            raise ValueError(f"{len(components)} components need as many positive weights; got {weights.tolist()}")
        self.weights, self.components = weights / weights.sum(), list(components)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """x0_hat, the shape and dtype of x; cond is ignored."""
        return self.average(x, sigma, [component(x, sigma) for component in self.components])

    def moments(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x0_hat, variance per real component): by the law of total variance, exact."""
        means, variances = zip(*(component.moments(x, sigma) for component in self.components), strict=True)
        x0_hat = self.average(x, sigma, means)
        parts = 2 if x.is_complex() else 1
        spread = [v + (m - x0_hat).abs() ** 2 / parts for m, v in zip(means, variances, strict=True)]
        return x0_hat, self.average(x, sigma, spread)

    def responsibilities(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Probability of each component given x, (k, batch), float64."""
        evidence = torch.stack([component.log_evidence(x, sigma) for component in self.components])
        return torch.softmax(evidence + self.weights.log().to(x.device)[:, None], 0)

    def average(self, x: Tensor, sigma: Tensor, values: Sequence[Tensor]) -> Tensor:
        shares = self.responsibilities(x, sigma)
        return reduce(torch.add, [column(share, value) * value for share, value in zip(shares, values, strict=True)])

    def draw(self, count: int, generator: Generator, dtype: torch.dtype | None = None) -> Tensor:
        """Exact draws from the prior, (count, *shape)."""
        chosen = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        draws = [component.draw(count, generator, dtype) for component in self.components]
        return torch.stack([draws[k][i] for i, k in enumerate(chosen.tolist())])


def column64(values: Tensor, like: Tensor) -> Tensor:
    """As `column`, in float64: variances of exact priors span more digits than float32 has."""
    values = torch.as_tensor(values, device=like.device, dtype=torch.float64)
    return values.reshape(-1, *[1] * (like.ndim - 1))
