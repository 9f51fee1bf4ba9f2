"""Where the regional bias of a PET posterior mean comes from: of the prior, or of how the region was cut?

    python benchmarks/pet_regions.py --out runs/benchmarks/pet_regions

Two kinds of truth are scanned at the published low dose: people whom nobody was trained on, and draws of the prior, for
which the prior is right by construction. Classes of pixels (CSF-, white- and grey-like) are cut by their activity
    - in the truth, as a segmentation of the truth does;
    - in the posterior mean, or in one draw (then the other draws make the mean): known without the truth;
    - in one draw that plays the truth, so the posterior's own forecast of the first.
Columns: bias of the mean of each class, %, mean and standard error over slices; "inside 80 %": how often the true mean
of a class lies in the interval that the draws state. Regions cut from the truth select pixels by what the counts leave
open, so that even an exact posterior mean is biased there (regression to the mean); what people have more of it than
draws of the prior is the prior's.
Writes table.md, table.csv and results.json into --out, whole or not at all.
"""

import argparse
from pathlib import Path

import torch
from pet_projector import write
from torch import Tensor

from companion.acquisition.pet import acquire
from companion.data.pet import held_out
from companion.diffusion.noise import karras
from companion.diffusion.sampling import sample
from companion.evaluation import metrics
from companion.evaluation.doses import mean_and_error
from companion.evaluation.tables import markdown
from companion.papers.pet.study import Enhance
from companion.reconstruction.activity import Prior, posterior

CLASSES = {
    "CSF-like, 0.5 to 3 kBq/mL": (0.5, 3.0),
    "white-like, 3 to 11": (3.0, 11.0),
    "grey-like, 11 to 31": (11.0, 31.0),
}


def means(x: Tensor, cut: Tensor) -> Tensor:
    """The mean of x in each class of pixels of the image `cut`, (slice, class)."""
    inside = torch.stack([((cut > low) & (cut <= high)).double() for low, high in CLASSES.values()], 1)
    return (x.double()[:, None] * inside).flatten(2).sum(2) / inside.flatten(2).sum(2)


def line(truth: str, regions: str, draws: Tensor, x: Tensor, cut: Tensor) -> dict:
    """One line of the table: draws (draw, slice, 1, y, x) against x in the classes of `cut`."""
    true, found = means(x, cut), torch.stack([means(one, cut) for one in draws])
    bias = 100 * (means(draws.mean(0), cut) / true - 1)
    _, shares = metrics.coverage(
        found.nan_to_num()[..., None, None], true.nan_to_num()[..., None, None], (0.8,), ~true.isnan()[..., None, None]
    )
    return (
        {"truth": truth, "regions cut from": regions}
        | {name: mean_and_error(values) for name, values in zip(CLASSES, bias.T, strict=True)}
        | {"inside 80 % (%)": 100 * shares.mean().item()}
    )


def rows_of(name: str, x: Tensor, mu: Tensor, pixel_mm: float, prior: Prior, p: Enhance) -> list[dict]:
    """The four ways to cut, for one kind of truth."""
    scan = acquire(x, mu, 0.25 * p.full_counts, range(900, 900 + len(x)), pixel_mm=pixel_mm)
    draws = posterior(prior, scan, p, p.seed).x
    return [
        line(name, "the truth", draws, x, x),
        line(name, "the posterior mean", draws, x, draws.mean(0)),
        line(name, "one draw", draws[1:], x, draws[0]),
        line("one of its draws", "the same draw", draws[1:], draws[0], draws[0]),
    ]


def main(argv=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/pet_regions"))
    parser.add_argument("--slices", type=int, default=16)
    args = parser.parse_args(argv)
    p = Enhance(device="cpu")
    measured = held_out("validation", p.validation_subjects, p.image_size, lesions=1).image
    prior = Prior.load(p.prior, measured, p.device, p.autocast, p.seed)
    people = held_out("validation", args.slices, p.image_size, lesions=1)
    drawn = (
        sample(
            prior.D,
            karras(18, 0.01, 40.0),
            shape=people.image.shape[1:],
            seeds=range(100, 100 + args.slices),
            solver="heun",
        ).x.clamp(min=0)
        * prior.scale_kbq
    )
    rows = [
        row
        for name, x in (("draws of the prior", drawn), ("people", people.image))
        for row in rows_of(name, x, people.mu, people.pixel_mm, prior, p)
    ]
    write(args.out, rows, markdown(rows))
    return rows


if __name__ == "__main__":
    main()
