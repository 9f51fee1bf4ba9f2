"""Raw k-space made ready: the noise it has, the coils it needs, the centre it holds, the image's units."""

import math
from pathlib import Path

import pytest
import torch

from companion.acquisition.maps import centre_of_mask, echo_of, espirit
from companion.acquisition.measurement import (
    compression,
    hybrid_slices,
    prepare_kspace,
    prepare_scan,
    remove_oversampling,
)
from companion.acquisition.noise import Noise, mix, noise_of_edges, noise_of_samples, noise_of_scan, whiten
from companion.data.raw.scan import RawScan
from companion.operators.linear import adjoint_error
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, fft, ifft
from companion.operators.soft_sense import CoilSets, soft_sense
from companion.operators.solve import conjugate_gradient

REAL = Path(__file__).parents[2] / "shared" / "real" / "kspace"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs shared/real beside the checkout")


def draw(*shape, seed=0, dtype=torch.complex64):
    """Complex numbers of deviation 1 per real component."""
    return math.sqrt(2) * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def head(shape=(64, 56), shift=(0.0, 0.0)):
    """An ellipse with structure and a smooth phase, its magnitude 1 at most."""
    grids = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in shape], indexing="ij")
    y, x = (g - s for g, s in zip(grids[-2:], shift, strict=True))
    radius = (y / 0.8) ** 2 + (x / 0.7) ** 2 + sum((g / 0.8) ** 2 for g in grids[:-2])
    magnitude = (radius < 1) * (0.6 + 0.2 * torch.cos(9 * x) * torch.cos(7 * y)) + 0.2 * (radius < 0.3)
    return torch.polar(magnitude.float(), 0.8 * x + 0.5 * y * y)


def covariance(coils=6, seed=1):
    mixing = torch.eye(coils, dtype=torch.complex128) + 0.15 * draw(coils, coils, seed=seed, dtype=torch.complex128)
    scales = torch.linspace(0.5, 2, coils, dtype=torch.float64)
    return scales[:, None] * (mixing @ mixing.mH) * scales


def coloured(sigma, *shape, seed=2):
    """Noise (coil, *shape) whose covariance per real component is sigma."""
    root = torch.linalg.cholesky(sigma)
    return mix(root, draw(len(sigma), *shape, seed=seed), len(shape))


def simulate(shape=(64, 56), coils=6, noise=0.002, seed=2, maps=None, image=None):
    """Fully sampled k-space (coil, *shape) with correlated noise, its noise covariance, maps and image."""
    maps = birdcage_maps(shape, coils) if maps is None else maps
    image = head(shape) if image is None else image
    sigma = noise**2 * covariance(coils)
    return fft(maps * image, len(shape)) + coloured(sigma, *shape, seed=seed), sigma, maps, image


# ------------------------------------------------------------------------------------------------------------- noise


def test_a_noise_scan_gives_its_covariance_and_whitening_the_identity():
    sigma = covariance()
    noise = noise_of_scan(coloured(sigma, 20000))
    assert (noise.covariance - sigma).norm() < 0.03 * sigma.norm()
    white = noise_of_scan(whiten(coloured(sigma, 200, 100, seed=5), noise))
    assert torch.allclose(white.covariance, torch.eye(6, dtype=torch.complex128), atol=0.04)
    assert torch.allclose(noise.whitening @ noise.covariance @ noise.whitening.mH, torch.eye(6).to(torch.complex128))
    assert torch.allclose(noise.std, sigma.diagonal().real.sqrt(), rtol=0.03)


def test_the_edges_of_kspace_give_the_covariance_although_signal_reaches_them():
    kspace, sigma, *_ = simulate((128, 128))
    found = noise_of_edges(kspace)
    assert (found.covariance - sigma).norm() < 0.08 * sigma.norm()
    assert "field of view" in found.source
    edges = coloured(sigma, 4000)
    edges[:, ::8] *= 30  # an eighth of the samples carries signal
    robust = noise_of_edges(edges[:, :, None].expand(-1, -1, 2), share=1.0)
    assert (robust.covariance - sigma).norm() < 0.15 * sigma.norm()
    assert (noise_of_scan(edges).covariance - sigma).norm() > 10 * sigma.norm()


def test_signal_that_falls_off_at_the_edges_of_kspace_is_told():
    radius = torch.linspace(0, 1, 20000)
    noise = noise_of_samples(draw(3, 20000), radius)
    assert "edges of k-space" in noise.source and noise.slope == pytest.approx(1, abs=0.1)
    assert noise_of_samples(draw(3, 20000) * (3 - 2.8 * radius), radius).slope < 0.8


def test_unmeasured_samples_and_echo_off_the_centre_do_not_disturb_the_noise():
    kspace, sigma, *_ = simulate((128, 120))
    mask = cartesian_mask((128, 120), 3, "random", acs=20, seed=1).mask
    found = noise_of_edges((kspace * mask).roll((9, -13), (-2, -1)), echo=(73, 47))
    assert (found.covariance - sigma).norm() < 0.12 * sigma.norm()


def test_noise_that_cannot_be_found_is_refused_in_words():
    with pytest.raises(ValueError, match="give a noise scan"):
        noise_of_edges(draw(32, 20, 20))
    with pytest.raises(ValueError, match="zero"):
        noise_of_edges(torch.zeros(4, 20, 20, dtype=torch.complex64))
    silent = draw(4, 100)
    silent[2] = 0
    with pytest.raises(ValueError, match=r"coils \[2\]"):
        noise_of_scan(silent)
    twice = draw(3, 400)[[0, 1, 2, 0]]
    with pytest.raises(ValueError, match="singular"):
        _ = noise_of_scan(twice).whitening


# ------------------------------------------------------------------------------------------------- centre and echo


def test_a_coil_that_is_a_copy_of_another_is_named_in_words():
    noise = torch.randn(3, 40, 40, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="sums of others"):
        _ = noise_of_edges(torch.cat([noise, noise[:1]])).whitening


def test_the_centre_is_found_wherever_it_is():
    mask = torch.zeros(40, 50)
    mask[5:21, 20:41] = 1
    mask[::3, ::4] = 1
    assert centre_of_mask(mask, (10, 25)) == ((5, 21), (20, 41))
    assert centre_of_mask(mask, (10, 25), widest=8) == ((6, 14), (21, 29))
    lines = torch.zeros(50)
    lines[::4] = 1
    lines[30:41] = 1
    assert centre_of_mask(lines.expand(40, 50), (20, 33)) == ((4, 36), (30, 41))
    disc = (torch.arange(41)[:, None] - 20) ** 2 + (torch.arange(41) - 20) ** 2 <= 12**2
    (top, bottom), (left, right) = centre_of_mask(disc, (20, 20))
    assert disc[top:bottom, left:right].all() and min(bottom - top, right - left) >= 15
    with pytest.raises(ValueError, match="not measured"):
        centre_of_mask(mask, (39, 49))


@pytest.mark.parametrize("shift", [(0, 0), (5, -7)])
def test_maps_come_from_a_centre_off_the_middle(shift):
    kspace, sigma, maps, image = simulate(noise=1e-4)
    kspace = kspace.roll(shift, (-2, -1))
    mask = cartesian_mask((64, 56), 4, "poisson_disc", acs=18, seed=3).mask.roll(shift, (-2, -1))
    echo = echo_of(kspace * mask)
    assert max(abs(e - c - s) for e, c, s in zip(echo, (32, 28), shift, strict=True)) <= 1
    found = prepare_kspace(kspace, mask, noise=Noise(sigma, 1, "given"), brightness=None)
    (top, bottom), (left, right) = found.found.centre
    assert abs((top + bottom) / 2 - 32 - shift[0]) < 2 and bottom - top >= 16
    assert abs((left + right) / 2 - 28 - shift[1]) < 2 and right - left >= 16
    x = conjugate_gradient(lambda v: found.A.normal(v) + 1e-4 * v, found.A.H(found.y), iterations=80)[0, 0]
    x, truth = x.abs(), mix(found.found.matrix, maps * image).abs().square().sum(0).sqrt()
    inside = image.abs() > 0
    assert ((x - truth)[inside].norm() / truth[inside].norm()).item() < 0.1
    assert found.A(found.A.H(found.y)).shape == found.y.shape


# -------------------------------------------------------------------------------------------------------------- maps


def test_espirit_agrees_with_sigpy():
    from companion.operators.mri import estimate_maps

    kspace, *_ = simulate(noise=1e-4)
    theirs = estimate_maps(kspace, 20)
    ours = espirit(kspace[:, 22:42, 18:38], (64, 56), sets=1, phase="coil", air=0.8).maps[0]
    both = (theirs != 0).any(0) & (ours != 0).any(0)
    assert both.float().mean() > 0.3 and ((theirs != 0) != (ours != 0)).float().mean() < 0.01
    assert (theirs[:, both] - ours[:, both]).abs().max() < 0.02


def test_espirit_in_three_dimensions():
    kspace, _, maps, image = simulate((20, 24, 22), 4, noise=1e-5)
    found = espirit(kspace[:, 3:17, 5:19, 4:18], (20, 24, 22), sets=1, kernel=4)
    inside = image.abs() > 0
    cosine = (found.maps[0].conj() * maps).sum(0).abs()[inside]
    assert found.maps.shape == (1, 4, 20, 24, 22) and cosine.median() > 0.99


def folded(width=36, shape=(64, 56), coils=8):
    """k-space of a head whose field of view along x is `width` of 56 pixels."""
    images = birdcage_maps(shape, coils) * head(shape)
    first, rest = images[..., :width].clone(), images[..., width:]
    first[..., : rest.shape[-1]] += rest
    return fft(first) + 1e-3 * draw(coils, shape[0], width), first


def test_two_sets_of_maps_where_the_field_of_view_folds_and_one_where_it_does_not():
    kspace, images = folded()
    eye = Noise(1e-6 * torch.eye(8, dtype=torch.complex128), 1, "given")
    one, two = (prepare_kspace(kspace, noise=eye, sets=sets, brightness=None) for sets in (1, None))
    assert two.found.sets == 2 and two.found.folded > 0.05 and two.A.domain_shape == (2, 64, 36)

    def residual(m):
        x = conjugate_gradient(lambda v: m.A.normal(v) + 1e-6 * v, m.A.H(m.y), iterations=100)
        return ((m.A(x) - m.y).norm() / m.y.norm()).item()

    assert residual(two) < 0.3 * residual(one)
    overlap = (two.maps[0, 0].conj() * two.maps[0, 1]).sum(0).abs()
    assert overlap.max() < 1e-4  # the sets are orthogonal where both exist
    whole, *_ = simulate(coils=8, noise=1e-3)
    assert prepare_kspace(whole, noise=eye, brightness=None).found.sets == 1


def test_soft_sense_is_linear_with_its_adjoint_and_one_set_is_sense():
    maps = draw(2, 3, 8, 7)
    A = soft_sense(maps, (draw(8, 7, seed=4).real > 0).float())
    assert A.domain_shape == (2, 8, 7) and adjoint_error(A) < 1e-5
    x = draw(3, 2, 8, 7, seed=6)
    assert torch.allclose(A.normal(x), A.H(A(x)), atol=1e-4)
    assert adjoint_error(CoilSets(draw(2, 2, 3, 4, 5, 6), 3), batch=1) < 1e-5
    assert torch.allclose(soft_sense(maps[:1], torch.ones(7)).forward(x[:, :1]), fft(maps[0] * x[:, :1]))


# ---------------------------------------------------------------------------------------------------- the whole thing


def test_compression_keeps_the_stated_energy_and_white_noise():
    kspace, sigma, *_ = simulate((64, 64), 12, noise=1e-3)
    noise = Noise(sigma, 1, "given")
    matrix, kept = compression(kspace, noise, 5)
    signal = mix(noise.whitening, kspace).abs().square().sum() - 2 * 12 * 64 * 64
    ours = mix(matrix, kspace).abs().square().sum() - 2 * 5 * 64 * 64
    assert (ours / signal).item() == pytest.approx(kept, abs=1e-4)
    identity = matrix @ sigma @ matrix.mH
    assert torch.allclose(identity, torch.eye(5, dtype=torch.complex128), atol=1e-6)
    few, kept = compression(kspace, noise)
    assert len(few) < 12 and kept >= 0.999
    with pytest.raises(ValueError, match="13"):
        compression(kspace, noise, 13)


@pytest.mark.parametrize("coils", [1, 2, 64])
def test_any_number_of_coils_gives_an_image_of_the_stated_brightness(coils):
    kspace, sigma, *_ = simulate((64, 56), coils, noise=1e-3)
    m = prepare_kspace(1e-5 * kspace, cartesian_mask((64, 56), 2, acs=16), noise=Noise(1e-10 * sigma, 1, "given"))
    assert m.y.shape[1] == m.found.virtual <= coils and m.A.range_shape == tuple(m.y.shape[1:])
    x = conjugate_gradient(lambda v: m.A.normal(v) + 1e-3 * v, m.A.H(m.y), iterations=30)
    if coils > 1:
        assert torch.quantile(x.abs().flatten(), 0.99).item() == pytest.approx(1, abs=0.15)
    assert m.noise_std == m.scale and "virtual" in str(m.found)


def test_the_noise_of_the_measurement_is_what_it_states():
    kspace, *_ = simulate((128, 120), noise=0.004)
    clean = fft(birdcage_maps((128, 120), 6) * head((128, 120)))
    mask = cartesian_mask((128, 120), 2, "random", acs=24).mask
    m = prepare_kspace(kspace, mask)
    residual = (m.y - m.raw_to_data(clean) * mask)[..., mask[0] > 0]
    assert residual.abs().square().mean().div(2).sqrt().item() == pytest.approx(m.noise_std, rel=0.1)


def test_slices_of_a_volume_have_maps_of_their_own_and_share_units():
    parts = [simulate(seed=s, image=(1 - 0.3 * s) * head(shift=(0.1 * s, 0)))[0] for s in range(2)]
    kspace = torch.stack(parts)
    masks = torch.stack([cartesian_mask((64, 56), 2, "random", acs=16, seed=s).mask for s in range(2)])[:, None]
    m = prepare_kspace(kspace, masks)
    assert len(m) == 2 and m.A.batch_shape == (2,) and m.maps.shape[:2] == (2, 1)
    for i in range(2):
        one = m.one(i)
        assert torch.allclose(one.A.H(one.y)[0], m.A.H(m.y)[i], atol=1e-6)
        assert one.A(draw(3, 1, 64, 56)).shape == (3, *m.y.shape[1:])
    dark, bright = (m.one(i).A.H(m.one(i).y).abs().quantile(0.9) for i in (1, 0))
    assert 0.5 < dark / bright < 0.9


def test_partial_fourier_is_a_mask_with_a_missing_part():
    kspace, sigma, *_ = simulate()
    kspace[..., :18] = 0
    m = prepare_kspace(kspace, noise=Noise(sigma, 1, "given"))
    assert m.found.measured == pytest.approx(38 / 56, abs=1e-3)
    assert m.found.centre[1][0] >= 18 and (m.A.mask.mask[..., :18] == 0).all()


def test_oversampling_of_a_fully_sampled_axis_goes_and_its_noise_stays():
    kspace, sigma, *_ = simulate((128, 56), noise=0.004)
    mask = cartesian_mask((128, 56), 2, acs=16).mask[None, None]
    cut, small = remove_oversampling(kspace[None] * mask, mask, (2, 1))
    assert cut.shape == (1, 6, 64, 56) and small.shape == (1, 1, 64, 56)
    whole, part = ifft(kspace * mask[0]), ifft(cut[0])
    assert torch.allclose(part, whole[:, 32:96] * 1.0, atol=1e-5)
    noise = noise_of_scan(remove_oversampling(coloured(sigma, 128, 56)[None], torch.ones(1, 1, 128, 56), (2, 1))[0][0])
    assert torch.allclose(noise.std, sigma.diagonal().real.sqrt(), rtol=0.05)
    with pytest.raises(ValueError, match="not fully sampled"):
        remove_oversampling(kspace[None] * mask, mask, (1, 2))


def test_a_volume_with_a_full_readout_becomes_slices_with_two_phase_encodes():
    kspace, sigma, maps, image = simulate((16, 20, 18), 4, noise=1e-6)
    slices = hybrid_slices(kspace)
    assert torch.allclose(ifft(slices), (maps * image).movedim(1, 0), atol=1e-4)


def test_given_maps_and_calibration_scans_are_used():
    kspace, sigma, maps, image = simulate(noise=1e-4)
    eye = Noise(sigma, 1, "given")
    mask = cartesian_mask((64, 56), 2).mask
    m = prepare_kspace(kspace, mask, noise=eye, maps=maps, coils=6)
    x = conjugate_gradient(lambda v: m.A.normal(v), m.A.H(m.y), iterations=60)[0, 0] / m.scale
    assert ((x - image).norm() / image.norm()).item() < 0.05
    scan = prepare_kspace(kspace, mask, noise=eye, calibration=kspace[:, 22:42, 18:38], coils=6)
    assert scan.found.centre is None and scan.A.domain_shape == (1, 64, 56)


def test_what_it_will_cost_is_told_before():
    kspace, *_ = simulate()
    m = prepare_kspace(kspace, cartesian_mask((64, 56), 2, acs=16))
    cost = m.cost(lambda x, sigma: x, draws=2, evaluations=10)
    assert cost.seconds > 0 and cost.bytes > m.y.nbytes and "GiB" in str(cost)


def test_a_time_allows_so_many_evaluations(monkeypatch):
    from companion.acquisition import measurement

    monkeypatch.setattr(measurement, "_seconds", lambda f: 0.01)  # of A^H A, 30 times an evaluation, and of D
    kspace, *_ = simulate()
    m = prepare_kspace(kspace, cartesian_mask((64, 56), 2, acs=16))
    assert m.affordable(10, lambda x, sigma: x, draws=2) == int(10 / (0.31 * 1.5))
    assert m.affordable(10, lambda x, sigma: x, draws=2, extra=0) == int(10 / 0.31)
    assert m.affordable(1e4, lambda x, sigma: x, draws=2, most=60) == 60
    with pytest.raises(ValueError, match="2 draws of 8 evaluations take 4 s here"):
        m.affordable(3, lambda x, sigma: x, draws=2)


@pytest.mark.parametrize("bad", [torch.zeros(4, 8, 8), torch.zeros(8, 8, dtype=torch.complex64)])
def test_what_is_not_kspace_is_refused(bad):
    with pytest.raises(ValueError, match="complex"):
        prepare_kspace(bad)


@needs_real
def test_a_real_brain_slice_with_both_axes_as_phase_encodes():
    from companion.data.cfl import read_cfl

    kspace = read_cfl(REAL / "full", squeeze=True).permute(2, 0, 1)
    assert echo_of(kspace) == (116, 89)
    noise = noise_of_edges(kspace, echo=(116, 89))
    assert 0.9 < noise.std.min() < noise.std.max() < 1.6 and 0.2 < noise.correlation < 0.4
    m = prepare_kspace(kspace, cartesian_mask((230, 180), 4, "poisson_disc", acs=24))
    assert m.found.sets == 1 and m.found.folded < 0.01
    assert all(last - first == 24 for first, last in m.found.centre)


def test_a_raw_scan_brings_its_mask_noise_and_oversampling():
    kspace, sigma, *_ = simulate((128, 56), noise=0.002)
    mask = cartesian_mask((128, 56), 2, acs=16).mask
    scan = RawScan(
        (kspace * mask).expand(2, *kspace.shape),
        mask[None, None],
        noise=coloured(sigma, 5000),
        oversampling=(2.0, 1.5),
    )
    m = prepare_scan(scan)
    assert len(m) == 2 and m.y.shape[-2:] == (64, 56) and m.found.noise.source == "noise scan"
    assert len(prepare_scan(scan, slice(1, 2), sets=1, brightness=None)) == 1
