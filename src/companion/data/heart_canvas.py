"""A canvas in millimetres on which a virtual chest is painted, and curves around a centre."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

POINT_SPREAD = 1.2  # voxels: full width at half maximum of an image from a limited k-space
ANGLES = 360  # samples of a contour


@dataclass(frozen=True)
class Canvas:
    """Pixel positions in mm, and shapes with soft borders on them.

    `y` (y,) and `x` (x,) are the grid; `down` (y or 1, ...) and `right`, broadcastable to (y, x), are where shapes see
    each pixel; `edge` is the width of a border.
    """

    y: Tensor
    x: Tensor
    down: Tensor
    right: Tensor
    edge: float

    def bend(self, generator: torch.Generator, amplitude_mm: float, spacing_mm: float) -> Canvas:
        """Return the canvas on which shapes are drawn smoothly bent."""
        dy, dx = (amplitude_mm * self.field(generator, spacing_mm) for _ in range(2))
        return replace(self, down=self.down + dy, right=self.right + dx)

    def cover(self, depth: Tensor, soft_mm: float = 0.0) -> Tensor:
        """Return how much of each pixel a shape covers, from the depth in mm of the pixel's centre inside it."""
        return (depth / (self.edge + soft_mm) + 0.5).clamp(0, 1)

    def ellipse(self, cy, cx, a: float, b: float, degrees=0.0) -> Tensor:
        """Return the cover of an ellipse with half axes a, b, the first at `degrees` anticlockwise of right."""
        turn = torch.as_tensor(degrees) * (math.pi / 180)
        dy, dx = self.down - cy, self.right - cx
        u, v = dx * turn.cos() - dy * turn.sin(), dx * turn.sin() + dy * turn.cos()
        return self.cover((1 - ((u / a).square() + (v / b).square()).sqrt()) * math.sqrt(a * b))

    def field(
        self, generator: torch.Generator, spacing_mm: float, shift=(0.0, 0.0), scale: float | Tensor = 1.0
    ) -> Tensor:
        """Return a smooth random field (y, x) of unit variance, or (frame, y, x) for shifts or scales (frame, 1)."""
        count = math.ceil(420 / spacing_mm) + 3  # same draws for every matrix
        noise = torch.randn(count, count, generator=generator)
        wy, wx = (
            _weights((at - by) / (scale * spacing_mm), count) for at, by in zip((self.y, self.x), shift, strict=True)
        )
        return wy @ noise @ wx.mT

    def spots(self, cy: Tensor, cx: Tensor, radius: Tensor, tone: Tensor) -> Tensor:
        """Return the sum of Gaussian spots at (..., spot); softened, not aliased, when smaller than a voxel."""
        width = (radius.square() + (self.edge / 2.355) ** 2).sqrt()
        gain = tone * (radius / width).square()
        gy = gain[:, None] * torch.exp(-0.5 * ((self.y - cy[..., None]) / width[:, None]).square())
        gx = torch.exp(-0.5 * ((self.x - cx[..., None]) / width[:, None]).square())
        return gy.mT @ gx


def _ease(u: Tensor) -> Tensor:
    """Return a smooth rise from 0 (u <= 0) to 1 (u >= 1)."""
    return (1 - torch.cos(math.pi * u.clamp(0, 1))) / 2


def _weights(position: Tensor, count: int) -> Tensor:
    """Return smooth weights (..., count) of control points at unit distance about 0; white noise keeps its variance."""
    distance = position.clamp(-(count - 1) / 2, (count - 1) / 2)[..., None] + (count - 1) / 2 - torch.arange(count)
    weight = (1 - (distance / 1.7).square()).clamp(min=0) ** 3  # bell-shaped and, unlike a Gaussian, quick
    return weight / weight.square().sum(-1, keepdim=True).sqrt()


def _wave(theta: Tensor, generator: torch.Generator, orders: range, power: float = 1.0) -> Tensor:
    """Return a random periodic function of the angle, standard deviation about 1; amplitudes fall as order^-power."""
    order = torch.tensor(list(orders), dtype=torch.float32)
    amplitude = order**-power
    amplitude = amplitude / amplitude.square().sum().sqrt()
    draws = torch.randn(2, len(order), generator=generator).clamp(-2, 2) * amplitude
    angle = order[:, None] * theta
    return draws[0] @ angle.cos() + draws[1] @ angle.sin()


def _bump(theta: Tensor, degrees: float, width_deg: float) -> Tensor:
    """Return a periodic bump of height 1 at an angle."""
    return torch.exp((torch.cos(theta - math.radians(degrees)) - 1) / math.radians(width_deg) ** 2)


class Polar:
    """Pixels in polar coordinates about a centre, numbers or (frame, 1, 1), for shapes given as contours r(angle)."""

    angles = torch.arange(ANGLES) * (2 * math.pi / ANGLES)

    def __init__(self, canvas: Canvas, cy, cx):
        dy, dx = canvas.down - cy, canvas.right - cx
        self.canvas, self.radius = canvas, (dy.square() + dx.square()).sqrt()
        at = torch.remainder(torch.atan2(-dy, dx), 2 * math.pi) * (ANGLES / (2 * math.pi))
        self.index = at.long().clamp(max=ANGLES - 1)
        self.rest = at - self.index

    def at(self, contour: Tensor) -> Tensor:
        """Return a table (angle,) or (frame, angle) at every pixel's angle."""
        table = torch.cat([contour, contour[..., :1]], -1)
        if table.ndim == 1:
            low, high = table[self.index], table[self.index + 1]
        else:
            flat = self.index.flatten(1)
            low, high = (table.gather(1, i).view_as(self.rest) for i in (flat, flat + 1))
        return torch.lerp(low, high, self.rest)

    def cover(self, contour: Tensor, soft_mm: float = 0.0) -> Tensor:
        """Return the cover of the shape inside a contour (angle,) or (frame, angle), mm."""
        slope = (contour.roll(-1, -1) - contour.roll(1, -1)) * (ANGLES / (4 * math.pi))
        lean = (1 + (slope / contour.clamp(min=1)).square()).rsqrt()  # radial to perpendicular distance
        return self.canvas.cover((self.at(contour) - self.radius) * self.at(lean), soft_mm)
