"""A training of a second, for test_training.py and the processes that it starts.

tiny_training.py plain FOLDER    the training of CONFIG (under torchrun: in several processes)
tiny_training.py kills FOLDER    FOLDER/quiet undisturbed, FOLDER/killed with ten kill -9 at random moments
"""

import multiprocessing
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from companion.training.loop import TrainConfig, train

DATA = torch.randn(29, 1, 8, 8, generator=torch.Generator().manual_seed(0))
CONFIG = TrainConfig(
    steps=12,
    batch_size=8,
    grad_accumulation=2,
    learning_rate=1e-2,
    warmup=3,
    schedule="cosine",
    ema_halflife=50,
    channels_last=True,
    checkpoint_every=5,
    log_every=1,
    device="cpu",
)


def new_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(12, 1, 3, padding=1))


def loss(model, x, generator):
    noise = torch.randn(x.shape, generator=generator)
    return ((model(x + noise) - x) ** 2).flatten(1).mean(1)


def augment(x, generator):
    return x.flip(-1) if torch.rand((), generator=generator) < 0.5 else x


def plain(folder: Path, config: TrainConfig = CONFIG) -> None:
    train(new_model(), loss, DATA, config, folder, augment=augment, progress=False)


def kills(folder: Path) -> None:
    """Each attempt is a process of its own, killed after one to five more lines of the log and up to 5 ms."""
    torch.set_num_threads(1)
    config = TrainConfig(**vars(CONFIG) | {"steps": 120, "checkpoint_every": 3, "log_every": 2})
    plain(folder / "quiet", config)  # first, so that the forks find everything imported
    fork = multiprocessing.get_context("fork")
    stats = folder / "killed" / "stats.jsonl"
    killed = 0
    while killed < 10:
        child = fork.Process(target=plain, args=(stats.parent, config))
        child.start()
        until = lines(stats) + random.randint(1, 4)
        while child.is_alive() and lines(stats) < until:
            time.sleep(1e-3)
        time.sleep(random.uniform(0, 0.005))
        child.kill()  # no error if it has just ended
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:
            break
    plain(stats.parent, config)
    print("kills:", killed)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    {"plain": plain, "kills": kills}[sys.argv[1]](Path(sys.argv[2]))
