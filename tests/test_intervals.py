"""Intervals of pixels, regions and PSNR: what draws promise, what conformal ones hold."""

import pytest
import torch

from companion.evaluation.intervals import KINDS, Drawn, interval_table, intervals, over_splits


def drawn(cases, seed, width=1.0, dtype=torch.complex64, paired=False):
    """Truths that are one more draw, of pixels that err alone and all together; draws `width` times as far apart."""
    g = torch.Generator().manual_seed(seed)
    shape = (5, cases, 1, 16, 16)
    together = torch.randn(*shape[:3], 1, 1, dtype=dtype, generator=g)
    x = 0.1 * torch.randn(shape, dtype=dtype, generator=g) + 0.03 * together
    if paired:
        x[2::2] = -x[1::2]
    x = 2 + x
    middle = x[1:].mean(0)
    mask = torch.ones(shape[1:], dtype=torch.bool)
    mask[..., :4] = False
    return Drawn(x[0], middle + width * (x[1:] - middle), mask, paired)


@pytest.mark.parametrize("paired", [False, True], ids=["independent", "antithetic"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32])
def test_right_draws_hold_what_they_promise_and_narrow_ones_after_calibration(dtype, paired):
    right = intervals(drawn(150, 0, 1.0, dtype, paired), drawn(200, 1, 1.0, dtype, paired))
    narrow = intervals(drawn(150, 0, 0.4, dtype, paired), drawn(200, 1, 0.4, dtype, paired))
    for kind in KINDS:
        assert right[kind].coverage == pytest.approx(0.91, abs=0.05) == pytest.approx(narrow[kind].coverage, abs=0.05)
        assert len(right[kind].each) == 200
    for kind in ("pixel", "region"):
        assert right[kind].raw == pytest.approx(0.9, abs=0.02) and narrow[kind].raw < 0.75
        assert narrow[kind].factor == pytest.approx(right[kind].factor / 0.4, rel=0.02)
        assert narrow[kind].width == pytest.approx(right[kind].width, rel=0.02)


def test_over_ways_to_part_the_slices_the_mean_coverage_is_the_promised_one():
    people = drawn(120, 3, 0.5)
    found = over_splits(people, 40, repeats=20)
    assert all(found[kind] == pytest.approx(0.91, abs=0.02) for kind in KINDS)
    assert over_splits(people, 40, repeats=1) == over_splits(people, 40, repeats=1)


def test_regions_are_means_of_magnitudes_inside_the_person():
    one = drawn(2, 0)
    means, known = one.regions(one.truth)
    assert means.shape == known.shape == (2, 16)
    assert not known.reshape(2, 4, 4)[:, :, 0].any() and known.reshape(2, 4, 4)[:, :, 1:].all()
    assert means[1, 6] == pytest.approx(one.truth[1, 0, 4:8, 8:12].abs().mean().item(), rel=1e-5)


def test_a_table_parts_the_people_or_takes_those_that_it_is_given():
    people = drawn(12, 5, 0.5)
    alone, given = interval_table(people), interval_table(people, drawn(30, 6, 0.5))
    for row, kind in zip(alone, KINDS, strict=True):
        assert row["factor"] == round(intervals(people, people)[kind].factor, 2)
        assert row["holds, conformal (%)"] == round(100 * over_splits(people, 9)[kind], 1)
    assert given[0]["holds, conformal (%)"] > 80 > given[0]["holds, as drawn (%)"]
    with pytest.raises(ValueError, match="9 are the least"):
        interval_table(drawn(8, 0), people)
    with pytest.raises(ValueError, match="9 are the least, and one to test"):
        interval_table(drawn(9, 0))
