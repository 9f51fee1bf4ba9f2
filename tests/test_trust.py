"""How far a prior is trusted: splitting, scoring and choosing, against laws known exactly."""

import dataclasses
import json

import pytest
import torch

from companion.diffusion.exact import FourierBasis, GaussianDenoiser
from companion.diffusion.gibbs import annealed_gibbs
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.noise import karras
from companion.diffusion.recalibration import ErrorModel
from companion.diffusion.sampling import Bill, Samples
from companion.operators.linear import Identity
from companion.operators.masks import cartesian_mask
from companion.operators.mri import Fourier, birdcage_maps, fft, sense
from companion.operators.noncartesian import GOLDEN, noncartesian_sense, radial_trajectory
from companion.randomness import randn
from companion.reconstruction import held_out, regularised, trust

SIZE, COILS, NOISE = 16, 4, 0.05
LEVELS = (0.1, 5.0)


def smooth_prior(mean: float = 0.0, size: int = SIZE) -> GaussianDenoiser:
    """Stationary texture of standard deviation 0.3 per component, smooth as images are, about a constant."""
    k = torch.fft.fftfreq(size, dtype=torch.float64) * size
    spectrum = (1 + (k[:, None] ** 2 + k**2) / 4) ** -1.5
    variances = (0.3**2 * spectrum / spectrum.mean())[None]
    return GaussianDenoiser(torch.full((1, size, size), mean, dtype=torch.complex64), variances, FourierBasis(2))


def scan(x: torch.Tensor, acceleration: float = 3, acs: int = 4, seed: int = 0):
    A = sense(birdcage_maps(x.shape[-2:], COILS), cartesian_mask(x.shape[-1], acceleration, acs=acs, seed=seed))
    noise = randn((len(x), *A.range_shape), x.dtype, torch.Generator().manual_seed(seed + 1))
    return A, A(x) + NOISE * A.mask(noise)


def error_of(D: GaussianDenoiser) -> ErrorModel:
    images = D.draw(16, torch.Generator().manual_seed(9), torch.complex64)
    return ErrorModel.fit(D, images, torch.logspace(-2, 1.3, 8), bins=2)


@pytest.mark.parametrize("kind, mask_shape", [("equispaced", SIZE), ("poisson_disc", (SIZE, SIZE))])
def test_the_two_parts_are_the_scan_and_the_centre_stays(kind, mask_shape):
    mask = cartesian_mask(mask_shape, 3, kind, acs=4)
    A = sense(birdcage_maps((SIZE, SIZE), COILS), mask)
    y = A.mask(randn((1, *A.range_shape), torch.complex64, torch.Generator().manual_seed(0)))
    split = held_out.hold_out(A, y, acs=4, share=0.2, seed=1)
    assert torch.equal(split.y + split.held_y, y)
    assert not (split.A.mask.mask.bool() & split.held).any(), "no sample is both seen and held out"
    assert torch.equal(split.A.mask.mask.bool() | split.held, mask.mask.bool().expand(SIZE, SIZE))
    middle = slice(SIZE // 2 - 2, SIZE // 2 + 2)
    assert not split.held[:, middle].any() if kind == "equispaced" else not split.held[middle, middle].any()
    assert abs(split.held.sum() / mask.mask.expand(SIZE, SIZE).sum() - 0.2) < 0.06
    other = held_out.hold_out(A, y, acs=4, share=0.2, seed=2)
    assert not torch.equal(other.held, split.held)
    assert torch.equal(held_out.hold_out(A, y, acs=4, share=0.2, seed=1).held, split.held)


def test_samples_off_the_grid_fall_in_two_scans():
    pytest.importorskip("finufft")
    k = radial_trajectory(torch.arange(9) * GOLDEN, 2 * SIZE, SIZE).flatten(0, 1)
    A = noncartesian_sense(birdcage_maps((SIZE, SIZE), COILS), k)
    x = randn((1, *A.domain_shape), torch.complex64, torch.Generator().manual_seed(0))
    y = A(x)
    split = held_out.hold_out(A, y, acs=4, share=0.2, seed=1)
    assert split.y.shape[-1] + split.held_y.shape[-1] == len(k) and len(split.held) == round(0.2 * len(k))
    assert torch.allclose(split.A(x), split.y, atol=1e-4) and torch.allclose(split.held_A(x), split.held_y, atol=1e-4)
    assert split.held_A.outer.trajectory.norm(dim=-1).min() > 2, "the centre, from which maps come, is seen"
    radius = split.held_A.outer.trajectory.norm(dim=-1)
    assert radius[split.group == 0].max() <= radius[split.group == held_out.BANDS - 1].min()
    samples = Samples(x + 0.1 * randn((3, *x.shape[1:]), x.dtype, torch.Generator().manual_seed(2)), None, None, None)
    score = held_out.predictive_score(split, samples, NOISE)
    assert score.chi2 < 2 and score.spread > 0


def test_a_scan_of_nothing_but_its_centre_cannot_be_split():
    A = sense(birdcage_maps((8, 8), 2), torch.tensor([0.0, 0, 1, 1, 1, 1, 0, 0]))
    with pytest.raises(ValueError, match="nothing can be held out"):
        held_out.hold_out(A, A.mask(torch.ones(1, 2, 8, 8, dtype=torch.complex64)), acs=4)
    with pytest.raises(ValueError, match="2 slices"):
        held_out.hold_out(A, torch.ones(2, 2, 8, 8, dtype=torch.complex64), acs=4)


def test_any_operator_can_be_split():
    """A composition, whose normal operator knows no mask, gives what SENSE gives."""
    A = sense(birdcage_maps((SIZE, SIZE), COILS), torch.ones(SIZE))
    x = randn((1, 1, SIZE, SIZE), torch.complex64, torch.Generator().manual_seed(0))
    y = A(x)
    ours, theirs = held_out.hold_out(Identity(A.range_shape) @ A, y, seed=3), held_out.hold_out(2.0 * A, 2 * y, seed=3)
    assert torch.equal(ours.held, theirs.held) and torch.allclose(theirs.A(x), 2 * ours.A(x), atol=1e-5)
    assert torch.allclose(theirs.A.normal(x), 4 * ours.A.normal(x), atol=1e-4)
    assert torch.allclose(ours.A(x), ours.y, atol=1e-5) and torch.allclose(ours.held_A(x), ours.held_y, atol=1e-5)


def test_the_right_law_has_chi_square_1_and_the_best_log_score():
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(20000, generator=generator) + 0.1
    residual = ((spread + 0.2) / 2).sqrt() * randn((20000,), torch.complex64, generator)
    scores = {f: held_out.gaussian_score(residual, f * spread, 0.2) for f in (0.25, 0.5, 1, 2, 4)}
    assert abs(scores[1].chi2 - 1) < 0.03 and abs(scores[1].widening - 1) < 0.05
    assert scores[0.25].chi2 > 1.5 and scores[4].chi2 < 0.6
    assert max(scores, key=lambda f: scores[f].log_score) == 1
    assert abs(scores[0.25].widening - 4) < 0.3


def test_draws_of_the_exact_posterior_predict_what_was_held_out():
    """Chi-square of few draws is 1 on average over scans, by the terms for the mean of few and its noise."""
    D = smooth_prior()
    error, chi2 = error_of(D), []
    for seed in range(10):
        x = D.draw(1, torch.Generator().manual_seed(seed), torch.complex64)
        A, y = scan(x, seed=seed)
        split = held_out.hold_out(A, y, acs=4, share=0.25, seed=seed)
        G = posterior_mean(split.A, split.y, NOISE, error, iterations=40)
        samples = annealed_gibbs(D, G, karras(5, *LEVELS), seeds=range(4))
        chi2.append(held_out.predictive_score(split, samples, NOISE).chi2)
    assert abs(sum(chi2) / len(chi2) - 1) < 0.12


def test_the_scale_of_the_error_is_found():
    """Of two error models the right one is taken; one that is ten times too small in variance is scaled up."""
    D = smooth_prior()
    right, chosen = error_of(D), []
    for seed in range(3):
        x = D.draw(1, torch.Generator().manual_seed(100 + seed), torch.complex64)
        A, y = scan(x, seed=seed)
        split = held_out.hold_out(A, y, acs=4, share=0.25, seed=seed)
        found = trust.assess(D, split, NOISE, {"wide": right.times(8), "right": right}, levels=LEVELS)
        chosen.append(found.chosen.name)
        assert found.bill.denoiser_calls <= 60
    assert chosen == ["right"] * 3
    found = trust.assess(D, split, NOISE, {"small": right.times(0.1)}, levels=LEVELS)
    assert found.chosen.scale > 1 and [c.scale for c in found.tried][:2] == [1, 2]


def test_the_mixture_with_a_classical_image_is_the_best_one():
    D = smooth_prior()
    x = D.draw(1, torch.Generator().manual_seed(3), torch.complex64)
    A, y = scan(x)
    split = held_out.hold_out(A, y, acs=4, share=0.25)
    off = D.draw(1, torch.Generator().manual_seed(4), torch.complex64)
    assert held_out.best_share(split, x, x + off) > 0.85
    assert held_out.best_share(split, x + off, x) < 0.15
    assert abs(held_out.best_share(split, x + off, x - off) - 0.5) < 0.1
    assert held_out.best_share(split, x, x) == 1


@pytest.mark.parametrize(("bias", "scatter"), [(0.1, 0.0), (0.3, 0.0), (0.1, 0.5), (0.0, 0.4)])
def test_what_held_out_samples_say_is_right_where_nothing_was_measured(bias, scatter):
    """Means that err by as much everywhere; a classical image that knows nothing of what was not measured."""
    g = torch.Generator().manual_seed(6)
    D = smooth_prior()
    x = D.draw(1, g, torch.complex64)
    A, y = scan(x)
    split = held_out.hold_out(A, y, acs=4, share=0.25)
    noise = [randn((n, *x.shape[1:]), x.dtype, g) for n in (1, 4)]
    means = x + bias * noise[0] + scatter * noise[1]
    classical = regularised.cg(A, y, 1e-3)
    of_part = regularised.cg(split.A, split.y, 1e-3)
    share, found = held_out.share_and_bias(split, means, of_part, len(means))
    assert share == held_out.best_share(split, means, of_part, len(means))
    beyond = held_out.share_beyond(A, means, classical, share, found)
    open_places = A.mask.mask == 0
    d, e = (fft(A.coils.forward(v)) * open_places for v in (means.mean(0, keepdim=True) - classical, x - classical))
    best = (d.conj() * e).real.sum() / d.abs().square().sum()
    assert share <= beyond and abs(beyond - best.clamp(max=1)) < 0.1
    one = held_out.share_beyond(A, means[:1], classical, share, found)
    assert one == share == held_out.share_beyond(Fourier((1, *x.shape[2:])), means, classical, share, found)
    pair = held_out.share_beyond(A, means.mean(0, keepdim=True), classical, share, found, settled=True)
    assert pair >= beyond, "a mean that is known well does not scatter"


def test_where_hardly_anything_is_missing_the_share_is_that_of_the_measured_samples():
    g = torch.Generator().manual_seed(6)
    x, other = (smooth_prior().draw(1, g, torch.complex64) for _ in range(2))
    means = x + 0.1 * randn((4, *x.shape[1:]), x.dtype, g)
    whole = torch.ones(SIZE, SIZE)
    most = whole.clone()
    most[0, 0] = 0
    for mask, off in ((whole, 1e-6), (most, 0.01)):
        A = sense(birdcage_maps((SIZE, SIZE), COILS), mask)
        assert held_out.share_beyond(A, means, other, 0.3, 0.01) == pytest.approx(0.3, abs=off)


def test_the_image_of_a_scan_leans_less_on_a_classical_one_than_its_measured_samples_ask():
    D = smooth_prior()
    x = D.draw(1, torch.Generator().manual_seed(5), torch.complex64)
    A, y = scan(x)
    how = dict(acs=4, seeds=range(4), evaluations=16, levels=LEVELS, classical=lambda A, y: regularised.cg(A, y, 0.01))
    result, found = trust.reconstruct(D, A, y, NOISE, {"its own": error_of(D)}, **how)
    assert found.bias is not None and found.held_share <= found.share <= 1
    again, same = trust.reconstruct(D, A, y, NOISE, {}, trust=found, **how)
    assert same.share == found.share and torch.equal(again.mean, result.mean)
    told = {"its own": dataclasses.replace(error_of(D), widening=1.2), "another": error_of(D).times(8)}
    _, stated = trust.reconstruct(D, A, y, NOISE, told, **how)
    assert stated.chosen == found.chosen and stated.widening == pytest.approx(found.widening * 1.2 / trust.WARM_LOSS)
    whole = trust.assess(D, held_out.hold_out(A, y, 4), NOISE, {"its own": error_of(D)}, levels=LEVELS, beside=False)
    assert whole.bias is None and whole.of(A, result, x) is whole


def test_two_classical_methods_are_mixed_and_one_that_is_no_use_is_not_asked():
    D = smooth_prior()
    x = D.draw(1, torch.Generator().manual_seed(3), torch.complex64)
    A, y = scan(x)
    split = held_out.hold_out(A, y, acs=4, share=0.25)
    off = D.draw(1, torch.Generator().manual_seed(4), torch.complex64)
    both = held_out.Blend.of(split, lambda A, y: x + off, lambda A, y: x - off)
    assert abs(both.share - 0.5) < 0.1 and (both(A, y) - x).norm() < 0.2 * off.norm()
    asked = []

    def useless(A, y):
        asked.append(len(y))
        return x + 100 * off

    first, second = (held_out.Blend.of(split, *pair) for pair in ((lambda A, y: x, useless), (useless, lambda A, y: x)))
    assert first.share > 0.99 and second.share < 0.01 and asked == [1, 1]
    for one in (held_out.Blend(lambda A, y: x, useless, 1.0), held_out.Blend(useless, lambda A, y: x, 0.0)):
        assert torch.equal(one(A, y), x)
    assert asked == [1, 1]


def test_a_prior_of_something_else_is_found_out_and_the_classical_image_taken():
    """The scan is a texture about 0; the prior expects one about 3."""
    D, wrong = smooth_prior(), smooth_prior(mean=3.0)
    x = D.draw(1, torch.Generator().manual_seed(5), torch.complex64)
    A, y = scan(x)
    errors = {"its own people": error_of(wrong)}
    options = dict(acs=4, seeds=range(4), evaluations=8, levels=LEVELS, classical=lambda A, y: x)
    result, found = trust.reconstruct(wrong, A, y, NOISE, errors, **options, extra=1.0)
    assert found.held_share == 0 and found.share < 0.5 and found.widening >= 1
    split = held_out.hold_out(A, y, acs=4)
    judged = trust.assess(wrong, split, NOISE, errors, levels=LEVELS, classical=lambda A, y: x, beside=False)
    assert not judged.knows and not judged.helps and "classical reconstruction preferred" in judged.verdict
    assert torch.allclose(result.mean, x, atol=0.5 * (x - 3).abs().max())
    right, known = trust.reconstruct(D, A, y, NOISE, {"its own": error_of(D)}, **options | {"classical": None})
    assert known.knows and known.share == 1 and known.verdict.startswith("the prior knows this scan")
    assert right.mean.shape == (1, *right.x.shape[1:])


@pytest.mark.parametrize(
    "chi2, share, says",
    [
        (0.9, 0.8, "the prior knows this scan: held-out chi-square 0.90, at most {}"),
        (0.9, 0.1, "the prior helps little with this scan: held-out chi-square 0.90, at most {}"),
        (3.0, 0.8, "the prior does not know this scan, yet helps: held-out chi-square 3.00, above {}"),
        (3.0, 0.1, "the prior does not know this scan: held-out chi-square 3.00, above {}"),
    ],
)  # fmt: skip
def test_the_verdict_says_what_was_found_and_against_which_threshold(chi2, share, says):
    one = trust.Candidate("people", 1.0, held_out.Score(0.0, chi2, 1.0, 1.0))
    found = trust.Trust(error_of(smooth_prior()), share, 1.0, one, (one,), 1.0, Bill(0, 0, 0.0))
    assert found.verdict.startswith(says.format(f"{trust.KNOWN:g}"))
    assert (found.fits, found.helps, found.knows) == (chi2 < 2, share > 0.5, chi2 < 2 and share > 0.5)
    alone = dataclasses.replace(found, share=1.0, classical=None)
    assert alone.helps and "yet" not in alone.verdict and "classical" not in alone.verdict


def test_a_trial_costs_at_most_half_of_the_draws_and_serves_a_volume():
    D, calls = smooth_prior(), []

    class Counting:
        def moments(self, x, sigma, cond=None):
            calls.append(len(x))
            return D.moments(x, sigma)

        def __call__(self, x, sigma, cond=None):
            return D(x, sigma)

    x = D.draw(1, torch.Generator().manual_seed(6), torch.complex64)
    A, y = scan(x)
    error = error_of(D)
    errors = {"a": error.times(0.1), "b": error.times(0.2), "c": error.times(0.3)}
    options = dict(acs=4, seeds=range(4), evaluations=20, levels=LEVELS)
    _, found = trust.reconstruct(Counting(), A, y, NOISE, errors, **options)
    assert found.bill.denoiser_calls == sum(calls) - 80 <= 40
    calls.clear()
    _, again = trust.reconstruct(Counting(), A, y, NOISE, errors, **options, trust=found)
    assert again is found and sum(calls) == 80, "the next slice needs no trial"
    with pytest.raises(ValueError, match="too few"):
        trust.reconstruct(D, A, y, NOISE, errors, **options | {"seeds": [0], "evaluations": 5})


def test_error_bars_are_widened_about_the_image():
    x = randn((4, 1, 5, 5), torch.complex64, torch.Generator().manual_seed(0))
    score = held_out.Score(0.0, 3.0, 4.0, 1.0)
    one = trust.Candidate("people", 1.0, score)
    found = trust.Trust(error_of(smooth_prior()), 0.25, 4.0, one, (one,), 1.0, Bill(0, 0, 0.0))
    classical = torch.ones(1, 1, 5, 5, dtype=torch.complex64)
    result = found.apply(Samples(x, Bill(1, 1, 0.0), mean=x / 2), classical)
    assert torch.allclose(result.mean, 0.25 * x.mean(0, keepdim=True) / 2 + 0.75 * classical, atol=1e-6)
    assert torch.allclose(result.x.mean(0, keepdim=True), result.mean, atol=1e-6)
    assert torch.allclose(result.x.var(0), 4 * x.var(0), rtol=1e-4)


def test_an_error_model_survives_storage_and_refuses_other_numbers():
    error = error_of(smooth_prior())
    again = ErrorModel.from_dict(json.loads(json.dumps(error.to_dict())))
    D, x = smooth_prior(), randn((2, 1, SIZE, SIZE), torch.complex64, torch.Generator().manual_seed(1))
    z = randn(x.shape, x.dtype, torch.Generator().manual_seed(2))
    sigma = torch.tensor([0.1, 1.0])
    ours, theirs = error(D, x, sigma)[1].L(z), again(D, x, sigma)[1].L(z)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert torch.allclose(error.times(4)(D, x, sigma)[1].L(z), 2 * ours, rtol=1e-4, atol=1e-6)
    wide = dataclasses.replace(error, widening=2.2)
    assert ErrorModel.from_dict(wide.to_dict()).widening == 2.2 and again.widening == 1
    sized = dataclasses.replace(error, pixel_mm=(2.5, 3.5))
    assert ErrorModel.from_dict(json.loads(json.dumps(sized.to_dict()))).pixel_mm == (2.5, 3.5)
    assert again.pixel_mm is None
    for broken in (
        {},
        error.to_dict() | {"widening": 0.0},
        error.to_dict() | {"spectrum": [[1.0]]},
        error.to_dict() | {"table": [[1.0], [[2.0]], [[]]]},
    ):
        with pytest.raises(ValueError, match="not an error model"):
            ErrorModel.from_dict(broken)


def test_errors_are_kept_beside_the_weights_they_belong_to(tmp_path):
    from companion.models.architectures import build
    from companion.models.errors import load_errors, save_errors
    from companion.models.folder import save_checkpoint

    network = {"name": "UNet", "in_channels": 2, "model_channels": 32, "out_channels": 2, "channel_mult": [1]}
    config = {
        "network": network | {"num_res_blocks": 1},
        "denoiser": {"name": "EDMDenoiser", "complex": True},
        "data": {"source": "test", "scale": "1"},
    }
    torch.manual_seed(0)
    folder = save_checkpoint(tmp_path / "prior", build(config), config, {})
    with pytest.raises(FileNotFoundError, match="not measured"):
        load_errors(folder)
    error = error_of(smooth_prior())
    save_errors(folder, {"own": error, "others": error.times(2)})
    found = load_errors(folder)
    assert list(found) == ["own", "others"]
    assert torch.allclose(found["others"].measured.spectrum, 2 * error.measured.spectrum, rtol=1e-5)
    errors = (folder / "errors.json").read_text()
    save_checkpoint(folder, build(config), config, {})
    assert not (folder / "errors.json").exists(), "other weights, other errors"
    (folder / "errors.json").write_text(errors)
    with pytest.raises(ValueError, match="other weights"):
        load_errors(folder)
    (folder / "errors.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        load_errors(folder)


def test_the_error_of_like_pixels_is_asked_first():
    from companion.models.errors import for_pixels, load_errors

    errors = load_errors("general/2d")
    assert list(for_pixels(errors, None)) == list(errors) == ["heads", "heads, large pixels", "dead leaves"]
    assert list(for_pixels(errors, 1.0)) == list(errors)
    assert list(for_pixels(errors, 3.25)) == ["heads, large pixels", "heads", "dead leaves"]
