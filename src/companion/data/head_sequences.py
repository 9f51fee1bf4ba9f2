"""Stacks of neighbouring slices of heads that nobody has: `companion.data.heads`, one slice after the other.

All slices of a stack are of one warped head, one contrast, pixel size and resolution; lesions are balls that each slice
cuts anew, texture and receive bias change from slice to slice as they do along them.

    heads = load_heads("data/heads", "train")          # of companion.data.heads_download
    stack = head_sequence(heads[0], np.random.default_rng(0), size=128, frames=4)   # (4, 128, 128)
    stack = leaves_sequence(np.random.default_rng(0), size=128, frames=4)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from companion.data.heads import (
    MARGIN,
    PIXEL_MM,
    Head,
    add_lesions,
    bias_fields,
    dead_leaves,
    draw_contrast,
    draw_pixel_mm,
    draw_plane,
    resolution,
    section,
    textures,
)
from companion.data.heads_download import load_heads
from companion.data.rows import Rows

GAP_MM = (0.6, 6.0)  # distances of neighbouring slices
BIAS_MM = 80.0  # distance along a stack in which receive bias changes altogether
LEAVES, BRAIN = 0.15, 0.07  # shares of stacks: dead leaves, and brains without a head


def head_sequence(
    head: Head,
    rng: np.random.Generator,
    size: int = 128,
    frames: int = 4,
    pixel_mm: float | None = None,
    gaps_mm: Sequence[float] | None = None,
) -> np.ndarray:
    """Return slices (frames, size, size) float32 of a warped head, each `gaps_mm` from the one before it.

    1 is the 99th percentile of the tissue's signal. Noise-free, but for what noise the head's own scan had. Raises
    ValueError for another number of gaps than one for each two neighbours, or gaps below 0.
    """
    pixel = draw_pixel_mm(rng) if pixel_mm is None else pixel_mm
    gaps = draw_gaps(rng, frames, pixel) if gaps_mm is None else np.asarray(gaps_mm, float)
    if gaps.shape != (frames - 1,) or (gaps < 0).any():
        raise ValueError(f"gaps_mm is {gaps_mm}; expected {frames - 1} distances of at least 0 for {frames} frames")
    heights = np.concatenate([[0.0], gaps.cumsum()])
    heights = (heights - heights[-1] / 2) * rng.choice([-1, 1])
    fine = math.ceil(pixel / 1.1)
    n = (size + 2 * MARGIN) * fine
    plane = draw_plane(head, rng, n, pixel / fine)
    thickness = min(GAP_MM[1], float(np.median(gaps)) if len(gaps) else pixel) * rng.uniform(0.5, 1)
    tone = draw_contrast(head.levels.numpy(), rng)
    seed, span = int(rng.integers(2**62)), float(np.ptp(heights))
    grain = textures(n, rng, (gaps * fine / pixel).tolist())
    factors = grain * bias_fields(n, rng, (heights * math.pi / 2 / BIAS_MM).tolist())
    stack = []
    for height, factor in zip(heights, factors, strict=True):
        image = section(head, plane, tone, thickness, height)
        image = add_lesions(image, np.random.default_rng([seed, 1]), pixel / fine, height, span)
        stack.append(resolution(image * factor, np.random.default_rng([seed, 2]), size, fine))
    return np.stack(stack)


def draw_gaps(rng: np.random.Generator, frames: int, pixel_mm: float) -> np.ndarray:
    """Return distances (frames - 1,), mm, of neighbouring slices: about a pixel in half of the stacks, else any.

    A tenth of the stacks is irregular, and in as many one neighbour lies far off, so that it tells little.
    """
    low, high = (0.8 * pixel_mm, 1.25 * pixel_mm) if rng.random() < 0.5 else GAP_MM
    gaps = np.full(frames - 1, np.exp(rng.uniform(math.log(low), math.log(high)))).clip(*GAP_MM)
    kind = rng.random()
    if kind < 0.1:
        gaps = gaps * np.exp(rng.normal(0, 0.6, frames - 1))
    elif kind < 0.2 and frames > 1:
        gaps[int(rng.integers(frames - 1))] = rng.uniform(8, 40)
    return gaps


def leaves_sequence(rng: np.random.Generator, size: int = 128, frames: int = 4) -> np.ndarray:
    """Return slices (frames, size, size) float32 of a stack of balls and blocks that hide each other, .3 to 6 pixels
    apart."""
    seed, gap = int(rng.integers(2**62)), math.exp(rng.uniform(math.log(0.3), math.log(6)))
    heights = gap * (np.arange(frames) - (frames - 1) / 2)
    return np.stack([dead_leaves(np.random.default_rng(seed), size, h, gap * (frames - 1)) for h in heights])


def any_sequence(heads: Sequence[Head], rng: np.random.Generator, size: int, frames: int) -> np.ndarray:
    """Return one stack (frames, size, size): dead leaves, a brain alone, or one of the whole heads."""
    brains = [head for head in heads if head.name.endswith("_brain")]
    whole = [head for head in heads if not head.name.endswith("_brain")]
    kind = rng.random()
    if kind < LEAVES:
        return leaves_sequence(rng, size, frames)
    known = brains if brains and (kind < LEAVES + BRAIN or not whole) else whole
    return head_sequence(known[int(rng.integers(len(known)))], rng, size, frames)


def sequence_arrays(
    folder: str | Path,
    image_size: int,
    frames: int,
    subjects: int,
    validation_share: float,
    seed: int,
    scratch: str | Path,
    progress: bool = True,
) -> dict[str, object]:
    """What `write_dataset` stores of stacks of the heads in a folder: "signal" (stack, frame, 1, y, x) float16, signed.

    `subjects` stacks of the heads for training, and so large a share more of the head held for validation. Stack i
    depends on seed and i alone. Raises FileNotFoundError when a head is missing.
    """
    heads = {split: load_heads(folder, split) for split in ("train", "validation")}
    counts = {"train": subjects, "validation": round(validation_share * subjects)}
    names = {split: [f"{split} {i}" for i in range(count)] for split, count in counts.items()}
    rows = Rows(scratch)
    todo = [(split, i) for split, count in counts.items() for i in range(count)]
    for split, i in tqdm(todo, desc="stacks", disable=not progress):
        rng = np.random.default_rng([seed, i, list(counts).index(split)])
        rows.append(any_sequence(heads[split], rng, image_size, frames)[:, None].astype(np.float16))
    return {
        "arrays": {"signal": rows},
        "units": {"signal": "1"},
        "scale": {"signal": "1 is the 99th percentile of the magnitude inside the object"},
        "seed": seed,
        "source": "stacks of warped and recoloured real heads and dead leaves of companion.data.head_sequences",
        "subjects": [name for of_split in names.values() for name in of_split],
        "split": names,
        "attrs": {"pixel_mm": "{} to {:.0f}".format(*PIXEL_MM), "gap_mm": "{} to {:.0f}".format(*GAP_MM)},
    }
