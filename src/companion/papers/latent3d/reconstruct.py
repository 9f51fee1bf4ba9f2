"""Volumes through the code and back, and 3D MRI with the latent prior as one more denoiser.

First what the autoencoder alone does: volume -> code -> volume. Then k-space undersampled along two axes of a 3D scan,
solved by sampling latents z that explain it:

    y = A decode(z) + noise,   D_y = projection(A, y, ...)(prior.D)   or   gradient(A, y, ...)(prior.D)

Both are guidances like those of `companion.diffusion.guidance`, so any solver draws with them. Coil maps and phase come
from the fully sampled centre of the very k-space that is reconstructed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from companion.acquisition.mri import Scan
from companion.acquisition.volume import VolumeProtocol
from companion.diffusion.latent_guidance import Errors
from companion.evaluation.known_people import unseen
from companion.models.checkpoint import load_denoiser
from companion.models.errors import load_errors
from companion.models.latent import PRIOR, LatentPrior
from companion.parameters import Parameters, param
from companion.reconstruction.latent import Classical, Reconstruction, Sampler, assess, posterior, posterior_of_voxels


@dataclass(frozen=True)
class ReconstructVolumes(Classical, Sampler, VolumeProtocol, Parameters):
    """Parameters of latent3d/4_reconstruct.ipynb."""

    weights: str = param(PRIOR, "prior on latents: an embedded name or a folder")
    autoencoder: str | None = param(None, "its autoencoder; none: the one that the prior names")
    data: str = param("data/latent3d_64.h5", "prepared volumes, from 1_data; missing: the embedded cohort, made anew")
    people: int = param(16, "held-out people to send through the code", minimum=2)
    synthetic: int = param(8, "volumes to draw, to compare their spectrum", minimum=2)
    start_sigmas: tuple[float, ...] = param(
        (0.3, 1.0, 3.0, 10.0), "noise added to the code of a person before it is drawn anew", minimum=1e-3
    )
    subjects: int = param(2, "held-out people to scan", minimum=1)
    validation_subjects: int = param(8, "other people, on whom the errors of the prior are measured", minimum=2)
    voxels: str | None = param(
        "latent3d/voxels", "prior of voxels to reconstruct with, beside the latent one; none: without"
    )
    voxel_evaluations: int = param(16, "evaluations of a draw of voxels", minimum=4)
    voxel_iterations: int = param(10, "conjugate-gradient steps an evaluation of voxels", minimum=1)
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))


def prepare(p: ReconstructVolumes, prior: LatentPrior) -> tuple[list[Scan], Errors]:
    """Scans of the first held-out people, and the errors of the prior, measured on validation people."""
    truths = unseen(prior, p.data, "test", p.subjects)
    scans = [p.acquire(x, i, p.seed).to(p.device) for i, x in enumerate(truths)]
    others = unseen(prior, p.data, "validation", p.validation_subjects).to(p.device)
    return scans, Errors.measure(prior.D, prior.space, others, seed=p.seed)


def study(p: ReconstructVolumes, prior: LatentPrior, scans: Sequence[Scan], errors: Errors) -> list[Reconstruction]:
    """What each method makes of each scan; of the latent methods the mean of the draws.

    "trusted": draws of the first latent method beside total variation, as far as the scan itself speaks for them;
    "voxels": the same of the prior of voxels.
    """
    made = []
    voxels = (load_denoiser(p.voxels, p.device, p.autocast), load_errors(p.voxels)) if p.voxels else None
    for scan in scans:
        images, draws, bills, seeds = p.images(scan), {}, {}, range(p.seed, p.seed + p.draws)
        for name in p.methods:
            found, bills[name] = posterior(prior, errors, scan, name, p, seeds)
            draws |= found
            images |= {label: x.mean(0, keepdim=True) for label, x in found.items()}
        verdict = assess(prior, errors, scan, p.methods[0], p, p, p.seed)
        other = images.get("total variation")
        images["trusted"], draws["trusted"] = verdict.apply(draws[f"{p.methods[0]} + data"], other)
        verdicts = {p.methods[0]: verdict.text}
        if voxels:
            samples, found = posterior_of_voxels(*voxels, scan, p, p.voxel_evaluations, p.voxel_iterations, seeds)
            draws["voxels"], bills["voxels"] = samples.x, samples.bill
            images["voxels"] = samples.x.mean(0, keepdim=True)  # about which they scatter
            verdicts["voxels"] = found.verdict
        made.append(Reconstruction(images, draws, bills, verdicts, p.draws % 2 == 0))
    return made
