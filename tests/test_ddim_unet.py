"""The DDIM U-Net beside its definition, published names, and checkpoints good and bad."""

import math

import pytest
import torch
import torch.nn.functional as F

from companion.models.architectures import build
from companion.networks import DDIMUNet, UNet
from companion.networks.ddim_unet import (
    EndPaddedDownsample,
    ddim_timestep_embedding,
    describe,
    load_published,
    read_published,
    translate,
)


def tensors(levels=2, blocks=1, attention=(1,), ch=32, ins=3, seed=0):
    """A published DDIM `Model` with random tensors, one width everywhere."""
    generator = torch.Generator().manual_seed(seed)
    made = {}

    def add(name, *shape):
        made[f"{name}.weight"] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        made[f"{name}.bias"] = torch.randn(shape[:1], generator=generator)

    def res(name, width):
        add(f"{name}.norm1", width), add(f"{name}.norm2", ch), add(f"{name}.temb_proj", ch, 4 * ch)
        add(f"{name}.conv1", ch, width, 3, 3), add(f"{name}.conv2", ch, ch, 3, 3)
        if width != ch:
            add(f"{name}.nin_shortcut", ch, width, 1, 1)

    def attn(name):
        add(f"{name}.norm", ch)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", ch, ch, 1, 1)

    add("temb.dense.0", 4 * ch, ch), add("temb.dense.1", 4 * ch, 4 * ch)
    add("conv_in", ch, ins, 3, 3), add("norm_out", ch), add("conv_out", 1, ch, 3, 3)
    res("mid.block_1", ch), attn("mid.attn_1"), res("mid.block_2", ch)
    for level in range(levels):
        for side, count, width in (("down", blocks, ch), ("up", blocks + 1, 2 * ch)):
            for b in range(count):
                res(f"{side}.{level}.block.{b}", width)
                if level in attention:
                    attn(f"{side}.{level}.attn.{b}")
        if level < levels - 1:
            add(f"down.{level}.downsample.conv", ch, ch, 3, 3)
        if level:
            add(f"up.{level}.upsample.conv", ch, ch, 3, 3)
    return made


def published_forward(w, x, t, levels, blocks, attention):
    """The published network, function by function."""

    def layer(name, h, stride=1):
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        if weight.ndim == 1:
            return F.group_norm(h, 32, weight, bias, eps=1e-6)
        if weight.ndim == 2:
            return F.linear(h, weight, bias)
        return F.conv2d(h, weight, bias, stride, padding=weight.shape[-1] // 2 if stride == 1 else 0)

    def res(name, h):
        y = layer(f"{name}.conv1", F.silu(layer(f"{name}.norm1", h)))
        y = y + layer(f"{name}.temb_proj", F.silu(temb))[:, :, None, None]
        y = layer(f"{name}.conv2", F.silu(layer(f"{name}.norm2", y)))
        return y + (layer(f"{name}.nin_shortcut", h) if f"{name}.nin_shortcut.weight" in w else h)

    def attn(name, h):
        q, k, v = (layer(f"{name}.{part}", layer(f"{name}.norm", h)).flatten(2) for part in "qkv")
        weights = (q.mT @ k / math.sqrt(q.shape[1])).softmax(-1)
        return h + layer(f"{name}.proj_out", (v @ weights.mT).view_as(h))

    ch = w["temb.dense.0.weight"].shape[1]
    temb = layer("temb.dense.1", F.silu(layer("temb.dense.0", ddim_timestep_embedding(t, ch))))
    skips = [layer("conv_in", x)]
    for level in range(levels):
        for b in range(blocks):
            h = res(f"down.{level}.block.{b}", skips[-1])
            skips.append(attn(f"down.{level}.attn.{b}", h) if level in attention else h)
        if level < levels - 1:
            skips.append(layer(f"down.{level}.downsample.conv", F.pad(skips[-1], (0, 1, 0, 1)), stride=2))
    h = res("mid.block_2", attn("mid.attn_1", res("mid.block_1", skips[-1])))
    for level in reversed(range(levels)):
        for b in range(blocks + 1):
            h = res(f"up.{level}.block.{b}", torch.cat([h, skips.pop()], dim=1))
            h = attn(f"up.{level}.attn.{b}", h) if level in attention else h
        if level:
            h = layer(f"up.{level}.upsample.conv", F.interpolate(h, scale_factor=2.0, mode="nearest"))
    return layer("conv_out", F.silu(layer("norm_out", h)))


@pytest.mark.parametrize("levels, blocks, attention", [(2, 1, (1,)), (3, 2, (0, 2)), (1, 1, ())])
def test_the_network_is_the_published_one(levels, blocks, attention):
    w = tensors(levels, blocks, attention)
    config = describe(w)
    assert config["attention_resolutions"] == [2**level for level in attention]
    assert (config["num_res_blocks"], config["channel_mult"]) == (blocks, [1.0] * levels)
    network = build({"network": config}).eval()
    assert isinstance(network, DDIMUNet)
    network.load_state_dict(translate(w))
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 3, 12, 8, generator=generator), torch.tensor([3.0, 870.0])
    with torch.no_grad():
        expected = published_forward(w, x, t, levels, blocks, attention)
        torch.testing.assert_close(network(x[:, :1], t, x[:, 1:]), expected, rtol=1e-4, atol=1e-4)


def test_time_features_begin_with_sines_and_reach_the_last_frequency():
    t, dim = torch.tensor([0.0, 7.0]), 8
    k = torch.arange(4) / 3
    expected = torch.cat([(t[:, None] * 1e-4**k).sin(), (t[:, None] * 1e-4**k).cos()], dim=1)
    torch.testing.assert_close(ddim_timestep_embedding(t, dim), expected)


def test_padding_follows_the_stride_in_three_dimensions():
    down = EndPaddedDownsample(32, 3, (1, 2, 2))
    assert down(torch.zeros(1, 32, 3, 6, 8)).shape == (1, 32, 3, 3, 4)


def test_average_pooling_is_recognised():
    network = DDIMUNet(3, 32, 1, num_res_blocks=1, channel_mult=(1, 2), conv_resample=False)
    config = describe(network.state_dict())  # under our names a UNet: only the published ones tell the two apart
    assert (config["name"], config["conv_resample"], config["channel_mult"]) == ("UNet", False, [1.0, 2.0])


@pytest.fixture
def checkpoint(tmp_path):
    """The path of a checkpoint in the published layout, its raw and its averaged tensors."""
    raw, averaged = tensors(seed=1), tensors(seed=2)
    path = tmp_path / "ckpt.pth"
    adam = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 3e-4, "params": [0]}]}
    torch.save([{f"module.{name}": x for name, x in raw.items()}, adam, 4, 20000, averaged], path)
    return path, raw, averaged


def test_published_checkpoints_load(checkpoint):
    path, raw, averaged = checkpoint
    for ema, expected in ((True, averaged), (False, raw)):
        found = read_published(path, ema)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    network = load_published(path)
    assert not network.training and network.in_channels == 3
    for name, x in translate(averaged).items():
        assert torch.equal(network.state_dict()[name], x)


def test_the_guided_diffusion_network_loads_by_its_own_names(tmp_path):
    torch.manual_seed(0)
    options = dict(num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(2,), use_scale_shift_norm=True)
    network = UNet(3, 32, 1, **options)
    torch.save([{f"module.{name}": x for name, x in network.state_dict().items()}, {}, 0, 0], tmp_path / "ckpt.pth")
    loaded = load_published(tmp_path / "ckpt.pth", ema=False)
    assert type(loaded) is UNet
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in network.state_dict().items())


def test_files_that_are_something_else(tmp_path, checkpoint):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    path = tmp_path / "other.pth"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_published(path)
    path.write_bytes(checkpoint[0].read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        read_published(path)
    torch.save([Trap()], path)
    with pytest.raises(ValueError, match="is not opened"):
        read_published(path)
    assert not (tmp_path / "opened").exists()
    torch.save([{"a": torch.zeros(1)}, {}, 0, 0], path)
    with pytest.raises(ValueError, match="no averaged weights; take the raw ones with ema=False"):
        read_published(path)
    with pytest.raises(ValueError, match="no U-Net of this family"):
        load_published(path, ema=False)
    torch.save([3, {}], path)
    with pytest.raises(ValueError, match="no published checkpoint"):
        read_published(path, ema=False)


@pytest.mark.parametrize(
    "options",
    [
        dict(resblock_updown=True),
        dict(num_res_blocks=[1, 2, 3], resblock_updown=True, num_classes=4),
        dict(num_res_blocks=[3, 1, 2]),
        dict(conv_resample=False),
        dict(resblock_updown=True, num_heads=4, use_scale_shift_norm=True, use_new_attention_order=True),
        dict(num_head_channels=16),
    ],
)
def test_a_guided_diffusion_network_is_described_whole(options):
    """Weights tell everything but the heads; told these, the network built from the description is the same."""
    generator = torch.Generator().manual_seed(0)
    sizes = dict(num_res_blocks=1, channel_mult=(1, 2, 2), attention_resolutions=(2,))
    network = UNet(3, 32, 1, **sizes | options).eval()
    for p in network.parameters():
        p.data.normal_(std=0.2, generator=generator)
    told = ("num_heads", "num_head_channels", "use_new_attention_order")
    config = describe(network.state_dict(), **{name: options[name] for name in told if name in options})
    again = build({"network": config}).eval()
    again.load_state_dict(network.state_dict())
    x, t = torch.randn(1, 3, 16, 8, generator=generator), torch.tensor([5.0])
    labels = {"y": torch.tensor([1])} if "num_classes" in options else {}
    with torch.no_grad():
        assert torch.equal(again(x, t, **labels), network(x, t, **labels))
        if "num_heads" in options:  # the same weights with one head are another network
            alone = build({"network": describe(network.state_dict())}).eval()
            alone.load_state_dict(network.state_dict())
            assert (alone(x, t) - network(x, t)).abs().max() > 1e-3
