"""The bench's rows as a table and a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from companion.files import atomic_write, code_version
from companion.reconstruction.bench import Settings


def markdown(rows: Sequence[dict], s: Settings) -> str:
    """One line an entry. Bold: mean within 0.1 posterior standard deviations and variance within 5 %."""
    priors = list(rows[0]["exact"])
    head = ["entry"]
    for prior in priors:
        head += [f"{prior}: mean error", "variance", "coverage", "ranks p"]
    if "people" in rows[0]:
        head += ["people: PSNR", "one draw", "calibration", "coverage", "conformal", "regions", "PSNR +-"]
    head += ["heads: PSNR", "calibration", "coverage"] if "heads" in rows[0] else []
    head += ["D calls", "ms"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["name"]]
        for e in (row["exact"][prior] for prior in priors):
            right = e["mean_error"] < 0.1 and abs(e["variance_ratio"] - 1) < 0.05
            mark = "**" if right else ""
            cells += [f"{mark}{e['mean_error']:.2f}{mark}", f"{mark}{e['variance_ratio']:.2f}{mark}"]
            cells += [f"{e['coverage']:.2f}", f"{e['ranks_p']:.2g}"]
        if p := row.get("people"):
            cells += [f"{p['psnr']:.1f}", f"{p['psnr_draw']:.1f}", f"{p['calibration']:.2f}", f"{p['coverage']:.2f}"]
            cells += [f"{p[f'{kind}_coverage']:.2f} (x {p[f'{kind}_factor']:.1f})" for kind in ("conformal", "region")]
            cells += [f"{p['psnr_width'] / 2:.1f}"]
        if h := row.get("heads"):
            cells += [f"{h['psnr']:.1f}", f"{h['calibration']:.2f}", f"{h['coverage']:.2f}"]
        cost = p or row["exact"][priors[0]]
        cells += [f"{cost['denoiser_calls']:.0f}", f"{cost['milliseconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        f"{s.calls} evaluations of D a draw. Exact: {s.size} x {s.size}, {s.draws} draws, ranks of {s.cases} simulated "
        "scans. ms: of a draw, on this machine."
    )
    if "people" in rows[0]:
        note += (
            f" People: {s.people} virtual slices, R = {s.acceleration:g}, {s.people_draws} draws; intervals of 90 %, "
            f"conformal ones calibrated on {s.calibration} others."
        )
    return "\n".join(lines) + f"\n\n{note}\n"


def figure(rows: Sequence[dict], s: Settings) -> Figure:
    """Mean and variance against the exact posterior; ranks; coverage of virtual slices before and after conformal."""
    parts = [_known, _ranks] + ([_people] if "people" in rows[0] else [])
    fig = Figure(figsize=(4.6 * len(parts), max(3.8, 1 + 0.3 * len(rows))), layout="constrained")
    for axes, part in zip(fig.subplots(1, len(parts)), parts, strict=True):
        part(axes, rows, s)
    return fig


def _known(axes: Axes, rows: Sequence[dict], s: Settings) -> None:
    axes.axhspan(0.95, 1.05, color="0.85", zorder=0)
    axes.axvspan(0, 0.1, color="0.92", zorder=0)
    for i, row in enumerate(rows):
        for j, e in enumerate(row["exact"].values()):
            x, y = min(max(e["mean_error"], 0.02), 4), min(max(e["variance_ratio"], 0.15), 6)
            axes.plot(x, y, "os^D"[j], color=f"C{i % 10}", label=row["name"] * (j == 0))
            axes.annotate(f"{i + 1}", (x, y), (4, 3), textcoords="offset points", fontsize=7, color=f"C{i % 10}")
    axes.set(xscale="log", yscale="log", xlabel="error of the mean (posterior std)", ylabel="variance / true variance")
    axes.set_title(f"exact posterior ({', '.join(f'{m} {n}' for m, n in zip('●■▲◆', rows[0]['exact'], strict=False))})")
    axes.minorticks_off()
    axes.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    axes.set_xticks([0.02, 0.1, 0.5, 1, 2], ["0.02", "0.1", "0.5", "1", "2"])
    axes.set(xlim=(0.018, 4.6), ylim=(0.13, 7))


def _ranks(axes: Axes, rows: Sequence[dict], s: Settings) -> None:
    """A row an entry and prior: how often the truth has each rank, over how often it should."""
    bins, named = s.rank_draws + 1, []
    shares = []
    for i, row in enumerate(rows):
        for prior, e in row["exact"].items():
            shares.append(torch.bincount(torch.tensor(e["ranks"]), minlength=bins).double() * bins / len(e["ranks"]))
            named.append(f"{i + 1} {row['name']}, {prior}: p = {e['ranks_p']:.1g}")
    shown = axes.imshow(torch.stack(shares).numpy(), cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.set(title="ranks of simulated truths", xlabel=f"rank among {s.rank_draws} draws")
    axes.set_yticks(range(len(named)), named, fontsize=7)
    axes.figure.colorbar(shown, ax=axes, label="share / uniform", shrink=0.8)


def _people(axes: Axes, rows: Sequence[dict], s: Settings) -> None:
    for i, row in enumerate(rows):
        for side, key in ((-0.12, "coverages"), (0.12, "conformal_coverages")):
            values = row["people"][key]
            spread = torch.linspace(-0.06, 0.06, len(values)) + i + side
            axes.plot(spread.tolist(), values, "o" if side > 0 else "x", color=f"C{i % 10}", ms=4, alpha=0.7)
    axes.axhline(0.9, color="k", lw=0.8)
    axes.set(title="virtual slices: raw x, conformal o", ylabel="pixels inside 90 % intervals", ylim=(0.4, 1.02))
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=20, ha="right", fontsize=8)


def write(rows: Sequence[dict], s: Settings, folder: Path) -> Path:
    """The folder, which now holds bench.md, bench.json (to submit) and bench.png, each written whole."""
    record = {"settings": asdict(s), "code": code_version(), "rows": list(rows)}
    for name, text in {"bench.md": markdown(rows, s), "bench.json": json.dumps(record, indent=1) + "\n"}.items():
        with atomic_write(folder / name) as aside:
            aside.write_text(text)
    with atomic_write(folder / "bench.png") as aside:
        figure(rows, s).savefig(aside, dpi=130)
    return folder
