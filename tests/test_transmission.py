"""Filtered back projection and Poisson transmission: right, monotone and calibrated, on virtual and measured scans."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.transform import iradon, radon

from companion.data.sinograms import read_sinograms
from companion.data.thorax import thorax
from companion.operators.counts import poisson_counts
from companion.operators.pet import ParallelBeam, Projector, attenuation_factors
from companion.papers.pet import transmission as pet
from companion.reconstruction import transmission
from companion.reconstruction.fbp import FILTERS, emission_integrals, fbp, transmission_integrals
from companion.reconstruction.transmission import (
    expected_transmission,
    laplace_draws,
    map_transmission,
    surrogate_curvature,
)

MEASURED = Path(__file__).parents[2] / "shared/real/pet"
SIZE, PIXEL = 48, 9.0
SKEW = ParallelBeam((SIZE, SIZE), np.deg2rad(15 - np.arange(72) * 2.5).tolist(), 80, PIXEL, 6.75, 0.5, 412.5)


@pytest.fixture(scope="module")
def body():
    """The virtual thorax, its projector in a skew geometry, a blank scan, a background, and counts."""
    truth, P = thorax(SIZE, PIXEL), Projector(SKEW)
    blank = torch.full((1, *P.range_shape), 200.0)
    background = torch.full_like(blank, 2.0)
    y = poisson_counts(expected_transmission(P, truth.mu, blank, background), [0])
    return truth, P, blank, background, y


# --- filtered back projection


@pytest.mark.parametrize("beam", [ParallelBeam((64, 64), 120, 90), SKEW], ids=["plain", "off, ring, backwards"])
def test_fbp_has_the_right_level_and_place(beam):
    """A smooth blob off the middle comes back where it was and as high."""
    axis = (torch.arange(beam.shape[0]) - (beam.shape[0] - 1) / 2) / beam.shape[0]
    blob = torch.exp(-((axis[:, None] - 0.1) ** 2 + (axis + 0.15) ** 2) / 0.01)[None, None]
    back = fbp(Projector(beam)(blob), beam)
    assert (back - blob).abs().max() < 0.02
    assert torch.equal(back.argmax(), blob.argmax())
    assert torch.allclose(fbp(Projector(beam)(blob.repeat(2, 1, 1, 1)), beam)[1], back[0], atol=1e-6)


@pytest.mark.parametrize(("window", "name"), [(w, w) for w in FILTERS])
def test_fbp_agrees_with_scikit_image(window, name):
    """On its sinogram, with its filter of the same name; inside, and to the accuracy of its interpolation."""
    n, angles = 64, np.arange(0, 180, 2.0)
    image = np.zeros((n, n))
    image[20:40, 25:50] = 1.0
    sinogram = radon(image, angles, circle=True)
    beam = ParallelBeam((n, n), np.deg2rad(angles).tolist(), n, bin_offset=0.5)  # its axis is at bin n / 2
    ours = fbp(torch.from_numpy(sinogram.T.copy())[None, None], beam, window)[0, 0].numpy()
    theirs = iradon(sinogram, angles, filter_name=name, circle=True)
    error = np.abs(ours[12:52, 12:52] - _half_pixel(theirs)[12:52, 12:52])
    assert error.mean() < 0.03 and ours[28:34, 32:44].mean() == pytest.approx(1, abs=0.03)


def _half_pixel(image: np.ndarray) -> np.ndarray:
    """Its origin is the centre of pixel n / 2, ours the centre of the image: half a pixel up and left."""
    from scipy.ndimage import shift

    return shift(image, (-0.5, -0.5), order=1)


def test_dead_bins_are_interpolated_and_few_counts_have_a_floor():
    y, blank = torch.full((1, 1, 2, 5), 10.0), torch.full((1, 1, 2, 5), 100.0)
    blank[..., 2] = 0
    y[..., 3] = 0
    p = transmission_integrals(y, blank)
    assert p[0, 0, 0, 0] == pytest.approx(np.log(10)) and p[0, 0, 0, 3] == pytest.approx(np.log(200))
    assert p[0, 0, 0, 2] == pytest.approx((np.log(10) + np.log(200)) / 2)
    factors = torch.tensor([2.0, 2.0, 0.0, 2.0, 2.0])
    assert emission_integrals(y, factors, torch.ones_like(y))[0, 0, 0].tolist() == [4.5, 4.5, 2.0, -0.5, 4.5]


def test_fbp_errors():
    with pytest.raises(ValueError, match="use one of ramp"):
        fbp(torch.zeros(1, 1, 8, 4), ParallelBeam((4, 4)), "box")
    with pytest.raises(ValueError, match="cutoff"):
        fbp(torch.zeros(1, 1, 8, 4), ParallelBeam((4, 4)), "hann", 2.0)
    with pytest.raises(ValueError, match="8 angles x 4 bins"):
        fbp(torch.zeros(1, 1, 4, 8), ParallelBeam((4, 4)))


# --- likelihood and prior


@pytest.mark.parametrize("r", [0.0, 3.0])
def test_the_surrogate_touches_and_lies_below(r):
    """A parabola of the stated curvature through f(l), f'(l) is never below the cost for line integrals from 0 to 8."""
    b, y = torch.tensor(50.0), torch.tensor([0.0, 1.0, 7.0, 49.0, 80.0])[:, None, None]
    at, other = torch.linspace(0.05, 6, 30)[:, None], torch.linspace(0, 8, 200)
    shape = torch.broadcast_shapes(y.shape, at.shape)
    curvature = surrogate_curvature(y.expand(shape), at.expand(shape), b.expand(shape), torch.full(shape, r)).double()

    def cost(lengths):
        through = b * (-lengths.double()).exp() + r
        return through - torch.xlogy(y.double(), through)

    through = b * (-at.double()).exp()
    slope = through * (y / (through + r) - 1)
    step = other.double() - at
    parabola = cost(at) + slope * step + curvature / 2 * step**2
    assert (parabola - cost(other) > -1e-3).all()


@pytest.mark.parametrize("strength", [0.0, 0.02])
def test_the_objective_never_falls(body, strength):
    _, P, blank, background, y = body
    values = []

    def keep(_, mu):
        expected = expected_transmission(P, mu, blank, background)
        fit = (torch.xlogy(y, expected) - expected).double().sum()
        from companion.reconstruction.pet import relative_difference

        values.append((fit - strength * P.H(y).mean() * relative_difference(mu)[0]).item())

    found = map_transmission(y, P, blank, background, strength=strength, iterations=25, tol=0, callback=keep)
    assert (np.diff(values) > -1e-4 * abs(values[-1]) * 1e-4).all() and found.iterations.item() == 25
    assert (found.x >= 0).all()


def test_water_is_right_where_the_logarithm_is_not(body):
    """Few counts: the likelihood keeps the level of water; the logarithm of noisy counts does not."""
    truth, P, blank, background, _ = body
    low, r = blank / 8, background / 8
    y = poisson_counts(expected_transmission(P, truth.mu, low, r).repeat(4, 1, 1, 1), range(4))
    found = map_transmission(y, P, low.expand_as(y), r.expand_as(y), strength=0.01, iterations=60).x
    level = found[truth.water.expand_as(found)].mean() / 0.0096
    assert level.item() == pytest.approx(1, abs=0.02)
    factors = attenuation_factors(P, found[:1])
    exact = attenuation_factors(P, truth.mu)
    assert (factors / exact).log().abs().mean() < 0.1


def test_an_item_is_what_it_is_alone(body):
    truth, P, blank, background, y = body
    other = poisson_counts(expected_transmission(P, 0.5 * truth.mu, blank, background), [1])
    both = map_transmission(
        torch.cat([y, other]), P, blank, background.expand(2, -1, -1, -1), strength=0.02, iterations=8
    )
    alone = map_transmission(y, P, blank, background, strength=0.02, iterations=8)
    assert torch.allclose(both.x[:1], alone.x, atol=2e-6)


def test_draws_have_the_covariance_of_their_precision():
    """4 x 4 pixels: mean and covariance of the draws against the inverse of the precision, written out."""
    beam = ParallelBeam((4, 4), 12, 6, pixel_mm=20.0)
    P = Projector(beam)
    mu = 0.005 + 0.004 * torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    blank = torch.full((1, *P.range_shape), 300.0)
    y = poisson_counts(expected_transmission(P, mu, blank), [0])
    draws = laplace_draws(mu, y, P, blank, strength=0.05, seeds=range(1500)).flatten(1).double()
    columns = torch.stack([P(e.reshape(1, 1, 4, 4)).flatten() for e in torch.eye(16)], 1).double()
    precision = columns.T @ ((blank * (-P(mu)).exp()).flatten()[:, None].double() * columns)
    weight, tiny = 0.05 * P.H(y).mean().double(), 1e-2 * mu.mean()
    flat = mu.flatten().double()
    for i in range(16):
        for j in range(i):
            dy, dx = i // 4 - j // 4, i % 4 - j % 4
            if max(abs(dy), abs(dx)) == 1:
                a, b = flat[i], flat[j]
                pull = (
                    weight
                    * 2
                    / (dy * dy + dx * dx) ** 0.5
                    * (a + b + tiny) ** 2
                    / (a + b + 2 * (a - b).abs() + tiny) ** 3
                )
                precision[i, i] += pull
                precision[j, j] += pull
                precision[i, j] -= pull
                precision[j, i] -= pull
    covariance = torch.linalg.inv(precision)
    assert torch.allclose(draws.var(0) / covariance.diagonal(), torch.ones(16).double(), atol=0.15)
    assert ((draws.mean(0) - flat).abs() < 5 * (covariance.diagonal() / 1500).sqrt()).all()
    correlated = torch.corrcoef(draws.T) - covariance / torch.outer(*[covariance.diagonal().sqrt()] * 2)
    assert correlated.abs().max() < 0.12


def test_errors_of_transmission(body):
    _, P, blank, background, y = body
    for call, message in (
        (lambda: map_transmission(y, P, -blank), "must not be negative"),
        (lambda: map_transmission(y, P, 0 * blank), "where blank and background are 0"),
        (lambda: map_transmission(y[..., 1:], P, blank), "geometry measures"),
        (lambda: map_transmission(y, P, blank, strength=-1.0), "strength"),
        (lambda: map_transmission(y - 1000, P, blank), "counts must not be negative"),
        (lambda: laplace_draws(y.new_zeros(2, 1, 4, 4), y, P, blank, strength=1.0, seeds=[0]), "one slice"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# --- the notebook's parts, and a measured scan


def test_the_virtual_scan_reconstructs_and_its_map_serves_an_emission_scan():
    p = pet.Transmission(image_size=48, pixel_mm=9.0, angles=64, bins=60, bin_mm=9.0, background=0.5, device="cpu")
    scan = pet.prepare(p)
    found = map_transmission(
        scan.y, scan.P, scan.blank, scan.background, strength=0.01, x0=scan.fbp("hann", 0.6), iterations=40
    )
    line = transmission.transmission_table(scan, {"MAP": found.x}, scan.truth.water)[0]
    assert abs(line["off 0.096 (%)"]) < 3 and line["deviance / expected"] == pytest.approx(1, abs=0.15)
    lines = transmission.emission_table(scan, {"truth": scan.truth.mu, "MAP": found.x, "none": None}, 1e6)
    heart = {one["attenuation from"]: one["heart (%)"] for one in lines}
    assert abs(heart["truth"]) < 3 and abs(heart["MAP"]) < 10 and heart["none"] < -30
    with pytest.raises(ValueError, match="virtual thorax"):
        transmission.emission_table(replace(scan, truth=None), {"none": None}, 1e6)


@pytest.mark.skipif(not MEASURED.is_dir(), reason="the measured ECAT scan is not beside this checkout")
def test_the_measured_ecat_scan(tmp_path):
    for name in ("phan_blank.raw", "phan_trans.raw"):
        (tmp_path / name).symlink_to(MEASURED / name)
    arrays = {"counts": {"file": "phan_trans.raw", "dtype": ">i2"}, "blank": {"file": "phan_blank.raw", "dtype": ">f4"}}
    about = {"format": "companion-pet-scan-1", "geometry": vars(transmission.ECAT), "arrays": arrays}
    (tmp_path / "ecat.json").write_text(json.dumps(about))
    assert read_sinograms(tmp_path / "ecat.json").arrays["counts"].sum() == 920653
    p = pet.Transmission(scan=str(tmp_path / "ecat.json"), image_size=64, pixel_mm=8.4375, device="cpu")
    scan = pet.prepare(p)
    first = scan.fbp("hann", 0.6)
    found = map_transmission(scan.y, scan.P, scan.blank, strength=0.01, x0=first, iterations=60).x
    line = transmission.transmission_table(scan, {"MAP": found}, transmission.water_of(found, 8.4375))[0]
    assert line["deviance / expected"] == pytest.approx(1, abs=0.05)
    assert abs(line["off 0.096 (%)"]) < 5
    lungs = found[0, 0, 24:40, 20:26]
    assert lungs.mean() < 0.005  # the couch lies below, the lungs on both sides
    assert found[0, 0, 44:52].max() > 0.0005
