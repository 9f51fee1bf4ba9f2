"""benchmarks/verdicts.py: what is no head is drawn anew by every seed, and statistics are judged rightly."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import no_heads  # noqa: E402
import verdicts  # noqa: E402


@pytest.mark.parametrize("draw", [no_heads.knee, no_heads.belly, no_heads.phantom, no_heads.beating])
def test_what_is_no_head_is_drawn_anew_by_every_seed(draw):
    first, again, other = (draw(np.random.default_rng(seed), 32) for seed in (0, 0, 1))
    assert first.shape == (32, 32) and np.isfinite(first).all() and np.abs(first).max() > 0.5
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_scan_is_the_truth_seen_by_its_operator_in_units_of_bright_tissue():
    x, A, y, noise, acs, maps, how = verdicts.scan(no_heads.knee, np.random.default_rng(3), 32)
    assert maps.shape == (how["coils"], 32, 32) and acs == 2 and 0.005 <= noise <= 0.02
    assert abs(np.percentile(x.abs()[x.abs() > 0.08 * x.abs().max()], 99) - 1) < 0.01
    assert (y - A(x)).abs().max() < 6 * noise


def test_a_statistic_is_judged_by_what_it_flags_and_accepts():
    assert verdicts.roc([1, 2, 3], [4, 5, 6]) == {"AUC": 1, "heads accepted": 1}
    assert verdicts.roc([1, 1], [1, 1])["AUC"] == 0.5
    found = verdicts.roc(list(range(10)), [4.5] + [20] * 9)
    assert 0.9 < found["AUC"] < 1 and found["heads accepted"] == 1
    assert verdicts.roc([1, 5], [0, 6])["heads accepted"] == 0


def test_measured_images_are_brought_to_the_size_asked_for(tmp_path):
    y, x = np.mgrid[-1:1:48j, -1:1:48j]
    np.save(tmp_path / "disc.npy", (np.hypot(y, x) < 0.7).astype(np.float32)[None])
    for size in (32, 64):
        image = verdicts.measured(tmp_path / "disc.npy")(np.random.default_rng(0), size)
        assert image.shape == (size, size) and abs(image.mean() - 0.385) < 0.05
