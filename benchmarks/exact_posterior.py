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
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from companion.diffusion.covariance import Isotropic, Jacobian, Measured, PerPixel
from companion.diffusion.exact import GaussianDenoiser, GaussianMixtureDenoiser
from companion.diffusion.gibbs import annealed_gibbs, split_gibbs
from companion.diffusion.guidance import ddnm, dds, diffpir, dps, landweber, pigdm, posterior_mean
from companion.diffusion.noise import karras, log_uniform
from companion.diffusion.sampling import sample
from companion.diffusion.solvers import SOLVERS, ddim
from companion.files import atomic_write
from companion.operators.linear import LinearOperator
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, sense
from companion.randomness import randn

PRIORS = ("gaussian", "mixture", "overfit")
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


# ------------------------------------------------------------------------------------------ the known answer
@dataclass(frozen=True)
class Problem:
    """A prior, data, and the exact posterior: mean, variance per real component, draws, (..., 1, y, x)."""

    name: str
    truth: GaussianDenoiser | GaussianMixtureDenoiser
    prior: GaussianDenoiser | GaussianMixtureDenoiser  # what the samplers get: the truth, or what training made of it
    A: LinearOperator
    y: Tensor
    noise_std: float
    mean: Tensor
    variance: Tensor
    draws: Tensor

    @property
    def shape(self):
        return tuple(self.A.domain_shape)

    def images(self, count: int, seed: int = 1) -> Tensor:
        """Draws from the true prior, as validation images."""
        return self.truth.draw(count, torch.Generator().manual_seed(seed), torch.complex64)


def brain_like(size: int) -> tuple[Tensor, Tensor]:
    """Mean (1, size, size) and dense covariance: an ellipse with linear phase; inside, a smooth random
    texture of standard deviation 0.3 per component, outside almost nothing."""
    axis = torch.linspace(-1, 1, size, dtype=torch.float64)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    body = torch.sigmoid((1 - ((column / 0.8) ** 2 + (row / 0.95) ** 2).sqrt()) * 12)
    mean = 0.6 * body * torch.exp(0.8j * column)
    k = torch.fft.fftfreq(size, dtype=torch.float64) * size
    spectrum = (1 + (k[:, None] ** 2 + k**2) / 2) ** -1.5
    pixels = torch.eye(size**2, dtype=torch.complex128).reshape(-1, size, size)
    texture = torch.fft.ifft2((spectrum / spectrum.mean()).sqrt() * torch.fft.fft2(pixels)).reshape(size**2, -1)
    factor = (0.02 + 0.3 * body).reshape(-1, 1) * texture.T
    return mean[None], factor @ factor.mH


def overfit(truth: GaussianDenoiser, count: int = 150) -> GaussianDenoiser:
    """The denoiser of the Gaussian that `count` images suggest: right on those, over-confident on others."""
    images = truth.draw(count, torch.Generator().manual_seed(50), torch.complex128).flatten(1)
    centred = images - images.mean(0)
    covariance = centred.T @ centred.conj() / (2 * count) + 1e-5 * torch.eye(images.shape[1])
    return GaussianDenoiser(images.mean(0).reshape(truth.mean.shape), (covariance + covariance.mH) / 2)


def matrix(A: LinearOperator) -> Tensor:
    """A as a dense matrix (samples, pixels), without the samples that are always 0."""
    pixels = torch.eye(math.prod(A.domain_shape), dtype=torch.complex128).reshape(-1, *A.domain_shape)
    rows = A(pixels).flatten(1).T
    return rows[rows.abs().sum(1) > 0], rows.abs().sum(1) > 0


def condition(mean: Tensor, covariance: Tensor, M: Tensor, y: Tensor, noise_std: float):
    """(mean, covariance per real component, log evidence) of a Gaussian after seeing y = M x + noise."""
    S = M @ covariance @ M.mH + noise_std**2 * torch.eye(len(M))
    gain = torch.linalg.solve(S, M @ covariance).mH
    r = y - M @ mean
    evidence = -(r.conj() @ torch.linalg.solve(S, r)).real / 2 - torch.linalg.slogdet(S)[1]
    return mean + gain @ r, covariance - gain @ M @ covariance, evidence


def make_problem(name: str, size=16, coils=4, R=4, noise_std=0.02, seed=3, draws=2000) -> Problem:
    """name: "gaussian"; "mixture" of six means that differ in the six least determined directions; "overfit",
    a Gaussian that the denoiser knows from 150 images only, while the posterior is that of the truth."""
    generator = torch.Generator().manual_seed(seed)
    A = sense(birdcage_maps((size, size), coils), cartesian_mask(size, R).mask)
    M, measured = matrix(A)
    mean, covariance = brain_like(size)
    means, covariances = [mean.flatten()], [covariance]
    if name == "mixture":
        covariances = [covariance / 2] * 6
        _, C, _ = condition(means[0], covariances[0], M, M @ means[0], noise_std)
        values, vectors = torch.linalg.eigh((C + C.mH) / 2)
        loose = vectors[:, -6:] * values[-6:].sqrt()
        means = [mean.flatten() + 1.6 * loose @ randn((6,), torch.complex128, generator) for _ in range(6)]
    parts = [GaussianDenoiser(m.reshape(mean.shape), c) for m, c in zip(means, covariances, strict=True)]
    prior = parts[0] if len(parts) == 1 else GaussianMixtureDenoiser(torch.ones(len(parts)), parts)
    D = overfit(prior) if name == "overfit" else prior
    y = A(prior.draw(1, generator, torch.complex128))
    y = y + noise_std * randn(y.shape, y.dtype, generator)

    seen = [condition(m, c, M, y.flatten()[measured], noise_std) for m, c in zip(means, covariances, strict=True)]
    share = torch.softmax(torch.stack([evidence for *_, evidence in seen]), 0)
    centre = sum(w * m for w, (m, _, _) in zip(share, seen, strict=True))
    variance = sum(
        w * (C.diagonal().real + (m - centre).abs() ** 2 / 2) for w, (m, C, _) in zip(share, seen, strict=True)
    )
    exact = [GaussianDenoiser(m.reshape(mean.shape), (C + C.mH) / 2).draw(draws, generator) for m, C, _ in seen]
    chosen = torch.multinomial(share, draws, replacement=True, generator=generator)
    exact = torch.stack([exact[k][i] for i, k in enumerate(chosen.tolist())])
    shape = mean.shape
    return Problem(
        name,
        prior,
        D,
        A,
        y.to(torch.complex64),
        noise_std,
        centre.reshape(shape),
        variance.reshape(shape),
        exact,
    )


# ---------------------------------------------------------------------------------------------------- scores
def score(x: Tensor, problem: Problem, means: Tensor | None = None) -> dict:
    """The columns of the table for draws x (draw, 1, y, x), or their conditional means; see the head of this file."""
    x = x.to(torch.complex128)
    mean, n = x.mean(0), len(x)
    energy = (x - mean).abs().square() / 2  # per real component
    variance = energy.sum(0) / (n - 1)
    ratio = variance / problem.variance
    estimates = x if means is None else means.to(torch.complex128)
    centre = estimates.mean(0)
    squared = ((centre - problem.mean).abs().square() / (2 * problem.variance)).mean().item()
    scatter = (estimates - centre).abs().square().sum(0) / (2 * (n - 1))
    monte_carlo = (scatter / problem.variance).mean().item() / n
    low_high = 1.645 * variance.sqrt()
    inside = [
        ((part(problem.draws) - part(mean)).abs() < low_high).double().mean().item()
        for part in (torch.real, torch.imag)
    ]
    return dict(
        mean_error=math.sqrt(max(squared - monte_carlo, 0)),
        mean_mc=math.sqrt(monte_carlo),
        variance_ratio=(variance.mean() / problem.variance.mean()).item(),
        variance_mc=(energy.flatten(1).mean(1).std() / math.sqrt(n) / problem.variance.mean()).item(),
        ratio_p5=ratio.quantile(0.05).item(),
        ratio_p95=ratio.quantile(0.95).item(),
        coverage=sum(inside) / 2,
    )


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
