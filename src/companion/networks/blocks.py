"""Building blocks of the guided-diffusion U-Net family, in 1, 2 or 3 dimensions.

Parameter names follow the published checkpoints (`in_layers.0`, `qkv`, `op`, ...), so state_dicts load strictly.
Layers keep the memory format and the precision of what they are given: channels_last and autocast are the caller's.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def conv(dims: int, in_channels: int, out_channels: int, kernel: int = 3, stride=1) -> nn.Module:
    """Returns a convolution in `dims` dimensions that keeps the size of an image when `stride` is 1."""
    return CONV[dims](in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)


def zero(module: nn.Module) -> nn.Module:
    """Returns `module` with all parameters set to zero, so that its branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Returns sinusoidal features (batch, dim) of times t (batch,), ordered [cos(t f_k), sin(t f_k)].

    f_k = max_period^(-k / (dim/2)); t may be fractional. Computed in float32. An odd `dim` ends in a zero column.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def pixel_unshuffle(x: Tensor, patch: int) -> Tensor:
    """Returns (batch, channel * patch^n, *space / patch) from (batch, channel, *space): F.pixel_unshuffle in n dimensions."""
    if patch == 1:
        return x
    space = x.shape[2:]
    n = len(space)
    split = [size for s in space for size in (s // patch, patch)]
    x = x.reshape(*x.shape[:2], *split)
    outer, inner = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
    return x.permute(0, 1, *inner, *outer).reshape(x.shape[0], -1, *(s // patch for s in space))


def pixel_shuffle(x: Tensor, patch: int) -> Tensor:
    """Returns (batch, channel / patch^n, *space * patch) from (batch, channel, *space): inverse of `pixel_unshuffle`."""
    if patch == 1:
        return x
    space = x.shape[2:]
    n = len(space)
    x = x.reshape(x.shape[0], -1, *([patch] * n), *space)
    order = [axis for i in range(n) for axis in (2 + n + i, 2 + i)]
    return x.permute(0, 1, *order).reshape(*x.shape[:2], *(s * patch for s in space))


class GroupNorm32(nn.GroupNorm):
    """Group normalisation in 32 groups with float32 statistics, whatever the precision of x (batch, channel, *space)."""

    def __init__(self, channels: int):
        if channels % 32:
            raise ValueError(
                f"{channels} channels cannot be normalised in 32 groups; choose model_channels and channel_mult "
                "such that every width is a multiple of 32"
            )
        super().__init__(32, channels)


class Downsample(nn.Module):
    """Halves the image along the axes where `stride` is 2: strided convolution `op`, or average pooling if not `learned`."""

    def __init__(self, channels: int, dims: int, stride: Sequence[int], learned: bool = True):
        super().__init__()
        stride = tuple(stride)
        self.op = conv(dims, channels, channels, stride=stride) if learned else AVERAGE_POOL[dims](stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Repeats pixels along the axes where `stride` is 2 (nearest neighbour), then a convolution `conv` if `learned`."""

    def __init__(self, channels: int, dims: int, stride: Sequence[int], learned: bool = True):
        super().__init__()
        self.stride = tuple(float(s) for s in stride)
        self.conv = conv(dims, channels, channels) if learned else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.stride, mode="nearest"))


class ResBlock(nn.Module):
    """Residual block that receives the time embedding: (batch, in_channels, *space) -> (batch, out_channels, *space').

    scale_shift: the embedding scales and shifts the second norm, else it is added before it.
    resample: an un-learned Downsample or Upsample, applied after the first norm and to the skip path.
    """

    def __init__(
        self,
        in_channels: int,
        emb_channels: int,
        out_channels: int,
        dims: int = 2,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample or nn.Identity()
        self.in_layers = nn.Sequential(GroupNorm32(in_channels), nn.SiLU(), conv(dims, in_channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels), nn.SiLU(), nn.Dropout(dropout), zero(conv(dims, out_channels, out_channels))
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else conv(dims, in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm1, act1, conv1 = self.in_layers
        h = conv1(self.resample(act1(norm1(x))))
        emb = self.emb_layers(emb).to(h.dtype)[(...,) + (None,) * (h.ndim - 2)]
        norm2, *rest = self.out_layers
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, norm2(h), 1 + scale)
        else:
            h = norm2(h + emb)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention over all pixels with a residual: (batch, channel, *space) -> same.

    new_order: q, k, v are split first and then the heads; otherwise (published models) heads first, then q, k, v in each.
    """

    def __init__(self, channels: int, num_heads: int = 1, num_head_channels: int = -1, new_order: bool = False):
        super().__init__()
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        if channels % self.num_heads or (num_head_channels != -1 and channels % num_head_channels):
            raise ValueError(
                f"attention over {channels} channels cannot be split into heads with num_heads={num_heads}, "
                f"num_head_channels={num_head_channels}; choose a divisor of {channels}"
            )
        self.new_order = new_order
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *space = x.shape
        # A 1x1 convolution is a linear map of the pixel vectors; in this layout neither SDPA nor channels_last copies.
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (batch, pixel, channel)
        qkv = F.linear(pixels, self.qkv.weight.squeeze(-1), self.qkv.bias)
        split = (3, self.num_heads) if self.new_order else (self.num_heads, 3)
        qkv = qkv.unflatten(-1, (*split, -1))  # (batch, pixel, [3, head] or [head, 3], channel per head)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2 if self.new_order else 3))
        # Published code scales q and k by (channel per head)^(-1/4) each: the default scale of SDPA.
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = F.linear(h, self.proj_out.weight.squeeze(-1), self.proj_out.bias)
        return x + h.transpose(1, 2).unflatten(2, space)


class Stage(nn.Sequential):
    """Runs its layers in order and hands the time embedding to the ones that take it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x
