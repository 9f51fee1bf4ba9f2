"""Measured and inferred parts against dense linear algebra."""

import pytest
import torch

from companion.operators.linear import Diagonal
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, sense
from companion.randomness import randn
from companion.reconstruction.nullspace import agreement, measured_fraction, measured_part


def draw(*shape, dtype=torch.complex64, seed=0):
    return randn(shape, dtype, torch.Generator().manual_seed(seed))


def dense(A, weight):
    """P as a matrix, complex128."""
    n = torch.Size(A.domain_shape).numel()
    M = A(torch.eye(n, dtype=torch.complex64).reshape(n, *A.domain_shape)).flatten(1).T.to(torch.complex128)
    N = M.mH @ M
    return torch.linalg.solve(N + weight * torch.eye(n), N)


SCANS = [((6, 8), 1, 4), ((7, 9), 3, 3), ((8, 5), 4, 2.5), ((9, 6), 2, 1)]  # shape, coils, acceleration


def scan(shape, coils, R, kind="random"):
    return sense(birdcage_maps(shape, coils), cartesian_mask(shape[-1], R, kind, seed=1))


@pytest.mark.parametrize("shape, coils, R", SCANS)
@pytest.mark.parametrize("weight", [1.0, 1e-2, 1e-3])
def test_the_measured_part_is_that_of_dense_algebra(shape, coils, R, weight):
    A, x = scan(shape, coils, R), draw(3, 1, *shape)
    before = x.clone()
    expected = (dense(A, weight) @ x.flatten(1).to(torch.complex128).T).T.reshape(x.shape)
    found = measured_part(A, x, weight)
    assert (found - expected).abs().max() < 2e-3 * expected.abs().max() and found.dtype == x.dtype
    torch.testing.assert_close(measured_part(A, x[1:2], weight), found[1:2], rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", ["equispaced", "random", "variable_density"])
def test_without_noise_one_coil_splits_into_range_and_null_space(kind):
    """P becomes A^H A itself, a projection; what it leaves the data do not see."""
    A, x = scan((7, 9), 1, 3, kind), draw(2, 1, 7, 9)
    part = measured_part(A, x, 1e-6)
    torch.testing.assert_close(part, A.normal(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(measured_part(A, part, 1e-6), part, rtol=1e-4, atol=1e-4)
    assert A(x - part).abs().max() < 1e-4
    assert measured_part(A, x - part, 1e-6).abs().max() < 1e-4


@pytest.mark.parametrize("shape, coils, R", SCANS)
def test_the_fraction_is_the_diagonal(shape, coils, R):
    """Within 4.5 standard errors of random signs: Var = sum of Re(P_ij)^2 over j other than i."""
    A, weight, probes = scan(shape, coils, R), 1e-2, 400
    P = dense(A, weight)
    exact = P.diagonal().real.reshape(1, *shape)
    error = ((P.real**2).sum(1) - P.diagonal().real ** 2).clamp_min(0).sqrt().reshape(1, *shape) / probes**0.5
    found = measured_fraction(A, weight, probes, seed=2)
    assert found.shape == (1, *shape) and found.dtype == torch.float32
    assert ((found - exact).abs() < 4.5 * error + 2e-3).all()
    assert torch.equal(found, measured_fraction(A, weight, probes, seed=2))
    assert 0 <= found.min() and found.max() <= 1


@pytest.mark.parametrize("R, kind", [(2, "equispaced"), (4, "random"), (3, "variable_density")])
def test_the_mean_fraction_counts_measured_directions(R, kind):
    """Of one coil every sample is a direction of its own: the share is 1 / exact acceleration; coils add some."""
    mask = cartesian_mask(15, R, kind)
    share = 1 / mask.acceleration
    one = measured_fraction(sense(birdcage_maps((12, 15), 1), mask), 1e-5, 200).mean().item()
    assert one == pytest.approx(share, abs=0.01)
    many = sense(birdcage_maps((12, 15), 4), mask)
    exact = dense(many, 1e-3).diagonal().real.mean().item()
    assert measured_fraction(many, 1e-3, 200).mean().item() == pytest.approx(exact, abs=0.01)
    assert share < exact <= min(1.0, 4 * share)


def test_a_diagonal_operator_gives_each_pixel_its_own_share():
    gain = torch.tensor([[0.0, 0.1, 1.0, 3.0]])
    weight = 0.04
    share = gain**2 / (gain**2 + weight)
    torch.testing.assert_close(measured_fraction(Diagonal(gain, gain.shape), weight, 3), share, rtol=1e-3, atol=1e-4)
    x = draw(2, 1, 4, dtype=torch.float32)
    torch.testing.assert_close(measured_part(Diagonal(gain, gain.shape), x, weight), share * x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_agreement_is_signal_over_signal_and_spread(dtype):
    """|m|^2 / (|m|^2 + variance), E|x - m|^2 = variance: 2 v for complex draws with v per real component."""
    mean, std = torch.tensor([0.0, 1.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 0.5, 0.0])
    draws = mean + std * draw(4000, 4, dtype=dtype)
    expected = mean**2 / (mean**2 + std**2 * (2 if dtype.is_complex else 1))
    assert ((agreement(draws) - expected).abs() < 0.02).all()
    assert agreement(draws)[3] == 1


def test_agreement_of_few_draws_is_not_taken_from_their_mean():
    """The mean of n draws of zero-mean noise has |mean|^2 = variance / n; unbiased parts leave little of it."""
    few = torch.stack([agreement(draw(4, 500, seed=seed)) for seed in range(8)])
    assert few.mean() < 0.12  # 0.2 with the biased |mean|^2
    assert agreement(torch.zeros(3, 2)).tolist() == [0, 0]


def test_errors_say_what_to_do():
    A, x = scan((6, 8), 2, 2), draw(1, 1, 6, 8)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight is"):
            measured_part(A, x, weight)
        with pytest.raises(ValueError, match="weight is"):
            measured_fraction(A, weight)
    with pytest.raises(ValueError, match="NaN"):
        measured_part(A, x * float("nan"), 1.0)
    with pytest.raises(ValueError, match=r"takes \(\.\.\., 1, 6, 8\)"):
        measured_part(A, x[..., :7], 1.0)
    with pytest.raises(ValueError, match="probes"):
        measured_fraction(A, 1.0, probes=0)
    with pytest.raises(ValueError, match="at least two draws"):
        agreement(x)
    with pytest.raises(ValueError, match="NaN"):
        agreement(torch.cat([x, x * float("nan")]))
