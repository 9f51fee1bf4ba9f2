"""Phase of MR images as scanners leave it: an image times exp(i phi), with phi smooth, or rapid near air."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

RAMP = 0.5  # radians a pixel at most of a linear phase: the echo lies up to 8 % of a pixel's bandwidth off the centre
NEAR_AIR = 6.0  # radians at most that the field at a surface adds
SIGN_CHANGES = 0.15  # share of images whose signal changes sign somewhere, as after an inversion
TURN, DRIFT = 0.5, 0.3  # radians a slice at most: by which smooth fields become others, and of the constant
OWN_CONSTANT = 0.1  # share of stacks in which each slice has a constant of its own


def add_phase(image: Tensor, generator: Generator) -> Tensor:
    """Return complex images (batch, 1, y, x) from real ones, each with a new phase; magnitudes stay, but see below.

    Stacks of slices (batch, slice, 1, y, x) get phases that change slowly along each stack. The phase is a constant, a
    ramp, a smooth field of up to some radians and, in half of the images, a field that follows the borders of air. Some
    images change sign across lines, where their magnitude then is 0.
    """
    if image.ndim == 5:
        return add_phase(image[:, :, 0], generator)[:, :, None]
    batch, slices, height, width = image.shape
    on = {"generator": generator, "device": generator.device}

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, 1, 1, 1, **on)

    def smooth(controls: int) -> Tensor:
        noise = torch.randn(batch, 1, controls, controls, **on)
        if slices > 1:
            turn = uniform(0, TURN) * number
            noise = turn.cos() * noise + turn.sin() * torch.randn(batch, 1, controls, controls, **on)
        return F.interpolate(noise, size=(height, width), mode="bicubic", align_corners=True)

    number = torch.arange(slices, dtype=torch.float32, device=generator.device)[:, None, None]
    y = torch.arange(height, dtype=torch.float32, device=generator.device)[:, None]
    x = torch.arange(width, dtype=torch.float32, device=generator.device)
    phase = uniform(-math.pi, math.pi)
    if slices > 1:
        own = 2 * math.pi * torch.rand(batch, slices, 1, 1, **on)
        phase = phase + uniform(-DRIFT, DRIFT) * number + own * (uniform(0, 1) < OWN_CONSTANT)
    phase = phase + uniform(-1, 1) ** 3 * RAMP * y + uniform(-1, 1) ** 3 * RAMP * x
    phase = phase + uniform(0, 1.2) * smooth(4) + uniform(0, 1) ** 2 * smooth(7)
    air = F.avg_pool2d((image.to(generator.device).abs() < 0.08).float(), 9, 1, 4)
    near = uniform(-1, 1).clamp(-0.5, 0.5) * (uniform(0, 1) < 0.5) * 2 * NEAR_AIR
    phase = phase + near * air * (1 + 0.5 * smooth(5))
    changes = uniform(0, 1) < SIGN_CHANGES
    sign = torch.where(changes, torch.tanh(uniform(1, 12) * smooth(4)), 1.0)
    real = (image.to(generator.device) * sign).to(image.device)
    return torch.complex(real * phase.cos().to(image.device), real * phase.sin().to(image.device))
