"""Scans as slices: of a raw file, of a 3D scan along its readout, of a head that is scanned here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from companion.acquisition.measurement import hybrid_slices, without_oversampling
from companion.data import anatomy
from companion.data.cohort import some
from companion.data.intake.kinds import refuse_labels
from companion.data.intake.look import look
from companion.data.intake.records import Item, Volume
from companion.data.raw.scan import RawScan, chosen_of, raw_scan, read_kspace
from companion.data.upright import canonical, cut_of
from companion.operators.mri import birdcage_maps, fft
from companion.randomness import randn


def scan_of(
    path: Path,
    axes: str | None,
    index: int | None,
    coils: int,
    noise_std: float,
    seed: int = 0,
    which: str | None = None,
) -> tuple[str, RawScan, int]:
    """A name, raw k-space and the index of the slice in it, of the only scan of a file or folder.

    axes: names of the stored axes of arrays that do not tell them. index: of the slice; none: the middle one. which: of
    several repetitions, contrasts or frames, as in "repetition 0"; of an image the frame, by default the first, as the
    name says. A head as NIfTI or DICOM is scanned here: that slice of it alone, with `coils` and `noise_std`; an axial
    one, or one as it was acquired where axial pixels would be long (`data.upright`). Raises FileNotFoundError or
    Unreadable for what cannot be read, ValueError for several scans, what is neither an image nor k-space, or a slice
    that is not there, and as `head`.
    """
    item, left = only_scan(path)
    if item.what.kind == "k-space":
        scan = as_slices(read_kspace(item, axes, which))
        i = len(scan.kspace) // 2 if index is None else index
        return f"{item.name}, slice {i}", replace(scan, about={**scan.about, **left}), i
    chosen = chosen_of(which) if which else {}
    frames = item.what.shape[0] if item.what.axes[0] == "t" else 1
    if unknown := set(chosen) - ({"frame"} if frames > 1 else set()):
        raise ValueError(f"which={which!r}: {item.name} has no {', '.join(sorted(unknown))} to choose")
    frame = chosen.get("frame", 0)
    volume = item.read(**({"frame": frame} if frames > 1 else {}))
    refuse_labels(volume.array, item.path)
    x, voxel_mm, plane = head(volume, item.name)
    i = len(x) // 2 if index is None else index
    if not i < len(x):
        raise ValueError(f"slice={i}: {item.name} has {plane} slices 0 to {len(x) - 1}")
    name = item.name if frames == 1 else f"{item.name}, frame {frame} of {frames}"
    scan = simulated(x[i : i + 1], coils, noise_std, voxel_mm, seed)
    return f"{name}, {plane} slice {i}, scanned here", replace(scan, about=left), 0


def only_scan(path: Path, kinds: Sequence[str] = ("image", "k-space")) -> tuple[Item, dict[str, str]]:
    """The only scan of these kinds in a file or folder, and {"left out": what else is there, and why}, if anything is.

    Raises FileNotFoundError, or ValueError that says what there is.
    """
    found = look(path)
    if not found.items:
        reasons = "; ".join(dict.fromkeys(found.left.values())) or "it has no files"
        raise ValueError(f"{path} holds no scan that can be used: {reasons}")
    fits = [item for item in found.items if item.what.kind in kinds]
    if len(fits) != 1:
        names = ", ".join(f"{item.name} ({item.what.kind})" for item in (fits or found.items)[:8])
        if fits:
            raise ValueError(f"{path} holds {len(fits)} scans: {names}. Name one of them as source")
        raise ValueError(f"{path} holds no {' or '.join(kinds)}, but {names}")
    others = {item.name: f"{item.what.kind}, not used" for item in found.items if item is not fits[0]}
    left = some([f"{name}: {why}" for name, why in (others | dict(found.left)).items()])
    return fits[0], {"left out": left} if left else {}


def head(volume: Volume, name: str = "the volume") -> tuple[Tensor, tuple[float, float, float], str]:
    """Complex slices (slice, 1, y, x) of a volume, upright, sides of a multiple of 8 pixels; their voxels; their plane.

    Axial ones from below up, where those have no long pixels. Voxels are (z, y, x), mm, z across the slices. 1 is the
    99th percentile of the tissue; the phase is smooth. Raises ValueError as `upright.canonical` and `upright.cut_of`.
    """
    signal, voxel = canonical(volume.array, volume.affine, name)
    cut = cut_of(voxel, signal.shape, name)
    bright = np.percentile(signal[signal > 0.08 * np.percentile(signal, 99.9)], 99)
    x = torch.from_numpy(np.ascontiguousarray(cut.upright(signal / bright), np.float32))[:, None]
    height, width = (-n % 8 for n in x.shape[-2:])
    x = torch.nn.functional.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
    return anatomy.random_phase(x, Generator().manual_seed(0)), cut.spacing(voxel), cut.name


def simulated(x: Tensor, coils: int, noise_std: float, voxel_mm: Sequence[float], seed: int = 0) -> RawScan:
    """All of the k-space of a complex slice x (1, 1, y, x), as receive coils see it, with noise."""
    k = fft(birdcage_maps(x.shape[-2:], coils) * x)
    noise = randn(k.shape, k.dtype, Generator().manual_seed(seed))
    return raw_scan("simulated", k + noise_std * noise, voxel_mm=voxel_mm)


def as_slices(scan: RawScan) -> RawScan:
    """A 3D scan as slices along its fully sampled readout y (else along x or z), each with two phase encodes.

    An inverse transform along that axis, which keeps the noise; what oversampling adds at both ends is cut off, of a
    scan of slices along every fully sampled axis. Raises ValueError where all three axes are undersampled, and for
    several volumes.
    """
    if scan.ndim == 2:
        return without_oversampling(scan)
    if len(scan.kspace) != 1:
        raise ValueError(f"got {len(scan.kspace)} volumes, {tuple(scan.kspace.shape)}; choose one of them")
    whole = [torch.equal(scan.mask, scan.mask.narrow(a, 0, 1).expand_as(scan.mask)) for a in (-3, -2, -1)]
    if not any(whole):
        raise ValueError(
            "all three axes of this 3D scan are undersampled, so it does not fall into slices: reconstruct it whole "
            "(prepare_kspace with ndim=3)"
        )
    axis = next(a for a in (-2, -1, -3) if whole[a])
    factor = scan.oversampling[axis]

    def cut(k: Tensor, size: int) -> Tensor:  # k-space (coil, z, y, x), of `size` along the axis, as slices
        lacking = size - k.shape[axis]
        pad = [0, 0] * (-axis - 1) + [size // 2 - k.shape[axis] // 2]
        slices = hybrid_slices(torch.nn.functional.pad(k, (*pad, lacking - pad[-1])), axis)
        kept = round(size / factor)
        return slices[size // 2 - kept // 2 :][:kept]

    size = scan.kspace.shape[axis]
    others = [a for a in (-3, -2, -1) if a != axis]
    found = replace(
        scan,
        kspace=cut(scan.kspace[0], size),
        mask=scan.mask.select(axis, 0),
        voxel_mm=None if scan.voxel_mm is None else tuple(scan.voxel_mm[a] for a in (axis, *others)),
        calibration=None if scan.calibration is None else cut(scan.calibration[0], size),
        oversampling=tuple(scan.oversampling[a] for a in others),
        shift=tuple(scan.shift[a] for a in others) if scan.shift else (),
        about={**scan.about, "slices": f"along {'zyx'[axis]}, the readout of a 3D scan"},
    )
    return without_oversampling(found)  # of the other axes


def centred_affine(voxel_mm: tuple[float, float, float] | None, shape) -> np.ndarray:
    """The affine of slices ([z,] y, x), y downwards, the middle at 0; voxels of 1 mm where none are known."""
    step = np.array([1, -1, 1]) * (voxel_mm or (1.0, 1.0, 1.0))[::-1]
    affine = np.diag([*step, 1.0])
    affine[:3, 3] = -step * (np.array([*shape[::-1], 1])[:3] - 1) / 2
    return affine
