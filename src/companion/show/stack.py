"""Named image arrays that are looked at together: opened from any file, cut into pictures, painted as PNG.

This is the gallery without its widgets: everything here is NumPy, so that a slider answers in milliseconds.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from companion.data.cfl import read_cfl
from companion.data.intake.readers import is_image, read_frames
from companion.data.intake.records import Volume
from companion.data.npz import read_npz
from companion.extras import extra
from companion.workbench.run import IMAGES

PARTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "magnitude": np.abs,
    "phase": np.angle,
    "real": np.real,
    "imaginary": np.imag,
    "log10 magnitude": lambda x: np.log10(np.maximum(np.abs(x), 1e-12)),
}
ROLES = {
    "truth": ("truth", "target", "reference"),
    "estimate": ("estimate", "mean", "reconstruction"),
    "error": ("error",),
    "std": ("std", "deviation"),
    "draws": ("draw", "sample", "posterior"),
}
BART = (
    "readout",
    "phase 1",
    "phase 2",
    "coil",
    "map",
    "echo",
    "coefficient",
    "coefficient 2",
    "level",
    "axis 9",
    "time",
    "cardiac",
    "respiratory",
    "slice",
    "average",
    "batch",
)
GIB = 2**30
LARGEST = 2 * GIB  # bytes read into memory; .npy files are mapped and may be larger


@dataclass(frozen=True, eq=False)
class Stack:
    """Arrays with named axes: two of them make the picture, each of the others is a slider.

    labels: values along an axis. voxel_mm: size by axis. window: grey levels (low, high). affine: 4 x 4, of z, y, x
    arrays, as in `data.nifti`. source: where it comes from, in words.
    """

    arrays: Mapping[str, np.ndarray]
    axes: Mapping[str, tuple[str, ...]]
    labels: Mapping[str, Sequence] = field(default_factory=dict)
    voxel_mm: Mapping[str, float] = field(default_factory=dict)
    unit: str = ""
    window: tuple[float, float] | None = None
    affine: np.ndarray | None = None
    source: str = ""

    @property
    def lengths(self) -> dict[str, int]:
        """Axis -> the largest length that any array has along it, leading axes first."""
        order = sorted(self.axes, key=lambda name: -len(self.axes[name]))
        lengths = {axis: 0 for name in order for axis in self.axes[name]}
        for name in order:
            for axis, n in zip(self.axes[name], self.arrays[name].shape, strict=True):
                lengths[axis] = max(lengths[axis], n)
        return lengths

    @property
    def planes(self) -> list[tuple[str, str]]:
        """Pairs of axes (rows, columns) that can make a picture, the natural one first."""
        names = list(self.lengths)
        rows, columns = ("y", "x") if {"y", "x"} <= set(names) else next(iter(self.axes.values()))[-2:]
        first = rows, columns
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        return [first, *(pair for pair in pairs if pair != first)]

    def role(self, name: str) -> str | None:
        """The array that is the truth, estimate, error, std or draws: the first whose name begins like that."""
        return next((key for key in self.arrays if key.lower().startswith(ROLES[name])), None)

    def is_complex(self) -> bool:
        """Whether any array is complex."""
        return any(np.iscomplexobj(array) for array in self.arrays.values())

    def cut(self, name: str, at: Mapping[str, int], plane: tuple[str, str], over: str = "") -> np.ndarray | None:
        """The picture (rows, columns) of one array at a position, or pictures (over, rows, columns).

        None where the array does not reach: too short along an axis, or without one that the picture needs. The z axis
        points up in a picture, as heads do.
        """
        axes, array = self.axes[name], self.arrays[name]
        wanted = ([over] if over else []) + list(plane)
        if not set(wanted) <= set(axes):
            return None
        index = tuple(slice(None) if axis in wanted else at.get(axis, 0) for axis in axes)
        if any(i >= n for i, n in zip(index, array.shape, strict=True) if isinstance(i, int)):
            return None
        kept = [axis for axis in axes if axis in wanted]
        picture = np.asarray(array[index]).transpose([kept.index(axis) for axis in wanted])
        return picture[..., ::-1, :] if plane[0] == "z" else picture


def pictures(
    stack: Stack, at: Mapping[str, int], plane: tuple[str, str], part: str = "magnitude"
) -> dict[str, np.ndarray]:
    """Every array's picture at a position, real, and those that follow: estimate, error and std, by name.

    The estimate is the mean of the draws, std the standard deviation of their magnitudes, error the difference of the
    magnitudes of estimate and truth; each only where the stack does not hold it already.
    """
    shown = {name: x for name in stack.arrays if (x := stack.cut(name, at, plane)) is not None}
    complex_ = {name for name, x in shown.items() if np.iscomplexobj(x)}
    truth, estimate, draws = (stack.role(name) for name in ("truth", "estimate", "draws"))
    many = stack.cut(draws, at, plane, "draw") if draws and "draw" in stack.axes[draws] else None
    mean = shown.get(estimate) if estimate else None
    derived = {}
    if many is not None and estimate is None:
        derived["estimate"] = mean = many.mean(0)
        complex_ |= {"estimate"} if np.iscomplexobj(mean) else set()
    if mean is not None and truth in shown and mean.shape == shown[truth].shape and not stack.role("error"):
        derived["error"] = np.abs(np.abs(mean) - np.abs(shown[truth]))
    if many is not None and len(many) > 1 and not stack.role("std"):
        derived["std"] = np.abs(many).std(0)
    if truth in shown:
        shown = {truth: shown.pop(truth)} | shown
    return {
        name: PARTS[part](x) if name in complex_ else x.astype(float, copy=False)
        for name, x in (shown | derived).items()
    }


def kind(stack: Stack, name: str) -> str:
    """What a picture shows: "error", "std", or "image"."""
    return next((role for role in ("error", "std") if name == role or stack.role(role) == name), "image")


def mosaic(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of one size in rows and columns, row by row; a grid about as wide as high."""
    columns = int(np.ceil(np.sqrt(len(tiles))))
    rows = -(-len(tiles) // columns)
    height, width = tiles[0].shape
    sheet = np.full((rows * columns, height, width), np.nan)
    sheet[: len(tiles)] = tiles
    return sheet.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)


@cache
def colour_table(name: str) -> np.ndarray:
    """256 colours (256, 3), uint8, of a matplotlib map."""
    with extra("notebooks"):
        from matplotlib import colormaps

    return (colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def paint(x: np.ndarray, low: float, high: float, colours: str = "gray") -> np.ndarray:
    """Pixels, uint8, (y, x) for grey or (y, x, 3): low is the first colour, high the last; NaN shows as the first."""
    levels = (np.nan_to_num(x, nan=low) - low) * (255 / max(high - low, 1e-30))
    levels = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return levels if colours == "gray" else colour_table(colours)[levels]


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of painted pixels."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def make_stack(arrays, source: str = "", **about) -> Stack:
    """The stack of a mapping of arrays or tensors, or of one; axes are guessed from shapes and names unless given."""
    arrays = arrays if isinstance(arrays, Mapping) else {"image": arrays}
    arrays = {name: _picturable(array) for name, array in arrays.items()}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    if not arrays:
        raise ValueError(f"{source or 'this'} holds no image: no array of numbers with two axes or more")
    if "axes" not in about:
        about["axes"] = {name: _guess_axes(name, a.ndim) for name, a in arrays.items()}
    return Stack(arrays, source=source, **about)


def open_stack(path: str | os.PathLike, only: Sequence[str] = ()) -> Stack:
    """The images of a .h5, .npz, .npy or .cfl file, or of an image volume that `data.intake` reads (.nii, ...).

    only: names of arrays to read from a file of many. Raises FileNotFoundError, or ValueError for a file that is
    damaged, holds no image, or is too large for memory, with the reason.
    """
    path = Path(path)
    suffix = ".nii" if is_image(path) else path.suffix.lower()
    if suffix not in READERS:
        raise ValueError(f"{path.name}: cannot show this kind of file; known are {', '.join(READERS)}, .png and .gif")
    if not path.exists() and suffix not in (".cfl", ".hdr"):
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return READERS[suffix](path, tuple(only))
    except (KeyError, EOFError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path.name} is damaged or not what its name says: {' '.join(str(error).split())}") from None


def _picturable(array) -> np.ndarray | None:
    """An array of numbers without single-element axes, or None when that leaves less than two."""
    array = array.detach().cpu().resolve_conj().numpy() if hasattr(array, "detach") else np.asanyarray(array)
    if array.dtype.kind not in "fciub" or array.size == 0:
        return None
    array = array[tuple(0 if n == 1 and i < array.ndim - 2 else slice(None) for i, n in enumerate(array.shape))]
    return array if array.ndim >= 2 else None


def _guess_axes(name: str, ndim: int) -> tuple[str, ...]:
    if ndim == 3 and name.lower().startswith(ROLES["draws"]):
        return ("draw", "y", "x")
    if name.lower().startswith("kspace") and ndim in (3, 4):
        return ("slice", "coil", "y", "x")[-ndim:]
    lead = [f"axis {i}" for i in range(1, ndim - 3)] + ["draw", "slice"]
    return (*lead[len(lead) - (ndim - 2) :], "y", "x")


def _read_npz(path: Path, only: tuple[str, ...]) -> Stack:
    return make_stack(read_npz(path, only or None), path.name)


def _read_npy(path: Path, only: tuple[str, ...]) -> Stack:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path.name}: not a readable array of numbers ({error}); save it again") from error
    return make_stack({path.stem: array}, path.name)


def _read_hdf5(path: Path, only: tuple[str, ...]) -> Stack:
    import h5py

    with h5py.File(path) as file:
        found: dict[str, h5py.Dataset] = {}
        file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
        found = {n: d for n, d in found.items() if d.dtype.kind in "fciub" and d.ndim >= 2 and (not only or n in only)}
        if (size := sum(d.size * d.dtype.itemsize for d in found.values())) > LARGEST:
            raise ValueError(
                f"{path.name} holds {size / GIB:.1f} GiB; open some of it with only=[...]: {', '.join(found)}"
            )
        arrays = {name: d[()] for name, d in found.items()}
        if file.attrs.get("format") != IMAGES:
            return make_stack(arrays, path.name)
        about = json.loads(str(file.attrs["about"]))
        arrays = {name: arrays[name] for name in about["arrays"] if name in arrays}  # HDF5 sorts by name
        axes = {name: tuple(str(d.attrs["axes"]).split()) for name, d in found.items()}
        voxel = dict(zip("zyx", about["voxel_mm"], strict=True)) if about["voxel_mm"] else {}
        window = tuple(about["window"]) if about["window"] else None
    return Stack(arrays, axes, about["labels"], voxel, about["unit"], window, source=path.name)


def _read_nifti(path: Path, only: tuple[str, ...]) -> Stack:
    frames, affine = read_frames(path)
    volume = Volume(frames[0], affine)
    array, axes = (frames, ("frame", "z", "y", "x")) if len(frames) > 1 else (volume.array, ("z", "y", "x"))
    name = re.sub(r"(\.gz|\.bz2)?$", "", path.name, flags=re.IGNORECASE).rsplit(".", 1)[0]
    voxel_mm = dict(zip("zyx", volume.voxel_mm, strict=True))
    return Stack({name: array}, {name: axes}, voxel_mm=voxel_mm, affine=affine, source=path.name)


def _read_cfl(path: Path, only: tuple[str, ...]) -> Stack:
    array = read_cfl(path).numpy()
    kept = [i for i, n in enumerate(array.shape) if n > 1 or i < 2]
    shape = [array.shape[i] for i in kept]
    order = [*range(2, len(kept)), 0, 1]  # BART's first two axes make the picture
    axes = tuple(BART[kept[i]] if kept[i] < len(BART) else f"axis {kept[i]}" for i in order)
    name = path.name.removesuffix(path.suffix)
    return Stack({name: array.reshape(shape).transpose(order)}, {name: axes}, source=path.name)


READERS: dict[str, Callable[[Path, tuple[str, ...]], Stack]] = {
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".nii": _read_nifti,
    ".cfl": _read_cfl,
    ".hdr": _read_cfl,
}
