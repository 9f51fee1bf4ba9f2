"""LMI for volumes: a NIfTI file in, its translation and a map of what the source does not support out.

    made = translate_volume(load_nifti("t1.nii.gz"), prior)
    made.verdict, made.volume, made.unsupported                  # on the person's own grid
    translate_file("t1.nii.gz", "t2.nii.gz", prior)              # t2.nii.gz, and t2_unsupported.nii.gz beside it

A head is brought to the cohort's template first, so that neither its size nor its place is guessed, and the result
back. Neighbouring slices begin with nearly the same noise, so that what the source leaves open is filled alike in them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from companion.data import anatomy
from companion.data.intensity import FOREGROUND, Scale, scaled
from companion.data.nifti import Volume, load_nifti, save_nifti
from companion.data.slicing import Slicing
from companion.data.template import OnTemplate
from companion.evaluation.support import Support, supported
from companion.randomness import generators, randn
from companion.reconstruction.translation import Setting, Translator, informed, opposite, translate

FILLED = 0.02  # share of the pixels of a slice that must be foreground for it to be translated
UNITS = "1: bright tissue (99.5 % of the foreground)"
WARNING = "LMI guess, for segmenters, NOT FOR DIAGNOSIS"
KERNEL_MM = 20.0  # standard deviation of the Gaussian along z that makes the noise of neighbouring slices alike


@dataclass(frozen=True, eq=False)
class VolumeTranslation:
    """A volume translated: `source`, `slices` (slice, 1, y, x), on the network's grid, `slicing` leads back from there.

    filled (slice,), bool: slices with enough in them to be translated; support: of these. scale: of the target.
    """

    source: Tensor
    slices: Tensor
    filled: Tensor
    support: Support
    slicing: Slicing | OnTemplate
    scale: Scale
    contrast: str

    @property
    def volume(self) -> np.ndarray:
        """The translation (z, y, x) on the source's own grid, in the units of `scale`."""
        return self.scale.undo(self.slicing.assemble(self.slices)).astype(np.float32)

    @property
    def unsupported(self) -> np.ndarray:
        """Where the prior insists, (z, y, x) on the source's own grid, from 0 to 1."""
        marked = torch.zeros_like(self.slices)
        marked[self.filled] = self.support.marked.to(marked)
        return self.slicing.assemble(marked)

    @property
    def verdict(self) -> str:
        """What the source says of the translation, in words and numbers, with the heights of doubtful slices."""
        told = self.support.verdict
        if isinstance(self.slicing, OnTemplate):
            z = torch.tensor(self.slicing.heights)[self.filled]
            low, high = anatomy.SLAB_MM
            if (bad := z[self.support.doubtful]).numel():
                told += f"; doubtful between {bad.min():.0f} and {bad.max():.0f} mm of MNI"
            if ((z < low) | (z > high)).any():
                told += f"; below {low:.0f} and above {high:.0f} mm of MNI the network has seen nobody"
            if self.slicing.stripped:
                told += "; a whole head: all but the template's brain was cut away"
        return told

    def save(self, out: str | Path) -> tuple[Path, Path]:
        """The paths of two NIfTI files on the grid of the source: `out`, and what is unsupported beside it."""
        out = Path(out)
        affine = self.slicing.affine
        first = save_nifti(out, self.volume, affine=affine, units=f"{self.contrast} {WARNING}; {self.scale.units}")
        stem = out.name.removesuffix(".gz").removesuffix(".nii")
        beside = out.with_name(f"{stem}_unsupported.nii.gz")
        note = "1: not supported by the source, or unlike the other side"
        return first, save_nifti(beside, self.unsupported, affine=affine, units=note)


def translate_volume(
    volume: Volume,
    prior: Translator,
    setting: Setting | None = None,
    *,
    seed: int = 0,
    grid: str = "template",
    plane: str = "axial",
    pixel_mm: float | None = None,
    step_mm: float | None = None,
    kernel_mm: float = KERNEL_MM,
    source_scale: Scale | None = None,
    target_scale: Scale | None = None,
    progress: bool = False,
) -> VolumeTranslation:
    """A volume of any contrast translated slice by slice, and what its source says of the result.

    setting: by default what is recommended for the prior. grid: "template", the cohort's, to which the head is
    registered (affine), or "own", the volume's, for heads that lie as the training slices do. plane: of "own".
    pixel_mm: side of the pixels that the network sees, by default that of its training slices. step_mm: distance of
    the slices on the template, by default half a pixel; what lies between is interpolated. kernel_mm: standard
    deviation of the Gaussian along the slices that their noise is drawn with; 0: each has its own. source_scale,
    target_scale: what is 0 and 1 in the source, by default percentiles, and in the target. progress: says how long it
    will take, then shows a bar. Slices with hardly anything in them stay empty. Raises ValueError for volumes without
    anything, or as `prepare_source` and `register`.
    """
    setting = setting or prior.recommended
    array = np.abs(volume.array) if np.iscomplexobj(volume.array) else volume.array
    volume, pixel_mm = Volume(array, volume.affine), pixel_mm or prior.pixel_mm
    if grid not in ("template", "own"):
        raise ValueError(f"grid is {grid!r}; choose template or own")
    if grid == "template":
        scaled(array, source_scale)  # its errors
        slicing = OnTemplate.of(volume, prior.size, pixel_mm=pixel_mm, step_mm=step_mm)
        cut = slicing.cut(array)
        z = torch.tensor(slicing.heights)
        slab = (z >= anatomy.SLAB_MM[0]) & (z <= anatomy.SLAB_MM[1])
        slab = slab if slab.any() else torch.ones_like(slab)
        of_slab = replace(slicing, heights=tuple(z[slab].tolist()))
        source_scale = source_scale or of_slab.scaled(cut[slab])[1]  # that of the slices that the cohort's are of
        slices, step = source_scale.apply(cut), slicing.step_mm
    else:
        inner = Slicing.of(volume, (1, 1), pixel_mm, plane).inner
        size = max(prior.size[0], inner[0]), max(prior.size[1], inner[1])
        values, _ = scaled(array, source_scale)
        slicing = Slicing.of(volume, size, pixel_mm, plane)
        slices = slicing.cut(values)
        step = float(np.linalg.norm(slicing.canvas_affine[:3, 2]))
    filled = (slices > FOREGROUND).float().mean((1, 2, 3)) >= FILLED
    if not filled.any():
        raise ValueError(f"no {plane} slice has anything in it; is the scale right ({source_scale})?")
    shown = slices[filled]
    if progress:
        cost = seconds(prior, shown, setting)
        print(f"{len(shown)} slices, {setting.draws} draws of {setting.evaluations} steps: about {cost:.0f} s")
    shape = (setting.draws, len(slices), prior.channels, *slices.shape[2:])
    noise = noise_along(shape, kernel_mm / step, seed)[:, filled] if kernel_mm else None
    if noise is not None and setting.draws % 2 == 0:
        noise[1::2] = opposite(noise[::2], setting)
    found = translate(prior, shown, setting, seed=seed, noise=noise, progress=progress)
    draws = found.draws
    made = torch.zeros_like(slices)
    made[filled] = draws.mean(0).clamp(0, None)
    scale = target_scale or Scale(0, 1, UNITS)
    support = supported(shown, draws, sides=grid == "template", paired=found.paired)
    return VolumeTranslation(slices, made, filled, support, slicing, scale, prior.contrast)


def translate_file(
    path: str | Path, out: str | Path, prior: Translator, setting: Setting | None = None, **options
) -> Path:
    """The path of a NIfTI volume: that of `path` translated, with its shape and affine; see `translate_volume`.

    Beside it lies NAME_unsupported.nii.gz. With progress=True the verdict is printed. Raises FileNotFoundError, or
    ValueError as `load_nifti` and `translate_volume`.
    """
    made = translate_volume(load_nifti(path), prior, setting, **options)
    if options.get("progress"):
        print(made.verdict)
    return made.save(out)[0]


def noise_along(shape: tuple[int, ...], width: float, seed: int) -> Tensor:
    """Unit Gaussian noise (draw, slice, channel, y, x), correlated along the slices by a Gaussian of `width` slices.

    Slices d apart have the correlation exp(-d^2 / (4 width^2)). Noise of draw j and place k has a seed of its own.
    """
    draws, slices, *image = shape
    reach = int(np.ceil(3 * width))
    at = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-0.5 * (at / max(width, 1e-6)) ** 2)
    kernel = kernel / kernel.square().sum().sqrt()
    made = []
    for j in range(draws):
        seeds = generators([seed + j + draws * k for k in range(slices + 2 * reach)])
        white = randn(tuple(image), torch.float32, seeds).flatten(1)
        made.append((white.T.unfold(1, 2 * reach + 1, 1) @ kernel).T.unflatten(1, tuple(image)))
    return torch.stack(made)


def seconds(prior: Translator, source: Tensor, setting: Setting) -> float:
    """About how long a translation of source slices (slice, 1, y, x) will take here, from one step of four of them."""
    some = source[torch.linspace(0, len(source) - 1, min(4, len(source))).long()].to(prior.device)
    G = informed(prior, some, setting)
    x = some + torch.zeros(len(some), prior.channels, *some.shape[2:]).to(some)
    spent = 0.0
    for _ in range(2):  # the first prepares
        start = time.perf_counter()
        G(x, torch.full((len(some),), 0.5).to(some))
        spent = time.perf_counter() - start
    return spent / len(some) * len(source) * setting.draws * setting.evaluations


class Volumes(NamedTuple):
    """`pictures` of a source volume and its translation, row -> column -> (1, y, x), and `facts` about them."""

    pictures: dict[str, dict[str, Tensor]]
    facts: dict[str, object]


def compare_volumes(source: str | Path, made: str | Path, unsupported: str | Path | None = None) -> Volumes:
    """Three planes through the middle of two or three NIfTI files, each in a window of its own, and their geometry."""
    pictures, facts = {}, {}
    files = {"source": source, "translation": made} | ({"unsupported": unsupported} if unsupported else {})
    for name, volume in ((name, load_nifti(path)) for name, path in files.items()):
        x = torch.from_numpy(np.asarray(volume.array, np.float32))
        x = (x / x.max().clamp(min=1e-6)).repeat_interleave(max(1, round(volume.voxel_mm[0] / volume.voxel_mm[1])), 0)
        z, y, width = (n // 2 for n in x.shape)
        planes = {"plane z": x[z], "plane y": x[:, y].flip(0), "plane x": x[..., width].flip(0)}
        pictures[name] = {plane: image[None] for plane, image in planes.items()}
        facts[name] = {"shape (z, y, x)": volume.array.shape, "affine": volume.affine.round(4).tolist()}
    facts["same shape"] = facts["source"]["shape (z, y, x)"] == facts["translation"]["shape (z, y, x)"]
    facts["same affine"] = facts["source"]["affine"] == facts["translation"]["affine"]
    return Volumes(pictures, facts)
