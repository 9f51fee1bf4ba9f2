import copy
import math

import pytest
import torch
from torch import nn

from companion.diffusion.complexify import to_channels
from companion.diffusion.denoisers import AnySize, ComplexDenoiser, DiscreteDenoiser, EDMDenoiser, once
from companion.diffusion.exact import FourierBasis, GaussianDenoiser, GaussianMixtureDenoiser
from companion.diffusion.noise import DiscreteSchedule
from companion.randomness import randn

SIGMA = torch.tensor([0.03, 0.7, 9.0], dtype=torch.float64)


def normal(*shape, dtype=torch.float64, seed=0):
    return randn(shape, dtype, torch.Generator().manual_seed(seed))


def column(values, x):
    return values.reshape(-1, *[1] * (x.ndim - 1))


class Constant(nn.Module):
    """A network with `factor` output channels per input channel, all of one value; keeps its inputs."""

    def __init__(self, value=0.0, factor=1, axis=1):
        super().__init__()
        self.value, self.factor, self.axis = nn.Parameter(torch.tensor(value).double()), factor, axis

    def forward(self, x, t, cond=None):
        self.seen = (x, t, cond)
        return torch.cat([torch.zeros_like(x) + self.value] * self.factor, self.axis)


# --- EDM


@pytest.mark.parametrize("shape, axis", [((2, 8, 8), 1), ((1, 4, 5, 6), 1), ((4, 2, 5, 5), 2), ((7,), 1)])
def test_edm_with_a_silent_network_is_exact_for_white_data(shape, axis):
    """c_skip and c_out^2 are the posterior mean and variance of N(0, sigma_data^2) data."""
    s = 0.4
    D = EDMDenoiser(Constant(0.0, factor=2, axis=axis), s, learned_variance=True, channel_axis=axis)
    prior = GaussianDenoiser(torch.zeros(shape), torch.full(shape, s**2))
    x = normal(3, *shape)
    for ours, exact in zip(D.moments(x, SIGMA), prior.moments(x, SIGMA), strict=True):
        torch.testing.assert_close(ours, exact.expand_as(ours))
    torch.testing.assert_close(D(x, SIGMA), prior(x, SIGMA))


def test_edm_network_inputs_have_unit_variance_and_the_stated_time():
    network = Constant()
    D = EDMDenoiser(network, sigma_data=0.3, cond_scale=1 / 0.3)
    noisy = 0.3 * normal(3, 1, 90, 90) + column(SIGMA, normal(3, 1, 1, 1)) * normal(3, 1, 90, 90, seed=1)
    D(noisy, SIGMA, normal(3, 1, 90, 90) * 0.3)
    x, t, cond = network.seen
    assert x.std((1, 2, 3)).tolist() == pytest.approx([1] * 3, abs=0.03)
    assert cond.std().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(t, SIGMA.log() / 4)


def test_edm_variance_channels():
    x = normal(3, 2, 6, 6)

    class Shared(Constant):
        def forward(self, x, t, cond=None):
            return torch.cat([x, torch.full_like(x[:, :1], math.log(2.0))], 1)

    mean, variance = EDMDenoiser(Shared(), 0.5, True, variance_channels=1).moments(x, SIGMA)
    u = 10 * math.tanh(math.log(2) / 10)
    expected = SIGMA**2 * 0.25 / (SIGMA**2 + 0.25) * math.exp(u)
    torch.testing.assert_close(variance, column(expected, x).expand(3, 1, 6, 6))
    with pytest.raises(ValueError, match="out_channels to 4"):
        EDMDenoiser(Shared(), 0.5, True)(x, SIGMA)
    with pytest.raises(ValueError, match="sigma_data"):
        EDMDenoiser(Shared(), 0.0)


def test_moments_exist_only_where_the_variance_is_learned_and_survive_copies():
    assert not hasattr(EDMDenoiser(Constant()), "moments")
    assert not hasattr(ComplexDenoiser(EDMDenoiser(Constant())), "moments")
    D = copy.deepcopy(ComplexDenoiser(EDMDenoiser(Constant(factor=2), learned_variance=True)))
    assert hasattr(D, "moments") and len(list(D.parameters())) == 1


def test_autocast_reaches_the_network_and_not_the_result():
    class Net(nn.Conv2d):
        def forward(self, x, t, cond=None):
            out = super().forward(x)
            self.seen = out.dtype
            return out

    network, x = Net(1, 1, 3, padding=1), normal(3, 1, 8, 8).float()
    full = EDMDenoiser(network)(x, SIGMA.float())
    assert network.seen == torch.float32
    half = EDMDenoiser(network, autocast=torch.bfloat16)(x, SIGMA.float())
    assert network.seen == torch.bfloat16 and half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        EDMDenoiser(network)(x, SIGMA.float())
    assert network.seen == torch.bfloat16


# --- complex


@pytest.mark.parametrize("shape, axis", [((1, 6, 5), 1), ((2, 4, 4, 4), 1), ((3, 1, 6, 5), 2)])
def test_complex_denoiser_is_the_real_one_on_channels(shape, axis):
    prior = GaussianDenoiser(torch.zeros(shape), torch.rand(shape, generator=torch.Generator().manual_seed(0)))
    variances = to_channels(torch.complex(prior.variances, prior.variances)[None], axis)[0]
    real = GaussianDenoiser(torch.zeros_like(variances), variances)
    x = normal(3, *shape, dtype=torch.complex128)
    D = ComplexDenoiser(real, axis)
    torch.testing.assert_close(D(x, SIGMA), prior(x, SIGMA))
    for ours, exact in zip(D.moments(x, SIGMA), prior.moments(x, SIGMA), strict=True):
        torch.testing.assert_close(ours, exact)
    with pytest.raises(TypeError, match="complex"):
        D(x.real, SIGMA)


def test_complex_condition_is_split_too():
    network = Constant()
    x = normal(3, 1, 4, 4, dtype=torch.complex128)
    ComplexDenoiser(EDMDenoiser(network))(x, SIGMA, x)
    assert network.seen[2].shape == (3, 2, 4, 4)


# --- discrete networks


class ExactNetwork(nn.Module):
    """What a perfectly trained discrete network returns for N(mean, variance) data."""

    def __init__(self, schedule, prediction, mean, variance, learned):
        super().__init__()
        self.schedule, self.prediction, self.learned = schedule, prediction, learned
        self.mean, self.variance, self.times = mean, variance, []

    def forward(self, x_t, t, cond=None):
        schedule = self.schedule
        self.times.append(t)
        # the noise level is log-linear between trained times, as our interpolation has it
        low = t.floor().long().clamp(max=len(schedule) - 2)
        sigma = torch.lerp(schedule.sigmas.log()[low], schedule.sigmas.log()[low + 1], t.double() - low).exp()
        signal = column((1 + sigma**2).rsqrt(), x_t)
        noise = (1 - signal**2).sqrt()
        gain = self.variance * signal / (self.variance * signal**2 + noise**2)
        x0 = self.mean + gain * (x_t - signal * self.mean)
        out = {
            "epsilon": (x_t - signal * x0) / noise,
            "v": (signal * x_t - x0) / noise,
            "x0": x0,
        }[self.prediction]
        if not self.learned:
            return out
        i = t.round().long()
        beta, coef1 = schedule.betas[i], schedule.posterior_mean_coef1[i]
        small, log_small = schedule.posterior_variance[i], schedule.posterior_log_variance_clipped[i]
        posterior = (
            self.variance
            * (1 - schedule.alphas_cumprod[i])
            / (self.variance * schedule.alphas_cumprod[i] + 1 - schedule.alphas_cumprod[i])
        )
        true = small + coef1**2 * posterior
        share = (true.log() - log_small) / (beta.log() - log_small)
        return torch.cat([out, column(2 * share - 1, out).expand_as(out)], 1)


@pytest.mark.parametrize("make", ["linear", "cosine", "scaled_linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_discrete_networks_become_the_exact_denoiser(make, prediction):
    schedule = getattr(DiscreteSchedule, make)()
    mean, variance = 0.2, 0.3
    exact = GaussianDenoiser(torch.full((2, 4, 4), mean, dtype=torch.float64), torch.full((2, 4, 4), variance))
    network = ExactNetwork(schedule, prediction, mean, variance, learned=False)
    D = DiscreteDenoiser(network, schedule, prediction)
    sigma = torch.tensor([0.05, 0.7, 9.0], dtype=torch.float64)  # between trained levels
    x = normal(3, 2, 4, 4)
    torch.testing.assert_close(D(x, sigma), exact(x, sigma), rtol=1e-5, atol=1e-5)
    assert not hasattr(D, "moments")
    at = schedule.sigmas[[3, 500, 990]]
    nearest = DiscreteDenoiser(network, schedule, prediction, timesteps="nearest")
    torch.testing.assert_close(nearest(x, at), exact(x, at), rtol=1e-5, atol=1e-5)
    assert network.times[-1].tolist() == [3, 500, 990] and not network.times[-1].is_floating_point()


@pytest.mark.parametrize("make", ["linear", "cosine"])
def test_learned_range_variance_becomes_the_variance_of_x0(make):
    schedule = getattr(DiscreteSchedule, make)()
    network = ExactNetwork(schedule, "epsilon", 0.0, 0.6, learned=True)
    D = DiscreteDenoiser(network, schedule, learned_variance=True)
    sigma, x = schedule.sigmas[[1, 40, 700]], normal(3, 1, 4, 4)
    exact = GaussianDenoiser(torch.zeros(1, 4, 4, dtype=torch.float64), torch.full((1, 4, 4), 0.6))
    for ours, truth in zip(D.moments(x, sigma), exact.moments(x, sigma), strict=True):
        torch.testing.assert_close(ours, truth.expand_as(ours), rtol=1e-4, atol=1e-7)


def test_discrete_denoiser_clips_and_refuses():
    schedule = DiscreteSchedule.linear()
    x, sigma = 100 * normal(3, 1, 4, 4), SIGMA
    D = DiscreteDenoiser(Constant(), schedule, clip=(-1.0, 1.0))
    assert D(x, sigma).abs().max() <= 1
    with pytest.raises(ValueError, match="channels"):
        DiscreteDenoiser(Constant(), schedule, learned_variance=True)(x, sigma)
    with pytest.raises(ValueError, match="prediction"):
        DiscreteDenoiser(Constant(), schedule, "eps")
    with pytest.raises(ValueError, match="timesteps"):
        DiscreteDenoiser(Constant(), schedule, timesteps="round")


# --- exact priors


def random_covariance(n, dtype):
    root = normal(n, n, dtype=dtype, seed=3) / math.sqrt(n)
    return root @ root.mH + 0.05 * torch.eye(n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 2, 1, 3)])
def test_dense_gaussian_denoiser_is_the_textbook_formula(shape, dtype):
    n = math.prod(shape)
    C, mean, x = (
        random_covariance(n, dtype),
        normal(*shape, dtype=dtype),
        normal(3, *shape, dtype=dtype, seed=1),
    )
    x0_hat, variance = GaussianDenoiser(mean, C).moments(x, SIGMA)
    for i, sigma in enumerate(SIGMA.tolist()):
        inverse = torch.linalg.inv(C + sigma**2 * torch.eye(n))
        expected = mean + (C @ inverse @ (x[i] - mean).flatten()).reshape(shape)
        torch.testing.assert_close(x0_hat[i], expected)
        posterior = (C - C @ inverse @ C).diagonal().real.reshape(shape)
        torch.testing.assert_close(variance[i], posterior, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_fourier_basis_equals_the_dense_circulant_matrix(dtype):
    shape, n = (1, 4, 5), 20
    basis = FourierBasis(2)
    spectrum = basis(normal(*shape)).abs() ** 2 + 0.1  # symmetric, so the covariance is real
    columns = basis.H(spectrum * basis(torch.eye(n, dtype=torch.complex128).reshape(n, *shape))).flatten(1)
    C = columns.T if dtype.is_complex else columns.T.real
    x, mean = normal(3, *shape, dtype=dtype), normal(*shape, dtype=dtype, seed=2)
    stationary, dense = GaussianDenoiser(mean, spectrum, basis), GaussianDenoiser(mean, C)
    for ours, theirs in zip(stationary.moments(x, SIGMA), dense.moments(x, SIGMA), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(stationary.log_evidence(x, SIGMA), dense.log_evidence(x, SIGMA))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_prior_draws_have_the_stated_covariance(dtype):
    C = random_covariance(4, dtype.to_complex() if dtype.is_complex else torch.float64)
    prior = GaussianDenoiser(torch.zeros(1, 2, 2, dtype=dtype), C)
    x = prior.draw(20000, torch.Generator().manual_seed(0)).flatten(1)
    assert x.dtype == dtype
    measured = (x.T @ x.conj()) / len(x) / (2 if dtype.is_complex else 1)
    assert (measured - C).abs().max() < 0.05


def two_humps(shape, dtype):
    components = [
        GaussianDenoiser(normal(*shape, dtype=dtype, seed=k), 0.1 + normal(*shape, seed=9 + k) ** 2) for k in range(2)
    ]
    return GaussianMixtureDenoiser([1.0, 3.0], components)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_mixture_obeys_tweedie(dtype):
    """x0_hat = x + sigma^2 grad log p and Var = sigma^2 + sigma^4 diag Hess log p, per real component."""
    shape, sigma = (1, 2, 2), torch.tensor([0.8], dtype=torch.float64)
    D, parts = two_humps(shape, dtype), 2 if dtype.is_complex else 1

    def log_p(flat):
        x = torch.view_as_complex(flat.reshape(1, *shape, 2)) if parts == 2 else flat.reshape(1, *shape)
        evidence = torch.stack([component.log_evidence(x, sigma) for component in D.components])
        return torch.logsumexp(evidence + D.weights.log()[:, None], 0)[0]

    x = normal(1, *shape, dtype=dtype, seed=5)
    flat = (torch.view_as_real(x) if parts == 2 else x).flatten()
    x0_hat, variance = D.moments(x, sigma)
    score = flat + sigma**2 * torch.autograd.functional.jacobian(log_p, flat)
    torch.testing.assert_close((torch.view_as_real(x0_hat) if parts == 2 else x0_hat).flatten(), score)
    hessian = torch.autograd.functional.hessian(log_p, flat).diagonal()
    expected = (sigma**2 + sigma**4 * hessian).reshape(*shape, parts).mean(-1)
    torch.testing.assert_close(variance[0], expected)


def test_mixture_draws_and_float32():
    D = two_humps((1, 2, 2), torch.float64)
    x = D.draw(4000, torch.Generator().manual_seed(0))
    mean = sum(w * component.mean for w, component in zip(D.weights, D.components, strict=True))
    assert (x.mean(0) - mean).abs().max() < 0.15
    assert D(x[:3].float(), SIGMA.float()).dtype == torch.float32


def test_priors_refuse_what_they_cannot_mean():
    mean = torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match="shape"):
        GaussianDenoiser(mean, torch.ones(3))
    with pytest.raises(ValueError, match="negative"):
        GaussianDenoiser(mean, -torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="weights"):
        GaussianMixtureDenoiser([1.0], [GaussianDenoiser(mean, torch.ones(1, 2, 2))] * 2)


# --- any size


class Blur(nn.Module):
    """A denoiser that knows multiples of 4 only: a local mean of x and of the newest cond; one variance channel."""

    def __init__(self):
        super().__init__()
        self.conds = []

    def forward(self, x, sigma, cond=None):
        assert x.shape[-1] % 4 == 0 and x.shape[-2] % 4 == 0
        self.conds.append(cond)
        if cond is not None:
            x = x + 0.5 * (cond if cond.ndim == x.ndim else cond[:, -1])
        return (x + x.roll(1, -1) + x.roll(-1, -1) + x.roll(1, -2) + x.roll(-1, -2)) / 5

    def moments(self, x, sigma, cond=None):
        x0_hat = self(x, sigma, cond)
        return x0_hat, x.abs().square().mean(1, keepdim=True)


SIZES = [(8, 8), (4, 12), (7, 9), (5, 8), (8, 13), (2, 6), (1, 3), (3, 1)]
DTYPES = [torch.float32, torch.complex64]


def conditions(x, batch):
    """None, an image and a window of frames."""
    shape = (batch, *x.shape[1:])
    return None, normal(*shape, dtype=x.dtype, seed=2), normal(batch, 3, *x.shape[1:], dtype=x.dtype, seed=3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_size_gives_images_of_the_same_size(size, dtype):
    x, D = normal(2, 1, *size, dtype=dtype), Blur()
    for cond in conditions(x, 2):
        before = None if cond is None else cond.clone()
        wrapped = AnySize(D, (4, 4))
        x0_hat, variance = wrapped.moments(x, SIGMA[:2], cond)
        assert x0_hat.shape == x.shape and x0_hat.dtype == x.dtype
        assert variance.shape == (2, 1, *size) and not variance.is_complex()
        assert torch.equal(x0_hat, wrapped(x, SIGMA[:2], cond))
        torch.testing.assert_close(variance, x.abs().square())
        assert torch.equal(x, normal(2, 1, *size, dtype=dtype)) and (cond is None or torch.equal(cond, before))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_size_changes_nothing_where_the_size_fits(dtype):
    x, D = normal(2, 1, 8, 12, dtype=dtype), Blur()
    for cond in conditions(x, 2):
        assert torch.equal(AnySize(D, (4, 4))(x, SIGMA[:2], cond), D(x, SIGMA[:2], cond))
        assert AnySize(D, (4, 4)).extend(x) is x
        assert D.conds[-1] is D.conds[-2]


def test_any_size_reflects_at_the_far_ends():
    x = torch.arange(5.0).reshape(1, 1, 1, 5)
    assert AnySize(Blur(), (1, 8)).extend(x).flatten().tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    short = torch.arange(2.0).reshape(1, 1, 2, 1)
    assert AnySize(Blur(), (5, 1)).extend(short).flatten().tolist() == [0, 1, 0, 1, 0]
    inner = normal(1, 1, 7, 9)  # where no end is near, the local mean is that of the image itself
    own = (inner + sum(inner.roll(s, a) for s in (1, -1) for a in (-1, -2))) / 5
    torch.testing.assert_close(AnySize(Blur(), (4, 4))(inner, SIGMA[:1])[..., 1:-1, 1:-1], own[..., 1:-1, 1:-1])


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_a_shared_condition_stays_shared(size):
    """Networks tell by its stride of 0 that all draws share it, and work it out once."""
    x, D = normal(3, 1, *size, dtype=torch.complex64), Blur()
    for one in conditions(x, 1)[1:]:
        shared = one.expand(3, *one.shape[1:])
        result = AnySize(D, (4, 4))(x, SIGMA, shared)
        assert D.conds[-1].stride(0) == 0 and len(D.conds[-1]) == 3
        torch.testing.assert_close(result, AnySize(D, (4, 4))(x, SIGMA, shared.clone()))
        assert D.conds[-1].stride(0) != 0


def test_once_works_a_shared_condition_out_once():
    seen = []

    def double(c):
        seen.append(len(c))
        return 2 * c

    cond = normal(1, 2, 3).expand(4, 2, 3)
    result = once(double, cond)
    assert seen == [1] and result.stride(0) == 0 and torch.equal(result, 2 * cond)
    assert once(double, cond.clone()).stride(0) != 0 and seen == [1, 4]
    assert once(double, cond[:1]).shape == (1, 2, 3) and once(double, None) is None


def test_any_size_has_moments_only_where_the_denoiser_has():
    bare = AnySize(nn.Identity(), (4, 4))
    assert not hasattr(bare, "moments")

    class Scalar(nn.Module):  # a variance to broadcast, without space
        def moments(self, x, sigma, cond=None):
            return x, column(sigma, x)

    x = normal(2, 1, 5, 6)
    x0_hat, variance = AnySize(Scalar(), (4, 4)).moments(x, SIGMA[:2])
    assert torch.equal(x0_hat, x) and variance.shape == (2, 1, 1, 1)
