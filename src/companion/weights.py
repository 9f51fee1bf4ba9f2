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

What `load` and all functions here take as a name:

    brain/t1w                       an embedded checkpoint, of the repository
    embedded                        the one that the caller suggests as `default`, or the only one
    aid/fastmri-320-cplx            a published one (companion.registry): downloaded, checked and converted once
    hf:owner/name@revision:folder   a checkpoint on the Hugging Face Hub; revision and folder may be left out
    runs/prior                      a folder, or its model.safetensors
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from companion import conversion, registry
from companion.diffusion.denoisers import AnySize, ComplexDenoiser, DiscreteDenoiser, EDMDenoiser, FlowDenoiser
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
    "FlowDenoiser": FlowDenoiser,
    "DiscreteDenoiser": DiscreteDenoiser,  # its "schedule" is {"name": "linear", "steps": 1000, ...}
}
SCHEDULES: dict[str, Callable[..., DiscreteSchedule]] = {
    "linear": DiscreteSchedule.linear,
    "scaled_linear": DiscreteSchedule.scaled_linear,
    "zero_terminal": DiscreteSchedule.zero_terminal,
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
    while isinstance(model, (AnySize, ComplexDenoiser, EDMDenoiser, FlowDenoiser, DiscreteDenoiser)):
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
    name: str | os.PathLike,
    device: str | torch.device = "cpu",
    autocast: str | None = None,
    default: str | None = None,
) -> nn.Module:
    """The model of a checkpoint, ready to use: in evaluation mode, without gradients, in float32.

    name: see the head of this module. A published or hub checkpoint that is not here is downloaded.
    autocast: "bfloat16" lets the network compute in it. default: what the name "embedded" stands for.

    Raises FileNotFoundError when there is no such checkpoint, ValueError when it is damaged, is not what its
    hash says, does not fit its config, or is a pickle; the errors of `registry.fetch` for downloads.
    """
    folder = resolve(name, default)
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


def load_denoiser(
    name: str | os.PathLike, device="cpu", autocast: str | None = None, default: str | None = None
) -> nn.Module:
    """`load`, for checkpoints that are denoisers; raises ValueError for others."""
    if describe(name, default).get("denoiser") is None:
        raise ValueError(f'{name} holds a bare network: its {CONFIG} has no "denoiser"; use load')
    return load(name, device, autocast, default)


def describe(name: str | os.PathLike, default: str | None = None) -> dict:
    """The config.json of a checkpoint: network, denoiser, data, sha256; "origin" if it was converted."""
    path = resolve(name, default) / CONFIG
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


@dataclass(frozen=True)
class Source:
    """What a name stands for: print it beside results."""

    name: str
    origin: str  # where it comes from, in words
    path: Path
    sha256: str  # of the weights that are loaded

    def __str__(self) -> str:
        return f"{self.name}: {self.origin}; {self.path}, SHA-256 {self.sha256}"


def describe_source(name: str | os.PathLike, default: str | None = None) -> Source:
    """What `load(name)` loads, from where, with which hash (computed now, not quoted)."""
    name = _named(name, default)
    folder = resolve(name)
    origin, hub = describe(folder).get("origin"), HUB_ID.fullmatch(str(name))
    if origin:
        place = f"{origin['repo']} at {origin['revision'][:12]}, " if origin.get("repo") else ""
        words = f"converted from {place}{origin['file']} (SHA-256 {origin['sha256']})"
    elif hub:
        words = f"Hugging Face Hub, {hub['repo']} at {_commit(folder)[:12]}"
    else:
        words = "embedded in the repository" if str(name) in embedded() else "a checkpoint on this machine"
    return Source(str(name), words, folder / MODEL, sha256(folder / MODEL))


HUB_ID = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./ -]+))?")


def resolve(name: str | os.PathLike, default: str | None = None) -> Path:
    """The folder of a checkpoint, given its name (see the head of this module).

    An embedded checkpoint is first compared with SHA256SUMS; a published or hub one is downloaded if need be.
    """
    name = _named(name, default)
    if re.fullmatch(r"\w[\w-]*(/\w[\w-]*)+", str(name)) and (root() / str(name) / CONFIG).exists():
        return _embedded_folder(str(name))
    if str(name).startswith("hf:"):
        return _hub_folder(str(name))
    path = Path(name)
    entry = None if path.exists() else registry.find(str(name))
    if entry:
        return obtain(entry)
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} is a pickle: loading one can run any program hidden in it, so this package never does. Convert it "
            "once, without running it: companion weights convert FILE --kind KIND --out FOLDER, and give that folder"
        )
    if path.name == MODEL:
        path = path.parent
    if path.is_dir():
        return path
    raise FileNotFoundError(_not_found(str(name)))


def _named(name: str | os.PathLike, default: str | None) -> str | os.PathLike:
    if str(name) != "embedded":
        return name
    names = [default] if default else embedded()
    if len(names) != 1:
        raise ValueError(f"which embedded checkpoint? Give its name: {', '.join(names) or 'there are none'}")
    return names[0]


def _embedded_folder(name: str) -> Path:
    folder, sums = root() / name, _sums()
    for file in (CONFIG, MODEL):
        key = f"{name}/{file}"
        if key not in sums:
            raise ValueError(f"{key} is not in {root() / SUMS}; add it with companion.weights.write_sums()")
        _verify(folder / file, sums[key], str(root() / SUMS))
    return folder


def _hub_folder(name: str) -> Path:
    """The checkpoint of a hub id, in the hub client's cache; a published file of the registry is converted."""
    found = HUB_ID.fullmatch(name)
    if not found:
        raise ValueError(f"{name} is no hub id; expected hf:owner/name, hf:owner/name@revision or hf:owner/name:folder")
    repo, revision, file = found["repo"], found["revision"], found["file"] or ""
    for entry in registry.entries().values():
        if (entry.repo, entry.file) == (repo, file) and entry.kind != "data":
            return obtain(entry if revision is None else dataclasses.replace(entry, revision=revision))
    if Path(file).suffix.lower() in PICKLES:
        raise ValueError(
            f"{name} is a pickle that the registry does not know, so its config is not known either. Fetch it (hf "
            f"download {repo} {file}), then: companion weights convert FILE --kind KIND --config CONFIG --out FOLDER"
        )
    at = file.removesuffix(MODEL).strip("/")
    names = [f"{at}/{part}" if at else part for part in (CONFIG, MODEL)]
    with registry.explained(name, repo, revision or "main"):
        config = registry.take(repo, names[0], revision or "main", name)
        model = registry.take(repo, names[1], config.revision, name)
    return model.path.parent


def _commit(folder: Path) -> str:
    return next((part for part in folder.parts[::-1] if registry.COMMIT.fullmatch(part)), "an unknown commit")


def _not_found(name: str) -> str:
    names = embedded()
    if not names:
        return (
            f"no checkpoint {name!r}: it is no folder, and the embedded checkpoints ({root()}) are absent. "
            "They come with the repository: clone it and `pip install -e .`, or give the path of a checkpoint"
        )
    close = difflib.get_close_matches(name, [*names, *registry.entries()], 1)
    hint = f"did you mean {close[0]!r}?" if close else f"embedded: {', '.join(names)}"
    return (
        f"no checkpoint {name!r}: neither an embedded nor a published name (companion weights list), nor a folder with "
        f"{MODEL} and {CONFIG}; a Hugging Face repository is written hf:owner/name; {hint}"
    )


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


# ----------------------------------------------------------------------------------------------------
# Published weights: converted once, then checkpoints like all others


def obtain(entry: registry.Entry, accept_change: bool = False) -> Path:
    """The folder of a published checkpoint: downloaded, checked and converted if it is not there already.

    A converted checkpoint stays usable when the hub client's cache is emptied. Raises the errors of
    `registry.fetch` and `convert`.
    """
    if entry.kind == "data":
        raise ValueError(f"{entry.name} is sample data, no model: companion weights where {entry.name}")
    folder = converted(entry)
    if folder is None or accept_change:
        found = registry.fetch(entry, accept_change)
        origin = {"name": entry.name, "repo": entry.repo, "revision": found.revision, "file": entry.file}
        with registry.one_at_a_time(f"{entry.key}, converted"):
            folder = _converted_folder(entry, found.sha256)
            if not (folder / CONFIG).exists():
                for aside in folder.parent.glob(".*"):  # left by a process that was killed here
                    shutil.rmtree(aside, ignore_errors=True)
                registry.check_space(registry.home(), found.path.stat().st_size, f"{entry.name}, converted,")
                convert(found.path, entry.kind, folder, entry.config, origin=origin, about=entry)
    return folder


def pull(name: str, accept_change: bool = False) -> Path:
    """The folder of a published checkpoint, or the first file of sample data, here and whole after this call.

    Mends what is damaged. Raises the errors of `obtain`, and FileNotFoundError for names not in the registry.
    """
    entry = registry.find(name)
    if entry is None:
        if name.startswith("hf:") or name in embedded():
            return resolve(name)
        raise FileNotFoundError(_not_found(name))
    if entry.kind == "data":
        return registry.fetch(entry, accept_change).path
    folder = converted(entry)
    if folder is not None and damage(folder):
        shutil.rmtree(folder)
    return obtain(entry, accept_change)


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint folder, or None."""
    try:
        _verify(folder / MODEL, describe(folder).get("sha256"), str(folder / CONFIG))
    except (OSError, ValueError) as error:
        return str(error)
    return None


def converted(entry: registry.Entry) -> Path | None:
    """The folder of a published checkpoint if it is there, else None; no network, nothing hashed."""
    known = registry.recorded(entry) if entry.repo else None
    folder = _converted_folder(entry, known["files"][entry.file]["sha256"]) if known else None
    return folder if folder and (folder / CONFIG).exists() else None


def _converted_folder(entry: registry.Entry, source: str) -> Path:
    # another file, or another reading of it, is another checkpoint
    key = hashlib.sha256(f"{source} {entry.kind} {json.dumps(entry.config, sort_keys=True)}".encode())
    return registry.home() / "converted" / entry.name / key.hexdigest()[:16]


def convert(
    file: str | os.PathLike,
    kind: str,
    folder: str | os.PathLike,
    config: Mapping | None = None,
    golden: str | os.PathLike | None = None,
    *,
    origin: Mapping | None = None,
    about: registry.Entry | None = None,
) -> Path:
    """The folder of the checkpoint made of a published file: the same numbers under our names.

    kind: one of conversion.KINDS, or the name of a registry entry, which also gives the config. config: as for
    `build`; can be left out where the file tells it, and for "aid" where names and shapes are those of a published
    model. golden: a safetensors file with inputs x, t (cond, y) of the network and its published output `out`, which
    must come out again. origin, about: where the file comes from, for config.json and the model card.

    Raises ValueError for files that are not what `kind` says or hold more than data, tensors that are missing, extra
    or of another shape, and a wrong output; FileNotFoundError.
    """
    entry = about or (None if kind in conversion.KINDS else registry.find(kind))
    if entry and entry.kind != "data":
        kind, config = entry.kind, config or entry.config or None
    tensors, told = conversion.read_kind(file, kind)
    if told or config:
        config = (told or {}) | dict(config or {})
    else:
        config = _config_for(tensors, kind, str(file))
    data = {"source": f"published weights, {Path(file).name}", "scale": "not stated in the file"}
    given = {"file": Path(file).name} | dict(origin or {}) | {"sha256": sha256(file)}
    config = config | {"data": data | dict(config.get("data") or {}), "origin": given}
    network = _blank(config)
    tensors = conversion.KINDS[kind].rename(tensors, network)
    _check_match(_shapes(network), {k: tuple(t.shape) for k, t in tensors.items()}, str(file))
    network.load_state_dict(tensors, assign=True)
    record = {"converted from": given, "kind": kind}
    if golden is not None:
        record["parity"] = _parity(network, Path(golden))
    card = registry_card(entry, config, record) if entry else None
    return save_checkpoint(folder, network, config, record, card)


def _config_for(tensors: Mapping[str, torch.Tensor], kind: str, source: str) -> dict:
    """The config of the registry's one model of a kind that has tensors of these names and shapes."""
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    for entry in registry.entries().values():
        if entry.kind == kind == "aid" and _shapes(_blank(entry.config)) == given:
            return dict(entry.config)
    names = [name for name, entry in registry.entries().items() if entry.kind == kind and entry.config.get("network")]
    raise ValueError(
        f"{source} does not say which network it is for. Give a config (--config FILE, JSON or YAML with network, "
        f"denoiser and data), or as kind the published model that it is: {', '.join(names) or 'none is known'}"
    )


@torch.no_grad()
def _parity(network: nn.Module, golden: Path) -> dict:
    """How well the network repeats a published output; raises ValueError if it does not."""
    given = load_file(golden)
    out = given.pop("out")
    ours = network.eval().float()(**given)
    error = ((ours - out).norm() / out.norm()).item()
    if not error < 1e-4:
        raise ValueError(
            f"the network does not repeat the output in {golden} (relative error {error:.2g}): wrong kind or config"
        )
    return {"file": golden.name, "relative_error": error}


def registry_card(entry: registry.Entry, config: Mapping, record: Mapping) -> str:
    """The README.md of a converted checkpoint: paper, licence, training data, metrics, intended use, origin."""
    facts = {
        "What": entry.title, "Paper": entry.citation, "Licence": entry.licence, "Training data": entry.training,
        "Metrics": entry.metrics, "Intended use": entry.use, "Scale": config["data"]["scale"],
    }  # fmt: skip
    lines = [f"- **{key}**: {value}" for key, value in facts.items()]
    lines += [f"- **{key}**: {json.dumps(value)}" for key, value in record.items()]
    head = "---\nlibrary_name: companion\nlicense: other\n---\n"
    note = "Converted by renaming tensors; no number was changed."
    return f"{head}# {entry.name}\n\n{note}\n\n{chr(10).join(lines)}\n"
