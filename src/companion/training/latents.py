"""Latents of all training volumes, computed once and kept on disk; priors learn from them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from companion.data import volumes
from companion.data.sequences import image_name
from companion.data.store import Prepared, open_dataset, write_dataset
from companion.diffusion.denoisers import Denoiser, DiscreteDenoiser, FlowDenoiser
from companion.diffusion.latent import LatentSpace, check_terminal_signal, statistics
from companion.diffusion.losses import discrete_loss, edm_loss, flow_loss
from companion.files import alone, sha256
from companion.models.architectures import SCHEDULES
from companion.networks.codec import Codec
from companion.parameters import autocast_dtype, param


def cache_latents(
    codec: Codec,
    prepared: Prepared,
    path: str | os.PathLike,
    mirror: bool = True,
    device="cpu",
    autocast: str | None = "auto",
    progress: bool = True,
) -> tuple[LatentSpace, Prepared]:
    """The space of normalised latents of all training volumes, and these latents, stored once as HDF5.

    z (person, version, channel, *cells) float16, mean 0 and standard deviation 1 per channel over all of them;
    version 1, with `mirror`, is that of the volume mirrored left to right. Raises ValueError if `path` holds latents of
    another autoencoder or of other volumes.
    """
    path, made_of = Path(path), sha256(prepared.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.with_name(f".{path.stem}.lock")):  # of torchrun's processes one does it, the others wait
        if not path.exists():
            _write_latents(path, codec, prepared, made_of, mirror, device, autocast, progress)
    cached = open_dataset(path, require=["z"])
    space = LatentSpace.described(codec, cached.attrs["latent"]).to(device)
    if cached.attrs["volumes"] != made_of:
        raise ValueError(f"{path} holds latents of other volumes than those of {prepared.path}; delete it")
    return space, cached


def _write_latents(path, codec, prepared, made_of, mirror, device, autocast, progress) -> None:
    raw, items, z = LatentSpace(codec), prepared.sequences("image", "train", 1), []
    number_format = autocast_dtype(autocast, device)
    for i in tqdm(range(len(items)), desc="latents", disable=not progress):
        x = items[i][None].float().to(device)
        both = torch.cat([x, x.flip(-1)]) if mirror else x
        with torch.autocast(torch.device(device).type, number_format, number_format is not None):
            z.append(raw.encode(both).float().cpu().half())
    z = torch.stack(z).float()
    space = LatentSpace(codec, *statistics(z.flatten(0, 1).split(64)))
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


class LatentItems(Dataset):
    """Items for training: z (version, channel, *cells), with the person's cond (name, *cells) behind it on channels."""

    def __init__(self, cached: Prepared, cond: Tensor | None = None):
        self.items, self.cond = cached.sequences("z", "train", cached.shapes["z"][1]), cond

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Tensor:
        z = self.items[i].float()
        return z if self.cond is None else torch.cat([z, self.cond[i].expand(len(z), *self.cond[i].shape)], 1)


def condition(values: Tensor, covariates: Sequence[Mapping], cells: tuple[int, ...]) -> Tensor:
    """The cond (batch, name, *cells) of a prior with covariates for values (batch, name) in their own units.

    covariates: of the prior's config, names, means and standard deviations of the training set. Each standardised
    number fills a channel.
    """
    if values.ndim != 2 or values.shape[1] != len(covariates):
        raise ValueError(
            f"covariates of shape {tuple(values.shape)} were given; this prior takes (batch, {len(covariates)})"
            f": {', '.join(a['name'] for a in covariates) or 'none'}"
        )
    mean, std = (torch.tensor([a[key] for a in covariates]) for key in ("mean", "std"))
    return ((values - mean) / std)[(...,) + (None,) * len(cells)].expand(*values.shape, *cells)


@torch.no_grad()
def encode_sequences(
    codec: Codec, intensity: tuple[float, float], prepared: Prepared, progress: bool = True
) -> tuple[Prepared, LatentSpace]:
    """The latents (sequence, frame, channel, y, x) of prepared sequences and their space, beside the images' file.

    Of magnitudes, by an autoencoder for which 0 and 1 are `intensity`; mean 0 and standard deviation 1 over the
    training sequences. attrs["latent"] says which autoencoder and normalisation, and goes into the checkpoint of a
    prior. Raises ValueError when the file is there with latents of another autoencoder or of other images.
    """
    name = image_name(prepared)
    path = prepared.path.with_name(f"{prepared.path.stem}_latents.h5")
    if not path.exists():
        images = prepared.read(name)

        def batches(rows: Sequence[int], what: str) -> Iterator[Tensor]:
            for i in tqdm(rows, desc=what, disable=not progress):
                yield torch.from_numpy(images[i]).abs()

        space = LatentSpace.fit(codec, batches(prepared.rows("train"), "statistics"), intensity=intensity)
        z = torch.stack([space.encode(x) for x in batches(range(len(images)), "latents")])
        write_dataset(
            path,
            {"latent": z.numpy()},
            units={"latent": "1"},
            seed=prepared.seed,
            source=prepared.source,
            scale={"latent": "mean 0, standard deviation 1 over the training sequences, channel by channel"},
            subjects=prepared.subjects,
            split=prepared.split,
            attrs={"latent": space.describe(), "images": prepared.path.name}
            | {key: value for key, value in prepared.attrs.items() if key == "spacing_mm"},
        )
    latents = open_dataset(path, require=["latent"])
    space = LatentSpace.described(codec, latents.attrs["latent"])
    if latents.subjects != prepared.subjects or space.intensity != intensity:
        raise ValueError(
            f"{path} holds latents of other images than {prepared.path.name}, or of another codec_range; delete it"
        )
    return latents, space


COVARIATES = {"brain_ml": "volume of the brain, mL", "csf_share": "CSF, share of the brain's volume: grows with age"}


@dataclass(frozen=True)
class Diffusion:
    """The part of a form that describes a prior on latents."""

    diffusion: str = param(
        "edm",
        "edm, rectified flow, or what a network at 1000 discrete times predicts",
        choices=("edm", "flow", "v", "epsilon", "x0"),
    )
    schedule: str = param("scaled_linear", "of v, epsilon, x0", choices=tuple(SCHEDULES))
    covariates: tuple[str, ...] = param((), "what the prior is told of each brain", choices=("brain_ml", "csf_share"))
    model_channels: int = param(96, "width of the network", minimum=32)
    channel_mult: tuple[float, ...] = param((1,), "relative width of each level, finest first")
    prior_res_blocks: int = param(1, "residual blocks a level", minimum=1)
    attention_resolutions: tuple[int, ...] = param((1,), "strides at which the network attends over cells")
    prior_patch: int = param(2, "the finest level works on blocks of so many cells along each axis", minimum=1)


def data_config(prepared: Prepared) -> dict:
    """What a checkpoint says of the volumes that it knows: source, scale, grid, affine of the first."""
    return {
        "source": prepared.source,
        "scale": volumes.SCALE,
        "volumes": len(prepared.rows("train")),
        "shape": list(prepared.shapes["image"][2:]),
        "voxel_mm": prepared.attrs["voxel_mm"],
        "affine": prepared.read("affine")[0].tolist() if "affine" in prepared.shapes else None,
    }


def covariates(tissue_ml: Tensor, names: tuple[str, ...]) -> Tensor:
    """Covariates (person, name) of tissue volumes (person, 3); see COVARIATES."""
    brain = tissue_ml.sum(-1)
    values = {"brain_ml": brain, "csf_share": tissue_ml[..., 0] / brain}
    return torch.stack([values[name] for name in names], -1)


SIGMA_MAX = 80.0  # where draws begin: latents of standard deviation 1 are invisible in it
DENOISERS = {"edm": {"name": "EDMDenoiser", "sigma_data": 1.0}, "flow": {"name": "FlowDenoiser"}}  # others: discrete


def prior_config(d: Diffusion, space: LatentSpace, prepared: Prepared, autoencoder: str) -> dict:
    """What `architectures.build` makes the prior from, the covariates that it takes, and whose latents it knows."""
    channels, about = space.codec.latent_channels, []
    discrete = {"name": "DiscreteDenoiser", "schedule": {"name": d.schedule}, "prediction": d.diffusion}
    network = {
        "name": "UNet",
        "dims": space.codec.dims,
        "in_channels": channels + len(d.covariates),
        "model_channels": d.model_channels,
        "out_channels": channels,
        "num_res_blocks": d.prior_res_blocks,
        "channel_mult": list(d.channel_mult),
        "attention_resolutions": list(d.attention_resolutions),
        "num_heads": 4,
        "use_scale_shift_norm": True,
        "patch": d.prior_patch,
    }
    if d.covariates:
        if "tissue_ml" not in prepared.shapes:
            raise ValueError(f"{prepared.path} does not say the tissue volumes of its people, which covariates need")
        values = covariates(torch.from_numpy(prepared.read("tissue_ml", "train")), d.covariates)
        about = [
            {"name": name, "what": COVARIATES[name], "mean": m, "std": s}
            for name, m, s in zip(d.covariates, values.mean(0).tolist(), values.std(0).tolist(), strict=True)
        ]
    return {
        "network": network,
        "denoiser": DENOISERS.get(d.diffusion, discrete),
        "data": data_config(prepared),
        "covariates": about,
        "autoencoder": autoencoder,
        "latent": space.describe(),
    }


def check_levels(D: nn.Module) -> float:
    """The share of the signal that is left at the highest noise level that a prior learns.

    See `latent.check_terminal_signal`; ValueError if sampling would begin with a state that training never showed.
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


def prior_loss(
    D: Denoiser, z: Tensor, generator: Generator, P_mean: float, P_std: float, covariates: int = 0
) -> Tensor:
    """The loss (batch,) of latents (batch, version, channel, *cells), a random version of each.

    covariates: how many of the last channels are what D is told, see `LatentItems`.
    """
    options = {"generator": generator, "device": generator.device}
    z = z[torch.arange(len(z)), torch.randint(z.shape[1], (len(z),), **options).to(z.device)]
    cond = None
    if covariates:
        z, cond = z[:, :-covariates], z[:, -covariates:]
    if isinstance(D, DiscreteDenoiser):
        return discrete_loss(D, z, generator, cond=cond)
    if isinstance(D, FlowDenoiser):
        return flow_loss(D, z, generator, cond=cond)
    return edm_loss(D, z, generator, P_mean, P_std, cond)


def latent_report(D: nn.Module, space: LatentSpace) -> list[dict[str, float]]:
    """What to look at before a prior is trained: the latents, and what is left of them at the highest noise."""
    left = {"amplitude left at the highest noise (%)": 100 * check_levels(D)}
    return [
        {"channel": i, "mean": m, "standard deviation": s, "normalised": "0, 1"} | left
        for i, (m, s) in enumerate(zip(space.mean.tolist(), space.std.tolist(), strict=True))
    ]


def average_person(config: Mapping, z: Tensor) -> Tensor | None:
    """The cond of an average person, for latents z (batch, channel, *cells); None for a prior without covariates."""
    names = config.get("covariates")
    return z.new_zeros(len(z), len(names), *z.shape[2:]) if names else None
