"""The brain prior and the study of start_here: complex T1w slices, a small diffusion prior, multi-coil MRI."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from companion import baselines, metrics
from companion.data import anatomy
from companion.data.store import Prepared, open_dataset, write_dataset
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.gibbs import annealed_gibbs
from companion.diffusion.guidance import Measured, posterior_mean
from companion.diffusion.losses import edm_loss
from companion.diffusion.noise import karras, randn
from companion.diffusion.sampling import Bill
from companion.operators.mri import CartesianMask, Sense, birdcage_maps, cartesian_mask, estimate_maps, sense
from companion.parameters import Parameters, param, read_yaml
from companion.runs import code_version, project_root
from companion.training import TrainConfig, TrainResult, train
from companion.weights import build, load, save_checkpoint

CONTRAST = "T1w"
SIGMA_DATA = 0.34  # standard deviation of the real components of the cohort's slices
FIRST_SIGMA = 5.0  # noise level at which posterior draws begin: an image is invisible in it
SCALE = "1 is the signal of the subject's brightest pure tissue"


@dataclass(frozen=True)
class TrainPrior(Parameters):
    """Parameters of train_prior.ipynb."""

    data: str = param("data/brain_t1w_64.h5", "prepared slices; made when missing")
    image_size: int = param(64, "pixels along y and x", minimum=16)
    subjects: int = param(2400, "virtual people to learn from", minimum=1)
    slices_per_subject: int = param(16, "axial slices of each", minimum=1)
    model_channels: int = param(64, "width of the network", minimum=32)
    channel_mult: tuple[float, ...] = param((1, 2, 2), "relative width of each level, finest first")
    num_res_blocks: int = param(1, "residual blocks a level", minimum=1)
    patch: int = param(2, "side of the pixel-unshuffle stem", minimum=1)
    variance_weight: float = param(0.05, "weight of the variance channel's likelihood in the loss", minimum=0)
    P_mean: float = param(-1.4, "mean of ln sigma in training")
    P_std: float = param(1.3, "standard deviation of ln sigma in training", minimum=0)
    start_from: str | None = param(None, "checkpoint whose weights to begin with; none: random weights")
    steps: int = param(14000, "optimiser steps", minimum=1)
    batch_size: int = param(32, "images a step", minimum=1)
    grad_accumulation: int = param(2, "pieces a batch is cut into; processes share them", minimum=1)
    learning_rate: float = param(5e-4, "highest learning rate", minimum=0)
    warmup: int = param(200, "steps of linear warm-up", minimum=0)
    ema_decay: float = param(0.999, "decay of the averaged weights", minimum=0, maximum=1)
    autocast: str | None = param("bfloat16", "number format inside the network", choices=("bfloat16", None))
    seconds: float | None = param(None, "stop with a checkpoint after this long", minimum=1)
    checkpoint_every: int = param(250, "steps between checkpoints", minimum=1)


@dataclass(frozen=True)
class StartHere(Parameters):
    """Parameters of start_here.ipynb."""

    weights: str = param("brain/t1w", "checkpoint: an embedded name or a folder")
    image_size: int = param(64, "pixels along y and x", minimum=16)
    accelerations: tuple[int, ...] = param((4, 8), "nominal accelerations R", minimum=1)
    acs: int = param(4, "fully sampled centre lines", minimum=0)
    coils: int = param(8, "receive coils", minimum=1)
    maps: str = param("oracle", "coil maps: the simulated ones, or ESPIRiT from the centre lines",
                      choices=("oracle", "espirit"))
    noise_std: float = param(0.01, "k-space noise per real component, in image units", minimum=0)
    subjects: int = param(16, "held-out subjects, one slice each", minimum=1)
    validation_subjects: int = param(4, "other subjects, to tune the classical methods", minimum=1)
    draws: int = param(8, "posterior draws a slice", minimum=2)
    evaluations: int = param(30, "network evaluations a draw", minimum=2)
    last_sigma: float = param(0.04, "noise level of the last evaluation; about 4 noise_std", minimum=1e-4)
    autocast: str | None = param("bfloat16", "number format inside the network", choices=("bfloat16", None))


def prior_config(p: TrainPrior) -> dict:
    """Return what `weights.build` makes the denoiser from: complex images, and a channel for the error's variance."""
    return {
        "network": {"name": "UNet", "in_channels": 2, "model_channels": p.model_channels, "out_channels": 3,
                    "num_res_blocks": p.num_res_blocks, "channel_mult": list(p.channel_mult), "num_heads": 4,
                    "use_scale_shift_norm": True, "patch": p.patch},
        "denoiser": {"name": "EDMDenoiser", "complex": True, "sigma_data": SIGMA_DATA, "learned_variance": True,
                     "variance_channels": 1},
        "data": {"source": f"virtual cohort of companion.data.anatomy (ICBM 152), {CONTRAST} axial slices",
                 "subjects": p.subjects, "slices_per_subject": p.slices_per_subject, "image_size": p.image_size,
                 "scale": SCALE},
    }


def train_prior(p: TrainPrior, progress: bool = True) -> TrainResult:
    """Return the trained prior; continues what `p.out` holds. The same call serves torchrun's processes."""
    config = prior_config(p)
    torch.manual_seed(p.seed)
    D = build(config)
    if p.start_from:
        D.load_state_dict(load(p.start_from).state_dict())
    D.D.autocast = getattr(torch, p.autocast) if p.autocast else None
    options = TrainConfig(steps=p.steps, batch_size=p.batch_size, grad_accumulation=p.grad_accumulation,
                          learning_rate=p.learning_rate, warmup=p.warmup, schedule="cosine", ema_decay=p.ema_decay,
                          channels_last=True, seed=p.seed, device=p.device, seconds=p.seconds,
                          checkpoint_every=p.checkpoint_every, log_every=50)
    data = prepare_training_set(p, project_root() / p.data).slices("magnitude", "train")

    def loss(D: Denoiser, magnitude: Tensor, generator: Generator) -> Tensor:
        return prior_loss(D, magnitude, generator, p)

    about = config | {name: getattr(p, name) for name in ("P_mean", "P_std", "variance_weight", "start_from")}
    return train(D, loss, data, options, project_root() / p.out, about=about, progress=progress)


def prior_loss(D: Denoiser, magnitude: Tensor, generator: Generator, p: TrainPrior) -> Tensor:
    """Return the EDM loss (batch,) of magnitudes (batch, 1, y, x), each mirrored at random and given a new phase."""
    mirrored = torch.rand(len(magnitude), 1, 1, 1, generator=generator, device=generator.device) < 0.5
    magnitude = torch.where(mirrored, magnitude.flip(-1), magnitude)
    return edm_loss(D, anatomy.random_phase(magnitude, generator), generator, p.P_mean, p.P_std,
                    variance_weight=p.variance_weight)


def slices(split: str, subjects: int, image_size: int, per_subject: int = 1, progress: bool = False) -> Tensor:
    """Return complex slices (subject * slice, 1, y, x) of the first subjects of a split.

    With one slice each, the heights of successive subjects sweep the slab, so that few subjects show all of it.
    """
    images = []
    for i, subject in enumerate(tqdm(anatomy.cohort(split, subjects), desc="subjects", disable=not progress)):
        heights = anatomy.slice_heights(subject, per_subject if per_subject > 1 else subjects)
        heights = heights if per_subject > 1 else heights[i : i + 1]
        images.append(anatomy.render(subject, CONTRAST, (len(heights), image_size, image_size),
                                     slices_mm=heights).image)
    return torch.cat(images)[:, None]


def prepare_training_set(p: TrainPrior, path: str | os.PathLike) -> Prepared:
    """Return the training slices' magnitudes, (subject, slice, 1, y, x) float32, made and stored once as HDF5.

    Phases are not stored: `prior_loss` draws a new one each time a slice is shown.
    """
    if not Path(path).exists():
        magnitude = slices("train", p.subjects, p.image_size, p.slices_per_subject, progress=True).abs()
        write_dataset(path, {"magnitude": magnitude.unflatten(0, (p.subjects, -1)).numpy()},
                      units={"magnitude": "1"}, scale={"magnitude": SCALE}, seed=anatomy.FIRST_SEED["train"],
                      source="companion.data.anatomy (ICBM 152), " + CONTRAST, split={"train": range(p.subjects)})
    prepared = open_dataset(path, require=["magnitude"])
    expected = (p.subjects, p.slices_per_subject, 1, p.image_size, p.image_size)
    if prepared.shapes["magnitude"] != expected:
        raise ValueError(f"{path} holds slices of shape {prepared.shapes['magnitude']} but the parameters ask for "
                         f"{expected}; delete the file, or give another data file")
    return prepared


@dataclass(frozen=True, eq=False)
class Scan:
    """A simulated acquisition: y = A x + noise. `x` (slice, 1, y, x) is the truth, `y` (slice, coil, y, x) k-space."""

    x: Tensor
    y: Tensor
    A: Sense
    mask: CartesianMask
    noise_std: float

    def one(self, i: int) -> Scan:
        """Return the scan of slice i alone."""
        maps = self.A.coils.maps
        A = self.A if maps.ndim == 3 else sense(maps[i : i + 1], self.mask)
        return Scan(self.x[i : i + 1], self.y[i : i + 1], A, self.mask, self.noise_std)


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
    return {"PSNR (dB)": metrics.mean_and_error(psnr),
            "gain over TV (dB)": metrics.mean_and_error(psnr, paired_with=metrics.psnr(tv, scan.x)),
            "SSIM": metrics.mean_and_error(metrics.ssim(x, scan.x)),
            "NRMSE": metrics.mean_and_error(metrics.nrmse(x, scan.x))}


def calibration(draws: Tensor, scan: Scan) -> float:
    """Return the variance of draws (draw, slice, 1, y, x) over the squared error of their mean, summed over slices.

    1 is calibrated, below 1 over-confident; `metrics.calibration_ratio` of all slices as one image.
    """
    together = draws.movedim(1, 2)  # the slices become rows of one image
    return metrics.calibration_ratio(together.flatten(2, 3)[:, None], scan.x.movedim(0, 1).flatten(1, 2)[None]).item()


@torch.no_grad()
def denoising_errors(D: Denoiser, p: TrainPrior, sigmas: list[float], subjects: int = 16) -> list[dict[str, float]]:
    """Return, for each sigma, the error of D on validation slices and the error that its variance channel expects."""
    x0 = slices("validation", subjects, p.image_size).to(p.device)
    noise = randn(x0.shape, x0.dtype, torch.Generator().manual_seed(p.seed)).to(p.device)
    rows = []
    for sigma in sigmas:
        mean, variance = D.moments(x0 + sigma * noise, torch.full((len(x0),), sigma, device=p.device))
        error = ((mean - x0).abs().square().mean() / 2).sqrt().item()
        rows.append({"sigma": sigma, "error": round(error, 4), "expected": round(variance.mean().sqrt().item(), 4)})
    return rows


def save_prior(result: TrainResult, p: TrainPrior, errors: list[dict[str, float]]) -> Path:
    """Return the folder <out>/checkpoint with the averaged weights in half precision, their config, record and card."""
    record = {"parameters": asdict(p), "steps": result.step, "images": result.step * p.batch_size,
              "seconds": round(result.seconds), "loss": result.loss, "validation": errors,
              "code": code_version()}
    return save_checkpoint(project_root() / p.out / "checkpoint", result.ema.half(), prior_config(p), record)


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.brain params.yaml
    train_prior(TrainPrior(**read_yaml(sys.argv[1])))
