"""3D scans and guidance through a decoder: exact where an answer is known, with a tiny untrained prior elsewhere."""

from dataclasses import replace

import pytest
import torch
from test_latent3d_sample import SHAPE, tiny_prior

from companion.acquisition.mri import Scan
from companion.acquisition.volume import plane_mask
from companion.diffusion import latent_guidance
from companion.diffusion.covariance import Factor
from companion.diffusion.guidance import posterior_mean
from companion.evaluation import metrics
from companion.evaluation.known_people import unseen
from companion.evaluation.population import power_spectrum
from companion.operators.linear import adjoint_error
from companion.operators.real import RealImages
from companion.papers.latent3d import reconstruct as mri
from companion.reconstruction import latent

P = mri.ReconstructVolumes(
    data="data/none.h5",
    people=2,
    subjects=1,
    validation_subjects=2,
    coils=3,
    acceleration=3,
    acs=10,
    draws=2,
    evaluations=3,
    iterations=3,
    start_sigmas=(0.01, 5.0),
    device="cpu",
    autocast=None,
    sparse_iterations=20,
    voxels=None,
)


@pytest.fixture(scope="module")
def prior():
    return tiny_prior()


@pytest.fixture(scope="module")
def person():
    return unseen(tiny_prior(), P.data, "test", 1)[0]


class Itself:
    """A latent space that is image space."""

    def encode(self, x):
        return x

    decode = encode


@pytest.fixture(scope="module")
def gaussian():
    """Data of two coils, noisy volumes and their noise levels: for white volumes all is linear."""
    shape, generator = (4, 6, 6), torch.Generator().manual_seed(0)
    maps = torch.randn(2, *shape, generator=generator, dtype=torch.complex64)
    scan = Scan(torch.zeros(1, 2, *shape), maps, plane_mask(shape, 3, 2, seed=0), 0.1, real=True)
    scan = replace(scan, y=scan.A(torch.randn(1, 1, *shape, generator=generator)))
    x = torch.randn(3, 1, *shape, generator=generator)
    return scan, x, torch.tensor([0.1, 1.0, 10.0])


def white(z, sigma, cond=None):
    return z / (1 + sigma.reshape(-1, 1, 1, 1, 1) ** 2)


def test_real_volumes_have_the_right_adjoint(person):
    assert adjoint_error(RealImages((1, 4, 4, 4))) < 1e-6
    assert adjoint_error(P.acquire(person, 0).A) < 1e-5


def test_a_scan_is_the_truth_plus_noise_where_the_mask_says(person):
    scan = replace(P, maps="oracle").acquire(person, 0)
    assert (scan.y[..., scan.mask.mask == 0] == 0).all()
    residual = (scan.y - scan.A(scan.x))[..., scan.mask.mask == 1]
    assert torch.view_as_real(residual).std() == pytest.approx(P.noise_std, rel=0.02)
    assert torch.equal(scan.y, P.acquire(person, 0).y) and not torch.equal(scan.y, P.acquire(person, 1).y)


def test_readouts_are_as_few_as_asked_and_hold_the_centre():
    mask = plane_mask((4, 32, 30), 4, 8, seed=1)
    assert mask.acceleration == 4 == 32 * 30 / mask.mask[0].sum() and torch.equal(mask.mask[0], mask.mask[3])
    assert (mask.mask[:, 12:20, 11:19] == 1).all() and mask.mask[0, 8:24].sum() > 0.6 * mask.lines
    assert torch.equal(mask.mask, plane_mask((4, 32, 30), 4, 8, seed=1).mask)
    with pytest.raises(ValueError, match="lower acs"):
        plane_mask((4, 32, 32), 16, 12, seed=0)


def test_centre_maps_leave_a_real_image(person):
    known = replace(P, maps="oracle", noise_std=0).acquire(person, 0).maps
    found = replace(P, noise_std=0).acquire(person, 0).maps
    agreement = (found.conj() * known).sum(0)[person[0] > 0.5]
    assert agreement.real.mean() > 0.97 and agreement.angle().abs().mean() < 0.1
    assert found.abs().square().sum(0) == pytest.approx(torch.ones(SHAPE), abs=1e-4)


def test_errors_are_those_at_the_levels_and_constant_outside():
    table = torch.tensor([1.0, 4.0]).reshape(2, 1, 1, 1, 1)
    errors = latent_guidance.Errors(
        torch.tensor([0.1, 1.0]), table.expand(2, 1, 2, 2, 2), table.expand(2, 3, 1, 1, 1), 0.0
    )
    assert errors.latent_at(torch.tensor([1.0])).flatten().tolist() == pytest.approx([4.0] * 3)
    found = errors.at(torch.tensor([0.01, 0.1, 10**-0.5, 1.0, 50.0]))
    assert found[:, 0, 0, 0, 0] == pytest.approx(torch.tensor([1.0, 1, 2, 4, 4]))


@pytest.mark.parametrize("kind", [latent_guidance.projection, latent_guidance.gradient])
def test_guidance_is_exact_for_a_linear_decoder(gaussian, kind):
    """For white volumes of variance 1 the error is sigma^2 / (1 + sigma^2), and both rules give E[x0 | x, y]."""
    scan, x, sigma = gaussian
    variance = (sigma**2 / (1 + sigma**2)).reshape(-1, 1, 1, 1, 1).expand(3, 1, *x.shape[2:])
    errors = latent_guidance.Errors(sigma, variance, variance, 0.0)
    G = kind(scan.A, scan.y, 0.1, 60, space=Itself(), errors=errors)

    def belief(D, x, sigma, cond=None):
        return D(x, sigma), Factor.diagonal(errors.at(sigma))

    exact = posterior_mean(scan.A, scan.y, 0.1, belief, 60, 1e-6)(white)(x, sigma)
    found = G(white)(x, sigma)
    assert torch.allclose(found, exact, atol=3e-3) and (found - white(x, sigma)).abs().max() > 0.05


def test_products_with_the_derivative_of_a_decoder(prior):
    z, v = torch.randn(2, 1, *prior.latent_shape, generator=torch.Generator().manual_seed(0))
    x, forward, transposed = latent_guidance.linearised(prior.space.decode, z)
    step = 1e-2 * v
    assert torch.allclose(forward(step), prior.decode(z + step) - x, atol=0.05 * (prior.decode(z + step) - x).std())
    w = torch.randn_like(x)
    assert (forward(v) * w).sum().item() == pytest.approx((v * transposed(w)).sum().item(), rel=1e-3)


def test_data_pull_an_ignorant_prior_towards_the_truth(prior):
    (scan,), errors = mri.prepare(P, prior)
    (made,) = mri.study(P, prior, [scan], errors)
    psnr = {name: metrics.psnr(x, scan.x, 1.0).item() for name, x in made.images.items()}
    for name in P.methods:
        assert psnr[f"{name} + data"] > psnr[name] + 1
        assert made.draws[name].shape == (2, 1, *SHAPE)
    for name in ("L1 of wavelets", "total variation"):  # few readouts: what is sparse helps
        assert psnr[name] > psnr["zero-filled"]
    assert made.draws["trusted"].shape == (2, 1, *SHAPE)
    assert psnr["trusted"] > max(psnr["total variation"], psnr[f"{P.methods[0]} + data"]) - 0.5
    table = latent.score([made], [scan])
    assert [row["method"] for row in table] == list(made.images) and table[0]["n"] == 1
    assert made.calibration(scan.x)["projection"] > 0


def test_held_out_readouts_tell_a_prior_that_knows_nothing(prior):
    (scan,), errors = mri.prepare(P, prior)
    seen, held = latent.without_some(scan)
    assert held.any() and not held.all() and seen.y[..., held].abs().max() == 0 and seen.mask.mask[held].max() == 0
    middle = tuple(n // 2 for n in held.shape)
    assert not held[middle] and torch.equal(held[0], held[-1]), "whole readouts, none of the centre"
    assert torch.equal(seen.y[..., ~held], scan.y[..., ~held])
    found = latent.assess(prior, errors, scan, P.methods[0], P, P, P.seed)
    assert set(found.excess) == {"latent prior", "total variation", "both"}
    assert found.excess["both"] <= min(found.excess.values()) + 1e-5 and 0 <= found.share <= 1 <= found.widening
    assert latent.Verdict(0.2, 4.0, {"both": 0.5}).text.startswith("WARNING: the prior does not know this scan")
    good = latent.Verdict(0.8, 4.0, {"both": 0.5})
    assert "80% of the image; error bars widened by 2.00" in good.text
    draws, other = torch.randn(3, 1, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1, *SHAPE)
    image, wide = good.apply(draws, other)
    assert torch.allclose(wide.mean(0, keepdim=True), image, atol=1e-5) and image.shape == other.shape
    assert torch.allclose(wide.var(0), 4 * draws.var(0), rtol=1e-3)
    assert torch.allclose(image, 0.8 * draws.mean(0, keepdim=True) + 0.2, atol=1e-5)


def test_rings_weigh_what_was_held_out_by_what_is_missing():
    plane = torch.zeros(16, 16, dtype=torch.bool)
    held, missing = plane.clone(), ~plane
    held[8, 9:], held[4, ::2] = True, True
    missing[6:11, 6:11] = False
    group, weight = latent.rings(missing.expand(3, -1, -1), held.expand(3, -1, -1))
    assert weight[:, held].mean().item() == pytest.approx(1) and weight[:, ~held].abs().max() == 0
    near, far = (weight[group == ring].max() for ring in (0, group.max()))
    assert near < far, "all about the middle was measured"


def test_little_noise_brings_the_same_code_back(prior, person):
    z = prior.encode(person[None])
    made = latent.drawn_anew(prior, z, P.start_sigmas, P.evaluations)
    near, far = ((made[f"sigma {s:g}"] - made["code"]).norm() for s in P.start_sigmas)
    assert near < 0.2 * far


def test_power_of_white_noise_is_flat():
    frequency, power = power_spectrum(torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0)), 6)
    assert power[1:] == pytest.approx([1.0] * 5, abs=0.1) and frequency[-1] < 0.5
