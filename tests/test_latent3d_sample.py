"""Sampling, failing and measuring with a tiny untrained prior: the mathematics does not ask for brains."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from companion.data import anatomy, volume_folder, volumes
from companion.data.nifti import load_nifti
from companion.data.store import open_dataset, write_dataset
from companion.diffusion.denoisers import EDMDenoiser
from companion.diffusion.latent import LatentDenoiser, LatentSpace
from companion.diffusion.noise import DiscreteSchedule
from companion.evaluation import failures as evaluation_failures
from companion.evaluation import volumes as evaluation_volumes
from companion.evaluation.known_people import TrainingSet, affine_of_first, check_grid, unseen
from companion.models import latent_draws
from companion.models.latent import LatentPrior
from companion.networks.autoencoder import AutoencoderKL
from companion.networks.unet import UNet
from companion.papers.latent3d import sample as latent3d
from companion.show.planes import by_plane, sheet

SHAPE = (32, 32, 32)
P = latent3d.SampleVolumes(
    draws=2,
    evaluations=4,
    solvers=("ddim", "heun", "ddpm"),
    held_out=4,
    training=2,
    pairs=2,
    data="data/none.h5",
    segmenter=None,
    device="cpu",
    autocast=None,
)


def drawn(prior, p, solver=None):
    return latent_draws.draw(prior, p, range(p.seed, p.seed + p.draws), solver)


def tiny_prior(D=None) -> LatentPrior:
    torch.manual_seed(0)
    codec = AutoencoderKL(3, 1, 1, 8, (1, 1), 1, 2, decoder_blocks=1, middle=False, norm_groups=4, patch=2)
    images = torch.stack([volumes.virtual(s, SHAPE).image[None] for s in anatomy.cohort("train", 2)])
    space = LatentSpace.fit(codec.requires_grad_(False), [images])
    if D is None:
        D = EDMDenoiser(UNet(2, 32, 2, 1, (), (1,), dims=3), 1.0)
    voxel_mm = volumes.spacing(SHAPE)
    affine = volumes.grid_affine(SHAPE, voxel_mm, anatomy.CENTRE_MM)
    config = {"data": {"shape": SHAPE, "voxel_mm": voxel_mm, "affine": affine.tolist(), "volumes": 2}}
    return LatentPrior(LatentDenoiser(D, space), config)


class White(torch.nn.Module):
    """The exact denoiser of white Gaussian latents of standard deviation 1."""

    def forward(self, z, sigma, cond=None):
        return z / (1 + sigma.reshape(-1, 1, 1, 1, 1) ** 2)


@pytest.fixture(scope="module")
def prior():
    return tiny_prior()


@pytest.fixture(scope="module")
def white():
    return tiny_prior(White())


def test_a_draw_does_not_depend_on_its_company(prior):
    both = drawn(prior, P)
    alone = drawn(prior, replace(P, seed=P.seed + 1))
    assert both.x.shape == (2, 1, *SHAPE) and torch.allclose(both.x[1], alone.x[0], atol=1e-5)


def test_respaced_ddpm_keeps_the_variance(white):
    """White latents are what DDPM should end with, the closer the more times it visits."""
    p = replace(P, draws=4, levels="schedule", evaluations=200)
    assert drawn(white, p, "ddpm").z.std() == pytest.approx(1, abs=0.05)
    assert p.noise_levels(white)[0] == pytest.approx(DiscreteSchedule.linear().sigmas[-1].item())
    whole = evaluation_failures.short_steps(white, DiscreteSchedule.linear(200, 1e-3, 0.1), 200, range(4))
    assert whole.std() == pytest.approx(1, abs=0.05)  # with no time left out the step is right


def test_short_steps_end_where_sampling_began(prior):
    class Nothing(torch.nn.Module):
        def forward(self, z, sigma, cond=None):
            return torch.zeros_like(z)

    silent = LatentPrior(LatentDenoiser(Nothing(), prior.space), prior.config)
    schedule = DiscreteSchedule.linear(1000)
    right = drawn(silent, replace(P, levels="schedule", evaluations=10), "ddpm").z
    assert right.std() < 1e-6
    assert evaluation_failures.short_steps(silent, schedule, 10, range(2)).std() > 0.8


def test_deterministic_samplers_share_a_limit(white):
    rows, volumes_by = evaluation_volumes.solver_table(white, replace(P, evaluations=24), P.solvers, range(2))
    found = {row["sampler"]: row for row in rows}
    assert found["ddpm"]["from the limit"] == "stochastic" and set(volumes_by) == {"ddim", "heun", "ddpm"}
    assert found["heun"]["from the limit"][0] < found["ddim"]["from the limit"][0] < 1
    assert found["heun"]["evaluations"] <= 24


def test_each_failure_differs_from_the_repair(prior):
    made = evaluation_failures.mistakes(prior, P.evaluations)
    good = made.pop("repaired")
    assert len(made) == 5 and all(x.shape == (2, 1, *SHAPE) and not torch.allclose(x, good) for x in made.values())


def test_clipping_is_in_the_units_of_the_autoencoder(prior):
    space = prior.space
    z = 100 * torch.randn(1, *prior.latent_shape)
    out = evaluation_failures.Clipped(tiny_prior(White()))(z, torch.tensor([1e-3]))
    raw = out * space.std.reshape(-1, 1, 1, 1) + space.mean.reshape(-1, 1, 1, 1)
    assert raw.abs().max() <= 1 + 1e-5 and raw.abs().max() > 0.99


def test_loss_of_the_best_white_network_is_the_formula(white):
    z = torch.randn(64, *white.latent_shape)
    rows = evaluation_failures.loss_against_scale(white, z, levels=6)
    known = [float(row["loss that knows only the scale"]) for row in rows]
    assert known == pytest.approx([0.3907, 0.1649, 0.0603, 0.0163], abs=1e-4)
    for row in rows:  # this prior is that network
        assert float(row["loss of this prior"]) == pytest.approx(float(row["loss that knows only the scale"]), rel=0.1)
    assert evaluation_failures.unexplained(white, z, torch.tensor([0.1, 10.0])) == pytest.approx([1, 1], abs=0.1)


def test_rows_are_planes_and_columns_are_volumes():
    a, b = torch.rand(2, 1, *SHAPE)
    rows = by_plane({"a": a, "b": b})
    assert list(rows) == ["axial", "coronal", "sagittal"] and list(rows["axial"]) == ["a", "b"]
    assert torch.equal(rows["coronal"]["b"][0, 0], b[0, -1, SHAPE[1] // 2])  # the vertex is in the first row


def test_sheet_cuts_long_sets_into_rows():
    x = torch.rand(5, 1, *SHAPE)
    rows = sheet(x, columns=3)
    assert len(rows) == 6 and all(list(row) == ["1", "2", "3"] for row in rows.values())
    assert torch.isnan(rows["4-6\naxial"]["3"]).all()


def test_volumes_on_disk_lie_in_mni_space(prior, tmp_path):
    x = torch.rand(2, 1, *SHAPE)
    first, _ = latent_draws.save_volumes(tmp_path, prior, x)
    back = load_nifti(first)
    assert np.array_equal(back.array, x[0, 0].numpy()) and np.allclose(back.affine, prior.affine)
    middle = back.affine @ np.array([15.5, 15.5, 15.5, 1])
    assert np.allclose(middle[:3], anatomy.CENTRE_MM)


@pytest.mark.parametrize(
    "voxel, grow, turn, match",
    [
        (None, 0, (), None),
        (4.0, 0, (), "has voxels of 4 x 4 x 4 mm"),
        (None, 6, (), "lies elsewhere"),
        (None, -5, (), "of where the"),
        (None, 0, (1,), "better upside down, so their affines"),
        (None, 0, (2,), "better back to front"),
        (None, 0, (3,), None),  # left and right are alike
    ],
)
def test_grids_are_compared_by_voxel_size_and_content(prior, tmp_path, voxel, grow, turn, match):
    brain = volumes.virtual(anatomy.cohort("train", 1)[0], SHAPE).image[None]
    image = (brain > 0.1).flip(turn)
    for _ in range(abs(grow)):  # a head around the brain, or a brain far too small
        image = (torch.nn.functional.max_pool3d((image if grow > 0 else ~image).float()[None], 3, 1, 1)[0] > 0) ^ (
            grow < 0
        )
    write_dataset(
        tmp_path / "d.h5",
        {"image": torch.where(image, 0.7, 0)[None].numpy()},
        units={"image": "1"},
        scale={"image": "made up"},
        source="somebody's scans",
        seed=None,
        split={"train": ["0"]},
        attrs={"voxel_mm": [voxel] * 3 if voxel else list(prior.voxel_mm)},
    )
    prepared = open_dataset(tmp_path / "d.h5")
    if match is None:
        check_grid(prepared, prior)
    else:
        with pytest.raises(ValueError, match=match):
            check_grid(prepared, prior)


def test_study_of_real_people_passes_and_of_copies_fails(prior, tmp_path):
    trained = TrainingSet.of(prior, P.data, P.training)
    assert trained.count == 2 and torch.equal(trained[1], next(trained.batches(2))[1])
    copies = torch.stack([trained[0], trained[1].flip(-1)])
    study = latent3d.study(P, prior, copies)
    verdict = {row["question"]: row["passes"] for row in evaluation_volumes.verdict(study)}
    assert not verdict["nobody memorised?"]
    some = evaluation_volumes.verdict(replace(study, searched="1 of its 2 people", searched_all=False))[1]
    assert not some["passes"] and "searched 1 of its 2 people, NOT all" in some["found"]
    assert study.memory[-1]["smallest"] == pytest.approx(0, abs=1e-3)
    assert [row["volumes"] for row in study.likeness] == ["other people", "other people, reconstructed", "synthetic"]
    assert study.likeness[0]["mean"] < study.likeness[1]["mean"]  # an untrained autoencoder is unlike people


def test_a_prior_on_patients_meets_its_own_people_anew(prior, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    data = prior.config["data"] | {"source": volume_folder.PATIENTS, "volumes": 10}
    known = replace(prior, config=dict(prior.config) | {"data": data})
    trained = TrainingSet.of(known, "none.h5", 100)
    assert (trained.count, trained.own) == (3, False) and "companion data get heads" in trained.what
    make = volume_folder.people(volume_folder.PATIENTS, "train", SHAPE)
    assert torch.equal(trained[2][0], make(8).image), "every fourth is of the template"
    assert not torch.equal(unseen(known, "none.h5", "test", 1)[0], trained[0])
    with pytest.raises(FileNotFoundError, match="companion data get heads"):
        volume_folder.people(volume_folder.PATIENTS, "train", SHAPE, tmp_path / "heads")


def test_images_of_a_person_lie_where_the_file_says(prior, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    assert np.array_equal(affine_of_first(prior, "none.h5", "test"), prior.affine)
    where, image = prior.affine + np.eye(4, k=3) * 7, volumes.virtual(anatomy.cohort("train", 1)[0], SHAPE).image
    write_dataset(
        tmp_path / "own.h5",
        {"image": torch.stack([image, image])[:, None].numpy(), "affine": np.stack([prior.affine, where])},
        units={"image": "1", "affine": "mm"},
        scale={"image": "made up", "affine": "1"},
        source="somebody's scans",
        seed=None,
        split={"train": ["0"], "test": ["1"]},
        attrs={"voxel_mm": list(prior.voxel_mm)},
    )
    assert np.array_equal(affine_of_first(prior, "own.h5", "test"), where)
    assert torch.equal(unseen(prior, "own.h5", "test", 4)[:, 0], image[None])
    others = unseen(prior, "own.h5", "validation", 1)
    assert not torch.equal(others[0, 0], image), "errors are measured on virtual people, not on this one"
