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
    aid/fastmri-320-cplx            a published one (companion.models.registry): downloaded, checked and converted once
    hf:owner/name@revision:folder   a checkpoint on the Hugging Face Hub; revision and folder may be left out
    runs/prior                      a folder, or its model.safetensors
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from companion.files import sha256
from companion.models import folder as folders
from companion.models import registry
from companion.models.architectures import _blank, _check_finite, _check_match, _shapes, _wrap, set_autocast
from companion.models.folder import CONFIG, MODEL, SUMS, _not_found, _read, _sums, _verify, embedded, read_config
from companion.models.obtain import converted, damage, obtain

PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin"}


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
    autocast: "bfloat16" lets the network compute in it, "auto" does so where the device is fast in it.
    default: what the name "embedded" stands for.

    Raises FileNotFoundError when there is no such checkpoint, ValueError when it is damaged, is not what its
    hash says, does not fit its config, or is a pickle; the errors of `registry.fetch` for downloads.
    """
    return find(name, default).load(device, autocast)


def load_denoiser(
    name: str | os.PathLike, device="cpu", autocast: str | None = None, default: str | None = None
) -> nn.Module:
    """`load`, for checkpoints that are denoisers; raises ValueError for others."""
    return find(name, default).denoiser(device, autocast)


def describe(name: str | os.PathLike, default: str | None = None) -> dict:
    """The config.json of a checkpoint: network, denoiser, data, sha256; "origin" if it was converted."""
    return find(name, default).config


@dataclass(frozen=True)
class Checkpoint:
    """A name found: its folder and its config. Who needs the config and the model asks once, and each file is hashed
    once: c = find("lmi/t2w"); c.config["data"]; D = c.denoiser()."""

    name: str
    folder: Path
    config: dict

    def load(self, device: str | torch.device = "cpu", autocast: str | None = None) -> nn.Module:
        """The model, see `load`."""
        path = self.folder / MODEL
        _verify(path, self.config.get("sha256"), f"{self.folder / CONFIG}")
        tensors = _read(path)
        network = _blank(self.config)
        _check_match(_shapes(network), {k: tuple(t.shape) for k, t in tensors.items()}, str(path))
        _check_finite(tensors, str(path))
        tensors = {k: _laid_out(t.float() if t.is_floating_point() else t) for k, t in tensors.items()}
        network.load_state_dict(tensors, assign=True)
        model = _wrap(network, self.config).to(device).eval().requires_grad_(False)
        return set_autocast(model, autocast, device) if autocast else model

    def denoiser(self, device: str | torch.device = "cpu", autocast: str | None = None) -> nn.Module:
        """The model, which must be a denoiser; raises ValueError for others."""
        if self.config.get("denoiser") is None:
            raise ValueError(f'{self.name} holds a bare network: its {CONFIG} has no "denoiser"; use load')
        return self.load(device, autocast)


def _laid_out(tensor: torch.Tensor) -> torch.Tensor:
    """The weights of 2D convolutions in channels-last order, as images come to them, which saves a tenth to a fifth."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def find(name: str | os.PathLike, default: str | None = None) -> Checkpoint:
    """The checkpoint of a name, its config compared with SHA256SUMS if it is embedded; its weights are when loaded.

    Raises as `load`, but for the weights.
    """
    name = _named(name, default)
    embedded_name = _is_embedded(name)
    folder = folders.root() / str(name) if embedded_name else resolve(name)
    if embedded_name:
        _verify_embedded(str(name), CONFIG)
    config = read_config(folder)
    if embedded_name and config.get("sha256") != _listed(f"{name}/{MODEL}"):
        raise ValueError(
            f"{folder / CONFIG} and {folders.root() / SUMS} list different weights; fetch the checkpoint again"
        )
    return Checkpoint(str(name), folder, config)


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
    found = find(name, default)
    name, folder, origin = found.name, found.folder, found.config.get("origin")
    hub = HUB_ID.fullmatch(name)
    if origin:
        place = f"{origin['repo']} at {origin['revision'][:12]}, " if origin.get("repo") else ""
        words = f"converted from {place}{origin['file']} (SHA-256 {origin['sha256']})"
    elif hub:
        words = f"Hugging Face Hub, {hub['repo']} at {_commit(folder)[:12]}"
    else:
        words = "embedded in the repository" if name in embedded() else "a checkpoint on this machine"
    return Source(name, words, folder / MODEL, sha256(folder / MODEL))


HUB_ID = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./ -]+))?")


def resolve(name: str | os.PathLike, default: str | None = None) -> Path:
    """The folder of a checkpoint, given its name (see the head of this module).

    An embedded checkpoint is first compared with SHA256SUMS; a published or hub one is downloaded if need be.
    """
    name = _named(name, default)
    if _is_embedded(name):
        for file in (CONFIG, MODEL):
            _verify_embedded(str(name), file)
        return folders.root() / str(name)
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


def _is_embedded(name: str | os.PathLike) -> bool:
    return bool(re.fullmatch(r"\w[\w-]*(/\w[\w-]*)+", str(name))) and (folders.root() / str(name) / CONFIG).exists()


def _listed(key: str) -> str:
    sums = _sums()
    if key not in sums:
        raise ValueError(f"{key} is not in {folders.root() / SUMS}; add it with companion.models.folder.write_sums()")
    return sums[key]


def _verify_embedded(name: str, file: str) -> None:
    _verify(folders.root() / name / file, _listed(f"{name}/{file}"), str(folders.root() / SUMS))


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
