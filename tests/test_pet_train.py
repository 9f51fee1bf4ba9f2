"""PET's own parts: scans in kBq/mL at any dose, prepared slices, three trainings on one path, exact resume."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from companion.acquisition import pet as acquisition_pet
from companion.data import pet as data_pet
from companion.data.nifti import save_nifti
from companion.models.architectures import build
from companion.models.checkpoint import describe, load_denoiser
from companion.papers.pet import data as pet
from companion.papers.pet import prior as pet_prior
from companion.parameters import check, read_yaml
from companion.reconstruction import condition, network_errors, stopping
from companion.show import activity as show_activity
from companion.training.loop import TrainConfig
from companion.training.recipe import save

PROFILES = Path(__file__).parents[1] / "notebooks/params/pet"


def preparation(folder, **values):
    defaults = dict(
        data=str(folder / "data.h5"),
        image_size=32,
        subjects=3,
        slices_per_subject=2,
        lesion_share=1.0,
        iterations=(2, 5),
        fraction=0.25,
        classes=4,
    )
    return pet.PrepareData(**defaults | values)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return pet.prepare(preparation(tmp_path_factory.mktemp("pet")), progress=False)


@pytest.fixture(scope="module")
def people():
    return data_pet.held_out("validation", 3, 32, lesions=1)


def training(prepared, folder, **values):
    defaults = dict(
        data=str(prepared.path),
        out=str(folder),
        steps=4,
        batch_size=4,
        warmup=1,
        model_channels=32,
        channel_mult=(1, 1),
        checkpoint_every=2,
        autocast=None,
        device="cpu",
    )
    return pet_prior.TrainModel(**defaults | values)


KINDS = {
    "unconditional": {},
    "conditional": {"task": "conditional"},
    "high dose": {"task": "conditional", "target": "high_dose", "dose_channel": False, "variance_weight": 0},
    "classes": {"class_labels": True, "label_dropout": 0.5, "network": "EDMUNet", "augment": 0.5, "dropout": 0.1},
}


# ------------------------------------------------------------------------------------------------------------ scans


def test_activity_keeps_its_units_at_every_dose(people):
    """Ten thousand to ten million counts: the level of an MLEM image is that of the truth, without a scale fit."""
    for counts in (1e4, 1e6):
        scan = acquisition_pet.acquire(people.image, people.mu, counts, [1, 2, 3], pixel_mm=people.pixel_mm)
        assert scan.y.sum((1, 2, 3)).tolist() == pytest.approx([counts] * 3, rel=0.05)
        level = condition.iterates(scan, (8,)).mean((1, 2, 3)) / people.image.mean((1, 2, 3))
        assert level.tolist() == pytest.approx([1] * 3, abs=0.06)
    dose = [
        acquisition_pet.dose_channel(acquisition_pet.mean_sensitivity(acquisition_pet.scanner((32, 32), 7.0) * c), 25.0)
        for c in (1.0, 10.0)
    ]
    assert (dose[1] - dose[0]).item() == pytest.approx(np.log(10) / 7, abs=1e-5)


def test_a_condition_depends_on_its_own_scan_only(people):
    options = dict(pixel_mm=people.pixel_mm)
    three = acquisition_pet.acquire(people.image, people.mu, torch.tensor([1e4, 1e5, 1e6]), [7, 8, 9], **options)
    alone = acquisition_pet.acquire(people.image[1:2], people.mu[1:2], 1e5, [8], **options)
    assert torch.equal(three.y[1], alone.y[0])
    cond = condition.condition(three, (2, 5), scale_kbq=20.0)
    assert cond.shape == (3, 3, 32, 32) and torch.allclose(
        cond[1], condition.condition(alone, (2, 5), 20.0)[0], atol=1e-4
    )
    assert torch.allclose(20 * cond[:, :2], condition.iterates(three, (2, 5)).clamp(max=80), rtol=1e-5)
    assert cond[:, 2].flatten(1).std(1).max() < 1e-6 and (cond[:, 2, 0, 0].diff() > 0).all()  # the dose, a constant


def test_thinned_scans_have_less_dose_and_the_same_activity(people):
    full = acquisition_pet.acquire(people.image, people.mu, 1e6, [1, 2, 3], pixel_mm=people.pixel_mm, randoms=0.2)
    low = full.thinned(0.1, [1, 2, 3])
    assert (low.y <= full.y).all() and low.y.sum().item() == pytest.approx(0.1 * full.y.sum().item(), rel=0.01)
    assert torch.allclose(low.A(people.image), 0.1 * full.A(people.image))
    assert torch.allclose(low.background, 0.1 * full.background)
    table = stopping.thinning_table(replace(full, background=None), (0.1, 1.0), repeats=30)
    assert all(row[k] == pytest.approx(1, abs=0.05) for row in table for k in row if k != "fraction")


def test_tables_say_where_to_stop_and_what_a_maximum_does(people):
    ladder = stopping.dose_ladder(people, (1e4, 1e7), (4, 40))
    low, high = stopping.stopping_table(ladder, (4, 40))
    assert low["4 iterations"][0] < low["40 iterations"][0] and high["40 iterations"][0] < high["4 iterations"][0]
    low, high = stopping.maximum_table(ladder)
    assert low["level, scale from counts"][0] == pytest.approx(1, abs=0.1)
    assert low["level, divided by maxima"][0] < 0.9 * high["level, divided by maxima"][0]


def test_held_out_people_sweep_the_slab(people):
    assert people.height_mm.diff().tolist() == pytest.approx([80 / 3] * 2) and (people.subject >= 1_000_000).all()
    assert people.pixel_mm == data_pet.FIELD_MM / 32 and (people.lesions.flatten(1).amax(1) == 1).sum() >= 2


# ------------------------------------------------------------------------------------------------------------- data


def test_slices_are_prepared_once(prepared):
    p = preparation(prepared.path.parent)
    shapes = {
        "activity": (3, 2, 1, 32, 32),
        "mlem": (3, 2, 2, 32, 32),
        "high": (3, 2, 1, 32, 32),
        "counts": (3, 2),
        "sensitivity": (3, 2),
        "label": (3, 2),
    }
    assert dict(prepared.shapes) == shapes and prepared.units["activity"] == "kBq/mL"
    activity = prepared.read("activity")
    assert prepared.attrs["rms"] == pytest.approx(np.sqrt((activity**2).mean()), rel=1e-6)
    assert (prepared.read("counts") < 0.25e7 * 1.05).all() and set(prepared.read("label").ravel()) <= set(range(4))
    written = prepared.path.stat().st_mtime_ns
    assert pet.prepare(p, progress=False).path.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"randoms = 0.0 where .* randoms = 0.5; delete the file"):
        pet.prepare(replace(p, randoms=0.5), progress=False)


def test_published_phantoms_and_activity_maps_can_be_prepared(tmp_path):
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.avg_pool1d(torch.rand(1024, 1, 290, generator=generator), 10, 1)[:, 0]  # 281 slices
    order = sorted(range(281), key=str)
    np.savez(tmp_path / "phantoms.npz", phantoms=(12 * smooth.T[order]).round().byte().numpy())
    p = preparation(
        tmp_path,
        source=str(tmp_path / "phantoms.npz"),
        attenuation=False,
        iterations=(3,),
        slices_per_subject=4,
        held_out_share=0.0,
    )
    prepared = pet.prepare(p, progress=False)
    assert prepared.shapes["high"] == (1, 4, 1, 32, 32) and prepared.units["activity"] == "relative"

    folder = tmp_path / "maps"
    folder.mkdir()
    for i in range(2):
        x = np.zeros((6, 48, 40), np.float32)
        x[1:5, 10:30, 10:30] = 5.0 + i
        save_nifti(folder / f"{i}.nii.gz", x, voxel_mm=4.0)
    p = preparation(tmp_path, source=str(folder), data=str(tmp_path / "maps.h5"), held_out_share=0.5)
    with pytest.raises(ValueError, match="its units are not said, and are not guessed"):
        pet.prepare(p, progress=False)
    p = replace(p, units="kBq/mL")
    prepared = pet.prepare(p, progress=False)
    assert prepared.split["test"] == ("1.nii.gz",) and prepared.attrs["pixel_mm"] == pytest.approx(6.0)
    inside = prepared.read("activity")[0, 0, 0]
    assert inside.max() == pytest.approx(5.0) and inside.sum() * 36 == pytest.approx(5.0 * 400 * 16, rel=1e-4)
    save_nifti(folder / "2.nii.gz", np.ones((9, 32, 32), np.float32), voxel_mm=6.0)
    few = pet.prepare(replace(p, slices_per_subject=8, data=str(tmp_path / "b.h5"), held_out_share=0.0), progress=False)
    assert few.subjects == ("2.nii.gz",) and "4 slices with activity" in few.attrs["skipped"]["0.nii.gz"]
    save_nifti(folder / "3.nii.gz", 5e3 * x, voxel_mm=4.0)
    again = pet.prepare(replace(p, data=str(tmp_path / "d.h5"), subjects=9), progress=False)
    assert "more than any tissue takes up" in again.attrs["skipped"]["3.nii.gz"] and len(again.subjects) == 3
    with pytest.raises(FileNotFoundError, match="neither a phantoms .npz nor a folder"):
        pet.prepare(preparation(tmp_path, source="nowhere", data=str(tmp_path / "c.h5")), progress=False)


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_comes_back_from_disk(prepared, tmp_path, kind):
    p = training(prepared, tmp_path, validation_people=2, **KINDS[kind])
    result, config = pet_prior.train(p, progress=False)
    errors = network_errors.validation_errors(result.ema, config["data"], people=2)
    logged = network_errors.logged_errors(errors)
    assert len(logged) == len(errors) and [line for line in result.stats if logged.items() <= line.items()]
    assert result.finished and errors and show_activity.errors_figure(errors).axes
    D, config = load_denoiser(save(result, p, config, errors, unit="slices")), describe(tmp_path / "checkpoint")
    assert config["data"]["scale_kbq"] == 25.0 and config["data"]["pixel_mm"] == 7.0
    assert hasattr(D, "moments") == (p.variance_weight > 0)
    channels = {"unconditional": 1, "conditional": 4, "high dose": 3, "classes": 1}
    assert config["network"]["in_channels"] == channels[kind]
    assert config["denoiser"]["sigma_data"] == pytest.approx(prepared.attrs["rms"] / 25, abs=1e-3)


@pytest.mark.parametrize("kind", ["conditional", "classes"])
def test_resume_continues_the_same_loss_stream(prepared, tmp_path, monkeypatch, kind):
    whole, _ = pet_prior.train(training(prepared, tmp_path / "whole", **KINDS[kind]), progress=False)
    model_loss, calls = pet_prior.model_loss, []

    def killed(*args, **options):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return model_loss(*args, **options)

    monkeypatch.setattr(pet_prior, "model_loss", killed)
    p = training(prepared, tmp_path / "cut", **KINDS[kind])
    with pytest.raises(KeyboardInterrupt):
        pet_prior.train(p, progress=False)
    assert pet_prior.train(p, progress=False)[0].loss == whole.loss and len(calls) == 6  # from the checkpoint at 2 on


@pytest.mark.slow
def test_two_processes_agree_with_one(prepared, tmp_path):
    p = training(prepared, tmp_path / "two", grad_accumulation=2, steps=2, **KINDS["classes"])
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(p).items()}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "companion.papers.pet.prior",
        str(tmp_path / "p.yaml"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    one, _ = pet_prior.train(replace(p, out=str(tmp_path / "one")), progress=False)
    last = json.loads((tmp_path / "two" / "stats.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and last["loss"] == pytest.approx(one.loss, rel=1e-6)


def test_target_and_condition_move_together(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        pet_prior, "edm_loss", lambda D, x0, *args, **labels: seen.update(x0=x0, cond=args[3], **labels)
    )
    generator = torch.Generator().manual_seed(0)
    x = 20 * torch.rand(12, 1, 32, 32, generator=generator)
    batch = {"activity": x, "mlem": x.repeat(1, 2, 1, 1), "sensitivity": torch.full((12,), 3.0)}
    for augment in (0.0, 0.5):
        pet_prior.model_loss(None, batch, generator, 25.0, True, -1.4, 1.3, 0.05, True, augment, "double_angle")
        assert torch.allclose(seen["x0"], seen["cond"][:, :1], atol=1e-6) and seen["cond"].shape[1] == 3
        assert not torch.equal(seen["x0"], x / 25) and seen["x0"].max() < 1
    assert seen["augment"].shape == (12, 9)


def test_class_guidance_needs_labels_that_were_dropped_at_times(prepared, tmp_path):
    torch.manual_seed(0)
    config = pet_prior.model_config(training(prepared, tmp_path, **KINDS["classes"]), prepared)
    assert config["network"]["num_classes"] == 4 and config["network"]["label_dropout"] == 0.5
    batch = pet_prior.training_slices(training(prepared, tmp_path, **KINDS["classes"]), prepared)[3]
    assert set(batch) == {"activity", "label"} and 0 <= batch["label"] < 4
    shown = pet_prior.first_batch(training(prepared, tmp_path, task="conditional"), prepared, 2)
    assert list(shown) == ["activity", "MLEM, 2", "MLEM, 5", "dose"] and shown["dose"].shape == (2, 1, 32, 32)


def test_impossible_trainings_are_refused(prepared, tmp_path):
    with pytest.raises(ValueError, match="set network: EDMUNet"):
        pet_prior.train(training(prepared, tmp_path, augment=0.1), progress=False)
    plain = pet.prepare(preparation(tmp_path, fraction=1.0), progress=False)
    with pytest.raises(ValueError, match="prepare it with a fraction below 1"):
        pet_prior.train(training(plain, tmp_path, target="high_dose"), progress=False)
    with pytest.raises(ValueError, match="unknown parameter labell"):
        check(pet_prior.TrainModel, {"labell_dropout": 0.1})
    with pytest.raises(FileNotFoundError, match="run the data notebook"):
        pet_prior.train(training(prepared, tmp_path, data=str(tmp_path / "none.h5")), progress=False)


def test_paper_profile_is_the_published_training(prepared):
    p = pet_prior.TrainModel(**read_yaml(PROFILES / "2_train/paper.yaml"))
    made = {"iterations": [50], "classes": 8, "counts": [1e6], "fraction": 0.25, "attenuation": False}
    config = pet_prior.model_config(p, replace(prepared, attrs=prepared.attrs | {"parameters": made}))
    with torch.device("meta"):
        D = build(config)
    assert sum(v.numel() for v in D.network.parameters()) == 57_088_897 and D.network.augment_dim == 9
    assert D.sigma_data == 0.5 and D.cond_scale == 2.0 and not D.learned_variance
    options = TrainConfig(
        steps=p.steps,
        batch_size=p.batch_size,
        learning_rate=p.learning_rate,
        warmup=p.warmup,
        schedule="cosine",
        ema_halflife=p.ema_halflife,
    )
    assert p.steps * p.batch_size == 600_000 and p.warmup * p.batch_size == 60_000
    assert [options.rate(n) for n in (0, p.warmup, p.steps)] == pytest.approx([1e-5, 2e-4, 4e-6])
    assert options.ema_beta(0) == 0 and options.ema_beta(p.steps) == pytest.approx(0.5 ** (32 / 15_000))
    for name in ("paper_unconditional", "paper_classes"):
        check(pet_prior.TrainModel, read_yaml(PROFILES / f"2_train/{name}.yaml"))
