"""Training of the latent prior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Generator, Tensor, nn

from companion.data.store import Prepared, open_dataset
from companion.diffusion.denoisers import Denoiser, DiscreteDenoiser, FlowDenoiser
from companion.diffusion.latent import LatentSpace, check_terminal_signal
from companion.diffusion.losses import discrete_loss, edm_loss, flow_loss
from companion.evaluation.denoising import denoising_errors
from companion.files import project_root
from companion.models.latent import load_autoencoder
from companion.papers.latent3d.autoencoder import COVARIATES, Diffusion, TrainLatent, covariates, data_config
from companion.parameters import resolve_device
from companion.training.latents import LatentItems, cache_latents, condition
from companion.training.loop import TrainResult
from companion.training.recipe import begin, fit

SIGMA_MAX = 80.0  # where draws begin: latents of standard deviation 1 are invisible in it
DENOISERS = {"edm": {"name": "EDMDenoiser", "sigma_data": 1.0}, "flow": {"name": "FlowDenoiser"}}  # others: discrete


def train_prior(p: TrainLatent, progress: bool = True) -> tuple[TrainResult, LatentSpace, dict]:
    """The trained prior, which continues what <out>/prior holds, the space of its latents, and its config.

    Latents are cached in <out>/latents.h5. Raises ValueError for latents of another autoencoder, and for a schedule
    that leaves signal at its end.
    """
    prepared, out = open_dataset(project_root() / p.data, require=["image"]), project_root() / p.out
    device, cond = resolve_device(p.device), None
    codec = load_autoencoder(p.codec, device)
    space, cached = cache_latents(codec, prepared, out / "latents.h5", p.mirror, device, p.autocast, progress)
    config = prior_config(p, space, prepared, p.codec)
    D = begin(config, p.seed, p.start_from, p.autocast, p.device)
    check_levels(D)
    if p.covariates:
        values = covariates(torch.from_numpy(prepared.read("tissue_ml", "train")), p.covariates)
        cond = condition(values, config["covariates"], cached.shapes["z"][3:])
    about = {name: config[name] for name in ("network", "denoiser", "covariates", "latent")}
    loss = partial(prior_loss, covariates=len(p.covariates))
    data, options = LatentItems(cached, cond), p.pick("P_mean", "P_std")
    result = fit(D, loss, data, p, about, options, folder=out / "prior", progress=progress, schedule=p.rate)
    return result, space, config


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


def latent_errors(D: Denoiser, z: Tensor, sigmas: Sequence[float], seed: int = 0, cond: Tensor | None = None) -> list:
    """For each sigma, the root mean squared error of D on latents z (batch, channel, *cells) of other people.

    "blank": of the best guess that knows nothing but mean 0 and standard deviation 1, sigma / sqrt(1 + sigma^2).
    """
    rows = denoising_errors({"error": lambda x, sigma: D(x, sigma, cond)}, z, sigmas, seed=seed)
    return [row | {"blank": round(row["sigma"] / (1 + row["sigma"] ** 2) ** 0.5, 4)} for row in rows]
