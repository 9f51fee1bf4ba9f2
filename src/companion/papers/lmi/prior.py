"""Training of a translator of LMI on the target contrast alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from companion.data.store import open_dataset
from companion.diffusion.denoisers import Denoiser, EDMDenoiser
from companion.diffusion.losses import discrete_loss, edm_loss
from companion.files import code_version, project_root
from companion.models.architectures import build
from companion.models.checkpoint import load
from companion.models.folder import save_checkpoint
from companion.papers.lmi.conditions import COND_SCALE, MAPS, Conditioning, conditions, grey, told
from companion.papers.lmi.data import some_slices
from companion.papers.lmi.remap import remapped
from companion.parameters import Parameters, autocast_dtype, param, read_yaml
from companion.randomness import randn
from companion.training.loop import TrainConfig, TrainResult, train

# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class TrainTranslator(Parameters):
    """Parameters of lmi/2_train.ipynb."""

    data: str = param("data/lmi_brain_64.h5", "prepared slices, made by 1_data")
    target: str = param("T2w", "the contrast to learn; no other is read")
    maps: tuple[str, ...] = param(MAPS, "what the network is told: some of cross, self, source", choices=MAPS)
    patches: tuple[int, ...] = param((3, 7), "odd sides of the patches of cross and self", minimum=3)
    bins: int | None = param(10, "of the histograms; none: the map's own number", minimum=2)
    mode: str = param("centre", "of the maps: centre, shifts, or published", choices=("centre", "shifts", "published"))
    equalised: bool = param(True, "sources are seen as ranks of their tissue, freed from shading")
    remapped_share: float = param(
        0.85, "share of the sources that are remapped; the others are the target itself", minimum=0, maximum=1
    )
    dropout: float = param(
        0.5, "share of the images that are told only some of the maps, or none", minimum=0, maximum=1
    )
    diffusion: str = param(
        "edm", "edm: Karras et al. 2022; ddpm: 1000 steps, epsilon, as published", choices=("edm", "ddpm")
    )
    look_ahead: bool = param(False, "of ddpm: the cross map is that of the next, noisier step, as published")
    network: str = param(
        "UNet",
        "UNet: guided-diffusion; DDIMUNet: the one that the published recipe trains",
        choices=("UNet", "DDIMUNet"),
    )
    model_channels: int = param(32, "width of the network", minimum=32)
    channel_mult: tuple[float, ...] = param((1, 2, 4), "relative width of each level, finest first")
    num_res_blocks: int = param(1, "residual blocks a level", minimum=1)
    attention_resolutions: tuple[int, ...] = param((), "strides at which the network attends, besides the bottom")
    dropout_rate: float = param(0.0, "dropout inside the network", minimum=0, maximum=0.9)
    patch: int = param(2, "side of the pixel-unshuffle stem", minimum=1)
    sigma_data: float | None = param(None, "root mean square of the images (edm); none: measured", minimum=1e-3)
    P_mean: float = param(-0.6, "mean of ln sigma in training (edm)")
    P_std: float = param(1.4, "standard deviation of ln sigma in training (edm)", minimum=0)
    mirror: bool = param(True, "mirror images left to right at random")
    start_from: str | None = param(None, "checkpoint whose weights to begin with; none: random weights")
    steps: int = param(3600, "optimiser steps", minimum=1)
    batch_size: int = param(16, "images a step", minimum=1)
    grad_accumulation: int = param(1, "pieces a batch is cut into; processes share them", minimum=1)
    learning_rate: float = param(8e-4, "highest learning rate", minimum=0)
    schedule: str = param("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    warmup: int = param(100, "steps of linear warm-up", minimum=0)
    ema_decay: float = param(0.995, "decay of the averaged weights", minimum=0, maximum=1)
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))
    seconds: float | None = param(None, "stop with a checkpoint after this long", minimum=1)
    checkpoint_every: int = param(100, "steps between checkpoints", minimum=1)

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(self.maps, self.patches, self.bins, self.mode, equalised=self.equalised)


def training_slices(p: TrainTranslator):
    """The training set: slices (channel, y, x) of the target's training subjects. No other contrast is opened."""
    return open_dataset(project_root() / p.data, require=[p.target]).slices(p.target, "train")


def translator_config(p: TrainTranslator) -> dict:
    """What `weights.build` makes the denoiser from."""
    prepared = open_dataset(project_root() / p.data, require=[p.target])
    shape = prepared.shapes[p.target]
    images, channels = training_slices(p), shape[2]
    sigma_data = p.sigma_data
    if sigma_data is None:
        shown = range(0, len(images), max(1, len(images) // 200))
        sigma_data = round(sum(images[i].square().mean().item() for i in shown) ** 0.5 / len(shown) ** 0.5, 3)
    network = {
        "name": p.network,
        "in_channels": channels + p.conditioning.channels,
        "out_channels": channels,
        "model_channels": p.model_channels,
        "num_res_blocks": p.num_res_blocks,
        "channel_mult": list(p.channel_mult),
        "attention_resolutions": list(p.attention_resolutions),
        "dropout": p.dropout_rate,
        "num_heads": 1 if p.network == "DDIMUNet" else 4,
        "use_scale_shift_norm": p.network == "UNet",
        "patch": p.patch,
    }
    denoiser = {"name": "DiscreteDenoiser", "schedule": {"name": "linear", "steps": 1000}, "prediction": "epsilon"}
    if p.diffusion == "edm":
        denoiser = {"name": "EDMDenoiser", "sigma_data": sigma_data, "cond_scale": COND_SCALE}
    return {
        "network": network,
        "denoiser": denoiser,
        "data": {
            "source": f"{prepared.source}, {p.target} only",
            "scale": prepared.scale[p.target],
            "contrast": p.target,
            "subjects": len(prepared.rows("train")),
            "slices_per_subject": shape[1],
            "image_size": list(shape[-2:]),
            "conditioning": asdict(p.conditioning),
        },
    }


def train_translator(p: TrainTranslator, progress: bool = True) -> TrainResult:
    """The trained model; continues what `p.out` holds. The same call serves torchrun's processes."""
    config = translator_config(p)
    torch.manual_seed(p.seed)
    D = build(config)
    if p.start_from:
        D.load_state_dict(load(p.start_from).state_dict())
    D.autocast = autocast_dtype(p.autocast, p.device)
    options = TrainConfig(
        steps=p.steps,
        batch_size=p.batch_size,
        grad_accumulation=p.grad_accumulation,
        learning_rate=p.learning_rate,
        warmup=p.warmup,
        schedule=p.schedule,
        ema_decay=p.ema_decay,
        channels_last=True,
        seed=p.seed,
        device=p.device,
        seconds=p.seconds,
        checkpoint_every=p.checkpoint_every,
        log_every=20,
    )

    def loss(D: Denoiser, x0: Tensor, generator: Generator) -> Tensor:
        return translation_loss(D, x0, generator, p)

    names = ("remapped_share", "dropout", "look_ahead", "P_mean", "P_std", "mirror", "start_from")
    about = config | {name: getattr(p, name) for name in names}
    return train(D, loss, training_slices(p), options, project_root() / p.out, about=about, progress=progress)


def translation_loss(D: Denoiser, x0: Tensor, generator: Generator, p: TrainTranslator) -> Tensor:
    """The loss (batch,) of target images x0 (batch, channel, y, x), told of a source made from x0 itself."""
    options = {"generator": generator, "device": generator.device}
    c, batch = p.conditioning, len(x0)
    if p.mirror:
        x0 = torch.where((torch.rand(batch, 1, 1, 1, **options) < 0.5).to(x0.device), x0.flip(-1), x0)
    source = remapped(x0, generator, p.remapped_share) if p.remapped_share else grey(x0)
    keep = told(batch, len(c.maps), p.dropout, generator)
    noise = randn(x0.shape, x0.dtype, generator, x0.device)
    if p.diffusion == "edm":
        sigma = (p.P_mean + p.P_std * randn((batch,), x0.dtype, generator, x0.device)).exp()
        cond = conditions(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma, source, c, keep)
        return edm_loss(D, x0, cond=cond, sigma=sigma, noise=noise)
    t = torch.randint(len(D.schedule), (batch,), **options).to(x0.device)
    seen = (t + p.look_ahead).clamp(max=len(D.schedule) - 1)
    sigma = D.schedule.sigmas.to(x0.device)[seen].to(x0.dtype)
    cond = conditions(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma, source, c, keep)
    return discrete_loss(D, x0, cond=cond, t=t, noise=noise)


@torch.no_grad()
def denoising_errors(D: EDMDenoiser, p: TrainTranslator, sigmas: Sequence[float], count: int = 48) -> list[dict]:
    """For each sigma the root mean squared error of D on validation slices, told of sources of each kind of contrast.

    "nothing", "itself" (the clean target), "remapped", and every other contrast that the prepared file has. The others
    are looked at here for the first time: to measure, not to learn.
    """
    stacks = some_slices(open_dataset(project_root() / p.data), count)
    stacks = {name: grey(x).to(p.device) for name, x in stacks.items() if name != "labels"}
    if not stacks:
        return []
    generator = torch.Generator().manual_seed(p.seed)
    x0 = stacks.pop(p.target)
    sources = {"nothing": None, "itself": x0, "remapped": remapped(x0, generator), **stacks}
    noise, table = randn(x0.shape, x0.dtype, generator).to(x0.device), []
    for sigma in sigmas:
        level, x, row = torch.full((len(x0),), sigma, device=x0.device), x0 + sigma * noise, {"sigma": sigma}
        for name, source in sources.items():
            told = conditions(x, level, source, p.conditioning)
            row[name] = round((D(x, level, told) - x0).square().mean().sqrt().item(), 4)
        table.append(row)
    return table


def save_translator(result: TrainResult, p: TrainTranslator, errors: list[dict]) -> Path:
    """The folder <out>/checkpoint with the averaged weights in half precision, their config, record and card."""
    record = {
        "parameters": asdict(p),
        "steps": result.step,
        "images": result.step * p.batch_size,
        "seconds": round(result.seconds),
        "loss": result.loss,
        "validation": errors,
        "code": code_version(),
    }
    return save_checkpoint(project_root() / p.out / "checkpoint", result.ema.half(), translator_config(p), record)


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.lmi params.yaml
    train_translator(TrainTranslator(**read_yaml(sys.argv[1])))
