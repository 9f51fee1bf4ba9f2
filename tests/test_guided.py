"""Means over pixels that a second image shows alike, and the network that is given them."""

import pytest
import torch

from companion.models.architectures import build
from companion.models.export import export
from companion.models.folder import save_checkpoint
from companion.networks.guided import BINS, TOP, GuidedUNet, guided_means
from companion.papers.pet.heads import TrainHeads, prior_config

CONFIG = prior_config(**TrainHeads().pick("model_channels", "channel_mult", "patch", "images"))


@pytest.fixture
def tissues():
    """Two tissues in a chequered pattern of squares, as a guide of two values: (guide, where the first tissue is)."""
    y, x = torch.meshgrid(torch.arange(48), torch.arange(40), indexing="ij")
    first = ((y // 8 + x // 8) % 2 == 0)[None, None]
    return torch.where(first, 3 * TOP / (BINS - 1), 8 * TOP / (BINS - 1)), first


def test_what_the_guide_tells_apart_is_not_mixed(tissues):
    guide, first = tissues
    x, known = torch.where(first, 2.0, 5.0), torch.ones_like(guide)
    means = guided_means(x, guide, known, (1.5, 6.0))
    assert means.shape == (1, 2, 48, 40)
    assert torch.allclose(means, x.expand_as(means), atol=1e-4)


def test_means_are_linear_in_the_image_and_less_noisy(tissues):
    guide, first = tissues
    noise = torch.randn(1, 1, 48, 40, generator=torch.Generator().manual_seed(0))
    known, x = torch.ones_like(guide), torch.where(first, 2.0, 5.0)
    apart = guided_means(x, guide, known, (6.0,)) + guided_means(noise, guide, known, (6.0,))
    assert torch.allclose(guided_means(x + noise, guide, known, (6.0,)), apart, atol=1e-4)
    spread = guided_means(noise, guide, known, (6.0,))[..., 12:-12, 12:-12].std().item()
    pixels = 4 * torch.pi * 6**2 / 2  # half of those under the Gaussian are of the same tissue
    assert spread == pytest.approx(pixels**-0.5, rel=0.35)


def test_where_the_guide_is_not_known_nothing_is_said_or_used(tissues):
    guide, first = tissues
    x, known = torch.where(first, 2.0, 5.0), (torch.arange(40) < 20).float().expand(1, 1, 48, 40)
    means = guided_means(torch.where(known > 0, x, 1000.0), guide, known, (4.0,))
    assert (means[..., 20:] == 0).all() and torch.allclose(means[..., :20], x[..., :20], atol=1e-3)


def test_the_network_takes_any_size_and_says_what_it_wants():
    D = build(CONFIG)
    assert isinstance(D.network, GuidedUNet)
    x, sigma = torch.randn(2, 1, 32, 48, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 2.0])
    cond = torch.rand(2, 2, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.nn.init.normal_(D.network.out[-1].weight, generator=torch.Generator().manual_seed(2))
    together = D(x, sigma, cond)
    assert together.shape == x.shape
    assert torch.allclose(
        torch.cat([D(x[i : i + 1], sigma[i : i + 1], cond[i : i + 1]) for i in (0, 1)]), together, atol=1e-4
    )
    assert not torch.allclose(D(x, sigma), together, atol=1e-2)
    with pytest.raises(ValueError, match="a condition of two"):
        D.network(x, sigma)
    with pytest.raises(ValueError, match="total stride"):
        D(x[..., :40], sigma, cond[..., :40])


def test_the_denoiser_is_exported_with_its_condition(tmp_path):
    small = prior_config(32, (1.0, 1.0), 2, 1)
    D = build(small)
    with torch.no_grad():
        torch.nn.init.normal_(D.network.out[-1].weight, std=0.1, generator=torch.Generator().manual_seed(0))
    save_checkpoint(tmp_path / "prior", D, small, {})
    found = torch.jit.load(str(export(tmp_path / "prior", tmp_path / "prior.pt", (24, 32))))
    g = torch.Generator().manual_seed(1)
    x, sigma, cond = (
        torch.randn(3, 1, 40, 24, generator=g),
        torch.tensor([0.1, 1.0, 5.0]),
        torch.rand(3, 2, 40, 24, generator=g),
    )
    assert torch.allclose(found(x, sigma, cond), D(x, sigma, cond), atol=1e-4)
