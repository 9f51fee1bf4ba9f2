"""Scores every guidance x solver, and split Gibbs, against posteriors known in closed form.

    python benchmarks/exact_posterior.py --out runs/benchmarks/exact_posterior

The operator is real SENSE (4 coils, equispaced R = 4, noise); the prior is a complex Gaussian, brain-like
in mean, support and spectrum, a mixture of such Gaussians that differ where the data hardly see (a
non-linear denoiser and a posterior of several modes), or a Gaussian that the denoiser has learned from too
few images (the prior of a short training). The mean and covariance of the posterior are then
matrices, and a sampler has nowhere to hide. Columns:
    mean error  rms over pixels of (mean of draws - posterior mean), in posterior standard deviations, with
                what the finite number of draws explains removed; "MC" is that part. Rows of conditional means take
                the average of E[x0 | x, y] of the last level instead, and their MC part; all else is of the draws.
    variance    mean over pixels of the draws' variance / mean of the true one; 5 and 95 % pixel of the ratio.
    coverage    share of true posterior draws inside the sampler's central 90 % interval, mean +- 1.645 std.
    D, A        calls per draw (a gradient through D is one more call), and milliseconds per draw.
Writes table.md, table.csv, results.json and figure.png into --out, whole or not at all.
"""

import argparse
import csv
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from companion.diffusion.covariance import Isotropic, Jacobian, Measured, PerPixel
from companion.diffusion.exact import GaussianDenoiser
from companion.diffusion.gibbs import annealed_gibbs, split_gibbs
from companion.diffusion.guidance import ddnm, dds, diffpir, dps, landweber, pigdm, posterior_mean
from companion.diffusion.noise import karras, log_uniform
from companion.diffusion.sampling import sample
from companion.diffusion.solvers import SOLVERS, ddim
from companion.evaluation.known_posterior import PRIORS, Problem, make_problem, score
from companion.files import atomic_write

LEVELS = (
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
)  # where validation images measure a covariance


@dataclass(frozen=True)
class NoMoments:
    """The same denoiser, silent about its variance."""

    D: GaussianDenoiser

    def __call__(self, x, sigma, cond=None):
        return self.D(x, sigma, cond)


def guidances(problem: Problem) -> dict:
    """Guided denoisers by name, from the published ones to the exact one."""
    A, y, s, D = problem.A, problem.y, problem.noise_std, problem.prior
    images = problem.images(64)
    isotropic = Measured.fit(NoMoments(D), images, LEVELS, bins=1)
    spectrum = Measured.fit(D, images, LEVELS)
    return {
        "landweber": landweber(A, y, s)(D),
        "dps": dps(A, y, s)(D),
        "pigdm": pigdm(A, y, s, prior_std=0.3, iterations=20)(D),
        "ddnm": ddnm(A, y, s, iterations=20)(D),
        "dds": dds(A, y, s)(D),
        "diffpir": diffpir(A, y, s)(D),
        "posterior_mean, isotropic guess": posterior_mean(A, y, s, Isotropic(0.3), iterations=40)(D),
        "posterior_mean, isotropic measured": posterior_mean(A, y, s, isotropic, iterations=40)(NoMoments(D)),
        "posterior_mean, per pixel": posterior_mean(A, y, s, PerPixel(), iterations=40)(D),
        "posterior_mean, pixel x spectrum": posterior_mean(A, y, s, spectrum, iterations=40)(D),
        "posterior_mean, Jacobian": posterior_mean(A, y, s, Jacobian(), iterations=40)(D),
    }


SOLVER_MENU = {
    "heun": "heun",
    "dpmpp_2m": "dpmpp_2m",
    "ddim eta=1": ddim(eta=1.0),
    "dpmpp_2m_sde": "dpmpp_2m_sde",
}


def run(problem: Problem, draws: int, calls: int, only: str = "") -> list[dict]:
    """One dict per guidance x solver, and one per budget of split Gibbs, printed as they come."""
    rows = []

    def add(guidance, solver, samples, means=None):
        bill = asdict(samples.bill)
        row = dict(prior=problem.name, guidance=guidance, solver=solver, **score(samples.x, problem, means), **bill)
        rows.append(row)
        print(" | ".join(v if isinstance(v, str) else f"{v:.3g}" for v in row.values()), flush=True)

    guided = guidances(problem)
    for guidance, D in guided.items():
        for name, solver in SOLVER_MENU.items():
            if only not in f"{guidance} {name}" or ("Jacobian" in guidance and name != "dpmpp_2m"):
                continue  # a gradient per CG step is dear: one solver will do for the reference
            steps = (calls + 1) // (SOLVERS[name].calls if name in SOLVERS else 1)
            sigmas = karras(min(steps, calls), sigma_min=problem.noise_std / 2, sigma_max=5.0)
            add(
                guidance,
                name,
                sample(D, sigmas, shape=problem.shape, seeds=range(draws), solver=solver, dtype=torch.complex64),
            )
    for name, D_y in guided.items():
        if not hasattr(D_y.guidance, "draw") or "Jacobian" in name or only not in f"{name} annealed_gibbs":
            continue
        for last in (0.5, 5.0):  # the last noise level, in units of noise_std
            sigmas = karras(calls, sigma_min=last * problem.noise_std, sigma_max=5.0)
            draw = annealed_gibbs(D_y.D, D_y.guidance, sigmas, seeds=range(draws))
            add(name, f"annealed_gibbs to {last:g}", draw)
            add(name, f"annealed_gibbs to {last:g}, conditional means", draw, draw.mean)
    for steps, sweeps in ((2, calls // 2), (5, 2 * calls)):
        if only in "split_gibbs":
            rhos = log_uniform(sweeps, problem.noise_std / 2, 0.5)[:-1]
            draw = split_gibbs(
                problem.prior, problem.A, problem.y, problem.noise_std, rhos, steps=steps, seeds=range(draws)
            )
            add("split_gibbs", f"{sweeps} sweeps of {steps}", draw)
    return rows


# ---------------------------------------------------------------------------------------------------- report
def markdown(rows: list[dict], draws: int) -> str:
    """The table, one line per row; bold where mean and variance are right."""
    lines = [
        f"Exact posterior, {draws} draws. Bold: mean within 0.1 posterior std, variance within 5 %.\n",
        "| prior | guidance | solver | mean error (MC) | variance (MC) | pixels | coverage | D | A | ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        mark = "**" if right(r) else ""
        lines.append(
            f"| {r['prior']} | {mark}{r['guidance']}{mark} | {r['solver']} | {r['mean_error']:.2f} "
            f"({r['mean_mc']:.2f}) | {r['variance_ratio']:.2f} ({r['variance_mc']:.2f}) | "
            f"{r['ratio_p5']:.2f}-{r['ratio_p95']:.2f} | {r['coverage']:.2f} | {r['denoiser_calls']:.0f} | "
            f"{r['operator_calls']:.0f} | {1000 * r['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def right(row: dict) -> bool:
    return row["mean_error"] < 0.1 and abs(row["variance_ratio"] - 1) < 0.05


def figure(rows: list[dict]):
    """Variance ratio over mean error: panel prior, colour guidance, shape solver; grey is right."""
    from matplotlib.figure import Figure

    priors = list(dict.fromkeys(r["prior"] for r in rows))
    names = list(dict.fromkeys(r["guidance"] for r in rows))
    shapes = dict(zip([*SOLVER_MENU, "annealed_gibbs to 0.5", "annealed_gibbs to 5"], "os^DPX", strict=True))
    fig = Figure(figsize=(5.2 * len(priors) + 2.8, 4.6), layout="constrained")
    axes = fig.subplots(1, len(priors), squeeze=False, sharey=True)[0]
    for ax, prior in zip(axes, priors, strict=True):
        ax.axhspan(0.95, 1.05, color="0.85", zorder=0)
        ax.axvspan(0, 0.1, color="0.92", zorder=0)
        for r in (r for r in rows if r["prior"] == prior):
            ax.plot(
                max(r["mean_error"], 0.02),
                min(max(r["variance_ratio"], 0.1), 10),
                shapes.get(r["solver"], "*"),
                color=f"C{names.index(r['guidance'])}" if names.index(r["guidance"]) < 10 else "k",
                ms=7,
                alpha=0.85,
            )
        ax.set(
            title=f"{prior} prior",
            xlabel="error of the mean (posterior std)",
            xscale="log",
            yscale="log",
            xlim=(0.018, None),
        )
        ax.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    axes[0].set_ylabel("variance of draws / true variance")
    handles = [axes[-1].plot([], [], "s", color=f"C{i}" if i < 10 else "k", label=n)[0] for i, n in enumerate(names)]
    handles += [axes[-1].plot([], [], m, color="0.4", label=s)[0] for s, m in [*shapes.items(), ("split Gibbs", "*")]]
    fig.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    return fig


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/exact_posterior"))
    parser.add_argument("--draws", type=int, default=512)
    parser.add_argument("--calls", type=int, default=50, help="denoiser evaluations per draw, gradients not counted")
    parser.add_argument("--size", type=int, default=16, help="pixels per side; matrices have size^2 rows")
    parser.add_argument("--priors", nargs="+", default=list(PRIORS), choices=PRIORS)
    parser.add_argument("--only", default="", help="run only rows whose guidance and solver contain this text")
    args = parser.parse_args(argv)
    rows = []
    for name in args.priors:
        rows += run(make_problem(name, args.size), args.draws, args.calls, args.only)
    args.out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    for name, content in {
        "table.md": markdown(rows, args.draws),
        "table.csv": text.getvalue(),
        "results.json": json.dumps(rows, indent=1) + "\n",
    }.items():
        with atomic_write(args.out / name) as path:
            path.write_text(content)
    with atomic_write(args.out / "figure.png") as path:
        figure(rows).savefig(path, format="png", dpi=150)
    print(markdown(rows, args.draws))
    return rows


if __name__ == "__main__":
    main()
