"""The one-pass reconstruction: it learns, its data have the last word, and it takes any operator, size and coils."""

import numpy as np
import pytest
import torch

from companion.data.heads import dead_leaves
from companion.data.random_scans import random_scan
from companion.evaluation.metrics import psnr
from companion.models.architectures import build
from companion.models.checkpoint import load
from companion.models.folder import save_checkpoint
from companion.operators.linear import adjoint_error
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, sense
from companion.operators.soft_sense import soft_sense
from companion.papers.one_pass import SIZES, TrainOnePass, one_pass_config, train_one_pass
from companion.reconstruction.mri import cg_sense, zero_filled
from companion.reconstruction.one_pass import one_pass

SMALL = {"stages": 2, "iterations": 4, "memory": 2, "channel_mult": (1, 1)}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(seed=0):
    torch.manual_seed(seed)
    R = build(one_pass_config(**TrainOnePass(**SMALL).pick(*SIZES)))
    with torch.no_grad():  # the last layer begins at zero: then nothing would depend on the network
        for p in R.cnn.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    return R.eval()


def scan(shape=(32, 28), coils=4, batch=1, noise=0.01, seed=0):
    x = torch.randn(batch, 1, *shape, dtype=torch.complex64, generator=rng(seed)) * 0.3
    A = sense(birdcage_maps(shape, coils), cartesian_mask(shape, 3, acs=4))
    return A, A(x) + noise * A.mask(torch.randn(batch, *A.range_shape, dtype=torch.complex64, generator=rng(seed + 1)))


def test_it_learns_one_image_and_beats_what_knows_no_image():
    image = torch.from_numpy(dead_leaves(np.random.default_rng(3), 24))[None, None]
    x0 = torch.complex(image, 0.2 * image)
    A = sense(birdcage_maps((24, 24), 2), cartesian_mask(24, 4, acs=4))
    y = A(x0) + 0.01 * A.mask(torch.randn(1, *A.range_shape, dtype=torch.complex64, generator=rng(1)))
    torch.manual_seed(0)
    R = build(one_pass_config(**TrainOnePass(**SMALL).pick(*SIZES)))
    optimiser = torch.optim.Adam(R.parameters(), 3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        (R(A, y, 0.01) - x0).abs().square().mean().sqrt().backward()
        optimiser.step()
    maps, mask = A.coils.maps, A.mask.mask
    best = max(psnr(cg_sense(y, maps, mask, w), x0).item() for w in (1e-3, 1e-2, 1e-1))
    learnt = psnr(R(A, y, 0.01).detach(), x0).item()
    assert learnt > best + 3 and best >= psnr(zero_filled(y, maps, mask), x0).item()


def test_any_size_coils_and_batch_and_each_item_for_itself():
    R = network()
    for shape, coils in (((32, 28), 1), ((19, 45), 3), ((8, 8), 9)):
        A, y = scan(shape, coils, batch=2)
        with torch.no_grad():
            both, one = R(A, y, torch.tensor([0.01, 0.05])), R(A, y[1:], 0.05)
        assert both.shape == (2, 1, *shape) and both.isfinite().all()
        torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-5)
    A, y = scan()
    with pytest.raises(ValueError, match="0 or more"):
        R(A, y, -0.1)


def test_two_sets_of_maps_are_two_images():
    maps = torch.stack([birdcage_maps((16, 12), 4), 0.1 * birdcage_maps((16, 12), 4).flip(0)])
    A = soft_sense(maps, cartesian_mask((16, 12), 2, acs=4).mask)
    y = torch.randn(2, *A.range_shape, dtype=torch.complex64, generator=rng()) * A.mask.mask
    with torch.no_grad():
        assert network()(A, y, 0.02).shape == (2, 2, 16, 12)


def test_the_data_have_the_last_word():
    """Whatever the networks say, data without noise are explained: within what conjugate gradients have left."""
    A, y = scan(noise=0.0, coils=1)
    R = network()
    with torch.no_grad():
        sure, unsure = (R(A, y, noise, 30) for noise in (0.0, 1.0))
    assert (A(sure) - y).norm() < 0.01 * y.norm() < 0.2 * (A(unsure) - y).norm()


def test_scans_to_learn_from_are_right_and_seeded():
    x = torch.randn(3, 1, 24, 20, dtype=torch.complex64, generator=rng())
    seen = set()
    for seed in range(8):
        x0, A, y, std = random_scan(x, rng(seed))
        assert adjoint_error(A) < 1e-5 and A.range_shape[0] <= 8
        power = A.coils.maps.abs().square().sum(1)
        assert torch.all((power - 1).abs().lt(1e-4) | power.eq(0)) and torch.all(x0[:, 0][power == 0] == 0)
        noise = (y - A(x0))[A.mask.mask.expand(y.shape) > 0]
        assert 0.001 < noise.abs().square().mean().div(2).sqrt() < 0.06 and std.min() >= 0.002
        assert all(1.5 < one.numel() / one.sum() < 9 for one in A.mask.mask)
        assert torch.equal(y, random_scan(x, rng(seed))[2])
        seen.add(A.range_shape[0])
    assert len(seen) > 3


def test_training_is_seeded_and_its_checkpoint_reconstructs(tmp_path):
    options = dict(heads=None, bank=str(tmp_path / "bank"), images=2, crop=16, steps=2, warmup=1, batch_size=2)
    leaves(tmp_path / "bank")
    runs = [train_one_pass(TrainOnePass(**SMALL, **options, out=str(tmp_path / n)), False) for n in "ab"]
    for a, b in zip(*(r.ema.parameters() for r in runs), strict=True):
        assert torch.equal(a, b)
    p = TrainOnePass(**SMALL, **options)
    folder = save_checkpoint(tmp_path / "unrolled", runs[0].ema, one_pass_config(**p.pick(*SIZES)), {"steps": 2})
    A, y = scan()
    image = one_pass(A, y, 0.01, str(folder))
    assert torch.equal(image, load(folder)(A, y, 0.01)) and not image.requires_grad
    with pytest.raises(ValueError, match="expected an unrolled network"):
        one_pass(A, y, 0.01, "segmenter/t1w")


def leaves(folder):
    folder.mkdir()
    np.save(folder / "000.npy", np.stack([dead_leaves(np.random.default_rng(i), 32) for i in range(2)]))
