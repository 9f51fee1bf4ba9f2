"""The U-Net of latent diffusion in 2D and 3D, in the layout of MONAI's DiffusionModelUNet.

It is the U-Net of `unet.py` with norms in any number of groups and heads of q, k, v apart in the weights;
`from_monai` renames a published state_dict.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from companion.networks.blocks import GroupNorm32
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
    ):
        if len(channels) != len(attention):
            raise ValueError(f"attention has {len(attention)} entries for {len(channels)} levels; give one each")
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
}
_TOP = {"conv_in.conv.": "input_blocks.0.0.", "out.2.conv.": "out.2.", "class_embedding.": "label_emb."}


def from_monai(model: DiffusionUNet, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict for `model` from that of MONAI's DiffusionModelUNet, without cross-attention.

    The matrices of q, k and v become one, otherwise tensors keep their values. load_state_dict says what does
    not fit.
    """
    renamed = {}
    for name, x in tensors.items():
        if name.endswith((".to_k.weight", ".to_k.bias", ".to_v.weight", ".to_v.bias")):
            continue
        if ".attn.to_q." in name:
            x = torch.cat([tensors[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")])
        new = _renamed(name, model)
        renamed[new] = x[:, :, None] if new.endswith(("qkv.weight", "proj_out.weight")) else x
    return renamed


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
            place = {"resnets": 0, "attentions": 1, "upsampler": len(model.output_blocks[i]) - 1}[kind]
            home = f"output_blocks.{i}.{place}."
    else:
        return name
    rest = name[found.end() :].replace("attn.to_q.", "qkv.")
    old = next((old for old in _BLOCK if rest.startswith(old)), "")
    return home + _BLOCK.get(old, "") + rest.removeprefix(old)
