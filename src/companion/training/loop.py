"""One training loop for every model: EMA, mixed precision, several processes, exact resume.

No random state is stored. The order of the data, the augmentations, the noise of the loss and the dropout
are functions of (seed, position in the run). So a run that was killed and started again repeats, bit for bit
on a CPU, the losses of the uninterrupted one, and two processes do what one does, to rounding.

    def loss(model, batch, generator):              # -> (batch,), one value per sample
        return edm_loss(model, batch, generator)

    result = train(D, loss, slices, TrainConfig(steps=4000, batch_size=16), "runs/aid/train/demo")
    result.ema(x, sigma)

Start it with `python` for one process and with `torchrun --nproc_per_node=4` for four; nothing else changes.
"""

from __future__ import annotations

import atexit
import copy
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from companion.files import atomic_write
from companion.parameters import autocast_dtype, check


@dataclass(frozen=True)
class TrainConfig:
    """Everything the loop needs to know. Same config, data and initial weights: same result."""

    steps: int = 1000  # optimiser steps; the schedule ends here
    batch_size: int = 16  # images per optimiser step, over all processes
    grad_accumulation: int = 1  # pieces of a batch; the processes share them, so a multiple of their number
    optimiser: str = "adamw"  # adamw | adam (weight_decay is then the L2 penalty)
    learning_rate: float = 1e-4  # the highest, reached after the warm-up
    warmup: int = 0  # steps of linear warm-up
    warmup_from: float = 0.05  # the warm-up starts at this fraction of learning_rate
    schedule: str = "constant"  # constant | cosine, after the warm-up
    final_fraction: float = 0.02  # cosine ends at this fraction of learning_rate
    betas: tuple[float, float] = (0.9, 0.999)  # decay of Adam's first and second moments
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0  # gradients longer than this are shortened to it; None: never
    ema_decay: float = 0.999  # decay per step of the averaged weights, unless ema_halflife is given
    ema_halflife: float | None = None  # in images: batch-size independent, ramps up from 0 (see ema_rampup)
    ema_rampup: float | None = 0.05  # the half-life is at most this fraction of the images seen; None: no ramp
    autocast: str | None = None  # "bfloat16", or "auto" (where it is fast): networks compute in it, weights do not
    channels_last: bool = False  # memory layout of the convolutions; bf16 on CPUs wants it
    compile: bool = False  # torch.compile: a minute at the start, faster steps afterwards
    seed: int = 0  # of data order, augmentation, noise and dropout (initial weights are the caller's)
    device: str = "auto"  # auto: cuda if there is one, else cpu; torchrun: each process its own GPU
    workers: int = 0  # processes that load data; 0: the training process does
    seconds: float | None = None  # stop with a checkpoint after this much training, resumes included
    checkpoint_every: int = 500  # steps; also at the end
    log_every: int = 10  # steps per line of stats.jsonl
    shard: bool = False  # weights, gradients and moments in shards, one a process (FSDP), where one GPU cannot hold all
    patience: float = 600.0  # seconds that processes wait for one another before all give up

    def __post_init__(self):
        for name, value in check(type(self), asdict(self)).items():
            object.__setattr__(self, name, value)
        positive = [
            "steps",
            "batch_size",
            "grad_accumulation",
            "learning_rate",
            "checkpoint_every",
            "log_every",
            "patience",
        ]
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        choices = {
            "optimiser": _OPTIMISERS,
            "schedule": ("constant", "cosine"),
            "autocast": (None, "auto", "bfloat16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {list(allowed)}")
        if self.batch_size % self.grad_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into {self.grad_accumulation} equal pieces; "
                "make it a multiple of grad_accumulation"
            )
        if self.warmup and self.warmup >= self.steps:
            raise ValueError(f"warmup {self.warmup} does not end before the last of {self.steps} steps")

    @property
    def piece_size(self) -> int:
        """Images per forward pass."""
        return self.batch_size // self.grad_accumulation

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ...: linear warm-up, then constant or half a cosine."""
        if step < self.warmup:
            return self.learning_rate * (self.warmup_from + (1 - self.warmup_from) * step / self.warmup)
        if self.schedule == "constant":
            return self.learning_rate
        progress = min((step - self.warmup) / (self.steps - self.warmup), 1.0)
        fraction = self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * fraction

    def ema_beta(self, step: int) -> float:
        """The weight of the old average in step 0, 1, ...

        Half-life: beta = 0.5^(batch / h), h = min(ema_halflife, ema_rampup * images seen before the step), as
        in Karras et al. 2022; the first step gives 0, so that the average forgets the initial weights.
        """
        if self.ema_halflife is None:
            return self.ema_decay
        halflife = self.ema_halflife
        if self.ema_rampup is not None:
            halflife = min(halflife, self.ema_rampup * step * self.batch_size)
        return 0.5 ** (self.batch_size / max(halflife, 1e-8))


LEFT_BY_A_KILL = (".state.*.safetensors", ".stats.*.jsonl", ".tmp??????")  # the last: safetensors' own
_OPTIMISERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}

# What may differ between a checkpoint and the run that continues it: none of these changes the losses
# (another device, or shards, change them by rounding).
_FREE = {"seconds", "checkpoint_every", "log_every", "workers", "device", "shard", "patience"}


@dataclass(frozen=True)
class TrainResult:
    """What a training leaves: `model` (raw weights), `ema` (averaged weights, the ones to use), a record."""

    model: torch.nn.Module
    ema: torch.nn.Module
    folder: Path
    step: int  # optimiser steps done
    steps: int  # optimiser steps planned
    seconds: float  # spent training, resumes included
    loss: float  # as in the last line of stats.jsonl

    @property
    def finished(self) -> bool:
        """Whether all planned steps are done; False when the time was up before."""
        return self.step >= self.steps

    @property
    def stats(self) -> list[dict]:
        """The lines of stats.jsonl."""
        return _read_stats(self.folder / "stats.jsonl")

    def curve(self, points: int = 60) -> tuple[list[float], list[float]]:
        """(items seen, mean loss) in about so many pieces of the log, for `figures.curves`."""
        lines = [line for line in self.stats if "loss" in line]
        width = max(1, len(lines) // points)
        pieces = [lines[i : i + width] for i in range(0, len(lines), width)]
        means = [sum(line["loss"] for line in piece) / len(piece) for piece in pieces]
        return [piece[-1]["images"] for piece in pieces], means


def train(
    model: torch.nn.Module,
    loss_fn: Callable[[torch.nn.Module, Any, torch.Generator], torch.Tensor],
    dataset,
    config: TrainConfig,
    folder: str | os.PathLike,
    *,
    augment: Callable[[Any, torch.Generator], Any] | None = None,
    validate: Callable[[torch.nn.Module], dict[str, float]] | None = None,
    about: dict | None = None,
    progress: bool = True,
) -> TrainResult:
    """The trained model and its averaged weights; continues the training that `folder` holds, if any.

    model: its float32 weights are trained in place.
    loss_fn(model, batch, generator) -> (batch,): one loss per sample; noise comes from `generator` only.
    dataset: anything with `len` and `[i]` giving a tensor, or a tuple or dict of tensors, without batch axis.
    augment(item, generator) -> item: random augmentation, drawn from `generator` only.
    validate(ema) -> {"name": number}: called before each checkpoint; its numbers go to the log.
    about: JSON-able facts that make this training what it is (network options, loss settings, data hash); a
        checkpoint with other facts is refused.

    `folder` receives state.safetensors (everything to continue), stats.jsonl and tensorboard/. A finished
    training returns at once.

    Raises ValueError for data with NaN, a loss of the wrong shape, or a checkpoint of another training;
    FloatingPointError when loss or gradient stop being finite, OSError when the disk is full (the last
    checkpoint stays).
    """
    if len(dataset) == 0:
        raise ValueError("the training data are empty")
    folder, path = Path(folder), Path(folder) / "state.safetensors"
    here = _processes(config.device, config.patience)
    with torch.random.fork_rng([here.device] if here.cuda else []):
        if config.grad_accumulation % here.world:
            raise ValueError(
                f"grad_accumulation {config.grad_accumulation} pieces cannot be shared by {here.world} "
                f"processes; set it to a multiple of {here.world}"
            )
        state = _state_of(config, here)(model, config, here)
        signature = _signature(config, model, dataset, about)
        if path.exists():
            state.load(path, signature)
        if state.done(config):
            return state.result(folder, config)

        if config.compile:
            _compile(model)
        pieces = _pieces(_Stream(dataset, config.seed, augment), config, state.step, here)
        log = _Log(folder, state, config, progress and here.first) if here.first else None
        before, start = state.seconds, time.monotonic()
        try:
            while not state.done(config):
                loss = _loss_and_gradient(state, loss_fn, pieces, config, here)
                norm = state.norm(here)
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise FloatingPointError(
                        f"step {state.step}: the loss is {loss} and the gradient norm {norm}. Weights and "
                        "checkpoint are untouched; lower learning_rate, lengthen warmup, or look at the data."
                    )
                if config.clip_norm is not None and norm > config.clip_norm:
                    state.scale(config.clip_norm / norm)
                state.update(config)
                state.count(loss, here.agree(before + time.monotonic() - start))

                last = state.done(config)
                if log and (state.step % config.log_every == 0 or last):
                    log.progress(state, config, norm, here)
                if state.step % config.checkpoint_every == 0 or last:
                    state.gather()
                    if log:
                        if validate is not None:
                            with torch.no_grad():
                                log.write({"step": state.step} | validate(state.ema))
                        log.sync()
                        state.save(path, signature)
                    here.wait()
        finally:
            state.release()
            if log:
                log.close()
        return state.result(folder, config)


def _loss_and_gradient(state: _State, loss_fn, pieces: Iterator, config: TrainConfig, here: _Here) -> float:
    """The mean loss of the next batch, its gradient left in the state; each process does its pieces."""
    state.zero()
    total = torch.zeros((), dtype=torch.float64, device=here.device)
    dtype = autocast_dtype(config.autocast, here.device)
    autocast = nullcontext() if dtype is None else torch.autocast(here.device.type, dtype)
    for piece in range(here.rank, config.grad_accumulation, here.world):
        batch = _to(next(pieces), here.device)
        torch.manual_seed(derive(config.seed, 3, state.step, piece))  # dropout
        generator = torch.Generator(here.device).manual_seed(derive(config.seed, 4, state.step, piece))
        with autocast:
            losses = loss_fn(state.model, batch, generator)
        if losses.shape != (config.piece_size,):
            raise ValueError(
                f"the loss has shape {tuple(losses.shape)}; expected ({config.piece_size},), one per sample"
            )
        loss = losses.sum() / config.batch_size
        loss.backward()
        total += loss.detach()
    state.collect(here)
    here.add(total)
    return total.item()


# ----------------------------------------------------------------------------------------------------------
# What is trained


class _State:
    """Model, averaged model, optimiser and the record of the run: what a checkpoint holds.

    On disk it is one safetensors file, with tensors model.*, ema.*, optimiser.<parameter>.<quantity> and all
    else as JSON in its header.
    """

    def __init__(self, model: torch.nn.Module, config: TrainConfig, here: _Here):
        self.model = model.to(here.device).train()
        for tensor in model.state_dict().values():
            here.share(tensor)
        if config.channels_last:
            _channels_last(model)
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradient = _flat_gradient(self.parameters)
        self.optimiser = _OPTIMISERS[config.optimiser](
            self.parameters, config.learning_rate, config.betas, weight_decay=config.weight_decay
        )
        # loss_sum: of the `count` steps since the last line of the log; loss: their mean in that line
        self.record = {"step": 0, "seconds": 0.0, "loss_sum": 0.0, "count": 0, "loss": math.nan}

    def zero(self) -> None:
        """Begin a new gradient."""
        self.gradient.zero_()

    def collect(self, here: _Here) -> None:
        """Sum the gradient over the processes."""
        here.add(self.gradient)

    def norm(self, here: _Here) -> float:
        """The length of the gradient."""
        return self.gradient.norm().item()

    def scale(self, factor: float) -> None:
        """Multiply the gradient."""
        self.gradient.mul_(factor)

    def gather(self) -> None:
        """Put together what lies in shards, for a checkpoint: here nothing does."""

    step = property(lambda self: self.record["step"])
    seconds = property(lambda self: self.record["seconds"])

    def done(self, config: TrainConfig) -> bool:
        out_of_time = config.seconds is not None and self.seconds >= config.seconds
        return self.step >= config.steps or out_of_time

    def update(self, config: TrainConfig) -> None:
        """One step of the optimiser, one of the average."""
        for group in self.optimiser.param_groups:
            group["lr"] = config.rate(self.step)
        self.optimiser.step()
        update_ema(self.ema, self.model, config.ema_beta(self.step))

    def count(self, loss: float, seconds: float) -> None:
        r = self.record
        r["step"], r["seconds"] = r["step"] + 1, seconds
        r["loss_sum"], r["count"] = r["loss_sum"] + loss, r["count"] + 1

    def mean_loss(self) -> float:
        """The mean loss since the last call."""
        r = self.record
        r["loss"], r["loss_sum"], r["count"] = r["loss_sum"] / r["count"], 0.0, 0
        return r["loss"]

    def release(self) -> None:
        """Leaves the models as a user wants them: for evaluation, without gradients lying about."""
        self.model.eval()
        for p in self.parameters:
            p.grad = None

    def result(self, folder: Path, config: TrainConfig) -> TrainResult:
        self.release()
        return TrainResult(self.model, self.ema, folder, self.step, config.steps, self.seconds, self.record["loss"])

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds, by name."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for i, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{k}": torch.as_tensor(v) for k, v in moments.items()}
        return tensors

    def save(self, path: Path, signature: dict) -> None:
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in self.tensors().items()}
        record = json.dumps(self.record | {"signature": signature})
        with _writing(path), atomic_write(path) as aside:
            save_file(tensors, aside, metadata={"record": record})
            aside.chmod(0o644)

    def load(self, path: Path, signature: dict) -> None:
        try:
            with safe_open(path, "pt") as file:
                record = json.loads(file.metadata()["record"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no training checkpoint ({error}); delete it to start afresh") from error
        _check_same(record["signature"], signature, path)
        self.record = {key: record[key] for key in self.record}

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        moments: dict[int, dict] = {}
        for name, value in part("optimiser.").items():
            i, quantity = name.split(".", 1)
            moments.setdefault(int(i), {})[quantity] = value
        self.restore(part("model."), part("ema."), moments)

    def restore(self, model: dict, ema: dict, moments: dict[int, dict[str, torch.Tensor]]) -> None:
        """Go on from the weights, averages and moments of a checkpoint."""
        self.model.load_state_dict(model)
        self.ema.load_state_dict(ema)
        for i, quantities in moments.items():
            p = self.parameters[i]
            for quantity, value in quantities.items():
                if value.shape == p.shape:  # lies in memory as its parameter does, for the same rounding
                    quantities[quantity] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        self.resume(moments)

    def resume(self, moments: dict[int, dict[str, torch.Tensor]]) -> None:
        """Give the optimiser its moments."""
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says what to do when `path` cannot be written, as on a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written ({error}); the last checkpoint is untouched. "
            "Free some space and start the same training again: it resumes."
        ) from error


def _state_of(config: TrainConfig, here: _Here) -> type[_State]:
    if not config.shard or here.world == 1:
        return _State
    from companion.training.sharding import ShardedState  # here: it needs this module

    return ShardedState


def _flat_gradient(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """One vector whose slices are the gradients of all parameters.

    Zeroing, summing over processes, measuring and clipping the gradient are then one line each. This replaces
    DistributedDataParallel: losses may call any method of the model, and unused parameters are no special
    case (their gradient is 0).
    """
    kinds = sorted({f"{p.dtype} on {p.device}" for p in parameters})
    if len(kinds) != 1:
        raise ValueError(f"the trainable parameters must be of one kind, not {kinds}; convert the model")
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
    for p, part in zip(parameters, flat.split(sizes), strict=True):
        p.grad = part.as_strided(p.shape, p.stride())
    return flat


@torch.no_grad()
def update_ema(ema: torch.nn.Module, model: torch.nn.Module, beta: float) -> None:
    """ema <- beta ema + (1 - beta) model for parameters; buffers are copied."""
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
        list(ema.parameters()), list(model.parameters()), 1 - beta
    )
    for averaged, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        averaged.copy_(buffer)


def _channels_last(model: torch.nn.Module) -> None:
    """Lays the weights of 2D and 3D convolutions out in channels-last order."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for p in model.parameters():
        if p.ndim in formats:
            p.data = p.data.contiguous(memory_format=formats[p.ndim])


def _compile(model: torch.nn.Module) -> None:
    """Compiles, in place, the network inside a denoiser: losses call it, and not the denoiser's forward."""
    _inner(model).compile()


def _inner(model: torch.nn.Module) -> torch.nn.Module:
    """The network inside a denoiser, the model itself where it is none."""
    while (inner := getattr(model, "D", getattr(model, "network", None))) is not None:
        model = inner
    return model


def _signature(config: TrainConfig, model: torch.nn.Module, dataset, about: dict | None) -> dict:
    """What a checkpoint must agree on with the run that continues it; JSON."""
    signature = {f"config.{k}": v for k, v in asdict(config).items() if k not in _FREE}
    if config.schedule == "constant":
        del signature["config.steps"]  # a constant rate may go on for longer
    signature |= {f"model.{k}": list(v.shape) for k, v in model.state_dict().items()}
    signature |= {f"about.{k}": v for k, v in (about or {}).items()}
    return json.loads(json.dumps(signature | {"dataset length": len(dataset)}))


def _check_same(saved: dict, ours: dict, path: Path) -> None:
    """Raises ValueError with the fields in which two signatures differ."""
    absent = "(absent)"
    new = {f"config.{f.name}": f.default for f in fields(TrainConfig)}  # options younger than the checkpoint
    saved = {k: v for k, v in new.items() if k in ours} | saved
    differ = [k for k in saved | ours if saved.get(k, absent) != ours.get(k, absent)]
    if differ:
        lines = [f"  {k}: {saved.get(k, absent)} there, {ours.get(k, absent)} here" for k in differ[:8]]
        lines += [f"  and {len(differ) - 8} more"] if len(differ) > 8 else []
        advice = "Use another folder, or delete this one."
        raise ValueError("\n".join([f"{path} belongs to another training:", *lines, advice]))


# ----------------------------------------------------------------------------------------------------------
# Data: a stream whose i-th item depends on seed and i alone


def derive(*keys: int) -> int:
    """A 64-bit seed from a tuple of non-negative integers; different tuples give unrelated seeds."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> torch.Tensor:
    """The order of the n items of a dataset in one epoch, a function of seed and epoch: (n,) int64."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive(seed, 1, epoch)))


class _Stream(Dataset):
    """The dataset as an endless stream: item i is number i mod N of epoch i // N, with its own generator."""

    def __init__(self, dataset, seed: int, augment=None):
        self.dataset, self.seed, self.augment = dataset, seed, augment

    def __getitem__(self, i: int):
        n = len(self.dataset)
        index = int(permutation(self.seed, i // n, n)[i % n])
        item = self.dataset[index]
        if not _finite(item):
            raise ValueError(
                f"item {index} of the training data holds NaN or infinity; repair it or leave it out "
                "(the last checkpoint is untouched)"
            )
        if self.augment is not None:
            item = self.augment(item, torch.Generator().manual_seed(derive(self.seed, 2, i)))
        return item


def _pieces(stream: _Stream, config: TrainConfig, step: int, here: _Here) -> Iterator:
    """The pieces of the batches that belong to this process, from `step` on."""

    def indices() -> Iterator[list[int]]:
        for s in range(step, config.steps):
            for piece in range(here.rank, config.grad_accumulation, here.world):
                first = s * config.batch_size + piece * config.piece_size
                yield list(range(first, first + config.piece_size))

    own = torch.Generator()  # so that the loader leaves the global one alone
    return iter(
        DataLoader(
            stream,
            batch_sampler=indices(),
            num_workers=config.workers,
            collate_fn=default_collate,
            generator=own,
        )
    )


def _finite(item) -> bool:
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, (tuple, list)):
        return all(map(_finite, item))
    return bool(torch.isfinite(item).all() if isinstance(item, torch.Tensor) else np.isfinite(item).all())


def _to(batch, device: torch.device):
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_to(value, device) for value in batch]
    return batch.to(device, non_blocking=True)


# ----------------------------------------------------------------------------------------------------------
# Several processes


class _Here(NamedTuple):
    """This process among those that train together; with one process, all methods do nothing."""

    rank: int
    world: int
    device: torch.device

    first = property(lambda self: self.rank == 0)
    cuda = property(lambda self: self.device.type == "cuda")

    def add(self, *tensors: torch.Tensor) -> None:
        """Replaces tensors by their sums over the processes."""
        for tensor in tensors if self.world > 1 else ():
            dist.all_reduce(tensor)

    def share(self, tensor: torch.Tensor) -> None:
        """Replaces a tensor by the first process's."""
        if self.world > 1:
            dist.broadcast(tensor, 0)

    def agree(self, seconds: float) -> float:
        """The first process's clock, so that all stop at the same step."""
        clock = torch.tensor(seconds, dtype=torch.float64, device=self.device if self.world > 1 else "cpu")
        self.share(clock)
        return clock.item()

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


def _processes(device: str, patience: float) -> _Here:
    """This process; joins the others when torchrun started several, and gives a silent one up after `patience` s."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    here = _Here(rank, world, torch.device(device))
    if here.cuda:
        torch.cuda.set_device(here.device)
    if world > 1 and not dist.is_initialized():  # once a process, however many trainings
        _join("nccl" if here.cuda else "gloo", rank, world, timedelta(seconds=patience))
        atexit.register(dist.destroy_process_group)
    return here


def _join(backend: str, rank: int, world: int, patience: timedelta) -> None:
    """Meet the other processes, each attempt of torchrun apart.

    torchrun keeps one store over its restarts, in which the addresses of the killed processes still are: those who
    read them would wait for the dead.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=patience)
        return
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, world, is_master=False, timeout=patience)
    attempt = f"companion/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    dist.init_process_group(backend, store=PrefixStore(attempt, store), rank=rank, world_size=world, timeout=patience)


# ----------------------------------------------------------------------------------------------------------
# The log: stats.jsonl, TensorBoard, progress bar


class _Log:
    """Writes the log of a run; begins by forgetting what is younger than the checkpoint."""

    def __init__(self, folder: Path, state: _State, config: TrainConfig, progress: bool):
        folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in (path for kind in LEFT_BY_A_KILL for path in folder.glob(kind)):
            left_by_a_kill.unlink()
        self.path = folder / "stats.jsonl"
        kept = [line for line in _read_stats(self.path) if line["step"] <= state.step]
        with _writing(self.path), atomic_write(self.path) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.path, "ab", buffering=0)
        self.began = state.step, state.seconds
        self.bar = tqdm(total=config.steps, initial=state.step, unit="step", disable=not progress)
        self.board = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            tqdm.write("No TensorBoard events: pip install tensorboard to have them.", file=sys.stderr)
        else:
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=state.step + 1)

    def progress(self, state: _State, config: TrainConfig, norm: float, here: _Here) -> None:
        """One line of numbers; moves the bar."""
        step, seconds = state.step, state.seconds
        speed = (step - self.began[0]) / max(seconds - self.began[1], 1e-9)
        line = {
            "step": step,
            "images": step * config.batch_size,
            "loss": state.mean_loss(),
            "lr": config.rate(step - 1),
            "grad_norm": norm,
            "seconds": round(seconds, 3),
            "images_per_second": round(speed * config.batch_size, 2),
            "eta": round((config.steps - step) / speed, 1),  # seconds
            "memory": round(_memory(here), 3),  # GiB
        }
        self.write(line)
        self.bar.set_postfix(loss=f"{line['loss']:.4g}", lr=f"{line['lr']:.1e}", refresh=False)
        self.bar.update(step - self.bar.n)

    def write(self, line: dict) -> None:
        with _writing(self.path):
            self.file.write((json.dumps(line, default=float) + "\n").encode())
            for name, value in line.items():
                if self.board and name != "step":
                    self.board.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        """To disk, so that a checkpoint is never ahead of its log."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        self.bar.close()
        if self.board:
            with suppress(OSError):  # a full disk: reported where the log or the checkpoint met it
                self.board.close()


def _read_stats(path: Path) -> list[dict]:
    """The whole lines of a stats.jsonl; a line cut by a kill is dropped."""
    stats = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            stats.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return stats


def _memory(here: _Here) -> float:
    """Peak memory in GiB: of the GPU when there is one, else of the process."""
    if here.cuda:
        return torch.cuda.max_memory_allocated(here.device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
