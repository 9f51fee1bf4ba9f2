"""Activity drawn from a prior, or given the MLEM images of a low-dose scan; is it good?

model = Model.load("pet/enhance")
cases = held_out_cases(model.data, subjects=8, counts=2.5e5)
found = draw(model, range(8), Schedule(), cases)          # found.x (slice, draw, 1, y, x) in kBq/mL
"""

from __future__ import annotations

from dataclasses import dataclass

from companion.data.draws import FORMATS
from companion.parameters import Parameters, param
from companion.reconstruction.enhancement import (
    EMBEDDED,
    Cases,
    Drawn,
    Model,
    Schedule,
    draw,
    held_out_cases,
    quality_table,
)


@dataclass(frozen=True)
class SampleModel(Schedule, Parameters):
    """Parameters of pet/3_sample.ipynb."""

    weights: str = param(EMBEDDED, "what to draw from: an embedded name or a folder; conditional or not")
    seeds: str = param("0-15", 'draws, of each scan if conditional: "0-63,80" or a list')
    label: int | None = param(None, "class label, if the network was trained with them; none: of no class", minimum=0)
    guidance: float = param(1.0, "weight of the class label; 1 as trained, above 1 exaggerates", minimum=0)
    source: str = param("cohort", "of scans: cohort, held-out virtual people; else a prepared file with a test split")
    subjects: int = param(16, "held-out slices: to scan if conditional, else to compare with", minimum=2)
    lesions: int = param(1, "of each held-out virtual person", minimum=0)
    counts: float = param(
        2.5e5, "true counts of each scan of virtual people; 2.5e5 is the published low dose", minimum=1
    )
    batch_size: int = param(16, "images at a time", minimum=1)
    formats: tuple[str, ...] = param(FORMATS, "files to write", choices=FORMATS)
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))


def study(p: SampleModel, model: Model, progress: bool = True) -> tuple[Drawn, Cases, list[dict]]:
    """The draws that the parameters ask for, the held-out people beside them, and the table that judges them."""
    cases = held_out_cases(model.data, p.subjects, p.source, p.lesions, p.counts, p.seed)
    drawn = draw(
        model, p.seeds, p, cases, label=p.label, guidance=p.guidance, batch_size=p.batch_size, progress=progress
    )
    return drawn, cases, quality_table(drawn, cases, model.data)
