"""Vector-quantised autoencoders for 2D and 3D images, and what all autoencoders here share.

    codec = VQVAE(dims=3, channels=(64, 64), num_embeddings=256, embedding_dim=32)
    z = codec.encode(x)                          # (batch, embedding_dim, *space / factor), before quantisation
    z_q, loss, indices, perplexity = codec.quantize(z)
    x_hat = codec.decode(z_q)                    # decode never quantises by itself
    x_hat = codec.decode(z_q, tile=16)           # the same in pieces, for volumes larger than memory

Parameter names of VQVAE are those of MONAI's VQVAE; those of EMAQuantizer and Quantizer too, so that
state_dicts load strictly.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from companion.networks.blocks import CONV
from companion.networks.codec import Autoencoded, Codec

TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


# ----------------------------------------------------------------------------------------------------
# Codebooks


class Quantised(NamedTuple):
    """Codes for latents: their vectors (gradients pass straight through), loss (batch,), and which they are."""

    z_q: Tensor  # (batch, channel, *space)
    loss: Tensor  # (batch,)
    indices: Tensor  # (batch, *space), int64
    perplexity: Tensor  # (), how many codes are in use: exp(entropy), 1 to the number of codes


class Quantizer(nn.Module):
    """Replaces each latent vector (batch, channel, *space) by the nearest of K codes, trained by gradient.

    loss: mean (q - sg z)^2 + commitment mean (sg q - z)^2, van den Oord et al. 2017, Eq. (3). restart: in
    training, a code whose use, averaged over about 1 / (1 - decay) batches, falls below so many vectors a batch
    is dead and moves to a random latent of the batch; 0 never.
    """

    ema_cluster_size: Tensor  # (code,), where use is counted

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        commitment: float = 0.25,
        restart: float = 0.0,
        decay: float = 0.99,
    ):
        super().__init__()
        self.commitment, self.restart, self.decay = commitment, restart, decay
        self.embedding = nn.Embedding(num_embeddings, embedding_dim)
        if not isinstance(self, EMAQuantizer):
            nn.init.uniform_(self.embedding.weight, -0.05, 0.05)
        if restart or isinstance(self, EMAQuantizer):
            # a revived code, like a new one, has about 0.7 / (1 - decay) batches to find its vectors
            self.register_buffer("ema_cluster_size", torch.full((num_embeddings,), 2.0 * restart))

    def forward(self, z: Tensor) -> Quantised:
        """The codes of latents z (batch, channel, *space), in float32; in training the codebook learns too."""
        if z.ndim < 2 or z.shape[1] != self.embedding.embedding_dim:
            raise ValueError(
                f"latents of shape {tuple(z.shape)} were given; the codes have {self.embedding.embedding_dim} "
                "channels: expected (batch, channel, *space)"
            )
        with torch.autocast(z.device.type, enabled=False):
            z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
            flat = z.detach().movedim(1, -1).flatten(0, -2)
            chosen = self.nearest(flat)
            counts = torch.bincount(chosen, minlength=self.embedding.num_embeddings).to(flat.dtype)
            indices = chosen.reshape(z.shape[0], *z.shape[2:])
            q = self.lookup(indices)
            loss = self.loss(z, q)
            if self.training:
                self.learn(flat, chosen, counts)
            return Quantised(z + (q - z).detach(), loss, indices, perplexity(counts))

    @torch.no_grad()
    def nearest(self, flat: Tensor) -> Tensor:
        """Indices (n,) of the nearest codes, in squared distance, to vectors (n, channel)."""
        codes = self.embedding.weight.to(flat.dtype)
        half = codes.square().sum(1) / 2
        rows = max(1, 2**24 // len(codes))  # 64 MB of distances at a time
        return torch.cat([torch.addmm(half, part, codes.T, alpha=-1).argmin(1) for part in flat.split(rows)])

    def lookup(self, indices: Tensor) -> Tensor:
        """Vectors (batch, channel, *space) of codes (batch, *space)."""
        return F.embedding(indices, self.embedding.weight).movedim(-1, 1)

    def loss(self, z: Tensor, q: Tensor) -> Tensor:
        return _mse(q, z.detach()) + self.commitment * _mse(q.detach(), z)

    @torch.no_grad()
    def learn(self, flat: Tensor, chosen: Tensor, counts: Tensor) -> None:
        """Keeps count of the use of codes and revives dead ones."""
        if self.restart:
            self.ema_cluster_size.lerp_(_over_processes(counts), 1 - self.decay)
            self.revive(flat)

    def revive(self, flat: Tensor) -> Tensor:
        """Moves dead codes to random latents of the batch, the same in every process; which they were (K,)."""
        dead = self.ema_cluster_size < self.restart
        picks = torch.randint(len(flat), (len(dead),)).to(flat.device)
        fresh = flat[picks]
        if dist.is_initialized():
            dist.broadcast(fresh, 0)
        self.embedding.weight.copy_(torch.where(dead[:, None], fresh, self.embedding.weight))
        self.ema_cluster_size.masked_fill_(dead, 2.0 * self.restart)
        return dead


class EMAQuantizer(Quantizer):
    """A codebook that follows running means of its latents instead of a gradient: only the latents are pulled.

    With d = decay, a batch's n_k <- d n_k + (1-d) count_k, m_k <- d m_k + (1-d) sum of the latents of code k,
    e_k = m_k / w_k, where w_k = (n_k + epsilon) / (N + K epsilon) N and N = sum n (Laplace smoothing): van den
    Oord et al. 2017, appendix A.1. The loss is commitment mean (sg q - z)^2 with the codes of before the update.
    """

    ema_w: Tensor  # (code, channel)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        commitment: float = 0.25,
        restart: float = 0.0,
        decay: float = 0.99,
        epsilon: float = 1e-5,
    ):
        super().__init__(num_embeddings, embedding_dim, commitment, restart, decay)
        self.epsilon = epsilon
        self.embedding.weight.requires_grad_(False)
        size = 2.0 * restart if restart else 1.0
        self.register_buffer("ema_w", self.embedding.weight.detach() * size)

    def loss(self, z: Tensor, q: Tensor) -> Tensor:
        return self.commitment * _mse(q, z)

    @torch.no_grad()
    def learn(self, flat: Tensor, chosen: Tensor, counts: Tensor) -> None:
        sums = torch.zeros_like(self.ema_w).index_add_(0, chosen, flat.to(self.ema_w.dtype))
        n, m, epsilon = self.ema_cluster_size, self.ema_w, self.epsilon
        n.lerp_(_over_processes(counts).to(n.dtype), 1 - self.decay)
        m.lerp_(_over_processes(sums), 1 - self.decay)
        total = n.sum()
        smooth = (n + epsilon) / (total + len(n) * epsilon) * total
        self.embedding.weight.copy_(m / smooth[:, None])
        if self.restart:
            dead = self.revive(flat)
            m.copy_(torch.where(dead[:, None], self.embedding.weight * 2.0 * self.restart, m))


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of use counts (K,): the number of codes that would be used if all were used alike."""
    return torch.special.entr(counts / counts.sum()).sum().exp()


def _mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)


def _over_processes(x: Tensor) -> Tensor:
    """The sum of x over the processes that train together."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


# ----------------------------------------------------------------------------------------------------
# Autoencoders


class VQCodec(Codec):
    """A Codec with `encoder`, `decoder` (whose `blocks` run in order) and a quantiser."""

    encoder: "_Blocks"
    decoder: "_Blocks"

    def __init__(self, dims: int, in_channels: int, quantizer: Quantizer, factor: int, use_checkpoint: bool):
        super().__init__(dims, in_channels, quantizer.embedding.embedding_dim, factor, use_checkpoint)
        self.quantizer = nn.ModuleDict({"quantizer": quantizer})  # two levels: the published name

    def encoder_path(self, x: Tensor) -> Tensor:
        return self.run(self.encoder.blocks, x)

    def decoder_path(self, z: Tensor) -> Tensor:
        return self.run(self.decoder.blocks, z)

    @property
    def codebook(self) -> Quantizer:
        return cast(Quantizer, self.quantizer["quantizer"])

    def quantize(self, z: Tensor) -> Quantised:
        """The codes of latents z (batch, latent_channels, *space)."""
        return self.codebook(z)

    def indices(self, x: Tensor) -> Tensor:
        """Codes (batch, *space / factor), int64, of images x (batch, in_channels, *space)."""
        return self.quantize(self.encode(x)).indices

    def decode_indices(self, indices: Tensor, tile: int | None = None, overlap: int = 8) -> Tensor:
        """Images of codes (batch, *space)."""
        return self.decode(self.codebook.lookup(indices), tile, overlap)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Autoencoded:
        """Encodes, quantises and decodes images x; details: indices and perplexity. Nothing is random."""
        self.check_image(x)
        z_q, loss, indices, used = self.quantize(self.encoder_path(x))
        return Autoencoded(self.decoder_path(z_q), loss, {"indices": indices, "perplexity": used})


class VQVAE(VQCodec):
    """Residual VQ-VAE in the layout and with the names of MONAI's VQVAE (Tudosiu et al., arXiv 2209.03177).

    Each level of the encoder is a strided convolution with ReLU and num_res_layers residual units, the decoder
    mirrors it; no norms. channels: widths, finest level first; num_res_channels: inner widths of the residual
    units (default: channels). downsample_parameters: (stride, kernel, dilation, padding) per level, by default
    (2, 4, 1, 1); upsample_parameters: (stride, kernel, dilation, padding, output_padding), by default
    (2, 4, 1, 1, 0). upsample: "transposed" convolutions, or "resize": nearest neighbours and a convolution of
    3, which cannot make a checkerboard. ema: the codebook follows means (EMAQuantizer), or learns by gradient;
    commitment_cost, decay, epsilon, restart: see there.
    """

    def __init__(
        self,
        dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (96, 96, 192),
        num_res_layers: int = 3,
        num_res_channels: Sequence[int] | None = None,
        downsample_parameters: Sequence[Sequence[int]] | None = None,
        upsample_parameters: Sequence[Sequence[int]] | None = None,
        num_embeddings: int = 32,
        embedding_dim: int = 64,
        commitment_cost: float = 0.25,
        decay: float = 0.5,
        epsilon: float = 1e-5,
        restart: float = 0.0,
        ema: bool = True,
        upsample: str = "transposed",
        use_checkpoint: bool = False,
    ):
        inner = _per_level(num_res_channels or channels, channels, "num_res_channels")
        down = _per_level(downsample_parameters or [(2, 4, 1, 1)] * len(channels), channels, "downsample_parameters")
        up = _per_level(upsample_parameters or [(2, 4, 1, 1, 0)] * len(channels), channels, "upsample_parameters")
        codes = (num_embeddings, embedding_dim, commitment_cost, restart, decay)
        quantizer = EMAQuantizer(*codes, epsilon) if ema else Quantizer(*codes)
        super().__init__(dims, in_channels, quantizer, math.prod(p[0] for p in down), use_checkpoint)
        if upsample not in ("transposed", "resize"):
            raise ValueError(f"upsample={upsample!r}: expected 'transposed' or 'resize'")

        def units(width: int, inner: int) -> list[nn.Module]:
            return [ResidualUnit(dims, width, inner) for _ in range(num_res_layers)]

        layers, width = [], in_channels
        for level_width, level_inner, (stride, kernel, dilation, padding) in zip(channels, inner, down, strict=True):
            strided = CONV[dims](width, level_width, kernel, stride, padding, dilation)
            layers += [Layer(strided), *units(level_width, level_inner)]
            width = level_width
        layers.append(Layer(CONV[dims](width, embedding_dim, 3, padding=1), act=False))
        self.encoder = _Blocks(layers)

        layers, narrower = [Layer(CONV[dims](embedding_dim, width, 3, padding=1), act=False)], [out_channels, *channels]
        for i in reversed(range(len(channels))):
            stride, kernel, dilation, padding, output_padding = up[i]
            resize = stride if upsample == "resize" else 1
            if resize == 1:
                wide = TRANSPOSED[dims](
                    channels[i], narrower[i], kernel, stride, padding, output_padding, dilation=dilation
                )
            else:
                wide = CONV[dims](channels[i], narrower[i], 3, padding=1)
            layers += [*units(channels[i], inner[i]), Layer(wide, act=i > 0, resize=resize)]
        self.decoder = _Blocks(layers)


class PlainVQVAE(VQCodec):
    """The small VQ-VAE of the DIPY and Keras examples: strided convolutions of 3, a 1x1 convolution, and back.

    The codebook is trained by gradient (ema=False). As in Keras, padding "same" at stride 2 adds one pixel at
    the end of each axis only, and the transposed convolutions mirror that.
    """

    def __init__(
        self,
        dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128),
        num_embeddings: int = 128,
        embedding_dim: int = 16,
        commitment_cost: float = 0.25,
        restart: float = 0.0,
        ema: bool = False,
        use_checkpoint: bool = False,
    ):
        kind = EMAQuantizer if ema else Quantizer
        quantizer = kind(num_embeddings, embedding_dim, commitment_cost, restart)
        super().__init__(dims, in_channels, quantizer, 2 ** len(channels), use_checkpoint)
        steps = list(zip([in_channels, *channels], channels, strict=False))
        down = [Layer(CONV[dims](a, b, 3, stride=2), pad_end=1) for a, b in steps]
        self.encoder = _Blocks([*down, Layer(CONV[dims](channels[-1], embedding_dim, 1), act=False)])
        widths = [embedding_dim, *reversed(channels)]
        up = [Layer(TRANSPOSED[dims](a, b, 3, stride=2), pad_end=-1) for a, b in zip(widths, widths[1:], strict=False)]
        last = Layer(TRANSPOSED[dims](channels[0], out_channels, 3, padding=1), act=False)
        self.decoder = _Blocks([*up, last])


class _Blocks(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class Layer(nn.Module):
    """A convolution and, if `act`, a ReLU; before it the image is enlarged `resize` times (nearest neighbour).

    pad_end: pixels added to the end of each axis before a convolution, or, negative, cut off after it.
    """

    def __init__(self, conv: nn.Module, act: bool = True, resize: int = 1, pad_end: int = 0):
        super().__init__()
        self.conv, self.act, self.resize, self.pad_end = conv, act, resize, pad_end

    def forward(self, x: Tensor) -> Tensor:
        ends = (0, self.pad_end) * (x.ndim - 2)
        if self.resize != 1:
            x = F.interpolate(x, scale_factor=float(self.resize), mode="nearest")
        if self.pad_end > 0:
            x = F.pad(x, ends)
        x = self.conv(x)
        if self.pad_end < 0:
            x = F.pad(x, ends)
        return F.relu_(x) if self.act else x


class ResidualUnit(nn.Module):
    """relu(x + conv2(relu(conv1(x)))), convolutions of 3, `inner` channels between them."""

    def __init__(self, dims: int, channels: int, inner: int):
        super().__init__()
        self.conv1 = Layer(CONV[dims](channels, inner, 3, padding=1))
        self.conv2 = Layer(CONV[dims](inner, channels, 3, padding=1), act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.conv2(self.conv1(x)).add_(x))


def _per_level(values: Sequence, channels: Sequence[int], name: str) -> Sequence:
    if len(values) != len(channels):
        raise ValueError(f"{name} has {len(values)} entries for {len(channels)} levels of channels; give one each")
    return values
