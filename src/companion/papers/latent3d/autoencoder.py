"""Training of the autoencoder of latent3d."""

from __future__ import annotations

import copy
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from companion.data import volumes
from companion.data.store import Prepared, open_dataset
from companion.evaluation import metrics
from companion.files import code_version, project_root
from companion.models import architectures, folder
from companion.models import checkpoint as weights
from companion.models.architectures import SCHEDULES
from companion.networks.autoencoder import PatchDiscriminator
from companion.networks.codec import Codec
from companion.parameters import Parameters, param
from companion.training.codec import AdversarialCodec, adversarial_loss, codec_loss
from companion.training.loop import TrainConfig, TrainResult, train

AUTOENCODER, PRIOR = "latent3d/autoencoder", "latent3d/prior"


# ----------------------------------------------------------------------------------------------------- autoencoder


@dataclass(frozen=True)
class TrainLatent(Parameters):
    """Parameters of latent3d/2_train.ipynb."""

    data: str = param("data/latent3d_64.h5", "prepared volumes, made by 1_data")
    stage: str = param(
        "both",
        "what to train; decoder: of the autoencoder only that half, so that its latents stay",
        choices=("autoencoder", "decoder", "prior", "both"),
    )
    # the autoencoder
    autoencoder: str | None = param(None, "checkpoint that its training begins with, or that a prior alone builds on")
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
    # the prior
    start_from: str | None = param(None, "prior to begin with")
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
    P_mean: float = param(0.3, "mean of ln sigma in training (edm)")
    P_std: float = param(1.3, "standard deviation of ln sigma in training (edm)", minimum=0)
    steps: int = param(10000, "optimiser steps", minimum=1)
    batch_size: int = param(4, "latents a step", minimum=1)
    grad_accumulation: int = param(1, "pieces a batch is cut into; processes share them", minimum=1)
    learning_rate: float = param(1e-3, "highest learning rate", minimum=0)
    warmup: int = param(100, "steps of linear warm-up", minimum=0)
    ema_decay: float = param(0.998, "decay of the averaged weights", minimum=0, maximum=1)
    seconds: float | None = param(None, "stop with a checkpoint after this long", minimum=0)
    # both
    rate: str = param(
        "cosine", "learning rates after the warm-up; constant ones can go on for longer", choices=("cosine", "constant")
    )
    mirror: bool = param(True, "mirror volumes left to right at random")
    autocast: str | None = param("auto", "number format inside the networks", choices=("auto", "bfloat16", None))
    checkpoint_every: int = param(200, "steps between checkpoints", minimum=1)


def data_config(prepared: Prepared) -> dict:
    """Return what a checkpoint says of the volumes that it knows: source, scale, grid, affine of the first."""
    return {
        "source": prepared.source,
        "scale": volumes.SCALE,
        "volumes": len(prepared.rows("train")),
        "shape": list(prepared.shapes["image"][2:]),
        "voxel_mm": prepared.attrs["voxel_mm"],
        "affine": prepared.read("affine")[0].tolist() if "affine" in prepared.shapes else None,
    }


def autoencoder_config(p: TrainLatent, prepared: Prepared) -> dict:
    """Return what `weights.build` makes the autoencoder from."""
    dims = len(prepared.shapes["image"]) - 2
    common = {"dims": dims, "in_channels": 1, "out_channels": 1}
    codebook = {"num_embeddings": p.codes, "embedding_dim": p.latent_channels, "restart": 0.05}
    network = {
        "kl": {
            "name": "AutoencoderKL",
            "channels": p.channels[0],
            "patch": p.patch,
            "middle": False,
            "channel_mult": [c / p.channels[0] for c in p.channels],
            "num_res_blocks": p.num_res_blocks,
            "decoder_blocks": p.num_res_blocks,
            "latent_channels": p.latent_channels,
            "norm_groups": 8,
        },
        "vq": {
            "name": "VQVAE",
            "channels": list(p.channels),
            "num_res_layers": p.num_res_blocks,
            "decay": 0.99,
            "upsample": "resize",
        }
        | codebook,
        "plain": {"name": "PlainVQVAE", "channels": list(p.channels)} | codebook,
    }[p.architecture]
    return {"network": network | common, "data": data_config(prepared)}


def train_autoencoder(p: TrainLatent, progress: bool = True) -> TrainResult:
    """Return the trained autoencoder; continues what <out>/autoencoder holds."""
    prepared = open_dataset(project_root() / p.data, require=["image"])
    config = autoencoder_config(p, prepared)
    torch.manual_seed(p.seed)
    codec = architectures.build(config)
    if p.architecture == "kl":  # begin almost without noise on the latents, or nothing is learned for long
        codec.quant_conv.bias.data[p.latent_channels :] = -4.0
    if p.autoencoder:
        codec.load_state_dict(load_autoencoder(p.autoencoder).state_dict())
    if p.stage == "decoder":
        for name, tensor in codec.named_parameters():
            tensor.requires_grad_(name.startswith(("decoder.", "post_quant_conv.")))
    model = codec
    if p.adversary:
        model = AdversarialCodec(codec, PatchDiscriminator(codec.dims))
    options = TrainConfig(
        steps=p.ae_steps,
        batch_size=p.ae_batch_size,
        learning_rate=p.ae_learning_rate,
        warmup=p.ae_warmup,
        schedule=p.rate,
        betas=(0.9, 0.99),
        ema_decay=p.ae_ema_decay,
        autocast=p.autocast,
        channels_last=True,
        seed=p.seed,
        device=p.device,
        seconds=p.ae_seconds,
        checkpoint_every=p.checkpoint_every,
    )

    def loss(model: nn.Module, x: Tensor, generator: Generator) -> Tensor:
        return autoencoder_loss(model, x, generator, p)

    about = config["network"] | {name: getattr(p, name) for name in AUTOENCODER_LOSS}
    about |= {"frozen encoder": True} if p.stage == "decoder" else {}
    return train(
        model,
        loss,
        prepared.sequences("image", "train", 1),
        options,
        project_root() / p.out / "autoencoder",
        about=about,
        progress=progress,
    )


AUTOENCODER_LOSS = ("background", "edges", "regulariser", "adversary", "mirror", "autoencoder")


def autoencoder_loss(model: nn.Module, x: Tensor, generator: Generator, p: TrainLatent) -> Tensor:
    """Return the loss (batch,) of volumes x (batch, 1, z, y, x): reconstruction, edges, regulariser, adversary."""
    x = x.float()
    if p.mirror:
        flipped = torch.rand(len(x), *[1] * (x.ndim - 1), generator=generator, device=generator.device) < 0.5
        x = torch.where(flipped.to(x.device), x.flip(-1), x)
    options = {"background": p.background, "edges": p.edges, "regulariser": p.regulariser}
    if p.adversary:
        return adversarial_loss(model, x, generator, weight=p.adversary, **options)
    return codec_loss(model, x, generator, **options)


@torch.no_grad()
def reconstruct(codec: Codec, x: Tensor, batch: int = 4) -> Tensor:
    """Return what an autoencoder makes of volumes (batch, 1, z, y, x): codes if it has them, else means, decoded."""
    parts = []
    for part in x.split(batch):
        z = codec.encode(part)
        parts.append(codec.decode(codec.quantize(z).z_q if hasattr(codec, "quantize") else z))
    return torch.cat(parts)


def reconstruction_figures(x_hat: Tensor, x: Tensor) -> dict[str, tuple[float, float]]:
    """Return L1, PSNR, SSIM and MS-SSIM of reconstructions, mean and standard error over volumes; peak signal 1.

    "brain": over voxels above 0 only, where the background cannot flatter.
    """
    brain, peak = x > 0, {"data_range": 1.0}
    figures = {
        "L1 (brain)": torch.where(brain, (x_hat - x).abs(), 0).flatten(1).sum(1) / brain.flatten(1).sum(1),
        "PSNR (dB)": metrics.psnr(x_hat, x, **peak),
        "PSNR (brain, dB)": metrics.psnr(x_hat, x, mask=brain, **peak),
        "SSIM": metrics.ssim(x_hat, x, **peak),
        "SSIM (brain)": metrics.ssim(x_hat, x, mask=brain, **peak),
        "MS-SSIM": metrics.ms_ssim(x_hat, x, 1.0),
    }
    return {name: metrics.mean_and_error(values) for name, values in figures.items()}


def codec_of(result: TrainResult) -> Codec:
    """Return the averaged autoencoder of a training, without the discriminator beside it."""
    return getattr(result.ema, "codec", result.ema)


def save_autoencoder(result: TrainResult, p: TrainLatent, figures: dict) -> Path:
    """Return the folder <out>/autoencoder/checkpoint with the averaged weights in half precision."""
    codec = codec_of(result)
    record = _record(result, p, p.ae_batch_size) | {"validation": figures}
    config = autoencoder_config(p, open_dataset(project_root() / p.data))
    return folder.save_checkpoint(
        project_root() / p.out / "autoencoder" / "checkpoint", copy.deepcopy(codec).half(), config, record
    )


def _record(result: TrainResult, p: TrainLatent, batch_size: int) -> dict:
    return {
        "parameters": asdict(p),
        "steps": result.step,
        "volumes seen": result.step * batch_size,
        "seconds": round(result.seconds),
        "loss": result.loss,
        "code": code_version(),
    }


COVARIATES = {"brain_ml": "volume of the brain, mL", "csf_share": "CSF, share of the brain's volume: grows with age"}


def covariates(tissue_ml: Tensor, names: tuple[str, ...]) -> Tensor:
    """Return covariates (person, name) of tissue volumes (person, 3); see COVARIATES."""
    brain = tissue_ml.sum(-1)
    values = {"brain_ml": brain, "csf_share": tissue_ml[..., 0] / brain}
    return torch.stack([values[name] for name in names], -1)


def load_autoencoder(name: str | os.PathLike = AUTOENCODER, device="cpu") -> Codec:
    """Return the autoencoder of a checkpoint; raises ValueError for a checkpoint of something else."""
    codec = weights.load(name, device)
    if not isinstance(codec, Codec):
        raise ValueError(f"{name} holds a {type(codec).__name__}, no autoencoder; give one such as {AUTOENCODER}")
    return codec
