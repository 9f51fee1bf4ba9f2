"""The readout that says "no head": what it sees, what it learns from, who asks it, and what is said then."""

import dataclasses
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from companion.data import anatomy, no_heads
from companion.data.bodies import BODIES, Canvas, draw_tissues
from companion.evaluation.organ import SIDE, Look, Organ, features, known_to, standard
from companion.files import project_root
from companion.models.checkpoint import load_denoiser
from companion.models.errors import load_errors, organ_of, save_errors, save_organ
from companion.models.folder import root
from companion.randomness import randn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import no_heads as benchmark  # noqa: E402

HEADS = project_root() / "data" / "heads"
NAME = "general/2d"


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# ------------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("draw", dict.fromkeys((*BODIES, *no_heads.THINGS)), ids=lambda f: f.__name__)
def test_every_kind_is_drawn_anew_by_every_seed(draw):
    def image(seed):
        canvas = Canvas(rng(seed), 24)
        draw(canvas, draw_tissues(canvas.rng), canvas.rng)
        return canvas.image

    first, again, other = image(0), image(0), image(1)
    assert np.isfinite(first).all() and first.max() > 0.05
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_what_is_drawn_is_of_one_scale_and_may_borrow_textures():
    lent = []

    def other(rng, size):
        lent.append(size)
        return rng.random((size, size)).astype(np.float32)

    for seed in range(12):
        plain, with_others = (no_heads.drawn(rng(seed), 32, others) for others in ((), (other,)))
        for image in (plain, with_others):
            assert image.shape == (32, 32) and image.dtype == np.float32 and np.isfinite(image).all()
    assert lent and set(lent) == {32}
    assert no_heads.collage(rng(0), 32, [other]).shape == (32, 32)


# ------------------------------------------------------------------------------------------------------------- looking


def test_size_scale_phase_and_sets_do_not_matter():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 72), indexing="ij")
    image = (torch.hypot(y, x) < 0.7).float()[None, None] + 0.3 * x
    seen = standard(image)
    assert seen.shape == (1, 1, SIDE, SIDE) and 0 <= seen.min() and seen.max() <= 1.5
    assert (seen[..., :8] == 0).all() and (seen[..., -8:] == 0).all(), "the aspect ratio stays"
    assert torch.allclose(standard(1e3 * image), seen, atol=1e-5)
    assert torch.allclose(standard(torch.polar(image.abs(), image)), standard(image.abs()), atol=1e-5)
    assert torch.allclose(standard(torch.cat([image, image], 1)), seen, atol=1e-5)
    larger = torch.nn.functional.interpolate(image, scale_factor=3, mode="bilinear")
    assert (standard(larger) - seen).abs().mean() < 0.01
    assert torch.equal(standard(torch.zeros(1, 1, 8, 8)), torch.zeros(1, 1, SIDE, SIDE))
    with pytest.raises(ValueError, match="of a volume give slices"):
        standard(image[0])
    with pytest.raises(ValueError, match="NaN"):
        standard(image / 0 * 0)


def test_turned_and_mirrored_images_look_the_same():
    D, organ = load_denoiser(NAME), known_to(NAME)
    assert organ.name == "head" and 0 < organ.accept <= 0.5
    image = torch.rand(1, 1, 40, 56, generator=torch.Generator().manual_seed(1))
    p = organ.probability(D, image)
    assert p.shape == (1,) and 0 <= p <= 1
    for other in (image.flip(2), image.flip(3), image.rot90(1, (2, 3)), image.transpose(2, 3)):
        assert torch.allclose(organ.probability(D, other), p, atol=1e-4)
    assert organ.look(D, image) == Look("head", p.item(), organ.accept)
    assert torch.allclose(organ.probability(D, torch.cat([image, image.flip(2)])), p.expand(2), atol=1e-4)
    with pytest.raises(ValueError, match="look at one"):
        organ.look(D, image.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="fit it again"):
        replace(organ, weight=organ.weight[:1216]).look(D, image)


def test_features_leave_the_network_as_it_was():
    D, x = load_denoiser(NAME), torch.rand(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    seen = features(D, x)
    assert seen.shape == (2, len(known_to(NAME).weight)) and torch.allclose(features(D, x[1:]), seen[1:], atol=1e-4)
    assert not any(m._forward_hooks for m in D.modules())


def test_a_look_is_told_with_its_threshold():
    assert str(Look("head", 0.93, 0.4)) == "looks like a head (0.93, at least 0.4)" and Look("head", 0.4, 0.4).like
    assert str(Look("head", 0.02, 0.4)) == "does not look like a head (0.02, below 0.4)"


# -------------------------------------------------------------------------------------------------------- the embedded


def noisy(image: np.ndarray, seed: int) -> torch.Tensor:
    x = torch.from_numpy(np.ascontiguousarray(image))[None, None].to(torch.complex64)
    bright = x.abs().flatten().quantile(0.98)
    return x / bright + 0.02 * randn(x.shape, x.dtype, torch.Generator().manual_seed(seed))


def test_virtual_people_look_like_heads_and_drawings_do_not():
    """People of the validation split, and the benchmark's drawings, of none of which it has seen one."""
    D, organ, people = load_denoiser(NAME), known_to(NAME), anatomy.cohort("validation", 8)
    heights = torch.linspace(-40, 60, 8)
    made = [anatomy.render(s, "T1w", (1, 64, 64), slices_mm=h[None]) for s, h in zip(people, heights, strict=True)]
    heads = [noisy(one.image[0].abs().numpy(), i) for i, one in enumerate(made)]
    assert sum(organ.look(D, x).like for x in heads) >= 7
    draws = (benchmark.knee, benchmark.belly, benchmark.phantom)
    others = [noisy(draw(rng(seed), 64), seed) for draw in draws for seed in range(6)]
    assert sum(organ.look(D, x).like for x in others) <= 6


@pytest.mark.skipif(not (HEADS / "heads.json").exists(), reason="companion data get heads")
def test_the_head_held_for_validation_looks_like_one():
    from companion.papers.general import validation_slices

    D, organ = load_denoiser(NAME), known_to(NAME)
    assert (organ.probability(D, validation_slices("data/heads", 4)) >= organ.accept).all()


# ------------------------------------------------------------------------------------------------------------ who asks


def test_the_readout_belongs_to_the_weights(tmp_path):
    assert known_to("brain/t1w") is None and known_to("aid/brain") is None, "whose error was measured, and was not"
    folder = shutil.copytree(root() / "general" / "2d", tmp_path / "mine")
    errors, organ = load_errors(folder), organ_of(folder)
    save_errors(folder, {"heads": errors["heads"]})
    assert known_to(folder).name == "head" and list(load_errors(folder)) == ["heads"], "measuring again keeps it"
    save_organ(folder, organ | {"name": "knee", "accept": 0.25})
    assert known_to(folder).name == "knee" and known_to(folder).accept == 0.25
    save_organ(folder, {"name": "knee"})
    with pytest.raises(ValueError, match="damaged"):
        known_to(folder)
    plain = json.loads((folder / "errors.json").read_text())
    (folder / "errors.json").write_text(json.dumps(plain | {"sha256": "of other weights"}))
    with pytest.raises(ValueError, match="other weights"):
        known_to(folder)
    save_errors(folder, errors)
    assert known_to(folder) is None, "other weights, no readout"


def test_the_verdict_and_nothing_else_changes():
    from companion.diffusion.exact import FourierBasis, GaussianDenoiser
    from companion.diffusion.recalibration import ErrorModel
    from companion.operators.masks import cartesian_mask
    from companion.operators.mri import birdcage_maps, sense
    from companion.reconstruction import trust

    k = torch.fft.fftfreq(16, dtype=torch.float64) * 16
    spectrum = (1 + (k[:, None] ** 2 + k**2) / 4) ** -1.5
    mean = torch.zeros(1, 16, 16, dtype=torch.complex64)
    D = GaussianDenoiser(mean, (0.09 * spectrum / spectrum.mean())[None], FourierBasis(2))
    errors = {
        "own": ErrorModel.fit(D, D.draw(8, torch.Generator().manual_seed(9), torch.complex64), torch.logspace(-2, 1, 6))
    }
    x = D.draw(1, torch.Generator().manual_seed(5), torch.complex64)
    A = sense(birdcage_maps((16, 16), 4), cartesian_mask(16, 3, acs=4))
    noise = randn((1, *A.range_shape), x.dtype, torch.Generator().manual_seed(1))
    y = A(x) + 0.05 * A.mask(noise)
    options = dict(acs=4, seeds=range(2), evaluations=16, levels=(0.1, 5.0))
    found = {}
    for name, logit in (("no", -4.0), ("yes", 4.0)):
        organ = Fixed("head", 0.5, torch.zeros(0), logit)
        found[name] = trust.reconstruct(D, A, y, 0.05, errors, classical=lambda A, y: x, organ=organ, **options)
    (image, no), (same, yes) = found["no"], found["yes"]
    assert torch.equal(image.mean, same.mean) and torch.equal(image.x, same.x) and no.share == yes.share
    assert no.knows == yes.knows and not no.accepted and yes.accepted == yes.knows
    assert no.verdict.startswith("this does not look like a head (0.02, below 0.5), from which the prior learnt")
    assert "edges, not anatomy" in no.verdict and f"chi-square {no.first.score.chi2:.2f}" in no.verdict
    assert yes.verdict.startswith("the prior") and "it looks like a head (0.98, at least 0.5)" in yes.verdict
    _, alone = trust.reconstruct(D, A, y, 0.05, errors, organ=organ, **options)
    assert alone.look is None and alone.accepted == alone.knows and "look" not in alone.verdict
    assert dataclasses.replace(no, look=None).accepted == no.knows


class Fixed(Organ):
    """A readout of no features."""

    def probability(self, D, image):
        return torch.full((len(image),), self.bias).sigmoid()


# ------------------------------------------------------------------------------------------------------------ training


def test_a_readout_is_fitted_to_scans_of_which_every_other_one_shows_a_head(monkeypatch, tmp_path):
    """Without real heads: virtual people, and drawings, which are told apart after few."""
    from companion.papers import organ

    monkeypatch.setattr(organ, "PART", 32)
    monkeypatch.setattr(organ, "PEOPLE", 1.0)
    monkeypatch.setattr(organ, "load_heads", lambda *_: [])
    monkeypatch.setattr(organ, "photograph", lambda rng, size: rng.random((size, size)).astype(np.float32))
    folder, bank = shutil.copytree(root() / "general" / "2d", tmp_path / "mine"), tmp_path / "bank"
    found = organ.fit_organ(folder, bank=bank, images=64, validation=32)
    assert found["AUC"] > 0.75 and known_to(folder).accept == found["accept"] <= 0.5
    train, validation = (organ.prepare_bank(bank, "", 32, split) for split in ("train", "validation"))
    assert train[0].shape == (1, SIDE, SIDE) and not torch.equal(train[0], validation[0])
    assert organ.labels_of(train)[:4].tolist() == [1, 0, 1, 0] and len(list(bank.rglob("*.npy"))) == 3


def test_a_regression_finds_what_tells_and_its_temperature():
    from companion.papers import organ

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.1]) + 5
    labels = (torch.rand(600, generator=generator) < (2 * (x[:, 0] - 5)).sigmoid()).float()
    weight, bias = organ.regression(x, labels, 1e-4)
    assert abs(weight[0] - 2) < 0.5 and abs(weight[1]) < 0.1 and abs(bias + 10) < 3
    T, entropy = organ.calibrated(5 * (x @ weight + bias), labels)
    assert 4 < T < 6.5 and 0 < entropy < 0.69
