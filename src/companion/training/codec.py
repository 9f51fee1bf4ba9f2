"""Losses of autoencoders."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from companion.networks.codec import Codec
from companion.parameters import param
from companion.training.loop import TrainResult

# ----------------------------------------------------------------------------------------------------
# Losses of autoencoders


def codec_loss(
    codec: Codec,
    x: Tensor,
    generator: Generator | None = None,
    *,
    kind: str = "l1",
    mask: Tensor | None = None,
    background: float = 1.0,
    regulariser: float | None = None,
    features: Callable | None = None,
    perceptual: float = 1e-3,
    edges: float = 0.0,
) -> Tensor:
    """Loss of each image (batch,): reconstruction, the codec's regulariser, and what else keeps it sharp.

    kind: "l1" or "l2". Pixels outside mask (batch, 1, *space), by default those at the darkest value of their
    image, weigh `background`; the weighted mean keeps the units. regulariser: its weight, by default the
    codec's. features: a network for `perceptual_distance`, weighted by `perceptual`; None: without. edges: weight
    of `edge_error`.
    """
    out = codec(x, generator)
    return _terms(out, codec, x, generator, kind, mask, background, regulariser, features, perceptual, edges)


def _terms(out, codec, x, generator, kind, mask, background, regulariser, features, perceptual, edges) -> Tensor:
    loss = reconstruction_error(out.x_hat, x, kind, mask, background)
    if edges:
        loss = loss + edges * edge_error(out.x_hat, x)
    loss = loss + (codec.regulariser_weight if regulariser is None else regulariser) * out.regulariser
    if features is not None:
        loss = loss + perceptual * perceptual_distance(features, out.x_hat, x, generator)
    return loss


def reconstruction_error(
    x_hat: Tensor, x: Tensor, kind: str = "l1", mask: Tensor | None = None, background: float = 1.0
) -> Tensor:
    """Weighted mean over pixels of |x_hat - x| ("l1") or its square ("l2"), (batch,). See `codec_loss`."""
    if kind not in ("l1", "l2"):
        raise ValueError(f"kind={kind!r}: expected 'l1' or 'l2'")
    error = (x_hat - x).abs() if kind == "l1" else (x_hat - x).square()
    if background == 1.0:
        return error.flatten(1).mean(1)
    if mask is None:
        mask = x > x.flatten(1).amin(1).reshape(-1, *[1] * (x.ndim - 1))
    if not mask.flatten(1).any(1).all():
        raise ValueError("the mask of an image is empty: without foreground there is nothing to weigh")
    weight = torch.where(mask.bool(), 1.0, background).expand_as(error)
    return (weight * error).flatten(1).sum(1) / weight.flatten(1).sum(1)


def edge_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error (batch,) of the differences between neighbouring pixels, summed over the axes of space.

    It costs blur what a mean absolute error forgives it: a soft edge is wrong by little everywhere.
    """
    e = x_hat - x
    return reduce(torch.add, [e.diff(dim=axis).abs().flatten(1).mean(1) for axis in range(2, e.ndim)])


def perceptual_distance(
    features: Callable, a: Tensor, b: Tensor, generator: Generator | None = None, fraction: float = 0.2
) -> Tensor:
    """Mean squared distance (batch,) of unit feature vectors of images a and b (batch, channel, *space).

    features: (n, channel, y, x) -> feature maps, a list of (n, c, y', x'). Of volumes a random fraction of the
    slices in each of the three planes is compared. Zhang et al. 2018 (LPIPS), without learned weights.
    """
    if a.ndim == 4:
        pairs = [(features(a), features(b))]
    else:
        pairs = []
        for axis in (2, 3, 4):
            n = a.shape[axis]
            some = torch.randperm(n, generator=generator)[: max(1, round(fraction * n))].to(a.device)
            pairs.append([features(v.index_select(axis, some).movedim(axis, 1).flatten(0, 1)) for v in (a, b)])
    total = a.new_zeros(len(a))
    for maps_a, maps_b in pairs:
        for f, g in zip(maps_a, maps_b, strict=True):
            difference = (F.normalize(f, dim=1) - F.normalize(g, dim=1)).square().sum(1)
            total = total + difference.reshape(len(a), -1).mean(1)
    return total / len(pairs)


class AdversarialCodec(nn.Module):
    """An autoencoder and the discriminator of its patches, to be trained together by `adversarial_loss`."""

    def __init__(self, codec: Codec, discriminator: nn.Module):
        super().__init__()
        self.codec, self.discriminator = codec, discriminator


def adversarial_loss(
    pair: AdversarialCodec, x: Tensor, generator: Generator | None = None, *, weight: float = 0.01, **options
) -> Tensor:
    """`codec_loss` with options, plus a least-squares adversarial term, plus the discriminator's loss; (batch,).

    One optimiser takes one step for both: the discriminator's weights are constants in the autoencoder's term,
    and the reconstruction is a constant in the discriminator's, so neither works for the other. Start from an
    autoencoder that was trained without. Mao et al. 2017; Isola et al. 2017 (patches).
    """
    defaults = dict(kind="l1", mask=None, background=1.0, regulariser=None, features=None, perceptual=1e-3, edges=0.0)
    unknown = options.keys() - defaults.keys()
    if unknown:
        raise TypeError(f"adversarial_loss does not know {', '.join(sorted(unknown))}; see codec_loss")
    out = pair.codec(x, generator)
    loss = _terms(out, pair.codec, x, generator, **(defaults | options))
    frozen = {name: p.detach() for name, p in pair.discriminator.named_parameters()}
    fooled = torch.func.functional_call(pair.discriminator, frozen, (out.x_hat,))
    real, fake = pair.discriminator(x), pair.discriminator(out.x_hat.detach())
    judge = ((real - 1).square().flatten(1).mean(1) + fake.square().flatten(1).mean(1)) / 2
    return loss + weight * (fooled - 1).square().flatten(1).mean(1) + judge


@dataclass(frozen=True)
class Autoencoder:
    """The part of a form that describes an autoencoder."""

    architecture: str = param(
        "kl",
        "kl: variational; vq: residual VQ-VAE (MONAI); plain: the project's first VQ-VAE",
        choices=("kl", "vq", "plain"),
    )
    channels: tuple[int, ...] = param((32, 48), "width of each level, finest first", minimum=4)
    patch: int = param(2, "of kl: the finest level works on blocks of so many voxels along each axis", minimum=1)
    num_res_blocks: int = param(1, "residual blocks a level", minimum=1)
    latent_channels: int = param(8, "channels of the latents", minimum=1)
    codes: int = param(512, "of vq and plain: size of the codebook", minimum=2)

    def network(self, dims: int) -> dict:
        """The "network" of a config, for images of so many dimensions."""
        common = {"dims": dims, "in_channels": 1, "out_channels": 1}
        codebook = {"num_embeddings": self.codes, "embedding_dim": self.latent_channels, "restart": 0.05}
        if self.architecture == "plain":
            return {"name": "PlainVQVAE", "channels": list(self.channels)} | codebook | common
        if self.architecture == "vq":
            layers = {"channels": list(self.channels), "num_res_layers": self.num_res_blocks}
            return {"name": "VQVAE", "decay": 0.99, "upsample": "resize"} | layers | codebook | common
        return common | {
            "name": "AutoencoderKL",
            "channels": self.channels[0],
            "patch": self.patch,
            "middle": False,
            "channel_mult": [c / self.channels[0] for c in self.channels],
            "num_res_blocks": self.num_res_blocks,
            "decoder_blocks": self.num_res_blocks,
            "latent_channels": self.latent_channels,
            "norm_groups": 8,
        }


def autoencoder_loss(
    model: Any, x: Tensor, generator: Generator, *, mirror: bool, adversary: float, **terms: Any
) -> Tensor:
    """The loss (batch,) of volumes x (batch, 1, z, y, x): reconstruction, edges, regulariser, adversary.

    model: a Codec, or with an adversary an AdversarialCodec. terms: background, edges, regulariser, see `codec_loss`.
    """
    x = x.float()
    if mirror:
        flipped = torch.rand(len(x), *[1] * (x.ndim - 1), generator=generator, device=generator.device) < 0.5
        x = torch.where(flipped.to(x.device), x.flip(-1), x)
    if adversary:
        return adversarial_loss(model, x, generator, weight=adversary, **terms)
    return codec_loss(model, x, generator, **terms)


def codec_of(result: TrainResult) -> Codec:
    """The averaged autoencoder of a training, without the discriminator beside it."""
    return cast(Codec, getattr(result.ema, "codec", result.ema))
