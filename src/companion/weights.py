"""Models on disk: save, check, load. A checkpoint is a folder of four files, none of which can run code.

    model.safetensors    the network's tensors, float32 unless said otherwise
    config.json          what to build from them: network, denoiser, data and their scale; the SHA-256
    training.json        how they were trained
    README.md            the model card

One dict describes a model from training to loading:

    config = {
        "network": {"name": "UNet", "in_channels": 2, "model_channels": 64, "out_channels": 2},
        "denoiser": {"name": "EDMDenoiser", "complex": True, "sigma_data": 0.35},
        "data": {"source": "virtual cohort, T1w", "scale": "largest magnitude of a slice is 1"},
    }
    D = build(config)                                         # random weights, to be trained
    save_checkpoint("runs/prior", ema, config, record)        # `ema`: the trained D, or its averaged weights
    D = load("runs/prior")                                    # or an embedded one: load("brain/t1w")
"""

from __future__ import annotations

import difflib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from companion.diffusion.denoisers import AnySize, ComplexDenoiser, DiscreteDenoiser, EDMDenoiser
from companion.diffusion.noise import DiscreteSchedule
from companion.networks.autoencoder import AutoencoderKL, VQModel
from companion.networks.causal_unet import CausalUNet
from companion.networks.ddim_unet import DDIMUNet
from companion.networks.diffusion_unet import DiffusionUNet
from companion.networks.edm_unet import EDMUNet
from companion.networks.unet import UNet
from companion.networks.vqvae import VQVAE, PlainVQVAE
from companion.runs import atomic_write, sha256

MODEL, CONFIG, RECORD, CARD, SUMS = (
    "model.safetensors", "config.json", "training.json", "README.md", "SHA256SUMS"
)  # fmt: skip

# What a config may name. Nothing outside these tables is ever built.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "UNet": UNet,
    "CausalUNet": CausalUNet,
    "DDIMUNet": DDIMUNet,
    "EDMUNet": EDMUNet,
    "DiffusionUNet": DiffusionUNet,
    "AutoencoderKL": AutoencoderKL,  # autoencoders: no "denoiser" in the config
    "VQModel": VQModel,
    "VQVAE": VQVAE,
    "PlainVQVAE": PlainVQVAE,
}
DENOISERS: dict[str, Callable[..., nn.Module]] = {
    "EDMDenoiser": EDMDenoiser,
    "DiscreteDenoiser": DiscreteDenoiser,  # its "schedule" is {"name": "linear", "steps": 1000, ...}
}
SCHEDULES: dict[str, Callable[..., DiscreteSchedule]] = {
    "linear": DiscreteSchedule.linear,
    "scaled_linear": DiscreteSchedule.scaled_linear,
    "cosine": DiscreteSchedule.cosine,
}

PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin"}


def root() -> Path:
    """The folder of the embedded checkpoints, in the repository beside src/."""
    return Path(__file__).resolve().parents[2] / "checkpoints"


def embedded() -> list[str]:
    """The names of the embedded checkpoints, such as "brain/t1w"."""
    return sorted(str(path.parent.relative_to(root())) for path in root().rglob(CONFIG))


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


def network_of(model: nn.Module) -> nn.Module:
    """The network inside a denoiser, under any number of wrappers; a bare network is returned as it is."""
    while isinstance(model, (AnySize, ComplexDenoiser, EDMDenoiser, DiscreteDenoiser)):
        model = model.D if isinstance(model, (AnySize, ComplexDenoiser)) else model.network
    return model


# ----------------------------------------------------------------------------------------------------
# Saving


def save_checkpoint(
    folder: str | os.PathLike, model: nn.Module, config: Mapping, record: Mapping, card: str | None = None
) -> Path:
    """The folder, which now holds the checkpoint whole (or, after an error, what it held before).

    model: the network, or the denoiser around it; its tensors are stored as they are.
    config: see the head of this module; config["data"] must say "source" and "scale" (the intensity units in
    which the model works). record: how it was trained, as JSON. card: the README; by default one is written
    from both.

    Raises ValueError when config does not build this model, or tensors are not finite, or `folder` holds
    other files; OSError when the disk is full.
    """
    folder = Path(folder)
    missing = {"source", "scale"} - set(config.get("data") or {})
    if missing:
        raise ValueError(
            f'config["data"] lacks {", ".join(sorted(missing))}: say what it was trained on, in which units'
        )
    tensors = {name: t.detach().cpu().contiguous() for name, t in network_of(model).state_dict().items()}
    _check_match(_shapes(_blank(config)), {k: tuple(t.shape) for k, t in tensors.items()}, "the model")
    _check_finite(tensors, "the model")
    strangers = {path.name for path in folder.glob("*")} - {MODEL, CONFIG, RECORD, CARD}
    if strangers:
        raise ValueError(
            f"{folder} also holds {', '.join(sorted(strangers)[:3])}; save to a folder of its own"
        )

    aside, old = (folder.with_name(f".{folder.name}.{secrets.token_hex(4)}") for _ in range(2))
    try:
        aside.mkdir(parents=True)
        with atomic_write(aside / MODEL) as path:
            save_file(tensors, path, metadata={"format": "pt"})
            path.chmod(0o644)
        config = dict(config) | {"sha256": sha256(aside / MODEL)}
        card = card or model_card(folder.name, config, record)
        texts = {CONFIG: json.dumps(config, indent=2) + "\n", CARD: card}
        texts[RECORD] = json.dumps(record, indent=2, default=str) + "\n"
        for name, text in texts.items():
            with atomic_write(aside / name) as path:
                path.write_text(text)
        if folder.exists():
            os.replace(folder, old)
        os.replace(aside, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OSError(f"the checkpoint {folder} could not be written: {error}; free some space") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def model_card(name: str, config: Mapping, record: Mapping) -> str:
    """A README.md for a checkpoint: what it is, what it saw, how it was trained, how to load it."""
    facts = {k: v for k, v in {**config["data"], **record}.items() if not isinstance(v, dict)}
    options = {k: config[k] for k in ("network", "denoiser") if k in config}
    return f"""---
library_name: companion
license: mit
---
# {name}

{chr(10).join(f"- {key}: {value}" for key, value in facts.items())}

```python
from companion.weights import load

D = load("path/to/this/folder")
```

A research model; not for clinical use.

```json
{json.dumps(options, indent=2)}
```
"""


def write_sums(folder: Path | None = None) -> Path:
    """SHA256SUMS of the embedded (or another folder of) checkpoints, as `sha256sum -c` reads it."""
    folder = root() if folder is None else Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.name in (MODEL, CONFIG))
    with atomic_write(folder / SUMS) as aside:
        aside.write_text(
            "".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
        )
    return folder / SUMS


# ----------------------------------------------------------------------------------------------------
# Loading


def load(
    name: str | os.PathLike, device: str | torch.device = "cpu", autocast: str | None = None
) -> nn.Module:
    """The model of a checkpoint, ready to use: in evaluation mode, without gradients, in float32.

    name: an embedded checkpoint ("brain/t1w") or the path of a checkpoint folder or of its model.safetensors.
    autocast: "bfloat16" lets the network compute in it.

    Raises FileNotFoundError when there is no such checkpoint, ValueError when it is damaged, is not what its
    hash says, does not fit its config, or is a pickle.
    """
    folder = resolve(name)
    config = describe(folder)
    path = folder / MODEL
    _verify(path, config.get("sha256"), f"{folder / CONFIG}")
    tensors = _read(path)
    network = _blank(config)
    _check_match(_shapes(network), {k: tuple(t.shape) for k, t in tensors.items()}, str(path))
    _check_finite(tensors, str(path))
    tensors = {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}
    network.load_state_dict(tensors, assign=True)
    model = _wrap(network, config).to(device).eval().requires_grad_(False)
    if autocast is not None:
        (model.D if isinstance(model, ComplexDenoiser) else model).autocast = getattr(torch, autocast)
    return model


def load_denoiser(name: str | os.PathLike, device="cpu", autocast: str | None = None) -> nn.Module:
    """`load`, for checkpoints that are denoisers; raises ValueError for others."""
    if describe(name).get("denoiser") is None:
        raise ValueError(f'{name} holds a bare network: its {CONFIG} has no "denoiser"; use load')
    return load(name, device, autocast)


def describe(name: str | os.PathLike) -> dict:
    """The config.json of a checkpoint: network, denoiser, data, sha256."""
    path = resolve(name) / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing: without it the weights beside it cannot be used"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected an object that describes a model")
    return config


def resolve(name: str | os.PathLike) -> Path:
    """The folder of a checkpoint, given its embedded name or a path. Other sources of weights join here.

    An embedded checkpoint is first compared with SHA256SUMS.
    """
    if re.fullmatch(r"\w[\w-]*(/\w[\w-]*)+", str(name)) and (root() / str(name) / CONFIG).exists():
        folder = root() / str(name)
        sums = _sums()
        for file in (CONFIG, MODEL):
            key = f"{name}/{file}"
            if key not in sums:
                raise ValueError(
                    f"{key} is not in {root() / SUMS}; add it with companion.weights.write_sums()"
                )
            _verify(folder / file, sums[key], str(root() / SUMS))
        return folder

    path = Path(name)
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} is a pickle: loading one can run any program hidden in it, so this package never does. "
            "Convert it to safetensors where you trust it (safetensors.torch.save_file) and load that; "
            "companion.conversion.read reads the published PET checkpoints without running them"
        )
    if path.name == MODEL:
        path = path.parent
    if path.is_dir():
        return path
    raise FileNotFoundError(_not_found(str(name)))


def _not_found(name: str) -> str:
    names = embedded()
    if not names:
        return (
            f"no checkpoint {name!r}: it is no folder, and the embedded checkpoints ({root()}) are absent. "
            "They come with the repository: clone it and `pip install -e .`, or give the path of a checkpoint"
        )
    close = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"embedded: {', '.join(names)}"
    return f"no checkpoint {name!r}: neither an embedded name nor a folder with {MODEL} and {CONFIG}; {hint}"


def _sums() -> dict[str, str]:
    path = root() / SUMS
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; write it with companion.weights.write_sums()")
    return {file: digest for digest, file in map(str.split, path.read_text().splitlines())}


def _verify(path: Path, expected: str | None, source: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; fetch the checkpoint again")
    if expected is not None and sha256(path) != expected:
        raise ValueError(f"{path} is not the file that {source} lists (its SHA-256 differs); fetch it again")


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file: {error}; fetch it again"
        ) from error


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
    lines = [f"  {k} {given[k]}: expected {expected[k]}" for k in shared if given[k] != expected[k]]
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
