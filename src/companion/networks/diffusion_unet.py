"""The U-Net of latent diffusion in 2D and 3D, in the layout of MONAI's DiffusionModelUNet.

It is the U-Net of `unet.py` with norms in any number of groups and heads of q, k, v apart in the weights;
`networks.monai` renames a published state_dict.
"""

from collections.abc import Sequence
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
    told: the network is told so many numbers about the image, in groups; each group has a perceptron whose output is
        put beside the embedding of time and class. They are multiplied by told_scale before.
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
        told: Sequence[int] = (),
        told_scale: float = 1.0,
    ):
        if len(channels) != len(attention):
            raise ValueError(f"attention has {len(attention)} entries for {len(channels)} levels; give one each")
        if told and context_width is not None:
            raise ValueError(f"told={list(told)} and context_width={context_width}: cond is either; leave out one")
        self.context_width, self.transformer_layers = context_width, transformer_layers
        self.groups, self.told_scale, self.emb_parts = list(told), told_scale, 1 + len(told)
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
        if told:
            width = 4 * channels[0]
            self.told = nn.ModuleList(
                nn.Sequential(nn.Linear(n, width), nn.SiLU(), nn.Linear(width, width)) for n in told
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
        in_channels leaves room, constant channels as well; with told the numbers (batch or 1, sum of told). Raises
        ValueError for shapes that do not fit.
        """
        if self.groups:
            self.check(x, t)
            return self.run(x, self.embed_told(cond, self.embed(t.expand(x.shape[0]), y)))
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

    def embed_told(self, cond: Tensor | None, emb: Tensor) -> Tensor:
        """emb (batch, width) and, beside it, what the numbers cond (batch or 1, sum of told) say."""
        count = sum(self.groups)
        if cond is None or cond.ndim != 2 or cond.shape[1] != count or len(cond) not in (1, len(emb)):
            raise ValueError(
                f"cond has shape {None if cond is None else tuple(cond.shape)}; this network is told {count} numbers "
                f"about each image, in groups of {self.groups}: give ({len(emb)}, {count}) or (1, {count})"
            )
        parts = (self.told_scale * cond.to(emb.dtype)).expand(len(emb), -1).split(self.groups, 1)
        return torch.cat([emb, *(layer(part) for layer, part in zip(self.told, parts, strict=True))], 1)
