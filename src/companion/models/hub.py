"""The way to the Hugging Face Hub and back, in the hub's own words. (`weights.load` reads hub checkpoints too.)"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import ModelHubMixin
from torch import nn

from companion.models import registry
from companion.models.checkpoint import load, resolve
from companion.models.folder import CARD, CONFIG, MODEL, RECORD

FILES = (MODEL, CONFIG, RECORD, CARD)


class HubModel(nn.Module, ModelHubMixin):
    """Any model of this package in Hugging Face's three words: from_pretrained, save_pretrained, push_to_hub.

        HubModel("runs/prior").push_to_hub("owner/name")
        D = HubModel.from_pretrained("owner/name", revision="main").model     # or load("hf:owner/name")

    What travels is the checkpoint folder, hash included.
    """

    def __init__(self, name: str | os.PathLike, device: str | torch.device = "cpu"):
        super().__init__()
        self.folder, self.model = resolve(name), load(name, device)

    def forward(self, *args, **options):
        return self.model(*args, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        for file in FILES:
            if (self.folder / file).exists():
                shutil.copyfile(self.folder / file, save_directory / file)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, revision: str | None, **model_kwargs) -> HubModel:
        options = {key: model_kwargs[key] for key in ("device",) if key in model_kwargs}
        if Path(model_id).is_dir():
            return cls(model_id, **options)
        return cls(f"hf:{model_id}" + (f"@{revision}" if revision else ""), **options)


def push(name: str | os.PathLike, repo: str, private: bool = False) -> str:
    """The address of the commit that put a checkpoint, checked first, into a hub repository (made if need be).

    Raises ValueError for a checkpoint that cannot be loaded, PermissionError without a login.
    """
    with registry.explained(str(name), repo, "main"):
        return str(HubModel(name).push_to_hub(repo, private=private))
