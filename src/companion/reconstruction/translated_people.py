"""People with known truth translated by every method, and scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from companion.data.contrast_people import People
from companion.diffusion.local_information import MAPS
from companion.diffusion.sampling import Bill
from companion.evaluation.segmenter import Segmenter
from companion.evaluation.tables import check_unique
from companion.evaluation.translation import CONSTANT, constant, matched, score_draws
from companion.parameters import param
from companion.reconstruction.translation import ABLATION, RECOMMENDED, Setting, Translator, translate


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
    guidance: float | None = param(
        None, "classifier-free guidance of the recommended row; 1 is none, none: what suits the weights", minimum=0
    )
    mirrored: bool = param(True, "half the draws of the recommended row are those of the mirrored source")
    shading: bool | None = param(
        None, "draws of the recommended row are given the shading of their source; none: if it suits the weights"
    )
    attraction: float = param(0.0, "weight of the gradient of the LMI in the recommended row", minimum=0)

    def settings(self, recommended: Setting = RECOMMENDED) -> dict[str, Setting]:
        """The rows of the table that are drawn, in its order. Raises ValueError for two of one name.

        recommended: of the weights, for what is left open.
        """
        common = {"solver": self.solver, "evaluations": self.evaluations, "draws": self.draws}
        check_unique([sdedit_name(s) for s in self.sdedit], "rows of SDEdit")
        edited = {sdedit_name(s): Setting((), start=s, begin="source", **common) for s in self.sdedit}
        chosen = {name: replace(ABLATION[name], **common) for name in ABLATION if name in self.rows}
        if "recommended" in chosen:
            chosen["recommended"] = self.chosen(recommended)
        if self.published:
            name = "published chain, cut" if self.cut else "published chain"
            chosen[name] = Setting(("cross", "self"), "published", self.published, draws=self.draws, cut=self.cut)
        return edited | chosen

    def chosen(self, recommended: Setting) -> Setting:
        """The recommended setting, with the maps, solver, evaluations, draws and guidance asked for."""
        return Setting(
            self.keep,
            self.solver,
            self.evaluations,
            draws=self.draws,
            guidance=recommended.guidance if self.guidance is None else self.guidance,
            mirrored=self.mirrored,
            shading=recommended.shading if self.shading is None else self.shading,
            attraction=self.attraction,
        )


def sdedit_name(sigma: float) -> str:
    """The name of the row of SDEdit from a noise level."""
    return f"SDEdit from sigma = {sigma:g}"


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
