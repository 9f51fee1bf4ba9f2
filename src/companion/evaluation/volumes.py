"""Volumes through an autoencoder or drawn anew, beside people: what is lost, and what a generator should pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from companion.evaluation import metrics, population
from companion.evaluation.tables import average
from companion.models.latent import LatentPrior
from companion.models.latent_draws import Drawing, draw
from companion.networks.codec import Codec


@torch.no_grad()
def reconstruct(codec: Codec, x: Tensor, batch: int = 4) -> Tensor:
    """What an autoencoder makes of volumes (batch, 1, z, y, x): codes if it has them, else means, decoded."""
    parts = []
    for part in x.split(batch):
        z = codec.encode(part)
        parts.append(codec.decode(cast(Any, codec).quantize(z).z_q if hasattr(codec, "quantize") else z))
    return torch.cat(parts)


def reconstruction_figures(x_hat: Tensor, x: Tensor) -> dict[str, tuple[float, float] | float]:
    """L1, PSNR, SSIM and MS-SSIM of reconstructions, mean and standard error over volumes; peak signal 1.

    Of one volume the values alone.
    "brain": over voxels above 0 only, where the background cannot flatter.
    """
    brain = x > 0
    figures = {
        "L1 (brain)": torch.where(brain, (x_hat - x).abs(), 0).flatten(1).sum(1) / brain.flatten(1).sum(1),
        "PSNR (dB)": metrics.psnr(x_hat, x, 1.0),
        "PSNR (brain, dB)": metrics.psnr(x_hat, x, 1.0, brain),
        "SSIM": metrics.ssim(x_hat, x, 1.0),
        "SSIM (brain)": metrics.ssim(x_hat, x, 1.0, brain),
        "MS-SSIM": metrics.ms_ssim(x_hat, x, 1.0),
    }
    return {name: average(values) for name, values in figures.items()}


HELD_OUT = "held out"  # people whom the prior never saw, in tables and figures
STOCHASTIC = ("ddpm", "dpmpp_2m_sde", "heun_churn", "aid_stochastic")


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


@dataclass(frozen=True, eq=False)
class Study:
    """Held-out, reconstructed and synthetic volumes (n, 1, z, y, x), and the tables that compare them."""

    others: Tensor  # held-out people that are not the reference
    reconstructed: Tensor  # the same, through the autoencoder
    synthetic: Tensor
    likeness: list[dict]
    diversity: list[dict]
    memory: list[dict]
    copied: list[dict]  # by a detector of copies in disguise
    tissue: list[dict]
    neighbours: dict[str, Tensor]  # the sample that is nearest to a training volume, and that volume
    tissue_ml: dict[str, Tensor]
    searched: str  # among whom the nearest was looked for
    searched_all: bool  # whether these are all volumes that the prior learned from


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
    _, novel, drawn, planted = s.copied
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
        {
            "question": "nobody copied in disguise?",
            "asked": "no sample more like a training person than held-out people are; 95 % of planted copies found",
            "found": f"{drawn['largest']:.3f}, held out, reconstructed {novel['largest']:.3f}; {planted['copies']} of "
            f"{planted['n']} found" + ("" if s.searched_all else "; NOT all were searched: no answer"),
            "passes": s.searched_all
            and drawn["largest"] <= novel["largest"]
            and planted["copies"] >= 0.95 * planted["n"],
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
