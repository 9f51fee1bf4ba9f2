"""The projector is the matrix of chord lengths, however it is computed; counts obey their laws."""

import math

import numpy as np
import pytest
import torch
from skimage.transform import radon

from companion.operators.counts import (
    check_counts,
    expected_deviance,
    poisson_counts,
    poisson_deviance,
    poisson_gradient,
    poisson_log_likelihood,
    thin,
)
from companion.operators.linear import adjoint_error
from companion.operators.pet import (
    Blur,
    ParallelBeam,
    Projector,
    attenuation_factors,
    background,
    column_normalised,
    emission_model,
    mean_activity,
    sensitivity,
    subset,
    with_counts,
)

BEAMS = {
    "published": ParallelBeam.published(16),
    "odd": ParallelBeam((13, 13), 26, 17),
    "rectangle": ParallelBeam((10, 15), 37, 21, 1.3, 0.7),
    "ties": ParallelBeam((12, 20), 24, 33, 1.0, 1.0),  # even sizes, odd bins: lines on the edges of pixels
    "irregular": ParallelBeam((11, 11), [0.1, 0.5, 2.0, 0.1 + math.pi], 14, 2.0, 3.1),
    "whole turn": ParallelBeam((8, 8), [2 * math.pi * k / 20 for k in range(20)]),
    "one ray": ParallelBeam((5, 5), [0.3], 1),
    "stack": ParallelBeam((3, 9, 9)),
    "off the middle": ParallelBeam((12, 12), 24, 15, 2.0, 1.7, bin_offset=0.5),
    "off, whole turn": ParallelBeam((8, 8), [2 * math.pi * k / 20 for k in range(20)], bin_offset=-0.3),
    "ring": ParallelBeam((12, 12), 24, 21, 2.0, 1.7, radius_mm=19.0),
    "ring, off": ParallelBeam((10, 14), 18, 21, 2.0, 1.7, bin_offset=0.5, radius_mm=19.0),
}


def dense(beam: ParallelBeam) -> torch.Tensor:
    rays, pixels, lengths = Projector(beam).triplets()
    matrix = torch.zeros(beam.rays, math.prod(beam.slice_shape), dtype=torch.float64)
    matrix[rays, pixels] = lengths
    return matrix


def square_chord(theta: float, shift: float, size: float) -> float:
    """Length of a line in the square [-size/2, size/2]^2, by clipping."""
    low, high = -math.inf, math.inf
    for along, across in ((-math.sin(theta), math.cos(theta)), (math.cos(theta), math.sin(theta))):
        start = shift * across
        if abs(along) < 1e-12:
            if abs(start) > size / 2:
                return 0.0
            continue
        ends = sorted(((-size / 2 - start) / along, (size / 2 - start) / along))
        low, high = max(low, ends[0]), min(high, ends[1])
    return max(0.0, high - low)


@pytest.mark.parametrize("beam", BEAMS.values(), ids=BEAMS)
@pytest.mark.parametrize("storage", ["sparse", "matrix-free"])
def test_projector_is_the_matrix_of_its_triplets(beam, storage):
    A, matrix = Projector(beam, storage), dense(beam)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, *beam.image_shape, dtype=torch.float64, generator=generator)
    y = torch.rand(2, *beam.sinogram_shape, dtype=torch.float64, generator=generator)
    projected = x.reshape(-1, matrix.shape[1]) @ matrix.T
    back = y.reshape(-1, matrix.shape[0]) @ matrix
    assert torch.allclose(A(x).reshape(projected.shape), projected, atol=1e-12)
    assert torch.allclose(A.H(y).reshape(back.shape), back, atol=1e-7)  # rounding decides on shared edges
    assert adjoint_error(A) < 1e-6
    assert torch.allclose(A(x.float()).double(), A(x), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, beam in BEAMS.items() if len(set(beam.slice_shape)) == 1])
def test_chords_of_a_ray_add_up_to_its_chord_in_the_square(name):
    beam = BEAMS[name]
    width = beam.slice_shape[1]
    shifts = (np.arange(beam.bins) - (beam.bins - 1) / 2 - beam.bin_offset) * beam.bin_mm
    if beam.radius_mm:
        shifts = beam.radius_mm * np.sin(shifts / beam.radius_mm)
    size = width * beam.pixel_mm
    exact = [[square_chord(theta, shift, size) for shift in shifts] for theta in beam.angles]
    total = dense(beam).sum(1).reshape(len(beam.angles), beam.bins).numpy()
    on_edge = np.abs(np.abs(shifts) - size / 2) < 1e-9  # half the line, by convention, where it is an edge
    np.testing.assert_allclose(total[:, ~on_edge], np.array(exact)[:, ~on_edge], atol=1e-12 * size)


def test_default_geometry_needs_an_eighth_of_the_matrix():
    kept = Projector(ParallelBeam((32, 32)))._symmetries("cpu").kept
    assert len(kept) == 17 * 16
    assert len(Projector(BEAMS["irregular"])._symmetries("cpu").kept) < BEAMS["irregular"].rays


def test_an_axis_off_the_middle_moves_the_sinogram_and_keeps_fewer_symmetries():
    """Whole bins off are a sinogram moved by whole bins; a scan of half a turn then has one symmetry, its own."""
    x = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    middle, off = (Projector(ParallelBeam((12, 12), 18, 30, bin_offset=o)) for o in (0, 3))
    assert torch.allclose(off(x)[..., 3:], middle(x)[..., :-3], atol=1e-5)
    assert len(off._symmetries("cpu").kept) == off.beam.rays > len(middle._symmetries("cpu").kept)
    disc = ParallelBeam((12, 12), 18, 30, radius_mm=1e6)  # a ring of a kilometre has even bins
    assert torch.allclose(Projector(disc)(x), middle(x), atol=1e-5)


@pytest.mark.parametrize("items", [1, 3, 40])
def test_an_item_is_the_same_in_any_batch(items):
    A = Projector(ParallelBeam((24, 24)))
    x = torch.rand(items, 1, 24, 24, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([A(one[None]) for one in x])
    assert torch.allclose(A(x), alone, rtol=1e-5)
    assert torch.allclose(A.H(A(x)), torch.cat([A.H(A(one[None])) for one in x]), rtol=1e-5)


def test_orientation_agrees_with_scikit_image():
    """The same disc, off centre, is seen at the same shift under the same angle."""
    n = 65
    rows, columns = np.mgrid[:n, :n] - (n - 1) / 2
    image = ((columns - 12) ** 2 + (rows + 7) ** 2 < 36).astype(np.float64)
    angles = np.arange(0, 180, 15.0)
    theirs = radon(image, angles, circle=True)
    beam = ParallelBeam((n, n), np.deg2rad(angles))
    ours = Projector(beam)(torch.from_numpy(image)[None, None])[0, 0].T.numpy()
    centre = np.arange(n) @ ours / ours.sum(0)
    np.testing.assert_allclose(centre, np.arange(n) @ theirs / theirs.sum(0), atol=0.15)
    np.testing.assert_allclose(ours.sum(0), theirs.sum(0), rtol=0.02)


@pytest.mark.parametrize("storage", ["sparse", "matrix-free"])
def test_gradients_flow_through_the_true_adjoint(storage):
    A = emission_model(ParallelBeam((6, 6), 7, 8), fwhm_mm=2.0, storage=storage)
    x = torch.rand(2, *A.domain_shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(A, x)
    assert torch.autograd.gradgradcheck(lambda v: A(v) ** 2, x)
    with torch.inference_mode():
        fresh = Projector(ParallelBeam((5, 5), 6))
        fresh(torch.ones(1, 1, 5, 5))
    x = torch.ones(1, 1, 5, 5, requires_grad=True)
    fresh(x).sum().backward()  # tables that were first made in inference mode serve training too
    assert torch.allclose(x.grad, sensitivity(fresh)[None], rtol=1e-5)


def test_large_images_are_matrix_free_on_request():
    beam = ParallelBeam((256, 256), angles=8)
    x = torch.rand(1, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    free, stored = Projector(beam, "matrix-free"), Projector(beam, "sparse")
    assert not free.stored and free(x).shape == (1, 1, 8, 256)
    assert torch.allclose(free(x), stored(x), rtol=1e-4)
    assert not Projector(ParallelBeam((1024, 1024))).stored and Projector(ParallelBeam((512, 512))).stored
    assert Projector(ParallelBeam((128, 128))).table_mib() < 300


def test_column_normalised_has_unit_sensitivity():
    A = column_normalised(Projector(ParallelBeam.published(16)), torch.float64)
    assert torch.allclose(sensitivity(A, torch.float64), torch.ones(1, 16, 16, dtype=torch.float64))


def test_blur_has_the_stated_width_keeps_counts_and_is_self_adjoint():
    G = Blur((41, 41), 2.0, 9.0)
    assert adjoint_error(G) < 1e-6 and torch.equal(Blur((5, 5), 2.0, 0.0)(torch.eye(5)[None]), torch.eye(5)[None])
    point = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    point[..., 20, 20] = 1
    spread = G(point)[0, 0].sum(0)
    assert spread.sum().item() == pytest.approx(1, abs=1e-9)
    position = 2.0 * (torch.arange(41) - 20)
    variance = (spread * position**2).sum() - 2.0**2 / 12  # what averaging over pixels adds
    assert math.sqrt(variance * 8 * math.log(2)) == pytest.approx(9.0, rel=0.02)
    assert adjoint_error(Blur((4, 9, 7), (3.0, 2.0, 2.0), (6.0, 5.0, 5.0))) < 1e-6


def test_the_model_of_a_scan_and_its_parts():
    beam = ParallelBeam((3, 12, 12), 10, pixel_mm=4.0)
    P = Projector(beam)
    factors = attenuation_factors(P, torch.full((1, 3, 12, 12), 0.0096))
    longest = P(torch.ones(beam.image_shape)).max()
    assert factors.min().item() == pytest.approx(math.exp(-0.0096 * longest), rel=1e-5)
    x = torch.rand(2, *beam.image_shape, generator=torch.Generator().manual_seed(0)) + 0.1
    A = with_counts(emission_model(beam, factors, fwhm_mm=5.0), x, torch.tensor([1e4, 2e5]))
    assert adjoint_error(A) < 1e-6
    totals = A(x).flatten(1).sum(1)
    assert totals.tolist() == pytest.approx([1e4, 2e5], rel=1e-5)
    assert (0.25 * A)(x).sum().item() == pytest.approx(0.25 * totals.sum().item(), rel=1e-5)
    b = background(A(x), randoms=0.2, scatter=0.3)
    assert b.flatten(1).sum(1).tolist() == pytest.approx([5e3, 1e5], rel=1e-5)
    for k in range(3):
        part = subset(0.5 * A, slice(k, None, 3))
        assert torch.allclose(part(x), 0.5 * A(x)[..., k::3, :], rtol=1e-4)
        assert adjoint_error(part) < 1e-6
    y = poisson_counts(A(x) + b, [0, 1])
    uniform = torch.full_like(x, 3.0)
    assert mean_activity(poisson_counts(A(uniform) + b, [2, 3]), A, b).tolist() == pytest.approx([3, 3], rel=0.05)
    assert mean_activity(thin(y, 0.25, [5, 6]), 0.25 * A, 0.25 * b).tolist() == pytest.approx(
        mean_activity(y, A, b).tolist(), rel=0.05
    )


# --- counts and likelihood


def test_thinned_counts_are_binomial_and_leave_an_independent_rest():
    expected = torch.full((1, 1, 400, 500), 8.0)
    y = poisson_counts(expected, [3])
    low = thin(y, 0.25, [3])
    assert (low <= y).all() and (low >= 0).all() and torch.equal(low, low.round())
    assert low.mean().item() == pytest.approx(2.0, abs=5 * math.sqrt(2 / low.numel()))
    assert low.var().item() == pytest.approx(2.0, rel=0.02)
    rest = y - low
    correlation = torch.corrcoef(torch.stack([low.flatten(), rest.flatten()]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(low.numel())
    assert torch.equal(thin(y, 1.0, [0]), y) and not thin(y, 0.0, [0]).any()


def test_counts_depend_on_their_own_seed_only():
    expected = torch.rand(3, 1, 4, 5) * 10
    together = poisson_counts(expected, [7, 8, 9])
    assert torch.equal(together[1:2], poisson_counts(expected[1:2], [8]))
    assert torch.equal(thin(together, 0.5, [1, 2, 3])[2:], thin(together[2:], 0.5, [3]))
    per_item = thin(together, torch.tensor([0.0, 0.5, 1.0]), [1, 2, 3])
    assert not per_item[0].any() and torch.equal(per_item[2], together[2])


def test_poisson_likelihood_and_gradient():
    A = emission_model(ParallelBeam((8, 8)))
    x = (torch.rand(2, 1, 8, 8, dtype=torch.float64) + 0.5).requires_grad_()
    b = torch.tensor(0.3, dtype=torch.float64)
    y = poisson_counts((A(x) + b).detach(), [0, 1])
    y[0] = 0
    value = poisson_log_likelihood(y, A(x) + b)
    exact = torch.distributions.Poisson(A(x) + b).log_prob(y).flatten(1).sum(1)
    assert torch.allclose(value, exact)
    value.sum().backward()
    assert torch.allclose(x.grad, poisson_gradient(x.detach(), y, A, b))
    assert poisson_log_likelihood(torch.ones(1, 1), torch.zeros(1, 1)).item() == -math.inf
    assert poisson_log_likelihood(torch.zeros(1, 1), torch.zeros(1, 1)).item() == 0


@pytest.mark.parametrize("rate", [1e-3, 0.1, 1.0, 7.3, 500.0])
def test_expected_deviance_is_the_mean_deviance(rate):
    expected = torch.full((1, 200_000), rate, dtype=torch.float64)
    y = poisson_counts(expected, [0])
    mean = poisson_deviance(y, expected) / expected.numel()
    assert (expected_deviance(expected) / expected.numel()).item() == pytest.approx(
        mean.item(), rel=0.01 + 5 / math.sqrt(200_000 * min(rate, 1))
    )


# --- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ParallelBeam((4,)), "shape must be"),
        (lambda: ParallelBeam((4, 4), []), "at least one"),
        (lambda: ParallelBeam((4, 4), pixel_mm=0), "positive"),
        (lambda: ParallelBeam((4, 4), bins=160, bin_mm=3.4, radius_mm=100), "circumference"),
        (lambda: ParallelBeam((4, 4), bin_offset=math.nan), "bin_offset"),
        (lambda: Projector(ParallelBeam((4, 4)), "dense"), "matrix-free"),
        (lambda: Blur((4, 4), 1.0, -1.0), "fwhm_mm"),
        (lambda: emission_model(ParallelBeam((4, 4)), torch.tensor(-1.0)), "factors"),
        (lambda: attenuation_factors(Projector(ParallelBeam((4, 4))), torch.full((1, 4, 4), 0.5)), "per cm"),
        (lambda: with_counts(Projector(ParallelBeam((4, 4))), torch.zeros(1, 1, 4, 4), 100), "no activity"),
        (lambda: mean_activity(torch.zeros(1, 1, 8, 4), Projector(ParallelBeam((4, 4)))), "empty"),
        (lambda: check_counts(torch.tensor([-1.0])), "negative"),
        (lambda: check_counts(torch.tensor([0.5])), "whole"),
        (lambda: check_counts(torch.tensor([math.nan])), "NaN"),
        (lambda: check_counts(torch.zeros(1, 1, 9, 4), Projector(ParallelBeam((4, 4)))), "geometry"),
        (lambda: thin(torch.ones(1, 2), 1.5, [0]), "between 0 and 1"),
        (lambda: thin(torch.ones(2, 2), 0.5, [0]), "seeds"),
        (lambda: poisson_counts(-torch.ones(1, 2), [0]), "negative"),
        (lambda: poisson_counts(torch.full((1, 2), 1e9), [0]), "float64"),
    ],
)
def test_clear_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
