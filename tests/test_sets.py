"""A denoiser of single images serves several that share their data: sets of maps, slices of a volume."""

import torch

from companion.diffusion import sets
from companion.diffusion.gibbs import annealed_gibbs
from companion.diffusion.guidance import PerPixel, posterior_mean
from companion.diffusion.noise import karras
from companion.diffusion.sets import EachSet, EachSlice
from companion.operators.cylinder import Cylinder, Projector3D
from companion.operators.soft_sense import soft_sense


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


class Shrink:
    """E[x0 | x] of independent pixels of variance 1 per real component, and its variance."""

    def __call__(self, x, sigma, cond=None):
        return x / (1 + sigma.square())[:, None, None, None]

    def moments(self, x, sigma, cond=None):
        s2 = sigma.square()[:, None, None, None]
        return x / (1 + s2), (s2 / (1 + s2)).expand(len(x), 1, *x.shape[2:])


def test_every_set_is_denoised_as_if_it_were_alone():
    D, x, sigma = EachSet(Shrink()), draw(3, 2, 6, 5), torch.tensor([0.1, 1.0, 3.0])
    assert torch.allclose(D(x, sigma), x / (1 + sigma.square())[:, None, None, None])
    mean, variance = D.moments(x, sigma)
    assert torch.equal(mean, D(x, sigma)) and variance.shape == x.shape
    assert torch.allclose(variance[1], torch.tensor(0.5))
    assert not hasattr(EachSet(lambda x, sigma, cond=None: x), "moments")


def test_the_posterior_of_two_sets_is_that_of_linear_algebra():
    maps, noise = draw(2, 3, 4, 4, seed=1), 0.3
    A = soft_sense(maps, torch.ones(4, 4))
    y = A(draw(1, 2, 4, 4, seed=2)) + noise * draw(1, 3, 4, 4, seed=3)
    basis = torch.eye(32).reshape(32, 2, 4, 4).to(torch.complex64)
    matrix = A(basis).flatten(1).mT.to(torch.complex128)
    precision = matrix.mH @ matrix / noise**2 + torch.eye(32)
    truth = torch.linalg.solve(precision, matrix.mH @ y.flatten().to(torch.complex128) / noise**2)
    G = posterior_mean(A, y, noise, PerPixel(), 100, 1e-6)
    draws = annealed_gibbs(EachSet(Shrink()), G, karras(6, 0.1, 5.0), seeds=range(400)).x.flatten(1)
    spread = torch.linalg.inv(precision).diagonal().real.sqrt()
    assert ((draws.mean(0) - truth).abs() / spread).square().mean().sqrt() < 3 * (2 / 400) ** 0.5
    ratio = (draws - draws.mean(0)).abs().square().mean(0) / 2 / spread.square()
    assert 0.9 < ratio.mean() < 1.1


def test_every_slice_is_denoised_as_if_it_were_alone(monkeypatch):
    """Whatever goes through the network together, and each with its own condition."""
    x, sigma = draw(2, 1, 5, 4, 3).real, torch.tensor([0.5, 2.0])
    cond = draw(1, 2, 5, 4, 3, seed=1).real

    def D(x, sigma, cond):
        assert len(x) == len(sigma) == len(cond) <= 3
        return x / sigma[:, None, None, None] + cond[:, :1] * cond[:, 1:]

    monkeypatch.setattr(sets, "AT_ONCE", 3)
    expected = x / sigma[:, None, None, None, None] + cond[:, :1] * cond[:, 1:]
    assert torch.allclose(EachSlice(D)(x, sigma, cond), expected)
    mean, variance = EachSlice(Shrink()).moments(x, sigma)
    assert mean.shape == variance.shape == x.shape
    assert torch.allclose(variance[1], torch.tensor(0.8)) and torch.allclose(mean[1], x[1] / 5)


def test_the_posterior_of_a_volume_seen_by_oblique_lines_is_that_of_linear_algebra():
    c = Cylinder((3, 4, 4), (4.0, 4.0), 4, 4, 4.0, 2, 6.0, 60.0)
    A, noise = 0.1 * Projector3D(c), 0.5
    y = A(draw(1, *c.volume_shape, seed=2).real) + noise * draw(1, *c.sinogram_shape, seed=3).real
    matrix = A(torch.eye(48).reshape(48, *c.volume_shape)).flatten(1).mT.double()
    precision = matrix.mT @ matrix / noise**2 + torch.eye(48)
    truth = torch.linalg.solve(precision, matrix.mT @ y.flatten().double() / noise**2)
    G = posterior_mean(A, y, noise, PerPixel(), 100, 1e-6)
    levels, options = karras(6, 0.1, 5.0), {"dtype": torch.float32}
    draws = annealed_gibbs(EachSlice(Shrink()), G, levels, seeds=range(400), **options).x.flatten(1)
    spread = torch.linalg.inv(precision).diagonal().sqrt()
    assert ((draws.mean(0) - truth) / spread).square().mean().sqrt() < 3 * (1 / 400) ** 0.5
    ratio = (draws - draws.mean(0)).square().mean(0) / spread.square()
    assert 0.9 < ratio.mean() < 1.1


def test_slices_are_cut_along_each_axis_in_turn():
    x, sigma = draw(2, 1, 4, 6, 5).real, torch.tensor([0.5, 2.0])
    cond = draw(1, 2, 4, 6, 5, seed=1).real

    def D(x, sigma, cond):
        """What tells the planes apart: the mean of a slice, the shape of a slice."""
        down = torch.arange(x.shape[-2])[:, None]
        return x - x.mean((-2, -1), keepdim=True) + 100 * x.shape[-1] + down + cond[:, :1]

    turning, still = EachSlice(D, turning=True), EachSlice(D)
    z, y = torch.arange(4)[:, None, None], torch.arange(6)[:, None]
    for planes, width, down in (((-2, -1), 5, y), ((-3, -1), 5, 3 - z), ((-3, -2), 6, 3 - z), ((-2, -1), 5, y)):
        found = turning(x, sigma, cond)
        assert torch.allclose(found, x - x.mean(planes, keepdim=True) + 100 * width + down + cond[:, :1], atol=1e-4)
    assert torch.equal(still(x, sigma, cond), still(x, sigma, cond))
