"""UNet2DModel of diffusers in our parts: the U-Net of guided diffusion with other constants, which its config states.

    config = describe(json.load(open("unet/config.json")), json.load(open("scheduler/scheduler_config.json")))
    tensors = translate(build(config).network, published)

Folders of DDPM, of diffusers' training examples and of unconditional pipelines are of this kind. What a config asks for
beyond that (Fourier times, other activations, residual or cross-attention blocks) is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.networks.blocks import GroupNorm32, dtype_of
from companion.networks.ddim_unet import pad_at_the_end
from companion.networks.unet import UNet


class DiffusersUNet(UNet):
    """Network (batch, in_channels, y, x), t (batch,) -> (batch, out_channels, y, x).

    channels: widths, finest level first. attention: whether the blocks of each level are followed by attention; the
    bottom block has one in any case. head_channels: of an attention head, None for one head. norm_groups, norm_eps:
    of every normalisation. sine_first, freq_shift: order of the time features, and what half their number is lowered
    by in the exponent. end_padding: halving sees one zero beyond the end of an axis, none before (DDPM).
    centre: images in [0, 1] are mapped to [-1, 1] first. num_classes, use_scale_shift_norm, dropout: as of UNet.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        attention: Sequence[bool],
        num_res_blocks: int = 2,
        head_channels: int | None = 8,
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
        sine_first: bool = False,
        freq_shift: float = 0.0,
        end_padding: bool = False,
        centre: bool = False,
        use_scale_shift_norm: bool = False,
        num_classes: int | None = None,
        dropout: float = 0.0,
    ):
        if len(channels) != len(attention):
            raise ValueError(f"attention has {len(attention)} entries for {len(channels)} levels; give one each")
        self.norm = partial(GroupNorm32, groups=norm_groups, eps=norm_eps)  # before the layers are made with it
        super().__init__(
            in_channels,
            channels[0],
            out_channels,
            num_res_blocks,
            attention_resolutions=[2**i for i, attends in enumerate(attention) if attends],
            channel_mult=[Fraction(width, channels[0]) for width in channels],
            dropout=dropout,
            num_classes=num_classes,
            num_head_channels=-1 if head_channels is None else head_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            use_new_attention_order=True,
        )
        self.sine_first, self.freq_shift, self.centre = sine_first, freq_shift, centre
        if use_scale_shift_norm:  # diffusers then leaves the attention of the bottom block without a norm
            self.middle_block[1].norm = nn.Identity()
        if end_padding:
            pad_at_the_end(self)

    def embed(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Embeddings (batch, 4 * channels[0]) of times t (batch,) and class labels y (batch,)."""
        if (y is None) != (self.num_classes is None):
            raise ValueError(f"this network has num_classes={self.num_classes}; y was {'not ' * (y is None)}given")
        half = self.model_channels // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device) / (half - self.freq_shift)
        angles = t.float()[:, None] * torch.exp(-math.log(10_000) * k)
        parts = (angles.sin(), angles.cos()) if self.sine_first else (angles.cos(), angles.sin())
        features = F.pad(torch.cat(parts, 1), (0, self.model_channels % 2))
        emb = self.time_embed(features.to(dtype_of(self.time_embed)))
        return emb if y is None else emb + self.label_emb(y)

    def run(self, x: Tensor, emb: Tensor, join=None, context: Tensor | None = None) -> Tensor:
        return super().run(2 * x - 1 if self.centre else x, emb, join, context)


# what only one value of is known here; the value, None standing for "absent" too
FIXED = {
    "act_fn": ("silu", "swish", None),
    "time_embedding_type": ("positional", None),
    "time_embedding_dim": (None,),
    "mid_block_type": ("UNetMidBlock2D", None),
    "mid_block_scale_factor": (1, 1.0, None),
    "downsample_type": ("conv", None),
    "upsample_type": ("conv", None),
    "attn_norm_num_groups": (None,),
    "class_embed_type": (None,),
    "add_attention": (True, None),
}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


def describe(model: Mapping[str, Any], scheduler: Mapping[str, Any] | None = None) -> dict:
    """The config that `companion.models` builds from, of a config.json and a scheduler_config.json of diffusers.

    Without a scheduler it is that of DDPM: 1000 steps, linear, epsilon. Raises ValueError for anything else than a
    UNet2DModel of ordinary and attention blocks with a discrete schedule.
    """
    if model.get("_class_name") != "UNet2DModel":
        raise ValueError(f"config.json is of a {model.get('_class_name')}; this kind reads UNet2DModel")
    for key, known in FIXED.items():
        if model.get(key) not in known:
            raise ValueError(f"config.json has {key} = {model[key]!r}; this kind knows {known[0]!r} only")
    down, up = model["down_block_types"], model["up_block_types"]
    blocks = {"DownBlock2D": False, "AttnDownBlock2D": True, "UpBlock2D": False, "AttnUpBlock2D": True}
    strange = [name for name in (*down, *up) if name not in blocks]
    if strange or [blocks[name] for name in down] != [blocks[name] for name in reversed(up)]:
        raise ValueError(
            f"blocks {down} and {up}; this kind knows DownBlock2D, AttnDownBlock2D and their mirror images"
        )
    network = {
        "name": "DiffusersUNet",
        "in_channels": model["in_channels"],
        "out_channels": model["out_channels"],
        "channels": list(model["block_out_channels"]),
        "attention": [blocks[name] for name in down],
        "num_res_blocks": model.get("layers_per_block", 2),
        "head_channels": model.get("attention_head_dim", 8),
        "norm_groups": model.get("norm_num_groups", 32),
        "norm_eps": model.get("norm_eps", 1e-5),
        "sine_first": not model.get("flip_sin_to_cos", True),
        "freq_shift": model.get("freq_shift", 0),
        "end_padding": model.get("downsample_padding", 1) == 0,
        "centre": model.get("center_input_sample", False),
        "use_scale_shift_norm": model.get("resnet_time_scale_shift", "default") == "scale_shift",
        "num_classes": model.get("num_class_embeds"),
    }
    return {"network": network, "denoiser": _denoiser(scheduler or {})}


def _denoiser(scheduler: Mapping[str, Any]) -> dict:
    name, prediction = scheduler.get("beta_schedule", "linear"), scheduler.get("prediction_type", "epsilon")
    odd = scheduler.get("trained_betas") is not None or scheduler.get("rescale_betas_zero_snr")
    if name not in SCHEDULES or prediction not in PREDICTIONS or odd or "Flow" in scheduler.get("_class_name", ""):
        raise ValueError(
            f"scheduler_config.json has beta_schedule = {name!r}, prediction_type = {prediction!r}; known are "
            f"{', '.join(SCHEDULES)}; {', '.join(PREDICTIONS)}; give --config with a denoiser for another one"
        )
    schedule = {"name": SCHEDULES[name], "steps": scheduler.get("num_train_timesteps", 1000)}
    if name != "squaredcos_cap_v2":
        ends = ("beta_start", 1e-4), ("beta_end", 0.02)
        schedule |= {key: scheduler.get(key, default) for key, default in ends}
    return {"name": "DiscreteDenoiser", "schedule": schedule, "prediction": PREDICTIONS[prediction]}


BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "query": "qkv",
    "to_out.0": "proj_out",
    "proj_attn": "proj_out",
}
TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
PLACE = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def translate(model: UNet, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under our names; q, k and v become one. Names that are unknown stay as they are."""
    ours = {}
    for name, x in tensors.items():
        layer, _, kind = name.rpartition(".")
        if layer.endswith((".to_k", ".to_v", ".key", ".value")):
            continue
        if layer.endswith((".to_q", ".query")):
            stem, old = layer.rpartition(".")[0], layer.endswith(".query")
            names = ("query", "key", "value") if old else ("to_q", "to_k", "to_v")
            x = torch.cat([tensors[f"{stem}.{part}.{kind}"] for part in names])
        new = _renamed(layer, model)
        weights = new.endswith((".qkv", ".proj_out")) and kind == "weight"
        ours[f"{new}.{kind}"] = x.reshape(*x.shape[:2], 1) if weights else x
    return ours


def _renamed(layer: str, model: UNet) -> str:
    if layer in TOP:
        return TOP[layer]
    place = PLACE.fullmatch(layer)
    if not place:
        return layer
    way, role, i, inside = place[1], place[3], int(place[4]), place[5]
    if way is None:
        home = f"middle_block.{1 if role == 'attentions' else 2 * i}"
    else:
        level, per = int(place[2]), model.blocks[0] + 1
        first = level * per  # a level's blocks and what halves it, or its blocks, with what doubles it in the last
        if way == "down":
            home = f"input_blocks.{1 + first + (per - 1 if role == 'downsamplers' else i)}.{int(role == 'attentions')}"
            inside = "op" if role == "downsamplers" else inside
        elif role == "upsamplers":
            block = first + per - 1
            home = f"output_blocks.{block}.{len(list(model.output_blocks[block].children())) - 1}"
        else:
            home = f"output_blocks.{first + i}.{int(role == 'attentions')}"
    return f"{home}.{BLOCK.get(inside, inside)}"
