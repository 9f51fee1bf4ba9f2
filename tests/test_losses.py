import math

import pytest
import torch
from torch import nn

from companion.diffusion.complexify import to_channels
from companion.diffusion.ddpm import DiscreteProcess
from companion.diffusion.denoisers import ComplexDenoiser, DiscreteDenoiser, EDMDenoiser
from companion.diffusion.losses import (
    discrete_loss,
    discrete_terms,
    discretised_log_likelihood,
    edm_loss,
    variational_bound,
)
from companion.diffusion.noise import DiscreteSchedule
from companion.randomness import randn


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class Net(nn.Conv2d):
    def __init__(self, channels=2, out=None):
        torch.manual_seed(0)
        super().__init__(channels, out or channels, 3, padding=1)

    def forward(self, x, t, cond=None):
        return super().forward(x if cond is None else x + cond) + t[:, None, None, None].to(x) / 100


X0 = randn((4, 2, 6, 6), torch.float32, rng(1))


def test_edm_loss_is_the_weighted_error_of_the_denoiser():
    D, sigma, noise = EDMDenoiser(Net(), 0.4), torch.tensor([0.01, 0.3, 2.0, 30.0]), torch.randn(X0.shape)
    error = (D(X0 + sigma[:, None, None, None] * noise, sigma) - X0).square().mean((1, 2, 3))
    weight = (sigma**2 + 0.4**2) / (sigma * 0.4) ** 2
    loss = edm_loss(D, X0, sigma=sigma, noise=noise)
    assert loss.shape == (4,)
    torch.testing.assert_close(loss, weight * error, rtol=1e-3, atol=1e-4)
    twice = edm_loss(D, X0, sigma=sigma, noise=noise, weight=torch.full((4, 1, 6, 6), 2.0))
    torch.testing.assert_close(twice, 2 * loss)
    corner = torch.zeros(1, 1, 6, 6)
    corner[..., :2, :3] = 1.0
    there = (D(X0 + sigma[:, None, None, None] * noise, sigma) - X0)[..., :2, :3].square().sum((1, 2, 3)) / 72
    some = edm_loss(D, X0, sigma=sigma, noise=noise, weight=corner)
    torch.testing.assert_close(some, weight * there, rtol=1e-3, atol=1e-4)


def test_edm_loss_draws_sigma_then_noise_from_the_generator():
    D, g = EDMDenoiser(Net()), rng(5)
    sigma = (-1.2 + 1.2 * torch.randn(4, generator=g)).exp()
    noise = torch.randn(X0.shape, generator=g)
    assert torch.equal(edm_loss(D, X0, rng(5)), edm_loss(D, X0, sigma=sigma, noise=noise))
    assert not torch.equal(edm_loss(D, X0, rng(5)), edm_loss(D, X0, rng(6)))
    with pytest.raises(TypeError, match="generator"):
        edm_loss(D, X0)


def test_a_silent_network_on_white_data_has_unit_loss():
    """Preconditioning makes the target white of unit variance at every sigma: no level outweighs another."""
    D, x0 = EDMDenoiser(Net(), 0.3), 0.3 * randn((4, 2, 64, 64), torch.float32, rng())
    nn.init.zeros_(D.network.weight), nn.init.zeros_(D.network.bias)
    sigma = torch.tensor([0.01, 0.3, 2.0, 30.0])
    D.network.forward = lambda x, t, cond=None: torch.zeros_like(x)
    loss = edm_loss(D, x0, sigma=sigma, noise=randn(x0.shape, torch.float32, rng(2)))
    torch.testing.assert_close(loss, torch.ones(4), rtol=0.06, atol=0)


def test_complex_loss_is_the_loss_of_the_channels():
    x0 = randn((4, 1, 6, 6), torch.complex64, rng())
    D = EDMDenoiser(Net(), 0.4)
    sigma, noise = torch.full((4,), 0.5), randn(x0.shape, torch.complex64, rng(1))
    ours = edm_loss(ComplexDenoiser(D), x0, sigma=sigma, noise=noise, cond=x0)
    theirs = edm_loss(D, to_channels(x0), sigma=sigma, noise=to_channels(noise), cond=to_channels(x0))
    assert torch.equal(ours, theirs)


def test_the_variance_term_teaches_the_variance_and_leaves_the_mean_alone():
    network = Net(2, 4)
    D = EDMDenoiser(network, 0.4, learned_variance=True)
    kwargs = dict(sigma=torch.full((4,), 0.5), noise=randn(X0.shape, torch.float32, rng(1)))
    gradients = []
    for weight in (0.0, 1.0):
        network.zero_grad()
        edm_loss(D, X0, variance_weight=weight, **kwargs).sum().backward()
        gradients.append(network.weight.grad.clone())
    assert torch.equal(gradients[0][:2], gradients[1][:2])
    assert gradients[0][2:].abs().max() == 0 and gradients[1][2:].abs().min() > 0


def test_the_learned_variance_converges_to_the_true_one():
    """Data N(0, 0.2^2) under sigma_data = 0.5: the best F is linear; u must find the posterior variance."""

    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.u = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

        def forward(self, x, t, cond=None):
            return torch.cat([self.gain * x, self.u.expand_as(x)], 1)

    D, g, sigma = EDMDenoiser(Affine(), 0.5, learned_variance=True), rng(), torch.full((64,), 0.4)
    optimiser = torch.optim.Adam(D.parameters(), 0.02)
    for _ in range(400):
        optimiser.zero_grad()
        edm_loss(D, 0.2 * randn((64, 1, 8, 8), torch.float32, g), g, sigma=sigma).mean().backward()
        optimiser.step()
    mean, variance = D.moments(torch.ones(1, 1, 2, 2), sigma[:1])
    assert mean.mean().item() == pytest.approx(0.04 / (0.04 + 0.16), rel=0.05)
    assert variance.mean().item() == pytest.approx(0.04 * 0.16 / (0.04 + 0.16), rel=0.05)


# --- discrete


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_targets_are_what_the_denoiser_undoes(prediction):
    """A network that returns the target exactly has zero loss and a denoiser that returns x0 exactly."""
    schedule = DiscreteSchedule.cosine()
    t = torch.tensor([0, 10, 500, 900])
    noise = randn(X0.shape, torch.float32, rng(1))
    truth = DiscreteProcess(schedule, prediction).target(X0, t, noise)
    D = DiscreteDenoiser(lambda x, t, cond=None: truth.to(x), schedule, prediction)
    assert discrete_loss(D, X0, t=t, noise=noise).tolist() == [0, 0, 0, 0]
    sigma = schedule.sigmas[t]
    x = X0 + sigma.float()[:, None, None, None] * noise
    torch.testing.assert_close(D(x.double(), sigma), X0.double(), rtol=0, atol=1e-4)


def test_discrete_loss_draws_times_then_noise():
    D = DiscreteDenoiser(Net(), DiscreteSchedule.linear(50))
    g = rng(3)
    t = torch.randint(50, (4,), generator=g)
    noise = torch.randn(X0.shape, generator=g)
    assert torch.equal(discrete_loss(D, X0, rng(3)), discrete_loss(D, X0, t=t, noise=noise))
    with pytest.raises(TypeError, match="generator"):
        discrete_loss(D, X0)
    with pytest.raises(ValueError, match="kind"):
        discrete_loss(D, X0, rng(), kind="l1")


def test_variational_term_is_the_kl_between_the_two_gaussians():
    schedule = DiscreteSchedule.linear()
    process, t = DiscreteProcess(schedule, variance="learned_range"), torch.tensor([1, 10, 500, 999])
    noise, output = randn(X0.shape, torch.float32, rng(1)), randn((4, 4, 6, 6), torch.float32, rng(2))
    x_t = schedule.q_sample(X0, t, noise)
    p, (mean, variance, _) = process.p_mean_variance(output, x_t, t), schedule.q_posterior(X0, x_t, t)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, variance.sqrt()),
        torch.distributions.Normal(p.mean, p.variance.sqrt()),
    )
    bits = kl.mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(variational_bound(process, output, X0, x_t, t), bits, rtol=1e-3, atol=1e-5)


def test_learned_variance_lies_between_the_fixed_ones():
    schedule, t = DiscreteSchedule.linear(), torch.tensor([1, 10, 500, 999])
    x_t = randn(X0.shape, torch.float32, rng())
    learned = DiscreteProcess(schedule, variance="learned_range")
    for v, kind in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        output = torch.cat([x_t, torch.full_like(x_t, v)], 1)
        ours = learned.p_mean_variance(output, x_t, t)
        fixed = DiscreteProcess(schedule, variance=kind).p_mean_variance(x_t, x_t, t)
        torch.testing.assert_close(ours.mean, fixed.mean)
        torch.testing.assert_close(ours.log_variance, fixed.log_variance, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean, std", [(0.0, 0.3), (0.9, 0.2), (-0.2, 0.01)])
def test_discretised_likelihood_is_a_distribution_over_256_values(mean, std):
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_std = torch.full_like(values, math.log(std))
    total = discretised_log_likelihood(values, torch.full_like(values, mean), log_std).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-6)


def test_hybrid_loss_terms_and_their_weights():
    schedule = DiscreteSchedule.linear(500)
    D = DiscreteDenoiser(Net(2, 4), schedule, learned_variance=True)
    kwargs = dict(t=torch.tensor([0, 1, 250, 499]), noise=randn(X0.shape, torch.float32, rng(1)))
    terms = {kind: discrete_terms(D, X0, kind=kind, **kwargs) for kind in ("mse", "rescaled_mse", "kl", "rescaled_kl")}
    torch.testing.assert_close(terms["mse"].loss, terms["mse"].mse + terms["mse"].vb)
    torch.testing.assert_close(terms["rescaled_mse"].vb, terms["mse"].vb / 2)
    torch.testing.assert_close(terms["kl"].loss, terms["mse"].vb)
    torch.testing.assert_close(terms["rescaled_kl"].loss, 500 * terms["kl"].loss)
    weight = D.network.weight
    (of_vb,) = torch.autograd.grad(terms["mse"].vb.sum(), weight, retain_graph=True)
    assert of_vb[:2].abs().max() == 0 and of_vb[2:].abs().max() > 0


def test_respaced_training_tells_the_network_the_original_times():
    seen = []

    def network(x, t, cond=None):
        seen.append(t)
        return x

    D = DiscreteDenoiser(network, DiscreteSchedule.linear().respace("ddim25"))
    discrete_loss(D, X0, t=torch.tensor([0, 1, 2, 24]), noise=X0)
    assert seen[0].tolist() == [0, 40, 80, 960]


def test_sequences_split_their_variance_on_the_channel_axis():
    D = DiscreteDenoiser(
        lambda x, t, cond=None: torch.cat([x, x], 2),
        DiscreteSchedule.linear(),
        learned_variance=True,
        channel_axis=2,
    )
    loss = discrete_loss(D, randn((2, 4, 1, 6, 6), torch.float32, rng()), rng())
    assert loss.shape == (2,) and torch.isfinite(loss).all()


def test_steps_of_the_discrete_process():
    schedule = DiscreteSchedule.linear().respace("ddim25")
    process, t = DiscreteProcess(schedule), torch.tensor([24, 7, 1, 0])
    noise = randn(X0.shape, torch.float32, rng(1))
    x_t = schedule.q_sample(X0, t, noise)
    previous = torch.tensor([23, 6, 0, 0])
    # told the true noise, DDIM stays on the line between x0 and noise, AID's rule swaps the noise
    for step, n in (
        (process.ddim_step(noise, x_t, t), noise),
        (process.stochastic_step(noise, x_t, t, X0), X0),
    ):
        expected = schedule.q_sample(X0, previous, n)
        expected[3] = X0[3]
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)
    eta1 = process.ddim_step(noise, x_t, t, X0, eta=1.0)
    ancestral = process.step(noise, x_t, t, X0)
    torch.testing.assert_close(eta1, ancestral, rtol=1e-4, atol=1e-4)
