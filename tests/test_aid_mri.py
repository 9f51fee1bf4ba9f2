"""Reconstruction of volumes: every choice that the parameters offer, honest scales and maps, files to metrics.

Priors are tiny networks with random weights, people are ellipses: what is tested is the way of the data, not quality.
"""

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from companion.acquisition import mri as acquisition
from companion.acquisition import virtual_volumes
from companion.acquisition.mri import phase_alignment
from companion.data.fastmri import Volume
from companion.evaluation import metrics
from companion.models.architectures import build, network_of
from companion.models.folder import save_checkpoint
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, combine, fft, ifft
from companion.papers.aid import reconstruct as aid_mri
from companion.papers.aid.reconstruct import MODELS, Reconstruct, study
from companion.randomness import randn
from companion.reconstruction import mri as baselines
from companion.reconstruction import sequence as posterior
from companion.reconstruction.kept import Kept
from companion.reconstruction.sequence import METHODS, Prior, measured_and_inferred, score, summary

REFERENCE = 0.8  # magnitude that 99 % of the pixels of `person` do not exceed, nearly


def person(source, split, index, frames, image_size, spacing_mm, beyond=0):
    """Complex slices (frame, 1, y, x) of an ellipse with a spot that wanders from slice to slice."""
    axis = torch.linspace(-1, 1, image_size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    n = torch.arange(frames + beyond).reshape(-1, 1, 1)
    shift = 0.3 * np.sin(index + (split == "test"))
    spot = torch.exp(-((y - 0.1 * n + 0.2) ** 2 + (x - shift) ** 2) / 0.05)
    edge = torch.sigmoid((0.6 - y**2 - 1.3 * x**2) * 20)
    return torch.polar(edge * (0.5 + 0.4 * spot), (0.8 * y + 0.3 * n * x).expand_as(spot))[:, None]


def people(source, split, subjects, frames, image_size, spacing_mm, progress=False, beyond=0):
    return torch.stack([person(source, split, i, frames, image_size, spacing_mm) for i in range(subjects)])


def simulate(p, split, index, reference, frames=None):
    """The scan of a person by a form's protocol."""
    like = virtual_volumes.examples(reference, p.spacing_mm)
    cohort = virtual_volumes.Cohort(p.image_size, p.spacing_mm, p, like, p.seed)
    return cohort.scan(split, index, frames or p.frames, p.coils, p.noise_std)


def prepare(name, kspace, mask, calibration, noise_std, p, reference, x=None, oracle=None):
    like = virtual_volumes.examples(reference, p.spacing_mm)
    return acquisition.undersampled(name, kspace, p, mask, like, calibration, noise_std, x=x, oracle=oracle)


def read_scan(path, p, reference):
    return acquisition.read_fastmri(
        path, p, virtual_volumes.examples(reference, p.spacing_mm), frames=p.frames, seed=p.seed
    )


def open_scans(p):
    """All scans, and those that the classical methods are tuned on."""
    cases = aid_mri.prepare(p)
    return [scan for case in cases for scan in case.scans], [scan for case in cases for scan in case.validation]


def reconstruct(prior, scan, p, context, seed):
    return posterior.reconstruct(prior, scan, p, context, seed, p.scale)


def csgm(prior, scan, p, seed):
    return posterior.csgm(prior, scan, p, p.langevin_steps, seed)


def studied(p):
    return study(p, aid_mri.prepare(p), progress=False)


def config(name, **options):
    network = {"name": name, "in_channels": 2, "out_channels": 3, "model_channels": 32, "num_res_blocks": 1,
               "channel_mult": [1, 1], "num_heads": 2, "use_scale_shift_norm": True, "patch": 2} | options  # fmt: skip
    denoiser = {"name": "EDMDenoiser", "sigma_data": 0.35, "variance_channels": 1, "complex": True,
                "learned_variance": True, "channel_axis": 1 if name == "UNet" else -3}  # fmt: skip
    data = {"source": "random weights", "scale": "1 is the brightest", "magnitude_q99": REFERENCE}
    return {"network": network, "denoiser": denoiser, "data": data}


def save(folder, config, seed=0):
    """A checkpoint of random weights, none of them zero, so that context has a say."""
    torch.manual_seed(seed)
    D = build(config)
    for parameter in network_of(D).parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.03)
    return str(save_checkpoint(folder, D, config, {}))


@pytest.fixture(scope="module", autouse=True)
def cohort():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(virtual_volumes, "volume", person)
        for module in (aid_mri, virtual_volumes):
            patch.setattr(module, "volumes", people)
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Parameters of a study that takes a second; p(image_size=24, ...) changes some."""
    folder = tmp_path_factory.mktemp("priors")
    weights = save(folder / "sequence", config("CausalUNet", seq_len=2, concat_cond=False))
    single = save(folder / "single", config("UNet"), seed=1)
    defaults = dict(weights=weights, single=single, image_size=24, frames=3, coils=3, subjects=1, validation_subjects=1,
                    draws=2, evaluations=4, langevin_steps=1, classical=False, autocast=None, device="cpu",
                    acceleration=3, interleave=False)  # fmt: skip
    return lambda **options: Reconstruct(**defaults | options)


@pytest.fixture(scope="module")
def priors(tiny):
    p = tiny()
    return {
        name: aid_mri.measured(Prior.load(weights, "", "cpu"), 24, p.spacing_mm, 0, people=2)
        for name, weights in (("sequence", p.weights), ("single", p.single))
    }


@pytest.fixture
def fewer_people(monkeypatch, priors):
    """`study` takes the priors that are measured already."""
    monkeypatch.setattr(Prior, "load", lambda name, *_: priors["sequence" if "sequence" in name else "single"])
    monkeypatch.setattr(aid_mri, "measured", lambda prior, *_: prior)


# --- every choice

CHOICES = [
    *[dict(mask=kind, interleave=True) for kind in ("equispaced", "random")],
    dict(interleave=True, maps="oracle"),
    *[dict(mask=kind) for kind in ("equispaced", "random", "variable_density")],
    *[dict(maps=kind, acs=acs) for kind, acs in (("acs", 12), ("oracle", 0), ("oracle", 12), ("calibration", 6))],
    *[dict(method=name) for name in METHODS],
    dict(start="truth"),
    dict(start="truth", maps="oracle", method="published", scale=1.0, acs=12),
    dict(scale=0.4),
    dict(noise_std=0.0),
    dict(langevin_steps=0, models=("AID",)),
    dict(models=("single image",), frames=1),
    dict(image_size=27, coils=1),
    dict(coils=1, maps="acs"),
    dict(acceleration=2.5, subjects=2),
]


@pytest.mark.parametrize("options", CHOICES, ids=lambda o: ", ".join(f"{k} {v}" for k, v in o.items()))
def test_every_choice_goes_from_scan_to_table(tiny, fewer_people, options):
    p = tiny(**options)
    cases = aid_mri.prepare(p)
    scans = [scan for case in cases for scan in case.scans]
    assert len(scans) == p.subjects and not cases[0].validation  # nothing is tuned
    before = [(s.y.clone(), s.maps.clone(), s.x.clone()) for s in scans]
    result = study(p, cases, progress=False)
    for scan, kept in zip(scans, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip((scan.y, scan.maps, scan.x), kept, strict=True))
    models = [*[name for name in p.models or MODELS if name in MODELS], *["CSGM-Langevin"] * (p.langevin_steps > 0)]
    methods = [name for model in models for name in (model, f"{model}, one draw")]
    assert set(result.images) == set(methods) and set(result.draws) == set(models) == set(result.calibration)
    for name in models:
        draws = result.draws[name].x
        assert draws.shape == (p.draws, p.frames, 1, p.image_size, p.image_size) and torch.isfinite(draws).all()
        assert torch.equal(result.images[name], draws.mean(0)) and draws.std() > 0
        if p.start == "truth" and name != "CSGM-Langevin":
            assert torch.equal(draws[:, 0], scans[0].x[:1].expand_as(draws[:, 0]))
    assert len(result.rows) == p.subjects * len(methods)
    table = summary(result.rows, versus=models[0])
    assert [row["method"] for row in table] == methods
    flat = [v for row in table for cell in row.values() if not isinstance(cell, str) for v in np.atleast_1d(cell)]
    assert np.isfinite(flat).all() and np.all(np.atleast_1d(table[0][f"{models[0]} gains (dB)"]) == 0)
    assert {row["R"] for row in result.rows} == {p.acceleration} and result.rows[0]["exact R"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_with_all_lines_every_method_returns_the_image(tiny, priors, method):
    """Data of all lines and little noise leave nothing to the prior."""
    p = tiny(method=method, acceleration=1, noise_std=0.003, evaluations=12, last_sigma=0.02, maps="oracle", frames=2)
    scan = simulate(p, "test", 0, REFERENCE)
    x = reconstruct(priors["sequence"], scan, p, "full", 0).x
    assert score(x.mean(0), scan, False)["PSNR"] > (20 if method == "dps" else 30)


@pytest.mark.filterwarnings("ignore:.*end of the grid")
def test_classical_methods_are_tuned_on_others_and_scored(tiny, fewer_people):
    p = tiny(classical=True, langevin_steps=0, models=("single image",), acceleration=2, frames=2)
    scans, validation = open_scans(p)
    assert not torch.equal(scans[0].x, validation[0].x)
    assert len(validation) == p.validation_subjects
    tuned = baselines.tune_all([(s.y, s.maps, s.mask, s.x) for s in validation], aid_mri.GRIDS)
    assert tuned["zero-filled"] is None and all(tuned[name] in aid_mri.GRIDS[name] for name in list(tuned)[1:])
    table = {row["method"]: row for row in summary(studied(p).rows, "CG-SENSE")}
    assert table["zero-filled"]["PSNR (dB)"] < min(table[m]["PSNR (dB)"] for m in ("CG-SENSE", "L1-wavelet", "TV"))


# --- scales, maps, seeds


@pytest.mark.parametrize("maps, acs", [("calibration", 0), ("acs", 12), ("oracle", 0), ("oracle", 12)])
def test_the_gain_of_the_scanner_leaves_no_trace(tiny, priors, maps, acs):
    """Gains of 1e-3 and 1e3 agree to rounding, which conjugate gradients that stop on a tolerance enlarge.

    Powers of two are not rounded: the same to the last bit.
    """
    p = tiny(maps=maps, acs=acs)
    x, S = person("", "test", 0, 2, 24, 5.0), birdcage_maps((24, 24), 3)
    kspace = fft(S * x) + 0.01 * randn((2, 3, 24, 24), x.dtype, torch.Generator().manual_seed(0))
    mask, oracle = cartesian_mask(24, 3, acs=acs), S.expand(2, 3, 24, 24) if maps == "oracle" else None
    small, large, half, double = (prepare("", g * kspace, mask, g * kspace, g * 0.01, p, REFERENCE, g * x, oracle)
                                  for g in (1e-3, 1e3, 2**-9, 2**9))  # fmt: skip
    assert small.scale / large.scale == pytest.approx(1e6, rel=1e-4)
    assert small.noise_std == pytest.approx(large.noise_std, rel=1e-4)
    for name in ("y", "maps", "x"):
        torch.testing.assert_close(getattr(small, name), getattr(large, name), rtol=1e-3, atol=1e-4)
        assert torch.equal(getattr(half, name), getattr(double, name))
    one, other = (reconstruct(priors["sequence"], scan, p, "full", 0).x for scan in (small, large))
    assert (one - other).norm() < 0.03 * one.norm()
    one, other = (reconstruct(priors["sequence"], scan, p, "full", 0).x for scan in (half, double))
    assert torch.equal(one, other)


@pytest.mark.parametrize("options", [dict(maps="calibration"), dict(maps="acs", acs=12), dict(maps="oracle", acs=12),
                                     dict(maps="oracle", acs=6), dict(maps="oracle", acceleration=2),
                                     dict(maps="oracle", acceleration=8, coils=1)])  # fmt: skip
@pytest.mark.parametrize("kind", ["equispaced", "random", "variable_density"])
def test_the_scale_that_is_found_is_nearly_the_right_one(tiny, options, kind):
    """Also where no centre is measured, and a random mask misses it: CG-SENSE alone is then wrong by up to 20."""
    p = tiny(**dict(mask=kind, image_size=32, coils=6) | options)
    truth = person("", "test", 0, 3, 32, 5.0)
    right = REFERENCE / torch.quantile(truth.abs().flatten(), 0.99)
    scan = simulate(p, "test", 0, REFERENCE)
    ratio = peak(scan.x) / (right * peak(truth))
    assert 0.8 < ratio < 1.25
    assert scan.noise_std == pytest.approx(0.01 * (right * ratio).item(), rel=1e-3)


def peak(x):
    return x.abs().max()


@pytest.mark.parametrize(("acceleration", "width"), [(2, 24), (4, 32), (8, 64), (12, 60)])
def test_interleaved_slices_together_measure_all_lines(tiny, acceleration, width):
    mask = tiny(acceleration=acceleration, interleave=True, acs=4).lines(width, acceleration, seed=0)
    lines = mask.mask[:, 0, 0]
    assert lines.shape == (acceleration, width) and set(lines.unique().tolist()) == {0, 1}
    centre = slice(width // 2 - 2, width // 2 + 2)
    assert lines[:, centre].all()
    lines[:, centre] = 0
    assert (lines.sum(0) <= 1).all()  # nobody measures what another slice measured
    assert lines.sum() == width - 4
    assert mask.acceleration == pytest.approx(width * acceleration / (width - 4 + 4 * acceleration))


@pytest.mark.parametrize("method", baselines.METHODS)
def test_classical_methods_take_other_lines_in_each_slice(tiny, method):
    scan = simulate(tiny(interleave=True, maps="oracle", acs=4), "test", 0, REFERENCE)
    options = {"regularisation": 1e-3, "iterations": 3}
    together = baselines.METHODS[method](scan.y, scan.maps, scan.mask, **options)
    alone = [
        baselines.METHODS[method](scan.y[n : n + 1], scan.maps[n], scan.mask.mask[n, 0, 0], **options)
        for n in range(len(scan.y))
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)


def test_by_hand_the_scale_is_the_peak_of_the_zero_filled_image(tiny):
    scan = simulate(tiny(scale=0.7), "test", 0, REFERENCE)
    zero_filled = torch.stack([scan.operator(n).H(scan.y[n]) for n in range(3)])
    assert peak(zero_filled).item() == pytest.approx(0.7, rel=1e-4)


@pytest.mark.parametrize("options", [dict(maps="calibration"), dict(maps="acs", acs=12)])
def test_maps_and_scale_come_from_the_centre_alone(tiny, options):
    """Whatever else a fully sampled scan knows must not reach them; nor do unmeasured lines reach y."""
    p = tiny(**options)
    x, S = person("", "test", 0, 1, 24, 5.0), birdcage_maps((24, 24), 3)
    kspace, mask = fft(S * x), cartesian_mask(24, 3, acs=p.acs)
    other = kspace + 100 * randn(kspace.shape, x.dtype, torch.Generator().manual_seed(0)) * (1 - mask.mask)
    width = p.acs or p.calibration
    centre = slice(12 - width // 2, 12 - width // 2 + width)
    other[..., centre, centre] = kspace[..., centre, centre]
    one, two = (prepare("", k, mask, k, 0.01, p, REFERENCE) for k in (kspace, other))
    assert torch.equal(one.maps, two.maps) and one.scale == two.scale
    unmeasured = mask.mask == 0
    assert one.y[..., unmeasured].abs().max() == 0 and torch.equal(two.y[..., unmeasured], one.y[..., unmeasured])


def test_the_truth_has_the_phase_that_its_maps_give_it(tiny):
    """ESPIRiT takes the phase of the first coil from the maps and gives it to the image."""
    p = tiny(acceleration=1, noise_std=0.0, image_size=32)
    scan = simulate(p, "test", 0, REFERENCE)
    found = combine(scan.y, scan.maps)
    inside = (scan.x.abs() > 0.3) & (scan.maps.abs().sum(1, keepdim=True) > 0)
    assert ((found - scan.x).abs()[inside] / scan.x.abs()[inside]).median() < 0.05
    bare = simulate(replace(p, maps="oracle"), "test", 0, REFERENCE)
    torch.testing.assert_close(combine(bare.y, bare.maps), bare.x, rtol=1e-3, atol=1e-3)
    S, phase = birdcage_maps((8, 8), 2), torch.exp(torch.tensor(0.5j))
    torch.testing.assert_close(phase_alignment(S, S * phase), phase.conj().expand(1, 8, 8))
    assert torch.equal(phase_alignment(S, 0 * S), torch.ones(1, 8, 8, dtype=S.dtype))


def test_scans_depend_on_seed_and_person_and_on_nothing_else(tiny):
    p = tiny(subjects=2)
    (first, second), _ = open_scans(p)
    (alone,), (other,) = open_scans(replace(p, subjects=1, draws=5, classical=True))
    assert torch.equal(first.y, alone.y) and first.scale == alone.scale
    noise = [s.y / s.scale - (fft(birdcage_maps((24, 24), 3) * person("", "test", i, 3, 24, 5.0)) * s.mask.mask)
             for i, s in enumerate((first, second))]  # fmt: skip
    assert not torch.allclose(noise[0], noise[1]) and not torch.equal(first.y, other.y)
    (again,), _ = open_scans(replace(p, subjects=1, seed=1))
    assert not torch.equal(again.y, first.y)


def test_draws_depend_on_their_seed_and_not_on_other_volumes_or_draws(tiny, priors, fewer_people):
    p = tiny(subjects=2, models=("AID",))
    (case,) = aid_mri.prepare(p)
    scans, both = case.scans, study(p, [case], progress=False)
    alone = study(p, [replace(case, scans=scans[:1])], progress=False)
    assert both.rows[: len(alone.rows)] == alone.rows
    assert torch.equal(both.draws["AID"].x, alone.draws["AID"].x)
    second = score(reconstruct(priors["sequence"], scans[1], p, "full", p.seed + p.draws).x.mean(0), scans[1], False)
    assert both.rows[len(alone.rows)].items() >= second.items()
    one = reconstruct(priors["sequence"], scans[0], replace(p, draws=4), "full", p.seed).x
    torch.testing.assert_close(one[:2], alone.draws["AID"].x, rtol=1e-3, atol=1e-4)
    one = csgm(priors["single"], scans[0], replace(p, draws=3), p.seed).x
    torch.testing.assert_close(one[:2], alone.draws["CSGM-Langevin"].x, rtol=1e-3, atol=1e-4)


def test_context_reaches_slices_as_the_model_says(tiny, priors):
    """Without it each slice is by itself; the newest alone and all of it differ from the third slice on."""
    p = tiny()
    scan = simulate(p, "test", 0, REFERENCE)
    full, last, none = (reconstruct(priors["sequence"], scan, p, context, 0).x for context in ("full", "last", None))
    assert torch.equal(full[:, :2], last[:, :2]) and not torch.allclose(full[:, 2], last[:, 2], atol=1e-5)
    assert torch.equal(full[:, 0], none[:, 0]) and not torch.allclose(full[:, 1], none[:, 1], atol=1e-5)
    changed = replace(scan, y=torch.cat([-scan.y[:1], scan.y[1:]]))
    full_changed, none_changed = (reconstruct(priors["sequence"], changed, p, c, 0).x for c in ("full", None))
    assert torch.equal(none_changed[:, 1:], none[:, 1:]) and not torch.allclose(none_changed[:, 0], none[:, 0])
    assert not torch.allclose(full_changed[:, 1], full[:, 1], atol=1e-5)


def test_networks_that_concatenate_start_from_a_blank_frame(tiny, tmp_path):
    weights = save(tmp_path / "concat", config("CausalUNet", seq_len=2, concat_cond=True))
    p = tiny(weights=weights, image_size=26)
    prior = aid_mri.measured(Prior.load(weights, ""), 26, p.spacing_mm, 0, people=2)
    x = reconstruct(prior, simulate(p, "test", 0, REFERENCE), p, "full", 0).x
    assert prior.start == "blank" and x.shape == (2, 3, 1, 26, 26) and torch.isfinite(x).all()


# --- measured and inferred, unfolding


def test_measured_and_inferred_parts_add_up(tiny, priors):
    p = tiny(acceleration=2)
    scan = simulate(p, "test", 0, REFERENCE)
    samples = reconstruct(priors["sequence"], scan, p, "full", 0)
    maps = measured_and_inferred(scan, samples, 1)
    assert all(m.shape == (1, 24, 24) for m in maps.values())
    torch.testing.assert_close(maps["measured part"] + maps["inferred part"], samples.x[:, 1].mean(0))
    seen = scan.operator(1)(maps["inferred part"]).norm() / scan.operator(1)(maps["measured part"]).norm()
    assert seen < 0.05
    for name in ("measured", "agreement"):
        assert 0 <= maps[name].min() and maps[name].max() <= 1


def test_unfolding_knows_the_slice_before(tiny, priors, fewer_people):
    p = tiny(draws=2)
    (case,) = aid_mri.prepare(p)
    scan = aid_mri.unfolding_scan(case.people, p.noise_std, frame=1)
    result = posterior.unfold(priors["sequence"], scan, 1, p, 0)
    assert {k: v.shape for k, v in result.items()} == {
        "before": (1, 24, 24), "truth": (1, 24, 24), "zero-filled": (1, 24, 24),
        "with": (2, 1, 24, 24), "without": (2, 1, 24, 24)}  # fmt: skip
    assert not torch.allclose(result["with"], result["without"])


# --- files

HEADER = """<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding>
 <encodedSpace><matrixSize><x>{full}</x><y>{columns}</y><z>1</z></matrixSize>
  <fieldOfView_mm><x>{full_mm}</x><y>{width_mm}</y><z>5</z></fieldOfView_mm></encodedSpace>
 <reconSpace><matrixSize><x>{rows}</x><y>{columns}</y><z>1</z></matrixSize>
  <fieldOfView_mm><x>{height_mm}</x><y>{width_mm}</y><z>5</z></fieldOfView_mm></reconSpace>
 <encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum><center>{centre}</center>
 </kspace_encoding_step_1></encodingLimits><trajectory>cartesian</trajectory></encoding></ismrmrdHeader>"""
ROWS, COLUMNS, SLICES = 67, 58, 3
UNITS = 3e-6


def head():
    """Complex slices (slice, y, x) with a skull, brain, ventricles and a smooth phase, readout oversampled twice."""
    y, x = np.meshgrid((np.arange(2 * ROWS) - ROWS) / ROWS * 2, (np.arange(COLUMNS) - COLUMNS // 2) / COLUMNS * 2,
                       indexing="ij")  # fmt: skip
    n = np.arange(SLICES).reshape(-1, 1, 1)

    def ellipse(cy, cx, ry, rx):  # soft edges, as partial volume makes them
        distance = np.sqrt(((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2)
        return 1 / (1 + np.exp(np.clip((distance - 1) * 40 * rx, -50, 50)))

    skull = ellipse(0, 0, 0.85, 0.75) - 0.7 * ellipse(0, 0, 0.78, 0.68)
    brain = 0.35 * ellipse(0, 0, 0.75, 0.65) - 0.4 * sum(ellipse(0.02 * n, c, 0.3 - 0.05 * n, 0.1) for c in (-0.2, 0.2))
    folds = 0.08 * np.cos(18 * x + n) * np.cos(15 * y) * ellipse(0, 0, 0.7, 0.6)
    return (skull + brain + folds) * np.exp(1j * (0.6 * y + 0.4 * x + 0.2 * n))


def write(path, coils, noise=0.004, mask=None, seed=0):
    """A fastMRI-format file, raw units of 3e-6; returns root-sum-of-squares images, (slice, y, x), without noise."""
    rng = np.random.default_rng(seed)
    angles = 2 * np.pi * np.arange(coils) / coils
    y, x = np.meshgrid((np.arange(2 * ROWS) - ROWS) / ROWS * 2, (np.arange(COLUMNS) - COLUMNS // 2) / COLUMNS * 2,
                       indexing="ij")  # fmt: skip
    maps = np.array([np.exp(-((y - np.sin(a)) ** 2 + (x - np.cos(a)) ** 2) / 2.5 + 1j * (a + 0.3 * y)) for a in angles])
    images = head()[:, None] * (maps if coils > 1 else 1)
    axes = (-2, -1)
    kspace = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(images, axes), norm="ortho"), axes)
    kspace = kspace + noise * (rng.standard_normal(kspace.shape) + 1j * rng.standard_normal(kspace.shape))
    kspace = UNITS * (kspace if mask is None else kspace * mask)
    text = HEADER.format(full=2 * ROWS, columns=COLUMNS, rows=ROWS, full_mm=4.0 * ROWS, height_mm=2.0 * ROWS,
                         width_mm=3.0 * COLUMNS, last=COLUMNS - 1, centre=COLUMNS // 2)  # fmt: skip
    inner = images[..., ROWS - ROWS // 2 : ROWS - ROWS // 2 + ROWS, :]
    rss = np.sqrt((np.abs(inner) ** 2).sum(1))
    with h5py.File(path, "w") as file:
        file["kspace"] = (kspace if coils > 1 else kspace[:, 0]).astype(np.complex64)
        file.create_dataset("ismrmrd_header", data=text, dtype=h5py.string_dtype())
        if mask is None:
            file["reconstruction_rss" if coils > 1 else "reconstruction_esc"] = (UNITS * rss).astype(np.float32)
        else:
            file["mask"] = mask.astype(np.float32)
        file.attrs.update({"acquisition": "AXT1", "patient_id": "nobody", "max": float(UNITS * rss.max())})
    return rss


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {coils: (folder / f"head_{coils}.h5", write(folder / f"head_{coils}.h5", coils)) for coils in (1, 12)}


@pytest.mark.filterwarnings("ignore:.*end of the grid")
@pytest.mark.parametrize("coils", [1, 12])
def test_a_file_of_odd_size_goes_to_metrics_without_a_constant_set_by_hand(
    tiny, fewer_people, files, coils, monkeypatch
):
    monkeypatch.setattr(aid_mri, "GRIDS", {name: grid[1:3] for name, grid in aid_mri.GRIDS.items()})  # saves time
    path, rss = files[coils]
    p = tiny(source=str(path), classical=True, acceleration=2, frames=10)
    (case,) = aid_mri.prepare(p)
    (scan,) = case.scans
    assert scan.y.shape == (SLICES, coils, ROWS, COLUMNS) and scan.x.shape == (SLICES, 1, ROWS, COLUMNS)
    assert scan.voxel_mm == pytest.approx((5.0, 2.0, 3.0)) and scan.name == path.stem
    assert scan.mask.mask.shape == (COLUMNS,) and scan.mask.acceleration == pytest.approx(2)
    assert scan.noise_std / scan.scale == pytest.approx(0.004 * UNITS, rel=0.1)
    truth = torch.from_numpy(rss)[:, None] * UNITS * scan.scale
    bright = truth > 0.2 * truth.max()  # ESPIRiT leaves out what is dark
    assert ((scan.x.abs() - truth).abs()[bright] / truth[bright]).median() < 0.05
    assert 0.5 < torch.quantile(scan.x.abs(), 0.99).item() / REFERENCE < 1.6
    for other in case.validation:  # other people, scanned as this file was
        assert other.y.shape[1:] == scan.y.shape[1:] and torch.equal(other.mask.mask, scan.mask.mask)
        assert 0.3 < other.noise_std / scan.noise_std < 3
    result = study(p, [case], progress=False)
    scores = {row["method"]: row for row in result.rows}
    models = [*MODELS, "CSGM-Langevin"]
    assert set(scores) == {*baselines.available_methods(), *models, *(f"{m}, one draw" for m in models)}
    for row in scores.values():
        assert 5 < row["PSNR"] < 60 and 0 < row["SSIM"] <= 1 and 0 < row["NRMSE"] < 1, row
        assert row["volume"] == path.stem
    if coils == 12:  # at R = 2 twelve coils need no prior
        assert scores["CG-SENSE"]["PSNR"] > scores["zero-filled"]["PSNR"] + 3
        assert scores["AID"]["PSNR"] > scores["zero-filled"]["PSNR"] + 3
    assert len(summary(result.rows)) == len(scores)


def test_a_files_units_and_the_number_of_frames_do_not_matter(tiny, files, tmp_path):
    path, _ = files[12]
    other = tmp_path / "other.h5"
    other.write_bytes(path.read_bytes())
    with h5py.File(other, "r+") as file:
        file["kspace"][...] = file["kspace"][...] * 1e7
    one, two = (read_scan(file, tiny(frames=2), REFERENCE) for file in (path, other))
    assert one.y.shape[0] == 2 and one.scale / two.scale == pytest.approx(1e7, rel=1e-3)
    torch.testing.assert_close(one.y, two.y, rtol=1e-3, atol=1e-4)


def test_an_undersampled_file_is_reconstructed_and_not_scored(tiny, fewer_people, tmp_path):
    mask = np.zeros(COLUMNS, bool)
    mask[::3] = mask[COLUMNS // 2 - 7 : COLUMNS // 2 + 7] = True
    write(tmp_path / "test.h5", 12, mask=mask)
    p = tiny(source=str(tmp_path / "test.h5"), maps="oracle", start="truth", langevin_steps=0, models=("AID",))
    (tuning,) = aid_mri.prepare(replace(p, classical=True))[0].validation  # other people, measured as the file was
    assert torch.equal(tuning.mask.mask.bool(), torch.from_numpy(mask)) and tuning.maps.shape == tuning.y.shape
    (case,) = aid_mri.prepare(p)
    (scan,) = case.scans
    assert scan.x is None and scan.mask.acs >= 14 and scan.mask.lines == mask.sum()
    assert scan.mask.acceleration == pytest.approx(COLUMNS / mask.sum())
    assert scan.y[..., ~mask].abs().max() == 0 and scan.noise_std / scan.scale == pytest.approx(0.004 * UNITS, rel=0.1)
    result = study(p, [case], progress=False)
    assert result.rows == [] and result.calibration == {} and summary(result.rows) == []
    assert result.draws["AID"].x.shape == (2, SLICES, 1, ROWS, COLUMNS) and torch.isfinite(result.draws["AID"].x).all()
    own = torch.stack([scan.operator(n)(result.images["AID"][n]) for n in range(SLICES)])
    assert (own - scan.y)[..., mask].norm() < 0.2 * scan.y.norm()
    few = np.zeros(COLUMNS, bool)
    few[::3] = True
    write(tmp_path / "no_centre.h5", 12, mask=few)
    with pytest.raises(ValueError, match="no_centre.*sample more centre lines"):
        open_scans(replace(p, source=str(tmp_path / "no_centre.h5")))


def test_a_folder_with_a_corrupt_file_gives_the_others_and_says_why(tiny, tmp_path, capsys):
    write(tmp_path / "b.h5", 1)
    whole = (tmp_path / "b.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.h5").write_text("not HDF5 at all")
    scans, _ = open_scans(tiny(source=str(tmp_path), subjects=5))
    assert [scan.name for scan in scans] == ["b"]
    report = capsys.readouterr().out
    assert "1 volumes, 2 files skipped" in report and "a.h5: truncated" in report and "c.h5: not an HDF5 file" in report
    (tmp_path / "b.h5").unlink()
    with pytest.raises(ValueError, match="holds no fastMRI volume"):
        open_scans(tiny(source=str(tmp_path)))
    with pytest.raises(ValueError, match="truncated"):
        open_scans(tiny(source=str(tmp_path / "a.h5")))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_scans(tiny(source=str(tmp_path / "nowhere")))


def test_only_what_is_asked_for_is_read_rendered_and_measured(tiny, tmp_path, monkeypatch):
    """The k-space of one file of a folder; priors measured and classical methods tuned at its size, or not at all."""
    for name in "abc":
        write(tmp_path / f"{name}.h5", 2)
    read, sizes, fitted = [], [], []
    whole, rendered = Volume.read, aid_mri.volumes

    def volumes(source, split, subjects, frames, image_size, spacing_mm):
        sizes.append(image_size)
        return rendered(source, split, subjects, frames, image_size, spacing_mm)

    monkeypatch.setattr(Volume, "read", lambda self, *a: read.append(self.path.name) or whole(self, *a))
    for module in (aid_mri, virtual_volumes):
        monkeypatch.setattr(module, "volumes", volumes)
    monkeypatch.setattr(posterior.Measured, "fit", lambda D, x, **_: fitted.append(x.shape[-1]))
    p = tiny(source=str(tmp_path), subjects=1, classical=True)
    (case,) = aid_mri.prepare(p)
    assert [scan.name for scan in case.scans] == ["a"] and read == ["a.h5"]
    assert set(fitted) == {max(ROWS, COLUMNS)} == set(sizes) and case.validation[0].y.shape[-2:] == (ROWS, COLUMNS)
    read.clear(), sizes.clear(), fitted.clear()
    (case,) = aid_mri.prepare(replace(p, method="published", scale=0.3, classical=False))
    assert not sizes and not fitted and not case.validation and case.priors["AID"].alone is None


def test_scans_of_different_matrices_are_cases_of_their_own(tiny, fewer_people, tmp_path):
    for name, coils in (("a", 2), ("b", 3), ("c", 2)):
        write(tmp_path / f"{name}.h5", coils)
    cases = aid_mri.prepare(tiny(source=str(tmp_path), subjects=3, frames=2))
    assert [[scan.name for scan in case.scans] for case in cases] == [["a", "c"], ["b"]]


def test_no_context_is_left_behind(tiny, priors):
    """Whoever holds the same network next must find it as it was, also after an error."""
    network, p = network_of(priors["sequence"].D), tiny()
    scan = simulate(p, "test", 0, REFERENCE)
    reconstruct(priors["sequence"], scan, p, "last", 0)
    assert network.context == "full" and network.cache is None
    with pytest.raises(RuntimeError), network.attending("last"):
        raise RuntimeError
    with pytest.raises(ValueError, match="expected"), network.attending("none"):
        pass
    assert network.context == "full"


def test_terms_of_calibration_add_up_to_its_ratio():
    draws = randn((4, 1, 1, 8, 8), torch.complex64, torch.Generator().manual_seed(0)).abs()
    truth = draws[0] + 0.1
    variance, error = metrics.calibration_terms(draws, truth)
    assert variance / error == pytest.approx(metrics.calibration_ratio(draws, truth).item(), rel=1e-5)


# --- errors


def test_errors_say_what_to_do(tiny, tmp_path):
    bare = config("UNet")
    del bare["data"]["magnitude_q99"]
    with pytest.raises(ValueError, match="how bright its training data are"):
        open_scans(tiny(weights=save(tmp_path / "bare", bare)))
    with pytest.raises(ValueError, match="sample more centre lines"):
        open_scans(tiny(maps="acs", acs=0))
    nothing, ones = (f(1, 1, 24, 24, dtype=torch.complex64) for f in (torch.zeros, torch.ones))
    for maps in ("oracle", "calibration"):
        with pytest.raises(ValueError, match="nobody: all measured samples are zero"):
            prepare("nobody", nothing, cartesian_mask(24, 3), nothing, 0.0, tiny(maps=maps), REFERENCE, oracle=ones)
    with pytest.raises(ValueError, match="intensity scale cannot be found"):
        prepare("nobody", ones, cartesian_mask(24, 3), nothing, 0.0, tiny(), REFERENCE)
    for bad in (dict(method="magic"), dict(mask="radial"), dict(maps="guess"), dict(start="end"), dict(draws=1)):
        with pytest.raises(ValueError, match=f"parameter {next(iter(bad))}"):
            tiny(**bad)


def test_the_inverse_transform_of_the_tests_own_writer_is_ours(files):
    """The writer knows nothing of this package; its transform is numpy's, so the two must mean the same."""
    path, rss = files[12]
    with h5py.File(path) as file:
        images = ifft(torch.from_numpy(file["kspace"][0]))
    ours = images.abs().square().sum(0).sqrt()[ROWS - ROWS // 2 : ROWS - ROWS // 2 + ROWS]
    assert (ours / UNITS - torch.from_numpy(rss[0])).abs().max() < 0.05


def test_a_drawing_that_is_stopped_twice_goes_on_and_ends_alike(tiny, fewer_people, tmp_path, monkeypatch):
    p = tiny(models=("AID", "single image"))
    cases, whole, keep = aid_mri.prepare(p), studied(p), tmp_path / "kept"
    stored, store = [], Kept._store

    def store_and_stop(self, step):
        store(self, step)
        stored.append((self.path.stem, step["frame"]))
        if len(stored) in (2, 7):
            raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "_store", store_and_stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            study(p, cases, progress=False, keep=keep)
    (keep / "0-single-image.safetensors").write_bytes(b"cut short")  # by a full disk, say: begun anew
    done = study(p, cases, progress=False, keep=keep)
    frames = {name: [n for path, n in stored if path == name] for name, _ in stored}
    assert frames == {"0-aid": [0, 1, 2], "0-single-image": [0, 1, 2] * 2, "0-csgm-langevin": [0, 1, 2]}
    assert not keep.exists() and len(done.rows) == len(whole.rows)
    for row, expected in zip(done.rows, whole.rows, strict=True):  # to rounding: context is not cached over a stop
        assert row == {k: v if isinstance(v, str) else pytest.approx(v, rel=1e-3) for k, v in expected.items()}
    for name, bill in whole.bills.items():
        assert replace(done.bills[name], seconds=0.0) == replace(bill, seconds=0.0)


def test_what_was_kept_of_another_drawing_is_not_used(tiny, priors, tmp_path):
    p, keep = tiny(frames=2), tmp_path / "kept.safetensors"
    scan, other = (simulate(p, "test", i, REFERENCE) for i in range(2))
    for change in ({}, {"scan": other}, {"seed": 1}, {"sampler": replace(p, evaluations=5)}, {"context": None}):
        call = {"scan": scan, "sampler": p, "context": "full", "seed": 0} | change
        drawn = posterior.reconstruct(priors["sequence"], **call, keep=keep)
        assert torch.equal(drawn.x, posterior.reconstruct(priors["sequence"], **call).x)
    assert torch.equal(posterior.reconstruct(priors["sequence"], **call, keep=keep).x, drawn.x)


def test_the_work_is_told_before_it_starts(tiny, fewer_people):
    p = tiny(models=("AID",))
    rows = aid_mri.cost(aid_mri.prepare(p), p, p.models, p.langevin_steps)
    assert [row["model"] for row in rows] == ["AID", "CSGM-Langevin"]
    about = {"matrix": "24 x 24", "slices": 3, "draws": 2, "evaluations": 4}
    assert all(about.items() <= row.items() and row["about, minutes"] > 0 for row in rows)
