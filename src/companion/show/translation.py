"""Pictures of translated people."""

from __future__ import annotations

from torch import Tensor

from companion.data.contrast_people import People
from companion.evaluation.translation import CONSTANT
from companion.reconstruction.translated_people import Direction

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
