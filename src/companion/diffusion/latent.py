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
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from companion.diffusion.denoisers import Denoiser, moments_of
from companion.diffusion.noise import DiscreteSchedule
from companion.networks.autoencoder import SCALE_FACTOR, AutoencoderKL, VQModel, vq_cardiac_d4
from companion.networks.codec import Codec


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

    codec: Codec
    mean: Tensor
    std: Tensor

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
            mean, std = cast(AutoencoderKL, codec).posterior(x, tile, overlap)
            z = mean + std * torch.empty_like(mean).normal_(generator=generator)
        else:
            z = codec.encode(x, tile, overlap)
            if self.latents == "quantised":
                z = cast(Any, codec).quantize(z).z_q
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

    def decode_in_parts(self, z: Tensor, tile: int | None = None, batch: int = 4) -> Tensor:
        """`decode`, so many at a time."""
        return torch.cat([self.decode(part, tile=tile) for part in z.split(batch)])

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
        if mean is None or squares is None:
            count, mean, squares = n, m, s
            continue
        shift, total = m - mean, count + n
        squares = squares + s + shift**2 * count * n / total
        mean, count = mean + shift * n / total, total
    if mean is None or squares is None:
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
        return moments_of(self.D)


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
