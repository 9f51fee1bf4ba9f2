"""Posteriors of a fully 3D scan, by the operator of oblique planes and by rebinned slices, beside 3D OSEM and MAP.

python benchmarks/pet_3d_posterior.py [--out runs/pet_3d_posterior] [--counts 4e6] [--draws 6] [--evaluations 16]

A virtual person, 17 slices 3.5 mm apart of 64 x 64 pixels of 3.5 mm with a lesion, in a scanner of 9 rings, 64 angles,
span 3; attenuation, 20 % randoms; measured from voxels of half the size. OSEM and MAP are tuned on another person.
Rebinned slices lie where those of the volume do. Process time, NRMSE, calibration of the draws, the lesion's contrast.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.acquisition.pet import Scan
from companion.data.anatomy import cohort, slice_heights
from companion.data.pet import held_out, place_lesions, render
from companion.evaluation import metrics
from companion.files import atomic_write
from companion.operators.counts import poisson_counts
from companion.operators.cylinder import Cylinder, Projector3D
from companion.operators.linear import Diagonal
from companion.operators.pet import ParallelBeam, Projector
from companion.reconstruction.activity import HEADS, PRIOR, Prior, Sampler, posterior, trusted
from companion.reconstruction.bsrem import bsrem
from companion.reconstruction.pet import osem
from companion.reconstruction.rebinning import ssrb

SHAPE, VOXEL_MM, RANDOMS = (17, 64, 64), 3.5, 0.2
STRENGTHS, ITERATIONS = (0.0003, 0.001, 0.003, 0.01, 0.02, 0.05), (1, 2, 3, 4, 6)


def ring(shape: tuple[int, int, int], voxel_mm: float) -> Cylinder:
    """The scanner, around a volume of these voxels."""
    return Cylinder(shape, (voxel_mm, voxel_mm), 64, 64, 3.5, 9, 7.0, 170.0, span=3)


def scans(split: str, counts: float) -> tuple[Scan, Scan, Tensor]:
    """The first person of a split in 3D, the same in rebinned counts slice by slice, and where the lesion is."""
    subject = cohort(split, 1)[0]
    depth, height, width = (2 * n for n in SHAPE)
    middle = slice_heights(subject, 1)
    heights = middle + (torch.arange(depth) - (depth - 1) / 2) * VOXEL_MM / 2
    lesions = place_lesions(subject, 1, middle)
    person = render(subject, (depth, height, width), VOXEL_MM / 2, heights, lesions)
    c, P = ring(SHAPE, VOXEL_MM), Projector3D(ring((depth, height, width), VOXEL_MM / 2))
    pairs = torch.tensor([len(plane) for plane in c.planes], dtype=torch.float32)[:, None, None]
    factors = (-(P(person.mu[None, None]) / pairs)).exp()  # of the mean line of a plane
    trues = factors * P(person.image[None, None])
    scale = counts / trues.sum()
    factors, trues = scale * factors, scale * trues
    background = (pairs * RANDOMS * counts / (pairs.sum() * len(c.theta) * c.bins)).expand_as(trues)
    y = poisson_counts(trues + background, [0])
    truth = F.avg_pool3d(person.image[None, None], 2)
    whole = Scan(truth, y, Diagonal(factors, c.sinogram_shape) @ Projector3D(c), background)
    flat = Projector(ParallelBeam(SHAPE[1:], c.theta, c.bins, VOXEL_MM, c.bin_mm))
    y, weights, background = (ssrb(v, c)[0].transpose(0, 1) for v in (y, pairs * factors, background))
    slices = Scan(truth[0].transpose(0, 1), y, Diagonal(weights, flat.range_shape) @ flat, background)
    return whole, slices, F.avg_pool3d((person.lesions > 0).float()[None, None], 2)[0, 0] > 0.5


def tuned(method: Callable[[Scan, float], Tensor], settings: tuple, scan: Scan) -> float:
    """The setting of the least NRMSE for this scan."""
    return min(settings, key=lambda v: metrics.nrmse(method(scan, v), scan.truth).item())


def by_osem(scan: Scan, iterations: float) -> Tensor:
    return osem(scan.y, scan.A, scan.background, iterations=int(iterations), subsets=8).x


def by_map(scan: Scan, strength: float) -> Tensor:
    return bsrem(scan.y, scan.A, scan.background, strength=strength, iterations=12, subsets=16).x


def stacked(x: Tensor) -> Tensor:
    """(..., slice, 1, y, x) as (..., 1, 1, z, y, x)."""
    return x.transpose(-4, -3).unsqueeze(-5)


def main() -> None:
    """Reconstruct, measure, write `pet_3d_posterior.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pet_3d_posterior"))
    parser.add_argument("--counts", type=float, default=4e6)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--evaluations", type=int, default=16)
    parser.add_argument("--trusted", action="store_true", help="also what the counts choose; four times as long")
    args = parser.parse_args()
    sampler = Sampler(args.draws, args.evaluations)
    other = scans("validation", args.counts)[0]
    scan, slices, lesion = scans("test", args.counts)
    truth, rows = scan.truth, []
    around = truth[0, 0][lesion].mean()

    def add(name: str, start: float, x: Tensor, draws: Tensor | None = None, **more) -> None:
        rows.append(
            {
                "method": name,
                "seconds": round(time.process_time() - start, 1),
                "NRMSE": metrics.nrmse(x, truth).item(),
                "without end slices": metrics.nrmse(x[..., 2:-2, :, :], truth[..., 2:-2, :, :]).item(),
                "lesion": (x[0, 0][lesion].mean() / around).item(),
                "activity": (x.sum() / truth.sum()).item(),
                "calibration": None if draws is None else metrics.pooled_calibration(draws[:, 0], truth[0]),
                "memory so far (GiB)": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                **more,
            }
        )
        print(rows[-1], flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out / "pet_3d_posterior.json") as aside:
            aside.write_text(json.dumps(rows, indent=2))

    for name, method, settings in (("OSEM", by_osem, ITERATIONS), ("MAP", by_map, STRENGTHS)):
        best = tuned(method, settings, other)
        start = time.process_time()
        add(name, start, method(scan, best), setting=best)
    strength = rows[-1]["setting"]
    priors = {PRIOR: Prior.load(PRIOR, held_out("validation", 16, lesions=1).image)} | Prior.every(HEADS, False)
    for name, prior in list(priors.items())[:2]:
        start = time.process_time()
        found = posterior(prior, slices, sampler)
        add(f"{name}, rebinned", start, stacked(found.mean), stacked(found.x))
        start = time.process_time()
        found = posterior(prior, scan, sampler)
        add(f"{name}, 3D", start, found.mean, found.x)
    if args.trusted:
        start = time.process_time()
        done = trusted(priors, scan, lambda part: by_map(part, strength), sampler)
        add("trusted, 3D", start, done.image, done.x, says=[t.verdict for t in done.trusts])


if __name__ == "__main__":
    main()
