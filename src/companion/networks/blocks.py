"""Building blocks of the guided-diffusion U-Net family, in 1, 2 or 3 dimensions.

Parameter names follow the published checkpoints (`in_layers.0`, `qkv`, `op`, ...): state_dicts load strictly.
Layers keep the memory format and precision they are given: channels_last and autocast are the caller's.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def conv(
    dims: int, in_channels: int, out_channels: int, kernel: int = 3, stride: int | tuple[int, ...] = 1
) -> nn.Module:
    """Returns a convolution in `dims` dimensions that keeps the size of an image when `stride` is 1."""
    of: Any = CONV[dims]  # each wants a tuple of its own length
    return of(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)


def zero(module: M) -> M:
    """Returns `module` with all parameters set to zero, so that its branch starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Returns sinusoidal features (batch, dim) of times t (batch,), ordered [cos(t f_k), sin(t f_k)].

    f_k = max_period^(-k / (dim/2)); t may be fractional. Float32. An odd `dim` ends in a zero column.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) / half * k)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def pixel_unshuffle(x: Tensor, patch: int) -> Tensor:
    """Returns (batch, channel * patch^n, *space / patch) from x (batch, channel, *space), n axes of space.

    The same as F.pixel_unshuffle where that exists (n = 2).
    """
    if patch == 1:
        return x
    batch, _, *space = x.shape
    n = len(space)
    coarse = [size // patch for size in space]
    x = x.reshape(batch, -1, *(size for s in coarse for size in (s, patch)))
    x = x.permute(0, 1, *range(3, 3 + 2 * n, 2), *range(2, 2 + 2 * n, 2))
    return x.reshape(batch, -1, *coarse)


def pixel_shuffle(x: Tensor, patch: int) -> Tensor:
    """Returns (batch, channel / patch^n, *space * patch) from x (batch, channel, *space): the inverse."""
    if patch == 1:
        return x
    batch, channels, *space = x.shape
    n = len(space)
    x = x.reshape(batch, channels // patch**n, *[patch] * n, *space)
    x = x.permute(0, 1, *(axis for i in range(n) for axis in (2 + n + i, 2 + i)))
    return x.reshape(batch, channels // patch**n, *(size * patch for size in space))


def dtype_of(layers: nn.Module) -> torch.dtype:
    """The number format of a module's first weights."""
    return next(layers.parameters()).dtype


class GroupNorm32(nn.GroupNorm):
    """Group normalisation of x (batch, channel, *space) in 32 groups, in float32 for every precision of x."""

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5):
        if channels % groups:
            raise ValueError(
                f"{channels} channels cannot be normalised in {groups} groups; choose model_channels and "
                f"channel_mult so that every width is a multiple of {groups}"
            )
        super().__init__(groups, channels, eps)

    def forward(self, input: Tensor) -> Tensor:
        x = input
        # PyTorch's channels_last backward on CPUs crashes when the weight wants a gradient and x does not.
        if self.weight.requires_grad and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()
        # On a CPU the casts cost less than they save: the bfloat16 channels_last kernel is many times slower.
        h = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return h.to(x.dtype)


def per_level(value: int | Sequence[int], levels: int, name: str) -> list[int]:
    """One number a level, finest level first: those given, or the one given for all. Raises ValueError."""
    values = [value] * levels if isinstance(value, int) else list(value)
    if len(values) != levels:
        raise ValueError(f"{name} has {len(values)} entries for {levels} levels; give one each, or one for all")
    return values


class Downsample(nn.Module):
    """Halves images along the axes whose `stride` is 2: strided convolution `op` if `learned`, else mean."""

    def __init__(self, channels: int, dims: int, stride: Sequence[int], learned: bool = True):
        super().__init__()
        self.channels, self.learned, by = channels, learned, tuple(stride)
        self.op = conv(dims, channels, channels, 3, by) if learned else AVERAGE_POOL[dims](by, by)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Repeats pixels along the axes whose `stride` is 2 (nearest neighbour), then convolves if `learned`."""

    def __init__(self, channels: int, dims: int, stride: Sequence[int], learned: bool = True):
        super().__init__()
        self.stride = tuple(float(s) for s in stride)
        self.conv = conv(dims, channels, channels) if learned else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.stride, mode="nearest"))


class ResBlock(nn.Module):
    """Residual block with time embedding: (batch, in_channels, *space) -> (batch, out_channels, *space').

    scale_shift: the embedding scales and shifts the second norm; otherwise it is added before that norm.
    resample: an un-learned Downsample or Upsample, applied after the first norm and to the skip path.
    norm: makes the normalisation of so many channels.
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
        norm: Callable[[int], nn.Module] = GroupNorm32,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample or nn.Identity()
        self.in_layers = nn.Sequential(norm(in_channels), nn.SiLU(), conv(dims, in_channels, out_channels))
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if scale_shift else out_channels)
        )
        self.out_layers = nn.Sequential(
            norm(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero(conv(dims, out_channels, out_channels)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else conv(dims, in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm1, activation, conv1 = self.in_layers
        norm2, *rest = self.out_layers
        h = conv1(self.resample(activation(norm1(x))))
        emb = self.emb_layers(emb).to(h.dtype)[(...,) + (None,) * (h.ndim - 2)]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, norm2(h), 1 + scale)
        else:
            h = norm2(h + emb)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, with a residual: (batch, channel, *space) -> same.

    new_order: the weights hold q, k, v first and heads inside; otherwise heads first and q, k, v inside each.
    norm: makes the normalisation of so many channels.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        new_order: bool = False,
        norm: Callable[[int], nn.Module] = GroupNorm32,
    ):
        super().__init__()
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        if channels % self.num_heads or (num_head_channels != -1 and channels % num_head_channels):
            raise ValueError(
                f"{channels} channels cannot be split into attention heads with num_heads={num_heads}, "
                f"num_head_channels={num_head_channels}; choose a divisor of {channels}"
            )
        self.new_order = new_order
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        # A 1x1 convolution is a linear map of pixels; written so, neither SDPA nor channels_last copies.
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (batch, pixel, channel)
        qkv = F.linear(pixels, self.qkv.weight.squeeze(-1), self.qkv.bias)
        order = (3, self.num_heads) if self.new_order else (self.num_heads, 3)
        qkv = qkv.unflatten(-1, (*order, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2 if self.new_order else 3))
        # (batch, head, pixel, width). The published code scales q and k by width^(-1/4) each: SDPA's default.
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = F.linear(h, self.proj_out.weight.squeeze(-1), self.proj_out.bias)
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Attends(nn.Module):
    """A layer that attends to a context: (x, context) -> the shape of x."""


class Stage(nn.ModuleList):
    """Runs its layers in order and hands the time embedding and a context, if there is one, to those that take it."""

    def __init__(self, *layers: nn.Module):
        super().__init__(layers)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            else:
                x = layer(x, context) if isinstance(layer, Attends) else layer(x)
        return x
