"""Denoisers that have seen the data: `G = dds(A, y, noise_std); D_y = G(D)`.

Model: y = A x0 + noise_std * n and x = x0 + sigma * n, where n has standard deviation 1 per real component
(so a complex n has variance 2; the factor cancels everywhere below). A denoiser gives E[x0 | x]; a guided
one gives an approximation of E[x0 | x, y] with the same signature, so every solver samples the posterior
with it. The methods differ in one thing only: how they believe the uncertainty of D(x) is shaped, their
covariance C of p(x0 | x).

| guidance         | C of p(x0 given x)                                     | cost per evaluation           |
|------------------|--------------------------------------------------------|-------------------------------|
| `landweber`      | none: gradient steps on the data                       | D, 2 `iterations` A           |
| `ddnm`           | infinite: replace the range of A                       | D, CG                         |
| `dds`, `diffpir` | isotropic: constant, or proportional to sigma^2        | D, CG                         |
| `dps`, `pigdm`   | sigma^2 J outside, scalar inside the inverse           | D and its gradient            |
| `posterior_mean` | a model: `Isotropic`, `PerPixel`, `Measured`           | D, CG                         |
| `posterior_mean` | `Jacobian`: sigma^2 J everywhere, exact for a Gaussian | D, a gradient per CG step     |

docs/posterior-sampling.md says which one to trust, with numbers. Class names are lower case because they
read as verbs in a notebook; each is a frozen record of (A, y, noise_std, options).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor

from companion.diffusion.covariance import Factor, Isotropic, Jacobian, PerPixel, Proportional, with_vjp
from companion.diffusion.denoisers import column
from companion.diffusion.response import Response
from companion.operators.linear import LinearOperator, check_finite
from companion.operators.solve import conjugate_gradient
from companion.randomness import randn


@dataclass(frozen=True, eq=False)
class Guidance:
    """A rule that turns a denoiser D into D_y(x, sigma, cond) -> estimate of E[x0 | x, y].

    A: linear operator; y: data (batch, *A.range_shape) with any batch axes that broadcast against those of x;
    noise_std: of each real component of y, in units of y (0 for consistent, noiseless data).
    Raises ValueError when y is not finite or not shaped like A's range, or noise_std is negative.
    """

    A: LinearOperator
    y: Tensor
    noise_std: float = 0.0

    def __post_init__(self):
        shape = tuple(self.A.range_shape)
        if tuple(self.y.shape[self.y.ndim - len(shape) :]) != shape:
            raise ValueError(
                f"y has shape {tuple(self.y.shape)} but A maps to (..., {', '.join(map(str, shape))}); "
                "pass the data of this operator, with batch axes in front"
            )
        check_finite(self.y, "y")
        if not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise ValueError(f"noise_std is {self.noise_std}; expected a finite number >= 0, in units of y")

    def __call__(self, D) -> "GuidedDenoiser":
        return GuidedDenoiser(self, D)

    def estimate(self, D, x: Tensor, sigma: Tensor, cond=None) -> Tensor:
        """E[x0 | x, y] as this method sees it; shaped like x."""
        raise NotImplementedError

    @property
    def denoiser_calls(self) -> int:
        """D calls per evaluation; a gradient through D counts as one more."""
        return 1

    @property
    def operator_calls(self) -> int:
        """Applications of A or its adjoint per evaluation."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class GuidedDenoiser:
    """D_y: the denoiser protocol, with the bill per evaluation stated."""

    guidance: Guidance
    D: Callable

    def __call__(self, x: Tensor, sigma: Tensor, cond=None) -> Tensor:
        """E[x0 | x, y] as the guidance sees it, the shape and dtype of x."""
        if len(self.guidance.y) not in (1, len(x)):
            raise ValueError(
                f"y holds {len(self.guidance.y)} items for {len(x)} draws; give y with a batch of 1, or "
                "of the draws and sample them in one batch"
            )
        sigma = torch.as_tensor(sigma, device=x.device, dtype=x.real.dtype).expand(x.shape[0])
        return self.guidance.estimate(self.D, x, sigma, cond)

    @property
    def denoiser_calls(self) -> int:
        return self.guidance.denoiser_calls * getattr(self.D, "denoiser_calls", 1)

    @property
    def operator_calls(self) -> int:
        inner = getattr(self.D, "operator_calls", 0)
        return self.guidance.operator_calls + self.guidance.denoiser_calls * inner


def solve(normal, b: Tensor, iterations: int, batch: int, tol: float = 1e-5, precondition=None) -> Tensor:
    """CG solution of normal(u) = b from zero, after b is expanded to the batch of x.

    The tolerance also protects singular systems: past convergence CG would divide rounding errors by
    rounding errors.
    """
    b = b.expand(batch, *b.shape[1:])
    return conjugate_gradient(normal, b, iterations=iterations, tol=tol, precondition=precondition)


# ----------------------------------------------------------------------------------------- published methods
@dataclass(frozen=True, eq=False)
class landweber(Guidance):
    """Gradient data consistency: x0 <- x0 - step_size (A^H A x0 - b), repeated `iterations` times.

    b = A^H y, in the units of the prior; with `scale`, b = scale * A^H y / max|A^H y| for each image, which
    is how AID puts data of unknown units on its prior's scale (about 1 with calibration lines, 1/R
    without). noise_std is not used: the paper has no noise model. [luo2024], posterior
    sampling.
    """

    step_size: float = 1.0
    iterations: int = 4
    scale: float | None = None

    def estimate(self, D, x, sigma, cond=None):
        x0_hat, target = D(x, sigma, cond), self.target()
        for _ in range(self.iterations):
            x0_hat = x0_hat - self.step_size * (self.A.normal(x0_hat) - target)
        return x0_hat

    def target(self) -> Tensor:
        """What A^H A x0 should be: A^H y, rescaled if `scale` says so."""
        b = self.A.H(self.y)
        if self.scale is None:
            return b
        peak = b.abs().amax(dim=tuple(range(-len(self.A.domain_shape), 0)), keepdim=True)
        return self.scale * b / peak.clamp_min(torch.finfo(peak.dtype).tiny)

    @property
    def operator_calls(self):
        return 1 + 2 * self.iterations


@dataclass(frozen=True, eq=False)
class dps(Guidance):
    """Gradient of the residual through the denoiser: x0_hat - step_size sigma^2 / (2 s^2) grad_x ||y - A
    D(x)||^2.

    s^2 = max(noise_std^2, ||y - A D(x)||^2 / size of y): the residual itself says how far D(x) still is
    from the data, which is what the paper's normalisation of the step by ||y - A D(x)|| does. Differs from
    the paper in that the correction belongs to the denoiser, not to the solver's step, so that it scales
    with the step. [chung2023dps], Algorithm 1 and Eq. (16). Costs one gradient of D.
    """

    step_size: float = 1.0

    def estimate(self, D, x, sigma, cond=None):
        x0_hat, vjp = with_vjp(D, x, sigma, cond)
        r = self.y - self.A(x0_hat)
        s2 = r.abs().square().flatten(1).mean(1) / (2 if r.is_complex() else 1)
        s2 = s2.clamp_min(max(self.noise_std**2, torch.finfo(s2.dtype).tiny))
        return x0_hat + self.step_size * column(sigma.square() / s2, x) * vjp(self.A.H(r))

    @property
    def denoiser_calls(self):
        return 2

    @property
    def operator_calls(self):
        return 2


@dataclass(frozen=True, eq=False)
class pigdm(Guidance):
    """Pseudo-inverse guidance: x0_hat + sigma^2 J^T A^H (r^2 A A^H + noise_std^2)^-1 (y - A x0_hat).

    r^2 = sigma^2 prior_std^2 / (sigma^2 + prior_std^2), J the Jacobian of D; this is Tweedie's formula for
    p(y | x) = N(A x0_hat, r^2 A A^H + noise_std^2). [song2023], Eq. (7), without the further
    weight of their Algorithm 1. Costs one gradient of D and CG in data space.
    """

    prior_std: float = 0.5
    iterations: int = 10

    def estimate(self, D, x, sigma, cond=None):
        return self.step(*with_vjp(D, x, sigma, cond), sigma)

    def step(self, x0_hat, vjp, sigma):
        """The estimate, given what D makes of x and its derivative."""
        v = column(Isotropic(self.prior_std).variance(sigma), x0_hat)
        b = self.A.H(self.y - self.A(x0_hat))  # A^H (v A A^H + s^2)^-1 r = (v A^H A + s^2)^-1 A^H r
        u = solve(lambda u: v * self.A.normal(u) + self.noise_std**2 * u, b, self.iterations, len(x0_hat))
        return x0_hat + column(sigma.square(), x0_hat) * vjp(u)

    @property
    def denoiser_calls(self):
        return 2

    @property
    def operator_calls(self):
        return 2 + 2 * self.iterations


@dataclass(frozen=True, eq=False)
class ddnm(Guidance):
    """Range from the data, null space from the prior: x0_hat + lambda A^+ (y - A x0_hat).

    lambda = min(1, sigma / noise_std); A^+ by `iterations` CG steps on the normal equations from zero,
    which stay in the range of A^H. [wang2023], Eq. (13);
    the weight is that of DDNM+, their Sec. 3.3.
    """

    iterations: int = 10

    def estimate(self, D, x, sigma, cond=None):
        x0_hat = D(x, sigma, cond)
        weight = (sigma / max(self.noise_std, torch.finfo(sigma.dtype).tiny)).clamp_max(1)
        return x0_hat + column(weight, x) * solve(
            self.A.normal, self.A.H(self.y - self.A(x0_hat)), self.iterations, len(x)
        )

    @property
    def operator_calls(self):
        return 2 + 2 * self.iterations


@dataclass(frozen=True, eq=False)
class dds(Guidance):
    """Decomposed diffusion sampling: a few CG steps on (I + gamma A^H A) x0 = x0_hat + gamma A^H y, from
    x0_hat.

    gamma is constant over noise levels, the steps are few: both are the paper's regularisation, and
    noise_std is not used. `posterior_mean` is what it becomes when gamma is the ratio of variances.
    [chung2024dds], Algorithm 1.
    """

    gamma: float = 5.0
    iterations: int = 5

    def estimate(self, D, x, sigma, cond=None):
        x0_hat = D(x, sigma, cond)
        b = self.gamma * self.A.H(self.y - self.A(x0_hat))
        return x0_hat + solve(lambda u: u + self.gamma * self.A.normal(u), b, self.iterations, len(x))

    @property
    def operator_calls(self):
        return 2 + 2 * self.iterations


# ------------------------------------------------------------------------------------ the Gaussian posterior
@dataclass(frozen=True, eq=False)
class posterior_mean(Guidance):
    """E[x0 | x, y] when p(x0 | x) = N(D(x), C): D + C A^H (A C A^H + noise_std^2)^-1 (y - A D).

    covariance: `Isotropic`, `PerPixel`, `Measured` (anything that gives (x0_hat, Factor)), or `Jacobian`.
    With a factor C = L L^H the system is solved in whitened image space, (L^H A^H A L + noise_std^2) z =
    L^H A^H r, which is well posed where C is 0 and preconditioned by C; with `Jacobian` in data space.
    CG stops at the relative residual `tol`, after at most `iterations` steps. Do not save here: at high noise
    levels the problem is nearly CG-SENSE, and 10 steps at tol 1e-2 instead of 40 at 1e-4 tripled the error of
    the mean in the exact-posterior benchmark. [rozet2024] (MMPS) solve the Jacobian case by CG; [song2023] (PiGDM) is
    the isotropic ancestor.
    balance: divide the unknowns by the root of the diagonal of L^H L mean(diag A^H A) + noise_std^2 (Jacobi). Where the
    diagonal of A^H A is even, as that of SENSE is, 30 steps then come as near as 45 to 60; that of PET is not, and its
    30 steps would come some 70 times less near. response: of A, which preconditions there instead of `balance`.
    """

    covariance: Callable = PerPixel()
    iterations: int = 30
    tol: float = 1e-4
    balance: bool = False
    response: Response | None = None

    def estimate(self, D, x, sigma, cond=None):
        if isinstance(self.covariance, Jacobian):
            return self.estimate_by_gradient(D, x, sigma, cond)
        return self.mean(*self.covariance(D, x, sigma, cond))

    def mean(self, x0_hat: Tensor, C: Factor) -> Tensor:
        """The mean of p(x0 | y) for the prior N(x0_hat, C)."""
        return x0_hat + self.correction(C, self.y - self.A(x0_hat), len(x0_hat))

    def correction(self, C: Factor, r: Tensor, batch: int) -> Tensor:
        """C A^H (A C A^H + noise_std^2)^-1 r for the residual r."""
        b = C.LH(self.A.H(r))
        w = (
            1.0
            if not self.balance or C.variance is None
            else (self.gain * C.variance + self.noise_std**2).clamp_min(1e-30).rsqrt()
        )

        near = None if self.balance or self.response is None else self.response.inverse(C, self.noise_std)

        def balanced(z: Tensor) -> Tensor:
            u = w * z
            return w * (C.LH(self.A.normal(C.L(u))) + self.noise_std**2 * u)

        return C.L(w * solve(balanced, w * b, self.iterations, batch, self.tol, near))

    @cached_property
    def gain(self) -> Tensor:
        """The mean of the diagonal of A^H A, (1 or batch of A, 1, ...), by random signs [hutchinson1990]."""
        shape, batch = tuple(self.A.domain_shape), tuple(self.A.batch_shape) or (1,)
        signs = 2 * torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)) - 1
        power = self.A(signs.to(self.y.device, self.A.domain_dtype).expand(*batch, *shape)).abs().square()
        return (power.flatten(len(batch)).sum(-1) / signs.numel()).reshape(*batch, *[1] * len(shape))

    def draw(self, x0_hat: Tensor, C: Factor, draws: list[Generator]) -> Tensor:
        """A draw from p(x0 | y) for the prior N(x0_hat, C): its mean for a perturbed prior mean and
        perturbed data.

        draws: a generator for each batch item. Exact for a Gaussian: [papandreou2010].
        """
        z = x0_hat + C.L(randn(x0_hat.shape[1:], x0_hat.dtype, draws, x0_hat.device))
        y = self.y + self.noise_std * randn(self.y.shape[1:], self.y.dtype, draws, x0_hat.device)
        return z + self.correction(C, y - self.A(z), len(z))

    def estimate_by_gradient(self, D, x, sigma, cond):
        x0_hat, vjp = with_vjp(D, x, sigma, cond)
        s2 = column(sigma.square(), x)
        u = solve(
            lambda u: self.A(s2 * vjp(self.A.H(u))) + self.noise_std**2 * u,
            self.y - self.A(x0_hat),
            self.iterations,
            len(x),
            self.tol,
        )
        return x0_hat + s2 * vjp(self.A.H(u))

    @property
    def denoiser_calls(self):
        return 2 + self.iterations if isinstance(self.covariance, Jacobian) else 1

    @property
    def operator_calls(self):
        return 2 + 2 * self.iterations


def diffpir(
    A: LinearOperator, y: Tensor, noise_std: float = 0.0, weight: float = 1.0, iterations: int = 15
) -> posterior_mean:
    """argmin over x0 of ||y - A x0||^2 / noise_std^2 + weight ||x0 - x0_hat||^2 / sigma^2, by CG.

    [zhu2023], Algorithm 1, with rho_t = weight noise_std^2 / sigma^2. Their zeta, the share
    of fresh noise in a step, belongs to the solver here: `ddim` with eta.
    """
    return posterior_mean(A, y, noise_std, Proportional(weight), iterations)
