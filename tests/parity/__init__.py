"""Parity ledger: our numbers beside those of the published codes, case by case.

`python -m tests.parity FOLDER` reads FOLDER/manifest.json, hands every case to the handler that its description asks
for, and prints what was compared. A case that nobody handles, and a tensor that nobody compared, count as failed.
"""

from . import aid  # noqa: F401  (registers its handlers)
from .ledger import Check, Folder, run, table

__all__ = ["Check", "Folder", "run", "table"]
