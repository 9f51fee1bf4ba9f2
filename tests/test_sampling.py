import pytest
import torch
from torch import nn

from companion.diffusion.denoisers import ComplexDenoiser, EDMDenoiser
from companion.diffusion.exact import GaussianDenoiser
from companion.diffusion.noise import karras, log_uniform
from companion.diffusion.sampling import sample
from companion.diffusion.solvers import SOLVERS, ddpm, heun_churn
from companion.randomness import generators

SHAPES = [
    pytest.param((1, 7, 6), torch.float32, id="2D"),
    pytest.param((2, 4, 5, 6), torch.float32, id="3D"),
    pytest.param((1, 7, 6), torch.complex64, id="complex"),
    pytest.param((3, 2, 5, 4), torch.float32, id="sequence"),
    pytest.param((3, 1, 4, 4), torch.complex64, id="complex-sequence"),
]
LEVELS = karras(8, 0.02, 10.0)


def prior(shape, dtype=torch.float32):
    variances = 0.05 + torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return GaussianDenoiser(torch.full(shape, 0.3, dtype=dtype), variances)


class SmallNet(nn.Module):
    """Two convolutions with a time input: non-linear, so that rounding may grow."""

    def __init__(self, channels=2):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(channels, 16, 3, padding=1), nn.Conv2d(16, channels, 3, padding=1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, t, cond=None):
        h = self.first(x if cond is None else x + cond) + t[:, None, None, None]
        return self.last(self.drop(torch.nn.functional.silu(h)))


class Spy:
    """Passes on to D and keeps what it was given."""

    def __init__(self, D):
        self.D, self.seen, self.sizes = D, [], []

    def __call__(self, x, sigma, cond=None):
        self.seen.append((x, sigma, cond))
        return self.D(x, sigma, cond)


@pytest.mark.parametrize("shape, dtype", SHAPES)
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_takes_every_shape(name, shape, dtype):
    solver = heun_churn(S_churn=1.0) if name == "heun_churn" else name
    samples = sample(prior(shape), LEVELS, shape=shape, seeds="0-2", solver=solver, dtype=dtype)
    assert samples.x.shape == (3, *shape) and samples.x.dtype == dtype
    assert torch.isfinite(samples.x.abs()).all()
    calls = len(LEVELS) - 1 if SOLVERS[name].calls == 1 else 2 * (len(LEVELS) - 1) - 1
    assert samples.bill.denoiser_calls == calls and samples.bill.operator_calls == 0


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", ddpm(), "dpmpp_2m_sde"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_seed_gives_the_same_sample_alone_and_in_a_batch_of_seven(solver, dtype):
    shape = (2, 16, 16) if not dtype.is_complex else (1, 16, 16)
    D = EDMDenoiser(SmallNet())
    D = Spy(ComplexDenoiser(D) if dtype.is_complex else D)
    batch = sample(D, LEVELS, shape=shape, seeds="0-6", solver=solver, dtype=dtype).x
    start = D.seen[0][0]
    split = sample(D, LEVELS, shape=shape, seeds="0-6", solver=solver, dtype=dtype, batch_size=3).x
    assert (split - batch).norm() <= 1e-5 * batch.norm()
    for i in range(7):
        D.seen.clear()
        alone = sample(D, LEVELS, shape=shape, seeds=i, solver=solver, dtype=dtype).x[0]
        assert torch.equal(D.seen[0][0][0], start[i])
        assert (alone - batch[i]).norm() <= 1e-5 * batch[i].norm()


def test_heun_draws_have_the_law_of_the_prior():
    D = prior((1, 2, 2))
    x = sample(D, karras(30, 0.005, 30.0), shape=(1, 2, 2), seeds=range(2000)).x
    torch.testing.assert_close(x.mean(0), D.mean, rtol=0, atol=0.08)
    torch.testing.assert_close(x.var(0), D.variances.float(), rtol=0.12, atol=0)


def test_start_is_noised_here_and_state_is_used_as_it_is():
    D, shape = Spy(prior((1, 4, 4))), (1, 4, 4)
    clean = torch.full((1, *shape), 5.0)
    sample(D, [0.5, 0.1, 0.0], shape=shape, seeds="0-1", start=clean)
    noised = D.seen[0][0]
    assert noised.shape == (2, *shape)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators("0-1")])
    torch.testing.assert_close(noised, clean + 0.5 * noise)
    D.seen.clear()
    sample(D, [0.5, 0.1, 0.0], shape=shape, seeds="0-1", state=clean)
    assert torch.equal(D.seen[0][0], clean.expand(2, *shape))


def test_generators_continue_where_they_were():
    one = torch.Generator().manual_seed(3)
    kwargs = dict(shape=(1, 4, 4), solver="ddpm")
    first = sample(prior((1, 4, 4)), LEVELS, seeds=[one], **kwargs).x
    second = sample(prior((1, 4, 4)), LEVELS, seeds=[one], **kwargs).x
    assert torch.equal(first, sample(prior((1, 4, 4)), LEVELS, seeds=3, **kwargs).x)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_cond_of_each_draw_reaches_it(batch_size):
    D = Spy(EDMDenoiser(SmallNet()))
    cond = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 2, 8, 8)
    kwargs = dict(shape=(2, 8, 8), seeds="0-4")
    together = sample(D, LEVELS, cond=cond, batch_size=batch_size, **kwargs).x
    for i in (0, 4):
        alone = sample(D, LEVELS, shape=(2, 8, 8), seeds=i, cond=cond[i : i + 1]).x[0]
        torch.testing.assert_close(alone, together[i], rtol=1e-4, atol=1e-5)
    D.seen.clear()
    sample(D, LEVELS, cond=cond[:1], batch_size=batch_size, **kwargs)
    assert D.seen[0][2].shape[0] == (batch_size or 5)


def test_progress_shows_a_bar(capsys):
    sample(prior((1, 2, 2)), LEVELS, shape=(1, 2, 2), seeds=0, progress=True)
    assert "8/8" in capsys.readouterr().err


def test_callback_trajectory_and_bill():
    D, infos = prior((1, 4, 4)), []
    D.denoiser_calls, D.operator_calls = 2, 7  # as a guided denoiser states
    samples = sample(
        D,
        LEVELS,
        shape=(1, 4, 4),
        seeds="0-3",
        solver="ddim",
        batch_size=3,
        trajectory=True,
        callback=infos.append,
    )
    assert [info["step"] for info in infos] == [*range(8)] * 2
    assert [info["sigma"] for info in infos[:8]] == LEVELS[:-1].tolist()
    assert samples.trajectory.shape == (8, 4, 1, 4, 4)
    torch.testing.assert_close(samples.trajectory[2, :3], infos[2]["x0_hat"])
    torch.testing.assert_close(samples.trajectory[-1], samples.x)
    assert (samples.bill.denoiser_calls, samples.bill.operator_calls) == (16, 56)
    assert samples.bill.seconds > 0


def test_networks_are_evaluated_in_evaluation_mode_and_restored():
    D = EDMDenoiser(SmallNet()).train()
    D.network.last.eval()
    draws = [sample(Spy(D), LEVELS, shape=(2, 8, 8), seeds=0).x for _ in range(2)]
    assert torch.equal(*draws)  # dropout would differ
    assert D.training and D.network.drop.training and not D.network.last.training


def test_gradients_inside_a_guidance_work():
    class ByGradient:
        D = prior((1, 4, 4))

        def __call__(self, x, sigma, cond=None):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                x0_hat = self.D(x, sigma)
                (slope,) = torch.autograd.grad(x0_hat.square().sum(), x)
            return (x0_hat - 0.1 * slope).detach()

    assert not sample(ByGradient(), LEVELS, shape=(1, 4, 4), seeds=0).x.requires_grad


def test_nan_is_reported_with_its_step_and_level():
    def D(x, sigma, cond=None):
        return x * float("nan") if sigma[0] < 1 else x

    with pytest.raises(FloatingPointError, match=r"step 3 of 5, sigma = 0\.1"):
        sample(D, [100, 10, 1, 0.1, 0.01, 0], shape=(1, 2, 2), seeds=0, solver="ddim")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(solver="huen"), "did you mean 'heun'"),
        (dict(sigmas=[1.0, 2.0, 0.0]), "strictly decreasing"),
        (dict(sigmas=[1.0]), "at least two"),
        (dict(sigmas=[1.0, float("nan")]), "decreasing"),
        (dict(sigmas=[1.0, -1.0]), "0 or above"),
        (dict(seeds="7-0"), "backwards"),
        (dict(seeds=[]), "no seeds"),
        (dict(start=torch.zeros(2, 1, 4, 4)), r"expected \(3, 1, 4, 4\)"),
        (dict(state=torch.zeros(1, 1, 4, 5)), "state has shape"),
        (dict(start=torch.full((1, 1, 4, 4), float("nan"))), "NaN"),
        (dict(cond=torch.zeros(2, 1, 4, 4)), "cond has shape"),
        (dict(start=torch.zeros(1, 1, 4, 4), state=torch.zeros(1, 1, 4, 4)), "not both"),
        (dict(solver=ddpm(variance="learned"), D=lambda x, s, c: x), "moments"),
        (dict(D=lambda x, s, c: x[:, :, 1:]), "the denoiser returned"),
    ],
)
def test_mistakes_are_explained(change, message):
    arguments = dict(D=prior((1, 4, 4)), sigmas=log_uniform(4), shape=(1, 4, 4), seeds="0-2") | change
    with pytest.raises(ValueError, match=message):
        sample(arguments.pop("D"), arguments.pop("sigmas"), **arguments)


def test_complex_start_needs_a_complex_state():
    with pytest.raises(TypeError, match="complex64"):
        sample(prior((1, 2, 2)), LEVELS, shape=(1, 2, 2), seeds=0, start=torch.zeros(1, 1, 2, 2) + 0j)
