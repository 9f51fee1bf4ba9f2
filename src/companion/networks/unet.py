"""The guided-diffusion U-Net (Dhariwal and Nichol 2021, arXiv 2105.05233) for 1D, 2D and 3D images."""

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from companion.networks.blocks import (
    AttentionBlock,
    Downsample,
    GroupNorm32,
    ResBlock,
    Stage,
    Upsample,
    conv,
    dtype_of,
    per_level,
    pixel_shuffle,
    pixel_unshuffle,
    timestep_embedding,
    zero,
)

# Channel multipliers of the published models by image size. A fraction narrows the first, largest levels.
CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    320: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    192: (1, 1, 2, 2, 2, 4),
    160: (1, 1, 2, 2, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    40: (1, 2, 2, 4),
    32: (1, 2, 2, 4),
}


def default_channel_mult(image_size: int) -> tuple[float, ...]:
    """Returns the channel multipliers, finest level first, that the published models use for `image_size`."""
    if image_size not in CHANNEL_MULT:
        raise ValueError(
            f"no published channel_mult for image size {image_size}, only for {sorted(CHANNEL_MULT)}; "
            "pass channel_mult yourself, e.g. (1, 2, 2)"
        )
    return CHANNEL_MULT[image_size]


class UNet(nn.Module):
    """Network (batch, in_channels, *space), t (batch,) -> (batch, out_channels, *space).

    Every image size works that is a multiple of `total_stride` = patch * 2^(levels - 1) along each axis.

    in_channels: channels of x plus those of cond.
    model_channels: width; level l has int(channel_mult[l] * model_channels) channels, a multiple of 32.
    num_res_blocks: residual blocks a level in the encoder, one number for all levels or one each, finest first;
        the decoder has one more.
    attention_resolutions: strides 1, 2, 4, ... (after the stem) of the levels whose blocks are followed by
        attention; the bottom block has one in any case, unless num_heads is 0.
    conv_resample: resample by learned convolutions. resblock_updown: by residual blocks instead.
    num_classes: how many class labels y the network knows; None for a network without labels.
    num_heads: attention heads, 0 for none anywhere; num_head_channels, if not -1, sets the channels per head
        instead (for all levels, or for each, finest first);
        num_heads_upsample, if not -1, is num_heads for the decoder.
    use_scale_shift_norm: the time embedding scales and shifts norms instead of being added.
    use_new_attention_order: order of q, k, v and heads inside the weights (see AttentionBlock).
    use_checkpoint: recompute blocks in the backward pass: less memory, same numbers.
    patch: side of the pixel-unshuffle stem, which turns fine levels into channels (1: no stem).
    halve_depth: in 3D resample all three axes; False keeps the size of the first, as the published code does.
    entry_width: the first block of each encoder level takes this many times the channels, for a subclass that
        concatenates features there.
    emb_mult: width of the time embedding over model_channels.
    """

    norm = GroupNorm32  # makes every normalisation; a subclass may have another
    emb_parts = 1  # embeddings side by side that blocks are given: that of time and class, and those of a subclass

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int] = 2,
        attention_resolutions: Sequence[int] = (),
        channel_mult: Sequence[float | Fraction] = (1, 2, 4, 8),
        dropout: float = 0.0,
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_head_channels: int | Sequence[int] = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        patch: int = 1,
        halve_depth: bool = True,
        entry_width: int = 1,
        emb_mult: int = 4,
    ):
        super().__init__()
        if dims not in (1, 2, 3):
            raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
        self.in_channels, self.model_channels, self.out_channels = in_channels, model_channels, out_channels
        self.dims, self.patch = dims, patch
        self.num_classes, self.use_checkpoint = num_classes, use_checkpoint
        self.widths = [int(mult * model_channels) for mult in channel_mult]
        self.stride = (2,) * dims if halve_depth or dims < 3 else (1, 2, 2)
        self.total_stride = tuple(patch * s ** (len(self.widths) - 1) for s in self.stride)
        emb, norm = emb_mult * model_channels, self.norm
        self.blocks = per_level(num_res_blocks, len(self.widths), "num_res_blocks")
        head_channels = per_level(num_head_channels, len(self.widths), "num_head_channels")

        def res_block(in_width: int, width: int, resample: nn.Module | None = None) -> ResBlock:
            return ResBlock(in_width, emb * self.emb_parts, width, dims, dropout, use_scale_shift_norm, resample, norm)

        def attention(width: int, level: int, heads: int = num_heads) -> list[nn.Module]:
            options = self.heads(width, heads, head_channels[level])
            return [self.attention(width, *options, use_new_attention_order)] if options else []

        def resampler(kind: type, width: int) -> nn.Module:
            if resblock_updown:
                return res_block(width, width, kind(width, dims, self.stride, learned=False))
            return kind(width, dims, self.stride, learned=conv_resample)

        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb)

        width = self.widths[0]
        self.input_blocks = nn.ModuleList([Stage(conv(dims, in_channels * patch**dims, width))])
        self.level_entries = {}  # index in input_blocks of the first block of a level -> level
        skips = [width]
        for level, level_width in enumerate(self.widths):
            self.level_entries[len(self.input_blocks)] = level
            for i in range(self.blocks[level]):
                layers: list[nn.Module] = [res_block(width * (entry_width if i == 0 else 1), level_width)]
                width = level_width
                if 2**level in attention_resolutions:
                    layers += attention(width, level)
                self.input_blocks.append(Stage(*layers))
                skips.append(width)
            if level < len(self.widths) - 1:
                self.input_blocks.append(Stage(resampler(Downsample, width)))
                skips.append(width)

        self.middle_block = Stage(
            res_block(width, width), *attention(width, len(self.widths) - 1), res_block(width, width)
        )

        heads = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.output_blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(self.widths))):
            for i in range(self.blocks[level] + 1):
                layers = [res_block(width + skips.pop(), level_width)]
                width = level_width
                if 2**level in attention_resolutions:
                    layers += attention(width, level, heads)
                if level and i == self.blocks[level]:
                    layers.append(resampler(Upsample, width))
                self.output_blocks.append(Stage(*layers))

        last = zero(conv(dims, width, out_channels * patch**dims))
        self.out = nn.Sequential(norm(width), nn.SiLU(), last)

    def heads(self, width: int, num_heads: int, num_head_channels: int) -> tuple[int, int] | None:
        """Returns (num_heads, num_head_channels) of attention over `width` channels; None: no attention."""
        return (num_heads, num_head_channels) if num_heads else None

    def attention(self, width: int, num_heads: int, num_head_channels: int, new_order: bool) -> nn.Module:
        """Returns the layer of attention over `width` channels."""
        return AttentionBlock(width, num_heads, num_head_channels, new_order, self.norm)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Returns (batch, out_channels, *space) for images x (batch, channel, *space) at times t (batch,).

        cond (batch or 1, channel, *space) is concatenated to x on channels; y (batch,) are class labels.
        Raises ValueError for shapes that the network was not built for.
        """
        if cond is not None:
            x = torch.cat([x, cond.to(x.dtype).expand(x.shape[0], *cond.shape[1:])], dim=1)
        self.check(x, t)
        return self.run(x, self.embed(t.expand(x.shape[0]), y))

    def embed(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Returns embeddings (batch, emb_mult * model_channels) of times t (batch,) and class labels y (batch,)."""
        if (y is None) != (self.num_classes is None):
            raise ValueError(
                f"this network was built with num_classes={self.num_classes}; class labels y were "
                f"{'not ' if y is None else ''}given"
            )
        emb = self.time_embed(timestep_embedding(t, self.model_channels).to(dtype_of(self.time_embed)))
        return emb if y is None else emb + self.label_emb(y)

    def run(
        self,
        x: Tensor,
        emb: Tensor,
        join: Callable[[int, Tensor], Tensor] | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Returns the output for images x and embeddings; join(level, h) replaces h where a level starts.

        context: what layers that attend to one are given.
        """
        given = (emb,) if context is None else (emb, context)
        h = pixel_unshuffle(x, self.patch)
        skips = []
        for i, stage in enumerate(self.input_blocks):
            if join is not None and i in self.level_entries:
                h = join(self.level_entries[i], h)
            h = self.call(stage, h, *given)
            skips.append(h)
        h = self.call(self.middle_block, h, *given)
        for stage in self.output_blocks:
            h = self.call(stage, torch.cat([h, skips.pop()], dim=1), *given)
        return pixel_shuffle(self.out(h), self.patch)

    def call(self, stage: nn.Module, *args):
        """Returns stage(*args), with use_checkpoint not stored but recomputed in the backward pass."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(stage, *args, use_reentrant=False)
        return stage(*args)

    def check(self, x: Tensor, t: Tensor) -> None:
        """Raises ValueError unless images x, conditions included, and times t fit the network."""
        space = x.shape[2:]
        if len(space) != self.dims or x.shape[1] != self.in_channels:
            raise ValueError(
                f"input (with cond) has shape {tuple(x.shape)}; expected (batch, {self.in_channels}, "
                f"{', '.join('zyx'[-self.dims :])})"
            )
        if any(size % stride for size, stride in zip(space, self.total_stride, strict=True)):
            raise ValueError(
                f"image size {tuple(space)} is not a multiple of the network's total stride "
                f"{self.total_stride}; pad or crop the image, or build the network with fewer levels"
            )
        if t.ndim > 1 or t.numel() not in (1, x.shape[0]):
            raise ValueError(f"t has shape {tuple(t.shape)}; expected ({x.shape[0]},), one time per image")
