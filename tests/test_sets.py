"""A denoiser of single images serves several that share their data."""

import torch

from companion.diffusion.gibbs import annealed_gibbs
from companion.diffusion.guidance import PerPixel, posterior_mean
from companion.diffusion.noise import karras
from companion.diffusion.sets import EachSet
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
