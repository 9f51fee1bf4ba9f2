"""LMI: what the network is told of a source, what it is trained on, and what must not reach it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from companion.data import anatomy, contrast_people, remap, shading
from companion.data.contrasts import CONTRASTS, cohort_slices, magnitudes
from companion.data.nifti import save_nifti
from companion.data.store import open_dataset, write_dataset
from companion.diffusion import local_information as lmi
from companion.diffusion.denoisers import DiscreteDenoiser, EDMDenoiser
from companion.diffusion.noise import DiscreteSchedule
from companion.evaluation import translation as evaluation_translation
from companion.information.box_mi import BoxMI
from companion.information.local_mi import LocalMI
from companion.models.architectures import build
from companion.models.checkpoint import describe, load
from companion.papers.lmi import data as lmi_data
from companion.papers.lmi import prior as lmi_prior
from companion.randomness import randn
from companion.reconstruction.translation import Translator, conditioning_of
from companion.training import translation
from companion.training.recipe import save

SMALL = lmi.Conditioning(patches=(3, 5), bins=8)


@pytest.fixture(scope="module")
def slices() -> dict[str, torch.Tensor]:
    """Slices (4, 1, 32, 32) of each contrast and "labels"."""
    return {name: x.flatten(0, 1) for name, x in cohort_slices("train", 2, 2, image_size=32).items()}


class Recorder(nn.Module):
    """A network that keeps what it is given and returns zeros."""

    def forward(self, x, t, cond=None):
        self.x, self.t, self.cond = x, t, cond
        return torch.zeros_like(x)


def small(**others) -> lmi_prior.TrainTranslator:
    settings = {
        "patches": (3,),
        "bins": 8,
        "channel_mult": (1, 1),
        "steps": 3,
        "batch_size": 2,
        "warmup": 1,
        "checkpoint_every": 2,
        "autocast": None,
        "device": "cpu",
        "schedule": "constant",
    }
    return lmi_prior.TrainTranslator(**settings | others)


def loss_of(D, x0, seed: int, p: lmi_prior.TrainTranslator) -> torch.Tensor:
    options = p.pick("remapped_share", "dropout", "look_ahead", "P_mean", "P_std", "mirror")
    return translation.translation_loss(
        D, x0, torch.Generator().manual_seed(seed), conditioning=p.conditioning, **options
    )


def config_of(p: lmi_prior.TrainTranslator) -> dict:
    return translation.translator_config(p, open_dataset(p.data), p.target)


# ------------------------------------------------------------------------------------------------- the fast maps


def test_box_maps_are_the_centre_maps_of_local_mi(slices):
    mi = BoxMI((3, 5, 9), 12)
    source, target = slices["T1w"].double(), slices["T2w"].double() + 0.3 * torch.randn(4, 1, 32, 32).double()
    maps = mi(source, target)
    for i, slow in enumerate(mi.like):
        assert (maps[:, i : i + 1] - slow(source, target)).abs().max() < 1e-6
    prepared = mi.prepare(source[:1])
    assert torch.equal(mi(prepared, target)[2], mi(source[:1], target[2:3])[0])  # one source serves all


def test_self_maps_take_half_of_the_joint_histogram(slices):
    mi = BoxMI((3, 7), 10)
    source, copy = mi.prepare(slices["T1w"]), mi.prepare(slices["T1w"])
    assert torch.allclose(mi(source, source), mi(source, copy), atol=1e-5)


def test_box_maps_are_differentiable():
    source, x = torch.rand(1, 1, 6, 5).double(), torch.rand(1, 1, 6, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: BoxMI((3,), 4)(source, x), x, eps=1e-5, atol=1e-4, fast_mode=True)


def test_box_maps_of_flat_images_are_zero():
    assert not BoxMI()(torch.full((2, 1, 12, 12), 0.3), torch.rand(2, 1, 12, 12)).any()


# -------------------------------------------------------------------------------------------------- the conditions


def test_training_and_sampling_are_told_the_same(slices):
    """The loss gives the network exactly what a sampler at the same noisy image would give it."""
    p = small(maps=lmi.MAPS, patches=(3, 5), remapped_share=0.0, dropout=0.0, mirror=False)
    x0, network = slices["T2w"], Recorder()
    D = EDMDenoiser(network, 0.4)
    loss_of(D, x0, 3, p)
    trained, x_in = network.cond, network.x
    generator = torch.Generator().manual_seed(3)
    lmi.told(4, 3, 0.0, generator)
    noise = randn(x0.shape, x0.dtype, generator, x0.device)
    sigma = (p.P_mean + p.P_std * randn((4,), x0.dtype, generator, x0.device)).exp()
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    lmi.Informed(D, x0, p.conditioning)(x, sigma)
    assert torch.equal(network.cond, trained) and torch.equal(network.x, x_in)
    assert torch.equal(trained, lmi.conditions(x, sigma, x0, p.conditioning)) and trained.shape[1] == 5


def test_conditions_are_the_maps_in_order(slices):
    x, sigma = slices["T2w"] + 2 * torch.randn(4, 1, 32, 32), torch.tensor([0.5, 1.0, 2.0, 4.0])
    found = lmi.conditions(x, sigma, slices["T1w"], SMALL)
    mi = BoxMI((3, 5), 8)
    noisy = x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
    assert torch.allclose(found[:, :2], mi(slices["T1w"], noisy), atol=1e-5)
    assert torch.allclose(found[:, 2:4], mi(slices["T1w"], slices["T1w"]), atol=1e-5)
    assert torch.equal(found[:, 4:], slices["T1w"])


def test_dropped_maps_are_zero_and_change_nothing_else(slices):
    x, source = slices["T2w"] + torch.randn(4, 1, 32, 32), slices["T1w"]
    every = lmi.conditions(x, 1.0, source, SMALL)
    keep = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    some = lmi.conditions(x, 1.0, source, SMALL, keep)
    wide = keep.repeat_interleave(torch.tensor(SMALL.widths), 1)[..., None, None]
    assert torch.equal(some, every * wide)
    assert torch.equal(lmi.conditions(x, 1.0, source, SMALL, ["source"])[:, 4:], source)
    assert not lmi.conditions(x, 1.0, None, SMALL).any() and not lmi.conditions(x, 1.0, source, SMALL, ()).any()


def test_a_prepared_source_serves_many_images(slices):
    x, source = torch.randn(3, 1, 32, 32), slices["T1w"][:1]
    side = lmi.prepare_source(source, SMALL)
    assert torch.equal(lmi.conditions(x, 2.0, side, SMALL), lmi.conditions(x, 2.0, source.expand(3, -1, -1, -1), SMALL))


def test_other_modes(slices):
    x = slices["T2w"] + 0.2 * torch.randn(4, 1, 32, 32)
    c = lmi.Conditioning(("cross",), (3,), None, "shifts")
    noisy = x / 1.04**0.5
    assert torch.allclose(lmi.conditions(x, 0.2, slices["T1w"], c), LocalMI(patch=3)(slices["T1w"], noisy), atol=1e-6)
    bits = lmi.conditions(x, 0.2, slices["T1w"], replace(c, normalise=False))
    assert torch.allclose(bits, LocalMI(patch=3, normalise=False)(slices["T1w"], noisy), atol=1e-6)


def test_the_published_mismatch_has_a_name(slices):
    """Training normalises and looks one step ahead, sampling does neither; only by name, not by default."""
    c, source = lmi.Conditioning.published(), slices["T1w"][:1]
    schedule = DiscreteSchedule.linear()
    x0, network = slices["T2w"][:1], Recorder()
    p = small(
        maps=c.maps,
        patches=c.patches,
        bins=None,
        mode="published",
        diffusion="ddpm",
        look_ahead=True,
        remapped_share=0.0,
        dropout=0.0,
        mirror=False,
        equalised=False,
    )
    assert p.conditioning == c
    loss_of(DiscreteDenoiser(network, schedule), x0, 0, p)
    generator = torch.Generator().manual_seed(0)
    lmi.told(1, 2, 0.0, generator)
    noise = randn(x0.shape, x0.dtype, generator, x0.device)
    t = torch.randint(1000, (1,), generator=generator)
    assert network.t == t
    ahead = schedule.q_sample(x0, t + 1, noise).float()
    published = LocalMI(mode="published", patch=3)
    assert torch.allclose(network.cond[:, :1], published(x0, ahead), atol=1e-4)
    assert torch.allclose(network.cond[:, 1:], published(x0, x0), atol=1e-4)
    x = torch.randn(1, 1, 32, 32)
    bits = lmi.conditions(x, 0.0, source, c.mismatched())
    assert torch.allclose(bits[:, :1], LocalMI(mode="published", patch=3, normalise=False)(source, x), atol=1e-4)
    assert not torch.allclose(bits, lmi.conditions(x, 0.0, source, c), atol=0.1)


def test_guidance_exaggerates_what_the_source_says(slices):
    class Two:
        def __call__(self, x, sigma, cond):
            return x + cond.mean(1, keepdim=True)

    x, sigma = torch.randn(4, 1, 32, 32), torch.ones(4)
    plain, strong = (lmi.Informed(Two(), slices["T1w"], SMALL, guidance=w)(x, sigma) - x for w in (1.0, 2.5))
    assert torch.allclose(strong, 2.5 * plain, atol=1e-5)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: lmi.conditions(x, 1.0, torch.rand(1, 1, 16, 16), SMALL), "same size"),
        (lambda x: lmi.conditions(x, 1.0, torch.rand(3, 1, 32, 32), SMALL), "one source"),
        (lambda x: lmi.conditions(x, 1.0, x, SMALL, ["edges"]), "no map edges"),
        (lambda x: lmi.conditions(x, 1.0, x, SMALL, torch.ones(2, 2)), "keep has shape"),
        (lambda x: lmi.conditions(x, 1.0, lmi.prepare_source(x, lmi.Conditioning()), SMALL), "prepare it again"),
        (lambda x: lmi.prepare_source(torch.zeros_like(x), SMALL), "constant"),
        (lambda x: lmi.prepare_source(x * torch.nan, SMALL), "NaN"),
        (lambda x: lmi.prepare_source(300 * x, SMALL), "expected 0 to 1"),
        (lambda x: lmi.prepare_source(x.expand(-1, 2, -1, -1), SMALL), "2 channels"),
        (lambda x: lmi.Conditioning(("cross", "edges")), "maps"),
        (lambda x: lmi.Conditioning(patches=(4,)), "odd"),
        (lambda x: lmi.Conditioning(normalise=False), "bits"),
        (lambda x: Translator.load("brain/t1w"), "lmi/t2w"),
        (lambda x: BoxMI((5, 3)), "smallest first"),
    ],
)
def test_errors_say_what_to_do(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.rand(2, 1, 32, 32))


# ------------------------------------------------------------------------------------------------- remapped sources


def test_equalised_sources_depend_on_the_order_of_grey_levels_only(slices):
    x = torch.where(slices["PDw"] > 0.1, slices["PDw"], 0)
    seen, air = shading.equalised(x), x == 0
    assert not seen[air].any() and seen[~air].min() >= shading.DARKEST and seen.max() <= 1
    assert torch.allclose(shading.equalised(0.8 * x), seen, atol=0.01)
    levels = seen[0][seen[0] > 0]  # equal shares of the tissue between equal steps
    assert (levels.sort().values - torch.linspace(shading.DARKEST, 1, len(levels))).abs().max() < 0.05
    faint = 0.7 + 0.1 * x  # a tenth of the contrast
    assert np.corrcoef(shading.equalised(torch.where(air, 0, faint))[~air], seen[~air])[0, 1] > 0.8
    told = replace(lmi.Conditioning(), equalised=True)
    assert torch.equal(lmi.conditions(x, 1.0, x, told, ("source",))[:, -1:], seen)
    assert not shading.equalised(torch.zeros(1, 1, 8, 8)).any()


def test_knots_lie_at_the_tissues():
    """Clusters of values are found from any start, however many there are."""
    x = torch.tensor([0.0, 0.2, 0.21, 0.6, 0.61, 0.9, 0.91]).repeat(40).view(1, 1, 20, 14)
    at = remap._knots(x, torch.tensor([[0.1, 0.5, 0.9]]), torch.tensor([[True]]))
    assert torch.allclose(at, torch.tensor([[0.0, 0.205, 0.605, 0.905, 0.91]]), atol=1e-3)


def test_remapped_sources_are_images_of_the_same_anatomy(slices):
    x0 = slices["T2w"].repeat(8, 1, 1, 1)
    y = remap.remapped(x0, torch.Generator().manual_seed(0))
    assert torch.equal(y, remap.remapped(x0, torch.Generator().manual_seed(0)))
    assert y.shape == x0.shape and y.min() >= 0 and y.max() <= 1
    inside = (slices["labels"] > 0).repeat(8, 1, 1, 1)
    signs = [
        np.sign(np.corrcoef(a[m], b[m])[0, 1]) for a, b, m in zip(y.numpy(), x0.numpy(), inside.numpy(), strict=True)
    ]
    assert 4 < signs.count(1) < 28  # bright and dark change places, or not
    dark = (y * ~inside).flatten(1).sum(1) / (~inside).flatten(1).sum(1) < 0.15
    assert dark.sum() >= 24  # air mostly stays air
    assert torch.equal(remap.remapped(x0, torch.Generator(), share=0.0), x0)


def test_partial_volumes_are_mixed_linearly():
    """A pixel that is half one tissue and half the other gets the mean of what the tissues get."""
    row = torch.tensor([0.2, 0.2, 0.5, 0.8, 0.8])
    x = row.expand(1, 1, 5, 5)
    at, heights = torch.tensor([[0.0, 0.2, 0.5, 0.8]]), torch.tensor([[0.0, 0.9, 1.0, 0.1]])
    mixed = remap._transfer(x, at, heights, torch.tensor(True))
    assert torch.allclose(mixed[0, 0, 0], torch.tensor([0.9, 0.9, 0.5, 0.1, 0.1]), atol=1e-5)
    assert torch.allclose(remap._transfer(x, at, heights, torch.tensor(False))[0, 0, 0, 2], torch.tensor(1.0))


def test_told_says_all_or_less():
    keep = lmi.told(4000, 3, 0.5, torch.Generator().manual_seed(0))
    assert abs(keep.all(1).float().mean() - 0.5) < 0.03
    assert abs((~keep.any(1)).float().mean() - 0.5 / 7) < 0.015
    assert lmi.told(100, 3, 0.0, torch.Generator()).all()


# ------------------------------------------------------------------------------------------------------------- data


def test_contrasts_are_those_of_anatomy():
    person = anatomy.cohort("test", 1)[0]
    heights = anatomy.slice_heights(person, 2)
    found = magnitudes(person, CONTRASTS, heights, 32)
    for contrast in CONTRASTS:
        same = anatomy.render(person, contrast, (2, 32, 32), slices_mm=heights)
        assert torch.allclose(found[contrast], same.image.abs(), atol=1e-5)
        assert torch.equal(found["labels"], same.labels)


def test_no_contrast_is_a_rising_function_of_another(slices):
    """So that histogram matching, which knows rising maps only, cannot be right for any direction."""
    order = {}
    for contrast in CONTRASTS:
        level = [anatomy.signal(contrast, *anatomy.RELAXATION[t]) for t in anatomy.TISSUES]
        order[contrast] = tuple(np.argsort(level))
        assert slices[contrast].min() >= 0 and slices[contrast].max() == 1
    assert len(set(order.values())) == 3


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    path = tmp_path_factory.mktemp("lmi") / "data.h5"
    p = lmi_data.PrepareData(
        data=str(path), image_size=32, slices_per_subject=2, subjects=2, validation_subjects=1, test_subjects=1
    )
    return p, lmi_data.prepare(p, progress=False)


def test_prepared_cohort(prepared):
    p, data = prepared
    assert data.shapes["T1w"] == (4, 2, 1, 32, 32) and {len(data.rows(s)) for s in ("validation", "test")} == {1}
    assert lmi_data.prepare(p, progress=False).path == data.path
    with pytest.raises(ValueError, match="subjects = 2 where the parameters ask for subjects = 3"):
        lmi_data.prepare(replace(p, subjects=3))


def save_images(folder, count, subject=lambda i: i // 2, mode="L", size=(24, 20), names=None):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (count, *size, 3), dtype=np.uint8)
    for i in range(count):
        name = f"s{subject(i)}_{i:03d}.png" if names is None else names[i]
        Image.fromarray(base[i] if mode == "RGB" else base[i, ..., 0]).save(folder / name)


def test_folders_of_slices(tmp_path):
    for contrast in ("A", "B"):
        save_images(tmp_path / contrast, 8)
    p = lmi_data.PrepareData(
        source=str(tmp_path),
        data=str(tmp_path / "d.h5"),
        contrasts=("A", "B"),
        image_size=32,
        validation_share=0.25,
        test_share=0.25,
    )
    data = lmi_data.prepare(p, progress=False)
    assert data.shapes["A"] == (8, 1, 1, 32, 32) and [len(data.split[s]) for s in data.split] == [4, 2, 2]
    save_images(tmp_path / "C", 8, mode="RGB")
    with pytest.raises(ValueError, match="mode RGB where grey was expected"):
        lmi_data.prepare(replace(p, contrasts=("A", "C"), data=str(tmp_path / "e.h5")))
    save_images(tmp_path / "D", 8, names=[f"other_{i}.png" for i in range(8)])
    with pytest.raises(ValueError, match="not paired"):
        lmi_data.prepare(replace(p, contrasts=("A", "D"), data=str(tmp_path / "e.h5")))


def test_volumes(tmp_path):
    for i, person in enumerate(anatomy.cohort("train", 3)):
        for contrast, name in (("T1w", "T1"), ("T2w", "T2"), ("PDw", "PD")):
            volume = anatomy.render(person, contrast, (6, 24, 24))
            save_nifti(tmp_path / f"IXI{i:03d}-{name}.nii.gz", volume.image.abs().numpy(), affine=volume.affine)
    p = lmi_data.PrepareData(
        source=str(tmp_path),
        data=str(tmp_path / "d.h5"),
        layout="IXI",
        contrasts=("T1", "T2"),
        image_size=32,
        slices_per_subject=2,
        grid="own",
        validation_share=0.33,
        test_share=0.33,
    )
    data = lmi_data.prepare(p, progress=False)
    assert data.shapes["T2w"] == (3, 2, 1, 32, 32) and "slicing" in data.attrs["subjects"][data.subjects[0]]
    with pytest.raises(ValueError, match="layout GoldAtlas has CT, MR, not T1w"):
        replace(p, data=str(tmp_path / "no.h5"), layout="GoldAtlas").before_start()
    with pytest.raises(ValueError, match="more than one of them is T1w"):
        replace(p, contrasts=("T1", "MPRAGE")).before_start()


# --------------------------------------------------------------------------------------------------------- training


def test_training_never_sees_another_contrast(prepared, tmp_path):
    """The same training from two files that differ in everything but the target gives the same weights."""
    p, data = prepared
    weights = []
    for name in ("there", "garbage"):
        arrays = {"T2w": data.read("T2w"), "T1w": data.read("T1w") if name == "there" else np.ones((4, 2, 1, 8, 8))}
        path = write_dataset(
            tmp_path / f"{name}.h5",
            arrays,
            units=dict.fromkeys(arrays, "1"),
            source="test",
            scale=dict.fromkeys(arrays, "1"),
            seed=0,
            subjects=data.subjects,
            split=data.split,
        )
        result, _ = lmi_prior.train(small(data=str(path), out=str(tmp_path / name)), progress=False)
        weights.append(result.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


def test_training_resumes_exactly_and_exports(prepared, tmp_path):
    p, data = prepared
    once = small(data=p.data, out=str(tmp_path / "once"), steps=4)
    twice = replace(once, out=str(tmp_path / "twice"), steps=2)
    whole, config = lmi_prior.train(once, progress=False)
    lmi_prior.train(twice, progress=False)
    again, _ = lmi_prior.train(replace(twice, steps=4), progress=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    )
    errors = evaluation_translation.source_errors(
        whole.ema, once.conditioning, contrast_people.some_slices(data, 48), "T2w", [1.0]
    )
    assert set(errors[0]) == {"sigma", "nothing", "itself", "remapped", "T1w", "PDw"}
    folder = save(whole, once, config, errors)
    D = load(folder)
    assert isinstance(D, EDMDenoiser) and conditioning_of(describe(folder), "it") == once.conditioning
    assert D(torch.randn(1, 1, 32, 32), torch.ones(1), torch.zeros(1, 3, 32, 32)).shape == (1, 1, 32, 32)


@pytest.mark.parametrize(
    "others",
    [
        {"network": "DDIMUNet", "diffusion": "ddpm", "look_ahead": True, "patch": 1},
        {"maps": ("source",)},
        {"mode": "shifts", "dropout": 0.0},
    ],
)
def test_other_models_learn(prepared, slices, others):
    p = small(data=prepared[0].data, **others)
    D = build(config_of(p))
    loss = loss_of(D, slices["T2w"], 0, p)
    loss.mean().backward()
    assert loss.shape == (4,) and torch.isfinite(loss).all()


def test_colours(tmp_path):
    """Colours in, colours out: the maps compare luma, and every channel of the image counts in the loss."""
    save_images(tmp_path / "he", 3, mode="RGB", subject=lambda i: i)
    data = lmi_data.prepare(
        lmi_data.PrepareData(
            source=str(tmp_path),
            data=str(tmp_path / "d.h5"),
            contrasts=("he",),
            channels=3,
            image_size=32,
            validation_share=0.33,
            test_share=0.33,
        ),
        progress=False,
    )
    assert data.shapes["he"] == (3, 1, 3, 32, 32)
    p = small(data=str(tmp_path / "d.h5"), target="he")
    D = build(config_of(p))
    x0 = torch.from_numpy(data.read("he"))[:, 0]
    assert loss_of(D, x0, 0, p).isfinite().all()
    informed = lmi.Informed(D, torch.rand(1, 1, 32, 32), p.conditioning)  # a grey source will do
    assert informed(torch.randn(2, 3, 32, 32), torch.ones(2)).shape == (2, 3, 32, 32)
