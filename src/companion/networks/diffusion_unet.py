"""The U-Net of latent diffusion in 2D and 3D, in the layout of MONAI's DiffusionModelUNet.

It is the U-Net of `unet.py` with norms in any number of groups and heads of q, k, v apart in the weights;
`from_monai` renames a published state_dict.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor, nn

from companion.networks.blocks import GroupNorm32
from companion.networks.transformer import SpatialTransformer
from companion.networks.unet import UNet


class DiffusionUNet(UNet):
    """Network (batch, in_channels, *space), t (batch,) -> (batch, out_channels, *space).

    Every size works that is a multiple of 2^(levels - 1) along each axis.

    in_channels: channels of x plus those of cond.
    channels: widths, finest level first, multiples of norm_groups. num_res_blocks: a level of the encoder,
        one number or one each; the decoder has one more.
    attention: whether the blocks of each level are followed by attention, whose cost grows with the square of
        the number of voxels: leave it to levels of a few thousand. The bottom block has one in any case.
    num_head_channels: channels of a head, one number or one a level.
    context_width: every attention also attends to a context of tokens of this width (transformer_layers blocks each).
    num_classes, resblock_updown, use_checkpoint, dropout: as in UNet.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (32, 64, 64),
        num_res_blocks: int | Sequence[int] = 1,
        attention: Sequence[bool] = (False, True, True),
        num_head_channels: int | Sequence[int] = 64,
        norm_groups: int = 32,
        dims: int = 3,
        num_classes: int | None = None,
        resblock_updown: bool = False,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
        context_width: int | None = None,
        transformer_layers: int = 1,
    ):
        if len(channels) != len(attention):
            raise ValueError(f"attention has {len(attention)} entries for {len(channels)} levels; give one each")
        self.context_width, self.transformer_layers = context_width, transformer_layers
        self.norm = partial(GroupNorm32, groups=norm_groups, eps=1e-6)  # before the layers are made with it
        super().__init__(
            in_channels,
            channels[0],
            out_channels,
            num_res_blocks,
            attention_resolutions=[2**i for i, attends in enumerate(attention) if attends],
            channel_mult=[Fraction(width, channels[0]) for width in channels],
            dropout=dropout,
            dims=dims,
            num_classes=num_classes,
            use_checkpoint=use_checkpoint,
            num_head_channels=num_head_channels,
            resblock_updown=resblock_updown,
            use_new_attention_order=True,
        )

    def attention(self, width: int, num_heads: int, num_head_channels: int, new_order: bool) -> nn.Module:
        if self.context_width is None:
            return super().attention(width, num_heads, num_head_channels, new_order)
        head = num_head_channels if num_head_channels > 0 else width // num_heads
        return SpatialTransformer(width, head, self.context_width, self.dims, self.norm(width), self.transformer_layers)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Returns (batch, out_channels, *space) for images x (batch, channel, *space) at times t (batch,).

        cond: condition images (batch or 1, channel, *space), concatenated to x; with context_width instead tokens
        (batch or 1, token, context_width), or numbers (batch or 1, context_width), which are one token and, where
        in_channels leaves room, constant channels as well. Raises ValueError for shapes that do not fit.
        """
        if self.context_width is None:
            return super().forward(x, t, cond, y)
        if cond is None or cond.ndim not in (2, 3) or cond.shape[-1] != self.context_width:
            given = None if cond is None else tuple(cond.shape)
            raise ValueError(
                f"cond has shape {given}; this network attends to tokens (batch, token, {self.context_width}) or to "
                f"numbers (batch, {self.context_width})"
            )
        if cond.ndim == 2 and x.shape[1] < self.in_channels:
            x = torch.cat([x, cond[(...,) + (None,) * self.dims].to(x.dtype).expand(len(x), -1, *x.shape[2:])], 1)
        self.check(x, t)
        return self.run(x, self.embed(t.expand(x.shape[0]), y), context=cond[:, None] if cond.ndim == 2 else cond)


_BLOCK = {
    "norm1.": "in_layers.0.",
    "conv1.conv.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.conv.": "out_layers.3.",
    "skip_connection.conv.": "skip_connection.",
    "op.conv.": "op.",
    "postconv.conv.": "conv.",
    "attn.out_proj.": "proj_out.",
    "proj_in.conv.": "proj_in.",
    "proj_out.conv.": "proj_out.",
}
_TOP = {"conv_in.conv.": "input_blocks.0.0.", "out.2.conv.": "out.2.", "class_embedding.": "label_emb."}


def from_monai(model: DiffusionUNet, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict for `model` from that of MONAI's DiffusionModelUNet, also of monai-generative.

    The matrices of q, k and v become one, otherwise tensors keep their values. load_state_dict says what does
    not fit.
    """
    renamed, tensors = {}, {_modern(name): x for name, x in tensors.items()}
    for name, x in tensors.items():
        if ".attn.to_k." in name or ".attn.to_v." in name:
            continue
        if ".attn.to_q." in name:
            x = torch.cat([tensors[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")])
        new = _renamed(name, model)
        linear = new.endswith(("qkv.weight", "proj_out.weight")) and x.ndim == 2
        renamed[new] = x[:, :, None] if linear else x
    return renamed


def _modern(name: str) -> str:
    """The name of today of a tensor of monai-generative."""
    name = re.sub(r"(attentions\.\d+|attention)\.to_([qkv])\.", r"\1.attn.to_\2.", name)
    name = re.sub(r"(attentions\.\d+|attention)\.proj_attn\.", r"\1.attn.out_proj.", name)
    return name.replace(".to_out.0.", ".out_proj.").replace("upsampler.conv.conv.", "upsampler.postconv.conv.")


def _renamed(name: str, model: DiffusionUNet) -> str:
    for old, new in _TOP.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    blocks = model.blocks
    if found := re.match(r"middle_block\.(resnet_1|attention|resnet_2)\.", name):
        home = f"middle_block.{('resnet_1', 'attention', 'resnet_2').index(found[1])}."
    elif found := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsampler|upsampler)\.(?:(\d+)\.)?", name):
        way, level, kind = found[1], int(found[2]), found[3]
        in_order = blocks if way == "down" else blocks[::-1]
        i = sum(n + 1 for n in in_order[:level]) + int(found[4] or in_order[level])
        if way == "down":
            home = f"input_blocks.{1 + i}.{int(kind == 'attentions')}."
        else:
            place = {"resnets": 0, "attentions": 1, "upsampler": len(list(model.output_blocks[i].children())) - 1}[kind]
            home = f"output_blocks.{i}.{place}."
    else:
        return name
    rest = name[found.end() :].replace("attn.to_q.", "qkv.")
    old = next((old for old in _BLOCK if rest.startswith(old)), "")
    return home + _BLOCK.get(old, "") + rest.removeprefix(old)
