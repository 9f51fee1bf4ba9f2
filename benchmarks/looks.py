"""How often the readout that says "no head" is right, asked of classical images alone: nothing is drawn.

    python benchmarks/looks.py data/heads --count 24
    python benchmarks/looks.py data/heads --measured FOLDER --size 128     # FOLDER as for benchmarks/verdicts.py

Scans are those of `benchmarks/verdicts.py`, with their seeds and a tenth of the samples held out, as for the verdict.
Beside its families: slices of the validation head near its vertex, its neck and its sides, and virtual people and
patients with lesions of the validation split, brains without a skull. "TV": total variation, as nearly the verdict has
it; "clean": the truth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from verdicts import Draw, families, roc, scan, seed_of

from companion.data import anatomy, patients
from companion.data.heads import AIR, Head
from companion.data.heads_download import load_heads
from companion.diffusion.denoisers import Denoiser
from companion.evaluation.organ import Organ, known_to
from companion.evaluation.tables import markdown
from companion.files import atomic_write
from companion.models.checkpoint import load_denoiser
from companion.reconstruction import held_out, regularised


def rim(head: Head, rng: np.random.Generator, size: int) -> np.ndarray:
    """An outer slice of a head as it is, along an axis: in its first or last tenth."""
    axis, last = int(rng.integers(3)), rng.random() < 0.5
    signal = head.signal[::2, ::2, ::2].movedim(axis, 0)
    tissue = (signal > AIR).float().mean((1, 2))
    inside = (tissue > 0.03).nonzero()[:, 0]
    place = rng.uniform(0.02, 0.1)
    x = signal[inside[round(float(1 - place if last else place) * (len(inside) - 1))]]
    side = max(x.shape)
    square = torch.zeros(1, 1, side, side)
    top, left = ((side - n) // 2 for n in x.shape)
    square[..., top : top + x.shape[0], left : left + x.shape[1]] = x
    image = torch.nn.functional.interpolate(square, size=(size, size), mode="bilinear", antialias=True)[0, 0]
    return np.rot90(image.numpy(), int(rng.integers(4))).copy()


def more(folder: Path) -> dict[str, tuple[bool, Draw]]:
    """Heads beside those of `verdicts.families`."""
    (held,) = load_heads(folder, "validation")
    people, known = anatomy.cohort("validation", 200), {}
    slab = (-45.0, 70.0)  # heights of axial slices of a brain, MNI mm

    def person(rng: np.random.Generator, size: int) -> np.ndarray:
        subject, contrast = people[int(rng.integers(200))], str(rng.choice(("T1w", "T2w", "PDw")))
        height = torch.tensor([rng.uniform(*slab)])
        return anatomy.render(subject, contrast, (1, size, size), slices_mm=height).image[0].abs().numpy()

    def patient(rng: np.random.Generator, size: int) -> np.ndarray:
        if size not in known:
            known[size] = patients.anatomies(None, "validation", anatomy.FIELD_OF_VIEW_MM / size)
        subject, contrast = people[int(rng.integers(200))], str(rng.choice(("T1w", "T2w", "PDw")))
        source = known[size][int(rng.integers(len(known[size])))]
        height = torch.tensor([rng.uniform(*slab)])
        return patients.patient(source, subject, (contrast,), height, size)[contrast][0, 0].numpy()

    return {
        "head, outer slice": (True, lambda rng, size: rim(held, rng, size)),
        "virtual person": (True, person),
        "virtual patient": (True, patient),
    }


def seen(draw: Draw, name: str, number: int, size: int) -> dict[str, Tensor]:
    """The images (1, 1, y, x) of one scan by reconstruction."""
    seed = seed_of(name, number)
    x, A, y, noise, acs, _, _ = scan(draw, np.random.default_rng(seed), size)
    split = held_out.hold_out(A, y, acs, seed=seed)
    return {"TV": regularised.tv(split.A, split.y, 2 * noise**1.5), "clean": x}


def study(known: dict[str, tuple[bool, Draw]], D: Denoiser, organ: Organ, count: int, size: int) -> list[dict]:
    """A row for each scan: its family, whether it is a head, and the probability by reconstruction."""
    rows = []
    for name, (head, draw) in known.items():
        for number in range(count):
            p = {k: organ.probability(D, x).item() for k, x in seen(draw, name, number, size).items()}
            rows.append({"family": name, "head": head, "number": number, "size": size, "p": p})
        print(name, [f"{row['p']['TV']:.2f}" for row in rows[-count:]], flush=True)
    return rows


def report(rows: list[dict], accept: float) -> str:
    """A table in Markdown: how many of each family are flagged, by reconstruction; and of all heads and all others."""
    kinds, lines = list(rows[0]["p"]), []
    groups = {name: [r for r in rows if r["family"] == name] for name in dict.fromkeys(r["family"] for r in rows)}
    groups |= {"all heads": [r for r in rows if r["head"]], "all others": [r for r in rows if not r["head"]]}
    for name, group in groups.items():
        line = {"family": name, "head": "yes" if group[0]["head"] else "no", "n": len(group)}
        for kind in kinds:
            p = np.array([row["p"][kind] for row in group])
            line[f"flagged, {kind}"] = int((p < accept).sum())
        line["probability, TV, 10, 50, 90 %"] = " ".join(
            f"{v:.2f}" for v in np.quantile([row["p"]["TV"] for row in group], (0.1, 0.5, 0.9))
        )
        lines.append(line)
    areas = []
    for kind in kinds:
        of = {head: [1 - row["p"][kind] for row in rows if row["head"] == head] for head in (True, False)}
        areas.append({"reconstruction": kind, **{k: f"{v:.3f}" for k, v in roc(of[True], of[False]).items()}})
    return f"{markdown(lines)}\n{markdown(areas)}"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heads", type=Path, help="folder that `companion data get heads` made")
    parser.add_argument("--measured", type=Path, help="folder with heads/*.npy and others/*.npy")
    parser.add_argument("--weights", default="general/2d", help="a prior that has a readout of heads")
    parser.add_argument("--count", type=int, default=24, help="scans of each family")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/looks"))
    args = parser.parse_args(argv)
    D, organ = load_denoiser(args.weights), known_to(args.weights)
    if organ is None:
        parser.error(f"{args.weights} has no readout; python -m companion.papers.organ fits one")
    rows = study(families(args.heads, args.measured) | more(args.heads), D, organ, args.count, args.size)
    with atomic_write(args.out / f"rows {args.size}.json") as path:
        path.write_text(json.dumps(rows) + "\n")
    print(report(rows, organ.accept))


if __name__ == "__main__":
    main()
