"""Times an MLEM iteration: ours against dense float32 matrices, as the published system has them.

    python benchmarks/mlem.py --out runs/benchmarks/mlem

One thread; the methods take turns in one process and the median is kept, in CPU time, so that a shared machine does not
decide. "bound ms" is the time to read the matrices of one iteration once; what the cache holds may be faster. "differs"
is |x - x of dense| / |x of dense| after 20 iterations of both from the same counts. A second table shows what 1000
iterations do to counts on which the published loop ends in NaN.
Writes table.md, table.csv and results.json into --out, whole or not at all.
"""

import argparse
import math
from pathlib import Path

import torch
from pet_projector import DENSE_MIB, alternate, dense_matrix, phantom, read_speed, table_mib, write

from companion.operators.counts import poisson_counts, poisson_log_likelihood, thin
from companion.operators.pet import ParallelBeam, Projector
from companion.reconstruction.pet import mlem

ITERATIONS = 20
COUNTS = 1e6  # per slice, the published high dose


def scan(A: Projector, batch: int) -> torch.Tensor:
    """Counts of the phantoms at the published high dose."""
    expected = A(phantom(A.domain_shape[-1], batch))
    return poisson_counts(expected * (COUNTS / expected.sum((-2, -1), keepdim=True)), range(batch))


def dense_mlem(matrix: torch.Tensor, gain: torch.Tensor, y: torch.Tensor, iterations: int) -> torch.Tensor:
    """The same algorithm with a dense matrix and no guards, (batch, pixel)."""
    x = torch.ones(len(y), matrix.shape[1])
    for _ in range(iterations):
        x = x * gain * ((y / (x @ matrix.T)) @ matrix)
    return x


def rows_of(size: int, batch: int, repeats: int, speed: float) -> list[dict]:
    """Ours and dense at one size and batch; dense is left out where it does not fit."""
    beam = ParallelBeam.published(size)
    A = Projector(beam)
    y = scan(A, batch)
    kept = table_mib(A)
    runs = {"ours": (lambda: mlem(y, A, iterations=ITERATIONS), kept)}
    dense_mib = beam.rays * size * size * 4 / 2**20
    differs = math.nan
    if dense_mib <= DENSE_MIB:
        matrix, flat = dense_matrix(beam), y.flatten(1)
        gain = 1 / matrix.sum(0)
        exact = dense_mlem(matrix, gain, flat, ITERATIONS)
        differs = ((mlem(y, A, iterations=ITERATIONS).x.flatten(1) - exact).norm() / exact.norm()).item()
        steps = max(1, round(2 / batch))  # one or two iterations of the slow one are enough to time it
        runs["dense float32"] = (lambda: dense_mlem(matrix, gain, flat, steps), dense_mib)
    seconds = alternate({name: run for name, (run, _) in runs.items()}, repeats)
    per = {"ours": seconds["ours"] / ITERATIONS}
    if "dense float32" in runs:
        per["dense float32"] = seconds["dense float32"] / steps
    return [
        {
            "size": size,
            "batch": batch,
            "method": name,
            "iteration_ms": 1000 * per[name],
            "speedup": per.get("dense float32", math.nan) / per[name],
            "kept_mib": mib,
            "bound_ms": 1000 * mib * 2**20 * (1 if name == "ours" else 2) / speed,
            "differs": differs if name == "ours" else 0.0,
        }
        for name, (_, mib) in runs.items()
    ]


def endurance(size: int = 64, iterations: int = 1000) -> str:
    """A table of 1000 iterations on counts that break an unguarded loop."""
    A = Projector(ParallelBeam.published(size))
    full = scan(A, 1)
    scans = {
        "published high dose": full,
        "published low dose (25 %)": thin(full, 0.25, [0]),
        "0.1 % of the counts": thin(full, 0.001, [0]),
        "one count": torch.zeros_like(full).index_put_(
            (*(torch.tensor(i) for i in (0, 0, size, size // 2)),), torch.tensor(1.0)
        ),
        "no counts": torch.zeros_like(full),
    }
    y = torch.cat(list(scans.values()))
    total = A.H(torch.ones(1, *A.range_shape))
    values = []
    last = mlem(
        y,
        A,
        iterations=iterations,
        callback=lambda k, x: values.append(poisson_log_likelihood(y, A(x))) if k % 20 == 1 else None,
    ).x
    falls = torch.stack(values).diff(dim=0).clamp(max=0).abs().amax(0)
    lines = [
        f"\n{iterations} iterations at {size} pixels, all in one batch:\n",
        "| counts | finite | counts kept (x / y) | largest fall of the log-likelihood (of its value) |",
        "|---|---|---|---|",
    ]
    for name, counts, x, fall, value in zip(scans, y, last, falls, values[-1], strict=True):
        ratio = ((total[0] * x).sum() / counts.sum()).item() if counts.any() else math.nan
        relative = (fall / value.abs().clamp(min=1)).item()
        lines.append(
            f"| {name} | {bool(torch.isfinite(x).all())} | "
            f"{'all zero' if math.isnan(ratio) else f'{ratio:.6f}'} | {relative:.1e} |"
        )
    return "\n".join(lines) + "\n"


def markdown(rows: list[dict], speed: float) -> str:
    lines = [
        f"MLEM, one thread, CPU time; this thread reads {speed / 1e9:.1f} GB/s from memory.\n",
        "| size | batch | method | ms per iteration | times faster | kept MiB | bound ms | differs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        faster, differs = (
            ("" if math.isnan(v) else f)
            for v, f in ((r["speedup"], f"{r['speedup']:.0f}"), (r["differs"], f"{r['differs']:.0e}"))
        )
        lines.append(
            f"| {r['size']} | {r['batch']} | {r['method']} | {r['iteration_ms']:.2f} | {faster} | "
            f"{r['kept_mib']:.1f} | {r['bound_ms']:.2f} | {differs} |"
        )
    return "\n".join(lines) + "\n"


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/mlem"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    speed = read_speed()
    rows = []
    for size in args.sizes:
        for batch in args.batches:
            rows += rows_of(size, batch, args.repeats if size <= 128 else 3, speed)
            print(markdown(rows[-2:], speed), flush=True)
    write(args.out, rows, markdown(rows, speed) + endurance())
    return rows


if __name__ == "__main__":
    main()
