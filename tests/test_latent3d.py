"""Latent diffusion on volumes: data, autoencoder, latents on disk, priors; all at toy size."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from companion.data import volume_folder, volumes
from companion.data.nifti import save_nifti
from companion.data.store import open_dataset, write_dataset
from companion.diffusion import latent
from companion.diffusion.noise import karras
from companion.diffusion.sampling import sample
from companion.evaluation import denoising
from companion.evaluation import volumes as evaluation_volumes
from companion.models import architectures
from companion.models import checkpoint as weights
from companion.models import latent as models_latent
from companion.models.folder import save_checkpoint
from companion.papers.latent3d import autoencoder as latent3d_autoencoder
from companion.papers.latent3d import data as latent3d
from companion.papers.latent3d import prior as latent3d_prior
from companion.training import codec as training_codec
from companion.training import latents
from companion.training.recipe import save

SHAPE = (8, 12, 16)  # no cube, and no multiple of 16


@pytest.fixture
def prepared(tmp_path):
    """Six volumes: a bright ellipsoid of random size each."""
    rng, at = np.random.default_rng(0), np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    image = np.stack([((at**2).sum(0) < r**2) * r for r in rng.uniform(0.6, 1.0, 6)])[:, None].astype(np.float16)
    tissue = rng.uniform(100, 900, (6, 3)).astype(np.float32)
    affine = np.repeat(volumes.grid_affine(SHAPE, (2, 2, 2), (0, 0, 0))[None], 6, 0)
    path = write_dataset(
        tmp_path / "toy.h5",
        {"image": image, "tissue_ml": tissue, "affine": affine},
        units=dict.fromkeys(("image", "tissue_ml", "affine"), "1"),
        scale=dict.fromkeys(("image", "tissue_ml", "affine"), "1"),
        source="toy",
        seed=0,
        split={"train": range(5), "test": [5]},
        attrs={"voxel_mm": [2, 2, 2]},
    )
    return open_dataset(path)


@pytest.fixture
def toy(prepared, tmp_path):
    return latent3d_autoencoder.TrainLatent(
        data=str(prepared.path),
        out=str(tmp_path / "run"),
        channels=(8, 8),
        patch=2,
        latent_channels=3,
        ae_steps=3,
        ae_warmup=1,
        model_channels=32,
        prior_res_blocks=1,
        attention_resolutions=(),
        prior_patch=1,
        steps=4,
        warmup=1,
        batch_size=2,
        autocast=None,
        checkpoint_every=1,
        device="cpu",
    )


@pytest.fixture
def trained(toy):
    """The parameters of a toy run whose autoencoder is there."""
    saved_autoencoder(toy)
    return toy


def saved_autoencoder(p):
    result, config = latent3d_autoencoder.train_autoencoder(p, progress=False)
    options = {"batch_size": p.ae_batch_size, "folder": Path(p.out) / "autoencoder" / "checkpoint"}
    return save(result, p, config, {}, model=training_codec.codec_of(result), **options)


def saved_prior(p):
    result, _, config = latent3d_prior.train_prior(p, progress=False)
    return save(result, p, config, [], folder=Path(p.out) / "prior" / "checkpoint"), result


# --- data


def test_a_folder_is_prepared_by_person_and_says_what_it_left_out(tmp_path):
    ball = (np.linalg.norm(np.stack(np.meshgrid(*[np.arange(32) - 16] * 3, indexing="ij")), axis=0) < 11).astype(float)
    for person in range(4):
        for session in range(2):
            save_nifti(tmp_path / "files" / f"sub-{person}_ses-{session}_T1w.nii.gz", ball * (person + 1), voxel_mm=6.0)
    save_nifti(tmp_path / "files" / "sub-9_T1w.nii.gz", ball + 1, voxel_mm=6.0)
    p = latent3d.PrepareData(
        source=str(tmp_path / "files"),
        data=str(tmp_path / "made.h5"),
        shape=(16, 18, 20),
        voxel_mm=(10, 9, 8),
        validation_share=0.25,
        test_share=0.25,
    )
    made = latent3d.prepare(p, progress=False)
    assert made.shapes["image"] == (8, 1, 16, 18, 20) and list(made.attrs["skipped"]) == ["sub-9_T1w.nii.gz"]
    people = {part: {name.split("_")[0] for name in names} for part, names in made.split.items()}
    assert sorted(map(len, people.values())) == [1, 1, 2] and len(set().union(*people.values())) == 4
    np.testing.assert_allclose(made.read("image").max((1, 2, 3, 4)), 1, atol=0.01)  # one scale for all
    np.testing.assert_allclose(made.read("scale"), np.repeat(np.arange(4) + 1, 2), rtol=1e-3)
    np.testing.assert_allclose(np.diag(made.read("affine")[0]), [8, -9, 10, 1])
    assert volume_folder.held_out(made, "validation", 9).shape == (2, 1, 16, 18, 20)
    with pytest.raises(ValueError, match="subjects = 1500 where the parameters ask for subjects = 7"):
        latent3d.prepare(replace(p, subjects=7), progress=False)
    with pytest.raises(ValueError, match="no file of .* can be used"):
        latent3d.prepare(replace(p, data=str(tmp_path / "none.h5"), voxel_mm=(1, 1, 1)), progress=False)
    with pytest.raises(ValueError, match="three numbers"):
        latent3d.prepare(replace(p, shape=(16, 16)), progress=False)


# --- latents


def test_cached_latents_are_normalised_and_belong_to_one_autoencoder(trained, prepared, tmp_path):
    codec = models_latent.load_autoencoder(trained.codec)
    path = tmp_path / "z.h5"
    space, cached = latents.cache_latents(codec, prepared, path, autocast=None, progress=False)
    z = torch.from_numpy(cached.read("z")).float()
    assert z.shape == (5, 2, 3, 2, 3, 4)
    torch.testing.assert_close(z.mean((0, 1, 3, 4, 5)), torch.zeros(3), atol=2e-3, rtol=0)
    torch.testing.assert_close(z.flatten(3).movedim(2, 0).flatten(1).std(1), torch.ones(3), atol=2e-3, rtol=0)
    x = torch.from_numpy(prepared.read("image")[:1]).float()
    torch.testing.assert_close(space.encode(x), z[0, :1], atol=5e-3, rtol=0)
    torch.testing.assert_close(space.encode(x.flip(-1)), z[0, 1:], atol=5e-3, rtol=0)

    before = path.stat().st_mtime_ns
    latents.cache_latents(codec, prepared, path, progress=False)
    assert path.stat().st_mtime_ns == before
    codec.quant_conv.bias.data += 1
    with pytest.raises(ValueError, match="made with another autoencoder"):
        latents.cache_latents(codec, prepared, path, progress=False)
    codec.quant_conv.bias.data -= 1
    other = tmp_path / "other.h5"
    other.write_bytes(prepared.path.read_bytes())
    image = np.zeros((2, 1, *SHAPE), np.float16)
    write_dataset(
        other,
        {"image": image},
        units={"image": "1"},
        scale={"image": "1"},
        source="other",
        seed=0,
        split={"train": [0, 1]},
    )
    with pytest.raises(ValueError, match="of other volumes"):
        latents.cache_latents(codec, open_dataset(other), path, progress=False)


# --- priors


@pytest.mark.parametrize("kind", ["edm", "flow", "v", "epsilon", "x0"])
def test_a_prior_loads_with_its_autoencoder_and_draws_volumes(trained, kind, tmp_path):
    p = replace(trained, diffusion=kind, schedule="linear")
    folder, result = saved_prior(p)
    prior = models_latent.load_latent(folder, autocast=None)
    assert prior.shape == SHAPE and prior.voxel_mm == (2, 2, 2) and prior.latent_shape == (3, 2, 3, 4)
    z = sample(prior.D, karras(3, 0.01, 20.0), shape=prior.latent_shape, seeds="0-1").x
    x = prior.decode(z, batch=1)
    assert x.shape == (2, 1, *SHAPE) and torch.isfinite(x).all()
    torch.testing.assert_close(prior.decode(z), x)
    rows = denoising.latent_errors(prior.D, z, [0.1, 10.0])
    assert rows[0]["blank"] == pytest.approx(0.0995) and rows[0]["error"] > 0

    stranger = models_latent.load_autoencoder(p.codec)
    stranger.quant_conv.bias.data += 1
    config = weights.describe(p.codec)
    save_checkpoint(tmp_path / "stranger", stranger, config, {})
    with pytest.raises(ValueError, match="another autoencoder"):
        models_latent.load_latent(folder, tmp_path / "stranger")
    with pytest.raises(ValueError, match="no autoencoder"):
        models_latent.load_autoencoder(folder)


def test_training_resumes_exactly(trained, tmp_path):
    _, whole = saved_prior(trained)
    p = replace(trained, out=str(tmp_path / "again"), stage="prior", autoencoder=trained.codec)
    part, *_ = latent3d_prior.train_prior(replace(p, seconds=1e-9), progress=False)
    assert part.step == 1 and not part.finished
    again, *_ = latent3d_prior.train_prior(p, progress=False)
    for a, b in zip(whole.ema.parameters(), again.ema.parameters(), strict=True):
        assert torch.equal(a, b)


def test_covariates_reach_the_prior_in_their_own_units(trained, prepared):
    p = replace(trained, covariates=("brain_ml", "csf_share"))
    folder, _ = saved_prior(p)
    prior = models_latent.load_latent(folder, autocast=None)
    values = latents.covariates(torch.from_numpy(prepared.read("tissue_ml", "train")), p.covariates)
    cond = latents.condition(values, prior.config["covariates"], prior.latent_shape[1:])
    assert cond.shape == (5, 2, 2, 3, 4)
    torch.testing.assert_close(cond.mean((0, 2, 3, 4)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(cond[..., 0, 0, 0].std(0), torch.ones(2))
    x = sample(prior.D, karras(2, 0.1, 10.0), shape=prior.latent_shape, seeds="0-1", cond=cond[:2]).x
    assert torch.isfinite(x).all()
    with pytest.raises(ValueError, match="this prior takes .*brain_ml, csf_share"):
        latents.condition(values[:, :1], prior.config["covariates"], (2, 3, 4))


def test_schedules_that_leave_signal_are_refused_before_training(trained, monkeypatch):
    short = latent.DiscreteSchedule.linear(steps=300)
    assert latents.check_levels(
        architectures.build({"network": {"name": "UNet", "in_channels": 1, "model_channels": 32,
        "out_channels": 1, "num_res_blocks": 1, "attention_resolutions": [], "channel_mult": [1]},
        "denoiser": {"name": "EDMDenoiser"}})) == pytest.approx(1 / 80, rel=1e-3)  # fmt: skip
    monkeypatch.setitem(architectures.SCHEDULES, "linear", lambda: short)
    with pytest.raises(ValueError, match="21.9 % of the signal is left"):
        latent3d_prior.train_prior(replace(trained, diffusion="v", schedule="linear"), progress=False)
    with pytest.raises(ValueError, match="choose diffusion v or x0"):
        latent3d_prior.train_prior(replace(trained, diffusion="epsilon", schedule="zero_terminal"), progress=False)


@pytest.mark.parametrize("architecture", ["vq", "plain"])
def test_codebook_autoencoders_train_too(toy, prepared, architecture):
    p = replace(toy, architecture=architecture, channels=(8, 8), codes=16, ae_steps=2)
    codec = models_latent.load_autoencoder(saved_autoencoder(p))
    x = volume_folder.held_out(prepared, "test", 1)
    assert evaluation_volumes.reconstruct(codec, x).shape == x.shape == (1, 1, *SHAPE)


def test_a_better_decoder_leaves_latents_and_prior_valid(trained, prepared, tmp_path):
    folder, _ = saved_prior(trained)
    name = trained.codec
    p = replace(trained, stage="decoder", autoencoder=name, out=str(tmp_path / "decoder"))
    saved_autoencoder(p)
    prior, codec = (
        models_latent.load_latent(folder, autocast=None),
        models_latent.load_autoencoder(p.codec),
    )
    x = torch.from_numpy(prepared.read("image")[:1]).float()
    assert torch.equal(codec.encode(x), prior.space.codec.encode(x))
    better = models_latent.with_decoder(prior, codec)
    z = better.space.encode(x)
    torch.testing.assert_close(z, prior.encode(x))
    assert not torch.equal(better.space.decode(z), prior.decode(z))
    codec.encoder.conv_in.bias.data += 1
    with pytest.raises(ValueError, match="the encoders differ"):
        models_latent.with_decoder(prior, codec)


def test_an_adversary_trains_beside_the_autoencoder(toy, monkeypatch):
    monkeypatch.setattr(
        latent3d_autoencoder,
        "PatchDiscriminator",
        partial(latent3d_autoencoder.PatchDiscriminator, channels=4, levels=1),
    )
    p = replace(toy, adversary=0.01, ae_steps=2, out=toy.out + "-gan")
    assert models_latent.load_autoencoder(saved_autoencoder(p)).latent_channels == 3


def test_blur_costs_more_with_the_edge_term():
    x = torch.zeros(1, 1, 8, 8, 8)
    x[..., 4:] = 1
    soft = x.clone()
    soft[..., 3], soft[..., 4] = 0.25, 0.75
    shifted = x + 0.0625  # the same mean absolute error, without blur
    assert training_codec.reconstruction_error(soft, x) == training_codec.reconstruction_error(shifted, x)
    assert training_codec.edge_error(shifted, x) == 0 < training_codec.edge_error(soft, x)


def test_reconstruction_figures_of_a_perfect_and_a_poor_copy():
    x = torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)) * (torch.arange(16) > 4)
    poor = evaluation_volumes.reconstruction_figures(x * 0.9, x)
    good = evaluation_volumes.reconstruction_figures(x + 1e-4, x)
    assert good["SSIM (brain)"][0] > 0.999 > poor["SSIM (brain)"][0]
    assert poor["L1 (brain)"][0] == pytest.approx(0.05, rel=0.05)
    assert good["PSNR (dB)"][0] == pytest.approx(80, abs=0.1)


# --- the 2D check of the code: digits


@pytest.mark.slow
def test_digits_come_out_of_latents(tmp_path):
    """Digits drawn through an autoencoder look like digits: nearer to test digits than noise of the same latents is."""
    data = latent3d.PrepareData(source="digits", data=str(tmp_path / "digits.h5"), shape=(16, 16), subjects=1500)
    prepared = latent3d.prepare(data, progress=False)
    p = latent3d_autoencoder.TrainLatent(
        data=str(prepared.path),
        out=str(tmp_path / "run"),
        channels=(32, 32),
        patch=1,
        latent_channels=4,
        mirror=False,
        background=1.0,
        ae_steps=250,
        ae_batch_size=16,
        ae_learning_rate=3e-3,
        model_channels=32,
        prior_patch=1,
        channel_mult=(1, 2),
        prior_res_blocks=1,
        attention_resolutions=(2,),
        steps=300,
        batch_size=32,
        learning_rate=2e-3,
        ema_decay=0.99,
        checkpoint_every=1000,
        device="cpu",
    )
    saved_autoencoder(p)
    folder, _ = saved_prior(p)
    prior = models_latent.load_latent(folder, autocast=None)
    real = volume_folder.held_out(prepared, "test", 297)
    assert (
        evaluation_volumes.reconstruction_figures(evaluation_volumes.reconstruct(prior.space.codec, real), real)[
            "PSNR (dB)"
        ][0]
        > 22
    )
    drawn = prior.decode(sample(prior.D, karras(20, 0.01, 80.0), shape=prior.latent_shape, seeds="0-31").x)
    noise = prior.decode(torch.randn(32, *prior.latent_shape, generator=torch.Generator().manual_seed(0)))

    def distance(x):
        return torch.cdist(x.flatten(1), real.flatten(1)).min(1).values.mean().item()

    among = torch.cdist(real.flatten(1), real.flatten(1)).topk(2, largest=False).values[:, 1].mean().item()
    assert distance(drawn) < 1.5 * among < distance(noise)
