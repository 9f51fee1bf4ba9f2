"""PET guided by MR: what counts as alike, and that it helps where the MR is right and tells where it cannot be used."""

from dataclasses import replace

import pytest
import torch

from companion.acquisition.pet import Scan
from companion.evaluation import metrics
from companion.operators.counts import poisson_counts
from companion.operators.pet import ParallelBeam, emission_model
from companion.reconstruction.activity import bowsher, leaning
from companion.reconstruction.mr_guided import bowsher_weights, kernel, kernel_em, map_bowsher
from companion.reconstruction.pet import GRIDS, map_rdp, mlem, pairs, relative_difference

SIZE = 32


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scan():
    """Rings of grey and white matter: their activity, a T1-like image of them in another unit, and counts."""
    line = torch.linspace(-1, 1, SIZE)
    radius = (line[:, None] ** 2 + line**2).sqrt()[None, None]
    label = (radius < 0.85).int() + (radius < 0.6).int() + (radius < 0.3).int()
    activity = torch.tensor([0.0, 20.0, 5.0, 20.0])[label]
    mr = torch.tensor([0.0, 300.0, 500.0, 300.0])[label]
    A = 0.3 * emission_model(ParallelBeam((SIZE, SIZE), pixel_mm=7.0))
    return activity, mr, A, torch.poisson(A(activity), generator=generator())


@pytest.mark.parametrize("space", [(9, 8), (4, 5, 6)])
def test_pixels_choose_the_neighbours_that_look_like_them(space):
    mr = torch.zeros(1, 1, *space)
    mr[..., : space[-1] // 2] = 7.0
    weights = bowsher_weights(mr + 0.01 * torch.rand(mr.shape, generator=generator()))
    assert weights.min() >= 0 and weights.max() == 1
    inner = torch.zeros(mr.shape, dtype=torch.bool)  # where enough neighbours lie on either side
    inner[(..., *[slice(1, -1)] * len(space))] = True
    for kind, (offset, here, there) in enumerate(pairs(space)):
        across = (mr[here] != mr[there]) & inner[here] & inner[there]
        assert not weights[kind][here][across].any(), offset
        assert weights[kind].sum() == weights[kind][here].sum(), "pairs that leave the image have no weight"
    assert torch.equal(bowsher_weights(3 * mr + 2), bowsher_weights(mr)), "the unit does not matter"
    everyone = bowsher_weights(mr, neighbours=2 * len(list(pairs(space))))
    assert torch.equal(everyone, torch.stack([(w > 0).float() for w in everyone])), "all neighbours: the plain prior"


def test_the_guided_prior_has_the_stated_gradient():
    x = 1 + torch.rand(1, 1, 6, 7, generator=generator(), dtype=torch.float64)
    alike = bowsher_weights(torch.rand(x.shape, generator=generator(1)))
    gradient = relative_difference(x, alike=alike)[1]
    for at in ((0, 0, 0, 0), (0, 0, 2, 3), (0, 0, 5, 6)):
        step = torch.zeros_like(x)
        step[at] = 1e-6
        rise = relative_difference(x + step, alike=alike)[0] - relative_difference(x - step, alike=alike)[0]
        assert rise.item() / 2e-6 == pytest.approx(gradient[at].item(), rel=1e-5)
    plain = relative_difference(x)
    ones = relative_difference(x, alike=torch.ones_like(alike))
    assert all(torch.allclose(a, b) for a, b in zip(plain, ones, strict=True))


@pytest.mark.parametrize("space", [(7, 9), (4, 5, 3)])
def test_the_kernel_mixes_alike_pixels_and_has_an_adjoint(space):
    mr = torch.rand(1, 1, *space, generator=generator())
    K = kernel(mr, near=6, reach=2)
    x, y = torch.rand(2, 1, 2, *space, generator=generator(1)).movedim(2, 1)
    assert torch.allclose((K(x[:, :1]) * y[:, :1]).sum(), (x[:, :1] * K.H(y[:, :1])).sum(), rtol=1e-5)
    assert torch.allclose(K(torch.ones_like(mr)), torch.ones_like(mr)), "rows sum to one"
    halves = (torch.arange(space[-1]) < space[-1] // 2).float().expand(1, 1, *space).clone()
    mixed = kernel(halves, near=6, reach=2, width=0.05)(torch.rand(1, 1, *space, generator=generator(2)) * halves)
    assert (mixed[halves == 0] < 0.01).all(), "nothing leaks over an edge of the MR"


def test_a_right_mr_makes_both_methods_better_than_any_without(scan):
    truth, mr, A, y = scan
    error = {
        "MAP": min(metrics.nrmse(map_rdp(y, A, strength=s).x, truth).item() for s in (0.02, 0.1, 0.5, 2.0)),
        "MLEM": min(metrics.nrmse(mlem(y, A, iterations=k).x, truth).item() for k in (5, 10, 20, 40)),
        "Bowsher": min(metrics.nrmse(map_bowsher(y, A, mr, strength=s).x, truth).item() for s in (0.5, 2.0)),
        "kernel": metrics.nrmse(kernel_em(y, A, mr, iterations=100).x, truth).item(),
    }
    assert error["Bowsher"] < 0.7 * min(error["MAP"], error["MLEM"]), error
    assert error["kernel"] < 0.7 * min(error["MAP"], error["MLEM"]), error
    both = map_bowsher(y.expand(2, *y.shape[1:]), A, mr, strength=0.5).x
    assert torch.allclose(both[0], both[1])


def test_slices_that_follow_one_another_help_each_other(scan):
    truth, mr, A, _ = scan
    n = 5
    y = poisson_counts(0.05 * A(truth).expand(n, *A.range_shape), range(n))
    apart = Scan(truth.expand(n, *truth.shape[1:]), y, 0.05 * A, mr=mr.expand(n, *mr.shape[1:]))
    single, volume = (bowsher(replace(apart, step=step), 0.5) for step in (None, 1.0))
    errors = [metrics.nrmse(x, apart.truth) for x in (single, volume)]
    assert (errors[1] < 0.8 * errors[0]).all(), "more counts for every tissue, at the ends of the stack, too"
    assert torch.equal(bowsher(replace(apart, step=2.5), 0.5), single), "too far away to help"
    assert torch.equal(bowsher(replace(apart.some([2]), step=1.0), 0.5), bowsher(apart.some([2]), 0.5))
    assert apart.some([0, 1]).step is None and replace(apart, step=1.0).thinned(0.5, range(n)).step == 1.0
    y, A, guide = _volume(apart)
    more = torch.cat([y[:, :, :-1], 3 * y[:, :, -1:]], 2)  # the last slice is another one
    moved = []
    for step in (1.0, 100.0):
        x, other = (map_bowsher(v, A, guide, strength=0.5, step=step, tol=1e-6).x for v in (y, more))
        moved.append((x - other)[..., :3, :, :].abs().mean())
    assert moved[1] < 0.1 * moved[0], "the further, the less slices count"


def _volume(scan):
    one = scan.volume()
    return one.y, one.A, one.mr


def test_the_counts_themselves_say_how_strongly_to_smooth(scan):
    truth, mr, A, y = scan
    one = Scan(truth, y, A, mr=mr)
    by_map, strength = leaning(one, 0.1)
    assert GRIDS["MAP"][0] < strength, "a right MR is worth following"
    error = metrics.nrmse(by_map(one), truth).item()
    assert error < 0.5 * min(metrics.nrmse(map_rdp(y, A, strength=s).x, truth).item() for s in (0.02, 0.1, 0.5, 2.0))
    plain, kept = leaning(Scan(truth, y, A), 0.1)
    assert kept == 0.1 and torch.equal(plain(one), map_rdp(y, A, strength=0.1).x)


def test_an_mr_of_another_grid_or_without_numbers_is_refused(scan):
    _, mr, A, y = scan
    with pytest.raises(ValueError, match="the grid of the PET image; resample"):
        map_bowsher(y, A, mr[..., :-1])
    with pytest.raises(ValueError, match="the grid of the PET image; resample"):
        kernel_em(y, A, mr.expand(2, 1, SIZE, SIZE))
    with pytest.raises(ValueError, match="the MR image"):
        map_bowsher(y, A, mr.where(mr > 0, torch.nan))
    with pytest.raises(ValueError, match="give 1 to 8"):
        bowsher_weights(mr, 9)
