"""Training and loading of the latent prior."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from companion.data.store import Prepared, open_dataset, write_dataset
from companion.diffusion import latent
from companion.diffusion.denoisers import DiscreteDenoiser
from companion.diffusion.latent import LatentDenoiser, LatentSpace, check_terminal_signal
from companion.diffusion.losses import discrete_loss, edm_loss, flow_loss
from companion.files import project_root, sha256
from companion.models import architectures
from companion.models import checkpoint as weights
from companion.models import latent as models_latent
from companion.networks.codec import Codec
from companion.papers.latent3d.autoencoder import (
    AUTOENCODER,
    COVARIATES,
    PRIOR,
    TrainLatent,
    _record,
    covariates,
    data_config,
    load_autoencoder,
)
from companion.parameters import autocast_dtype, resolve_device
from companion.randomness import randn
from companion.training.loop import TrainConfig, TrainResult, train

# ------------------------------------------------------------------------------------------------------------ prior


def cache_latents(
    codec: Codec,
    prepared: Prepared,
    path: str | os.PathLike,
    mirror: bool = True,
    device="cpu",
    autocast: str | None = "auto",
    progress: bool = True,
) -> tuple[LatentSpace, Prepared]:
    """Return the space of normalised latents of all training volumes, and these latents, stored once as HDF5.

    z (person, version, channel, *cells) float16, mean 0 and standard deviation 1 per channel over all of them;
    version 1, with `mirror`, is that of the volume mirrored left to right. Raises ValueError if `path` holds latents of
    another autoencoder or of other volumes.
    """
    path, made_of = Path(path), sha256(prepared.path)
    if not path.exists():
        raw, items = LatentSpace(codec), prepared.sequences("image", "train", 1)
        number_format = autocast_dtype(autocast, device)
        z = []
        for i in tqdm(range(len(items)), desc="latents", disable=not progress):
            x = items[i][None].float().to(device)
            both = torch.cat([x, x.flip(-1)]) if mirror else x
            with torch.autocast(torch.device(device).type, number_format, number_format is not None):
                z.append(raw.encode(both).float().cpu().half())
        z = torch.stack(z).float()
        mean, std = latent.statistics(z.flatten(0, 1).split(64))
        space = LatentSpace(codec, mean, std)
        z = (z - space._column(space.mean.cpu())) / space._column(space.std.cpu())
        people = [prepared.subjects[row] for row in prepared.rows("train")]
        write_dataset(
            path,
            {"z": z.half().numpy()},
            units={"z": "1"},
            seed=prepared.seed,
            subjects=people,
            scale={"z": "mean 0 and standard deviation 1 in each channel; see attrs"},
            source=prepared.source,
            split={"train": people},
            attrs={"latent": space.describe(), "volumes": made_of},
        )
    cached = open_dataset(path, require=["z"])
    space = LatentSpace.described(codec, cached.attrs["latent"]).to(device)
    if cached.attrs["volumes"] != made_of:
        raise ValueError(f"{path} holds latents of other volumes than those of {prepared.path}; delete it")
    return space, cached


def condition(values: Tensor, config: dict, cells: tuple[int, ...]) -> Tensor:
    """Return the cond (batch, name, *cells) of a prior with covariates for values (batch, name) in their own units.

    config: the prior's, whose "covariates" give names, means and standard deviations of the training set. Each
    standardised number fills a channel.
    """
    about = config.get("covariates", [])
    if values.ndim != 2 or values.shape[1] != len(about):
        raise ValueError(
            f"covariates of shape {tuple(values.shape)} were given; this prior takes (batch, {len(about)})"
            f": {', '.join(a['name'] for a in about) or 'none'}"
        )
    mean, std = (torch.tensor([a[key] for a in about]) for key in ("mean", "std"))
    return ((values - mean) / std)[(...,) + (None,) * len(cells)].expand(*values.shape, *cells)


class _Latents(Dataset):
    """Items for training: z (version, channel, *cells), with the person's cond (name, *cells) behind it on channels."""

    def __init__(self, cached: Prepared, cond: Tensor | None):
        self.items, self.cond = cached.sequences("z", "train", cached.shapes["z"][1]), cond

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Tensor:
        z = self.items[i].float()
        return z if self.cond is None else torch.cat([z, self.cond[i].expand(len(z), *self.cond[i].shape)], 1)


def prior_config(p: TrainLatent, space: LatentSpace, prepared: Prepared) -> dict:
    """Return what `weights.build` makes the prior from, the covariates that it takes, and whose latents it knows."""
    channels = space.codec.latent_channels
    denoiser = {"edm": {"name": "EDMDenoiser", "sigma_data": 1.0}, "flow": {"name": "FlowDenoiser"}}.get(
        p.diffusion, {"name": "DiscreteDenoiser", "schedule": {"name": p.schedule}, "prediction": p.diffusion}
    )
    network = {
        "name": "UNet",
        "dims": space.codec.dims,
        "in_channels": channels + len(p.covariates),
        "model_channels": p.model_channels,
        "out_channels": channels,
        "num_res_blocks": p.prior_res_blocks,
        "channel_mult": list(p.channel_mult),
        "attention_resolutions": list(p.attention_resolutions),
        "num_heads": 4,
        "use_scale_shift_norm": True,
        "patch": p.prior_patch,
    }
    about = []
    if p.covariates:
        if "tissue_ml" not in prepared.shapes:
            raise ValueError(f"{prepared.path} does not say the tissue volumes of its people, which covariates need")
        values = covariates(torch.from_numpy(prepared.read("tissue_ml", "train")), p.covariates)
        about = [
            {"name": name, "what": COVARIATES[name], "mean": m, "std": s}
            for name, m, s in zip(p.covariates, values.mean(0).tolist(), values.std(0).tolist(), strict=True)
        ]
    return {
        "network": network,
        "denoiser": denoiser,
        "data": data_config(prepared),
        "covariates": about,
        "autoencoder": autoencoder_name(p),
    }


def autoencoder_name(p: TrainLatent) -> str:
    """Return the checkpoint of the autoencoder that a prior is to be trained on."""
    if p.stage == "prior" and p.autoencoder is None:
        raise ValueError("stage prior needs the name or folder of its autoencoder: autoencoder = latent3d/autoencoder")
    return p.autoencoder if p.stage == "prior" else f"{p.out}/autoencoder/checkpoint"


def check_levels(D: nn.Module) -> float:
    """Return the share of the signal that is left at the highest noise level that a prior learns, see

    `latent.check_terminal_signal`; ValueError if sampling would begin with a state that training never showed.
    """
    if not isinstance(D, DiscreteDenoiser):
        return check_terminal_signal(SIGMA_MAX)
    share = check_terminal_signal(D.schedule)
    if share == 0 and D.process.prediction == "epsilon":
        raise ValueError(
            "a schedule without signal at its end leaves epsilon nothing to say about the image there; "
            "choose diffusion v or x0, or another schedule"
        )
    return share


def prior_loss(D: nn.Module, z: Tensor, generator: Generator, p: TrainLatent) -> Tensor:
    """Return the loss (batch,) of latents (batch, version, channel, *cells), a random version of each."""
    options = {"generator": generator, "device": generator.device}
    z = z[torch.arange(len(z)), torch.randint(z.shape[1], (len(z),), **options).to(z.device)]
    cond = None
    if p.covariates:
        z, cond = z[:, : -len(p.covariates)], z[:, -len(p.covariates) :]
    if p.diffusion == "edm":
        return edm_loss(D, z, generator, p.P_mean, p.P_std, cond)
    return (flow_loss if p.diffusion == "flow" else discrete_loss)(D, z, generator, cond=cond)


def train_prior(p: TrainLatent, progress: bool = True) -> tuple[TrainResult, LatentSpace]:
    """Return the trained prior and the space of its latents; continues what <out>/prior holds.

    Latents are cached in <out>/latents.h5. Raises ValueError for latents of another autoencoder, and for a schedule
    that leaves signal at its end.
    """
    prepared, out = open_dataset(project_root() / p.data, require=["image"]), project_root() / p.out
    device = resolve_device(p.device)
    codec = load_autoencoder(autoencoder_name(p), device)
    space, cached = cache_latents(codec, prepared, out / "latents.h5", p.mirror, device, p.autocast, progress)
    config = prior_config(p, space, prepared)
    torch.manual_seed(p.seed)
    D = architectures.build(config)
    check_levels(D)
    if p.start_from:
        D.load_state_dict(weights.load_denoiser(p.start_from).state_dict())
    D.autocast = autocast_dtype(p.autocast, p.device)
    cond = None
    if p.covariates:
        values = covariates(torch.from_numpy(prepared.read("tissue_ml", "train")), p.covariates)
        cond = condition(values, config, cached.shapes["z"][3:])
    options = TrainConfig(
        steps=p.steps,
        batch_size=p.batch_size,
        grad_accumulation=p.grad_accumulation,
        learning_rate=p.learning_rate,
        warmup=p.warmup,
        schedule=p.rate,
        ema_decay=p.ema_decay,
        channels_last=True,
        seed=p.seed,
        device=p.device,
        seconds=p.seconds,
        checkpoint_every=p.checkpoint_every,
    )

    def loss(D: nn.Module, z: Tensor, generator: Generator) -> Tensor:
        return prior_loss(D, z, generator, p)

    about = {name: config[name] for name in ("network", "denoiser", "covariates")}
    about |= {"latent": space.describe(), "P_mean": p.P_mean, "P_std": p.P_std, "start_from": p.start_from}
    return train(D, loss, _Latents(cached, cond), options, out / "prior", about=about, progress=progress), space


SIGMA_MAX = 80.0  # where draws begin: latents of standard deviation 1 are invisible in it


def latent_report(D: nn.Module, space: LatentSpace) -> list[dict[str, float]]:
    """Return what to look at before a prior is trained: the latents, and what is left of them at the highest noise."""
    left = {"amplitude left at the highest noise (%)": 100 * check_levels(D)}
    return [
        {"channel": i, "mean": m, "standard deviation": s, "normalised": "0, 1"} | left
        for i, (m, s) in enumerate(zip(space.mean.tolist(), space.std.tolist(), strict=True))
    ]


def with_decoder(prior: LatentPrior, codec: Codec) -> LatentDenoiser:
    """Return the prior with another decoder for the same latents, to be saved; ValueError if the latents are others."""
    halves = [
        {k: v for k, v in c.state_dict().items() if not k.startswith(("decoder.", "post_quant_conv."))}
        for c in (prior.space.codec, codec)
    ]
    if halves[0].keys() != halves[1].keys() or not all(torch.equal(v, halves[1][k]) for k, v in halves[0].items()):
        raise ValueError("the encoders differ, so the latents do; train the prior on those of the new autoencoder")
    space = LatentSpace(codec, prior.space.mean, prior.space.std, prior.space.latents, prior.space.intensity)
    return LatentDenoiser(prior.D.D, space)


def no_cond(p: TrainLatent, z: Tensor) -> Tensor | None:
    """Return the cond of an average person, for latents z (batch, channel, *cells); None without covariates."""
    return z.new_zeros(len(z), len(p.covariates), *z.shape[2:]) if p.covariates else None


@torch.no_grad()
def denoising_errors(D: nn.Module, z: Tensor, sigmas: list[float], seed: int = 0, cond: Tensor | None = None) -> list:
    """Return, for each sigma, the root mean squared error of D on latents z (batch, channel, *cells) of other people.

    "blank": of the best guess that knows nothing but mean 0 and standard deviation 1, sigma / sqrt(1 + sigma^2).
    """
    noise, rows = randn(z.shape, z.dtype, Generator().manual_seed(seed)).to(z.device), []
    for sigma in sigmas:
        level = torch.full((len(z),), sigma, device=z.device)
        error = (D(z + sigma * noise, level, cond) - z).square().mean().sqrt().item()
        rows.append({"sigma": sigma, "error": round(error, 4), "blank": round(sigma / (1 + sigma**2) ** 0.5, 4)})
    return rows


def save_prior(result: TrainResult, space: LatentSpace, p: TrainLatent, errors: list) -> Path:
    """Return the folder <out>/prior/checkpoint: averaged weights in half precision, latent statistics, autoencoder."""
    record = _record(result, p, p.batch_size) | {"validation": errors}
    config = prior_config(p, space, open_dataset(project_root() / p.data))
    prior = LatentDenoiser(copy.deepcopy(result.ema).half(), space)
    return models_latent.save_prior(project_root() / p.out / "prior" / "checkpoint", prior, config, record)


# ---------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True, eq=False)
class LatentPrior:
    """A prior on the latents of an autoencoder, with all that is needed to draw volumes from it.

    D: denoiser of normalised latents (batch, *latent_shape), the prior's network inside. space: encode and decode.
    shape, voxel_mm: (z, y, x) of the volumes that it was trained on; affine: from their voxels (x, y, z) to mm.
    covariates: names of what D takes as cond, see `condition`; () for most priors.
    """

    D: LatentDenoiser
    config: dict

    @property
    def space(self) -> LatentSpace:
        return self.D.space

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.config["data"]["shape"])

    @property
    def voxel_mm(self) -> tuple[float, float, float]:
        return tuple(self.config["data"]["voxel_mm"])

    @property
    def affine(self) -> np.ndarray:
        return np.array(self.config["data"]["affine"])

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        codec = self.space.codec
        return codec.latent_channels, *(n // codec.factor for n in self.shape)

    def encode(self, x: Tensor, tile: int | None = None) -> Tensor:
        """Return normalised latents (batch, *latent_shape) of volumes (batch, 1, z, y, x) in [0, 1]."""
        return self.space.encode(x, tile=tile)

    def decode(self, z: Tensor, tile: int | None = None, batch: int = 4) -> Tensor:
        """Return volumes (batch, 1, z, y, x) of normalised latents, `batch` at a time; nothing is clipped."""
        return torch.cat([self.space.decode(part, tile=tile) for part in z.split(batch)])


def load_latent(
    name: str | os.PathLike = PRIOR,
    autoencoder: str | os.PathLike | None = None,
    device="cpu",
    autocast: str | None = "auto",
) -> LatentPrior:
    """Return the prior of a checkpoint together with its autoencoder; raises ValueError if they do not belong together.

    autoencoder: its checkpoint, by default the one that the prior's config names.
    """
    config = weights.describe(name)
    codec = load_autoencoder(autoencoder or config.get("autoencoder", AUTOENCODER), device)
    return LatentPrior(models_latent.load_prior(name, codec, device, autocast), config)
