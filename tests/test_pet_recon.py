"""The dose study: scans, tuned baselines, scores; the posterior on a prior that is known."""

import dataclasses

import numpy as np
import pytest
import torch

from companion.acquisition import doses
from companion.acquisition.own_pet import OwnScan
from companion.acquisition.pet import Scan, scanner
from companion.data.head_mr import mr_condition
from companion.data.pet import Slices, held_out
from companion.diffusion.covariance import Measured
from companion.diffusion.exact import GaussianDenoiser
from companion.evaluation import activity, metrics
from companion.evaluation import doses as evaluation_doses
from companion.evaluation.intervals import Drawn, interval_table
from companion.papers.pet import study as pet_study
from companion.papers.pet.study import Enhance
from companion.reconstruction import activity as reconstruction_activity
from companion.reconstruction import pet as reconstruction
from companion.reconstruction import regions as pet_regions
from companion.reconstruction.activity import Prior, Sampler

SIZE = 24


@pytest.fixture(scope="module")
def people() -> Slices:
    """Three discs of grey matter, each with a white core and a lesion, no template needed."""
    axis = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius = (x**2 + y**2).sqrt()
    labels = torch.where(radius < 0.4, 3, torch.where(radius < 0.8, 2, 0)).to(torch.uint8).expand(3, 1, SIZE, SIZE)
    lesions = (((x - 0.6) ** 2 + y**2).sqrt() < 0.12).to(torch.uint8).expand(3, 1, SIZE, SIZE)
    level = torch.tensor([0.9, 1.0, 1.1]).reshape(3, 1, 1, 1)
    image = level * torch.where(lesions > 0, 40.0, torch.where(labels == 2, 20.0, torch.where(labels == 3, 5.0, 0.0)))
    mu = 0.0096 * (labels > 0).float()
    return Slices(image, labels, lesions, mu, torch.arange(3), torch.zeros(3), pixel_mm=224 / SIZE)


def parameters(**others) -> Enhance:
    return Enhance(device="cpu", image_size=SIZE, network=None, **others)


def ladder(people: Slices, p: Enhance) -> list[doses.Level]:
    return doses.ladder(people, p, p, p.seed)


def posterior(prior: Prior, scan: Scan, p: Enhance, *rule, **options):
    return reconstruction_activity.posterior(prior, scan, p, p.seed, *rule, **options)


def of(scan: Scan) -> tuple:
    return scan.y, scan.A, scan.background


def test_a_ladder_thins_one_scan_and_calibrates_others(people):
    p = parameters(fractions=(0.25, 1.0), factors=(10.0,))
    low, quarter, full = ladder(people, p)
    assert [low.name, quarter.name, full.name] == ["10 per pixel", "25% dose", "100% dose"]
    assert (quarter.scan.y <= full.scan.y).all() and torch.equal(quarter.scan.x, people.image)
    assert torch.allclose(quarter.scan.A(people.image), 0.25 * full.scan.A(people.image), rtol=1e-5)
    counts = 10 * (people.image > 0.5).flatten(1).sum(1)
    assert torch.allclose(low.scan.A(people.image).flatten(1).sum(1), counts.float(), rtol=1e-4)
    error = [level.scan.counting_error() for level in (quarter, full)]
    assert ((error[0] / error[1] - 2).abs() < 0.05).all(), "as 1 / sqrt(dose)"
    with pytest.raises(ValueError, match="no dose"):
        ladder(people, parameters(fractions=(), factors=()))


@pytest.mark.parametrize("fractions", [(0.001, 0.004), (0.25, 0.2501), (0.3333333, 0.3333334)])
def test_doses_have_names_of_their_own(people, fractions):
    """Tables are keyed by them: no two doses share a name, or the study is refused."""
    p = parameters(fractions=fractions, factors=())
    if len({f"{f:.6g}" for f in fractions}) == 2:
        assert {level.name for level in ladder(people, p)} == {doses.dose_name(f) for f in fractions}
        assert len({doses.dose_name(f) for f in fractions}) == 2
    else:
        with pytest.raises(ValueError, match="two doses are both called 33.3333% dose"):
            ladder(people, p)


def test_methods_have_names_of_their_own():
    names = [
        *reconstruction.METHODS,
        reconstruction_activity.ORACLE,
        reconstruction_activity.GUESS,
        reconstruction_activity.ANCHORED,
        evaluation_doses.MEAN,
    ]
    names += [evaluation_doses.ONE, *(f"{name}, mean" for name in reconstruction_activity.GUIDED)]
    assert len(set(names)) == len(names)


def test_some_scans_are_what_they_are_alone(people):
    scan = ladder(people, parameters(fractions=(0.25,), factors=(), randoms=0.2))[0].scan
    index = torch.tensor([2, 0, 2])
    chosen = scan.some(index)
    assert torch.equal(chosen.y, scan.y[index]) and torch.equal(chosen.background, scan.background[index])
    assert torch.equal(chosen.A(people.image[index]), scan.A(people.image)[index])


def test_tuning_finds_the_best_setting_and_nobody_beats_the_oracle(people, monkeypatch):
    monkeypatch.setitem(reconstruction.GRIDS, "MLEM", (1, 2, 4, 8, 16, 32, 64))
    scan = ladder(people, parameters(fractions=(0.25,), factors=()))[0].scan
    monkeypatch.setitem(reconstruction.METHODS, "offset", lambda y, A, b, v: scan.x + (v - 3.0))
    monkeypatch.setitem(reconstruction.GRIDS, "offset", tuple(range(12)))
    assert reconstruction.tune("offset", *of(scan), scan.x) == 3
    best = reconstruction.tune("MLEM", *of(scan), scan.x)
    errors = {
        k: metrics.nrmse(reconstruction.METHODS["MLEM"](*of(scan), k), scan.x) for k in reconstruction.GRIDS["MLEM"]
    }
    assert best == min(errors, key=lambda k: errors[k].mean())
    oracle = metrics.nrmse(reconstruction.oracle_stop(*of(scan), scan.x), scan.x)
    assert all((oracle <= error + 1e-6).all() for error in errors.values())


def test_the_truth_scores_perfectly(people):
    scores = activity.score(people.image, people)
    assert scores["NRMSE"].max() == 0 and torch.allclose(scores["recovery"], torch.ones(3).double())
    assert torch.allclose(scores["SSIM"], torch.ones(3).double())
    assert all(scores[name].nan_to_num().abs().max() < 1e-12 for name in scores if name.startswith("bias"))
    twice = activity.score(2 * people.image, people)
    assert torch.allclose(twice["bias, grey"], torch.ones(3).double())
    blurred = activity.score(reconstruction.filtered(people.image, 1.0), people)
    assert (blurred["bias, white inside"].abs() < 0.3 * blurred["bias, white"].abs()).all(), "no blur from outside"
    ring = activity.surroundings(people)
    assert not (ring & (people.lesions > 0)).any() and ring.flatten(1).sum(1).min() > 10


def gaussian_prior(people) -> Prior:
    mean = (people.image / 25).mean(0).double()
    smooth = torch.exp(-((torch.arange(SIZE)[:, None] - torch.arange(SIZE)) ** 2) / 8.0).double()
    std = (0.02 + 0.25 * mean).flatten()
    D = GaussianDenoiser(mean, std[:, None] * torch.kron(smooth, smooth) * std)
    images = D.draw(30, torch.Generator().manual_seed(0)).float()
    return Prior(D, 25.0, Measured.fit(D, images, torch.logspace(-2, 1.3, 8)))


def test_the_posterior_beats_mlem_is_calibrated_and_keeps_its_seeds(people):
    prior = gaussian_prior(people)
    truth = 25 * prior.D.draw(3, torch.Generator().manual_seed(7)).float().clamp(min=0)
    drawn = Slices(truth, people.labels, people.lesions, people.mu, people.subject, people.height_mm, people.pixel_mm)
    p = parameters(fractions=(0.02,), factors=(), draws=8, evaluations=12, last_noise=1.0)
    scan = ladder(drawn, p)[0].scan
    result = posterior(prior, scan, p)
    assert result.x.shape == (8, 3, 1, SIZE, SIZE) and result.mean.shape == truth.shape
    assert result.bill.denoiser_calls == 12
    error = metrics.nrmse(result.mean, truth)
    assert (error < metrics.nrmse(reconstruction.oracle_stop(*of(scan), truth), truth)).all()
    assert (error < metrics.nrmse(result.x[0], truth)).all()
    assert 0.6 < metrics.pooled_calibration(result.x, truth) < 1.6
    alone = posterior(prior, scan.some([0]), p)
    assert torch.equal(alone.x, posterior(prior, scan.some([0]), p).x)
    assert torch.allclose(alone.x[:, 0], result.x[:, 0], atol=0.02), "a slice's draw is the same in any batch"
    assert result.x[:, 0].std(0).mean() > 0.5
    for name in ("EM steps", "one mean", "DPS", "PiGDM"):
        other = posterior(prior, scan, p, name, draws=2)
        assert torch.isfinite(other.x).all() and other.bill.denoiser_calls <= 12


def test_a_network_that_states_no_variance_has_one_for_all_pixels(people):
    class LastIterate(torch.nn.Linear):  # a denoiser without moments
        def forward(self, x, sigma, cond=None):
            return cond[:, :1]

    scan = ladder(people, parameters(fractions=(1.0,), factors=()))[0].scan
    network = reconstruction_activity.Network(LastIterate(1, 1), {"iterations": [5], "scale_kbq": 25.0})
    mean, variance = network.guess(scan)
    assert mean.shape == variance.shape == people.image.shape and variance.unique().numel() == 1
    assert metrics.nrmse(reconstruction_activity.with_likelihood((mean, variance), scan, 1.0), people.image).max() < 0.3


def test_regions_come_from_the_counts_where_the_maps_are_right(people):
    healthy = torch.where(people.lesions > 0, 0, people.labels)
    shares = torch.stack([(people.labels == k).float() for k in (1, 2, 3)], 1)
    scan = ladder(people, parameters(fractions=(1.0,), factors=(), randoms=0.2))[0].scan
    blurred = reconstruction.filtered(people.image, 2.0)
    before, after, off = (
        metrics.region_bias(x, people.image, healthy, (2, 3)).abs().mean(0)
        for x in (
            blurred,
            pet_regions.regional(blurred, *of(scan), shares),
            pet_regions.regional(blurred, *of(scan), pet_regions.misplaced(shares)),
        )
    )
    assert (after < 0.02).all() and (before > 0.05).all() and (off > after).all()
    found = pet_regions.regional(people.image, *of(scan), shares)
    contrast = metrics.lesion_recovery(found, people.image, people.lesions > 0, activity.surroundings(people))
    assert (contrast - 1).abs().max() < 0.1, "a lesion is a region of its own"
    assert torch.equal(pet_regions.decided(shares), shares), "tissues without partial volume"
    right = pet_regions.misplaced(shares, 1.0)
    torch.testing.assert_close(right[..., 1:], shares[..., :-1])


def test_region_rows_have_every_method_and_kind_of_maps():
    people = held_out("test", 2, 32, lesions=1)
    level = ladder(people, Enhance(device="cpu", fractions=(1.0,), factors=()))[0]
    images = dict.fromkeys(("MLEM", "MAP", "posterior mean"), people.image)
    rows = [{"level": level.name} | row for row in pet_regions.region_rows(images, people, level.scan)]
    assert len(rows) == 3 * len(pet_regions.MAPS) * 2
    lines = evaluation_doses.region_table(rows, "100% dose")
    exact = {line["anatomical maps"]: line["bias, grey (%)"][0] for line in lines if line["method"] == "MAP"}
    assert exact["none"] == 0 and abs(exact["exact"]) < 1.5 < abs(exact["half a pixel off"])


def rows_of(values: dict[str, list[float]], counts=(1e4, 1e5, 1e6)) -> list[dict]:
    return [
        {
            "level": f"{n:g}",
            "counts": int(n),
            "method": name,
            "person": i,
            "NRMSE": error + 0.01 * i,
            "PSNR": 30.0,
            "SSIM": 0.9,
            "bias, grey": 0.01,
            "noise, white": 0.1,
            "recovery": float("nan") if i else 0.8,
        }
        for name, errors in values.items()
        for n, error in zip(counts, errors, strict=True)
        for i in range(3)
    ]


def test_tables_and_curves_say_what_the_rows_hold():
    rows = rows_of({"MAP": [0.4, 0.3, 0.2], "posterior mean": [0.3, 0.2, 0.1]})
    line = evaluation_doses.dose_table(rows, "10000")[0]
    assert line["method"] == "MAP" and abs(line["NRMSE"][0] - 0.41) < 1e-9
    assert abs(line["gain (%)"][0] - 100 * (0.1 / torch.tensor([0.4, 0.41, 0.42])).mean()) < 1e-3
    assert line["lesion recovery"][0] == 0.8
    counts, means, _ = evaluation_doses.curves(rows, ["posterior mean", "none of these"])["posterior mean"]
    assert counts == [10_000, 100_000, 1_000_000] and np.allclose(means, [0.31, 0.21, 0.11])
    equal = evaluation_doses.same_quality(rows, "MAP")
    assert equal[0]["times fewer"] is None, "lower counts than were measured"
    assert abs(equal[1]["times fewer"] - 10) < 0.5 and abs(equal[2]["times fewer"] - 10) < 0.5


def write(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


SHAPE = (2, 2 * SIZE, SIZE)


def own(path: str) -> Scan:
    return OwnScan.read(path, SIZE, units="kBq/mL").scan


def test_own_counts_become_a_scan(tmp_path):
    counts = np.random.default_rng(0).poisson(5.0, SHAPE)
    path = write(tmp_path / "mine.npz", counts=counts, factors=np.full(SHAPE[1:], 0.01), background=np.ones(SHAPE))
    cases = pet_study.prepare(parameters(scan=path, validation_subjects=2, pixel_mm=3.5, units="kBq/mL"))
    (level,) = cases.levels
    assert level.scan.x is None and level.name == "mine" and cases.people is None and level.fraction is None
    assert cases.validation.pixel_mm == 3.5 == cases.beam.pixel_mm
    assert torch.equal(level.scan.y[:, 0], torch.from_numpy(counts).float())
    x = torch.ones(2, 1, SIZE, SIZE)
    assert torch.allclose(level.scan.A(x), 0.01 * scanner((SIZE, SIZE), 3.5)(x))
    assert torch.isfinite(reconstruction.METHODS["MAP"](*of(level.scan), 0.1)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(counts=-np.ones(SHAPE)), "must not be negative"),
        (dict(counts=np.full(SHAPE, 0.5)), "whole numbers"),
        (dict(counts=np.ones((2, SIZE, SIZE))), "this geometry measures"),
        (dict(counts=np.zeros(SHAPE)), "empty"),
        (dict(counts=np.full(SHAPE, np.nan)), "NaN"),
        (dict(factors=-np.ones(SHAPE[1:])), "factors must not be negative"),
        (dict(factors=np.ones((3, *SHAPE[1:]))), "must fit counts"),
        (dict(counts=np.array([{}], object)), "npz of plain arrays"),
        (dict(counts=np.ones((SIZE, 2 * SIZE))), "angles and bins are exchanged"),
        (dict(factors=np.full(SHAPE[1:], np.inf)), "factors: .* NaN or infinite"),
        (dict(factors=np.zeros(SHAPE[1:])), "all factors are 0"),
        (dict(factors=np.ones(SHAPE[1:]) * (np.arange(SIZE) != 7)), "counts in 96 bins where the model allows none"),
        (dict(background=np.full(SHAPE, np.nan)), "background: .* NaN or infinite"),
        (dict(background=np.full(SHAPE, -0.1)), "background must not be negative"),
        (dict(background=np.full(SHAPE, 2.0)), "empty: no counts above the background"),
        (dict(counts=9.0 * np.ones(SHAPE) * (np.arange(SIZE) != 7)), "bins 7 counted nothing"),
        (dict(counts=9.0 * np.ones(SHAPE) * (np.arange(2 * SIZE) != 7)[:, None]), "angles 7 counted nothing"),
    ],
)
def test_what_cannot_be_reconstructed_is_refused(tmp_path, change, message):
    arrays = dict(counts=np.ones(SHAPE), factors=np.ones(SHAPE[1:])) | change
    with pytest.raises(ValueError, match=message):
        own(write(tmp_path / "bad.npz", **arrays))


def test_dead_bins_may_be_said_by_factors_and_background_explains_counts(tmp_path):
    alive = np.ones(SHAPE[1:]) * (np.arange(SIZE) != 7)
    dead = write(tmp_path / "dead.npz", counts=9 * np.ones(SHAPE) * alive, factors=alive)
    randoms = write(tmp_path / "randoms.npz", counts=9 * np.ones(SHAPE), factors=alive, background=np.ones(SHAPE))
    one = write(tmp_path / "one.npz", counts=np.ones(SHAPE[1:], np.uint16), factors=np.float32(1))
    assert [len(own(path).y) for path in (dead, randoms, one)] == [2, 2, 1]


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.npz does not exist"):
        own(str(tmp_path / "nowhere.npz"))
    with pytest.raises(ValueError, match="holds phantoms but not counts, factors"):
        own(write(tmp_path / "foreign.npz", phantoms=np.ones(3)))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match="npz of plain arrays"):
        own(str(tmp_path / "text.npz"))


class Told:
    """A denoiser that believes the MR it is given, and nobody without one."""

    def __call__(self, x, sigma, cond=None):
        return torch.zeros_like(x) if cond is None else cond[:, :1]

    def moments(self, x, sigma, cond=None):
        return self(x, sigma, cond), torch.full_like(x, 1e-6)


def test_draws_are_given_the_mr_of_their_own_slice(people):
    scan = ladder(people, parameters(fractions=(0.25,), factors=()))[0].scan
    scan = dataclasses.replace(scan, mr=torch.rand(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) + 0.1)
    error = Measured(torch.tensor([1.0]), torch.ones(1, 1))
    sampler = Sampler(draws=2, evaluations=2)
    told = reconstruction_activity.posterior(Prior(Told(), 25.0, error, with_mr=True), scan, sampler)
    alone = reconstruction_activity.posterior(Prior(Told(), 25.0, error), scan, sampler)
    near, far = ((x.mean / 25 - mr_condition(scan.mr)[:, :1]).square().mean().sqrt().item() for x in (told, alone))
    assert near < 0.1 * far, (near, far)
    wider = reconstruction_activity.posterior(Prior(Told(), 25.0, error, widening=4.0), scan, sampler)
    assert torch.equal(wider.mean, alone.mean) and torch.allclose(wider.x.mean(0), alone.x.mean(0), atol=1e-4)
    assert torch.allclose(wider.x.var(0), 4 * alone.x.var(0), rtol=1e-3, atol=1e-9)
    with pytest.raises(ValueError, match="the scan has none"):
        reconstruction_activity.posterior(
            Prior(Told(), 25.0, error, with_mr=True), dataclasses.replace(scan, mr=None), sampler
        )


def test_the_posterior_of_a_volume_is_that_of_its_slices(people):
    """As one scan of three slices, with and without an MR; the operator here ties nothing together."""
    prior = gaussian_prior(people)
    scan = ladder(people, parameters(fractions=(0.02,), factors=()))[0].scan
    sampler = Sampler(draws=8, evaluations=8, last_noise=1.0)
    slices = reconstruction_activity.posterior(prior, scan, sampler)
    volume = reconstruction_activity.posterior(prior, scan.volume(), sampler, warm=None)  # the same levels
    assert volume.x.shape == (8, 1, 1, 3, SIZE, SIZE) and volume.mean.shape == (1, 1, 3, SIZE, SIZE)
    spread = slices.x.var(0).sum().item()
    assert volume.x.var(0).sum().item() == pytest.approx(spread, rel=0.1)
    apart = (volume.mean[0].transpose(0, 1) - slices.mean).square().sum().item()
    assert apart < 3 * 2 * spread / 8, "but for chance"
    told = Prior(Told(), 25.0, Measured(torch.tensor([1.0]), torch.ones(1, 1)), with_mr=True)
    mr = torch.rand(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) + 0.1
    seen = reconstruction_activity.posterior(
        told, dataclasses.replace(scan, mr=mr).volume(), Sampler(draws=2, evaluations=2)
    )
    assert torch.allclose(seen.mean[0].transpose(0, 1) / 25, mr_condition(mr)[:, :1], atol=0.05)


def test_a_study_calibrates_its_intervals_on_further_people(people):
    calibration = dataclasses.replace(
        people, **{k: getattr(people, k).repeat(3, 1, 1, 1) for k in ("image", "labels", "lesions", "mu")}
    )
    p = parameters(fractions=(0.25,), factors=(10.0,), draws=2, evaluations=2)
    prior = Prior(Told(), 25.0, Measured(torch.tensor([1.0]), torch.ones(1, 1)))
    found = pet_study.study(p, ladder(people, p), people, people, prior, None, progress=False, calibration=calibration)
    assert list(found.intervals) == ["25% dose"]
    assert found.intervals["25% dose"] == interval_table(
        pet_study.drawn(prior, calibration, ladder(people, p)[-1].counts, p, p, 7000),
        Drawn(people.image, found.draws["25% dose"], people.labels > 0),
    )
    with pytest.raises(ValueError, match="90 % intervals take 9"):
        pet_study.prepare(Enhance(device="cpu", calibration_subjects=3))
