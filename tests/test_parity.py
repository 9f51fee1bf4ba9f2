"""The parity ledger on a small part of the golden data, and that it fails when it should."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from parity import Folder, run, table
from parity.__main__ import main
from parity.aid import noted_schedule
from parity.ledger import error
from safetensors.torch import load_file, save_file

from companion.networks import UNet

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def copy(tmp_path):
    """A copy of the AID folder with one light case, and functions to change its manifest and tensors."""
    folder = tmp_path / "aid"
    shutil.copytree(GOLDEN / "aid", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["cases"] = {"diffusion": manifest["cases"]["diffusion"]}
    del manifest["published_parameter_lists"]

    def save():
        (folder / "manifest.json").write_text(json.dumps(manifest))

    save()
    return folder, manifest, save


def failures(folder):
    return [check for check in run(Folder(folder)) if not check.passed]


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in GOLDEN.glob("*/manifest.json")))
def test_golden_data(folder):
    with torch.inference_mode():
        checks = run(Folder(GOLDEN / folder))
    failed = [check for check in checks if not check.passed]
    assert not failed, table(failed)
    assert len(checks) > 20
    assert table(checks).splitlines()[-1] == f"{len(checks)} passed, 0 failed"


@pytest.mark.parametrize("name", ["linear1000.betas", "pmv.clipTrue.mean", "ddim.skip40.sample"])
def test_a_perturbed_tensor_fails_alone(copy, name):
    folder, _, _ = copy
    path = folder / "diffusion.safetensors"
    tensors = load_file(path)
    key = name if name in tensors else f"io.{name}"
    tensors[key].flatten()[-1] += 1e-3
    save_file(tensors, path)
    assert [check.quantity for check in failures(folder)] == [name]
    assert main([str(folder)]) == 1


def test_an_unchanged_folder_passes(copy, capsys):
    assert main([str(copy[0])]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" passed, 0 failed")


def test_a_case_without_handler_fails(copy, capsys):
    folder, manifest, save = copy
    manifest["cases"]["new"] = {"file": "diffusion.safetensors", "class": "Transformer", "constructor": {}}
    save()
    assert main([str(folder)]) == 1
    assert "no handler for this case" in capsys.readouterr().out


def test_a_tensor_that_nobody_compares_fails(copy):
    folder, _, _ = copy
    path = folder / "diffusion.safetensors"
    tensors = load_file(path)
    prefix = "io." if any(key.startswith("io.") for key in tensors) else ""
    save_file(tensors | {f"{prefix}new.thing": torch.zeros(2)}, path)
    assert [(check.quantity, check.reason) for check in failures(folder)] == [("new.thing", "not compared")]


def test_a_broken_case_fails_with_its_reason(copy):
    folder, manifest, save = copy
    manifest["cases"]["diffusion"]["file"] = "missing.safetensors"
    save()
    (check,) = failures(folder)
    assert "missing.safetensors" in check.reason


def test_other_names_and_settings_are_read_from_the_manifest(copy):
    """A network under another name, with another attention layout, is built from what the manifest says."""
    folder, manifest, save = copy
    from companion.networks import UNet

    spec = dict(in_channels=1, model_channels=32, out_channels=2, num_res_blocks=1, channel_mult=[1, 2])
    spec |= dict(attention_resolutions=[1, 2], num_heads=2, use_new_attention_order=True, num_classes=3)
    torch.manual_seed(0)
    network = UNet(**spec).eval()
    for parameter in network.parameters():
        parameter.data = (parameter + 0.1 * torch.randn(parameter.shape)).half().float()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2])
    tensors = {f"w.{name}": p.detach().half() for name, p in network.named_parameters()}
    tensors |= {"v.x": x, "v.t": t, "v.y": y, "v.out": network(x, t, y=y).detach()}
    save_file(tensors, folder / "other.safetensors")
    manifest["cases"] = {
        "any name": {
            "file": "other.safetensors",
            "class": "UNetModel",
            "constructor": spec | {"image_size": 8},
            "n_params": sum(p.numel() for p in network.parameters()),
            "param_prefix": "w.",
            "io_prefix": "v.",
        }
    }
    save()
    assert not failures(folder)


def test_no_folder_no_manifest_no_cases(tmp_path, capsys):
    assert main([]) == 2
    assert main([str(tmp_path)]) == 2
    assert "manifest.json does not exist" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{")
    assert main([str(tmp_path)]) == 2
    (tmp_path / "manifest.json").write_text("{}")
    assert main([str(tmp_path)]) == 1


def test_the_error_is_that_of_allclose():
    assert error([1.0, 2.0], [1.0, 2.0 + 3e-4])[0] == pytest.approx(1e-4, rel=1e-3)
    assert error([1.0], [1.0, 2.0]) == (math.inf, "shape (1,), not (2,)")
    assert error([math.nan], [1.0])[0] == math.inf
    assert error([math.inf], [math.inf])[0] == math.inf
    assert error([], [])[0] == math.inf


@pytest.fixture
def guided(tmp_path):
    """An LMI folder of one guided-diffusion network with four heads and residual blocks that resample."""
    options = dict(num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(2,), num_heads=4, resblock_updown=True)
    network, generator = UNet(3, 32, 1, **options).eval(), torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data.normal_(std=0.2, generator=generator)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    t = torch.tensor([3, 500])
    with torch.no_grad():
        io = {"x": x[:, :1].clone(), "cond": x[:, 1:].clone(), "t": t, "y": network(x, t)}
    save_file(dict(network.state_dict()), tmp_path / "guided.weights.safetensors")
    save_file(io, tmp_path / "guided.io.safetensors")
    spec = {
        "what": "UNetModel state_dict, every parameter re-randomised",
        "constructor": {"fn": "create_model", "image_size": 16, "num_heads": 4, "resblock_updown": True},
        "io": "guided.io.safetensors",
        "n_params": sum(p.numel() for p in network.parameters()),
        "tolerance": {"abs": 2e-4},
    }

    def verdicts(**constructor):
        said = spec | {"constructor": spec["constructor"] | constructor}
        manifest = {"files": {"guided.weights.safetensors": said}}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return {check.quantity: (check.passed, check.reason) for check in run(Folder(tmp_path))}

    return verdicts


def test_networks_are_built_from_what_the_manifest_says(guided):
    assert all(passed for passed, _ in guided().values())
    assert not guided(num_heads=1)["y"][0], "the heads of the manifest were not used"
    assert "resblock_updown" in guided(resblock_updown=False)["-"][1]
    assert "does not know" in guided(temporal_layers=3)["-"][1]


@pytest.mark.parametrize(
    "note, steps, last",
    [
        ("linear 1000, learned sigma", 1000, 0.02),
        ("linear schedule, 500 steps", 500, 0.04),
        ("cosine 250", 250, 0.999),
        ("no schedule named", 1000, 0.02),
    ],
)
def test_schedules_are_those_that_a_note_names(note, steps, last):
    schedule = noted_schedule(note)
    assert len(schedule) == steps and schedule.betas[-1].item() == pytest.approx(last)
