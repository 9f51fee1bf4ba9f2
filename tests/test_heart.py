"""The virtual hearts: seeded, periodic, contracting by a known volume, the same at every matrix size."""

import time

import numpy as np
import pytest
import torch

from companion.data import heart_parts
from companion.data.heart import cohort, render
from companion.data.heart_parts import LABELS, Heart, bssfp

FINE = {"shape": (121, 131), "voxel_mm": 1.0, "breathing": 0.0}  # the heart and little around it


def areas(labels, name):
    return (labels == LABELS[name]).sum((1, 2)).double()


def test_a_seed_decides_everything_and_seeds_differ():
    first, again, other = (render(Heart(seed), 2).image for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert (first.abs() - other.abs()).square().mean().sqrt() > 0.05


def test_rendering_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    render(Heart(5), 1)
    assert torch.equal(before, torch.get_rng_state())


def test_splits_share_nobody():
    seeds = [{person.seed for person in cohort(split, 50)} for split in ("train", "validation", "test")]
    assert len(set.union(*seeds)) == 150
    with pytest.raises(ValueError, match="unknown split"):
        cohort("holdout", 3)


def test_without_breathing_the_second_cycle_repeats_the_first():
    r = render(Heart(1), 12, (40, 40), cycles=2, breathing=0.0)
    assert torch.allclose(r.image[:6], r.image[6:], atol=1e-4) and torch.equal(r.labels[:6], r.labels[6:])
    breathes = render(Heart(1), 12, (40, 40), cycles=2)
    assert (breathes.image[:6].abs() - breathes.image[6:].abs()).abs().max() > 0.1


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_the_cavity_follows_the_volume_curve_and_the_wall_keeps_its_area(seed):
    r = render(Heart(seed), 10, **FINE)
    cavity, wall = areas(r.labels, "lv_blood"), areas(r.labels, "myocardium")
    power = 1 - heart_parts.LENGTH_SHARE
    assert torch.allclose(cavity / cavity[0], r.volume.double() ** power, atol=0.02)
    assert ((wall / wall.mean()) - 1).abs().max() < 0.03
    assert areas(r.labels, "rv_blood").min() < 0.75 * areas(r.labels, "rv_blood")[0]


def test_volume_curve_is_healthy_smooth_and_periodic():
    cycle = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for person in cohort("train", 20):
        volume = person.volume(cycle)
        assert 0.5 < 1 - volume.min() / volume[0] < 0.7
        assert 0.3 < cycle[volume.argmin()] < 0.46  # the end of systole, or of the relaxation after it
        assert abs(volume[-1] - volume[0]) < 1e-4 and volume.max() <= 1 + 1e-9
        assert volume.diff().abs().max() < 0.006  # no jump


def test_wall_thickens_and_the_heart_moves_but_the_back_does_not():
    r = render(Heart(2), 8, breathing=0.0)
    change = (r.image.abs()[:4] - r.image.abs()[0]).abs().amax(0)
    inside = (r.labels > 0).any(0)
    assert change[inside].mean() > 5 * change[-16:, :].mean()
    radius = [areas(r.labels, name) for name in ("lv_blood", "myocardium")]
    thickness = (radius[0] + radius[1]).sqrt() - radius[0].sqrt()
    assert thickness.max() > 1.15 * thickness[0]


def test_breathing_moves_heart_and_diaphragm_down_by_what_it_says():
    person = next(p for p in cohort("train", 9) if p.build.breath_mm > 8)
    times = torch.linspace(0, person.build.breath_ms, 201)
    down = person.diaphragm_mm(times)
    assert down.min() < 1e-3 and abs(down.max() - person.build.breath_mm) < 0.05
    cycles = person.build.breath_ms / person.build.cycle_ms
    labels = [render(person, 24, (140, 140), 1.0, cycles=cycles, breathing=b).labels == 1 for b in (0.0, 1.0)]
    rows = torch.arange(140.0)[:, None]
    middle = [(mask * rows).sum((1, 2)) / mask.sum((1, 2)) for mask in labels]
    expected = heart_parts.HEART_FOLLOWS[0] * person.diaphragm_mm(torch.arange(24) * (person.build.breath_ms / 24))
    assert torch.allclose(middle[1] - middle[0], expected, atol=0.15)


@pytest.mark.parametrize("shape", [(1, 1), (37, 53), (64, 31)])
def test_any_size(shape):
    r = render(Heart(0), 3, shape)
    assert r.image.shape == r.labels.shape == (3, *shape) and r.image.dtype == torch.complex64
    assert torch.isfinite(torch.view_as_real(r.image)).all() and r.labels.dtype == torch.uint8


def test_one_heart_is_the_same_at_every_matrix_size():
    coarse, fine = (render(Heart(1), 1, (n, n)).image.abs() for n in (70, 140))
    pooled = torch.nn.functional.avg_pool2d(fine, 2)
    correlation = np.corrcoef(pooled.flatten(), coarse.flatten())[0, 1]
    assert correlation > 0.98
    other = render(Heart(2), 1, (70, 70)).image.abs()
    assert np.corrcoef(other.flatten(), coarse.flatten())[0, 1] < correlation - 0.02


def test_phase_is_smooth_in_space_and_time_and_leaves_the_magnitude():
    flat, curved = render(Heart(6), 12, phase_rad=0.0).image, render(Heart(6), 12).image
    assert torch.allclose(flat.abs(), curved.abs(), atol=1e-5)
    body = (curved.abs() > 0.05).all(0)
    between = curved[1:] * curved[:-1].conj()
    assert between.angle()[:, body].abs().max() < 0.35
    for axis in (1, 2):
        n = curved.shape[axis] - 1
        step = (curved.narrow(axis, 1, n) * curved.narrow(axis, 0, n).conj()).angle()
        both = body.narrow(axis - 1, 1, n) & body.narrow(axis - 1, 0, n)
        assert step[:, both].abs().max() < 0.25
    assert curved[0][body].angle().std() > 0.1


def test_contrast_is_that_of_bssfp():
    assert bssfp(1000.0, 1000.0, 90.0) == pytest.approx(0.5)
    r = render(Heart(0), 1, bias=0.0, **FINE)
    level = {name: float(r.image.abs()[r.labels == label].median()) for name, label in LABELS.items()}
    assert level["lv_blood"] == pytest.approx(1, abs=0.08) and level["rv_blood"] == pytest.approx(1, abs=0.12)
    assert 0.2 < level["myocardium"] < 0.4
    assert r.image.abs().max() < 1.6


def test_the_apex_is_smaller_than_the_base():
    sizes = [areas(render(Heart(0), 1, level=level, **FINE).labels, "lv_blood") for level in (0.0, 0.5, 1.0)]
    assert sizes[0] > sizes[1] > 2 * sizes[2] > 0


@pytest.mark.parametrize("wrong", [{"frames": 0}, {"shape": (0, 4)}, {"cycles": 0}, {"level": 2}, {"voxel_mm": -1}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        render(Heart(0), **wrong)


def test_twelve_frames_are_quick():
    render(Heart(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        took = []
        for seed in range(5):
            start = time.process_time()
            render(Heart(seed))
            took.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(took) < 0.1  # about 0.02 s; slower machines are allowed
