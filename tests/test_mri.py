"""MRI physics: unitary transform, exact adjoints, masks that do what they say, maps that fit."""

import numpy as np
import pytest
import torch

from companion.operators.linear import Identity, Stack, adjoint_error
from companion.operators.masks import MASKS, CartesianMask, cartesian_mask, centre_lines
from companion.operators.mri import (
    Coils,
    Fourier,
    Mask,
    birdcage_maps,
    centre_crop,
    coil_maps,
    combine,
    compress_coils,
    crop_kspace,
    estimate_maps,
    estimate_noise,
    fft,
    ifft,
    low_pass,
    normalise,
    sense,
)

SHAPES = [(8, 8), (9, 7), (8, 7), (4, 6, 8), (5, 4, 7)]


def draw(*shape, dtype=torch.complex64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_fourier_is_unitary_and_centred(shape):
    x, ndim = draw(2, *shape, dtype=torch.complex128), len(shape)
    assert torch.allclose(ifft(fft(x, ndim), ndim), x)
    assert fft(x, ndim).norm().item() == pytest.approx(x.norm().item())
    middle = tuple(n // 2 for n in shape)
    constant = torch.ones(shape, dtype=torch.complex128)
    assert fft(constant, ndim)[middle].real == pytest.approx(np.prod(shape) ** 0.5)  # zero frequency at n // 2
    impulse = torch.zeros_like(constant)
    impulse[middle] = 1
    assert torch.allclose(fft(impulse, ndim), constant / np.prod(shape) ** 0.5)  # real: x = 0 is at n // 2


def test_fourier_is_the_stated_sum():
    n, x = 7, draw(7, dtype=torch.complex128)
    k = torch.arange(n, dtype=torch.float64) - n // 2
    matrix = torch.exp(-2j * torch.pi * torch.outer(k, k) / n) / n**0.5
    assert torch.allclose(fft(x, 1), matrix @ x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MASKS)
def test_adjoints_and_normal(shape, kind):
    ndim = len(shape)
    mask = cartesian_mask(shape, 1.6 if kind == "poisson_disc" else 2, kind, acs=2)
    maps = birdcage_maps(shape, 5)
    A = sense(maps, mask, ndim)
    batched = sense(torch.stack([maps, maps.roll(1, 0)]), mask.mask.expand(2, 1, *shape), ndim)
    pieces = Mask(mask.mask, (5, *shape)) @ Fourier((5, *shape)) @ Coils(maps, ndim)
    for operator in (A, batched, pieces, Stack((A, 0.1 * Identity(A.domain_shape)))):
        assert adjoint_error(operator) < 1e-5
        x = draw(2, 1, *shape)
        assert torch.allclose(operator.normal(x), operator.H(operator(x)), atol=1e-5)
    assert torch.allclose(pieces(x), A(x), atol=1e-6)
    assert torch.allclose(batched(x)[:1], A(x[:1]), atol=1e-6)


def test_any_number_of_coils_and_weights():
    for coils in (1, 3, 12):
        assert adjoint_error(sense(birdcage_maps((9, 8), coils), cartesian_mask(8, 2))) < 1e-5
    weighted = sense(birdcage_maps((9, 8), 3), torch.rand(9, 8))
    x = draw(2, 1, 9, 8)
    assert torch.allclose(weighted.normal(x), weighted.H(weighted(x)), atol=1e-5)


def test_sequences_share_the_operator():
    A = sense(birdcage_maps((9, 8), 3), cartesian_mask(8, 2))
    frames = draw(2, 4, 1, 9, 8)  # (batch, frame, channel, y, x)
    assert torch.allclose(A(frames)[1, 2], A(frames[1, 2][None])[0])


def test_the_gradient_is_the_adjoint():
    A = sense(birdcage_maps((9, 8), 3), cartesian_mask(8, 2))
    x, y = draw(2, 1, 9, 8).requires_grad_(), draw(2, 3, 9, 8, seed=1)
    (A(x) - y).abs().square().sum().div(2).backward()
    assert torch.allclose(x.grad, A.H(A(x) - y), atol=1e-5)
    x.grad = None
    target = draw(2, 1, 9, 8, seed=2)
    (A.normal(x).conj() * target).sum().real.backward()
    assert torch.allclose(x.grad, A.normal(target), atol=1e-5)


def test_unit_maps_and_full_sampling_give_the_identity():
    A, x = sense(birdcage_maps((9, 8), 6), torch.ones(8)), draw(2, 1, 9, 8)
    assert torch.allclose(A.H(A(x)), x, atol=1e-6) and torch.allclose(A.normal(x), x, atol=1e-6)


SHAPES = [17, (16, 21), (4, 24, 24)]


# a Poisson disc needs two axes
@pytest.mark.parametrize(("kind", "shape"), [(k, s) for k in MASKS for s in SHAPES if k != "poisson_disc" or s != 17])
def test_masks_are_seeded_and_say_what_they_do(kind, shape):
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    R, acs = 3, 4
    mask = cartesian_mask(shape, R, kind, acs=acs, seed=5)
    again = cartesian_mask(shape, R, kind, acs=acs, seed=5)
    assert isinstance(mask, CartesianMask) and torch.equal(mask.mask, again.mask)
    assert np.array_equal(before[0], np.random.get_state()[1]) and torch.equal(before[1], torch.get_rng_state())
    assert set(mask.mask.unique().tolist()) == {0.0, 1.0}
    assert mask.acceleration == pytest.approx(mask.mask.numel() / mask.mask.sum().item())
    width = mask.mask.shape[-1]
    centre = mask.mask[..., width // 2 - acs // 2 : width // 2 - acs // 2 + acs]
    if kind == "poisson_disc":
        assert centre_crop(mask.mask, (acs - 2, acs - 2)).min() == 1
        assert mask.acceleration == pytest.approx(R, abs=0.16)
        assert mask.lines == mask.mask.reshape(-1, *mask.mask.shape[-2:])[0].sum()
    else:
        assert centre.min() == 1 and mask.lines == mask.mask.reshape(-1, width)[0].sum()
        assert torch.equal(mask.mask, mask.mask.reshape(-1, width)[0].expand_as(mask.mask))
    if kind != "equispaced":
        assert not torch.equal(mask.mask, cartesian_mask(shape, R, kind, acs=acs, seed=6).mask)


def test_equispaced_lines_and_acs():
    mask = cartesian_mask(40, 4, acs=6)
    assert mask.mask.nonzero().flatten().tolist() == sorted({*range(0, 40, 4), *range(17, 23)})
    assert (mask.lines, mask.acceleration) == (15, 40 / 15)  # line 20 is in both
    assert cartesian_mask(10, 2.5).mask.nonzero().flatten().tolist() == [0, 2, 5, 7]


def test_variable_density_prefers_the_centre():
    masks = torch.stack([cartesian_mask(64, 4, "variable_density", seed=s).mask for s in range(200)]).mean(0)
    uniform = torch.stack([cartesian_mask(64, 4, "random", seed=s).mask for s in range(200)]).mean(0)
    inner, outer = masks[24:40].mean(), torch.cat([masks[:12], masks[52:]]).mean()
    assert inner > 4 * outer and masks.mean() == pytest.approx(0.25)
    assert uniform[24:40].mean() == pytest.approx(0.25, abs=0.04)


def phantom(shape=(32, 32)):
    y, x = np.mgrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    image = (x**2 + y**2 < 0.7) * (1 + 0.5 * np.cos(7 * x) * np.sin(5 * y))
    return torch.from_numpy(image.astype(np.complex64))[None, None]


def test_espirit_maps_explain_the_coil_images():
    maps, x = birdcage_maps((32, 32), 6), phantom()
    mask = cartesian_mask(32, 3, acs=16)
    found = estimate_maps(sense(maps, mask)(x), acs=16)
    assert found.shape == (1, 6, 32, 32)
    coil_images = maps * x
    inside = x.abs() > 0
    combined = (found.conj() * coil_images).sum(1, keepdim=True)
    residual = ((coil_images - found * combined) * inside).norm() / coil_images.norm()
    assert residual < 0.03
    rss = found.abs().square().sum(1, keepdim=True)[inside]
    assert torch.allclose(rss, torch.ones_like(rss), atol=1e-4)


def test_espirit_needs_a_measured_centre():
    maps, x = birdcage_maps((32, 32), 4), phantom()
    with pytest.raises(ValueError, match="not all measured"):
        estimate_maps(sense(maps, cartesian_mask(32, 4, acs=4))(x), acs=12)
    with pytest.raises(ValueError, match="finds no coil maps"):
        estimate_maps(maps[None] * x, acs=12, crop=2.0)  # no eigenvalue is that large
    with pytest.raises(ValueError, match="does not suit"):
        estimate_maps(maps[None], acs=40)
    with pytest.raises(ValueError, match="NaN"):
        estimate_maps(maps[None] * float("nan"), acs=12)


@pytest.mark.parametrize("shape", [(8, 8), (9, 7), (4, 6, 5)])
@pytest.mark.parametrize("coils", [1, 5, 8])
def test_birdcage_maps_have_unit_energy(shape, coils):
    maps = birdcage_maps(shape, coils)
    assert maps.shape == (coils, *shape) and maps.dtype == torch.complex64
    assert torch.allclose(maps.abs().square().sum(0), torch.ones(shape), atol=1e-5)


def test_coil_compression_keeps_the_energy():
    kspace = sense(birdcage_maps((16, 16), 8), torch.ones(16))(draw(3, 1, 16, 16))
    full, matrix = compress_coils(kspace, 8)
    assert torch.allclose(matrix @ matrix.mH, torch.eye(8, dtype=matrix.dtype), atol=1e-5)
    assert full.norm().item() == pytest.approx(kspace.norm().item(), rel=1e-5)
    few, matrix = compress_coils(kspace, 4)
    assert few.shape == (3, 4, 16, 16) and torch.allclose(few, full[:, :4], atol=1e-4)
    assert torch.allclose(few, torch.einsum("vc,bcyx->bvyx", matrix, kspace), atol=1e-5)
    energies = full.abs().square().sum((0, 2, 3))
    assert (energies.diff() <= 1e-3 * energies[0]).all()  # strongest first
    with pytest.raises(ValueError, match="1 to 8"):
        compress_coils(kspace, 9)


def test_normalise_keeps_phase_and_records_the_scale():
    x = draw(2, 1, 8, 8) * 5
    scaled, scale = normalise(x)
    assert scaled.abs().max().item() == pytest.approx(1) and torch.allclose(scaled * scale, x)
    assert torch.allclose(scaled.angle(), x.angle(), atol=1e-5)
    each, scales = normalise(x, dim=(1, 2, 3))
    assert scales.shape == (2, 1, 1, 1) and torch.allclose(each.abs().amax((1, 2, 3)), torch.ones(2))
    zero, one = normalise(torch.zeros(3))
    assert zero.abs().max() == 0 and one == 1
    with pytest.raises(ValueError, match="NaN"):
        normalise(x * float("nan"))


def test_crop_kspace_crops_the_field_of_view():
    image = draw(2, 3, 12, 9)
    cropped = crop_kspace(fft(image), (8, 5))
    assert torch.allclose(ifft(cropped), centre_crop(image, (8, 5)), atol=1e-6)
    assert torch.equal(centre_crop(torch.arange(9), (4,)), torch.arange(2, 6))
    with pytest.raises(ValueError, match="larger"):
        crop_kspace(image, (20, 5))


def test_errors_say_what_to_do():
    maps = birdcage_maps((8, 8), 3)
    with pytest.raises(ValueError, match="mask has 10 columns but the maps have 8"):
        sense(maps, cartesian_mask(10, 2))
    with pytest.raises(ValueError, match="broadcast"):
        sense(maps, torch.ones(5, 8))
    with pytest.raises(TypeError, match="complex"):
        sense(maps.real, torch.ones(8))
    with pytest.raises(ValueError, match="coil axis"):
        sense(maps[0], torch.ones(8))
    with pytest.raises(ValueError, match="NaN"):
        sense(maps * float("nan"), torch.ones(8))
    with pytest.raises(ValueError, match="batch"):
        sense(maps.expand(2, 3, 8, 8), torch.ones(8))(draw(3, 1, 8, 8))
    with pytest.raises(ValueError, match="unknown"):
        cartesian_mask(8, 2, "equidistant")
    with pytest.raises(ValueError, match="acceleration"):
        cartesian_mask(8, 0.5)
    with pytest.raises(ValueError, match="ACS"):
        cartesian_mask(8, 2, acs=9)
    with pytest.raises(ValueError, match="two axes"):
        cartesian_mask(8, 2, "poisson_disc")


@pytest.mark.parametrize("shape", [(24, 24), (25, 31)])
@pytest.mark.parametrize("noise_std", [0.003, 0.05])
def test_the_noise_of_a_scan_is_found_in_its_corners(shape, noise_std):
    """Within 10 %, in any units, of whole scans and of those with half of the lines."""
    maps, soft = birdcage_maps(shape, 6), ifft(low_pass(fft(phantom(shape)), 16))
    kspace = fft(maps * soft) + noise_std * 2**0.5 * draw(3, 6, *shape)
    for gain in (1e-6, 1.0, 1e4):
        assert estimate_noise(gain * kspace) == pytest.approx(gain * noise_std, rel=0.1)
    half = kspace * cartesian_mask(shape[-1], 2).mask
    assert estimate_noise(half) == pytest.approx(noise_std, rel=0.1)
    with pytest.raises(ValueError, match="0 samples lie in the corners"):
        estimate_noise(torch.zeros_like(kspace))
    with pytest.raises(ValueError, match="NaN"):
        estimate_noise(kspace * float("nan"))


@pytest.mark.parametrize("shape, width", [((24, 24), 12), ((25, 31), 12), ((24, 25), 13)])
def test_low_pass_reads_the_centre_alone(shape, width):
    kspace = draw(2, 3, *shape)
    low = low_pass(kspace, width)
    outside = torch.ones(shape, dtype=torch.bool)
    centre_crop(outside, (width, width))[:] = False
    assert low.shape == kspace.shape and low[..., outside].abs().max() == 0
    middle = (..., shape[0] // 2, shape[1] // 2)
    assert torch.equal(low[middle], kspace[middle])
    ratio = (low / kspace).real  # symmetric weights, so that a real image stays real
    wide = centre_crop(ratio, (width // 2, width // 2) if width % 2 else (width - 1, width - 1))[0, 0]
    odd = centre_crop(wide, tuple(n - 1 + n % 2 for n in wide.shape))
    torch.testing.assert_close(odd, odd.flip(0, 1))
    assert 0 < odd.min() and odd.max() <= 1.0001


def test_coil_combination_is_the_least_squares_image():
    maps, x = birdcage_maps((12, 15), 4), draw(3, 1, 12, 15)
    kspace = fft(maps * x)
    assert torch.allclose(combine(kspace, maps), x, atol=1e-5)
    assert torch.allclose(combine(kspace, maps), sense(maps, torch.ones(15)).H(kspace), atol=1e-6)


def test_maps_of_one_coil_are_ones_and_of_several_those_of_espirit():
    kspace = fft(birdcage_maps((24, 24), 3) * phantom((24, 24)))
    assert torch.equal(coil_maps(kspace, 12), estimate_maps(kspace, 12))
    assert torch.equal(coil_maps(kspace[:, :1], 0), torch.ones(1, 1, 24, 24, dtype=kspace.dtype))


@pytest.mark.parametrize("width", [15, 16, 37])
@pytest.mark.parametrize("acs", [0, 1, 4, 5, 12, 15])
def test_centre_lines_are_the_acs_of_the_mask(width, acs):
    mask = torch.zeros(width)
    centre_crop(mask, (acs,))[:] = 1
    assert centre_lines(mask) == acs
    more = cartesian_mask(width, 5, acs=acs).mask
    found = centre_lines(more)
    assert found >= acs and bool((centre_crop(more, (found,)) == 1).all())
    assert found == width or not bool((centre_crop(more, (found + 1,)) == 1).all())


def test_a_mask_within_the_acquired_lines():
    mask = cartesian_mask(64, 4, acs=8)
    columns = torch.ones(64)
    columns[:8] = 0
    part = mask.within(columns)
    assert not part.mask[:8].any() and torch.equal(part.mask[8:], mask.mask[8:])
    assert part.lines == int(part.mask.sum()) == mask.lines - 2 and part.acceleration == pytest.approx(64 / part.lines)
    with pytest.raises(ValueError, match="share none"):
        mask.within(torch.zeros(64))
