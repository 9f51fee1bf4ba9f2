"""A second projector, to simulate scans with: strips, where `operators.pet` has lines, and finer pixels.

A study that makes its data with the matrix that reconstructs them commits the inverse crime: the model is exact, and
every method looks better than it is. Here a detector bin sees a strip of its own width, so the share of a pixel that
it sees is an area, in closed form; the image is as fine as one likes, and detectors blur. Nothing is shared with
`operators.pet` but the geometry `ParallelBeam`, and nothing is stored: every application computes its weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from companion.operators.linear import Shape
from companion.operators.pet import ParallelBeam, gaussian


@dataclass(frozen=True)
class Strips:
    """Strip integrals (activity mm) of images `fine` times finer than a geometry's pixels, blurred along the bins.

    beam: a geometry of the coarse image, of square slices. fwhm_mm: of the detectors' Gaussian response.
    Raises ValueError for stacks and for a `fine` below 1.
    """

    beam: ParallelBeam
    fine: int = 2
    fwhm_mm: float = 0.0

    def __post_init__(self):
        if len(self.beam.shape) != 2 or self.fine < 1:
            raise ValueError(f"shape {self.beam.shape}, fine {self.fine}: expected a slice (y, x) and fine >= 1")

    @property
    def image_shape(self) -> Shape:
        """Axes of a fine image: (1, y, x)."""
        return (1, *(self.fine * n for n in self.beam.shape))

    def __call__(self, x: Tensor) -> Tensor:
        """Return sinograms (batch, 1, angle, bin) of images (batch, 1, y, x), in their precision.

        Raises ValueError for images of another size.
        """
        if tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"images of shape {tuple(x.shape)}; expected (batch, {self.image_shape})")
        values = x.flatten(1).T.double()
        filled = (values != 0).any(1)
        values, places = values[filled], self.places()[filled]
        rows = [self.profile(angle, values, places) for angle in self.beam.theta]
        sinogram = torch.stack(rows).movedim(2, 0)[:, None]  # (angle, bin, batch) -> (batch, 1, angle, bin)
        return self.detected(sinogram).to(x.dtype)

    def detected(self, sinogram: Tensor) -> Tensor:
        """Return sinograms (batch, 1, angle, bin) after the response of the detectors."""
        if not self.fwhm_mm:
            return sinogram
        return sinogram @ gaussian(self.beam.bins, self.beam.bin_mm, self.fwhm_mm).to(sinogram)

    def places(self) -> Tensor:
        """The centres (pixel, 2) of the fine pixels, x and y in mm."""
        pixel_mm = self.beam.pixel_mm / self.fine
        _, height, width = self.image_shape
        y = ((height - 1) / 2 - torch.arange(height, dtype=torch.float64)) * pixel_mm
        x = (torch.arange(width, dtype=torch.float64) - (width - 1) / 2) * pixel_mm
        return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).reshape(-1, 2)

    def profile(self, angle: float, values: Tensor, places: Tensor) -> Tensor:
        """The bins (bin, batch) of one angle: for each pixel the area of it in each strip, over the strip's width."""
        theta, bin_mm, pixel_mm = torch.tensor(angle, dtype=torch.float64), self.beam.bin_mm, self.beam.pixel_mm
        cos, sin, side = theta.cos(), theta.sin(), pixel_mm / self.fine
        wide, narrow = side * torch.maximum(cos.abs(), sin.abs()), side * torch.minimum(cos.abs(), sin.abs())
        centre = places[:, 0] * cos + places[:, 1] * sin
        edge = (centre - (wide + narrow) / 2) / bin_mm + self.beam.bins / 2  # where the pixel begins, in bins
        first = edge.floor()
        count = int(((wide + narrow) / bin_mm).ceil()) + 1
        at = first[:, None] + torch.arange(count + 1, dtype=torch.float64)
        below = shadow((at - self.beam.bins / 2) * bin_mm - centre[:, None], wide, narrow)
        area = (below[:, 1:] - below[:, :-1]) * side**2 / bin_mm
        index = at[:, :-1].long()
        area = torch.where((index >= 0) & (index < self.beam.bins), area.clamp(min=0), 0.0)  # but for rounding
        bins = values.new_zeros(self.beam.bins, values.shape[1])
        for k in range(count):
            bins.index_add_(0, index[:, k].clamp(0, self.beam.bins - 1), area[:, k, None] * values)
        return bins


def shadow(s: Tensor, wide: Tensor, narrow: Tensor) -> Tensor:
    """The share of a square's area on the side of a line below shift s (mm, from its centre): 0 to 1.

    wide, narrow: the larger and the smaller projection of the square's sides. Its density is a trapezoid, the
    convolution of two boxes, so this is piecewise quadratic.
    """
    narrow = narrow.clamp(min=1e-9 * wide)

    def ramp(t: Tensor) -> Tensor:
        return t.clamp(min=0).square() / 2

    a, b = (wide + narrow) / 2, (wide - narrow) / 2
    return ((ramp(s + a) - ramp(s + b) - ramp(s - b) + ramp(s - a)) / (wide * narrow)).clamp(0, 1)
