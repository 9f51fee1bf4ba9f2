"""How far a prior errs, measured once and kept beside its weights, so that no virtual people are rendered to use it.

errors.json    {"sha256": of the weights, "errors": {name: `ErrorModel.to_dict`}}; the first are the prior's own
               "organ": a readout of its features (`companion.evaluation.organ`), where it has one
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from companion.diffusion.recalibration import ErrorModel
from companion.files import atomic_write
from companion.models.checkpoint import describe, resolve
from companion.models.folder import ERRORS


def save_errors(name: str | os.PathLike, errors: Mapping[str, ErrorModel], default: str | None = None) -> Path:
    """The file errors.json of a checkpoint, written whole. The first of `errors` is that of the prior's own people.

    What else it said of the same weights stays.
    """
    path, sha256 = resolve(name, default) / ERRORS, describe(name, default)["sha256"]
    try:
        before = _read(path, name, default)
    except (FileNotFoundError, ValueError):  # of other weights, or damaged
        before = {}
    plain = before | {"sha256": sha256, "errors": {k: rounded(e.to_dict()) for k, e in errors.items()}}
    return _write(path, plain)


def save_organ(name: str | os.PathLike, organ: Mapping, default: str | None = None) -> Path:
    """The file errors.json of a checkpoint, which now says how to tell by the prior's features what it learnt from.

    Raises FileNotFoundError and ValueError as `load_errors`: a prior's own error is measured first.
    """
    path = resolve(name, default) / ERRORS
    return _write(path, _read(path, name, default) | {"organ": rounded(dict(organ))})


def _write(path: Path, plain: Mapping) -> Path:
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(plain) + "\n")
    return path


def load_errors(name: str | os.PathLike, default: str | None = None) -> dict[str, ErrorModel]:
    """The error models of a checkpoint by name, the prior's own people first.

    Raises FileNotFoundError when none were measured, ValueError when they belong to other weights or are damaged.
    """
    path = resolve(name, default) / ERRORS
    return {key: ErrorModel.from_dict(value) for key, value in _read(path, name, default)["errors"].items()}


def organ_of(name: str | os.PathLike, default: str | None = None) -> dict | None:
    """The readout of a prior as it is stored (`evaluation.organ.known_to`); None where it has none, or no errors.json.

    Raises ValueError as `load_errors`.
    """
    path = resolve(name, default) / ERRORS
    return _read(path, name, default).get("organ") if path.exists() else None


def _read(path: Path, name: str | os.PathLike, default: str | None) -> dict:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: the error of {name} was not measured; tools/prior_errors.py does it"
        )
    try:
        plain = json.loads(path.read_text())
        owner, plain["errors"] = plain["sha256"], dict(plain["errors"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); measure it again") from error
    if owner != describe(name, default)["sha256"]:
        raise ValueError(f"{path} was measured with other weights than those beside it; measure it again")
    return plain


def for_pixels(errors: Mapping[str, ErrorModel], pixel_mm: float | None) -> dict[str, ErrorModel]:
    """The same models, those first that were measured at pixels nearest to `pixel_mm`; as they are for None.

    A head of large pixels is small and has more edges to err at: the scan's own size says more of that than its data.
    Models that name no size stay behind those that do, as they were.
    """
    if pixel_mm is None:
        return dict(errors)

    def away(model: ErrorModel) -> float:
        if model.pixel_mm is None:
            return math.inf
        low, high = model.pixel_mm
        return max(math.log(low / pixel_mm), math.log(pixel_mm / high), 0)

    return dict(sorted(errors.items(), key=lambda item: away(item[1])))


def rounded(plain):
    """The same structure with numbers of six significant digits."""
    if isinstance(plain, dict):
        return {key: rounded(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [rounded(value) for value in plain]
    return float(f"{plain:.6g}") if isinstance(plain, float) else plain
