"""What the slices before a slice are worth on a real head: denoising, and reconstruction of undersampled volumes.

    python benchmarks/aid_heads.py --out runs/benchmarks/aid_heads
    python benchmarks/aid_heads.py --only denoising

The head held for validation, its own signal, not warped: axial slices 110 to 40 mm below its top, averaged over
voxels, 1 the 99th percentile of its tissue, with a smooth phase. Denoising: the error per real component of the last of
four slices, alone and given true slices before it, or such with errors. Reconstruction: volumes of six slices, 8
birdcage coils, true maps, equispaced lines with a few centre lines, noise 0.01; PSNR of the mean of the draws of
volumes after a scale, mean over volumes. Classical methods are tuned on these very scans, which favours them.
"trusted": as far as each scan trusts the prior (`reconstruction.trusted_sequence`). Calibration: variance of the draws
over squared error of their mean (1 is right), of trusted ones also as they fell, before they were widened. 90 %
intervals are looked at inside the head. Writes results.json and table.md into --out.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from real_heads import inside
from torch import Generator, Tensor

from companion.acquisition.mri import Protocol, Scan, acquire
from companion.data import anatomy
from companion.data.heads import Head
from companion.data.heads_download import load_heads
from companion.evaluation import metrics, tables
from companion.evaluation.denoising import denoising_errors
from companion.files import atomic_write, code_version, project_root
from companion.models.errors import load_errors
from companion.operators.mri import birdcage_maps
from companion.papers.aid.reconstruct import EMBEDDED_HEADS, GENERAL, GRIDS, MODELS, TRUSTED, context_of
from companion.reconstruction import mri as baselines
from companion.reconstruction import trusted_sequence
from companion.reconstruction.sequence import Prior, Sampler, drawn, reconstruct, score

LOWEST_MM, HIGHEST_MM = 110.0, 40.0  # below the top of the head
SETTINGS = ((1.0, 1.0, 224), (1.0, 3.0, 224), (3.25, 3.25, 64))  # pixel, distance of slices in mm, pixels a side
SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def volume(head: Head, frames: int, size: int, pixel_mm: float, gap_mm: float, below_mm: float) -> Tensor:
    """Axial slices (frame, 1, y, x) of a head from the lowest up, the nose up, the first `below_mm` under its top.

    Each is the mean over voxels of pixel_mm x pixel_mm x gap_mm.
    """
    fine, deep = math.ceil(pixel_mm / 1.1), math.ceil(gap_mm / 1.1)
    n = size * fine
    line = (torch.arange(n) - (n - 1) / 2) * pixel_mm / fine
    centre, bottom = head.tissue.mean(0), head.tissue[:, 2].max() - below_mm
    heights = bottom + (torch.arange(frames * deep) + 0.5) * gap_mm / deep
    z, y, x = torch.meshgrid(heights, centre[1] - line, centre[0] + line, indexing="ij")
    signal = head.at(torch.stack([x, y, z], -1))
    return signal.reshape(frames, deep, size, fine, size, fine).mean((1, 3, 5))[:, None]


def starts(count: int, frames: int, gap_mm: float) -> list[float]:
    """Where so many volumes begin, mm below the top, evenly over the range they may cover."""
    last = HIGHEST_MM + frames * gap_mm
    return [LOWEST_MM + (last - LOWEST_MM) * i / max(count - 1, 1) for i in range(count)]


def stacks(head: Head, count: int, frames: int, setting: tuple[float, float, int]) -> Tensor:
    """Complex volumes (volume, frame, 1, y, x), each with a smooth phase."""
    pixel, gap, size = setting
    made = torch.stack([volume(head, frames, size, pixel, gap, below) for below in starts(count, frames, gap)])
    return anatomy.random_sequence_phase(made, gap, Generator().manual_seed(1))


def denoising(head: Head, single: Prior, prior: Prior, count: int) -> list[dict]:
    """A row for each setting and noise level."""
    rows = []
    for setting in SETTINGS:
        x = stacks(head, count, prior.window + 1, setting)
        wrong = drawn(x, 2)

        def given(context: Tensor):
            return lambda noisy, sigma: prior.D(noisy, sigma, context)

        estimates = {
            GENERAL: single.D,
            "no context": prior.D,
            "1 slice": given(x[:, -2:-1]),
            f"{prior.window} slices": given(x[:, :-1]),
            f"{prior.window} slices with errors": given(wrong[:, :-1]),
        }
        about = {"pixel (mm)": setting[0], "slices apart (mm)": setting[1]}
        for row in denoising_errors(estimates, x[:, -1], SIGMAS):
            rows.append(about | row)
            print(rows[-1], flush=True)
    return rows


def scans(head: Head, setting: tuple[float, float, int], count: int, frames: int, R: int, acs: int, interleave: bool):
    """Volumes of the head as scans, in the units of the prior."""
    made: list[Scan] = []
    protocol = Protocol(acceleration=R, acs=acs, interleave=interleave)
    for i, x in enumerate(stacks(head, count, frames, setting)):
        mask = protocol.lines(x.shape[-1], frames, i)
        made.append(acquire(x, birdcage_maps(x.shape[-2:], 8), mask, 0.01, seed=i))
    return made


def volumes(head: Head, single: Prior, prior: Prior, args) -> list[dict]:
    """A row for each setting, acceleration and choice of lines."""
    rows = []
    for setting, acs in (((3.25, 3.25, 64), 4), ((1.0, 3.0, args.size), 24)):
        if setting[2] == 0:
            continue
        alone = single.known(load_errors(GENERAL), setting[0])
        given = prior.known(load_errors(args.weights), setting[0])
        for R in args.R:
            for interleave in (True, False):
                known = scans(head, setting, args.volumes, args.frames, R, acs, interleave)
                tuned = baselines.tune_all([(s.y, s.maps, s.mask, s.x) for s in known], GRIDS)
                found: dict[str, list[float]] = {}
                terms: dict[str, list] = {}
                covered: dict[str, list[float]] = {}
                shares: dict[str, list[float]] = {}
                for i, scan in enumerate(known):
                    estimates = baselines.reconstruct_all(scan.y, scan.maps, scan.mask, tuned)
                    sampler = Sampler(draws=args.draws, evaluations=args.evaluations)
                    for name in args.models:
                        context = context_of(name)
                        how = (alone if context is None else given, scan, sampler, context, 100 * i)
                        if name in TRUSTED:
                            samples, told = trusted_sequence.reconstruct(*how)
                            print(trusted_sequence.of_volume(told).verdict, flush=True)
                            shares.setdefault(name, []).extend(one.share for one in told)
                            fell = samples.x.mean(0) + (samples.x - samples.x.mean(0)) / told[0].widening ** 0.5
                            add_terms(terms, f"{name}, as they fell", fell, scan, samples.paired)
                        else:
                            samples = reconstruct(*how)
                        estimates[name] = samples.x.mean(0)
                        add_terms(terms, name, samples.x, scan, samples.paired)
                        mask = inside(scan.truth.abs())
                        how = {"levels": (0.9,), "mask": mask, "paired": samples.paired}
                        within = metrics.coverage(samples.x.abs(), scan.truth.abs(), **how)[1]
                        covered.setdefault(name, []).append(within.mean().item())
                    for name, x in estimates.items():
                        found.setdefault(name, []).append(score(x, scan, False)["PSNR"])
                best = max((name for name in tuned), key=lambda name: sum(found[name]))
                row = {"pixel (mm)": setting[0], "slices apart (mm)": setting[1], "R": R, "interleaved": interleave}
                row |= {"best classical": metrics.mean_and_error(found[best])}
                row |= {name: metrics.mean_and_error(found[name]) for name in args.models}
                if "single image" in found and "AID" in found:
                    row["AID over single"] = metrics.mean_and_error(found["AID"], found["single image"])
                ratios = {name: sum(a for a, _ in t) / sum(b for _, b in t) for name, t in terms.items()}
                row |= {f"{name}, calibration": ratio for name, ratio in ratios.items()}
                row |= {f"{name}, 90 % intervals hold": sum(c) / len(c) for name, c in covered.items()}
                row |= {f"{name}, share of the prior": sum(w) / len(w) for name, w in shares.items()}
                rows.append(row | {"classical": best})
                print(rows[-1], flush=True)
    return rows


def add_terms(terms: dict[str, list], name: str, x: Tensor, scan: Scan, paired: bool) -> None:
    """Those of the calibration of draws x (draw, frame, 1, y, x)."""
    terms.setdefault(name, []).append(metrics.calibration_terms(x.abs(), scan.truth.abs(), paired))


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/aid_heads"))
    parser.add_argument("--weights", default=EMBEDDED_HEADS)
    parser.add_argument("--only", choices=("denoising", "volumes"))
    parser.add_argument("--stacks", type=int, default=6, help="to denoise")
    parser.add_argument("--volumes", type=int, default=2)
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--R", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--size", type=int, default=0, help="pixels a side of 1 mm to reconstruct too; 0: none")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--evaluations", type=int, default=24)
    parser.add_argument("--models", nargs="+", default=["single image", "AID", *TRUSTED], choices=(*MODELS, *TRUSTED))
    args = parser.parse_args(argv)
    (head,) = load_heads(project_root() / "data" / "heads", "validation")
    prior, single = Prior.load(args.weights, EMBEDDED_HEADS), Prior.load(GENERAL, GENERAL)
    found: dict = {"code": code_version(), "weights": str(args.weights)}
    if args.only != "volumes":
        found["denoising"] = denoising(head, single, prior, args.stacks)
    if args.only != "denoising":
        found["volumes"] = volumes(head, single, prior, args)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("results.json", json.dumps(found, indent=1) + "\n"),
        ("table.md", "\n\n".join(tables.markdown(v) for v in found.values() if isinstance(v, list)) + "\n"),
    ):
        with atomic_write(args.out / name) as aside:
            aside.write_text(text)


if __name__ == "__main__":
    main()
