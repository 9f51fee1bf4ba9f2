"""Volumes drawn from the latent prior, and how good they are beside people it never saw.

prior = load_latent("latent3d/prior")
drawn = draw(prior, Drawing(evaluations=24), seeds=range(8))      # drawn.x (8, 1, z, y, x)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from companion.data.nifti import save_nifti
from companion.diffusion.denoisers import DiscreteDenoiser
from companion.diffusion.noise import DiscreteSchedule, karras
from companion.diffusion.sampling import Bill, find_solver, sample
from companion.diffusion.solvers import SOLVERS
from companion.evaluation import metrics, population
from companion.evaluation.segmenter import load_segmenter
from companion.models.latent import PRIOR, LatentPrior
from companion.papers.latent3d.data import TrainingSet, unseen
from companion.parameters import Parameters, param

HELD_OUT = "held out"  # people whom the prior never saw, in tables and figures
STOCHASTIC = ("ddpm", "dpmpp_2m_sde", "heun_churn", "aid_stochastic")


@dataclass(frozen=True)
class Drawing:
    """The part of a form that says how latents are drawn."""

    solver: str = param("dpmpp_2m", "any of companion.diffusion.SOLVERS", choices=tuple(SOLVERS))
    evaluations: int = param(24, "network evaluations a volume", minimum=2)
    levels: str = param(
        "karras",
        "noise levels: karras, or schedule, the betas of a discrete chain of 1000 steps, respaced",
        choices=("karras", "schedule"),
    )
    first_sigma: float = param(80.0, "highest noise level (karras); latents have standard deviation 1", minimum=1e-3)
    last_sigma: float = param(0.02, "lowest noise level above 0 (karras)", minimum=1e-5)

    def noise_levels(self, prior: LatentPrior, solver: str | None = None) -> Tensor:
        """Noise levels for about `evaluations` evaluations, whatever a step of the solver costs.

        "schedule" respaces the chain of 1000 betas: fewer times, betas recomputed from the signal left at each of them,
        so that one step removes the noise of all the steps it stands for.
        """
        steps = max(1, self.evaluations // find_solver(solver or self.solver).calls)
        if self.levels == "karras":
            return karras(steps, self.last_sigma, self.first_sigma)
        return chain(prior).respace(str(steps)).levels()


@dataclass(frozen=True)
class SampleVolumes(Drawing, Parameters):
    """Parameters of latent3d/3_sample.ipynb."""

    weights: str = param(PRIOR, "prior on latents: an embedded name or a folder")
    autoencoder: str | None = param(None, "its autoencoder; none: the one that the prior names")
    draws: int = param(16, "volumes to draw", minimum=2)
    solvers: tuple[str, ...] = param(
        ("ddpm", "ddim", "dpmpp_2m", "heun"), "samplers to compare at equal evaluations", choices=tuple(SOLVERS)
    )
    failures: bool = param(True, "show what went wrong in the original, one cause at a time")
    held_out: int = param(32, "held-out people to compare with", minimum=4)
    training: int = param(2000, "training people among whom the nearest is looked for, at most", minimum=1)
    data: str = param("data/latent3d_64.h5", "prepared training volumes, from 1_data; missing: people are made anew")
    pairs: int = param(60, "pairs of volumes for MS-SSIM", minimum=1)
    features: str = param("brain/t1w", "network whose view of slices the Frechet distance compares")
    slices: int = param(16, "slices of a volume that it sees in each plane", minimum=2)
    segmenter: str | None = param("segmenter/t1w", "segmenter of T1w slices; none: no tissue volumes")
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))


# ------------------------------------------------------------------------------------------------------------- drawing


def chain(prior: LatentPrior, steps: int = 1000) -> DiscreteSchedule:
    """The discrete chain of the prior, or the linear one of Ho et al. 2020 if it was trained at all levels."""
    return prior.D.D.schedule if isinstance(prior.D.D, DiscreteDenoiser) else DiscreteSchedule.linear(steps)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Latents z (draw, *latent_shape), their volumes x (draw, 1, z, y, x), and what one volume cost, decoding too."""

    z: Tensor
    x: Tensor
    bill: Bill


def draw(
    prior: LatentPrior, how: Drawing, seeds: Sequence[int], solver: str | None = None, progress: bool = False
) -> Drawn:
    """A volume for each seed, each the same alone or in any batch."""
    began = time.perf_counter()
    drawn = sample(
        prior.D,
        how.noise_levels(prior, solver),
        shape=prior.latent_shape,
        seeds=seeds,
        solver=solver or how.solver,
        device=prior.device,
        progress=progress,
    )
    x = prior.decode(drawn.x)
    return Drawn(drawn.x, x, replace(drawn.bill, seconds=(time.perf_counter() - began) / len(seeds)))


def solver_table(
    prior: LatentPrior, how: Drawing, solvers: Sequence[str], seeds: Sequence[int]
) -> tuple[list[dict], dict[str, Tensor]]:
    """What each sampler makes of the same noise at equal cost, and its volumes.

    Deterministic samplers follow one flow, so they should all end where Heun ends with four times the evaluations; the
    distance of their latents from there, relative, is the error of the sampler. DDPM draws another volume.
    """
    limit = draw(prior, replace(how, evaluations=4 * how.evaluations), seeds, "heun").z
    rows, volumes = [], {}
    for name in solvers:
        d = draw(prior, how, seeds, name)
        away = (d.z - limit).flatten(1).norm(dim=1) / limit.flatten(1).norm(dim=1)
        rows.append(
            {
                "sampler": name,
                "evaluations": round(d.bill.denoiser_calls, 1),
                "seconds a volume": round(d.bill.seconds, 2),
                "from the limit": "stochastic" if name in STOCHASTIC else metrics.mean_and_error(away),
            }
        )
        volumes[name] = d.x
    return rows, volumes


def save_volumes(folder: Path, prior: LatentPrior, x: Tensor) -> list[Path]:
    """The NIfTI files sample_00.nii.gz, ... of volumes (draw, 1, z, y, x), at the prior's affine (MNI mm)."""
    return [
        save_nifti(
            folder / f"sample_{i:02d}.nii.gz",
            volume[0].float().cpu().numpy(),
            affine=prior.affine,
            units="1 is the 99.5th percentile of a brain",
        )
        for i, volume in enumerate(x)
    ]


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, eq=False)
class Study:
    """Held-out, reconstructed and synthetic volumes (n, 1, z, y, x), and the tables that compare them."""

    others: Tensor  # held-out people that are not the reference
    reconstructed: Tensor  # the same, through the autoencoder
    synthetic: Tensor
    likeness: list[dict]
    diversity: list[dict]
    memory: list[dict]
    tissue: list[dict]
    neighbours: dict[str, Tensor]  # the sample that is nearest to a training volume, and that volume
    tissue_ml: dict[str, Tensor]
    searched: str  # among whom the nearest was looked for
    searched_all: bool  # whether these are all volumes that the prior learned from


@torch.no_grad()
def study(p: SampleVolumes, prior: LatentPrior, synthetic: Tensor) -> Study:
    """How synthetic volumes compare with held-out people, and with the same people through the autoencoder.

    What the autoencoder loses is lost for the prior too; only what is worse than the reconstructions is its fault.
    """
    held_out = unseen(prior, p.data, "test", p.held_out).to(p.device)
    half = len(held_out) // 2
    reference, others = held_out[:half], held_out[half:]
    every = prior.decode(prior.encode(held_out)).clamp(min=0)
    through, synthetic = every[half:], synthetic.clamp(min=0)
    sets = {"other people": others, "other people, reconstructed": through, "synthetic": synthetic}
    features = population.load_features(p.features, p.device, p.autocast)
    likeness = population.likeness_table(features, reference, sets, p.slices)
    whole = {HELD_OUT: held_out, "other people, reconstructed": through, "synthetic": synthetic}
    diversity = population.diversity_table(whole, p.pairs, p.seed)
    trained = TrainingSet.of(prior, p.data, p.training)
    groups = {"people": held_out, "people, reconstructed": every, "synthetic": synthetic}
    memory, near = population.memory_table(groups, trained.batches(), trained.count)
    closest = near["synthetic"].distance.argmin().item()
    neighbours = {
        "sample": synthetic[closest],
        "nearest training volume": trained[near["synthetic"].index[closest].item()],
    }
    tissue_ml, tissue = {}, []
    if p.segmenter:
        segmenter = load_segmenter(p.segmenter, "T1w", p.device)
        tissue_ml = {name: population.tissue_volumes(x, segmenter, prior.voxel_mm).cpu() for name, x in whole.items()}
        tissue = population.tissue_table(tissue_ml, HELD_OUT)
    seen = trained.what, trained.own
    return Study(others, through, synthetic, likeness, diversity, memory, tissue, neighbours, tissue_ml, *seen)


def tissue_curves(s: Study) -> dict[str, tuple[list, list]]:
    """Lines (ml, share of volumes with less) of each tissue, held out and synthetic."""
    lines = {}
    for i, tissue in enumerate(population.TISSUES):
        for name in (HELD_OUT, "synthetic"):
            ml = s.tissue_ml[name][:, i].sort().values
            lines[f"{tissue}, {name}"] = (ml.tolist(), ((torch.arange(len(ml)) + 0.5) / len(ml)).tolist())
    return lines


def verdict(s: Study) -> list[dict[str, object]]:
    """What a good generator of volumes should pass, with the numbers that decide."""
    people, synthetic = s.diversity[0]["MS-SSIM"], s.diversity[-1]["MS-SSIM"]
    held, own = s.memory[1], s.memory[-1]
    rows = [
        {
            "question": "as diverse as people?",
            "asked": "MS-SSIM of pairs within 0.05 of pairs of people",
            "found": f"{synthetic:.3f}, people {people:.3f}",
            "passes": abs(synthetic - people) <= 0.05,
        },
        {
            "question": "nobody memorised?",
            "asked": "no sample nearer to a training volume than held-out people are",
            "found": f"{own['smallest']:.3f}, held out, reconstructed {held['smallest']:.3f}; searched {s.searched}"
            + ("" if s.searched_all else ", NOT all that the prior learned from: no answer"),
            "passes": s.searched_all and own["smallest"] >= held["smallest"],
        },
    ]
    symmetry, people_symmetry = population.left_right(s.synthetic), population.left_right(s.reconstructed)
    rows.append(
        {
            "question": "two hemispheres alike?",
            "asked": "correlation with the mirror image as in people, ± 2 standard deviations",
            "found": f"{symmetry.mean():.3f}, least {symmetry.min():.3f}; people, reconstructed "
            f"{people_symmetry.mean():.3f}, least {people_symmetry.min():.3f}",
            "passes": bool((symmetry.mean() - people_symmetry.mean()).abs() <= 2 * people_symmetry.std()),
        }
    )
    if s.tissue_ml:
        share = population.tissue_fractions(s.tissue_ml["synthetic"]).mean(0)
        people_share = population.tissue_fractions(s.tissue_ml[HELD_OUT]).mean(0)
        ratio = (share / people_share).tolist()
        rows.append(
            {
                "question": "the right tissue?",
                "asked": "shares within 10 % of the means of people",
                "found": ", ".join(f"{t} {r:.3f} x" for t, r in zip(population.TISSUES, ratio, strict=True)),
                "passes": all(abs(r - 1) <= 0.1 for r in ratio),
            }
        )
    return rows
