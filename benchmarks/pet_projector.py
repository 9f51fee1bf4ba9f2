"""Times the PET projector and its adjoint: stored, matrix-free, dense float32, scikit-image, deepinv if installed.

    python benchmarks/pet_projector.py --out runs/benchmarks/pet_projector

One thread; the methods take turns in one process and the median is kept, in CPU time, so that a shared machine does not
decide. Columns:
    ms             per application to the whole batch, forward and adjoint
    MiB            what the method keeps: matrices, indices
    bound ms       the bytes that it has to read at least once, over the copying speed of this machine
    error          |A x - exact| / |exact|, exact from all chord lengths in float64; scikit-image and deepinv rotate and
                   interpolate, so theirs is a difference of models
Writes table.md, table.csv and results.json into --out, whole or not at all.
"""

import argparse
import csv
import gc
import io
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from companion.files import atomic_write
from companion.operators.pet import ParallelBeam, Projector

DENSE_MIB = 3000  # larger dense matrices are only counted, not built


def alternate(functions: dict, repeats: int) -> dict[str, float]:
    """Median CPU seconds of each function, taking turns; one unmeasured call each first."""
    for function in functions.values():
        function()
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def read_speed() -> float:
    """Bytes per second that one thread reads from memory, by adding up 512 MiB."""
    block = torch.ones(2**27)
    best = min(alternate({"sum": block.sum}, 1)["sum"] for _ in range(5))
    return block.numel() * 4 / best


def phantom(size: int, batch: int) -> torch.Tensor:
    """Ellipses of activity, (batch, 1, size, size), a little different in each item."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    row, column = axis[:, None], axis[None, :]
    items = []
    for k in range(batch):
        body = ((row / 0.9) ** 2 + (column / (0.7 + 0.01 * k)) ** 2 < 1).float()
        cold = ((row + 0.1) ** 2 / 0.1 + column**2 / 0.03 < 1).float()
        hot = (row - 0.4) ** 2 + (column - 0.2) ** 2 < 0.01
        items.append(4 * body - 3 * cold * body + 6 * hot)
    return torch.stack(items)[:, None]


def dense_matrix(beam: ParallelBeam) -> torch.Tensor:
    """The whole matrix (ray, pixel) in float32."""
    rays, pixels, lengths = Projector(beam).triplets()
    matrix = torch.zeros(beam.rays, math.prod(beam.slice_shape))
    matrix[rays, pixels] = lengths.to(torch.float32)
    return matrix


def methods(beam: ParallelBeam, batch: int) -> tuple[torch.Tensor, dict[str, tuple]]:
    """The images, and by name (forward to (batch, angle * bin), adjoint, MiB kept, MiB read at least)."""
    n = beam.slice_shape[0]
    x = phantom(n, batch)
    y = torch.rand(batch, *beam.sinogram_shape, generator=torch.Generator().manual_seed(1))
    stored, free = Projector(beam, "sparse"), Projector(beam, "matrix-free")
    vectors = batch * (n * n + beam.rays) * 4 / 2**20
    kept = table_mib(stored)
    found = {
        "ours, stored": (lambda: stored(x).flatten(1), lambda: stored.H(y), kept, kept / 2 + vectors),
        "ours, matrix-free": (lambda: free(x).flatten(1), lambda: free.H(y), 0.0, vectors),
    }
    size = beam.rays * n * n * 4 / 2**20
    if size <= DENSE_MIB:
        matrix = dense_matrix(beam)
        images, rays = x.flatten(1), y.flatten(1)
        found["dense float32"] = (lambda: images @ matrix.T, lambda: rays @ matrix, size, size + vectors)
    found |= scikit(beam, x, y) | deepinv(beam, x, y)
    return x, found


def table_mib(A: Projector) -> float:
    """MiB of the tables that A keeps."""
    matrices = A._matrices(torch.float32, torch.device("cpu"))
    parts = [v for m in matrices for v in (m.values(), m.col_indices(), m.crow_indices())]
    return sum(v.numel() * v.element_size() for v in parts) / 2**20


def scikit(beam, x, y) -> dict:
    from skimage.transform import iradon, radon

    degrees = np.rad2deg(beam.angles)
    images, sinograms = x[:, 0].double().numpy(), y[:, 0].double().numpy()

    def forward():
        lines = [radon(image, degrees, circle=True).T * beam.pixel_mm for image in images]
        return torch.from_numpy(np.stack(lines)).flatten(1)

    def adjoint():
        return [iradon(s.T, degrees, filter_name=None, circle=True) for s in sinograms]

    return {"scikit-image radon": (forward, adjoint, 0.0, math.nan)}


def deepinv(beam, x, y) -> dict:
    try:
        from deepinv.physics import Tomography
    except ImportError:
        return {}
    n = beam.slice_shape[0]
    angles = torch.tensor(np.rad2deg(beam.angles), dtype=torch.float32)
    physics = Tomography(angles=angles, img_width=n, circle=True, normalize=False, device="cpu")
    measured = physics.A(x)

    def forward():
        return physics.A(x).transpose(-1, -2).flatten(1) * beam.pixel_mm

    return {"deepinv Tomography": (forward, lambda: physics.A_adjoint(measured), 0.0, math.nan)}


def rows_of(size: int, batch: int, repeats: int, speed: float) -> list[dict]:
    """One dict per method at one size and batch."""
    beam = ParallelBeam.published(size)
    x, found = methods(beam, batch)
    exact = Projector(beam, "matrix-free")(x.double()).flatten(1)
    errors = {name: torch.linalg.norm(m[0]().double() - exact).item() for name, m in found.items()}
    forward = alternate({name: m[0] for name, m in found.items()}, repeats)
    adjoint = alternate({name: m[1] for name, m in found.items()}, repeats)
    return [
        {
            "size": size,
            "batch": batch,
            "method": name,
            "forward_ms": 1000 * forward[name],
            "adjoint_ms": 1000 * adjoint[name],
            "kept_mib": kept,
            "bound_ms": 1000 * read * 2**20 / speed,
            "error": errors[name] / torch.linalg.norm(exact).item(),
        }
        for name, (_, _, kept, read) in found.items()
    ]


def markdown(rows: list[dict], speed: float) -> str:
    lines = [
        f"PET projector, one thread, CPU time; this thread reads {speed / 1e9:.1f} GB/s from memory.\n",
        "| size | batch | method | forward ms | adjoint ms | kept MiB | bound ms | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        bound = "" if math.isnan(r["bound_ms"]) else f"{r['bound_ms']:.2f}"
        lines.append(
            f"| {r['size']} | {r['batch']} | {r['method']} | {r['forward_ms']:.2f} | {r['adjoint_ms']:.2f} | "
            f"{r['kept_mib']:.1f} | {bound} | {r['error']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def write(out: Path, rows: list[dict], table: str) -> None:
    """table.md, table.csv and results.json in `out`, and the table on screen."""
    out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in r.items()} for r in rows]
    for name, content in {
        "table.md": table,
        "table.csv": text.getvalue(),
        "results.json": json.dumps(plain, indent=1) + "\n",
    }.items():
        with atomic_write(out / name) as path:
            path.write_text(content)
    print(table)


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/pet_projector"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    speed = read_speed()
    rows = []
    for size in args.sizes:
        for batch in args.batches:
            if size > 256 and batch > 1:
                continue
            rows += rows_of(size, batch, args.repeats if size <= 128 else 2, speed)
            print(markdown(rows[-5:], speed), flush=True)
            gc.collect()
    write(args.out, rows, markdown(rows, speed))
    return rows


if __name__ == "__main__":
    main()
