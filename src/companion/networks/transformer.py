"""Attention of an image to itself and to a context of tokens: the transformer of latent diffusion [rombach2022].

Parameters have the names of MONAI's SpatialTransformer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.networks.blocks import Attends, conv, zero


class Attention(nn.Module):
    """Multi-head attention of x (batch, token, width) to context (batch, token, context_width)."""

    def __init__(self, width: int, head_channels: int, context_width: int | None = None):
        super().__init__()
        self.head_channels = head_channels
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_width or width, width, bias=False) for _ in range(2))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (part.unflatten(2, (-1, self.head_channels)).transpose(1, 2) for part in tokens)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """Two layers with the gate of GELU between them (GEGLU)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.linear1(x).chunk(2, -1)
        return self.linear2(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Attention to itself, to the context, and a perceptron; each normalised before and added."""

    def __init__(self, width: int, head_channels: int, context_width: int):
        super().__init__()
        self.attn1, self.attn2 = Attention(width, head_channels), Attention(width, head_channels, context_width)
        self.ff = GatedMLP(width, 4 * width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        own = self.norm1(x)
        x = x + self.attn1(own, own)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(Attends):
    """Images (batch, width, *space) that attend to themselves and a context (batch, token, context_width)."""

    def __init__(self, width: int, head_channels: int, context_width: int, dims: int, norm: nn.Module, layers: int = 1):
        super().__init__()
        if width % head_channels:
            raise ValueError(f"{width} channels cannot be split into heads of {head_channels}; choose a divisor")
        self.norm, self.proj_in, self.proj_out = norm, conv(dims, width, width, 1), zero(conv(dims, width, width, 1))
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, head_channels, context_width) for _ in range(layers)
        )

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        context = torch.broadcast_to(context, (len(x), *context.shape[1:])).to(tokens.dtype)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))
