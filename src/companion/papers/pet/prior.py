"""Training of the PET networks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor
from torch.utils.data import default_collate

from companion.acquisition.pet import SCALE_KBQ, acquire, as_condition, condition, iterates
from companion.data.augmentation import AugmentPipe
from companion.data.store import Prepared, open_dataset
from companion.diffusion.denoisers import EDMDenoiser
from companion.diffusion.losses import edm_loss
from companion.evaluation import metrics
from companion.files import code_version, project_root
from companion.models.architectures import build
from companion.models.checkpoint import load
from companion.models.folder import save_checkpoint
from companion.papers.pet.data import PEOPLE, held_out
from companion.parameters import Parameters, autocast_dtype, param, read_yaml
from companion.randomness import randn
from companion.show import figures
from companion.training.loop import TrainConfig, TrainResult, train

# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class TrainModel(Parameters):
    """Parameters of pet/2_train.ipynb."""

    data: str = param("data/pet_64.h5", "prepared slices, made by 1_data")
    task: str = param(
        "unconditional",
        "unconditional: a prior; conditional: given the MLEM images of a low-dose scan",
        choices=("unconditional", "conditional"),
    )
    target: str = param(
        "phantom",
        "what is learned: phantom, the true activity; high_dose, the MLEM image of the full dose, as published",
        choices=("phantom", "high_dose"),
    )
    class_labels: bool = param(False, "the network is told the height of a slice")
    label_dropout: float = param(0.1, "of class labels: how often it is not told, for guidance", minimum=0, maximum=1)
    dose_channel: bool = param(True, "of conditional networks: the dose of the scan as one more constant image")
    start_from: str | None = param(None, "checkpoint whose weights to begin with; none: random weights")
    network: str = param(
        "UNet",
        "UNet: small and fast; EDMUNet: the published one, needed for labels and augmentation",
        choices=("UNet", "EDMUNet"),
    )
    model_channels: int = param(64, "width of the network", minimum=32)
    channel_mult: tuple[float, ...] = param((1, 2, 2), "relative width of each level, finest first")
    num_res_blocks: int = param(1, "residual blocks a level", minimum=1)
    attention_resolutions: tuple[int, ...] = param((), "strides of the levels with attention; the bottom has it anyway")
    dropout: float = param(0.0, "inside residual blocks", minimum=0, maximum=1)
    patch: int = param(2, "side of the pixel-unshuffle stem (UNet)", minimum=1)
    scale_kbq: float = param(SCALE_KBQ, "kBq/mL that are 1 for the network; one constant for all", minimum=1e-6)
    sigma_data: float | None = param(None, "size of the data for the network; none: measured, their rms", minimum=1e-3)
    variance_weight: float = param(
        0.05, "weight of the variance channel's likelihood; 0: no such channel, as published", minimum=0
    )
    P_mean: float = param(-1.4, "mean of ln sigma in training")
    P_std: float = param(1.3, "standard deviation of ln sigma in training", minimum=0)
    mirror: bool = param(True, "mirror slices left to right at random")
    augment: float = param(
        0.0, "probability of each move of the augmentation pipe (EDMUNet); published: 0.05", minimum=0, maximum=1
    )
    stretch_label: str = param(
        "double_angle",
        "how the pipe labels a stretch: unambiguously, or as published",
        choices=("double_angle", "published"),
    )
    steps: int = param(4800, "optimiser steps", minimum=1)
    batch_size: int = param(16, "slices a step", minimum=1)
    grad_accumulation: int = param(1, "pieces a batch is cut into; processes share them", minimum=1)
    learning_rate: float = param(4e-4, "highest learning rate, after the warm-up; then half a cosine", minimum=0)
    warmup: int = param(200, "steps of linear warm-up", minimum=0)
    clip_norm: float | None = param(1.0, "longer gradients are shortened to it; none: never, as published", minimum=0)
    ema_decay: float = param(0.999, "decay of the averaged weights", minimum=0, maximum=1)
    ema_halflife: float | None = param(
        None, "of the averaged weights, in slices, ramped up; replaces ema_decay", minimum=1
    )
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))
    seconds: float | None = param(None, "stop with a checkpoint after this long", minimum=1)
    checkpoint_every: int = param(250, "steps between checkpoints", minimum=1)
    validation_people: int = param(
        0, "whose errors go to stats.jsonl with every checkpoint (embedded cohort)", minimum=0
    )


def model_config(p: TrainModel, prepared: Prepared) -> dict:
    """Return what `weights.build` makes the denoiser from, for prepared slices.

    Raises ValueError for labels or augmentation with a network that cannot be told.
    """
    made, conditional = prepared.attrs["parameters"], p.task == "conditional"
    if p.network == "UNet" and (p.class_labels or p.augment):
        raise ValueError("a UNet cannot be told class labels or augmentation; set network: EDMUNet")
    if p.target == "high_dose" and "high" not in prepared.shapes:
        raise ValueError(f"{prepared.path.name} has no full-dose images to learn; prepare it with a fraction below 1")
    learned_variance = p.variance_weight > 0
    network = {
        "name": p.network,
        "in_channels": 1 + conditional * (len(made["iterations"]) + p.dose_channel),
        "model_channels": p.model_channels,
        "out_channels": 1 + learned_variance,
        "num_res_blocks": p.num_res_blocks,
        "channel_mult": list(p.channel_mult),
        "dropout": p.dropout,
        "attention_resolutions": list(p.attention_resolutions),
    }
    if p.network == "UNet":
        network |= {"num_heads": 4, "use_scale_shift_norm": True, "patch": p.patch}
    elif p.augment:
        network |= {"augment_dim": 9}
    if p.class_labels:
        network |= {"num_classes": made["classes"], "label_dropout": p.label_dropout}
    sigma_data = p.sigma_data or round(prepared.attrs["rms"] / p.scale_kbq, 3)
    denoiser = {
        "name": "EDMDenoiser",
        "sigma_data": sigma_data,
        "learned_variance": learned_variance,
        "cond_scale": round(1 / sigma_data, 3),
    }
    shape = prepared.shapes["activity"]
    units = prepared.units["activity"]
    data = {
        "source": prepared.source,
        "scale": f"1 is {p.scale_kbq:g} {units}, for every image",
        "scale_kbq": p.scale_kbq,
        "units": units,
        "task": p.task,
        "target": p.target,
        "subjects": len(prepared.rows("train")),
        "slices_per_subject": shape[1],
        "image_size": list(shape[-2:]),
        "pixel_mm": prepared.attrs["pixel_mm"],
    }
    if conditional:
        data |= {
            "iterations": made["iterations"],
            "dose_channel": p.dose_channel,
            "counts": made["counts"],
            "fraction": made["fraction"],
            "attenuation": made["attenuation"],
        }
    return {"network": network, "denoiser": denoiser, "data": data}


def training_slices(p: TrainModel, prepared: Prepared):
    """Return the dataset of training: dicts of arrays (see `prepare`) of one slice each."""
    names = ["high" if p.target == "high_dose" else "activity"]
    names += ["mlem", "sensitivity"] * (p.task == "conditional") + ["label"] * p.class_labels
    return prepared.slices(names, "train", partial(_named, names))


def _named(names: Sequence[str], values) -> dict[str, Tensor]:
    return dict(zip(names, values if len(names) > 1 else (values,), strict=True))


def train_model(p: TrainModel, progress: bool = True) -> TrainResult:
    """Return the trained model; continues what `p.out` holds. The same call serves torchrun's processes."""
    prepared = open_dataset(project_root() / p.data, require=["activity", "mlem", "sensitivity"])
    config = model_config(p, prepared)
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
        schedule="cosine",
        clip_norm=p.clip_norm,
        ema_decay=p.ema_decay,
        ema_halflife=p.ema_halflife,
        channels_last=True,
        seed=p.seed,
        device=p.device,
        seconds=p.seconds,
        checkpoint_every=p.checkpoint_every,
        log_every=25,
    )

    def loss(D: EDMDenoiser, batch: dict[str, Tensor], generator: Generator) -> Tensor:
        return model_loss(D, batch, generator, p)

    def validate(ema: EDMDenoiser) -> dict[str, float]:
        return logged_errors(validation_errors(ema, p, p.validation_people))

    losses = ("P_mean", "P_std", "variance_weight", "mirror", "augment", "stretch_label", "start_from")
    about = config | {name: getattr(p, name) for name in losses}
    return train(
        D,
        loss,
        training_slices(p, prepared),
        options,
        project_root() / p.out,
        about=about,
        progress=progress,
        validate=validate if p.validation_people else None,
    )


def model_loss(D: EDMDenoiser, batch: dict[str, Tensor], generator: Generator, p: TrainModel) -> Tensor:
    """Return the EDM loss (batch,) of slices as `training_slices` gives them, in kBq/mL.

    Target and condition move together: they are one image of several channels while they are augmented.
    """
    target = batch["high" if p.target == "high_dose" else "activity"]
    images = target if p.task == "unconditional" else torch.cat([target, batch["mlem"]], 1)
    labels = {"y": batch["label"].long()} if p.class_labels else {}
    if p.augment:
        pipe = AugmentPipe(p.augment, flip_x=1e8 * p.mirror, stretch_label=p.stretch_label)
        images, labels["augment"] = pipe(images, generator)
    elif p.mirror:
        turned = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device) < 0.5
        images = torch.where(turned, images.flip(-1), images)
    cond = None
    if p.task == "conditional":
        cond = as_condition(images[:, 1:], batch["sensitivity"], p.scale_kbq)
        cond = cond if p.dose_channel else cond[:, :-1]
    return edm_loss(
        D, images[:, :1] / p.scale_kbq, generator, p.P_mean, p.P_std, cond, variance_weight=p.variance_weight, **labels
    )


@torch.no_grad()
def denoising_errors(
    D: EDMDenoiser, scale_kbq: float, sigmas: Sequence[float], people: int = 16, image_size: int = 64, seed: int = 0
) -> list[dict[str, float]]:
    """Return, for each sigma (network units), the error of an unconditional D on slices of validation people.

    Root mean squared error in kBq/mL, beside the one that the variance channel expects and the noise it was given.
    """
    x0 = (held_out("validation", people, image_size).image / scale_kbq).to(next(D.parameters()).device)
    noise = randn(x0.shape, x0.dtype, torch.Generator().manual_seed(seed)).to(x0.device)
    rows = []
    for sigma in sigmas:
        at = x0 + sigma * noise, torch.full((len(x0),), sigma, device=x0.device)
        mean, variance = D.moments(*at) if D.learned_variance else (D(*at), torch.full_like(x0, torch.nan))
        rows.append(
            {
                "sigma": sigma,
                "noise (kBq/mL)": sigma * scale_kbq,
                "error (kBq/mL)": (mean - x0).square().mean().sqrt().item() * scale_kbq,
                "expected": variance.mean().sqrt().item() * scale_kbq,
            }
        )
    return rows


@torch.no_grad()
def enhancement_errors(D: EDMDenoiser, data: dict, counts: Sequence[float], people: int = 16, seed: int = 0) -> list:
    """Return, for each number of counts, the NRMSE of D's best guess from a scan alone and of its MLEM images.

    Slices of validation people with a lesion each; mean and standard error over people. D looks at pure noise of
    sigma 40, so the guess is the posterior mean, in one evaluation. data: of the checkpoint's config.
    """
    slices = held_out("validation", people, data["image_size"][-1], lesions=1)
    device, rows = next(D.parameters()).device, []
    noise = 40 * randn(slices.image.shape, torch.float32, torch.Generator().manual_seed(seed))
    for total in counts:
        mu = slices.mu if data["attenuation"] else None
        scan = acquire(slices.image, mu, total, range(seed, seed + people), pixel_mm=slices.pixel_mm)
        cond = condition(scan, data["iterations"], data["scale_kbq"])
        given = cond if data["dose_channel"] else cond[:, :-1]
        guess = D(noise.to(device), torch.full((people,), 40.0, device=device), given.to(device)).cpu()
        images = iterates(scan, data["iterations"]) / data["scale_kbq"]
        mlems = {f"MLEM, {k} iterations": images[:, i : i + 1] for i, k in enumerate(data["iterations"])}
        rows.append(
            {"counts": total}
            | {
                name: metrics.mean_and_error(metrics.nrmse(x * data["scale_kbq"], slices.image))
                for name, x in ({"network": guess} | mlems).items()
            }
        )
    return rows


def validation_errors(D: EDMDenoiser, p: TrainModel, people: int = 16) -> list[dict]:
    """Return `denoising_errors` or `enhancement_errors`, whichever fits the task; nothing without embedded people."""
    prepared = open_dataset(project_root() / p.data)
    data = model_config(p, prepared)["data"]
    if prepared.source != PEOPLE:
        return []
    if p.task == "conditional":
        return enhancement_errors(D, data, (2.5e3, 1e4, 5e4, 2.5e5, 1e6), people, p.seed)
    return denoising_errors(
        D, p.scale_kbq, (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0), people, data["image_size"][-1], p.seed
    )


def first_batch(p: TrainModel, prepared: Prepared, count: int) -> dict[str, Tensor]:
    """Return what the network sees of training slices, by name: target and condition images (slice, 1, y, x)."""
    slices = training_slices(p, prepared)
    names = {"high": "full-dose MLEM", "activity": "activity"}
    at = [round(i * (len(slices) - 1) / max(1, count - 1)) for i in range(count)]
    batch = default_collate([slices[i] for i in at])
    shown = {label: batch[name] / p.scale_kbq for name, label in names.items() if name in batch}
    if p.task == "conditional":
        made = prepared.attrs["parameters"]["iterations"]
        cond = as_condition(batch["mlem"], batch["sensitivity"], p.scale_kbq)
        shown |= {f"MLEM, {k}": cond[:, i : i + 1] for i, k in enumerate(made)}
        shown |= {"dose": cond[:, -1:]} if p.dose_channel else {}
    return shown


def errors_figure(errors: list[dict]) -> Figure:
    """Return what `validation_errors` says as curves: against the noise level, or against the counts."""
    if "sigma" in errors[0]:
        sigmas = [row["sigma"] for row in errors]
        lines = {
            name: (sigmas, [row[key] for row in errors])
            for name, key in (
                ("noise", "noise (kBq/mL)"),
                ("left after denoising", "error (kBq/mL)"),
                ("expected", "expected"),
            )
        }
        return figures.curves(lines, xlabel="noise level sigma", ylabel="kBq/mL", logx=True, logy=True, size=(4.2, 3.4))
    counts = [row["counts"] for row in errors]
    lines = {
        name: (counts, *map(list, zip(*(row[name] for row in errors), strict=True)))
        for name in errors[0]
        if name != "counts"
    }
    return figures.curves(lines, xlabel="counts of a slice", ylabel="NRMSE", logx=True, logy=True, size=(4.2, 3.4))


def logged_errors(errors: list[dict]) -> dict[str, float]:
    """Return what `validation_errors` says of the network as single numbers by name, for stats.jsonl."""
    return {f"NRMSE at {row['counts']:g} counts": row["network"][0] for row in errors if "counts" in row} | {
        f"error at sigma {row['sigma']:g}": row["error (kBq/mL)"] for row in errors if "sigma" in row
    }


def save_model(result: TrainResult, p: TrainModel, errors: list[dict]) -> Path:
    """Return the folder <out>/checkpoint with the averaged weights in half precision, their config, record and card."""
    record = {
        "parameters": asdict(p),
        "steps": result.step,
        "slices": result.step * p.batch_size,
        "seconds": round(result.seconds),
        "loss": result.loss,
        "validation": errors,
        "code": code_version(),
    }
    config = model_config(p, open_dataset(project_root() / p.data))
    return save_checkpoint(project_root() / p.out / "checkpoint", result.ema.half(), config, record)


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.pet params.yaml
    train_model(TrainModel(**read_yaml(sys.argv[1])))
