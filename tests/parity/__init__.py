"""Parity ledger: our numbers beside those of the published codes, case by case.

`python -m tests.parity FOLDER` reads FOLDER/manifest.json, hands every case to the handler that its
description asks for, and prints what was compared. A case without a handler and a tensor that was not
compared count as failed. A paper is one module of handlers, imported here.
"""

from . import aid, latent3d, lmi, pet, pet_networks  # noqa: F401  (register their handlers)
from .ledger import Check, Folder, run, table

__all__ = ["Check", "Folder", "run", "table"]
