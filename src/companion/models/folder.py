"""The folder of a checkpoint: what lies in it, written whole, verified by its hash."""

from __future__ import annotations

import difflib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from companion.files import atomic_write, sha256, shipped
from companion.models import registry
from companion.models.architectures import _blank, _check_finite, _check_match, _shapes, network_of

MODEL, CONFIG, RECORD, CARD, SUMS = (
    "model.safetensors", "config.json", "training.json", "README.md", "SHA256SUMS"
)  # fmt: skip
ERRORS = "errors.json"  # how far the model errs, see `companion.models.errors`; goes when the weights change


def root() -> Path:
    """The folder of the embedded checkpoints, which come with the package."""
    return shipped("checkpoints")


def embedded() -> list[str]:
    """The names of the embedded checkpoints, such as "brain/t1w"."""
    return sorted(str(path.parent.relative_to(root())) for path in root().rglob(CONFIG))


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
    strangers = {path.name for path in folder.glob("*")} - {MODEL, CONFIG, RECORD, CARD, ERRORS}
    if strangers:
        raise ValueError(f"{folder} also holds {', '.join(sorted(strangers)[:3])}; save to a folder of its own")

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
from companion.models.checkpoint import load

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
        aside.write_text("".join(f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files))
    return folder / SUMS


def _not_found(name: str) -> str:
    names = embedded()
    if not names:
        return (
            f"no checkpoint {name!r}: it is no folder, and the embedded checkpoints ({root()}) are absent. "
            "They come with the package: install its wheel again, or give the path of a checkpoint"
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


def read_config(folder: Path) -> dict:
    """The config.json of a checkpoint folder. Raises FileNotFoundError if absent, ValueError if it is none."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: without it the weights beside it cannot be used") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected an object that describes a model")
    return config
