"""Small real runs, made in seconds, for a first look at the gallery and for its tests: volumes and dose, no network.

MR: a head at three accelerations, reconstructed by CG-SENSE from several noisy scans. PET: slices at three doses,
reconstructed by MLEM from several scans. Here the draws are repeated scans, so their spread is that of the noise alone.
"""

from __future__ import annotations

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from companion.data import anatomy
from companion.data.pet import cohort_slices
from companion.evaluation import metrics
from companion.files import project_root
from companion.operators.counts import poisson_counts
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, sense
from companion.operators.pet import ParallelBeam, emission_model, with_counts
from companion.parameters import Parameters, param
from companion.randomness import randn
from companion.reconstruction import mri as baselines
from companion.reconstruction.pet import mlem
from companion.show import figures
from companion.workbench.catalogue import find_entries
from companion.workbench.run import Run

SIZE, SCANS = 40, 4


@dataclass(frozen=True)
class Scan(Parameters):
    """Parameters of an example: what it varies and how many scans it repeats."""

    acceleration: int = param(1, "of the k-space lines, one in so many is measured", minimum=1)
    dose: float = param(1.0, "share of the full dose", minimum=0, maximum=1)


def write_examples(runs: str | os.PathLike, accelerations=(2, 6), doses=(0.1, 1.0), people=(0, 1)) -> list[Path]:
    """Folders of one run for each acceleration and dose, and each person (their seed)."""
    runs, folders = Path(runs), []
    with contextlib.redirect_stdout(io.StringIO()):  # each run says that it is done
        for seed in people:
            for acceleration in accelerations:
                out = runs / "example" / "mr" / f"acceleration={acceleration},seed={seed}"
                folders.append(_mr(Scan(out=str(out), device="cpu", seed=seed, acceleration=acceleration)))
            for dose in doses:
                out = runs / "example" / "pet" / f"dose={dose},seed={seed}"
                folders.append(_pet(Scan(out=str(out), device="cpu", seed=seed, dose=dose)))
    return folders


def _mr(p: Scan) -> Path:
    person, shape = anatomy.cohort("test", p.seed + 1)[p.seed], (24, SIZE, SIZE)
    x = anatomy.render(person, "T1w", shape).image[:, None]
    maps = birdcage_maps((SIZE, SIZE), 4)
    mask = cartesian_mask(SIZE, p.acceleration, "equispaced", acs=4)
    y = sense(maps, mask)(x)
    seeds = (torch.Generator().manual_seed(100 * p.seed + i) for i in range(SCANS))
    noisy = (y + 0.02 * randn(y.shape, y.dtype, generator) * (y != 0) for generator in seeds)
    draws = torch.stack([baselines.cg_sense(scan, maps, mask, iterations=10) for scan in noisy])
    return _write(
        p,
        "mr",
        x,
        draws,
        {"zero_filled": (baselines.zero_filled(y, maps, mask), "z y x")},
        "z",
        anatomy.FIELD_OF_VIEW_MM / SIZE,
        "signal",
        (0.0, 1.1),
    )


def _pet(p: Scan) -> Path:
    slices = cohort_slices("test", 1, SIZE, per_subject=6, first=p.seed)
    x = slices.image
    A = with_counts(emission_model(ParallelBeam((SIZE, SIZE), pixel_mm=slices.pixel_mm)), x, 3e5)
    draws = torch.stack(
        [
            mlem(
                poisson_counts(p.dose * A(x), [1000 * p.seed + 10 * j + i for j in range(len(x))]),
                p.dose * A,
                iterations=15,
            ).x
            for i in range(SCANS)
        ]
    )
    return _write(p, "pet", x, draws, {}, "slice", slices.pixel_mm, "kBq/mL", (0.0, float(x.max())))


def _write(p: Scan, stage: str, x, draws, others, depth: str, voxel_mm: float, unit: str, window) -> Path:
    run = Run.start(p, paper="example", stage=stage)
    mean, n = draws.mean(0), len(x) // 2
    images = {"truth": x[n], "one scan": draws[0, n], "mean": mean[n], "error": (mean[n].abs() - x[n].abs()).abs()}
    fig = figures.image_grid(
        {f"{depth} {n}": images},
        window=window,
        unit=unit,
        voxel_mm=voxel_mm,
        kinds={"error": ("magma", 0, 0.2 * window[1])},
    )
    run.figure(
        fig,
        "overview",
        alt=f"Truth, one reconstruction, the mean of {SCANS} and its error",
        dpi=80,
        caption=f"person {p.seed}, {SCANS} scans",
    )
    run.images(
        "images",
        truth=(x, f"{depth} y x"),
        draws=(draws, f"draw {depth} y x"),
        voxel_mm=voxel_mm,
        unit=unit,
        window=window,
        labels={"draw": [f"scan {i + 1}" for i in range(len(draws))]},
        **others,
    )
    run.metrics(
        {
            "psnr_db": {
                "one scan": metrics.psnr(draws[0].abs(), x.abs()).mean().item(),
                "mean of all": metrics.psnr(mean.abs(), x.abs()).mean().item(),
            },
            "calibration_ratio": metrics.calibration_ratio(draws.abs(), x.abs()).mean().item(),
        }
    )
    return run.finish().parent


@dataclass(frozen=True)
class Browse(Parameters):
    """Parameters of gallery.ipynb."""

    runs: str = param("runs", "folder that holds the runs")
    examples: bool = param(False, "make small example runs and show those instead")
    paper: str = param("all", "show runs of this paper only")
    where: str = param("", "show runs that fulfil this, such as 'acceleration >= 8, mask = random, PSNR > 25'")
    explore: bool = param(False, "open a volume in ipyniivue (WebGL); not for executed copies, which cannot keep it")


def folder_of(p: Browse, beside: Path) -> Path:
    """The folder of runs to show: p.runs, or examples made `beside` when asked for or when p.runs has none to show."""
    runs = project_root() / p.runs
    if not p.examples and runs.is_dir() and any(entry.done and entry.files() for entry in find_entries(runs)):
        return runs
    write_examples(beside / ".examples")
    return beside / ".examples"
