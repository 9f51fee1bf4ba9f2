"""Run folders: results that appear whole or not at all, and `run.json`, the proof that a run is done.

`run.json` is written last. It holds the parameters, seed, code and package versions, device, the hashes of
what was read and of every result, the times and the bill. A folder without it is not a finished run.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import companion
from companion.files import atomic_write, code_version, project_root, sha256
from companion.parameters import P, resolve

MANIFEST = "run.json"
NOTEBOOK = "notebook.ipynb"
IMAGES = "companion-images-1"  # the format of Run.images
VERSION = "COMPANION_VERSION"  # set by the runner: a kernel with another companion stops at once
EXECUTION = "COMPANION_EXECUTION"  # set by the runner: a manifest without this mark is from another run
ORIGIN = "COMPANION_ORIGIN"  # set by the runner: the notebook, and the cell of a grid, as JSON


def begin(form: type[P], namespace: Mapping[str, Any], *, paper: str, stage: str) -> tuple[P, Run]:
    """The checked parameters of a notebook and its run; the line after its imports:

        p, run = begin(StartHere, globals(), paper="brain", stage="start_here")

    Prints the parameters. Raises what `parameters.resolve` and `Run.start` raise.
    """
    p = resolve(form, namespace)
    return p, Run.start(p, paper=paper, stage=stage)


class Run:
    """A run in progress: collects the results of one notebook in one folder.

    run = Run.start(p, paper="brain", stage="start_here")     # `begin` does this
    run.figure(fig, "overview", alt="Four reconstructions of one slice ...")
    run.metrics({"psnr_db": 31.2})
    run.finish()
    """

    def __init__(self, folder: Path, record: dict[str, Any]):
        self.folder = folder
        self._record = record
        self._metrics: dict[str, Any] = {}
        self._results: dict[str, dict] = {}

    @classmethod
    def start(cls, p, *, paper: str, stage: str) -> Run:
        """A run in folder `p.out` (relative to the project), cleared of a former run's results.

        p: the resolved Parameters. Raises ValueError when `p.out` cannot be a folder, RuntimeError in a process
        that a runner of another version started.
        """
        wanted = os.environ.get(VERSION, companion.__version__)
        if wanted != companion.__version__:
            raise RuntimeError(
                f"this kernel has companion {companion.__version__} ({companion.__file__}), the runner has {wanted}: "
                "two versions are installed; look at PYTHONPATH and sys.path, and keep one"
            )
        folder = project_root() / p.out
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"out is {p.out}, which is a file; name a folder")
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        return cls(
            folder,
            {
                "paper": paper,
                "stage": stage,
                "parameters": dataclasses.asdict(p),
                "seed": p.seed,
                "device": _device(p.device),
                "code": code_version(),
                "packages": package_versions(),
                "platform": {"system": platform.platform(), "cores": os.cpu_count(), "cpu": processor()},
                "execution": os.environ.get(EXECUTION),
                "origin": json.loads(os.environ.get(ORIGIN, "{}")),
                "start": _now(),
                "inputs": {},
                "bill": {},
            },
        )

    def figure(self, fig, name: str, alt: str, caption: str = "", dpi: int = 150) -> Path:
        """The path of matplotlib figure `fig` saved as `name`.png. `alt` tells what a blind reader misses."""
        if not alt.strip():
            raise ValueError(f"figure {name} has no alt text; say in a sentence what it shows")
        path = self._path(name, ".png")
        with atomic_write(path) as aside:  # no software version inside: same numbers, same file
            fig.savefig(aside, dpi=dpi, bbox_inches="tight", metadata={"Software": None})
        return self.add(path, kind="figure", alt=alt, caption=caption)

    def metrics(self, values: Mapping[str, Any]) -> Path:
        """The path of metrics.json, which holds all values given so far (nested mappings are tables)."""
        self._metrics.update(_plain(values))
        path = self._path("metrics", ".json")
        _write_json(path, self._metrics)
        return self.add(path, kind="metrics")

    def arrays(self, name: str, **arrays) -> Path:
        """The path of `name`.npz holding the named arrays or tensors."""
        import numpy as np

        path = self._path(name, ".npz")
        on_host = {k: v.detach().cpu().numpy() if hasattr(v, "detach") else v for k, v in arrays.items()}
        with atomic_write(path) as aside:
            np.savez_compressed(aside, **on_host)
        return self.add(path, kind="arrays")

    def images(
        self,
        name: str,
        *,
        labels: Mapping[str, Iterable] | None = None,
        voxel_mm=None,
        unit: str = "",
        window: tuple[float, float] | None = None,
        **arrays: tuple[Any, str],
    ) -> Path:
        """The path of `name`.h5: image arrays that belong together, with axes by name, for the gallery's sliders.

            run.images("subject", truth=(x, "z y x"), draws=(xs, "acceleration draw z y x"), voxel_mm=(5, 2, 2),
                       labels={"acceleration": [4, 8]}, unit="signal", window=(0, 1.1))

        arrays: name -> (array or tensor, its axes); single-channel axes may be left out of the names. The gallery knows
        truth, estimate, error, std and draws, and finds estimate, error and std itself where draws and truth are given.
        labels: values along an axis, shown at its slider. voxel_mm: a number or (z, y, x). window: grey levels shown.
        Raises ValueError when axes or labels do not fit, or for NaN.
        """
        import h5py
        import numpy as np

        path, lengths = self._path(name, ".h5"), {}
        with atomic_write(path) as aside, h5py.File(aside, "w") as file:
            for key, (array, axes) in arrays.items():
                array = np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
                for axis in range(array.ndim - 1, -1, -1):
                    if array.ndim > len(axes.split()) and array.shape[axis] == 1:
                        array = array.squeeze(axis)
                if array.ndim != len(axes.split()) or array.ndim < 2 or not np.isfinite(array).all():
                    raise ValueError(
                        f"images {name}: {key} has shape {array.shape} and axes '{axes}'; give one name "
                        "for each axis, at least two axes, and finite numbers"
                    )
                lengths |= dict(zip(axes.split(), array.shape, strict=True))
                stored = file.create_dataset(key, data=array, compression="gzip", compression_opts=1, shuffle=True)
                stored.attrs["axes"] = axes
            labels = {axis: _plain(list(values)) for axis, values in (labels or {}).items()}
            if wrong := [axis for axis, values in labels.items() if lengths.get(axis) != len(values)]:
                raise ValueError(f"images {name}: the labels of {', '.join(wrong)} do not fit an axis of that length")
            voxel_mm = None if voxel_mm is None else np.broadcast_to(voxel_mm, 3).tolist()
            file.attrs["format"] = IMAGES
            file.attrs["about"] = json.dumps(
                {
                    "arrays": list(arrays),
                    "labels": labels,
                    "voxel_mm": voxel_mm,
                    "unit": unit,
                    "window": window and list(window),
                }
            )
        return self.add(path, kind="images")

    def add(self, path: str | os.PathLike, kind: str = "file", **about: str) -> Path:
        """`path`, now listed among the results. It must be a finished file in the run's folder.

        Raises FileNotFoundError when it does not exist, ValueError when it lies outside the folder.
        """
        path = self.folder / path
        if not path.is_file():
            raise FileNotFoundError(f"{path} cannot be listed as a result: it does not exist")
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{path} is outside the run's folder {self.folder}; write results inside it")
        name = path.resolve().relative_to(self.folder.resolve()).as_posix()
        self._results[name] = {"kind": kind, **about}
        return path

    def uses(self, path: str | os.PathLike) -> Path:
        """`path` of data or weights (a file or folder), now recorded with its hash."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist, so the run cannot use it")
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        self._record["inputs"] |= {_relative(f): sha256(f) for f in files}
        return path

    def weights(self, *names: str, default: str | None = None) -> None:
        """Record the checkpoints of these names with their hashes, and print where each comes from.

        default: what the name "embedded" means.
        """
        from companion.models.checkpoint import (
            describe_source,  # here: torch, which a run without weights does not need
        )

        for name in names:
            source = describe_source(name, default)
            self.uses(source.path.parent)
            print(source)

    def checkpoint(self, folder: str | os.PathLike) -> None:
        """List the files of a checkpoint that was written inside the run's folder among its results."""
        for file in sorted(Path(folder).iterdir()):
            self.add(file, kind="checkpoint")

    def bill(self, label: str, bill=None, **numbers: float) -> None:
        """Record what a step cost: a `Bill` (or mapping), or numbers by name, under `label`."""
        given = dataclasses.asdict(cast(Any, bill)) if dataclasses.is_dataclass(bill) else dict(bill or {})
        self._record["bill"][label] = _plain(given | numbers)

    def finish(self) -> Path:
        """The path of run.json. Call it last: from now on the run counts as done."""
        results = {
            name: about | {"sha256": sha256(self.folder / name), "bytes": (self.folder / name).stat().st_size}
            for name, about in self._results.items()
        }
        end = _now()
        took = datetime.fromisoformat(end) - datetime.fromisoformat(self._record["start"])
        path = self.folder / MANIFEST
        used = {"seconds": took.total_seconds(), "memory_bytes": peak_memory()}
        _write_json(path, self._record | {"end": end} | used | {"results": results})
        print(f"done: {len(results)} results in {_relative(self.folder)}")
        return path

    def _path(self, name: str, suffix: str) -> Path:
        if not re.fullmatch(r"[\w.=+-]+(/[\w.=+-]+)*", name) or name.startswith("."):
            raise ValueError(f"result name {name!r} must be made of letters, digits and _ . = + - only")
        return self.folder / (name.removesuffix(suffix) + suffix)


@dataclasses.dataclass(frozen=True)
class RunState:
    """What a folder holds: a run in one of five states, why, and its record when it has one.

    `read_run` tells done, incomplete and corrupt apart; `index.find_runs` also sees running ones and older versions.
    """

    folder: Path
    state: Literal["done", "running", "incomplete", "corrupt", "older"]
    reason: str = ""
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_run(folder: str | os.PathLike, hashes: bool = True) -> RunState:
    """The state of the run in `folder`, with every result compared with its hash in run.json, or only its size."""
    folder = Path(folder)
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        results = {name: (about["bytes"], about["sha256"]) for name, about in record["results"].items()}
    except FileNotFoundError:
        return RunState(folder, "incomplete", f"there is no {MANIFEST}: it was stopped, failed or still runs")
    except (ValueError, KeyError, TypeError, AttributeError):
        return RunState(folder, "corrupt", f"{MANIFEST} cannot be read")
    for name, (size, digest) in results.items():
        file = folder / name
        if not file.is_file():
            return RunState(folder, "corrupt", f"{name} is missing", record)
        if file.stat().st_size != size or hashes and sha256(file) != digest:
            return RunState(folder, "corrupt", f"{name} is not the file that the run wrote", record)
    return RunState(folder, "done", "", record)


def clear(folder: str | os.PathLike) -> None:
    """Take back a former run in `folder`: its done mark first, then the results that it listed."""
    former = Path(folder) / MANIFEST
    if not former.exists():
        return
    try:
        listed = list(json.loads(former.read_text(encoding="utf-8"))["results"])
    except (ValueError, KeyError, TypeError):
        listed = []
    former.unlink()
    for name in listed:
        file = Path(folder) / name
        if file.resolve().is_relative_to(Path(folder).resolve()):
            file.unlink(missing_ok=True)


@functools.cache
def package_versions() -> dict[str, str]:
    """Python's version and those of the packages that companion asks for."""
    versions = {"python": platform.python_version(), "companion": companion.__version__}
    for requirement in importlib.metadata.requires("companion") or []:
        if "extra ==" in requirement:
            continue
        name = re.split(r"[^\w.-]", requirement)[0]
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


@functools.cache
def processor() -> str:
    """The processor's name, by which to tell whether another run must have the same bits; "" if it is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device(device: str) -> dict[str, Any]:
    described: dict[str, Any] = {"device": device}
    if (torch := sys.modules.get("torch")) is not None:
        described["threads"] = torch.get_num_threads()
        if device.startswith("cuda"):
            described["name"] = torch.cuda.get_device_name(device)
    return described


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _relative(path: Path) -> str:
    """`path` from the project's root where it lies inside, so that records carry no machine's folders."""
    path, root = path.resolve(), project_root()
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays as lists, NaN and infinity as text."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _write_json(path: Path, record: Mapping) -> None:
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")
