"""Published weights: pulled, checked, converted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from companion.files import sha256
from companion.models import kinds, registry
from companion.models.architectures import _blank, _check_match, _shapes
from companion.models.folder import CONFIG, MODEL, _verify, read_config, save_checkpoint

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


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint folder, or None."""
    try:
        _verify(folder / MODEL, read_config(folder).get("sha256"), str(folder / CONFIG))
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

    kind: one of kinds.KINDS, or the name of a registry entry, which also gives the config. config: as for
    `build`; can be left out where the file tells it, and for "aid" where names and shapes are those of a published
    model; where the file tells it, it adds to that, as {"network": {"num_heads": 4}} does for attention with
    several heads, which leave no trace in the weights (what is assumed instead stands in training.json). golden: a
    safetensors file with inputs x, t (cond, y) of the network and its published output `out`, which must come out
    again. origin, about: where the file comes from, for config.json and the model card.

    Raises ValueError for files that are not what `kind` says or hold more than data, tensors that are missing, extra
    or of another shape, and a wrong output; FileNotFoundError.
    """
    entry = about or (None if kind in kinds.KINDS else registry.find(kind))
    if entry and entry.kind != "data":
        kind, config = entry.kind, config or entry.config or None
    file = kinds.weights_file(file, kind)
    tensors, told = kinds.read_kind(file, kind)
    if told:
        config = dict(config or {})
        merged = {part: dict(told.get(part) or {}) | dict(config.get(part) or {}) for part in ("network", "data")}
        config = told | config | merged
    config = dict(config or _config_for(tensors, kind, str(file)))
    assumed = {k: v for k, v in kinds.KINDS[kind].assumed.items() if k not in config["network"]}
    data = {"source": f"published weights, {Path(file).name}", "scale": "not stated in the file"}
    given = {"file": Path(file).name} | dict(origin or {}) | {"sha256": sha256(file)}
    config = config | {"data": data | dict(config.get("data") or {}), "origin": given}
    network = _blank(config)
    tensors = kinds.KINDS[kind].rename(tensors, network)
    _check_match(_shapes(network), {k: tuple(t.shape) for k, t in tensors.items()}, str(file))
    network.load_state_dict(tensors, assign=True)
    record = {"converted from": given, "kind": kind}
    if assumed and any(name.endswith("qkv.weight") for name in tensors):
        record["assumed, for weights do not say it"] = assumed
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
