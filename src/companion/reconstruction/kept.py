"""Frames of a long drawing, kept in a file while it is made: after a stop the same call goes on from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from companion.diffusion.sampling import Bill
from companion.diffusion.sequence import add
from companion.files import atomic_write


class Kept:
    """What was drawn so far of the drawing that is made from these things, and what it has cost.

    kept = Kept(file, y, weights, seeds)                # kept.notes.append(...): what else is to be kept of a frame
    samples = draw_sequence(..., **kept.options)
    bill = add(kept.bill, samples.bill)                 # `bill` is that of the frames that were there

    path: of the file; None keeps nothing. made_from: everything that the frames depend on: tensors, networks, records
    of them, plain values. A file that was made from anything else, or is damaged, is overwritten. notes: plain values
    that whoever draws a frame adds before it is done, such as a number for each.
    """

    def __init__(self, path: Path | None, *made_from: object):
        self.path, self.key = path, "" if path is None else fingerprint(*made_from)
        self.frames: list[Tensor] = []
        self.notes: list[Any] = []
        self.bill = Bill(0.0, 0.0, 0.0)
        if path is not None and path.exists():
            try:
                with safe_open(path, "pt") as file:
                    about = file.metadata() or {}
                    if about.get("key") == self.key:
                        frames = file.get_tensor("frames")
                        self.frames = list((torch.view_as_complex(frames) if "complex" in about else frames).unbind(1))
                        self.bill, self.notes = Bill(**json.loads(about["bill"])), json.loads(about["notes"])
            except SafetensorError:
                pass  # cut short by a full disk, say: the frames are drawn again

    @property
    def options(self) -> dict[str, Any]:
        """`resume` and `callback` of `diffusion.sequence.draw_sequence`."""
        if self.path is None:
            return {}
        return {"resume": torch.stack(self.frames, 1) if self.frames else None, "callback": self._store}

    def _store(self, step: Mapping[str, Any]) -> None:
        assert self.path is not None
        self.frames.append(step["x"].cpu())
        x = torch.stack(self.frames, 1)
        bill = asdict(add(self.bill, step["bill"]))
        about = {"key": self.key, "bill": json.dumps(bill), "notes": json.dumps(self.notes)}
        if x.is_complex():
            x, about = torch.view_as_real(x), about | {"complex": "the last axis is real and imaginary part"}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as aside:
            save_file({"frames": x.contiguous()}, aside, about)


def fingerprint(*things: object) -> str:
    """The SHA-256 of tensors, networks, records and mappings of them, and of the text of anything else."""
    found = hashlib.sha256()

    def take(thing: object) -> None:
        if isinstance(thing, Tensor):
            plain = torch.view_as_real(thing.resolve_conj()) if thing.is_complex() else thing
            found.update(f"{thing.dtype}{tuple(thing.shape)}".encode())
            found.update(plain.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(thing, nn.Module):
            take(thing.state_dict())
        elif isinstance(thing, Mapping):
            for name, value in thing.items():
                found.update(f"{name}:".encode())
                take(value)
        elif is_dataclass(thing):
            found.update(type(thing).__name__.encode())
            take({field.name: getattr(thing, field.name) for field in fields(thing)})
        elif isinstance(thing, list | tuple):
            take(dict(enumerate(thing)))
        else:
            found.update(repr(thing).encode())

    take(things)
    return found.hexdigest()
