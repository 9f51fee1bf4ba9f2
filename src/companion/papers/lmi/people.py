"""Translation of people with known truth: scores, tables, pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from companion.data.cohort import standard, standards
from companion.data.contrast_people import People, array_of
from companion.data.contrasts import CONTRASTS
from companion.data.intake.kinds import refuse_labels
from companion.data.intake.readers import sniff
from companion.data.intensity import scaled
from companion.data.nifti import load_nifti
from companion.data.store import Prepared, open_dataset
from companion.evaluation.segmenter import Segmenter, load_segmenter
from companion.files import project_root
from companion.models.checkpoint import describe
from companion.parameters import Parameters, param
from companion.reconstruction.translated_people import Direction, Drawing, translate_people
from companion.reconstruction.translation import Translator

WEIGHTS, SEGMENTERS = "lmi/{target}", "segmenter/{target}"  # what the name "embedded" stands for
PATIENTS, KNOWN_PATIENTS = "lmi/patients/{target}", ("T1w", "T2w", "FLAIR")  # and for scans of one's own


@dataclass(frozen=True)
class Translate(Drawing, Parameters):
    """Parameters of lmi/4_translate.ipynb."""

    people: str = param("brain", "brain: the embedded cohort; else a file prepared by 1_data")
    split: str = param(
        "test", "whose people: test, or validation, on which settings are chosen", choices=("test", "validation")
    )
    targets: tuple[str, ...] = param(CONTRASTS, "contrasts to translate into")
    sources: tuple[str, ...] = param(CONTRASTS, "contrasts to translate from")
    weights: str = param(
        "embedded",
        "translators, {target} for the contrast; embedded: lmi/{target}, for your own scans lmi/patients/{target}",
    )
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

    def translator(self, target: str) -> str:
        """The name of the translator into a contrast."""
        own = self.people != "brain" or self.volume is not None
        return named(self.weights, target, PATIENTS if own and target in KNOWN_PATIENTS else WEIGHTS)

    def before_start(self) -> None:
        """Raise for people, weights or a volume that are not there, do not know a contrast, or are not of one.

        Also for heads of another size than the weights know, and a volume that is no image, or is of the target.
        """
        self.settings()
        wanted = tuple(dict.fromkeys((*self.sources, *self.targets)))
        if not any(source != target for source in self.sources for target in self.targets):
            raise ValueError(f"nothing to translate: sources and targets are both {', '.join(self.targets)}")
        labelled, size = self.people == "brain", self.image_size
        if not labelled:
            prepared = open_dataset(project_root() / self.people)
            arrays, labelled = [array_of(prepared, c) for c in wanted], "labels" in prepared.shapes
            if (made := prepared.shapes[arrays[0]][1]) < self.slices:
                raise ValueError(f"{self.people} has {made} slices of each subject, not {self.slices}; lower slices")
            if not prepared.rows(self.split):
                have = ", ".join(f"{len(who)} for {part}" for part, who in prepared.split.items())
                raise ValueError(f"{self.people} has nobody for {self.split} ({have}); choose another split")
            size = prepared.shapes[arrays[0]][-1] if on_template(prepared) else None
        for target in self.targets:
            about = describe(self.translator(target)).get("data", {})
            if standard(known := about.get("contrast", "")) != target:
                raise ValueError(f"{self.translator(target)} makes {known or 'no contrast'}, not {target}")
            if size and size != (learnt := about.get("image_size", [size])[-1]):
                raise ValueError(
                    f"{self.people} shows heads on {size} x {size} pixels, {self.translator(target)} learnt them on "
                    f"{learnt} x {learnt} and would take them for others; use image_size={learnt}, or its own weights"
                )
            if self.segmenters and labelled:
                describe(named(self.segmenters, target, SEGMENTERS))
        if self.volume is not None:
            check_volume(project_root() / self.volume, self.targets[-1])


def on_template(prepared: Prepared) -> bool:
    """Whether the people of a prepared file lie on the grid of the template, on which all heads have one size."""
    cut = prepared.attrs.get("subjects", {}).values()
    return prepared.source.startswith("virtual") or (bool(cut) and all("found" in one["slicing"] for one in cut))


def check_volume(path: Path, target: str) -> None:
    """Raise ValueError unless a file is one volume of an image, of another contrast than `target`."""
    what, _ = sniff(path)
    if standard(what.contrast) == target:
        raise ValueError(
            f"{path.name} is {target} by its name or header, which is what it would become; choose another target"
        )
    array = load_nifti(path).array
    refuse_labels(array, path)
    scaled(np.abs(array), name=path.name)


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
        prior, segmenter = load_pair(p.translator(target), segmenters, target, p.device, p.autocast)
        directions += [
            translate_people(prior, segmenter, people, source, p.settings(prior.recommended), p.seed, progress, target)
            for source in p.sources
            if source != target
        ]
    return directions
