"""What the notebooks of all papers share: forms, the training recipe, prepared files, tables, errors of denoisers."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

from companion.data.store import open_dataset, prepare_once
from companion.diffusion import denoisers, recalibration
from companion.diffusion.denoisers import inner_denoiser
from companion.diffusion.latent import LatentDenoiser
from companion.diffusion.losses import edm_loss
from companion.evaluation import metrics, tables
from companion.evaluation.denoising import denoising_errors, expected_errors
from companion.models.architectures import build, network_of, set_autocast
from companion.models.checkpoint import load
from companion.papers.latent3d.sample import SampleVolumes
from companion.parameters import RENAMED, Parameters, check, param
from companion.randomness import randn
from companion.training import recipe
from companion.training.recipe import Training, begin, fit, save

CONFIG = {
    "network": {"name": "UNet", "in_channels": 1, "out_channels": 2, "model_channels": 32, "num_res_blocks": 1,
                "channel_mult": [1, 1], "num_heads": 2, "use_scale_shift_norm": True},
    "denoiser": {"name": "EDMDenoiser", "sigma_data": 0.4, "learned_variance": True, "variance_channels": 1},
    "data": {"source": "random squares", "scale": "1 is a square"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainSquares(Training, steps=3, batch_size=2, warmup=1, autocast=None, checkpoint_every=2):
    P_mean: float = param(-1.0, "mean of ln sigma")


def squares(n, seed=0):
    x = torch.zeros(n, 1, 16, 16)
    for i, corner in enumerate(torch.randint(0, 8, (n, 2), generator=torch.Generator().manual_seed(seed)).tolist()):
        x[i, 0, corner[0] : corner[0] + 8, corner[1] : corner[1] + 8] = 1
    return x


def loss(D, x0, generator, P_mean):
    return edm_loss(D, x0, generator, P_mean, 1.0, variance_weight=0.05)


# --- forms


def test_a_form_gives_inherited_fields_other_defaults_and_keeps_their_rules():
    p = TrainSquares()
    assert (p.steps, p.batch_size, p.learning_rate) == (3, 2, Training().learning_rate) and Training().steps != 3
    with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
        TrainSquares(steps=0)
    assert TrainSquares(steps="7").steps == 7 and p.pick("steps", "P_mean") == {"steps": 3, "P_mean": -1.0}
    with pytest.raises(KeyError):
        type("Odd", (Training,), {}, stepps=3)


def test_a_renamed_parameter_is_told_its_new_name(monkeypatch):
    monkeypatch.setitem(RENAMED, "pace", "learning_rate")
    with pytest.raises(ValueError, match="pace of TrainSquares was renamed to learning_rate"):
        check(TrainSquares, {"pace": 1e-3})
    with pytest.raises(ValueError, match="unknown parameter pace"):  # a form without the new name never had the old
        check(Parameters, {"pace": 1e-3})
    with pytest.raises(ValueError, match="parameter real of SampleVolumes was renamed to held_out"):
        check(SampleVolumes, {"real": 4})


def test_the_loop_gets_all_that_form_and_loop_have_in_common():
    config = TrainSquares(seconds=5, seed=3).config(log_every=7, schedule="constant")
    assert (config.steps, config.seconds, config.seed, config.log_every) == (3, 5, 3, 7)
    assert config.schedule == "constant" and config.autocast is None and config.channels_last
    assert TrainSquares(autocast="bfloat16").config().autocast is None


# --- the recipe


def test_a_prior_is_trained_saved_and_begins_another(tmp_path):
    p = TrainSquares(out=str(tmp_path / "one"), device="cpu")
    first = begin(CONFIG, p.seed)
    again = begin(CONFIG, p.seed)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    result = fit(first, loss, squares(6), p, CONFIG, p.pick("P_mean"), progress=False)
    assert result.step == 3 and result.curve()[0][-1] == 6
    with pytest.raises(ValueError, match="P_mean"):  # other options are another training
        fit(
            begin(CONFIG, 0),
            loss,
            squares(6),
            dataclasses.replace(p, P_mean=0.0),
            CONFIG,
            {"P_mean": 0.0},
            progress=False,
        )
    folder = save(result, p, CONFIG, [{"error": 1.0}], unit="squares")
    assert folder == tmp_path / "one" / "checkpoint"
    assert all(v.dtype == torch.float32 for v in result.ema.parameters()), "saving must leave the trained model alone"
    D = load(folder)
    began = begin(CONFIG, 5, str(folder))
    state = D.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in began.state_dict().items())
    record = (folder / "training.json").read_text()
    assert '"squares": 6' in record and '"P_mean": -1.0' in record


def test_main_reads_one_file_of_parameters(tmp_path, monkeypatch):
    (tmp_path / "p.yaml").write_text("steps: 5\n")
    seen = []
    monkeypatch.setattr(sys, "argv", ["prior", str(tmp_path / "p.yaml")])
    recipe.main(TrainSquares, seen.append)
    assert seen == [TrainSquares(steps=5)]
    monkeypatch.setattr(sys, "argv", ["prior"])
    with pytest.raises(SystemExit, match="give one file of parameters"):
        recipe.main(TrainSquares, seen.append)


# --- wrappers


def recalibrated(D):
    return recalibration.Recalibrated(D, torch.ones(1), torch.zeros(1, 2), torch.zeros(1, 2))


def wrapped(kind):
    D = build(CONFIG)
    return {
        "ComplexDenoiser": lambda: denoisers.ComplexDenoiser(D, 1),
        "AnySize": lambda: denoisers.AnySize(D, (2, 2)),
        "Recalibrated": lambda: recalibrated(D),
        "all of them": lambda: recalibrated(denoisers.AnySize(denoisers.ComplexDenoiser(D, 1), (2, 2))),
        "latent": lambda: LatentDenoiser(D, torch.nn.Identity()),
        "none": lambda: D,
    }[kind](), D  # fmt: skip


@pytest.mark.parametrize("kind", ["ComplexDenoiser", "AnySize", "Recalibrated", "all of them", "latent", "none"])
def test_no_wrapper_counts_as_a_network(kind):
    outer, D = wrapped(kind)
    assert network_of(outer) is D.network and inner_denoiser(outer) is D and network_of(D.network) is D.network
    assert set_autocast(outer, "bfloat16") is outer and D.autocast is torch.bfloat16
    set_autocast(outer, None)
    assert D.autocast is None


# --- prepared once


def arrays(value=1.0):
    return {"arrays": {"x": np.full((2, 3), value, np.float32)}, "units": {"x": "1"}, "scale": {"x": "1"},
            "source": "made up", "seed": 0, "split": {"train": [0, 1]}, "attrs": {"mm": 2.0}}  # fmt: skip


def test_a_file_is_prepared_once_and_only_from_the_same_parameters(tmp_path):
    path, made = tmp_path / "x.h5", []
    wanted = {"size": (3, 4), "seed": 0}
    prepared = prepare_once(path, wanted, lambda: made.append(1) or arrays())
    assert prepared.attrs == {"mm": 2.0, "parameters": {"size": [3, 4], "seed": 0}}
    assert prepare_once(path, wanted, lambda: made.append(1) or arrays()).shapes == {"x": (2, 3)} and made == [1]
    with pytest.raises(ValueError, match=r"prepared with seed = 0 where the parameters ask for seed = 1; delete"):
        prepare_once(path, wanted | {"seed": 1}, arrays)
    with pytest.raises(
        ValueError, match=r"seed = 0, axis = nothing where the parameters ask for seed = nothing, axis = 2"
    ):
        prepare_once(path, {"size": (3, 4), "axis": 2}, arrays)
    from companion.data.store import write_dataset

    write_dataset(tmp_path / "old.h5", **arrays())
    with pytest.raises(ValueError, match="size = nothing, seed = nothing where the parameters ask for size"):
        prepare_once(tmp_path / "old.h5", wanted, arrays)
    assert open_dataset(tmp_path / "old.h5").attrs == {"mm": 2.0}


# --- tables


def test_tables_group_average_and_pair():
    cases = ("a", 4, 30.0), ("b", 4, 32.0), ("a", 8, 25.0)
    rows = [{"method": m, "R": R, "person": i, "PSNR": v + i} for m, R, v in cases for i in range(3)]
    assert list(tables.grouped(rows, "method")) == ["a", "b"]
    assert list(tables.grouped(rows, "method", "R")) == [("a", 4), ("b", 4), ("a", 8)]
    one, other = tables.summary(rows[:6], {"PSNR": "PSNR (dB)"}, versus="b", gains={"PSNR": "b gains"})
    assert one["method"] == "a" and one["PSNR (dB)"] == pytest.approx((31, 1 / 3**0.5))
    assert one["b gains"] == (2.0, 0.0) and other["b gains"] == (0.0, 0.0)
    assert tables.summary([], {"PSNR": "PSNR"}) == []
    (single,) = tables.summary(rows[:1], {"PSNR": "PSNR"}, versus="c")
    assert single == {"method": "a", "PSNR": 30.0} and tables.mean_of(single["PSNR"]) == 30.0
    assert tables.average([1.0, float("nan"), 3.0])[0] == 2.0 and np.isnan(tables.average([float("nan")]))
    with pytest.raises(ValueError, match="the same people"):
        tables.average([1.0, 2.0], [1.0])


def test_tables_are_shown_and_written(tmp_path):
    rows = [{"method": "a, b", "PSNR": (31.234, 0.5)}, {"method": "c", "PSNR": 0.12345}]
    table = tables.markdown(rows)
    assert table.splitlines()[2:] == ["| a, b | 31.23 ± 0.50 |", "| c | 0.123 |"] and table._repr_markdown_() == table
    text = tables.write_csv(tmp_path / "t.csv", [{"a": 1, "b": "x,y"}, {"a": 2, "b": ""}]).read_text()
    assert text.splitlines() == ["a,b", '1,"x,y"', "2,"]


# --- errors of denoisers


def test_errors_of_the_exact_denoiser_are_those_of_its_posterior():
    sigmas, x0 = [0.1, 0.5, 2.0], 0.5 * randn((64, 1, 16, 16), torch.complex64, torch.Generator().manual_seed(1))

    def wiener(x, sigma):
        return x * (0.25 / (0.25 + sigma.square())).reshape(-1, 1, 1, 1)

    rows = denoising_errors({"exact": wiener, "noise": lambda x, sigma: x}, x0, sigmas, seed=2)
    for row, s in zip(rows, sigmas, strict=True):
        assert row["noise"] == pytest.approx(s, rel=0.02)
        assert row["exact"] == pytest.approx((0.25 * s**2 / (0.25 + s**2)) ** 0.5, rel=0.02)


def test_a_denoiser_is_asked_what_it_expects():
    D = build(CONFIG)
    rows = expected_errors(D, squares(4), [0.1, 1.0], digits=None)
    plain = denoising_errors({"error": D}, squares(4), [0.1, 1.0], digits=None)
    assert [row["error"] for row in rows] == [row["error"] for row in plain] and all(
        row["expected"] > 0 for row in rows
    )


def test_pooled_calibration_is_one_for_draws_that_the_truth_could_be_one_of():
    everything = randn((9, 5, 1, 64, 64), torch.complex64, torch.Generator().manual_seed(0))
    assert metrics.pooled_calibration(everything[1:], everything[0]) == pytest.approx(1, abs=0.03)
    assert metrics.pooled_calibration(everything[1:] / 2, everything[0]) < 0.35
