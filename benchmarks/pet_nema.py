"""Contrast recovery against background variability on a phantom like that of NEMA NU 2, for every PET reconstruction.

    python benchmarks/pet_nema.py [--counts 3e5] [--repeats 4] [--ratio 4] [--out runs/benchmarks/pet_nema]

Six hot spheres of 10 to 37 mm in one plane of a body of 5.3 kBq/mL (water), a lung of 50 mm without activity in the
middle. Five slices 10 mm apart, the middle one through the spheres, each scanned by itself, with no inverse crime
(`acquisition.simulated`: strips, finer pixels, detectors of 4 mm, scatter and randoms, a scatter estimate that is off).

As NEMA NU 2-2018, section 7, has it: contrast recovery (C_H / C_B - 1) / (a_H / a_B - 1) of a sphere's disc in the
middle slice, C_B the mean of 12 discs of the same size in each of the five slices; background variability is the
standard deviation of these 60 over their mean; lung residual, the mean in the lung over C_B. In per cent, mean over
repeats. What differs: slices instead of a volume, and their number of angles.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.acquisition.pet import Scan
from companion.acquisition.simulated import simulate
from companion.evaluation import tables
from companion.files import atomic_write
from companion.reconstruction.activity import HEADS, Prior, Sampler, posterior, trusted
from companion.reconstruction.pet import METHODS
from companion.show import figures

PIXEL_MM, SIZE, FINE = 3.5, 96, 3
DIAMETERS = (10.0, 13.0, 17.0, 22.0, 28.0, 37.0)  # of the spheres, mm
RING_MM, LUNG_MM, BACKGROUND = 57.2, 50.0, 5.3  # radius of their centres, width of the lung, kBq/mL
HEIGHTS = (-20.0, -10.0, 0.0, 10.0, 20.0)  # of the slices, mm from the centres of the spheres
WATER, LUNG = 0.0096, 0.003  # attenuation, 1/mm
SETTINGS = {
    "MLEM": (5, 10, 20, 40, 80),
    "OSEM": (1, 2, 4, 8),
    "filtered MLEM": (1.0, 1.5, 2.0, 3.0),
    "MAP": (0.01, 0.03, 0.1, 0.3),
}
CHOSEN = {"MLEM": 40, "OSEM": 4, "filtered MLEM": 1.5, "MAP": 0.03}  # shown in the table and the pictures


# --------------------------------------------------------------------------------------------------------- phantom


def places(count: int = SIZE * FINE, field_mm: float = SIZE * PIXEL_MM) -> tuple[Tensor, Tensor]:
    """x to the right and y upwards (y, x) of pixels, mm from the middle of the image."""
    line = (torch.arange(count) - (count - 1) / 2) * field_mm / count
    y, x = torch.meshgrid(-line, line, indexing="ij")
    return x, y


def disc(x: Tensor, y: Tensor, centre: tuple[float, float], radius: float) -> Tensor:
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2


def body(x: Tensor, y: Tensor) -> Tensor:
    """The outline of the phantom: a half disc of 147 mm above, two quarters of 77 mm and what is between them below."""
    y = y + 35.0  # the middle of the spheres lies 35 mm above the straight line between both halves
    below = (y <= 0) & (y >= -77) & (x.abs() <= 70)
    corners = (y <= 0) & (((x.abs() - 70) ** 2 + y**2) <= 77**2) & (x.abs() >= 70)
    return ((x**2 + y**2 <= 147**2) & (y > 0)) | below | corners


def centres() -> list[tuple[float, float]]:
    """Of the spheres (x, y), mm, a sixth of a turn apart."""
    turns = [math.pi * (i / 3 + 1) for i in range(len(DIAMETERS))]
    return [(RING_MM * math.cos(t), RING_MM * math.sin(t)) for t in turns]


@cache
def background_centres(count: int = 12) -> list[tuple[float, float]]:
    """Of the discs of the background: as far from one another as there is room for the largest, beside the spheres."""
    x, y = places()
    largest, room = DIAMETERS[-1] / 2, 5.0
    outside = torch.stack([x, y], -1)[~body(x, y)]
    line = torch.arange(-150.0, 150.0, 5.0).tolist()
    known = [((0.0, 0.0), LUNG_MM / 2), *((c, d / 2) for c, d in zip(centres(), DIAMETERS, strict=True))]
    free = [
        p
        for p in ((a, b) for a in line for b in line)
        if all(math.dist(p, c) > r + largest + room for c, r in known)
        and (outside - torch.tensor(p)).norm(dim=1).min() > largest + room
    ]
    chosen = [min(free)]
    while len(chosen) < count:
        chosen.append(max(free, key=lambda p: min(math.dist(p, c) for c in chosen)))
    return chosen


def phantom(ratio: float) -> tuple[Tensor, Tensor]:
    """Activity (slice, 1, y, x), kBq/mL, and attenuation, 1/mm, on fine pixels."""
    x, y = places()
    inside, lung = body(x, y), disc(x, y, (0.0, 0.0), LUNG_MM / 2)
    slices = []
    for height in HEIGHTS:
        image = BACKGROUND * (inside & ~lung).float()
        for centre, diameter in zip(centres(), DIAMETERS, strict=True):
            half = (diameter / 2) ** 2 - height**2
            if half > 0:
                image[disc(x, y, centre, half**0.5)] = ratio * BACKGROUND
        slices.append(image[None])
    mu = torch.where(lung, LUNG, WATER) * inside
    return torch.stack(slices), mu.expand(len(HEIGHTS), 1, *mu.shape)


# ---------------------------------------------------------------------------------------------------------- figures


@cache
def share(centre: tuple[float, float], diameter: float) -> Tensor:
    """The share (y, x) of each pixel that lies in a disc."""
    return F.avg_pool2d(disc(*places(), centre, diameter / 2)[None].float(), FINE)[0]


def quality(x: Tensor, ratio: float) -> dict[str, float]:
    """The figures of images (repeat * slice, 1, y, x) of the phantom, in per cent."""
    x = x.reshape(-1, len(HEIGHTS), SIZE, SIZE)
    found = {}
    for centre, diameter in zip(centres(), DIAMETERS, strict=True):
        spots = torch.stack([share(c, diameter) for c in background_centres()])
        values = torch.einsum("rsyx,byx->rsb", x, spots) / spots.sum((1, 2))
        mean = values.mean((1, 2))
        hot = (x[:, len(HEIGHTS) // 2] * share(centre, diameter)).sum((1, 2)) / share(centre, diameter).sum()
        found[f"recovery {diameter:g} mm"] = 100 * ((hot / mean - 1) / (ratio - 1)).mean().item()
        found[f"variability {diameter:g} mm"] = 100 * (values.flatten(1).std(1) / mean).mean().item()
    lung = share((0.0, 0.0), 0.6 * LUNG_MM)
    found["lung residual"] = 100 * ((x * lung).sum((2, 3)) / lung.sum() / mean[:, None]).mean().item()
    return found


def main() -> None:
    """Scan, reconstruct, measure; write the table, `pet_nema.json` and a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=float, default=3e5, help="true counts of a slice")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=4.0, help="activity of the spheres / background")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--evaluations", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/pet_nema"))
    args = parser.parse_args()
    image, mu = (v.repeat(args.repeats, 1, 1, 1) for v in phantom(args.ratio))
    scan = simulate(image, mu, args.counts, range(len(image)), pixel_mm=PIXEL_MM, fine=FINE)
    rows, pictures = [], {"truth": scan.truth[len(HEIGHTS) // 2]}

    def add(method: str, setting: float | None, reconstruct: Callable[[Scan], Tensor]) -> None:
        began = time.process_time()
        x = reconstruct(scan)
        seconds = (time.process_time() - began) / len(x)
        rows.append({"method": method, "setting": setting, **quality(x, args.ratio), "seconds a slice": seconds})
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        if setting in (None, CHOSEN.get(method)):
            pictures[method] = x[len(HEIGHTS) // 2]

    add("truth", None, lambda s: s.truth)
    for name, settings in SETTINGS.items():
        for value in settings:
            add(name, value, lambda s, f=METHODS[name], v=value: f(s.y, s.A, s.background, v))
    priors, sampler = Prior.every(HEADS, False), Sampler(args.draws, args.evaluations)
    first, by_map = next(iter(priors.values())), METHODS["MAP"]
    add(HEADS, None, lambda s: posterior(first, s, sampler).mean)
    add(
        "trusted",
        None,
        lambda s: trusted(priors, s, lambda p: by_map(p.y, p.A, p.background, CHOSEN["MAP"]), sampler).image,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out / "pet_nema.json") as aside:
        aside.write_text(json.dumps({"counts": args.counts, "ratio": args.ratio, "rows": rows}, indent=1))
    lines = {
        name: [[r[f"{what} 22 mm"] for r in rows if r["method"] == name] for what in ("variability", "recovery")]
        for name in dict.fromkeys(r["method"] for r in rows)
    }
    figures.curves(lines, xlabel="background variability (%)", ylabel="contrast recovery, 22 mm (%)").savefig(
        args.out / "pet_nema_curves.png", dpi=110
    )
    figures.image_grid({"one slice": pictures}, window=(0, 1.2 * args.ratio * BACKGROUND), width=1.6).savefig(
        args.out / "pet_nema.png", dpi=110
    )
    names = ("recovery 10 mm", "variability 10 mm", "recovery 22 mm", "variability 22 mm", "lung residual")
    told = [r for r in rows if r["setting"] in (None, CHOSEN.get(r["method"]))]
    print(tables.markdown([{k: r[k] for k in ("method", "setting", *names, "seconds a slice")} for r in told]))


if __name__ == "__main__":
    main()
