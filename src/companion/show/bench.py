"""The bench's rows as a table and a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure

from companion.files import atomic_write, code_version
from companion.reconstruction.bench import Settings


def markdown(rows: Sequence[dict], s: Settings) -> str:
    """One line an entry. Bold: mean within 0.1 posterior standard deviations and variance within 5 %."""
    priors = list(rows[0]["exact"])
    head = ["entry"]
    for prior in priors:
        head += [f"{prior}: mean error", "variance", "coverage", "ranks p"]
    head += ["people: PSNR", "one draw", "calibration", "coverage", "conformal", "PSNR +-"]
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
        p = row["people"]
        cells += [f"{p['psnr']:.1f}", f"{p['psnr_draw']:.1f}", f"{p['calibration']:.2f}", f"{p['coverage']:.2f}"]
        cells += [f"{p['conformal_coverage']:.2f} (x {p['conformal_factor']:.1f})", f"{p['psnr_width'] / 2:.1f}"]
        if h := row.get("heads"):
            cells += [f"{h['psnr']:.1f}", f"{h['calibration']:.2f}", f"{h['coverage']:.2f}"]
        cells += [f"{p['denoiser_calls']:.0f}", f"{p['milliseconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        f"{s.calls} evaluations of D a draw. Exact: {s.size} x {s.size}, {s.draws} draws, ranks of {s.cases} simulated "
        f"scans. People: {s.people} virtual slices, R = {s.acceleration:g}, {s.people_draws} draws; intervals of 90 %, "
        f"conformal ones calibrated on {s.calibration} others. ms: a draw of a virtual slice, on this machine."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def figure(rows: Sequence[dict], s: Settings) -> Figure:
    """Mean and variance against the exact posterior; ranks; coverage of virtual slices before and after conformal."""
    priors = list(rows[0]["exact"])
    fig = Figure(figsize=(13, 3.8), layout="constrained")
    known, flat, people = fig.subplots(1, 3)
    known.axhspan(0.95, 1.05, color="0.85", zorder=0)
    known.axvspan(0, 0.1, color="0.92", zorder=0)
    width = 1 / (len(rows) * len(priors) + 1)
    bins = s.rank_draws + 1
    for i, row in enumerate(rows):
        for j, prior in enumerate(priors):
            e, label = row["exact"][prior], f"{row['name']}, {prior}"
            x, y = max(e["mean_error"], 0.02), min(max(e["variance_ratio"], 0.1), 10)
            known.plot(x, y, "os^D"[j], color=f"C{i}", label=label)
            share = torch.bincount(torch.tensor(e["ranks"]), minlength=bins).double() * bins / len(e["ranks"])
            at = torch.arange(bins) + width * (i * len(priors) + j - (len(rows) * len(priors) - 1) / 2)
            flat.bar(at.tolist(), share.tolist(), width, color=f"C{i}", alpha=1 - 0.5 * j)
        for side, key in ((-0.12, "coverages"), (0.12, "conformal_coverages")):
            values = row["people"][key]
            spread = torch.linspace(-0.06, 0.06, len(values)) + i + side
            people.plot(spread.tolist(), values, "o" if side > 0 else "x", color=f"C{i}", ms=4, alpha=0.7)
    known.set(xscale="log", yscale="log", xlabel="error of the mean (posterior std)", ylabel="variance / true variance")
    known.set_title("exact posterior")
    known.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    known.minorticks_off()
    known.set_xticks([0.02, 0.1, 0.5, 1, 2], ["0.02", "0.1", "0.5", "1", "2"])
    known.set(xlim=(0.018, 4), ylim=(0.15, 6))
    known.legend(fontsize=7, frameon=False)
    flat.axhline(1, color="k", lw=0.8)
    flat.set(title="ranks of simulated truths", xlabel=f"rank among {s.rank_draws} draws", ylabel="share / uniform")
    people.axhline(0.9, color="k", lw=0.8)
    people.set(title="virtual slices: raw x, conformal o", ylabel="pixels inside 90 % intervals", ylim=(0.4, 1.02))
    people.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=20, ha="right", fontsize=8)
    return fig


def write(rows: Sequence[dict], s: Settings, folder: Path) -> Path:
    """The folder, which now holds bench.md, bench.json (to submit) and bench.png, each written whole."""
    record = {"settings": asdict(s), "code": code_version(), "rows": list(rows)}
    for name, text in {"bench.md": markdown(rows, s), "bench.json": json.dumps(record, indent=1) + "\n"}.items():
        with atomic_write(folder / name) as aside:
            aside.write_text(text)
    with atomic_write(folder / "bench.png") as aside:
        figure(rows, s).savefig(aside, dpi=130)
    return folder
