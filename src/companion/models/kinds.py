"""The kinds of published files: how each is opened, what it says of its network, and our names for its tensors.

`KINDS` are all that `companion weights convert` reads, through the reader of `pickles`, which executes nothing, or as
safetensors. Most are dictionaries of tensors, alone or inside a training checkpoint. The tensors of large files are
not copied: they are views of the file, mapped into memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from companion.models.pickles import Module, Refused
from companion.models.published import _content, _refusals, describe, read, translate
from companion.networks import autoencoder, ddim_unet, diffusers_unet, monai, song_unet
from companion.networks.unet import UNet


@dataclass(frozen=True)
class Kind:
    """A family of published files.

    unpack: the content of a file -> its tensors under their names. rename: those tensors and the network that they
    are for -> the same under our names. config: what the tensors themselves say of the network, if they do.
    assumed: options of the network that leave no trace in them, and what the published networks have.
    """

    title: str
    unpack: Callable[[Any], Mapping[str, Tensor]]
    rename: Callable[[Mapping[str, Tensor], nn.Module], Mapping[str, Tensor]]
    config: Callable[[Mapping[str, Tensor]], dict] | None = None
    assumed: Mapping[str, Any] = field(default_factory=dict)


def state_dict(content) -> Mapping[str, Tensor]:
    """The tensors of a state_dict, bare or as the "state_dict" of a training checkpoint."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise Refused(f"it holds a {type(content).__name__}; expected a dictionary of tensors")
    strange = next((name for name, x in content.items() if not (type(name) is str and isinstance(x, Tensor))), None)
    if strange is not None:
        raise Refused(f"its entry {str(strange)[:100]!r} is no tensor; expected a dictionary of tensors")
    return content


def _lmi_weights(content) -> Mapping[str, Tensor]:
    """Averaged weights, else raw ones, of [weights, Adam, epoch, step, averaged weights]."""
    if isinstance(content, list) and content:
        content = content[4] if len(content) > 4 else content[0]
    return {name.removeprefix("module."): x for name, x in state_dict(content).items()}


def _lmi_config(tensors: Mapping[str, Tensor]) -> dict:
    schedule = {"name": "linear", "steps": 1000}
    denoiser = {"name": "DiscreteDenoiser", "schedule": schedule, "prediction": "epsilon"}
    return {"network": ddim_unet.describe(tensors), "denoiser": denoiser}


def _edm(content) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Tensors and attributes of a network: averaged weights ("ema") where a file has them, else raw ones ("net")."""
    if isinstance(content, dict):
        content = next((content[key] for key in ("ema", "net") if content.get(key) is not None), content)
    if isinstance(content, Module):
        if not content.name.endswith("EDMPrecond"):
            raise Refused(f"its network is a {content.name.rpartition('.')[2]}; this kind knows EDMPrecond")
        parameters, buffers, attributes = content.collect()
        return parameters | buffers, attributes
    return {re.sub(r"^(module\.|net\.)+", "", name): x for name, x in state_dict(content).items()}, {}


def edm_config(tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> dict:
    """Network and denoiser of an EDM checkpoint; sigma_data is 0.5 where the file does not say it, as in EDM."""
    song = song_unet.is_song(tensors)
    network = song_unet.describe(tensors) if song else describe(tensors, attributes)
    return {
        "network": network,
        "denoiser": {"name": "EDMDenoiser", "sigma_data": float(attributes.get("sigma_data", 0.5))},
    }


def weights_file(path: str | os.PathLike, kind: str) -> Path:
    """The file of weights of a published folder (diffusers), or the path itself."""
    path = Path(path)
    if kind != "diffusers" or not path.is_dir():
        return path
    names = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    found = [at / name for at in (path, path / "unet") for name in names if (at / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{path} holds neither {names[0]} nor {names[1]}, nor does a folder unet in it")
    return found[0]


def _diffusers_config(path: Path) -> dict:
    model = path.with_name("config.json")
    if not model.is_file():
        raise FileNotFoundError(
            f"{model} is not there; diffusers describes a network in it, keep it beside its weights"
        )
    places = [path.with_name("scheduler_config.json"), path.parents[1] / "scheduler" / "scheduler_config.json"]
    scheduler = next((json.loads(place.read_text()) for place in places if place.is_file()), None)
    return diffusers_unet.describe(json.loads(model.read_text()), scheduler)


def _from_diffusers(tensors: Mapping[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    return diffusers_unet.translate(network, tensors) if isinstance(network, UNet) else tensors


def _maisi_weights(content) -> Mapping[str, Tensor]:
    """The tensors of a state_dict, bare or in a training checkpoint, which has its "scale_factor" beside them."""
    if not (isinstance(content, dict) and isinstance(content.get("unet_state_dict"), dict)):
        if isinstance(content, dict) and "controlnet_state_dict" in content:
            raise Refused("it holds a ControlNet (controlnet_state_dict), which is not supported")
        return state_dict(content)
    scale = {"scale_factor": torch.as_tensor(content["scale_factor"])} if "scale_factor" in content else {}
    return dict(state_dict(content["unet_state_dict"])) | scale


def _maisi_config(tensors: Mapping[str, Tensor]) -> dict:
    config = {"network": monai.describe(tensors)}
    if "scale_factor" in tensors:
        config["data"] = {"scale_factor": float(tensors["scale_factor"])}
    return config


def _from_maisi(tensors: Mapping[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    return monai.translate(network, {name: x for name, x in tensors.items() if name != "scale_factor"})


# The authors' class of RAM has factors that its forward pass never reads, and deepinv's class not at all
UNREAD = re.compile(r".*\.PhysicsBlock\.gain(_(grad|pinv)[xy])?")


def _ram_weights(content) -> Mapping[str, Tensor]:
    return {name: x for name, x in state_dict(content).items() if not UNREAD.fullmatch(name)}


def _ram_config(tensors: Mapping[str, Tensor]) -> dict:
    heads = [x for name, x in tensors.items() if re.fullmatch(r"m_head\.conv\d+\.weight", name)]
    if not heads:
        raise ValueError("it has no m_head.conv0.weight")
    channels = [x.shape[1] - 2 for x in heads]  # beside two maps of noise
    return {"network": {"name": "RAM", "in_channels": channels}, "data": {"scale": "bright tissue is 1"}}


def _direct_weights(content) -> Mapping[str, Tensor]:
    """The tensors of all networks of a checkpoint of DIRECT: "model", "sensitivity_model", ... ."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise Refused('it has no entry "model"')
    found = {"engine_model": content["model"]}
    found |= {f"engine_models.{k}": v for k, v in content.items() if str(k).endswith("_model") and isinstance(v, dict)}
    return {f"{part}.{name}": x for part, state in found.items() for name, x in state_dict(state).items()}


def _direct_config(path: Path) -> dict:
    model = path.with_suffix(".yaml")
    if not model.is_file():
        raise FileNotFoundError(f"{model} is not there; DIRECT describes a network in it, keep it beside its weights")
    says = yaml.safe_load(model.read_text())
    if not isinstance(says, dict) or not isinstance(says.get("model"), dict):
        raise ValueError(f"{model} describes no network: it has no part model")
    parts = {name: says.get(name) or {} for name in ("model", "additional_models", "physics")}
    return {"network": {"name": "DIRECT"} | parts, "data": {"scale": "that of the data, up to a factor"}}


def _inside(tensors: Mapping[str, Tensor], _) -> Mapping[str, Tensor]:
    """The names of a network that another project's class holds inside ours."""
    return {f"theirs.{name}": x for name, x in tensors.items()}


KINDS = {
    "aid": Kind("AID: sequence and single-image U-Nets (.pt)", state_dict, lambda tensors, _: tensors),
    "taming": Kind(
        "VQModel or KL autoencoder under the names of taming, latent diffusion or diffusers (.ckpt)",
        state_dict,
        lambda tensors, _: autoencoder.published(tensors),
    ),
    "lmi": Kind(
        "LMI translation: DDIM or guided-diffusion U-Net (.pth)",
        _lmi_weights,
        lambda tensors, _: ddim_unet.translate(tensors),
        _lmi_config,
        {"num_heads": 1, "use_new_attention_order": False},
    ),
    "monai": Kind(
        "latent3d: MONAI's VQVAE, AutoencoderKL or DiffusionModelUNet (.pt)",
        state_dict,
        lambda tensors, network: monai.translate(network, tensors),
    ),
    "maisi": Kind(
        "MAISI, NV-Generate: AutoencoderKlMaisi or DiffusionModelUNetMaisi, also in a training checkpoint (.pt)",
        _maisi_weights,
        _from_maisi,
        _maisi_config,
    ),
    "edm": Kind(
        "EDM and InverseBench: SongUNet or DhariwalUNet with EDM's preconditioning (.pkl, .pt, .safetensors)",
        lambda content: _edm(content)[0],
        lambda tensors, _: song_unet.translate(tensors) if song_unet.is_song(tensors) else translate(tensors),
    ),
    "diffusers": Kind(
        "diffusers: UNet2DModel, the folder or its file of weights (config.json beside it)",
        state_dict,
        _from_diffusers,
    ),
    "ram": Kind("RAM, run by deepinv: one pass for any linear operator (.pth.tar)", _ram_weights, _inside, _ram_config),
    "direct": Kind("DIRECT, run by deepinv: MR in one pass (.pt, and its .yaml beside it)", _direct_weights, _inside),
    "pet": Kind("PET: network-snapshot-*.pkl, training-state-*.pt", lambda content: content, lambda t, _: translate(t)),
}
BESIDE = {"diffusers": _diffusers_config, "direct": _direct_config}  # what says more than the tensors do


def read_kind(path: str | os.PathLike, kind: str) -> tuple[Mapping[str, Tensor], dict | None]:
    """The tensors of a published file under their own names, and the config that the file tells, if it does.

    kind: one of KINDS. Nothing in the file is executed. Tensors of torch.save files are views of the mapped file.
    Raises ValueError for a file that is more than tensors, or damaged, or of another kind; FileNotFoundError.
    """
    path = Path(path)
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r} of published file; choose one of {', '.join(KINDS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    if kind == "pet":
        published = read(path)
        return published.tensors, published.config
    with _refusals(path):
        content = _safetensors(path) if path.suffix == ".safetensors" else _content(path)
        tensors = KINDS[kind].unpack(content)
        if kind == "edm":
            return tensors, edm_config(tensors, _edm(content)[1])
    if kind in BESIDE:
        return tensors, BESIDE[kind](path)
    config = KINDS[kind].config
    if config is None:
        return tensors, None
    try:
        return tensors, config(tensors)
    except (KeyError, IndexError, ValueError) as problem:
        raise ValueError(f"{path} is not of kind {kind!r}: {problem}") from problem


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise Refused(f"its header does not fit its {path.stat().st_size} bytes: {error}") from None
