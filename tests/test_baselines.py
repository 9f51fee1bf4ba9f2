"""Baselines minimise what they say they minimise, in any batch, in 2D and 3D."""

import numpy as np
import pytest
import torch

from companion.baselines import METHODS, cg_sense, l1_wavelet, total_variation, tune, zero_filled
from companion.metrics import psnr
from companion.operators.mri import birdcage_maps, cartesian_mask, sense


def boxes(*shape: int) -> torch.Tensor:
    """A complex image (1, 1, *shape) of nested boxes, magnitude at most 1."""
    image = torch.zeros(shape)
    for inset, value in ((1 / 8, 0.5), (1 / 4, 0.5), (3 / 8, -0.4)):
        image[tuple(slice(int(n * inset), n - int(n * inset)) for n in shape)] += value
    return torch.polar(image, torch.linspace(0, 1, shape[-1]).expand(shape))[None, None]


@pytest.fixture
def scan():
    x, maps, mask = boxes(32, 32), birdcage_maps((32, 32), 4), cartesian_mask(32, 3, acs=4)
    A = sense(maps, mask)
    noise = torch.randn(A(x).shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    return x, maps, mask, A, mask.mask * (A(x) + 0.01 * 2**0.5 * noise)


def objective(A, y, x, penalty) -> float:
    return (A(x) - y).abs().square().sum().item() / 2 + penalty(x)


def test_cg_sense_solves_the_normal_equations(scan):
    _, maps, mask, A, y = scan
    x = cg_sense(y, maps, mask, 0.05, 100)
    assert torch.allclose(A.normal(x) + 0.05 * x, A.H(y), atol=1e-5)


def test_cg_sense_agrees_with_sigpy(scan):
    from sigpy.mri.app import SenseRecon

    _, maps, mask, _, y = scan
    weights = mask.mask.expand(32, 32).numpy()
    theirs = SenseRecon(
        y[0].numpy(), maps.numpy(), 0.05, weights=weights, max_iter=100, show_pbar=False
    ).run()
    np.testing.assert_allclose(cg_sense(y, maps, mask, 0.05, 100)[0, 0].numpy(), theirs, atol=1e-4)


def test_total_variation_converges_to_a_minimum(scan):
    _, maps, mask, A, y = scan

    def penalty(x):
        return 0.005 * sum((x - x.roll(1, d)).abs().sum().item() for d in (-2, -1))

    ours = objective(A, y, total_variation(y, maps, mask, 0.005), penalty)
    long = objective(A, y, total_variation(y, maps, mask, 0.005, 800), penalty)
    assert long <= ours < 1.01 * long
    assert ours < 0.7 * objective(A, y, zero_filled(y, maps, mask), penalty)


def test_wavelet_lowers_its_objective(scan):
    import sigpy

    _, maps, mask, A, y = scan
    W = sigpy.linop.Wavelet((32, 32), wave_name="db4")

    def penalty(x):
        return 0.005 * np.abs(W(x[0, 0].numpy())).sum()

    ours = objective(A, y, l1_wavelet(y, maps, mask, 0.005), penalty)
    long = objective(A, y, l1_wavelet(y, maps, mask, 0.005, 600), penalty)
    assert ours == pytest.approx(long, rel=0.02)


def test_order_of_quality(scan):
    x, maps, mask, _, y = scan
    quality = {name: psnr(method(y, maps, mask), x).item() for name, method in METHODS.items()}
    assert quality["zero-filled"] < quality["CG-SENSE"] < quality["TV"]
    assert quality["zero-filled"] < quality["L1-wavelet"]


@pytest.mark.parametrize("name", METHODS)
def test_items_are_independent_and_scale(name, scan):
    _, maps, mask, _, y = scan
    method, own_maps = METHODS[name], torch.stack([maps, maps.flip(0)])
    both = method(torch.cat([y, y.flip(1)]), own_maps, mask, 0.003, 20)
    assert both.shape == (2, 1, 32, 32) and both.dtype == torch.complex64
    alone = method(y, maps, mask, 0.003, 20)
    assert torch.allclose(both[:1], alone, atol=1e-5)
    assert torch.allclose(both[1:], alone, atol=1e-5)  # coils permuted with their data


@pytest.mark.parametrize("name", METHODS)
def test_volumes_and_empty_data(name):
    x, maps = boxes(8, 10, 9), birdcage_maps((8, 10, 9), 3)
    mask = cartesian_mask(9, 2, acs=3)
    y = sense(maps, mask, ndim=3)(x)
    assert METHODS[name](y, maps, mask, 0.01, 5).shape == (1, 1, 8, 10, 9)
    assert METHODS[name](torch.zeros_like(y), maps, mask, 0.01, 5).abs().max() == 0


def test_tune_finds_the_best_value_and_warns_at_the_edge(scan):
    x, maps, mask, _, y = scan
    tuned = tune(cg_sense, [(y, maps, mask, x)], [1e-5, 1e-2, 10.0])
    assert tuned.regularisation == 1e-2 and max(tuned.psnr) == tuned.psnr[1]
    with pytest.warns(UserWarning, match="end of the grid"):
        tune(cg_sense, [(y, maps, mask, x)], [1.0, 10.0])


def test_errors_say_what_to_do(scan):
    _, maps, mask, _, y = scan
    with pytest.raises(ValueError, match="y must be complex"):
        zero_filled(y[:, :3], maps, mask)
    with pytest.raises(ValueError, match="NaN"):
        cg_sense(y * float("nan"), maps, mask)
    with pytest.raises(ValueError, match="zeros and ones"):
        l1_wavelet(y, maps, 0.5 * mask.mask)
    with pytest.raises(ValueError, match="cg_sense"):
        total_variation(y, maps, mask, 0.0)
    with pytest.raises(ValueError, match="cases"):
        tune(cg_sense, [], [1.0])
