"""How right is an image of activity: of one slice against its truth, and of a population of drawn slices.

Images are (slice, 1, y, x) in kBq/mL.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.data.pet import Slices
from companion.evaluation import metrics
from companion.evaluation.population import relative_distance

TISSUES = {"CSF": 1, "grey": 2, "white": 3}  # values of `Slices.labels`


def healthy(people: Slices) -> Tensor:
    """The labels (slice, 1, y, x) without lesions, which are no tissue."""
    return torch.where(people.lesions > 0, 0, people.labels)


def score(x: Tensor, people: Slices) -> dict[str, Tensor]:
    """The figures of images x, one value for each slice; NaN for what a slice does not have.

    PSNR's peak is each slice's true maximum. Bias and noise: of the mean over a tissue, and inside it, over the mean of
    the truth there. "inside": pixels whose eight neighbours are of the same tissue, so that blur across its edge does
    not count as bias. Recovery: of the contrast of the lesion to the brain around it.
    """
    truth, labels = people.image, healthy(people)
    bias = metrics.region_bias(x, truth, labels, tuple(TISSUES.values()))
    brain = metrics.region_bias(x, truth, people.labels > 0, (1,))
    inside = metrics.region_bias(x, truth, interior(labels), tuple(TISSUES.values()))
    noise = metrics.region_noise(x, truth, labels, (TISSUES["white"],))
    return {
        "NRMSE": metrics.nrmse(x, truth),
        "PSNR": metrics.psnr(x, truth),
        "SSIM": metrics.ssim(x, truth),
        "bias, brain": brain[:, 0],
        **{f"bias, {tissue}": bias[:, i] for i, tissue in enumerate(TISSUES)},
        **{f"bias, {tissue} inside": inside[:, i] for i, tissue in enumerate(TISSUES) if tissue != "CSF"},
        "noise, white": noise[:, 0],
        "recovery": metrics.lesion_recovery(x, truth, people.lesions > 0, surroundings(people)),
    }


def surroundings(people: Slices, inner: int = 1, outer: int = 4) -> Tensor:
    """Masks (slice, 1, y, x) of brain more than `inner` and at most `outer` pixels away from a lesion."""

    def grown(pixels: int) -> Tensor:
        return F.max_pool2d((people.lesions > 0).float(), 2 * pixels + 1, 1, pixels) > 0

    return grown(outer) & ~grown(inner) & (people.labels > 0)


def interior(labels: Tensor) -> Tensor:
    """The labels (slice, 1, y, x) where all neighbours have the same, else 0."""
    values = labels.float()
    highest, lowest = F.max_pool2d(values, 3, 1, 1), -F.max_pool2d(-values, 3, 1, 1)
    return torch.where(highest == lowest, labels, 0)


def count_linearity(images: Mapping[str, list[Tensor]], people: Slices) -> list[dict]:
    """For each method the line through measured against true activity of all tissues, people and images of it."""
    labels, lines = healthy(people), []

    def means(x: Tensor) -> Tensor:
        found = []
        for value in TISSUES.values():
            inside = (labels == value).double()
            found.append((x.double() * inside).flatten(1).sum(1) / inside.flatten(1).sum(1))
        return torch.cat(found)

    for name, found in images.items():
        measured, true = torch.cat([means(x) for x in found]), torch.cat([means(people.image)] * len(found))
        known = ~true.isnan()
        slope, intercept, r2 = metrics.linearity(measured[known], true[known])
        lines.append({"method": name, "slope": slope, "intercept (kBq/mL)": intercept, "R2": r2})
    return lines


# ---------------------------------------------------------------------------------------------------------- population

FACTS = ("mean activity (kBq/mL)", "99th percentile (kBq/mL)", "head (cm2)", "hot share", "roughness")


def facts(x: Tensor, pixel_mm: float) -> Tensor:
    """Numbers of slices that draws and people should share, (slice, FACTS).

    Mean activity in the head, its 99th percentile, area of the head (activity above 1 kBq/mL), share of it that is hot
    as grey matter (above half of the percentile), and mean absolute difference of neighbours over the mean.
    """
    rows = []
    for one in x[:, 0].double():
        head = one > 1.0
        values = one[head] if head.any() else one.flatten()
        high = torch.quantile(values, 0.99)
        steps = (one.diff(dim=0).abs().mean() + one.diff(dim=1).abs().mean()) / 2
        area, hot = head.sum() * (pixel_mm / 10) ** 2, (values > high / 2).double().mean()
        rows.append(torch.stack([values.mean(), high, area, hot, steps / one.mean().clamp(min=1e-9)]))
    return torch.stack(rows)


def nearest(x: Tensor, others: Tensor | None = None) -> Tensor:
    """The distance of each slice of x to the nearest of others, by default of the other slices of x.

    See `population.relative_distance`.
    """
    a = x.flatten(1).double()
    if others is None:
        return relative_distance(a, a).fill_diagonal_(torch.inf).amin(1)
    return relative_distance(a, others.flatten(1).double()).amin(1)


def population_table(drawn: Tensor, people: Tensor, pixel_mm: float, training: Tensor | None = None) -> list[dict]:
    """`facts` of drawn and of held-out slices, mean and standard error, and two distances.

    To the nearest other of its own kind (small: draws repeat one another) and, given training slices, to the nearest of
    them (smaller than that of held-out people: the network has learnt them by heart).
    """
    rows = []
    for name, x in (("held-out people", people), ("drawn", drawn)):
        values = facts(x, pixel_mm)
        row = {"slices": name, "n": len(x)}
        row |= {fact: metrics.mean_and_error(values[:, i]) for i, fact in enumerate(FACTS)}
        row["to the nearest other"] = metrics.mean_and_error(nearest(x))
        if training is not None:
            row["to the nearest of training"] = metrics.mean_and_error(nearest(x, training))
        rows.append(row)
    return rows
