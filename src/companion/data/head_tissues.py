"""Where the brain of a T1-weighted head is, and which signal its tissues have: enough to give a head an activity, or to
take its fat away.

    brain = brain_mask(signal, voxel_mm)            # share of brain, 0 to 1, on the grid of `signal`
    brain, bias = even_brain(signal, voxel_mm)      # the same where coils see some places better than others
    levels = tissue_levels(signal / bias, brain)    # signal of CSF, grey and white matter

Classical steps, no learned segmentation: what lies deep within tissue and hangs together is the brain (erosion, the
largest component, geodesic dilation), N4 inside it gives the receive bias, and a mixture of three Gaussians the signal
of its tissues.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from companion.data.heads import AIR, BRIGHT, Head
from companion.extras import extra

COARSE_MM = 2.0  # grid on which the brain is looked for
BRAIN_ML = (700.0, 2100.0)  # volumes that a brain may have; the search goes on outside
TYPICAL_ML = (1100.0, 1900.0)  # that most have: looked for first, for thin cuts join the scalp, thick ones lose gyri
LEVELS = (0.36, 0.42, 0.48, 0.3, 0.54, 0.6)  # of bright tissue, above which there is tissue
TRIALS = ((TYPICAL_ML, (2, 3)), (BRAIN_ML, (2, 3, 1, 4)))  # volumes, and coarse voxels that are eroded
BELOW_TOP_MM = 40.0  # of the head, at most, that a brain begins: muscles of face and neck hang together, too
FAT = 0.9  # of the mean of grey and white matter, above which signal outside of the brain is fat
CLOSING = 4  # coarse voxels: sulci and ventricles that are narrower are closed
BIAS_MM = 6.0  # grid on which the receive bias is looked for
ROUNDS = 2  # of bias and brain; a third lets the brain of a head with a strong bias run into the neck
REGROWTH = 4  # coarse voxels beyond the brain so far, where a round looks for more
FLUID = 0.42  # of white matter, below which nothing is brain tissue


def brain_mask(signal: np.ndarray, voxel_mm) -> np.ndarray:
    """Return the share of brain (x, y, z) float32, 0 to 1, of a T1-weighted head, axes towards right, front and top.

    signal: any scale. Ventricles and sulci count as brain. Raises ValueError where no connected tissue has the volume
    of a brain: another contrast, a part of a head, or axes in another order.
    """
    voxel_mm = np.asarray(voxel_mm, float)
    coarse = _coarse(signal, voxel_mm)
    bright = np.percentile(coarse[coarse > 0.1 * np.percentile(coarse, 99.5)], 95)
    top = _top(coarse > LEVELS[0] * bright)
    found, volumes = None, []
    for (least, most), radii in TRIALS:
        for low, radius in product(LEVELS, radii):
            core = _core((coarse > low * bright) & (coarse < 1.35 * bright), radius)
            if core is None:
                continue
            volumes.append(core.sum() * COARSE_MM**3 / 1e3)
            if least < volumes[-1] < most and top - _top(core) < BELOW_TOP_MM / COARSE_MM:
                found = core
                break
        if found is not None:
            break
    if found is None:
        raise ValueError(
            f"no connected tissue of {BRAIN_ML[0]:g} to {BRAIN_ML[1]:g} mL in this image, but of "
            f"{', '.join(f'{v:.0f}' for v in sorted(set(volumes))) or 'none'}: expected a whole T1-weighted head, axes "
            "to right, front, top"
        )
    return _on_grid(found, signal.shape, voxel_mm)


def even_brain(signal: np.ndarray, voxel_mm) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of brain, as `brain_mask`, and the receive bias (x, y, z), of mean 1 in the brain.

    Cortex that the coils see too dimly for `brain_mask` is found by what the tissues beside it have: the bias inside
    the brain so far is divided out everywhere, and the brain grows into what is between fluid and white matter. `signal
    / bias` has even tissues in the brain; outside, the bias is extrapolated. Raises ValueError as `brain_mask`.
    """
    signal = np.asarray(signal, np.float32)
    brain = brain_mask(signal, voxel_mm)
    for _ in range(ROUNDS):
        even = signal / receive_bias(signal, brain, voxel_mm)
        brain = _regrown(even, brain, np.asarray(voxel_mm, float))
    return brain, receive_bias(signal, brain, voxel_mm)


def receive_bias(signal: np.ndarray, brain: np.ndarray, voxel_mm) -> np.ndarray:
    """The receive bias of a head by N4 (Tustison et al., IEEE TMI 2010) inside its brain, of mean 1 there."""
    with extra("formats"):
        import SimpleITK as sitk
    image, mask = (sitk.GetImageFromArray(np.ascontiguousarray(a)) for a in (signal, (brain > 0.5).astype(np.uint8)))
    search = sitk.N4BiasFieldCorrectionImageFilter()
    search.SetMaximumNumberOfIterations([30, 30, 30])
    search.SetNumberOfThreads(1)  # sums in another order would end elsewhere
    shrink = [max(1, int(BIAS_MM / v)) for v in reversed(tuple(voxel_mm))]
    search.Execute(sitk.Shrink(image, shrink), sitk.Shrink(mask, shrink))
    field = np.exp(sitk.GetArrayFromImage(search.GetLogBiasFieldAsImage(image)))
    return (field / field[brain > 0.5].mean()).clip(0.3, 3)


def _regrown(even: np.ndarray, brain: np.ndarray, voxel_mm: np.ndarray) -> np.ndarray:
    """The brain of a head of even tissues, which holds much of `brain`: what hangs together near it, and its gyri."""
    _, grey, white = tissue_levels(even, brain)
    low, high = max(fluid_level(grey, white), FLUID * white), white + 0.8 * (white - grey)
    coarse, before = _coarse(even, voxel_mm), _coarse(brain, voxel_mm) > 0.5
    tissue = (coarse > low) & (coarse < high) & (_depth(~before) <= REGROWTH)
    core = _core(tissue, 2)
    if core is None:
        return brain
    opened = tissue & (_depth(_depth(tissue) <= 1) <= 1.6)  # no bridges of one voxel, as dura is
    for _ in range(2):  # gyri that erosion had taken
        core = core | (np.asarray(ndimage.binary_dilation(core), bool) & opened)
    return _on_grid(_closed(core), even.shape, voxel_mm)


def _coarse(image: np.ndarray, voxel_mm: np.ndarray) -> np.ndarray:
    """An image (x, y, z) on the grid of `COARSE_MM`, with little of its noise."""
    coarse = ndimage.zoom(np.asarray(image, np.float32), voxel_mm / COARSE_MM, order=1, grid_mode=True, mode="nearest")
    return np.asarray(ndimage.gaussian_filter(coarse, 0.4))


def _on_grid(inside: np.ndarray, shape: tuple[int, ...], voxel_mm: np.ndarray) -> np.ndarray:
    """A mask of the coarse grid as shares, 0 to 1, on the grid of an image."""
    smooth = ndimage.gaussian_filter(inside.astype(np.float32), 0.7)
    grid = np.meshgrid(
        *((np.arange(n) + 0.5) * v / COARSE_MM - 0.5 for n, v in zip(shape, voxel_mm, strict=True)), indexing="ij"
    )
    return ndimage.map_coordinates(smooth, grid, order=1, mode="nearest").astype(np.float32)


def _top(inside: np.ndarray) -> int:
    """The highest level at which a mask (x, y, z) holds more than a few voxels."""
    return int(np.flatnonzero(inside.sum((0, 1)) > 20)[-1:].sum())


def _depth(inside: np.ndarray) -> np.ndarray:
    """How far each voxel is from the outside, in voxels."""
    return np.asarray(ndimage.distance_transform_edt(inside))


def _core(tissue: np.ndarray, radius: int) -> np.ndarray | None:
    """The brain among tissue on the coarse grid: eroded, the largest component, grown back, closed, holes filled."""
    ball = _depth(tissue) > radius
    parts, count = cast("tuple[np.ndarray, int]", ndimage.label(ball))
    if not count:
        return None
    largest = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    near = _depth(~largest) <= radius + 0.6
    grown = near & tissue
    return _closed(grown)


def _closed(inside: np.ndarray) -> np.ndarray:
    """A mask with its sulci, ventricles and holes."""
    closed = _depth(_depth(~inside) <= CLOSING) > CLOSING
    return np.asarray(ndimage.binary_fill_holes(closed | inside))


def tissue_levels(signal: np.ndarray, brain: np.ndarray, iterations: int = 60) -> tuple[float, float, float]:
    """Return the signals of CSF, grey and white matter: the means of a mixture of three Gaussians inside the brain."""
    values = signal[brain > 0.5]
    values = values[:: max(1, len(values) // 50_000)].astype(float)
    mean = np.percentile(values, (8, 45, 85))
    spread, share = np.full(3, values.std() / 3), np.ones(3) / 3
    for _ in range(iterations):
        density = share / spread * np.exp(-((values[:, None] - mean) ** 2) / (2 * spread**2)) + 1e-30
        weight = density / density.sum(1, keepdims=True)
        total = weight.sum(0)
        mean, share = (weight * values[:, None]).sum(0) / total, total / len(values)
        spread = np.sqrt((weight * (values[:, None] - mean) ** 2).sum(0) / total).clip(0.02 * values.std())
    csf, grey, white = np.sort(mean)
    return float(csf), float(grey), float(white)


def fluid_level(grey: float, white: float) -> float:
    """Return the signal of CSF as those of grey and white matter tell it: few pixels of a brain are fluid alone."""
    return max(0.1 * grey, grey - 1.3 * (white - grey))


def fat_suppressed(head: Head, left: float = 0.15) -> Head:
    """Return a T1-weighted head as a sequence shows it that suppresses fat: scalp, marrow and orbits are dark.

    Outside of the brain, what is brighter than nearly its white matter keeps `left` of its signal, with its edges; 1 is
    bright tissue again. Raises ValueError as `brain_mask`.
    """
    signal = head.signal[::2, ::2, ::2].numpy()  # of the file's own voxels
    brain = brain_mask(signal, [2 * mm for mm in head.voxel_mm]) > 0.5
    _, grey, white = tissue_levels(signal, brain)
    near = ndimage.gaussian_filter(ndimage.binary_dilation(brain, iterations=2).astype(np.float32), 1.0)
    bright = (signal > FAT * (grey + white) / 2) & (near < 0.5)
    edges = ndimage.binary_dilation(bright, iterations=2).astype(np.float32)
    fat = torch.from_numpy(ndimage.gaussian_filter(edges, 0.8) * (1 - near))[None, None]
    fat = F.interpolate(fat, size=head.signal.shape, mode="trilinear", align_corners=True)[0, 0]
    dark = replace(head, name=f"{head.name}_no_fat", signal=head.signal * (1 - (1 - left) * fat))
    levels = dark.at(head.tissue)
    top = torch.quantile(levels[levels > AIR], BRIGHT / 100).item()
    return replace(dark, signal=dark.signal / top, levels=levels / top)
