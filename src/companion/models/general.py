"""Which of the two general priors serves a scan.

Both are the same small network for complex images of any size. One learnt from pixels of all sizes, the other from
large ones alone, at which it errs less; a network so small cannot know both as well (docs/heads.md has the figures).
"""

from __future__ import annotations

BY_PIXELS = "general"  # as the name of weights: the one that suits the scan
ANY_PIXELS, LARGE_PIXELS = "general/2d", "general/coarse"
LARGE_MM = 2.2  # smallest pixels that `general/coarse` learnt from


def general_prior(weights: str, pixel_mm: float | None) -> str:
    """The checkpoint that `weights` names: for "general" that of pixels of this size, mm (the smaller side), and
    `general/2d` where their size is not known; any other name is itself."""
    if weights != BY_PIXELS:
        return weights
    return LARGE_PIXELS if pixel_mm is not None and pixel_mm >= LARGE_MM else ANY_PIXELS
