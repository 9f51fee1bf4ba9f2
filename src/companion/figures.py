"""Static figures in one style: grey images on a shared window, errors on a stated scale, units on every bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito: safe for the colour-blind
MARKERS = "osD^vP"
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
         "figure.facecolor": "white", "image.interpolation": "nearest", "axes.prop_cycle": plt.cycler(color=COLOURS)}


def picture(x: Tensor | np.ndarray) -> np.ndarray:
    """Return a (y, x) array to show: the magnitude of complex images, singleton axes dropped."""
    x = torch.as_tensor(x).detach().cpu()
    x = (x.abs() if x.is_complex() else x.float()).squeeze()
    if x.ndim != 2:
        raise ValueError(f"expected one image (y, x) after dropping singleton axes, got shape {tuple(x.shape)}")
    return x.numpy()


def image_grid(rows: Mapping[str, Mapping[str, Tensor]], *, window: tuple[float, float] = (0.0, 1.0), unit: str = "",
               kinds: Mapping[str, tuple[str, float]] | None = None, notes: Mapping[tuple[str, str], str] | None = None,
               voxel_mm: float | None = None, width: float = 1.35) -> Figure:
    """Return a grid of images: one row per key of `rows`, one column per key inside; all rows share their columns.

    window  grey window shared by all columns that `kinds` does not name
    kinds   {column: (colour map, maximum)} for errors and deviations, each with its own labelled colour bar
    notes   {(row, column): text} written in the corner of an image, such as "31.2 dB"
    voxel_mm  draws a scale bar of 50 mm in the first image
    """
    kinds, notes = kinds or {}, notes or {}
    columns = list(next(iter(rows.values())))
    with plt.rc_context(STYLE):
        # Images touch, so that the eye compares them; the bars below say what grey and colour mean.
        fig, axes = plt.subplots(len(rows) + 1, len(columns), squeeze=False,
                                 figsize=(width * len(columns) + 0.35, width * len(rows) + 0.45),
                                 gridspec_kw={"height_ratios": [1] * len(rows) + [0.05], "wspace": 0.03,
                                              "hspace": 0.04})
        for i, (row, images) in enumerate(rows.items()):
            for j, column in enumerate(columns):
                ax = axes[i, j]
                colours, top = kinds.get(column, ("gray", window[1]))
                shown = ax.imshow(picture(images[column]), cmap=colours, vmin=0 if column in kinds else window[0],
                                  vmax=top)
                ax.set(xticks=[], yticks=[])
                ax.spines[:].set_visible(False)
                if i == 0:
                    ax.set_title(column)
                if j == 0:
                    ax.set_ylabel(row)
                if (row, column) in notes:
                    ax.text(0.97, 0.03, notes[row, column], transform=ax.transAxes, ha="right", va="bottom",
                            color="white", fontsize=7.5)
                if i == len(rows) - 1:
                    bar = fig.colorbar(shown, cax=axes[-1, j], orientation="horizontal")
                    bar.outline.set_visible(False)
                    bar.set_ticks([shown.norm.vmin, shown.norm.vmax])
                    bar.ax.tick_params(labelsize=7, length=0)
                    bar.ax.get_xticklabels()[0].set_ha("left")
                    bar.ax.get_xticklabels()[-1].set_ha("right")
                    if unit and j == 0:
                        bar.set_label(unit, fontsize=7, labelpad=-6)
        if voxel_mm:
            ax, length = axes[0, 0], 50 / voxel_mm
            height = picture(next(iter(rows.values()))[columns[0]]).shape[0]
            ax.plot([2, 2 + length], [height - 3] * 2, color="white", lw=1.5, solid_capstyle="butt")
            ax.text(2 + length / 2, height - 4.5, "50 mm", color="white", fontsize=6.5, ha="center", va="bottom")
    plt.close(fig)  # the notebook shows what it is given, once
    return fig


def curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, xlabel: str, ylabel: str,
           diagonal: str | None = None, logx: bool = False, size: tuple[float, float] = (3.4, 3.2)) -> Figure:
    """Return a figure of named (x, y) lines, told apart by colour and marker; `diagonal` labels the line y = x."""
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=size)
        if diagonal:
            ax.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--", label=diagonal)
        for marker, (name, (x, y)) in zip(MARKERS * len(lines), lines.items(), strict=False):
            ax.plot(x, y, marker=marker, ms=4, lw=1.2, label=name)
        ax.set(xlabel=xlabel, ylabel=ylabel, **({"xscale": "log"} if logx else {}))
        if len(lines) + bool(diagonal) > 1:
            ax.legend(frameon=False, fontsize=8)
        fig.tight_layout()
    plt.close(fig)
    return fig


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return a Markdown table with one line per mapping, columns in the order of the first."""
    if not rows:
        raise ValueError("a table needs at least one row")
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows])
