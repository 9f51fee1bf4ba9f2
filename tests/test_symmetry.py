"""Motions that a prior does not mind: there and back, item by item, and what they do to errors that do mind."""

import pytest
import torch

from companion.diffusion.covariance import Isotropic
from companion.diffusion.denoisers import EDMDenoiser
from companion.diffusion.exact import GaussianDenoiser
from companion.diffusion.gibbs import annealed_gibbs
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.noise import karras
from companion.diffusion.symmetry import Motion, Moved, Symmetries, moved, symmetries_of
from companion.models.checkpoint import load_denoiser
from companion.operators.linear import Identity
from companion.randomness import generators, randn

ALL = Symmetries(mirror=True, turn=True, shift=True, phase=True)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_a_motion_is_undone_on_any_size(dtype):
    x = randn((2, 1, 6, 9), dtype, torch.Generator().manual_seed(0))
    motions = ALL.draw(generators(range(40)))
    assert len(set(motions)) > 30
    for motion in motions:
        assert torch.allclose(motion.back(motion.there(x)), x, atol=1e-6)
    assert {m.turns for m in motions} == {0, 1, 2, 3} and {m.mirror for m in motions} == {False, True}
    assert not torch.equal(Motion(mirror=True).there(x), x) and torch.equal(Motion().there(x), x)


def test_a_denoiser_with_the_symmetry_is_left_as_it_is():
    D = GaussianDenoiser(torch.zeros(1, 8, 8, dtype=torch.complex64), torch.full((1, 8, 8), 0.5))
    x = randn((5, 1, 8, 8), torch.complex64, torch.Generator().manual_seed(1))
    sigma = torch.linspace(0.1, 2, 5)
    assert torch.allclose(Moved(D, ALL.draw(generators(range(5))))(x, sigma), D(x, sigma), atol=1e-6)


class Lopsided:
    """Errs on the left half, and where its condition says; the variance is larger there."""

    symmetries = ("mirror",)

    def __call__(self, x, sigma, cond=None):
        return self.moments(x, sigma, cond)[0]

    def moments(self, x, sigma, cond=None):
        left = (torch.arange(x.shape[-1]) < x.shape[-1] // 2).to(x.real.dtype)
        wrong = left if cond is None else left + cond
        v = 1 / (1 + sigma[:, None, None, None] ** -2)
        return v * (x / sigma[:, None, None, None] ** 2) + 0.3 * wrong, v + left.expand(x.shape)


def test_each_image_of_a_batch_has_its_own_motion_and_the_condition_goes_along():
    D, motions = Lopsided(), [Motion(), Motion(mirror=True), Motion(), Motion(turns=1)]
    x, sigma = randn((4, 1, 6, 8), torch.float32, torch.Generator().manual_seed(2)), torch.linspace(0.3, 1, 4)
    cond = randn((1, 1, 6, 8), torch.float32, torch.Generator().manual_seed(3))
    mean, v = Moved(D, motions).moments(x, sigma, cond)
    for i, motion in enumerate(motions):
        alone, v_alone = D.moments(motion.there(x[i : i + 1]), sigma[i : i + 1], motion.there(cond))
        assert torch.equal(mean[i : i + 1], motion.back(alone)) and torch.equal(v[i : i + 1], motion.back(v_alone))
    wider = v - 1 / (1 + sigma[:, None, None, None] ** -2)  # by 1 on the left half, as the image lies for D
    assert wider[0, 0, :, :4].min() > 0.9 and wider[0, 0, :, 4:].max() < 0.1
    assert wider[1, 0, :, 4:].min() > 0.9 and wider[1, 0, :, :4].max() < 0.1
    sizes = []
    Moved(lambda x, sigma, cond=None: sizes.append(len(x)) or x, motions)(x, sigma)
    assert sizes == [3, 1]  # those of one shape go through the network together
    with pytest.raises(ValueError, match="2 motions for 4 images"):
        Moved(D, motions[:2])(x, sigma)
    assert not hasattr(Moved(lambda x, sigma, cond=None: x, motions), "moments")


def test_a_chain_forgets_errors_that_are_not_symmetric_whatever_the_batch():
    """The error of the left half is shared by both halves, and no longer all of it agrees in all draws."""
    A, D = Identity((1, 8, 8), torch.float32), Lopsided()
    y = torch.zeros(1, 1, 8, 8)
    G, levels = posterior_mean(A, y, 1.0, Isotropic(1.0)), karras(12, 0.3, 3.0)
    on = {"seeds": range(24), "dtype": torch.float32}
    found = annealed_gibbs(D, G, levels, **on)
    bias = found.mean.mean((0, 1, 2))
    assert (bias[:4].mean() - bias[4:].mean()).abs() < 0.5 * bias.mean()
    D.symmetries = ()
    plain = annealed_gibbs(D, G, levels, **on).mean.mean((0, 1, 2))
    assert plain[:4].mean() - plain[4:].mean() > plain.mean()
    D.symmetries = ("mirror",)
    parts = annealed_gibbs(D, G, levels, batch_size=5, **on)
    assert torch.allclose(parts.x, found.x, atol=1e-5)


def test_symmetries_come_from_the_checkpoint_and_samplers_use_no_others():
    D = load_denoiser("general/2d")
    assert symmetries_of(D) == Symmetries(mirror=True, turn=True, phase=True)
    assert isinstance(moved(D, generators(2)), Moved)
    plain = load_denoiser("brain/t1w")
    assert symmetries_of(plain) == Symmetries() and moved(plain, generators(2)) is plain
    with pytest.raises(ValueError, match="mirrors.*expected some of mirror, turn, shift, phase"):
        symmetries_of(EDMDenoiser(torch.nn.Identity(), symmetries=["mirrors"]))
