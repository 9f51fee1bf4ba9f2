"""Stated variances, corrected."""

import pytest
import torch

from companion.diffusion.exact import GaussianDenoiser
from companion.diffusion.recalibration import Recalibrated
from companion.randomness import randn

TRUTH = torch.ones(1, 16, 16)
TRUTH[:, :, 8:] = 0.01  # half of the image hardly varies


class Boaster:
    """A right mean whose stated variance is four times too small on the left and thirty times on the right."""

    D = GaussianDenoiser(torch.zeros(1, 16, 16), TRUTH)

    def __call__(self, x, sigma, cond=None):
        return self.D(x, sigma)

    def moments(self, x, sigma, cond=None):
        mean, v = self.D.moments(x, sigma)
        return mean, torch.where(TRUTH == 1, v / 4, v / 30)


def test_each_pixel_gets_the_factor_of_pixels_that_state_alike():
    sigmas = [0.1, 0.3, 1.0, 3.0]
    images = Boaster.D.draw(200, torch.Generator().manual_seed(0))
    D = Recalibrated.fit(Boaster(), images, sigmas)
    x = images + 0.5 * randn(images.shape, images.dtype, torch.Generator().manual_seed(1))
    mean, v = D.moments(x, torch.full((200,), 0.5))  # between two levels of the table
    assert torch.equal(mean, Boaster()(x, torch.full((200,), 0.5)))
    for half in (TRUTH == 1, TRUTH != 1):
        ratio = (images - mean).square()[:, half].mean() / v[:, half].mean()
        assert abs(ratio - 1) < 0.1
    alone = D.moments(x[3:4], torch.tensor([0.5]))[1]
    assert torch.allclose(alone, v[3:4])
    assert torch.isfinite(D.moments(x, torch.full((200,), 50.0))[1]).all(), "outside the table"


def test_levels_may_differ_within_a_batch():
    images = Boaster.D.draw(50, torch.Generator().manual_seed(0))
    D = Recalibrated.fit(Boaster(), images, [0.1, 1.0])
    sigma = torch.tensor([0.1, 1.0])
    v = D.moments(images[:2], sigma)[1]
    for i in range(2):
        assert torch.allclose(D.moments(images[i : i + 1], sigma[i : i + 1])[1], v[i : i + 1])


def test_one_level_is_enough_and_no_variance_is_refused():
    images = Boaster.D.draw(50, torch.Generator().manual_seed(0))
    D = Recalibrated.fit(Boaster(), images, [0.5])
    assert torch.isfinite(D.moments(images, torch.full((50,), 2.0))[1]).all()
    with pytest.raises(TypeError, match="no moments"):
        Recalibrated.fit(lambda x, sigma: x, images, [0.5])
