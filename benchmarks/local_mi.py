"""Times the LMI map against a plain re-expression of the published algorithm: one thread, taking turns.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/local_mi.py --out runs/benchmarks/local_mi

The plain version does what the paper's description says, with every candidate patch of every pixel as one item
of a large batch. Both compute mode "published", source side included. Each round runs one, then the other; the
table holds medians of the rounds in CPU seconds (seconds, on an idle machine), the median and the smallest of the
rounds' ratios, the largest difference between the two maps, and by how much each raises the peak of the process's
memory. Cases, at 128 x 128 pixels and patch 3:
    brain         axial T1w against T2w of the same virtual subject; about half is flat background
    brain, noisy  the same T1w against the T2w with half its variance replaced by noise, as in sampling
    random        two images of uniform noise, the worst case
Below them, the other modes (same images, no plain version), and a gradient of a mean map.
Writes table.md and results.json into --out.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.data.anatomy import Subject, render
from companion.files import atomic_write
from companion.information.local_mi import LocalMI


# ------------------------------------------------------------------------------------------ the published algorithm
def plain(source: Tensor, target: Tensor, patch: int = 3, width: float = 8.0, normalise: bool = False) -> Tensor:
    """The published map (1, 1, y, x), step by step."""
    p, h, (height, width_px) = patch, patch // 2, source.shape[2:]
    # Every pixel of the target becomes a block: its neighbourhood.
    blocks = F.unfold(target, p, padding=h).view(1, p, p, height, width_px)
    augmented = blocks.permute(0, 3, 1, 4, 2).reshape(1, 1, p * height, p * width_px)
    # Candidate (a, b) of pixel (i, j) is the neighbourhood of (p i + a, p j + b) there.
    patches = F.unfold(augmented, p, padding=h).view(p * p, height, p, width_px, p)
    patches = patches.permute(1, 3, 2, 4, 0).reshape(-1, p * p)
    sources = F.unfold(source, p, padding=h)[0].T.repeat_interleave(p * p, dim=0)
    scores = information(sources, patches, p**3, width, normalise)
    return scores.view(-1, p * p).amax(1).view(1, 1, height, width_px)


def information(x1: Tensor, x2: Tensor, bins: int, width: float, normalise: bool, eps: float = 1e-10) -> Tensor:
    """Mutual information (item,) of patches (item, pixel)."""
    centres = torch.linspace(0, 255, bins)
    k1, k2 = (torch.exp(-0.5 * (((255 * x).int().float()[..., None] - centres) / width) ** 2) for x in (x1, x2))
    h1, h2 = (bits(m / (m.sum(1, keepdim=True) + eps), eps) for m in (k1.mean(1), k2.mean(1)))
    joint = k1.transpose(1, 2) @ k2
    joint = joint / (joint.sum((1, 2), keepdim=True) + eps)
    mi = h1 + h2 - bits(joint.flatten(1), eps)
    return 2 * (mi + eps) / (h1 + h2 + eps) if normalise else mi


def bits(p: Tensor, eps: float) -> Tensor:
    return -(p * torch.log2(p + eps)).sum(1)


# ------------------------------------------------------------------------------------------ timing
def images(size: int, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """(source, target), (1, 1, size, size) each, of every case."""
    height = torch.tensor([22.0])
    t1w, t2w = (
        render(Subject(2_000_000 + seed), c, (1, size, size), slices_mm=height, phase_rad=0.0).image.abs()[None]
        for c in ("T1w", "T2w")
    )
    t1w, t2w = (x / x.amax() for x in (t1w, t2w))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(t2w.shape, generator=generator)
    uniform = torch.rand(2, 1, 1, size, size, generator=generator)
    return {
        "brain": (t1w, t2w),
        "brain, noisy": (t1w, 0.5**0.5 * (t2w + noise)),
        "random": (uniform[0], uniform[1]),
    }


def seconds(f: Callable[[], Tensor]) -> float:
    start = time.process_time()
    f()
    return time.process_time() - start


def peak_mb(f: Callable[[], Tensor]) -> float:
    """How far f raises the peak of the process's resident memory above what it holds before (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # or f would be given memory that only seems to be in use
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb("VmRSS")
    f()
    return resident_mb("VmHWM") - before


def resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def compare(name: str, source: Tensor, target: Tensor, rounds: int) -> dict:
    """One row: the plain version and ours, taking turns."""
    lmi = LocalMI(mode="published", normalise=False)
    fast, slow = (lambda: lmi(source, target)), (lambda: plain(source, target))
    row = {"case": name, "mode": "published", "flat": lmi.prepare(source).flat.float().mean().item()}
    row |= {"memory_mb": peak_mb(fast), "error": (fast() - slow()).abs().max().item()}
    times = [(seconds(slow), seconds(fast)) for _ in range(rounds)]
    ratios = [slow / fast for slow, fast in times]
    slow, fast = (statistics.median(t) for t in zip(*times, strict=True))
    row |= {"plain_s": slow, "ours_s": fast, "ratio": statistics.median(ratios), "least_ratio": min(ratios)}
    return row | {"plain_memory_mb": peak_mb(lambda: plain(source, target))}


def alone(name: str, mode: str, source: Tensor, target: Tensor, rounds: int, gradient: bool = False) -> dict:
    """One row of ours only."""
    lmi = LocalMI(mode=mode)
    prepared = lmi.prepare(source)

    def run():
        if not gradient:
            return lmi(prepared, target)
        x = target.clone().requires_grad_()
        return torch.autograd.grad(lmi(prepared, x).mean(), x)

    label = f"{mode}, gradient" if gradient else f"{mode}, prepared"
    memory = peak_mb(run)
    return {"case": name, "mode": label, "memory_mb": memory} | {
        "ours_s": statistics.median(seconds(run) for _ in range(rounds))
    }


def markdown(rows: list[dict], size: int) -> str:
    def cell(row: dict, key: str, text: str) -> str:
        return text.format(row[key]) if key in row else ""

    columns = {
        "case": "{}", "mode": "{}", "flat": "{:.0%}", "plain_s": "{:.2f}", "ours_s": "{:.3f}", "ratio": "{:.1f}",
        "least_ratio": "{:.1f}", "error": "{:.1e}", "plain_memory_mb": "{:.0f}", "memory_mb": "{:.0f}",
    }  # fmt: skip
    heads = [
        "case", "mode", "flat", "plain, s", "ours, s", "ratio", "least ratio", "max difference, bits",
        "plain memory, MB", "memory, MB",
    ]  # fmt: skip
    lines = [f"LMI map, {size} x {size}, patch 3, 27 bins, one thread.", "", f"| {' | '.join(heads)} |"]
    lines.append("|---" * len(heads) + "|")
    lines += [f"| {' | '.join(cell(row, *column) for column in columns.items())} |" for row in rows]
    return "\n".join(lines) + "\n"


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/local_mi"))
    parser.add_argument("--size", type=int, default=128, help="pixels per side")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    pairs = images(args.size)
    with torch.no_grad():
        rows = [compare(name, *pair, args.rounds) for name, pair in pairs.items()]
        rows += [alone(name, mode, *pairs[name], args.rounds) for mode in ("shifts", "centre") for name in pairs]
    rows += [alone("brain, noisy", "shifts", *pairs["brain, noisy"], args.rounds, gradient=True)]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, content in {"table.md": markdown(rows, args.size), "results.json": json.dumps(rows, indent=1)}.items():
        with atomic_write(args.out / name) as path:
            path.write_text(content)
    print(markdown(rows, args.size))
    return rows


if __name__ == "__main__":
    main()
