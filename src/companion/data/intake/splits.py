"""People into "train", "validation" and "test": seeded, never empty without a word, never one person twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from companion.data.intake.walk import natural
from companion.data.store import SPLITS


def split_people(
    people: Iterable[str],
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    given: Mapping[str, str] | None = None,
) -> dict[str, list[str]]:
    """Return "train", "validation", "test" -> people: a seeded draw that the order of the names cannot change.

    shares: of train, validation and test; their sum is 1. Every part with a share above 0 gets one person at least.
    given: person -> part, for people of whom a table says so; the others are drawn into what the shares leave. Raises
    ValueError if there are too few people, or a person of `given` is in a part without a share.
    """
    names = sorted(set(people), key=natural)
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must be three numbers of at least 0 with sum 1, got {shares}")
    parts = {part: [n for n in names if (given or {}).get(n) == part] for part in SPLITS}
    fixed = {n for members in parts.values() for n in members}
    if fixed != set(names):
        free = [n for n in names if n not in fixed]
        counts = _counts(len(names), shares, [len(parts[part]) for part in SPLITS], len(free))
        drawn = [free[i] for i in np.random.default_rng(seed).permutation(len(free))]
        for part, n in zip(SPLITS, counts, strict=True):
            parts[part] += drawn[:n]
            drawn = drawn[n:]
    empty = [part for part, share in zip(SPLITS, shares, strict=True) if share > 0 and not parts[part]]
    if empty:
        raise ValueError(
            f"{len(names)} people ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''}) cannot be split into "
            f"train, validation and test of {', '.join(f'{s:g}' for s in shares)}: nobody would be in "
            f"{' and '.join(empty)}; give more people, or set the share of a part that you do not need to 0"
        )
    return {part: sorted(members, key=natural) for part, members in parts.items()}


def _counts(total: int, shares: Sequence[float], have: Sequence[int], free: int) -> list[int]:
    """How many of `free` people each part gets: its share of all, one at least, the rest to the largest."""
    wanted = [max(max(round(s * total), int(s > 0)) - n, 0) for s, n in zip(shares, have, strict=True)]
    largest = int(np.argmax(shares))
    order = [i for i in range(len(shares)) if i != largest]
    counts = [0] * len(shares)
    for i in order:
        counts[i] = min(wanted[i], max(free - sum(counts) - int(have[largest] == 0 and shares[largest] > 0), 0))
    counts[largest] = free - sum(counts)
    return counts


def split_table(split: Mapping[str, Sequence[str]], files: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return the split as text, one line a part: how many people, how many files, and who they are."""
    lines = []
    for part, people in split.items():
        number = sum(len(files.get(p, ())) for p in people) if files else 0
        count = f", {number} file{'s' * (number != 1)}" if files else ""
        who = ", ".join(list(people)[:12]) + (f" and {len(people) - 12} more" if len(people) > 12 else "")
        lines.append(
            f"{part:<11} {len(people):>4} {'person' if len(people) == 1 else 'people'}{count}: {who or 'nobody'}"
        )
    return "\n".join(lines)
