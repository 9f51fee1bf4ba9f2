"""A scan of one's own as sinograms in an .npz: counts, the factors of its model, background; one clear error each."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from companion.data.intake.records import Unreadable
from companion.data.npz import read_npz
from companion.operators.linear import Diagonal, LinearOperator

SEEN = 50  # counts in both neighbours of a bin or an angle: by chance it would not be empty itself


def read_sinograms(path: str | os.PathLike, P: LinearOperator) -> tuple[Tensor, LinearOperator, Tensor | None]:
    """Return counts y (slice, 1, angle, bin), their model A = factors * P, and the background or None.

    The file holds plain arrays: counts (slice, angle, bin) or (angle, bin), raw and whole; factors, broadcastable to
    them, the counts that one unit of activity gives per mm of a line; background (optional), the expected counts of
    randoms and scatter. P: the projector of the scanner, whose range is (1, angle, bin).
    Raises FileNotFoundError, or Unreadable for arrays that are missing, no real numbers, NaN, negative, of another
    geometry, for counts that are not whole, for slices without counts above the background, for counts in bins in which
    the model allows none, and for dead bins that the factors do not know.
    """
    path = Path(path)
    arrays = read_npz(path)
    if missing := [name for name in ("counts", "factors") if name not in arrays]:
        raise Unreadable(path, f"holds {', '.join(arrays) or 'nothing'} but not {', '.join(missing)}")
    used = {name: _numbers(path, name, arrays[name]) for name in ("counts", "factors", "background") if name in arrays}
    y = _counts(path, used.pop("counts"), tuple(P.range_shape))
    given = {name: _expanded(path, name, value, y) for name, value in used.items()}
    if not given["factors"].any():
        raise Unreadable(
            path, "all factors are 0, so nothing would ever be counted; give calibration times attenuation"
        )
    A = Diagonal(given["factors"].contiguous(), P.range_shape) @ P
    background = given.get("background")
    _check_model(path, y, A, background)
    return y, A, background


def _numbers(path: Path, name: str, value: np.ndarray) -> np.ndarray:
    if value.dtype.kind not in "fiub":
        raise Unreadable(path, f"{name} of type {value.dtype}; expected real numbers")
    value = np.asarray(value, np.float64)
    if bad := int((~np.isfinite(value)).sum()):
        hint = "give factors of 0 for dead bins" if name != "background" else "give 0 where none is expected"
        raise Unreadable(path, f"{name}: {bad} of {value.size} values are NaN or infinite; {hint}")
    if (value < 0).any():
        hint = " (with randoms or scatter subtracted?); give the raw counts, and the corrections as background"
        raise Unreadable(path, f"{name} must not be negative, got {value.min():.4g}{hint if name == 'counts' else ''}")
    return value


def _counts(path: Path, value: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    value = value[None] if value.ndim == 2 else value
    value = value[:, None] if value.ndim == 3 else value
    angles, bins = shape[-2:]
    if value.ndim != 4 or value.shape[1:] != shape:
        turned = value.ndim == 4 and value.shape[1:] == (1, bins, angles)
        hint = "; angles and bins are exchanged" if turned else "; it is of another scanner, or image_size is another"
        raise Unreadable(
            path,
            f"counts of shape {tuple(np.squeeze(value).shape)}, but this geometry measures {angles} angles x {bins} "
            f"bins{hint}",
        )
    if not np.array_equal(value, np.rint(value)):
        raise Unreadable(
            path,
            "counts must be whole numbers: scaled or corrected data are not Poisson; give the raw counts, and the "
            "corrections as factors of the model",
        )
    return torch.from_numpy(value.astype(np.float32))


def _expanded(path: Path, name: str, value: np.ndarray, y: Tensor) -> Tensor:
    value = torch.from_numpy(value.astype(np.float32))
    try:
        value = value[:, None] if value.ndim == 3 else value
        return value.expand(y.shape)
    except RuntimeError as error:
        raise Unreadable(path, f"{name} of shape {tuple(value.shape)} must fit counts {tuple(y.shape)}") from error


def _check_model(path: Path, y: Tensor, A: LinearOperator, background: Tensor | None) -> None:
    """Refuse slices without signal, and counts where neither activity nor background could make any."""
    above = y.double().flatten(1).sum(1) - (0 if background is None else background.double().flatten(1).sum(1))
    if empty := torch.nonzero(above <= 0).flatten().tolist():
        raise Unreadable(path, f"slices {empty} are empty: no counts above the background; leave them out")
    allowed = A(torch.ones(len(y), *A.domain_shape))
    allowed = allowed if background is None else allowed + background
    if wrong := int(((y > 0) & (allowed <= 0)).sum()):
        raise Unreadable(
            path,
            f"counts in {wrong} bins where the model allows none: factors (and background) are 0 there, or no line "
            "crosses the image; set these counts to 0 if the bins are dead, or give their factors",
        )
    for axis, what in ((-1, "bins"), (-2, "angles")):
        total = y.double().sum([0, 1, -3 - axis])
        modelled = allowed.double().sum([0, 1, -3 - axis]) > 0
        beside = torch.minimum(total.roll(1), total.roll(-1))
        beside[[0, -1]] = 0
        if dead := torch.nonzero((total == 0) & modelled & (beside >= SEEN)).flatten().tolist():
            raise Unreadable(
                path,
                f"{what} {', '.join(map(str, dead[:8]))} counted nothing between {what} that counted {SEEN} and more: "
                "dead detectors of which the factors do not know; set their factors to 0",
            )
