"""The bench: an exact sampler passes, a wrong one does not; entries are read, counted and refused with the reason."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import peers
import pytest
import torch

from companion.data.nifti import save_nifti
from companion.diffusion.complexify import to_channels, to_complex
from companion.evaluation.known_posterior import condition, make_problem, matrix
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, sense
from companion.randomness import randn
from companion.reconstruction import bench
from companion.reconstruction.bench import Counted, Entry, Settings, Slices, draw, exact, read_entry
from companion.show.bench import figure, markdown, write

EXAMPLE = Path(__file__).parents[1] / "benchmarks" / "entries" / "example.py"
ENTRIES = sorted(p for p in EXAMPLE.parent.glob("*.py") if p.stem not in ("example", "between_0_and_1"))
QUICK = Settings(size=8, draws=64, cases=100, calls=4)


def truth(width=1.0):
    """An entry that draws from the exact posterior of the Gaussian prior, its spread times `width`."""

    def sample(D, A, y, noise_std, seeds, **_):
        M, seen = matrix(A)
        D.images += 4 * len(seeds)
        data = y.expand(len(seeds), *y.shape[1:]).flatten(1)[:, seen].to(torch.complex128)
        prior, n = D.D, len(M.T)
        C = prior.covariance()
        mean, post, _ = condition(prior.mean.flatten().to(torch.complex128), C, M, data[0], noise_std)
        gain = torch.linalg.solve(M @ C @ M.mH + noise_std**2 * torch.eye(len(M)), M @ C).mH
        means = mean + (data - data[0]) @ gain.T
        factor = torch.linalg.cholesky((post + post.mH) / 2 + 1e-12 * torch.eye(n))
        noise = torch.stack(
            [torch.randn(n, 2, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        )
        x = means + width * torch.view_as_complex(noise.contiguous()) @ factor.T
        return x.reshape(-1, *A.domain_shape).to(torch.complex64)

    return Entry("exact", sample)


@pytest.fixture(autouse=True)
def covariance(monkeypatch):
    from companion.diffusion.exact import GaussianDenoiser

    def dense(self):
        n = self.mean.numel()
        eye = torch.eye(n, dtype=torch.complex128).reshape(n, *self.mean.shape)
        return self.basis.H(self.variances * self.basis(eye)).flatten(1).T

    monkeypatch.setattr(GaussianDenoiser, "covariance", dense, raising=False)


def test_the_exact_posterior_passes_and_a_narrow_one_does_not():
    right, narrow = exact(truth(), QUICK, "gaussian"), exact(truth(0.4), QUICK, "gaussian")
    assert right["mean_error"] < 0.2 and 0.9 < right["variance_ratio"] < 1.1 and abs(right["coverage"] - 0.9) < 0.03
    assert right["ranks_p"] > 0.05 and right["denoiser_calls"] == 4
    assert narrow["variance_ratio"] == pytest.approx(0.16, abs=0.04) and narrow["coverage"] < 0.6
    assert narrow["ranks_p"] < 0.01


def test_the_example_is_twenty_lines_and_its_evaluations_are_counted():
    lines = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(lines) <= 22
    entry, problem = read_entry(EXAMPLE), make_problem("gaussian", 8, draws=50)
    assert entry.name == "isotropic guess, ancestral" and len(entry.sha256) == 64
    found = draw(entry, problem.prior, problem.A, problem.y, 0.02, range(3), 6, None)
    again = draw(entry, problem.prior, problem.A, problem.y, 0.02, range(1, 2), 6, None)
    assert found.denoiser_calls == 6
    torch.testing.assert_close(found.x[1:2], again.x, rtol=1e-4, atol=1e-5)  # a draw depends on its own seed alone


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.stem)
def test_entries_keep_to_their_budget_and_draws_to_their_seeds(path):
    if path.stem.startswith("deepinv"):
        peers.deepinv()
    entry, problem = read_entry(path), make_problem("gaussian", 8, draws=10)
    entry = replace(entry, options={name: values[0] for name, values in entry.grid.items()})
    given = (problem.prior, problem.A, problem.y, 0.02)
    images = problem.images(4)
    both, one = (draw(entry, *given, seeds, 10, images) for seeds in ((0, 1), (1,)))
    assert 5 <= both.denoiser_calls <= 10
    torch.testing.assert_close(both.x[1:], one.x, rtol=1e-3, atol=1e-4)
    assert (both.x[0] - both.x[1]).norm() > 0.01


def test_the_data_step_of_deepinvs_entry_is_exact():
    """Against the dense solution; deepinv's own, converged, is compared with it in test_bridges_out."""
    found = runpy.run_path(str(EXAMPLE.parent / "between_0_and_1.py"))
    A = 2.6 * sense(birdcage_maps((7, 6), 3), cartesian_mask((7, 6), 2, acs=2))
    generator = torch.Generator().manual_seed(0)
    y, z = (randn((2, *shape), torch.complex64, generator) for shape in (A.range_shape, A.domain_shape))
    M, gamma = A(torch.eye(42, dtype=torch.complex64).reshape(42, 1, 7, 6)).flatten(1).T, torch.tensor(0.7)
    right = torch.linalg.solve(M.mH @ M + torch.eye(42) / gamma, (y.flatten(1) @ M.conj() + z.flatten(1) / gamma).T).T
    prox = found["exact_prox"](A)(to_channels(z), torch.view_as_real(y).movedim(-1, 1), gamma)
    torch.testing.assert_close(to_complex(prox).flatten(1), right, rtol=1e-4, atol=1e-4)
    turned = sense(birdcage_maps((7, 6), 3), torch.eye(7, 6))
    with pytest.raises(ValueError, match="several rows"):
        found["exact_prox"](turned)


def test_a_gradient_counts_as_another_evaluation_and_moments_exist_only_where_D_has_them():
    D = Counted(lambda x, sigma, cond=None: x / 2)
    x = torch.ones(3, requires_grad=True)
    D(x, torch.ones(3)).sum().backward()
    assert D.images == 6 and not hasattr(D, "moments")
    assert hasattr(Counted(make_problem("gaussian", 8, draws=10).prior), "moments")


def test_a_guidance_is_an_entry_as_well(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from companion.diffusion.guidance import dds\n"
        "def guidance(A, y, noise_std):\n    return dds(A, y, noise_std)\n"
    )
    problem = make_problem("gaussian", 8, draws=10)
    found = draw(read_entry(path), problem.prior, problem.A, problem.y, 0.02, range(2), 5, None)
    assert found.x.shape == (2, 1, 8, 8) and found.denoiser_calls == 5


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 1", "neither sample nor guidance"),
        ("from companion.diffusion.sampling import sample", "neither sample nor guidance"),
        ("def sample(): pass\ndef guidance(): pass", "sample and guidance"),
        ("def sample(D, magic): pass", "asks for magic"),
        ("def sample(D, seeds): return D", "expected finite draws"),
    ],
)
def test_what_is_no_entry_is_refused_with_the_reason(tmp_path, code, said):
    path = tmp_path / "mine.py"
    path.write_text(code)
    problem = make_problem("gaussian", 8, draws=10)
    with pytest.raises(ValueError, match=said):
        draw(read_entry(path), problem.prior, problem.A, problem.y, 0.02, range(2), 5, None)


def test_a_file_of_another_kind_is_no_entry(tmp_path):
    (tmp_path / "mine.txt").write_text("def sample(D): pass")
    with pytest.raises(ValueError, match=r"must end in \.py"):
        read_entry(tmp_path / "mine.txt")


def test_the_option_of_the_grid_that_draws_from_the_posterior_is_found():
    """Too narrow draws have the better mean, too wide ones the better coverage: the score takes neither."""
    inner, problem = truth().draw, make_problem("gaussian", 8, draws=10)

    def sample(width, **given):
        return truth(width).draw(**given)

    entry = Entry("exact", sample, grid={"width": (0.3, 1.0, 3.0)})
    found = bench.tuned(entry, problem.prior, problem.A, 0.02, problem.images(8), 4)
    assert found.options == {"width": 1.0} and bench.tuned(Entry("", inner), None, None, 0, None, 4).options == {}
    x = torch.tensor([[0.0], [2.0]])
    assert bench.energy_score(x, torch.tensor([1.0])) == pytest.approx(0.0)  # mean distance 1, half the pairs' 2


def test_settings_that_cannot_answer_are_refused():
    with pytest.raises(ValueError, match="calibration=8"):
        Settings(calibration=8)


class Flat(torch.nn.Module):
    total_stride = (1, 1)

    def forward(self, x, sigma, cond=None):
        return 0.5 * x


def test_real_heads_of_a_folder_are_one_more_part_of_the_row(tmp_path, monkeypatch):
    z, y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in (44, 52, 40)), indexing="ij")
    ball = ((z**2 + y**2 + x**2).sqrt() < 0.9) * (1 + 0.3 * x)
    save_nifti(tmp_path / "head.nii.gz", ball, voxel_mm=4.0)
    monkeypatch.setattr(bench, "load_denoiser", lambda name: Flat())

    def sample(D, A, y, seeds, images, scale=0.0):
        assert images.shape == (QUICK.calibration, 1, 64, 64) and images.abs().amax((1, 2, 3)).min() > 0.05
        noise = [torch.randn(A.domain_shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return scale * A.H(y) + 0.1 * torch.stack(noise)

    entry = Entry("adjoint", sample, grid={"scale": (0.0, 1.0)})
    row = bench.heads(entry, replace(QUICK, heads=str(tmp_path), people_draws=3))
    assert row["options"] == {"scale": 1.0}, "tuned on images that are no heads'"
    assert row["heads"] == 1 and row["slices"] == 2 and 5 < row["psnr"] < 40 and row["denoiser_calls"] == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="nothing to use there"):
        bench.heads(Entry("adjoint", sample), replace(QUICK, heads=str(tmp_path / "empty")))


def people(cases, seed):
    """Truths that are one more draw of what the draws are from."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(6, cases, 1, 12, 12, dtype=torch.complex64, generator=g) * 0.1 + 1).to(torch.complex64)
    return Slices(x[0], x[1:], {"denoiser_calls": 4.0, "milliseconds": 1.0})


def test_intervals_of_people_cover_and_a_row_becomes_table_figure_and_json(tmp_path):
    s = replace(QUICK, cases=20, priors=("gaussian",))
    quality = bench._quality(people(30, 0), people(30, 1))
    assert quality["coverage"] == pytest.approx(0.9, abs=0.02)
    assert quality["conformal_coverage"] == pytest.approx(0.93, abs=0.02)  # 0.9 + 0.9 / 30: few slices cost width
    assert quality["psnr_coverage"] > 0.75 and quality["psnr_draw"] < quality["psnr"]
    row = {"name": "exact", "sha256": "", "exact": {"gaussian": exact(truth(), s, "gaussian")}, "people": quality}
    folder = write([row], s, tmp_path)
    record = json.loads((folder / "bench.json").read_text())
    assert record["rows"][0]["people"]["slices"] == 30 and record["settings"]["calls"] == 4
    table = markdown([row | {"heads": quality}], s)
    assert table.count("|\n") == 3 and "heads: PSNR" in table
    alone = {k: v for k, v in row.items() if k != "people"}
    assert "people" not in markdown([alone], s) and len(figure([alone], s).axes) == 3
    assert len(figure([row], s).axes) == 4 and (folder / "bench.png").stat().st_size > 10_000
