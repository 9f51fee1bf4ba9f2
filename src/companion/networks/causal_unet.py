"""U-Net for image sequences: a frame given the frames before it (Luo, Huang, Uecker 2024, arXiv 2405.14327).

Two branches. The main one is the U-Net of `unet.py`, run on every noisy frame by itself. The context branch
(`x0_blocks`) sees the clean frames; its transformer blocks attend over time, causally, each pixel by itself.
Where the main branch enters a level, the features of context frame n join it and condition frame n + 1.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from companion.networks.blocks import Downsample, ResBlock, Stage, conv, pixel_unshuffle, zero
from companion.networks.causal_blocks import (
    Concatenate,
    Connector,
    ContextGroup,
    DiTBlock,
    Memory,
    all_equal,
    positional_embedding,
)
from companion.networks.condition_cache import CacheReport, ConditionCache
from companion.networks.unet import UNet

# Names of the parameters that the plain U-Net does not have.
CONTEXT_BRANCH = ("x0_blocks.", "connectors.")


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
    context_heads: attention heads over frames; by default num_heads, which may be 0 for a main branch without any.
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
        context_heads: int | None = None,
        **options,
    ):
        super().__init__(in_channels, model_channels, out_channels, **options, entry_width=1 + concat_cond)
        self.seq_len, self.concat_cond, self.context = seq_len, concat_cond, context
        self.gated = use_causal_gated
        self.cache: ConditionCache | None = None
        self.check_context()
        emb, dims = 4 * model_channels, self.dims
        num_heads = context_heads or options.get("num_heads", 1) or 1
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
            if not (cond is None or isinstance(cond, Tensor)):
                raise ValueError("whole sequences are given their context as frames, not as features of one frame")
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
    def attending(self, context: str) -> Iterator[None]:
        """Let new frames attend to "full" or "last" inside the block; afterwards to what they did before."""
        before = self.context
        self.context = context
        try:
            self.check_context()
            yield
        finally:
            self.context = before

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
            if isinstance(connector, Connector):
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
