"""Latents of all training volumes, computed once and kept on disk; priors learn from them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from companion.data.store import Prepared, open_dataset, write_dataset
from companion.diffusion.latent import LatentSpace, statistics
from companion.files import sha256
from companion.networks.codec import Codec
from companion.parameters import autocast_dtype


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
    if not path.exists():
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
    cached = open_dataset(path, require=["z"])
    space = LatentSpace.described(codec, cached.attrs["latent"]).to(device)
    if cached.attrs["volumes"] != made_of:
        raise ValueError(f"{path} holds latents of other volumes than those of {prepared.path}; delete it")
    return space, cached


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
