"""The EDM network against the published one written down independently; labels; guidance by class."""

import math

import pytest
import torch
from published_edm import PublishedNetwork

from companion.diffusion import EDMDenoiser, edm_loss, karras, sample
from companion.diffusion.class_guidance import ClassGuidance
from companion.models import published as conversion
from companion.models.checkpoint import load
from companion.models.folder import save_checkpoint
from companion.networks import EDMUNet

TINY = dict(in_channels=1, model_channels=8, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=())


def randomised(network):
    """The network with every weight random, so that no branch is zero."""
    torch.manual_seed(1)
    for p in network.parameters():
        p.data = 0.2 * torch.randn_like(p)
    return network.eval()


@pytest.mark.parametrize(
    "options",
    [
        dict(size=(16, 8), width=32, mult=(1, 4), attention=(1,)),  # two heads, a rectangle
        dict(size=(8, 8), width=64, mult=(1, 1, 2), attention=(0, 2), blocks=2, emb_mult=4),
        dict(size=(8, 8), width=16, mult=(1, 2), attention=(0, 1), out_channels=2),  # too narrow for a head
    ],
)
def test_it_is_the_published_network(options):
    theirs = PublishedNetwork(**options)
    torch.manual_seed(0)
    x, t = torch.randn(2, 2, *options["size"]), torch.tensor([-1.5, 0.9])
    labels, augment = torch.eye(3)[[0, 2]], torch.randn(2, 9)
    expected = theirs(x, t, labels, augment)

    config = conversion.describe(theirs.tensors)
    assert config.pop("name") == "EDMUNet"
    ours = EDMUNet(**config).eval()
    ours.load_state_dict(conversion.translate(theirs.tensors))
    out = ours(x[:, :1], t, x[:, 1:], y=torch.tensor([0, 2]), augment=augment)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x, t), theirs(x, t), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x, t, y=labels), theirs(x, t, labels), rtol=1e-4, atol=1e-4)


def test_the_published_size():
    with torch.device("meta"):
        network = EDMUNet(in_channels=2, augment_dim=9)
    assert sum(p.numel() for p in network.parameters()) == 57_088_897
    assert len(network.state_dict()) == 495


def test_any_image_size_and_any_dimension():
    network = randomised(EDMUNet(**TINY))
    for size in ((8, 8), (6, 10), (2, 2)):
        assert network(torch.randn(2, 1, *size), torch.zeros(2)).shape == (2, 1, *size)
    with pytest.raises(ValueError, match="multiple of the network's total stride"):
        network(torch.randn(2, 1, 7, 8), torch.zeros(2))
    assert EDMUNet(**TINY, dims=3)(torch.randn(1, 1, 4, 4, 4), torch.zeros(1)).shape == (1, 1, 4, 4, 4)


def test_it_starts_as_published():
    """Uniform within 1 / sqrt(fan in), label columns of variance 1, and branches and output that are zero."""
    torch.manual_seed(0)
    network = EDMUNet(**TINY, num_classes=50, augment_dim=9)
    weight, bias = network.time_embed[2].weight, network.time_embed[2].bias
    bound = 1 / math.sqrt(weight.shape[1])
    assert weight.abs().max() <= bound and bias.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert network.label_emb.weight.std().item() == pytest.approx(1, rel=0.1)
    assert network(torch.randn(2, 1, 4, 4), torch.zeros(2)).abs().max() == 0
    assert network.map_augment.weight.abs().max() == 0


def test_a_level_too_narrow_for_a_head_has_no_attention():
    options = TINY | dict(attention_resolutions=(1, 2))
    assert not [name for name in EDMUNet(**options).state_dict() if "qkv" in name]
    assert [name for name in EDMUNet(**options, head_channels=16).state_dict() if "qkv" in name]
    with pytest.raises(ValueError, match="too few to be normalised"):
        EDMUNet(**TINY | dict(model_channels=2))


# --- labels


def test_no_label_is_the_zero_row_and_dropout_makes_it():
    network = randomised(EDMUNet(**TINY, dropout=0.0, num_classes=3, label_dropout=1.0))
    x, t, y = torch.randn(4, 1, 4, 4), torch.zeros(4), torch.tensor([0, 1, 2, 1])
    null = network(x, t)
    torch.testing.assert_close(network(x, t, y=torch.zeros(4, 3)), null)
    assert not torch.allclose(network(x, t, y=y), null)
    torch.testing.assert_close(network.train()(x, t, y=y), null)


def test_labels_are_dropped_as_often_as_asked():
    network = randomised(EDMUNet(**TINY, num_classes=2, label_dropout=0.25)).train()
    kept = network.embed_class(torch.ones(1, dtype=torch.long), 4000).abs().sum(1) > 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    network.eval()
    assert (network.embed_class(torch.ones(4000, dtype=torch.long), 4000).abs().sum(1) > 0).all()


def test_integers_and_one_hot_rows_are_the_same_label():
    network = randomised(EDMUNet(**TINY, num_classes=3))
    x, t = torch.randn(2, 1, 4, 4), torch.zeros(2)
    rows = torch.eye(3)[[2, 0]]
    torch.testing.assert_close(network(x, t, y=torch.tensor([2, 0])), network(x, t, y=rows))
    torch.testing.assert_close(network(x, t, y=torch.tensor([1])), network(x, t, y=torch.tensor([1, 1])))


def test_augmentation_labels():
    network = randomised(EDMUNet(**TINY, augment_dim=9))
    x, t = torch.randn(2, 1, 4, 4), torch.zeros(2)
    torch.testing.assert_close(network(x, t, augment=torch.zeros(2, 9)), network(x, t))
    assert not torch.allclose(network(x, t, augment=torch.ones(1, 9)), network(x, t))


@pytest.mark.parametrize(
    "options, labels, message",
    [
        ({}, dict(y=torch.tensor([0, 1])), "num_classes=None"),
        ({}, dict(augment=torch.zeros(2, 9)), "expects none"),
        (dict(num_classes=2), dict(y=torch.tensor([0, 2])), "not all in 0..1"),
        (dict(num_classes=2), dict(y=torch.tensor([0, -1])), "not all in 0..1"),
        (dict(num_classes=2), dict(y=torch.tensor([0.0, 1.0])), "integers"),
        (dict(num_classes=2), dict(y=torch.zeros(2, 3)), r"expects \(2, 2\)"),
        (dict(augment_dim=9), dict(augment=torch.zeros(3, 9)), r"expects \(2, 9\)"),
        (dict(augment_dim=9), dict(augment=torch.zeros(2, 6)), r"expects \(2, 9\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(options, labels, message):
    network = EDMUNet(**TINY, **options)
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(2, 1, 4, 4), torch.zeros(2), **labels)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="give num_classes too"):
        EDMUNet(**TINY, label_dropout=0.1)
    with pytest.raises(ValueError, match="from 0 to 1"):
        EDMUNet(**TINY, label_dropout=1.5, num_classes=2)


# --- denoiser, loss, guidance


@pytest.fixture
def D():
    return EDMDenoiser(randomised(EDMUNet(**TINY | dict(in_channels=2), num_classes=3, augment_dim=9)), cond_scale=2)


def test_the_denoiser_is_the_published_preconditioning(D):
    x, sigma, cond = torch.randn(2, 1, 4, 4), torch.tensor([0.1, 5.0]), torch.randn(2, 1, 4, 4)
    s, sg = 0.5, sigma[:, None, None, None]
    y = torch.tensor([1, 2])
    F = D.network(x / (sg**2 + s**2).sqrt(), sigma.log() / 4, cond / s, y=y)
    expected = s**2 / (sg**2 + s**2) * x + sg * s / (sg**2 + s**2).sqrt() * F
    torch.testing.assert_close(D(x, sigma, cond, y=y), expected)


def test_labels_reach_the_network_from_the_loss(D):
    torch.manual_seed(0)
    x0, cond, y = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([0, 1])
    given = dict(sigma=torch.tensor([0.5, 1.0]), noise=torch.randn(2, 1, 4, 4))
    loss = edm_loss(D, x0, cond=cond, y=y, augment=torch.ones(2, 9), **given)
    loss.sum().backward()
    for p in (D.network.label_emb.weight, D.network.map_augment.weight):
        assert p.grad.abs().max() > 0
    assert not torch.allclose(loss, edm_loss(D, x0, cond=cond, **given))
    with pytest.raises(TypeError, match="label"):
        edm_loss(D, x0, cond=cond, label=y, **given)


@pytest.mark.parametrize("weight, calls", [(0, 1), (1, 1), (2.5, 2), (-0.5, 2)])
def test_class_guidance(D, weight, calls):
    x, sigma, cond = torch.randn(2, 1, 4, 4), torch.tensor([0.3, 2.0]), torch.randn(2, 1, 4, 4)
    null, conditional = D(x, sigma, cond), D(x, sigma, cond, y=torch.tensor([2, 2]))
    guided = ClassGuidance(D, 2, weight)
    torch.testing.assert_close(guided(x, sigma, cond), null + weight * (conditional - null))
    drawn = sample(guided, karras(3), shape=(1, 4, 4), seeds="0-1", cond=cond)
    assert drawn.bill.denoiser_calls == calls * 5
    assert not hasattr(guided, "moments")


def test_class_guidance_keeps_moments_where_they_mean_something():
    network = randomised(EDMUNet(**TINY | dict(out_channels=2), num_classes=3))
    D = EDMDenoiser(network, learned_variance=True)
    x, sigma = torch.randn(2, 1, 4, 4), torch.tensor([0.3, 2.0])
    mean, variance = ClassGuidance(D, torch.tensor([0, 1])).moments(x, sigma)
    torch.testing.assert_close(mean, D(x, sigma, y=torch.tensor([0, 1])))
    assert variance.min() > 0
    assert not hasattr(ClassGuidance(D, 0, 2.0), "moments")


def test_it_is_saved_and_loaded(D, tmp_path):
    network = {"name": "EDMUNet", "num_classes": 3, "augment_dim": 9} | TINY | {"in_channels": 2}
    config = {"network": network, "denoiser": {"name": "EDMDenoiser", "cond_scale": 2.0}}
    save_checkpoint(tmp_path / "net", D, config | {"data": {"source": "noise", "scale": "1"}}, {})
    x, sigma = torch.randn(2, 1, 4, 4), torch.tensor([0.3, 2.0])
    given = dict(cond=torch.randn(2, 1, 4, 4), y=torch.tensor([0, 1]))
    torch.testing.assert_close(load(tmp_path / "net")(x, sigma, **given), D(x, sigma, **given))
