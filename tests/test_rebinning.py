"""Fourier rebinning against exact line integrals: right far from the axis, where single slices blur along z."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from companion.operators.cylinder import Cylinder, Projector3D
from companion.reconstruction.rebinning import arc_corrected, fore, rebinned_model, ssrb

SIGMA = 6.0
RING = Cylinder((8, 32, 32), (3.0, 5.0), 64, 64, 2.5, 12, 6.0, 120.0, 8)


def integrals(c: Cylinder, centre: tuple[float, float, float]) -> Tensor:
    """Those of a Gaussian of 1 at `centre` (x, y, z), SIGMA mm wide, in closed form: (1, plane, angle, bin)."""
    s, cos, sin = c.shifts_mm, np.cos(c.theta)[:, None], np.sin(c.theta)[:, None]
    half = np.sqrt(c.radius_mm**2 - s**2)
    p = np.zeros(c.sinogram_shape[1:])
    for i, plane in enumerate(c.planes):
        for low, high in ((np.array(pair) - (c.rings - 1) / 2) * c.ring_mm for pair in plane):
            middle = np.broadcast_arrays(s * cos, s * sin, (low + high) / 2)
            along = np.broadcast_arrays(-sin, cos, (high - low) / (2 * half))
            away = np.asarray(centre) - np.stack(middle, -1)
            along = np.stack(along, -1) / np.linalg.norm(np.stack(along, -1), axis=-1, keepdims=True)
            squared = (away**2).sum(-1) - (away * along).sum(-1) ** 2
            p[i] += math.sqrt(2 * math.pi) * SIGMA * np.exp(-squared / (2 * SIGMA**2))
    return torch.from_numpy(p)[None]


def direct(c: Cylinder, centre: tuple[float, float, float]) -> Tensor:
    """What rebinning is to find: integrals of lines in slices half a ring apart, times their pairs."""
    even = replace(c, rings=2 * c.rings - 1, ring_mm=c.ring_mm / 2, max_difference=0, span=1)
    pairs = torch.bincount(torch.tensor([sum(pair) for plane in c.planes for pair in plane]))
    return pairs[:, None, None] * integrals(even, centre)


def error(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("span", [1, 3])
def test_far_from_the_axis_it_is_right_where_single_slices_blur(span):
    c = replace(RING, span=span, max_difference=11)
    p, exact = integrals(c, (48.0, 36.0, 3.0)), direct(c, (48.0, 36.0, 3.0))
    assert error(ssrb(p, c), exact) > 0.3
    found = fore(p, c)
    assert error(found, exact) < 0.1
    assert found.sum().item() == pytest.approx(exact.sum().item(), rel=0.02)


def test_on_the_axis_both_are_right_and_no_count_is_lost():
    p, exact = integrals(RING, (0.0, 0.0, 3.0)), direct(RING, (0.0, 0.0, 3.0))
    assert error(ssrb(p, RING), exact) < 0.012 and error(fore(p, RING), exact) < 0.012
    assert fore(p, RING).sum().item() == pytest.approx(exact.sum().item(), rel=1e-3)


def test_what_does_not_change_along_z_comes_back_as_its_direct_planes():
    planar = replace(RING, rings=1, max_difference=0)
    one = integrals(planar, (30.0, -20.0, 0.0))[0, 0]  # of a rod: that of its slice times the slope of the line
    rods = torch.stack([one * stretch(RING, plane) * len(plane) for plane in RING.planes])
    found, pairs = fore(rods[None], RING)[0], torch.bincount(torch.tensor([sum(q[0]) for q in RING.planes]))
    assert error(found, pairs[:, None, None] * one) < 1e-3


def stretch(c: Cylinder, plane: list[tuple[int, int]]) -> Tensor:
    (low, high), *_ = plane
    half = np.sqrt(c.radius_mm**2 - c.shifts_mm**2)
    return torch.from_numpy(np.hypot(1, (high - low) * c.ring_mm / (2 * half)))


def test_direct_planes_alone_stay_as_they_are():
    c = replace(RING, max_difference=0)
    p = integrals(c, (20.0, 30.0, 3.0))
    found = fore(p, c)
    assert error(found[:, ::2], p) < 1e-3 and not found[:, 1::2].any()


def test_angles_may_turn_the_other_way_or_all_around():
    centre = (30.0, -40.0, -5.0)
    p = integrals(RING, centre)
    found = fore(p, RING)
    back = replace(RING, angles=RING.theta[::-1])
    assert torch.allclose(fore(p.flip(-2), back), found.flip(-2), atol=1e-8)
    shifted = replace(RING, angles=[a + 0.7 for a in RING.theta])
    assert error(fore(integrals(shifted, centre), shifted), direct(shifted, centre)) < 0.1
    around = replace(RING, angles=[math.pi * i / 64 for i in range(128)])
    whole = fore(integrals(around, centre), around)
    assert torch.allclose(whole[..., :64, :], found, atol=1e-8)
    assert torch.allclose(whole[..., 64:, :], found.flip(-1), atol=1e-8)


def test_batches_precision_and_the_model():
    """Of volumes projected by our own operators, in single precision: what `rebinned_model` expects."""
    c = replace(RING, shape=(23, 32, 32))
    z, y, x = torch.meshgrid(*[torch.arange(n) - (n - 1) / 2 for n in c.shape], indexing="ij")
    blobs = [
        torch.exp(-((3 * (z - i)) ** 2 + (5 * x - a) ** 2 + (5 * y + 20) ** 2) / 200) for i, a in ((2, 40), (-3, 0))
    ]
    volumes = torch.stack(blobs)[:, None]
    p = Projector3D(c)(volumes)
    found = fore(p, c)
    assert found.dtype == torch.float32 and found.shape == rebinned_model(c)(volumes).shape
    assert torch.allclose(fore(p[1], c), found[1], atol=1e-3) and torch.allclose(
        fore(p.double(), c).float(), found, atol=1e-2
    )
    exact = rebinned_model(c)(volumes)  # slices of the volume lie half a ring apart
    assert error(found, exact) < 0.06 < error(ssrb(p, c), exact)


def test_arc_correction_comes_first():
    ring = replace(RING, bins=70, bin_mm=2.4, arc_corrected=False)
    centre = (40.0, 20.0, 3.0)
    p, even = arc_corrected(integrals(ring, centre), ring)
    assert even.arc_corrected and even.bins % 2 == 0 and even.bins < 70
    assert abs(even.shifts_mm[-1]) <= ring.shifts_mm[-1] < even.shifts_mm[-1] + even.bin_mm
    assert error(p, integrals(even, centre)) < 0.02
    assert error(fore(p, even), direct(even, centre)) < 0.1
    same, scanner = arc_corrected(p, even)
    assert same is p and scanner is even


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tof_bins": 5, "tof_bin_mm": 30.0, "tof_fwhm_mm": 50.0}, "add them up first"),
        ({"arc_corrected": False}, "arc_corrected"),
        ({"angles": 40}, "40 angles in half a turn"),
        ({"angles": [0.04 * i for i in range(64)]}, "even ones"),
        ({"angles": [math.pi * i / 32.5 for i in range(65)]}, "even number"),
        ({"angles": [math.pi * (i / 64) ** 1.1 for i in range(64)]}, "even ones"),
        ({"rings": 11}, "the scanner measures"),
    ],
)
def test_errors(change, message):
    scanner = replace(RING, **change)
    shape = RING.sinogram_shape if "rings" in change else scanner.sinogram_shape
    with pytest.raises(ValueError, match=message):
        fore(torch.zeros(1, *shape), scanner)


def test_few_angles_are_enough_for_a_small_field():
    c = replace(RING, angles=40)
    centre = (24.0, 18.0, 3.0)
    p, exact = integrals(c, centre), direct(c, centre)
    assert error(fore(p, c, field_mm=60.0), exact) < 0.5 * error(ssrb(p, c), exact)
    with pytest.raises(ValueError, match="field_mm"):
        fore(p, c, field_mm=0.0)
