"""Virtual patients: many anatomies, lesions, protocols; what a source made from a target does with lesions."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from companion.data import anatomy, patients, remap
from companion.data.contrast_folder import virtual_patients
from companion.data.contrast_people import array_of
from companion.data.heads import prepare_head
from companion.data.store import open_dataset, write_dataset
from companion.diffusion.denoisers import EDMDenoiser
from companion.diffusion.local_information import Conditioning
from companion.papers.lmi.data import PrepareData, prepare
from companion.papers.lmi.prior import TrainTranslator
from companion.training.translation import translation_loss

HEIGHTS = torch.tensor([5.0, 25.0])


@pytest.fixture(scope="module")
def icbm() -> patients.Anatomy:
    return patients.anatomies(None, "train", 3.25)[0]


@pytest.fixture(scope="module")
def people(icbm) -> list[dict]:
    return [patients.patient(icbm, anatomy.Subject(i), ("T1w", "T2w"), HEIGHTS) for i in range(16)]


def test_a_seed_is_a_person_and_images_are_scaled(icbm, people):
    again = patients.patient(icbm, anatomy.Subject(3), ("T1w", "T2w"), HEIGHTS)
    assert all(torch.equal(again[name], people[3][name]) for name in again)
    for found in people:
        assert found["T1w"].shape == found["lesion"].shape == found["labels"].shape == (2, 1, 64, 64)
        assert 0 <= found["T1w"].min() and found["T1w"].max() <= 1 and found["T1w"].dtype == torch.float32
        assert 0 <= found["lesion"].min() and found["lesion"].max() < 1.01
        assert not ((found["lesion"] > 0.5) & (found["T1w"] == 0)).any()
    brains = torch.tensor([float((p["labels"] > 0).float().mean()) for p in people])
    assert brains.std() / brains.mean() > 0.05, "people differ in size"
    shown = [bool((p["lesion"] > 0.5).any()) for p in people]
    assert 3 < sum(shown) < 14, "some have lesions, some have none"


def test_health_at_the_template_is_the_template(icbm):
    points = anatomy.grid_mm((2, 64, 64), 3.25, HEIGHTS)
    assert torch.allclose(icbm.at(points), anatomy.tissue_maps(None, points, 3.25), atol=1e-5)


def test_protocols_and_parameters_stay_in_their_ranges():
    rng = np.random.default_rng(0)
    for contrast, kinds in patients.PROTOCOLS.items():
        for _ in range(20):
            drawn = patients.draw_protocol(contrast, rng)
            (kind,) = [k for k in kinds if k.keys() == drawn.keys()]
            assert all(kind[name][0] <= value <= kind[name][1] for name, value in drawn.items())
    with pytest.raises(ValueError, match="unknown contrast 'CT'; use T1w"):
        patients.draw_protocol("CT", rng)
    order = [anatomy.signal("T2w", *anatomy.RELAXATION[t]) for t in anatomy.TISSUES]
    assert order == sorted(order, reverse=True), "fluid, grey, white"
    assert anatomy.signal(anatomy.SEQUENCES["T2w"], 1, 900, 80) == anatomy.signal("T2w", 1, 900, 80)


def test_a_head_becomes_an_anatomy_in_the_place_of_the_template():
    """A made head of known tissues: grey around white around fluid, found again after the way to the template."""
    grid = np.stack(np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * 3.0 for n in (64, 76, 64)], indexing="ij"))
    away = np.sqrt((grid[0] / 72) ** 2 + (grid[1] / 88) ** 2 + (grid[2] / 70) ** 2)
    signal = np.select([away < 0.25, away < 0.7, away < 1.0, away < 1.1, away < 1.25], [0.25, 1.0, 0.7, 0.05, 1.1], 0.0)
    signal = gaussian_filter(signal, 0.4).astype(np.float32)
    found = patients.head_anatomy(prepare_head("made", signal, (3.0, 3.0, 3.0)), 3.25)
    csf, grey, white, texture = found.at(torch.tensor([[[anatomy.CENTRE_MM]]]))[:, 0, 0, 0]
    assert csf > 0.9 and white < 0.1 and 0.75 < texture < 1.25
    points = anatomy.grid_mm((56, 64, 56), 3.25)
    maps, template = found.at(points), anatomy.tissue_maps(None, points, 3.25)
    assert maps[:3].sum(0).max() < 1.001 and maps.min() >= 0
    ours, theirs = maps[:3].sum(0) > 0.5, template[:3].sum(0) > 0.5
    assert 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) > 0.8


def test_lesions_of_a_source_have_a_map_of_their_own():
    x0 = torch.full((64, 1, 16, 16), 0.5)
    x0[:, :, 4:12, 4:12] = 0.8
    lesion = torch.zeros_like(x0)
    lesion[:, :, 6:10, 6:10] = 1.0
    plain, other = (remap.remapped(x0, torch.Generator().manual_seed(0), lesion=some) for some in (None, lesion))
    inside = lesion > 0
    differs = ((other - other[:, :, 4:5, 4:5]).abs() > 0.1)[inside].view(64, -1).float().mean(1)
    assert 0.3 < differs.mean() < 0.85, "most, not all"
    assert plain.shape == other.shape and other.min() >= 0 and other.max() <= 1
    assert torch.equal(remap.remapped(x0, torch.Generator(), share=0.0, lesion=lesion), x0)


def test_a_training_sees_lesions_and_nobody_takes_them_for_a_contrast(tmp_path):
    made = virtual_patients(None, {"train": 2, "validation": 1}, 2, ("T2", "FLAIR"), 64)
    path = write_dataset(tmp_path / "x.h5", **made, seed=0, units=dict.fromkeys(made["arrays"], "1"))
    prepared = open_dataset(path)
    assert set(prepared.shapes) == {"T2w", "FLAIR", "labels", "lesion"} and len(prepared.rows("train")) == 2
    with pytest.raises(ValueError, match="has no lesion; it has FLAIR, T2w"):
        array_of(prepared, "lesion")
    image, lesion = prepared.slices(("T2w", "lesion"), "train")[0]

    class Network(torch.nn.Module):
        in_channels, out_channels = 2, 1

        def forward(self, x, noise, cond):
            return x * cond[:, :1]

    D = EDMDenoiser(Network(), sigma_data=0.3)
    c = Conditioning(("source",), (3,), 6)
    options = {"remapped_share": 1.0, "dropout": 0.0, "look_ahead": False, "P_mean": -1.0, "P_std": 1.0, "mirror": True}
    losses = []
    for some in (torch.zeros_like(lesion), torch.ones_like(lesion)):
        x0 = (image[None].repeat(8, 1, 1, 1), some[None].repeat(8, 1, 1, 1))
        losses.append(translation_loss(D, x0, torch.Generator().manual_seed(0), conditioning=c, **options))
    assert losses[0].shape == (8,) and not torch.equal(*losses)
    rng, x0 = torch.Generator(), (image[None].repeat(8, 1, 1, 1), torch.ones_like(lesion)[None].repeat(8, 1, 1, 1))
    once, often = (
        translation_loss(D, x0, rng.manual_seed(0), conditioning=c, lesion_weight=w, **options) for w in (1.0, 3.0)
    )
    torch.testing.assert_close(often, 3 * once)
    with pytest.raises(ValueError, match="lesion_weight=3 is for diffusion edm"):
        TrainTranslator(diffusion="ddpm", lesion_weight=3.0)


def test_heads_that_are_not_there_are_named_before_the_start_and_concern_patients_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="missing; run: companion data get heads"):
        PrepareData(source="patients", heads="data/heads", contrasts=("T1w",)).before_start()
    asked = {
        "contrasts": ("T1w",),
        "slices_per_subject": 1,
        "subjects": 1,
        "validation_subjects": 1,
        "test_subjects": 1,
    }
    made = [prepare(PrepareData(source=s, data=f"{s}.h5", **asked), progress=False) for s in ("brain", "patients")]
    assert ["heads" in m.attrs["parameters"] for m in made] == [False, True], "files of before still fit"
