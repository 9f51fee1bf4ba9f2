"""One record for raw Cartesian MRI, whatever the file: what a reconstruction needs, and where it was measured.

Space is (y, x) for 2D scans and (z, y, x) for 3D ones: y is the readout, x the first phase encoding, z the second.
Zero frequency is in the middle of every axis, at n // 2.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from companion.data.intake.records import Description, Item, Unreadable

UNNAMED = ("NumPy", "MATLAB", "BART")  # formats whose arrays need not name their axes
PEAK = 30.0  # peak / mean above which an array is k-space
Choice = Mapping[str, int] | str | None  # of several repetitions, contrasts, frames: which
OFF_CENTRE = 1  # samples that the peak of energy may lie beside the middle: the image's own phase moves it so far


@dataclass(frozen=True, eq=False)
class RawScan:
    """Cartesian k-space as a scanner measured it.

    kspace        (slice, coil, y, x), of a 3D scan (slice, coil, z, y, x); complex64, zero where not measured
    mask          (slice or 1, 1, *space), ones where measured
    voxel_mm      (z, y, x) of the image on this grid, or None where the file does not say
    noise         (coil, sample) of a noise scan, in the units of the k-space, or None
    calibration   (slice, coil, *box) of a separate calibration scan, zero frequency at n // 2, or None
    oversampling  how many times the field of view is larger than that of the scanner's image, for each axis of space
    shift         how many samples k-space was turned, for each axis of space, to bring its echo to the middle
    about         what else was found, to print
    """

    kspace: Tensor
    mask: Tensor = field(repr=False)
    voxel_mm: tuple[float, float, float] | None = None
    noise: Tensor | None = field(default=None, repr=False)
    calibration: Tensor | None = field(default=None, repr=False)
    oversampling: tuple[float, ...] = ()
    shift: tuple[int, ...] = ()
    about: Mapping[str, object] = field(default_factory=dict)

    @property
    def ndim(self) -> int:
        """Axes of space, 2 or 3."""
        return self.kspace.ndim - 2

    @property
    def acceleration(self) -> float:
        """All samples / samples measured."""
        return 1 / self.mask.mean().item()

    def __str__(self) -> str:
        slices, coils, *space = self.kspace.shape
        lines = [f"{slices} slice{'s' * (slices > 1)}, {coils} coil{'s' * (coils > 1)}, {' x '.join(map(str, space))}"]
        lines[0] += f", R = {self.acceleration:.2f}"
        if self.voxel_mm:
            lines.append(f"voxels of {' x '.join(f'{v:.3g}' for v in self.voxel_mm)} mm (z, y, x)")
        if any(self.shift):
            lines.append(f"echo brought to the middle by {self.shift} samples")
        if self.noise is not None:
            lines.append(f"noise scan of {self.noise.shape[1]} samples a coil")
        if self.calibration is not None:
            lines.append(f"calibration scan of {' x '.join(map(str, self.calibration.shape[2:]))}")
        return "\n".join(lines + [f"{name}: {value}" for name, value in self.about.items()])


def raw_scan(path: str | os.PathLike, kspace: np.ndarray | Tensor, mask=None, **about) -> RawScan:
    """Return the record of k-space (slice, coil, *space), checked, its echo brought to the middle.

    mask: broadcastable to (slice, 1, *space), what the file says was measured; samples that are exactly zero in all
    coils were not, whatever it says. Coils that hold nothing but zeros are left out, which `about` says. about: the
    other fields of `RawScan`. Raises Unreadable for NaN, and for k-space that is zero everywhere.
    """
    kspace = torch.as_tensor(
        np.array(kspace) if isinstance(kspace, np.ndarray) and not kspace.flags.writeable else kspace
    )
    if not kspace.is_complex() or kspace.ndim not in (4, 5) or not kspace.numel():
        raise Unreadable(path, f"k-space of {kspace.dtype} {tuple(kspace.shape)}; expected complex (slice, coil, y, x)")
    kspace = kspace.to(torch.complex64)
    if not torch.isfinite(torch.view_as_real(kspace)).all():
        bad = int((~torch.isfinite(kspace)).sum())
        raise Unreadable(path, f"{bad} NaN or infinite samples of {kspace.numel()} in its k-space; export it again")
    measured = (kspace != 0).any(1, keepdim=True)
    if mask is not None:
        try:
            measured = measured & torch.as_tensor(np.asarray(mask) != 0).expand(measured.shape)
        except RuntimeError as error:
            raise Unreadable(path, f"a mask {np.shape(mask)} for k-space {tuple(kspace.shape)}; they differ") from error
    if not measured.any():
        raise Unreadable(path, "its k-space is zero everywhere; export it again")
    on = kspace.movedim(1, 0).flatten(1).any(1)
    if not on.all():  # nothing of the image is in coils that were switched off
        kspace = kspace[:, on]
        for name, axis in (("noise", 0), ("calibration", 1)):
            if about.get(name) is not None:
                about[name] = about[name].index_select(axis, on.nonzero()[:, 0])
        off = (~on).nonzero()[:, 0].tolist()
        about["about"] = {**(about.get("about") or {}), "coils that hold only zeros, left out": off}
    if len(measured) > 1 and torch.equal(measured, measured[:1].expand_as(measured)):
        measured = measured[:1]
    kspace, shift = recentred(kspace * measured, kspace.ndim - 2)
    space = tuple(range(-len(shift), 0))
    about.setdefault("oversampling", (1.0,) * len(shift))
    return RawScan(kspace, measured.float().roll(shift, space), shift=shift, **about)


def gapless(mask: Tensor) -> bool:
    """Whether a mask (*space) leaves nothing out between the first and the last sample of any line along any axis.

    So are full k-space, partial Fourier and ellipses; undersampling leaves gaps.
    """
    on = mask != 0
    for axis in range(on.ndim):
        before = on.cumsum(axis) > 0
        after = on.flip(axis).cumsum(axis).flip(axis) > 0
        if (before & after & ~on).any():
            return False
    return bool(on.any())


def echo_offset(kspace: Tensor, ndim: int = 2) -> tuple[int, ...]:
    """How far the peak of energy of k-space `(..., *space)` lies beyond the middle of each axis of space.

    0 within OFF_CENTRE samples, which the phase of the object explains; more is a partial echo or a shifted window.
    """
    energy = kspace.abs().square().flatten(0, -ndim - 1).sum(0)
    peak = np.unravel_index(int(energy.argmax()), energy.shape)
    offsets = [int(p) - n // 2 for p, n in zip(peak, energy.shape, strict=True)]
    return tuple(o if abs(o) > OFF_CENTRE else 0 for o in offsets)


def recentred(kspace: Tensor, ndim: int = 2) -> tuple[Tensor, tuple[int, ...]]:
    """k-space with its echo in the middle, and by how many samples it was turned along each axis of space.

    Turning k-space around (samples that leave at one side come in at the other) multiplies the image by a linear
    phase, exactly: on the grid, frequencies are periodic. So nothing is lost, and windows around the middle
    (calibration, masks with a full centre, low-pass filters, intensity scales) lie around the echo.
    """
    shift = tuple(-o for o in echo_offset(kspace, ndim))
    return (kspace.roll(shift, tuple(range(-ndim, 0))) if any(shift) else kspace), shift


def centred_box(values: np.ndarray, hits: np.ndarray) -> torch.Tensor | None:
    """The largest box around the centre of (slice, coil, z, y, x) that `hits` (slice, 1, z, y, x) fills, None if none.

    Zero frequency lies at n // 2 of the box, as of the whole.
    """
    full = hits[:, 0].min(0) > 0
    box = []
    for axis, n in enumerate(full.shape):
        line = full.any(axis=tuple(a for a in range(3) if a != axis))
        half = 0
        while half < n // 2 and line[n // 2 - half - 1 : n // 2 + half + 1].all():
            half += 1
        box.append(slice(0, 1) if n == 1 else slice(n // 2 - half, n // 2 + half))
    if not full[tuple(box)].size or not full[tuple(box)].all():
        return None
    return torch.from_numpy(np.ascontiguousarray(values[(slice(None), slice(None), *box)]))


def looks_like_kspace(array: np.ndarray) -> bool:
    """Whether an array of unstated axes is k-space: complex, with a peak near the middle that towers over the rest.

    Looked at in one plane of its two longest axes. Peak / mean is 280 to 1,300 in k-space of brains, 50 in radial
    k-space, 6 to 13 in images of coils.
    """
    if array.dtype.kind != "c" or array.ndim < 2:
        return False
    plane = sorted(np.argsort(array.shape, kind="stable")[-2:])
    part = np.abs(array[tuple(slice(None) if i in plane else n // 2 for i, n in enumerate(array.shape))])
    if not np.isfinite(part).all() or not part.any():
        return False
    peak = np.unravel_index(part.argmax(), part.shape)
    central = all(abs(p - n // 2) <= max(n // 8, 2) for p, n in zip(peak, part.shape, strict=True))
    return bool(central and part.max() > min(PEAK, 0.8 * part.size**0.5) * part.mean())


def describe(form: str, scan_shape: tuple[int, ...], **more) -> Description:
    """Return the description of k-space of shape (slice, coil, y, x) or (slice, coil, z, y, x)."""
    axes = ("slice", "coil", "z", "y", "x") if len(scan_shape) == 5 else ("slice", "coil", "y", "x")
    return Description("k-space", form, axes, tuple(scan_shape), dtype="complex64", **more)


def choose(path: str | os.PathLike, counts: Mapping[str, int], which: Choice) -> dict[str, int]:
    """Return the index along every axis of `counts` (repetition, contrast, ...): the only one, or what `which` says.

    which: {"repetition": 0}, or in words as `chosen_of`. Raises Unreadable where there are several and none is chosen,
    for an index out of range, and for an unknown axis.
    """
    which = chosen_of(which) if isinstance(which, str) else dict(which or {})
    if unknown := set(which) - set(counts):
        raise Unreadable(
            path, f"has no axis {', '.join(sorted(unknown))}; it has {', '.join(counts) or 'none to choose'}"
        )
    open_ = {name: n for name, n in counts.items() if n > 1 and name not in which}
    if open_:
        several = ", ".join(f"{n} of {name}" for name, n in open_.items())
        wanted = ", ".join(f"{name} 0" for name in open_)
        raise Unreadable(path, f"holds {several}; choose with which='{wanted}'")
    for name, i in which.items():
        if not 0 <= i < counts[name]:
            raise Unreadable(path, f"{name} {i} of a file with {counts[name]}; choose 0 to {counts[name] - 1}")
    return {name: which.get(name, 0) for name in counts}


def chosen_of(text: str) -> dict[str, int]:
    """Which of several a text names: "repetition 0, frame 3" -> {"repetition": 0, "frame": 3}; raises ValueError."""
    found = {}
    for part in text.split(","):
        name, _, number = part.strip().replace("=", " ").partition(" ")
        if not name or not number.strip().isdecimal():
            raise ValueError(f"which={text!r}; write names and numbers from 0, as in 'repetition 0, frame 3'")
        found[name] = int(number)
    return found


def read_kspace(item: Item, axes: str | None = None, which: str | None = None) -> RawScan:
    """The scan of an item of the intake whose kind is k-space.

    axes: of arrays that do not tell them; other formats know theirs. which: as `chosen_of`. Raises Unreadable, or
    ValueError for a choice in a file that holds one thing.
    """
    options: dict[str, object] = {"axes": axes} if axes and item.reader.name in UNNAMED else {}
    if which and item.reader.name == "fastMRI":
        raise ValueError(f"which={which!r}: {item.name} ({item.what.format}) holds nothing to choose from")
    return item.read(**options, **({"which": which} if which else {}))
