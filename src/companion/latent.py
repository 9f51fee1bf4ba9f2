"""Diffusion on the latents of an autoencoder: the space they live in, losses that make it, priors that know it.

    space = LatentSpace.fit(codec, volumes)          # per-channel mean and std over the whole training set
    z = space.encode(x)                              # normalised latents: mean 0, standard deviation 1
    x_hat = space.decode(z)

    prior = LatentDenoiser(EDMDenoiser(network, sigma_data=1.0), space)     # a Denoiser of z like any other
    save_prior("runs/prior", prior, config, record)  # with mean, std and the autoencoder's fingerprint
    prior = load_prior("runs/prior", codec)          # refuses another autoencoder
    volumes = prior.space.decode(sample(prior, karras(30), shape=..., seeds="0-7").x)
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from companion import weights
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.noise import DiscreteSchedule
from companion.networks.autoencoder import SCALE_FACTOR, AutoencoderKL, VQModel, vq_cardiac_d4
from companion.networks.vqvae import Codec


def fingerprint(codec: nn.Module) -> str:
    """SHA-256 of an autoencoder's names, shapes and float32 values: which latents can be exchanged with it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class LatentSpace(nn.Module):
    """Images <-> normalised latents z = (latent - mean) / std of an autoencoder, per channel.

    mean, std: (latent_channels,) or one number. latents: "continuous", what the encoder gives (for a
    variational autoencoder the mean); "quantised", their codes; "sample", a draw around the mean. intensity:
    what 0 and 1 of an image are for the autoencoder, e.g. (-1, 1). Decoding never quantises. Images and latents
    may have further leading axes, such as frames: (batch, frame, channel, y, x). The autoencoder is finished: it
    is put, and stays, in evaluation mode.
    """

    def __init__(
        self,
        codec: Codec,
        mean: Tensor | float = 0.0,
        std: Tensor | float = 1.0,
        latents: str = "continuous",
        intensity: tuple[float, float] = (0.0, 1.0),
    ):
        super().__init__()
        able = {"continuous"} | ({"sample"} if isinstance(codec, AutoencoderKL) else {"quantised"})
        if latents not in able:
            raise ValueError(f"latents={latents!r}: a {type(codec).__name__} offers {', '.join(sorted(able))}")
        mean, std = (torch.as_tensor(v, dtype=torch.float32).expand(codec.latent_channels) for v in (mean, std))
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
            raise ValueError(f"mean {mean.tolist()} and std {std.tolist()} must be finite, and std above 0")
        self.codec, self.latents, self.intensity = codec, latents, (float(intensity[0]), float(intensity[1]))
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self.eval()

    def train(self, mode: bool = True) -> "LatentSpace":
        """Stays in evaluation mode: in training an autoencoder's codebook would move with every image."""
        return super().train(False)

    @classmethod
    def fit(cls, codec: Codec, batches: Iterable[Tensor], **options) -> "LatentSpace":
        """The space whose mean and std are those of the latents of all images in `batches` (batch, channel, ...)."""
        raw = cls(codec, **options)
        mean, std = statistics(raw.encode(batch) for batch in batches)
        return cls(codec, mean, std, **options).to(raw.mean.device)

    @torch.no_grad()
    def encode(
        self, x: Tensor, generator: Generator | None = None, tile: int | None = None, overlap: int = 8
    ) -> Tensor:
        """Normalised latents (..., latent_channels, *space / factor) of images x (..., channel, *space).

        A single channel is repeated for an autoencoder of colour images. generator: for latents="sample". tile,
        overlap: see Codec.encode. Raises ValueError for other shapes and for NaN.
        """
        codec, lead = self.codec, x.shape[: -1 - self.codec.dims]
        x = x.reshape(-1, *x.shape[len(lead) :])
        if x.shape[1] == 1 < codec.in_channels:
            x = x.expand(-1, codec.in_channels, *x.shape[2:])
        low, high = self.intensity
        x = low + (high - low) * x
        if self.latents == "sample":
            mean, std = codec.posterior(x, tile, overlap)
            z = mean + std * torch.empty_like(mean).normal_(generator=generator)
        else:
            z = codec.encode(x, tile, overlap)
            if self.latents == "quantised":
                z = codec.quantize(z).z_q
        z = (z - self._column(self.mean)) / self._column(self.std)
        return z.reshape(*lead, *z.shape[1:])

    def decode(self, z: Tensor, tile: int | None = None, overlap: int = 8) -> Tensor:
        """Images (..., channel, *space * factor) of normalised latents z (..., latent_channels, *space).

        Has a gradient if z asks for one.
        """
        lead = z.shape[: -1 - self.codec.dims]
        z = z.reshape(-1, *z.shape[len(lead) :])
        if z.shape[1] != self.codec.latent_channels:
            self._wrong_channels(z)
        with torch.set_grad_enabled(torch.is_grad_enabled() and z.requires_grad):
            x = self.codec.decode(z * self._column(self.std) + self._column(self.mean), tile, overlap)
        low, high = self.intensity
        x = (x - low) / (high - low)
        return x.reshape(*lead, *x.shape[1:])

    def _column(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * self.codec.dims)

    def _wrong_channels(self, z: Tensor) -> None:
        raise ValueError(
            f"latents of shape {tuple(z.shape)} were given to an autoencoder of {self.codec.latent_channels} latent "
            "channels; were they made by another one?"
        )

    def describe(self) -> dict:
        """What must travel with latents or a prior on them; JSON. See `check` and `LatentSpace.described`."""
        return {
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "latents": self.latents,
            "intensity": list(self.intensity),
            "codec": fingerprint(self.codec),
        }

    @classmethod
    def described(cls, codec: Codec, description: Mapping) -> "LatentSpace":
        """The space of a description, around the autoencoder that it was made with; ValueError for another."""
        missing = {"mean", "std", "latents", "intensity", "codec"} - set(description)
        if missing:
            raise ValueError(f"the description of the latents lacks {', '.join(sorted(missing))}")
        channels = len(description["mean"]), len(description["std"])
        if channels != (codec.latent_channels,) * 2:
            raise ValueError(
                f"mean and std have {channels} channels, this autoencoder's latents {codec.latent_channels}: "
                "give the autoencoder that the latents were made with"
            )
        own = fingerprint(codec)
        if own != description["codec"]:
            raise ValueError(
                f"the latents were made with another autoencoder (fingerprint {description['codec'][:12]}...) than "
                f"the one given ({own[:12]}...): load that one, or make the latents again and train the prior anew"
            )
        options = {key: description[key] for key in ("latents", "intensity")}
        return cls(codec, torch.tensor(description["mean"]), torch.tensor(description["std"]), **options)

    def check(self, description: Mapping) -> None:
        """Raises ValueError unless latents that come with `description` belong to this very space."""
        other = LatentSpace.described(self.codec, description)
        for name in ("mean", "std", "latents", "intensity"):
            a, b = self.describe()[name], other.describe()[name]
            if a != b:
                raise ValueError(f"the latents were made with {name} {b}, this space has {a}; make them again")


def statistics(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel (channel,) of all latents in batches (batch, channel, *space).

    One pass in float64. Raises ValueError without latents, for NaN, and for a channel that never changes.
    """
    count, mean, squares = 0, None, None
    for batch in batches:
        flat = batch.detach().movedim(1, 0).flatten(1).double()
        n, m = flat.shape[1], flat.mean(1)
        s = (flat - m[:, None]).square().sum(1)
        if mean is None:
            count, mean, squares = n, m, s
            continue
        shift, total = m - mean, count + n
        squares = squares + s + shift**2 * count * n / total
        mean, count = mean + shift * n / total, total
    if mean is None:
        raise ValueError("no latents were given; statistics need the whole training set")
    std = (squares / max(count - 1, 1)).sqrt()
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
        raise ValueError("the latents hold NaN or infinity; look at the autoencoder's training")
    if not (std > 1e-8).all():
        raise ValueError(
            f"latent channels {(std <= 1e-8).nonzero().flatten().tolist()} never change; use fewer latent channels, "
            "or train the autoencoder longer"
        )
    return mean.float(), std.float()


def cine_space(codec: VQModel | AutoencoderKL | None = None) -> LatentSpace:
    """The latents of AID's cine mode: images in [0, 1], grey repeated to three channels, latents times 0.18215.

    codec: vq_cardiac_d4 (default, without weights), whose latents are codes, or sd_vae, whose latents are drawn.
    """
    codec = vq_cardiac_d4() if codec is None else codec
    latents = "sample" if isinstance(codec, AutoencoderKL) else "quantised"
    return LatentSpace(codec, 0.0, 1 / SCALE_FACTOR, latents, intensity=(-1.0, 1.0))


# ----------------------------------------------------------------------------------------------------
# Priors


class LatentDenoiser(nn.Module):
    """A denoiser D of normalised latents that knows their space: D(z, sigma, cond) -> z0_hat.

    z: (batch, latent_channels, *space). `space.decode` makes images of what a sampler returns.
    """

    def __init__(self, D: Denoiser, space: LatentSpace):
        super().__init__()
        self.D, self.space = D, space

    def forward(self, z: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """z0_hat, the shape of z."""
        if z.shape[1] != self.space.codec.latent_channels:
            self.space._wrong_channels(z)
        return self.D(z, sigma, cond)

    @property
    def moments(self) -> Callable:
        """moments(z, sigma, cond) -> (z0_hat, variance); exists if D has it."""
        return self.D.moments


def save_prior(folder: str | os.PathLike, prior: LatentDenoiser, config: Mapping, record: Mapping) -> Path:
    """The folder of a checkpoint of prior.D whose config says under "latent" what its latents are."""
    config = dict(config) | {"latent": prior.space.describe()}
    return weights.save_checkpoint(folder, prior.D, config, record)


def load_prior(name: str | os.PathLike, codec: Codec, device="cpu", autocast: str | None = None) -> LatentDenoiser:
    """The prior of a checkpoint on the latents of `codec`; raises ValueError if it was trained on others."""
    description = weights.describe(name).get("latent")
    if description is None:
        raise ValueError(f'{name} is no prior on latents: its config has no "latent"; use weights.load')
    space = LatentSpace.described(codec, description).to(device).requires_grad_(False)
    return LatentDenoiser(weights.load_denoiser(name, device, autocast), space)


def check_terminal_signal(levels: DiscreteSchedule | float, data_std: float = 1.0, limit: float = 0.05) -> float:
    """The share of the signal's amplitude left at the highest noise level; ValueError if it exceeds `limit`.

    levels: a discrete schedule, or the highest sigma of a continuous one. Sampling starts from pure noise,
    which the network has never seen if its training stopped before.
    """
    sigma = float(levels.sigmas[-1]) if isinstance(levels, DiscreteSchedule) else float(levels)
    share = data_std / math.hypot(data_std, sigma)
    if share > limit:
        raise ValueError(
            f"at the highest noise level {100 * share:.1f} % of the signal is left (limit {100 * limit:g} %): "
            "lengthen the schedule, raise its betas or sigma_max, or normalise the latents"
        )
    return share


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
    return sum(e.diff(dim=axis).abs().flatten(1).mean(1) for axis in range(2, e.ndim))


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
    total = 0.0
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
