"""Simulated scans: the model that they come with is nearly right, and not exactly."""

import pytest
import torch

from companion.acquisition.pet import acquire
from companion.acquisition.simulated import Detector, simulate
from companion.reconstruction.pet import mlem

CLEAN = Detector(fwhm_mm=0.0, scatter=0.0, randoms=0.0)


def fine(size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    line = torch.linspace(-1, 1, size)
    r = torch.hypot(line[:, None], line)
    x = 4.0 * (r < 0.7) + 12.0 * (torch.hypot(line[:, None] - 0.2, line + 0.3) < 0.2)
    return x[None, None], 0.0096 * (r < 0.8).float()[None, None]


def test_the_counts_are_those_asked_for_and_the_model_knows_them():
    x, mu = fine()
    scan = simulate(x, mu, 2e5, [3], pixel_mm=7.0, fine=4, detector=CLEAN)
    assert scan.background is None and scan.y.sum().item() == pytest.approx(2e5, rel=0.01)
    assert scan.A(scan.x).sum().item() == pytest.approx(2e5, rel=0.02)
    assert torch.allclose(scan.x, torch.nn.functional.avg_pool2d(x, 4))


def test_the_model_is_close_and_not_exact():
    x, mu = fine()
    scan = simulate(x, mu, 1e9, [3], pixel_mm=7.0, fine=4)
    expected = scan.A(scan.x) + scan.background
    off = ((scan.y - expected).abs().sum() / scan.y.sum()).item()
    assert 0.003 < off < 0.06  # noise is below 0.1 %
    exact = acquire(scan.x, torch.nn.functional.avg_pool2d(mu, 4), 1e9, [3], pixel_mm=7.0)
    assert ((exact.y - exact.A(exact.x)).abs().sum() / exact.y.sum()).item() < 0.003


def test_an_item_depends_on_its_own_seed_only():
    x, mu = fine()
    one = simulate(x, mu, 1e5, [5], pixel_mm=7.0, fine=4)
    two = simulate(x.repeat(2, 1, 1, 1), mu.repeat(2, 1, 1, 1), 1e5, [9, 5], pixel_mm=7.0, fine=4)
    assert torch.equal(one.y[0], two.y[1]) and torch.allclose(one.background[0], two.background[1])
    assert not torch.equal(two.y[0], two.y[1])


def test_such_scans_reconstruct_on_scale():
    x, mu = fine()
    scan = simulate(x, mu, 1e6, [1], pixel_mm=7.0, fine=4)
    image = mlem(scan.y, scan.A, scan.background, iterations=40).x
    assert image.sum().item() == pytest.approx(scan.x.sum().item(), rel=0.05)


def test_what_cannot_be_simulated_is_refused():
    x, mu = fine()
    with pytest.raises(ValueError, match="multiple of fine"):
        simulate(x, mu, 1e5, [0], pixel_mm=7.0, fine=5)
    with pytest.raises(ValueError, match="no activity"):
        simulate(0 * x, mu, 1e5, [0], pixel_mm=7.0, fine=4)
