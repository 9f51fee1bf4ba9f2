"""LMI: images of contrasts that a model never saw, translated into the one it knows, and how well that goes.

Reverse diffusion whose conditions are worked out anew at every step, from the noisy image of that step and the source:

    prior = Translator.load("lmi/t2w")
    found = translate(prior, source, RECOMMENDED, seed=0)        # source (image, 1, y, x), any contrast
    found.x, found.draws                                         # mean of the draws, and the draws
    translate_file("pd.nii.gz", "t2.nii.gz", prior)              # a volume, with the shape and affine of the source

Everything about a translation is a `Setting`; the rows of the evaluation are settings and three rules of thumb.
Wang et al. 2024, IEEE TMI, doi 10.1109/TMI.2024.3382043.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from skimage.exposure import match_histograms
from torch import Generator, Tensor
from tqdm.auto import tqdm

from companion import metrics
from companion.data import anatomy
from companion.data.nifti import load_nifti, save_nifti
from companion.data.paired import FOREGROUND, Scale, Slicing, cut_file, save_translation
from companion.data.store import open_dataset
from companion.diffusion.denoisers import AnySize, Denoiser, column
from companion.diffusion.noise import DiscreteSchedule, generators, karras, randn
from companion.diffusion.sampling import Bill, sample
from companion.diffusion.solvers import Solver, ddpm
from companion.papers import lmi
from companion.papers.lmi import AIR, CONTRASTS, Conditioning, Informed, SourceSide
from companion.parameters import Parameters, param
from companion.runs import project_root
from companion.segmentation import Segmenter, load_segmenter
from companion.weights import describe, load_denoiser, network_of

FIRST_SIGMA, LAST_SIGMA = 30.0, 0.01  # noise levels between which images are drawn; from 10 on they come out too dark
PUBLISHED = DiscreteSchedule.linear()  # 1000 times; the chain that the release trains and samples with
DIRECTIONS = tuple((a, b) for b in CONTRASTS for a in CONTRASTS if a != b)  # (source, target)


@dataclass(frozen=True)
class Setting:
    """How a translation is drawn.

    keep: the maps that the network is told, see `lmi.conditions`; () is an unconditional draw, none: all it knows.
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
RECOMMENDED = replace(GUIDED, keep=lmi.MAPS, shading=True)  # chosen on validation people, see docs/lmi.md
ABLATION = {  # the rows of the evaluation that a network draws
    "unconditional": replace(BOTH, keep=()),
    "self LMI only": replace(BOTH, keep=("self",)),
    "cross LMI only": replace(BOTH, keep=("cross",)),
    "cross and self LMI": BOTH,
    "source only": replace(BOTH, keep=("source",)),
    "LMI and source": replace(BOTH, keep=lmi.MAPS),
    "guided LMI": GUIDED,
    "guided LMI and source": replace(GUIDED, keep=lmi.MAPS),
    "recommended": RECOMMENDED,
    "oracle: LMI of the truth": replace(BOTH, oracle=True),
}


# ------------------------------------------------------------------------------------------------------ translation


@dataclass(frozen=True, eq=False)
class Translator:
    """What a checkpoint of 2_train knows: a denoiser, how it is conditioned, and the contrast that it learned.

    pixel_mm, size: side of the pixels of its training slices, and how many there were (y, x). channels: 1 or 3.
    """

    D: Denoiser
    conditioning: Conditioning
    contrast: str
    pixel_mm: float = anatomy.FIELD_OF_VIEW_MM / 64
    channels: int = 1
    size: tuple[int, int] = (64, 64)

    @classmethod
    def load(cls, name: str, device: str = "cpu", autocast: str | None = None) -> Translator:
        """Return that of a checkpoint. Raises ValueError for checkpoints that know nothing of sources."""
        conditioning, about = Conditioning.of(name), describe(name)
        data, inputs = about["data"], about["network"]["in_channels"]
        return cls(load_denoiser(name, device, autocast), conditioning, data["contrast"],
                   anatomy.FIELD_OF_VIEW_MM / data["image_size"][-1], inputs - conditioning.channels,
                   tuple(data["image_size"]))

    @property
    def device(self) -> torch.device:
        return next(network_of(self.D).parameters()).device


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

    def __call__(self, x: Tensor, sigma: Tensor, cond: None = None) -> Tensor:
        """x0_hat, the shape of x."""
        x0_hat = self.D(x, sigma)
        with torch.enable_grad():
            estimate = x0_hat.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.side.cross(lmi.grey(estimate)).sum(), estimate)
        return x0_hat + self.weight * column(1 / (sigma**-2 + self.spread**-2), x) * slope


@dataclass(frozen=True, eq=False)
class Translation:
    """`draws` (draw, image, 1, y, x), their mean `x` (image, 1, y, x), and what one draw of one image cost."""

    draws: Tensor
    bill: Bill

    @property
    def x(self) -> Tensor:
        return self.draws.mean(0)


def translate(prior: Translator, source: Tensor, setting: Setting = RECOMMENDED, *, seed: int = 0,
              batch_size: int = 32, progress: bool = False) -> Translation:
    """Return translations of images of any contrast, (image, 1, y, x) or RGB (image, 3, y, x), in [0, 1].

    Draw j of image i has the seed `seed + i * draws + j`, whatever the batches. Any size will do: what the network
    cannot halve often enough is extended for it. Raises TypeError or ValueError as `lmi.prepare_source`.
    """
    if source.ndim != 4 or source.shape[1] not in (1, 3):
        raise ValueError(f"the source has shape {tuple(source.shape)}; expected grey or RGB images, "
                         "(image, 1 or 3, y, x)")
    levels, solver = setting.levels(), ddpm(variance="large") if setting.solver == "published" else setting.solver
    drawn, bills = [[] for _ in range(setting.draws)], []
    with tqdm(total=setting.draws * len(source), desc="translations", disable=not progress) as bar:
        for first in range(0, len(source), batch_size):
            part = source[first : first + batch_size].to(prior.device)
            turns = [part, part.flip(-1)] if setting.mirrored and setting.draws > 1 else [part]
            views = [(shown, informed(prior, shown, setting)) for shown in turns]
            for j in range(setting.draws):
                shown, G = views[j % len(views)]
                seeds = generators([seed + i * setting.draws + j for i in range(first, first + len(part))])
                state = begin(shown, prior.channels, levels[0].item(), setting, seeds)
                samples = sample(G, levels, shape=state.shape[1:], seeds=seeds, solver=solver, state=state,
                                 device=prior.device)
                x = samples.x
                if setting.solver == "published":
                    x = x + LAST_STD * randn(x.shape[1:], x.dtype, seeds, x.device)
                x = shaded_like(shown, x) if setting.shading else x
                drawn[j].append((x.flip(-1) if j % len(views) else x).cpu())
                bills.append(samples.bill)
                bar.update(len(part))
    calls = bills[0].denoiser_calls * (1 if setting.guidance == 1 else 2)
    bill = Bill(calls, 0, sum(b.seconds for b in bills) / len(bills))
    return Translation(torch.stack([torch.cat(parts) for parts in drawn]), bill)


def informed(prior: Translator, source: Tensor, setting: Setting) -> Denoiser:
    """Return the denoiser that has seen sources (image, 1 or 3, y, x), for images of any size."""
    D = AnySize(prior.D, network_of(prior.D).total_stride)
    side = lmi.prepare_source(source, prior.conditioning)
    G = Informed(D, side, prior.conditioning, setting.keep, setting.guidance)
    G = Attracted(G, side, setting.attraction) if setting.attraction else G
    return (lambda x, sigma, cond=None: G(x, sigma).clamp(0, 1)) if setting.cut else G


def begin(source: Tensor, channels: int, sigma: float, setting: Setting, seeds: list[Generator]) -> Tensor:
    """Return the noisy images (image, channel, y, x) to start from: x0 + sigma n, or without x0 as noise alone.

    The published chain begins with unit noise at the scale where images have the variance 1 / (1 + sigma^2).
    """
    noise = randn((channels, *source.shape[2:]), source.dtype, seeds, source.device)
    if setting.begin == "source":
        known = source if source.shape[1] == channels else lmi.grey(source).expand(-1, channels, -1, -1)
        return known + sigma * noise
    return (math.hypot(1, sigma) if setting.solver == "published" else sigma) * noise


# The release adds noise after the last step as well: that of the posterior of its second time ("fixedlarge").
LAST_STD = PUBLISHED.posterior_log_variance_clipped[0].div(2).exp().item()


# --------------------------------------------------------------------------------------------------------- shading

KNOTS, ROUNDS = 5, 5  # of the map from ranks to grey levels; of reweighting
FLAT = 0.03  # share of the pixels that speak for no shading, from the border: composition is not the same everywhere


def shaded_like(source: Tensor, x: Tensor) -> Tensor:
    """Return images x (image, 1 or 3, y, x) with the shading of their sources (image, 1 or 3, y, x) for their own.

    A receive coil shades all contrasts of a sitting alike, but ranks are free of shading, and a network that is told
    them makes some up. Only the linear part, exp(slope . position), can be told from anatomy. The mean of log x stays.
    """
    given, made = lmi.grey(source), lmi.grey(x)
    tissue = (given > lmi.FAINT) & (made > lmi.FAINT)
    pairs = (given, lmi.equalised(made), made, lmi.equalised(given), tissue)
    change = torch.cat([slope(a, rank_b, inside) - slope(b, rank_a, inside)  # one by one, which bounds the memory
                        for a, rank_b, b, rank_a, inside in zip(*(v.split(1) for v in pairs), strict=True)])
    shading = torch.einsum("nc,cyx->nyx", change, positions(x))[:, None]
    shading = shading - (shading * tissue).sum((2, 3), True) / tissue.sum((2, 3), True).clamp(min=1)
    return x * shading.exp()


def slope(image: Tensor, rank: Tensor, tissue: Tensor) -> Tensor:
    """Return the slopes (image, 2) along y and x, over half the field of view, of log image = f(rank) + slope position.

    f is piecewise linear in the ranks of the other contrast. Least squares over the `tissue` with Cauchy weights.
    """
    at = (rank.flatten(1).double() - lmi.DARKEST).clamp(min=0) / (1 - lmi.DARKEST) * (KNOTS - 1)
    hats = (1 - (at[..., None] - torch.arange(KNOTS).to(at)).abs()).clamp(min=0)
    place = positions(image).flatten(1).T.double().expand(len(image), -1, -1)
    M, v = torch.cat([hats, place], -1), image.flatten(1).double().clamp(min=1e-6).log()
    inside = tissue.flatten(1)
    flat = FLAT * inside.sum(1, keepdim=True).clamp(min=1) * torch.ones(2).to(M)
    prior = torch.cat([torch.full_like(M[:, 0, :KNOTS], 1e-6), flat], 1).diag_embed()
    weight = inside.double()
    for _ in range(ROUNDS):
        weighted = (M * weight[..., None]).mT
        found = torch.linalg.solve(weighted @ M + prior, weighted @ v[..., None])
        residual = v - (M @ found)[..., 0]
        width = 1.48 * residual.abs().masked_fill(~inside, torch.nan).nanmedian(1, keepdim=True).values.nan_to_num()
        weight = inside / (1 + (residual / (2 * width).clamp(min=1e-6)).square())
    return found[:, KNOTS:, 0].to(image)


def positions(x: Tensor) -> Tensor:
    """Return the coordinates (2, y, x) of the pixels of x, from -1 to 1 across the field of view."""
    return torch.stack(torch.meshgrid(*((2 * torch.arange(n).to(x) + 1) / n - 1 for n in x.shape[2:]), indexing="ij"))


# --------------------------------------------------------------------------------------------------------- volumes


def translate_file(path: str | Path, out: str | Path, prior: Translator, setting: Setting = RECOMMENDED, *,
                   seed: int = 0, plane: str = "axial", pixel_mm: float | None = None,
                   source_scale: Scale | None = None, target_scale: Scale | None = None,
                   progress: bool = False) -> Path:
    """Return the path of a NIfTI volume: that of `path`, slice by slice, with its shape and affine.

    pixel_mm: side of the pixels that the network sees, by default that of its training slices; air is put around fields
    of view smaller than theirs. source_scale: what is 0 and 1 in the source, by default percentiles. target_scale: what
    0 and 1 of the target are, by default 0 and 1.
    Slices with hardly anything in them stay empty. Raises FileNotFoundError or ValueError as `cut_file`.
    """
    pixel_mm = pixel_mm or prior.pixel_mm
    inner = Slicing.of(load_nifti(path), (1, 1), pixel_mm, plane).inner
    size = tuple(max(trained, n) for trained, n in zip(prior.size, inner, strict=True))
    cut = cut_file(path, size=size, pixel_mm=pixel_mm, plane=plane, scale=source_scale)
    filled = (cut.slices > FOREGROUND).float().mean((1, 2, 3)) >= FILLED
    if not filled.any():
        raise ValueError(f"{path}: no {plane} slice has anything in it; is the scale right ({cut.scale})?")
    made = torch.zeros_like(cut.slices)
    made[filled] = translate(prior, cut.slices[filled], setting, seed=seed, progress=progress).x.clamp(0, None)
    return save_translation(out, made, cut.slicing, target_scale or Scale(0, 1, UNITS))


FILLED = 0.02  # share of the pixels of a slice that must be foreground for it to be translated
UNITS = "1: bright tissue (99.5 % of the foreground)"


# -------------------------------------------------------------------------------------------------------- evaluation

SLICES = 8  # of each person of the embedded cohort, whose scale is found from all of them


@lru_cache(maxsize=8)
def stacks(people: str, split: str, subjects: int, contrasts: tuple[str, ...], image_size: int) -> dict[str, Tensor]:
    """Return slices (subject, slice, 1, y, x) of contrasts and, if known, "labels", of the first people of a split.

    people: "brain", the embedded cohort, or a prepared file, which `image_size` does not concern. Remembered.
    """
    if people == "brain":
        return lmi.cohort_slices(split, subjects, SLICES, tuple(dict.fromkeys(contrasts)), image_size)
    prepared = open_dataset(project_root() / people, require=contrasts)
    names = dict.fromkeys(n for n in (*contrasts, "labels") if n in prepared.shapes)
    count, depth = min(subjects, len(prepared.rows(split))), prepared.shapes[contrasts[0]][1]
    slices = {n: prepared.slices(n, split) for n in names}
    return {n: torch.stack([s[i] for i in range(count * depth)]).unflatten(0, (count, depth))
            for n, s in slices.items()}


@dataclass(frozen=True)
class Translate(Parameters):
    """Parameters of lmi/4_translate.ipynb."""

    people: str = param("brain", "brain: the embedded cohort; else a file prepared by 1_data")
    split: str = param("test", "whose people: test, or validation, on which settings are chosen",
                       choices=("test", "validation"))
    targets: tuple[str, ...] = param(CONTRASTS, "contrasts to translate into")
    sources: tuple[str, ...] = param(CONTRASTS, "contrasts to translate from")
    weights: str = param("lmi/{target}", "translators; {target} is the contrast in small letters")
    segmenters: str | None = param("segmenter/{target}", "segmenters that know only the target; none: no Dice")
    image_size: int = param(64, "pixels along y and x of the embedded cohort", minimum=16)
    subjects: int = param(12, "held-out people", minimum=2)
    slices: int = param(2, "slices of each, evenly spaced", minimum=1)
    rows: tuple[str, ...] = param(("unconditional", "cross and self LMI", "recommended"),
                                  "what the networks draw: rows of the table", choices=tuple(ABLATION))
    keep: tuple[str, ...] = param(RECOMMENDED.keep, "maps that the recommended row is told", choices=lmi.MAPS)
    sdedit: tuple[float, ...] = param((0.25, 0.5, 1.0), "noise levels at which SDEdit puts the source in", minimum=0.01)
    published: int = param(0, "evaluations of the published chain; 1000 as released, 0: no such row", minimum=0)
    cut: bool = param(False, "estimates of the published chain are cut to [0, 1], which the release does not do")
    solver: str = param("dpmpp_2m", "of all other rows", choices=("dpmpp_2m", "ddim", "heun", "ddpm", "dpmpp_2m_sde"))
    evaluations: int = param(30, "steps of a draw", minimum=1)
    draws: int = param(4, "draws of an image; their mean is the translation", minimum=2)
    guidance: float = param(2.0, "classifier-free guidance of the recommended row; 1 is none", minimum=0)
    mirrored: bool = param(True, "half the draws of the recommended row are those of the mirrored source")
    shading: bool = param(True, "draws of the recommended row are given the shading of their source")
    attraction: float = param(0.0, "weight of the gradient of the LMI in the recommended row", minimum=0)
    volume: str | None = param(None, "NIfTI volume to translate; none: a person of the cohort, lying oblique")
    autocast: str | None = param("bfloat16", "number format inside the network", choices=("bfloat16", None))

    def settings(self) -> dict[str, Setting]:
        """Return the rows of the table that are drawn, in its order."""
        common = {"solver": self.solver, "evaluations": self.evaluations, "draws": self.draws}
        edited = {f"SDEdit from sigma = {s:g}": Setting((), start=s, begin="source", **common) for s in self.sdedit}
        chosen = {name: replace(ABLATION[name], **common) for name in ABLATION if name in self.rows}
        if "recommended" in chosen:
            chosen["recommended"] = self.chosen
        if self.published:
            name = "published chain, cut" if self.cut else "published chain"
            chosen[name] = Setting(("cross", "self"), "published", self.published, draws=self.draws, cut=self.cut)
        return edited | chosen

    @property
    def chosen(self) -> Setting:
        """Return the recommended setting, with the maps, solver, evaluations, draws and guidance asked for."""
        return Setting(self.keep, self.solver, self.evaluations, draws=self.draws, guidance=self.guidance,
                       mirrored=self.mirrored, shading=self.shading, attraction=self.attraction)


TRAINING_PEOPLE = 4  # whose tissue histogram matching aims at


@dataclass(frozen=True, eq=False)
class People:
    """Held-out people: contrast -> images (subject, slice, 1, y, x) in [0, 1].

    labels: in the same shape, if there are any. reference: contrast -> tissue of training people, (pixel,).
    """

    images: Mapping[str, Tensor]
    labels: Tensor | None
    reference: Mapping[str, Tensor]

    @classmethod
    def of(cls, p: Translate) -> People:
        """Return those that the parameters ask for. Raises ValueError for a file that lacks them."""
        names = tuple(dict.fromkeys((*p.sources, *p.targets)))
        found = stacks(p.people, p.split, p.subjects, names, p.image_size)
        count, made = found[names[0]].shape[:2]
        if made < p.slices:
            raise ValueError(f"{p.slices} slices of each subject are wanted, {p.people} has {made}; lower slices")
        people = torch.arange(count)[:, None]  # the next person's slices lie a little higher, so that all heights occur
        at = ((torch.arange(p.slices) + (people + 0.5) / count) * made / p.slices).long()
        found = {n: x[people, at] for n, x in found.items()}
        train = stacks(p.people, "train", TRAINING_PEOPLE, names, p.image_size)
        reference = {n: train[n][train["labels"] > 0 if "labels" in train else train[n] > AIR] for n in names}
        return cls({n: found[n] for n in names}, found.get("labels"), reference)

    def inside(self, target: str) -> Tensor:
        """Return where there is tissue, bool, in the shape of the images."""
        return self.images[target] > AIR if self.labels is None else self.labels > 0


def matched(source: Tensor, inside: Tensor, reference: Tensor) -> Tensor:
    """Return source images (..., 1, y, x) with their grey levels matched to `reference` (pixel,), by scikit-image.

    Only pixels `inside` the true tissue are matched, each slice by itself, the others are 0: a favour to this method.
    """
    x = torch.zeros_like(source)
    for index in np.ndindex(*source.shape[:-3]):
        here = inside[index]
        if here.any():
            x[index][here] = torch.from_numpy(match_histograms(source[index][here].numpy(), reference.numpy())).to(x)
    return x


SCORES = ("PSNR", "SSIM", "MS-SSIM", "MAE", "NMI", "Dice")


def score(x: Tensor, truth: Tensor, inside: Tensor, labels: Tensor | None = None,
          segmenter: Segmenter | None = None) -> dict[str, Tensor]:
    """Return the scores (subject,) of images x (subject, slice, 1, y, x), the slices of a subject taken as one image.

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


def named(pattern: str, contrast: str) -> str:
    """Return the name of a checkpoint for one contrast."""
    return pattern.format(target=contrast.lower())


def load_pair(p: Translate, target: str) -> tuple[Translator, Segmenter | None]:
    """Return the translator into a contrast, and the segmenter that judges it. ValueError if they know another one."""
    prior = Translator.load(named(p.weights, target), p.device, p.autocast)
    if prior.contrast != target:
        raise ValueError(f"{named(p.weights, target)} makes {prior.contrast}, not {target}; give weights=...")
    return prior, load_segmenter(named(p.segmenters, target), target) if p.segmenters else None


@dataclass(frozen=True, eq=False)
class Direction:
    """All translations from one contrast to another: method -> draws (draw, subject, slice, 1, y, x), or one image."""

    source: str
    target: str
    draws: Mapping[str, Tensor]
    bills: Mapping[str, Bill]
    rows: list[dict]  # a tidy table: a row for every method and subject

    @property
    def name(self) -> str:
        return f"{self.source} to {self.target}"


def translate_people(prior: Translator, segmenter: Segmenter | None, people: People, source: str, p: Translate,
                     progress: bool = False) -> Direction:
    """Return the translations of one direction by all methods, and their scores."""
    truth, given = people.images[prior.contrast], people.images[source]
    inside, shape = people.inside(prior.contrast), given.shape[:2]
    draws = {"no translation": given[None],
             "histogram matching": matched(given, inside, people.reference[prior.contrast])[None]}
    bills = {}
    for name, setting in p.settings().items():
        shown = truth if setting.oracle else given
        found = translate(prior, shown.flatten(0, 1), setting, seed=p.seed, progress=progress)
        draws[name], bills[name] = found.draws.unflatten(1, shape), found.bill
    draws["true target"] = truth[None]
    rows = []
    for name, x in draws.items():
        rows += score_draws(name, x, truth, inside, people.labels, segmenter)
    return Direction(source, prior.contrast, draws, bills, [{"direction": f"{source} to {prior.contrast}"} | r
                                                            for r in rows])


def score_draws(name: str, draws: Tensor, truth: Tensor, inside: Tensor, labels: Tensor | None,
                segmenter: Segmenter | None) -> list[dict]:
    """Return a row for each subject: scores of the mean of the draws and, if there are several, of single draws.

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


def summary(rows: list[dict]) -> list[dict]:
    """Return a table row for each direction and method: mean and standard error over subjects of the scores.

    The score of the mean of the draws; PSNR and Dice of single draws, with the deviation between draws of a subject.
    """
    table = []
    for direction, method in dict.fromkeys((r["direction"], r["method"]) for r in rows):
        mine = [r for r in rows if (r["direction"], r["method"]) == (direction, method)]
        row = {"direction": direction, "method": method}
        for name in SCORES:
            if name in mine[0]:
                values = [r[name] for r in mine]
                row[name] = metrics.mean_and_error(values) if all(map(math.isfinite, values)) else ""
        for name in ("PSNR", "Dice"):
            label = f"{name}, one draw (and deviation of draws)"
            if name in mine[0]:
                row[label] = tuple(sum(r[f"{name}, {k}"] for r in mine) / len(mine) for k in ("one draw", "spread")) \
                    if f"{name}, one draw" in mine[0] else ""
        row["Frechet distance"] = mine[0].get("Frechet distance", "")
        table.append(row)
    return table


def verdict(rows: list[dict], method: str = "recommended") -> list[dict]:
    """Return for each direction what `method` gains in PSNR, SSIM and Dice: paired means and standard errors.

    Over no translation, histogram matching, and SDEdit from that level, for each score, where it is best. Last, the
    Dice as a share of what the true targets reach.
    """
    table = []
    for direction in dict.fromkeys(r["direction"] for r in rows):
        by_method: dict[str, list[dict]] = {}
        for r in rows:
            if r["direction"] == direction:
                by_method.setdefault(r["method"], []).append(r)
        if method not in by_method:
            continue
        row: dict = {"direction": direction}
        for k in (k for k in ("PSNR", "SSIM", "Dice") if k in by_method[method][0]):
            values = {name: [r[k] for r in mine] for name, mine in by_method.items()}
            edited = {name: sum(v) for name, v in values.items() if name.startswith("SDEdit")}
            rivals = {"none": "no translation", "matching": "histogram matching",
                      "best SDEdit": max(edited, key=edited.get, default=None)}
            row |= {f"{k} over {label}": metrics.mean_and_error(values[method], values[name])
                    for label, name in rivals.items() if name in values}
        if "Dice" in by_method[method][0]:
            true = sum(r["Dice"] for r in by_method["true target"])
            row["Dice, share of true"] = sum(r["Dice"] for r in by_method[method]) / true
        table.append(row)
    return table


# --------------------------------------------------------------------------------------------------------- pictures


def picture_rows(d: Direction, people: People, count: int = 3) -> dict[str, dict[str, Tensor]]:
    """Return one slice of the first people, translated by every method: row -> column -> (1, y, x)."""
    at = people.images[d.source].shape[1] // 2
    short = {"no translation": d.source, "histogram matching": "matching", "true target": f"true {d.target}",
             "cross and self LMI": "cross + self", "LMI and source": "LMI + source",
             "guided LMI and source": "guided + source", "oracle: LMI of the truth": "oracle",
             "published chain": "published", "published chain, cut": "published, cut"}
    return {f"person {i}": {short.get(name, name.replace(" from sigma =", "")): x.mean(0)[i, at]
                            for name, x in d.draws.items()} for i in range(min(count, len(people.images[d.source])))}


def example_volume(path: Path, p: Translate, prior: Translator) -> Path:
    """Return the path of a NIfTI volume of a held-out person in another contrast: odd in size, lying oblique."""
    source = next(c for c in (*p.sources, *CONTRASTS) if c != prior.contrast)
    shape, voxel, spacing = (11, 81, 71), 2.5, 8.0
    heights = anatomy.SLAB_MM[0] + spacing * torch.arange(shape[0])  # the slab that the cohort's slices come from
    image = anatomy.render(anatomy.cohort(p.split, 1)[0], source, shape, voxel, heights).image.abs()
    upright = anatomy.affine(shape, voxel)
    upright[2, 2:] = spacing, heights[0].item()
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("xyz", (12, -9, 15), degrees=True).as_matrix()
    return save_nifti(path, 1000 * image.numpy(), affine=turned @ upright, units="made up")


class Volumes(NamedTuple):
    """`pictures` of a source volume and its translation, row -> column -> (1, y, x), and `facts` about them."""

    pictures: dict[str, dict[str, Tensor]]
    facts: dict[str, object]


def compare_volumes(source: str | Path, made: str | Path) -> Volumes:
    """Return three planes through the middle of two NIfTI files, each in a window of its own, and their geometry."""
    pictures, facts = {}, {}
    for name, volume in (("source", load_nifti(source)), ("translation", load_nifti(made))):
        x = torch.from_numpy(np.asarray(volume.array, np.float32))
        x = (x / x.max()).repeat_interleave(max(1, round(volume.voxel_mm[0] / volume.voxel_mm[1])), 0)
        z, y, width = (n // 2 for n in x.shape)
        planes = {"plane z": x[z], "plane y": x[:, y].flip(0), "plane x": x[..., width].flip(0)}
        pictures[name] = {plane: image[None] for plane, image in planes.items()}
        facts[name] = {"shape (z, y, x)": volume.array.shape, "affine": volume.affine.round(4).tolist()}
    facts["same shape"] = facts["source"]["shape (z, y, x)"] == facts["translation"]["shape (z, y, x)"]
    facts["same affine"] = facts["source"]["affine"] == facts["translation"]["affine"]
    return Volumes(pictures, facts)
