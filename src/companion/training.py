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

import copy
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from companion.runs import atomic_write

Loss = Callable[[torch.nn.Module, object, torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class TrainConfig:
    """Everything the loop needs to know. Same config, same data, same initial weights: same result."""

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
    ema_rampup: float | None = 0.05  # the half-life is at most this fraction of the images seen
    autocast: str | None = None  # "bfloat16": networks compute in it, weights and optimiser stay float32
    channels_last: bool = False  # memory layout of the convolutions; bf16 on CPUs wants it
    compile: bool = False  # torch.compile: a minute at the start, faster steps afterwards
    seed: int = 0  # of data order, augmentation, noise and dropout (initial weights are the caller's)
    device: str = "auto"  # auto: cuda if there is one, else cpu; torchrun: each process its own GPU
    workers: int = 0  # processes that load data; 0: the training process does
    seconds: float | None = None  # stop with a checkpoint after this much training, resumes included
    checkpoint_every: int = 500  # steps; also at the end
    log_every: int = 10  # steps per line of stats.jsonl

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        positive = (
            "steps",
            "batch_size",
            "grad_accumulation",
            "learning_rate",
            "checkpoint_every",
            "log_every",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name, allowed in {
            "optimiser": ("adamw", "adam"),
            "schedule": ("constant", "cosine"),
            "autocast": (None, "bfloat16"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {allowed}")
        if self.batch_size % self.grad_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into {self.grad_accumulation} equal pieces; "
                "make it a multiple of grad_accumulation"
            )
        if self.warmup and self.warmup >= self.steps:
            raise ValueError(f"warmup {self.warmup} does not end before the last of {self.steps} steps")

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


# What may differ between a checkpoint and the run that continues it: none of these changes the losses
# (another device changes them by rounding).
_FREE = {"seconds", "checkpoint_every", "log_every", "workers", "device"}


@dataclass(frozen=True)
class TrainResult:
    """What a training leaves: `model` (raw weights), `ema` (averaged weights, the ones to use), its record."""

    model: torch.nn.Module
    ema: torch.nn.Module
    folder: Path
    step: int  # optimiser steps done
    steps: int  # optimiser steps planned
    seconds: float  # spent training, resumes included
    loss: float  # mean since the last line of stats.jsonl (or of that line)

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    @property
    def stats(self) -> list[dict]:
        """The lines of stats.jsonl."""
        return _read_stats(self.folder / "stats.jsonl")


def derive(*keys: int) -> int:
    """A 64-bit seed from a tuple of non-negative integers; different tuples give unrelated seeds."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> torch.Tensor:
    """The order of the n items of a dataset in one epoch, a function of seed and epoch: (n,) int64."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive(seed, 1, epoch)))


class _Stream(Dataset):
    """The dataset as an endless stream: item i is the (i mod N)-th of epoch i // N, with its own generator."""

    def __init__(self, dataset, seed: int, augment=None):
        self.dataset, self.seed, self.augment = dataset, seed, augment

    def __getitem__(self, i: int):
        n = len(self.dataset)
        index = int(permutation(self.seed, i // n, n)[i % n])
        item = self.dataset[index]
        if self.augment is not None:
            item = self.augment(item, torch.Generator().manual_seed(derive(self.seed, 2, i)))
        for tensor in _tensors(item):
            if not torch.isfinite(torch.as_tensor(tensor)).all():
                raise ValueError(
                    f"item {index} of the training data holds NaN or infinity; repair or remove it "
                    "(nothing was overwritten)"
                )
        return item


def _tensors(item) -> Iterator:
    """The tensors and arrays inside an item or a batch: a tensor, or a tuple, list or dict of items."""
    if isinstance(item, (torch.Tensor, np.ndarray)):
        yield item
    elif isinstance(item, (tuple, list)):
        for part in item:
            yield from _tensors(part)
    elif isinstance(item, dict):
        yield from _tensors(list(item.values()))


def _to(batch, device):
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_to(value, device) for value in batch)
    return batch


# ----------------------------------------------------------------------------------------------------------
# Several processes


@contextmanager
def _processes(device: str) -> Iterator[tuple[int, int, torch.device]]:
    """(rank, number of processes, device) of this process; joins the others when torchrun started it."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    joined = world > 1 and not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield rank, world, device
    finally:
        if joined:
            dist.destroy_process_group()


def _flat_gradients(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """One vector whose slices are the gradients of all parameters.

    Zeroing, summing over processes, measuring and clipping the gradient are then one line each. This
    replaces DistributedDataParallel: losses may call any method of the model, and unused parameters are no
    special case.
    """
    if len({(p.dtype, p.device) for p in parameters}) != 1:
        kinds = sorted({f"{p.dtype} on {p.device}" for p in parameters})
        raise ValueError(
            f"the trainable parameters must be of one kind, not {', '.join(kinds)}; convert them"
        )
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
    for p, part in zip(parameters, flat.split(sizes), strict=True):
        p.grad = part.as_strided(p.shape, p.stride())
    return flat


# ----------------------------------------------------------------------------------------------------------
# Checkpoints: one safetensors file, tensors named model.*, ema.*, optimiser.<parameter>.<quantity>;
# everything else is JSON in its header


def _save_state(path: Path, model, ema, optimiser, record: dict) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.state_dict().items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    try:
        with atomic_write(path) as aside:
            save_file(tensors, aside, metadata={"record": json.dumps(record)})
            aside.chmod(0o644)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the checkpoint {path} could not be written ({error}); the previous one is untouched. "
            "Free some space and start the same training again: it resumes."
        ) from error


def _read_record(path: Path) -> dict:
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["record"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no training checkpoint ({error}); delete it to start afresh") from error


def _load_state(path: Path, model, ema, optimiser) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for prefix, module in (("model.", model), ("ema.", ema)):
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        module.load_state_dict(own)
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    state: dict[int, dict] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, i, quantity = name.split(".", 2)
            if value.shape == parameters[int(i)].shape:  # moments lie in memory as their parameter does
                value = torch.empty_like(parameters[int(i)], dtype=value.dtype).copy_(value)
            state.setdefault(int(i), {})[quantity] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _signature(config: TrainConfig, model, dataset, about) -> dict:
    """What a checkpoint must agree on with the run that continues it; JSON."""
    fields = {f"config.{k}": v for k, v in asdict(config).items() if k not in _FREE}
    if config.schedule == "constant":
        del fields["config.steps"]  # a constant rate may go on for longer
    fields |= {f"model.{k}": list(v.shape) for k, v in model.state_dict().items()}
    fields |= {f"about.{k}": v for k, v in (about or {}).items()}
    return json.loads(json.dumps(fields | {"dataset length": len(dataset)}))


def _check_same(saved: dict, ours: dict, path: Path) -> None:
    absent = "(absent)"
    differ = [k for k in saved | ours if saved.get(k, absent) != ours.get(k, absent)]
    if differ:
        lines = [f"  {k}: {saved.get(k, absent)} there, {ours.get(k, absent)} here" for k in differ[:8]]
        lines += [f"  and {len(differ) - 8} more"] if len(differ) > 8 else []
        advice = "Use another folder, or delete this one."
        raise ValueError("\n".join([f"{path} belongs to another training:", *lines, advice]))


# ----------------------------------------------------------------------------------------------------------
# The log: stats.jsonl, TensorBoard, progress bar


def _read_stats(path: Path) -> list[dict]:
    """The whole lines of a stats.jsonl; a line cut by a kill is dropped."""
    stats = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            stats.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return stats


class _Log:
    """Writes the lines of one run; begins by forgetting what was written after the checkpoint."""

    def __init__(self, folder: Path, step: int, config: TrainConfig, progress: bool):
        self.path = folder / "stats.jsonl"
        kept = [line for line in _read_stats(self.path) if line["step"] <= step]
        with atomic_write(self.path) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.path, "a")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board = None
            print("tensorboard is not installed: stats.jsonl only (pip install tensorboard)", file=sys.stderr)
        else:
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.bar = tqdm(total=config.steps, initial=step, unit="step", disable=not progress)

    def write(self, line: dict) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in line.items():
            if self.board and name not in ("step", "eta"):
                self.board.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        """To disk, so that a checkpoint is never ahead of its log."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()
        self.bar.close()
        if self.board:
            self.board.close()


class _Silent:
    """The log of the processes other than the first."""

    def __init__(self):
        self.bar = tqdm(disable=True)

    def write(self, line):
        pass

    sync = close = lambda self: None


def _memory(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU when there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ----------------------------------------------------------------------------------------------------------
# The loop


def train(
    model: torch.nn.Module,
    loss_fn: Loss,
    dataset,
    config: TrainConfig,
    folder: str | os.PathLike,
    *,
    augment: Callable | None = None,
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
    with _processes(config.device) as (rank, world, device), torch.random.fork_rng(devices=_cuda(device)):
        if config.grad_accumulation % world:
            raise ValueError(
                f"grad_accumulation {config.grad_accumulation} pieces cannot be shared by {world} processes; "
                f"set it to a multiple of {world}"
            )
        folder = Path(folder)
        path = folder / "state.safetensors"
        signature = _signature(config, model, dataset, about)

        model = _laid_out(model.to(device).train(), config.channels_last)
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradient = _flat_gradients(parameters)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimiser]
        optimiser = kind(parameters, config.learning_rate, config.betas, weight_decay=config.weight_decay)

        # step: optimiser steps done; loss_sum: of the `count` steps since the last line of the log
        record = {"step": 0, "seconds": 0.0, "loss_sum": 0.0, "count": 0, "loss": math.nan}
        if path.exists():
            saved = _read_record(path)
            _check_same(saved["signature"], signature, path)
            record = {key: saved[key] for key in record}
            _load_state(path, model, ema, optimiser)
        elif world > 1:  # everybody starts from the first process's weights
            for tensor in [*model.state_dict().values(), *ema.state_dict().values()]:
                dist.broadcast(tensor, 0)

        def result() -> TrainResult:
            return TrainResult(
                model, ema, folder, record["step"], config.steps, record["seconds"], record["loss"]
            )

        def out_of_time() -> bool:
            return config.seconds is not None and record["seconds"] >= config.seconds

        if record["step"] >= config.steps or out_of_time():
            return result()

        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left_by_a_kill in folder.glob(".state.*.safetensors"):
                left_by_a_kill.unlink()
            log = _Log(folder, record["step"], config, progress)
        else:
            log = _Silent()
        network = torch.compile(model) if config.compile else model
        autocast = (
            torch.autocast(device.type, getattr(torch, config.autocast)) if config.autocast else nullcontext()
        )
        pieces = _pieces(_Stream(dataset, config.seed, augment), config, record["step"], rank, world)
        piece_size = config.batch_size // config.grad_accumulation
        earlier, start, done = record["seconds"], time.monotonic(), record["step"]
        try:
            while record["step"] < config.steps and not out_of_time():
                step = record["step"]

                # Loss and gradient: the sum over the pieces of the batch, whoever computes them
                gradient.zero_()
                loss = torch.zeros((), dtype=torch.float64, device=device)
                for piece in range(rank, config.grad_accumulation, world):
                    batch = _to(next(pieces), device)
                    torch.manual_seed(derive(config.seed, 3, step, piece))  # dropout
                    generator = torch.Generator(device).manual_seed(derive(config.seed, 4, step, piece))
                    with autocast:
                        losses = loss_fn(network, batch, generator)
                    if losses.shape != (piece_size,):
                        raise ValueError(
                            f"the loss has shape {tuple(losses.shape)}; "
                            f"expected one value per sample, ({piece_size},)"
                        )
                    piece_loss = losses.sum() / config.batch_size
                    piece_loss.backward()
                    loss += piece_loss.detach()
                if world > 1:
                    dist.all_reduce(gradient)
                    dist.all_reduce(loss)
                norm = gradient.norm()
                loss, norm_value = torch.stack([loss, norm.double()]).tolist()
                if not (math.isfinite(loss) and math.isfinite(norm_value)):
                    raise FloatingPointError(
                        f"step {step}: the loss is {loss} and the gradient norm {norm_value}. Weights and "
                        "checkpoint are as they were; lower learning_rate, lengthen warmup or look at the data."
                    )
                if config.clip_norm is not None and norm_value > config.clip_norm:
                    gradient.mul_(config.clip_norm / norm_value)

                # Step and average
                for group in optimiser.param_groups:
                    group["lr"] = config.rate(step)
                optimiser.step()
                _update_ema(ema, model, config.ema_beta(step))

                # Book-keeping
                record["step"] = step = step + 1
                record["seconds"] = _agreed(earlier + time.monotonic() - start, device, world)
                record["loss_sum"] += loss
                record["count"] += 1
                last = step == config.steps or out_of_time()
                if step % config.log_every == 0 or last:
                    record["loss"] = record["loss_sum"] / record["count"]
                    record["loss_sum"], record["count"] = 0.0, 0
                    speed = (step - done) / (record["seconds"] - earlier)
                    log.write(
                        {
                            "step": step,
                            "images": step * config.batch_size,
                            "loss": record["loss"],
                            "lr": config.rate(step - 1),
                            "grad_norm": norm_value,
                            "seconds": round(record["seconds"], 3),
                            "images_per_second": round(speed * config.batch_size, 2),
                            "eta": round((config.steps - step) / speed, 1),
                            "memory": round(_memory(device), 3),
                        }
                    )
                    log.bar.set_postfix(loss=f"{record['loss']:.4g}", lr=f"{config.rate(step - 1):.1e}")
                log.bar.update()
                if step % config.checkpoint_every == 0 or last:
                    if rank == 0:
                        if validate is not None:
                            with torch.no_grad():
                                log.write({"step": step} | {k: float(v) for k, v in validate(ema).items()})
                        log.sync()
                        _save_state(path, model, ema, optimiser, record | {"signature": signature})
                    if world > 1:
                        dist.barrier()
        finally:
            log.close()
            for p in parameters:
                p.grad = None
        return result()


def _pieces(stream: _Stream, config: TrainConfig, step: int, rank: int, world: int) -> Iterator:
    """The pieces of the batches that belong to this process, from `step` on, for ever."""
    size = config.batch_size // config.grad_accumulation

    def indices():
        for s in range(step, config.steps):
            for piece in range(rank, config.grad_accumulation, world):
                first = s * config.batch_size + piece * size
                yield range(first, first + size)

    return iter(
        DataLoader(
            stream,
            batch_sampler=indices(),
            num_workers=config.workers,
            collate_fn=default_collate,
            generator=torch.Generator(),  # its own, so that the global one is left alone
        )
    )


@torch.no_grad()
def _update_ema(ema: torch.nn.Module, model: torch.nn.Module, beta: float) -> None:
    """ema <- beta ema + (1 - beta) model for parameters; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - beta)
    for averaged, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        averaged.copy_(buffer)


def _laid_out(model: torch.nn.Module, channels_last: bool) -> torch.nn.Module:
    """The model with the weights of its 2D and 3D convolutions in channels-last order, if asked for."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
    for p in model.parameters():
        if p.ndim in formats:
            p.data = p.data.contiguous(memory_format=formats[p.ndim])
    return model


def _agreed(seconds: float, device: torch.device, world: int) -> float:
    """The first process's clock, so that all stop at the same step."""
    if world > 1:
        clock = torch.tensor(seconds, dtype=torch.float64, device=device)
        dist.broadcast(clock, 0)
        return float(clock)
    return seconds


def _cuda(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
