"""Counts that no image explains are refused before anything long starts, and those of a right model are not."""

from dataclasses import replace

import numpy as np
import pytest

from companion.acquisition.own_pet import OwnScan, write_example
from companion.data.npz import read_npz
from companion.data.scan_geometry import Geometry
from companion.data.sinograms import write_sinograms
from companion.reconstruction.misfit import TOLD, misfit

GEOMETRY = Geometry(64, 56, 4.0)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    return read_npz(write_example(tmp_path_factory.mktemp("scan") / "a.npz", GEOMETRY, 2, 1e5, image_size=32))


def found(path, arrays, geometry=GEOMETRY):
    return misfit(OwnScan.read(write_sinograms(path, geometry=geometry, units="kBq/mL", **arrays), 32).scan)


def test_a_right_model_explains_its_counts_whichever_way_the_image_is_turned(arrays, tmp_path):
    for geometry in (GEOMETRY, replace(GEOMETRY, span_deg=-180.0, first_angle_deg=90.0)):
        one = found(tmp_path / "a.npz", arrays, geometry)
        one.check("a.npz")
        assert one.error < TOLD and one.scatter > 0.9 and "explains the counts" in one.verdict
    few = {name: x / 100 for name, x in arrays.items()}
    few["counts"] = np.random.default_rng(0).binomial(arrays["counts"].astype(int), 0.01)
    assert found(tmp_path / "a.npz", few).error < TOLD  # counting noise is not taken for a wrong model


@pytest.mark.parametrize("change", [{"span_deg": 360.0}, {"bin_offset": 4.0}])
def test_another_geometry_is_told(arrays, tmp_path, change):
    assert "look at the angles, bins" in found(tmp_path / "a.npz", arrays, replace(GEOMETRY, **change)).verdict


def gap(counts):
    counts[:, :, 20:26] = 0
    return {"counts": counts}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (gap, "no image explains its counts"),
        (lambda y: {"counts": np.round((y + np.roll(y, 1, -1) + np.roll(y, -1, -1)) / 3)}, "smoothed, interpolated"),
        (lambda y: {"counts": np.clip(y, None, 255) + 300 * (y > 60)}, "no image explains its counts"),
    ],
)
def test_counts_that_are_none_are_refused(arrays, tmp_path, change, words):
    with pytest.raises(ValueError, match=f"a.npz: .*{words}"):
        found(tmp_path / "a.npz", arrays | change(arrays["counts"].copy())).check("a.npz")


def test_bins_in_cm_and_factors_of_another_unit_are_refused(arrays, tmp_path):
    with pytest.raises(ValueError, match="no image explains"):
        found(tmp_path / "a.npz", arrays, replace(GEOMETRY, bin_mm=0.4)).check("a.npz")
    with pytest.raises(ValueError, match="check units and calibration"):
        found(tmp_path / "a.npz", arrays | {"factors": arrays["factors"] / 1000}).check("a.npz")


def test_scaled_counts_are_refused(arrays, tmp_path):
    with pytest.raises(ValueError, match="multiples of 10"):
        found(tmp_path / "a.npz", arrays | {"counts": 10 * arrays["counts"]})
