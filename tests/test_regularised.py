"""Classical reconstructions for any operator: they find the minimum, and agree with other programs."""

import shutil

import numpy as np
import pytest
import torch

from companion.acquisition.measurement import prepare_kspace
from companion.acquisition.noise import Noise
from companion.acquisition.redundancy import redundancy
from companion.operators.masks import cartesian_mask
from companion.operators.mri import Fourier, birdcage_maps, fft, sense
from companion.operators.noncartesian import noncartesian_sense, radial_trajectory
from companion.operators.soft_sense import soft_sense
from companion.reconstruction import mri, regularised
from companion.reconstruction.regularised import METHODS, bart_pics, cg, largest_eigenvalue, tv, wavelet


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def head(n=32):
    grid = torch.linspace(-1, 1, n)
    y, x = grid[:, None], grid[None]
    inside = ((y / 0.8) ** 2 + (x / 0.6) ** 2 < 1).float() + 0.5 * (((y - 0.2) ** 2 + x**2) < 0.1)
    return torch.polar(inside, (0.7 * x + 0 * y))[None, None]


def problem(kind="cartesian", n=32, noise=0.01):
    maps = birdcage_maps((n, n), 4)
    if kind == "cartesian":
        A = sense(maps, cartesian_mask((n, n), 2, "random", acs=8, seed=1))
    elif kind == "sets":
        A = soft_sense(torch.stack([maps, birdcage_maps((n, n), 5)[1:]]), torch.ones(n, n))
    else:
        A = noncartesian_sense(maps, radial_trajectory(torch.pi * torch.arange(24) / 24, 2 * n, n).flatten(0, 1))
    x = head(n).expand(1, A.domain_shape[0], n, n)
    return A, A(x) + noise * draw(1, *A.range_shape), x


def penalty(x):
    dy = x.diff(dim=-2, append=x[..., -1:, :])
    dx = x.diff(dim=-1, append=x[..., -1:])
    return (dy.abs().square() + dx.abs().square()).sqrt().sum()


@pytest.mark.parametrize("kind", ["cartesian", "sets", "radial"])
def test_tv_finds_the_minimum(kind):
    A, y, _ = problem(kind)

    def objective(x):
        return ((A(x) - y).abs().square().sum() / 2 + 0.02 * penalty(x)).item()

    x = tv(A, y, 0.02, iterations=400)
    least = objective(x)
    assert objective(tv(A, y, 0.02)) < 1.01 * least
    for seed in range(5):
        assert objective(x + 1e-2 * draw(*x.shape, seed=seed)) > least
    assert objective(0.99 * x) > least and objective(1.01 * x) > least
    with pytest.raises(ValueError, match="positive"):
        tv(A, y, 0.0)


@pytest.mark.parametrize("regularisation", [0.001, 0.005, 0.02])
@pytest.mark.parametrize("kind", ["cartesian", "radial"])
def test_tv_is_done_by_default_and_what_was_not_measured_is_too(kind, regularisation):
    # low objectives come early, images late: what the data do not see is moved by the penalty alone
    A, y, _ = problem(kind)
    x, found = tv(A, 4 * y, 4 * regularisation, 200), tv(A, 4 * y, 4 * regularisation)
    assert ((found - x).norm() / x.norm()).item() < 0.02
    # scales with the data; a power of 2, for what rounding leaves of 3 is .01 where little is measured
    assert torch.allclose(found, 4 * tv(A, y, regularisation), atol=1e-6 * x.abs().max())


def test_wavelets_of_a_unitary_operator_are_soft_thresholded_once():
    from sigpy.wavelet import fwt

    A, x = Fourier((1, 32, 32)), head()
    y = A(x + 0.05 * draw(1, 1, 32, 32))
    found = wavelet(A, y, 0.1, iterations=1, wave="db1", seed=3)  # orthonormal, with no ends to pad
    rng = np.random.default_rng(3)
    shift = [int(rng.integers(32)) for _ in range(2)]
    before, after = (fwt(v[0, 0].roll(shift, (0, 1)).numpy(), wave_name="db1") for v in (A.H(y), found))
    small = abs(before) < 0.099
    assert abs(after[small]).max() < 5e-3
    big = abs(before) > 0.2
    assert abs(abs(before[big]) - abs(after[big]) - 0.1).max() < 5e-3


def test_wavelets_come_nearer_with_random_shifts_than_on_a_grid_of_their_own():
    A, y, x = problem()
    on_a_grid = mri.l1_wavelet(y, A.coils.maps, A.mask.mask, 0.01, 100)  # sigpy's
    ours, other = wavelet(A, y, 0.01, wave="db4"), wavelet(A, y, 0.01, wave="db4", seed=1)
    assert (ours - x).norm() < 0.95 * (on_a_grid - x).norm()
    assert torch.equal(ours, wavelet(A, y, 0.01, wave="db4"))
    assert 0 < (ours - other).norm() < 0.7 * (ours - x).norm()


@pytest.mark.skipif(not shutil.which("bart"), reason="needs the program bart")
def test_barts_wavelets_are_ours():
    A, y, x = problem()
    found, ours = bart_pics(A, y, A.coils.maps[None], 0.02), wavelet(A, y, 0.02)
    assert (found - ours).norm() < 0.8 * min((ours - x).norm(), (found - x).norm()) + 0.02 * x.norm()


@pytest.mark.parametrize("kind", ["cartesian", "sets", "radial"])
def test_all_methods_improve_on_nothing_for_every_operator(kind):
    A, y, x = problem(kind)
    for name, method in METHODS.items():
        found = method(A, y, 0.005)
        assert found.shape == x.shape and (found - x).norm() < 0.35 * x.norm(), name


def test_the_largest_eigenvalue():
    A = soft_sense(2 * torch.stack([birdcage_maps((16, 16), 4)] * 2), torch.ones(16))
    assert largest_eigenvalue(A) == pytest.approx(8 * 1.02, rel=1e-3)  # two equal sets of 4 |S|^2 = 4


@pytest.mark.skipif(not shutil.which("bart"), reason="needs the program bart")
@pytest.mark.parametrize("kind", ["cartesian", "sets", "radial"])
def test_bart_solves_the_same_problem(kind):
    A, y, x = problem(kind)
    maps = (A.inner if kind == "radial" else A.coils).maps
    found = bart_pics(A, y, maps if kind == "sets" else maps[None], 0.02, 200, penalty="T")
    ours = tv(A, y, 0.02, 400)
    assert found.shape == x.shape and ((found - ours).norm() / ours.norm()).item() < 0.1


@pytest.mark.skipif(not shutil.which("bart"), reason="needs the program bart")
def test_barts_wavelets_converge_off_the_grid():
    A, y, x = problem("radial")
    assert largest_eigenvalue(A) > 2  # steps of 1, which BART takes unless told otherwise, diverge
    for found in (bart_pics(A, y, A.inner.maps[None], 0.02), tv(A, y, 0.02)):
        assert ((found - x).norm() / x.norm()).item() < 0.2


def test_bart_missing_is_told_and_what_it_cannot_solve(monkeypatch):
    A, y, _ = problem()
    monkeypatch.setattr(regularised.shutil, "which", lambda name: name)
    with pytest.raises(ValueError, match="got Mask"):
        bart_pics(A.mask, y, A.coils.maps[None])
    monkeypatch.setattr(regularised.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="install BART"):
        bart_pics(A, y, A.coils.maps[None])


def test_redundant_coils_tell_the_noise_that_the_edges_did_not():
    n = 64
    maps, noise = birdcage_maps((n, n), 8), 0.02
    kspace = fft(maps * head(n)[0, 0]) + noise * 2**0.5 * draw(8, n, n)
    mask = cartesian_mask((n, n), 2, acs=16)
    stated = Noise((2 * noise) ** 2 * torch.eye(8, dtype=torch.complex128), 1, "given")  # twice too high
    m = prepare_kspace(kspace, mask, noise=stated, maps=maps, coils=8)
    found = redundancy(m)
    assert found.ratio == pytest.approx(0.5, abs=0.02) and 0.5 < found.spare < 1
    one = prepare_kspace(
        kspace[:1], cartesian_mask((n, n), 2, acs=16), noise=Noise(stated.covariance[:1, :1], 1, "given")
    )
    with pytest.raises(ValueError, match="redundant"):
        redundancy(one)


def test_cg_is_least_squares():
    A, y, x = problem(noise=0)
    assert ((cg(A, y, 1e-4, 100) - x).norm() / x.norm()).item() < 0.05
