"""Convolutional autoencoders of latent diffusion (Esser et al. 2021, Rombach et al. 2022), in 2D and 3D.

    codec = AutoencoderKL(dims=3, in_channels=1, channels=32, channel_mult=(1, 2, 2), latent_channels=3)
    mean, std = codec.posterior(x)              # (batch, latent_channels, *space / factor)
    x_hat = codec.decode(mean)

    codec = vq_cardiac_d4()                     # the published layouts, without weights ...
    codec.load_state_dict(published(tensors))   # ... which load strictly, whichever names the file has

Parameter names are those of the original VQModel and AutoencoderKL; `published` renames the others, and MONAI's are
renamed by `networks.monai`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.networks.blocks import CONV, GroupNorm32, conv, per_level, pixel_shuffle, pixel_unshuffle
from companion.networks.codec import Autoencoded, Codec
from companion.networks.vqvae import Quantised, Quantizer

# The factor that brings the latents of the published natural-image autoencoders to about unit variance.
SCALE_FACTOR = 0.18215

# How images are doubled -> the mode of F.interpolate in 1, 2 and 3 dimensions.
UPSAMPLING = {"nearest": ("nearest",) * 3, "linear": ("linear", "bilinear", "trilinear"), "transposed": ("",) * 3}
CONV_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


# ----------------------------------------------------------------------------------------------------
# Layers


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, dims: int, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm32(in_channels, groups, 1e-6)
        self.conv1 = conv(dims, in_channels, out_channels)
        self.norm2 = GroupNorm32(out_channels, groups, 1e-6)
        self.conv2 = conv(dims, out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = conv(dims, in_channels, out_channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention of one head over all pixels, with a residual."""

    def __init__(self, dims: int, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm32(channels, groups, 1e-6)
        self.q, self.k, self.v, self.proj_out = (conv(dims, channels, channels, kernel=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (batch, pixel, channel)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halves images by a convolution of 3; one pixel of padding at the end of each axis, none at the start."""

    def __init__(self, dims: int, channels: int):
        super().__init__()
        self.conv = CONV[dims](channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1) * (x.ndim - 2)))


class Upsample(nn.Module):
    """Doubles images by "nearest" or "linear" interpolation and a convolution of 3, or by one that is "transposed"."""

    def __init__(self, dims: int, channels: int, how: str = "nearest"):
        super().__init__()
        if how not in UPSAMPLING:
            raise ValueError(f"upsampling={how!r}: expected one of {', '.join(UPSAMPLING)}")
        self.mode = UPSAMPLING[how][dims - 1]
        if how == "transposed":
            self.conv = CONV_TRANSPOSED[dims](channels, channels, 3, stride=2, padding=1, output_padding=1)
        else:
            self.conv = conv(dims, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode=self.mode) if self.mode else x)


class _Level(nn.Module):
    """The blocks of one resolution, under their published names."""

    def __init__(self, block: Sequence[nn.Module], attn: Sequence[nn.Module]):
        super().__init__()
        self.block, self.attn = nn.ModuleList(block), nn.ModuleList(attn)

    def layers(self) -> list[nn.Module]:
        after = list(self.attn) or [None] * len(self.block)
        layers = [layer for pair in zip(self.block, after, strict=True) for layer in pair if layer is not None]
        return layers + [getattr(self, name) for name in ("downsample", "upsample") if hasattr(self, name)]


class _Middle(nn.Module):
    def __init__(self, dims: int, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(dims, channels, channels, groups)
        self.attn_1 = AttnBlock(dims, channels, groups)
        self.block_2 = ResnetBlock(dims, channels, channels, groups)

    def layers(self) -> list[nn.Module]:
        return [self.block_1, self.attn_1, self.block_2]


class _Path(nn.Module):
    """Encoder or decoder: `layers()` are to be run in order."""

    def levels(self, dims, in_width, widths, blocks, attention, groups) -> list[_Level]:
        levels = []
        for width, attends, count in zip(widths, attention, blocks, strict=True):
            steps = [in_width] + [width] * (count - 1)
            block = [ResnetBlock(dims, before, width, groups) for before in steps[:count]]
            levels.append(_Level(block, [AttnBlock(dims, width, groups) for _ in block] if attends else []))
            in_width = width if count else in_width
        return levels

    def end(self, dims: int, width: int, out_channels: int, groups: int, activation: bool) -> None:
        self.norm_out = GroupNorm32(width, groups, 1e-6)
        self.act_out = nn.SiLU() if activation else nn.Identity()
        self.conv_out = conv(dims, width, out_channels)

    conv_in: nn.Module
    mid: _Middle

    def in_order(self, *middle: nn.Module) -> list[nn.Module]:
        return [self.conv_in, *middle, self.norm_out, self.act_out, self.conv_out]

    def middle(self) -> list[nn.Module]:
        return self.mid.layers() if hasattr(self, "mid") else []


class Encoder(_Path):
    """Images -> features of the coarsest level, `out_channels` of them."""

    def __init__(self, dims, in_channels, widths, blocks, attention, out_channels, groups, middle, final_activation):
        super().__init__()
        self.conv_in = conv(dims, in_channels, widths[0])
        self.down = nn.ModuleList(self.levels(dims, widths[0], widths, blocks, attention, groups))
        for level, width in zip(self.down[:-1], widths, strict=False):
            level.downsample = Downsample(dims, width)
        if middle:
            self.mid = _Middle(dims, widths[-1], groups)
        self.end(dims, widths[-1], out_channels, groups, final_activation)

    def layers(self) -> list[nn.Module]:
        levels = [layer for level in cast("Iterable[_Level]", self.down) for layer in level.layers()]
        return self.in_order(*levels, *self.middle())


class Decoder(_Path):
    """Features of the coarsest level -> images. `up` counts levels from the finest, as published."""

    def __init__(
        self, dims, in_channels, widths, blocks, attention, out_channels, groups, middle, final_activation, upsampling
    ):
        super().__init__()
        self.conv_in = conv(dims, in_channels, widths[-1])
        if middle:
            self.mid = _Middle(dims, widths[-1], groups)
        coarse_first = self.levels(dims, widths[-1], widths[::-1], blocks[::-1], attention[::-1], groups)
        self.up = nn.ModuleList(coarse_first[::-1])
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = Upsample(dims, width, upsampling)
        self.end(dims, widths[0], out_channels, groups, final_activation)

    def layers(self) -> list[nn.Module]:
        levels = [layer for level in reversed(cast("Sequence[_Level]", self.up)) for layer in level.layers()]
        return self.in_order(*self.middle(), *levels)


# ----------------------------------------------------------------------------------------------------
# Autoencoders


class _ConvCodec(Codec):
    """Encoder, decoder, and the 1x1 convolutions on either side of the latents."""

    def __init__(
        self, dims, in_channels, out_channels, channels, channel_mult, num_res_blocks, decoder_blocks,
        latent_channels, z_channels, attention, norm_groups, middle, use_checkpoint, features, moments,
        final_activation=True, patch=1, upsampling="nearest",
    ):  # fmt: skip
        super().__init__(dims, in_channels, latent_channels, patch * 2 ** (len(channel_mult) - 1), use_checkpoint)
        self.patch = patch
        widths = [int(channels * mult) for mult in channel_mult]
        attention = list(attention) or [False] * len(widths)
        if len(attention) != len(widths):
            raise ValueError(f"attention has {len(attention)} entries for {len(widths)} levels; give one each")
        blocks = per_level(num_res_blocks, len(widths), "num_res_blocks")
        if decoder_blocks is None:
            decoder_blocks = [n + 1 for n in blocks]
        decoder_blocks = per_level(decoder_blocks, len(widths), "decoder_blocks")
        encoder_middle, decoder_middle = (middle, middle) if isinstance(middle, bool) else middle
        cells = patch**dims
        self.encoder = Encoder(
            dims,
            in_channels * cells,
            widths,
            blocks,
            attention,
            features,
            norm_groups,
            encoder_middle,
            final_activation,
        )
        self.decoder = Decoder(
            dims, z_channels, widths, decoder_blocks, attention, out_channels * cells, norm_groups, decoder_middle,
            final_activation, upsampling,
        )  # fmt: skip
        self.quant_conv = conv(dims, features, moments, kernel=1)
        self.post_quant_conv = conv(dims, latent_channels, z_channels, kernel=1)

    def features(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.run(self.encoder.layers(), pixel_unshuffle(x, self.patch)))

    def decoder_path(self, z: Tensor) -> Tensor:
        return pixel_shuffle(self.run(self.decoder.layers(), self.post_quant_conv(z)), self.patch)


class AutoencoderKL(_ConvCodec):
    """Variational autoencoder: the latents of an image are Gaussian, kept near the standard normal by a KL term.

    channels: width of the finest level, times channel_mult for each; the latents are 2^(levels - 1) times coarser.
    num_res_blocks: a level of the encoder; decoder_blocks: of the decoder, by default one more; each one number for
    all levels or one for each, finest first. attention: whether the blocks of each level are followed by attention;
    middle: two more blocks around an attention at the coarsest level, for both sides, or (encoder, decoder).
    norm_groups: groups of the norms. double_z: the encoder ends in 2 latent_channels features, not latent_channels,
    from which a 1x1 convolution makes mean and log variance. final_activation: SiLU after the last norms. patch:
    the finest level works on blocks of so many pixels along each axis (pixel unshuffle and shuffle). upsampling: of
    the decoder, "nearest", "linear" or "transposed", see Upsample. Rombach et al. 2022; MONAI's has neither double_z
    nor final_activation nor patch.
    """

    regulariser_weight = 1e-6

    def __init__(
        self,
        dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 3,
        channels: int = 128,
        channel_mult: Sequence[float] = (1, 2, 4, 4),
        num_res_blocks: int | Sequence[int] = 2,
        latent_channels: int = 4,
        *,
        decoder_blocks: int | Sequence[int] | None = None,
        attention: Sequence[bool] = (),
        middle: bool | tuple[bool, bool] = True,
        norm_groups: int = 32,
        double_z: bool = True,
        final_activation: bool = True,
        patch: int = 1,
        upsampling: str = "nearest",
        use_checkpoint: bool = False,
    ):
        super().__init__(
            dims, in_channels, out_channels, channels, channel_mult, num_res_blocks, decoder_blocks,
            latent_channels, latent_channels, attention, norm_groups, middle, use_checkpoint,
            features=latent_channels * (2 if double_z else 1), moments=2 * latent_channels,
            final_activation=final_activation, patch=patch, upsampling=upsampling,
        )  # fmt: skip

    def encoder_path(self, x: Tensor) -> Tensor:
        return self.features(x)[:, : self.latent_channels]

    def posterior(self, x: Tensor, tile: int | None = None, overlap: int = 8) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images x; see `encode`, which returns the mean."""
        self.check_image(x)
        return _mean_std(self.in_pieces(self.features, x, tile, overlap, up=False))

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Autoencoded:
        """Encodes images x, draws latents, decodes. regulariser: KL summed over the latents, (batch,).

        KL to the standard normal is sum (mean^2 + std^2 - log std^2 - 1) / 2. details: mean and std.
        """
        self.check_image(x)
        mean, std = _mean_std(self.features(x))
        noise = torch.empty_like(mean).normal_(generator=generator)
        kl = (mean.square() + std.square() - 2 * std.log() - 1).flatten(1).sum(1) / 2
        return Autoencoded(self.decoder_path(mean + std * noise), kl, {"mean": mean, "std": std})


def _mean_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, (log_variance.clamp(-30, 20) / 2).exp()


class VQModel(_ConvCodec):
    """Vector-quantised autoencoder without adversary: taming transformers' VQModel (Esser et al. 2021).

    Options as for AutoencoderKL; num_embeddings codes of embedding_dim channels, z_channels features beside
    them. `encode` returns latents before quantisation, `quantize` their codes, and `decode` takes either.
    """

    def __init__(
        self,
        dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 3,
        channels: int = 128,
        channel_mult: Sequence[float] = (1, 2, 4),
        num_res_blocks: int | Sequence[int] = 2,
        num_embeddings: int = 8192,
        embedding_dim: int = 3,
        z_channels: int = 3,
        *,
        attention: Sequence[bool] = (),
        middle: bool | tuple[bool, bool] = True,
        norm_groups: int = 32,
        commitment_cost: float = 0.25,
        use_checkpoint: bool = False,
    ):
        super().__init__(
            dims, in_channels, out_channels, channels, channel_mult, num_res_blocks, None,
            embedding_dim, z_channels, attention, norm_groups, middle, use_checkpoint,
            features=z_channels, moments=embedding_dim,
        )  # fmt: skip
        self.quantize = Quantizer(num_embeddings, embedding_dim, commitment_cost)

    def encoder_path(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Autoencoded:
        """Encodes, quantises and decodes images x; details: indices and perplexity. Nothing is random."""
        self.check_image(x)
        q: Quantised = self.quantize(self.features(x))
        return Autoencoded(self.decoder_path(q.z_q), q.loss, {"indices": q.indices, "perplexity": q.perplexity})


# ----------------------------------------------------------------------------------------------------
# Published layouts and names


def vq_cardiac_d4(**options) -> VQModel:
    """The autoencoder of AID's cine mode, factor 4, 3 latent channels: images in [-1, 1], grey repeated."""
    return VQModel(**options)


def sd_vae(**options) -> AutoencoderKL:
    """The Stable Diffusion autoencoder (stabilityai/sd-vae-ft-ema), factor 8, 4 channels; images in [-1, 1]."""
    return AutoencoderKL(**options)


# Patterns, one after the other, that change diffusers' names into ours.
_DIFFUSERS = [
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.attentions\.", r".down.\1.attn."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.-\1.block."),
    (r"\.up_blocks\.(\d+)\.attentions\.", r".up.-\1.attn."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.-\1.upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.(?:to_q|query)\.", ".q."),
    (r"\.(?:to_k|key)\.", ".k."),
    (r"\.(?:to_v|value)\.", ".v."),
    (r"\.(?:to_out\.0|proj_attn)\.", ".proj_out."),
]


def published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a VQModel or AutoencoderKL, from that of a published 2D model under any usual names.

    Understands the original names, also inside a training checkpoint or a whole latent-diffusion model (prefix
    `first_stage_model.`), whose other tensors (loss networks, averages of weights) are left out, and diffusers'
    names, old and new. Tensors keep their values; attention weights that diffusers keeps as matrices become
    1x1 convolutions.
    """
    tensors = cast("Mapping[str, Tensor]", tensors.get("state_dict", tensors))
    prefix = "first_stage_model."
    if any(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    parts = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
    tensors = {name: x for name, x in tensors.items() if name.startswith(parts)}
    coarsest = max((int(found[1]) for name in tensors if (found := re.search(r"up_blocks\.(\d+)", name))), default=0)
    renamed = {}
    for name, x in tensors.items():
        for pattern, replacement in _DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"\.up\.-(\d+)\.", lambda m: f".up.{coarsest - int(m[1])}.", name)
        if re.search(r"attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight$", name) and x.ndim == 2:
            x = x[:, :, None, None]
        renamed[name] = x
    return renamed


class PatchDiscriminator(nn.Sequential):
    """Scores (batch, 1, *coarser space) of overlapping patches of images: 1 for real ones (Isola et al. 2017).

    `levels` strided convolutions of 4, widths channels, 2 channels, ..., then two of stride 1. Instance norms
    in place of batch norms, which small batches of volumes do not feed.
    """

    def __init__(self, dims: int = 3, in_channels: int = 1, channels: int = 32, levels: int = 3):
        widths = [in_channels, *(channels * min(2**i, 8) for i in range(levels + 1))]
        layers = []
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            layers.append(CONV[dims](before, after, 4, stride=2 if i < levels else 1, padding=1))
            if i:
                layers.append(nn.GroupNorm(after, after))
            layers.append(nn.LeakyReLU(0.2))
        super().__init__(*layers, CONV[dims](widths[-1], 1, 4, padding=1))
