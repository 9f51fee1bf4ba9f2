"""Priors of any image: the form, the bank of images and the training that `general` and `pet.heads` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from companion.data.heads import Head
from companion.data.heads_download import head_files, load_head
from companion.files import atomic_write, project_root
from companion.parameters import param
from companion.training.loop import TrainResult
from companion.training.recipe import Training, fit


@dataclass(frozen=True)
class TrainOnCrops(Training, batch_size=8, learning_rate=6e-4):
    """What a training on crops of a bank of images asks for; a subclass has the images and other defaults."""

    heads: str | None = param("data/heads", "folder of the real heads; none: images without them")
    more_heads: bool = param(False, "learn from those of companion data get more-heads, too")
    bank: str = param("data/bank", "folder of the images to learn from; completed when too few")
    images: int = param(15000, "images to learn from", minimum=1)
    crop: int = param(96, "pixels along y and x that a step sees of an image", minimum=16)
    model_channels: int = param(32, "width of the network", minimum=32)
    channel_mult: tuple[float, ...] = param((1, 2, 3, 3), "relative width of each level, finest first")
    patch: int = param(2, "side of the pixel-unshuffle stem", minimum=1)
    variance_weight: float = param(0.3, "weight of the variance channel's likelihood in the loss", minimum=0)
    P_mean: float = param(-2.2, "mean of ln sigma in training")
    P_std: float = param(1.4, "standard deviation of ln sigma in training", minimum=0)
    schedule: str = param("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    ema_halflife: float = param(3000.0, "half-life of the averaged weights, images; short at first", minimum=0)

    @property
    def large_pixels(self) -> bool:
        """Whether heads whose voxels are larger than a millimetre are sharp enough, too."""
        return False

    @property
    def bank_folder(self) -> Path:
        """The folder of the images, of their own where more heads are in them."""
        kind = "_more" if self.more_heads and not self.large_pixels else "_all" if self.more_heads else ""
        return project_root() / f"{self.bank}{kind}"

    def head_paths(self) -> dict[str, Path]:
        """Return name -> file of the real heads to learn from. Raises FileNotFoundError when one is missing."""
        more = [] if not self.more_heads else ["more", "large"] if self.large_pixels else ["more"]
        splits = ["train", *more] if self.heads else []
        found = [head_files(project_root() / str(self.heads), split) for split in splits]
        return {name: path for files in found for name, path in files.items()}

    def training_heads(self) -> list[Head]:
        """Load the real heads to learn from. Raises FileNotFoundError when one is missing."""
        return [load_head(name, path) for name, path in self.head_paths().items()]


def unet(channels: int, model_channels: int, channel_mult: tuple[float, ...], patch: int, condition: int = 0) -> dict:
    """Return the "network" of a config: images of so many channels, and one channel for the error's variance.

    condition: channels of what it is given beside the noisy image.
    """
    return {
        "name": "UNet",
        "in_channels": channels,
        "model_channels": model_channels,
        "out_channels": channels + 1,
        "num_res_blocks": 1,
        "channel_mult": list(channel_mult),
        "num_heads": 0,
        "use_scale_shift_norm": True,
        "patch": patch,
    }


def train_on_crops(
    D: nn.Module,
    loss: Callable,
    images: Bank,
    p: TrainOnCrops,
    config: Mapping,
    crop: Callable,
    progress: bool = True,
    options: Sequence[str] = ("P_mean", "P_std", "variance_weight"),
) -> TrainResult:
    """Return the trained prior; continues what `p.out` holds. crop(image, generator, size=...) makes an item.

    options: fields of the form that the loss takes.
    """
    return fit(
        D,
        loss,
        images,
        p,
        config,
        p.pick(*options),
        augment=partial(crop, size=p.crop),
        progress=progress,
        schedule=p.schedule,
        ema_halflife=p.ema_halflife,
        channels_last=False,
        log_every=20,
    )


class Bank(Dataset):
    """Images (channel, y, x) float32 of the files of a folder, in the order of their names.

    A file holds (n, channel, y, x) float16, or (n, y, x) where there is one channel.
    """

    def __init__(self, folder: Path, images: int):
        self.parts, self.count = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("[0-9]*.npy"))], images
        self.ends = np.cumsum([len(part) for part in self.parts])
        if not self.parts or self.ends[-1] < images:
            raise ValueError(f"{folder} holds {self.ends[-1] if self.parts else 0} images; expected {images}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Tensor:
        part = int(np.searchsorted(self.ends, i, side="right"))
        first = self.ends[part - 1] if part else 0
        image = torch.from_numpy(self.parts[part][i - first].astype(np.float32))
        return image[None] if image.ndim == 2 else image


def complete(folder: Path, images: int, size: int, source: Callable[[], Callable[[int], np.ndarray]]) -> Bank:
    """Return the bank of a folder; files of `size` images that it lacks are made first, number i by source()(i)."""
    count = -(-images // size)
    if len(list(folder.glob("[0-9]*.npy"))) < count:
        make = source()
        for part in tqdm(range(count), desc="images, files"):
            path = folder / f"{part:03d}.npy"
            if not path.exists():
                with atomic_write(path) as aside:
                    np.save(aside, make(part))
    return Bank(folder, images)
