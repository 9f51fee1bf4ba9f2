"""The study of start_here: fair data, honest numbers, a prior that trains and comes back from disk."""

import pytest
import torch

from companion.evaluation import metrics
from companion.models.checkpoint import load_denoiser
from companion.papers import start_here as brain
from companion.papers import train_prior

P = brain.StartHere(
    image_size=32, subjects=3, validation_subjects=2, draws=3, evaluations=3, device="cpu", autocast=None
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prior")
    p = train_prior.TrainPrior(
        image_size=32,
        subjects=3,
        slices_per_subject=2,
        model_channels=32,
        channel_mult=(1, 1),
        steps=3,
        batch_size=4,
        warmup=1,
        out=str(folder),
        data=str(folder / "data.h5"),
        device="cpu",
    )
    return p, train_prior.train_prior(p, progress=False)


def test_scan_measures_the_truth_plus_noise_where_the_mask_says():
    x = brain.slices("test", 3, 32)
    scan = brain.acquire(x, 4, P, seed=1)
    clean = scan.A(x)
    measured = clean.abs() > 0
    assert (scan.y[~measured.expand_as(scan.y)] == 0).all()
    noise = torch.view_as_real((scan.y - clean)[measured])
    assert noise.std() == pytest.approx(P.noise_std, rel=0.05) and noise.mean().abs() < 1e-3
    assert torch.equal(scan.y, brain.acquire(x, 4, P, seed=1).y)
    assert not torch.equal(scan.y, brain.acquire(x, 4, P, seed=2).y)


def test_one_slice_of_a_scan_is_the_scan_of_one_slice():
    scan = brain.acquire(brain.slices("test", 3, 32), 4, P, seed=0)
    one = scan.one(2)
    assert torch.equal(one.y[0], scan.y[2]) and torch.allclose(one.A.H(one.y)[0], scan.A.H(scan.y)[2], atol=1e-6)


def test_slices_of_successive_subjects_sweep_the_slab():
    x = brain.slices("validation", 4, 32)
    assert x.shape == (4, 1, 32, 32) and x.is_complex()
    assert brain.slices("validation", 2, 32, per_subject=3).shape == (6, 1, 32, 32)


def test_calibration_is_one_for_draws_that_the_truth_could_be_one_of():
    generator = torch.Generator().manual_seed(0)
    everything = torch.randn(9, 5, 1, 64, 64, generator=generator, dtype=torch.complex64)
    scan = brain.Scan(everything[0], None, None, None, 0.01)
    assert brain.calibration(everything[1:], scan) == pytest.approx(1, abs=0.03)
    assert brain.calibration(everything[1:] / 2, scan) < 0.35


def test_score_reports_the_paired_gain():
    scan = brain.Scan(torch.ones(3, 1, 16, 16, dtype=torch.complex64), None, None, None, 0.0)
    worse, better = scan.x + 0.2, scan.x + 0.1
    row = brain.score(better, scan, tv=worse)
    assert row["gain over TV (dB)"][0] == pytest.approx(6.02, abs=0.01)
    assert row["NRMSE"][0] == pytest.approx(0.1, abs=1e-5)


def test_training_set_is_made_once_and_checked(tiny):
    p, _ = tiny
    prepared = train_prior.prepare_training_set(p, p.data)
    assert prepared.shapes["magnitude"] == (3, 2, 1, 32, 32) and prepared.seed == 0
    with pytest.raises(ValueError, match="the parameters ask for"):
        train_prior.prepare_training_set(train_prior.TrainPrior(image_size=16), p.data)


def test_a_prior_survives_the_disk_and_draws_posteriors(tiny):
    p, result = tiny
    errors = train_prior.denoising_errors(result.ema, p, [0.1, 1.0], subjects=2)
    assert [row["sigma"] for row in errors] == [0.1, 1.0] and all(row["error"] > 0 for row in errors)
    D = load_denoiser(train_prior.save_prior(result, p, errors))
    scan = brain.acquire(brain.slices("test", P.subjects, 32), 4, P, seed=0)
    C = brain.measured_error(D, P, subjects=2)
    draws, bill = brain.posterior(D, C, scan, P)
    assert draws.shape == (3, 3, 1, 32, 32) and bill.denoiser_calls == P.evaluations
    assert torch.isfinite(torch.view_as_real(draws)).all()
    residual = (scan.A(draws[0]) - scan.y).abs().square().mean() / 2  # an untrained prior, but the data are heard
    assert residual < 0.2 * (scan.A.H(scan.y).abs().square().mean() / 2)
    again, _ = brain.posterior(D, C, brain.Scan(scan.x[:1], scan.y[:1], scan.A, scan.mask, scan.noise_std), P)
    assert torch.allclose(again[:, 0], draws[:, 0], atol=1e-4)
    assert metrics.psnr(draws[0], scan.x).shape == (3,)


def test_classical_methods_are_tuned_on_other_people():
    x, others = brain.slices("test", 2, 32), brain.slices("validation", 1, 32)
    images, tuned = brain.classical(brain.acquire(x, 3, P, 0), brain.acquire(others, 3, P, 1))
    assert set(images) == {"zero-filled", "CG-SENSE", "L1-wavelet", "TV"} and set(tuned) == set(brain.GRIDS)
    psnr = {name: metrics.psnr(image, x).mean() for name, image in images.items()}
    assert psnr["TV"] > psnr["zero-filled"] + 3 and psnr["CG-SENSE"] > psnr["zero-filled"] + 1
