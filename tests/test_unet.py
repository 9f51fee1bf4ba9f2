"""The U-Net family: its options, its shapes, and that speed options change nothing else."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from companion.networks import UNet, default_channel_mult
from companion.networks.blocks import AttentionBlock, GroupNorm32, pixel_shuffle, pixel_unshuffle, timestep_embedding


def randomise(network, seed=0):
    """The network in eval mode, every parameter drawn anew so that zero-initialised branches count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
            p.copy_(scale * torch.randn(p.shape, generator=generator) + (1.0 if p.ndim == 1 else 0.0))
    return network.eval()


def small(**options):
    defaults = dict(in_channels=2, model_channels=32, out_channels=3, num_res_blocks=1, channel_mult=(1, 2))
    torch.manual_seed(0)
    return randomise(UNet(**(defaults | options)))


def image(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options, shape",
    [
        (dict(), (16, 12)),
        (dict(dims=1), (20,)),
        (dict(dims=3), (4, 6, 8)),
        (dict(dims=3, halve_depth=False), (3, 6, 8)),
        (dict(dims=3, patch=2), (4, 8, 12)),
        (dict(patch=4, attention_resolutions=(1,)), (16, 24)),
        (dict(resblock_updown=True, use_scale_shift_norm=True, attention_resolutions=(1, 2)), (8, 8)),
        (dict(conv_resample=False, num_head_channels=16, use_new_attention_order=True), (8, 8)),
        (dict(num_heads=4, num_heads_upsample=2, channel_mult=(1, 1, 2)), (12, 8)),
    ],
)
def test_every_size_divisible_by_the_stride(options, shape):
    net = small(**options)
    x, t = image(2, 2, *shape), torch.tensor([0.3, 900.0])
    out = net(x, t)
    assert out.shape == (2, 3, *shape)
    one_by_one = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(out, one_by_one, rtol=1e-4, atol=1e-4)


def test_condition_is_concatenated_and_shared():
    net = small(in_channels=3)
    x, cond, t = image(4, 2, 8, 8), image(1, 1, 8, 8, seed=2), torch.tensor(5.0)
    expected = net(torch.cat([x, cond.expand(4, 1, 8, 8)], dim=1), t.expand(4))
    torch.testing.assert_close(net(x, t, cond=cond), expected)
    torch.testing.assert_close(net(x, t, cond=cond.expand(4, 1, 8, 8)), expected)


def test_class_labels_change_the_output():
    net = small(num_classes=3)
    x, t = image(2, 2, 8, 8).repeat(2, 1, 1, 1)[:2], torch.tensor([1.0, 1.0])
    a, b = net(x, t, y=torch.tensor([0, 0])), net(x, t, y=torch.tensor([0, 2]))
    torch.testing.assert_close(a[0], b[0])
    assert (a[1] - b[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="not given"):
        net(x, t)
    with pytest.raises(ValueError, match="num_classes=None"):
        small()(x, t, y=torch.tensor([0, 1]))


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_is_the_published_formula(new_order):
    """Softmax of (q c^-1/4)(k c^-1/4) over pixels, in both orders of heads and q, k, v, on Conv1d weights."""
    channels, heads, width = 64, 4, 16
    block = randomise(AttentionBlock(channels, heads, new_order=new_order))
    x = image(2, channels, 5, 3)
    flat = F.conv1d(block.norm(x).flatten(2), block.qkv.weight, block.qkv.bias)
    if new_order:
        q, k, v = (part.reshape(2 * heads, width, -1) for part in flat.chunk(3, dim=1))
    else:
        q, k, v = flat.reshape(2 * heads, 3 * width, -1).split(width, dim=1)
    weight = torch.einsum("bct,bcs->bts", q * width**-0.25, k * width**-0.25).softmax(-1)
    h = torch.einsum("bts,bcs->bct", weight, v).reshape(2, channels, -1)
    expected = x + F.conv1d(h, block.proj_out.weight, block.proj_out.bias).reshape(x.shape)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_pixel_unshuffle_agrees_with_pytorch_and_inverts_in_every_dimension():
    x = image(2, 3, 4, 6)
    torch.testing.assert_close(pixel_unshuffle(x, 2), F.pixel_unshuffle(x, 2))
    for n, patch in itertools.product((1, 2, 3), (1, 2, 3)):
        x = image(2, 2, *(patch * (i + 1) for i in range(n)))
        y = pixel_unshuffle(x, patch)
        assert y.shape == (2, 2 * patch**n, *(i + 1 for i in range(n)))
        torch.testing.assert_close(pixel_shuffle(y, patch), x)


def test_times_are_embedded_as_cosines_then_sines():
    t = torch.tensor([0.0, 2.5])
    emb = timestep_embedding(t, 6)
    f = 10_000.0 ** (-torch.arange(3) / 3)
    torch.testing.assert_close(emb, torch.cat([(t[:, None] * f).cos(), (t[:, None] * f).sin()], dim=1))


def test_norm_statistics_are_float32():
    norm = GroupNorm32(32)
    x = (1000 + image(1, 32, 16, 16)).bfloat16()
    torch.testing.assert_close(norm(x).float(), norm(x.float()), rtol=1e-2, atol=1e-2)


def test_speed_options_change_nothing_else():
    options = dict(attention_resolutions=(2,), use_scale_shift_norm=True)
    net, t = small(**options), torch.tensor([1.0, 7.0])
    x = image(2, 2, 16, 16)
    reference = net(x, t)
    reference.square().sum().backward()

    saving = small(**options, use_checkpoint=True)
    saving.load_state_dict(net.state_dict())
    out = saving(x, t)
    out.square().sum().backward()
    torch.testing.assert_close(out, reference)
    for p, q in zip(net.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)

    net = net.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x, t), reference, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        half = net(x, t)
    assert half.dtype == torch.bfloat16
    assert (half - reference).norm() < 0.02 * reference.norm()


def test_a_new_network_starts_at_zero():
    net = UNet(2, 32, 3, num_res_blocks=1, channel_mult=(1, 1))
    assert net(image(1, 2, 4, 4), torch.zeros(1)).abs().max() == 0


def test_errors_say_what_to_do():
    net = small(channel_mult=(1, 1, 1), patch=2)
    with pytest.raises(ValueError, match=r"multiple of .*\(8, 8\).*pad or crop"):
        net(image(1, 2, 16, 12), torch.zeros(1))
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\); expected \(batch, 2, y, x\)"):
        net(image(1, 3, 16, 16), torch.zeros(1))
    with pytest.raises(ValueError, match="one time per image"):
        net(image(2, 2, 16, 16), torch.zeros(3))
    with pytest.raises(ValueError, match="multiple of 32"):
        small(model_channels=48)
    with pytest.raises(ValueError, match="divisor of 64"):
        small(num_head_channels=24)
    with pytest.raises(ValueError, match="dims"):
        small(dims=4)


def test_channels_of_heads_and_blocks_are_those_of_their_level_finest_first():
    net = small(num_head_channels=(16, 32), num_res_blocks=(1, 2), attention_resolutions=(1, 2))
    heads = [
        m.num_heads for blocks in (net.input_blocks, net.middle_block) for m in blocks.modules() if hasattr(m, "qkv")
    ]
    assert heads == [
        32 // 16,
        64 // 32,
        64 // 32,
        64 // 32,
    ]  # one block of the fine level, two of the coarse, the middle
    assert net(image(1, 2, 8, 8), torch.zeros(1)).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="num_head_channels has 3 entries for 2 levels"):
        small(num_head_channels=(16, 16, 16))


def test_published_multipliers():
    assert default_channel_mult(320)[0] == 0.5 and default_channel_mult(128) == (1, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="pass channel_mult yourself"):
        default_channel_mult(100)
