"""Quality of reconstructed volumes against network evaluations, for each posterior sampler with a sequence prior.

    python benchmarks/aid_volume.py --out runs/benchmarks/aid_volume

Held-out virtual people, multi-coil, undersampled, honest protocol; every sampler reconstructs the
same scans with the same prior and the context of the slices before. Rows: sampler and evaluations a slice and draw;
columns: PSNR of one draw and of the mean of the draws (mean and standard error over volumes), the paired difference of
the mean to that at the most evaluations, calibration, seconds for a draw of a volume. Samplers whose guidance needs the
network's gradient stop at --most-gradients evaluations.
Writes table.md, table.csv, figure.png and results.json into --out, whole or not at all.
"""

import argparse
import json
from pathlib import Path

import torch

from companion.acquisition import virtual_volumes
from companion.acquisition.mri import Protocol, Scan
from companion.evaluation import metrics, tables
from companion.files import atomic_write, code_version
from companion.papers.aid import reconstruct as aid_mri
from companion.reconstruction import sequence
from companion.reconstruction.sequence import METHODS, Prior, Sampler, reconstruct
from companion.show import figures

GRADIENT = ("pigdm", "dps")  # guidances that differentiate the network


def evaluate(prior: Prior, scans: list[Scan], sampler: Sampler, context: str) -> dict:
    """Return the scores of one sampler on all scans, lists over volumes."""
    one, mean, terms, seconds = [], [], [], []
    for i, scan in enumerate(scans):
        samples = reconstruct(prior, scan, sampler, context, seed=i * sampler.draws)
        one.append(sequence.score(samples.x[0], scan, False)["PSNR"])
        mean.append(sequence.score(samples.x.mean(0), scan, False)["PSNR"])
        terms.append(metrics.calibration_terms(samples.x.abs(), scan.x.abs(), samples.paired))
        seconds.append(samples.bill.seconds)
    ratio = sum(a for a, _ in terms) / sum(b for _, b in terms)
    return {"one draw": one, "mean": mean, "calibration": ratio, "seconds": sum(seconds) / len(seconds)}


def run(args) -> list[dict]:
    """Return one row for each sampler and number of evaluations."""
    protocol = Protocol(acs=args.acs, acceleration=args.acceleration, mask=args.mask)
    like = virtual_volumes.examples(aid_mri.brightness_of(args.weights), 3.25)
    people = virtual_volumes.Cohort(64, 3.25, protocol, like, seed=0)
    scans = [people.scan("test", i, args.frames, coils=8, noise_std=0.01) for i in range(args.volumes)]
    prior = aid_mri.measured(Prior.load(args.weights, aid_mri.EMBEDDED, args.device, args.autocast), 64, 3.25, seed=0)
    rows = []
    for method in args.methods:
        counts = [n for n in args.evaluations if method not in GRADIENT or n <= args.most_gradients]
        for n in sorted(counts, reverse=True):
            result = evaluate(prior, scans, Sampler(method=method, draws=args.draws, evaluations=n), args.context)
            row = {"sampler": method, "evaluations": n} | result
            most = next(r for r in [*rows, row] if r["sampler"] == method)
            row["to the most"] = metrics.mean_and_error(row["mean"], most["mean"]) if row is not most else (0.0, 0.0)
            rows.append(row)
            print(f"{method:16} {n:5}  {sum(row['mean']) / len(scans):6.2f} dB  {row['seconds']:.1f} s", flush=True)
    return rows


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""
    return tables.markdown(
        [
            {
                "sampler": r["sampler"],
                "evaluations": r["evaluations"],
                "one draw (dB)": metrics.mean_and_error(r["one draw"]),
                "mean of draws (dB)": metrics.mean_and_error(r["mean"]),
                "to the most evaluations (dB)": r["to the most"],
                "calibration": r["calibration"],
                "seconds": r["seconds"],
            }
            for r in rows
        ]
    )


def figure(rows: list[dict]):
    """Return PSNR of the mean against evaluations, a line for each sampler."""
    lines = {}
    for r in sorted(rows, key=lambda r: r["evaluations"]):
        x, y = lines.setdefault(r["sampler"], ([], []))
        x.append(r["evaluations"])
        y.append(sum(r["mean"]) / len(r["mean"]))
    return figures.curves(
        lines, xlabel="network evaluations", ylabel="PSNR of the mean (dB)", logx=True, size=(4.6, 3.4)
    )


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/aid_volume"))
    parser.add_argument("--weights", default="aid/brain")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[10, 24, 50, 100, 300, 1000])
    parser.add_argument("--most-gradients", type=int, default=100)
    parser.add_argument("--volumes", type=int, default=4)
    parser.add_argument("--frames", type=int, default=3)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--acceleration", type=float, default=8)
    parser.add_argument("--mask", default="equispaced")
    parser.add_argument("--acs", type=int, default=0)
    parser.add_argument("--context", default="full", choices=("full", "last"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", default="bfloat16")
    args = parser.parse_args(argv)
    rows = run(args)
    args.out.mkdir(parents=True, exist_ok=True)
    about = {"code": code_version(), "options": {k: str(v) for k, v in vars(args).items()}, "rows": rows}
    for name, content in {"table.md": table(rows) + "\n", "results.json": json.dumps(about, indent=1) + "\n"}.items():
        with atomic_write(args.out / name) as path:
            path.write_text(content)
    tables.write_csv(
        args.out / "table.csv", [{k: v for k, v in r.items() if not isinstance(v, (list, tuple))} for r in rows]
    )
    with atomic_write(args.out / "figure.png") as path:
        figure(rows).savefig(path, format="png", dpi=150)
    print(table(rows))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
