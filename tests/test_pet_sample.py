"""PET's sampling: one seed one image, whatever the batch; files that keep scale, truth and counts; honest tables."""

import json
from dataclasses import replace

import h5py
import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from companion.data import pet as data_pet
from companion.data.store import open_dataset, write_dataset
from companion.diffusion.class_guidance import ClassGuidance
from companion.diffusion.sampling import Bill
from companion.evaluation import activity, metrics
from companion.models.architectures import build
from companion.models.folder import save_checkpoint
from companion.papers.pet import data as pet
from companion.papers.pet import sample as sampling
from companion.reconstruction import enhancement
from companion.show import activity as show_activity

SIZE = 32


def checkpoint(folder, task="unconditional", **network):
    """A network with random weights that knows its units."""
    conditional = task == "conditional"
    network = {
        "name": "EDMUNet",
        "in_channels": 1 + 3 * conditional,
        "model_channels": 32,
        "out_channels": 1,
        "num_res_blocks": 1,
        "channel_mult": [1, 1],
        "attention_resolutions": [],
    } | network
    data = {
        "source": "test",
        "scale": "1 is 20 kBq/mL",
        "scale_kbq": 20.0,
        "units": "kBq/mL",
        "task": task,
        "target": "phantom",
        "image_size": [SIZE, SIZE],
        "pixel_mm": 7.0,
    }
    data |= {"iterations": [2, 5], "dose_channel": True, "attenuation": True} if conditional else {}
    config = {"network": network, "denoiser": {"name": "EDMDenoiser", "sigma_data": 0.4}, "data": data}
    torch.manual_seed(0)
    D = build(config)
    with torch.no_grad():
        for v in D.parameters():  # a fresh network returns zeros: make it say something
            v.add_(0.02 * torch.randn_like(v))
    return str(save_checkpoint(folder, D, config, {}))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {
        "unconditional": checkpoint(folder / "prior"),
        "conditional": checkpoint(folder / "enhance", "conditional"),
        "classes": checkpoint(folder / "classes", num_classes=3),
    }


def parameters(weights, kind, **values):
    defaults = dict(weights=weights[kind], seeds="3,5-6", subjects=2, steps=3, device="cpu", autocast=None)
    return sampling.SampleModel(**defaults | values)


def model_of(p):
    return enhancement.Model.load(p.weights, p.device, p.autocast)


def cases_of(data, p):
    return enhancement.held_out_cases(data, p.subjects, p.source, p.lesions, p.counts, p.seed)


def drawn_of(p, cases=None, model=None):
    options = {"label": p.label, "guidance": p.guidance, "batch_size": p.batch_size}
    return enhancement.draw(model or model_of(p), p.seeds, p, cases, **options)


@pytest.fixture(scope="module")
def enhanced(weights):
    p = parameters(weights, "conditional")
    model = model_of(p)
    cases = cases_of(model.data, p)
    return model, model.data, cases, drawn_of(p, cases, model)


def test_same_batch_same_bits_other_batch_same_image(weights, enhanced):
    model, _, cases, drawn = enhanced
    again = drawn_of(parameters(weights, "conditional"), cases, model)
    assert torch.equal(again.x, drawn.x) and drawn.x.shape == (2, 3, 1, SIZE, SIZE) and drawn.seeds == [3, 5, 6]
    one = drawn_of(parameters(weights, "conditional", seeds="5", batch_size=1), cases, model)
    assert torch.allclose(one.x[:, 0], drawn.x[:, 1], rtol=1e-4, atol=1e-3)  # kBq/mL
    assert not torch.allclose(drawn.x[0, 0], drawn.x[0, 1], atol=1)


def test_cases_are_scans_of_held_out_people(weights, enhanced):
    _, data, cases, _ = enhanced
    assert cases.counts.tolist() == pytest.approx([2.5e5] * 2, rel=0.01) and cases.name[0].startswith("subject 2000000")
    assert cases.mlem.shape == (2, 2, SIZE, SIZE) and cases.condition(data).shape == (2, 3, SIZE, SIZE)
    level = cases.mlem[:, 1].mean((1, 2)) / cases.truth.mean((1, 2, 3))
    assert level.tolist() == pytest.approx([1, 1], abs=0.05)
    with pytest.raises(ValueError, match="give the cases"):
        drawn_of(parameters(weights, "conditional"))


def test_a_prepared_file_has_its_own_cases(weights, tmp_path):
    p = pet.PrepareData(
        data=str(tmp_path / "a.h5"), image_size=SIZE, subjects=2, slices_per_subject=3, iterations=(2, 5)
    )
    made = pet.prepare(p, progress=False)
    arrays = {name: made.read(name) for name in made.shapes}
    write_dataset(
        tmp_path / "b.h5",
        arrays,
        units=made.units,
        scale=made.scale,
        source="a clinic",
        seed=0,
        split={"train": [0], "test": [1]},
        attrs=made.attrs,
    )
    data = model_of(parameters(weights, "conditional")).data
    cases = cases_of(data, parameters(weights, "conditional", source=str(tmp_path / "b.h5")))
    assert np.array_equal(cases.truth.numpy(), arrays["activity"][1, [0, 2]])
    assert cases.name == ["1, slice 0", "1, slice 2"]
    with pytest.raises(ValueError, match="no test split"):
        cases_of(data, parameters(weights, "conditional", source=p.data))
    with pytest.raises(ValueError, match=r"iterates \[2, 5\].*trained on \[50\]"):
        cases_of(data | {"iterations": [50]}, parameters(weights, "conditional", source=str(tmp_path / "b.h5")))
    with pytest.raises(ValueError, match="trained for pixels of 3.5 mm, and the image has 7 mm"):
        cases_of(data | {"pixel_mm": 3.5}, parameters(weights, "conditional", source=str(tmp_path / "b.h5")))
    with pytest.raises(ValueError, match="units 'kBq/mL', and the network knows relative"):
        cases_of(data | {"units": "relative"}, parameters(weights, "conditional", source=str(tmp_path / "b.h5")))
    alone = model_of(parameters(weights, "unconditional")).data  # compares truths, and takes no iterates
    assert len(cases_of(alone, parameters(weights, "unconditional", source=str(tmp_path / "b.h5"))).truth) == 2


@pytest.mark.parametrize("solver", ["heun", "heun_churn", "dpmpp_2m", "ddpm"])
def test_every_solver_draws(weights, solver):
    p = parameters(weights, "unconditional", solver=solver, S_churn=1.0)
    drawn = drawn_of(p)
    assert drawn.x.shape == (1, 3, 1, SIZE, SIZE) and drawn.cases is None and drawn.x.std() > 0


def test_saturated_churn_says_so(weights):
    p = parameters(weights, "unconditional", solver="heun_churn", S_churn=40.0)
    with pytest.warns(UserWarning, match="any S_churn above 1.243 gives the same samples"):
        drawn_of(p)


def test_labels_and_guidance(weights):
    p = parameters(weights, "classes", label=2, guidance=2.0, seeds="0", solver="euler")
    model = model_of(p)
    assert isinstance(model.labelled(2, 2.0), ClassGuidance)
    assert drawn_of(p, model=model).bill.denoiser_calls == 2 * p.steps
    plain = drawn_of(parameters(weights, "classes", label=2, seeds="0", solver="euler"), model=model)
    assert plain.bill.denoiser_calls == p.steps
    for label, name, message in ((3, "classes", "knows classes 0 to 2"), (0, "unconditional", "knows no classes")):
        with pytest.raises(ValueError, match=message):
            model_of(parameters(weights, name)).labelled(label)
    with pytest.raises(ValueError, match="no label to weigh"):
        model.labelled(None, 2.0)
    with pytest.raises(ValueError, match="does not state pixel_mm, scale_kbq, task"):
        enhancement.Model.load("brain/t1w")


def test_files_keep_scale_truth_counts_and_seeds(enhanced, tmp_path):
    _, _, cases, drawn = enhanced
    files = drawn.files().write(tmp_path)
    assert {f.name for f in files} >= {"drawn.npz", "drawn.h5", "drawn.nii.gz", "drawn.json", "000000.png"}
    with np.load(tmp_path / "drawn.npz") as npz:
        assert np.array_equal(npz["drawn"], drawn.x) and np.array_equal(npz["truth"], cases.truth)
        assert npz["seeds"].tolist() == [3, 5, 6] and json.loads(str(npz["about"]))["scale_kbq"] == 20.0
        assert npz["counts"].tolist() == cases.counts.tolist() and npz["name"].tolist() == cases.name
    stored = open_dataset(tmp_path / "drawn.h5")
    assert stored.units["drawn"] == "kBq/mL" and stored.attrs["seeds"] == [3, 5, 6]
    assert stored.subjects == tuple(cases.name) and np.array_equal(stored.read("mlem"), cases.mlem)
    volume = nibabel.load(tmp_path / "drawn.nii.gz")
    assert volume.header.get_zooms()[:2] == (7.0, 7.0)
    assert np.allclose(np.asarray(volume.dataobj)[:, ::-1, 4].T, drawn.x[1, 1, 0], atol=1e-5)
    rows = json.loads((tmp_path / "drawn.json").read_text())["slices"]
    assert rows[4] == {"slice": 4, "case": cases.name[1], "counts": cases.counts[1].item(), "seed": 5 + 1_000_000}
    with Image.open(tmp_path / "png" / "000004.png") as png:
        back = np.asarray(png).astype(float) * float(png.text["kbq_per_level"])
        assert np.allclose(back, drawn.x[1, 1, 0].clamp(min=0), atol=drawn.x.max().item() / 60000)
        assert png.text["case"] == cases.name[1] and png.text["units"] == "kBq/mL"


def test_draws_without_condition_are_written_too(weights, tmp_path):
    p = parameters(weights, "unconditional")
    drawn = drawn_of(p)
    drawn.files().write(tmp_path, ("npz", "hdf5"))
    with h5py.File(tmp_path / "drawn.h5") as file:
        assert file["drawn"].shape == (1, 3, 1, SIZE, SIZE)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["drawn.h5", "drawn.npz"]


def test_population_table_tells_people_from_copies():
    people = data_pet.held_out("test", 4, SIZE)
    training = data_pet.held_out("validation", 4, SIZE)
    copies = training.image[[0, 0, 1, 1]] * 1.01
    real, copied = activity.population_table(copies, people.image, people.pixel_mm, training.image)
    assert copied["to the nearest other"][0] < 1e-3 < 0.2 < real["to the nearest other"][0]
    assert copied["to the nearest of training"][0] == pytest.approx(0.01, abs=1e-3)
    assert real["to the nearest of training"][0] > 0.1
    values = activity.facts(torch.full((1, 1, 10, 10), 8.0), pixel_mm=5.0)[0].tolist()
    assert values == pytest.approx([8.0, 8.0, 25.0, 1.0, 0.0])


def test_enhancement_table_and_calibration(enhanced):
    _, _, cases, _ = enhanced
    generator = torch.Generator().manual_seed(0)
    truth = cases.truth + 2 * torch.randn(cases.truth.shape, generator=generator)
    x = cases.truth[:, None] + 2 * torch.randn(2, 8, 1, SIZE, SIZE, generator=generator)
    noisy = enhancement.Cases(cases.name, truth, cases.mlem, cases.counts, cases.sensitivity)
    drawn = enhancement.Drawn(x, list(range(8)), noisy, Bill(1, 0, 0.0), {})
    assert metrics.pooled_calibration(drawn.x.movedim(1, 0), truth) == pytest.approx(1, abs=0.1)
    table = {row["image"]: row["NRMSE"][0] for row in enhancement.enhancement_table(drawn)}
    assert list(table)[-2:] == ["one draw", "mean of 8 draws"]
    assert table["mean of 8 draws"] == pytest.approx(table["one draw"] * (1.125 / 2) ** 0.5, rel=0.05)
    assert set(show_activity.uncertainty(drawn)["2000000\n-10 mm"]) >= {"truth", "std of draws"}
    shown = show_activity.overview(drawn, noisy, most=5)["2000001\n30 mm"]
    assert list(shown) == ["truth", "MLEM", "seed 0", "seed 1", "mean"]
    for of_people in (enhancement.enhancement_table, show_activity.uncertainty):
        with pytest.raises(ValueError, match="unconditional"):
            of_people(replace(drawn, cases=None))
