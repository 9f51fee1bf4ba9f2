"""How often the verdict of `companion.reconstruction.trust` is right: heads and what is none, many scans of each.

    python benchmarks/verdicts.py data/heads --count 20 --out runs/benchmarks/verdicts
    python benchmarks/verdicts.py data/heads --measured FOLDER     # with FOLDER/heads/*.npy and FOLDER/others/*.npy

Heads are those that were held for validation, as they are and in disguise (`companion.data.heads`). What is no head is
drawn: knees, bellies, phantoms, and the virtual hearts. --measured: arrays (image, y, x), square, of real ones.
Every scan draws its own coils (1 to 8), mask (R = 4 or 8, equispaced), noise (.005 to .02) and phase. Total variation,
on which the image leans, is tuned by the scan itself; "best" is the best image, by the truth, of that one and, where
BART is installed, of its l1 wavelets with three settings, which favours them. Scans of even number are there to
choose thresholds on; the table is of those of odd number.

Columns: PSNR in dB of the best classical image and of the trusted one, and the worst loss; quantiles of the statistics
that the verdict rests on; the share of scans that are flagged, by held-out samples, by what the prior
sees (`benchmarks/looks.py` asks that alone), by either. A finished scan is not redone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from no_heads import beating, belly, knee, phantom
from scipy.ndimage import zoom

from companion.data.heads import Head, draw_plane, head_image
from companion.data.heads_download import load_heads
from companion.data.phase import add_phase
from companion.data.random_scans import random_maps
from companion.diffusion.denoisers import AnySize
from companion.evaluation import metrics
from companion.evaluation.organ import Organ, known_to
from companion.evaluation.tables import markdown
from companion.files import atomic_write
from companion.models.architectures import network_of
from companion.models.checkpoint import describe_source, load_denoiser
from companion.models.errors import for_pixels, load_errors
from companion.models.general import BY_PIXELS, general_prior
from companion.operators.masks import cartesian_mask
from companion.operators.mri import sense
from companion.randomness import randn
from companion.reconstruction import held_out, regularised, trust

GRID = (1.0, 2.0, 4.0)  # regularisation of the classical methods, in noise^(3/2)
Draw = Callable[[np.random.Generator, int], np.ndarray]  # (rng, size) -> magnitudes (size, size), real or complex


# --------------------------------------------------------------------------------------------------------- drawing


def plain(head: Head, rng: np.random.Generator, size: int, pixel_mm: float) -> np.ndarray:
    """A slice of a head as its own scan shows it."""
    plane = draw_plane(head, rng, 3 * size, pixel_mm / 3)
    return head.at(plane.points).numpy().reshape(size, 3, size, 3).mean((1, 3))


def measured(path: Path) -> Draw:
    """Images of a file (image, y, x), at the resolution asked for, turned and mirrored at random."""
    images = np.load(path)

    def draw(rng: np.random.Generator, size: int) -> np.ndarray:
        x = images[int(rng.integers(len(images)))]
        low = (len(x) - size) // 2
        if low > 0:
            spectrum = np.fft.fftshift(np.fft.fft2(x, norm="forward"))
            spectrum = spectrum[low : low + size, low : low + size]
            x = np.fft.ifft2(np.fft.ifftshift(spectrum), norm="forward")
            x = x if np.iscomplexobj(images) else x.real
        elif low < 0:
            x = zoom(x, size / len(x), order=1)
        return np.ascontiguousarray(np.rot90(x[:, :: rng.choice([-1, 1])], int(rng.integers(4))))

    return draw


def families(folder: Path, real: Path | None) -> dict[str, tuple[bool, Draw]]:
    """What is scanned, by name: whether it is a head, and how it is drawn."""
    held = load_heads(folder, "validation")

    def one(make) -> Draw:
        def draw(rng: np.random.Generator, size: int) -> np.ndarray:
            return make(held[int(rng.integers(len(held)))], rng, size, pixel_mm(size) * rng.uniform(0.85, 1.1))

        return draw

    found = {"head": (True, one(plain)), "head, disguised": (True, one(head_image))}
    for name, draw in {"knee": knee, "belly": belly, "phantom": phantom, "virtual heart": beating}.items():
        found[name] = (False, draw)
    for kind in ("heads", "others") if real else ():
        found |= {path.stem: (kind == "heads", measured(path)) for path in sorted((real / kind).glob("*.npy"))}
    return found


# -------------------------------------------------------------------------------------------------------- scanning


def pixel_mm(size: int) -> float:
    """Of heads in images of this size, which then fill most of them."""
    return 3.25 * 64 / size


def scan(draw: Draw, rng: np.random.Generator, size: int):
    """The truth (1, 1, y, x), operator, data, noise, lines of the centre, coil maps and a description of one scan."""
    image = draw(rng, size)
    bright = np.abs(image)
    image = image / np.percentile(bright[bright > 0.08 * bright.max()], 99)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    x = torch.from_numpy(image)[None, None]
    x = x.to(torch.complex64) if x.is_complex() else add_phase(x.float(), generator)
    coils, acs = int(rng.integers(1, 9)), 4 * size // 64
    R = 8 if coils >= 4 and rng.random() < 0.5 else 4
    noise = float(np.exp(rng.uniform(np.log(0.005), np.log(0.02))))
    maps = random_maps(1, coils, (size, size), generator)[0]
    A = sense(maps, cartesian_mask(size, R, acs=acs))
    y = A(x) + noise * A.mask(randn((1, *A.range_shape), x.dtype, generator))
    return x, A, y, noise, acs, maps, {"coils": coils, "R": R, "noise": noise}


def seed_of(name: str, number: int) -> int:
    """The seed of a scan of a family."""
    return zlib.crc32(f"{name} {number}".encode())


def study(name: str, head: bool, draw: Draw, prior, organ: Organ | None, number: int, size: int) -> dict:
    """What the verdict said of one scan, and what is true."""
    D, errors = prior
    seed = seed_of(name, number)
    x, A, y, noise, acs, maps, how = scan(draw, np.random.default_rng(seed), size)
    unit = noise**1.5  # of regularisation, for any noise
    split = held_out.hold_out(A, y, acs, seed=seed)
    grid = [g * unit for g in GRID]
    leaning = held_out.Blend.of(split, *(held_out.tuned(split, f, grid) for f in (regularised.tv, regularised.wavelet)))
    images = [method(A, y) for method in (leaning.first, leaning.second)]
    if shutil.which("bart"):  # its l1 wavelets
        images += [regularised.bart_pics(A, y, maps[None], g, penalty="W") for g in grid]
    samples, found = trust.reconstruct(
        D, A, y, noise, for_pixels(errors, pixel_mm(size)), acs=acs, seeds=range(seed, seed + 4),
        classical=leaning, organ=organ,
    )  # fmt: skip
    scores = {c.name: c.score for c in reversed(found.tried)}  # of a name, those at scale 1
    own, leaves = found.first.score, scores.get("dead leaves", found.first.score)
    draws = metrics.spread(samples.x, samples.paired).variance.sum().item()
    error = (samples.mean - x).abs().square().sum().item()
    step = samples.mean - leaning(A, y)  # share * (posterior mean - classical image)
    best_share = found.share * ((step.conj() * (x - samples.mean + step)).real.sum() / step.abs().square().sum()).item()
    return {
        "family": name, "head": head, "number": number, "size": size, **how, "verdict": found.verdict,
        "knows": found.knows, "looks": found.look is None or found.look.like, "accepted": found.accepted,
        "best": max(metrics.psnr(image, x).item() for image in images),
        "trusted": metrics.psnr(samples.mean, x).item(), "calibration": draws / error,
        "share": found.share, "best share": best_share if found.share > 0 else None,
        "statistics": {
            "chi-square": own.chi2, "minus log score": -own.log_score, "chi-square, dead leaves": leaves.chi2,
            "log score, dead leaves - own": leaves.log_score - own.log_score, "widening": own.widening,
            "excess / classical": own.excess / max(found.classical or 0.0, 1e-9), "classical share": 1 - found.share,
            **({} if found.look is None else {f"not a {found.look.organ}": 1 - found.look.probability}),
        },
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- report


def roc(heads: list[float], others: list[float]) -> dict[str, float]:
    """Of a statistic that is larger for what is no head: the area, and heads accepted where 95 % others are flagged."""
    a, b = np.array(heads), np.array(others)
    above = (b[:, None] > a).mean() + 0.5 * (b[:, None] == a).mean()
    return {"AUC": float(above), "heads accepted": float((a < np.quantile(b, 0.05)).mean())}


def report(rows: list[dict]) -> str:
    """Tables in Markdown: a row for each family, and one for each statistic, of scans with an odd number."""
    rows = [row for row in rows if row["number"] % 2]
    lines = []
    for name in dict.fromkeys(row["family"] for row in rows):
        group = [row for row in rows if row["family"] == name]
        gain = np.array([row["trusted"] - row["best"] for row in group])
        line = {"family": name, "n": len(group)}
        for title, key in (("flagged", "accepted"), ("by held-out samples", "knows"), ("by its looks", "looks")):
            line[title] = f"{np.mean([not row[key] for row in group]):.0%}"
        for key in ("chi-square", "classical share"):
            values = np.quantile([row["statistics"][key] for row in group], (0.1, 0.5, 0.9))
            line[f"{key}, 10, 50, 90 %"] = " ".join(f"{v:.2f}" for v in values)
        line |= {"best classical dB": f"{np.mean([row['best'] for row in group]):.1f}"}
        line |= {"trusted dB": f"{np.mean([row['trusted'] for row in group]):.1f}", "worst": f"{gain.min():+.1f}"}
        line |= {"better": f"{(gain > 0).mean():.0%}"}
        lines.append(line)
    scores = []
    for key in rows[0]["statistics"]:
        of = {head: [row["statistics"][key] for row in rows if row["head"] == head] for head in (True, False)}
        scores.append({"statistic": key, **{k: f"{v:.2f}" for k, v in roc(of[True], of[False]).items()}})
    return f"{markdown(lines)}\n{markdown(scores)}"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heads", type=Path, help="folder that `companion data get heads` made")
    parser.add_argument("--measured", type=Path, help="folder with heads/*.npy and others/*.npy")
    parser.add_argument("--weights", default=BY_PIXELS, help="general: the prior for such pixels")
    parser.add_argument("--count", type=int, default=20, help="scans of each family")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/verdicts"))
    args = parser.parse_args(argv)
    if args.count < 2:
        parser.error(f"--count {args.count}: the table is of scans of odd number, which begin with the second")
    weights = general_prior(args.weights, pixel_mm(args.size))
    D = load_denoiser(weights)
    prior, organ = (AnySize(D, network_of(D).total_stride), load_errors(weights)), known_to(weights)
    known, rows = families(args.heads, args.measured), []
    key = describe_source(weights).sha256[:8]
    for number in range(args.count):
        for name, (head, draw) in known.items():
            done = args.out / "scans" / f"{key} {name} {args.size} {number}.json"
            if not done.exists():
                found = study(name, head, draw, prior, organ, number, args.size)
                with atomic_write(done) as path:
                    path.write_text(json.dumps(found) + "\n")
                print(name, number, f"{found['best']:.1f} {found['trusted']:.1f} dB", found["verdict"], flush=True)
            rows.append(json.loads(done.read_text()))
    text = report(rows)
    with atomic_write(args.out / f"table {args.size}.md") as path:
        path.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
