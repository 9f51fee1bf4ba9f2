"""Raw, fully sampled k-space, undersampled and reconstructed by classical methods and by a diffusion prior.

    python benchmarks/real_kspace.py scan.cfl other.h5 --heads validation_head.nii.gz --out runs/benchmarks/real_kspace

Protocol. Each file is fully sampled k-space of any format that `companion look` names as such. Its reference image is
the coil combination of all data with maps from the centre of all data, zero where ESPIRiT sees air. Measured are every
R-th line, or a Poisson disc over both phase encodes, R = 4 and 8, with a fully sampled centre of 24; noise, coil
compression, maps and units come from the measured samples alone (`prepare_scan`), the noise level from the redundancy
of the coils. Classical methods are tuned, and the error of the prior is measured, on the validation heads given (else
on virtual people), seen by the coils and mask of the scan; never on the scan. The posterior mean averages the
conditional means of the last level, and leans on a mixture of TV and wavelets; held-out samples choose both shares.

Rows: file, mask, R, method. PSNR (peak: largest magnitude of the reference), SSIM, NRMSE of magnitudes. The reference
has the noise of the scan, the same as in the measured samples, so an image that keeps that noise comes closer to it
than one without. "unmeasured" has no such favourite: error over signal of the samples that no method has seen, root
mean squares with the expected noise taken off (coil by coil, with the maps of the undersampled data). Calibration
(variance of draws / squared error of their mean) and coverage of the 90 % interval, of magnitudes inside the object.
Both hold the reference's noise against the draws, which are of the image without it; so they are asked a second time,
"noisy": each draw then has the noise that samples nobody measured bring into the reference (of the level that the
measured ones tell), and what is between the intervals is the reference itself. "its noise" is the share of the squared
error that this noise explains. Chi-square a held-out sample under the error model that the scan chose, and the verdict
(`reconstruction.trust`); seconds; peak memory of the process so far. Writes table.md, results.json and sheet.png into
--out.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from companion.acquisition.measurement import Measurement, prepare_scan, reference_image
from companion.acquisition.redundancy import redundancy
from companion.acquisition.slices import as_slices, only_scan
from companion.data import anatomy
from companion.data.intake.readers import read_image
from companion.data.raw.scan import gapless, read_kspace
from companion.diffusion.covariance import FIT_SIGMAS
from companion.diffusion.denoisers import AnySize
from companion.diffusion.recalibration import ErrorModel
from companion.diffusion.sampling import Samples
from companion.diffusion.sets import EachSet
from companion.evaluation import metrics
from companion.evaluation.organ import known_to
from companion.evaluation.tables import markdown
from companion.files import atomic_write, code_version
from companion.models.architectures import network_of
from companion.models.checkpoint import load_denoiser
from companion.models.errors import load_errors
from companion.operators.masks import cartesian_mask
from companion.operators.mri import fft, ifft
from companion.papers.real_scan import FULL
from companion.randomness import antithetic, randn
from companion.reconstruction import held_out, regularised, trust
from companion.reconstruction.one_pass import NAME, one_pass
from companion.reconstruction.regularised import bart_pics, cg, tv, wavelet
from companion.show import figures

KINDS = {"lines": "equispaced", "Poisson": "poisson_disc"}
LEANS, LEANING = {"TV": tv, "L1-wavelet": wavelet}, "TV and wavelets"  # in the proportion that each scan asks for
GRID = (0.5, 1.0, 2.0, 4.0)  # regularisation, in noise_std^(3/2): tuned values then lie inside for any noise


@dataclass(frozen=True, eq=False)
class Case:
    """One slice, undersampled: its measurement, and of all data the reference image (1, 1, y, x) and the samples
    (1, coil, y, x), in the same units."""

    name: str
    kind: str
    acceleration: float
    m: Measurement
    reference: Tensor
    full: Tensor

    def unmeasured(self, x: Tensor) -> float:
        """The error of an image (1, set, y, x) at samples that were left out, over the signal there, less noise.

        The noise is that of the outermost 3 % of all samples. A phase of the whole image, which magnitudes do not show
        (BART's may have another sign), is that of the measured samples.
        """
        acquired = (self.full != 0).any(1)[0]
        radius = torch.where(acquired, held_out.radii(acquired), -1.0)
        edge = radius > torch.quantile(radius[acquired], 0.97)
        noise = self.full[:, :, edge].abs().square().mean().item()
        hidden = (self.full != 0) & (self.m.y == 0)
        predicted = fft((self.m.maps * x[:, :, None]).sum(1))
        seen = torch.vdot(predicted[~hidden], self.full[~hidden])
        apart = predicted * seen / seen.abs() - self.full
        error, signal = (v[hidden].abs().square().mean().item() - noise for v in (apart, self.full))
        return (max(error, 0.0) / signal) ** 0.5

    def as_reference(self, draws: Tensor, seed: int = 0) -> Tensor:
        """Draws (draw, set, y, x) as the reference shows an image: with the noise of the samples that were left out."""
        hidden = (self.full != 0) & (self.m.y == 0)
        noise = randn(self.full.shape[1:], draws.dtype, antithetic(range(seed, seed + len(draws))))
        return draws + (self.m.maps.conj() * ifft(self.m.noise_std * noise * hidden)[:, None]).sum(2)

    @property
    def inside(self) -> Tensor:
        """The object, (1, 1, y, x): above 5 % of the reference's 99th percentile."""
        size = self.reference.abs()
        return size > 0.05 * torch.quantile(size.flatten(), 0.99)


def cases(path: Path, args) -> Iterator[Case]:
    """All masks and accelerations of the middle slices of a file; ValueError or OSError for what cannot serve."""
    scan = as_slices(read_kspace(only_scan(path, ("k-space",))[0], args.axes, args.which))
    count = len(scan.kspace)
    first = max(0, (count - args.slices) // 2)
    for i in range(first, min(count, first + args.slices)):
        measured = scan.mask[min(i, len(scan.mask) - 1), 0]
        if measured.mean() < FULL or not gapless(measured):
            raise ValueError(
                f"{path}: {scan}\nneeds fully sampled k-space; of slice {i}, {measured.mean():.0%} was measured"
            )
        for kind in args.kinds:
            for R in args.accelerations:
                mask = cartesian_mask(scan.kspace.shape[-2:], R, KINDS[kind], acs=args.acs, seed=args.seed + i).mask
                m = prepare_scan(scan, slice(i, i + 1), mask=mask * measured, brightness=args.brightness)
                found = redundancy(m)
                print(f"{path.name}, slice {i}, {kind}, R = {R}\n{m.found}\nredundancy  {found}", flush=True)
                m = m.with_noise(found.noise_std)
                full = m.raw_to_data(scan.kspace[i])[None]
                yield Case(f"{path.stem} {i}", kind, R, m, reference_image(scan.kspace[i], m), full)


# -------------------------------------------------------------------------------------------------- validation images


def validation_images(shape: tuple[int, int], heads: list[Path], count: int, seed: int) -> Tensor:
    """Complex images (image, 1, y, x) of other people, 99 % of the object's pixels at most 1, with smooth phases."""
    if heads:
        volumes = [torch.from_numpy(read_image(path).array).float() for path in heads]
        images = [one for v in volumes for one in axial(v, count // len(volumes), shape)]
    else:
        people = anatomy.cohort("validation", count)
        heights = [anatomy.slice_heights(s, count)[i : i + 1] for i, s in enumerate(people)]
        images = [
            anatomy.render(s, "T1w", (1, *shape), slices_mm=h).image[0].abs()
            for s, h in zip(people, heights, strict=True)
        ]
    magnitude = torch.stack(images)[:, None]
    return anatomy.random_phase(magnitude, torch.Generator().manual_seed(seed))


def axial(volume: Tensor, count: int, shape: tuple[int, int]) -> list[Tensor]:
    """Axial slices of a head (z, y, x), centred on `shape` pixels of its own size, the middle half of its height."""
    heights = torch.linspace(0.35, 0.75, count) * len(volume)
    images = []
    for z in heights.long().tolist():
        image = volume[z].flip(0)
        for axis, n in ((0, shape[0]), (1, shape[1])):
            have = image.shape[axis]
            image = image.narrow(axis, max(0, (have - n) // 2), min(n, have))
            before = (n - image.shape[axis]) // 2
            pads = (
                (0, 0, before, n - image.shape[axis] - before)
                if axis == 0
                else (before, n - image.shape[axis] - before)
            )
            image = torch.nn.functional.pad(image, pads)
        bright = torch.quantile(image[image > 0.1 * image.max()], 0.99)
        images.append(image / bright)
    return images


def tuned(case: Case, images: Tensor, methods: dict) -> dict[str, float]:
    """The best regularisation of each classical method for validation images as this scan would see them, by PSNR."""
    m = case.m
    noise = randn((len(images), *m.A.range_shape), images.dtype, torch.Generator().manual_seed(7))
    x = torch.cat([images, 0 * images.expand(-1, m.maps.shape[1] - 1, -1, -1)], 1) if m.maps.shape[1] > 1 else images
    x = x * (m.maps[0, :1].abs().sum(1) > 0)
    y = m.A(x) + m.noise_std * m.A.mask.mask * noise
    best = {}
    for name, method in methods.items():
        scores = {}
        for factor in GRID:
            weight = factor * m.noise_std**1.5
            found = torch.cat([method(m.A, one[None], weight) for one in y])
            scores[weight] = metrics.psnr(found[:, :1].abs(), x[:, :1].abs()).mean().item()
        best[name] = max(scores, key=scores.get)
    return best


def classical(m: Measurement) -> dict:
    """The classical methods, (A, y, regularisation) -> image, by name."""
    methods = {"CG-SENSE": cg, "L1-wavelet": wavelet, "TV": tv}
    if regularised.shutil.which("bart"):
        methods["BART l1-wavelet"] = lambda A, y, weight: bart_pics(A, y, m.maps[0], weight)
        methods["BART TV"] = lambda A, y, weight: bart_pics(A, y, m.maps[0], weight, penalty="T")
    return methods


# ---------------------------------------------------------------------------------------------------------- the table


def row(case: Case, method: str, x: Tensor, seconds: float, samples: Samples | None = None) -> dict:
    """One line of the table. samples: draws (draw, set, y, x) about x."""
    truth, found = case.reference.abs(), case.m.magnitude(x)
    line = {
        "scan": case.name,
        "mask": case.kind,
        "R": case.acceleration,
        "method": method,
        "PSNR (dB)": metrics.psnr(found, truth).item(),
        "SSIM": metrics.ssim(found, truth).item(),
        "NRMSE": metrics.nrmse(found, truth).item(),
        "unmeasured": case.unmeasured(x),
        "calibration": None,
        "coverage": None,
        "calibration, noisy": None,
        "coverage, noisy": None,
        "its noise": None,
        "chi-square": None,
        "looks like its organ": None,
        "verdict": "",
        "seconds": seconds,
        "memory (GiB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    if samples is not None:
        how = {"mask": case.inside, "paired": samples.paired}
        for images, noisy in ((samples.x, ""), (case.as_reference(samples.x), ", noisy")):
            spread = case.m.magnitude(images)[:, None]
            line[f"calibration{noisy}"] = metrics.calibration_ratio(spread, truth, **how).item()
            line[f"coverage{noisy}"] = metrics.coverage(spread, truth, (0.9,), **how)[1].item()
        noise = case.m.noise_std**2 * ((case.full != 0) & (case.m.y == 0)).any(1).float().mean()
        line["its noise"] = (noise / (found - truth)[case.inside].square().mean()).item()
    return line


def prior(weights: str, images: Tensor, args):
    """The denoiser and the models of its error: those beside the weights, else that on the validation images."""
    D = load_denoiser(weights, args.device, args.autocast)
    D = EachSet(AnySize(D, network_of(D).total_stride))
    try:
        return D, load_errors(weights)
    except FileNotFoundError:
        return D, {"validation heads": ErrorModel.fit(D, images, FIT_SIGMAS, about="validation heads", seed=args.seed)}


def evaluate(
    case: Case, D, errors, methods: dict, weights: dict[str, float], args
) -> tuple[list[dict], dict[str, Tensor]]:
    """The rows of a case, and its images by method."""
    m, rows, images = case.m, [], {"reference": case.reference}
    images["zero-filled"] = m.A.H(m.y)
    rows.append(row(case, "zero-filled", images["zero-filled"], 0.0))
    for name, method in methods.items():
        began = time.perf_counter()
        images[name] = method(m.A, m.y, weights[name])
        rows.append(row(case, name, images[name], time.perf_counter() - began))
    began = time.perf_counter()
    images[NAME] = one_pass(m.A, m.y, m.noise_std)
    rows.append(row(case, NAME, images[NAME], time.perf_counter() - began))
    began = time.perf_counter()
    split = held_out.hold_out(m.A, m.y, args.acs, seed=args.seed)
    leaning = held_out.Blend.of(
        split, *(partial(f, regularisation=weights.get(n, m.noise_std**1.5)) for n, f in LEANS.items())
    )
    images[LEANING] = leaning(m.A, m.y)
    rows.append(row(case, LEANING, images[LEANING], time.perf_counter() - began))
    print(f"posterior: {m.cost(D, args.draws, args.evaluations)}", flush=True)
    began = time.perf_counter()
    samples, found = trust.reconstruct(
        D,
        m.A,
        m.y,
        m.noise_std,
        errors,
        acs=args.acs,
        seeds=range(args.seed, args.seed + args.draws),
        evaluations=args.evaluations,
        classical=leaning,
        organ=known_to(args.weights),
    )
    seconds = time.perf_counter() - began
    images["one draw"], images["trusted"] = samples.x[:1], samples.mean
    rows.append(row(case, "one draw", images["one draw"], seconds / args.draws))
    if found.share > 0:  # what the image leans on, taken off again
        images["posterior mean"] = images[LEANING] + (samples.mean - images[LEANING]) / found.share
        rows.append(row(case, "posterior mean", images["posterior mean"], seconds))
    rows.append(row(case, "trusted", images["trusted"], seconds, samples))
    rows[-1] |= {"chi-square": found.chosen.score.chi2, "verdict": found.verdict}
    if found.look is not None:
        rows[-1] |= {"looks like its organ": found.look.probability}
    return rows, images


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/real_kspace"))
    parser.add_argument("--weights", default="general/2d")
    parser.add_argument("--heads", type=Path, nargs="*", default=[], help="validation heads, image files")
    parser.add_argument("--axes", help="names of the stored axes of arrays that do not tell them, as in 'coil y x'")
    parser.add_argument("--which", help="of several repetitions, contrasts or frames, as in 'repetition 0'")
    parser.add_argument("--accelerations", type=float, nargs="+", default=[4, 8])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--methods", nargs="+", help="classical methods; default all, BART's where it is installed")
    parser.add_argument("--acs", type=int, default=24)
    parser.add_argument("--slices", type=int, default=1, help="of a file, its middle ones")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--evaluations", type=int, default=30)
    parser.add_argument("--brightness", type=float, default=1.0, help="of the object, in units of the prior")
    parser.add_argument("--validation", type=int, default=4, help="validation images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", default=None)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rows, sheets, fitted = [], [], {}
    args.out.mkdir(parents=True, exist_ok=True)
    left = {}
    for path in args.files:
        try:
            for case in cases(path, args):
                some, pictures = scored(case, fitted, args)
                rows += some
                sheets.append((case, pictures))
                write(args, rows, sheets)
        except (ValueError, OSError) as error:  # what was done of it stays
            left[path] = error
            print(f"left out: {error}", flush=True)
    if not rows:
        raise SystemExit("no file could be used:\n" + "\n".join(map(str, left.values())))
    return rows


def scored(case: Case, fitted: dict, args) -> tuple[list[dict], dict[str, Tensor]]:
    """`evaluate` of a case, its classical methods tuned; fitted: shape -> prior and its errors, filled here."""
    shape = tuple(case.reference.shape[-2:])
    images = validation_images(shape, args.heads, args.validation, args.seed)
    if shape not in fitted:
        fitted[shape] = prior(args.weights, images, args)
    methods = {n: f for n, f in classical(case.m).items() if args.methods is None or n in args.methods}
    weights = tuned(case, images[: max(1, args.validation // 2)], methods)
    rows, pictures = evaluate(case, *fitted[shape], methods, weights, args)
    for line in rows:
        line["regularisation"] = weights.get(line["method"])
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}, flush=True)
    return rows, pictures


def write(args, rows: list[dict], sheets: list[tuple[Case, dict[str, Tensor]]]) -> None:
    """The table, the numbers and the contact sheet of what is finished."""
    about = {"code": code_version(), "options": {k: str(v) for k, v in vars(args).items()}, "rows": rows}
    texts = {"table.md": markdown(rows) + "\n", "results.json": json.dumps(about, indent=1) + "\n"}
    for name, text in texts.items():
        with atomic_write(args.out / name) as path:
            path.write_text(text)
    with atomic_write(args.out / "sheet.png") as path:
        sheet(sheets).savefig(path, format="png", dpi=100)


def sheet(sheets):
    """A figure: a row for each case and one for its errors, five times brighter; a column for each method."""
    some = ("reference", "zero-filled", "L1-wavelet", "TV", "BART TV", NAME, "one draw", "posterior mean", "trusted")
    shown = [one for one in some if one in sheets[0][1]]
    grid, notes = {}, {}
    for case, pictures in sheets:
        truth, name = case.reference.abs(), f"{case.name} {case.kind} {case.acceleration:g}"
        peak = torch.quantile(truth, 0.995)
        pictures = {one: truth if one == "reference" else case.m.magnitude(pictures[one]) for one in shown}
        grid[name] = {one: pictures[one][0, 0] / peak for one in shown}
        grid[f"{name} error x 5"] = {one: 5 * (pictures[one] - truth).abs()[0, 0] / peak for one in shown}
        for one in shown[1:]:
            notes[name, one] = f"{metrics.psnr(pictures[one], truth).item():.1f} dB"
    return figures.image_grid(grid, notes=notes, width=2.2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
