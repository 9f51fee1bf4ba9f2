"""Tissue fractions of brain slices by a small network that knows one contrast: a judge of images that others made.

    S = train_segmenter(*training_slices("T2w", 80))      # two minutes on one core
    S = load_segmenter("segmenter/t2w")                   # or one that is embedded
    S.labels(x)      # (batch, 1, *space): 0 background, 1 CSF, 2 grey, 3 white matter, as companion.data.anatomy
    S.fractions(x)   # (batch, 3, *space): how much of each voxel these tissues fill
    S.features(x)    # (batch, d): its inner view of an image, for a Frechet distance

Trained with soft labels, the tissue fractions themselves, on slices of one contrast. Images of another contrast it
judges wrongly: the Dice overlap of a translation says whether software made for the target contrast can read it.

    S = train_segmenter(*unseen_parts(tissue_slices(...)), augment=any_contrast)

reads any contrast, for it never saw a real one: every image in its training had grey values of its own (SynthSeg,
Billot et al., Medical Image Analysis 2023, arXiv 2107.09559). It shares no grey levels with the cohort of translators.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from companion.data import anatomy
from companion.diffusion.denoisers import AnySize
from companion.evaluation import metrics
from companion.files import code_version
from companion.models.checkpoint import describe, load
from companion.models.folder import save_checkpoint
from companion.networks.unet import UNet
from companion.training.loop import TrainConfig, train

SLAB_MM = (-55.0, 75.0)  # heights (MNI z) of training slices: the whole brain
SCALE = "1 is about the signal of the subject's brightest pure tissue: 0.7 to 1.15 times that"
GAIN = (0.7, 1.15)  # training images are multiplied by something between: scales by percentiles will do as well
NOISE = 0.02  # the largest standard deviation of noise that is added to them


@dataclass(frozen=True, eq=False)
class Segmenter:
    """A network (batch, 1, y, x) -> (batch, 4, y, x), logits of background and the tissues, in evaluation mode.

    Images are real, (batch, 1, y, x) or volumes (batch, 1, z, y, x), whose axial slices are seen one by one, of any
    size; pixels of about the size it was trained with, intensities as in `SCALE`. Raises ValueError for others.
    """

    network: Any  # an nn.Module

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> Tensor:
        """Shares (batch, 4, *space) of background, CSF, grey and white matter; their sum is 1."""
        return self._by_slices(self._probabilities, x)

    def fractions(self, x: Tensor) -> Tensor:
        """Shares (batch, 3, *space) of CSF, grey and white matter."""
        return self.probabilities(x)[:, 1:]

    def labels(self, x: Tensor) -> Tensor:
        """Labels (batch, 1, *space), uint8: the rule of `anatomy.labels_from_tissue`."""
        return torch.stack([anatomy.labels_from_tissue(f) for f in self.fractions(x)])[:, None]

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Activations (batch, d) at the bottom of the network, averaged over space, of slices (batch, 1, y, x)."""
        if x.ndim != 4:
            raise ValueError(f"features are of slices (batch, 1, y, x), got {tuple(x.shape)}")
        seen = []
        with self.network.middle_block.register_forward_hook(lambda *args: seen.append(args[-1].mean((-2, -1)))):
            self._by_slices(self._probabilities, x)
        return torch.cat(seen)

    @cached_property
    def _any_size(self) -> AnySize:
        return AnySize(lambda x, sigma, cond=None: self.network(x, sigma).softmax(1), self.network.total_stride)

    def _probabilities(self, x: Tensor) -> Tensor:
        return torch.cat([self._any_size(part, part.new_zeros(len(part))) for part in x.split(64)])

    def _by_slices(self, f, x: Tensor) -> Tensor:
        if x.ndim not in (4, 5) or x.shape[1] != 1 or not x.is_floating_point():
            raise ValueError(
                f"expected real images (batch, 1, y, x) or volumes (batch, 1, z, y, x), got {x.dtype} "
                f"{tuple(x.shape)}; of complex images take the magnitude"
            )
        if not torch.isfinite(x).all():
            raise ValueError("the image holds NaN or infinity; mask or repair it first")
        if x.ndim == 4:
            return f(x)
        flat = x.movedim(2, 1).flatten(0, 1)
        return f(flat).unflatten(0, (len(x), -1)).movedim(1, 2)


def segmenter_config(contrast: str, image_size: int, subjects: int) -> dict:
    """Return what `weights.build` makes the network from, and what it was trained on."""
    return {
        "network": {
            "name": "UNet",
            "in_channels": 1,
            "model_channels": 32,
            "out_channels": 4,
            "num_res_blocks": 1,
            "channel_mult": [1, 1, 1],
            "use_scale_shift_norm": True,
            "patch": 2,
        },
        "data": {
            "source": f"virtual cohort of companion.data.anatomy (ICBM 152), {contrast} axial slices, tissue fractions",
            "contrast": contrast,
            "subjects": subjects,
            "image_size": image_size,
            "scale": SCALE,
        },
    }


def training_slices(
    contrast: str,
    subjects: int,
    per_subject: int = 10,
    image_size: int = 64,
    split: str = "train",
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return magnitudes (slice, 1, y, x) at random heights, and shares (slice, 4, y, x) as `Segmenter.probabilities`.

    The slices of a subject follow one another.
    """
    images, shares = [], []
    for subject in tqdm(anatomy.cohort(split, subjects), desc="subjects", disable=not progress):
        low, high = SLAB_MM
        heights = low + (high - low) * torch.rand(per_subject, generator=subject.generator("segment"))
        made = anatomy.render(subject, contrast, (per_subject, image_size, image_size), slices_mm=heights)
        tissue = made.tissue.movedim(0, 1).clamp(0, 1)
        images.append(made.image.abs()[:, None])
        shares.append(torch.cat([(1 - tissue.sum(1, keepdim=True)).clamp(min=0), tissue], 1))
    return torch.cat(images), torch.cat(shares)


def train_segmenter(
    images: Tensor,
    shares: Tensor,
    steps: int = 800,
    batch_size: int = 8,
    seed: int = 0,
    config: Mapping | None = None,
    progress: bool = False,
    augment: Callable[[tuple[Tensor, Tensor], Generator], tuple[Tensor, Tensor]] | None = None,
    folder: str | os.PathLike | None = None,
) -> Segmenter:
    """Return a segmenter trained on images (slice, 1, y, x) of one contrast and their shares (slice, 4, y, x).

    Cross entropy with soft labels; where shares are 0 nothing is asked. Images are mirrored, and vary a little in gain
    and noise. augment: makes an image and its shares of what `images` holds of a slice, anew each time, as
    `any_contrast`. folder: keeps the training, which goes on from there; none: nothing is kept.
    """
    if images.shape[:1] != shares.shape[:1] or images.shape[2:] != shares.shape[2:] or shares.shape[1] != 4:
        raise ValueError(
            f"images {tuple(images.shape)} and shares {tuple(shares.shape)} do not belong together: "
            "expected (slice, 1, y, x) and (slice, 4, y, x)"
        )
    options = dict((config or segmenter_config("", images.shape[-1], 0))["network"])
    options.pop("name")
    torch.manual_seed(seed)
    network = UNet(**options)
    about = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=2e-3,
        warmup=min(50, steps - 1),
        schedule="cosine",
        ema_halflife=400.0,
        autocast="auto",
        channels_last=True,
        seed=seed,
        device="cpu",
        checkpoint_every=steps if folder is None else min(steps, 200),
        log_every=50,
    )
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as kept:
        result = train(network, _loss, TensorDataset(images, shares), about, kept, augment=augment, progress=progress)
    return Segmenter(result.ema.eval().requires_grad_(False))


def _loss(network: nn.Module, batch: tuple[Tensor, Tensor], generator: Generator) -> Tensor:
    """Return the cross entropy (batch,) of images varied at random."""
    x, shares = batch
    mirrored, gain, noise = torch.rand(3, len(x), 1, 1, 1, generator=generator, device=generator.device)
    x, shares = (torch.where(mirrored < 0.5, v.flip(-1), v) for v in (x, shares))
    x = x * (GAIN[0] + (GAIN[1] - GAIN[0]) * gain)
    x = x + NOISE * noise * torch.randn(x.shape, generator=generator, device=generator.device)
    logits = network(x, x.new_zeros(len(x)))
    return -(shares * logits.float().log_softmax(1)).sum(1).flatten(1).mean(1)


def unseen_parts(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Return parts (slice, 5, y, x) of `patients.tissue_slices` and their shares (slice, 4, y, x), none in lesions."""
    return parts, torch.cat([(1 - parts[:, :4].sum(1, keepdim=True)).clamp(min=0), parts[:, :3]], 1)


def any_contrast(item: tuple[Tensor, Tensor], generator: Generator) -> tuple[Tensor, Tensor]:
    """Return an image (1, y, x) in [0, 1] in a contrast that nobody has seen, and its shares, as they were.

    item: parts (5, y, x) and shares of one slice, see `unseen_parts`. Each tissue and the lesions have a Gaussian of
    grey values, mean between 0 and 1, standard deviation up to 0.06, fine and coarse; texture, shading, blur and noise
    are drawn.
    """
    parts, shares = item
    tissue, texture = parts[:4], parts[4:].clamp(min=0.1)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=parts.device)

    def smooth(count: int, side: int) -> Tensor:
        field = torch.randn(1, count, side, side, generator=generator, device=parts.device)
        return F.interpolate(field, size=parts.shape[1:], mode="bicubic", align_corners=True)[0]

    fine = torch.randn(tissue.shape, generator=generator, device=parts.device)
    grey = rand(4, 1, 1) + 0.06 * (rand(4, 1, 1) * fine + rand(4, 1, 1) * smooth(4, 12))
    image = (tissue * grey.clamp(min=0)).sum(0, keepdim=True) * texture ** (2 * rand(1) - 1)
    image = image * (0.2 * rand(1) * smooth(1, 4)).exp()
    blurred = F.avg_pool2d(F.pad(image[None], [1] * 4, mode="replicate"), 3, 1)[0]
    image = torch.lerp(image, blurred, rand(1).square())
    noise = 0.04 * rand(1).square() * torch.randn(image.shape, generator=generator, device=parts.device)
    image = image + noise * (tissue.sum(0, keepdim=True) > 0.02)  # stripped
    bright = image[tissue.sum(0, keepdim=True) > 0.5]
    top = bright.quantile(0.99).clamp(min=0.05) if len(bright) else 1.0
    return (image / top).clamp(0, 1), shares


def save_segmenter(folder: str | os.PathLike, segmenter: Segmenter, config: Mapping, record: Mapping) -> Path:
    """Return the folder, which now holds the segmenter in half precision; `config` as `segmenter_config`."""
    half = UNet(**{k: v for k, v in config["network"].items() if k != "name"})
    half.load_state_dict(segmenter.network.state_dict())
    return save_checkpoint(folder, half.half(), config, record)


def load_segmenter(name: str | os.PathLike, contrast: str | None = None, device: str = "cpu") -> Segmenter:
    """Return the segmenter of a checkpoint. Raises ValueError if it was trained on another than the `contrast`."""
    known = describe(name)["data"].get("contrast")
    if contrast is not None and known != contrast:
        raise ValueError(f"{name} was trained on {known}, not on {contrast}; give a segmenter of that contrast")
    return Segmenter(load(name, device))


def make_checkpoint(contrast: str, folder: str | os.PathLike, subjects: int = 80, steps: int = 800) -> Path:
    """Return the folder with a segmenter of one contrast of the virtual cohort, trained and judged here."""
    config = segmenter_config(contrast, 64, subjects)
    segmenter = train_segmenter(*training_slices(contrast, subjects), steps, config=config)
    x, shares = training_slices(contrast, 16, split="validation")
    labels = torch.stack([anatomy.labels_from_tissue(s[1:]) for s in shares])[:, None]
    found = metrics.dice(segmenter.labels(x), labels).nanmean(0)
    record = {
        "steps": steps,
        "slices": 10 * subjects,
        "validation slices": len(x),
        "validation Dice of CSF, grey, white": [round(v, 3) for v in found.tolist()],
        "code": code_version(),
    }
    return save_segmenter(folder, segmenter, config, record)


if __name__ == "__main__":  # python -m companion.evaluation.segmenter T2w checkpoints/segmenter/t2w
    make_checkpoint(sys.argv[1], sys.argv[2])
