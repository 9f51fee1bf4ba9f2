"""The study of 4_enhance: all methods at all doses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from companion.acquisition.pet import Scan, acquire
from companion.data.pet import Slices
from companion.evaluation import metrics
from companion.papers.pet.reconstruct import (
    METHODS,
    TRUSTS,
    Enhance,
    Level,
    Network,
    Prior,
    Study,
    oracle_stop,
    posterior,
    tune,
    validation_people,
    with_likelihood,
)
from companion.papers.pet.regions import TISSUES, mean_and_error, region_rows


def run_study(p: Enhance, people: Slices | None, levels: Sequence[Level], progress: bool = True) -> Study:
    """Return every method's images at every level, scored where the truth is known (`people` not None)."""
    prior, network, study = Prior.load(p), Network.load(p) if p.network else None, Study()
    for level in tqdm(levels, desc="doses", disable=not progress):
        validation = validation_scan(p, level)
        tuned = {name: tune(name, validation) for name in METHODS}
        images = {name: METHODS[name](level.scan, setting) for name, setting in tuned.items()}
        if people is not None:
            images["MLEM, oracle stop"] = oracle_stop(level.scan)
        spread, stated = {}, {}
        if network is not None:
            guess, other = network.guess(level.scan, p.seed), network.guess(validation, p.seed)
            tuned["network + likelihood"] = min(
                TRUSTS, key=lambda t: metrics.nrmse(with_likelihood(other, validation, t), validation.x).mean().item()
            )  # noqa: B023
            images["network"] = guess[0]
            images["network + likelihood"] = with_likelihood(guess, level.scan, tuned["network + likelihood"])
            if people is not None and hasattr(network.D, "moments"):
                stated = {"network": (guess[1].sum() / (guess[0] - people.image).square().sum()).item()}
        result = posterior(prior, level.scan, p)
        images |= {"posterior mean": result.mean, "one draw": result.x[0]}
        spread["posterior mean"] = result.x
        study.bills["posterior"], study.draws[level.name] = result.bill, result.x
        if level.name.endswith("dose"):
            for name in p.samplers:
                guided = posterior(prior, level.scan, p, name)
                images[f"{name}, mean"], spread[f"{name}, mean"] = guided.mean, guided.x
                study.bills[name] = guided.bill
        study.tuned[level.name], study.images[level.name] = tuned, images
        if people is not None:
            study.rows += [row for name, x in images.items() for row in rows_of(name, x, people, level)]
            study.regions += region_rows(images, people, level)
            study.calibration.append(
                {"level": level.name, "counts": round(level.counts)}
                | {name: calibration(draws, people.image) for name, draws in spread.items()}
                | stated
            )
    return study


def validation_scan(p: Enhance, level: Level) -> Scan:
    """Return scans of validation people with the true counts of a level."""
    people = validation_people(p.validation_subjects, p.image_size)
    mu = people.mu if p.attenuation else None
    return acquire(
        people.image,
        mu,
        level.counts,
        [p.seed + 5000 + i for i in range(len(people.image))],
        pixel_mm=people.pixel_mm,
        randoms=p.randoms,
        scatter=p.scatter,
    )


def calibration(draws: Tensor, truth: Tensor) -> float:
    """Return the variance of draws (draw, slice, 1, y, x) over the squared error of their mean, summed over slices.

    1 is calibrated, below 1 over-confident; `metrics.calibration_ratio` of all slices as one image.
    """
    together = draws.movedim(1, 2).flatten(2, 3)[:, None]
    return metrics.calibration_ratio(together, truth.movedim(0, 1).flatten(1, 2)[None]).item()


def nrmse(x: Tensor, truth: Tensor) -> float:
    """Return the NRMSE of one image (1, y, x)."""
    return metrics.nrmse(x[None], truth[None]).item()


def surroundings(people: Slices, inner: int = 1, outer: int = 4) -> Tensor:
    """Return masks (slice, 1, y, x) of brain more than `inner` and at most `outer` pixels away from a lesion."""

    def grown(pixels: int) -> Tensor:
        return F.max_pool2d((people.lesions > 0).float(), 2 * pixels + 1, 1, pixels) > 0

    return grown(outer) & ~grown(inner) & (people.labels > 0)


def interior(labels: Tensor) -> Tensor:
    """Return the labels (slice, 1, y, x) where all neighbours have the same, else 0."""
    values = labels.float()
    highest, lowest = F.max_pool2d(values, 3, 1, 1), -F.max_pool2d(-values, 3, 1, 1)
    return torch.where(highest == lowest, labels, 0)


def score(x: Tensor, people: Slices) -> dict[str, Tensor]:
    """Return the figures of images x (slice, 1, y, x), one value for each slice; NaN for what a slice does not have.

    PSNR's peak is each slice's true maximum. Bias and noise: of the mean over a tissue, and inside it, over the mean of
    the truth there; lesions are no tissue. "inside": pixels whose eight neighbours are of the same tissue, so that blur
    across its edge does not count as bias. Recovery: of the contrast of the lesion to the brain around it.
    """
    truth, healthy = people.image, torch.where(people.lesions > 0, 0, people.labels)
    bias = metrics.region_bias(x, truth, healthy, tuple(TISSUES.values()))
    brain = metrics.region_bias(x, truth, people.labels > 0, (1,))
    inside = metrics.region_bias(x, truth, interior(healthy), tuple(TISSUES.values()))
    noise = metrics.region_noise(x, truth, healthy, (TISSUES["white"],))
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


def rows_of(name: str, x: Tensor, people: Slices, level: Level) -> list[dict]:
    """Return a row of plain numbers for each slice of one method's images at one level."""
    figures = score(x, people)
    return [
        {"level": level.name, "counts": round(level.counts), "method": name, "person": int(people.subject[i])}
        | {key: values[i].item() for key, values in figures.items()}
        for i in range(len(x))
    ]


def table(study: Study, level: str, versus: str = "posterior mean") -> list[dict]:
    """Return one line per method at a level: means over people and their standard errors.

    "gain": by how much the NRMSE of `versus` is lower on the same people, in per cent of the method's.
    """
    rows = [row for row in study.rows if row["level"] == level]
    values = {
        name: columns([row for row in rows if row["method"] == name])
        for name in dict.fromkeys(row["method"] for row in rows)
    }
    lines = []
    for name, v in values.items():
        gain = 100 * (1 - values[versus]["NRMSE"] / v["NRMSE"])
        lines.append(
            {
                "method": name,
                "NRMSE": mean_and_error(v["NRMSE"]),
                "gain (%)": mean_and_error(gain),
                "PSNR (dB)": mean_and_error(v["PSNR"]),
                "SSIM": mean_and_error(v["SSIM"]),
                **{f"{key} (%)": mean_and_error(100 * v[key]) for key in v if key.startswith(("bias", "noise"))},
                "lesion recovery": mean_and_error(v["recovery"]),
            }
        )
    return lines


def columns(rows: Sequence[Mapping]) -> dict[str, Tensor]:
    """Return the numbers of rows by name, (row,)."""
    return {
        key: torch.tensor([row[key] for row in rows], dtype=torch.float64)
        for key in rows[0]
        if key not in ("level", "method")
    }


def curves(study: Study, methods: Sequence[str], figure: str = "NRMSE") -> dict[str, tuple]:
    """Return for each method (counts, mean of a figure, its standard error), as `figures.curves` takes them."""
    lines = {}
    for name in methods:
        groups: dict[int, list[dict]] = {}
        for row in study.rows:
            if row["method"] == name:
                groups.setdefault(row["counts"], []).append(row)
        if groups:
            pairs = [mean_and_error(columns(rows)[figure]) for _, rows in sorted(groups.items())]
            lines[name] = (sorted(groups), [a for a, _ in pairs], [b for _, b in pairs])
    return lines


def same_quality(study: Study, method: str, versus: str = "posterior mean") -> list[dict]:
    """Return how many counts `versus` needs for the NRMSE that a method has at each level, and how many times fewer.

    By interpolation of log NRMSE over log counts; None below the lowest level that was measured.
    """
    (counts, ours, _), (_, theirs, _) = (curves(study, [name])[name] for name in (versus, method))
    x, y = np.log(counts), np.log(ours)
    lines = []
    for n, error in zip(counts, theirs, strict=True):
        reached = y.min() <= np.log(error) <= y.max()
        needed = float(np.exp(np.interp(np.log(error), y[::-1], x[::-1]))) if reached else None
        lines.append(
            {
                "counts": n,
                f"NRMSE of {method}": error,
                f"counts for it with {versus}": needed and round(needed),
                "times fewer": needed and n / needed,
            }
        )
    return lines


def count_linearity(study: Study, people: Slices, methods: Sequence[str]) -> list[dict]:
    """Return for each method the line through measured against true activity of all tissues, people and doses."""
    healthy, lines = torch.where(people.lesions > 0, 0, people.labels), []
    for name in methods:
        measured, true = [], []
        for images in study.images.values():
            for x, found in ((images[name], measured), (people.image, true)):
                for value in TISSUES.values():
                    inside = (healthy == value).double()
                    found.append((x.double() * inside).flatten(1).sum(1) / inside.flatten(1).sum(1))
        measured, true = torch.cat(measured), torch.cat(true)
        known = ~true.isnan()
        slope, intercept, r2 = metrics.linearity(measured[known], true[known])
        lines.append({"method": name, "slope": slope, "intercept (kBq/mL)": intercept, "R2": r2})
    return lines
