"""The ledger itself: folders of golden data, cases, handlers, comparison, table. Knows no paper."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

TEXT = (
    "about",
    "title",
    "note",
    "format",
    "torch",
    "numpy",
    "made_by",
    "made_with",
    "tolerance",
    "tolerances",
)


@dataclass(frozen=True)
class Check:
    """One row: a quantity of a case, how far ours is from the reference, and how far it may be."""

    case: str
    quantity: str
    error: float
    tolerance: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


class Tensors(Mapping):
    """Tensors by name that remember which of them were read, so that none is forgotten in silence."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors, self.seen = tensors, set()

    def __getitem__(self, name: str) -> Tensor:
        self.seen.add(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def unread(self) -> list[str]:
        return [name for name in self.tensors if name not in self.seen]


class Folder:
    """A folder of golden data: manifest.json and the files it names."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = self.path / "manifest.json"
        if not manifest.is_file():
            raise FileNotFoundError(f"{manifest} does not exist; FOLDER must hold golden data and its manifest.json")
        try:
            self.manifest = json.loads(manifest.read_text())
        except json.JSONDecodeError as problem:
            raise ValueError(f"{manifest} is not JSON: {problem}") from problem
        self.loaded: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def cases(self) -> dict[str, "Case"]:
        """Every entry of every section of the manifest (`cases`, `files`, ...); JSON files are read in."""
        cases = {}
        for section, entries in self.manifest.items():
            if not isinstance(entries, dict) or section in (*TEXT, "conventions"):
                continue
            for name, spec in entries.items():
                if isinstance(spec, str) and spec.endswith(".json"):
                    spec = {"file": spec, **json.loads((self.path / spec).read_text())}
                if not isinstance(spec, dict):
                    spec = {"value": spec}
                cases[name] = Case(self, name, {"section": section, "file": name} | spec)
        return cases

    def tensors(self, file: str) -> dict[str, Tensor]:
        """All tensors of a safetensors or npz file, by the names they have in it."""
        if file not in self.loaded:
            path = self.path / file
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    self.loaded[file] = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays}
            else:
                self.loaded[file] = load_file(path)
        return self.loaded[file]

    def tolerance(self, default: float = 1e-4) -> float:
        """The number after "rtol" in the manifest's tolerance, which holds for rtol and atol."""
        found = re.search(r"rtol\s*([0-9.]+(?:e-?\d+)?)", str(self.manifest.get("tolerance", "")))
        return float(found[1]) if found else default


@dataclass
class Case:
    """One case: its name and what the manifest says of it."""

    folder: Folder
    name: str
    spec: dict

    @cached_property
    def io(self) -> Tensors:
        """Inputs and outputs by name, without their prefix."""
        return Tensors(self.strip(self.spec.get("io_prefix", "io.")) or self.strip(""))

    def weights(self) -> dict[str, Tensor]:
        """The state_dict, in float32 (stored as float16 that are exact)."""
        return {name: w.float() for name, w in self.strip(self.spec.get("param_prefix", "param.")).items()}

    def strip(self, prefix: str) -> dict[str, Tensor]:
        tensors = self.folder.tensors(self.spec["file"])
        return {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Handler:
    """run(case) yields (quantity, ours, reference) or (quantity, ours, reference, tolerance)."""

    accepts: Callable[[Case], bool]
    run: Callable[[Case], Iterator[tuple]]


HANDLERS: list[Handler] = []


def handles(accepts: Callable[[Case], bool]):
    """Registers a generator of comparisons for cases that `accepts` recognises by what the manifest says."""

    def register(run):
        HANDLERS.append(Handler(accepts, run))
        return run

    return register


def error(ours, reference) -> tuple[float, str]:
    """max |ours - reference| / (1 + |reference|), infinite with a reason where the two cannot be compared.

    An error <= e is the same as allclose with rtol = atol = e.
    """
    ours, reference = torch.as_tensor(ours), torch.as_tensor(reference)
    if ours.shape != reference.shape:
        return math.inf, f"shape {tuple(ours.shape)}, not {tuple(reference.shape)}"
    if not reference.numel():
        return math.inf, "empty"
    wide = torch.complex128 if ours.is_complex() or reference.is_complex() else torch.float64
    ours, reference = ours.to(wide), reference.to(wide)
    worst = ((ours - reference).abs() / (1 + reference.abs())).max().item()
    return (worst, "") if math.isfinite(worst) else (math.inf, "not finite")


def run_case(case: Case) -> list[Check]:
    """The checks of one case; at least one."""
    handler = next((h for h in HANDLERS if h.accepts(case)), None)
    if handler is None:
        return [Check(case.name, "-", math.inf, 0.0, "no handler for this case")]
    checks = []
    try:
        for quantity, ours, reference, *tolerance in handler.run(case):
            worst, reason = error(ours, reference)
            limit = tolerance[0] if tolerance else case.folder.tolerance()
            checks.append(Check(case.name, quantity, worst, limit, reason))
        if "io" in vars(case):
            checks += [Check(case.name, name, math.inf, 0.0, "not compared") for name in case.io.unread]
    except Exception as problem:  # a ledger reports, whatever goes wrong
        text = " ".join(f"{type(problem).__name__}: {problem}".split())
        checks.append(Check(case.name, "-", math.inf, 0.0, text[:300]))
    return checks or [Check(case.name, "-", math.inf, 0.0, "nothing was compared")]


def run(folder: Folder) -> list[Check]:
    """The checks of every case of a folder; a manifest without cases is a failure too."""
    checks = [check for case in folder.cases.values() for check in run_case(case)]
    return checks or [Check(str(folder.path), "-", math.inf, 0.0, "the manifest names no cases")]


def table(checks: list[Check]) -> str:
    """Aligned rows of case, quantity, error, tolerance, verdict, and the last line `N passed, N failed`."""
    rows = [("case", "quantity", "error", "tolerance", "verdict")]
    for c in checks:
        verdict = "pass" if c.passed else f"FAIL {c.reason}".rstrip()
        rows.append((c.case, c.quantity, f"{c.error:.1e}", f"{c.tolerance:.0e}", verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]) for row in rows]
    passed = sum(c.passed for c in checks)
    return "\n".join([*lines, f"{passed} passed, {len(checks) - passed} failed"])
