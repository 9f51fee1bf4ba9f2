"""The benchmark on raw k-space runs from a file to its table and picture, and its protocol holds."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from companion.data.cfl import write_cfl
from companion.diffusion.covariance import Measured
from companion.diffusion.recalibration import ErrorModel
from companion.diffusion.sampling import Bill, Samples
from companion.diffusion.sets import EachSet
from companion.operators.mri import birdcage_maps, fft

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_kspace.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("real_kspace", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Shrink:
        def __call__(self, x, sigma, cond=None):
            return x / (1 + (sigma / 0.3).square())[:, None, None, None]

    sigmas = torch.tensor([0.01, 10.0])
    monkeypatch.setattr(
        module,
        "prior",
        lambda *args: (EachSet(Shrink()), {"all": ErrorModel(Measured(sigmas, torch.ones(2, 4), prior_std=0.3))}),
    )
    monkeypatch.setattr(module, "known_to", lambda weights: None)  # it has no network whose features could tell
    return module


@pytest.fixture
def raw(tmp_path):
    """A BART pair of fully sampled k-space, 48 x 40, 5 coils."""
    grid = [torch.linspace(-1, 1, n) for n in (48, 40)]
    y, x = grid[0][:, None], grid[1][None]
    image = ((y / 0.8) ** 2 + (x / 0.7) ** 2 < 1) * (0.7 + 0.3 * torch.cos(6 * x) * torch.cos(5 * y))
    kspace = fft(birdcage_maps((48, 40), 5) * image)
    kspace = kspace + 0.01 * torch.randn(kspace.shape, dtype=kspace.dtype, generator=torch.Generator().manual_seed(0))
    write_cfl(tmp_path / "full", kspace.permute(1, 2, 0)[None])
    write_cfl(tmp_path / "clean", fft(birdcage_maps((48, 40), 5) * image).permute(1, 2, 0)[None])
    return tmp_path / "full.cfl"


def test_from_a_file_to_its_table(benchmark, raw, tmp_path):
    out = tmp_path / "out"
    options = ["--accelerations", "2", "--acs", "14", "--draws", "2", "--evaluations", "8", "--validation", "1"]
    rows = benchmark.main([str(raw), "--out", str(out), "--methods", "TV", "CG-SENSE", *options])
    every = ["zero-filled", "CG-SENSE", "TV", "one draw", "posterior mean", "trusted"]
    for mask in ("lines", "Poisson"):  # without the posterior mean where the scan trusts nothing of it
        assert set(every) - {r["method"] for r in rows if r["mask"] == mask} <= {"posterior mean"}
    best = {r["method"]: r for r in rows if r["mask"] == "lines"}
    assert best["CG-SENSE"]["PSNR (dB)"] > best["zero-filled"]["PSNR (dB)"] + 3
    assert best["trusted"]["PSNR (dB)"] > best["one draw"]["PSNR (dB)"]
    assert best["zero-filled"]["unmeasured"] > 2 * best["CG-SENSE"]["unmeasured"] > 0
    means = [r for r in rows if r["method"] == "trusted"]
    assert all(r["chi-square"] > 0 and "the prior" in r["verdict"] for r in means)
    assert all(0 < r["coverage"] <= 1 and r["calibration"] > 0 and r["memory (GiB)"] > 0 for r in means)
    assert (
        len((out / "table.md").read_text().splitlines()) == 2 + len(rows) and (out / "sheet.png").stat().st_size > 10000
    )
    assert json.loads((out / "results.json").read_text())["rows"][0]["scan"] == "full 0"


def test_the_noise_of_the_reference_is_not_held_against_draws(benchmark, raw):
    """Of an image that is right but for the noise of what was measured, the rest of the error is the reference's."""
    options = SimpleNamespace(
        axes=None, which=None, slices=1, kinds=["lines"], accelerations=[4], acs=14, seed=0, brightness=1.0
    )
    (case,) = benchmark.cases(raw, options)
    path = benchmark.only_scan(raw.with_name("clean.cfl"), ("k-space",))[0]
    clean = case.m.raw_to_data(benchmark.as_slices(benchmark.read_kspace(path, None, None)).kspace[0])[None]
    full = clean + 0.01 * benchmark.randn(clean.shape, clean.dtype, torch.Generator().manual_seed(1))  # white, as said
    case = replace(case, m=replace(case.m.with_noise(0.01), y=full * (case.m.y != 0)), full=full)
    seen = (case.m.maps.conj() * benchmark.ifft(case.full)[:, None]).sum(2)
    case = replace(case, reference=case.m.magnitude(seen).to(torch.complex64))  # of the same maps: they err, too
    image = (case.m.maps.conj() * benchmark.ifft(torch.where(case.m.y != 0, case.full, clean))[:, None]).sum(2)
    draws = case.as_reference(image.expand(64, -1, -1, -1))
    assert torch.equal(draws, case.as_reference(image.expand(64, -1, -1, -1)))
    same = Samples(image.expand(8, -1, -1, -1), Bill(0, 0, 0.0), paired=True)
    line = benchmark.row(case, "right", image, 0.0, same)
    assert line["calibration"] < 1e-6 and line["coverage"] < 0.01
    assert line["calibration, noisy"] == pytest.approx(1, abs=0.12) and line["its noise"] == pytest.approx(1, abs=0.12)
    assert line["coverage, noisy"] > 0.65  # of 8 draws, between the fifth and the ninety-fifth percentile


def test_undersampled_files_are_refused(benchmark, raw, tmp_path):
    from companion.data.cfl import read_cfl

    kspace = read_cfl(raw)
    kspace[:, :, ::2] = 0
    write_cfl(tmp_path / "half", kspace)
    with pytest.raises(SystemExit, match="fully sampled"):
        benchmark.main([str(tmp_path / "half.cfl"), "--out", str(tmp_path / "out")])
