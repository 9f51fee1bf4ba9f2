"""The virtual cohort: seeded, the same at every matrix size, brain-like, in the right place."""

import numpy as np
import pytest
import torch

from companion.data import anatomy
from companion.data.anatomy import Subject, affine, cohort, grid_mm, render, signal, slice_heights, tissue_maps

HEIGHT = torch.tensor([8.0])


def slice_of(subject, size=48, contrast="T1w", **options):
    return render(subject, contrast, (1, size, size), slices_mm=HEIGHT, **options)


def test_a_seed_decides_everything_and_seeds_differ():
    first, again, other = (slice_of(Subject(seed)).image for seed in (3, 3, 4))
    assert torch.equal(first, again)
    difference = (first.abs() - other.abs()).square().mean().sqrt()
    assert difference > 0.05


def test_rendering_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    slice_of(Subject(5))
    assert torch.equal(before, torch.get_rng_state())


def test_one_subject_is_the_same_person_at_every_matrix_size():
    coarse, fine = (slice_of(Subject(1), size).image.abs() for size in (48, 96))
    pooled = torch.nn.functional.avg_pool2d(fine[None], 2)[0]
    correlation = np.corrcoef(pooled.flatten(), coarse.flatten())[0, 1]
    assert correlation > 0.98
    assert np.corrcoef(slice_of(Subject(2), 48).image.abs().flatten(), coarse.flatten())[0, 1] < correlation - 0.02


def test_odd_and_rectangular_sizes():
    r = render(Subject(0), "T2w", (3, 41, 57))
    assert r.image.shape == r.labels.shape == (3, 41, 57) and r.image.dtype == torch.complex64


def test_warps_are_diffeomorphic_and_mild():
    points = grid_mm((24, 24, 24), 8.0)
    for seed in range(4):
        moved = anatomy.warp(Subject(seed), points)
        z, y, x = (torch.diff(moved, dim=axis)[:23, :23, :23] for axis in range(3))
        volume = torch.linalg.det(torch.stack([x, -y, z], -1)) / 8.0**3  # y runs backwards
        assert volume.min() > 0.2 and volume.max() < 3
        assert (moved - points).norm(dim=-1).mean() < 12


def test_tissue_fractions_and_labels_agree():
    subject = Subject(7)
    r = slice_of(subject)
    total = r.tissue.sum(0)
    assert r.tissue.min() >= -1e-4 and total.max() < 1.01
    assert set(r.labels.unique().tolist()) == {0, 1, 2, 3}
    assert torch.equal(r.labels > 0, total > 0.5)
    share = [(r.labels == label).float().mean() for label in (2, 3)]
    assert 0.1 < share[0] < 0.4 and 0.05 < share[1] < 0.3


def test_contrasts_order_tissues_as_radiologists_know_them():
    level = {c: {t: signal(c, *anatomy.RELAXATION[t]) for t in anatomy.TISSUES} for c in anatomy.SEQUENCES}
    assert level["T1w"]["white"] > level["T1w"]["grey"] > level["T1w"]["csf"]
    assert level["T2w"]["csf"] > level["T2w"]["grey"] > level["T2w"]["white"]
    assert level["PDw"]["grey"] > level["PDw"]["white"] > level["PDw"]["csf"]  # not monotone in T1w nor T2w
    assert level["FLAIR"]["csf"] < 0.2 * level["FLAIR"]["white"] < level["FLAIR"]["grey"]


def test_spin_echo_signal_formula():
    expected = 0.8 * (1 - np.exp(-5)) * np.exp(-1)
    assert signal("T2w", 0.8, 1000.0, 100.0) == pytest.approx(expected)


def test_phase_is_smooth_and_magnitude_does_not_depend_on_it():
    flat, curved = slice_of(Subject(2), phase_rad=0.0).image, slice_of(Subject(2)).image
    assert torch.allclose(flat.abs(), curved.abs(), atol=1e-5)
    inside = flat.abs() > 0.2
    assert flat[inside].angle().std() < 1e-3
    phase = (curved * curved[inside][0].conj()).angle()
    step = torch.diff(phase, dim=-1)[inside[..., 1:] & inside[..., :-1]]
    assert step.abs().median() < 0.2


def test_random_phase_keeps_magnitudes_and_follows_its_generator():
    magnitude = torch.rand(3, 1, 20, 24)
    first, second = (anatomy.random_phase(magnitude, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second) and torch.allclose(first.abs(), magnitude, atol=1e-6)
    assert (first[0] / first[0].abs() - first[1] / first[1].abs()).abs().mean() > 0.1


def test_smooth_fields_have_unit_variance_everywhere():
    points = grid_mm((1, 16, 16), 13.0)
    fields = torch.stack([anatomy.smooth_field(points, torch.Generator().manual_seed(i))[0] for i in range(400)])
    assert fields.var(0).min() > 0.7 and fields.var(0).max() < 1.35


def test_affine_points_at_the_same_place_as_the_grid():
    shape, voxel_mm = (5, 8, 7), 2.5
    points = grid_mm(shape, voxel_mm)
    for z, y, x in [(0, 0, 0), (4, 7, 6), (2, 3, 1)]:
        assert np.allclose(affine(shape, voxel_mm)[:3] @ [x, y, z, 1], points[z, y, x].numpy(), atol=1e-4)
    assert points[0, 0, 0, 1] > points[0, -1, 0, 1]  # rows run from anterior to posterior


def test_the_template_itself_lies_where_mni_says():
    points = torch.tensor([[[[22.0, -30.0, 28.0], [120.0, 0.0, 0.0]]]])  # deep white matter; outside the head
    white, outside = tissue_maps(None, points, 2.0)[2, 0, 0]
    assert white > 0.9 and outside == 0


def test_splits_share_nobody():
    people = [subject.seed for split in ("train", "validation", "test") for subject in cohort(split, 50)]
    assert len(set(people)) == 150
    with pytest.raises(ValueError, match="train, validation, test"):
        cohort("holdout", 3)


def test_heights_cover_the_slab_in_order():
    heights = slice_heights(Subject(3), 12)
    low, high = anatomy.SLAB_MM
    assert low <= heights.min() and heights.max() <= high and (torch.diff(heights) > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(contrast="T3w"), "T1w, T2w"),
        (dict(shape=(0, 8, 8)), "positive"),
        (dict(voxel_mm=-1.0), "voxel_mm"),
        (dict(shape=(2, 8, 8), slices_mm=HEIGHT), "2 slices"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        render(Subject(0), **({"shape": (1, 8, 8)} | arguments))
