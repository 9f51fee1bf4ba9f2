"""Annealed Langevin dynamics against its own exact law and against closed-form posteriors."""

import pytest
import torch

from companion.diffusion.exact import GaussianDenoiser
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.langevin import langevin
from companion.operators.linear import Diagonal

COPIES = 3000  # columns of the image: independent pixels under the same law, each row of 4 pixels


def rows(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype).reshape(1, 4, 1).expand(1, 4, COPIES)


GAIN = rows(0.0, 0.5, 1.0, 0.9)  # of the data: a pixel unmeasured, three measured
PRIOR = rows(0.5, 1.0, 0.2, 2.0)  # variance per real component
MEAN = rows(1.0, -1.0, 0.5, 0.0)
NOISE = 0.3


def problem(dtype=torch.complex64):
    """Exact denoiser, data and y. Complex images are real ones turned by 0.7 rad, and A turns them as far again."""
    phase = torch.exp(torch.tensor(0.7j)).to(dtype) if dtype.is_complex else 1.0
    A = Diagonal((GAIN * phase).to(dtype), GAIN.shape)
    y = rows(0.0, 2.0, -1.0, 1.0, dtype=dtype)[None] * phase**2
    return GaussianDenoiser((MEAN * phase).to(dtype), PRIOR), posterior_mean(A, y, NOISE), y


def moments(x):
    """Mean and variance of the real and the imaginary part of each row, (4, 1 or 2), turned back."""
    if x.is_complex():
        x = torch.view_as_real(x * torch.exp(torch.tensor(-0.7j)))
    x = x.reshape(4, COPIES, -1)
    return x.mean(1), x.var(1)


def chain_law(y, levels, steps, step_size):
    """Mean and variance per real component of what `langevin` draws: its steps are linear."""
    m, v = torch.zeros_like(MEAN), torch.full_like(MEAN, levels[0] ** 2)
    for sigma in levels:
        shrink, pull = sigma**2 / (PRIOR + sigma**2), step_size / (1 + (NOISE / sigma) ** 2)
        for _ in range(steps):
            m = m + step_size * shrink * (MEAN - m) + pull * GAIN * (y - GAIN * m)
            v = (1 - step_size * shrink - pull * GAIN**2) ** 2 * v + 2 * step_size * sigma**2
    return (m + shrink * (MEAN - m))[0, :, :1], ((1 - shrink) ** 2 * v)[0, :, :1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("levels, steps, size", [([3.0], 1, 0.3), ([2.0, 0.5, 0.1], 3, 0.3), ([1.0, 0.2], 2, 0.95)])
def test_draws_have_the_law_of_the_stated_steps(dtype, levels, steps, size):
    """Also where the steps are far too few to reach the posterior."""
    D, G, _ = problem(dtype)
    x = langevin(D, G, levels, seeds=0, steps=steps, step_size=size, dtype=dtype).x
    assert x.dtype == dtype and x.shape == (1, 1, 4, COPIES)
    mean, variance = chain_law(rows(0.0, 2.0, -1.0, 1.0), levels, steps, size)
    found_mean, found_variance = moments(x)
    expected = torch.cat([mean, torch.zeros_like(mean)], 1)[:, : found_mean.shape[1]]
    assert ((found_mean - expected).abs() < 4.5 * (variance / COPIES).sqrt()).all()
    assert ((found_variance / variance - 1).abs() < 4.5 * (2 / COPIES) ** 0.5).all()


def test_many_small_steps_draw_from_the_posterior():
    """Within 0.3 of its standard deviations and 17 % of its variances.

    By the exact law 0.22 and 6 % are due to the last level, 0.08, which widens prior and likelihood, and to its steps;
    the rest is what 3000 draws leave open (4.5 standard errors).
    """
    D, G, y = problem(torch.float32)
    x = langevin(D, G, [3.0, 1.0, 0.4, 0.16, 0.08], seeds=0, steps=800, step_size=0.1, dtype=torch.float32).x
    mean, variance = moments(x)
    precision = (1 / PRIOR + GAIN**2 / NOISE**2)[0, :, :1]
    exact = (MEAN / PRIOR + GAIN * y[0] / NOISE**2)[0, :, :1] / precision
    assert ((mean - exact).abs() < 0.3 / precision.sqrt()).all()
    assert ((variance * precision - 1).abs() < 0.17).all()


@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_seed_gives_the_same_draw_alone_and_in_a_batch(batch_size):
    D, G, _ = problem()
    together = langevin(D, G, [1.0, 0.3, 0.0], seeds="0-6", batch_size=batch_size)
    alone = langevin(D, G, [1.0, 0.3], seeds=5)
    torch.testing.assert_close(together.x[5:6], alone.x)
    assert not torch.equal(together.x[0], together.x[1])
    assert together.bill.denoiser_calls == alone.bill.denoiser_calls


def test_the_condition_and_each_draws_own_data_reach_their_draw():
    D, G, y = problem()
    many = posterior_mean(G.A, torch.cat([y, 2 * y]), NOISE)
    x = langevin(D, many, [1.0, 0.3], seeds=[4, 4]).x
    torch.testing.assert_close(x[:1], langevin(D, G, [1.0, 0.3], seeds=4).x)
    assert not torch.allclose(x[0], x[1])
    seen = []

    def listening(x, sigma, cond=None):
        seen.append((len(x), cond))
        return D(x, sigma)

    cond = torch.arange(2.0).reshape(2, 1)
    result = langevin(listening, G, [1.0, 0.3], seeds="0-1", steps=2, cond=cond)
    assert len(seen) == 2 * 2 + 1 and all(torch.equal(c, cond) for _, c in seen)
    assert (result.bill.denoiser_calls, result.bill.operator_calls) == (5, 8)


def test_errors_say_what_to_do():
    D, G, _ = problem()
    for sigmas in ([], [0.0], [0.1, 0.2], [1.0, -1.0], [float("nan")]):
        with pytest.raises(ValueError, match="levels must be"):
            langevin(D, G, sigmas, seeds=0)
    with pytest.raises(ValueError, match="steps"):
        langevin(D, G, [1.0, 1.0, 0.1], seeds=0)
    for options in (dict(steps=0), dict(step_size=0.0), dict(step_size=1.0), dict(step_size=float("nan"))):
        with pytest.raises(ValueError, match="at least 1 step"):
            langevin(D, G, [1.0], seeds=0, **options)
    with pytest.raises(ValueError, match="seeds"):
        langevin(D, G, [1.0], seeds=[])
