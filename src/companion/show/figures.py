"""Static figures in one style: grey images on a shared window, errors on a stated scale, units on every bar."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from companion.extras import extra
from companion.files import atomic_write

with extra("notebooks"):
    import matplotlib.pyplot as plt
    from cycler import cycler
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito: safe for the colour-blind
MARKERS = "osD^vP"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "image.interpolation": "nearest",
    "axes.prop_cycle": cycler(color=COLOURS),
}


def picture(x: Tensor | np.ndarray) -> np.ndarray:
    """Return a (y, x) array to show: the magnitude of complex images, leading singleton axes dropped."""
    x = torch.as_tensor(x).detach().cpu()
    if x.ndim < 2 or x[..., 0, 0].numel() != 1:
        raise ValueError(f"expected one image (1, ..., y, x), got shape {tuple(x.shape)}")
    return (x.abs() if x.is_complex() else x.float()).reshape(x.shape[-2:]).numpy()


def image_grid(
    rows: Mapping[str, Mapping[str, Tensor | np.ndarray]],
    *,
    window: tuple[float, float] = (0.0, 1.0),
    unit: str = "",
    kinds: Mapping[str, tuple[str, float, float]] | None = None,
    notes: Mapping[tuple[str, str], str] | None = None,
    voxel_mm: float | None = None,
    width: float = 1.35,
) -> Figure:
    """Return a grid of images: one row per key of `rows`, one column per key inside; all rows share their columns.

    window  grey window shared by all columns that `kinds` does not name
    kinds   {column: (colour map, low, high)} for phases, labels, errors and deviations
    notes   {(row, column): text} written in the corner of an image, such as "31.2 dB"
    voxel_mm  draws a scale bar of 50 mm in the first image
    """
    kinds, notes = kinds or {}, notes or {}
    columns = list(next(iter(rows.values())))
    with plt.rc_context(STYLE):
        # Images touch, so that the eye compares them; the bars below say what grey and colour mean.
        fig, axes = plt.subplots(
            len(rows) + 1,
            len(columns),
            squeeze=False,
            figsize=(width * len(columns) + 0.35, width * len(rows) + 0.45),
            gridspec_kw={"height_ratios": [1] * len(rows) + [0.05], "wspace": 0.03, "hspace": 0.04},
        )
        for i, (row, images) in enumerate(rows.items()):
            for j, column in enumerate(columns):
                ax = axes[i, j]
                colours, low, high = kind = kinds.get(column, ("gray", *window))
                shown = ax.imshow(picture(images[column]), cmap=colours, vmin=low, vmax=high)
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
                if i == 0:
                    ax.set_title(column)
                if j == 0:
                    ax.set_ylabel(textwrap.fill(row, max(8, int(12 * width))))  # no longer than the row is high
                if (row, column) in notes:
                    ax.text(
                        0.97,
                        0.03,
                        notes[row, column],
                        transform=ax.transAxes,
                        ha="right",
                        va="bottom",
                        color="white",
                        fontsize=7.5,
                    )
                if i == len(rows) - 1:
                    _bar(
                        fig,
                        axes[-1, j],
                        shown,
                        unit if column not in kinds else "",
                        hidden=j > 0 and kind == kinds.get(columns[j - 1], ("gray", *window)),
                    )
        if voxel_mm:
            ax, length = axes[0, 0], 50 / voxel_mm
            height = picture(next(iter(rows.values()))[columns[0]]).shape[0]
            ax.plot([2, 2 + length], [height - 3] * 2, color="white", lw=1.5, solid_capstyle="butt")
            ax.text(2 + length / 2, height - 4.5, "50 mm", color="white", fontsize=6.5, ha="center", va="bottom")
    plt.close(fig)  # the notebook shows what it is given, once
    return fig


def _bar(fig: Figure, cax, shown, unit: str, hidden: bool) -> None:
    """Draw the colour bar of a column below it; `hidden` where the column to the left has the same one."""
    if hidden:
        cax.set_axis_off()
        return
    bar = fig.colorbar(shown, cax=cax, orientation="horizontal")
    bar.outline.set_visible(False)
    low, high = shown.get_clim()
    bar.set_ticks([low, high], labels=[f"{low:.3g}", f"{high:.3g} {unit}".strip()])
    bar.ax.tick_params(labelsize=7, length=0)
    for label, side in zip(bar.ax.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)


def thumbnail(path: str | os.PathLike, side: int = 400) -> np.ndarray:
    """Return a PNG as pixels (y, x, 3), at most `side` wide and high."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        image.thumbnail((side, side))
        return np.asarray(image)


def animation(
    path: str | os.PathLike,
    sequences: Mapping[str, Tensor | np.ndarray],
    *,
    window: tuple[float, float] = (0.0, 1.0),
    frame_ms: int = 200,
    zoom: int = 3,
    kinds: Mapping[str, tuple[str, float, float]] | None = None,
) -> Path:
    """Return the path of a GIF that plays sequences (frame, 1, y, x) beside one another, for ever, on one grey window.

    Magnitudes, every pixel `zoom` pixels wide, under the names of the sequences and the number of the frame. A longer
    name is cut where its picture ends. `kinds` gives sequences a colour map and limits of their own, as in
    `image_grid`. Raises ValueError for sequences of different numbers of frames.
    """
    counts = {len(x) for x in sequences.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"sequences must have equally many frames, got {[len(x) for x in sequences.values()]}")
    font, top, gap, kinds = ImageFont.load_default(11), 16, 4, kinds or {}
    mode = "RGB" if any(colours != "gray" for colours, *_ in kinds.values()) else "L"
    frames, (count,) = [], counts
    for n in range(count):
        panels = [_painted(picture(x[n]), kinds.get(name, ("gray", *window)), zoom) for name, x in sequences.items()]
        height = max(panel.height for panel in panels)
        sheet = Image.new(mode, (sum(panel.width + gap for panel in panels) - gap, height + 2 * top), "white")
        draw, left = ImageDraw.Draw(sheet), 0
        for name, panel in zip(sequences, panels, strict=True):
            while name and draw.textlength(name, font) > panel.width:
                name = name[:-1]
            draw.text((left, 1), name, fill="black", font=font)
            sheet.paste(panel, (left, top))
            left += panel.width + gap
        draw.text((0, height + top + 1), f"frame {n + 1} of {count}", fill="black", font=font)
        frames.append(sheet)
    with atomic_write(path) as aside:
        frames[0].save(aside, format="GIF", save_all=True, append_images=frames[1:], duration=frame_ms, loop=0)
    return Path(path)


def _painted(x: np.ndarray, kind: tuple[str, float, float], zoom: int) -> Image.Image:
    colours, low, high = kind
    levels = (np.clip((np.nan_to_num(x) - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
    if colours != "gray":
        levels = (plt.colormaps[colours](levels)[..., :3] * 255).round().astype(np.uint8)
    return Image.fromarray(levels.repeat(zoom, 0).repeat(zoom, 1))


def curves(
    lines: Mapping[str, Sequence[Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    diagonal: str | None = None,
    logx: bool = False,
    logy: bool = False,
    size: tuple[float, float] = (3.4, 3.2),
) -> Figure:
    """Return a figure of named lines (x, y) or (x, y, error of y), told apart by colour and marker.

    `diagonal` labels the line y = x. Errors are drawn as bands of plus and minus one.
    """
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=size)
        if diagonal:
            ax.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--", label=diagonal)
        for marker, (name, (x, y, *error)) in zip(MARKERS * len(lines), lines.items(), strict=False):
            (line,) = ax.plot(x, y, marker=marker, ms=4, lw=1.2, label=name)
            if error:
                low, high = np.asarray(y) - error[0], np.asarray(y) + error[0]
                ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)
        ax.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if logx else "linear", yscale="log" if logy else "linear")
        if all(isinstance(value, int) for x, *_ in lines.values() for value in x) and not logx:
            locator: Any = ax.xaxis.get_major_locator()
            locator.set_params(integer=True)
        if (count := len(lines) + bool(diagonal)) > 1:  # many names would cover the lines: they go beside them
            beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if count > 4 else {}
            ax.legend(frameon=False, fontsize=8, **beside)
        fig.tight_layout()
    plt.close(fig)
    return fig


def panels(
    groups: Mapping[str, Mapping[str, tuple]],
    *,
    xlabel: str,
    ylabel: str,
    columns: int = 4,
    size: tuple[float, float] = (2.5, 2.4),
) -> Figure:
    """Return axes that share their scales, one for each key, `columns` a row; inside, named lines (x, y, error bar)."""
    columns = min(columns, len(groups))
    rows = -(-len(groups) // columns)
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            rows, columns, squeeze=False, sharex=True, sharey=True, figsize=(size[0] * columns, size[1] * rows)
        )
        for ax in axes.flat[len(groups) :]:
            ax.set_axis_off()
        for i, (ax, (title, lines)) in enumerate(zip(axes.flat, groups.items(), strict=False)):
            for marker, (name, (x, y, error)) in zip(MARKERS, lines.items(), strict=False):
                ax.errorbar(x, y, error, marker=marker, ms=4, lw=1.2, capsize=2, label=name)
            ax.set(
                title=title,
                xticks=sorted({v for x, _, _ in lines.values() for v in x}),
                xlabel=xlabel if i >= len(groups) - columns else "",
                ylabel=ylabel if i % columns == 0 else "",
            )
        axes[0, -1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        fig.tight_layout()
    plt.close(fig)
    return fig


def spreads(groups: Mapping[str, Sequence[float]], *, ylabel: str) -> Figure:
    """Return a box of quartiles for each key over its values, each of them a point beside the others."""
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(1.6 + 0.8 * len(groups), 3))
        ax.boxplot(list(groups.values()), widths=0.6, showfliers=False, medianprops={"color": "black"})
        for place, values in enumerate(groups.values(), 1):
            ordered = np.sort(values)
            aside = 0.2 * np.sin(np.arange(len(ordered)) * 2.4)  # neighbours in value lie apart
            ax.plot(place + aside, ordered, "o", ms=3, alpha=0.6, mew=0)
        ax.set_xticks(range(1, len(groups) + 1), labels=[str(name)[:24] for name in groups], rotation=30, ha="right")
        ax.set_ylabel(ylabel)
        fig.tight_layout()
    plt.close(fig)
    return fig
