"""Translation of people with known truth: scores, tables, pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from companion.data import anatomy
from companion.data.cohort import standard, standards
from companion.data.contrasts import CONTRASTS
from companion.data.intake.readers import sniff
from companion.data.nifti import load_nifti, save_nifti
from companion.data.shading import AIR
from companion.data.store import open_dataset
from companion.diffusion.local_information import MAPS
from companion.diffusion.sampling import Bill
from companion.evaluation.segmenter import Segmenter, load_segmenter
from companion.evaluation.tables import average, check_unique, grouped
from companion.evaluation.translation import CONSTANT, SCORES, constant, matched, score_draws
from companion.files import project_root
from companion.models.checkpoint import describe
from companion.papers.lmi.data import array_of, stacks
from companion.papers.lmi.translate import ABLATION, RECOMMENDED, Setting, Translator, translate
from companion.parameters import Parameters, param

WEIGHTS, SEGMENTERS = "lmi/{target}", "segmenter/{target}"  # what the name "embedded" stands for


@dataclass(frozen=True)
class Drawing:
    """The part of a form that says which rows of the table networks draw, and how."""

    rows: tuple[str, ...] = param(
        ("unconditional", "cross and self LMI", "recommended"),
        "what the networks draw: rows of the table",
        choices=tuple(ABLATION),
    )
    keep: tuple[str, ...] = param(RECOMMENDED.keep, "maps that the recommended row is told", choices=MAPS)
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

    def settings(self) -> dict[str, Setting]:
        """The rows of the table that are drawn, in its order. Raises ValueError for two of one name."""
        common = {"solver": self.solver, "evaluations": self.evaluations, "draws": self.draws}
        check_unique([sdedit_name(s) for s in self.sdedit], "rows of SDEdit")
        edited = {sdedit_name(s): Setting((), start=s, begin="source", **common) for s in self.sdedit}
        chosen = {name: replace(ABLATION[name], **common) for name in ABLATION if name in self.rows}
        if "recommended" in chosen:
            chosen["recommended"] = self.chosen
        if self.published:
            name = "published chain, cut" if self.cut else "published chain"
            chosen[name] = Setting(("cross", "self"), "published", self.published, draws=self.draws, cut=self.cut)
        return edited | chosen

    @property
    def chosen(self) -> Setting:
        """The recommended setting, with the maps, solver, evaluations, draws and guidance asked for."""
        return Setting(
            self.keep,
            self.solver,
            self.evaluations,
            draws=self.draws,
            guidance=self.guidance,
            mirrored=self.mirrored,
            shading=self.shading,
            attraction=self.attraction,
        )


def sdedit_name(sigma: float) -> str:
    """The name of the row of SDEdit from a noise level."""
    return f"SDEdit from sigma = {sigma:g}"


@dataclass(frozen=True)
class Translate(Drawing, Parameters):
    """Parameters of lmi/4_translate.ipynb."""

    people: str = param("brain", "brain: the embedded cohort; else a file prepared by 1_data")
    split: str = param(
        "test", "whose people: test, or validation, on which settings are chosen", choices=("test", "validation")
    )
    targets: tuple[str, ...] = param(CONTRASTS, "contrasts to translate into")
    sources: tuple[str, ...] = param(CONTRASTS, "contrasts to translate from")
    weights: str = param("lmi/{target}", "translators; {target} is the contrast in small letters")
    segmenters: str | None = param("segmenter/{target}", "segmenters that know only the target; none: no Dice")
    image_size: int = param(64, "pixels along y and x of the embedded cohort", minimum=16)
    subjects: int = param(12, "held-out people; of one, scores have no error", minimum=1)
    slices: int = param(2, "slices of each, evenly spaced", minimum=1)
    volume: str | None = param(None, "NIfTI volume to translate; none: a person of the cohort, lying oblique")
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))

    def __post_init__(self):
        super().__post_init__()
        for name in ("targets", "sources"):  # a file of T1, T2 and PD meets weights for T1w, T2w and PDw
            object.__setattr__(self, name, standards(getattr(self, name)))

    def before_start(self) -> None:
        """Raise for people, weights or a volume that are not there, do not know a contrast, or are not of one."""
        self.settings()
        wanted = tuple(dict.fromkeys((*self.sources, *self.targets)))
        if not any(source != target for source in self.sources for target in self.targets):
            raise ValueError(f"nothing to translate: sources and targets are both {', '.join(self.targets)}")
        labelled = self.people == "brain"
        if not labelled:
            prepared = open_dataset(project_root() / self.people)
            arrays, labelled = [array_of(prepared, c) for c in wanted], "labels" in prepared.shapes
            if (made := prepared.shapes[arrays[0]][1]) < self.slices:
                raise ValueError(f"{self.people} has {made} slices of each subject, not {self.slices}; lower slices")
            if not prepared.rows(self.split):
                have = ", ".join(f"{len(who)} for {part}" for part, who in prepared.split.items())
                raise ValueError(f"{self.people} has nobody for {self.split} ({have}); choose another split")
        for target in self.targets:
            known = describe(named(self.weights, target)).get("data", {}).get("contrast", "")
            if standard(known) != target:
                raise ValueError(f"{named(self.weights, target)} makes {known or 'no contrast'}, not {target}")
            if self.segmenters and labelled:
                describe(named(self.segmenters, target, SEGMENTERS))
        if self.volume is not None:
            sniff(project_root() / self.volume)


TRAINING_PEOPLE = 4  # whose tissue histogram matching aims at


@dataclass(frozen=True, eq=False)
class People:
    """Held-out people: contrast -> images (subject, slice, 1, y, x) in [0, 1].

    labels: in the same shape, if there are any. reference: contrast -> tissue of training people, (pixel,), of virtual
    ones where a file has none.
    """

    images: Mapping[str, Tensor]
    labels: Tensor | None
    reference: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, source: str, split: str, subjects: int, slices: int, contrasts: Sequence[str], image_size: int = 64
    ) -> People:
        """So many of a source ("brain" or a prepared file). Raises ValueError for a file that lacks them."""
        names = tuple(dict.fromkeys(contrasts))
        found = stacks(source, split, subjects, names, image_size)
        count, made = found[names[0]].shape[:2]
        if made < slices:
            raise ValueError(f"{slices} slices of each subject are wanted, {source} has {made}; lower slices")
        people = torch.arange(count)[:, None]  # the next person's slices lie a little higher, so that all heights occur
        at = ((torch.arange(slices) + (people + 0.5) / count) * made / slices).long()
        found = {n: x[people, at] for n, x in found.items()}
        known = source == "brain" or open_dataset(project_root() / source).rows("train")
        size = found[names[0]].shape[-1]
        train = stacks(source if known else "brain", "train", TRAINING_PEOPLE, names, image_size if known else size)
        reference = {n: train[n][train["labels"] > 0 if "labels" in train else train[n] > AIR] for n in names}
        return cls({n: found[n] for n in names}, found.get("labels"), reference)

    def inside(self, target: str) -> Tensor:
        """Where there is tissue, bool, in the shape of the images."""
        return self.images[target] > AIR if self.labels is None else self.labels > 0


def named(pattern: str, contrast: str, default: str = WEIGHTS) -> str:
    """The name of a checkpoint for one contrast; the pattern "embedded" stands for `default`."""
    return (default if pattern == "embedded" else pattern).format(target=contrast.lower())


def load_pair(
    weights: str, segmenters: str | None, target: str, device: str = "cpu", autocast: str | None = None
) -> tuple[Translator, Segmenter | None]:
    """The translator into a contrast, and the segmenter that judges it. ValueError if they know another one."""
    prior = Translator.load(named(weights, target), device, autocast)
    if standard(prior.contrast) != standard(target):
        raise ValueError(f"{named(weights, target)} makes {prior.contrast}, not {target}; give weights=...")
    return prior, load_segmenter(named(segmenters, target, SEGMENTERS), target) if segmenters else None


def study(p: Translate, people: People, progress: bool = True) -> list[Direction]:
    """All translations that the parameters ask for, direction by direction, with their scores."""
    directions = []
    segmenters = p.segmenters if people.labels is not None else None
    for target in p.targets:
        prior, segmenter = load_pair(p.weights, segmenters, target, p.device, p.autocast)
        directions += [
            translate_people(prior, segmenter, people, source, p.settings(), p.seed, progress, target)
            for source in p.sources
            if source != target
        ]
    return directions


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


def translate_people(
    prior: Translator,
    segmenter: Segmenter | None,
    people: People,
    source: str,
    settings: Mapping[str, Setting],
    seed: int = 0,
    progress: bool = False,
    target: str | None = None,
) -> Direction:
    """The translations of one direction by all methods, and their scores. target: by default as the prior calls it."""
    target = target or prior.contrast
    truth, given = people.images[target], people.images[source]
    inside, shape = people.inside(target), given.shape[:2]
    draws = {
        CONSTANT: constant(truth, inside)[None],
        "no translation": given[None],
        "histogram matching": matched(given, inside, people.reference[target])[None],
    }
    bills = {}
    for name, setting in settings.items():
        shown = truth if setting.oracle else given
        found = translate(prior, shown.flatten(0, 1), setting, seed=seed, progress=progress)
        draws[name], bills[name] = found.draws.unflatten(1, shape), found.bill
    draws["true target"] = truth[None]
    rows = []
    for name, x in draws.items():
        rows += score_draws(name, x, truth, inside, people.labels, segmenter)
    return Direction(source, target, draws, bills, [{"direction": f"{source} to {target}"} | r for r in rows])


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
                "best SDEdit": max(edited, key=edited.get, default=None),
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


# --------------------------------------------------------------------------------------------------------- pictures


SHORT = {  # names as a figure has room for them
    CONSTANT: "constant",
    "histogram matching": "matching",
    "cross and self LMI": "cross + self",
    "LMI and source": "LMI + source",
    "guided LMI and source": "guided + source",
    "oracle: LMI of the truth": "oracle",
    "published chain": "published",
    "published chain, cut": "published, cut",
}


def picture_rows(d: Direction, people: People, count: int = 3) -> dict[str, dict[str, Tensor]]:
    """One slice of the first people, translated by every method: row -> column -> (1, y, x)."""
    at = people.images[d.source].shape[1] // 2
    short = {"no translation": d.source, "true target": f"true {d.target}"}
    return {
        f"person {i}": {
            short.get(name, SHORT.get(name, name.replace(" from sigma =", ""))): x.mean(0)[i, at]
            for name, x in d.draws.items()
        }
        for i in range(min(count, len(people.images[d.source])))
    }


def example_volume(path: Path, sources: Sequence[str], target: str, split: str = "test") -> Path:
    """The path of a NIfTI volume of a held-out person in another contrast: odd in size, lying oblique."""
    source = next(c for c in (*sources, *CONTRASTS) if c != target)
    shape, voxel, spacing = (11, 81, 71), 2.5, 8.0
    heights = anatomy.SLAB_MM[0] + spacing * torch.arange(shape[0])  # the slab that the cohort's slices come from
    image = anatomy.render(anatomy.cohort(split, 1)[0], source, shape, voxel, heights).image.abs()
    upright = anatomy.affine(shape, voxel)
    upright[2, 2:] = spacing, heights[0].item()
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("xyz", (12, -9, 15), degrees=True).as_matrix()
    return save_nifti(path, 1000 * image.numpy(), affine=turned @ upright, units="made up")


class Volumes(NamedTuple):
    """`pictures` of a source volume and its translation, row -> column -> (1, y, x), and `facts` about them."""

    pictures: dict[str, dict[str, Tensor]]
    facts: dict[str, object]


def compare_volumes(source: str | Path, made: str | Path, unsupported: str | Path | None = None) -> Volumes:
    """Three planes through the middle of two or three NIfTI files, each in a window of its own, and their geometry."""
    pictures, facts = {}, {}
    files = {"source": source, "translation": made} | ({"unsupported": unsupported} if unsupported else {})
    for name, volume in ((name, load_nifti(path)) for name, path in files.items()):
        x = torch.from_numpy(np.asarray(volume.array, np.float32))
        x = (x / x.max().clamp(min=1e-6)).repeat_interleave(max(1, round(volume.voxel_mm[0] / volume.voxel_mm[1])), 0)
        z, y, width = (n // 2 for n in x.shape)
        planes = {"plane z": x[z], "plane y": x[:, y].flip(0), "plane x": x[..., width].flip(0)}
        pictures[name] = {plane: image[None] for plane, image in planes.items()}
        facts[name] = {"shape (z, y, x)": volume.array.shape, "affine": volume.affine.round(4).tolist()}
    facts["same shape"] = facts["source"]["shape (z, y, x)"] == facts["translation"]["shape (z, y, x)"]
    facts["same affine"] = facts["source"]["affine"] == facts["translation"]["affine"]
    return Volumes(pictures, facts)
