"""U-Net for image sequences: a frame given the frames before it (Luo, Huang, Uecker 2024, arXiv 2405.14327).

Two branches. The main one is the U-Net of `unet.py`, run on every noisy frame by itself. The context branch
(`x0_blocks`) sees the clean frames; its transformer blocks attend over time, causally, each pixel by itself.
Where the main branch enters a level, the features of context frame n join it and condition frame n + 1.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.networks.blocks import (
    AttentionBlock,
    Downsample,
    GroupNorm32,
    ResBlock,
    Stage,
    conv,
    pixel_unshuffle,
    zero,
)
from companion.networks.unet import UNet

# One call of attention handles so many pixels; CUDA kernels refuse batches of 65,536 and more.
PIXELS_AT_ONCE = 32_768

# Names of the parameters that the plain U-Net does not have.
CONTEXT_BRANCH = ("x0_blocks.", "connectors.")


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
            keys, values = (
                torch.cat(pair, dim=1) for pair in zip(self[layer], (keys, values), strict=True)
            )
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
        chunks = zip(*(h.split(PIXELS_AT_ONCE) for h in (q, k, v)), strict=True)
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
        self.ada_pos_emb = (
            nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 3 * width)) if positional else None
        )

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
        if self.mlpe is not None:
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
        if attention:
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


@dataclass
class CacheReport:
    """How often a cache helped and what it holds; up to date at any time."""

    budget_bytes: int
    bytes_held: int = 0
    hits: int = 0  # the context of before: nothing was computed
    extensions: int = 0  # a context that begins as before: only its further frames were computed
    misses: int = 0  # all frames were computed
    refusals: int = 0  # of the two above, results that the budget had no room for

    def __str__(self) -> str:
        return (
            f"{self.hits} hits, {self.extensions} extensions, {self.misses} misses, {self.refusals} not stored; "
            f"{self.bytes_held / 2**20:.1f} of {self.budget_bytes / 2**20:.1f} MiB held"
        )


@dataclass(frozen=True)
class CacheEntry:
    """A context that was conditioned on, under which setting, and what is known of it."""

    setting: tuple
    context: Tensor
    features: list[Tensor]
    memory: Memory

    @property
    def nbytes(self) -> int:
        pairs = (h for pair in self.memory.values() for h in pair)
        return sum(h.nbytes for h in (self.context, *self.features, *pairs))

    def agreement(self, context: Tensor, setting: tuple) -> int:
        """How many frames at the start of both contexts are the same."""
        if setting != self.setting or len(self.context) not in (1, len(context)):
            return 0
        frames = min(self.context.shape[1], context.shape[1])
        same = (self.context[:, :frames] == context[:, :frames]).flatten(2).all(dim=2).all(dim=0)
        return int(same.cumprod(0).sum())


class ConditionCache:
    """What `CausalUNet.caching` switches on: one entry for each time t (and labels y)."""

    def __init__(self, weights: Iterable[nn.Parameter], budget_bytes: int):
        self.weights, self.state = list(weights), []
        self.entries: dict[tuple, CacheEntry] = {}
        self.report = CacheReport(budget_bytes)

    def condition(self, net: "CausalUNet", context: Tensor, t: Tensor, y: Tensor | None) -> list[Tensor]:
        """Returns net.condition(context, t, y), with no more work than what the entries lack."""
        self.forget_other_weights()
        key, setting = tuple(None if v is None else tuple(v.tolist()) for v in (t, y)), self.setting(net, context)
        if all_equal(t) and (y is None or all_equal(y)):  # also found when the batch has grown out of one
            key = tuple(v and v[:1] for v in key)
        batch, frames = context.shape[:2]
        entry, agreed = self.entries.get(key), 0
        if entry is not None:
            agreed = entry.agreement(context, setting)
            if agreed == frames and context.shape == entry.context.shape:
                self.report.hits += 1
                return list(entry.features)

        memory = Memory() if not agreed else entry.memory.first(min(agreed, frames - 1), batch)
        self.report.extensions += memory.frames > 0
        self.report.misses += memory.frames == 0
        grows = net.context == "full" and not net.gated
        features = net.condition_anew(context, t, y, memory if grows else None)
        if frames == net.seq_len:  # the window slides from now on: these keys can serve no other context
            memory = Memory()
        keep = entry is not None and agreed == entry.context.shape[1]
        self.store(key, CacheEntry(setting, context.clone(), [h.clone() for h in features], memory), keep)
        return features

    def store(self, key: tuple, entry: CacheEntry, keep: bool) -> None:
        """Puts entry in the place of the one with this key; without room for it, may keep the old one."""
        old = self.entries[key].nbytes if key in self.entries else 0
        held = self.report.bytes_held - old + entry.nbytes
        if held <= self.report.budget_bytes:
            self.entries[key], self.report.bytes_held = entry, held
            return
        self.report.refusals += 1
        if old and not keep:
            del self.entries[key]
            self.report.bytes_held -= old

    def forget_other_weights(self) -> None:
        """Drops everything if weights were changed or moved since the last call."""
        state = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.weights]
        if state != self.state:
            self.entries.clear()
            self.state, self.report.bytes_held = state, 0

    @staticmethod
    def setting(net: "CausalUNet", context: Tensor) -> tuple:
        """What else the numbers, or their use, depend on."""
        device = context.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        inference = torch.is_inference_mode_enabled()  # its tensors are of no use to a gradient
        return net.context, context.shape[2:], context.dtype, context.device, autocast, inference


class CausalUNet(UNet):
    """Sequence network: x, t (batch,), cond -> output like x with out_channels channels.

    x (batch, frame, channel, *space): frame n of x is denoised given frames 0..n of cond (batch, frame, ...),
        for all n at once (training; cond is the sequence that x continues by one frame).
    x (batch, channel, *space): one new frame, given all frames of cond (batch or 1, frame, channel, *space).
        A cond of batch 1, or of equal items, is worked out once for all of x if they share one t.

    seq_len: longest window of frames.
    concat_cond: features join by concatenation; otherwise by `connectors`, which can be left out (cond=None).
    complicated_x0: deep context groups, num_complicated + 2 pairs of blocks a level instead of one.
    pos_emb: deep groups know the position in the window.
    use_causal_gated: transformer blocks have causal gates (and no position).
    context: what a new frame attends to: "full", as in training, or "last", as the published code samples.
    options: those of UNet.
    """

    def __init__(
        self,
        seq_len: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        *,
        concat_cond: bool = True,
        complicated_x0: bool = False,
        num_complicated: int = 0,
        pos_emb: bool = False,
        use_causal_gated: bool = False,
        context: str = "full",
        **options,
    ):
        super().__init__(in_channels, model_channels, out_channels, **options, entry_width=1 + concat_cond)
        self.seq_len, self.concat_cond, self.context = seq_len, concat_cond, context
        self.gated = use_causal_gated
        self.cache: ConditionCache | None = None
        self.check_context()
        emb, dims = 4 * model_channels, self.dims
        num_heads = options.get("num_heads", 1)
        dropout, scale_shift = options.get("dropout", 0.0), options.get("use_scale_shift_norm", False)
        pairs = num_complicated + 2 if complicated_x0 else 1

        entries = [self.widths[0], *self.widths[:-1]]  # width on entering each level
        self.x0_blocks = nn.ModuleList([Stage(conv(dims, in_channels * self.patch**dims, entries[0]))])
        for level, (before, width) in enumerate(zip([entries[0], *entries], entries, strict=False)):
            group = ContextGroup()
            for i in range(pairs):
                first, last = i == 0, i == pairs - 1
                down = Downsample(width, dims, self.stride, learned=False) if level and last else None
                block_in = before if first else width
                positional = pos_emb and not first and not use_causal_gated
                group[str(4 * i + 1)] = DiTBlock(block_in, emb, num_heads, positional, use_causal_gated)
                group[str(4 * i + 3)] = ResBlock(block_in, emb, width, dims, dropout, scale_shift, down)
            self.x0_blocks.append(group)

        # Attention in a connector follows the stride of the level before: a quirk of the published code.
        attended = options.get("attention_resolutions", ())
        self.connectors = nn.ModuleList(
            Concatenate() if concat_cond else Connector(width, dims, 2 ** max(level - 1, 0) in attended)
            for level, width in enumerate(entries)
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor | Sequence[Tensor] | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Returns the output for x at times t given cond: frames, or what `condition` made of them.

        Without cond the main branch works alone, which needs connectors (concat_cond=False): stage 1 of two.
        Raises ValueError for shapes that the network was not built for and for windows longer than seq_len.
        """
        if cond is None and self.concat_cond:
            raise ValueError(
                "a network with concat_cond=True needs context frames; to start a sequence give it a blank "
                "one: cond = zeros (batch, 1, channel, *space)"
            )
        if x.ndim == self.dims + 3:
            return self.forward_sequence(x, t, cond, y)
        self.check(x, t)
        t = t.expand(x.shape[0])
        if isinstance(cond, Tensor):
            if all_equal(t) and (y is None or all_equal(y)) and all_equal(cond):
                cond = self.condition(cond[:1], t[:1], None if y is None else y[:1])
            else:
                cond = self.condition(cond.expand(x.shape[0], *cond.shape[1:]), t, y)
        return self.run(x, self.embed(t, y), self.joining(cond))

    def forward_sequence(self, x: Tensor, t: Tensor, cond: Tensor | None, y: Tensor | None) -> Tensor:
        """Returns the output (batch, frame, out_channels, *space) for all frames of x at once."""
        batch, frames = x.shape[:2]
        if cond is not None and cond.shape != x.shape:
            raise ValueError(
                f"context has shape {tuple(cond.shape)}, noisy frames {tuple(x.shape)}; they must be equal: "
                "frame n of x is what follows frame n of the context"
            )
        if t.ndim > 1 or t.numel() not in (1, batch):
            raise ValueError(f"t has shape {tuple(t.shape)}; expected ({batch},), one time per sequence")
        self.check(x.flatten(0, 1), t[:0].new_zeros(1))
        emb = self.embed(t.expand(batch), y)
        features = None if cond is None else self.features(cond, emb)
        out = self.run(x.flatten(0, 1), emb.repeat_interleave(frames, dim=0), self.joining(features))
        return out.unflatten(0, (batch, frames))

    def condition(self, context: Tensor, t: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """Returns features, one (batch, channel, *space) a level, for the frame after context, t (batch,).

        context (batch, frame, channel, *space): clean frames, oldest first, at most seq_len. `forward`
        takes the result as cond, so that calls at the same t can share it.
        """
        self.check_context()
        t = t.expand(context.shape[0])
        if self.cache is None or self.training or self.learns_from(context, t):
            return self.condition_anew(context, t, y)
        return self.cache.condition(self, context, t, y)

    def condition_anew(
        self, context: Tensor, t: Tensor, y: Tensor | None = None, memory: Memory | None = None
    ) -> list[Tensor]:
        """Returns `condition` without a cache; only frames that memory does not know are computed."""
        emb, own_only = self.embed(t, y), self.context == "last"
        if own_only and not self.gated:  # nothing flows between frames
            return self.features(context, emb, newest_only=True, skip=context.shape[1] - 1)
        skip = 0 if memory is None else memory.frames
        return self.features(context, emb, newest_only=True, own_only=own_only, skip=skip, memory=memory)

    def learns_from(self, context: Tensor, t: Tensor) -> bool:
        """Whether the features of context would carry gradients."""
        return torch.is_grad_enabled() and any(h.requires_grad for h in (context, t, *self.parameters()))

    @contextlib.contextmanager
    def caching(self, budget_bytes: int = 2**30) -> Iterator[CacheReport]:
        """Inside `with net.caching() as report:` each new frame costs the conditioning of about one frame.

        At equal t the keys and values of context frames serve all later frames while the window grows. One
        entry for each t knows the frames that it was computed for: it is used for as many frames as begin a
        new context, and the rest is computed. A context that comes again at the same t (the two evaluations
        of a Heun step, draws in several batches) costs nothing. Once the window slides, and with
        context="last" or causal gates, only the latter helps. Numbers are those without the cache.

        budget_bytes: what may be held besides the entry in work. An entry that would exceed it is not stored;
        what is held goes on serving. All is released at the end; an inner `caching` uses the outer one.
        Nothing is reused in training mode or with gradients to weights or context. Weights changed in place
        are noticed and all entries dropped; parameters replaced by new objects, or changed through `.data`,
        inside the block are not.
        """
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes={budget_bytes}: expected how many bytes may be held, such as 2**30")
        if self.cache is not None:
            yield self.cache.report
            return
        self.cache = ConditionCache(self.parameters(), budget_bytes)
        try:
            yield self.cache.report
        finally:
            self.cache = None

    def features(
        self,
        context: Tensor,
        emb: Tensor,
        newest_only: bool = False,
        own_only: bool = False,
        skip: int = 0,
        memory: Memory | None = None,
    ) -> list[Tensor]:
        """Returns features, one (batch * frame, channel, *space) a level, of context (batch, frame, ...).

        newest_only: only those of the last frame, with no more work than that. skip: frames to leave out.
        memory: knows the frames left out, and learns the others.
        """
        batch, frames = context.shape[:2]
        if context.ndim != self.dims + 3 or not 1 <= frames <= self.seq_len:
            raise ValueError(
                f"context has shape {tuple(context.shape)}; expected (batch, frame, {self.in_channels}, "
                f"*space) with 1 to seq_len={self.seq_len} frames; keep only the last {self.seq_len}"
            )
        positions = positional_embedding(frames, emb.shape[-1], emb.device).to(emb.dtype)[:, skip:]
        h = pixel_unshuffle(context[:, skip:].flatten(0, 1), self.patch)
        if self.dims == 2:  # then pixels are rows for the transformer blocks without a copy
            h = h.contiguous(memory_format=torch.channels_last)
        stem, *groups = self.x0_blocks
        h = self.call(stem, h, emb)
        features = []
        for group in groups:
            h = self.call(group, h, emb, positions, newest_only and group is groups[-1], own_only, memory)
            features.append(h.unflatten(0, (batch, -1))[:, -1] if newest_only else h)
        return features

    def joining(self, features: Sequence[Tensor] | None):
        """Returns the function with which `run` joins features to the main branch; None without features."""
        if features is None:
            return None
        return lambda level, h: self.connectors[level](h, features[level])

    def start_from_main(self, state_dict: Mapping[str, Tensor]) -> "CausalUNet":
        """Returns the network with the weights of a trained single-image UNet, ready for stage 2 of two.

        state_dict: that of a UNet with the same options. It goes into the main branch, and the last layer of
        each connector's adaLN becomes zero: at first the network with context equals that UNet exactly. The
        first step moves the gates; from the second on the context branch learns as well.
        Raises ValueError for concat_cond=True, and for weights that are not those of the main branch.
        """
        if self.concat_cond:
            raise ValueError(
                "a network with concat_cond=True has no connectors that could start at nothing; build it "
                "with concat_cond=False"
            )
        main = {name: p for name, p in self.state_dict().items() if not name.startswith(CONTEXT_BRANCH)}
        wrong = sorted(
            name
            for name in main.keys() | state_dict.keys()
            if name not in main or name not in state_dict or main[name].shape != state_dict[name].shape
        )
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(main)} tensors of the main branch are missing, unexpected or of another "
                f"shape, such as {', '.join(wrong[:3])}; give the state_dict of a bare UNet (weights.network_of "
                "finds it inside a denoiser) that was built with the same options"
            )
        self.load_state_dict(state_dict, strict=False)
        for connector in self.connectors:
            zero(connector.modulation[-1])
        return self

    def freeze_main(self, frozen: bool = True) -> "CausalUNet":
        """Returns the network with all but the context branch and the connectors frozen: stage 2 of two."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not frozen or name.startswith(CONTEXT_BRANCH))
        return self

    def check_context(self) -> None:
        """Raises ValueError for an unknown context."""
        if self.context not in ("full", "last"):
            raise ValueError(f'context is "{self.context}"; expected "full" or "last"')
