"""Training of the PET networks: a prior of activity, or activity given the MLEM images of a scan and its dose.

Checkpoints say under "data" in their config: `scale_kbq`, the kBq/mL that are 1 for the network; `pixel_mm`;
conditional ones also `iterations`, the MLEM iterates in their condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import default_collate

from companion.acquisition.pet import SCALE_KBQ, as_condition
from companion.data.augmentation import AugmentPipe
from companion.data.store import Prepared, SliceDataset, open_dataset
from companion.diffusion.denoisers import EDMDenoiser
from companion.diffusion.losses import edm_loss
from companion.files import project_root
from companion.parameters import param
from companion.reconstruction.network_errors import logged_errors, validation_errors
from companion.training.loop import TrainResult
from companion.training.recipe import Training, UNetSize, begin, fit, main

if TYPE_CHECKING:
    pass
UNET_ONLY = ("num_heads", "use_scale_shift_norm", "patch")  # options that EDMUNet does not take


@dataclass(frozen=True)
class Model(UNetSize):
    """The part of a form that says what a network learns, and what it is told."""

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
    network: str = param(
        "UNet",
        "UNet: small and fast; EDMUNet: the published one, needed for labels and augmentation",
        choices=("UNet", "EDMUNet"),
    )
    attention_resolutions: tuple[int, ...] = param((), "strides of the levels with attention; the bottom has it anyway")
    dropout: float = param(0.0, "inside residual blocks", minimum=0, maximum=1)
    scale_kbq: float = param(SCALE_KBQ, "kBq/mL that are 1 for the network; one constant for all", minimum=1e-6)
    sigma_data: float | None = param(None, "size of the data for the network; none: measured, their rms", minimum=1e-3)
    variance_weight: float = param(
        0.05, "weight of the variance channel's likelihood; 0: no such channel, as published", minimum=0
    )
    augment: float = param(
        0.0, "probability of each move of the augmentation pipe (EDMUNet); published: 0.05", minimum=0, maximum=1
    )


@dataclass(frozen=True)
class TrainModel(
    Model,
    Training,
    steps=4800,
    learning_rate=4e-4,
    warmup=200,
    ema_decay=0.999,
    checkpoint_every=250,
):
    """Parameters of pet/2_train.ipynb."""

    data: str = param("data/pet_64.h5", "prepared slices, made by 1_data")
    P_mean: float = param(-1.4, "mean of ln sigma in training")
    P_std: float = param(1.3, "standard deviation of ln sigma in training", minimum=0)
    mirror: bool = param(True, "mirror slices left to right at random")
    stretch_label: str = param(
        "double_angle",
        "how the pipe labels a stretch: unambiguously, or as published",
        choices=("double_angle", "published"),
    )
    clip_norm: float | None = param(1.0, "longer gradients are shortened to it; none: never, as published", minimum=0)
    ema_halflife: float | None = param(
        None, "of the averaged weights, in slices, ramped up; replaces ema_decay", minimum=1
    )
    validation_people: int = param(
        0, "whose errors go to stats.jsonl with every checkpoint (embedded cohort)", minimum=0
    )


def train(p: TrainModel, progress: bool = True) -> tuple[TrainResult, dict]:
    """The trained model, which continues what `p.out` holds, and its config; torchrun's processes share the work."""
    prepared = open_dataset(project_root() / p.data, require=["activity", "mlem", "sensitivity"])
    config = model_config(p, prepared)
    D = begin(config, p.seed, p.start_from, p.autocast, p.device)

    def validate(ema: nn.Module) -> dict[str, float]:
        return logged_errors(validation_errors(cast(EDMDenoiser, ema), config["data"], p.validation_people, p.seed))

    result = fit(
        D,
        model_loss,
        training_slices(p, prepared),
        p,
        config,
        p.pick("scale_kbq", "dose_channel", "P_mean", "P_std", "variance_weight", "mirror", "augment", "stretch_label"),
        validate=validate if p.validation_people else None,
        progress=progress,
        clip_norm=p.clip_norm,
        ema_halflife=p.ema_halflife,
        log_every=25,
    )
    return result, config


def model_config(m: Model, prepared: Prepared) -> dict:
    """What `architectures.build` makes the denoiser from, for prepared slices.

    Raises ValueError for labels or augmentation with a network that cannot be told.
    """
    made, conditional = prepared.attrs["parameters"], m.task == "conditional"
    if m.network == "UNet" and (m.class_labels or m.augment):
        raise ValueError("a UNet cannot be told class labels or augmentation; set network: EDMUNet")
    if m.target == "high_dose" and "high" not in prepared.shapes:
        raise ValueError(f"{prepared.path.name} has no full-dose images to learn; prepare it with a fraction below 1")
    learned_variance = m.variance_weight > 0
    network = m.unet(
        name=m.network,
        in_channels=1 + conditional * (len(made["iterations"]) + m.dose_channel),
        out_channels=1 + learned_variance,
        dropout=m.dropout,
        attention_resolutions=list(m.attention_resolutions),
    )
    if m.network == "EDMUNet":
        network = {name: value for name, value in network.items() if name not in UNET_ONLY}
        network |= {"augment_dim": 9} if m.augment else {}
    if m.class_labels:
        network |= {"num_classes": made["classes"], "label_dropout": m.label_dropout}
    sigma_data = m.sigma_data or round(prepared.attrs["rms"] / m.scale_kbq, 3)
    denoiser = {
        "name": "EDMDenoiser",
        "sigma_data": sigma_data,
        "learned_variance": learned_variance,
        "cond_scale": round(1 / sigma_data, 3),
    }
    shape, units = prepared.shapes["activity"], prepared.units["activity"]
    data = {
        "source": prepared.source,
        "scale": f"1 is {m.scale_kbq:g} {units}, for every image",
        "scale_kbq": m.scale_kbq,
        "units": units,
        "task": m.task,
        "target": m.target,
        "subjects": len(prepared.rows("train")),
        "slices_per_subject": shape[1],
        "image_size": list(shape[-2:]),
        "pixel_mm": prepared.attrs["pixel_mm"],
    }
    if conditional:
        data |= {name: made[name] for name in ("iterations", "counts", "fraction", "attenuation")}
        data |= {"dose_channel": m.dose_channel}
    return {"network": network, "denoiser": denoiser, "data": data}


def training_slices(m: Model, prepared: Prepared) -> SliceDataset:
    """The dataset of training: dicts of arrays (see `data.prepare`) of one slice each."""
    names = ["high" if m.target == "high_dose" else "activity"]
    names += ["mlem", "sensitivity"] * (m.task == "conditional") + ["label"] * m.class_labels
    return prepared.slices(names, "train", partial(_named, names))


def _named(names: Sequence[str], values) -> dict[str, Tensor]:
    return dict(zip(names, values if len(names) > 1 else (values,), strict=True))


def model_loss(
    D: EDMDenoiser,
    batch: dict[str, Tensor],
    generator: Generator,
    scale_kbq: float,
    dose_channel: bool,
    P_mean: float,
    P_std: float,
    variance_weight: float,
    mirror: bool,
    augment: float,
    stretch_label: str,
) -> Tensor:
    """The EDM loss (batch,) of slices as `training_slices` gives them, in kBq/mL: conditional if they have MLEM images.

    Target and condition move together: they are one image of several channels while they are augmented.
    """
    target, conditional = batch["high" if "high" in batch else "activity"], "mlem" in batch
    images = torch.cat([target, batch["mlem"]], 1) if conditional else target
    labels = {"y": batch["label"].long()} if "label" in batch else {}
    if augment:
        pipe = AugmentPipe(augment, flip_x=1e8 * mirror, stretch_label=stretch_label)
        images, labels["augment"] = pipe(images, generator)
    elif mirror:
        turned = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device) < 0.5
        images = torch.where(turned, images.flip(-1), images)
    cond = None
    if conditional:
        cond = as_condition(images[:, 1:], batch["sensitivity"], scale_kbq)
        cond = cond if dose_channel else cond[:, :-1]
    return edm_loss(
        D, images[:, :1] / scale_kbq, generator, P_mean, P_std, cond, variance_weight=variance_weight, **labels
    )


def first_batch(m: Model, prepared: Prepared, count: int) -> dict[str, Tensor]:
    """What the network sees of training slices, by name: target and condition images (slice, 1, y, x)."""
    slices = training_slices(m, prepared)
    names = {"high": "full-dose MLEM", "activity": "activity"}
    at = [round(i * (len(slices) - 1) / max(1, count - 1)) for i in range(count)]
    batch = default_collate([slices[i] for i in at])
    shown = {label: batch[name] / m.scale_kbq for name, label in names.items() if name in batch}
    if m.task == "conditional":
        made = prepared.attrs["parameters"]["iterations"]
        cond = as_condition(batch["mlem"], batch["sensitivity"], m.scale_kbq)
        shown |= {f"MLEM, {k}": cond[:, i : i + 1] for i, k in enumerate(made)}
        shown |= {"dose": cond[:, -1:]} if m.dose_channel else {}
    return shown


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.pet.prior params.yaml
    main(TrainModel, train)
