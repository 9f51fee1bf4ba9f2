"""Volumes of heads for priors of voxels, their training, and 3D scans reconstructed with one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_latent3d_mri import P
from test_latent3d_sample import tiny_prior

from companion.data import volume_folder, volumes
from companion.data.head_volumes import head_volume, smooth_noise
from companion.data.heads import prepare_head
from companion.diffusion.denoisers import AnySize
from companion.diffusion.recalibration import ErrorModel
from companion.evaluation import metrics
from companion.evaluation.known_people import unseen
from companion.models.architectures import build, network_of
from companion.networks.autoencoder import AutoencoderKL
from companion.papers.latent3d import reconstruct as mri
from companion.papers.latent3d import voxels
from companion.papers.latent3d.autoencoder import widened
from companion.reconstruction import latent

PERSON = 2  # of the test split


@pytest.fixture(scope="module")
def head():
    z, y, x = np.meshgrid(*[np.arange(40) - 20] * 3, indexing="ij")
    r = np.sqrt(x**2 + y**2 + z**2)
    return prepare_head("ball", np.where(r < 17, 0.5 + 0.4 * (r < 9) + 0.02 * np.sin(x), 0), (5.0, 5.0, 5.0))


def test_a_seed_is_a_volume(head):
    one, again, other = (head_volume(head, np.random.default_rng(i), 16) for i in (3, 3, 4))
    assert one.shape == (16, 16, 16) and one.dtype == np.float32 and np.array_equal(one, again)
    assert not np.array_equal(one, other) and one.min() > -0.01 and one.max() < 4
    coarse = head_volume(head, np.random.default_rng(3), 16, 4.0)
    assert coarse.shape == (16, 16, 16)
    fields = smooth_noise(24, np.random.default_rng(0), 5, 3)
    assert fields.shape == (3, 24, 24, 24)
    assert fields.diff(dim=-1).std() < 0.4 * fields.std(), "smooth"


def test_volumes_to_learn_from_may_show_whole_heads(head, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(volume_folder, "load_heads", lambda folder, split: asked.append(split) or [head])
    monkeypatch.setattr(volume_folder, "anatomies", lambda folder, split, mm, more: voxels.anatomies(None, split, mm))
    made = volume_folder.virtual_people(volume_folder.PATIENTS, 3, (16, 16, 16), tmp_path, more=True, whole=1 / 3)
    image, tissue = made["arrays"]["image"], made["arrays"]["tissue_ml"]
    assert asked == ["train", "more"] and tissue.any(1).tolist() == [True, True, False]
    assert np.isfinite(image).all() and 0 <= image.min() and image.max() <= volumes.CEILING
    alone = volume_folder.virtual_people(volume_folder.PATIENTS, 3, (16, 16, 16), tmp_path)["arrays"]["image"]
    assert np.array_equal(alone[:2], image[:2]) and not np.array_equal(alone[2], image[2])
    with pytest.raises(ValueError, match="companion data get heads"):
        volume_folder.virtual_people(volume_folder.PATIENTS, 3, (16, 16, 16), whole=0.5)


def test_crops_hold_something_and_come_in_every_position():
    volume = torch.zeros(1, 20, 20, 20)
    volume[:, 2:8, 3:9, 10:16] = torch.rand(1, 6, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    parts = [voxels.crop(volume, torch.Generator().manual_seed(i), 8) for i in range(30)]
    assert all(part.shape == (1, 8, 8, 8) for part in parts)
    assert np.mean([(part > 0.1).float().mean() > 0.1 for part in parts]) > 0.6, "a quarter of the places"
    assert torch.equal(parts[7], voxels.crop(volume, torch.Generator().manual_seed(7), 8))


def test_a_training_of_few_volumes(head, tmp_path, monkeypatch):
    monkeypatch.setattr(voxels, "PART", 2)
    monkeypatch.setattr(voxels, "SHAPE", (16, 16, 16))
    monkeypatch.setattr(voxels, "HEAD_SIZE", 16)
    sources = voxels.anatomies(None, "train", 12.0)
    patients, heads = (voxels.bank_part(sources, [head], part) for part in (0, 2))
    assert patients.shape == heads.shape == (2, 1, 16, 16, 16) and np.isfinite(heads).all()
    assert np.array_equal(patients, voxels.bank_part(sources, [head], 0))
    folder = tmp_path / "bank"
    folder.mkdir()
    np.save(folder / "000.npy", patients)
    p = voxels.TrainVoxels(bank=str(folder), out=str(tmp_path / "run"), images=2, steps=2, batch_size=2, crop=16,
                           channel_mult=(1, 1), warmup=1, device="cpu", autocast=None, heads=None)  # fmt: skip
    result = voxels.train_voxels(p, progress=False)
    assert result.step == 2 and np.isfinite(result.loss)
    rows = voxels.validation_errors(result.ema, None, 2)
    assert len(rows) == len(voxels.SIGMAS) and {row["volumes"] for row in rows} == {"virtual patients"}


def test_the_network_takes_any_size():
    D = build(voxels.prior_config(32, (1, 1), 2, 1))
    D = AnySize(D, network_of(D).total_stride)
    assert D(torch.zeros(1, 1, 9, 12, 14), torch.ones(1)).shape == (1, 1, 9, 12, 14)


class Oracle:
    """Says the truth, mixed with what it is given as far as a prior of deviation 0.02 about it would."""

    def __init__(self, x):
        self.x, self.total_stride = x, (1, 1, 1)

    def __call__(self, z, sigma, cond=None):
        w = sigma.reshape(-1, 1, 1, 1, 1) ** 2
        return (4e-4 * z + w * self.x) / (4e-4 + w)


def test_held_out_samples_speak_for_a_prior_that_knows_and_against_one_that_does_not(monkeypatch):
    monkeypatch.setattr(latent, "network_of", lambda D: D)
    person = unseen(tiny_prior(), P.data, "test", PERSON + 1)[PERSON]
    scan = P.acquire(person, 0)
    other = unseen(tiny_prior(), P.data, "test", 1)
    found = {}
    for name, about in (("knows", person[None]), ("does not", other)):
        D = Oracle(about)
        errors = {"people": ErrorModel.fit(D, about + 0.02 * torch.randn(4, *person.shape), torch.logspace(-2, 0, 4))}
        samples, trust = latent.posterior_of_voxels(D, errors, scan, P, 8, 6, range(2))
        assert samples.x.shape == (2, *person.shape) and not samples.x.is_complex()
        found[name] = trust.share, metrics.psnr(samples.mean, person[None], 1.0).item()
    tv = metrics.psnr(P.total_variation(scan), person[None], 1.0).item()
    assert found["knows"][0] > 0.8 and found["knows"][1] > tv
    assert found["does not"][0] < 0.6 and found["does not"][1] > tv - 0.5


def test_voxels_stand_beside_latents_in_the_study(monkeypatch):
    prior = tiny_prior()
    (scan,), errors = mri.prepare(P, prior)
    monkeypatch.setattr(mri, "load_denoiser", lambda *_: Oracle(scan.x))
    monkeypatch.setattr(latent, "network_of", lambda D: D)
    about = ErrorModel.fit(Oracle(scan.x), scan.x + 0.02 * torch.randn(2, *scan.x.shape[1:]), torch.logspace(-2, 0, 4))
    monkeypatch.setattr(mri, "load_errors", lambda name: {"people": about})
    (made,) = mri.study(replace(P, voxels="some", voxel_evaluations=8), prior, [scan], errors)
    assert list(made.images)[-1] == "voxels" and made.draws["voxels"].shape == made.draws["trusted"].shape
    assert "this scan" in made.verdicts["voxels"] and made.bills["voxels"].denoiser_calls > 0


def test_an_autoencoder_of_fewer_latent_channels_goes_on_as_it_was():
    def small(channels):
        torch.manual_seed(channels)
        return AutoencoderKL(
            channels=8,
            channel_mult=(1, 2),
            latent_channels=channels,
            norm_groups=4,
            dims=3,
            in_channels=1,
            out_channels=1,
        ).eval()

    old, new = small(2), small(5)
    x = torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    new.load_state_dict(widened(old.state_dict(), new))
    with torch.no_grad():
        mean, more = old.posterior(x)[0], new.posterior(x)[0]
        alone = torch.cat([mean, torch.zeros_like(more[:, 2:])], 1)
        change = (new.decode(alone) - old.decode(mean)).abs().mean() / old.decode(mean).std()
    assert torch.allclose(more[:, :2], mean, atol=1e-5) and more.shape[1] == 5 and change < 0.3
    with pytest.raises(ValueError, match="more than latent_channels = 2"):
        widened(new.state_dict(), old)
    assert all(torch.equal(v, old.state_dict()[k]) for k, v in widened(old.state_dict(), old).items())
