"""Blocks that see the past frames of a sequence only."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.networks.blocks import AttentionBlock, GroupNorm32, conv

# One call of attention handles so many pixels; CUDA kernels refuse batches of 65,536 and more.
PIXELS_AT_ONCE = 32_768


def positional_embedding(length: int, dim: int, device=None) -> Tensor:
    """Returns sinusoids (1, length, dim): sin in even, cos in odd columns, frequencies 10000^(-2k / dim)."""
    position = torch.arange(length, dtype=torch.float32, device=device)
    frequency = torch.exp(-math.log(1e4) / dim * torch.arange(0, dim, 2, dtype=torch.float32, device=device))
    angles = position[:, None] * frequency
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[None]


def layer_norm(x: Tensor) -> Tensor:
    """Returns x normalised over its last axis (nothing learned, eps 1e-6), in float32 for every precision."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


def all_equal(values: Tensor) -> bool:
    """Whether all items of values (batch, ...) are the same, so that one will do for all."""
    if len(values) == 1 or values.stride(0) == 0:
        return True
    if values.is_meta or values.requires_grad:  # no values to compare; each item wants its own gradient
        return False
    return torch.equal(values[1:], values[:1].expand_as(values[1:]))


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Returns attention of the newest frames q to k, v, all (batch, head, frame, width), same shape as q."""
    asking, known = q.shape[2], k.shape[2]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # For a great many short sequences plain products are 2.5 times as fast as the bfloat16 CPU kernel.
        logits = (scale * q) @ k.mT
        if asking > 1:
            logits = logits.masked_fill(~past(asking, known), -torch.inf)
        return logits.softmax(-1).to(v.dtype) @ v
    if 1 < asking < known:
        return F.scaled_dot_product_attention(q, k, v, past(asking, known, q.device), scale=scale)
    return F.scaled_dot_product_attention(q, k, v, is_causal=asking > 1, scale=scale)


def past(asking: int, known: int, device=None) -> Tensor:
    """Returns which of the known frames each of the newest `asking` may see: bool (asking, known)."""
    return torch.ones(asking, known, dtype=torch.bool, device=device).tril(known - asking)


class Memory(dict):
    """Keys and values of context frames by attention layer: layer -> two of (batch, frame, pixel, channel)."""

    @property
    def frames(self) -> int:
        """How many frames are known."""
        return next(iter(self.values()))[0].shape[1] if self else 0

    def extend(self, layer: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values of all frames, given those of the newest; remembers them."""
        if layer in self:
            keys, values = (torch.cat(pair, dim=1) for pair in zip(self[layer], (keys, values), strict=True))
        self[layer] = keys, values
        return keys, values

    def first(self, frames: int, batch: int) -> "Memory":
        """Returns the memory of the first frames only, shared by a whole batch if it was of batch 1."""
        return Memory(
            (layer, tuple(h[:, :frames].expand(batch, -1, -1, -1) for h in pair))
            for layer, pair in self.items()
            if frames
        )


class MLP(nn.Module):
    """Two pointwise layers `fc1`, `fc2` with tanh-GELU between, four times as wide inside."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module):
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    @classmethod
    def linear(cls, width: int) -> "MLP":
        return cls(nn.Linear(width, 4 * width), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FrameAttention(nn.Module):
    """Causal attention over frames, separately at each pixel: (batch, frame, pixel, channel) -> same."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"{width} channels cannot be split into num_heads={num_heads}; choose a divisor")
        self.num_heads = num_heads
        self.values = nn.Linear(width, width)
        self.keys = nn.Linear(width, width)
        self.queries = nn.Linear(width, width)
        self.fc_out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, newest_only: bool = False, own_only: bool = False, memory: Memory | None = None
    ) -> Tensor:
        """Returns what each frame of x learns from itself and earlier ones.

        newest_only: only the last frame asks: (batch, 1, pixel, channel). own_only: the last frame attends to
        itself and all frames get its answer, as in the published sampling code. memory: knows the frames
        before x, and learns those of x.
        """
        if own_only or (x.shape[1] == 1 and memory is None):  # softmax over one key
            return self.fc_out(self.values(x[:, -1:]))
        queries = self.queries(x[:, -1:] if newest_only else x)
        keys, values = self.keys(x), self.values(x)
        if memory is not None:
            keys, values = memory.extend(self, keys, values)
        q, k, v = (self.split(h) for h in (queries, keys, values))
        # The scale is that of the full width, not of a head: the published weights were trained so.
        scale = x.shape[-1] ** -0.5
        chunks = zip(q.split(PIXELS_AT_ONCE), k.split(PIXELS_AT_ONCE), v.split(PIXELS_AT_ONCE), strict=True)
        h = torch.cat([attend(*chunk, scale) for chunk in chunks])
        h = h.unflatten(0, (x.shape[0], -1)).permute(0, 3, 1, 2, 4).flatten(3)
        return self.fc_out(h)

    def split(self, h: Tensor) -> Tensor:
        """Returns (batch * pixel, head, frame, width) from h (batch, frame, pixel, channel)."""
        return h.unflatten(-1, (self.num_heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)


class CausalConvolutions(nn.Module):
    """Five convolutions over frames that look only back, (pixel, channel, frame) -> (pixel, out, frame)."""

    DILATIONS = (1, 1, 2, 2, 2)

    def __init__(self, width: int, out: int):
        super().__init__()
        widths = (width,) + (out,) * 4
        self.conv1 = nn.ModuleList(
            nn.Conv1d(w, out, 3, dilation=d, bias=False) for w, d in zip(widths, self.DILATIONS, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer, dilation in zip(self.conv1, self.DILATIONS, strict=True):
            x = layer(F.pad(x, (2 * dilation, 0)))
        return x


class CausalGate(nn.Module):
    """Gate from the frames so far: (batch, frame, pixel, channel) -> same."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = CausalConvolutions(width, width)
        self.conv2 = CausalConvolutions(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        h = x.permute(0, 2, 3, 1).flatten(0, 1)  # (batch * pixel, channel, frame)
        h = self.conv2(F.silu(self.conv1(F.silu(h))))
        return F.glu(h, dim=1).unflatten(0, (x.shape[0], -1)).permute(0, 3, 1, 2)


class DiTBlock(nn.Module):
    """Transformer block over frames, conditioned on time by adaLN: (batch, frame, pixel, channel) -> same.

    positional: a first step adds the position in the window. gated: a causal gate is added to the gates.
    """

    def __init__(self, width: int, emb_channels: int, num_heads: int, positional: bool, gated: bool):
        super().__init__()
        self.attn = FrameAttention(width, num_heads)
        self.mlp = MLP.linear(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 6 * width))
        self.causal_gate = CausalGate(width) if gated else None
        self.mlpe = MLP.linear(width) if positional else None
        self.ada_pos_emb = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 3 * width)) if positional else None

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        positions: Tensor,
        newest_only: bool = False,
        own_only: bool = False,
        memory: Memory | None = None,
    ) -> Tensor:
        """Returns the new x; emb (batch, 4 * model_channels), positions (1, frame, 4 * model_channels).

        newest_only: only the last frame is returned: (batch, 1, pixel, channel). The rest: as FrameAttention.
        """
        if self.mlpe is not None and self.ada_pos_emb is not None:
            vectors = self.ada_pos_emb(positions).to(x.dtype)[:, :, None]  # (1, frame, 1, 3 * channel)
            shift, scale, gate = vectors.chunk(3, dim=-1)
            x = x + gate * self.mlpe(modulate(layer_norm(x), shift, scale))
        vectors = self.adaLN_modulation(emb).to(x.dtype)[:, None, None]  # once a sequence, not once a pixel
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors.chunk(6, dim=-1)
        if self.causal_gate is not None:
            gate = self.causal_gate(x)
            gate = gate[:, -1:] if newest_only else gate
            gate_a, gate_m = gate_a + gate, gate_m + gate
        h = self.attn(modulate(layer_norm(x), shift_a, scale_a), newest_only, own_only, memory)
        x = (x[:, -1:] if newest_only else x) + gate_a * h
        return x + gate_m * self.mlp(modulate(layer_norm(x), shift_m, scale_m))


class Connector(nn.Module):
    """Joins context features to the main branch by adaLN, for training in two stages: h, feature -> h."""

    def __init__(self, width: int, dims: int, attention: bool):
        super().__init__()
        self.norm1 = GroupNorm32(width) if attention else None
        self.attn = AttentionBlock(width, num_heads=4) if attention else None
        self.norm2 = GroupNorm32(width)
        self.mlp = MLP(conv(dims, width, 4 * width, kernel=1), conv(dims, 4 * width, width, kernel=1))
        parts = 6 if attention else 3
        self.modulation = nn.Sequential(nn.SiLU(), conv(dims, width, parts * width, kernel=1))

    def forward(self, h: Tensor, feature: Tensor) -> Tensor:
        *attention, gate, shift, scale = self.modulation(feature).to(h.dtype).split(h.shape[1], dim=1)
        if self.norm1 is not None and self.attn is not None:
            a_gate, a_shift, a_scale = attention
            h = h + a_gate * self.attn(modulate(self.norm1(h), a_shift, a_scale))
        return h + gate * self.mlp(modulate(self.norm2(h), shift, scale))


class Concatenate(nn.Module):
    """Joins context features to the main branch by concatenation, without parameters: h, feature -> h."""

    def forward(self, h: Tensor, feature: Tensor) -> Tensor:
        return torch.cat([h, feature.to(h.dtype).expand(h.shape[0], *feature.shape[1:])], dim=1)


class ContextGroup(nn.ModuleDict):
    """Transformer and residual blocks of one level, on frames (batch * frame, channel, *space).

    The keys 1, 3, 5, ... are those of the published weights, in which reshapes took the places between.
    """

    def forward(
        self, h: Tensor, emb: Tensor, positions: Tensor, newest_only=False, own_only=False, memory=None
    ) -> Tensor:
        """Returns new features; emb (batch, ...). newest_only: the last pair of blocks drops other frames."""
        blocks = list(self.values())
        for transformer, res_block in zip(blocks[::2], blocks[1::2], strict=True):
            last = newest_only and res_block is blocks[-1]
            space = h.shape[2:]
            tokens = h.unflatten(0, (emb.shape[0], -1)).flatten(3).transpose(2, 3)
            tokens = transformer(tokens, emb, positions, last, own_only, memory)
            h = tokens.transpose(2, 3).unflatten(3, space).flatten(0, 1)
            h = res_block(h, emb.repeat_interleave(tokens.shape[1], dim=0))
        return h
