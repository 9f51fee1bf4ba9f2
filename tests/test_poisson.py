"""Samplers that have seen counts, against posteriors known by importance sampling."""

import dataclasses
import math
from functools import cache

import pytest
import torch

from companion.diffusion.covariance import Measured
from companion.diffusion.exact import GaussianDenoiser, GaussianMixtureDenoiser
from companion.diffusion.gibbs import annealed_gibbs
from companion.diffusion.noise import karras
from companion.diffusion.poisson import (
    Widened,
    anchored_em,
    em_steps,
    poisson_dps,
    poisson_gibbs,
    poisson_mean,
    poisson_pigdm,
)
from companion.diffusion.sampling import sample
from companion.evaluation.known_counts import CountProblem
from companion.operators.counts import poisson_counts
from companion.operators.linear import Identity
from companion.operators.pet import ParallelBeam, background, emission_model, with_counts
from companion.randomness import generators
from companion.reconstruction.pet import mlem

SIZE = 6
LEVELS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


def prior(lesion: float = 0.0) -> GaussianDenoiser:
    return CountProblem(SIZE, lesion=lesion).prior


def dense(A):
    return A(torch.eye(SIZE**2).reshape(-1, *A.domain_shape)).flatten(1).T.double()


def exact_posterior(components, M, b, y, count=20000):
    """Mean and variance of p(x | counts) by importance sampling from a Laplace approximation for each component of the
    prior, 10 % wider; and the share of draws that count."""
    generator = torch.Generator().manual_seed(0)
    xs, logs = [], []
    for D in components:
        mu, U = D.mean.flatten(), D.basis.U
        C = U @ torch.diag(D.variances.flatten()) @ U.T
        P, m = torch.linalg.inv(C), mu
        for _ in range(30):  # Newton, from inside
            e = (M @ m + b).clamp(min=1e-3)
            H = M.T @ (y / e**2)[:, None].mul(M) + P
            m = m + 0.7 * torch.linalg.solve(H, M.T @ (y / e - 1) - P @ (m - mu))
        L = 1.1 * torch.linalg.cholesky(torch.linalg.inv(H))
        n = torch.randn(count, len(mu), generator=generator, dtype=torch.float64)
        x = m + n @ L.T
        e = x @ M.T + b
        possible = (e > 0).all(1)
        log = (torch.xlogy(y, e.clamp(min=1e-9)) - e).sum(1) - ((x - mu) @ P * (x - mu)).sum(1) / 2
        log = log - torch.linalg.slogdet(C)[1] / 2 + n.square().sum(1) / 2 + L.diagonal().log().sum()
        xs.append(x)
        logs.append(torch.where(possible, log, -math.inf))
    x, w = torch.cat(xs), torch.softmax(torch.cat(logs), 0)
    mean = w @ x
    return mean, w @ (x - mean) ** 2, 1 / (w.square().sum() * len(w)).item()


@cache
def problem(kind: str, counts: float):
    """(prior, A, background, counts, posterior mean, posterior variance) of a small scan."""
    parts = [prior(), prior(6.0)] if kind == "mixture" else [prior()]
    D = parts[0] if len(parts) == 1 else GaussianMixtureDenoiser(torch.ones(2), parts)
    A = emission_model(ParallelBeam((SIZE, SIZE)), factors=torch.linspace(0.6, 1.0, SIZE).expand(1, 2 * SIZE, SIZE))
    x = parts[-1].draw(1, torch.Generator().manual_seed(1)).float().clamp(min=0)
    A = with_counts(A, x, counts)
    b = background(A(x), randoms=0.2, scatter=0.2) if kind == "background" else torch.zeros(1, *A.range_shape)
    y = poisson_counts(A(x) + b, [2])
    mean, variance, effective = exact_posterior(parts, dense(A), b.flatten().double(), y.flatten().double())
    assert effective > 0.02
    return D, A, b if kind == "background" else None, y, mean, variance


def score(x, mean, variance):
    """Error of the mean in posterior deviations, its Monte-Carlo part removed; variance ratio; error of the sum."""
    x = x.flatten(1).double()
    z2 = ((x.mean(0) - mean) ** 2 / variance).mean() - (x.var(0) / variance).mean() / len(x)
    ratio, total = x.var(0).mean() / variance.mean(), x.mean(0).sum() / mean.sum()
    return z2.clamp(min=0).sqrt().item(), ratio.item(), total.item()


def measured(D):
    return Measured.fit(D, D.draw(200, torch.Generator().manual_seed(3)).float(), LEVELS, bins=4)


@pytest.mark.parametrize(("kind", "counts"), [("gaussian", 150), ("gaussian", 5000), ("background", 1000)])
@pytest.mark.parametrize("tails", [None, 8.0])
def test_gibbs_draws_from_the_posterior_of_counts(kind, counts, tails):
    """Heavy tails cost little where they are not needed."""
    D, A, b, y, mean, variance = problem(kind, counts)
    G = poisson_mean(A, y, background=b, covariance=measured(D))
    draws = poisson_gibbs(D, G, karras(20, 0.3, 60.0), seeds=range(400), tails=tails)
    error, ratio, total = score(draws.x, mean, variance)
    assert error < 0.1 and abs(ratio - 1) < (0.06 if tails is None else 0.12)
    assert abs(total - 1) < (0.015 if counts < 1000 else 0.006)
    assert draws.bill.denoiser_calls == 20
    less_noisy = score(draws.mean, mean, variance)  # its Monte-Carlo part is smaller: variance of means of posteriors
    assert less_noisy[0] < 0.1 and less_noisy[1] < ratio


def test_without_tails_it_is_annealed_gibbs():
    D, A, b, y, *_ = problem("background", 1000)
    G = poisson_mean(A, y, background=b, covariance=measured(D))
    same = annealed_gibbs(D, G, karras(4, 0.3, 60.0), seeds=range(3), dtype=torch.float32)
    assert torch.equal(poisson_gibbs(D, G, karras(4, 0.3, 60.0), seeds=range(3), tails=None).x, same.x)


def test_gibbs_finds_out_whether_there_is_a_lesion():
    """Two kinds of people, with and without: a posterior that is no Gaussian."""
    D, A, b, y, mean, variance = problem("mixture", 400)
    G = poisson_mean(A, y, covariance=measured(D))
    for tails in (None, 8.0):
        draws = poisson_gibbs(D, G, karras(30, 0.3, 60.0), seeds=range(400), tails=tails)
        error, ratio, _ = score(draws.x, mean, variance)
        assert error < 0.12 and abs(ratio - 1) < 0.12


def test_heavy_tails_widen_only_where_the_last_draw_contradicts_the_denoiser():
    D = GaussianDenoiser(torch.zeros(1, 12, 12), torch.ones(1, 12, 12))
    x, sigma = torch.zeros(1, 1, 12, 12), torch.ones(1)  # D says 0 with variance 1/2
    z = torch.full_like(x, 0.5**0.5)
    z[..., 9:, 9:] = 5.0
    mean, v = Widened(D, z, 8.0, 3).moments(x, sigma)
    assert torch.allclose(mean, x)
    assert torch.allclose(v[..., :7, :7], torch.tensor(0.5)), "as far off as stated: nothing changes"
    assert torch.allclose(v[..., 11, 11], torch.tensor(0.5 * (8 + 9 * 50) / (8 + 9)), rtol=1e-4)
    _, calm = Widened(D, x, 8.0, 3).moments(x, sigma)
    assert torch.allclose(calm, torch.tensor(0.5 * 8 / 17))


@pytest.mark.parametrize(
    ("rule", "error", "ratio"),
    [
        (lambda *a, **k: poisson_mean(*a, **k), 0.3, 0.3),
        (lambda *a, **k: em_steps(*a, iterations=8, **k), 0.3, 0.3),
        (lambda *a, **k: poisson_dps(*a, **k), 0.25, 0.3),
        (lambda *a, **k: poisson_pigdm(*a, prior_std=2.5, **k), 0.2, 0.15),
    ],
    ids=["poisson_mean", "em_steps", "dps", "pigdm"],
)
def test_guided_samplers_come_near_the_posterior(rule, error, ratio):
    """What each of them is known to miss is in docs/pet.md; none may be further off than this."""
    D, A, b, y, mean, variance = problem("background", 1000)
    G = rule(A, y, background=b)
    draws = sample(G(D), karras(25, 0.15, 200.0), shape=A.domain_shape, seeds=range(200), solver="dpmpp_2m")
    e, r, total = score(draws.x, mean, variance)
    assert e < error and abs(r - 1) < ratio and abs(total - 1) < 0.05


def test_the_gaussian_at_the_estimate_has_the_gradient_of_the_counts():
    _, A, b, y, *_ = problem("background", 1000)
    m = torch.full((1, *A.domain_shape), 8.0)
    W, data = poisson_mean(A, y, background=b).whitened(m)
    expected = A(m) + b
    assert torch.allclose(W.H(data - W(m)), A.H(y / expected - 1), rtol=1e-4, atol=1e-4)


def test_a_draw_for_known_weights_has_the_right_mean_and_variance():
    """One pixel a bin: N(m, v) times Poisson near m is a scalar problem."""
    A, y = Identity((1, 1, 4), torch.float32), torch.tensor([90.0, 100, 110, 400]).reshape(1, 1, 1, 4)
    D = GaussianDenoiser(torch.full((1, 1, 4), 100.0), torch.full((1, 1, 4), 50.0))
    G = poisson_mean(A, y, iterations=20, tol=0.0)
    sigma = torch.full((4000,), 1e4)
    x0_hat, C = G.covariance(D, torch.full((4000, 1, 1, 4), 100.0), sigma)
    x = G.draw(x0_hat, C, generators(range(4000)))
    gain = 50 / (50 + 100)
    assert torch.allclose(x.mean(0).flatten(), 100 + gain * (y.flatten() - 100), atol=0.5)
    assert torch.allclose(x.var(0).flatten(), torch.full((4,), 50 * (1 - gain)), rtol=0.1)


def test_anchored_em_lies_between_the_anchor_and_mlem_and_climbs():
    _, A, b, y, *_ = problem("background", 1000)
    anchor = torch.full((1, *A.domain_shape), 8.0)
    assert torch.allclose(anchored_em(anchor, torch.tensor(0.0), y, A, b), anchor)
    free = anchored_em(anchor, torch.tensor(1e12), y, A, b, iterations=10)
    assert torch.allclose(free, mlem(y, A, b, iterations=10, x0=anchor).x, rtol=1e-3)

    def log_posterior(x):
        expected = A(x) + b
        return (torch.xlogy(y, expected) - expected).sum() - (x - anchor).square().sum() / (2 * 4.0)

    values = [log_posterior(anchored_em(anchor, torch.tensor(4.0), y, A, b, iterations=k)) for k in (1, 3, 10, 30)]
    assert all(a <= c + 1e-3 for a, c in zip(values, values[1:], strict=False))
    empty = anchored_em(torch.zeros_like(anchor), torch.tensor(4.0), torch.zeros_like(y), A, iterations=50)
    assert torch.isfinite(empty).all() and (empty >= 0).all() and empty.max() < 1e-6


def test_nothing_breaks_without_counts():
    D, A, _, y, *_ = problem("gaussian", 150)
    G = poisson_mean(A, torch.zeros_like(y), covariance=measured(D))
    draws = poisson_gibbs(D, G, karras(6, 0.3, 60.0), seeds=range(4))
    assert torch.isfinite(draws.x).all() and draws.x.mean() < D.mean.mean()


def test_what_is_not_counts_is_refused():
    _, A, _, y, *_ = problem("gaussian", 150)
    for rule in (poisson_mean, poisson_dps, poisson_pigdm, em_steps):
        with pytest.raises(ValueError, match="must not be negative"):
            rule(A, y - 1 - y.max())
        with pytest.raises(ValueError, match="whole numbers"):
            rule(A, y + 0.5)
        with pytest.raises(ValueError, match="pass the data of this operator"):
            rule(A, y[..., :-1])
        with pytest.raises(ValueError, match="background must not be negative"):
            rule(A, y, background=-torch.ones_like(y))


def test_scaling_the_units_scales_the_draws():
    D, A, _, y, *_ = problem("gaussian", 5000)
    scaled = GaussianDenoiser(D.mean / 10, D.basis.U @ torch.diag(D.variances.flatten()) @ D.basis.U.T / 100)
    x = [
        annealed_gibbs(E, poisson_mean(k * A, y), karras(5, 0.3 / k, 60.0 / k), seeds=range(3), dtype=torch.float32).x
        for E, k in ((D, 1), (scaled, 10))
    ]
    assert torch.allclose(x[0], 10 * x[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("background", [0.0, 0.4])
def test_truths_rank_evenly_among_the_draws_and_not_among_narrower_ones(background):
    known = CountProblem(SIZE, counts=1000, background=background)

    def draw(A, y, b, seeds):
        G = poisson_mean(A, y, background=b, covariance=known.covariance)
        return poisson_gibbs(known.prior, G, karras(20, 0.3, 60.0), seeds=seeds).x

    def narrow(*given):
        x = draw(*given).unflatten(0, (-1, 9))
        return (x.mean(1, keepdim=True) + 0.5 * (x - x.mean(1, keepdim=True))).flatten(0, 1)

    p, ranks = known.ranks(draw, cases=60)
    assert p > 0.05 and ranks.shape == (60, 5) and 0 <= ranks.min() and ranks.max() <= 9
    assert known.ranks(narrow, cases=60)[0] < 0.01


def volume_of_counts(ties: float) -> poisson_mean:
    """Two slices that no line ties together, and 50 counts in each pixel."""
    A = 5.0 * Identity((1, 2, SIZE, SIZE), torch.float32)
    y = poisson_counts(torch.full((1, 1, 2, SIZE, SIZE), 50.0), [0])
    return poisson_mean(A, y, covariance=Measured(torch.tensor([1.0]), torch.ones(1, 1)), ties=ties)


def test_ties_have_the_value_of_the_relative_difference_prior():
    G = volume_of_counts(1.5)
    a, b = 4.0, 10.0
    m = torch.stack([torch.full((SIZE, SIZE), v) for v in (a, b)])[None, None]
    value = 0.5 * (G.tied(m) * (b - a)).square()
    exact = 1.5 * (b - a) ** 2 / (a + b + 2 * (b - a))  # [nuyts2002], gamma 2
    assert value.shape == (1, 1, 1, SIZE, SIZE) and torch.allclose(value, torch.tensor(exact), rtol=0.02)
    assert torch.isfinite(G.tied(torch.zeros_like(m))).all(), "an empty image is tied, too"
    assert G.near(m).A.range_shape == (3 * SIZE**2,) and volume_of_counts(0.0).near(m).A.range_shape != (3 * SIZE**2,)


def test_ties_draw_neighbouring_slices_together_and_means_are_averaged():
    """A flat prior of each pixel, N(10, 9): what a tie does to a pair of pixels is known in closed form."""
    D = GaussianDenoiser(torch.full((1, 2, SIZE, SIZE), 10.0).double(), 9 * torch.eye(2 * SIZE**2).double())
    levels = [6.0, 4.0, 3.0, 2.0, 1.0]

    def drawn(ties: float, averaged: int = 1):
        C = Measured.fit(D, D.draw(40, torch.Generator().manual_seed(0)).float(), levels, bins=1)
        G = dataclasses.replace(volume_of_counts(ties), covariance=C)
        return poisson_gibbs(D, G, levels, seeds=range(60), tails=None, averaged=averaged)

    free, tied, averaged = drawn(0.0), drawn(10.0), drawn(10.0, 4)
    alone, weight = 1 / 9 + 25 / 50, 2 * 10.0 / 20  # the latter of equal voxels; less of those that differ
    apart, together = (found.x.diff(dim=2).var(0).mean().item() for found in (free, tied))
    assert apart == pytest.approx(2 / alone, rel=0.1)
    assert 1 <= together / (2 / (alone + 2 * weight)) < 1.25
    assert torch.equal(averaged.x, tied.x), "means take nothing from the draws"
    assert (averaged.mean - tied.mean).abs().max() > 0
    spread, less = (f.mean.var(0).mean().item() for f in (tied, averaged))
    assert less < 0.6 * spread, "of means of sweeps that forget"
