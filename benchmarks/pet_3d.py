"""A brain of 128 x 128 x 64 voxels from a fully 3D scan, with and without time of flight: OSEM, and rebinned slices.

python benchmarks/pet_3d.py --out runs/pet_3d [--angles 48] [--counts 2e7]

A virtual person in a scanner of 24 rings; process time, peak memory, NRMSE, and three cuts of each volume as a picture.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch

from companion.data.anatomy import cohort
from companion.data.pet import render
from companion.evaluation import metrics
from companion.files import atomic_write
from companion.operators.counts import poisson_counts
from companion.operators.cylinder import Cylinder, Projector3D
from companion.operators.linear import Diagonal
from companion.operators.pet import with_counts
from companion.reconstruction.pet import osem
from companion.reconstruction.rebinning import rebinned_model, ssrb
from companion.show import figures

SHAPE, VOXEL_MM = (64, 128, 128), 1.75
TOF = {"tof_bins": 9, "tof_bin_mm": 30.0, "tof_fwhm_mm": 60.0}  # 400 ps


def cuts(volume: torch.Tensor) -> dict[str, torch.Tensor]:
    """The middle of a volume (1, z, y, x) across each axis, the head up."""
    _, z, y, x = volume.shape
    return {
        "axial": volume[0, z // 2],
        "coronal": volume[0, :, y // 2].flip(0),
        "sagittal": volume[0, :, :, x // 2].flip(0),
    }


def main() -> None:
    """Reconstruct, measure, and write `pet_3d.json` and `pet_3d.png`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pet_3d"))
    parser.add_argument("--angles", type=int, default=96)
    parser.add_argument("--counts", type=float, default=2e7)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--subsets", type=int, default=8)
    args = parser.parse_args()
    person = render(cohort("test", 1)[0], SHAPE, VOXEL_MM)
    truth, mu = person.image[None, None], person.mu[None, None]
    rows, numbers = {"truth": cuts(truth[0])}, {}
    for name, tof in (("3D", {}), ("3D, TOF", TOF)):
        c = Cylinder(SHAPE, (VOXEL_MM, VOXEL_MM), args.angles, SHAPE[2], VOXEL_MM, 24, 5.0, 200.0, span=3, **tof)
        start = time.process_time()
        P = Projector3D(c)
        flat = Projector3D(
            Cylinder(SHAPE, (VOXEL_MM, VOXEL_MM), args.angles, SHAPE[2], VOXEL_MM, 24, 5.0, 200.0, span=3)
        )
        pairs = torch.tensor([len(plane) for plane in c.planes], dtype=torch.float32)[:, None, None]
        factors = (-(flat(mu) / pairs)).exp()  # of the mean line of a plane
        factors = factors[:, :, None].expand(1, *c.sinogram_shape) if tof else factors
        A = with_counts(Diagonal(factors, c.sinogram_shape) @ P, truth, args.counts)
        y = poisson_counts(A(truth), [0])
        made = time.process_time()
        x = osem(y, A, iterations=args.iterations, subsets=args.subsets).x
        numbers[name] = {
            "bins": y.numel(),
            "tables and scan (s)": made - start,
            "OSEM (s)": time.process_time() - made,
            "NRMSE": metrics.nrmse(x, truth).item(),
            "activity": (x.sum() / truth.sum()).item(),
        }
        rows[name] = cuts(x[0])
        if not tof:
            slices, scale = (
                ssrb(y, c),
                ssrb(A(torch.ones_like(truth)), c)
                / rebinned_model(c)(torch.ones(1, 1, 2 * c.rings - 1, *SHAPE[1:])).clamp(min=1e-6),
            )
            start = time.process_time()
            thick = osem(slices, Diagonal(scale, slices.shape[1:]) @ rebinned_model(c), iterations=2, subsets=8).x
            numbers["rebinned"] = {"OSEM (s)": time.process_time() - start}
            rows["rebinned"] = cuts(thick[0])
        print(name, numbers[name], flush=True)
    numbers["peak memory (GiB)"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    args.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out / "pet_3d.json") as aside:
        aside.write_text(json.dumps(numbers, indent=2))
    fig = figures.image_grid(rows, window=(0, 40), unit="kBq/mL", width=1.8)
    fig.savefig(args.out / "pet_3d.png", dpi=120, bbox_inches="tight")
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
