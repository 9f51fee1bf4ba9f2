"""Posteriors of a fully 3D scan, by the operator of oblique planes and by rebinned slices, beside 3D OSEM and MAP.

python benchmarks/pet_3d_posterior.py [--out runs/pet_3d_posterior] [--doses 0.25] [--draws 6] [--evaluations 16]
python benchmarks/pet_3d_posterior.py --head data/heads --slices 9 --doses 0.05 0.25 1 --trusted 0.25

A virtual person, or with --head the validation head of that folder with the FDG-like activity of
`companion.data.head_phantoms` and its MR: 17 slices 3.5 mm apart of 64 x 64 pixels of 3.5 mm with a lesion, in a
scanner of 9 rings, 64 angles, span 3; attenuation, 20 % randoms; measured from voxels of half the size. Full dose is
10^6 true counts a slice, lower ones are thinned. OSEM and MAP are tuned on another person, at each dose for itself;
those of --head on a training head. Rebinned slices lie where those of the volume do. Process time, NRMSE, calibration
of the draws, the lesion's activity over its true one.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.acquisition.pet import Scan
from companion.data import head_phantoms as phantoms
from companion.data.anatomy import cohort, slice_heights
from companion.data.head_activity import active_head
from companion.data.heads_download import load_heads
from companion.data.pet import held_out, place_lesions, render
from companion.evaluation import metrics
from companion.files import atomic_write
from companion.operators.counts import poisson_counts, thin
from companion.operators.cylinder import Cylinder, Projector3D
from companion.operators.linear import Diagonal
from companion.operators.pet import ParallelBeam, Projector
from companion.reconstruction.activity import HEADS, PRIOR, Prior, Sampler, posterior, trusted
from companion.reconstruction.bsrem import bsrem
from companion.reconstruction.pet import osem
from companion.reconstruction.rebinning import ssrb

SIZE, VOXEL_MM, RANDOMS, FULL = 64, 3.5, 0.2, 1e6
STRENGTHS, ITERATIONS = (0.0003, 0.001, 0.003, 0.01, 0.02, 0.05), (1, 2, 3, 4, 6)


@dataclass(frozen=True)
class Fine:
    """A person in voxels of half the size, (2 slices, 2 SIZE, 2 SIZE), and the MR on those of the scan, if any."""

    image: Tensor
    mu: Tensor
    lesion: Tensor
    mr: Tensor | None = None


def virtual(split: str, slices: int) -> Fine:
    """The first person of a split of the virtual cohort."""
    subject = cohort(split, 1)[0]
    middle = slice_heights(subject, 1)
    heights = middle + (torch.arange(2 * slices) - slices + 0.5) * VOXEL_MM / 2
    lesions = place_lesions(subject, 1, middle)
    person = render(subject, (2 * slices, 2 * SIZE, 2 * SIZE), VOXEL_MM / 2, heights, lesions)
    return Fine(person.image, person.mu, (person.lesions > 0).float())


def real(folder: Path, split: str, slices: int) -> Fine:
    """The first head of a split."""
    active = active_head(load_heads(folder, split)[0])
    fine = phantoms.fdg_slices(phantoms.flattened(active), 2 * slices, step_mm=VOXEL_MM / 2)
    mr = phantoms.mr_slices(active, 2 * slices, VOXEL_MM / 2)
    within = phantoms.FINE // SIZE
    image, mu, lesion = (
        F.avg_pool2d(v.float(), within // 2)[:, 0] for v in (fine.image, fine.mu, (fine.lesions > 0).float())
    )
    return Fine(image, mu, lesion, F.avg_pool3d(mr[:, 0][None, None], (2, within, within)))


def ring(shape: tuple[int, ...], voxel_mm: float, rings: int) -> Cylinder:
    """The scanner, around a volume of these voxels."""
    return Cylinder(shape, (voxel_mm, voxel_mm), 64, 64, 3.5, rings, 7.0, 170.0, span=3)


def scans(person: Fine, dose: float) -> tuple[Scan, Scan, Tensor]:
    """A person in 3D at a share of the full dose, the same in rebinned counts, and where the lesion is."""
    shape = len(person.image) // 2, SIZE, SIZE
    rings, counts = (shape[0] + 1) // 2, FULL * shape[0]
    c, P = ring(shape, VOXEL_MM, rings), Projector3D(ring(tuple(person.image.shape), VOXEL_MM / 2, rings))
    pairs = torch.tensor([len(plane) for plane in c.planes], dtype=torch.float32)[:, None, None]
    factors = (-(P(person.mu[None, None]) / pairs)).exp()  # of the mean line of a plane
    trues = factors * P(person.image[None, None])
    scale = counts / trues.sum()
    factors, trues = scale * factors, scale * trues
    background = (pairs * RANDOMS * counts / (pairs.sum() * len(c.theta) * c.bins)).expand_as(trues)
    truth = F.avg_pool3d(person.image[None, None], 2)
    y = thin(poisson_counts(trues + background, [0]), dose, [0])
    background, factors = dose * background, dose * factors
    whole = Scan(truth, y, Diagonal(factors, c.sinogram_shape) @ Projector3D(c), background, person.mr)
    flat = Projector(ParallelBeam(shape[1:], c.theta, c.bins, VOXEL_MM, c.bin_mm))
    y, weights, background = (ssrb(v, c)[0].transpose(0, 1) for v in (y, pairs * factors, background))
    slices = Scan(truth[0].transpose(0, 1), y, Diagonal(weights, flat.range_shape) @ flat, background)
    return whole, slices, F.avg_pool3d(person.lesion[None, None], 2)[0, 0] > 0.5


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
    """Reconstruct, measure, write `pet_3d_posterior.json` and `images.pt`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pet_3d_posterior"))
    parser.add_argument("--head", type=Path, help="a folder of heads; else a virtual person")
    parser.add_argument("--slices", type=int, default=17, help="odd: two a ring, less one")
    parser.add_argument("--doses", type=float, nargs="+", default=[0.25], help="shares of the full dose")
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--evaluations", type=int, default=16)
    parser.add_argument("--weights", nargs="+", choices=(PRIOR, HEADS), default=[PRIOR, HEADS])
    parser.add_argument(
        "--trusted", type=float, nargs="*", default=[], help="doses at which the counts choose among them"
    )
    args = parser.parse_args()
    sampler = Sampler(args.draws, args.evaluations)
    person, other = (
        virtual(split, args.slices) if args.head is None else real(args.head, of_heads, args.slices)
        for split, of_heads in (("test", "validation"), ("validation", "train"))
    )
    priors = {PRIOR: {PRIOR: Prior.load(PRIOR, held_out("validation", 16, lesions=1).image)}}
    priors = {w: priors.get(w) or Prior.every(w, mr=person.mr is not None) for w in args.weights}
    rows, images = [], {}
    for dose in args.doses:
        study(person, other, dose, priors, sampler, dose in args.trusted, rows, images, args.out)


def study(
    person: Fine, other: Fine, dose: float, priors: dict, sampler: Sampler, trust: bool, rows: list, images: dict, out
) -> None:
    """Rows and images of all methods at one dose, written as they come."""
    scan, slices, lesion = scans(person, dose)
    truth, example = scan.truth, scans(other, dose)[0]
    images["truth"] = truth[0, 0]

    def add(name: str, start: float, x: Tensor, draws: Tensor | None = None, **more) -> None:
        rows.append(
            {
                "dose": dose,
                "method": name,
                "seconds": round(time.process_time() - start, 1),
                "NRMSE": metrics.nrmse(x, truth).item(),
                "without end slices": metrics.nrmse(x[..., 2:-2, :, :], truth[..., 2:-2, :, :]).item(),
                "lesion": (x[0, 0][lesion].mean() / truth[0, 0][lesion].mean()).item(),
                "activity": (x.sum() / truth.sum()).item(),
                "calibration": None if draws is None else metrics.pooled_calibration(draws[:, 0], truth[0]),
                "memory so far (GiB)": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                **more,
            }
        )
        print(rows[-1], flush=True)
        images[f"{name}, {dose:g}"] = x[0, 0]
        if draws is not None:
            images[f"{name}, {dose:g}, deviation"] = draws[:, 0, 0].std(0)
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / "pet_3d_posterior.json") as aside:
            aside.write_text(json.dumps(rows, indent=2))
        with atomic_write(out / "images.pt") as aside:
            torch.save(images, aside)

    for name, method, settings in (("OSEM", by_osem, ITERATIONS), ("MAP", by_map, STRENGTHS)):
        best = tuned(method, settings, example)
        start = time.process_time()
        add(name, start, method(scan, best), setting=best)
    strength = rows[-1]["setting"]
    shown = {}
    for kinds in priors.values():
        for mr in (False, True):
            for name, prior in [(n, p) for n, p in kinds.items() if p.with_mr == mr][:1]:
                shown[name] = prior
                if not mr and person.mr is None:
                    start = time.process_time()
                    found = posterior(prior, slices, sampler)
                    add(f"{name}, rebinned", start, stacked(found.mean), stacked(found.x))
                start = time.process_time()
                found = posterior(prior, scan, sampler)
                add(f"{name}, 3D", start, found.mean, found.x)
    if trust:
        start = time.process_time()
        done = trusted(shown, scan, lambda part: by_map(part, strength), sampler)
        add("trusted, 3D", start, done.image, done.x, says=[t.verdict for t in done.trusts])


if __name__ == "__main__":
    main()
