"""U-Net for image sequences: a frame given the frames before it (Luo, Huang, Uecker 2024, arXiv 2405.14327).

Two branches. The main one is the U-Net of `unet.py`, run on every noisy frame by itself. The context branch
(`x0_blocks`) sees the clean frames; its transformer blocks attend over time, causally, each pixel by itself.
Where the main branch enters a level, the features of context frame n join it and condition frame n + 1.
"""

import math
from collections.abc import Mapping, Sequence

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
    """Whether the values (batch,) are one and the same."""
    return len(values) == 1 or values.stride(0) == 0 or bool((values == values[0]).all())


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """Returns attention over frames of q, k, v (batch, head, frame, width), same shape as q."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # For a great many short sequences plain products are 2.5 times as fast as the bfloat16 CPU kernel.
        logits = (scale * q) @ k.mT
        if causal:
            future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(future, -torch.inf)
        return logits.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


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

    def forward(self, x: Tensor, newest_only: bool = False, own_only: bool = False) -> Tensor:
        """Returns what each frame of x learns from itself and earlier ones.

        newest_only: only the last frame asks: (batch, 1, pixel, channel). own_only: the last frame attends to
        itself and all frames get its answer, as in the published sampling code.
        """
        if own_only or x.shape[1] == 1:  # softmax over one key
            return self.fc_out(self.values(x[:, -1:]))
        queries = self.queries(x[:, -1:] if newest_only else x)
        q, k, v = (self.split(h) for h in (queries, self.keys(x), self.values(x)))
        # The scale is that of the full width, not of a head: the published weights were trained so.
        scale = x.shape[-1] ** -0.5
        chunks = zip(*(h.split(PIXELS_AT_ONCE) for h in (q, k, v)), strict=True)
        h = torch.cat([attend(*chunk, not newest_only, scale) for chunk in chunks])
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
        self, x: Tensor, emb: Tensor, positions: Tensor, newest_only: bool = False, own_only: bool = False
    ) -> Tensor:
        """Returns the new x; emb (batch, 4 * model_channels), positions (1, frame, 4 * model_channels).

        newest_only: only the last frame is returned: (batch, 1, pixel, channel). own_only: as FrameAttention.
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
        h = self.attn(modulate(layer_norm(x), shift_a, scale_a), newest_only, own_only)
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

    def forward(self, h: Tensor, emb: Tensor, positions: Tensor, newest_only=False, own_only=False) -> Tensor:
        """Returns new features; emb (batch, ...). newest_only: the last pair of blocks drops other frames."""
        blocks = list(self.values())
        for transformer, res_block in zip(blocks[::2], blocks[1::2], strict=True):
            last = newest_only and res_block is blocks[-1]
            space = h.shape[2:]
            tokens = h.unflatten(0, (emb.shape[0], -1)).flatten(3).transpose(2, 3)
            tokens = transformer(tokens, emb, positions, last, own_only)
            h = tokens.transpose(2, 3).unflatten(3, space).flatten(0, 1)
            h = res_block(h, emb.repeat_interleave(tokens.shape[1], dim=0))
        return h


class CausalUNet(UNet):
    """Sequence network: x, t (batch,), cond -> output like x with out_channels channels.

    x (batch, frame, channel, *space): frame n of x is denoised given frames 0..n of cond (batch, frame, ...),
        for all n at once (training; cond is the sequence that x continues by one frame).
    x (batch, channel, *space): one new frame, given all frames of cond (batch or 1, frame, channel, *space).
        A cond of batch 1, or expanded from it, is worked out once for all of x if they share one t.

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
            if (cond.shape[0] == 1 or cond.stride(0) == 0) and all_equal(t) and (y is None or all_equal(y)):
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
        emb = self.embed(t.expand(context.shape[0]), y)
        own_only = self.context == "last"
        if own_only and not self.gated:  # nothing flows between frames
            return self.features(context, emb, newest_only=True, skip=context.shape[1] - 1)
        return self.features(context, emb, newest_only=True, own_only=own_only)

    def features(
        self, context: Tensor, emb: Tensor, newest_only: bool = False, own_only: bool = False, skip: int = 0
    ) -> list[Tensor]:
        """Returns features, one (batch * frame, channel, *space) a level, of context (batch, frame, ...).

        newest_only: only those of the last frame, with no more work than that. skip: frames to leave out.
        """
        batch, frames = context.shape[:2]
        if context.ndim != self.dims + 3 or not 1 <= frames <= self.seq_len:
            raise ValueError(
                f"context has shape {tuple(context.shape)}; expected (batch, frame, {self.in_channels}, "
                f"*space) with 1 to seq_len={self.seq_len} frames; keep only the last {self.seq_len}"
            )
        positions = positional_embedding(frames, emb.shape[-1], emb.device).to(emb.dtype)[:, skip:]
        h = pixel_unshuffle(context[:, skip:].flatten(0, 1), self.patch)
        stem, *groups = self.x0_blocks
        h = self.call(stem, h, emb)
        features = []
        for group in groups:
            h = self.call(group, h, emb, positions, newest_only and group is groups[-1], own_only)
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
