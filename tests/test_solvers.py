"""A Gaussian prior makes every sampler linear, so its law and its order are known without Monte Carlo."""

import math
import warnings

import pytest
import torch

from companion.diffusion.ddpm import DiscreteProcess
from companion.diffusion.denoisers import DiscreteDenoiser
from companion.diffusion.exact import GaussianDenoiser
from companion.diffusion.noise import DiscreteSchedule, karras, log_uniform
from companion.diffusion.sampling import sample
from companion.diffusion.solvers import DDIM, DDPM, SOLVERS, AIDStochastic, DPMpp2M, DPMpp2MSDE, Euler, Heun, HeunChurn

VARIANTS = [
    Euler(),
    Heun(),
    DPMpp2M(),
    DDIM(0.0),
    DDIM(0.5),
    DDIM(1.0),
    DDPM("small"),
    DDPM("large"),
    HeunChurn(S_churn=0.0),
    HeunChurn(S_churn=5.0, S_min=0.0, S_max=math.inf, S_noise=1.0),
    DPMpp2MSDE(0.0),
    DPMpp2MSDE(0.5),
    DPMpp2MSDE(1.0),
]


class Scalar:
    """The exact denoiser of N(0, variance)."""

    def __init__(self, variance):
        self.variance, self.calls = variance, 0

    def __call__(self, x, sigma):
        self.calls += 1
        return self.variance / (self.variance + sigma**2) * x

    def moments(self, x, sigma):
        posterior = self.variance * sigma**2 / (self.variance + sigma**2)
        return self(x, sigma), torch.tensor(posterior, dtype=torch.float64)


def variance_at_the_end(solver, levels, variance):
    """Exact variance of a sampler's output, started from the true law at levels[0].

    x holds the coefficients of all the independent noises that the sampler has drawn so far.
    """
    x = torch.zeros(len(levels), dtype=torch.float64)
    x[0] = math.sqrt(variance + levels[0] ** 2)
    drawn = iter(range(1, len(levels)))

    def noise():
        one = torch.zeros_like(x)
        one[next(drawn)] = 1
        return one

    memory, D = None, Scalar(variance)
    for i in range(len(levels) - 1):
        x, _, memory = solver.step(D, x, levels, i, noise, memory)
    return (x**2).sum().item()


@pytest.mark.parametrize("solver", VARIANTS, ids=repr)
def test_measured_order_of_the_law_is_the_stated_one(solver):
    variance, errors = 0.7, []
    for steps in (80, 160, 320):
        levels = log_uniform(steps + 1, 0.05, 20.0)[:-1].tolist()
        errors.append(abs(variance_at_the_end(solver, levels, variance) / (variance + 0.05**2) - 1))
    measured = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert measured[-1] == pytest.approx(solver.order, abs=0.06), measured
    assert errors[-1] < (0.03 if solver.order == 1 else 1e-3)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "ddim"])
def test_order_of_the_trajectory_through_sample(solver):
    """The probability flow of N(0, C) scales x by sqrt((C + sigma_end^2) / (C + sigma_0^2))."""
    C = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64).reshape(1, 1, 3)
    D, errors = GaussianDenoiser(torch.zeros_like(C), C), []
    state = torch.ones(1, 1, 1, 3, dtype=torch.float64)
    exact = ((C + 0.05**2) / (C + 10.0**2)).sqrt()
    for steps in (60, 120, 240):
        levels = log_uniform(steps + 1, 0.05, 10.0)[:-1]
        x = sample(D, levels, shape=C.shape, seeds=0, solver=solver, state=state, dtype=torch.float64).x
        errors.append((x[0] - exact).norm().item())
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(SOLVERS[solver].order, abs=0.1)


@pytest.mark.parametrize("name", SOLVERS)
def test_stated_calls_are_the_calls_made(name):
    D, solver, x = Scalar(1.0), SOLVERS[name](), torch.ones(3, dtype=torch.float64)
    solver.step(D, x, [2.0, 1.0, 0.0], 0, lambda: torch.zeros(3), None)
    assert D.calls == solver.calls and solver.name == name


@pytest.mark.parametrize("name", SOLVERS)
def test_stochastic_and_deterministic_members_agree_on_the_mean_and_the_last_step(name):
    """Into sigma = 0 every solver returns its estimate x0_hat."""
    if name == "heun_churn":
        solver = HeunChurn(S_churn=0.0)
    else:
        solver = SOLVERS[name]()
    D, x = Scalar(1.0), torch.full((3,), 0.4, dtype=torch.float64)
    step = solver.step(D, x, [0.5, 0.0], 0, lambda: torch.ones(3, dtype=torch.float64), None)
    torch.testing.assert_close(step.x, D(x, 0.5))
    torch.testing.assert_close(step.x0_hat, D(x, 0.5))


def pairs_that_are_one_method():
    return [(DDIM(0.0), Euler()), (DDIM(1.0), DDPM("small")), (DPMpp2MSDE(0.0), DPMpp2M())]


@pytest.mark.parametrize("one, other", pairs_that_are_one_method(), ids=repr)
def test_names_of_the_same_method(one, other):
    C = torch.tensor([0.1, 0.5, 2.0]).reshape(1, 1, 3)
    D = GaussianDenoiser(torch.zeros_like(C), C)
    x, y = (sample(D, karras(12), shape=(1, 1, 3), seeds="0-3", solver=s).x for s in (one, other))
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_ddpm_with_the_true_variance_is_exact_in_few_steps():
    levels = log_uniform(6, 0.05, 20.0)[:-1].tolist()
    law = variance_at_the_end(DDPM("learned"), levels, 0.7)
    assert law == pytest.approx(0.7 + 0.05**2, rel=1e-9)
    assert variance_at_the_end(DDPM("small"), levels, 0.7) < 0.5 * law  # too narrow: x0 is taken as known


def test_ddpm_large_is_exact_for_white_data_of_unit_variance():
    levels = log_uniform(6, 0.05, 20.0)[:-1].tolist()
    assert variance_at_the_end(DDPM("large"), levels, 1.0) == pytest.approx(1 + 0.05**2, rel=1e-9)


def test_the_rule_of_aid_halves_the_variance_as_its_docstring_says():
    levels = log_uniform(1000, 0.02, 20.0)[:-1].tolist()
    law = variance_at_the_end(AIDStochastic(), levels, 0.7)
    assert law / 0.7 == pytest.approx(0.5, abs=0.02)


def test_monte_carlo_law_of_stochastic_solvers_through_sample():
    mean, C = torch.tensor([1.0, -2.0]).reshape(1, 1, 2), torch.tensor([0.25, 1.5]).reshape(1, 1, 2)
    D = GaussianDenoiser(mean, C)
    for solver in (DDPM("learned"), HeunChurn(S_churn=5.0, S_noise=1.0), DPMpp2MSDE()):
        x = sample(D, karras(25, 0.01, 20.0), shape=(1, 1, 2), seeds=range(1500), solver=solver).x
        torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.12)
        torch.testing.assert_close(x.var(0), C, rtol=0.15, atol=0)


def test_churn_warns_exactly_when_it_saturates():
    with pytest.warns(UserWarning, match="24.85 gives the same"):  # the published PET setting
        HeunChurn(S_churn=40.0).check(karras(60).tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HeunChurn(S_churn=40.0).check(karras(256).tolist())
        HeunChurn(S_churn=40.0, S_min=100.0, S_max=200.0).check(karras(60).tolist())  # empty window


def test_discrete_ancestral_chain_is_the_ddpm_solver():
    """x_t / sqrt(abar_t) of the chain of Ho et al. is the state of our solver, for the same noise."""
    schedule = DiscreteSchedule.linear().respace("10")

    def network(x, t, cond=None):
        return 0.3 * x + t.reshape(-1, 1, 1, 1).to(x) / 1000

    process = DiscreteProcess(schedule)
    noises = torch.randn(11, 2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = noises[0] * schedule.alphas_cumprod[-1].sqrt() * schedule.sigmas[-1]
    x, queue = x_t / schedule.alphas_cumprod[-1].sqrt(), iter(noises[1:])
    D, levels = DiscreteDenoiser(network, schedule), schedule.levels().tolist()
    for i, index in enumerate(range(9, -1, -1)):
        t = torch.full((2,), index)
        x_t = process.step(network(x_t, process.network_t(t)), x_t, t, noises[1 + i])
        at_level = lambda x, sigma: D(x, torch.full((2,), sigma, dtype=torch.float64))  # noqa: E731
        x = DDPM().step(at_level, x, levels, i, lambda: next(queue), None).x
        scale = schedule.alphas_cumprod[index - 1].sqrt() if index else 1.0
        torch.testing.assert_close(x_t / scale, x)


@pytest.mark.parametrize("wrong", [lambda: DDIM(1.5), lambda: DDIM(-0.1), lambda: DDPM("tiny"), lambda: DPMpp2MSDE(-1)])
def test_impossible_parameters_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong()
