"""Every head of a folder through one protocol: classical methods, a prior, and what the scan says of the prior.

    python benchmarks/real_heads.py FOLDER --out runs/benchmarks/real_heads
    python benchmarks/real_heads.py FOLDER --tune          # on validation heads: writes real_heads_tuned.json
    python benchmarks/real_heads.py FOLDER --radial        # spokes instead of lines

Heads: images of any format that `companion look` knows (NIfTI of any orientation, DICOM series, ...), one file or
series each. A head is turned to its nearest axial position; 1 is the 99th percentile of its tissue. Slices lie between
40 and 110 mm below the top of the head. Sizes: "64" is 64 x 64 pixels of 3.25 mm with 4 centre lines, "native" the
file's own pixels, not interpolated, in a field of view of about 240 mm (multiples of 8), with 24 centre lines. A smooth
phase, 8 birdcage coils, equispaced lines R = 4 and 8, noise 0.01 per real component, true maps; --radial: spokes at
golden angles, pi / 2 n / R of them, their readout oversampled twice. The settings of the
classical methods come from real_heads_tuned.json, made on validation heads; the folder is never tuned on. "one pass" is
the unrolled network `general/unrolled`, which has nothing to tune.

Columns: PSNR (peak of each slice), SSIM, NRMSE of magnitudes; calibration = variance of the draws / squared error of
their mean (1 is right); coverage of 90 % intervals inside the head; chi2 of held-out samples and the verdict, which
know no truth; seconds a slice and the largest memory of the process. Numbers of a head are means over its slices, the
table gives means and standard errors over heads. A finished head is not redone: each has its file in <out>/heads.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import resource
import shutil
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import torch
from torch import Tensor

from companion.data import anatomy
from companion.data.intake.kinds import refuse_labels
from companion.data.intake.look import find
from companion.data.upright import cut_of, head_slices
from companion.diffusion.denoisers import AnySize, Denoiser
from companion.diffusion.gibbs import annealed_gibbs
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.recalibration import ErrorModel
from companion.evaluation import metrics
from companion.evaluation.organ import Organ, known_to
from companion.files import atomic_write, code_version
from companion.models.architectures import network_of
from companion.models.checkpoint import describe_source, load_denoiser
from companion.models.errors import for_pixels, load_errors
from companion.models.general import BY_PIXELS, general_prior
from companion.operators.linear import LinearOperator
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, sense
from companion.operators.noncartesian import GOLDEN, noncartesian_sense, radial_trajectory
from companion.randomness import antithetic, randn
from companion.reconstruction import held_out, regularised, trust
from companion.reconstruction.one_pass import NAME, one_pass

Sheets = dict[str, dict[str, Tensor]]  # size and R -> truth or method -> (y, x)
TUNED = Path(__file__).with_name("real_heads_tuned.json")
ACS = {"64": 4, "native": 24}
COILS, NOISE = 8, 0.01
GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
LEANING = "TV and wavelets"  # in the proportion that each scan asks for
OURS = ("prior, mean of draws", "prior, posterior mean", "prior, trusted")


# ----------------------------------------------------------------------------------------------------------- heads


def scan(x: Tensor, acceleration: int, acs: int, seed: int, radial: bool = False) -> tuple[LinearOperator, Tensor]:
    """The operator and the data (slice, coil, y, x) or, of spokes, (slice, coil, sample) of complex slices."""
    maps, space = birdcage_maps(x.shape[-2:], COILS), x.shape[-2:]
    if radial:
        n = max(space)
        angles = GOLDEN * torch.arange(round(math.pi / 2 * n / acceleration))
        spokes = radial_trajectory(angles, 2 * n, n) * torch.tensor(space) / n
        A = noncartesian_sense(maps, spokes.flatten(0, 1))
    else:
        A = sense(maps, cartesian_mask(space[1], acceleration, acs=acs))
    noise = randn((len(x), *A.range_shape), x.dtype, torch.Generator().manual_seed(seed))
    return A, A(x) + NOISE * (noise if radial else A.mask(noise))


def inside(x: Tensor) -> Tensor:
    """The head in magnitudes (slice, 1, y, x): where there is signal, and the holes within."""
    smooth = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    return smooth > 0.1 * x.flatten(1).quantile(0.99, 1).reshape(-1, 1, 1, 1)


# --------------------------------------------------------------------------------------------------------- methods


def methods() -> dict:
    """The classical methods (A, y, regularisation) -> image, for slices of one scan, by name."""
    found = {"L1-wavelet": regularised.wavelet, "TV": regularised.tv}
    if shutil.which("bart"):
        for name, penalty in (("BART l1-wavelet", "W"), ("BART TV", "T")):
            found[name] = partial(each_slice, penalty=penalty)
    return found


def each_slice(A: LinearOperator, y: Tensor, regularisation: float, penalty: str) -> Tensor:
    """What `bart pics` makes of slices."""
    maps = birdcage_maps(A.domain_shape[1:], COILS)[None]
    images = [regularised.bart_pics(A, one[None], maps, regularisation, penalty=penalty) for one in y]
    return torch.cat(images)


def classical(name: str, settings: dict) -> held_out.Classical:
    """The method (A, y) -> image, with its setting."""
    method = methods()[name]
    return lambda A, y: method(A, y, settings[name])


def lean(A: LinearOperator, y: Tensor, settings: dict, acs: int, seed: int) -> held_out.Blend:
    """The mixture of two of them that held-out samples of the middle slice ask for."""
    middle = len(y) // 2
    split = held_out.hold_out(A, y[middle : middle + 1], acs, seed=seed)
    return held_out.Blend.of(split, classical("TV", settings), classical("L1-wavelet", settings))


def tune(heads: dict, args) -> dict:
    """The best settings of the classical methods on validation heads, by size and acceleration: highest mean PSNR."""
    found = {}
    for size in args.sizes:
        for R in args.R:
            scans = []
            for seed, load in enumerate(heads.values()):
                x = anatomy.random_phase(head_slices(*load(), size, args.slices), torch.Generator().manual_seed(seed))
                scans.append((x, *scan(x, R, ACS[size], seed, args.radial)))
            for name, method in methods().items():
                scores = {
                    value: torch.cat([metrics.psnr(method(A, y, value), x) for x, A, y in scans]).mean().item()
                    for value in args.grid
                }
                best = max(scores, key=scores.get)
                ends = " (an end of the grid: extend it)" if best in (min(args.grid), max(args.grid)) else ""
                print(size, R, name, f"{best:g}: {scores[best]:.2f} dB{ends}", scores, flush=True)
                found.setdefault(setting(size, R, args), {})[name] = best
    how = {"heads": sorted(heads), "slices": args.slices, "grid": list(args.grid), "noise": NOISE, "coils": COILS}
    made = {setting: {**how, "score": "mean PSNR", "code": code_version()} for setting in found}
    return {"made": made, "settings": found}


def setting(size: str, R: int, args) -> str:
    """The name of a protocol, by which settings and sheets are kept."""
    return f"{size} R={R}" + " radial" * args.radial


@dataclass(frozen=True)
class Row:
    """Scores of one method on one head; None where a method has none."""

    head: str
    size: str
    R: int
    method: str
    psnr: float
    ssim: float
    nrmse: float
    calibration: float | None
    coverage: float | None
    chi2: float | None
    verdict: str
    seconds: float
    memory_gb: float


def score(name, size, R, method, x, truth, seconds, draws=None, chi2=None, verdict="", paired=False) -> Row:
    """The scores of images x and draws (draw, slice, 1, y, x) against the complex truth (slice, 1, y, x)."""
    calibration = coverage = None
    if draws is not None:
        together = draws.abs().movedim(1, 2).flatten(2, 3)[:, None], truth.abs().movedim(0, 1).flatten(1, 2)[None]
        calibration = metrics.calibration_ratio(*together, paired=paired).item()
        mask = inside(truth.abs())
        coverage = metrics.coverage(draws.abs(), truth.abs(), levels=(0.9,), mask=mask, paired=paired)[1].mean().item()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    means = (f(x, truth).mean().item() for f in (metrics.psnr, metrics.ssim, metrics.nrmse))
    return Row(name, size, R, method, *means, calibration, coverage, chi2, verdict, seconds, memory)


def study(name: str, load, settings: dict, args) -> tuple[list[Row], Sheets]:
    """Rows of one head, and for each size and R the middle slice (y, x) of the truth and of all methods."""
    rows, pictures = [], {}
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:3], "big")  # the same in any folder
    array, affine = load()
    for size in args.sizes:
        x = anatomy.random_phase(head_slices(array, affine, size, args.slices), torch.Generator().manual_seed(seed))
        prior = Prior.of(args.weights, pixel_mm(size, array, affine))
        for R in args.R:
            A, y = scan(x, R, ACS[size], seed + 1, args.radial)
            tuned, images = settings[setting(size, R, args)], {}
            for method in (m for m in methods() if m in tuned):
                began = time.perf_counter()
                images[method] = classical(method, tuned)(A, y)
                rows.append(score(name, size, R, method, images[method], x, (time.perf_counter() - began) / len(x)))
            began = time.perf_counter()
            images[NAME] = one_pass(A, y, NOISE, iterations=20 if args.radial else None)
            rows.append(score(name, size, R, NAME, images[NAME], x, (time.perf_counter() - began) / len(x)))
            for weights in args.one_pass:
                began = time.perf_counter()
                images[weights] = one_pass(A, y, NOISE, weights)
                rows.append(score(name, size, R, weights, images[weights], x, (time.perf_counter() - began) / len(x)))
            began = time.perf_counter()
            leaning = lean(A, y, tuned, ACS[size], seed)
            images[LEANING] = leaning(A, y)
            rows.append(score(name, size, R, LEANING, images[LEANING], x, (time.perf_counter() - began) / len(x)))
            plain, trusted, verdict, seconds = reconstruct(prior, A, y, leaning, ACS[size], seed, args)
            draws = torch.stack([s.x for s in plain], 1)
            images[OURS[0]] = draws.mean(0)
            images[OURS[1]] = torch.cat([s.mean.mean(0, keepdim=True) for s in plain])
            images[OURS[2]] = torch.cat([s.mean for s in trusted])
            first = verdict.first.score.chi2
            paired = plain[0].paired
            rows.append(score(name, size, R, OURS[0], images[OURS[0]], x, seconds[0], draws, paired=paired))
            rows.append(score(name, size, R, OURS[1], images[OURS[1]], x, seconds[0], draws, paired=paired))
            wide = torch.stack([s.x for s in trusted], 1)
            told = {"chi2": first, "verdict": verdict.verdict}
            rows.append(score(name, size, R, OURS[2], images[OURS[2]], x, seconds[1], wide, paired=paired, **told))
            for row in rows[-len(images) :]:
                print(
                    f"{name} {size} R={R} {row.method}: {row.psnr:.2f} dB {row.calibration} {row.verdict}", flush=True
                )
            middle = len(x) // 2
            shown = {"truth": x} | images
            pictures[setting(size, R, args)] = {name: v[middle, 0].abs().half() for name, v in shown.items()}
    return rows, pictures


def pixel_mm(size: str, array: np.ndarray, affine: np.ndarray) -> float:
    """The smaller side of the pixels of a size, mm, in whatever order the file stores its axes."""
    order = np.argsort(nibabel.orientations.io_orientation(affine)[:, 0])  # of x, y and z among the stored axes
    voxel = np.linalg.norm(affine[:3, :3], axis=0)[order]
    shape = np.array(array.shape[::-1])[order]
    return 3.25 if size == "64" else min(cut_of(voxel, tuple(shape)).spacing(voxel)[1:])


@dataclass(frozen=True, eq=False)
class Prior:
    """A denoiser, the models of its error, those of such pixels first, and the readout of what it learnt from."""

    D: Denoiser
    errors: dict[str, ErrorModel]
    organ: Organ | None

    @classmethod
    def of(cls, weights: str, pixel: float) -> Prior:
        name = general_prior(weights, pixel)
        D = load_denoiser(name)
        return cls(AnySize(D, network_of(D).total_stride), for_pixels(load_errors(name), pixel), known_to(name))


def reconstruct(prior: Prior, A, y, leaning, acs, seed, args):
    """Plain and trusted samples of all slices, the verdict of the middle one, seconds a slice of both."""
    D, errors = prior.D, prior.errors
    sigmas, own = trust.levels_for(NOISE, True, args.evaluations), next(iter(errors.values()))
    seeds, found, spent = [range(seed + 8 * i, seed + 8 * i + args.draws) for i in range(len(y))], None, [0.0, 0.0]
    plain, trusted, shares = [], [], []
    began = time.perf_counter()
    middle = len(y) // 2
    found = trust.assess(
        D, held_out.hold_out(A, y[middle : middle + 1], acs, seed=seed), NOISE, errors, seed=seed,
        evaluations=args.evaluations * args.draws, classical=leaning, final=args.draws,
        organ=prior.organ,
    )  # fmt: skip
    spent[1] += time.perf_counter() - began
    for i, draws in enumerate(seeds):
        one, began = y[i : i + 1], time.perf_counter()
        image = leaning(A, one)
        plain.append(
            annealed_gibbs(
                D, posterior_mean(A, one, NOISE, own, balance=True), sigmas, seeds=antithetic(draws), start=image
            )
        )
        spent[0] += time.perf_counter() - began
        began = time.perf_counter()
        same = (found.chosen.name, found.chosen.scale) == (found.first.name, found.first.scale)
        G = posterior_mean(A, one, NOISE, found.error, balance=True)
        again = plain[-1] if same else annealed_gibbs(D, G, sigmas, seeds=antithetic(draws), start=image)
        shares.append(found.of(A, again, image))
        trusted.append(shares[-1].apply(again, image))
        spent[1] += time.perf_counter() - began + (same * plain[-1].bill.seconds * args.draws)
    return plain, trusted, shares[middle], [s / len(y) for s in spent]


# ---------------------------------------------------------------------------------------------------------- report


def table(rows: list[Row]) -> list[dict]:
    """For each size, R and method the mean over heads of every column, and its standard error for more than one."""
    lines = []
    for size, R, method in dict.fromkeys((r.size, r.R, r.method) for r in rows):
        group = [r for r in rows if (r.size, r.R, r.method) == (size, R, method)]
        line = {"size": size, "R": R, "method": method, "heads": len(group)}
        for column in ("psnr", "ssim", "nrmse", "calibration", "coverage", "chi2", "seconds", "memory_gb"):
            values = [v for r in group if (v := getattr(r, column)) is not None]
            line[column] = float(np.mean(values)) if values else None
            line[f"{column} error"] = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
        told = [r.verdict for r in group if r.verdict]
        line["known"] = sum(v.startswith("the prior knows") for v in told) / len(told) if told else None
        lines.append(line)
    return lines


def markdown(lines: list[dict]) -> str:
    """The table in Markdown, +- one standard error over heads."""
    heads = ("PSNR dB", "SSIM", "NRMSE", "calibration", "coverage 90 %", "held-out chi2", "known", "s a slice", "GB")
    columns = ("psnr", "ssim", "nrmse", "calibration", "coverage", "chi2", "known", "seconds", "memory_gb")
    text = [f"| size | R | method | heads | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 4)]
    for line in lines:
        cells = [line["size"], str(line["R"]), line["method"], str(line["heads"])]
        for column in columns:
            value, error = line[column], line.get(f"{column} error")
            digits = 1 if column in ("psnr", "seconds") else 2 if column != "ssim" else 3
            shown = "" if value is None else f"{value:.{digits}f}"
            cells.append(shown if error is None or not shown else f"{shown} +- {error:.{digits}f}")
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def contact_sheet(pictures: dict[str, Sheets], protocol: str):
    """A row a head: the truth and all methods at one size and R."""
    from matplotlib.figure import Figure

    shown = {name: sheets[protocol] for name, sheets in pictures.items() if protocol in sheets}
    columns = max(len(images) for images in shown.values())
    figure = Figure(figsize=(1.8 * columns, 2 * len(shown) + 0.2), facecolor="black")
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for row, (name, images) in zip(axes, shown.items(), strict=True):
        for ax in row:
            ax.axis("off")
        top = np.quantile(images["truth"].float().numpy(), 0.995)
        for ax, (method, image) in zip(row, images.items(), strict=False):
            ax.imshow(image.float().numpy(), cmap="gray", vmin=0, vmax=top)
            ax.set_title(f"{name[:24]}, truth" if method == "truth" else method, color="white", fontsize=7)
    figure.subplots_adjust(0, 0, 1, 1 - 0.3 / figure.get_figheight(), 0.02, 0.08)
    return figure


def heads_of(folder: Path) -> tuple[dict, dict[str, str]]:
    """Loaders of (array (z, y, x), affine) by name, and the reasons for what is left out."""
    found = find(folder)
    heads, left = {}, dict(found.left)
    for item in found.items:
        if len(item.what.shape) < 3 or min(item.what.shape[-3:]) < 16:
            left[item.name] = f"shape {item.what.shape}: not a volume"
            continue

        frames = item.what.shape[0] if item.what.axes[0] == "t" else 1
        name = item.name if frames == 1 else f"{item.name}, frame 0 of {frames}"

        def load(item=item, several=frames > 1):
            volume = item.read(**({"frame": 0} if several else {}))
            refuse_labels(volume.array, item.path)
            return volume.array, volume.affine

        heads[name] = load
    return heads, left


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/real_heads"))
    parser.add_argument("--weights", default=BY_PIXELS, help="general: the prior for pixels of each size")
    parser.add_argument("--sizes", nargs="+", default=list(ACS), choices=list(ACS))
    parser.add_argument("--R", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--slices", type=int, default=6)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--evaluations", type=int, default=30, help="of the network, a draw")
    parser.add_argument("--radial", action="store_true", help="spokes at golden angles instead of lines")
    parser.add_argument("--one-pass", nargs="+", default=[], help="further checkpoints that look once, such as RAM's")
    parser.add_argument("--tune", action="store_true", help="the folder holds validation heads: tune on them, and stop")
    parser.add_argument("--grid", nargs="+", type=float, default=list(GRID))
    parser.add_argument("--tuned", type=Path, default=TUNED)
    args = parser.parse_args(argv)
    heads, left = heads_of(args.folder)
    for name, why in left.items():
        print(f"left out: {name}: {why}")
    if args.tune:
        found = tune(heads, args)
        if args.tuned.exists():  # other sizes stay
            known = json.loads(args.tuned.read_text())
            found = {"made": {**known["made"], **found["made"]}, "settings": {**known["settings"], **found["settings"]}}
        with atomic_write(args.tuned) as path:
            path.write_text(json.dumps(found, indent=1) + "\n")
        return []
    tuned = read_tuned(args)
    asked = {k: getattr(args, k) for k in ("sizes", "R", "slices", "draws", "evaluations", "radial")}
    asked |= {"one_pass": [describe_source(name).sha256 for name in args.one_pass]} if args.one_pass else {}
    priors = sorted({general_prior(args.weights, mm) for mm in (1, 3.25)})
    key = {**asked, "weights": [describe_source(n).sha256 for n in priors], "settings": tuned["settings"]}
    rows, pictures = [], {}
    (args.out / "heads").mkdir(parents=True, exist_ok=True)
    for name, load in heads.items():
        stem = hashlib.sha256(f"{name} {json.dumps(key, sort_keys=True)}".encode()).hexdigest()[:16]
        done = args.out / "heads" / f"{stem}.json"
        images = done.with_suffix(".pt")
        if not done.exists():
            try:
                found, sheets = study(name, load, tuned["settings"], args)
            except (ValueError, OSError) as error:
                warnings.warn(f"{name} left out: {error}", stacklevel=1)
                continue
            with atomic_write(images) as path:
                torch.save(sheets, path)
            with atomic_write(done) as path:
                path.write_text(json.dumps({"head": name, **key, "rows": [asdict(r) for r in found]}, indent=1))
        rows += [Row(**r) for r in json.loads(done.read_text())["rows"]]
        pictures[name] = torch.load(images, weights_only=True)
        write(args.out, rows, pictures)
    if not rows:
        raise SystemExit(f"{args.folder}: no head could be used")
    print(markdown(table(rows)))
    return table(rows)


def read_tuned(args) -> dict:
    """The settings of the classical methods. Raises SystemExit where one that is needed was never tuned."""
    tuned = json.loads(args.tuned.read_text()) if args.tuned.exists() else {"settings": {}}
    wanted = [setting(size, R, args) for size in args.sizes for R in args.R]
    missing = [name for name in wanted if name not in tuned["settings"]]
    if missing:
        raise SystemExit(
            f"{args.tuned} has no settings of classical methods for {', '.join(missing)}; make them on a folder of "
            "validation heads with --tune, or leave out these --sizes or --R"
        )
    return tuned


def write(out: Path, rows: list[Row], pictures: dict) -> None:
    """The table as Markdown, JSON and CSV, all rows, and a contact sheet for each size and R."""
    lines, text = table(rows), io.StringIO()
    writer = csv.DictWriter(text, lines[0])
    writer.writeheader()
    writer.writerows(lines)
    results = {"code": code_version(), "table": lines, "rows": [asdict(r) for r in rows]}
    contents = {
        "table.md": markdown(lines),
        "table.csv": text.getvalue(),
        "results.json": json.dumps(results, indent=1),
    }
    for name, content in contents.items():
        with atomic_write(out / name) as path:
            path.write_text(content)
    for protocol in dict.fromkeys(s for sheets in pictures.values() for s in sheets):
        with atomic_write(out / f"sheet {protocol}.png".replace(" ", "_").replace("=", "")) as path:
            contact_sheet(pictures, protocol).savefig(path, format="png", dpi=110)


if __name__ == "__main__":
    main()
