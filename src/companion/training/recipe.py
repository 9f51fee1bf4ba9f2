"""One recipe for every prior: built from a config, trained on prepared data, saved with its record and card.

p = TrainPrior(...)                                         # a form: Training and what else the notebook asks
config = prior_config(...)                                  # what `architectures.build` takes
D = begin(config, p.seed, p.start_from, p.autocast, p.device)
result = fit(D, prior_loss, slices, p, config, p.pick("P_mean", "P_std"), log_every=50)
save(result, p, config, validation=errors)                  # <out>/checkpoint
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from companion.files import code_version, project_root
from companion.models.architectures import build, set_autocast
from companion.models.checkpoint import load
from companion.models.folder import save_checkpoint
from companion.parameters import Parameters, param, read_yaml
from companion.training.loop import TrainConfig, TrainResult, train


@dataclass(frozen=True)
class Training(Parameters):
    """What every notebook that trains asks for; a subclass adds the model, the data and the loss."""

    start_from: str | None = param(None, "checkpoint whose weights to begin with; none: random weights")
    steps: int = param(2000, "optimiser steps", minimum=1)
    batch_size: int = param(16, "items a step", minimum=1)
    grad_accumulation: int = param(1, "pieces a batch is cut into; processes share them", minimum=1)
    shard: bool = param(False, "weights and moments in shards, one a process (FSDP), where a GPU cannot hold all")
    learning_rate: float = param(5e-4, "highest learning rate", minimum=0)
    warmup: int = param(100, "steps of linear warm-up", minimum=0)
    ema_decay: float = param(0.998, "decay of the averaged weights", minimum=0, maximum=1)
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))
    seconds: float | None = param(None, "stop with a checkpoint after this long", minimum=0)
    checkpoint_every: int = param(100, "steps between checkpoints", minimum=1)

    def config(self, **others) -> TrainConfig:
        """The options of `training.loop.train`, half a cosine of learning rates unless `others` say otherwise.

        Not autocast, which denoisers handle themselves, see `begin`.
        """
        known = {field.name for field in fields(TrainConfig)} & {field.name for field in fields(Training)}
        mine = self.pick(*sorted(known - {"autocast"}))
        return TrainConfig(**{"schedule": "cosine", "channels_last": True} | mine | others)


@dataclass(frozen=True)
class UNetSize:
    """The part of a form that says how large a U-Net is."""

    model_channels: int = param(64, "width of the network", minimum=32)
    channel_mult: tuple[float, ...] = param((1, 2, 2), "relative width of each level, finest first")
    num_res_blocks: int = param(1, "residual blocks a level", minimum=1)
    patch: int = param(2, "side of the pixel-unshuffle stem", minimum=1)

    def unet(self, **others) -> dict:
        """The "network" of a config: a UNet of this size; `others` add to it or replace."""
        size = {
            "model_channels": self.model_channels,
            "num_res_blocks": self.num_res_blocks,
            "channel_mult": list(self.channel_mult),
            "patch": self.patch,
        }
        return {"name": "UNet", "num_heads": 4, "use_scale_shift_norm": True} | size | others


Form = TypeVar("Form", bound=Training)


def begin(
    config: Mapping, seed: int, start_from: str | nn.Module | None = None, autocast: str | None = None, device="auto"
) -> nn.Module:
    """The model of `config` to be trained on `device`: random weights of a seed, or those of a checkpoint or model."""
    torch.manual_seed(seed)
    D = build(config)
    if start_from is not None:
        start = start_from if isinstance(start_from, nn.Module) else load(start_from)
        D.load_state_dict(start.state_dict())
    return set_autocast(D, autocast, device)


def fit(
    model: nn.Module,
    loss: Callable,
    data,
    p: Training,
    config: Mapping,
    options: Mapping[str, object] | None = None,
    *,
    folder: Path | None = None,
    augment: Callable | None = None,
    validate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool = True,
    **loop,
) -> TrainResult:
    """The trained model; continues what `folder`, by default `p.out`, holds. torchrun's processes share the work.

    loss(model, batch, generator, **options) -> (batch,). config and options make the training what it is: a run that
    is continued must have the same. augment, validate: as for `training.loop.train`. loop: options of `TrainConfig`
    beside those of the form.
    """
    options = dict(options or {})
    return train(
        model,
        partial(loss, **options),
        data,
        p.config(**loop),
        folder or project_root() / p.out,
        about=dict(config) | options | {"start_from": p.start_from},
        augment=augment,
        validate=validate,
        progress=progress,
    )


def save(
    result: TrainResult,
    p: Training,
    config: Mapping,
    validation,
    *,
    unit: str = "images",
    batch_size: int | None = None,
    model: nn.Module | None = None,
    folder: Path | None = None,
) -> Path:
    """The folder, by default <out>/checkpoint, with the averaged weights in half precision, config, record and card.

    unit: what a batch is made of. model: what to save instead of all of result.ema. The trained model stays as it is.
    """
    record = {
        "parameters": asdict(p),
        "steps": result.step,
        unit: result.step * (batch_size or p.batch_size),
        "seconds": round(result.seconds),
        "loss": result.loss,
        "validation": validation,
        "code": code_version(),
    }
    half = copy.deepcopy(result.ema if model is None else model).half()
    return save_checkpoint(folder or project_root() / p.out / "checkpoint", half, config, record)


def main(form: type[Form], train: Callable[[Form], object]) -> None:
    """Train with the parameters of a YAML file: torchrun --nproc_per_node=4 -m companion.papers.X.prior FILE."""
    if len(sys.argv) != 2:
        raise SystemExit(f"give one file of parameters (those of {form.__name__}), got {sys.argv[1:]}")
    if torch.cuda.is_available():  # also for what a training does before it begins, say to encode its data
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    train(form(**read_yaml(sys.argv[1])))
