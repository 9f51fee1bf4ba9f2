"""The published EDM network written down a second time, block by block and by its own names, for tests.

It makes its weights on first use, so that running it once tells all names and shapes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class PublishedNetwork:
    """F(x, t, labels, augment) with random weights; `tensors` holds those used so far, by published name."""

    def __init__(self, size, width=32, mult=(1, 4), blocks=1, attention=(1,), emb_mult=2, out_channels=1, seed=0):
        self.size, self.width, self.mult, self.blocks = size, width, mult, blocks
        self.attention, self.emb_mult, self.out_channels = attention, emb_mult, out_channels
        self.tensors: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self.tensors:
            scale = 1 / math.sqrt(math.prod(shape[1:]))
            self.tensors[name] = scale * torch.randn(shape, generator=self.generator)
        return self.tensors[name]

    def linear(self, name: str, x: Tensor, width: int, bias: bool = True) -> Tensor:
        weight = self.weight(f"{name}.weight", width, x.shape[1])
        return F.linear(x, weight, self.weight(f"{name}.bias", width) if bias else None)

    def conv(self, name: str, x: Tensor, width: int, kernel: int = 3) -> Tensor:
        weight = self.weight(f"{name}.weight", width, x.shape[1], kernel, kernel)
        return F.conv2d(x, weight, self.weight(f"{name}.bias", width), padding=kernel // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        channels = x.shape[1]
        weight, bias = (self.weight(f"{name}.{kind}", channels) for kind in ("weight", "bias"))
        return F.group_norm(x, min(32, channels // 4), weight, bias, 1e-5)

    def resample(self, name: str, x: Tensor, how: str) -> Tensor:
        if how:
            self.tensors[f"{name}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
        return {"": x, "down": F.avg_pool2d(x, 2), "up": x.repeat_interleave(2, 2).repeat_interleave(2, 3)}[how]

    def block(self, name: str, x: Tensor, emb: Tensor, width: int, attention: bool = False, how: str = "") -> Tensor:
        h = self.resample(f"{name}.conv0", F.silu(self.norm(f"{name}.norm0", x)), how)
        h = self.conv(f"{name}.conv0", h, width)
        scale, shift = self.linear(f"{name}.affine", emb, 2 * width)[:, :, None, None].chunk(2, 1)
        h = F.silu(self.norm(f"{name}.norm1", h) * (1 + scale) + shift)
        h = self.conv(f"{name}.conv1", h, width)
        x = self.resample(f"{name}.skip", x, how)
        h = h + (x if x.shape[1] == width else self.conv(f"{name}.skip", x, width, 1))
        heads = width // 64
        if not attention or not heads:
            return h
        qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", h), 3 * width, 1)
        q, k, v = qkv.reshape(len(x) * heads, width // heads, 3, -1).unbind(2)
        a = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(width // heads)).softmax(2)
        a = torch.einsum("nqk,nck->ncq", a, v).reshape(h.shape)
        return h + self.conv(f"{name}.proj", a, width, 1)

    def embed(self, t: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        half = self.width // 2
        angles = t[:, None] * 10_000 ** (-torch.arange(half) / half)
        emb = torch.cat([angles.cos(), angles.sin()], 1)
        if augment is not None:
            emb = emb + self.linear("model.map_augment", augment, self.width, bias=False)
        emb = F.silu(self.linear("model.map_layer0", emb, self.emb_mult * self.width))
        emb = self.linear("model.map_layer1", emb, self.emb_mult * self.width)
        if labels is not None:
            emb = emb + self.linear("model.map_label", labels, self.emb_mult * self.width, bias=False)
        return F.silu(emb)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        emb, skips = self.embed(t, labels, augment), []
        places = [f"{self.size[0] >> s}x{self.size[1] >> s}" for s in range(len(self.mult))]
        widths = [self.width * m for m in self.mult]
        for s, place in enumerate(places):
            if s == 0:
                x = self.conv(f"model.enc.{place}_conv", x, self.width)
            else:
                x = self.block(f"model.enc.{place}_down", x, emb, x.shape[1], how="down")
            skips.append(x)
            for i in range(self.blocks):
                x = self.block(f"model.enc.{place}_block{i}", x, emb, widths[s], s in self.attention)
                skips.append(x)
        for s, place in reversed(list(enumerate(places))):
            name = f"model.dec.{place}"
            if s == len(places) - 1:
                x = self.block(f"{name}_in0", x, emb, x.shape[1], True)
                x = self.block(f"{name}_in1", x, emb, x.shape[1])
            else:
                x = self.block(f"{name}_up", x, emb, x.shape[1], how="up")
            for i in range(self.blocks + 1):
                x = torch.cat([x, skips.pop()], 1)
                x = self.block(f"{name}_block{i}", x, emb, widths[s], s in self.attention)
        return self.conv("model.out_conv", F.silu(self.norm("model.out_norm", x)), self.out_channels)
