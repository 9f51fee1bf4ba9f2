"""Conformal intervals and ranks: exact posteriors must pass, over-confident and biased ones must not."""

import pytest
import torch

from companion.evaluation import conformal, ranks

N = 400


def gaussians(cases, shape=(6, 6), scale=1.0, seed=0, dtype=torch.float64):
    """Posterior mean, its claimed std and a truth drawn from the true posterior of std 1 / scale times the claim."""
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(cases, *shape, generator=g, dtype=dtype)
    std = 0.5 + torch.rand(cases, *shape, generator=g, dtype=torch.float64)
    return (
        mean,
        std / scale,
        mean + std * torch.randn(cases, *shape, generator=g, dtype=dtype) * (2 if dtype.is_complex else 1) ** 0.5,
    )


def test_the_quantile_is_the_one_whose_promise_holds_for_every_sample():
    assert conformal.quantile(range(1, 10), 0.9) == 9 and conformal.quantile(range(1, 20), 0.9) == 18
    with pytest.raises(ValueError, match="give 9 or more"):
        conformal.quantile(range(8), 0.9)
    with pytest.raises(ValueError, match="NaN"):
        conformal.quantile([1.0] * 20 + [float("nan")])
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(20_000, 20, generator=g, dtype=torch.float64)
    inside = scores[:, 19] <= scores[:, :19].sort(1).values[:, 17]
    assert inside.double().mean() == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_pixels_are_covered_on_new_slices_whatever_the_sampler_claims(scale, dtype):
    k = conformal.pixel_factor(*gaussians(N, scale=scale, dtype=dtype))
    mean, std, truth = gaussians(N, scale=scale, seed=1, dtype=dtype)
    assert k == pytest.approx(1.645 * scale, rel=0.04)
    assert conformal.pixel_coverage(mean, std, truth, k).mean() == pytest.approx(0.9, abs=0.01)
    raw = conformal.pixel_coverage(mean, std, truth, 1.645).mean()
    assert raw == pytest.approx(0.9, abs=0.01) if scale == 1 else raw < 0.6


def test_slices_count_and_not_their_pixels():
    """Twenty slices whose pixels err all together: the promise is for the average slice, and pays for having few."""
    g = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(100):
        error = torch.randn(21, 1, generator=g, dtype=torch.float64).expand(21, 5)
        zero, one = torch.zeros(20, 5, dtype=torch.float64), torch.ones(20, 5, dtype=torch.float64)
        k = conformal.pixel_factor(zero, one, error[:20])
        shares.append(conformal.pixel_coverage(zero[:1], one[:1], error[20:], k))
    assert torch.cat(shares).mean() > 0.85
    with pytest.raises(ValueError, match="cannot promise"):
        conformal.pixel_factor(zero[:5], one[:5], error[:5])


def test_a_mask_leaves_pixels_out():
    mean, std, truth = gaussians(50)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[1:4, 2:5] = True
    wrong = torch.where(mask, truth, 100.0)
    k = conformal.pixel_factor(mean, std, truth, mask)
    assert conformal.pixel_factor(mean, std, wrong, mask) == k
    assert conformal.pixel_coverage(mean, std, wrong, k, mask).mean() > 0.89
    with pytest.raises(ValueError, match="without pixels"):
        conformal.pixel_factor(mean, std, truth, torch.zeros(6, 6, dtype=torch.bool))


def test_regions_and_psnr_are_numbers_a_case():
    mean, std, truth = (v.flatten(1).mean(1) for v in gaussians(N))
    k = conformal.number_factor(mean, std, truth)
    more = [v.flatten(1).mean(1) for v in gaussians(N, seed=1)]
    assert conformal.number_coverage(*more, k) == pytest.approx(0.9, abs=0.05)
    g = torch.Generator().manual_seed(2)
    draws = torch.randn(8, 200, 16, 16, generator=g, dtype=torch.float64)
    truths = torch.randn(200, 16, 16, generator=g, dtype=torch.float64)
    psnr = 10 * torch.log10(1 / (draws.mean(0) - truths).square().flatten(1).mean(1))
    said, spread = conformal.predicted_psnr(draws, torch.ones(200))
    assert (said - psnr).mean().abs() < 0.05
    k = conformal.number_factor(said[:100], spread[:100], psnr[:100])
    assert conformal.number_coverage(said[100:], spread[100:], psnr[100:], k) == pytest.approx(0.9, abs=0.08)


def simulated(width=1.0, bias=0.0, cases=600, draws=9, seed=0):
    """Ranks of three projections for a Gaussian prior and data: truth, then draws of a posterior made wrong."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(cases, 12, generator=g, dtype=torch.float64)
    y = truth + 0.5 * torch.randn(cases, 12, generator=g, dtype=torch.float64)
    mean, std = y / 1.25, 0.2**0.5
    x = mean + bias * std + width * std * torch.randn(draws, cases, 12, generator=g, dtype=torch.float64)
    directions = ranks.projections((12,), 3, torch.float64)
    return ranks.rank(ranks.along(truth, directions), ranks.along(x, directions)), draws


def test_ranks_of_an_exact_posterior_are_flat_and_of_wrong_ones_are_not():
    assert ranks.all_uniform(*simulated()) > 0.05
    assert ranks.all_uniform(*simulated(width=0.7)) < 1e-3
    assert ranks.all_uniform(*simulated(width=1.4)) < 1e-3
    assert ranks.all_uniform(*simulated(bias=0.4)) < 1e-3


def test_p_values_of_flat_ranks_are_flat_themselves():
    g = torch.Generator().manual_seed(0)
    p = torch.tensor([ranks.uniformity(torch.randint(0, 10, (200,), generator=g), 9) for _ in range(400)])
    assert (p < 0.1).double().mean() == pytest.approx(0.1, abs=0.04)
    with pytest.raises(ValueError, match="even bins"):
        ranks.uniformity(torch.arange(20) % 10, 9, bins=3)
    with pytest.raises(ValueError, match="from 0 to 9"):
        ranks.uniformity(torch.arange(20), 9)


def test_ties_are_broken_at_random():
    truth, draws = torch.zeros(5000), torch.zeros(4, 5000)
    found = ranks.rank(truth, draws, torch.Generator().manual_seed(0))
    assert ranks.uniformity(found, 4) > 0.01 and (ranks.rank(truth, draws) == 0).all()
