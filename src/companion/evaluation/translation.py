"""How well an image was translated into another contrast: scores, a rule of thumb to beat, what rules could reach."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from companion.data.contrasts import MAPS
from companion.data.remap import remapped
from companion.data.shading import AIR
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.local_information import Conditioning, conditions
from companion.evaluation import metrics
from companion.evaluation.denoising import denoising_errors
from companion.evaluation.segmenter import Segmenter
from companion.evaluation.tables import average, grouped
from companion.extras import extra
from companion.information.pairs import grey
from companion.randomness import randn

with extra("notebooks"):
    from skimage.exposure import match_histograms

CONSTANT = "constant grey"
SCORES = ("PSNR", "SSIM", "MS-SSIM", "MAE", "NMI", "Dice")


def score(
    x: Tensor, truth: Tensor, inside: Tensor, labels: Tensor | None = None, segmenter: Segmenter | None = None
) -> dict[str, Tensor]:
    """The scores (subject,) of images x (subject, slice, 1, y, x), the slices of a subject taken as one image.

    Inside the tissue: PSNR in dB for a peak of 1, SSIM, mean absolute error, normalised mutual information. MS-SSIM of
    whole slices. Dice of the segmenter's labels, the mean over CSF, grey and white matter.
    """
    whole, true, mask = (v.transpose(1, 2) for v in (x, truth, inside))
    slices, true_slices, masks = (v.flatten(0, 1) for v in (x, truth, inside))

    def by_subject(v: Tensor) -> Tensor:
        return v.unflatten(0, x.shape[:2]).mean(1)

    found = {
        "PSNR": metrics.psnr(whole, true, 1.0, mask),
        "SSIM": by_subject(metrics.ssim(slices, true_slices, 1.0, masks)),
        "MS-SSIM": by_subject(metrics.ms_ssim(slices, true_slices, 1.0)),
        "MAE": metrics.mae(whole, true, mask),
        "NMI": metrics.nmi(whole, true, mask),
    }
    if segmenter is not None and labels is not None:
        found["Dice"] = metrics.dice(segmenter.labels(slices).reshape(labels.shape), labels).nanmean(1)
    return found


def score_draws(
    name: str, draws: Tensor, truth: Tensor, inside: Tensor, labels: Tensor | None, segmenter: Segmenter | None
) -> list[dict]:
    """A row for each subject: scores of the mean of the draws and, if there are several, of single draws.

    "<score>, one draw" is the mean over draws, "<score>, spread" their standard deviation. "Frechet distance", of the
    first draws' slices from the true ones in the segmenter's features, is that of all subjects together.
    """
    several = len(draws) > 1
    of_mean = score(draws.mean(0), truth, inside, labels, segmenter)
    each = [score(x, truth, inside, labels, segmenter) for x in draws] if several else []
    frechet = None
    if segmenter is not None and draws[0].flatten(0, 1).shape[0] > 1:
        seen, true = (segmenter.features(x.flatten(0, 1)) for x in (draws[0], truth))
        frechet = metrics.frechet_distance(seen, true)
    rows = []
    for i in range(len(truth)):
        row = {"method": name, "subject": i} | {k: v[i].item() for k, v in of_mean.items()}
        for k in of_mean if several else ():
            values = torch.stack([e[k][i] for e in each])
            row |= {f"{k}, one draw": values.mean().item(), f"{k}, spread": values.std().item()}
        rows.append(row | ({} if frechet is None else {"Frechet distance": frechet}))
    return rows


def constant(truth: Tensor, inside: Tensor) -> Tensor:
    """Images of the shape of `truth` (subject, slice, 1, y, x), each subject one grey: the mean of the truth `inside`.

    It knows the right mean and nothing else; a translation worth anything beats it.
    """
    weight = inside.to(truth)
    mean = (truth * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)
    return mean.view(-1, *[1] * (truth.ndim - 1)) * weight


def matched(source: Tensor, inside: Tensor, reference: Tensor) -> Tensor:
    """Source images (..., 1, y, x) with their grey levels matched to `reference` (pixel,), by scikit-image.

    Only pixels `inside` the true tissue are matched, each slice by itself, the others are 0: a favour to this method.
    """
    x = torch.zeros_like(source)
    for index in np.ndindex(*source.shape[:-3]):
        here = inside[index]
        if here.any():
            x[index][here] = torch.from_numpy(match_histograms(source[index][here].numpy(), reference.numpy())).to(x)
    return x


def intensity_rules(stacks: dict[str, Tensor], bins: int = 128) -> list[dict]:
    """How well any rule of intensities alone could translate: PSNR (mean, standard error over slices), every direction.

    stacks: paired slices (slice, 1, y, x) in [0, 1] of each contrast. "as it is": no translation. "best rising map":
    the rising map with the smallest squared error on these very slices, more than histogram matching can reach. "best
    map": the mean target value of each source value. The maps are fitted to the truth: limits, not methods.
    """
    table = []
    for a, b in itertools.permutations([name for name in stacks if name not in MAPS], 2):
        x, y = grey(stacks[a]), grey(stacks[b])
        index = (x * (bins - 1)).round().long().flatten().numpy()
        counts = np.bincount(index, minlength=bins)
        mean = np.bincount(index, weights=y.flatten().double().numpy(), minlength=bins) / counts.clip(1)
        rising = isotonic_regression(mean, weights=counts + 1e-9).x
        row = {"from": a, "to": b, "as it is": average(metrics.psnr(x, y, data_range=1.0))}
        for name, rule in (("best rising map", rising), ("best map", mean)):
            found = torch.from_numpy(rule[index]).to(x.dtype).view_as(x)
            row[name] = average(metrics.psnr(found, y, data_range=1.0))
        table.append(row)
    return table


def summary(rows: list[dict]) -> list[dict]:
    """A table row for each direction and method: mean and standard error over subjects of the scores.

    The score of the mean of the draws; PSNR and Dice of single draws, with the deviation between draws of a subject.
    """
    table = []
    for (direction, method), mine in grouped(rows, "direction", "method").items():
        row = {"direction": direction, "method": method}
        for name in SCORES:
            if name in mine[0]:
                values = [r[name] for r in mine]
                row[name] = average(values) if all(map(math.isfinite, values)) else ""
        for name in ("PSNR", "Dice"):
            label = f"{name}, one draw (and deviation of draws)"
            if name in mine[0]:
                row[label] = (
                    tuple(sum(r[f"{name}, {k}"] for r in mine) / len(mine) for k in ("one draw", "spread"))
                    if f"{name}, one draw" in mine[0]
                    else ""
                )
        row["Frechet distance"] = mine[0].get("Frechet distance", "")
        table.append(row)
    return table


def verdict(rows: list[dict], method: str = "recommended") -> list[dict]:
    """For each direction what `method` gains in PSNR, SSIM and Dice: paired means and standard errors.

    Over a constant grey, no translation, histogram matching, and SDEdit from that level, for each score, where it is
    best. Last, the Dice as a share of what the true targets reach.
    """
    table = []
    for direction, found in grouped(rows, "direction").items():
        by_method = grouped(found, "method")
        if method not in by_method:
            continue
        row: dict = {"direction": direction}
        for k in (k for k in ("PSNR", "SSIM", "Dice") if k in by_method[method][0]):
            values = {name: [r[k] for r in mine] for name, mine in by_method.items()}
            edited = {name: sum(v) for name, v in values.items() if name.startswith("SDEdit")}
            rivals = {
                "constant": CONSTANT,
                "none": "no translation",
                "matching": "histogram matching",
                "best SDEdit": max(edited, key=lambda name: edited[name], default=None),
            }
            row |= {
                f"{k} over {label}": average(values[method], values[name])
                for label, name in rivals.items()
                if name in values
            }
        if "Dice" in by_method[method][0]:
            true = sum(r["Dice"] for r in by_method["true target"])
            row["Dice, share of true"] = sum(r["Dice"] for r in by_method[method]) / true
        table.append(row)
    return table


def invariance(stacks: dict[str, Tensor], target: str, conditioning: Conditioning, sigma: float, seed: int = 0) -> list:
    """How much of each map survives another contrast: its correlation with that of the target, inside the head.

    Mean and standard error over slices, for every other contrast as the source; the noisy image is the target's.
    """
    x0 = grey(stacks[target])
    x = x0 + sigma * randn(x0.shape, x0.dtype, torch.Generator().manual_seed(seed))
    head, ours = (x0 > AIR)[:, 0], conditions(x, sigma, x0, conditioning)
    names = [f"{name} {patch}" for name in conditioning.maps if name != "source" for patch in conditioning.patches]
    table = []
    for other in (name for name in stacks if name != target and name not in MAPS):
        row: dict[str, object] = {"source": other}
        theirs = conditions(x, sigma, grey(stacks[other]), conditioning)
        for i, name in enumerate(names + ["source"] * ("source" in conditioning.maps)):
            values = [
                torch.corrcoef(torch.stack([a[i][m], b[i][m]]))[0, 1]
                for a, b, m in zip(ours, theirs, head, strict=True)
                if m.sum() > 10
            ]
            row[name] = average(torch.stack(values)) if values else float("nan")
        table.append(row)
    return table


def source_errors(
    D: Denoiser,
    conditioning: Conditioning,
    stacks: Mapping[str, Tensor],
    target: str,
    sigmas: Sequence[float],
    seed: int = 0,
) -> list[dict[str, float]]:
    """For each sigma the root mean squared error of D on slices, told of sources of each kind of contrast.

    stacks: slices (slice, channel, y, x) of the target and of other contrasts. Sources are "nothing", "itself" (the
    clean target), "remapped", and every other contrast: looked at to measure, not to learn.
    """
    images = {name: grey(x) for name, x in stacks.items() if name not in MAPS}
    if not images:
        return []
    generator = torch.Generator().manual_seed(seed)
    x0 = images.pop(target)
    sources = {"nothing": None, "itself": x0, "remapped": remapped(x0, generator), **images}

    def estimate(x: Tensor, sigma: Tensor, source: Tensor | None) -> Tensor:
        return D(x, sigma, conditions(x, sigma, source, conditioning))

    told_of = {name: partial(estimate, source=source) for name, source in sources.items()}
    return denoising_errors(told_of, x0, sigmas, seed=generator)
