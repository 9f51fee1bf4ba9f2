"""Are drawn brains any use? Segmenters trained on them, on virtual people and on both, judged on real people.

    python benchmarks/latent3d_segmenter.py data/heads [--people 40] [--steps 800] [--out runs/benchmarks/segmenter]

The small network of `evaluation.segmenter` learns T1w slices of 3 mm with their tissue, from as many slices each
time: of virtual people (`data.volumes`), whose tissue is known; of volumes drawn from a latent prior, whose labels
are those that the first segmenter gives them; and of half of both. Real people are the heads of `companion data get
heads`, none of which the prior or the segmenters saw: their brain, N4, and as labels what a mixture of three
Gaussians says of its signal, no expert's. Mean Dice and standard error over people. Slices as they lie in the
scanner.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from companion.data import anatomy, patients, volumes
from companion.data.head_tissues import brain_mask, fluid_level, tissue_levels
from companion.data.heads import Head
from companion.data.heads_download import load_heads
from companion.evaluation import metrics, tables
from companion.evaluation.segmenter import Segmenter, train_segmenter
from companion.files import atomic_write
from companion.models.latent import PRIOR, load_latent
from companion.models.latent_draws import Drawing, draw
from companion.show import figures

VOXEL_MM, SIZE, LEAST = 3.0, 64, 0.05  # of the slices; and the share of a slice that a brain has to fill
TISSUES = ("CSF", "grey", "white")


def real_person(head: Head) -> tuple[Tensor, Tensor]:
    """Axial slices (slice, 1, y, x) of the brain of a head, 1 its bright tissue, and their labels."""
    step = np.array(head.voxel_mm) * 2
    signal = head.signal[::2, ::2, ::2].numpy()
    brain = brain_mask(signal, step)
    signal = signal / patients.receive_bias(signal, brain)
    _, grey, white = tissue_levels(signal, brain)
    csf = fluid_level(grey, white)
    label = np.where(brain > 0.5, np.digitize(signal, [(csf + grey) / 2, (grey + white) / 2]) + 1, 0)
    middle = np.array(ndimage.center_of_mass(brain > 0.5))
    at = [(np.arange(SIZE) - (SIZE - 1) / 2) * VOXEL_MM / s + m for s, m in zip(step, middle, strict=True)]
    places = np.meshgrid(at[2], at[1][::-1], at[0], indexing="ij")[::-1]  # z, y from the front, x
    soft = [
        ndimage.gaussian_filter(v, VOXEL_MM / 2.355 / step)
        for v in (signal * brain, *((label == k).astype(np.float32) for k in range(4)))
    ]
    image, *shares = (ndimage.map_coordinates(v, places, order=1) for v in soft)
    image, labels = torch.from_numpy(image / white)[:, None], torch.from_numpy(np.stack(shares)).argmax(0)[:, None]
    return image.float(), labels.to(torch.uint8)


def slices_of(images: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The slices of volumes (n, z, y, x) and shares (n, 4, z, y, x) in which there is a brain."""
    x, s = images.flatten(0, 1)[:, None], shares.movedim(1, 2).flatten(0, 1)
    there = (s[:, 1:].sum(1) > 0.5).float().mean((1, 2)) > LEAST
    return x[there], s[there]


def one_hot(labels: Tensor) -> Tensor:
    """Shares (n, 4, z, y, x) of labels (n, z, y, x)."""
    return torch.nn.functional.one_hot(labels.long(), 4).movedim(-1, 1).float()


def main() -> None:
    """Train, judge, write `segmenter.json` and a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heads", type=Path)
    parser.add_argument("--prior", default=PRIOR)
    parser.add_argument("--people", type=int, default=40)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/segmenter"))
    args = parser.parse_args()
    people = [volumes.virtual(s, (SIZE,) * 3) for s in anatomy.cohort("train", args.people)]
    virtual = slices_of(torch.stack([p.image for p in people]), one_hot(torch.stack([p.labels for p in people])))
    judges = {"virtual people": train_segmenter(*virtual, args.steps)}
    prior = load_latent(args.prior)
    with torch.no_grad():
        parts = torch.arange(args.people).split(8)
        drawn = torch.cat([draw(prior, Drawing(), part.tolist()).x for part in parts]).clamp(min=0)
    made = slices_of(drawn[:, 0], one_hot(judges["virtual people"].labels(drawn)[:, 0]))
    g = torch.Generator().manual_seed(0)
    half = [torch.randperm(len(x), generator=g)[: len(x) // 2] for x, _ in (virtual, made)]
    both = [torch.cat([a[half[0]], b[half[1]]]) for a, b in zip(virtual, made, strict=True)]
    judges |= {"drawn people": train_segmenter(*made, args.steps), "half of both": train_segmenter(*both, args.steps)}
    real = {
        head.name: real_person(head)
        for split in ("train", "validation")
        for head in load_heads(args.heads, split)
        if not head.name.endswith("_brain")
    }
    rows = [{"trained on": name, "slices": n} | scores(judge, real) for (name, judge), n in
            zip(judges.items(), (len(virtual[0]), len(made[0]), len(both[0])), strict=True)]  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out / "segmenter.json") as aside:
        aside.write_text(json.dumps({"people": list(real), "rows": rows}, indent=1))
    shown = {}
    for name, (x, labels) in real.items():
        z = len(x) // 2
        shown[name] = {"T1w": x[z], "classical": labels[z] / 3} | {
            k: j.labels(x[z][None])[0] / 3 for k, j in judges.items()
        }
    figures.image_grid(shown, window=(0, 1.1), width=1.4).savefig(args.out / "segmenter.png", dpi=110)
    print(tables.markdown(rows))


def scores(judge: Segmenter, real: dict[str, tuple[Tensor, Tensor]]) -> dict:
    """Dice of each tissue in whole people: mean and standard error."""
    found = torch.stack([metrics.dice(judge.labels(x).flatten()[None], y.flatten()[None])[0] for x, y in real.values()])
    return {name: tables.average(values) for name, values in zip(TISSUES, found.T, strict=True)}


if __name__ == "__main__":
    main()
