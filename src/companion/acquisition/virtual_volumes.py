"""Virtual people scanned as volumes, by a protocol or as a scan of somebody else was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor

from companion.acquisition.mri import AS_MEASURED, Examples, Protocol, Scan, simulate
from companion.data import anatomy
from companion.data.intake.look import look
from companion.data.virtual import volume, volumes
from companion.operators.masks import CartesianMask


def examples(reference: float, spacing_mm: float, people: int = 3) -> Examples:
    """(frames, y, x) -> validation people (person, frame, 1, y, x), 99 % of whose pixels stay below `reference`."""

    @cache  # lives as long as this function
    def like(shape: tuple[int, int, int]) -> Tensor:
        x = resized(volumes("brain", "validation", people, shape[0], max(shape[1:]), spacing_mm), shape[1:])
        return reference / torch.quantile(x.abs().flatten(), 0.99).item() * x

    return like


def resized(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Complex images x (..., frame, 1, y, x) at another size."""
    parts = torch.view_as_real(x[..., 0, :, :]).movedim(-1, -3).flatten(0, -4)
    parts = torch.nn.functional.interpolate(parts, shape, mode="bilinear", antialias=True)
    return torch.view_as_complex(parts.movedim(1, -1).contiguous()).unflatten(0, x.shape[:-3])[..., None, :, :]


@dataclass(frozen=True, eq=False)
class Cohort:
    """Virtual people to be scanned by a protocol."""

    image_size: int
    spacing_mm: float
    protocol: Protocol
    like: Examples | None
    seed: int

    def scan(self, split: str, index: int, frames: int, coils: int, noise_std: float) -> Scan:
        """The scan of a person in raw units nobody knows, prepared as measured data would be."""
        x = volume("brain", split, index, frames, self.image_size, self.spacing_mm)
        mask = self.protocol.lines(x.shape[-1], len(x), self.seed + 1000 * index)
        return self._simulated(x, split, index, mask, coils, noise_std)

    def like_scan(self, scan: Scan, index: int, frames: int) -> Scan:
        """A validation person scanned as `scan` was: its matrix, lines, number of coils and noise."""
        frames = min(len(scan.y), frames)
        x = volume("brain", "validation", index, frames, max(scan.shape[1:]), self.spacing_mm)
        lines = scan.mask.mask
        mask = replace(scan.mask, mask=lines[:frames]) if lines.ndim == scan.y.ndim else scan.mask
        measured = Protocol(maps="acs", acs=mask.acs, scale=self.protocol.scale)
        others = replace(self, protocol=measured) if mask.kind == AS_MEASURED else self
        x = resized(x, scan.shape[1:])
        return others._simulated(x, "validation", index, mask, scan.y.shape[1], scan.noise_std)

    def _simulated(self, x: Tensor, split: str, index: int, mask: CartesianMask, coils: int, noise_std: float) -> Scan:
        generator = Generator().manual_seed(self.seed + 7919 * index + {"validation": 1, "test": 2}[split])
        voxel_mm = (self.spacing_mm, *(anatomy.FIELD_OF_VIEW_MM / n for n in x.shape[-2:]))
        options = {"coils": coils, "noise_std": noise_std, "generator": generator, "voxel_mm": voxel_mm}
        return simulate(x, self.protocol, mask, self.like, name=f"{split} {index}", **options)


def fastmri_files(path: Path, count: int) -> list[Path]:
    """The file, or the first fastMRI files of a folder; what is passed over is printed with the reason.

    Only the descriptions of a folder's files are read. Raises ValueError for a folder without any.
    """
    if not path.is_dir():
        return [path]
    found = look(path)
    files = [item.path for item in found.items if item.reader.name == "fastMRI"]
    left = dict(found.left) | {i.name: f"{i.what.format}, no fastMRI file" for i in found.items if i.path not in files}
    reasons = "".join(f"\n  {name}: {why}" for name, why in left.items())
    if not files:
        raise ValueError(f"{path} holds no fastMRI volume that can be read:{reasons or ' it is empty'}")
    print(f"{path}: {len(files)} volumes, {len(left)} files skipped{reasons}")
    return files[:count]
