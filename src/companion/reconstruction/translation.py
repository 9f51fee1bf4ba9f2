"""LMI: images of contrasts that a model never saw, translated into the one it knows, and how well that goes.

Reverse diffusion whose conditions are worked out anew at every step, from the noisy image of that step and the source:

    prior = Translator.load("lmi/t2w")
    found = translate(prior, source, RECOMMENDED, seed=0)        # source (image, 1, y, x), any contrast
    found.x, found.draws                                         # mean of the draws, and the draws
    companion.reconstruction.volume_translation translates whole volumes

Everything about a translation is a `Setting`; the rows of the evaluation are settings and three rules of thumb.
Wang et al. 2024, IEEE TMI, doi 10.1109/TMI.2024.3382043.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from companion.data import anatomy
from companion.data.shading import shaded_like
from companion.diffusion.denoisers import AnySize, Denoiser, column
from companion.diffusion.local_information import MAPS, Conditioning, Informed, SourceSide, conditions, prepare_source
from companion.diffusion.noise import DiscreteSchedule, karras
from companion.diffusion.sampling import Bill, sample
from companion.diffusion.solvers import Solver, ddpm
from companion.information.pairs import grey
from companion.models import checkpoint
from companion.models.architectures import network_of
from companion.randomness import generators, randn

EMBEDDED = "lmi/t2w"
FIRST_SIGMA, LAST_SIGMA = 30.0, 0.01  # noise levels between which images are drawn; from 10 on they come out too dark
PUBLISHED = DiscreteSchedule.linear()  # 1000 times; the chain that the release trains and samples with


@dataclass(frozen=True)
class Setting:
    """How a translation is drawn.

    keep: the maps that the network is told, see `conditions`; () is an unconditional draw, none: all it knows.
    solver: a name or Solver of `companion.diffusion`. "published": the ancestral chain of the release, 1000
        evaluations or a respacing, its larger variance, and noise added after the last step too.
    start: noise level to begin at; none: the highest. begin: there with the "source", noised (SDEdit), or with "noise"
        alone, as the release does at any level.
    draws: of each image; the translation is their mean.
    guidance: how much further than the network says estimates move away from what it says when told nothing
        (classifier-free guidance); 1 is the network's own.
    mirrored: every second draw is that of the mirrored source, mirrored back: left and right are alike to a network
        whose training images were mirrored at random, so their errors average out.
    shading: every draw is given the slow shading of its source for its own; see `shaded_like`.
    cut: estimates are cut to [0, 1], the range of images, as DDPM does; the release does not. Without, the chain of a
        network that predicts noise runs away unless it errs by far less than 1 / sigma.
    attraction: weight of a step up the gradient of the smooth LMI of source and estimate; see `Attracted`.
    oracle: conditions of the true target, which no translation has: what the maps cannot say even then is missing.
    """

    keep: tuple[str, ...] | None = None
    solver: str | Solver = "dpmpp_2m"
    evaluations: int = 30
    start: float | None = None
    begin: str = "noise"
    draws: int = 4
    guidance: float = 1.0
    mirrored: bool = False
    shading: bool = False
    cut: bool = False
    attraction: float = 0.0
    oracle: bool = False

    def __post_init__(self):
        if self.evaluations < 1 or self.draws < 1:
            raise ValueError(f"evaluations ({self.evaluations}) and draws ({self.draws}) must be 1 or more")
        if self.begin not in ("noise", "source"):
            raise ValueError(f"begin is {self.begin!r}; choose noise or source")
        if self.start is not None and not 0 < self.start < math.inf:
            raise ValueError(f"start is {self.start}; expected a noise level above 0, as 1.0")

    def levels(self) -> Tensor:
        """Noise levels (evaluations + 1,), float64, the last 0."""
        if self.solver != "published":
            return karras(self.evaluations, sigma_min=LAST_SIGMA, sigma_max=self.start or FIRST_SIGMA)
        times = range(len(PUBLISHED))
        if self.start is not None:
            times = range(1 + int(PUBLISHED.nearest_index(torch.tensor([self.start]))))
        chain = DiscreteSchedule(PUBLISHED.betas[: len(times)])
        return (chain if self.evaluations >= len(chain) else chain.respace(self.evaluations)).levels()


BOTH = Setting(("cross", "self"))  # the paper's maps
GUIDED = replace(BOTH, guidance=2.0, mirrored=True)
RECOMMENDED = replace(GUIDED, keep=MAPS, shading=True)  # chosen on validation people, see docs/lmi.md
RECOMMENDED_FOR_PATIENTS = replace(RECOMMENDED, guidance=1.5, shading=False)  # on validation patients
ABLATION = {  # the rows of the evaluation that a network draws
    "unconditional": replace(BOTH, keep=()),
    "self LMI only": replace(BOTH, keep=("self",)),
    "cross LMI only": replace(BOTH, keep=("cross",)),
    "cross and self LMI": BOTH,
    "source only": replace(BOTH, keep=("source",)),
    "LMI and source": replace(BOTH, keep=MAPS),
    "guided LMI": GUIDED,
    "guided LMI and source": replace(GUIDED, keep=MAPS),
    "recommended": RECOMMENDED,
    "oracle: LMI of the truth": replace(BOTH, oracle=True),
}


@dataclass(frozen=True, eq=False)
class Translator:
    """What a checkpoint of 2_train knows: a denoiser, how it is conditioned, and the contrast that it learned.

    pixel_mm, size: side of the pixels of its training slices, and how many there were (y, x). channels: 1 or 3.
    recommended: the setting that did best on its validation people.
    """

    D: Denoiser
    conditioning: Conditioning
    contrast: str
    pixel_mm: float = anatomy.FIELD_OF_VIEW_MM / 64
    channels: int = 1
    size: tuple[int, int] = (64, 64)
    recommended: Setting = RECOMMENDED

    @classmethod
    def load(cls, name: str, device: str = "cpu", autocast: str | None = None) -> Translator:
        """That of a checkpoint. Raises ValueError for checkpoints that know nothing of sources."""
        found = checkpoint.find(name, EMBEDDED)
        conditioning, data = conditioning_of(found.config, found.name), found.config["data"]
        return cls(
            found.denoiser(device, autocast),
            conditioning,
            data["contrast"],
            anatomy.FIELD_OF_VIEW_MM / data["image_size"][-1],
            found.config["network"]["in_channels"] - conditioning.channels,
            tuple(data["image_size"]),
            RECOMMENDED_FOR_PATIENTS if data["source"].startswith("virtual patients") else RECOMMENDED,
        )

    @property
    def denoiser(self) -> Denoiser:
        """D for images of any size."""
        return AnySize(self.D, network_of(self.D).total_stride)

    @property
    def device(self) -> torch.device:
        return next(network_of(self.D).parameters()).device


def conditioning_of(config: Mapping, name: str) -> Conditioning:
    """What the network of a checkpoint's config was told in training. ValueError if it is not one of this paper's."""
    found = config.get("data", {}).get("conditioning")
    if found is None:
        raise ValueError(f"{name} says nothing of conditions on a source; choose one such as {EMBEDDED}")
    return Conditioning(**found)


@dataclass(frozen=True, eq=False)
class Attracted:
    """D whose estimate takes a step towards more information about the source: x0_hat + weight Var grad LMI.

    Var = 1 / (1 / sigma^2 + 1 / spread^2), what is uncertain of an estimate at this noise level. LMI is the sum over
    pixels and patch sizes of the map of source and estimate; its gradient does not pass through D.
    """

    D: Denoiser
    side: SourceSide
    weight: float
    spread: float = 0.35  # standard deviation of images

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """X0_hat, the shape of x."""
        x0_hat = self.D(x, sigma)
        with torch.enable_grad():
            estimate = x0_hat.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.side.cross(grey(estimate)).sum(), estimate)
        return x0_hat + self.weight * column(1 / (sigma**-2 + self.spread**-2), x) * slope


@dataclass(frozen=True, eq=False)
class Translation:
    """`draws` (draw, image, 1, y, x), their mean `x` (image, 1, y, x), and what one draw of one image cost.

    paired: draws 2k and 2k + 1 are antithetic, see `evaluation.metrics.spread`.
    """

    draws: Tensor
    bill: Bill
    paired: bool = False

    @property
    def x(self) -> Tensor:
        return self.draws.mean(0)


def translate(
    prior: Translator,
    source: Tensor,
    setting: Setting = RECOMMENDED,
    *,
    seed: int = 0,
    batch_size: int = 32,
    noise: Tensor | None = None,
    progress: bool = False,
) -> Translation:
    """Translations of images of any contrast, (image, 1, y, x) or RGB (image, 3, y, x), in [0, 1].

    Draw j of image i has the seed `seed + i * draws + j`, whatever the batches. Where their number is even every second
    one begins with the `opposite` noise of the one before, and the mean of a few is as good as that of many independent
    ones (docs/lmi.md). noise: what the draws begin with instead, of unit variance, (draw, image, channel, y, x), made
    so, too. Any size will do: what the network cannot halve often enough is extended for it. Raises TypeError or
    ValueError as `prepare_source`.
    """
    if source.ndim != 4 or source.shape[1] not in (1, 3):
        raise ValueError(
            f"the source has shape {tuple(source.shape)}; expected grey or RGB images, (image, 1 or 3, y, x)"
        )
    paired = setting.draws % 2 == 0
    levels, solver = setting.levels(), ddpm(variance="large") if setting.solver == "published" else setting.solver
    drawn, bills = [[] for _ in range(setting.draws)], []
    with tqdm(total=setting.draws * len(source), desc="translations", disable=not progress) as bar:
        for first in range(0, len(source), batch_size):
            part = source[first : first + batch_size].to(prior.device)
            turns = [part, part.flip(-1)] if setting.mirrored and setting.draws > 1 else [part]
            views = [(shown, informed(prior, shown, setting)) for shown in turns]
            for j in range(setting.draws):
                shown, G = views[j % len(views)]
                second, numbers = paired and j % 2, [seed + i * setting.draws + j for i in range(len(source))]
                numbers = numbers[first : first + len(part)]
                seeds = generators(numbers)
                if noise is not None:
                    given = noise[j, first : first + len(part)].to(part)
                else:
                    own = generators([number - 1 for number in numbers]) if second else seeds
                    given = randn((prior.channels, *part.shape[2:]), part.dtype, own, part.device)
                    given = opposite(given, setting) if second else given
                state = begin(shown, levels[0].item(), setting, given)
                samples = sample(
                    G, levels, shape=state.shape[1:], seeds=seeds, solver=solver, state=state, device=prior.device
                )
                x = samples.x
                if setting.solver == "published":
                    x = x + LAST_STD * randn(x.shape[1:], x.dtype, seeds, x.device)
                x = shaded_like(shown, x) if setting.shading else x
                drawn[j].append((x.flip(-1) if j % len(views) else x).cpu())
                bills.append(samples.bill)
                bar.update(len(part))
    calls = bills[0].denoiser_calls * (1 if setting.guidance == 1 else 2)
    bill = Bill(calls, 0, sum(b.seconds for b in bills) / len(bills))
    return Translation(torch.stack([torch.cat(parts) for parts in drawn]), bill, paired)


def informed(prior: Translator, source: Tensor, setting: Setting) -> Denoiser:
    """The denoiser that has seen sources (image, 1 or 3, y, x), for images of any size."""
    side = prepare_source(source, prior.conditioning)
    G: Denoiser = Informed(prior.denoiser, side, prior.conditioning, setting.keep, setting.guidance)
    G = Attracted(G, side, setting.attraction) if setting.attraction else G
    if not setting.cut:
        return G
    return lambda x, sigma, cond=None: G(x, sigma).clamp(0, 1)


def opposite(noise: Tensor, setting: Setting) -> Tensor:
    """The opposite noise (..., y, x) of a draw, as the next one begins with it, which may see its source mirrored.

    What noise does to a draw is nearly linear, so that it cancels in their mean: antithetic variates [hammersley1956].
    """
    return -noise.flip(-1) if setting.mirrored else -noise


def begin(source: Tensor, sigma: float, setting: Setting, noise: Tensor) -> Tensor:
    """The noisy images (image, channel, y, x) to start from: x0 + sigma n, or without x0 as noise alone.

    The published chain begins with unit noise at the scale where images have the variance 1 / (1 + sigma^2).
    """
    if setting.begin == "source":
        known = source if source.shape[1] == noise.shape[1] else grey(source).expand(-1, noise.shape[1], -1, -1)
        return known + sigma * noise
    return (math.hypot(1, sigma) if setting.solver == "published" else sigma) * noise


# The release adds noise after the last step as well: that of the posterior of its second time ("fixedlarge").
LAST_STD = PUBLISHED.posterior_log_variance_clipped[0].div(2).exp().item()


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
    noise = randn((prior.channels, *source.shape[2:]), source.dtype, seeds, source.device)
    state = begin(source, levels[0].item(), setting, noise)
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
