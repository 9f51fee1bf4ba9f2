"""Activity of heads: where the brain is, what a tracer does, and the bank of a training."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from companion.data import head_activity as source
from companion.data.head_mr import moved, mr_condition
from companion.data.head_phantoms import FINE, coarser, fdg_slices, flattened
from companion.data.head_tissues import brain_mask, even_brain, fat_suppressed, tissue_levels
from companion.data.heads import prepare_head
from companion.models.architectures import build
from companion.models.checkpoint import load
from companion.papers.pet import heads as training

MM = 3.0


@pytest.fixture(scope="module")
def signal() -> np.ndarray:
    """A head as T1-weighted scans see it: scalp, dark skull, and a brain of grey and white matter and a ventricle."""
    grid = np.stack(np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * MM for n in (64, 76, 64)], indexing="ij"))
    away = np.sqrt((grid[0] / 72) ** 2 + (grid[1] / 88) ** 2 + (grid[2] / 70) ** 2)
    values = np.select([away < 0.15, away < 0.7, away < 1.0, away < 1.1, away < 1.25], [0.3, 1.0, 0.7, 0.05, 1.1], 0.0)
    return gaussian_filter(values, 0.4).astype(np.float32) + 0.01 * np.random.default_rng(0).random(values.shape)


@pytest.fixture(scope="module")
def active(signal) -> source.ActiveHead:
    return source.active_head(prepare_head("made", signal, (MM, MM, MM)))


def test_the_brain_is_found_and_the_scalp_left_out(signal):
    mask = brain_mask(signal, (MM, MM, MM))
    volume = mask.sum() * MM**3 / 1e3
    assert volume == pytest.approx(4 / 3 * np.pi * 7.2 * 8.8 * 7.0, rel=0.1)
    assert mask[32, 38, 32] > 0.99 and mask[32, 38, 61] < 0.01 and 0 <= mask.min() and mask.max() <= 1
    _, grey, white = tissue_levels(signal, mask)
    assert grey == pytest.approx(0.7, abs=0.05) and white == pytest.approx(1.0, abs=0.05)


def test_a_strong_receive_bias_hides_no_cortex_and_leaves_no_trend(signal):
    height = np.linspace(-1, 1, signal.shape[2])
    coils = np.exp(-0.6 * height - 0.15 * height**2)  # dim at the vertex, 2.3 times less than below the brain
    seen, truth = (signal * coils).astype(np.float32), brain_mask(signal, (MM, MM, MM)) > 0.5
    alone = brain_mask(seen, (MM, MM, MM)) > 0.5
    brain, bias = even_brain(seen, (MM, MM, MM))
    missed = [(truth & ~found).sum() / truth.sum() for found in (alone, brain > 0.5)]
    assert missed[0] > 0.05 and missed[1] < 0.01 and (brain > 0.5).sum() < 1.05 * truth.sum()
    left = np.broadcast_to(coils, signal.shape)[truth] / bias[truth]
    assert left.std() / left.mean() < 0.03 < coils[10:-10].std() / coils[10:-10].mean()
    assert bias[brain > 0.5].mean() == pytest.approx(1, abs=1e-3)


def test_suppressed_fat_is_dark_and_the_brain_as_it_was(signal):
    head = prepare_head("made", signal, (MM, MM, MM))
    dark = fat_suppressed(head)
    assert dark.name == "made_no_fat" and dark.levels.quantile(0.99).item() == pytest.approx(1, abs=0.01)
    scalp, skull, grey, white = ((64, 76, z) for z in (118, 111, 104, 90))  # half voxels from below
    change = [(dark.signal[at] / head.signal[at]).item() for at in (scalp, grey, white)]
    assert change[0] < 0.35 * change[1] and change[1] == pytest.approx(change[2], rel=0.02)
    assert dark.signal[scalp] < 0.4 and dark.signal[skull] < 0.2


def test_what_is_no_head_is_refused():
    with pytest.raises(ValueError, match="expected a whole T1-weighted head"):
        brain_mask(np.random.default_rng(0).random((20, 20, 20)), (2.0, 2.0, 2.0))


def test_activity_is_of_this_seed_and_has_air_around(active):
    one, same = (source.activity_image(active, np.random.default_rng(3), 48, 3.5) for _ in range(2))
    assert np.array_equal(one, same) and one.shape == (48, 48) and one.dtype == np.float32
    images = np.stack([source.activity_image(active, np.random.default_rng(i), 48, 3.5) for i in range(12)])
    assert images.min() >= 0 and 0.05 < images.max() < 6.01
    assert (images[:, 0, 0] == 0).mean() > 0.5
    assert len({round(float(x.max()), 3) for x in images}) > 8


def test_pixel_sizes_and_planes_are_those_promised():
    rng = np.random.default_rng(0)
    sizes = [source.draw_pixel_mm(rng) for _ in range(300)]
    assert source.PIXEL_MM[0] <= min(sizes) and max(sizes) <= source.PIXEL_MM[1]
    axial = np.mean([abs(source.draw_axes(rng)[2, 2]) > 0.8 for _ in range(300)])
    assert 0.5 < axial < 0.9


def test_a_phantom_knows_its_tissues_and_its_lesion(active):
    fine = fdg_slices(flattened(active), 2, ratio=4.0)
    assert fine.image.shape == (2, 1, FINE, FINE) and (fine.lesions.flatten(1).sum(1) > 0).all()
    healthy = fine.lesions == 0
    grey, white = (fine.image[healthy & (fine.labels == k)].median().item() for k in (2, 3))
    assert grey == pytest.approx(22, rel=0.15) and white == pytest.approx(5.5, rel=0.2)
    assert fine.image[fine.lesions > 0].mean() > 1.3 * grey
    bare = fdg_slices(flattened(active), 2, scalp=False)
    outside = fine.labels == 0
    assert fine.image[outside].sum() > 0 and bare.image[outside].sum() < 0.3 * fine.image[outside].sum()
    small = coarser(fine, 4)
    assert small.pixel_mm == pytest.approx(3.5)
    assert torch.allclose(small.image.mean((1, 2, 3)), fine.image.mean((1, 2, 3)), rtol=1e-4)


def test_the_real_half_of_a_complex_prior():
    sizes = training.TrainHeads().pick("model_channels", "channel_mult", "patch", "images")
    config = training.prior_config(**sizes)
    half, general = training.real_half(config, "general/2d"), load("general/2d").D
    mine, theirs = half.state_dict(), general.state_dict()
    first = next(k for k in mine if k.endswith("input_blocks.0.0.weight"))
    assert torch.equal(mine[first][:, :4], theirs[first][:, :4]) and set(mine) == set(theirs)
    assert (mine[first][:, 4:] == 0).all()  # of the MR, which the general prior is not given
    other = training.prior_config(**sizes | {"channel_mult": (1, 2, 2, 2)})
    with pytest.raises(ValueError, match="network of the same size"):
        training.real_half(other, "general/2d")
    assert build(config)(torch.zeros(1, 1, 16, 32), torch.ones(1)).shape == (1, 1, 16, 32)


def test_a_training_of_few_images(active, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "PART", 10)
    part = training.bank_part([active], 0, 1)
    assert part.shape == (10, 2, 80, 80) and np.array_equal(part, training.bank_part([active], 0, 1))
    folder = tmp_path / "bank"
    folder.mkdir()
    np.save(folder / "000.npy", part)
    p = training.TrainHeads(bank=str(folder), out=str(tmp_path / "run"), images=10, steps=2, batch_size=2, crop=32,
                            warmup=1, device="cpu", autocast=None)  # fmt: skip
    result = training.train_heads(p, progress=False)
    assert result.step == 2 and np.isfinite(result.loss)


def test_a_pair_has_the_same_activity_and_an_mr_of_its_own(active):
    pairs = [source.activity_and_mr(active, np.random.default_rng(i), 48, 3.5) for i in range(6)]
    for i, (activity, mr) in enumerate(pairs):
        assert np.array_equal(activity, source.activity_image(active, np.random.default_rng(i), 48, 3.5))
        assert mr.shape == activity.shape and mr.min() >= 0
        assert np.percentile(mr[mr > 0.1 * mr.max()], 95) == pytest.approx(1, rel=1e-3)


def test_the_condition_has_a_scale_of_its_own():
    mr = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) + 0.2
    given = mr_condition(mr)
    assert given.shape == (3, 2, 16, 16) and (given[:, 1] == 1).all()
    assert torch.allclose(given, mr_condition(700 * mr), atol=1e-5)
    assert torch.equal(given[1:2], mr_condition(mr[1:2]))  # whatever lies beside it
    known = (torch.arange(16) < 9).float().expand(3, 1, 16, 16)
    part = mr_condition(torch.where(known > 0, mr, torch.tensor(1e6)), known)
    assert torch.equal(part[:, 1:], known) and (part[:, 0, :, 9:] == 0).all() and part[:, 0].max() < 1.5
    assert (mr_condition(torch.full((1, 1, 8, 8), 3.0)) == 0).all()  # no MR of this slice
    with pytest.raises(ValueError, match="expected"):
        mr_condition(mr[:, 0])
    with pytest.raises(ValueError, match="MR image"):
        mr_condition(mr / 0)


def test_a_moved_mr_lies_where_it_was_moved_to():
    image = np.zeros((21, 21), np.float32)
    image[10, 14] = 1
    assert moved(image, np.array([2.0, -1.0]), 0.0)[12, 13] == pytest.approx(1)
    assert moved(image, np.zeros(2), np.pi / 2).sum() == pytest.approx(1, abs=1e-3)


def test_a_crop_shows_the_mr_or_says_that_it_is_not_known():
    image = torch.rand(2, 40, 40, generator=torch.Generator().manual_seed(0)) + 0.1
    crops = torch.stack([training.crop(image, torch.Generator().manual_seed(i), 32) for i in range(300)])
    known = crops[:, 2]
    assert crops.shape == (300, 3, 32, 32) and set(known.unique().tolist()) == {0.0, 1.0}
    assert ((crops[:, 1] > 0) == (known > 0)).all()
    none = (known.flatten(1).sum(1) == 0).float().mean().item()
    assert none == pytest.approx(training.NO_MR, abs=0.09)


def test_a_prior_that_may_be_given_an_mr_needs_none():
    D = build(training.prior_config(**training.TrainHeads().pick("model_channels", "channel_mult", "patch", "images")))
    x, sigma = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 1.0])
    assert torch.equal(D(x, sigma), D(x, sigma, torch.zeros(2, 2, 16, 16)))
