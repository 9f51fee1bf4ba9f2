"""Nothing is left behind on the CPU: every denoiser, guidance, sampler and model of errors on the meta device.

Tensors there have a shape and a device but no values; an operation of one of them with values of a CPU tensor fails, as
it would between a CPU and a GPU. Noise levels and tables are given on the CPU, as users give them.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from companion.diffusion import covariance, guidance, poisson
from companion.diffusion.denoisers import AnySize, ComplexDenoiser, DiscreteDenoiser, EDMDenoiser, FlowDenoiser
from companion.diffusion.gibbs import annealed_gibbs, split_gibbs
from companion.diffusion.langevin import langevin
from companion.diffusion.noise import DiscreteSchedule, karras
from companion.diffusion.recalibration import Recalibrated
from companion.diffusion.sampling import sample
from companion.diffusion.sets import EachSet
from companion.diffusion.solvers import SOLVERS
from companion.networks.diffusion_unet import UNet
from companion.operators.linear import Identity
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, sense

SIZE, LEVELS = 16, karras(3, 0.05, 5.0)


class Values(TorchFunctionMode):
    """Answers what asks meta tensors for their values: finite, not negative, equal, and iterations go on."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor) and args[0].is_meta:
            if function in (torch.isfinite, torch.Tensor.isfinite):
                return torch.ones((), dtype=torch.bool)
            if function in (torch.isnan, torch.Tensor.isnan):
                return torch.zeros((), dtype=torch.bool)
            if function.__name__ in ("lt", "__lt__"):
                return torch.zeros((), dtype=torch.bool)
            if function in (torch.Tensor.__bool__, torch.equal):
                return True
            if function in (torch.Tensor.item, torch.Tensor.__float__):
                return 1.0
            if function is torch.Tensor.cpu:
                return torch.ones(args[0].shape, dtype=args[0].dtype)
        return function(*args, **kwargs or {})


@pytest.fixture(autouse=True)
def values():
    with Values():
        yield


def network(channels: int, out: int, **options) -> UNet:
    return UNet(
        in_channels=channels, model_channels=32, out_channels=out, num_res_blocks=1, channel_mult=(1,), **options
    )


def edm() -> EDMDenoiser:
    return EDMDenoiser(network(1, 2), learned_variance=True)


def discrete(prediction: str = "epsilon") -> DiscreteDenoiser:
    return DiscreteDenoiser(network(1, 2), DiscreteSchedule.linear(50), prediction=prediction, learned_variance=True)


DENOISERS = {
    "edm": edm,
    "epsilon": discrete,
    "v": lambda: discrete("v"),
    "flow": lambda: FlowDenoiser(network(1, 1)),
    "complex": lambda: ComplexDenoiser(EDMDenoiser(network(2, 3), learned_variance=True, variance_channels=1)),
    "complex epsilon": lambda: ComplexDenoiser(
        DiscreteDenoiser(network(2, 4), DiscreteSchedule.linear(50), learned_variance=True)
    ),
    "any size": lambda: AnySize(edm(), (4, 4)),
    "each set": lambda: EachSet(edm()),
    "recalibrated": lambda: Recalibrated(edm(), torch.logspace(-2, 1, 4), torch.ones(4, 3), torch.ones(4, 3)),
}


def meta_denoiser(name: str):
    D = DENOISERS[name]()
    inner = D.D if name == "recalibrated" else D
    inner.to("meta")
    return D


def dtype_of(name: str) -> torch.dtype:
    return torch.complex64 if name.startswith("complex") else torch.float32


def image(name: str = "edm", batch: int = 2) -> torch.Tensor:
    return torch.empty(batch, 1, SIZE, SIZE, dtype=dtype_of(name), device="meta")


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_bring_noise_levels_to_their_images(name):
    D, x = meta_denoiser(name), image(name)
    x0_hat = D(x, torch.tensor([0.5, 2.0]))
    assert x0_hat.is_meta and x0_hat.shape == x.shape and x0_hat.dtype == x.dtype
    if name != "flow":
        mean, variance = D.moments(x, torch.tensor([0.5, 2.0]))
        assert mean.is_meta and variance.is_meta


@pytest.mark.filterwarnings("ignore:S_churn = 40 over 3 steps")
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["edm", "epsilon", "complex"])
def test_solvers_draw_where_the_denoiser_is(name, solver):
    D = meta_denoiser(name)
    found = sample(D, LEVELS, shape=(1, SIZE, SIZE), seeds=[0, 1], solver=solver, device="meta", dtype=dtype_of(name))
    assert found.x.is_meta and found.x.shape == (2, 1, SIZE, SIZE)


MODELS = {
    "isotropic": covariance.Isotropic(0.3),
    "per pixel": covariance.PerPixel(),
    "measured": covariance.Measured(torch.logspace(-2, 1, 4), torch.ones(4, 5)),
    "Jacobian": covariance.Jacobian(),
}


@pytest.mark.parametrize("name", ["edm", "epsilon", "complex epsilon", "recalibrated"])
def test_errors_are_measured_where_the_images_are(name):
    found = covariance.Measured.fit(meta_denoiser(name), image(name), torch.logspace(-2, 1, 3), bins=4)
    assert found.spectrum.shape == (3, 4) and not found.spectrum.is_meta


def test_a_recalibration_is_fitted_where_the_images_are():
    D = edm().to("meta")
    assert Recalibrated.fit(D, image(), torch.logspace(-2, 1, 3), bins=4).factor.shape == (3, 4)


def operator():
    return sense(birdcage_maps((SIZE, SIZE), 3).to("meta"), cartesian_mask(SIZE, 2, "equispaced", acs=4, seed=0))


def scan():
    A = operator()
    return A, A(image("complex", 1))


EVERY = ("landweber", "dps", "pigdm", "ddnm", "dds", "diffpir", "posterior_mean")


@pytest.mark.parametrize("name", ["complex", "complex epsilon"])
@pytest.mark.parametrize("rule", EVERY)
def test_guidances_estimate_where_the_data_are(rule, name):
    A, y = scan()
    D_y = getattr(guidance, rule)(A, y, 0.05)(meta_denoiser(name))
    x0_hat = D_y(image("complex"), torch.tensor([0.5, 2.0]))
    assert x0_hat.is_meta and x0_hat.shape == (2, 1, SIZE, SIZE)


@pytest.mark.parametrize("model", MODELS)
def test_models_of_errors_follow_the_data(model):
    A, y = scan()
    D_y = guidance.posterior_mean(A, y, 0.05, MODELS[model], iterations=2)(meta_denoiser("complex"))
    assert D_y(image("complex"), torch.tensor([0.5, 2.0])).is_meta


@pytest.mark.parametrize("sampler", [annealed_gibbs, langevin])
@pytest.mark.parametrize("name", ["complex", "complex epsilon"])
def test_posterior_samplers_draw_where_the_data_are(sampler, name):
    A, y = scan()
    G = guidance.posterior_mean(A, y, 0.05, MODELS["measured"], iterations=2)
    assert sampler(meta_denoiser(name), G, LEVELS, seeds=[0, 1], device="meta").x.is_meta


def test_split_gibbs_draws_where_the_data_are():
    A, y = scan()
    found = split_gibbs(
        meta_denoiser("complex"), A, y, 0.05, LEVELS[:-1], seeds=[0], steps=1, iterations=2, device="meta"
    )
    assert found.x.is_meta


@pytest.mark.parametrize("rule", ["poisson_mean", "poisson_dps", "poisson_pigdm", "em_steps"])
def test_guidances_of_counts_estimate_where_they_are(rule):
    counts = torch.empty(1, 1, SIZE, SIZE, device="meta")
    options = {"covariance": MODELS["measured"], "iterations": 2} if rule == "poisson_mean" else {}
    G = getattr(poisson, rule)(
        Identity((1, SIZE, SIZE), torch.float32), counts, background=torch.ones_like(counts), **options
    )
    assert G(meta_denoiser("edm"))(image(), torch.tensor([0.5, 2.0])).is_meta


def test_sweeps_over_counts_draw_where_they_are():
    counts = torch.empty(1, 1, SIZE, SIZE, device="meta")
    options = {"background": torch.ones_like(counts), "covariance": MODELS["measured"], "iterations": 2}
    G = poisson.poisson_mean(Identity((1, SIZE, SIZE), torch.float32), counts, **options)
    assert poisson.poisson_gibbs(meta_denoiser("edm"), G, LEVELS, seeds=[0, 1], device="meta").x.is_meta
