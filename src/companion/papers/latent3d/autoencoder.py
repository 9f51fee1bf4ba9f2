"""Training of the autoencoder of latent3d, and the form of both trainings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from companion.data.store import open_dataset
from companion.files import project_root
from companion.models.latent import load_autoencoder
from companion.networks.autoencoder import PatchDiscriminator
from companion.parameters import param
from companion.training.codec import AdversarialCodec, Autoencoder, autoencoder_loss
from companion.training.latents import Diffusion, data_config
from companion.training.loop import TrainResult
from companion.training.recipe import Training, begin, fit


@dataclass(frozen=True)
class TrainLatent(
    Autoencoder, Diffusion, Training, steps=10000, batch_size=4, learning_rate=1e-3, checkpoint_every=200
):
    """Parameters of latent3d/2_train.ipynb; those of training without ae_ are of the prior."""

    data: str = param("data/latent3d_64.h5", "prepared volumes, made by 1_data")
    stage: str = param(
        "both",
        "what to train; decoder: of the autoencoder only that half, so that its latents stay",
        choices=("autoencoder", "decoder", "prior", "both"),
    )
    autoencoder: str | None = param(
        None,
        "checkpoint that its training begins with, of as many latent channels or fewer (kl), or that a prior builds on",
    )
    background: float = param(0.2, "weight of voxels outside the brain in the reconstruction error", minimum=0)
    edges: float = param(0.5, "weight of the error of differences between neighbours, against blur", minimum=0)
    regulariser: float | None = param(1e-7, "weight of the KL or codebook term; none: the architecture's usual one")
    adversary: float = param(0.0, "weight of a patch discriminator; begin without", minimum=0)
    ae_steps: int = param(6000, "optimiser steps", minimum=1)
    ae_batch_size: int = param(1, "volumes a step", minimum=1)
    ae_learning_rate: float = param(2e-3, "highest learning rate", minimum=0)
    ae_warmup: int = param(50, "steps of linear warm-up", minimum=0)
    ae_ema_decay: float = param(0.995, "decay of the averaged weights", minimum=0, maximum=1)
    ae_seconds: float | None = param(None, "stop with a checkpoint after this long", minimum=0)
    P_mean: float = param(0.3, "mean of ln sigma in training (edm)")
    P_std: float = param(1.3, "standard deviation of ln sigma in training (edm)", minimum=0)
    rate: str = param(
        "cosine", "learning rates after the warm-up; constant ones can go on for longer", choices=("cosine", "constant")
    )
    mirror: bool = param(True, "mirror volumes left to right at random")

    @property
    def codec(self) -> str:
        """The checkpoint of the autoencoder that a prior is trained on."""
        if self.stage == "prior" and self.autoencoder is None:
            raise ValueError(
                "stage prior needs the name or folder of its autoencoder: autoencoder = latent3d/autoencoder"
            )
        return str(self.autoencoder) if self.stage == "prior" else f"{self.out}/autoencoder/checkpoint"


def train_autoencoder(p: TrainLatent, progress: bool = True) -> tuple[TrainResult, dict]:
    """The trained autoencoder, which continues what <out>/autoencoder holds, and its config."""
    prepared = open_dataset(project_root() / p.data, require=["image"])
    config = {"network": p.network(len(prepared.shapes["image"]) - 2), "data": data_config(prepared)}
    codec: Any = begin(config, p.seed)
    if p.architecture == "kl":  # begin almost without noise on the latents, or nothing is learned for long
        codec.quant_conv.bias.data[p.latent_channels :] = -4.0
    if p.autoencoder:
        known = load_autoencoder(p.autoencoder)
        codec.load_state_dict(widened(known.state_dict(), codec) if p.architecture == "kl" else known.state_dict())
    if p.stage == "decoder":
        for name, tensor in codec.named_parameters():
            tensor.requires_grad_(name.startswith(("decoder.", "post_quant_conv.")))
    result = fit(
        AdversarialCodec(codec, PatchDiscriminator(codec.dims)) if p.adversary else codec,
        autoencoder_loss,
        prepared.sequences("image", "train", 1),
        p,
        config["network"] | {"autoencoder": p.autoencoder, "frozen encoder": p.stage == "decoder"},
        p.pick("background", "edges", "regulariser", "adversary", "mirror"),
        folder=project_root() / p.out / "autoencoder",
        progress=progress,
        steps=p.ae_steps,
        batch_size=p.ae_batch_size,
        grad_accumulation=1,
        learning_rate=p.ae_learning_rate,
        warmup=p.ae_warmup,
        schedule=p.rate,
        betas=(0.9, 0.99),
        ema_decay=p.ae_ema_decay,
        autocast=p.autocast,
        seconds=p.ae_seconds,
    )
    return result, config


NEW_CHANNELS, NEW_LOG_VARIANCE = 0.1, -8.0  # what the decoder makes of new channels at first; their noise


def widened(known: Mapping[str, Tensor], codec: nn.Module) -> dict[str, Tensor]:
    """The weights of a KL autoencoder of fewer latent channels, or as many, as those of this one begin.

    Old channels keep what they do; new ones begin as they are in `codec`, almost unheard. Raises ValueError for more.
    """
    fresh = {name: x.clone() for name, x in codec.state_dict().items()}
    old, new = (len(x["post_quant_conv.weight"]) for x in (known, fresh))
    if old > new:
        raise ValueError(f"the autoencoder to begin with has {old} latent channels, more than latent_channels = {new}")
    if old == new:
        return dict(known)
    means, both = torch.arange(old), torch.cat([torch.arange(old), new + torch.arange(old)])
    fresh["decoder.conv_in.weight"] *= NEW_CHANNELS
    fresh["quant_conv.bias"][new:] = NEW_LOG_VARIANCE
    # of the axes (out, in) of each layer whose width is that of the latents, or twice that
    rows = {"encoder.conv_out": (both, None), "quant_conv": (both, both)}
    rows |= {"post_quant_conv": (means, means), "decoder.conv_in": (None, means)}
    for name, x in known.items():
        layer, _, kind = name.rpartition(".")
        out, into = rows.get(layer, (None, None))
        if kind == "bias" or into is None:
            fresh[name][slice(None) if out is None else out] = x
        elif out is None:
            fresh[name][:, into] = x
        else:
            fresh[name][out] = 0  # old channels do not hear new ones
            fresh[name][out[:, None], into] = x
    return fresh
