"""Rectified flow and schedules that leave no signal: in closed form on Gaussians."""

import pytest
import torch

from companion.diffusion.denoisers import DiscreteDenoiser, FlowDenoiser
from companion.diffusion.losses import flow_loss
from companion.diffusion.noise import DiscreteSchedule, flow_levels, scaled_linear_betas
from companion.diffusion.sampling import sample
from companion.models import architectures, folder
from companion.models import checkpoint as weights
from companion.randomness import randn


class Velocity(torch.nn.Module):
    """E[n - x0 | x_t] for x0 ~ N(0, 1): x_t (2 t - 1) / ((1 - t)^2 + t^2)."""

    def forward(self, x, t, cond=None):
        t = (t / 1000).reshape(-1, *[1] * (x.ndim - 1))
        return x * (2 * t - 1) / ((1 - t) ** 2 + t**2)


def test_the_exact_velocity_is_the_exact_denoiser():
    D = FlowDenoiser(Velocity())
    x, sigma = torch.randn(3, 1, 5, 5, dtype=torch.float64), torch.tensor([0.01, 1.0, 60.0], dtype=torch.float64)
    torch.testing.assert_close(D(x, sigma), x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2))


def test_flow_loss_is_the_variance_of_the_velocity():
    """Var(n - x0 | x_t) = 1 / ((1 - t)^2 + t^2) is what the exact velocity cannot explain."""
    x0 = torch.randn(4, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.3, 0.5, 1.0])
    loss = flow_loss(FlowDenoiser(Velocity()), x0, torch.Generator().manual_seed(1), t=t)
    torch.testing.assert_close(loss, 1 / ((1 - t) ** 2 + t**2), rtol=0.05, atol=0)
    drawn = flow_loss(FlowDenoiser(Velocity()), x0, torch.Generator().manual_seed(1))
    assert drawn.shape == (4,) and torch.isfinite(drawn).all()
    with pytest.raises(TypeError, match="give a generator"):
        flow_loss(FlowDenoiser(Velocity()), x0)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_order_of_solvers_on_flow_levels(solver, order):
    """The probability flow of N(0, 1) takes x at sigma to x / sqrt(1 + sigma^2)."""
    state = torch.ones(1, 1, 2, 2, dtype=torch.float64)

    def error(n):
        levels = flow_levels(n, 0.05, 20.0)[:-1]  # the last step, into 0, is of first order for every solver
        x = sample(
            FlowDenoiser(Velocity()), levels, shape=(1, 2, 2), seeds=0, solver=solver, state=state, dtype=torch.float64
        ).x
        exact = state * ((1 + 0.05**2) / (1 + 20.0**2)) ** 0.5
        return (x - exact).abs().max().item()

    coarse, fine = error(40), error(80)
    assert 2**order * 0.75 < coarse / fine < 2**order * 1.35


def test_a_step_of_euler_is_a_straight_step_of_the_flow():
    D, levels = FlowDenoiser(Velocity()), flow_levels(4, 0.1, 10.0)
    t = levels / (1 + levels)
    torch.testing.assert_close(t[:-1].diff(), t[1] - t[0] + torch.zeros(3, dtype=torch.float64))
    y = randn((1, 1, 3, 3), torch.float64, torch.Generator().manual_seed(0)) * levels[0]
    by_levels = sample(D, levels[:2], shape=(1, 3, 3), seeds=0, solver="euler", state=y, dtype=torch.float64).x
    x_t = (1 - t[0]) * y
    straight = x_t + (t[1] - t[0]) * D.velocity(x_t, t[:1])
    torch.testing.assert_close(by_levels, straight / (1 - t[1]))


def test_a_shift_multiplies_noise_levels_and_bends_time():
    """t -> r t / (1 + (r - 1) t), from one end of the range to the other."""
    plain, shifted = flow_levels(6, 0.1, 10.0), flow_levels(6, 0.3, 30.0, shift=3.0)
    torch.testing.assert_close(shifted, 3 * plain)
    t, bent = plain / (1 + plain), shifted / (1 + shifted)
    torch.testing.assert_close(bent, 3 * t / (1 + 2 * t))
    with pytest.raises(ValueError, match="above 0"):
        flow_levels(6, shift=0)


def test_a_velocity_to_the_data_is_the_same_denoiser():
    class Back(Velocity):
        def forward(self, x, t, cond=None):
            return -super().forward(x, t)

    x, sigma = torch.randn(2, 1, 5, 5), torch.tensor([0.1, 3.0])
    assert torch.equal(FlowDenoiser(Back(), to_data=True)(x, sigma), FlowDenoiser(Velocity())(x, sigma))


def test_flow_priors_are_checkpoints_like_all_others(tmp_path):
    config = {
        "network": {
            "name": "UNet",
            "in_channels": 1,
            "model_channels": 32,
            "out_channels": 1,
            "num_res_blocks": 1,
            "channel_mult": [1],
            "attention_resolutions": [],
        },
        "denoiser": {"name": "FlowDenoiser"},
        "data": {"source": "noise", "scale": "1"},
    }
    D = architectures.build(config)
    folder.save_checkpoint(tmp_path / "flow", D, config, {})
    again, x = weights.load_denoiser(tmp_path / "flow"), torch.randn(1, 1, 4, 4)
    assert isinstance(again, FlowDenoiser)
    torch.testing.assert_close(again(x, torch.ones(1)), D.eval()(x, torch.ones(1)))
    with pytest.raises(ValueError, match="returned shape"):
        FlowDenoiser(lambda x, t: x[:, :0]).velocity(x, torch.ones(1))


def test_zero_terminal_schedule():
    """Lin et al. 2024: no signal at the end, the first level as before, the rest in order."""
    plain, zero = DiscreteSchedule(scaled_linear_betas(1000)), DiscreteSchedule.zero_terminal(1000)
    assert zero.alphas_cumprod[-1] == 0 and zero.betas[-1] == 1
    torch.testing.assert_close(zero.alphas_cumprod[0], plain.alphas_cumprod[0])
    assert (zero.alphas_cumprod.diff() < 0).all()
    root, before = zero.alphas_cumprod.sqrt(), plain.alphas_cumprod.sqrt()
    share = (before - before[-1]) / (before[0] - before[-1])
    torch.testing.assert_close(root, share * before[0], rtol=1e-6, atol=1e-9)


def test_v_networks_work_up_to_zero_signal():
    """v = -x0 where no signal is left: for N(0, 1) the exact v is 0 there and D gives the mean, 0."""
    D = DiscreteDenoiser(lambda x, t: torch.zeros_like(x), DiscreteSchedule.zero_terminal(100), "v")
    x = torch.randn(2, 1, 4, 4)
    for sigma in (0.1, 1e3):
        expected = x / (1 + sigma**2)  # of a unit Gaussian
        torch.testing.assert_close(D(x * 1.0, torch.full((2,), sigma)), expected, rtol=1e-4, atol=1e-6)
