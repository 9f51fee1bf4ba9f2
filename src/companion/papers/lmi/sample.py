"""LMI, one translation from the inside: what the network is told, how a draw comes about, how many steps it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from companion.data.cohort import standard
from companion.data.shading import AIR
from companion.data.store import open_dataset
from companion.diffusion.local_information import conditions, prepare_source
from companion.diffusion.sampling import sample
from companion.evaluation import metrics
from companion.evaluation.tables import average
from companion.evaluation.translation import score
from companion.files import project_root
from companion.information.pairs import grey
from companion.models.checkpoint import describe
from companion.papers.lmi.data import array_of, stacks
from companion.papers.lmi.translate import BOTH, EMBEDDED, Setting, Translator, begin, informed, translate
from companion.parameters import Parameters, param
from companion.randomness import generators, randn


@dataclass(frozen=True)
class Sample(Parameters):
    """Parameters of lmi/3_sample.ipynb."""

    weights: str = param(EMBEDDED, "translator: an embedded name or a folder")
    people: str = param("brain", "brain: the embedded cohort; else a file prepared by 1_data")
    source: str = param("T1w", "contrast to translate from")
    image_size: int = param(64, "pixels along y and x", minimum=16)
    subjects: int = param(4, "held-out people, one slice each", minimum=1)
    split: str = param("test", "whose people", choices=("test", "validation"))
    draws: int = param(4, "draws of an image", minimum=2)
    maps_at: tuple[float, ...] = param((10.0, 1.0, 0.3, 0.1), "noise levels at which the maps are shown", minimum=1e-3)
    solvers: tuple[str, ...] = param(
        ("dpmpp_2m", "ddim"), "solvers to compare", choices=("dpmpp_2m", "ddim", "heun", "ddpm", "dpmpp_2m_sde")
    )
    evaluations: tuple[int, ...] = param((10, 30), "steps of a draw to compare; the last is used elsewhere", minimum=1)
    published: int = param(0, "evaluations of the published chain; 1000 as released, 0: leave it out", minimum=0)
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "source", standard(self.source))

    def before_start(self) -> None:
        """Raise for weights or people that are not there, or have not the contrasts."""
        target = describe(self.weights, EMBEDDED).get("data", {}).get("contrast", "")
        if standard(target) == self.source:
            raise ValueError(f"source is {self.source}, which is what {self.weights} makes; give another contrast")
        if self.people != "brain":
            prepared = open_dataset(project_root() / self.people)
            for contrast in (self.source, target):
                array_of(prepared, contrast)

    @property
    def setting(self) -> Setting:
        """The setting of the pictures."""
        return replace(BOTH, solver=self.solvers[0], evaluations=self.evaluations[-1], draws=self.draws)


def held_out(
    people: str, split: str, subjects: int, source: str, target: str, image_size: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Sources, true targets and tissue masks (image, 1, y, x): a slice of each person, ever higher up."""
    if source == target:
        raise ValueError(f"source is {source}, which is what the translator makes; give another contrast")
    found = stacks(people, split, subjects, (source, target), image_size)
    count, slices = found[target].shape[:2]
    i = torch.arange(count)
    given, truth, *labels = (x[i, i * slices // count] for x in found.values())
    return given, truth, labels[0] > 0 if labels else grey(truth) > AIR


def maps_at(prior: Translator, source: Tensor, truth: Tensor, sigmas: Sequence[float], seed: int) -> dict:
    """For each noise level what the network is told of one image (1, 1, y, x): row -> column -> (1, y, x)."""
    noise = randn(truth.shape[1:], truth.dtype, [torch.Generator().manual_seed(seed)])
    side, sizes, rows = prepare_source(source, prior.conditioning), prior.conditioning.patches, {}
    for sigma in sigmas:
        x = truth + sigma * noise
        shrunk = x / math.hypot(1, sigma)
        told = conditions(x, sigma, side, prior.conditioning, ("cross",))[0]
        first = sum(prior.conditioning.widths[: prior.conditioning.maps.index("cross")])
        rows[f"σ = {sigma:g}"] = (
            {"source": source[0], "noisy target": shrunk[0]}
            | {f"cross, {n} x {n}": told[first + i : first + i + 1] for i, n in enumerate(sizes)}
            | {f"self, {n} x {n}": side.self_map[0, i : i + 1] for i, n in enumerate(sizes)}
        )
    return rows


def reverse_run(prior: Translator, source: Tensor, setting: Setting, seed: int, pictures: int = 8) -> dict:
    """Pictures of one draw of one image (1, 1, y, x): row -> column -> (1, y, x), from noise to the result.

    "noisy": x / sqrt(1 + sigma^2); "estimate": x0_hat there; "cross x 2": twice the finest cross map.
    """
    levels, path, c = setting.levels(), [], prior.conditioning
    seeds = generators([seed])
    state = begin(source, prior.channels, levels[0].item(), setting, seeds)
    sample(
        informed(prior, source, setting),
        levels,
        shape=state.shape[1:],
        seeds=seeds,
        state=state,
        solver=setting.solver,
        callback=path.append,
    )
    xs = [state, *(info["x"] for info in path)]
    rows: dict[str, dict] = {"noisy": {}, "estimate": {}} | ({"cross x 2": {}} if "cross" in c.maps else {})
    for i in torch.linspace(0, len(path) - 1, min(pictures, len(path))).round().int().tolist():
        sigma, column_name = path[i]["sigma"], f"σ = {path[i]['sigma']:.2g}"
        rows["noisy"][column_name] = xs[i][0] / math.hypot(1, sigma)
        rows["estimate"][column_name] = path[i]["x0_hat"][0]
        if "cross" in c.maps:
            rows["cross x 2"][column_name] = (
                2 * prepare_source(source, c).cross(grey(xs[i]) / (math.hypot(1, sigma) if c.scaled else 1))[0, :1]
            )
    return rows


def study(p: Sample, prior: Translator, source: Tensor, truth: Tensor, inside: Tensor) -> list[dict]:
    """A table row for each solver and number of evaluations: PSNR and SSIM of the mean of the draws, seconds.

    Sources, true targets and masks (image, 1, y, x); the scores are means and standard errors over images.
    """
    chosen = [(name, n) for name in p.solvers for n in p.evaluations]
    if p.published:
        chosen.append(("published", p.published))
    table = []
    for name, n in chosen:
        setting = replace(p.setting, solver=name, evaluations=n)
        found = translate(prior, source, setting, seed=p.seed)
        scores = {k: score(found.x[:, None], truth[:, None], inside[:, None])[k] for k in ("PSNR", "SSIM")}
        one = metrics.psnr(found.draws[0], truth, 1.0, inside)
        table.append(
            {"solver": "ancestral, as published" if name == "published" else name, "evaluations": n}
            | {k: average(v) for k, v in scores.items()}
            | {"PSNR, one draw": one.mean().item(), "seconds an image and draw": found.bill.seconds}
        )
    return table
