"""The parameters of AID's sampling; sequences are drawn by `companion.models.sequences`."""

from __future__ import annotations

from dataclasses import dataclass

from companion.models.sequences import EMBEDDED, Drawing
from companion.parameters import Parameters, param


@dataclass(frozen=True)
class SampleSequence(Drawing, Parameters):
    """Parameters of aid/3_sample.ipynb."""

    weights: str = param(EMBEDDED, "sequence prior: an embedded or published name, a folder, hf:owner/name")
    codec: str | None = param(None, "autoencoder whose latents the prior works on: a folder; none: it works on images")
    source: str = param("brain", "held-out sequences: brain or heart, the embedded cohorts; else a prepared file")
    subjects: int = param(16, "held-out sequences to compare with", minimum=2)
    autocast: str | None = param("auto", "number format inside the network", choices=("auto", "bfloat16", None))
