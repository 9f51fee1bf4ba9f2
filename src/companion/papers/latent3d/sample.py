"""Volumes drawn from the latent prior: samplers, what the original did wrong, and how good the volumes are.

Parameters and assembling functions of notebooks/latent3d/3_sample; measures of a population are in
`companion.evaluation.population`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from companion.data import anatomy
from companion.data.nifti import save_nifti
from companion.data.store import Prepared, SequenceDataset, open_dataset
from companion.data.volumes import virtual
from companion.diffusion.denoisers import DiscreteDenoiser
from companion.diffusion.latent import LatentSpace
from companion.diffusion.noise import DiscreteSchedule, karras
from companion.diffusion.sampling import Bill, find_solver, sample
from companion.diffusion.solvers import SOLVERS
from companion.evaluation import metrics
from companion.evaluation import population as generative
from companion.evaluation.segmenter import load_segmenter
from companion.files import project_root
from companion.papers.latent3d.autoencoder import PRIOR
from companion.papers.latent3d.data import held_out, planes
from companion.papers.latent3d.prior import LatentPrior
from companion.parameters import Parameters, param
from companion.randomness import generators, randn

SMALL_LATENTS = 0.05  # the original's codebook began within so much of 0


@dataclass(frozen=True)
class SampleVolumes(Parameters):
    """Parameters of latent3d/3_sample.ipynb."""

    weights: str = param(PRIOR, "prior on latents: an embedded name or a folder")
    autoencoder: str | None = param(None, "its autoencoder; none: the one that the prior names")
    draws: int = param(16, "volumes to draw", minimum=2)
    solver: str = param("dpmpp_2m", "any of companion.diffusion.SOLVERS", choices=tuple(SOLVERS))
    evaluations: int = param(24, "network evaluations a volume", minimum=2)
    levels: str = param(
        "karras",
        "noise levels: karras, or schedule, the betas of a discrete chain of 1000 steps, respaced",
        choices=("karras", "schedule"),
    )
    first_sigma: float = param(80.0, "highest noise level (karras); latents have standard deviation 1", minimum=1e-3)
    last_sigma: float = param(0.02, "lowest noise level above 0 (karras)", minimum=1e-5)
    solvers: tuple[str, ...] = param(
        ("ddpm", "ddim", "dpmpp_2m", "heun"), "samplers to compare at equal evaluations", choices=tuple(SOLVERS)
    )
    failures: bool = param(True, "show what went wrong in the original, one cause at a time")
    real: int = param(32, "held-out people to compare with", minimum=4)
    training: int = param(2000, "training people among whom the nearest is looked for, at most", minimum=1)
    data: str = param("data/latent3d_64.h5", "prepared training volumes, from 1_data; missing: people are made anew")
    pairs: int = param(60, "pairs of volumes for MS-SSIM", minimum=1)
    features: str = param("brain/t1w", "network whose view of slices the Frechet distance compares")
    slices: int = param(16, "slices of a volume that it sees in each plane", minimum=2)
    segmenter: str | None = param("segmenter/t1w", "segmenter of T1w slices; none: no tissue volumes")
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))


# -------------------------------------------------------------------------------------------------------------- people


def people(prior: LatentPrior, data: str, split: str, count: int) -> Tensor:
    """Return volumes (person, 1, z, y, x) of people the prior never saw, on its grid: of the prepared file `data`.

    Without that file, of the embedded cohort. Raises ValueError for a file on another grid.
    """
    path = project_root() / data
    if not path.exists():
        return torch.stack([virtual(one, prior.shape).image[None] for one in anatomy.cohort(split, count)])
    prepared = open_dataset(path, require=["image"])
    check_grid(prepared, prior)
    return held_out(prepared, split, count)


def check_grid(prepared: Prepared, prior: LatentPrior) -> None:
    """Raise ValueError unless prepared volumes lie on the grid that the prior was trained on."""
    shape = tuple(prepared.shapes["image"][-3:])
    if shape != prior.shape:
        raise ValueError(
            f"{prepared.path} holds volumes of {shape} voxels, the prior was trained on {prior.shape}; "
            "give its own data, or a name that does not exist to draw the embedded cohort anew"
        )


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The first `count` volumes (1, z, y, x) that a prior learned from: read from a prepared file, or made anew."""

    count: int
    shape: tuple[int, int, int]
    stored: SequenceDataset | None

    @classmethod
    def of(cls, prior: LatentPrior, p: SampleVolumes) -> TrainingSet:
        path, stored = project_root() / p.data, None
        if path.exists():
            prepared = open_dataset(path, require=["image"])
            check_grid(prepared, prior)
            stored = prepared.sequences("image", "train", 1)
        known = prior.config["data"]["volumes"] if stored is None else len(stored)
        return cls(min(p.training, known), prior.shape, stored)

    def __getitem__(self, i: int) -> Tensor:
        if self.stored is not None:
            return self.stored[i].reshape(1, *self.shape).float()
        return virtual(anatomy.Subject(anatomy.FIRST_SEED["train"] + i), self.shape).image[None]

    def batches(self, size: int = 50) -> Iterator[Tensor]:
        """Yield all of them, (batch, 1, z, y, x)."""
        for i in range(0, self.count, size):
            yield torch.stack([self[j] for j in range(i, min(i + size, self.count))])


# ------------------------------------------------------------------------------------------------------------ sampling


def noise_levels(prior: LatentPrior, p: SampleVolumes, solver: str | None = None) -> Tensor:
    """Return noise levels for about `p.evaluations` evaluations, whatever a step of the solver costs.

    "schedule" respaces the chain of 1000 betas: fewer times, betas recomputed from the signal left at each of them, so
    that one step removes the noise of all the steps it stands for.
    """
    steps = max(1, p.evaluations // find_solver(solver or p.solver).calls)
    if p.levels == "karras":
        return karras(steps, p.last_sigma, p.first_sigma)
    return chain(prior).respace(str(steps)).levels()


def chain(prior: LatentPrior, steps: int = 1000) -> DiscreteSchedule:
    """Return the discrete chain of the prior, or the linear one of Ho et al. 2020 if it was trained at all levels."""
    return prior.D.D.schedule if isinstance(prior.D.D, DiscreteDenoiser) else DiscreteSchedule.linear(steps)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Latents z (draw, *latent_shape), their volumes x (draw, 1, z, y, x), and what one volume cost, decoding too."""

    z: Tensor
    x: Tensor
    bill: Bill


def draw(prior: LatentPrior, p: SampleVolumes, solver: str | None = None, progress: bool = False) -> Drawn:
    """Return `p.draws` volumes with the seeds p.seed, p.seed + 1, ..., each the same alone or in any batch."""
    began, seeds = time.perf_counter(), range(p.seed, p.seed + p.draws)
    drawn = sample(
        prior.D,
        noise_levels(prior, p, solver),
        shape=prior.latent_shape,
        seeds=seeds,
        solver=solver or p.solver,
        device=p.device,
        progress=progress,
    )
    x = prior.decode(drawn.x)
    return Drawn(drawn.x, x, replace(drawn.bill, seconds=(time.perf_counter() - began) / p.draws))


def solver_table(prior: LatentPrior, p: SampleVolumes, draws: int = 4) -> tuple[list[dict], dict[str, Tensor]]:
    """Return what each sampler of `p.solvers` makes of the same noise at equal cost, and its volumes.

    Deterministic samplers follow one flow, so they should all end where Heun ends with four times the evaluations; the
    distance of their latents from there, relative, is the error of the sampler. DDPM draws another volume.
    """
    few = replace(p, draws=min(draws, p.draws))
    limit = draw(prior, replace(few, evaluations=4 * p.evaluations), "heun").z
    rows, volumes = [], {}
    for name in p.solvers:
        d = draw(prior, few, name)
        away = (d.z - limit).flatten(1).norm(dim=1) / limit.flatten(1).norm(dim=1)
        rows.append(
            {
                "sampler": name,
                "evaluations": round(d.bill.denoiser_calls, 1),
                "seconds a volume": round(d.bill.seconds, 2),
                "from the limit": "stochastic"
                if name in ("ddpm", "dpmpp_2m_sde", "heun_churn", "aid_stochastic")
                else metrics.mean_and_error(away),
            }
        )
        volumes[name] = d.x
    return rows, volumes


# ------------------------------------------------------------------------------------------ what the original did wrong


class Clipped(torch.nn.Module):
    """A denoiser whose estimate is clipped to [-1, 1] in the units of the autoencoder, as image samplers do."""

    def __init__(self, prior: LatentPrior):
        super().__init__()
        self.D = prior.D

    def forward(self, z: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        space = self.D.space
        mean, std = (v.reshape(-1, *[1] * (z.ndim - 2)) for v in (space.mean, space.std))
        return ((self.D(z, sigma, cond) * std + mean).clamp(-1, 1) - mean) / std


@torch.no_grad()
def short_steps(prior: LatentPrior, schedule: DiscreteSchedule, visited: int, seeds, device: str = "cpu") -> Tensor:
    """Return latents of a chain that evaluates `visited` of its times, but whose every step removes one time's noise.

    From t to t - 1, and then on at t - T / visited as if it were there: the step of published schedulers that do not
    know that times are skipped.
    """
    draws = generators(seeds)
    x = randn(prior.latent_shape, torch.float32, draws, device)
    abar = schedule.alphas_cumprod
    for t in range(len(schedule) - 1, -1, -(len(schedule) // visited)):
        at = torch.full((len(x),), t)
        sigma = schedule.sigmas[t].to(device, torch.float32).expand(len(x))
        x0_hat = prior.D(x / abar[t].sqrt().item(), sigma)
        mean, variance, _ = schedule.q_posterior(x0_hat, x, at)
        x = mean + variance.sqrt() * randn(prior.latent_shape, torch.float32, draws, device)
    return x


@torch.no_grad()
def failures(prior: LatentPrior, p: SampleVolumes) -> dict[str, Tensor]:
    """Return volumes (draw, 1, z, y, x) of this prior with one mistake of the original at a time, first without any.

    All from the same seeds, by DDPM with about `p.evaluations` evaluations.
    """
    seeds, schedule = range(p.seed, p.seed + 2), DiscreteSchedule.linear(1000)
    options = dict(shape=prior.latent_shape, seeds=seeds, device=p.device, solver="ddpm")
    levels = schedule.respace(str(p.evaluations)).levels()
    good = sample(prior.D, levels, **options).x
    clipped = sample(Clipped(prior), levels, **options).x
    noise = randn(prior.latent_shape, torch.float32, generators(seeds), p.device)
    # T = 200 with the betas of 1000 ends with 36 % of the signal's amplitude, yet sampling begins with noise alone
    early = DiscreteSchedule.linear(200)
    first = noise / early.alphas_cumprod[-1].sqrt().item()
    started = sample(prior.D, early.respace(str(p.evaluations)).levels(), state=first, **options).x
    # our autoencoder, but for a factor that makes its latents as small as the original's, used without that factor
    small = SMALL_LATENTS / prior.space.std.mean()
    unscaled = LatentSpace(prior.space.codec, std=1 / small, intensity=prior.space.intensity)
    return {
        "repaired": prior.decode(good),
        "scale not\nundone": unscaled.decode(good),
        "clipped to\n[-1, 1]": prior.decode(clipped),
        "steps of one\ntime only": prior.decode(short_steps(prior, schedule, p.evaluations, seeds, p.device)),
        "36 % signal\nat the start": prior.decode(started),
        "nothing but\nscale learnt": prior.decode(noise),
    }


@torch.no_grad()
def unexplained(prior: LatentPrior, z: Tensor, sigmas: Tensor) -> Tensor:
    """Return E|D(z + sigma n) - z|^2 over that of the best white network, sigma^2 / (1 + sigma^2), for each level.

    1: the prior knows no more of the latents z (batch, *latent_shape) than that their standard deviation is 1.
    """
    noise = randn(z.shape[1:], z.dtype, generators(range(len(z))), z.device)
    errors = []
    for sigma in sigmas.tolist():
        level = torch.full((len(z),), sigma, device=z.device)
        errors.append((prior.D(z + sigma * noise, level) - z).square().mean().item())
    return torch.tensor(errors, dtype=torch.float64) * (1 + sigmas**2) / sigmas**2


def loss_against_scale(
    prior: LatentPrior, z: Tensor, scales=(1.0, 0.3, 0.1, 0.03), steps: int = 500, levels: int = 12
) -> list[dict[str, object]]:
    """Return the epsilon loss, averaged over the times of the original chain, of latents z scaled to a deviation s.

    Of a network that knows the scale of the latents and nothing else (exact: s^2 abar / (s^2 abar + 1 - abar) for white
    Gaussian latents), and of this prior, whose estimate s D(z + sigma n / s, sigma / s) suits any s: the same times the
    share that `unexplained` measures, interpolated between noise levels.
    """
    schedule = DiscreteSchedule.linear(steps)
    abar = schedule.alphas_cumprod
    sigmas = torch.logspace(-2, 2, levels, dtype=torch.float64)
    share, rows = unexplained(prior, z, sigmas), []
    for s in scales:
        only_scale = s**2 * abar / (s**2 * abar + 1 - abar)
        at = np.interp((schedule.sigmas / s).log().numpy(), sigmas.log().numpy(), share.numpy())
        losses = only_scale.mean().item(), (only_scale * torch.from_numpy(at)).mean().item()
        rows.append(
            {
                "standard deviation": s,
                "loss that knows only the scale": f"{losses[0]:.4f}",
                "loss of this prior": f"{losses[1]:.4f}",
                "left to learn": f"{losses[0] - losses[1]:.4f}",
            }
        )
    return rows


# ------------------------------------------------------------------------------------------------------------- looking


def by_plane(volumes: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return rows for `figures.image_grid`: a row for each plane, a column for each named volume (1, z, y, x)."""
    shown = {name: planes(x) for name, x in volumes.items()}
    return {plane: {name: images[plane] for name, images in shown.items()} for plane in next(iter(shown.values()))}


def sheet(volumes: Tensor, columns: int = 8) -> dict[str, dict[str, Tensor]]:
    """Return rows for `figures.image_grid`: volumes (draw, 1, z, y, x) in three planes, many in several blocks."""
    rows = {}
    for start in range(0, len(volumes), columns):
        part = [planes(x) for x in volumes[start : start + columns]]
        blank = {plane: torch.full_like(image, torch.nan) for plane, image in part[0].items()}
        part += [blank] * (columns - len(part) if len(volumes) > columns else 0)
        label = f"{start + 1}-{start + columns}\n" if len(volumes) > columns else ""
        for plane in part[0]:
            rows[label + plane] = {str(i + 1): images[plane] for i, images in enumerate(part)}
    return rows


def save_volumes(folder: Path, prior: LatentPrior, x: Tensor) -> list[Path]:
    """Return the NIfTI files sample_00.nii.gz, ... of volumes (draw, 1, z, y, x), at the prior's affine (MNI mm)."""
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
    """Real, reconstructed and synthetic volumes (n, 1, z, y, x), and the tables that compare them."""

    others: Tensor  # held-out people that are not the reference
    reconstructed: Tensor  # the same, through the autoencoder
    synthetic: Tensor
    likeness: list[dict]
    diversity: list[dict]
    memory: list[dict]
    tissue: list[dict]
    neighbours: dict[str, Tensor]  # the sample that is nearest to a training volume, and that volume
    tissue_ml: dict[str, Tensor]


@torch.no_grad()
def study(prior: LatentPrior, synthetic: Tensor, p: SampleVolumes) -> Study:
    """Return how synthetic volumes compare with held-out people, and with the same people through the autoencoder.

    What the autoencoder loses is lost for the prior too; only what is worse than the reconstructions is its fault.
    """
    real = people(prior, p.data, "test", p.real).to(p.device)
    half = len(real) // 2
    reference, others = real[:half], real[half:]
    every = prior.decode(prior.encode(real)).clamp(min=0)
    through = every[half:]
    synthetic = synthetic.clamp(min=0)
    sets = {"other people": others, "other people, reconstructed": through, "synthetic": synthetic}
    features = generative.load_features(p.features, p.device, p.autocast)
    likeness = generative.likeness_table(features, reference, sets, p.slices)
    diversity = []
    for name, x in {"real": real, "other people, reconstructed": through, "synthetic": synthetic}.items():
        values = generative.pairwise_ms_ssim(x, p.pairs, p.seed)
        diversity.append(
            {
                "volumes": name,
                "pairs": len(values),
                "MS-SSIM": values.mean().item(),
                "standard deviation": values.std().item() if len(values) > 1 else 0.0,
            }
        )
    groups = {"people": real, "people, reconstructed": every, "synthetic": synthetic}
    together = torch.cat(list(groups.values()))
    trained = TrainingSet.of(prior, p)
    near = generative.nearest(together, trained.batches())
    memory, at = [], 0
    for name, x in groups.items():
        d = near.distance[at : at + len(x)]
        memory.append(
            {
                "volumes": name,
                "n": len(x),
                "training volumes": trained.count,
                "to the nearest": d.mean().item(),
                "standard deviation": d.std().item(),
                "smallest": d.min().item(),
            }
        )
        at += len(x)
    closest = near.distance[-len(synthetic) :].argmin().item()
    number = near.index[len(together) - len(synthetic) + closest].item()
    neighbours = {"sample": synthetic[closest], "nearest training volume": trained[number]}
    tissue_ml, tissue = {}, []
    if p.segmenter:
        segmenter = load_segmenter(p.segmenter, "T1w", p.device)
        tissue_ml = {
            name: generative.tissue_volumes(x, segmenter, prior.voxel_mm).cpu()
            for name, x in ({"real": real} | sets).items()
            if name != "other people"
        }
        tissue = generative.tissue_table(tissue_ml, "real")
    return Study(others, through, synthetic, likeness, diversity, memory, tissue, neighbours, tissue_ml)


def tissue_curves(s: Study) -> dict[str, tuple[list, list]]:
    """Return lines (ml, share of volumes with less) of each tissue in real and synthetic volumes."""
    lines = {}
    for i, tissue in enumerate(generative.TISSUES):
        for name in ("real", "synthetic"):
            ml = s.tissue_ml[name][:, i].sort().values
            lines[f"{tissue}, {name}"] = (ml.tolist(), ((torch.arange(len(ml)) + 0.5) / len(ml)).tolist())
    return lines


def verdict(s: Study) -> list[dict[str, object]]:
    """Return what a good generator of volumes should pass, with the numbers that decide."""
    real, synthetic = s.diversity[0]["MS-SSIM"], s.diversity[-1]["MS-SSIM"]
    held, own = s.memory[1], s.memory[-1]
    rows = [
        {
            "question": "as diverse as real people?",
            "asked": "MS-SSIM of pairs within 0.05 of real pairs",
            "found": f"{synthetic:.3f}, real {real:.3f}",
            "passes": abs(synthetic - real) <= 0.05,
        },
        {
            "question": "nobody memorised?",
            "asked": "no sample nearer to a training volume than held-out people are",
            "found": f"{own['smallest']:.3f}, held out, reconstructed {held['smallest']:.3f}",
            "passes": own["smallest"] >= held["smallest"],
        },
    ]
    symmetry, people_symmetry = generative.left_right(s.synthetic), generative.left_right(s.reconstructed)
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
        share = generative.tissue_fractions(s.tissue_ml["synthetic"]).mean(0)
        real_share = generative.tissue_fractions(s.tissue_ml["real"]).mean(0)
        ratio = (share / real_share).tolist()
        rows.append(
            {
                "question": "the right tissue?",
                "asked": "shares within 10 % of the real means",
                "found": ", ".join(f"{t} {r:.3f} x" for t, r in zip(generative.TISSUES, ratio, strict=True)),
                "passes": all(abs(r - 1) <= 0.1 for r in ratio),
            }
        )
    return rows
