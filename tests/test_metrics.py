"""Metrics equal their formulas, and calibration measures give the truth for a perfect sampler."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from companion.evaluation.metrics import calibration_ratio, coverage, mean_and_error, nrmse, psnr, spread, ssim


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair():
    reference = draw(3, 1, 16, 20).abs()
    return reference + 0.1 * draw(3, 1, 16, 20, seed=1), reference


def test_against_scikit_image(pair):
    x, reference = pair
    for i in range(3):
        a, b = reference[i, 0].numpy(), x[i, 0].numpy()
        assert psnr(x, reference, 2.0)[i].item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=2.0))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True}
        full = structural_similarity(a, b, data_range=a.max(), **options)[1]
        assert ssim(x, reference)[i].item() == pytest.approx(full.mean())
        assert nrmse(x, reference)[i].item() == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a))


def test_perfect_images(pair):
    _, reference = pair
    assert torch.isinf(psnr(reference, reference)).all() and nrmse(reference, reference).max() == 0
    assert torch.allclose(ssim(reference, reference), torch.ones(3, dtype=torch.float64))


def test_range_mask_and_scale_are_what_they_say(pair):
    x, reference = pair
    assert torch.allclose(psnr(x, reference, 2.0) - psnr(x, reference, 1.0), torch.tensor(20 * np.log10(2.0)))
    mask = torch.zeros(16, 20)
    mask[4:12, 5:15] = 1
    outside = x + 100 * (1 - mask)
    for metric in (psnr, nrmse):
        assert torch.allclose(metric(outside, reference, mask=mask), metric(x, reference, mask=mask))
        inner = x[..., 4:12, 5:15], reference[..., 4:12, 5:15]
        assert torch.allclose(metric(x, reference, mask=mask), metric(*inner))
        assert torch.allclose(metric(7 * x, reference, fit_scale=True), metric(x, reference, fit_scale=True))
    assert (nrmse(x, reference, fit_scale=True) <= nrmse(x, reference)).all()
    assert ssim(x, reference, mask=mask).shape == (3,)


def test_complex_images_are_compared_by_magnitude(pair):
    x, reference = pair
    turned = reference * torch.exp(1j * draw(3, 1, 16, 20, seed=2))
    assert torch.allclose(psnr(x.abs() + 0j, turned), psnr(x.abs(), reference))


def test_ssim_of_volumes():
    volume = draw(1, 1, 12, 12, 12).abs()
    assert ssim(volume, volume).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(volume[..., :8], volume[..., :8])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("n", [2, 8])
def test_a_perfect_sampler_is_calibrated(dtype, n):
    mean, std = draw(4, 1, 64, 64, dtype=dtype), draw(4, 1, 64, 64, seed=9).abs() + 0.1
    truth = mean + std * draw(4, 1, 64, 64, dtype=dtype, seed=1)
    draws = mean + std * draw(n, 4, 1, 64, 64, dtype=dtype, seed=2)
    ratio = calibration_ratio(draws, truth)
    assert ratio.shape == (4,) and ratio.mean().item() == pytest.approx(1, abs=0.04)
    levels, shares = coverage(draws, truth)
    assert shares.shape == (4, len(levels))
    assert torch.allclose(shares.mean(0), levels, atol=0.015)


@pytest.mark.parametrize("share", [1.0, 0.7, 0.0], ids=["opposite", "in part", "independent"])
def test_a_perfect_sampler_in_pairs_is_calibrated(share):
    """Half of the noise of each pair, or less, is opposite; `spread` does not know how much."""
    truth, n = draw(4, 1, 64, 64, seed=1), 8
    opposite = draw(n // 2, 4, 1, 64, 64, seed=2).repeat_interleave(2, 0)
    opposite[1::2] *= -1
    draws = share**0.5 * opposite + (1 - share) ** 0.5 * draw(n, 4, 1, 64, 64, seed=3)
    assert calibration_ratio(draws, truth, paired=True).mean().item() == pytest.approx(1, abs=0.04)
    levels, shares = coverage(draws, truth, paired=True)
    assert torch.allclose(shares.mean(0), levels, atol=0.015 if share == 1 else 0.035)  # as if less were known of them
    found = spread(draws, paired=True)
    assert found.variance.mean().item() == pytest.approx(1, abs=0.03)
    assert found.of_mean.mean().item() == pytest.approx((1 - share) / n, abs=0.01)
    if share == 1:
        wide = calibration_ratio(draws, truth).mean().item()
        assert wide == pytest.approx((1 + 1 / n) * n / (n - 1), rel=0.05), "taken for independent they seem too wide"


def test_over_confidence_is_seen():
    truth, draws = draw(2, 1, 64, 64), 0.5 * draw(8, 2, 1, 64, 64, seed=1)
    n = 8
    expected = (1 + 1 / n) * 0.25 / (1 + 0.25 / n)
    assert calibration_ratio(draws, truth).mean().item() == pytest.approx(expected, rel=0.05)
    assert coverage(draws, truth, [0.9])[1].max() < 0.7
    mask = torch.zeros(64, 64)
    mask[:32] = 1
    inner = calibration_ratio(draws[..., :32, :], truth[..., :32, :])
    assert torch.allclose(calibration_ratio(draws, truth, mask), inner)


def test_paired_error_is_smaller_than_unpaired():
    subjects = draw(16) * 5
    better = subjects + 1 + 0.1 * draw(16, seed=1)
    mean, error = mean_and_error(better, paired_with=subjects)
    assert mean == pytest.approx(1, abs=0.1) and error < 0.05 < mean_and_error(better)[1]
    values = [1.0, 2.0, 3.0]
    assert mean_and_error(values) == pytest.approx((2.0, 1 / 3**0.5))


def test_errors_say_what_to_do(pair):
    x, reference = pair
    with pytest.raises(ValueError, match="same shape"):
        psnr(x[:2], reference)
    with pytest.raises(ValueError, match="NaN"):
        nrmse(x * float("nan"), reference)
    with pytest.raises(ValueError, match="empty"):
        psnr(x, reference, mask=torch.zeros(16, 20))
    with pytest.raises(ValueError, match="broadcast"):
        psnr(x, reference, mask=torch.ones(16, 21))
    with pytest.raises(ValueError, match="positive"):
        psnr(x, 0 * reference)
    with pytest.raises(ValueError, match=r"draws\[:, None\]"):
        calibration_ratio(x, reference)
    with pytest.raises(ValueError, match="two draws"):
        coverage(x[None], reference)
    with pytest.raises(TypeError, match="like with like"):
        calibration_ratio(torch.stack([x, x]) + 0j, reference)
    with pytest.raises(ValueError, match="between 0 and 1"):
        coverage(torch.stack([x, x]), reference, [90])
    with pytest.raises(ValueError, match="two subjects"):
        mean_and_error([1.0])
