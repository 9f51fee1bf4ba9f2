"""The U-Net of DDIM (`Model` of Song et al. 2021, arXiv 2010.02502), and published checkpoints of both U-Nets.

The published LMI recipe trains this network; its guided-diffusion alternative is `networks.unet.UNet`. Both are
made of the same blocks in the same order; this one differs in its time features, in the constant of its norms
and in where it pads before halving an image. Parameters have the names of UNet; `translate` knows the published.

    network = load_published("ckpt.pth")             # averaged weights, either network, ready to use
    noise = network(x, t, torch.cat([cross, self_map], dim=1))
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.networks.blocks import Downsample, GroupNorm32, Stage, dtype_of
from companion.networks.unet import UNet


class DDIMUNet(UNet):
    """Network (batch, in_channels, *space), t (batch,) -> (batch, out_channels, *space); options as in UNet.

    `attention_resolutions` are strides: the published model for 128 pixels with attention at 16 has (8,).
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for module in self.modules():
            if isinstance(module, GroupNorm32):
                module.eps = 1e-6
        pad_at_the_end(self)

    def embed(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Returns embeddings (batch, 4 * model_channels) of times t (batch,)."""
        if y is not None:
            raise ValueError("this network has no class labels; leave y out")
        features = ddim_timestep_embedding(t, self.model_channels)
        return self.time_embed(features.to(dtype_of(self.time_embed)))


def pad_at_the_end(network: UNet) -> None:
    """Put an `EndPaddedDownsample` in the place of every strided convolution of a network."""
    for stage in network.input_blocks:
        if isinstance(stage, Stage) and isinstance(first := stage[0], Downsample) and first.learned:
            stage[0] = EndPaddedDownsample(first.channels, network.dims, network.stride)


class EndPaddedDownsample(Downsample):
    """Halves images by a strided convolution that sees one zero beyond the end of an axis, none before."""

    def __init__(self, channels: int, dims: int, stride: tuple[int, ...]):
        super().__init__(channels, dims, stride)
        convolution: Any = self.op
        convolution.padding = (0,) * dims
        # F.pad begins with the last axis. An axis that is not halved keeps its size by a zero at both ends.
        self.padding = [n for s in reversed(stride) for n in ((0, 1) if s == 2 else (1, 1))]

    def forward(self, x: Tensor) -> Tensor:
        return self.op(F.pad(x, self.padding))


def ddim_timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Returns features (batch, dim) of times t (batch,), [sin(t f_k), cos(t f_k)], f_k from 1 to 1/max_period.

    Unlike blocks.timestep_embedding: sine first, and the last frequency is reached.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) / (half - 1) * k)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, dim % 2))


# ------------------------------------------------------------------------------------ published checkpoints


def load_published(path: str | os.PathLike, ema: bool = True, **told) -> UNet:
    """The network of a published checkpoint, DDIMUNet or UNet, in evaluation mode; errors of read_published.

    told: what weights do not say, such as num_heads=4 or num_head_channels=64; see `describe`.
    """
    tensors = read_published(path, ema)
    options = describe(tensors, **told)
    network = {"DDIMUNet": DDIMUNet, "UNet": UNet}[options.pop("name")](**options)
    network.load_state_dict(translate(tensors))
    return network.eval()


def read_published(path: str | os.PathLike, ema: bool = True) -> dict[str, Tensor]:
    """The tensors of a published checkpoint by their published names, float32, without "module.".

    The file is a list: weights, state of Adam, epoch, step, and, if they were kept, averaged weights, which
    sampling uses; or the weights alone. Nothing in it is executed. Raises FileNotFoundError, or ValueError for
    a file that is something else, or without averaged weights when `ema`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and numbers and is not opened: {reason}"
        ) from error
    if isinstance(content, (list, tuple)) and content:
        if ema and len(content) < 5:
            raise ValueError(f"{path} holds no averaged weights; take the raw ones with ema=False")
        content = content[4] if ema else content[0]
    elif ema:
        raise ValueError(f"{path} is not a list with averaged weights; take what it holds with ema=False")
    if not isinstance(content, Mapping) or not content or not all(isinstance(x, Tensor) for x in content.values()):
        raise ValueError(f"{path} is no published checkpoint: expected a list that begins with a dict of tensors")
    return {name.removeprefix("module."): x.float() for name, x in content.items()}


def describe(
    tensors: Mapping[str, Tensor],
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_new_attention_order: bool = False,
) -> dict:
    """What `companion.models.checkpoint` builds the network from, read off the published names and shapes.

    Heads of attention and the order of q, k and v leave no trace in the weights: give them for networks with more
    than the one head of the published ones. Nor does dropout, which is 0 in use. Raises ValueError for other networks.
    """
    ours = translate(tensors)
    shape = {name: tuple(x.shape) for name, x in ours.items()}
    if not {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= shape.keys():
        raise ValueError(f"no U-Net of this family: names such as {', '.join(list(tensors)[:3])}")
    channels = shape["time_embed.0.weight"][1]
    depth = 1 + max(int(name.split(".")[1]) for name in shape if name.startswith("input_blocks"))
    updown = any(re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.2\.weight", name) for name in shape)
    blocks = _blocks_by_doubling(shape, depth) if updown else _blocks_by_halving(shape, depth)
    first = [1 + sum(blocks[:level]) + level for level in range(len(blocks))]
    widths = [shape[f"input_blocks.{i}.0.in_layers.2.weight"][0] for i in first]
    attends = [2**level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in shape]
    options = {
        "name": "DDIMUNet" if "conv_in.weight" in tensors else "UNet",
        "in_channels": shape["input_blocks.0.0.weight"][1],
        "model_channels": channels,
        "out_channels": shape["out.2.weight"][0],
        "num_res_blocks": blocks[0] if len(set(blocks)) == 1 else blocks,
        "channel_mult": [width / channels for width in widths],
        "attention_resolutions": attends,
        "conv_resample": len(widths) == 1 or any(name.endswith(".op.weight") for name in shape),
        "use_scale_shift_norm": shape["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0],
    }
    more = {
        "resblock_updown": (updown, False),
        "num_classes": (shape.get("label_emb.weight", (None,))[0], None),
        "num_heads": (num_heads, 1),
        "num_head_channels": (num_head_channels, -1),
        "num_heads_upsample": (num_heads_upsample, -1),
        "use_new_attention_order": (use_new_attention_order, False),
    }
    return options | {name: value for name, (value, default) in more.items() if value != default}


def _blocks_by_halving(shape: Mapping[str, tuple], depth: int) -> list[int]:
    """Residual blocks of each level, finest first, where what halves an image is no residual block."""
    blocks = [0]
    for i in range(1, depth):
        if f"input_blocks.{i}.0.in_layers.2.weight" in shape:
            blocks[-1] += 1
        else:
            blocks.append(0)
    if 0 in blocks:
        raise ValueError(f"a level without residual blocks ({blocks}): no U-Net of this family")
    return blocks


def _blocks_by_doubling(shape: Mapping[str, tuple], depth: int) -> list[int]:
    """The same where residual blocks halve and double: the decoder tells which, for there they come last in a stage."""
    doubling = [i for i in range(depth) if any(f"output_blocks.{i}.{k}.in_layers.2.weight" in shape for k in (1, 2))]
    ends = [-1, *doubling, depth - 1]
    return [after - before - 1 for before, after in zip(ends, ends[1:], strict=False)][::-1]


RES_BLOCK = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "temb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "nin_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "temb.dense.0": "time_embed.0", "temb.dense.1": "time_embed.2", "conv_in": "input_blocks.0.0",
    "norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
MIDDLE = {"block_1": 0, "attn_1": 1, "block_2": 2}


def translate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names and in our shapes: of a DDIM `Model`; those of a UNet stay as they are."""
    if "conv_in.weight" not in tensors:
        return dict(tensors)
    levels, blocks = (
        1 + max(int(found[1]) for name in tensors if (found := re.match(pattern, name)))
        for pattern in (r"down\.(\d+)\.", r"down\.\d+\.block\.(\d+)\.")
    )
    ours = {}
    for name, x in tensors.items():
        module, kind = name.rsplit(".", 1)
        if module in ENDS:
            ours[f"{ENDS[module]}.{kind}"] = x
            continue
        place, part = module.rsplit(".", 1)
        place = _place(place, levels, blocks, tensors)
        if part in RES_BLOCK:
            ours[f"{place}.{RES_BLOCK[part]}.{kind}"] = x
        elif part in ("q", "k", "v"):
            x = torch.cat([tensors[f"{module[:-1]}{letter}.{kind}"] for letter in "qkv"])
            ours[f"{place}.qkv.{kind}"] = x.flatten(2) if kind == "weight" else x
        elif part == "proj_out":
            ours[f"{place}.proj_out.{kind}"] = x.flatten(2) if kind == "weight" else x
        else:  # the norm of an attention block, or the convolution that resamples
            part = "op" if part == "conv" and module.startswith("down") else part
            ours[f"{place}.{part}.{kind}"] = x
    return ours


def _place(published: str, levels: int, blocks: int, tensors: Mapping) -> str:
    """Our name of a published block: down.1.attn.0 -> input_blocks.4.1."""
    side, *rest = published.split(".")
    if side == "mid":
        return f"middle_block.{MIDDLE[rest[0]]}"
    level, kind = int(rest[0]), rest[1]
    if side == "down":
        first = 1 + level * (blocks + 1)
        if kind == "downsample":
            return f"input_blocks.{first + blocks}.0"
        return f"input_blocks.{first + int(rest[2])}.{int(kind == 'attn')}"
    first = (levels - 1 - level) * (blocks + 1)
    if kind == "upsample":
        return f"output_blocks.{first + blocks}.{1 + (f'up.{level}.attn.0.norm.weight' in tensors)}"
    return f"output_blocks.{first + int(rest[2])}.{int(kind == 'attn')}"
