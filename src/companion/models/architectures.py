"""From a config to a denoiser: networks, denoisers and noise schedules by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from companion.diffusion.denoisers import (
    ComplexDenoiser,
    Denoiser,
    DiscreteDenoiser,
    EDMDenoiser,
    FlowDenoiser,
    inner_denoiser,
)
from companion.diffusion.noise import DiscreteSchedule
from companion.models.deepinv import DIRECT, RAM
from companion.models.unrolled import Unrolled
from companion.networks.autoencoder import AutoencoderKL, VQModel
from companion.networks.causal_unet import CausalUNet
from companion.networks.ddim_unet import DDIMUNet
from companion.networks.diffusers_unet import DiffusersUNet
from companion.networks.diffusion_unet import DiffusionUNet
from companion.networks.edm_unet import EDMUNet
from companion.networks.guided import GuidedUNet
from companion.networks.song_unet import SongUNet
from companion.networks.unet import UNet
from companion.networks.vqvae import VQVAE, PlainVQVAE
from companion.parameters import autocast_dtype

# What a config may name. Nothing outside these tables is ever built.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "UNet": UNet,
    "GuidedUNet": GuidedUNet,
    "CausalUNet": CausalUNet,
    "DDIMUNet": DDIMUNet,
    "EDMUNet": EDMUNet,
    "DiffusionUNet": DiffusionUNet,
    "DiffusersUNet": DiffusersUNet,
    "SongUNet": SongUNet,
    "AutoencoderKL": AutoencoderKL,  # autoencoders: no "denoiser" in the config
    "VQModel": VQModel,
    "VQVAE": VQVAE,
    "PlainVQVAE": PlainVQVAE,
    "Unrolled": Unrolled,  # reconstructions: no "denoiser" either
    "RAM": RAM,
    "DIRECT": DIRECT,
}
DENOISERS: dict[str, Callable[..., nn.Module]] = {
    "EDMDenoiser": EDMDenoiser,
    "FlowDenoiser": FlowDenoiser,
    "DiscreteDenoiser": DiscreteDenoiser,  # its "schedule" is {"name": "linear", "steps": 1000, ...}
}
SCHEDULES: dict[str, Callable[..., DiscreteSchedule]] = {
    "linear": DiscreteSchedule.linear,
    "scaled_linear": DiscreteSchedule.scaled_linear,
    "zero_terminal": DiscreteSchedule.zero_terminal,
    "cosine": DiscreteSchedule.cosine,
}


# ----------------------------------------------------------------------------------------------------
# Config -> model


def build(config: Mapping) -> nn.Module:
    """The model of `config` with random weights: a denoiser, or a bare network if it has no "denoiser".

    Raises ValueError for names outside NETWORKS and DENOISERS and for options that these do not take.
    """
    return _wrap(_make(config, "network", NETWORKS), config)


def _wrap(network: nn.Module, config: Mapping) -> nn.Module:
    if config.get("denoiser") is None:
        return network
    D = _make(config, "denoiser", DENOISERS, network)
    return ComplexDenoiser(D, D.channel_axis) if config["denoiser"].get("complex") else D


def _make(config: Mapping, part: str, table: Mapping[str, Callable], *args):
    """The thing that config[part] names, from its table, made of its options."""
    options = dict(config.get(part) or {})
    name = options.pop("name", None)
    if part == "denoiser":
        options.pop("complex", None)  # see _wrap
        if "schedule" in options:
            options["schedule"] = _make(options, "schedule", SCHEDULES)
    if name not in table:
        raise ValueError(f'config["{part}"]["name"] is {name!r}; this package knows {", ".join(table)}')
    try:
        return table[name](*args, **options)
    except TypeError as error:
        raise ValueError(f'config["{part}"] does not describe a {name}: {error}') from error


def network_of(model: Denoiser | nn.Module) -> Any:
    """The network inside a denoiser, an nn.Module, under any number of wrappers; a bare network as it is."""
    inner = inner_denoiser(model)
    return getattr(inner, "network", inner)


def set_autocast(D: nn.Module, autocast: str | None, device: str | torch.device = "auto") -> nn.Module:
    """D, whose network now computes in the number format `autocast`, such as "bfloat16"; None: in that of its weights.

    "auto" is what the `device` is fast in. Bare networks have no such switch and are returned as they are.
    """
    if network_of(D) is not (inner := inner_denoiser(D)):
        inner.autocast = autocast_dtype(autocast, device)
    return D


def _blank(config: Mapping) -> nn.Module:
    """The network of `config` without memory for its tensors: a file is checked before they are allocated."""
    with torch.device("meta"):
        return _make(config, "network", NETWORKS)


def _shapes(network: nn.Module) -> dict[str, tuple]:
    return {name: tuple(t.shape) for name, t in network.state_dict().items()}


def _check_match(expected: dict[str, tuple], given: dict[str, tuple], source: str) -> None:
    """Raises ValueError naming tensors that are missing, extra (with the nearest missing) or misshaped."""
    missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
    shared = [name for name in expected if name in given]
    lines = []
    for k in shared:
        if given[k] != expected[k]:
            turned = " (is it transposed?)" if given[k] == expected[k][::-1] else ""
            lines.append(f"  {k} {given[k]}: expected {expected[k]}{turned}")
    for name in sorted(extra):
        near = difflib.get_close_matches(name, missing, 1)
        hint = f"; is it {near[0]}?" if near else ""
        lines.append(f"  {name} {given[name]} is not part of the network{hint}")
    lines += [f"  {name} {expected[name]} is missing" for name in sorted(missing)]
    if lines:
        more = [f"  and {len(lines) - 8} more"] if len(lines) > 8 else []
        raise ValueError(f"the tensors of {source} do not fit the config:\n" + "\n".join(lines[:8] + more))


def _check_finite(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {name} of {source} holds NaN or infinity")
