"""Which sampler to trust with the counts: eight on one trained prior, at the published low dose.

    python benchmarks/pet_samplers.py --out runs/benchmarks/pet_samplers

Held-out people of `pet/4_enhance`, one slice each with a lesion, the same scans and seeds for every sampler.
Columns: network evaluations a draw (a gradient through D counts as one more); NRMSE of the mean of the draws and the
contrast of the lesion that is in it, mean and standard error over people; calibration, the variance of draws over the
squared error of their mean; CPU seconds a draw on one thread.
Writes table.md, table.csv and results.json into --out, whole or not at all.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from pet_projector import write
from torch import Tensor

from companion.acquisition.pet import Scan
from companion.data.pet import Slices
from companion.diffusion.noise import karras
from companion.diffusion.poisson import em_steps, poisson_dps, poisson_gibbs, poisson_mean, poisson_pigdm
from companion.diffusion.sampling import sample
from companion.evaluation import metrics
from companion.evaluation.activity import score
from companion.evaluation.doses import mean_and_error
from companion.evaluation.tables import markdown
from companion.papers.pet.study import Enhance, prepare
from companion.reconstruction.activity import FIRST_SIGMA, LAST_GUIDED, Prior


def samplers(prior: Prior, scan: Scan, last: float, seeds: list[int]) -> dict:
    """Each sampler by name: returns draws and the bill. `last`: noise level, in network units, where the sweeps end."""
    A, y, b = prior.scale_kbq * scan.A, scan.y, {"background": scan.background}
    exact = poisson_mean(A, y, **b, covariance=prior.error, iterations=30, tol=1e-4)

    def sweeps(tails: float | None):
        return poisson_gibbs(prior.D, exact, karras(25, last, FIRST_SIGMA), seeds=seeds, tails=tails)

    def guided(G, calls: int):
        levels = karras(calls // G.denoiser_calls, LAST_GUIDED, FIRST_SIGMA)
        return sample(G(prior.D), levels, shape=tuple(A.domain_shape), seeds=seeds, solver="dpmpp_2m")

    return {
        "poisson_gibbs": lambda: sweeps(8.0),
        "poisson_gibbs without heavy tails": lambda: sweeps(None),
        "em_steps (PET-DDS), 20 steps, trust 3": lambda: guided(em_steps(A, y, **b, iterations=20, trust=3.0), 25),
        "em_steps, 5 steps, trust 1": lambda: guided(em_steps(A, y, **b, iterations=5, trust=1.0), 25),
        "poisson_mean": lambda: guided(exact, 25),
        "poisson_pigdm": lambda: guided(poisson_pigdm(A, y, **b, prior_std=0.35), 24),
        "poisson_pigdm, twice the steps": lambda: guided(poisson_pigdm(A, y, **b, prior_std=0.35), 50),
        "poisson_dps, step 0.1": lambda: guided(poisson_dps(A, y, **b, step_size=0.1), 50),
    }


def line(name: str, result, seconds: float, prior: Prior, people: Slices) -> dict:
    """One line of the table, of draws in the order draw, slice."""
    draws: Tensor = prior.scale_kbq * result.x.unflatten(0, (-1, len(people.image)))
    mean = prior.scale_kbq * getattr(result, "mean", result.x).unflatten(0, (-1, len(people.image))).mean(0)
    figure = score(mean, people)
    return {
        "sampler": name,
        "calls": result.bill.denoiser_calls,
        "NRMSE of the mean": mean_and_error(figure["NRMSE"]),
        "lesion contrast recovered": mean_and_error(figure["recovery"]),
        "calibration": metrics.pooled_calibration(draws, people.image),
        "seconds": seconds / len(result.x),
    }


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/pet_samplers"))
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--people", type=int, default=8)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    p = replace(Enhance(device="cpu"), subjects=args.people, fractions=(0.25,), factors=())
    [level], people, validation = prepare(p)
    prior = Prior.load(p.prior, validation.image, p.device, p.autocast, p.seed)
    index = torch.arange(args.people).repeat(args.draws)
    seeds = [p.seed + 10_000 * i + k for k in range(args.draws) for i in range(args.people)]
    last = p.last_levels(level.scan).log().mean().exp().item() / prior.scale_kbq
    rows = []
    for name, run in samplers(prior, level.scan.some(index), last, seeds).items():
        start = time.process_time()
        result = run()
        rows.append(line(name, result, time.process_time() - start, prior, people))
        print(rows[-1], flush=True)
    write(args.out, rows, markdown(rows))
    return rows


if __name__ == "__main__":
    main()
