"""Multi-coil MRI scans of slices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from companion.operators.mri import CartesianMask, Sense, sense


@dataclass(frozen=True, eq=False)
class Scan:
    """A simulated acquisition: y = A x + noise. `x` (slice, 1, y, x) is the truth, `y` (slice, coil, y, x) k-space."""

    x: Tensor
    y: Tensor
    A: Sense
    mask: CartesianMask
    noise_std: float

    def one(self, i: int) -> Scan:
        """Return the scan of slice i alone."""
        maps = self.A.coils.maps
        A = self.A if maps.ndim == 3 else sense(maps[i : i + 1], self.mask)
        return Scan(self.x[i : i + 1], self.y[i : i + 1], A, self.mask, self.noise_std)
