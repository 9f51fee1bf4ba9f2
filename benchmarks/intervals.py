"""Do 90 % intervals hold 90 % of the truths? Virtual people, MRI and PET, as drawn and made conformal.

    python benchmarks/intervals.py mri pet --out runs/benchmarks/intervals

One slice each of 50 validation people to calibrate on and of 100 test people to count: 64 x 64 pixels, a prior of their
own cohort, the recommended sampler, few short draws. MRI: 4 coils, R = 4, noise .01, `brain/t1w`. PET: a quarter of the
published dose, one lesion a slice, `pet/prior`. The error of a prior is measured on 16 further validation people.
Intervals of pixels, of the means of squares an eighth of the field wide, and of the PSNR of the mean of the draws.
Writes intervals.json and table.md; finished draws are kept in <out> and not redone.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm.auto import tqdm

from companion.acquisition.pet import acquire
from companion.data.pet import held_out
from companion.data.virtual import slices
from companion.diffusion.covariance import Measured
from companion.diffusion.gibbs import annealed_gibbs
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.noise import karras
from companion.evaluation.intervals import KINDS, Drawn, intervals, over_splits
from companion.files import atomic_write, code_version
from companion.models.checkpoint import load_denoiser
from companion.papers.start_here import FIRST_SIGMA, scanned
from companion.reconstruction.activity import Prior, Sampler, posterior

FIT = 16  # validation people on whom the error of a prior is measured; others calibrate
NOISE = 0.01


def mri(split: str, args) -> Drawn:
    """Complex slices of T1w brains."""
    D = load_denoiser("brain/t1w")
    C = Measured.fit(D, slices("validation", FIT, 64))
    skip = FIT * (split == "validation")
    x = slices(split, skip + args.count[split], 64)[skip:]
    scan = scanned(x, 4, 4, 4, NOISE, seed=len(split))
    levels, draws = karras(args.evaluations, 4 * NOISE, FIRST_SIGMA), []
    for i in tqdm(range(len(x)), desc=f"MRI, {split}"):
        G = posterior_mean(scan.one(i).A, scan.y[i : i + 1], NOISE, C, iterations=12, balance=True)
        seeds = range(args.draws * (skip + i), args.draws * (skip + i + 1))
        draws.append(annealed_gibbs(D, G, levels, seeds=seeds).x)
    return Drawn(x, torch.stack(draws, 1), x.abs() > 0.08 * x.abs().amax((-1, -2), keepdim=True))


def pet(split: str, args) -> Drawn:
    """Activity of FDG in kBq/mL."""
    prior = Prior.load("pet/prior", held_out("validation", FIT, lesions=1).image)
    skip = FIT * (split == "validation")
    people = held_out(split, skip + args.count[split], lesions=1)
    found = []
    for i in tqdm(range(skip, len(people.image)), desc=f"PET, {split}"):
        x, mu = people.image[i : i + 1], people.mu[i : i + 1]
        scan = acquire(x, mu, 2.5e5, [70_000 + i], pixel_mm=people.pixel_mm)
        found.append(posterior(prior, scan, Sampler(args.draws, args.evaluations), seed=1000 * i).x)
    return Drawn(people.image[skip:], torch.cat(found, 1), people.labels[skip:] > 0)


PARTS = {"mri": mri, "pet": pet}


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/intervals"))
    parser.add_argument("--calibration", type=int, default=50)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=6)
    args = parser.parse_args(argv)
    args.count = {"validation": args.calibration, "test": args.test}
    results, lines = {"code": code_version(), "settings": {k: v for k, v in vars(args).items() if k != "out"}}, []
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.parts:
        calibrated, tested = (drawn(name, split, args) for split in args.count)
        held = intervals(calibrated, tested)
        both = Drawn(*(torch.cat([getattr(d, f) for d in (calibrated, tested)], int(f == "draws")) for f in FIELDS))
        mean = over_splits(both, len(calibrated.truth))
        results[name] = {kind: asdict(held[kind]) | {"over splits": mean[kind]} for kind in KINDS}
        lines += [line(name, kind, held[kind], mean[kind]) for kind in KINDS]
    head = (
        "| scan | interval of | holds, as drawn | factor | holds, conformal | over 100 splits | width |\n" + "|---" * 7
    )
    for file, text in {
        "table.md": f"{head}|\n" + "\n".join(lines),
        "intervals.json": json.dumps(results, indent=1),
    }.items():
        with atomic_write(args.out / file) as path:
            path.write_text(text + "\n")
    print(head, *lines, sep="\n")
    return results


FIELDS = ("truth", "draws", "mask")


def drawn(name: str, split: str, args) -> Drawn:
    """The slices of a split, drawn now or before."""
    kept = args.out / f"{name}-{split}-{args.count[split]}-{args.draws}x{args.evaluations}.pt"
    if not kept.exists():
        found = PARTS[name](split, args)
        with atomic_write(kept) as path:
            torch.save({field: getattr(found, field) for field in FIELDS}, path)
    return Drawn(**torch.load(kept, weights_only=True))


def line(name: str, kind: str, held, mean: float) -> str:
    """A row of the table, coverage in per cent with the standard error over the slices."""
    error = 100 * torch.tensor(held.each).std().item() / len(held.each) ** 0.5
    cells = [
        name.upper(),
        kind,
        f"{100 * held.raw:.1f} %",
        f"{held.factor:.2f}",
        f"{100 * held.coverage:.1f} +- {error:.1f} %",
    ]
    return f"| {' | '.join([*cells, f'{100 * mean:.1f} %', f'{held.width:.3g}'])} |"


if __name__ == "__main__":
    main()
