"""Activity by region: bias and intervals."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.acquisition.pet import Scan
from companion.data.pet import Slices, tissue_shares
from companion.evaluation import metrics
from companion.papers.pet.reconstruct import Level, Study
from companion.reconstruction.pet import region_levels

TISSUES = {"CSF": 1, "grey": 2, "white": 3}


# ------------------------------------------------------------------------------------------------- activity by region

HOT = 0.4  # of the most active tissue: what stands out of the tissues by more is a lesion, and a region of its own


def regional(x: Tensor, scan: Scan, shares: Tensor, rounds: int = 4) -> Tensor:
    """Return images (slice, 1, y, x) of tissues and lesions whose levels the counts decide, given what is where.

    shares (slice, tissue, 1, y, x): of each tissue in each pixel, from a segmented MR scan. Lesions are in no such
    scan: they are what stands out of the tissues in the reconstruction x. `emission.region_levels` has the sources.
    """
    hot = torch.zeros_like(x)[:, None]
    for _ in range(rounds):
        shapes = torch.cat([shares, hot], 1)
        levels = region_levels(scan.y, scan.A, shapes, scan.background)[0].float()[..., None, None, None]
        tissue = (levels[:, :-1] * shares).sum(1)
        excess = x - tissue
        image = tissue + levels[:, -1] * hot[:, 0]
        hot = torch.where(excess > HOT * levels[:, :-1].amax(1), excess, 0.0)[:, None]
    return image


def misplaced(shares: Tensor, pixels: float = 0.5) -> Tensor:
    """Return shares that lie `pixels` to the right of where they should, as after an imperfect registration."""
    return torch.lerp(shares, shares.roll(1, -1), pixels)


def decided(shares: Tensor) -> Tensor:
    """Return 1 for the tissue that fills most of each pixel and 0 for others: labels, without partial volume."""
    filled = shares.sum(1, keepdim=True) > 0.5
    return (F.one_hot(shares.argmax(1), shares.shape[1]).movedim(-1, 1) * filled).to(shares)


MAPS = {"none": None, "exact": lambda shares: shares, "half a pixel off": misplaced, "labels only": decided}


def region_rows(images: Mapping[str, Tensor], people: Slices, level: Level) -> list[dict]:
    """Return the bias of each tissue's mean, a row for each method, kind of anatomical maps, and slice."""
    shares, healthy = tissue_shares(people), torch.where(people.lesions > 0, 0, people.labels)
    rows = []
    for name in ("MLEM", "MAP", "posterior mean"):
        for kind, change in MAPS.items():
            x = images[name] if change is None else regional(images[name], level.scan, change(shares))
            bias = metrics.region_bias(x, people.image, healthy, tuple(TISSUES.values()))
            rows += [
                {
                    "level": level.name,
                    "counts": round(level.counts),
                    "method": name,
                    "maps": kind,
                    "person": int(people.subject[i]),
                }
                | dict(zip(TISSUES, b.tolist(), strict=True))
                for i, b in enumerate(bias)
            ]
    return rows


def region_table(study: Study, level: str) -> list[dict]:
    """Return the bias of tissue means at a level, %: mean and standard error, a line for each method and maps."""
    lines = []
    for name in dict.fromkeys((row["method"], row["maps"]) for row in study.regions):
        rows = [row for row in study.regions if (row["method"], row["maps"]) == name and row["level"] == level]
        bias = {t: torch.tensor([100 * row[t] for row in rows], dtype=torch.float64) for t in TISSUES}
        lines.append(
            {"method": name[0], "anatomical maps": name[1]}
            | {f"bias, {t} (%)": mean_and_error(values) for t, values in bias.items()}
        )
    return lines


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return mean and standard error of the values that are not NaN; the error of a single one is NaN."""
    known = values[~values.isnan()]
    return metrics.mean_and_error(known) if len(known) > 1 else (known.mean().item(), float("nan"))
