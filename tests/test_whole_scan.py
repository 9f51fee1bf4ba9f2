"""Whole scans: slices as alone, stopped and continued, without signal, measured each in its own way, cut out of 3D."""

import dataclasses

import pytest
import torch
from test_real_scan import SIZE, kspace, slices
from test_trust import error_of, smooth_prior

from companion.acquisition.slices import as_slices, centred_affine
from companion.data.raw.scan import raw_scan
from companion.diffusion.sampling import Bill
from companion.evaluation.metrics import spread
from companion.operators.masks import cartesian_mask
from companion.operators.mri import fft
from companion.reconstruction import held_out, regularised, trust, whole_scan
from companion.reconstruction.whole_scan import reconstruct_slices

LINES = cartesian_mask(SIZE, 2, acs=16).mask.expand(SIZE, SIZE)
OPTIONS = {"seeds": range(2), "evaluations": 4, "progress": False}


@pytest.fixture(scope="module")
def study():
    """A scan of four slices, the last of them air, the measurement of slice 1, a prior and what it is told of it."""
    x = slices(4)
    x[3] = 0
    scan = raw_scan("scan", 700 * kspace(x), voxel_mm=(5.0, 3.25, 3.25))
    D = smooth_prior(size=SIZE)
    one = trust.Candidate("people", 1.0, held_out.Score(0.0, 1.0, 1.0, 1.0))
    found = trust.Trust(error_of(D), 0.7, 1.5, one, (one,), 1.0, Bill(0, 0, 0.0))
    like = whole_scan.prepare_scan(scan, slice(1, 2), mask=LINES)
    return D, scan, like, found


def classical(A, y):
    return regularised.tv(A, y, 0.002)


def test_a_slice_is_the_same_alone_and_what_is_done_is_kept(study, tmp_path, monkeypatch):
    D, scan, like, found = study
    whole = reconstruct_slices(D, scan, LINES, like, found, classical, folder=tmp_path, **OPTIONS)
    m = whole_scan.with_real_noise(like).one(0)
    alone, _ = trust.reconstruct(
        D, m.A, m.y, m.noise_std, {}, acs=0, seeds=range(2), evaluations=4, trust=found, classical=classical
    )
    assert torch.allclose(whole.image[1], m.magnitude(alone.mean)[0, 0], atol=1e-4)
    assert torch.allclose(whole.deviation[1], spread(m.magnitude(alone.x), alone.paired).deviation[0], atol=1e-4)
    truth = slices(4)[:3, 0].abs()
    scale = (truth[1] * whole.image[1]).sum() / whole.image[1].square().sum()
    assert (scale * whole.image[:3] - truth).square().mean().sqrt() < 0.06, "all slices are in the units of one"

    monkeypatch.setattr(whole_scan, "_slice", lambda *_: pytest.fail("a slice was done again"))
    again = reconstruct_slices(D, scan, LINES, like, found, classical, folder=tmp_path, **OPTIONS)
    assert torch.equal(again.image, whole.image) and again.empty == whole.empty


def test_after_a_stop_or_a_damaged_file_the_rest_is_done_and_another_scan_is_not_mistaken(study, tmp_path, monkeypatch):
    D, scan, like, found = study
    done, real = [], whole_scan._slice

    def counted(D, scan, i, *rest):
        done.append(i)
        return real(D, scan, i, *rest) if i < 2 else (_ for _ in ()).throw(KeyboardInterrupt())

    monkeypatch.setattr(whole_scan, "_slice", counted)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_slices(D, scan, LINES, like, found, classical, folder=tmp_path, **OPTIONS)
    (tmp_path / "0000.safetensors").write_bytes((tmp_path / "0000.safetensors").read_bytes()[:100])
    with pytest.raises(KeyboardInterrupt):
        reconstruct_slices(D, scan, LINES, like, found, classical, folder=tmp_path, **OPTIONS)
    assert done == [0, 1, 2, 0, 2]
    other = dataclasses.replace(found, widening=2.0)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_slices(D, scan, LINES, like, other, classical, folder=tmp_path, **OPTIONS)
    assert done[5:] == [0, 1, 2]


def test_air_stays_dark_and_every_slice_has_its_own_mask(study):
    D, scan, like, found = study
    masks = torch.stack([cartesian_mask(SIZE, 2, "random", acs=16, seed=i).mask.expand(SIZE, SIZE) for i in range(4)])
    own = raw_scan("scan", scan.kspace * masks[:, None], voxel_mm=(5.0, 3.25, 3.25))
    like = whole_scan.prepare_scan(own, slice(1, 2))
    whole = reconstruct_slices(D, own, None, like, found, classical, **OPTIONS)
    truth = slices(4)[:3, 0].abs()
    scale = (truth[1] * whole.image[1]).sum() / whole.image[1].square().sum()
    assert (scale * whole.image[:3] - truth).square().mean().sqrt() < 0.08
    assert whole.image[3].max() < 0.2 * whole.image[1].max()


@pytest.mark.parametrize("mask_axis, along", [(0, "y"), (1, "x")])
def test_a_3d_scan_falls_into_slices_along_its_readout(mask_axis, along):
    x = slices(6)[:, 0]
    k = fft(x[None, None], 3)
    lines = torch.ones(6, SIZE, SIZE)
    lines[:, 1::2] = 0 if mask_axis else 1
    lines[1::2] = 0 if not mask_axis else 1
    scan = as_slices(raw_scan("scan", k * lines, voxel_mm=(5.0, 3.0, 2.0)))
    assert scan.ndim == 2 and f"along {along}" in scan.about["slices"]
    images = x.permute(1, 0, 2) if along == "y" else x.permute(2, 0, 1)
    assert torch.allclose(scan.kspace[:, 0], fft(images) * scan.mask[0, 0], atol=1e-3)
    assert scan.voxel_mm == ((3.0, 5.0, 2.0) if along == "y" else (2.0, 5.0, 3.0))
    lines = torch.randint(0, 2, lines.shape, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="all three axes"):
        as_slices(raw_scan("scan", k * lines))


def test_the_readout_s_oversampling_is_cut_and_the_calibration_follows():
    x = torch.zeros(6, 2 * SIZE, SIZE, dtype=torch.complex64)
    x[:, SIZE // 2 : SIZE // 2 + SIZE] = slices(6)[:, 0]
    k = fft(x[None, None], 3)
    calibration = k[..., SIZE - 16 : SIZE + 16, SIZE // 2 - 8 : SIZE // 2 + 8]
    scan = as_slices(raw_scan("scan", k, oversampling=(1.0, 2.0, 1.0), calibration=calibration))
    assert scan.kspace.shape == (SIZE, 1, 6, SIZE) and scan.oversampling == (1.0, 1.0)
    assert torch.allclose(scan.kspace[:, 0], fft(x[:, SIZE // 2 : SIZE // 2 + SIZE].permute(1, 0, 2)), atol=1e-3)
    assert scan.calibration.shape == (SIZE, 1, 6, 16)
    strong = scan.calibration.abs().flatten(1).norm(dim=1) * scan.kspace.abs().flatten(1).norm(dim=1)
    assert strong.argmax() in range(8, SIZE - 8)


def test_volumes_are_centred():
    affine = centred_affine((5.0, 2.0, 3.0), (7, 10, 20))
    assert (affine @ [9.5, 4.5, 3, 1])[:3].tolist() == [0, 0, 0]
    assert affine.diagonal().tolist() == [3.0, -2.0, 5.0, 1.0]
