"""A PET scan of one's own as sinograms in a file, and the writer of such files; one clear error each.

    write_sinograms("my_scan.npz", counts, factors=factors, geometry=Geometry(192, 160, 3.375), units="kBq/mL")
    scan = read_sinograms("my_scan.npz")
    y, A, background = scan.emission(Projector(scan.geometry.beam(64, 3.5)))

Geometry, units and dose lie in a JSON file of the same name, my_scan.json, which may name arrays of other types too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.data.intake.records import Description, Unreadable
from companion.data.interfile import read_sinogram
from companion.data.npz import read_npz
from companion.data.scan_geometry import UNITS, Dosage, Geometry
from companion.files import atomic_write
from companion.operators.linear import Diagonal, LinearOperator

FORMAT = "companion-pet-scan-1"
ARRAYS = ("counts", "factors", "background", "blank")
ABOUT = ("format", "geometry", "units", "slice_mm", "weight_kg", "dose_MBq", "uptake_min", "half_life_min", "arrays")
SEEN = 50  # counts in both neighbours of a bin or an angle: by chance it would not be empty itself
SOME = 50  # bins with counts, which do not share a divisor by chance
LARGEST = 2**33  # bytes of an array that cannot be right
UNKNOWN = Dosage()


@dataclass(frozen=True, eq=False)
class Sinograms:
    """The arrays of a file, and what it says of them.

    counts (slice, angle, bin), raw and whole; factors, broadcastable to them, the counts that one unit of activity
    gives per mm of a line (of an emission scan); background, the expected counts of randoms and scatter; blank, the
    expected counts without a body (of a transmission scan). slice_mm: from each slice to the next, if they
    follow one another. It, geometry and units are None or "" where the file does not say.
    """

    path: Path
    arrays: Mapping[str, np.ndarray] = field(repr=False)
    geometry: Geometry | None = None
    units: str = ""
    dosage: Dosage = UNKNOWN
    slice_mm: float | None = None

    def emission(self, P: LinearOperator, units: str | None = None) -> tuple[Tensor, LinearOperator, Tensor | None]:
        """Counts y (slice, 1, angle, bin), the model A = factors * P of activity in kBq/mL, and the background or None.

        P: the projector of the scanner, whose range is (1, angle, bin). units: of the activity that factors are for,
        where the file does not say. Raises Unreadable for arrays that are missing, of another geometry, slices without
        counts above the background, counts in bins in which the model allows none, dead bins that the factors do not
        know, and units that nobody says.
        """
        y, given = self._fitted(P, "factors")
        if not given["factors"].any():
            raise Unreadable(
                self.path, "all factors are 0, so nothing would ever be counted; give calibration times attenuation"
            )
        A = Diagonal((given["factors"] / self.kbq(units)).contiguous(), P.range_shape) @ P
        _check_model(self.path, y, A, given.get("background"))
        return y, A, given.get("background")

    def transmission(self, P: LinearOperator) -> tuple[Tensor, Tensor, Tensor | None]:
        """Counts (slice, 1, angle, bin) of a transmission scan, the blank scan and the background or None, as y.

        Raises Unreadable as `emission`, and for counts where blank and background are 0.
        """
        y, given = self._fitted(P, "blank")
        background = given.get("background")
        allowed = given["blank"] if background is None else given["blank"] + background
        if wrong := int(((y > 0) & (allowed <= 0)).sum()):
            raise Unreadable(self.path, f"counts in {wrong} bins where the blank scan has none; set them to 0 if dead")
        return y, given["blank"].contiguous(), background

    def kbq(self, units: str | None = None) -> float:
        """The kBq/mL that are 1 in the units of the file, or those given where it has none; Unreadable if nobody says.

        Raises Unreadable too where both say and differ.
        """
        if units and self.units and units != self.units:
            raise Unreadable(self.path, f"its activity is in {self.units}, but units={units!r} was asked for")
        if not (units or self.units):
            raise Unreadable(
                self.path,
                f"does not say which units of activity its factors are for; give units, one of {', '.join(UNITS)} "
                "(counts: not calibrated)",
            )
        try:
            return self.dosage.kbq(units or self.units)
        except ValueError as error:
            raise Unreadable(self.path, str(error)) from error

    def _fitted(self, P: LinearOperator, needed: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Counts and the other arrays in their shape, checked against a projector."""
        if missing := [name for name in ("counts", needed) if name not in self.arrays]:
            kind = "emission" if needed == "factors" else "transmission"
            raise Unreadable(
                self.path, f"holds {', '.join(self.arrays) or 'nothing'} but not {', '.join(missing)}: no {kind} scan"
            )
        y = _counts(self.path, self.arrays["counts"], tuple(P.range_shape), self.geometry)
        rest = {n: _expanded(self.path, n, v, y) for n, v in self.arrays.items() if n != "counts"}
        above = y.double().flatten(1).sum(1)
        if "background" in rest:
            above = above - rest["background"].double().flatten(1).sum(1)
        if empty := torch.nonzero(above <= 0).flatten().tolist():
            raise Unreadable(self.path, f"slices {empty} are empty: no counts above the background; leave them out")
        return y, rest


def read_sinograms(path: str | os.PathLike, about: str | os.PathLike | None = None) -> Sinograms:
    """The sinograms of an .npz of plain arrays, of a JSON file that names arrays, or of an Interfile header (.hs).

    about: the JSON file of geometry and units; by default the .json of the same name, where there is one. Its "arrays"
    may name .npy and .hs files, or raw ones with their type: {"counts": {"file": "prompts.raw", "dtype": ">i2"}}. A .hs
    has the counts and their geometry; the JSON file beside it names factors and background.
    Raises FileNotFoundError, or Unreadable for what is damaged, NaN, negative, no real numbers, or not whole.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give an .npz with counts and factors, or its .json")
    beside = path.with_suffix(".json")
    about = Path(about) if about else beside if beside.is_file() else None
    said, geometry = read_about(about) if about else {}, None
    if path.suffix.lower() == ".json":
        if not said.get("arrays"):
            raise Unreadable(path, 'names no "arrays"; give the .npz beside it, or add them')
        loaded = {name: _array(path, name, where, said) for name, where in said["arrays"].items()}
    elif path.suffix.lower() == ".hs":
        loaded, geometry = _interfile(path, said)
    else:
        loaded = read_npz(path)
    arrays = {name: _numbers(path, name, loaded[name]) for name in ARRAYS if name in loaded}
    if not arrays:
        raise Unreadable(path, f"holds {', '.join(loaded) or 'nothing'} but not counts, factors")
    dosage = {f: said[f] for f in Dosage.__dataclass_fields__ if said.get(f) is not None}
    try:
        person, geometry = Dosage(**dosage), Geometry.of(said["geometry"]) if said.get("geometry") else geometry
    except (ValueError, TypeError) as error:
        raise Unreadable(about or path, str(error)) from error
    return Sinograms(path, arrays, geometry, said.get("units") or "", person, said.get("slice_mm"))


def read_about(path: str | os.PathLike) -> dict:
    """The JSON file of a scan: geometry, units and person; Unreadable for another file, or names that are unknown."""
    path = Path(path)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; give the geometry file of the scan") from None
    except (ValueError, OSError) as error:
        raise Unreadable(path, f"not a readable JSON file ({error})") from error
    if not isinstance(said, dict) or said.get("format") != FORMAT:
        raise Unreadable(path, f'not the geometry file of a PET scan: it has no "format": "{FORMAT}"')
    if unknown := [name for name in said if name not in ABOUT]:
        raise Unreadable(path, f"{', '.join(unknown)} unknown; it takes {', '.join(ABOUT)}")
    if said.get("units") not in (None, "", *UNITS):
        raise Unreadable(path, f"units {said['units']!r} are unknown; use one of {', '.join(UNITS)}")
    for name in ("geometry", "arrays"):
        if not isinstance(said.get(name) or {}, dict):
            raise Unreadable(path, f"{name} must be names with values, got {said[name]!r}")
    for name in ("slice_mm", *Dosage.__dataclass_fields__):
        value = said.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise Unreadable(path, f"{name} must be a number that is not negative, got {value!r}")
    return said


def write_sinograms(
    path: str | os.PathLike,
    counts,
    *,
    geometry: Geometry,
    units: str = "",
    factors=None,
    background=None,
    blank=None,
    slice_mm: float | None = None,
    dosage: Dosage = UNKNOWN,
) -> Path:
    """The path of the .npz written, with its .json beside it: what `read_sinograms` reads.

    counts (slice, angle, bin) or (angle, bin), whole; factors, the counts that one of `units` gives per mm of a line,
    or blank, the expected counts without a body. slice_mm: from each slice to the next, if they follow one another.
    Raises ValueError for arrays that do not fit each other.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path.name}: a scan is written as .npz")
    given = {"counts": counts, "factors": factors, "background": background, "blank": blank}
    arrays = {n: _numbers(path, n, np.asarray(v)) for n, v in given.items() if v is not None}
    y = _counts(path, arrays["counts"], (1, geometry.angles, geometry.bins), geometry)
    for name, value in arrays.items():
        _expanded(path, name, value, y)
    if ("factors" in arrays) == ("blank" in arrays):
        raise ValueError("give factors (an emission scan) or blank (a transmission scan), one of them")
    if units not in (("",) if blank is not None else UNITS):
        raise ValueError(f"units {units!r} of activity; an emission scan takes one of {', '.join(UNITS)}, others none")
    person = {k: v for k, v in asdict(dosage).items() if v}
    about = {"format": FORMAT, "geometry": asdict(geometry), "units": units or None, "slice_mm": slice_mm} | person
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as aside:
        whole = arrays["counts"].astype(np.int64)
        stored: dict[str, Any] = dict(arrays) | {"counts": whole}
        np.savez_compressed(aside, **stored)
    with atomic_write(path.with_suffix(".json")) as aside:
        aside.write_text(json.dumps({k: v for k, v in about.items() if v is not None}, indent=2) + "\n")
    return path


def sniff_sinograms(path: str | os.PathLike) -> Description | None:
    """What a scan file is, for `companion look`; None for other .npz and .json files."""
    path = Path(path)
    if path.suffix.lower() == ".json" and f'"{FORMAT}"'.encode() not in path.read_bytes()[:4096]:
        return None
    if path.suffix.lower() == ".npz" and "counts" not in read_npz(path):
        return None
    scan = read_sinograms(path)
    if "counts" not in scan.arrays:
        raise Unreadable(path, f"holds {', '.join(scan.arrays)} but no counts")
    counts = scan.arrays["counts"]
    kind = "transmission" if "blank" in scan.arrays else "emission"
    axes = {2: ("angle", "bin"), 3: ("slice", "angle", "bin")}.get(counts.ndim, tuple(f"axis {i}" for i in range(9)))
    about = {
        "scan": kind,
        "counts": float(counts.sum()),
        "with": ", ".join(n for n in scan.arrays if n != "counts"),
        "geometry": str(scan.geometry or "not said: give it by parameters or in a .json of this name"),
    }
    units = "" if kind == "transmission" else scan.units or "units not said"
    return Description(
        "sinogram", "PET sinograms", axes[: counts.ndim], counts.shape, None, str(counts.dtype), units, "PET",
        parts=(path.with_suffix(".json"),) if path.suffix == ".npz" and path.with_suffix(".json").is_file() else (),
        about=about,
    )  # fmt: skip


def report_scan(path: str | os.PathLike, about: str | os.PathLike | None = None) -> str:
    """What `companion look` says of a scan whose geometry file lies elsewhere; raises as `read_sinograms`."""
    scan = read_sinograms(path, about)
    return (
        f"{scan.path}: {scan.units or 'units not said'}; {scan.geometry or 'no geometry'}\n{read_item([path], about)}"
    )


def read_item(files, about: str | os.PathLike | None = None, frame: int | None = None) -> str:
    """What the values of a scan file say, for `companion look`, which see: whether its counts fit its geometry."""
    scan = read_sinograms(files[0], about)
    y = scan.arrays["counts"]
    text = f"{y.sum():.6g} counts, {y.max():g} in the fullest bin, {100 * (y == 0).mean():.0f} % of bins are empty"
    if scan.geometry is not None:
        shape = (1, scan.geometry.angles, scan.geometry.bins)
        _counts(scan.path, y, shape, scan.geometry)
    return text


# ------------------------------------------------------------------------------------------------------------- checks


def _array(path: Path, name: str, where, said: Mapping) -> np.ndarray:
    """An array that a geometry file names: .npy, Interfile, or raw numbers of a stated type, shaped as the geometry."""
    where = {"file": where} if isinstance(where, str) else where
    if not isinstance(where, dict) or not isinstance(where.get("file"), str) or set(where) - {"file", "dtype"}:
        raise Unreadable(path, f'{name}: expected a file\'s name or {{"file": ..., "dtype": ...}}, got {where!r}')
    file = path.parent / where["file"]
    if Path(where["file"]).name != where["file"]:
        raise Unreadable(path, f"{name} is in {where['file']!r}; only files beside the geometry file are read")
    if not file.is_file():
        raise Unreadable(path, f"{name} is in {where['file']}, which is not there")
    if file.suffix == ".npy":
        try:
            return np.load(file, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise Unreadable(file, f"not a readable array ({error})") from error
    if file.suffix == ".hs":
        return read_sinogram(file)[0]
    try:
        dtype = np.dtype(where.get("dtype") or "")
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in "iuf" or not where.get("dtype"):
        raise Unreadable(path, f"{name}: raw numbers need a dtype such as '>i2' or '<f4', got {where.get('dtype')!r}")
    geometry = said.get("geometry") or {}
    shape = (int(geometry.get("angles") or 0), int(geometry.get("bins") or 0))
    one, size = dtype.itemsize * shape[0] * shape[1], file.stat().st_size
    if not one or size % one or not 0 < size < LARGEST:
        raise Unreadable(file, f"{size} bytes are no whole number of {shape[0]} x {shape[1]} sinograms of {dtype}")
    values = np.fromfile(file, dtype).reshape(-1, *shape)
    return values[0] if len(values) == 1 else values


def _interfile(path: Path, said: Mapping) -> tuple[dict[str, np.ndarray], Geometry]:
    """Counts and geometry of an Interfile header, and the arrays that the JSON file beside it names."""
    counts, geometry = read_sinogram(path)
    shape = {"geometry": asdict(geometry)}
    rest = {n: _array(path, n, where, shape) for n, where in (said.get("arrays") or {}).items() if n != "counts"}
    return {"counts": counts} | rest, geometry


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


def _counts(path: Path, value: np.ndarray, shape: tuple[int, ...], geometry: Geometry | None) -> Tensor:
    if value.ndim > 3 and value.shape[1] != 1 or (geometry is not None and geometry.tof_bins > 1):
        raise Unreadable(
            path,
            f"counts of shape {value.shape}: time-of-flight (or 3D) data, but this model has neither TOF bins nor "
            "oblique planes; sum over the TOF bins and rebin to slices (`reconstruction.rebinning`) first",
        )
    value = value[None] if value.ndim == 2 else value
    value = value[:, None] if value.ndim == 3 else value
    angles, bins = shape[-2:]
    if value.ndim != 4 or value.shape[1:] != shape:
        turned = value.ndim == 4 and value.shape[1:] == (1, bins, angles)
        other = "; it is of another scanner: give its geometry, by parameters or in a .json beside the file"
        raise Unreadable(
            path,
            f"counts of shape {tuple(np.squeeze(value).shape)}, but this geometry measures {angles} angles x {bins} "
            f"bins{'; angles and bins are exchanged' if turned else other}",
        )
    if not np.array_equal(value, np.rint(value)):
        raise Unreadable(
            path,
            "counts must be whole numbers: scaled or corrected data are not Poisson; give the raw counts, and the "
            "corrections as factors of the model",
        )
    step = np.gcd.reduce(value[value > 0].astype(np.int64), initial=0)
    if 1 < step < value.max() and (value > 0).sum() >= SOME:
        raise Unreadable(path, f"all counts are multiples of {step}, so they were scaled; give the raw counts")
    return torch.from_numpy(value.astype(np.float32))


def _expanded(path: Path, name: str, value: np.ndarray, y: Tensor) -> Tensor:
    found = torch.from_numpy(value.astype(np.float32))
    try:
        found = found[:, None] if found.ndim == 3 else found
        return found.expand(y.shape)
    except RuntimeError as error:
        raise Unreadable(path, f"{name} of shape {tuple(found.shape)} must fit counts {tuple(y.shape)}") from error


def _check_model(path: Path, y: Tensor, A: LinearOperator, background: Tensor | None) -> None:
    """Refuse counts where neither activity nor background could make any, and dead bins that look alive."""
    allowed = A(torch.ones(len(y), *A.domain_shape))
    allowed = allowed if background is None else allowed + background
    if wrong := int(((y > 0) & (allowed <= 0)).sum()):
        raise Unreadable(
            path,
            f"counts in {wrong} bins where the model allows none: factors (and background) are 0 there, or no line "
            "crosses the image; set these counts to 0 if the bins are dead, give their factors, or a larger image",
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
