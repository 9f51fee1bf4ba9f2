"""Volumes drawn from a latent prior, by any sampler."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from companion.data.nifti import save_nifti
from companion.diffusion.denoisers import DiscreteDenoiser
from companion.diffusion.noise import DiscreteSchedule, karras
from companion.diffusion.sampling import Bill, find_solver, sample
from companion.diffusion.solvers import SOLVERS
from companion.models.latent import LatentPrior
from companion.parameters import param


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
