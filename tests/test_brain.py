"""The study of start_here: fair data, honest numbers, a prior that trains and comes back from disk."""

import pytest
import torch

from companion.acquisition.mri import Scan
from companion.data.virtual import slices
from companion.diffusion.covariance import Measured
from companion.diffusion.noise import karras
from companion.evaluation import metrics
from companion.evaluation.denoising import expected_errors
from companion.models.checkpoint import load_denoiser
from companion.papers import start_here as brain
from companion.papers import train_prior
from companion.reconstruction.one_pass import NAME
from companion.training.recipe import save

NOISE_STD = 0.01


def scanned(x, R, seed):
    return brain.scanned(x, R, acs=4, coils=8, noise_std=NOISE_STD, seed=seed)


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
    return p, *train_prior.train(p, progress=False)


def test_scan_measures_the_truth_plus_noise_where_the_mask_says():
    x = slices("test", 3, 32)
    scan = scanned(x, 4, 1)
    clean = scan.A(x)
    measured = clean.abs() > 0
    assert (scan.y[~measured.expand_as(scan.y)] == 0).all()
    noise = torch.view_as_real((scan.y - clean)[measured])
    assert noise.std() == pytest.approx(NOISE_STD, rel=0.05) and noise.mean().abs() < 1e-3
    assert torch.equal(scan.y, scanned(x, 4, 1).y)
    assert not torch.equal(scan.y, scanned(x, 4, 2).y)


def test_one_slice_of_a_scan_is_the_scan_of_one_slice():
    scan = scanned(slices("test", 3, 32), 4, 0)
    one = scan.one(2)
    assert torch.equal(one.y[0], scan.y[2]) and torch.allclose(one.A.H(one.y)[0], scan.A.H(scan.y)[2], atol=1e-6)


def test_slices_of_successive_subjects_sweep_the_slab():
    x = slices("validation", 4, 32)
    assert x.shape == (4, 1, 32, 32) and x.is_complex()
    assert slices("validation", 2, 32, per_subject=3).shape == (6, 1, 32, 32)


def test_score_reports_the_paired_gain():
    scan = Scan(None, None, None, 0.0, x=torch.ones(3, 1, 16, 16, dtype=torch.complex64))
    worse, better = scan.x + 0.2, scan.x + 0.1
    row = brain.score(better, scan, tv=worse)
    assert row["gain over TV (dB)"][0] == pytest.approx(6.02, abs=0.01)
    assert row["NRMSE"][0] == pytest.approx(0.1, abs=1e-5)


def test_training_set_is_made_once_and_checked(tiny):
    p, *_ = tiny
    prepared = train_prior.prepare(p.data, 3, 2, 32)
    assert prepared.shapes["magnitude"] == (3, 2, 1, 32, 32) and prepared.seed == 0
    with pytest.raises(ValueError, match="image_size = 32 where the parameters ask for image_size = 16"):
        train_prior.prepare(p.data, 3, 2, 16)


def test_a_prior_survives_the_disk_and_draws_posteriors(tiny):
    p, result, config = tiny
    errors = expected_errors(result.ema, slices("validation", 2, 32), [0.1, 1.0])
    assert [row["sigma"] for row in errors] == [0.1, 1.0] and all(row["error"] > 0 for row in errors)
    D = load_denoiser(save(result, p, config, errors))
    scan, levels = scanned(slices("test", 3, 32), 4, 0), karras(3, 0.04, 5.0)
    C = Measured.fit(D, slices("validation", 2, 32))
    draws, bill = brain.posterior(D, C, scan, levels, 3)
    assert draws.shape == (3, 3, 1, 32, 32) and bill.denoiser_calls == 3
    assert torch.isfinite(torch.view_as_real(draws)).all()
    residual = (scan.A(draws[0]) - scan.y).abs().square().mean() / 2  # an untrained prior, but the data are heard
    assert residual < 0.2 * (scan.A.H(scan.y).abs().square().mean() / 2)
    again, _ = brain.posterior(D, C, scan.one(0), levels, 3)
    assert torch.allclose(again[:, 0], draws[:, 0], atol=1e-4)
    assert metrics.psnr(draws[0], scan.x).shape == (3,)


def test_maps_may_come_from_the_centre_lines():
    x = slices("test", 2, 32)
    true, found = (brain.scanned(x, 2, acs=16, coils=4, noise_std=0.001, maps=maps) for maps in ("oracle", "espirit"))
    assert torch.equal(true.y, found.y) and found.maps.shape == (2, 4, 32, 32)
    one = found.one(1)
    torch.testing.assert_close(one.A.H(one.y), found.A.H(found.y)[1:])
    torch.testing.assert_close(found.operator(1).H(found.y[1:]), one.A.H(one.y))
    seen = found.maps.abs().sum(1, keepdim=True) > 0
    aligned = (found.maps.conj() * true.maps).sum(1, keepdim=True).abs()[seen]  # the same maps, but for a phase
    assert aligned.median() > 0.98


def test_study_scores_every_method_on_every_slice(tiny):
    p, result, _ = tiny
    options = dict(image_size=32, subjects=2, validation_subjects=1, draws=2, evaluations=3, accelerations=(3,))
    q = brain.StartHere(**options, device="cpu", autocast=None)
    C = Measured.fit(result.ema, slices("validation", 2, 32))
    study, scans = brain.study(q, result.ema, C, karras(3, 0.04, 5.0), progress=False)
    methods = ["zero-filled", "CG-SENSE", "L1-wavelet", "TV", NAME, "diffusion, one draw", "diffusion, mean of 2"]
    assert [row["method"] for row in study.table] == methods and list(scans) == [3]
    assert torch.equal(study.images[3]["diffusion, mean of 2"], study.draws[3].mean(0))


def test_classical_methods_are_tuned_on_other_people():
    x, others = slices("test", 2, 32), slices("validation", 1, 32)
    images, tuned = brain.classical(scanned(x, 3, 0), scanned(others, 3, 1))
    assert set(images) == {"zero-filled", "CG-SENSE", "L1-wavelet", "TV"} and set(tuned) == set(brain.GRIDS)
    psnr = {name: metrics.psnr(image, x).mean() for name, image in images.items()}
    assert psnr["TV"] > psnr["zero-filled"] + 3 and psnr["CG-SENSE"] > psnr["zero-filled"] + 1
