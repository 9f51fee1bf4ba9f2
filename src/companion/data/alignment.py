"""Are two images of one head on one grid, and do they match?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import affine_transform, gaussian_filter

from companion.data.intensity import FOREGROUND, scaled
from companion.data.nifti import Volume
from companion.information.pairs import entropy, normalised

MAX_SHIFT = 0.75  # pixels that a pair may seem apart: noise makes half of one, a neighbouring slice a whole
QUARTER = 2000  # pixels from which a quarter of an image has enough of a joint histogram to say how it fits


# ----------------------------------------------------------------------------------------------------------- geometry


def grid_distance_mm(a: Volume, b: Volume) -> float:
    """How far, at most, equal voxel indices of two volumes lie apart in mm; infinite if their shapes differ."""
    if a.array.shape != b.array.shape:
        return float("inf")
    z, y, x = a.array.shape
    corners = np.array([(i, j, k, 1) for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)])
    return float(np.linalg.norm((corners @ (a.affine - b.affine).T)[:, :3], axis=1).max())


def resample(volume: Volume, reference: Volume, nearest: bool = False) -> Volume:
    """The volume on the grid of another, by their affines; trilinear after a Gaussian against aliasing.

    Voxels outside become the smallest value of the volume. This does not register: it trusts that both affines lead
    to the same world. nearest: for labels. Raises ValueError if the volumes do not overlap.
    """
    to_voxel = np.linalg.inv(volume.affine) @ reference.affine  # (x, y, z) indices of the reference to those here
    shape = np.array(reference.array.shape[::-1])
    probe = np.stack(np.meshgrid(*(np.linspace(0, n - 1, 12) for n in shape), indexing="ij")).reshape(3, -1)
    at = to_voxel[:3, :3] @ probe + to_voxel[:3, 3:]
    if not ((at > -0.5) & (at < np.array(volume.array.shape[::-1])[:, None] - 0.5)).all(0).any():
        raise ValueError("the two volumes lie in different places and do not overlap; check their affines")
    array = volume.array if nearest else volume.array.astype(np.float32)
    if not nearest:
        step = np.linalg.norm(to_voxel[:3, :3], axis=1)[::-1]  # of the new grid, in voxels of this one
        array = gaussian_filter(array, np.sqrt((step**2 - 1).clip(0)) / 2.355)
    moved = affine_transform(
        array,
        to_voxel[:3, :3][::-1, ::-1],
        to_voxel[:3, 3][::-1].tolist(),
        output_shape=reference.array.shape,
        order=0 if nearest else 1,
        cval=float(array.min()),
    )
    return Volume(moved, reference.affine)


@dataclass(frozen=True)
class Alignment:
    """How two images fit: the shift of the second that would fit best, along each axis, in pixels.

    `information` is their normalised mutual information as they are, `best` the largest that was found nearby; `reach`
    the largest shifts tried. A shift as long as the reach may be longer, or the images have nothing in common. `local`
    is the longest in-plane shift of any quarter by itself, which tells rotations and stretches; 0 for small images.
    """

    shift: tuple[float, ...]
    information: float
    best: float
    reach: tuple[int, ...]
    local: float = 0.0

    @property
    def distance(self) -> float:
        """The longest shift along any axis, of the whole or of a quarter, pixels; infinite at the end of the reach."""
        return float("inf") if self._far else max(self.local, *(abs(s) for s in self.shift))

    @property
    def _far(self) -> bool:
        return any(abs(s) >= r > 0 for s, r in zip(self.shift, self.reach, strict=True))

    def __str__(self) -> str:
        shift = " x ".join(f"{s:+.1f}" for s in self.shift)
        shift += " pixels or more, or unrelated" if self._far else " pixels"
        told = f"mutual information {self.information:.3f}, {self.best:.3f} nearby"
        return f"shifted by {shift}, a quarter by {self.local:.1f} ({told})"


def alignment(a: np.ndarray, b: np.ndarray, reach: int = 3, bins: int = 32) -> Alignment:
    """How two images or volumes of the same shape, (y, x) or (z, y, x), of any contrasts, fit each other.

    Compares the mutual information where they are with that after shifts of up to `reach` pixels along each axis by
    itself (less along axes too short for it); a parabola through the maximum gives fractions. Quarters are compared
    likewise if they have `QUARTER` pixels. It sees displacements of about a pixel; two people whose heads are alike
    may pass. Raises ValueError for different shapes, NaN or constant images.
    """
    a, b = (np.asarray(x) for x in (a, b))
    if a.shape != b.shape or a.ndim not in (2, 3):
        raise ValueError(f"pairs must have one shape, (y, x) or (z, y, x), got {a.shape} and {b.shape}")
    values = scaled(a, name="the first image")[0], scaled(b, name="the second image")[0]
    reaches = tuple(min(reach, (n - 1) // 4) for n in a.shape)
    middle = [slice(r, n - r) for r, n in zip(reaches, a.shape, strict=True)]  # so that every shift counts as many
    shift, here, best = _best_shift(*values, middle, reaches, bins)
    halves = [(slice(s.start, (s.start + s.stop) // 2), slice((s.start + s.stop) // 2, s.stop)) for s in middle[-2:]]
    quarters = [(*middle[:-2], rows, columns) for rows in halves[0] for columns in halves[1]]
    quarters = [q for q in quarters if a[q].size >= QUARTER and all(np.ptp(v[q]) > FOREGROUND for v in values)]
    in_plane = (*(0 for _ in middle[:-2]), *reaches[-2:])
    local = [max(map(abs, _best_shift(*values, q, in_plane, bins // 2)[0])) for q in quarters]
    return Alignment(shift, here, best, reaches, max(local, default=0.0))


def _best_shift(a: np.ndarray, b: np.ndarray, region: Sequence[slice], reaches: Sequence[int], bins: int):
    """The shift of `b` along each axis at which it tells most about `a` in `region`; what it tells now, and at best."""
    fixed, moving = (np.rint(x * (bins - 1)).astype(np.int64) for x in (a, b))
    fixed = fixed[tuple(region)].ravel() * bins

    def information(axis: int, by: int) -> float:
        window = [slice(s.start + by, s.stop + by) if i == axis else s for i, s in enumerate(region)]
        counts = np.bincount(fixed + moving[tuple(window)].ravel(), minlength=bins * bins)
        p = torch.from_numpy(counts.reshape(bins, bins) / counts.sum())
        h1, h2 = entropy(p.sum(1)), entropy(p.sum(0))
        return float(normalised(h1 + h2 - entropy(p, dims=2), h1, h2))

    here = information(0, 0)
    curves = [[here if by == 0 else information(axis, by) for by in range(-r, r + 1)] for axis, r in enumerate(reaches)]
    # Where the second image, read `by` further on, fits the first, it lies `by` too far along the axis.
    return tuple(-_peak(curve) for curve in curves), here, max(map(max, curves))


def _peak(curve: Sequence[float]) -> float:
    """Where a curve sampled at ..., -1, 0, 1, ... is largest; the top of the parabola through it and its neighbours."""
    i, middle = int(np.argmax(curve)), len(curve) // 2
    if i in (0, len(curve) - 1):
        return float(i - middle)
    left, top, right = curve[i - 1 : i + 2]
    bend = left - 2 * top + right
    return i - middle + (0.5 * (left - right) / bend if bend < 0 else 0.0)
