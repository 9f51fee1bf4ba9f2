"""Guidances against closed-form posteriors, against their algebra, and on every shape of data."""

import math
import sys
from pathlib import Path

import pytest
import torch

from companion.diffusion import covariance as diffusion_covariance
from companion.diffusion.covariance import Isotropic, Jacobian, Measured, PerPixel
from companion.diffusion.exact import GaussianDenoiser
from companion.diffusion.guidance import ddnm, dds, diffpir, dps, landweber, pigdm, posterior_mean
from companion.diffusion.noise import karras
from companion.diffusion.sampling import sample
from companion.evaluation import known_posterior
from companion.operators.linear import Identity
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, sense
from companion.randomness import randn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import exact_posterior as bench  # noqa: E402

EVERY = [landweber, dps, pigdm, ddnm, dds, diffpir, posterior_mean]
NOISE_STD = 0.05


@pytest.fixture(scope="module")
def problem():
    return known_posterior.make_problem("gaussian", size=8, R=2, noise_std=NOISE_STD, draws=500)


def normal(shape, seed=0, dtype=torch.complex64):
    return randn(shape, dtype, torch.Generator().manual_seed(seed))


def dense_solution(problem, x, sigma, C):
    """D + C A^H (A C A^H + s^2)^-1 (y - A D) with matrices; C (n, n) complex128."""
    M, measured = known_posterior.matrix(problem.A)
    x0_hat = problem.prior(x, sigma)[0].flatten().to(torch.complex128)
    y = problem.y.flatten()[measured].to(torch.complex128)
    S = M @ C @ M.mH + problem.noise_std**2 * torch.eye(len(M))
    return x0_hat + C @ M.mH @ torch.linalg.solve(S, y - M @ x0_hat)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("kind", ["isotropic", "per pixel", "Jacobian"])
def test_posterior_mean_solves_its_equation(problem, kind, sigma):
    sigma = torch.tensor([sigma])
    x = problem.images(1) + sigma * normal((1, *problem.shape))
    prior_covariance = known_posterior.brain_like(8)[1]
    true = sigma.item() ** 2 * prior_covariance @ torch.linalg.inv(prior_covariance + sigma.item() ** 2 * torch.eye(64))
    C, model = {
        "isotropic": (Isotropic(0.3).variance(sigma).double() * torch.eye(64), Isotropic(0.3)),
        "per pixel": (torch.diag(true.diagonal().real), PerPixel()),
        "Jacobian": (true, Jacobian()),
    }[kind]
    D_y = posterior_mean(problem.A, problem.y, NOISE_STD, model, iterations=80, tol=1e-6)(problem.prior)
    wanted = dense_solution(problem, x, sigma, C.to(torch.complex128))
    assert torch.linalg.norm(D_y(x, sigma).flatten() - wanted) < 2e-3 * torch.linalg.norm(wanted)


def test_jacobian_covariance_is_exact_for_a_gaussian_prior(problem):
    """D_y must be the denoiser of the posterior, which is itself a Gaussian."""
    M, measured = known_posterior.matrix(problem.A)
    mean, covariance = known_posterior.brain_like(8)
    y = problem.y.flatten()[measured].to(torch.complex128)
    m, C, _ = known_posterior.condition(mean.flatten(), covariance, M, y, NOISE_STD)
    exact = GaussianDenoiser(m.reshape(mean.shape), (C + C.mH) / 2)
    D_y = posterior_mean(problem.A, problem.y, NOISE_STD, Jacobian(), iterations=80, tol=1e-6)(problem.prior)
    for level in (0.05, 0.5, 5.0):
        sigma = torch.full((3,), level)
        x = problem.draws[:3].to(torch.complex64) + level * normal((3, *problem.shape))
        assert torch.allclose(D_y(x, sigma), exact(x, sigma), atol=2e-3)


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m_sde"])
def test_exact_guidance_samples_the_true_posterior(problem, solver):
    D_y = posterior_mean(problem.A, problem.y, NOISE_STD, Jacobian(), iterations=40)(problem.prior)
    xs = sample(
        D_y,
        karras(30, 0.01, 5.0),
        shape=problem.shape,
        seeds=range(300),
        solver=solver,
        dtype=torch.complex64,
    )
    scores = known_posterior.score(xs.x, problem)
    assert scores["mean_error"] < 0.1
    assert abs(scores["variance_ratio"] - 1) < 0.05 + 2 * scores["variance_mc"]
    assert abs(scores["coverage"] - 0.9) < 0.02


def test_measured_covariance_is_nearly_exact_at_one_call_a_step(problem):
    errors = {}
    for name, model in {
        "isotropic": Isotropic(0.3),
        "per pixel": PerPixel(),
        "measured": Measured.fit(problem.prior, problem.images(64), bench.LEVELS),
    }.items():
        D_y = posterior_mean(problem.A, problem.y, NOISE_STD, model, iterations=40)(problem.prior)
        draws = sample(
            D_y,
            karras(25, 0.01, 5.0),
            shape=problem.shape,
            seeds=range(300),
            solver="dpmpp_2m",
            dtype=torch.complex64,
        )
        assert draws.bill.denoiser_calls == 25
        errors[name] = known_posterior.score(draws.x, problem)
    assert errors["measured"]["mean_error"] < 0.15
    assert abs(errors["measured"]["variance_ratio"] - 1) < 0.1
    assert errors["measured"]["mean_error"] < errors["per pixel"]["mean_error"] < errors["isotropic"]["mean_error"]


def test_measured_fit_finds_a_known_spectrum():
    """For a stationary prior it is s(k) sigma^2 / (s(k) + sigma^2) over the isotropic guess."""
    shape = (1, 24, 24)
    bins = diffusion_covariance.radial_bins(shape[1:], 6)
    power = torch.linspace(2.0, 0.1, 6)[bins].double()

    class Basis:
        H = staticmethod(lambda z: diffusion_covariance.spatial_fft(z, 2, inverse=True))

        def __call__(self, x):
            return diffusion_covariance.spatial_fft(x, 2)

    D = bench.NoMoments(GaussianDenoiser(torch.zeros(shape, dtype=torch.complex64), power[None], Basis()))
    images = D.D.draw(64, torch.Generator().manual_seed(7), torch.complex64)
    table = Measured.fit(D, images, [0.3, 1.0], bins=6, prior_std=1.0)
    for row, sigma in zip(table.spectrum, (0.3, 1.0), strict=True):
        s = torch.linspace(2.0, 0.1, 6)
        guess = sigma**2 / (1 + sigma**2)
        assert torch.allclose(row, s * sigma**2 / (s + sigma**2) / guess, rtol=0.1)


def test_measured_factor_is_adjoint_and_keeps_real_images_real():
    table = Measured(torch.tensor([0.1, 1.0]), torch.rand(2, 8) + 0.1)
    for dtype, shape in (
        (torch.complex64, (2, 1, 9, 8)),
        (torch.float32, (2, 3, 8, 9)),
        (torch.complex64, (2, 4, 1, 8, 8)),
    ):
        x, z = normal(shape, 1, dtype), normal(shape, 2, dtype)
        _, C = table(lambda x, sigma, cond: x, x, torch.tensor([0.05, 0.5]), None)
        assert C.L(z).dtype == dtype
        left, right = torch.vdot(x.flatten(), C.L(z).flatten()), torch.vdot(C.LH(x).flatten(), z.flatten())
        assert abs(left - right) < 1e-4 * abs(x.norm() * z.norm())


def test_landweber_is_aids_gradient_step():
    A = sense(birdcage_maps((8, 8), 3), cartesian_mask(8, 2).mask)
    x, y = normal((1, 1, 8, 8)), A(normal((1, 1, 8, 8), 1))
    target = 0.3 * A.H(y) / A.H(y).abs().max()
    D_y = landweber(A, y, iterations=1, step_size=0.5, scale=0.3)(lambda x, sigma, cond: x)
    assert torch.allclose(D_y(x, 1.0), x - 0.5 * (A.H(A(x)) - target), atol=1e-6)


def test_ddnm_replaces_the_range_and_keeps_the_null_space():
    A = sense(birdcage_maps((8, 8), 1), cartesian_mask(8, 2).mask)  # one coil: A A^H is a projection
    x, y = normal((1, 1, 8, 8)), A(normal((1, 1, 8, 8), 1))
    x0 = ddnm(A, y)(lambda x, sigma, cond: x)(x, 1.0)
    assert torch.allclose(A(x0), y, atol=1e-5)
    assert torch.allclose(x0 - A.normal(x0), x - A.normal(x), atol=1e-5)


def test_pigdm_is_exact_for_a_white_prior():
    """For a white Gaussian prior J and r^2 of the paper are the truth, and PiGDM is the posterior mean."""
    A = sense(birdcage_maps((8, 8), 3), cartesian_mask(8, 2).mask)
    D = GaussianDenoiser(torch.zeros(1, 8, 8, dtype=torch.complex64), torch.full((1, 8, 8), 0.25))
    y = A(normal((1, 1, 8, 8), 1)) + 0.1 * normal((1, 3, 8, 8), 2)
    x, sigma = normal((2, 1, 8, 8)), torch.tensor([0.2, 2.0])
    song = pigdm(A, y, 0.1, prior_std=0.5, iterations=30)(D)(x, sigma)
    ours = posterior_mean(A, y, 0.1, PerPixel(), iterations=30, tol=0.0)(D)(x, sigma)
    assert torch.allclose(song, ours, atol=1e-4)


def test_diffpir_and_dds_solve_their_proximal_problem():
    A, x = Identity((1, 6, 6)), normal((1, 1, 6, 6))
    y, sigma, s = normal((1, 1, 6, 6), 1), 0.3, 0.1
    D = lambda x, sigma, cond: x  # noqa: E731
    weight = 1 / (1 + s**2 / sigma**2)
    assert torch.allclose(diffpir(A, y, s)(D)(x, sigma), weight * y + (1 - weight) * x, atol=1e-5)
    assert torch.allclose(dds(A, y, s, gamma=3.0)(D)(x, sigma), (x + 3 * y) / 4, atol=1e-5)


def test_dps_step_is_the_gradient_of_the_squared_residual():
    A = sense(birdcage_maps((6, 6), 2), cartesian_mask(6, 2).mask)
    x, y = normal((1, 1, 6, 6)).requires_grad_(), A(normal((1, 1, 6, 6), 1))

    def D(x, sigma, cond=None):
        return torch.view_as_complex(torch.tanh(torch.view_as_real(x)))

    loss = (y - A(D(x, None))).abs().square().sum()
    (slope,) = torch.autograd.grad(loss, x)
    scale = 0.5**2 / 2 * 2 * y.numel() / loss.detach()  # sigma^2 / (2 s^2), s^2 per real component of y
    wanted = D(x, None) - scale * slope
    assert torch.allclose(dps(A, y)(D)(x.detach(), 0.5), wanted.detach(), atol=1e-5)


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("shape", [(3, 1, 6, 7), (3, 1, 4, 5, 6), (3, 2, 1, 6, 6)], ids=["2D", "3D", "sequence"])
def test_every_guidance_on_every_shape(make, shape):
    space = shape[-3:] if len(shape) == 5 and shape[1] == 1 else shape[-2:]
    A = sense(birdcage_maps(space, 3), cartesian_mask(space, 2).mask, ndim=len(space))
    x = normal(shape)
    y = A(normal((1, *shape[1:]), 1))
    D = GaussianDenoiser(torch.zeros(shape[1:], dtype=torch.complex64), torch.ones(shape[1:]))
    D_y = make(A, y, 0.1)(D)
    out = D_y(x, torch.tensor([0.1, 1.0, 10.0]))
    assert out.shape == x.shape and out.dtype == x.dtype and torch.isfinite(torch.view_as_real(out)).all()
    assert not out.requires_grad
    alone = D_y(x[1:2], torch.tensor([1.0]))  # a draw does not depend on its batch
    assert torch.allclose(out[1:2], alone, atol=1e-5)


@pytest.mark.parametrize("make", EVERY)
def test_real_images(make):
    D = GaussianDenoiser(torch.zeros(2, 6, 6), torch.ones(2, 6, 6))
    A = Identity((2, 6, 6), torch.float32)
    y = normal((1, 2, 6, 6), 1, torch.float32)
    out = make(A, y, 0.1)(D)(normal((1, 2, 6, 6), 2, torch.float32), 0.5)
    assert out.dtype == torch.float32
    assert (out - y).norm() < (D(normal((1, 2, 6, 6), 2, torch.float32), torch.tensor([0.5])) - y).norm()


@pytest.mark.parametrize("make", EVERY)
def test_the_bill_is_what_is_called(make):
    class Counting(Identity):
        count = 0

        def forward(self, x):
            Counting.count += 1
            return x

        adjoint = forward
        H = property(lambda self: self)

    A = Counting((1, 6, 6))
    D = GaussianDenoiser(torch.zeros(1, 6, 6, dtype=torch.complex64), torch.ones(1, 6, 6))
    options = dict(tol=0.0) if make is posterior_mean else {}
    # uneven eigenvalues are not needed: CG on a multiple of 1 stops early, so the bill is an upper bound
    D_y = make(A, normal((1, 1, 6, 6)), 0.1, **options)(D)
    Counting.count = 0
    D_y(normal((1, 1, 6, 6), 1), 0.5)
    assert 0 < Counting.count <= D_y.operator_calls
    assert D_y.denoiser_calls == (2 if make in (dps, pigdm) else 1)


def test_zero_variance_leaves_the_prior_alone():
    variance = torch.zeros(1, 4, 4)
    variance[..., 2:] = 1
    D = GaussianDenoiser(torch.ones(1, 4, 4, dtype=torch.complex64), variance)
    y = torch.zeros(1, 1, 4, 4, dtype=torch.complex64)
    out = posterior_mean(Identity((1, 4, 4)), y, 0.1)(D)(normal((1, 1, 4, 4)), 1.0)
    assert torch.allclose(out[..., :2], torch.ones(2, dtype=y.dtype)) and out[..., 2:].abs().max() < 0.1


def test_errors_say_what_to_do():
    A = Identity((1, 4, 4))
    with pytest.raises(ValueError, match="data of this operator"):
        dds(A, torch.zeros(1, 1, 4, 5, dtype=torch.complex64))
    with pytest.raises(ValueError, match="NaN"):
        dds(A, torch.full((1, 1, 4, 4), math.nan, dtype=torch.complex64))
    with pytest.raises(ValueError, match="noise_std is -1"):
        dds(A, torch.zeros(1, 1, 4, 4, dtype=torch.complex64), -1)
    D = lambda x, sigma, cond=None: x  # noqa: E731
    x = torch.zeros(3, 1, 4, 4, dtype=torch.complex64)
    with pytest.raises(TypeError, match="Isotropic"):
        posterior_mean(A, x[:1], 0.1)(D)(x, 1.0)
    with pytest.raises(ValueError, match="2 items for 3 draws"):
        dds(A, x[:2])(D)(x, 1.0)
    with pytest.raises(ValueError, match="gradient"):
        dps(A, x[:1])(lambda x, sigma, cond=None: x.detach())(x, 1.0)


def test_the_default_precision_of_the_process_changes_nothing():
    """Measured errors, denoisers and draws under torch.set_default_dtype(float64)."""
    images = randn((4, 1, 8, 8), torch.complex64, torch.Generator().manual_seed(0))
    D = GaussianDenoiser(torch.zeros(1, 8, 8, dtype=torch.complex64), 0.3**2 * torch.ones(1, 8, 8))
    single = Measured.fit(D, images, torch.logspace(-1, 0, 3))
    torch.set_default_dtype(torch.float64)
    try:
        double = Measured.fit(D, images, torch.logspace(-1, 0, 3))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(single.spectrum.double(), double.spectrum.double(), rtol=1e-4)


def test_coil_maps_that_are_no_tensor_are_refused():
    with pytest.raises(TypeError, match=r"torch\.as_tensor"):
        sense(birdcage_maps((8, 8), 2).numpy(), torch.ones(8))


@pytest.mark.parametrize("lines", [torch.ones(16), cartesian_mask(16, 3, acs=4).mask])
def test_balanced_unknowns_have_the_same_solution(lines):
    """And of SENSE they reach it in fewer steps."""
    A = sense(birdcage_maps((16, 16), 4), lines)
    variance = torch.logspace(-5, -1, 256).reshape(1, 1, 16, 16)
    C = diffusion_covariance.Factor.diagonal(variance)
    r = A.mask(randn((1, *A.range_shape), torch.complex64, torch.Generator().manual_seed(0)))
    exact = posterior_mean(A, r, 0.01, iterations=300, tol=1e-7).correction(C, r, 1)
    balanced = posterior_mean(A, r, 0.01, iterations=300, tol=1e-7, balance=True).correction(C, r, 1)
    assert torch.allclose(balanced, exact, atol=1e-3 * exact.abs().max())
    errors = [
        (posterior_mean(A, r, 0.01, iterations=8, tol=0.0, balance=b).correction(C, r, 1) - exact).abs().square().mean()
        for b in (False, True)
    ]
    assert errors[1] < errors[0]
