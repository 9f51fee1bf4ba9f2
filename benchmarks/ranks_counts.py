"""Simulation-based ranks of samplers that have seen counts: PET's check of what `companion bench` asks of MRI's.

    python benchmarks/ranks_counts.py --cases 200

100 truths or more of a known prior, their scans, 9 draws of each by every sampler (25 evaluations of the exact prior).
p below 0.05 says that the draws are not those of the posterior.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pet_projector import write

from companion.diffusion.noise import karras
from companion.diffusion.poisson import em_steps, poisson_dps, poisson_gibbs, poisson_mean, poisson_pigdm
from companion.diffusion.sampling import sample
from companion.evaluation.known_counts import CountProblem
from companion.evaluation.tables import markdown

PROBLEMS = {"150 counts": (150, 0.0), "1000 counts, 40 % background": (1000, 0.4), "5000 counts": (5000, 0.0)}
FIRST, LAST = 60.0, 0.3  # noise levels


def gibbs(problem: CountProblem, tails: float | None):
    """Draws by `poisson_gibbs`."""

    def draw(A, y, b, seeds):
        G = poisson_mean(A, y, background=b, covariance=problem.covariance)
        return poisson_gibbs(problem.prior, G, karras(25, LAST, FIRST), seeds=seeds, tails=tails).x

    return draw


def guided(problem: CountProblem, guidance, calls: int = 1):
    """Draws by DPM-Solver++ under a guidance."""

    def draw(A, y, b, seeds):
        D, levels = guidance(A, y, b)(problem.prior), karras(25 // calls, 0.02, FIRST)
        return sample(D, levels, shape=A.domain_shape, seeds=seeds, solver="dpmpp_2m").x

    return draw


def samplers(problem: CountProblem) -> dict:
    """The draws of each sampler by name."""
    C = problem.covariance
    return {
        "poisson_gibbs, Gaussian": gibbs(problem, None),
        "poisson_gibbs, heavy tails": gibbs(problem, 8.0),
        "poisson_mean, 2M": guided(problem, lambda A, y, b: poisson_mean(A, y, background=b, covariance=C)),
        "em_steps, 2M": guided(problem, lambda A, y, b: em_steps(A, y, background=b, iterations=5)),
        "poisson_dps, 2M": guided(problem, lambda A, y, b: poisson_dps(A, y, background=b), 2),
        "poisson_pigdm, 2M": guided(problem, lambda A, y, b: poisson_pigdm(A, y, background=b, prior_std=2.5), 2),
    }


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200, help="truths")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ranks_counts"))
    args = parser.parse_args(argv)
    rows: dict[str, dict] = {}
    for name, (counts, background) in PROBLEMS.items():
        problem = CountProblem(counts=counts, background=background)
        for sampler, draw in samplers(problem).items():
            p, _ = problem.ranks(draw, args.cases)
            rows.setdefault(sampler, {"sampler": sampler})[name] = f"{p:.2g}"
            print(name, sampler, f"p = {p:.2g}", flush=True)
    write(args.out, list(rows.values()), markdown(list(rows.values())))
    return list(rows.values())


if __name__ == "__main__":
    main()
