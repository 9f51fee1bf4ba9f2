"""MLEM, OSEM and MAP: what theory promises of them, in any batch, and on data that break naive code."""

import numpy as np
import pytest
import torch

from companion.evaluation.metrics import nrmse
from companion.operators.counts import poisson_counts, poisson_log_likelihood
from companion.operators.pet import ParallelBeam, Projector, emission_model, sensitivity, with_counts
from companion.reconstruction.bsrem import bsrem
from companion.reconstruction.pet import em_update, map_rdp, mlem, osem, region_levels, relative_difference

N = 24


def phantom(items: int = 2) -> torch.Tensor:
    """Discs of 10 with a cold and a hot spot, a little different in each item."""
    rows, columns = torch.meshgrid(*[torch.arange(N) - (N - 1) / 2] * 2, indexing="ij")
    images = []
    for k in range(items):
        image = 10.0 * (rows**2 + columns**2 < 90)
        image[(rows + 3) ** 2 + (columns - k) ** 2 < 6] = 2.0
        image[(rows - 4) ** 2 + columns**2 < 6] = 30.0
        images.append(image)
    return torch.stack(images)[:, None]


@pytest.fixture(scope="module")
def scan():
    x = phantom()
    A = with_counts(emission_model(ParallelBeam((N, N), pixel_mm=4.0), fwhm_mm=5.0), x, 1e5)
    b = torch.full(A.range_shape, 4.0)
    return x, A, b, poisson_counts(A(x) + b, [0, 1])


def test_mlem_raises_the_likelihood_and_keeps_counts(scan):
    x, A, _, _ = scan
    y = poisson_counts(A(x), [2, 3])
    total = sensitivity(A)
    values = []

    def watch(k, image):
        values.append(poisson_log_likelihood(y, A(image)))
        assert torch.allclose((total * image).flatten(1).sum(1), y.flatten(1).sum(1), rtol=1e-5)
        assert (image >= 0).all()

    mlem(y, A, iterations=60, callback=watch)
    assert (torch.stack(values).diff(dim=0) > -1e-6 * values[-1].abs()).all()


def test_mlem_with_background_raises_the_likelihood(scan):
    _, A, b, y = scan
    values = []
    mlem(y, A, b, iterations=60, callback=lambda k, image: values.append(poisson_log_likelihood(y, A(image) + b)))
    assert (torch.stack(values).diff(dim=0) > -1e-6 * values[-1].abs()).all()


def test_mlem_finds_noise_free_activity_in_its_units():
    """Raw chord lengths and an explicit sensitivity: no ripple, no dark corners."""
    A = Projector(ParallelBeam((16, 16), bins=26, pixel_mm=3.0))
    x = torch.full((1, 1, 16, 16), 7.0, dtype=torch.float64)
    x[..., 4:8, 5:9] = 20.0
    image = mlem(A(x), A, iterations=600, noise_free=True).x
    assert nrmse(image, x).item() < 0.02


@pytest.mark.parametrize("noise_free", [False, True])
def test_a_fixed_point_stays(noise_free):
    A = Projector(ParallelBeam((8, 8)))
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64) + 1
    gain = 1 / sensitivity(A, torch.float64)
    assert torch.allclose(em_update(x, A(x), A, gain), x)


HARD = {
    "zero": lambda y: torch.zeros_like(y),
    "single count": lambda y: torch.zeros_like(y).index_put_((torch.tensor(0),) * 4, torch.tensor(1.0)),
    "sparse": lambda y: (torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < 0.02).float(),
    "one hot bin": lambda y: (
        torch.zeros_like(y)
        .index_fill_(3, torch.tensor(5), 0)
        .index_put_(tuple(torch.tensor(i) for i in (0, 0, 9, 11)), torch.tensor(1e6))
    ),
}


@pytest.mark.parametrize("make", HARD.values(), ids=HARD)
def test_a_thousand_iterations_on_hard_data_stay_finite(make):
    A = Projector(ParallelBeam((16, 16), pixel_mm=2 / 16))
    good = poisson_counts(20 * A(torch.ones(1, 1, 16, 16)), [0])
    hard = make(torch.zeros(1, *A.range_shape))
    y = torch.cat([hard, good])
    result = mlem(y, A, iterations=1000)
    assert torch.isfinite(result.x).all() and (result.x >= 0).all()
    total = (sensitivity(A) * result.x).flatten(1).sum(1)
    assert torch.allclose(total, y.flatten(1).sum(1), rtol=1e-3)
    alone = mlem(good, A, iterations=1000).x
    assert nrmse(result.x[1:], alone).item() < 1e-3
    for method in (lambda: osem(y, A, iterations=40, subsets=4), lambda: map_rdp(y, A, iterations=40)):
        assert torch.isfinite(method().x).all()


def test_empty_slices_of_a_stack_are_empty():
    beam = ParallelBeam((3, 16, 16))
    A = Projector(beam)
    x = torch.ones(1, 1, 3, 16, 16)
    x[:, :, 1] = 0
    image = mlem(poisson_counts(A(x), [0]), A, iterations=100).x
    assert not image[:, :, 1].any() and torch.isfinite(image).all()


def test_items_stop_on_their_own(scan):
    x, A, b, y = scan
    dim = with_counts(A, x, 3e3)
    few = poisson_counts(dim(x), [4, 5])[:1]
    single = with_counts(emission_model(ParallelBeam((N, N), pixel_mm=4.0), fwhm_mm=5.0), x[:1], 1e5)
    mixed = torch.cat([few, poisson_counts(single(x[:1]), [6])])
    both = mlem(mixed, single, iterations=300, discrepancy=True)
    alone = [mlem(one[None], single, iterations=300, discrepancy=True) for one in mixed]
    assert both.iterations.tolist() == [one.iterations.item() for one in alone]
    assert both.iterations[0] < both.iterations[1] < 300
    assert torch.allclose(both.x, torch.cat([one.x for one in alone]), rtol=1e-4, atol=1e-4)
    loose = mlem(mixed, single, iterations=300, tol=0.02)
    assert (loose.iterations < 300).all()


def test_the_discrepancy_stop_is_near_the_best_stop(scan):
    x, A, b, y = scan
    errors = {}
    mlem(y, A, b, iterations=150, callback=lambda k, image: errors.__setitem__(k, nrmse(image, x)))
    errors = torch.stack(list(errors.values()))
    stopped = nrmse(mlem(y, A, b, iterations=150, discrepancy=True).x, x)
    assert (stopped < 1.15 * errors.amin(0)).all()


def test_osem_with_one_subset_is_mlem_and_with_more_is_faster(scan):
    _, A, b, y = scan
    assert torch.allclose(osem(y, A, b, iterations=7, subsets=1).x, mlem(y, A, b, iterations=7).x, rtol=1e-4)
    fast, slow = osem(y, A, b, iterations=2, subsets=8).x, mlem(y, A, b, iterations=16).x
    assert (nrmse(fast, slow) < 0.1).all()


def test_relative_difference_prior_has_the_stated_derivatives():
    x = (torch.rand(2, 1, 5, 6, dtype=torch.float64) + 0.1).requires_grad_()
    tiny = x.detach()
    value, gradient, curvature = relative_difference(tiny)
    auto = torch.autograd.functional.jacobian(lambda v: pairwise(v, 2.0), x).squeeze()
    assert torch.allclose(value, pairwise(tiny, 2.0), rtol=1e-4)
    assert torch.allclose(gradient[0], auto[0, 0], rtol=1e-3, atol=1e-5)
    step = 1e-5
    bumped = tiny.clone()
    bumped[..., 2, 3] += step
    difference = (relative_difference(bumped)[1] - gradient)[..., 2, 3] / step
    assert torch.allclose(difference, curvature[..., 2, 3], rtol=1e-2)
    volume = torch.rand(1, 1, 3, 4, 5)
    assert relative_difference(3 * volume, ndim=3)[0].item() == pytest.approx(
        3 * relative_difference(volume, ndim=3)[0].item(), rel=1e-5
    )


def pairwise(x: torch.Tensor, gamma: float) -> torch.Tensor:
    """The prior, written as its definition says."""
    total = 0
    for rows, columns, weight in ((0, 1, 1.0), (1, 0, 1.0), (1, 1, 0.5**0.5), (1, -1, 0.5**0.5)):
        a = x[..., : x.shape[-2] - rows, max(0, -columns) : x.shape[-1] - max(0, columns)]
        b = x[..., rows:, max(0, columns) : x.shape[-1] + min(0, columns)]
        total = total + weight * ((a - b) ** 2 / (a + b + gamma * (a - b).abs())).flatten(1).sum(1)
    return total


def test_map_climbs_converges_and_beats_mlem(scan):
    x, A, b, y = scan
    values = []
    strength = 0.02

    def objective(image):
        total = sensitivity(A).mean((-3, -2, -1)).flatten().double()
        return poisson_log_likelihood(y, A(image) + b) - strength * total * relative_difference(image)[0]

    converged = map_rdp(
        y, A, b, strength=strength, iterations=400, tol=0, callback=lambda k, image: values.append(objective(image))
    )
    assert (torch.stack(values).diff(dim=0) > -1e-2).all()
    usual = map_rdp(y, A, b, strength=strength)
    assert (nrmse(usual.x, converged.x) < 0.01).all()
    best = torch.stack([nrmse(mlem(y, A, b, iterations=k).x, x) for k in (10, 20, 30, 50)]).amin(0)
    assert (nrmse(usual.x, x) < best).all()
    alone = map_rdp(
        y[:1],
        with_counts(emission_model(ParallelBeam((N, N), pixel_mm=4.0), fwhm_mm=5.0), x[:1], 1e5),
        b,
        strength=strength,
    )
    assert nrmse(usual.x[:1], alone.x).item() < 5e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: -y - 1, "negative"),
        (lambda y: y + 0.5, "whole"),
        (lambda y: y[..., :-1], "geometry"),
        (lambda y: y[0], "geometry"),
        (lambda y: y * np.nan, "NaN"),
    ],
)
@pytest.mark.parametrize("method", [mlem, osem, map_rdp, bsrem])
def test_clear_errors(scan, method, change, message):
    _, A, b, y = scan
    with pytest.raises(ValueError, match=message):
        method(change(y), A, b)


def test_clear_errors_of_options(scan):
    _, A, b, y = scan
    with pytest.raises(ValueError, match="subsets"):
        osem(y, A, b, subsets=1000)
    with pytest.raises(ValueError, match="background"):
        mlem(y, A, -b)
    with pytest.raises(ValueError, match="x0"):
        mlem(y, A, x0=torch.ones(1, 1, 3, 3))
    with pytest.raises(ValueError, match="strength"):
        map_rdp(y, A, strength=-1)


def test_region_levels_are_unbiased_and_as_sure_as_they_say():
    x, scans = phantom(1), 400
    A = with_counts(emission_model(ParallelBeam((N, N), pixel_mm=4.0)), x, 300)
    b = torch.full(A.range_shape, 0.5)  # as many counts again
    left = (torch.arange(N) < N // 2).float()
    parts = torch.stack([x[0] * left, x[0] * (1 - left), 0 * x[0]])[None]
    true = torch.tensor([0.8, 1.3, 0.0], dtype=torch.float64)
    mean = A(0.8 * parts[:, 0] + 1.3 * parts[:, 1]) + b
    levels, covariance = region_levels(poisson_counts(mean.expand(scans, *b.shape), range(scans)), A, parts, b)
    z = (levels - true)[:, :2] / covariance.diagonal(dim1=1, dim2=2)[:, :2].sqrt().mean(0)
    assert (z.mean(0).abs() < 3 / scans**0.5).all() and ((z.std(0) - 1).abs() < 0.15).all()
    assert (levels[:, 2] == 0).all(), "a region that nothing sees"
    exact, _ = region_levels(mean, A, parts, b, noise_free=True)
    torch.testing.assert_close(exact[0], true, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="shapes must be"):
        region_levels(mean, A, parts[:, :, 0], noise_free=True)
