"""A picture of what the intake sees: the middle of each scan of a file or folder."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np

from companion.data.intake.records import Found, Item, Unreadable, Volume
from companion.data.sinograms import read_sinograms
from companion.data.slicing import turned
from companion.extras import extra
from companion.files import atomic_write

with extra("notebooks"):
    import matplotlib.pyplot as plt


def picture(found: Found, path: str | os.PathLike, most: int = 16) -> Path:
    """Return the path of the PNG written: the middle slices of the first scans, volumes in three planes.

    Of k-space the logarithm of its magnitude, all coils together; of PET sinograms the counts. Scans that cannot be
    read show the reason.
    """
    items = found.items[:most]
    columns = min(4, max(1, math.ceil(math.sqrt(len(items)))))
    rows = max(1, math.ceil(len(items) / columns))
    size = (3.6 * columns, 1.9 * rows + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, item in zip(axes.flat, items, strict=False):
        axis.set_title(f"{item.person} {item.session}\n{item.path.name}".strip(), fontsize=7)
        try:
            axis.imshow(_shown(item), cmap="gray", interpolation="nearest")
        except (Unreadable, OSError) as error:
            text = error.reason if isinstance(error, Unreadable) else str(error)
            axis.text(0.5, 0.5, text, ha="center", va="center", wrap=True, fontsize=7, transform=axis.transAxes)
    path = Path(path)
    with atomic_write(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
    plt.close(figure)
    return path


def _shown(item: Item) -> np.ndarray:
    """One image (rows, columns) of a scan, the head up, grey levels up to its 99.5th percentile."""
    if item.what.kind == "picture":
        return item.read()
    if item.what.kind == "sinogram":
        counts = read_sinograms(item.path).arrays["counts"]
        return counts if counts.ndim == 2 else counts[len(counts) // 2]
    if item.what.kind == "k-space":
        kspace = item.read().kspace
        one = kspace[len(kspace) // 2].abs().square().sum(0).sqrt().numpy()
        one = one[len(one) // 2] if one.ndim == 3 else one
        return np.log10(one + 1e-3 * one.max() + 1e-30)
    read = item.read(frame=0 if item.what.axes[:1] == ("t",) else None)
    array = read.array if isinstance(read, Volume) else np.asarray(read)
    array = np.abs(array) if np.iscomplexobj(array) else array.astype(float)
    return np.minimum(_planes(Volume(array, read.affine)), max(np.percentile(array, 99.5), 1e-12))


def _planes(volume: Volume) -> np.ndarray:
    """The middle of a volume in its axial, coronal and sagittal plane by its affine, side by side at square pixels.

    Noses and heads are up, the person's right is on the right; of a single slice that slice as it is stored.
    """
    if min(volume.array.shape) < 4:
        return volume.array[len(volume.array) // 2]
    upright = turned(volume, "axial")
    array, voxel_mm = upright.array, upright.voxel_mm
    z, y, x = array.shape
    cuts = ((array[z // 2], 1, 2), (array[::-1, y // 2], 0, 2), (array[::-1, :, x // 2], 0, 1))
    step = min(voxel_mm)
    pictures = []
    for cut, row, column in cuts:
        rows, columns = (max(1, round(array.shape[i] * voxel_mm[i] / step)) for i in (row, column))
        at = np.ix_(*(np.arange(n) * m // n for n, m in ((rows, cut.shape[0]), (columns, cut.shape[1]))))
        pictures.append(cut[at])
    height = max(len(p) for p in pictures)
    return np.hstack([np.pad(p, ((0, height - len(p)), (0, 2))) for p in pictures])
