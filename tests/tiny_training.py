"""A training of a second, for test_training.py and the processes that it starts.

tiny_training.py plain FOLDER    the training of CONFIG (under torchrun: in several processes)
tiny_training.py killed FOLDER   four processes, one of which is killed at step 7 of the first attempt
tiny_training.py sharded FOLDER  a network of blocks in shards
tiny_training.py kills FOLDER    FOLDER/quiet undisturbed, FOLDER/killed with ten kill -9 at random moments
"""

import multiprocessing
import os
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
FOUR = {"grad_accumulation": 4, "checkpoint_every": 3}  # for four processes


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


def killed(folder: Path) -> None:
    seen = []

    def fragile(model, x, generator):
        seen.append(1)
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(seen) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(model, x, generator)

    config = TrainConfig(**vars(CONFIG) | FOUR)
    train(new_model(), fragile, DATA, config, folder, augment=augment, progress=False)


class Blocks(nn.Module):
    """A small network for volumes, with a list of blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.head = nn.Conv3d(1, 6, 3, padding=1), nn.Conv3d(6, 1, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Conv3d(6, 6, 3, padding=1)) for _ in range(2))

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


class Denoiser(nn.Module):
    """Its own weight lies outside of the network, as a denoiser's may; losses call the network."""

    def __init__(self):
        super().__init__()
        self.network, self.scale = Blocks(), nn.Parameter(torch.ones(()))

    def raw(self, x):
        return self.scale * self.network(x)


def volumes_loss(model, x, generator):
    return ((model.raw(x + torch.randn(x.shape, generator=generator)) - x) ** 2).flatten(1).mean(1)


def sharded(folder: Path, shard: bool = True) -> None:
    volumes = torch.randn(13, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    config = TrainConfig(**vars(CONFIG) | {"shard": shard, "clip_norm": 0.5})
    half = TrainConfig(**vars(config) | {"seconds": 1e-9, "schedule": "cosine"})
    result = train(Denoiser(), volumes_loss, volumes, half, folder, progress=False)  # one step
    assert result.step == 1
    result = train(Denoiser(), volumes_loss, volumes, config, folder, progress=False)
    assert result.finished and not any(hasattr(p, "to_local") for p in result.ema.parameters())


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
    {"plain": plain, "kills": kills, "killed": killed, "sharded": sharded}[sys.argv[1]](Path(sys.argv[2]))
