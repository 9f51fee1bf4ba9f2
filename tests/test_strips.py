"""The second projector: exact areas, and agreement with the first where both should agree."""

import math

import pytest
import torch

from companion.operators.pet import ParallelBeam, Projector
from companion.operators.strips import Strips, shadow


def disc(size: int, radius_mm: float, pixel_mm: float, fine: int = 8) -> torch.Tensor:
    line = (torch.arange(size * fine) - (size * fine - 1) / 2) * pixel_mm / fine
    inside = (line[:, None] ** 2 + line**2 < radius_mm**2).double()
    return inside.reshape(size, fine, size, fine).mean((1, 3))[None, None]


def test_every_angle_keeps_the_activity():
    beam = ParallelBeam((12, 12), angles=7, bins=24, pixel_mm=3.0, bin_mm=2.2)
    x = torch.rand(2, 1, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    strips = Strips(beam, fine=2)
    per_angle = strips(x).sum(-1)[:, 0] * beam.bin_mm
    wanted = x.flatten(1).sum(1, keepdim=True) * 1.5**2
    assert torch.allclose(per_angle, wanted.expand_as(per_angle), rtol=1e-10)


def test_a_strip_is_the_mean_of_many_lines():
    beam = ParallelBeam((6, 6), angles=5, bins=6, pixel_mm=4.0)
    lines = 200
    finer = ParallelBeam((6, 6), angles=5, bins=6 * lines, pixel_mm=4.0, bin_mm=4.0 / lines)
    x = torch.rand(1, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mean = Projector(finer)(x).reshape(1, 1, 5, 6, lines).mean(-1)
    assert torch.allclose(Strips(beam, fine=1)(x), mean, atol=2e-3 * mean.max().item())


def test_a_disc_has_the_profile_of_a_disc():
    beam = ParallelBeam((32, 32), angles=9, pixel_mm=2.0)
    sinogram = Strips(beam, fine=4)(disc(128, 20.0, 0.5))[0, 0]
    edges = (torch.arange(33, dtype=torch.float64) - 16) * 2.0
    t = edges.clamp(-20, 20)
    area = t * (400 - t**2).sqrt() + 400 * (t / 20).asin()
    assert torch.allclose(sinogram, (area.diff() / 2.0).expand(9, 32), atol=0.25)
    assert math.isclose(sinogram[0].sum().item() * 2, math.pi * 400, rel_tol=1e-3)


def test_detectors_blur_and_lose_nothing_inside():
    beam = ParallelBeam((32, 32), angles=3, pixel_mm=2.0)
    x = disc(32, 12.0, 2.0)
    sharp, soft = Strips(beam, 1)(x), Strips(beam, 1, fwhm_mm=5.0)(x)
    assert torch.allclose(sharp.sum(-1), soft.sum(-1), rtol=1e-6) and soft.amax() < sharp.amax()


def test_the_shadow_of_a_square_rises_from_none_to_all():
    wide, narrow = torch.tensor(2.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    s = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    assert torch.allclose(
        shadow(s, wide, narrow), torch.tensor([0, 0, 0.5, 0.75, 1, 1], dtype=torch.float64), atol=1e-6
    )


def test_other_images_are_refused():
    with pytest.raises(ValueError, match="expected"):
        Strips(ParallelBeam((8, 8)), 2)(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="fine"):
        Strips(ParallelBeam((8, 8)), 0)
