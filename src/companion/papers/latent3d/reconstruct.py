"""Volumes through the code and back, and 3D MRI with the latent prior as one more denoiser.

First what the autoencoder alone does: real volume -> code -> volume. Then k-space undersampled along two axes of a 3D
scan, solved by sampling latents z that explain it:

    y = A decode(z) + noise,   D_y = projection(A, y, ...)(prior.D)   or   gradient(A, y, ...)(prior.D)

Both are guidances like those of `companion.diffusion.guidance`, so any solver draws with them. Coil maps and phase come
from the fully sampled centre of the very k-space that is reconstructed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from companion.data import anatomy
from companion.data.volumes import spacing
from companion.diffusion.latent_guidance import SUPPORT, WIDE, Errors, explain, gradient, projection
from companion.diffusion.noise import karras
from companion.diffusion.sampling import Bill, sample
from companion.evaluation import metrics
from companion.operators.linear import LinearOperator
from companion.operators.mri import CartesianMask, birdcage_maps, fft, ifft, low_pass, sense
from companion.operators.real import RealImages
from companion.papers.latent3d.autoencoder import PRIOR
from companion.papers.latent3d.prior import LatentPrior
from companion.papers.latent3d.sample import people
from companion.parameters import Parameters, param
from companion.randomness import randn
from companion.reconstruction import mri as baselines

METHODS = ("projection", "gradient")


@dataclass(frozen=True)
class ReconstructVolumes(Parameters):
    """Parameters of latent3d/4_reconstruct.ipynb."""

    weights: str = param(PRIOR, "prior on latents: an embedded name or a folder")
    autoencoder: str | None = param(None, "its autoencoder; none: the one that the prior names")
    data: str = param("data/latent3d_64.h5", "prepared volumes, from 1_data; missing: the embedded cohort, made anew")
    people: int = param(16, "held-out people to send through the code", minimum=2)
    synthetic: int = param(8, "volumes to draw, to compare their spectrum", minimum=2)
    start_sigmas: tuple[float, ...] = param(
        (0.3, 1.0, 3.0, 10.0), "noise added to a real code before it is drawn anew", minimum=1e-3
    )
    subjects: int = param(2, "held-out people to scan", minimum=1)
    validation_subjects: int = param(8, "other people, on whom the errors of the prior are measured", minimum=2)
    coils: int = param(8, "receive coils", minimum=1)
    noise_std: float = param(0.02, "k-space noise per real component, in image units", minimum=0)
    acceleration: float = param(8, "readouts along z are made at one in so many places (y, x)", minimum=1)
    acs: int = param(12, "fully sampled centre along y and x", minimum=8)
    maps: str = param(
        "calibration",
        "coil maps and phase: from the centre of the data, or oracle, the true ones",
        choices=("calibration", "oracle"),
    )
    methods: tuple[str, ...] = param(
        METHODS,
        "how latents are led to the data: decode, correct, encode; or by the decoder's derivatives",
        choices=METHODS,
    )
    draws: int = param(4, "posterior draws of a volume", minimum=1)
    evaluations: int = param(16, "network evaluations a draw", minimum=2)
    first_sigma: float = param(20.0, "noise level at which draws begin", minimum=1e-3)
    last_sigma: float = param(0.1, "noise level of the last evaluation", minimum=1e-5)
    iterations: int = param(8, "conjugate-gradient steps an evaluation", minimum=1)
    regularisation: float = param(0.03, "of CG-SENSE, chosen on validation people, as the next two", minimum=0)
    wavelets: float | None = param(0.004, "weight of |wavelets|_1; none: without that baseline", minimum=0)
    variation: float | None = param(0.0015, "weight of the total variation; none: without that baseline", minimum=1e-9)
    sparse_iterations: int = param(80, "steps of these two", minimum=1)
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))


@torch.no_grad()
def drawn_anew(prior: LatentPrior, z: Tensor, p: ReconstructVolumes) -> dict[str, Tensor]:
    """Return the code z (1, *latent_shape), and that code noised to each level and drawn from there, as volumes.

    Little noise must bring the same brain back, much noise another brain; noise in between shows which features the
    prior holds on to. A decoder that fails does so without any noise; a prior that fails does so with much.
    """
    made = {"code": prior.decode(z)}
    for sigma in p.start_sigmas:
        levels = karras(max(2, p.evaluations), min(0.02, sigma / 10), sigma)
        drawn = sample(
            prior.D, levels, shape=prior.latent_shape, seeds=p.seed, start=z, solver="dpmpp_2m", device=p.device
        )
        made[f"sigma {sigma:g}"] = prior.decode(drawn.x)
    return made


@dataclass(frozen=True, eq=False)
class VolumeScan:
    """A simulated 3D scan: truth x (1, 1, z, y, x), k-space y (1, coil, z, y, x), maps that carry the phase too."""

    x: Tensor
    y: Tensor
    maps: Tensor
    mask: CartesianMask
    noise_std: float

    @property
    def A(self) -> LinearOperator:
        """From real volumes (1, z, y, x) to k-space: the phase is in the maps."""
        return sense(self.maps, self.mask, ndim=3) @ RealImages((1, *self.maps.shape[-3:]))


def acquire(x: Tensor, index: int, p: ReconstructVolumes) -> VolumeScan:
    """Return the scan of a person x (1, z, y, x): smooth phase, birdcage coils, noise, and few readouts."""
    shape, generator = tuple(x.shape[1:]), torch.Generator().manual_seed(p.seed + 7919 * index)
    voxel = spacing(shape)
    heights = anatomy.CENTRE_MM[2] + voxel[0] * (torch.arange(shape[0]) - (shape[0] - 1) / 2)
    phase = anatomy.PHASE_RAD * anatomy.smooth_field(anatomy.grid_mm(shape, voxel[1], heights), generator)
    true = birdcage_maps(shape, p.coils) * torch.polar(torch.ones(shape), phase)
    mask = plane_mask(shape, p.acceleration, p.acs, p.seed + index)
    full = fft(true * x, 3)
    y = mask.mask * (full + p.noise_std * randn(full.shape, full.dtype, generator))
    maps = true if p.maps == "oracle" else centre_maps(y, p.acs)
    return VolumeScan(x[None].to(p.device), y[None].to(p.device), maps.to(p.device), mask, p.noise_std)


def plane_mask(shape: tuple[int, int, int], acceleration: float, acs: int, seed: int) -> CartesianMask:
    """Return a mask (z, y, x) of readouts along z at random places (y, x), the denser the nearer to the centre.

    The density falls as (1 - |k| / k_max)^2; the fully sampled square of `acs` in the centre counts towards the
    acceleration, which is reached exactly. Raises ValueError when the square alone has more samples.
    """
    height, width = shape[-2:]
    count = round(height * width / acceleration)
    distance = [((torch.arange(n) - n // 2) / (n // 2)).abs() for n in (height, width)]
    k = (distance[0][:, None].square() + distance[1].square()).sqrt() / 2**0.5
    centre = [(torch.arange(n) - n // 2 + acs // 2).clamp(-1, acs).remainder(acs + 1) < acs for n in (height, width)]
    inside = centre[0][:, None] & centre[1]
    if not inside.sum() <= count:
        raise ValueError(
            f"acceleration {acceleration} leaves {count} of {height} x {width} places, the centre alone "
            f"has {int(inside.sum())}; lower acs or the acceleration"
        )
    density = torch.where(inside, 0, (1 - k).square() + 1e-6).flatten()
    plane, more = inside.float(), count - int(inside.sum())
    if more:
        chosen = torch.multinomial(density, more, generator=torch.Generator().manual_seed(seed))
        plane.view(-1)[chosen] = 1
    return CartesianMask(
        plane.expand(shape).clone(),
        height * width / count,
        acceleration,
        count,
        acs,
        "variable density, two axes",
        seed,
    )


def centre_maps(y: Tensor, acs: int) -> Tensor:
    """Return coil maps (coil, z, y, x) from the centre of k-space: low-resolution coil images, unit sum of squares.

    They carry the phase of the image, which is smooth, so that the image they leave is real. Where there is no signal
    they go on smoothly, for the data to say that there is none.
    """
    blurred = ifft(low_pass(y, acs), 3)
    size = blurred.abs().square().sum(0).sqrt()
    maps = torch.where(size > SUPPORT * size.max(), blurred / size.clamp(min=1e-12), 0)
    distance = sum(k.square() for k in torch.meshgrid(*[torch.fft.fftfreq(n) for n in y.shape[1:]], indexing="ij"))
    wide = torch.exp(-2 * (torch.pi * WIDE) ** 2 * distance).to(y.device)
    smooth = torch.fft.ifftn(wide * torch.fft.fftn(maps, dim=(1, 2, 3)), dim=(1, 2, 3))
    smooth = smooth / smooth.abs().square().sum(0).sqrt().clamp(min=1e-12)
    return torch.where(size > SUPPORT * size.max(), maps, smooth)


# ------------------------------------------------------------------------------------------------------ reconstruction


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Real images (1, 1, z, y, x) of one scan by method, posterior draws (draw, 1, z, y, x) by method, and bills."""

    images: dict[str, Tensor]
    draws: dict[str, Tensor]
    bills: dict[str, Bill]


def without_prior(scan: VolumeScan, p: ReconstructVolumes) -> dict[str, Tensor]:
    """Return what methods without a learned prior make of a scan, 0 and above: they too are told that it is real."""
    methods = {
        "zero-filled": (baselines.zero_filled, 0.0, None),
        "CG-SENSE": (baselines.cg_sense, p.regularisation, 30),
        "L1 of wavelets": (baselines.l1_wavelet, p.wavelets, p.sparse_iterations),
        "total variation": (baselines.total_variation, p.variation, p.sparse_iterations),
    }
    return {
        name: method(scan.y, scan.maps, scan.mask, weight, iterations).real.clamp(min=0)
        for name, (method, weight, iterations) in methods.items()
        if weight is not None
    }


def reconstruct_scan(prior: LatentPrior, errors: Errors, scan: VolumeScan, p: ReconstructVolumes) -> Reconstruction:
    """Return what each method makes of a scan; of the latent methods the mean of the draws.

    Their last step leaves the latents: the decoded volume is made to agree with the data once more, and what the
    autoencoder cannot express is added ("+ data").
    """
    images, levels = without_prior(scan, p), karras(p.evaluations, p.last_sigma, p.first_sigma)
    draws, bills = {}, {}
    for name in p.methods:
        G = {"projection": projection, "gradient": gradient}[name](
            scan.A, scan.y, scan.noise_std, p.iterations, space=prior.space, errors=errors
        )
        began = time.perf_counter()
        z = sample(
            G(prior.D),
            levels,
            shape=prior.latent_shape,
            seeds=range(p.seed, p.seed + p.draws),
            solver="dpmpp_2m",
            device=p.device,
            batch_size=1,
        )
        decoded = prior.decode(z.x)
        last = errors.at(torch.full((p.draws,), p.last_sigma, device=decoded.device))
        with torch.no_grad():
            explained = torch.cat([explain(x[None], v[None], G) for x, v in zip(decoded, last, strict=True)])
        draws[name], draws[f"{name} + data"] = decoded.clamp(min=0), explained.clamp(min=0)
        bills[name] = replace(z.bill, seconds=(time.perf_counter() - began) / p.draws)
        for label in (name, f"{name} + data"):
            images[label] = draws[label].mean(0, keepdim=True)
    return Reconstruction(images, draws, bills)


def score(reconstructions: list[Reconstruction], scans: list[VolumeScan]) -> list[dict[str, object]]:
    """Return PSNR and SSIM of every method, mean and standard error over people; peak 1, and inside the brain."""
    rows, truth = [], torch.cat([scan.x for scan in scans])
    for name in reconstructions[0].images:
        x = torch.cat([r.images[name] for r in reconstructions])
        values = {
            "PSNR (dB)": metrics.psnr(x, truth, 1.0),
            "PSNR (brain, dB)": metrics.psnr(x, truth, 1.0, truth > 0),
            "SSIM": metrics.ssim(x, truth, 1.0),
            "SSIM (brain)": metrics.ssim(x, truth, 1.0, truth > 0),
        }
        rows.append(
            {"method": name, "n": len(x)}
            | {key: metrics.mean_and_error(v) if len(v) > 1 else v.item() for key, v in values.items()}
        )
    return rows


def calibration(draws: Tensor, truth: Tensor) -> float:
    """Return the variance of draws (draw, 1, z, y, x) over the squared error of their mean, in the brain; 1: right."""
    return metrics.calibration_ratio(draws[:, None], truth, truth > 0).item()


def validation_errors(prior: LatentPrior, p: ReconstructVolumes) -> Errors:
    """Return the errors of the prior, measured on validation people."""
    return Errors.measure(prior, people(prior, p.data, "validation", p.validation_subjects).to(p.device), seed=p.seed)


def scans(prior: LatentPrior, p: ReconstructVolumes) -> list[VolumeScan]:
    """Return scans of the first held-out people."""
    return [acquire(x, i, p) for i, x in enumerate(people(prior, p.data, "test", p.subjects))]
