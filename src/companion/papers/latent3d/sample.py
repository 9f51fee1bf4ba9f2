"""Volumes drawn from the latent prior, and how good they are beside people it never saw.

prior = load_latent("latent3d/prior")
drawn = draw(prior, Drawing(evaluations=24), seeds=range(8))      # drawn.x (8, 1, z, y, x)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from companion.diffusion.solvers import SOLVERS
from companion.evaluation import copies, population
from companion.evaluation.known_people import TrainingSet, unseen
from companion.evaluation.segmenter import load_segmenter
from companion.evaluation.volumes import HELD_OUT, Study
from companion.models.latent import PRIOR, LatentPrior
from companion.models.latent_draws import Drawing
from companion.parameters import Parameters, param


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
    planted: int = param(48, "of them, disguised, whom the detector of copies has to find", minimum=1)
    data: str = param("data/latent3d_64.h5", "prepared training volumes, from 1_data; missing: people are made anew")
    pairs: int = param(60, "pairs of volumes for MS-SSIM", minimum=1)
    features: str = param("brain/t1w", "network whose view of slices the Frechet distance compares")
    slices: int = param(16, "slices of a volume that it sees in each plane", minimum=2)
    segmenter: str | None = param("segmenter/t1w", "segmenter of T1w slices; none: no tissue volumes")
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))


@torch.no_grad()
def study(p: SampleVolumes, prior: LatentPrior, synthetic: Tensor) -> Study:
    """How synthetic volumes compare with held-out people, and with the same people through the autoencoder.

    What the autoencoder loses is lost for the prior too; only what is worse than the reconstructions is its fault.
    """
    held_out = unseen(prior, p.data, "test", p.held_out).to(p.device)
    if len(held_out) < 4:
        raise ValueError(
            f"{p.data} holds {len(held_out)} people that the prior never saw; at least 4 are needed, in two halves, to "
            "compare with: give more people, or a name that does not exist to compare with virtual ones"
        )
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
    known: list[Tensor] = []  # for the detector of copies: people who are made anew are made once

    def batches():
        for batch in trained.batches():
            known.append(copies.coarse(batch))
            yield batch

    memory, near = population.memory_table(groups, batches(), trained.count)
    closest = int(near["synthetic"].distance.argmin())
    neighbours = {
        "sample": synthetic[closest],
        "nearest training volume": trained[int(near["synthetic"].index[closest])],
    }
    g = torch.Generator().manual_seed(p.seed)
    who = torch.randperm(trained.count, generator=g)[: p.planted]
    planted = copies.disguised(torch.stack([trained[i] for i in who.tolist()]), g).to(p.device)
    planted = prior.decode(prior.encode(planted)).clamp(min=0)
    copied = copies.table(copies.CopyDetector.of(known), groups, "people, reconstructed", planted, who)
    tissue_ml, tissue = {}, []
    if p.segmenter:
        segmenter = load_segmenter(p.segmenter, "T1w", p.device)
        tissue_ml = {name: population.tissue_volumes(x, segmenter, prior.voxel_mm).cpu() for name, x in whole.items()}
        tissue = population.tissue_table(tissue_ml, HELD_OUT)
    seen = trained.what, trained.own
    return Study(others, through, synthetic, likeness, diversity, memory, copied, tissue, neighbours, tissue_ml, *seen)
