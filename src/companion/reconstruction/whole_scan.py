"""Every slice of a raw scan: from k-space to a volume with error bars, one slice after the other, resumable.

What one slice said of the prior (`trust.assess`), and the classical method that its held-out samples asked for, serve
all of them; coil maps, brightness and what coils contradict each other about are each slice's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from companion.acquisition.measurement import Measurement, prepare_scan
from companion.acquisition.redundancy import with_real_noise
from companion.data.raw.scan import RawScan
from companion.diffusion.denoisers import Denoiser
from companion.evaluation.metrics import spread
from companion.files import atomic_write
from companion.reconstruction import trust
from companion.reconstruction.held_out import Classical
from companion.reconstruction.kept import fingerprint

MOST_GAIN = 2.0  # by which a slice is made brighter for the prior than the one that was asked


@dataclass(frozen=True, eq=False)
class Volume:
    """Magnitudes of all slices, and how far their draws deviate: (slice, y, x) float32, in the units of one of them.

    empty: slices without anything to reconstruct, which are 0, and what was said of them.
    """

    image: Tensor
    deviation: Tensor
    empty: dict[int, str]


def reconstruct_slices(
    D: Denoiser,
    scan: RawScan,
    lines: Tensor | None,
    like: Measurement,
    found: trust.Trust,
    classical: Classical,
    *,
    seeds: range,
    evaluations: int = 30,
    folder: Path | None = None,
    progress: bool = True,
) -> Volume:
    """The volume of a 2D scan of several slices.

    lines: (*space), 1 where samples of fuller data are used; None: all that were measured. like: the measurement of
    the slice that was asked (`found`, `classical`): its noise whitens all others, and its units are those of the
    volume. For the prior each slice is scaled by its own brightness. seeds: of the draws, the same ones for every
    slice, so that a slice is the same alone and in its volume. folder: slices that are done are kept there, and not
    done again by a call with the same scan, lines, prior and trial; others are written over.

    Raises ValueError for a 3D scan (`acquisition.slices.as_slices` makes one of slices).
    """
    if scan.ndim != 2:
        raise ValueError(f"got {tuple(scan.kspace.shape)}, a 3D scan; make slices of it first (as_slices)")
    first = (lines, D, found.error, found.held_share, found.bias, found.widening, list(seeds), evaluations, like.scale)
    made_from = fingerprint(*first)
    shape, empty = (len(scan.kspace), *like.y.shape[2:]), {}
    images = torch.zeros(2, *shape)
    for i in tqdm(range(len(scan.kspace)), desc="slices", disable=not progress):
        key = fingerprint(made_from, scan.kspace[i])
        path = None if folder is None else folder / f"{i:04d}.safetensors"
        known = None if path is None else _read(path, key)
        if known is None:
            known = _slice(D, scan, i, lines, like, found, classical, seeds, evaluations)
            if path is not None:
                _write(path, key, known)
        images[:, i], why = known
        if why:
            empty[i] = why
    return Volume(images[0], images[1], empty)


def _slice(D, scan, i, lines, like, found, classical, seeds, evaluations) -> tuple[Tensor, str]:
    """Image and deviation (2, y, x) of one slice in the units of `like`; zeros, and why, where there is nothing."""
    mask = scan.mask[min(i, len(scan.mask) - 1), 0]
    part, options = slice(i, i + 1), {"mask": mask if lines is None else mask * lines, "noise": like.found.noise}
    try:
        m = prepare_scan(scan, part, **options)
        if m.scale > MOST_GAIN * like.scale:  # hardly more than air, which is not to be made as bright as a head
            m = prepare_scan(scan, part, **options, brightness=MOST_GAIN * like.scale / m.scale)
    except ValueError as error:
        return torch.zeros(2, *like.y.shape[2:]), str(error)
    m = with_real_noise(m.to(str(like.y.device))).one(0)
    samples, _ = trust.draw(D, m.A, m.y, m.noise_std, found, seeds=seeds, evaluations=evaluations, classical=classical)
    assert samples.mean is not None  # the image that the scan trusts
    deviation = spread(m.magnitude(samples.x), samples.paired).deviation
    images = torch.stack([m.magnitude(samples.mean)[0, 0], deviation[0]]).cpu()
    return images * (like.scale / m.scale), ""


def _read(path: Path, key: str) -> tuple[Tensor, str] | None:
    """What `_write` wrote of the same thing; None where there is no such file."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            if about.get("key") != key:
                return None
            return file.get_tensor("image and deviation"), about["empty"]
    except (FileNotFoundError, SafetensorError):
        return None  # not there, or cut short by a full disk, say


def _write(path: Path, key: str, known: tuple[Tensor, str]) -> None:
    images, why = known
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as aside:
        about = {"about": json.dumps({"key": key, "empty": why})}
        save_file({"image and deviation": images.contiguous()}, aside, about)
