"""Geometric augmentation for small training sets, told to the network so that it does not learn to do it.

The pipe of EDM (Karras et al. 2022, App. F.2; moves and filter from Karras et al. 2020, StyleGAN2-ADA, App. B):
each image is now and then flipped, scaled, rotated, stretched or shifted, and nine numbers say how. The network
takes them as `augment=`; without them, as in sampling, it draws images that were not augmented.

    pipe = AugmentPipe(p=0.05)
    images, labels = pipe(images, torch.Generator().manual_seed(0))
    edm_loss(D, images[:, :1], generator, cond=images[:, 1:], augment=labels)

All channels of an image move together: stack an image and its condition before the call.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# Low-pass filter of the symlet with 6 vanishing moments (Daubechies 1992, Table 6.3); its sum is sqrt(2).
SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
PAD = 5  # of the filter, so that it halves or doubles a size exactly
PEAK = 0.25  # pixels from a fine pixel's place to that of the filter's peak, which is not its middle
REACH = 3  # pixels beside each pixel that the filter touches


class Moves(NamedTuple):
    """What happens to each of n images; all zero: nothing."""

    flip_x: Tensor  # (n,) 0 or 1: along the last axis
    flip_y: Tensor  # (n,) 0 or 1: along the axis before
    scale: Tensor  # (n,) in units of scale_std octaves
    angle: Tensor  # (n,) of the rotation, radians
    stretch: Tensor  # (n,) in units of stretch_std octaves, along `direction`; across it the inverse
    direction: Tensor  # (n,) radians
    shift: Tensor  # (2, n) along x and y, in units of shift_std of the image's size


@dataclass(frozen=True)
class AugmentPipe:
    """Random moves: pipe(images, generator) -> (images, labels (batch, 9)).

    A move happens to an image with probability min(1, p * its multiplier), each by itself; flip_x at 1e8 is
    always drawn, so that half of the images are mirrored. The defaults are EDM's for small images; the
    published PET network was trained with p = 0.05.

    stretch_label: "double_angle" says a stretch w along r as (w cos 2r, w sin 2r), one label for one stretch.
    "published" says it as (w cos r, w sin r), which (-w, r + pi) shares although it does the inverse; for
    networks that were trained so.
    """

    p: float = 0.12
    flip_x: float = 1e8
    flip_y: float = 1.0
    scale: float = 1.0
    rotate: float = 1.0
    stretch: float = 1.0
    shift: float = 1.0
    scale_std: float = 0.2
    stretch_std: float = 0.2
    shift_std: float = 0.125
    stretch_label: str = "double_angle"

    def __post_init__(self):
        if not 0 <= self.p <= 1:
            raise ValueError(f"p={self.p}: expected a probability, from 0 to 1")
        for name in ("flip_x", "flip_y", "scale", "rotate", "stretch", "shift"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a multiplier of p, 0 or above")
        if self.stretch_label not in ("double_angle", "published"):
            raise ValueError(f"stretch_label={self.stretch_label!r}: expected 'double_angle' or 'published'")

    def __call__(self, images: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """(augmented images, labels (batch, 9)) of real images (batch, channel, y, x)."""
        moves = self.moves(self.draw(len(images), generator))
        moves = Moves(*(move.to(images.device) for move in moves))
        return self.apply(images, moves), self.labels(moves).to(images.dtype)

    def item(self, image: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """(augmented image, labels (9,)) of one image (channel, y, x)."""
        images, labels = self(image[None], generator)
        return images[0], labels[0]

    def draw(self, n: int, generator: Generator) -> list[Tensor]:
        """Every random number for n images, in the published order: each move's values, then its gate."""
        on: dict[str, Any] = dict(generator=generator, device=generator.device)
        coin = partial(torch.randint, 2, (n,), **on)
        rand, randn = partial(torch.rand, n, **on), partial(torch.randn, n, **on)
        flips = [coin(), rand(), coin(), rand()]
        scale, angle, stretch = [randn(), rand()], [rand(), rand()], [randn(), rand(), rand(), rand()]
        return flips + scale + angle + stretch + [torch.randn(2, n, **on), torch.rand(n, **on)]

    def moves(self, draws: list[Tensor]) -> Moves:
        """What these random numbers do. A gate above the probability of a move undoes it."""
        flip_x, a, flip_y, b, scale, c, turn, d, stretch, direction, e, free, shift, f = draws

        def gated(value: Tensor, gate: Tensor, probability: float) -> Tensor:
            return torch.where(gate < probability, value, torch.zeros_like(value))

        return Moves(
            gated(flip_x, a, self.flip_x * self.p),
            gated(flip_y, b, self.flip_y * self.p),
            gated(scale, c, self.scale * self.p),
            gated((2 * turn - 1) * math.pi, d, self.rotate * self.p),
            gated(stretch, e, self.stretch * self.p),
            gated((2 * direction - 1) * math.pi, free, 0.5),  # half of the stretches are along x
            gated(shift, f, self.shift * self.p),
        )

    def labels(self, moves: Moves) -> Tensor:
        """What a network is told, (n, 9): flips, scale, (cos - 1, sin) of the angle, stretch (2), shift (2)."""
        m, turns = moves, 2 if self.stretch_label == "double_angle" else 1
        return torch.stack(
            [
                m.flip_x.to(m.scale.dtype),
                m.flip_y.to(m.scale.dtype),
                m.scale,
                m.angle.cos() - 1,
                m.angle.sin(),
                m.stretch * (turns * m.direction).cos(),
                m.stretch * (turns * m.direction).sin(),
                *m.shift,
            ],
            dim=1,
        )

    def apply(self, images: Tensor, moves: Moves) -> Tensor:
        """The moved images. Flips are exact; images that only flip, or do nothing, are not resampled."""
        if images.ndim != 4 or not images.is_floating_point() or len(images) != len(moves.scale):
            raise ValueError(
                f"images have shape {tuple(images.shape)} and type {images.dtype}; expected real images "
                f"({len(moves.scale)}, channel, y, x)"
            )
        for flip, axis in ((moves.flip_x, 3), (moves.flip_y, 2)):
            images = torch.where(flip.bool()[:, None, None, None], images.flip(axis), images)
        moved = (moves.scale != 0) | (moves.angle != 0) | (moves.stretch != 0) | (moves.shift != 0).any(0)
        if not moved.any():
            return images
        images = images.clone()
        matrices = self.inverse(moves, images.shape[2:])[moved].to(images.dtype)
        images[moved] = resample(images[moved], matrices)
        return images

    def inverse(self, moves: Moves, size: Sequence[int]) -> Tensor:
        """Matrices (n, 3, 3) from places (x, y, 1) in the new image to the old, in pixels from the centre."""
        scale, stretch = 2 ** (-self.scale_std * moves.scale), 2 ** (-self.stretch_std * moves.stretch)
        x, y = (self.shift_std * shift for shift in moves.shift)
        return (
            _scaling(scale, scale)
            @ _rotation(moves.angle)
            @ _rotation(-moves.direction)
            @ _scaling(stretch, 1 / stretch)
            @ _rotation(moves.direction)
            @ _translation(-x * size[1], -y * size[0])
        )


def _matrices(rows: list[list]) -> Tensor:
    """(n, 3, 3) from rows of entries that are numbers or (n,)."""
    like = next(entry for row in rows for entry in row if isinstance(entry, Tensor))
    stacked = [torch.stack([torch.as_tensor(e).to(like).expand_as(like) for e in row], -1) for row in rows]
    return torch.stack(stacked, -2)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return _matrices([[x, 0, 0], [0, y, 0], [0, 0, 1]])


def _rotation(angle: Tensor) -> Tensor:
    return _matrices([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 1]])


def _translation(x, y) -> Tensor:
    return _matrices([[1, 0, x], [0, 1, y], [0, 0, 1]])


def resample(images: Tensor, inverse: Tensor) -> Tensor:
    """Images (n, channel, y, x) whose place p (x, y, 1), in pixels from the centre, shows what was at inverse p.

    Images continue by reflection. Interpolation is bilinear between pixels of half the size, made and undone
    with a wavelet filter, so that the identity and whole shifts are almost exact.
    """
    height, width = images.shape[2:]
    margins = _margins(inverse, width, height)
    left, right, top, bottom = margins
    fine = _double(F.pad(images, margins, mode="reflect"))

    # places of the fine pixels of the new image, with the border that the filter needs
    x, y = (
        (torch.arange(2 * n, device=images.device, dtype=images.dtype) - (n - 0.5)) / 2 + PEAK
        for n in (width + 2 * REACH, height + 2 * REACH)
    )
    places = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x)), x.new_ones(len(y), len(x))], -1)
    places = torch.einsum("nij,yxj->nyxi", inverse[:, :2], places)
    # ... in the padded old image, in units of half its size
    centre = places.new_tensor([(left - right) / 2, (top - bottom) / 2])
    size = places.new_tensor([width + left + right, height + top + bottom])
    grid = (places + centre - PEAK) / (size / 2)
    moved = F.grid_sample(fine, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return _halve(moved)[:, :, REACH:-REACH, REACH:-REACH]


def _margins(inverse: Tensor, width: int, height: int) -> tuple[int, int, int, int]:
    """How far (left, right, top, bottom) the corners of any of the new images lie outside the old ones.

    At most a size less one, beyond which a reflection has no more to show.
    """
    half = inverse.new_tensor([(width - 1) / 2, (height - 1) / 2])
    signs = inverse.new_tensor([[-1, -1], [1, -1], [-1, 1], [1, 1]])
    corners = torch.einsum("nij,kj->nki", inverse[:, :2, :2], signs * half) + inverse[:, None, :2, 2]
    low, high = (-corners).amax((0, 1)), corners.amax((0, 1))
    limit = half.new_tensor([width - 1, height - 1])
    low, high = (torch.minimum((m - half + 2 * REACH).clamp(min=0), limit).ceil() for m in (low, high))
    return int(low[0]), int(high[0]), int(low[1]), int(high[1])


def _double(x: Tensor) -> Tensor:
    """Images (n, channel, 2 y, 2 x): zeros between the pixels, then the filter along both axes."""
    n, channels = x.shape[:2]
    taps = x.new_tensor(SYM6)
    x = x.flatten(0, 1)[:, None]
    x = F.conv_transpose2d(x, taps[None, None, None], stride=(1, 2), padding=(0, PAD))
    x = F.conv_transpose2d(x, taps[None, None, :, None], stride=(2, 1), padding=(PAD, 0))
    return x[:, 0].unflatten(0, (n, channels))


def _halve(x: Tensor) -> Tensor:
    """Images (n, channel, y / 2, x / 2): the adjoint of _double."""
    n, channels = x.shape[:2]
    taps = x.new_tensor(SYM6)
    x = x.flatten(0, 1)[:, None]
    x = F.conv2d(x, taps[None, None, None], stride=(1, 2), padding=(0, PAD))
    x = F.conv2d(x, taps[None, None, :, None], stride=(2, 1), padding=(PAD, 0))
    return x[:, 0].unflatten(0, (n, channels))
