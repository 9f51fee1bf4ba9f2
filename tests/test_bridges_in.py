"""Weights of other projects: loaded strictly, and the answers of the classes that published them come out again.

The goldens hold what those classes answer to weights of a formula; tests/golden/bridges/make.py made them.
"""

import enum
import json
import pickle
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from companion.diffusion.class_guidance import ClassGuidance
from companion.diffusion.noise import flow_levels
from companion.models import kinds, registry
from companion.models.architectures import network_of
from companion.models.checkpoint import load
from companion.models.obtain import convert, obtain
from companion.workbench import doctor

FOLDER = Path(__file__).parent / "golden" / "bridges"
FORMULA = runpy.run_path(str(FOLDER / "make.py"))["formula"]


def golden(name):
    """(tensors by published name, inputs and output, what else it says) of a golden."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = file.metadata()
    tensors = {k: FORMULA(k, tuple(shape)) for k, shape in json.loads(about["shapes"]).items()}
    fixed = {k.removeprefix("fixed/"): held.pop(k) for k in list(held) if k.startswith("fixed/")}
    return tensors | fixed, held, json.loads(about["more"])


def close(ours, theirs):
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ncsnpp", "inversebench"])
def test_edm_networks_denoise_as_published(tmp_path, name):
    tensors, held, more = golden(name)
    torch.save({"net": {k: torch.zeros_like(x) for k, x in tensors.items()}, "ema": tensors}, tmp_path / "published.pt")
    sigma_data = more.get("sigma_data", 0.5)
    denoiser = {"denoiser": {"name": "EDMDenoiser", "sigma_data": sigma_data}}
    D = load(convert(tmp_path / "published.pt", "edm", tmp_path / "ours", denoiser if sigma_data != 0.5 else None))
    close(D(**{k: x for k, x in held.items() if k != "out"}), held["out"])
    assert D(torch.zeros(1, 2, 24, 48), torch.ones(1)).shape == (1, 2, 24, 48)  # the size in the names binds nobody


def test_the_complex_config_of_inversebench_gives_a_complex_denoiser(tmp_path):
    tensors, held, _ = golden("inversebench")
    save_file({f"net.{k}": x for k, x in tensors.items()}, tmp_path / "published.safetensors")
    config = {"denoiser": {"name": "EDMDenoiser", "sigma_data": 0.5, "complex": True}}
    D = load(convert(tmp_path / "published.safetensors", "edm", tmp_path / "ours", config))
    x = torch.complex(held["x"][:, :1], held["x"][:, 1:])
    close(D(x, held["sigma"]), torch.complex(held["out"][:, :1], held["out"][:, 1:]))


def persistent_pickle(tensors, monkeypatch, source):
    """Bytes as EDM pickles a network: every class of its own with its source text, to be run on loading."""
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = lambda meta: pytest.fail("it was run")
    module._reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    module._reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)

    class Persistent:
        def __init__(self, name, state):
            self.name, self.state = name, state

        def __reduce__(self):
            meta = dict(type="class", version=6, module_src=source, class_name=self.name, state=self.state)
            return module._reconstruct_persistent_obj, (meta,)

    def node(prefix):
        below = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
        own = {k: torch.nn.Parameter(x) for k, x in below.items() if "." not in k and k != "resample_filter"}
        buffers = {k: x for k, x in below.items() if k == "resample_filter"}
        children = {k: node(f"{prefix}{k}.") for k in dict.fromkeys(k.split(".")[0] for k in below if "." in k)}
        name = {"": "EDMPrecond", "model.": "SongUNet"}.get(prefix, "UNetBlock")
        extra = {"sigma_data": 0.4, "sigma_max": float("inf")} if not prefix else {}
        return Persistent(name, {"_parameters": own, "_buffers": buffers, "_modules": children, **extra})

    return pickle.dumps({"ema": node(""), "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2}), "augment_pipe": None})


def test_an_edm_pickle_is_read_with_its_sigma_data_and_its_source_is_not_run(tmp_path, monkeypatch):
    tensors, held, _ = golden("edm_ddpmpp")
    data = persistent_pickle(tensors, monkeypatch, "raise SystemExit('it was run')")
    (tmp_path / "network-snapshot.pkl").write_bytes(data)
    D = load(convert(tmp_path / "network-snapshot.pkl", "edm", tmp_path / "ours"))
    assert D.sigma_data == 0.4 and network_of(D).num_classes == 3
    close(D(**{k: x for k, x in held.items() if k != "out"}), held["out"])


def test_other_preconditionings_and_pyramids_are_refused_by_name(tmp_path, monkeypatch):
    tensors, _, _ = golden("edm_ddpmpp")
    data = persistent_pickle(tensors, monkeypatch, "").replace(b"\x8c\nEDMPrecond", b"\x8c\nVPXPrecond")
    (tmp_path / "vp.pkl").write_bytes(data)
    with pytest.raises(ValueError, match="VPXPrecond.*EDMPrecond"):
        convert(tmp_path / "vp.pkl", "edm", tmp_path / "ours")
    tensors["model.enc.8x8_aux_skip.weight"] = torch.zeros(1)
    torch.save(tensors, tmp_path / "skip.pt")
    with pytest.raises(ValueError, match="'skip' pyramids"):
        convert(tmp_path / "skip.pt", "edm", tmp_path / "ours")


def diffusers_folder(folder, name, **changed):
    tensors, held, more = golden(name)
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors")
    config = more["config"] | {"_class_name": "UNet2DModel"} | changed
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    scheduler = {"_class_name": "DDPMScheduler", "beta_end": 0.01, "prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return tensors, held


@pytest.mark.parametrize("name", ["diffusers", "diffusers_ddpm"])
def test_a_diffusers_folder_answers_as_published(tmp_path, name):
    _, held = diffusers_folder(tmp_path / "pipeline", name)
    D = load(convert(tmp_path / "pipeline", "diffusers", tmp_path / "ours"))
    more = {"y": held["y"]} if "y" in held else {}
    close(network_of(D)(held["x"], held["t"], **more), held["out"])
    assert D.process.prediction == "v" and float(D.schedule.betas[-1]) == pytest.approx(0.01)


def test_older_names_of_attention_in_diffusers_mean_the_same(tmp_path):
    tensors, held = diffusers_folder(tmp_path / "pipeline", "diffusers")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        tensors = {k.replace(f".{new}.", f".{name}."): x for k, x in tensors.items()}
    save_file(tensors, tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    D = load(convert(tmp_path / "pipeline", "diffusers", tmp_path / "ours"))
    close(network_of(D)(held["x"], held["t"]), held["out"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier'"),
        ({"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}, "CrossAttnDownBlock2D"),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
    ],
)
def test_what_a_diffusers_config_asks_beyond_that_is_refused(tmp_path, changed, said):
    diffusers_folder(tmp_path / "pipeline", "diffusers", **changed)
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "pipeline", "diffusers", tmp_path / "ours")


def brain_ldm():
    network = dict(
        name="DiffusionUNet", in_channels=7, out_channels=3, channels=[16, 32], attention=[False, True],
        num_head_channels=16, norm_groups=8, resblock_updown=True, context_width=4,
    )  # fmt: skip
    schedule = dict(name="scaled_linear", steps=1000, beta_start=0.0015, beta_end=0.0205)
    return {"network": network, "denoiser": {"name": "DiscreteDenoiser", "schedule": schedule}}


def test_the_brain_ldm_of_monai_answers_as_published_told_four_numbers(tmp_path):
    tensors, held, _ = golden("monai_brain_ldm")
    torch.save(tensors, tmp_path / "model.pt")
    D = load(convert(tmp_path / "model.pt", "monai", tmp_path / "ours", brain_ldm()))
    network = network_of(D)
    close(network(held["x"], held["t"], held["cond"]), held["out"])
    other = held["cond"] + torch.tensor([1.0, 0, 0, 0])
    assert (network(held["x"], held["t"], other) - held["out"]).abs().max() > 0.01
    assert D(held["x"], torch.full((2,), 0.5), held["cond"]).shape == held["x"].shape
    with pytest.raises(ValueError, match="attends to tokens"):
        network(held["x"], held["t"])


def test_names_of_monai_generative_mean_the_same(tmp_path):
    tensors, held, _ = golden("monai_brain_ldm")
    tensors = {k.replace(".out_proj.", ".to_out.0."): x for k, x in tensors.items()}
    torch.save(tensors, tmp_path / "model.pt")
    network = network_of(load(convert(tmp_path / "model.pt", "monai", tmp_path / "ours", brain_ldm())))
    close(network(held["x"], held["t"], held["cond"]), held["out"])


MASKS = {"network": {"upsampling": "transposed"}}


@pytest.mark.parametrize(("name", "config"), [("maisi_autoencoder", None), ("maisi_mask_autoencoder", MASKS)])
def test_maisi_autoencoders_answer_as_published(tmp_path, name, config):
    tensors, held, _ = golden(name)
    torch.save(tensors, tmp_path / "autoencoder.pt")
    codec = load(convert(tmp_path / "autoencoder.pt", "maisi", tmp_path / "ours", config))
    with torch.no_grad():
        mean, std = codec.posterior(held["x"])
        close(torch.cat([part.flatten() for part in (mean, std, codec.decode(held["z"]))]), held["out"])
    if config is None:  # the shapes are those of the other way to double images as well
        with pytest.raises(ValueError, match="expected one of nearest, linear, transposed"):
            convert(tmp_path / "autoencoder.pt", "maisi", tmp_path / "o", {"network": {"upsampling": "cubic"}})


def meta_tensor(monkeypatch, value):
    """A MONAI MetaTensor, with a record of the image that it came from."""
    names = ("monai", "monai.data", "monai.utils", "monai.data.meta_tensor", "monai.utils.enums")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module, enums = (sys.modules[name] for name in names[3:])
    module.MetaTensor = type("MetaTensor", (torch.Tensor,), {"__module__": module.__name__})
    enums.SpaceKeys = enum.StrEnum("SpaceKeys", {"RAS": "RAS"}, module=enums.__name__, qualname="SpaceKeys")
    made = torch.tensor(value).as_subclass(module.MetaTensor)
    made.meta = {enums.SpaceKeys.RAS: torch.eye(4, dtype=torch.float64), "dim": torch.zeros(8, dtype=torch.int16)}
    return made


def test_the_rectified_flow_of_maisi_denoises_as_published(tmp_path, monkeypatch):
    """Told spacing and modality; the network's velocity points to the data."""
    tensors, held, more = golden("maisi_rflow")
    scale = meta_tensor(monkeypatch, 1.25)
    checkpoint = {"epoch": 3, "loss": 0.1, "num_train_timesteps": 1000, "scale_factor": scale}
    torch.save(checkpoint | {"unet_state_dict": tensors}, tmp_path / "unet.pt")
    folder = convert(tmp_path / "unet.pt", "monai/maisi-rflow-mr", tmp_path / "ours")
    D, (velocity, x0) = load(folder), held["out"]
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["scale_factor"] == 1.25 and "Noncommercial" in (folder / "README.md").read_text()
    told = {"cond": held["cond"], "y": held["y"]}
    close(network_of(D)(held["x"], held["t"], **told), velocity)
    t = held["t"] / 1000
    close(D(held["x"] / (1 - t.reshape(-1, 1, 1, 1, 1)), t / (1 - t), **told), x0)
    assert (network_of(D)(held["x"], held["t"], held["cond"] * 2, held["y"]) - velocity).abs().max() > 0.01

    levels = flow_levels(10, 2 / 9, 1e9, shift=2.0)[:-1]  # latents of 64 pixels a side; MONAI keeps times in float16
    torch.testing.assert_close(1000 * levels / (1 + levels), torch.tensor(more["times"]).double(), rtol=1e-3, atol=0)
    x, sigma, cond = held["x"], torch.ones(2), held["cond"]
    guided = ClassGuidance(D, 9, 3.0, null=0)(x, sigma, cond)
    own, none = (D(x, sigma, cond, y=torch.tensor([y])) for y in (9, 0))
    close(guided, none + 3 * (own - none))


def test_the_ddpm_of_maisi_answers_as_published_told_regions_and_spacing(tmp_path):
    tensors, held, _ = golden("maisi_ddpm")
    torch.save(tensors, tmp_path / "unet.pt")
    D = load(convert(tmp_path / "unet.pt", "monai/maisi-ddpm-ct", tmp_path / "ours"))
    close(network_of(D)(held["x"], held["t"], held["cond"]), held["out"])
    assert float(D.schedule.betas[-1]) == pytest.approx(0.0195) and D.process.prediction == "epsilon"
    assert D(held["x"], torch.ones(2), held["cond"]).shape == held["x"].shape
    with pytest.raises(ValueError, match=r"told 11 numbers about each image, in groups of \[4, 4, 3\]"):
        D(held["x"], torch.ones(2), held["cond"][:, 8:])


def test_what_maisi_has_beyond_that_is_refused_by_name(tmp_path):
    tensors, _, _ = golden("maisi_ddpm")
    x = torch.zeros(1)
    for content, said in [
        ({"controlnet_state_dict": tensors}, "a ControlNet"),
        (tensors | {"controlnet_mid_block.conv.weight": x}, "a ControlNet"),
        (tensors | {"adagn_context_embed.0.weight": x}, "AdaGN"),
        (tensors | {"middle_block.attention.transformer_blocks.0.norm1.weight": x}, "with_conditioning"),
        ({"weight": x}, "neither MAISI's autoencoder nor its U-Net"),
    ]:
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(ValueError, match=said):
            convert(tmp_path / "file.pt", "maisi", tmp_path / "ours")


def test_weights_that_are_had_by_hand_say_where_and_under_which_terms():
    brain = registry.find("inversebench/brain")
    assert doctor.state(brain) == "by hand" and "devzhk/InverseBench" in registry.how_to_make(brain)
    with pytest.raises(ValueError, match="on no hub.*mri-brain.pt"):
        obtain(brain)
    terms = dict(line.split(": ", 1) for line in doctor.terms().splitlines())
    assert "MIT" in terms["inversebench/brain, inversebench/knee"] and "CC BY-NC-SA 4.0" in terms["edm/networks"]
    assert sum(len(names.split(", ")) for names in terms) == len(registry.entries())


def test_every_kind_states_what_it_reads():
    assert {"edm", "diffusers", "monai"} <= set(kinds.KINDS)
    assert all(kind.title for kind in kinds.KINDS.values())
