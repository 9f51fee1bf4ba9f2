"""Posteriors of a fully 3D scan, by the operator of oblique planes and by rebinned slices, beside 3D OSEM and MAP.

python benchmarks/pet_3d_posterior.py [--out runs/pet_3d_posterior] [--doses 0.25] [--draws 6] [--evaluations 16]
python benchmarks/pet_3d_posterior.py --head data/heads --slices 9 --doses 0.05 0.25 1 --weights pet/heads --draws 4
python benchmarks/pet_3d_posterior.py --large --weights pet/heads --draws 4

A virtual person, or with --head the validation head of that folder with the FDG-like activity of
`companion.data.head_phantoms` and its MR: 17 slices 3.5 mm apart of 64 x 64 pixels of 3.5 mm with a lesion, in a
scanner of 9 rings, 64 angles, span 3, 10^6 true counts a slice at full dose, lower ones thinned. --large: 64 slices of
128 x 128 voxels of 1.75 mm, 24 rings, 48 angles, 2 x 10^7 counts.

No inverse crime: scans are simulated from voxels of half the size, by lines half a bin apart that are averaged, with
detectors of 4 mm, 20 % scatter and 10 % randoms; reconstructed with a line a bin, a blur of the image of 4 mm, the
attenuation of coarse voxels, and a scatter estimate that is broader and some per cent off, as in
`companion.acquisition.simulated`. OSEM and MAP are tuned on another person, at each dose for itself, those of --head on
a training head; those of --large are not. With an MR there is MAP guided by it (Bowsher), too. Rebinned slices lie
where those of the volume do. Process time, what was foreseen of it, NRMSE, calibration of the draws, the lesion's
activity over its true one, the bias of classes of true activity. "trusted" is what is delivered: the mixture of a
posterior mean with MAP (Bowsher, where the MR is given) for which the counts themselves ask.
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
from companion.acquisition.simulated import Detector
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
from companion.operators.pet import Blur, ParallelBeam, background, emission_model, gaussian
from companion.reconstruction.activity import HEADS, PRIOR, Prior, Sampler, cost, posterior, trusted
from companion.reconstruction.bsrem import bsrem
from companion.reconstruction.mr_guided import bowsher_weights
from companion.reconstruction.pet import osem
from companion.reconstruction.rebinning import ssrb

STRENGTHS, ITERATIONS = (0.003, 0.0003, 0.001, 0.005, 0.01, 0.02), (2, 1, 3, 4, 6)  # the first are for --large
TISSUES = {"CSF": (0.5, 3.0), "white": (3.0, 11.0), "grey": (11.0, 31.0)}  # by their true activity, kBq/mL
DETECTOR, SCATTER_MM = Detector(), 3.5  # the bins that the widths of its scatter are in


@dataclass(frozen=True)
class Size:
    """A volume, the scanner around it, and the true counts of the full dose."""

    shape: tuple[int, int, int]
    voxel_mm: float
    angles: int
    rings: int
    ring_mm: float
    radius_mm: float
    counts: float

    @classmethod
    def small(cls, slices: int) -> Size:
        return cls((slices, 64, 64), 3.5, 64, (slices + 1) // 2, 7.0, 170.0, 1e6 * slices)

    @classmethod
    def large(cls) -> Size:
        return cls((64, 128, 128), 1.75, 48, 24, 5.0, 200.0, 2e7)

    def scanner(self, fine: int = 1) -> Cylinder:
        """With voxels and bins so many times finer."""
        z, y, x = (fine * n for n in self.shape)
        voxel = self.voxel_mm / fine
        return Cylinder(
            (z, y, x), (voxel, voxel), self.angles, x, voxel, self.rings, self.ring_mm, self.radius_mm, span=3
        )


@dataclass(frozen=True)
class Fine:
    """A person in voxels of half the size, (2 slices, 2 y, 2 x), and the MR on those of the scan, if any."""

    image: Tensor
    mu: Tensor
    lesion: Tensor
    mr: Tensor | None = None


def virtual(split: str, size: Size) -> Fine:
    """The first person of a split of the virtual cohort."""
    subject, voxel = cohort(split, 1)[0], size.voxel_mm / 2
    z, y, x = (2 * n for n in size.shape)
    middle = slice_heights(subject, 1)
    heights = middle + (torch.arange(z) - (z - 1) / 2) * voxel
    lesions = place_lesions(subject, 1, middle)
    person = render(subject, (z, y, x), voxel, heights, lesions)
    return Fine(person.image, person.mu, (person.lesions > 0).float())


def real(folder: Path, split: str, size: Size) -> Fine:
    """The first head of a split."""
    active = active_head(load_heads(folder, split)[0])
    slices, step = 2 * size.shape[0], size.voxel_mm / 2
    fine = phantoms.fdg_slices(phantoms.flattened(active), slices, step_mm=step)
    mr = phantoms.mr_slices(active, slices, step)
    within = phantoms.FINE // size.shape[2]
    image, mu, lesion = (
        F.avg_pool2d(v.float(), within // 2)[:, 0] for v in (fine.image, fine.mu, (fine.lesions > 0).float())
    )
    return Fine(image, mu, lesion, F.avg_pool3d(mr[:, 0][None, None], (2, within, within)))


def simulated(person: Fine, size: Size, pairs: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts at full dose, the estimate of their background, and the true counts of a unit line integral."""
    c, voxel = size.scanner(2), size.voxel_mm / 2
    P, width = Projector3D(c), SCATTER_MM / size.voxel_mm

    def seen(x: Tensor) -> Tensor:
        return P(x[None, None]).unflatten(-1, (-1, 2)).mean(-1)

    along_z = Blur(c.shape, voxel, (DETECTOR.fwhm_mm, 0, 0))(person.image[None])[0]
    trues = (-(seen(person.mu) / pairs)).exp() * seen(along_z)
    trues = trues @ gaussian(trues.shape[-1], size.voxel_mm, DETECTOR.fwhm_mm).to(trues)
    gain = size.counts / trues.sum()
    trues = gain * trues
    extra, estimate = (background(trues, 0.0, DETECTOR.scatter, bins * width) for bins in DETECTOR.scatter_bins)
    randoms = background(trues, DETECTOR.randoms)
    off = torch.randn((), generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)
    estimate = (1 + DETECTOR.scatter_error * off) * estimate + randoms
    return poisson_counts(trues + extra + randoms, [seed]), estimate, gain


def scans(person: Fine, size: Size, dose: float, seed: int) -> tuple[Scan, Scan, Tensor]:
    """A person in 3D at a share of the full dose, the same in rebinned counts, and where the lesion is."""
    c = size.scanner()
    pairs = torch.tensor([len(plane) for plane in c.planes], dtype=torch.float32)[:, None, None]
    y, estimate, gain = simulated(person, size, pairs, seed)
    P = Projector3D(c)
    mu, truth, lesion = (F.avg_pool3d(v[None, None], 2) for v in (person.mu, person.image, person.lesion))
    y, estimate = thin(y, dose, [seed]), dose * estimate
    factors = dose * gain * (-(P(mu) / pairs)).exp()  # of the mean line of a plane
    A = Diagonal(factors, c.sinogram_shape) @ P @ Blur(c.shape, size.voxel_mm, DETECTOR.fwhm_mm)
    whole = Scan(truth, y, A, estimate, person.mr, step=1.0)  # cubes
    beam = ParallelBeam(size.shape[1:], c.theta, c.bins, size.voxel_mm, c.bin_mm)
    y, weights, estimate = (ssrb(v, c)[0].transpose(0, 1) for v in (y, pairs * factors, estimate))
    slices = Scan(truth[0].transpose(0, 1), y, emission_model(beam, weights, DETECTOR.fwhm_mm), estimate)
    return whole, slices, lesion[0, 0] > 0.5


def tuned(method: Callable[[Scan, float], Tensor], settings: tuple, scan: Scan | None) -> float:
    """The setting of the least NRMSE for this scan; the first without one."""
    if scan is None:
        return settings[0]
    return min(settings, key=lambda v: metrics.nrmse(method(scan, v), scan.truth).item())


def by_osem(scan: Scan, iterations: float) -> Tensor:
    return osem(scan.y, scan.A, scan.background, iterations=int(iterations), subsets=8).x


def by_map(scan: Scan, strength: float) -> Tensor:
    return bsrem(scan.y, scan.A, scan.background, strength=strength, iterations=12, subsets=8).x


def by_bowsher(scan: Scan, strength: float) -> Tensor:
    assert scan.mr is not None
    alike = bowsher_weights(scan.mr)
    return bsrem(scan.y, scan.A, scan.background, strength=strength, alike=alike, iterations=12, subsets=8).x


def stacked(x: Tensor) -> Tensor:
    """(..., slice, 1, y, x) as (..., 1, 1, z, y, x)."""
    return x.transpose(-4, -3).unsqueeze(-5)


def main() -> None:
    """Reconstruct, measure, write `pet_3d_posterior.json` and `images.pt`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pet_3d_posterior"))
    parser.add_argument("--head", type=Path, help="a folder of heads; else a virtual person")
    parser.add_argument("--slices", type=int, default=17, help="odd: two a ring, less one")
    parser.add_argument("--large", action="store_true", help="128 x 128 x 64 voxels; OSEM and MAP are not tuned")
    parser.add_argument("--doses", type=float, nargs="+", default=[0.25], help="shares of the full dose")
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--evaluations", type=int, default=16)
    parser.add_argument("--weights", nargs="+", choices=(PRIOR, HEADS), default=[PRIOR, HEADS])
    parser.add_argument("--trusted", action=argparse.BooleanOptionalAction, default=True, help="the counts choose")
    args = parser.parse_args()
    sampler = Sampler(args.draws, args.evaluations)
    size = Size.large() if args.large else Size.small(args.slices)
    people = [
        virtual(split, size) if args.head is None else real(args.head, of_heads, size)
        for split, of_heads in (("test", "validation"), ("validation", "train"))[: 1 if args.large else 2]
    ]
    with_mr = people[0].mr is not None
    priors = {
        w: {PRIOR: Prior.load(PRIOR, held_out("validation", 16, lesions=1).image)}
        if w == PRIOR
        else Prior.every(w, mr=with_mr)
        for w in args.weights
    }
    rows, images = [], {}
    for dose in args.doses:
        study(people, size, dose, priors, sampler, args.trusted, rows, images, args.out)


def study(
    people: list[Fine],
    size: Size,
    dose: float,
    priors: dict,
    sampler: Sampler,
    trust: bool,
    rows: list,
    images: dict,
    out: Path,
) -> None:
    """Rows and images of all methods at one dose, written as they come."""
    scan, slices, lesion = scans(people[0], size, dose, 0)
    truth, example = scan.truth, next((scans(p, size, dose, 1)[0] for p in people[1:]), None)
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
                "bias (%)": {
                    name: 100 * (x[within].sum() / truth[within].sum() - 1).item()
                    for name, (low, high) in TISSUES.items()
                    for within in [(truth >= low) & (truth < high)]
                },
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

    classical = {"OSEM": (by_osem, ITERATIONS), "MAP": (by_map, STRENGTHS)}
    classical |= {} if scan.mr is None else {"Bowsher": (by_bowsher, STRENGTHS)}
    best = {}
    for name, (method, settings) in classical.items():
        best[name] = tuned(method, settings, example)
        start = time.process_time()
        add(name, start, method(scan, best[name]), setting=best[name])
    for mr in (False, True)[: 1 if scan.mr is None else 2]:
        shown, found = {}, {}
        for kinds in priors.values():
            for name, prior in [(n, p) for n, p in kinds.items() if p.with_mr == mr][:1]:
                if scan.mr is None and slices.y.shape[0] == size.shape[0]:
                    start = time.process_time()
                    by_slices = posterior(prior, slices, sampler)
                    add(f"{name}, rebinned", start, stacked(by_slices.mean), stacked(by_slices.x))
                foreseen = cost(prior, scan, sampler)
                print(f"{name}: {foreseen}", flush=True)
                start = time.process_time()
                shown[name], found[name] = prior, posterior(prior, scan, sampler)
                more = {"foreseen": foreseen, "widening": prior.widening}
                add(f"{name}, 3D", start, found[name].mean, found[name].x, **more)
        if trust and shown:
            start, lean = time.process_time(), by_bowsher if mr else by_map
            strength = best["Bowsher" if mr else "MAP"]
            done = trusted(shown, scan, lambda part, m=lean, s=strength: m(part, s), sampler, at_hand=found)
            more = {"says": [t.verdict for t in done.trusts], "share": [t.share for t in done.trusts]}
            add("trusted, MR given" if mr else "trusted", start, done.image, done.x, **more)


if __name__ == "__main__":
    main()
