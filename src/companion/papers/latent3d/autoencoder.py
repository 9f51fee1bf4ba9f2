"""Training of the autoencoder of latent3d, and the form of both trainings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from companion.data import volumes
from companion.data.store import Prepared, open_dataset
from companion.evaluation import metrics
from companion.files import project_root
from companion.models.architectures import SCHEDULES
from companion.models.latent import load_autoencoder
from companion.networks.autoencoder import PatchDiscriminator
from companion.networks.codec import Codec
from companion.parameters import param
from companion.training.codec import AdversarialCodec, adversarial_loss, codec_loss
from companion.training.loop import TrainResult
from companion.training.recipe import Training, begin, fit

COVARIATES = {"brain_ml": "volume of the brain, mL", "csf_share": "CSF, share of the brain's volume: grows with age"}


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
    autoencoder: str | None = param(None, "checkpoint that its training begins with, or that a prior alone builds on")
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
        return self.autoencoder if self.stage == "prior" else f"{self.out}/autoencoder/checkpoint"


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


def train_autoencoder(p: TrainLatent, progress: bool = True) -> tuple[TrainResult, dict]:
    """The trained autoencoder, which continues what <out>/autoencoder holds, and its config."""
    prepared = open_dataset(project_root() / p.data, require=["image"])
    config = {"network": p.network(len(prepared.shapes["image"]) - 2), "data": data_config(prepared)}
    codec = begin(config, p.seed)
    if p.architecture == "kl":  # begin almost without noise on the latents, or nothing is learned for long
        codec.quant_conv.bias.data[p.latent_channels :] = -4.0
    if p.autoencoder:
        codec.load_state_dict(load_autoencoder(p.autoencoder).state_dict())
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


def autoencoder_loss(
    model: nn.Module, x: Tensor, generator: Generator, *, mirror: bool, adversary: float, **terms: float | None
) -> Tensor:
    """The loss (batch,) of volumes x (batch, 1, z, y, x): reconstruction, edges, regulariser, adversary.

    terms: background, edges, regulariser, see `codec_loss`.
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
    return getattr(result.ema, "codec", result.ema)


@torch.no_grad()
def reconstruct(codec: Codec, x: Tensor, batch: int = 4) -> Tensor:
    """What an autoencoder makes of volumes (batch, 1, z, y, x): codes if it has them, else means, decoded."""
    parts = []
    for part in x.split(batch):
        z = codec.encode(part)
        parts.append(codec.decode(codec.quantize(z).z_q if hasattr(codec, "quantize") else z))
    return torch.cat(parts)


def reconstruction_figures(x_hat: Tensor, x: Tensor) -> dict[str, tuple[float, float]]:
    """L1, PSNR, SSIM and MS-SSIM of reconstructions, mean and standard error over volumes; peak signal 1.

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


def covariates(tissue_ml: Tensor, names: tuple[str, ...]) -> Tensor:
    """Covariates (person, name) of tissue volumes (person, 3); see COVARIATES."""
    brain = tissue_ml.sum(-1)
    values = {"brain_ml": brain, "csf_share": tissue_ml[..., 0] / brain}
    return torch.stack([values[name] for name in names], -1)
