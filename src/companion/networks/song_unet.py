"""The U-Nets of score-based models (DDPM++ and NCSN++ of Song et al. 2021), as EDM trains them (Karras et al. 2022).

Against `edm_unet.EDMUNet` the time embedding is added and not a scale, sums are divided by sqrt(2), attention has one
head and stands at the end of a decoder level only, resampling has a filter of its own, and NCSN++ feeds a second
pyramid of the image into the encoder. Blocks are named by level and role, so one set of weights serves every size.
`describe` and `translate` read published tensors, which have the image size in their names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF = math.sqrt(0.5)
DDPMPP, NCSNPP = (1, 1), (1, 3, 3, 1)  # resampling filters


class Resample(nn.Module):
    """Halves or doubles images (batch, channel, y, x) with the separable filter `taps` (of even length)."""

    def __init__(self, up: bool, taps: Sequence[float]):
        super().__init__()
        self.up, self.taps = up, tuple(taps)

    def forward(self, x: Tensor, padding: int | None = None) -> Tensor:
        f = torch.tensor(self.taps, dtype=x.dtype, device=x.device)
        f = torch.outer(f, f) / f.sum() ** 2 * (4 if self.up else 1)
        weight = f.expand(x.shape[1], 1, *f.shape)
        padding = (len(self.taps) - 1) // 2 if padding is None else padding
        transform = F.conv_transpose2d if self.up else F.conv2d
        return transform(x, weight, stride=2, padding=padding, groups=x.shape[1])


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Block(nn.Module):
    """Residual block with an added time embedding, resampling and attention if wanted; all sums over sqrt(2)."""

    def __init__(
        self,
        width_in: int,
        width: int,
        embedding: int,
        resample: Resample | None = None,
        attention: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.resample, self.dropout, self.attends = resample, nn.Dropout(dropout), attention
        self.norm0, self.conv0 = norm(width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.affine = nn.Linear(embedding, width)
        self.norm1, self.conv1 = norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width, 1) if width != width_in or resample else None
        if attention:
            self.norm2, self.qkv, self.proj = norm(width), nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        resample = self.resample or (lambda image: image)
        h = self.conv0(resample(F.silu(self.norm0(x)))) + self.affine(emb)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        h = HALF * (h + (self.skip(resample(x)) if self.skip else x))
        return HALF * (h + self.attend(h)) if self.attends else h

    def attend(self, x: Tensor) -> Tensor:
        """One head over all pixels; q, k and v of a channel lie side by side in the weights."""
        q, k, v = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (-1, 3)).transpose(1, 3).unbind(2)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(2, x.shape[2:]))


class Shortcut(nn.Module):
    """The next image of NCSN++'s second pyramid: convolved, then halved by the filter, whose border is the image's."""

    def __init__(self, width_in: int, width: int, taps: Sequence[float]):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width_in, 3, 3) / math.sqrt(9 * width_in))
        self.bias, self.resample = nn.Parameter(torch.zeros(width)), Resample(False, taps)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(x, self.weight, padding=1 + (len(self.resample.taps) - 1) // 2)
        return self.resample(h, padding=0) + self.bias[:, None, None]


class SongUNet(nn.Module):
    """Network (batch, in_channels, y, x), t (batch,) -> (batch, out_channels, y, x); sizes multiples of total_stride.

    in_channels: of x and cond together. num_res_blocks: a level of the encoder; the decoder has one more.
    attention_resolutions: strides 1, 2, 4, ... of the levels with attention; the bottom block has it in any case.
    embedding: "positional" (DDPM++) or "fourier" (NCSN++, with noise_mult 2). residual: the second pyramid of NCSN++.
    taps: the resampling filter. num_classes, augment_dim: as of EDMUNet.
    """

    freqs: Tensor  # (noise_width / 2,), of the Fourier embedding

    def __init__(
        self,
        in_channels: int,
        model_channels: int = 128,
        out_channels: int = 2,
        num_res_blocks: int = 4,
        attention_resolutions: Sequence[int] = (2,),
        channel_mult: Sequence[float] = (1, 2, 2, 2),
        emb_mult: int = 4,
        noise_mult: int = 1,
        embedding: str = "positional",
        residual: bool = False,
        taps: Sequence[float] = DDPMPP,
        dropout: float = 0.0,
        num_classes: int | None = None,
        augment_dim: int = 0,
    ):
        super().__init__()
        if embedding not in ("positional", "fourier"):
            raise ValueError(f"embedding={embedding!r}: expected 'positional' or 'fourier'")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_classes, self.augment_dim = num_classes, augment_dim
        self.total_stride = (2 ** (len(channel_mult) - 1),) * 2
        emb, self.noise_width = emb_mult * model_channels, noise_mult * model_channels
        if embedding == "fourier":
            self.register_buffer("freqs", 16 * torch.randn(self.noise_width // 2))
        if num_classes:
            self.map_label = nn.Linear(num_classes, self.noise_width)
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, self.noise_width, bias=False)
        self.map_layer0, self.map_layer1 = nn.Linear(self.noise_width, emb), nn.Linear(emb, emb)

        def block(width_in: int, width: int, resample: Resample | None = None, attention: bool = False) -> Block:
            return Block(width_in, width, emb, resample, attention, dropout)

        widths, attends = [int(m * model_channels) for m in channel_mult], [2**i for i in range(len(channel_mult))]
        attends = [stride in attention_resolutions for stride in attends]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        width, pyramid = model_channels, in_channels
        self.enc["0_conv"], skips = nn.Conv2d(in_channels, width, 3, padding=1), [width]
        for level, wide in enumerate(widths):
            if level:
                self.enc[f"{level}_down"] = block(width, width, Resample(False, taps))
                skips.append(width)
                if residual:
                    self.enc[f"{level}_aux_residual"] = Shortcut(pyramid, width, taps)
                    pyramid = width
            for i in range(num_res_blocks):
                self.enc[f"{level}_block{i}"], width = block(width, wide, attention=attends[level]), wide
                skips.append(width)
        for level, wide in reversed(list(enumerate(widths))):
            if level == len(widths) - 1:
                self.dec[f"{level}_in0"], self.dec[f"{level}_in1"] = (
                    block(width, width, attention=True),
                    block(width, width),
                )
            else:
                self.dec[f"{level}_up"] = block(width, width, Resample(True, taps))
            for i in range(num_res_blocks + 1):
                last = attends[level] and i == num_res_blocks
                self.dec[f"{level}_block{i}"], width = block(width + skips.pop(), wide, attention=last), wide
        self.out_norm, self.out_conv = norm(width), nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, y: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """Images (batch, out_channels, y, x); cond (batch or 1, channel, y, x) is concatenated to x.

        y: class labels (batch,), or one-hot rows (batch, num_classes); augment (batch, augment_dim). ValueError for
        images that do not fit.
        """
        if cond is not None:
            x = torch.cat([x, cond.to(x.dtype).expand(x.shape[0], *cond.shape[1:])], 1)
        stride = self.total_stride[0]
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] % stride or x.shape[3] % stride:
            raise ValueError(
                f"input (with cond) has shape {tuple(x.shape)}; expected (batch, {self.in_channels}, y, x), y and x "
                f"multiples of {stride}"
            )
        emb, skips, pyramid = self.embed(t.expand(x.shape[0]), y, augment), [], x
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                x = skips[-1] = pyramid = HALF * (x + layer(pyramid))
                continue
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(torch.cat([x, skips.pop()], 1) if "_block" in name else x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))

    def embed(self, t: Tensor, y: Tensor | None, augment: Tensor | None) -> Tensor:
        """Embeddings (batch, emb_mult * model_channels) of times, labels and augmentations."""
        if hasattr(self, "freqs"):
            angles = 2 * math.pi * t[:, None] * self.freqs
        else:
            half = self.noise_width // 2
            steps = torch.arange(half, dtype=torch.float32, device=t.device) / (half - 1)
            angles = t.float()[:, None] * torch.exp(-math.log(10_000) * steps)
        features = torch.cat([angles.sin(), angles.cos()], 1).to(self.map_layer0.weight.dtype)
        if y is not None:
            if not self.num_classes:
                raise ValueError("class labels y were given to a network without classes")
            one_hot = F.one_hot(y, self.num_classes) if y.ndim == 1 else y
            features = features + self.map_label(math.sqrt(self.num_classes) * one_hot.to(features.dtype))
        elif self.num_classes:
            features = features + self.map_label.bias  # the null class
        if augment is not None and self.augment_dim:
            features = features + self.map_augment(augment.to(features.dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(features))))


PLACE = re.compile(r"(enc|dec)\.(\d+)x(\d+)_(\w+)\.(.+)")


def is_song(tensors: Mapping[str, Tensor]) -> bool:
    """Whether published tensors are those of a SongUNet rather than a DhariwalUNet."""
    return any("_aux_norm." in name for name in tensors)


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors with levels in place of sizes; `resample_filter` buffers stay."""
    bare = {re.sub(r"^(module\.|net\.|model\.)+", "", name): x for name, x in tensors.items()}
    sizes = sorted({(int(p[2]), int(p[3])) for name in bare if (p := PLACE.fullmatch(name))}, reverse=True)
    if len({a * n for a, n in zip((s[0] for s in sizes), (2**i for i in range(len(sizes))), strict=True)}) > 1:
        raise ValueError(f"levels of {sizes} pixels do not halve from one to the next")
    ours = {}
    for name, x in bare.items():
        if p := PLACE.fullmatch(name):
            name = f"{p[1]}.{sizes.index((int(p[2]), int(p[3])))}_{p[4]}.{p[5]}"
        name = name.replace("dec.0_aux_norm.", "out_norm.").replace("dec.0_aux_conv.", "out_conv.")
        ours[name.replace("map_noise.freqs", "freqs")] = x
    return ours


def translate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under our names; the filters of resampling, constants, have none."""
    return {name: x for name, x in _named(tensors).items() if not name.endswith(".resample_filter")}


def describe(tensors: Mapping[str, Tensor]) -> dict:
    """The config of the SongUNet that holds published tensors, from their names and shapes; ValueError if of none."""
    ours = _named(tensors)
    if any("_aux_down" in name or "_aux_skip" in name or "_aux_up" in name for name in ours):
        raise ValueError("a SongUNet with 'skip' pyramids; those of EDM are 'standard' or 'residual'")
    try:
        first, last = ours["enc.0_conv.weight"], ours["out_conv.weight"]
        levels = 1 + max(int(p[1]) for name in ours if (p := re.match(r"enc\.(\d+)_", name)))
        blocks = 1 + max(int(p[1]) for name in ours if (p := re.match(r"enc\.0_block(\d+)\.", name)))
        width, (emb, noise) = len(first), ours["map_layer0.weight"].shape
        mult = [len(ours[f"enc.{i}_block{blocks - 1}.conv1.weight"]) / width for i in range(levels)]
    except (KeyError, ValueError) as error:
        raise ValueError(f"these tensors are not those of a SongUNet: {error}") from None
    taps = next((x[0, 0].sum(0) for name, x in ours.items() if name.endswith("resample_filter")), None)
    config = {
        "name": "SongUNet",
        "in_channels": first.shape[1],
        "model_channels": width,
        "out_channels": len(last),
        "num_res_blocks": blocks,
        "attention_resolutions": [2**i for i in range(levels) if f"enc.{i}_block0.qkv.weight" in ours],
        "channel_mult": [int(m) if m == int(m) else m for m in mult],
        "emb_mult": emb // width,
        "noise_mult": noise // width,
        "embedding": "fourier" if "freqs" in ours else "positional",
        "residual": any("_aux_residual." in name for name in ours),
        "taps": [round(x / taps[0].item()) for x in taps.tolist()] if taps is not None else list(DDPMPP),
    }
    if "map_label.weight" in ours:
        config["num_classes"] = ours["map_label.weight"].shape[1]
    if "map_augment.weight" in ours:
        config["augment_dim"] = ours["map_augment.weight"].shape[1]
    return config
