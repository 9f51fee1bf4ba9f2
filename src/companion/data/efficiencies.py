"""How well each pair of detectors detects, as PETSIRD states it, and the singles rates that delayed events tell of."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from companion.data.intake.records import Unreadable

SWEEPS = 500  # of the fixed point for singles rates; tens are enough where many modules are in coincidence


@dataclass(frozen=True, eq=False)
class Efficiencies:
    """The efficiency of a pair of detectors, summed over their energy windows: that of each times that of their place.

    module, element (detector,): detectors are numbered module by module. single (detector, energy), or None: 1.
    group (module, module): which matrix of `matrices` (group, element, energy, element, energy) a pair of modules has,
    the one with the larger number first; -1 for none. matrices None: 1. alive (module, module), 0 or 1: in coincidence.
    """

    module: np.ndarray
    element: np.ndarray
    energies: int
    calibration: float
    single: np.ndarray | None
    group: np.ndarray
    matrices: np.ndarray | None

    @classmethod
    def of(cls, path: Path, given, modules: int, elements: int, energies: int) -> Efficiencies:
        """Those of a PETSIRD header; Unreadable for tables that do not fit the scanner, or are negative or NaN."""
        single = matrices = None
        if given.detection_bin_efficiencies and len(given.detection_bin_efficiencies[0]):
            single = np.asarray(given.detection_bin_efficiencies[0], np.float64)
            _check(path, "detection_bin_efficiencies", single, (modules * elements * energies,))
            single = single.reshape(-1, energies)
        group = np.zeros((modules, modules), int)
        if given.module_pair_sgidlut and given.module_pair_sgidlut[0] and len(given.module_pair_sgidlut[0][0]):
            rows = given.module_pair_sgidlut[0][0]
            if [len(row) for row in rows] != list(range(1, modules + 1)):
                raise Unreadable(path, f"module_pair_sgidlut is not a lower triangle of {modules} modules: damaged")
            for i, row in enumerate(rows):
                group[i, : i + 1] = group[: i + 1, i] = row
        vectors = given.module_pair_efficiencies_vectors
        if vectors and vectors[0] and len(vectors[0][0]):
            size = elements * energies
            matrices = np.stack([np.asarray(one.values, np.float32) for one in vectors[0][0]])
            _check(path, "module_pair_efficiencies", matrices, (len(matrices), size, size))
            if [one.sgid for one in vectors[0][0]] != list(range(len(matrices))) or group.max() >= len(matrices):
                raise Unreadable(path, f"module_pair_sgidlut asks for {group.max() + 1} of {len(matrices)} matrices")
            matrices = matrices.reshape(-1, elements, energies, elements, energies)
        module, element = np.divmod(np.arange(modules * elements), elements)
        return cls(module, element, energies, float(given.calibration_factor), single, group, matrices)

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """The efficiency (pair,) of pairs of detectors, without the calibration."""
        high, low = np.maximum(first, second), np.minimum(first, second)
        group = self.group[self.module[high], self.module[low]]
        if self.single is None and self.matrices is None:
            return (group >= 0) * float(self.energies**2)
        total = np.zeros(len(high))
        for a, b in product(range(self.energies), repeat=2):
            found = np.ones(len(high))
            if self.single is not None:
                found *= self.single[high, a] * self.single[low, b]
            if self.matrices is not None:
                found *= self.matrices[group, self.element[high], a, self.element[low], b]
            total += found
        return np.where(group >= 0, total, 0)

    @property
    def alive(self) -> np.ndarray:
        return (self.group >= 0).astype(np.float64)

    @property
    def said(self) -> str:
        """In words, which parts the file has."""
        parts = {"detectors": self.single is not None, "pairs of modules": self.matrices is not None}
        return " and ".join(name for name, there in parts.items() if there) or "none"


def singles_of(fans: np.ndarray, efficiencies: Efficiencies) -> np.ndarray:
    """Rates (detector,) so that a pair in coincidence expects rate_i rate_j random events: the most likely ones.

    fans: the delayed events (detector,) in which each takes part. Then sum_j rate_i rate_j = fan_i for all i (the
    likelihood equations of Poisson counts), whose fixed point is damped; Panin, Chen and Michel 2008, for fan sums.
    """
    module, alive = efficiencies.module, efficiencies.alive
    own = alive[module, module]
    rates = fans / np.sqrt(max(fans.sum(), 1.0))
    for _ in range(SWEEPS):
        others = (alive @ np.bincount(module, rates, len(alive)))[module] - own * rates
        new = np.sqrt(rates * np.divide(fans, others, out=np.zeros_like(fans), where=others > 0))
        done = np.abs(new - rates).max() <= 1e-9 * max(new.max(), 1e-30)
        rates = new
        if done:
            break
    return rates


def _check(path: Path, name: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
    if values.shape != shape or not np.isfinite(values).all() or values.min() < 0:
        raise Unreadable(path, f"{name} of shape {values.shape}; expected {shape}, not negative, and no NaN")
