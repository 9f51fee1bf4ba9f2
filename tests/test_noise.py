import math

import pytest
import torch

from companion.diffusion.noise import DiscreteSchedule, karras, linear, log_uniform, respaced_indices
from companion.randomness import generators, parse_seeds, randn

SCHEDULES = {
    "linear": DiscreteSchedule.linear(),
    "cosine": DiscreteSchedule.cosine(),
    "scaled_linear": DiscreteSchedule.scaled_linear(),
}


@pytest.mark.parametrize("levels", [karras, log_uniform, linear])
def test_levels_fall_from_sigma_max_to_sigma_min_to_zero(levels):
    sigmas = levels(18, 0.01, 50.0)
    assert sigmas.shape == (19,) and sigmas.dtype == torch.float64
    assert (sigmas.diff() < 0).all() and sigmas[-1] == 0
    torch.testing.assert_close(sigmas[[0, 17]], torch.tensor([50.0, 0.01], dtype=torch.float64))


def test_karras_is_linear_in_the_rho_th_root_and_log_uniform_has_a_constant_ratio():
    roots = karras(10, rho=7)[:-1] ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(9))
    ratios = log_uniform(10)[1:-1] / log_uniform(10)[:-2]
    torch.testing.assert_close(ratios, ratios[:1].expand(9))
    torch.testing.assert_close(karras(10, rho=1), linear(10))


@pytest.mark.parametrize("bad", [dict(n=0), dict(n=5, sigma_min=0), dict(n=5, sigma_min=2, sigma_max=1)])
def test_impossible_levels_are_refused(bad):
    with pytest.raises(ValueError):
        karras(**bad)


def test_betas_follow_their_formulas():
    assert SCHEDULES["linear"].betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    roots = SCHEDULES["scaled_linear"].betas.sqrt()
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(999))
    time = (torch.arange(1, 900, dtype=torch.float64) / 1000 + 0.008) / 1.008
    signal = (time * math.pi / 2).cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(SCHEDULES["cosine"].alphas_cumprod[:899], signal)


@pytest.mark.parametrize("name", SCHEDULES)
def test_q_posterior_is_bayes_rule(name):
    """Product of two Gaussians in x_{t-1}: q(x_{t-1} | x0) and q(x_t | x_{t-1})."""
    schedule, t = SCHEDULES[name], torch.tensor([1, 17, 998])
    x0, x_t = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    beta = schedule.betas[t][:, None]
    abar_prev = schedule.alphas_cumprod[t - 1][:, None]
    precision = 1 / (1 - abar_prev) + (1 - beta) / beta
    expected = (abar_prev.sqrt() * x0 / (1 - abar_prev) + (1 - beta).sqrt() * x_t / beta) / precision
    mean, variance, log_variance = schedule.q_posterior(x0, x_t, t)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(variance, 1 / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(log_variance.exp(), variance)


def test_q_posterior_at_zero_is_the_clean_image():
    x0, x_t = torch.ones(1, 2), torch.zeros(1, 2)
    mean, variance, log_variance = SCHEDULES["linear"].q_posterior(x0, x_t, torch.tensor([0]))
    assert torch.equal(mean, x0) and variance.item() == 0 and torch.isfinite(log_variance).all()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spec", ["25", "ddim25", "10,15,20", 7, [3, 4]])
def test_respacing_keeps_signal_levels_and_original_times(name, spec):
    schedule = SCHEDULES[name]
    short = schedule.respace(spec)
    assert (short.timesteps.diff() > 0).all()
    torch.testing.assert_close(short.alphas_cumprod, schedule.alphas_cumprod[short.timesteps], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(short.levels()[:-1], schedule.sigmas[short.timesteps].flip(0))
    assert short.levels()[-1] == 0


def test_respacing_grammar():
    assert respaced_indices(1000, "ddim25") == list(range(0, 1000, 40))
    assert respaced_indices(10, "10") == list(range(10))
    assert respaced_indices(1000, "2") == [0, 999]
    sections = respaced_indices(90, "10,15,20")
    assert [sum(low <= i < low + 30 for i in sections) for low in (0, 30, 60)] == [10, 15, 20]
    assert SCHEDULES["linear"].respace("10").respace("5").timesteps[-1] == 999
    for impossible in ("ddim7000", "ddim999", "1001", "0"):
        with pytest.raises(ValueError, match="respacing"):
            respaced_indices(1000, impossible)


def test_sigma_to_t_inverts_the_schedule_and_clamps():
    for schedule in (*SCHEDULES.values(), SCHEDULES["linear"].respace("25")):
        for mode in ("interpolate", "nearest"):
            t = schedule.sigma_to_t(schedule.sigmas, mode)
            torch.testing.assert_close(t.double(), schedule.timesteps.double(), rtol=0, atol=1e-6)
    linear1000 = SCHEDULES["linear"]
    between = (linear1000.sigmas[10] * linear1000.sigmas[11]).sqrt().reshape(1)
    assert linear1000.sigma_to_t(between).item() == pytest.approx(10.5)
    ends = torch.tensor([1e-9, 1e9])
    assert linear1000.sigma_to_t(ends).tolist() == [0, 999]
    assert linear1000.sigma_to_t(ends, "nearest").tolist() == [0, 999]


def test_zero_terminal_signal_is_handled():
    schedule = DiscreteSchedule(torch.tensor([0.1, 0.5, 1.0]))
    assert schedule.sigma_to_t(torch.tensor([0.5, 1e9]))[1] == 2
    assert torch.isfinite(schedule.posterior_mean_coef1).all()


def test_seed_texts():
    assert parse_seeds("0-3,80, 7") == [0, 1, 2, 3, 80, 7]
    assert parse_seeds(5) == [5] and parse_seeds(range(3)) == [0, 1, 2]
    for wrong in ("3-1", "a", "1,,2", "-4", ""):
        with pytest.raises(ValueError, match="seeds"):
            parse_seeds(wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64])
def test_noise_of_a_seed_is_the_same_bits_in_any_batch(dtype):
    batch = randn((2, 9, 5), dtype, generators("0-6"))
    for i in range(7):
        assert torch.equal(batch[i : i + 1], randn((2, 9, 5), dtype, generators(i)))


def test_complex_noise_has_unit_variance_per_component():
    noise = randn((200, 200), torch.complex64, torch.Generator().manual_seed(0))
    assert noise.real.std().item() == pytest.approx(1, abs=0.02)
    assert noise.imag.std().item() == pytest.approx(1, abs=0.02)
    with pytest.raises(TypeError, match="generator"):
        randn((2,), torch.float32, None)
