"""The study of start_here: complex T1w slices of people, multi-coil scans, a small diffusion prior, its posterior."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from companion.acquisition.mri import Scan, acquire, with_estimated_maps
from companion.data.virtual import slices
from companion.diffusion.covariance import Measured
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.gibbs import annealed_gibbs
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.sampling import Bill
from companion.evaluation import metrics
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps
from companion.parameters import Parameters, param
from companion.randomness import antithetic
from companion.reconstruction import mri as baselines
from companion.reconstruction.one_pass import NAME, one_pass

FIRST_SIGMA = 5.0  # noise level at which posterior draws begin: an image is invisible in it


@dataclass(frozen=True)
class StartHere(Parameters):
    """Parameters of start_here.ipynb."""

    weights: str = param("brain/t1w", "checkpoint: an embedded name or a folder")
    image_size: int = param(64, "pixels along y and x", minimum=16)
    accelerations: tuple[int, ...] = param((4, 8), "nominal accelerations R", minimum=1)
    acs: int = param(4, "fully sampled centre lines", minimum=0)
    coils: int = param(8, "receive coils", minimum=1)
    maps: str = param(
        "oracle", "coil maps: the simulated ones, or ESPIRiT from the centre lines", choices=("oracle", "espirit")
    )
    noise_std: float = param(0.01, "k-space noise per real component, in image units", minimum=0)
    subjects: int = param(16, "held-out subjects, one slice each", minimum=1)
    validation_subjects: int = param(4, "other subjects, to tune the classical methods", minimum=1)
    draws: int = param(8, "posterior draws a slice", minimum=2)
    evaluations: int = param(30, "network evaluations a draw", minimum=2)
    last_sigma: float = param(0.04, "noise level of the last evaluation; about 4 noise_std", minimum=1e-4)
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))


@dataclass(frozen=True, eq=False)
class Study:
    """What `study` finds at each acceleration: images by method, posterior draws, one tidy table, tuned settings."""

    images: dict[int, dict[str, Tensor]]  # R -> method -> (slice, 1, y, x)
    draws: dict[int, Tensor]  # R -> (draw, slice, 1, y, x)
    paired: bool  # whether draws are antithetic, see `metrics.spread`
    table: list[dict]
    regularisation: dict[int, dict[str, float]]
    bills: dict[int, Bill]  # of one draw of one slice


def study(
    p: StartHere, D: Denoiser, C: Measured, levels: Tensor, progress: bool = True
) -> tuple[Study, dict[int, Scan]]:
    """Every method on all held-out slices at all accelerations, and the scans; classical ones tuned on other people."""
    x = slices("test", p.subjects, p.image_size).to(p.device)
    others = slices("validation", p.validation_subjects, p.image_size).to(p.device)
    images, draws, tuned, bills, table, scans = {}, {}, {}, {}, [], {}
    for R in p.accelerations:
        scans[R] = scan = scanned(x, R, p.acs, p.coils, p.noise_std, p.maps, p.seed)
        images[R], tuned[R] = classical(scan, scanned(others, R, p.acs, p.coils, p.noise_std, p.maps, p.seed + 1))
        images[R][NAME] = torch.cat([one_pass(scan.one(i).A, scan.y[i : i + 1], p.noise_std) for i in range(len(x))])
        draws[R], bills[R] = posterior(D, C, scan, levels, p.draws, p.seed, progress)
        images[R] |= {"diffusion, one draw": draws[R][0], f"diffusion, mean of {p.draws}": draws[R].mean(0)}
        table += [{"R": R, "method": name} | score(x, scan, images[R]["TV"]) for name, x in images[R].items()]
    return Study(images, draws, p.draws % 2 == 0, table, tuned, bills), scans


def scanned(x: Tensor, R: float, acs: int, coils: int, noise_std: float, maps: str = "oracle", seed: int = 0) -> Scan:
    """The multi-coil scan of slices x (slice, 1, y, x): equispaced lines, `acs` at the centre; maps: or "espirit"."""
    mask = cartesian_mask(x.shape[-1], R, "equispaced", acs=acs, seed=seed)
    scan = acquire(x, birdcage_maps(x.shape[-2:], coils).to(x.device), mask, noise_std, seed)
    return with_estimated_maps(scan) if maps == "espirit" else scan


GRIDS = {  # searched on validation subjects; the best values lie inside
    "CG-SENSE": (1e-3, 3e-3, 1e-2, 3e-2),
    "L1-wavelet": (5e-4, 1e-3, 2e-3, 4e-3),
    "TV": (5e-4, 1e-3, 2e-3, 4e-3),
}


def classical(scan: Scan, validation: Scan) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The classical reconstructions (slice, 1, y, x) by name, and the regularisation that each was tuned to."""
    tuned = baselines.tune_all([(validation.y, validation.maps, validation.mask, validation.x)], GRIDS)
    images = baselines.reconstruct_all(scan.y, scan.maps, scan.mask, tuned)
    return images, {name: value for name, value in tuned.items() if value is not None}


def posterior(
    D: Denoiser, C: Measured, scan: Scan, levels: Tensor, draws: int, seed: int = 0, progress: bool = False
) -> tuple[Tensor, Bill]:
    """Posterior draws (draw, slice, 1, y, x) of all slices of a scan, antithetic if even, and what one draw cost.

    Slice i uses the seeds from seed + i * draws on, so no two slices share their noise.
    """
    results = []
    for i in tqdm(range(len(scan.y)), desc="posterior draws, slice", disable=not progress):
        G = posterior_mean(scan.one(i).A, scan.y[i : i + 1], scan.noise_std, C)
        seeds = antithetic(range(seed + i * draws, seed + (i + 1) * draws))
        results.append(annealed_gibbs(D, G, levels, seeds=seeds, dtype=scan.truth.dtype, device=scan.truth.device))
    seconds = sum(r.bill.seconds for r in results) / len(results)
    return torch.stack([r.x for r in results], 1), replace(results[0].bill, seconds=seconds)


def score(x: Tensor, scan: Scan, tv: Tensor) -> dict[str, tuple[float, float]]:
    """PSNR, its paired gain over TV, SSIM and NRMSE, each as mean and standard error over slices.

    Magnitudes of whole images, peak = the largest value of each true slice.
    """
    psnr = metrics.psnr(x, scan.truth)
    return {
        "PSNR (dB)": metrics.mean_and_error(psnr),
        "gain over TV (dB)": metrics.mean_and_error(psnr, paired_with=metrics.psnr(tv, scan.truth)),
        "SSIM": metrics.mean_and_error(metrics.ssim(x, scan.truth)),
        "NRMSE": metrics.mean_and_error(metrics.nrmse(x, scan.truth)),
    }
