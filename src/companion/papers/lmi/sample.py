"""LMI, one translation from the inside: what the network is told, how a draw comes about, how many steps it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from companion.data.cohort import standard
from companion.data.contrast_people import array_of
from companion.data.store import open_dataset
from companion.evaluation import metrics
from companion.evaluation.tables import average
from companion.evaluation.translation import score
from companion.files import project_root
from companion.models.checkpoint import describe
from companion.parameters import Parameters, param
from companion.reconstruction.translation import BOTH, EMBEDDED, Setting, Translator, translate


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
