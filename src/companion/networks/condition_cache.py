"""What a causal network remembers of the frames before."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from companion.networks.causal_unet import CausalUNet
from companion.networks.causal_blocks import Memory, all_equal


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

        memory = entry.memory.first(min(agreed, frames - 1), batch) if entry is not None and agreed else Memory()
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
