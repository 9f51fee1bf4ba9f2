"""Look at any file or array: `view` in the viewer, `explore` in a volume renderer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from companion.extras import extra
from companion.show.picture import Picture, Shown
from companion.show.stack import Stack, make_stack, open_stack
from companion.show.viewer import Viewer


def view(first, second=None, *, only=(), folder=None) -> Shown | Picture:
    """A viewer of a file (.cfl, .npy, .npz, .nii, .h5, .png, .gif), an array or tensor, or a mapping of them.

    second: another, to compare: shown beside the first, with the difference. only: names of arrays in a file of many.
    folder: where the save buttons write, by default runs/saved. Raises FileNotFoundError or ValueError.
    """
    if isinstance(first, (str, os.PathLike)) and Path(first).suffix.lower() in (".png", ".gif", ".jpg"):
        picture = Picture(value=Path(first).read_bytes(), format=Path(first).suffix[1:].lower().replace("jpg", "jpeg"))
        picture.tooltip = Path(first).stem
        return picture
    stacks = [_stack(source, only) for source in (first, second) if source is not None]
    if len(stacks) == 1:
        return Viewer(stacks[0], folder=folder)
    (a, one), (b, two) = (next(iter(s.arrays.items())) for s in stacks)
    if one.shape != two.shape:
        raise ValueError(f"cannot compare shapes {one.shape} and {two.shape}")
    arrays = {f"reference: {a}": one, f"estimate: {b}": two}
    axes = dict.fromkeys(arrays, stacks[0].axes[a])
    both = replace(stacks[0], arrays=arrays, axes=axes, source=f"{stacks[0].source} and {stacks[1].source}")
    return Viewer(both, folder=folder)


def _stack(source, only) -> Stack:
    if isinstance(source, Stack):
        return source
    if isinstance(source, (str, os.PathLike)):
        return open_stack(source, only)
    return make_stack(source if isinstance(source, Mapping) else {"array": source})


def explore(path: str | os.PathLike, height: int = 300):
    """A volume in ipyniivue (WebGL): rotate, cross-hairs, clip planes. Interactive only; leaves no still picture.

    Raises ImportError with the command that installs it.
    """
    with extra("view"):
        from ipyniivue import NiiVue  # pyright: ignore[reportMissingImports] (an extra of its own)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    scene = NiiVue(height=height)
    scene.load_volumes([{"path": str(path)}])
    return scene
