"""A ladder of doses: the same people scanned at each."""

from __future__ import annotations

from dataclasses import dataclass

from companion.acquisition.pet import Physics, Scan
from companion.data.pet import Slices
from companion.evaluation.tables import check_unique
from companion.parameters import param


@dataclass(frozen=True)
class Doses:
    """The part of a form that says at which doses people are scanned."""

    full_counts: float = param(1e6, "true counts of a slice at full dose; 1e6 as published", minimum=1)
    fractions: tuple[float, ...] = param(
        (0.05, 0.25, 1.0), "of the full dose, by thinning; 0.25 as published", minimum=1e-4, maximum=1
    )
    factors: tuple[float, ...] = param((2.5, 10.0), "further doses, as true counts per pixel with activity", minimum=0)


@dataclass(frozen=True, eq=False)
class Level:
    """A dose: its name, the mean true counts of a slice, everybody's scan, and its share of the full dose."""

    name: str
    counts: float
    scan: Scan
    fraction: float | None = None


def dose_name(fraction: float) -> str:
    """The name of a fraction of the full dose, in per cent with all its digits: what tables are keyed by."""
    return f"{100 * fraction:g}% dose"


def ladder(people: Slices, doses: Doses, physics: Physics, seed: int = 0) -> list[Level]:
    """The scans of the people at every dose, lowest counts first.

    Doses of `fractions` are one full-dose scan, thinned; those of `factors` are scans of their own. Raises ValueError
    for no dose, or for two that tables could not tell apart.
    """
    seeds = [seed * 1000 + int(person) * 100 for person in people.subject]
    levels = []
    if doses.fractions:
        full = physics.acquire(people.image, people.mu, doses.full_counts, seeds, pixel_mm=people.pixel_mm)
        levels += [
            Level(dose_name(f), f * doses.full_counts, full if f == 1 else full.thinned(f, seeds), f)
            for f in doses.fractions
        ]
    for k, factor in enumerate(doses.factors):
        counts = factor * (people.image > 0.5).flatten(1).sum(1).double()
        scan = physics.acquire(people.image, people.mu, counts, [s + k + 1 for s in seeds], pixel_mm=people.pixel_mm)
        levels.append(Level(f"{factor:g} per pixel", counts.mean().item(), scan))
    if not levels:
        raise ValueError("no dose to study; give fractions of the full dose, or factors, counts per pixel")
    check_unique([level.name for level in levels], "doses")
    return sorted(levels, key=lambda level: level.counts)
