"""Split Gibbs against closed-form posteriors."""

import sys
from pathlib import Path

import pytest
import torch

from companion.diffusion.covariance import Factor, Jacobian, Measured
from companion.diffusion.exact import GaussianDenoiser
from companion.diffusion.gibbs import annealed_gibbs, split_gibbs
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.noise import karras, log_uniform
from companion.evaluation import known_posterior, metrics
from companion.operators.linear import Identity
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, sense
from companion.randomness import antithetic, generators, randn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import exact_posterior as bench  # noqa: E402


def test_the_likelihood_draw_has_the_right_mean_and_covariance():
    A = sense(birdcage_maps((4, 4), 2), cartesian_mask(4, 2).mask)
    generator = torch.Generator().manual_seed(0)
    y, s, rho = randn((1, *A.range_shape), torch.complex64, generator), 0.3, 0.5
    G = posterior_mean(A, y, s, iterations=30, tol=0.0)
    zero = torch.zeros(4000, 1, 4, 4, dtype=y.dtype)
    x = G.draw(zero, Factor.diagonal(torch.tensor(rho**2)), generators(range(4000)))
    M, measured = known_posterior.matrix(A)
    prior_mean = torch.zeros(16, dtype=torch.complex128)
    prior = rho**2 * torch.eye(16, dtype=torch.complex128)
    mean, C, _ = known_posterior.condition(prior_mean, prior, M, y.flatten()[measured].to(torch.complex128), s)
    x = x.flatten(1).to(torch.complex128)
    assert (x.mean(0) - mean).abs().max() < 5 * rho * (2 / 4000) ** 0.5
    x = x - x.mean(0)
    assert (x.T @ x.conj() / (2 * 4000) - C).abs().max() < 5 * rho**2 / 4000**0.5


def test_split_gibbs_is_exact_in_the_limit():
    """A white prior: prior step and likelihood are both exact, so only rho and the sweeps remain."""
    D = GaussianDenoiser(torch.zeros(1, 6, 6, dtype=torch.complex64), torch.ones(1, 6, 6))
    y = torch.full((1, 1, 6, 6), 1 + 1j, dtype=torch.complex64)
    s = 0.5
    draws = split_gibbs(D, Identity((1, 6, 6)), y, s, [0.6] * 3 + [0.1] * 120, steps=6, seeds=range(200))
    variance = s**2 / (1 + s**2)
    x = torch.view_as_real(draws.x)
    assert abs(x.mean() - 1 / (1 + s**2)) < 0.02
    assert abs(x.var() / variance - 1) < 0.06
    assert draws.bill.denoiser_calls == 123 * 6


def test_split_gibbs_approaches_the_sense_posterior():
    problem = known_posterior.make_problem("gaussian", size=8, R=2, noise_std=0.05, draws=500)
    rhos = log_uniform(60, 0.025, 0.5)[:-1]
    draws = split_gibbs(problem.prior, problem.A, problem.y, 0.05, rhos, steps=6, seeds=range(150))
    scores = known_posterior.score(draws.x, problem)
    assert scores["mean_error"] < 0.3 and abs(scores["variance_ratio"] - 1) < 0.2


@pytest.mark.parametrize("refresh, calls", [(None, 20), (10.0, 20), (10.0, 150), (0.0, 60)])
def test_annealed_gibbs_samples_the_sense_posterior_with_few_calls_and_many(refresh, calls):
    problem = known_posterior.make_problem("gaussian", size=8, R=2, noise_std=0.05, draws=500)
    covariance = Measured.fit(problem.prior, problem.images(64), bench.LEVELS)
    G = posterior_mean(problem.A, problem.y, 0.05, covariance, iterations=40)
    draws = annealed_gibbs(problem.prior, G, karras(calls, 0.025, 5.0), seeds=range(400), refresh=refresh)
    scores = known_posterior.score(draws.x, problem)
    assert draws.bill.denoiser_calls == calls
    assert scores["mean_error"] < 0.15 and abs(scores["variance_ratio"] - 1) < 0.08
    with pytest.raises(TypeError, match="Jacobian"):
        annealed_gibbs(problem.prior, posterior_mean(problem.A, problem.y, 0.05, Jacobian()), [1.0, 0.1], seeds=0)


@pytest.mark.parametrize("name, least", [("gaussian", 25), ("mixture", 6)])
def test_the_mean_of_a_pair_of_antithetic_draws_is_that_of_many(name, least):
    """The Monte-Carlo part of its squared error, against that of two independent draws."""
    problem = known_posterior.make_problem(name, size=8, R=2, noise_std=0.05, draws=500)
    covariance = Measured.fit(problem.prior, problem.images(64), bench.LEVELS)
    G = posterior_mean(problem.A, problem.y, 0.05, covariance, iterations=60, tol=0.0)
    left, variance = {}, {}
    for kind, make in (("independent", generators), ("pairs", antithetic)):
        found = annealed_gibbs(problem.prior, G, karras(20, 0.25, 5.0), seeds=make(range(200)))
        two = found.x.unflatten(0, (-1, 2)).mean(1)
        left[kind] = (two - two.mean(0)).abs().square().mean()
        variance[kind] = metrics.spread(found.x, found.paired).variance.mean()
        assert found.paired == (kind == "pairs") and len(found.centres) == (100 if found.paired else 200)
    assert left["independent"] > least * left["pairs"]
    assert variance["pairs"] == pytest.approx(variance["independent"].item(), rel=0.1)


def test_antithetic_draws_are_the_same_in_any_batch_and_independent_where_their_number_is_odd():
    problem = known_posterior.make_problem("gaussian", size=8, R=2, noise_std=0.05, draws=10)
    G = posterior_mean(problem.A, problem.y, 0.05, iterations=40)
    levels = karras(4, 0.05, 5.0)
    whole, parts = (
        annealed_gibbs(problem.prior, G, levels, seeds=antithetic("3-6"), batch_size=size) for size in (4, 1)
    )
    torch.testing.assert_close(whole.x, parts.x, rtol=1e-4, atol=1e-5)
    alone = annealed_gibbs(problem.prior, G, levels, seeds=antithetic("3-4"))
    torch.testing.assert_close(whole.x[:2], alone.x, rtol=1e-4, atol=1e-5)
    three = annealed_gibbs(problem.prior, G, levels, seeds=antithetic("3-5"))
    plain = annealed_gibbs(problem.prior, G, levels, seeds="3-5")
    assert torch.equal(three.x, plain.x) and not three.paired and torch.equal(three.centres, three.mean)
    noise = randn((5,), torch.float32, antithetic((7, 8)))
    assert torch.equal(noise[0], -noise[1])
    a, b = (torch.rand(4, generator=g) for g in antithetic((7, 8)))
    assert not torch.allclose(a, b), "what is not noise differs"


def test_a_seed_gives_the_same_draw_alone_and_in_a_batch():
    D = GaussianDenoiser(torch.zeros(1, 5, 5, dtype=torch.complex64), torch.ones(1, 5, 5))
    A, y = Identity((1, 5, 5)), torch.ones(1, 1, 5, 5, dtype=torch.complex64)
    together = split_gibbs(D, A, y, 0.1, [0.5, 0.2], seeds="0-6", batch_size=4).x
    alone = split_gibbs(D, A, y, 0.1, [0.5, 0.2], seeds=5).x
    assert torch.allclose(together[5:6], alone, rtol=1e-5, atol=1e-6)
    G = posterior_mean(A, y, 0.1)
    together = annealed_gibbs(D, G, [0.5, 0.3, 0.2], seeds="0-6", refresh=2.0, batch_size=4).x
    alone = annealed_gibbs(D, G, [0.5, 0.3, 0.2], seeds=5, refresh=2.0).x
    assert torch.allclose(together[5:6], alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="refresh"):
        annealed_gibbs(D, G, [0.5], seeds=0, refresh=-1.0)


@pytest.mark.parametrize("rhos", [[], [0.1, 0.2], [0.1, 0.0], [float("nan")]])
def test_couplings_are_checked(rhos):
    D = GaussianDenoiser(torch.zeros(1, 5, 5, dtype=torch.complex64), torch.ones(1, 5, 5))
    with pytest.raises(ValueError, match="levels must be"):
        split_gibbs(D, Identity((1, 5, 5)), torch.ones(1, 1, 5, 5, dtype=torch.complex64), 0.1, rhos, seeds=0)


def test_conditional_means_average_to_the_posterior_mean_with_less_noise_and_leave_the_draws_alone():
    """For a Gaussian prior E[x0 | x, y] at the last level is unbiased, and a draw is one of its neighbours."""
    problem = known_posterior.make_problem("gaussian", size=8, R=2, noise_std=0.05, draws=500)
    covariance = Measured.fit(problem.prior, problem.images(64), bench.LEVELS)
    G = posterior_mean(problem.A, problem.y, 0.05, covariance, iterations=40)
    levels = karras(12, 0.25, 5.0)
    result = annealed_gibbs(problem.prior, G, levels, seeds=range(300), batch_size=128)
    assert result.mean.shape == result.x.shape
    assert result.bill.denoiser_calls == 12 and result.bill.operator_calls == 13 * G.operator_calls
    draws, means = (known_posterior.score(result.x, problem, m) for m in (None, result.mean))
    assert means["mean_error"] < 0.15 and means["mean_mc"] < 0.8 * draws["mean_mc"]
    alone = annealed_gibbs(problem.prior, G, levels, seeds=7).mean
    assert torch.allclose(alone[0], result.mean[7], atol=1e-4)


def test_without_noise_to_add_the_mean_is_the_exact_one():
    """One level so high that x tells nothing: E[x0 | x, y] of every draw is E[x0 | y], which is known."""
    D = GaussianDenoiser(torch.zeros(1, 6, 6, dtype=torch.complex64), torch.ones(1, 6, 6))
    y = torch.full((1, 1, 6, 6), 1 + 1j, dtype=torch.complex64)
    result = annealed_gibbs(D, posterior_mean(Identity((1, 6, 6)), y, 0.5), [1e4], seeds=range(3))
    assert torch.allclose(result.mean, (y / 1.25).expand_as(result.mean), atol=1e-3)


def test_a_chain_that_starts_at_an_image_needs_fewer_sweeps_and_is_no_less_exact():
    problem = known_posterior.make_problem("gaussian", size=8, R=2, noise_std=0.05, draws=500)
    covariance = Measured.fit(problem.prior, problem.images(64), bench.LEVELS)
    G = posterior_mean(problem.A, problem.y, 0.05, covariance, iterations=40)
    start = problem.mean[None].to(torch.complex64)
    warm = annealed_gibbs(problem.prior, G, karras(5, 0.25, 0.6), seeds=range(300), start=start)
    scores = known_posterior.score(warm.x, problem, warm.mean)
    assert scores["mean_error"] < 0.15 and abs(scores["variance_ratio"] - 1) < 0.08
    zero = annealed_gibbs(problem.prior, G, [0.6, 0.25], seeds=[1], start=torch.zeros_like(start))
    assert torch.equal(zero.x, annealed_gibbs(problem.prior, G, [0.6, 0.25], seeds=[1]).x)
    with pytest.raises(ValueError, match="start has shape"):
        annealed_gibbs(problem.prior, G, [0.6], seeds=[1], start=start[..., :4])
