"""Looking at images in a notebook: sliders for every axis, linked pictures, play, save. `view("x.cfl")` opens a file.

A slider's answer is NumPy and a PNG in an Image widget, without matplotlib. The still picture that each viewer leaves
in the notebook, and what the save button writes, is a figure in the style of all others.
"""

from __future__ import annotations

import os
import re
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from companion.data.nifti import save_nifti
from companion.extras import extra
from companion.files import atomic_write, project_root
from companion.show import figures
from companion.show.picture import COLOURS, MIDDLE, MOST, NAMES, THREE, WIDTHS, Picture, Shown, _square, close
from companion.show.stack import PARTS, Stack, kind, mosaic, paint, pictures, png

with extra("notebooks"):
    import ipywidgets as widgets
    from ipywidgets import jslink

CSS = """<style>
.companion-picture { image-rendering: pixelated; background: #000; display: block; max-width: none; }
.companion-tile { margin: 0 10px 8px 0; }
.companion-note { line-height: 1.35; font-size: 12px; font-variant-numeric: tabular-nums; }
</style>"""


class Viewer(Shown):
    """Pictures of a stack beside one another, all at the position that the sliders say."""

    # Any: the traits of ipywidgets have no types
    plane: Any
    names: Any
    over: Any
    part: Any
    colours: Any
    size: Any
    playing: Any
    play: Any

    def __init__(self, stack: Stack, *, folder: str | os.PathLike | None = None):
        self.folder = Path(folder) if folder else None
        self.stack = stack
        self._at, self._busy, self._tiles, self._link, self.sliders = {}, True, {}, None, {}
        self._make_controls()
        self.box = widgets.VBox([widgets.HTML(CSS), self._choices, self._axes_box, self._grid, self._saving])
        self.show(stack)

    # ------------------------------------------------------------------ what is shown

    def show(self, stack: Stack) -> None:
        """Show another stack; sliders stay where they are if it has the same axes."""
        alike = bool(self._at) and stack.lengths.keys() == self.stack.lengths.keys()
        same = alike and (stack.lengths, stack.labels) == (self.stack.lengths, self.stack.labels)
        self.stack, self._busy = stack, True
        former = [] if same else list(self.sliders.values())
        try:
            if not alike:
                self._at = {a: n // 2 if a in MIDDLE else 0 for a, n in stack.lengths.items()}
                self._make_planes()
            if not same:
                self._at = {axis: min(self._at[axis], n - 1) for axis, n in stack.lengths.items()}
                self._make_sliders()
            names = list(pictures(stack, self._at, self.planes[0]))
            if set(self.names.options) != set(names):
                self.names.options, self.names.value = names, names[:MOST]
            self.part.layout.display = None if stack.is_complex() else "none"
            if not alike:
                self._set_window()
        finally:
            self._busy = False
        self._rebuild()
        for slider in former:
            close(slider)

    def close(self) -> None:
        """Forget all widgets of this viewer."""
        self._unlink()
        for widget in (self.box, self.part, self._player, *self.sliders.values()):
            close(widget)

    @property
    def at(self) -> dict[str, int]:
        """The position along every axis."""
        return dict(self._at)

    @property
    def planes(self) -> tuple[tuple[str, str], ...]:
        """The planes shown, each (rows, columns)."""
        return self.plane.value

    def tiles(self) -> dict[tuple[tuple[str, str], str], np.ndarray]:
        """The numbers behind the pictures: (plane, name) -> (rows, columns), turned and mirrored as chosen."""
        tiles = {}
        for plane in self.planes:
            over = "" if self.over.value in plane else self.over.value
            steps = range(self.stack.lengths[over]) if over else [0]
            found = [pictures(self.stack, self._at | {over: i}, plane, self.part.value) for i in steps]
            for name in self.names.value:
                cuts = [self._turned(f[name]) for f in found if name in f]
                alike = [cut for cut in cuts if cut.shape == cuts[0].shape]
                if cuts:
                    tiles[plane, name] = mosaic(alike) if over in self._axes(name) and len(alike) > 1 else cuts[0]
        return tiles

    def limits(self, name: str) -> tuple[str, float, float]:
        """Colour map and the values of its first and last colour, for a picture of that name."""
        if kind(self.stack, name) != "image":
            return "magma", 0.0, self.error.value
        if self.part.value == "phase" and self._complex(name):
            return "twilight_shifted", -np.pi, np.pi
        low, width = self.level.value - self.width.value / 2, self.width.value
        low = 0.0 if abs(low) < 1e-6 * width else low
        return self.colours.value, low, low + width

    def position(self) -> str:
        """The position in words, as in "z 12 (0 to 31), draw 0 (0 to 7)"."""
        hidden = {axis for plane in self.planes for axis in plane} if len(self.planes) == 1 else set()
        said = [
            f"{axis} {self._label(axis)}"
            for axis in self._at
            if axis not in hidden and axis != self.over.value and self.stack.lengths[axis] > 1
        ]
        return ", ".join(said + ([f"all along {self.over.value}"] if self.over.value else []))

    def alt(self) -> str:
        names = ", ".join(self.names.value)
        return f"{names} of {self.stack.source or 'an array'}{', ' + self.position() if self.position() else ''}"

    def figure(self):
        """What is shown now, as a figure with colour bars and, where voxels have a size, a scale bar."""
        rows: dict[str, dict[str, np.ndarray]] = {}
        kinds, window = {}, ("gray", 0.0, 1.0)
        voxel = self.stack.voxel_mm.get(self._columns(self.planes[0]))
        for (plane, name), x in self.tiles().items():
            row = NAMES.get(plane, f"{plane[0]}, {plane[1]}") if len(self.planes) > 1 else self.position()
            rows.setdefault(row.replace(", ", "\n"), {})[name] = np.ascontiguousarray(_square(x, self._aspect(plane)))
            kinds[name] = window = self.limits(name)
        common = [name for name in kinds if all(name in row for row in rows.values())]
        rows = (
            {row: {name: images[name] for name in common} for row, images in rows.items()}
            if common
            else {"": {"nothing chosen": np.zeros((2, 2))}}
        )
        return figures.image_grid(
            rows,
            window=window[1:],
            unit=self.stack.unit,
            kinds=kinds,
            width=1.9,
            voxel_mm=None if self.over.value else voxel,
        )

    # ------------------------------------------------------------------ saving

    def save_png(self, name: str | None = None) -> Path:
        """The path of the PNG written: all that is shown, with its scales."""
        path = self._path(name, ".png")
        with atomic_write(path) as aside:
            aside.write_bytes(self.still())
        return path

    def save_gif(self, name: str | None = None, frame_ms: int = 150) -> Path:
        """The path of the GIF written: all that is shown, along the axis that plays. ValueError if none does."""
        if self.playing.value is None:
            raise ValueError("nothing here can be played: there is no axis besides those of the picture")
        frames, before = [], self.at
        try:
            for i in range(self.stack.lengths[self.playing.value]):
                self._at[self.playing.value] = i
                frames.append(
                    {n: _square(x, self._aspect(p)) for (p, n), x in self.tiles().items() if p == self.planes[0]}
                )
        finally:
            self._at = before
        shape = {name: x.shape for name, x in frames[0].items()}
        names = [name for name in shape if all(name in f and f[name].shape == shape[name] for f in frames)]
        zoom = max(1, round(WIDTHS["medium"] / max(frames[0][n].shape[1] for n in names)))
        return figures.animation(
            self._path(name, ".gif"),
            {n: np.stack([f[n] for f in frames]) for n in names},
            kinds={n: self.limits(n) for n in names},
            frame_ms=frame_ms,
            zoom=zoom,
        )

    def save_nifti(self, name: str | None = None) -> list[Path]:
        """The paths of the volumes written, one of each array shown that has three axes, at the position of the rest.

        The slowest of the three is the axis that plays, or z. Voxels of unknown size are 1 mm.
        """
        paths = []
        for array in self.names.value:
            if array not in self.stack.arrays:
                continue
            axes = self.stack.axes[array]
            depth = "z" if "z" in axes else self.playing.value
            volume = self.stack.cut(array, self._at, ("y", "x"), depth) if depth in set(axes) - {"y", "x"} else None
            if volume is None:
                continue
            volume = PARTS[self.part.value](volume) if np.iscomplexobj(volume) else volume
            size = [self.stack.voxel_mm.get(a, self.stack.voxel_mm.get("z", 1.0)) for a in (depth, "y", "x")]
            where = {"voxel_mm": size} if self.stack.affine is None else {"affine": self.stack.affine}
            path = self._path(f"{name or self._default_name()}_{array}", ".nii.gz")
            volume = np.ascontiguousarray(volume, dtype=np.float32)
            paths.append(save_nifti(path, volume, units=self.stack.unit, **where))
        if not paths:
            raise ValueError("no array shown has three axes (z, y, x): nothing to write as NIfTI")
        return paths

    # ------------------------------------------------------------------ widgets

    def _make_controls(self) -> None:
        wide = {"style": {"description_width": "initial"}, "layout": {"width": "auto"}}
        self.plane = widgets.Dropdown(description="plane", **wide)
        self.names = widgets.SelectMultiple(description="show", rows=4, **wide)
        self.over = widgets.Dropdown(description="all along", **wide)
        self.part = widgets.Dropdown(options=list(PARTS), description="part", **wide)
        self.level = widgets.FloatSlider(description="level", readout_format=".3g")
        self.width = widgets.FloatSlider(description="window", readout_format=".3g")
        self.error = widgets.FloatSlider(description="error scale", readout_format=".3g")
        self.colours = widgets.Dropdown(options=COLOURS, description="colours", **wide)
        self.size = widgets.Dropdown(options=list(WIDTHS), value="medium", description="size", **wide)
        self.turn = widgets.Button(description="turn", tooltip="turn by 90 degrees", layout={"width": "auto"})
        self.mirror = widgets.ToggleButton(description="mirror", layout={"width": "auto"})
        self._turns = 0
        self.playing = widgets.Dropdown(description="along", **wide)
        self.play = widgets.Play(interval=150, repeat=True, description="play")
        flow = {"flex_flow": "row wrap", "align_items": "flex-start"}
        how = [self.plane, self.part, self.over, self.colours, self.size, self.turn, self.mirror]
        scales = widgets.VBox([self.level, self.width, self.error])
        self._choices = widgets.VBox([widgets.HBox(how, layout=flow), widgets.HBox([self.names, scales], layout=flow)])
        self._player = widgets.HBox([self.play, self.playing])
        self._axes_box, self._grid = widgets.VBox(), widgets.VBox()
        kinds = ("PNG", "GIF", "NIfTI")
        save = [widgets.Button(description=f"save {what}", layout={"width": "auto"}) for what in kinds]
        for button, write in zip(save, (self.save_png, self.save_gif, self.save_nifti), strict=True):
            button.on_click(partial(self._save, write))
        self.said = widgets.HTML('<span role="status"></span>')
        self._saving = widgets.HBox([*save, self.said], layout=flow)
        for control in (self.plane, self.names, self.over, self.size):
            control.observe(self._rebuild, "value")
        self.part.observe(self._new_part, "value")
        for control in (self.level, self.width, self.error, self.colours):
            control.observe(self._refresh, "value")
        self.mirror.observe(self._refresh, "value")
        self.turn.on_click(self._turn)
        self.playing.observe(self._link_play, "value")

    def _make_planes(self) -> None:
        planes: list[tuple[str, tuple]] = [
            (NAMES.get(p, f"{p[0]} (rows), {p[1]} (columns)"), (p,)) for p in self.stack.planes
        ]
        if {"z", "y", "x"} <= set(self.stack.lengths):
            planes.insert(1, ("three planes", THREE))
        self.plane.options, self.plane.value = planes, planes[0][1]
        self.plane.layout.display = None if len(planes) > 1 else "none"
        moving = [axis for axis, n in self.stack.lengths.items() if n > 1 and axis not in self.stack.planes[0]]
        self.over.options = [("-", ""), *((axis, axis) for axis in moving)]
        self.over.layout.display = None if moving else "none"
        self.over.value = ""

    def _make_sliders(self) -> None:
        """A slider for every axis: whole numbers, or the labels of the axis where it has some."""
        self._unlink()
        self.sliders = {}
        for axis, n in self.stack.lengths.items():
            common = {"description": axis, "layout": {"width": "420px"}, "style": {"description_width": "90px"}}
            if axis in self.stack.labels:
                options = [(str(label), i) for i, label in enumerate(self.stack.labels[axis])]
                slider = widgets.SelectionSlider(options=options, index=self._at[axis], **common)
            else:
                slider = widgets.IntSlider(value=self._at[axis], min=0, max=max(n - 1, 1), disabled=n < 2, **common)
            slider.observe(partial(self._moved, axis), "value")
            self.sliders[axis] = slider
        still = self.stack.planes[0] if len(self.stack.lengths) == 2 else ()
        moving = [axis for axis, n in self.stack.lengths.items() if n > 1 and axis not in still]
        wanted = self.playing.value
        self.playing.options = moving or [("-", None)]
        natural = [axis for axis in ("frame", "slice", "z", *moving) if axis in moving]
        self.playing.value = wanted if wanted in moving else next(iter(natural), None)
        self._link_play()

    def _unlink(self) -> None:
        if self._link is not None:
            self._link.unlink()
            self._link = None

    def _link_play(self, _=None) -> None:
        self._unlink()
        slider = self.sliders.get(self.playing.value)
        if slider is None:
            return
        counted = isinstance(slider, widgets.IntSlider)
        self.play.min, self.play.max = 0, self.stack.lengths[self.playing.value] - 1
        self.play.value = self._at[self.playing.value]
        self._link = jslink((self.play, "value"), (slider, "value" if counted else "index"))

    def _set_window(self) -> None:
        """Level, window and error scale that suit what is shown."""
        shown = pictures(self.stack, self._at, self.planes[0], self.part.value)
        plain = [x for name, x in shown.items() if kind(self.stack, name) == "image" and self.part.value != "phase"]
        values = np.concatenate([x[np.isfinite(x)].ravel() for x in plain] or [np.array([0.0, 1.0])])
        low, high = (float(v) for v in np.percentile(values, [0.2, 99.8])) if values.size else (0.0, 1.0)
        if self.part.value == "magnitude":
            low, high = self.stack.window or (low if low < 0 else 0.0, high)
        elif self.part.value in ("real", "imaginary"):
            low, high = -max(-low, high), max(-low, high)
        span = max(high - low, 1e-12)
        errors = [float(np.percentile(x, 99)) for name, x in shown.items() if kind(self.stack, name) != "image"]
        scale = float(f"{max(errors):.1g}") if errors and max(errors) > 0 else span / 10
        self.error.layout.display = None if errors else "none"
        middle = (low + high) / 2  # the values lie on the steps, else the browser would round them
        around, fine = 1.5 * span, span / 200
        for slider, value, least, most, step in (
            (self.level, middle, middle - around, middle + around, fine),
            (self.width, span, fine, 3 * span, fine),
            (self.error, scale, scale / 20, 5 * scale, scale / 20),
        ):
            with slider.hold_trait_notifications():
                slider.min, slider.max, slider.step, slider.value = least, most, step, value

    def _new_part(self, _=None) -> None:
        if not self._busy:
            self._busy = True
            self._set_window()
            self._busy = False
            self._refresh()

    def _turn(self, _=None) -> None:
        self._turns = (self._turns + 1) % 4
        self._rebuild()

    def _moved(self, axis: str, change) -> None:
        slider = change["owner"]
        self._at[axis] = slider.index if isinstance(slider, widgets.SelectionSlider) else slider.value
        self._refresh()

    def _rebuild(self, _=None) -> None:
        """Make one Image and one note for each picture; what they hold is for `_refresh`."""
        if self._busy:
            return
        self._tiles, rows, tiles = {}, {}, self.tiles()
        for key, x in tiles.items():
            plane, name = key
            image, note = Picture(format="png"), widgets.HTML(layout={"margin": "0"})
            image.add_class("companion-picture")
            image.tooltip = f"{name}, {NAMES.get(plane, ' and '.join(plane))} picture; the text below gives its numbers"
            high, wide = np.array(x.shape) * (self._aspect(plane), 1.0)
            width = WIDTHS[self.size.value] * (2 if self.over.value in self._axes(name) else 1)
            image.layout.width, image.layout.height = f"{width}px", f"{round(width * high / wide)}px"
            tile = widgets.VBox([image, note])
            tile.add_class("companion-tile")
            self._tiles[key] = tile
            rows.setdefault(plane, []).append(tile)
        hidden = {axis for plane in self.planes for axis in plane} if len(self.planes) == 1 else set()
        moving = [s for axis, s in self.sliders.items() if axis not in hidden and self.stack.lengths[axis] > 1]
        self._axes_box.children = [*moving, self._player] if moving else []
        flow = {"flex_flow": "row wrap", "align_items": "flex-start"}
        former, self._grid.children = self._grid.children, [widgets.HBox(row, layout=flow) for row in rows.values()]
        self._refresh()
        for row in former:
            close(row)

    def _refresh(self, _=None) -> None:
        """Paint every picture at the present position. This is all that a moving slider costs."""
        if self._busy:
            return
        tiles = self.tiles()
        if tiles.keys() - self._tiles.keys():
            return self._rebuild()
        truth = self.stack.role("truth") or ""
        for (plane, name), tile in self._tiles.items():
            image, note = tile.children
            x = tiles.get((plane, name))
            if x is None:
                image.value = png(np.full((2, 2), 60, np.uint8))
                note.value = f'<div class="companion-note"><b>{escape(name)}</b><br>ends before this position</div>'
                continue
            colours, low, high = self.limits(name)
            image.value = png(paint(x, low, high, colours))
            note.value = self._note(name, x, tiles.get((plane, truth)), low, high)

    def _note(self, name: str, x: np.ndarray, truth: np.ndarray | None, low: float, high: float) -> str:
        lines = [
            f"{np.nanmin(x):.3g} to {np.nanmax(x):.3g}, mean {np.nanmean(x):.4g}",
            f"scale {low:.3g} to {high:.3g} {escape(self.stack.unit)}",
        ]
        compared = kind(self.stack, name) == "image" and name != self.stack.role("truth")
        if compared and truth is not None and truth.shape == x.shape and self.part.value == "magnitude":
            difference = float(np.sqrt(np.nanmean((x - truth) ** 2)))
            if difference > 0 and np.nanmax(truth) > 0:
                lines.append(f"PSNR {20 * np.log10(np.nanmax(truth) / difference):.1f} dB, this picture")
        return f'<div class="companion-note"><b>{escape(name)}</b><br>{"<br>".join(lines)}</div>'

    def _save(self, write, _=None) -> None:
        try:
            paths = write()
            paths = paths if isinstance(paths, list) else [paths]
            said = f"saved {', '.join(p.name for p in paths)} in {paths[0].parent}"
        except (ValueError, OSError) as error:
            said = f"not saved: {error}"
        self.said.value = f'<span role="status">{escape(said)}</span>'

    # ------------------------------------------------------------------ small things

    def _complex(self, name: str) -> bool:
        array = self.stack.arrays.get(name)
        return np.iscomplexobj(array) if array is not None else self.stack.is_complex()

    def _axes(self, name: str) -> set[str]:
        """The axes along which a picture changes; what is derived does so with the draws and the truth."""
        if name in self.stack.axes:
            return set(self.stack.axes[name])
        roles = [self.stack.role(role) or "" for role in ("draws", "truth")]
        return {a for name in roles for a in self.stack.axes.get(name, ())} - {"draw"}

    def _label(self, axis: str) -> str:
        if axis in self.stack.labels:
            return str(self.stack.labels[axis][self._at[axis]])
        return f"{self._at[axis]} (0 to {self.stack.lengths[axis] - 1})"  # as the slider counts

    def _turned(self, x: np.ndarray) -> np.ndarray:
        return np.rot90(x[:, ::-1] if self.mirror.value else x, self._turns)

    def _columns(self, plane: tuple[str, str]) -> str:
        return plane[1 - self._turns % 2]

    def _aspect(self, plane: tuple[str, str]) -> float:
        """Height of a pixel over its width."""
        high, wide = (self.stack.voxel_mm.get(axis, 1.0) for axis in plane)
        return wide / high if self._turns % 2 else high / wide

    def _default_name(self) -> str:
        where = "_".join(f"{axis}{i}" for axis, i in self._at.items() if axis not in self.planes[0])
        return re.sub(r"[^\w=+-]+", "_", f"{Path(self.stack.source or 'array').name.split('.')[0]}_{where}").strip("_")

    def _path(self, name: str | None, suffix: str) -> Path:
        folder = self.folder or project_root() / "runs" / "saved"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / ((name or self._default_name()).removesuffix(suffix) + suffix)
