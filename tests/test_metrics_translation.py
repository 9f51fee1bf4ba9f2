"""Metrics of translated and of generated images equal their formulas."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from companion.evaluation.metrics import dice, frechet_distance, mae, ms_ssim, nmi, ssim


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_frechet_distance_is_that_of_gaussians():
    a, b = draw(200, 5), draw(300, 5, seed=1) @ draw(5, 5, seed=2) + 1
    ca, cb = np.cov(a.numpy().T), np.cov(b.numpy().T)
    expected = np.square(a.numpy().mean(0) - b.numpy().mean(0)).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert frechet_distance(a, b) == pytest.approx(expected) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, a + torch.tensor([3.0, 0, 0, 0, 4.0])) == pytest.approx(25)
    few = a[:4]  # fewer samples than features: singular covariances
    ca, cb = np.cov(few.numpy().T), np.cov(b.numpy().T)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="n, m >= 2"):
        frechet_distance(a[:1], b)
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(a, b.where(b > 0, torch.nan))


def test_ms_ssim_with_one_scale_is_ssim_and_sees_blur():
    x = draw(2, 1, 64, 64).abs()
    noisy = x + 0.1 * draw(2, 1, 64, 64, seed=1)
    assert ms_ssim(x, x, 2.0) == pytest.approx([1, 1])
    assert (ms_ssim(noisy, x, 2.0) < 1).all()
    small, other = x[..., :16, :16], noisy[..., :16, :16]  # one scale fits
    assert ms_ssim(other, small, 2.0) == pytest.approx(ssim(other, small, 2.0), abs=0.05)  # other border rules
    assert len(ms_ssim(draw(2, 1, 24, 24, 24).abs(), draw(2, 1, 24, 24, 24).abs(), 2.0)) == 2
    with pytest.raises(ValueError, match="11 pixels"):
        ms_ssim(x[..., :8], x[..., :8], 1.0)


def test_mutual_information_does_not_see_colours():
    x = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert nmi(x, x).item() == pytest.approx(1)
    assert nmi(1 - x, x).item() == pytest.approx(1, abs=0.05)
    noise = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    assert nmi(noise, x, bins=8).item() < 0.01
    assert nmi(torch.zeros_like(x), torch.ones_like(x)).item() == 1


def test_mae_and_dice_count_what_they_say():
    a, b = torch.tensor([[[0.0, 1, 1, 3]]]), torch.tensor([[[0.0, 1, 2, 2]]])
    assert mae(a, b) == pytest.approx([0.5])
    assert mae(a, b, mask=torch.tensor([0, 0, 1, 1])) == pytest.approx([1.0])
    found = dice(a.int(), b.int(), (1, 2, 3, 4))[0]
    assert found[:3].tolist() == pytest.approx([2 / 3, 0, 0]) and torch.isnan(found[3])
    with pytest.raises(ValueError, match="differ in shape"):
        dice(a, b[..., :2])
