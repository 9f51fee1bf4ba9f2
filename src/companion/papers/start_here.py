"""The brain prior and the study of start_here: complex T1w slices, a small diffusion prior, multi-coil MRI."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from companion.acquisition.mri import Scan
from companion.diffusion.covariance import Measured
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.gibbs import annealed_gibbs
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.noise import karras
from companion.diffusion.sampling import Bill
from companion.evaluation import metrics
from companion.operators.mri import birdcage_maps, cartesian_mask, estimate_maps, sense
from companion.papers.train_prior import slices
from companion.parameters import Parameters, param
from companion.randomness import randn
from companion.reconstruction import mri as baselines

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


def acquire(x: Tensor, acceleration: int, p: StartHere, seed: int) -> Scan:
    """Return the multi-coil scan of slices x (slice, 1, y, x), equispaced lines plus `p.acs` at the centre."""
    mask = cartesian_mask(x.shape[-1], acceleration, "equispaced", acs=p.acs, seed=seed)
    A = sense(birdcage_maps(x.shape[-2:], p.coils), mask)
    noise = randn((len(x), *A.range_shape), x.dtype, torch.Generator().manual_seed(seed))
    y = A(x) + p.noise_std * A.mask(noise)
    if p.maps == "espirit":
        A = sense(estimate_maps(y, p.acs), mask)
    return Scan(x, y, A, mask, p.noise_std)


GRIDS = {  # searched on validation subjects; the best values lie inside
    "CG-SENSE": (1e-3, 3e-3, 1e-2, 3e-2),
    "L1-wavelet": (5e-4, 1e-3, 2e-3, 4e-3),
    "TV": (5e-4, 1e-3, 2e-3, 4e-3),
}


def classical(scan: Scan, validation: Scan) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the classical reconstructions (slice, 1, y, x) by name, and the regularisation that each was tuned to."""
    maps, mask = scan.A.coils.maps, scan.mask
    case = (validation.y, validation.A.coils.maps, mask, validation.x)
    images, tuned = {"zero-filled": baselines.zero_filled(scan.y, maps, mask)}, {}
    for name, grid in GRIDS.items():
        method = baselines.METHODS[name]
        tuned[name] = baselines.tune(method, [case], grid).regularisation
        images[name] = method(scan.y, maps, mask, tuned[name])
    return images, tuned


FIT_SIGMAS = torch.logspace(-2, 1.3, 12)  # noise levels at which the error of a prior is measured


def measured_error(D: Denoiser, p: StartHere, subjects: int = 16) -> Measured:
    """Return the covariance model of the error of D, measured on validation slices: variance and spectrum by level."""
    return Measured.fit(D, slices("validation", subjects, p.image_size).to(p.device), FIT_SIGMAS, seed=p.seed)


def posterior(D: Denoiser, error: Measured, scan: Scan, p: StartHere, progress: bool = False) -> tuple[Tensor, Bill]:
    """Return posterior draws (draw, slice, 1, y, x) of all slices of a scan, and what one draw cost.

    Slice i uses the seeds from p.seed + i * p.draws on, so no two slices share their noise.
    """
    levels = karras(p.evaluations, sigma_min=p.last_sigma, sigma_max=FIRST_SIGMA)
    results = []
    for i in tqdm(range(len(scan.x)), desc="posterior draws, slice", disable=not progress):
        one = scan.one(i)
        seeds = range(p.seed + i * p.draws, p.seed + (i + 1) * p.draws)
        G = posterior_mean(one.A, one.y, one.noise_std, error)
        results.append(annealed_gibbs(D, G, levels, seeds=seeds, dtype=scan.x.dtype, device=scan.x.device))
    seconds = sum(r.bill.seconds for r in results) / len(results)
    return torch.stack([r.x for r in results], 1), replace(results[0].bill, seconds=seconds)


def score(x: Tensor, scan: Scan, tv: Tensor) -> dict[str, tuple[float, float]]:
    """Return PSNR, its paired gain over TV, SSIM and NRMSE, each as mean and standard error over slices.

    Magnitudes of whole images, peak = the largest value of each true slice.
    """
    psnr = metrics.psnr(x, scan.x)
    return {
        "PSNR (dB)": metrics.mean_and_error(psnr),
        "gain over TV (dB)": metrics.mean_and_error(psnr, paired_with=metrics.psnr(tv, scan.x)),
        "SSIM": metrics.mean_and_error(metrics.ssim(x, scan.x)),
        "NRMSE": metrics.mean_and_error(metrics.nrmse(x, scan.x)),
    }


def calibration(draws: Tensor, scan: Scan) -> float:
    """Return the variance of draws (draw, slice, 1, y, x) over the squared error of their mean, summed over slices.

    1 is calibrated, below 1 over-confident; `metrics.calibration_ratio` of all slices as one image.
    """
    together = draws.movedim(1, 2)  # the slices become rows of one image
    return metrics.calibration_ratio(together.flatten(2, 3)[:, None], scan.x.movedim(0, 1).flatten(1, 2)[None]).item()
