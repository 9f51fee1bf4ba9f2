"""Files as the authors publish them, small: what tests put on the loopback hub."""

from collections import OrderedDict
from pathlib import Path

import torch

from companion.models.architectures import build

CONFIG = {
    "network": dict(
        name="CausalUNet", in_channels=2, model_channels=32, out_channels=4, num_res_blocks=1,
        channel_mult=[1, 1], attention_resolutions=[2], num_heads=2, use_scale_shift_norm=True, seq_len=3,
    ),
    "denoiser": dict(
        name="DiscreteDenoiser", schedule={"name": "linear", "steps": 1000}, prediction="epsilon",
        learned_variance=True, complex=True, channel_axis=-3,
    ),
    "data": dict(source="a test", scale="largest magnitude is 1"),
}  # fmt: skip


def network(config=CONFIG, seed: int = 0) -> torch.nn.Module:
    """The network of a config, no weight at its initial value."""
    net = build({"network": config["network"]}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return net


def aid_file(path: Path, net: torch.nn.Module) -> Path:
    """A pickled OrderedDict of Parameters, as the AID files are."""
    torch.save(OrderedDict(net.named_parameters()), path)
    return path
