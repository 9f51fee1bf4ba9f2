"""Execute a notebook with checked parameters, and believe only its own run.json.

papermill's metadata cannot be trusted as proof of success: after a killed kernel every cell is "completed".
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import json
import logging
import os
import random
import sys
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import companion
from companion.extras import extra
from companion.files import alone, project_root, shipped
from companion.parameters import Parameters, check, coerce, read_yaml, unknown_names
from companion.workbench import attempts, cores
from companion.workbench.run import EXECUTION, MANIFEST, NOTEBOOK, ORIGIN, VERSION, clear, read_run
from companion.workbench.sources import code_hash
from companion.workbench.surroundings import settle, without_grammar

STARTS = 4  # attempts to start a kernel: two kernels that start together may pick the same port
QUIET = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "JUPYTER_PLATFORM_DIRS": "1"}


# Errors of a notebook that another attempt may not meet; all others come again.
PASSING = {"MemoryError", "OutOfMemoryError", "OSError", "TimeoutError", "ConnectionError", "BlockingIOError"}


class RunFailed(RuntimeError):
    """The notebook did not finish; the message says in which cell and where the executed copy is.

    again: whether the same run could succeed.
    """

    def __init__(self, message: str, again: bool = True):
        super().__init__(message)
        self.again = again


@dataclass(frozen=True)
class Signature:
    """What a notebook declares: parameter names with their defaults, and their class when it names one."""

    notebook: Path
    defaults: Mapping[str, Any]
    parameters: type[Parameters] | None

    def check(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """`values` coerced and checked. Raises ValueError or TypeError with the name at fault."""
        unknown_names(values, self.defaults, self.notebook.name)
        if self.parameters is not None:
            return check(self.parameters, values)
        kinds = {name: type(default) for name, default in self.defaults.items()}
        return {n: v if kinds[n] is type(None) else coerce(n, v, kinds[n]) for n, v in values.items()}


def read_signature(notebook: str | os.PathLike) -> Signature:
    """The parameters that a notebook declares in its one cell tagged `parameters`.

    The notebook's metadata may name a Parameters class ({"companion": {"parameters": "module:Class"}}),
    which then gives types, choices and ranges; otherwise the types are those of the defaults.
    Raises FileNotFoundError, or ValueError when the notebook cannot be used, with the reason.
    """
    notebook = Path(notebook)
    content = _read_notebook(notebook)
    cells = [c for c in content["cells"] if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{notebook} has {len(cells)} cells tagged 'parameters'; tag exactly one code cell")
    defaults = _assignments("".join(cells[0]["source"]), notebook)
    name = content.get("metadata", {}).get("companion", {}).get("parameters")
    cls = _load_class(name, notebook) if name else None
    if cls is not None and (odd := set(defaults) ^ {field.name for field in fields(cls)}):
        raise ValueError(f"the parameters cell of {notebook} and {name} differ in {', '.join(sorted(odd))}")
    return Signature(notebook, defaults, cls)


def _read_notebook(notebook: Path) -> dict[str, Any]:
    try:
        content = json.loads(notebook.read_text(encoding="utf-8"))
        if content["nbformat"] >= 4 and isinstance(content["cells"], list):
            return content
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no notebook {notebook}") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{notebook} is not a Jupyter notebook (nbformat 4)")


def _assignments(source: str, notebook: Path) -> dict[str, Any]:
    """The names and literal values that a cell assigns."""
    values = {}
    try:
        for line in ast.parse(source).body:
            target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
            value = getattr(line, "value", None)
            if not isinstance(target, ast.Name) or value is None:
                raise ValueError("it holds more than 'name = value' lines")
            values[target.id] = ast.literal_eval(value)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the parameters cell of {notebook} cannot be read: {error}") from None
    return values


def _load_class(name: str, notebook: Path) -> type[Parameters]:
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{notebook} names its parameters as {name}, which fails to load: {error}") from None
    if not (isinstance(cls, type) and issubclass(cls, Parameters)):
        raise ValueError(f"{notebook} names its parameters as {name}, which is not a Parameters class")
    return cls


def merge(file: str | os.PathLike | None, pairs: Iterable[str]) -> dict[str, Any]:
    """Parameter values from a YAML file, then from "name=value" texts, which win."""
    values = read_yaml(file) if file is not None else {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(f"-p {pair} is not of the form name=value")
        values[name.strip()] = value.strip()
    return values


def run_notebook(
    notebook: str | os.PathLike, values: Mapping[str, Any], out: str | None = None, origin: Mapping | None = None
) -> Path:
    """The folder of a finished run of `notebook` with parameters `values`, other names at their defaults.

    out: results folder (relative to here); by default the notebook's parameter `out` (relative to the
    project). A former run in that folder is taken back first; the executed copy is kept, failed or not.
    origin: goes to run.json beside the notebook's name and hash; a done run of the same origin stays as it is.
    Raises ValueError, TypeError or FileNotFoundError before anything starts; RunFailed afterwards.
    """
    signature = read_signature(notebook)
    if out is not None:
        values = {**values, "out": os.path.abspath(out)}
    if "out" not in signature.defaults:
        raise ValueError(f"{notebook} has no parameter 'out', the folder of its results; add it")
    values = signature.check(values)
    if signature.parameters is not None:
        signature.parameters(**{**signature.defaults, **values}).before_start()
    root = project_root()
    folder = root / (values.get("out") or signature.defaults["out"])
    if folder.is_relative_to(root):  # records stay free of this machine's folders
        values["out"] = folder.relative_to(root).as_posix()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the results should go to {folder}, which is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    whence = {"notebook": _named(Path(notebook), root), "notebook_sha256": source_hash(notebook), "code": code_hash()}
    whence |= origin or {}
    busy = f"another run is writing to {folder}; waiting for it to end"  # say an orphan of a killed workflow
    with alone(folder / attempts.LOCK, busy):
        if origin and (there := read_run(folder)).state == "done" and there.record.get("origin") == whence:
            return folder  # by an orphan of a killed workflow
        clear(folder)
        mark = uuid.uuid4().hex
        attempts.begin(folder)
        try:
            _execute(Path(notebook), folder / NOTEBOOK, values, root, {EXECUTION: mark, ORIGIN: json.dumps(whence)})
            _verify(folder, mark)
        except BaseException as error:
            (folder / MANIFEST).unlink(missing_ok=True)
            said = " ".join(str(error).split()) or type(error).__name__
            attempts.end(folder, said, getattr(error, "again", True))
            raise
        attempts.end(folder)
    return folder


def source_hash(notebook: str | os.PathLike) -> str:
    """One hash of a notebook's cells, whatever its outputs and metadata."""
    cells = [(c["cell_type"], "".join(c["source"])) for c in _read_notebook(Path(notebook))["cells"]]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def _named(notebook: Path, root: Path) -> str:
    """A notebook's path from the project's root, or from the package's; its name alone, where it is in neither."""
    for base in (root, shipped("notebooks").parent):
        if notebook.resolve().is_relative_to(base):
            return notebook.resolve().relative_to(base).as_posix()
    return notebook.name


def _execute(notebook: Path, output: Path, values: Mapping[str, Any], root: Path, marks: Mapping[str, str]) -> None:
    """Run the notebook through papermill; `output` appears whole, whatever happens short of kill -9."""
    before = cores.look()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with extra("notebooks"), without_grammar():
            import papermill
            from papermill.exceptions import PapermillExecutionError
    logging.getLogger("papermill").setLevel(logging.ERROR)
    settle()
    os.environ.update({VERSION: companion.__version__, **marks} | {k: os.environ.get(k, v) for k, v in QUIET.items()})
    threads = cores.free_threads(before, cores.look())
    few = "OMP_NUM_THREADS" not in os.environ and threads is not None and threads < len(os.sched_getaffinity(0))
    if few:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    aside = output.with_name(f".{output.name}")
    aside.unlink(missing_ok=True)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    try:
        for attempt in range(1, STARTS + 1):
            try:
                papermill.execute_notebook(
                    _unformatted(notebook),
                    _unformatted(aside),
                    plain,
                    kernel_name="python3",
                    language="python",
                    kernel_manager_class=own_kernel(),
                    cwd=str(root),
                    progress_bar=False,
                    extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
                )
                return
            except RuntimeError as error:
                if "before replying" not in str(error) or attempt == STARTS:
                    raise
                time.sleep(attempt * random.uniform(0.5, 1.5))
    except PapermillExecutionError as error:
        said = " ".join(f"{error.ename}: {error.evalue}".split())
        raise RunFailed(f"cell [{error.exec_count}] failed: {said}; see {output}", error.ename in PASSING) from None
    except RuntimeError as error:  # the kernel was killed or never started
        raise RunFailed(f"the notebook's process ended early ({error}); out of memory? see {output}") from None
    except OSError:
        aside.unlink(missing_ok=True)  # the disk is full: half a notebook is worse than none
        raise
    finally:
        if few:
            del os.environ["OMP_NUM_THREADS"]
        if aside.exists():
            os.replace(aside, output)


def _unformatted(path: Path) -> str:
    """A path as papermill wants it, which fills parameters in between braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


@functools.cache
def own_kernel():
    """The class of kernel managers whose kernel is this interpreter.

    What "python3" means to Jupyter is decided by files in half a dozen folders (JUPYTER_PATH, the user's, the
    environment's), of which another environment's may come first: its kernel has another companion, or none.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]

    class OwnKernel(AsyncKernelManager):
        @property
        def kernel_spec(self):
            return KernelSpec(argv=argv, display_name="Python 3", language="python", name="python3")

    return OwnKernel


def _verify(folder: Path, mark: str) -> None:
    run = read_run(folder)
    ran = run.record.get("packages", {}).get("companion", companion.__version__)
    if run.state == "done" and ran != companion.__version__:
        raise RunFailed(
            f"the notebook was computed by companion {ran}, but started by {companion.__version__}: two versions are "
            "installed; look at PYTHONPATH and sys.path, and keep one"
        )
    if run.state == "done" and run.record.get("execution") != mark:
        raise RunFailed(f"{MANIFEST} in {folder} was written by another run")
    if run.state == "incomplete":
        raise RunFailed(f"the notebook ended without {MANIFEST} in {folder}: does it call run.finish() last?", False)
    if run.state == "corrupt":
        raise RunFailed(f"the results in {folder} are not what {MANIFEST} says: {run.reason}")
