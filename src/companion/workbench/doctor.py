"""What this machine has and what each paper can run on it: `companion doctor`. Looks only; fetches nothing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import constants

import companion
from companion.files import find_project, project_root
from companion.models import checkpoint as weights
from companion.models import folder as folders
from companion.models import registry
from companion.models.registry import Entry
from companion.workbench.runner import read_signature

PAPERS = {
    "brain": "start here: a brain, a prior, a reconstruction",
    "general": "anybody's head: a general prior, a real scan",
    "aid": "Autoregressive Image Diffusion",
    "lmi": "LMI-guided translation",
    "latent3d": "synthetic 3D MRI",
    "pet": "PET dose enhancement",
}
CHECKPOINTS = ("weights", "single", "codec", "start_from")  # notebook parameters that name a checkpoint
OPTIONAL = {"snakemake": "companion batch", "ipyniivue": "the 3D viewer"}


# ----------------------------------------------------------------------------------------------------
# Weights and data


def weights_table() -> str:
    """All weights and sample data: name, size, whether they are here, what they are."""
    rows = [("name", "size", "state", "what")]
    for name in weights.embedded():
        size = (folders.root() / name / weights.MODEL).stat().st_size
        rows.append((name, _mb(size), "embedded", weights.describe(name)["data"]["source"]))
    for entry in registry.entries().values():
        rows.append((entry.name, _mb(entry.size), state(entry), entry.title))
    return _columns(rows)


def slots() -> str:
    """How to come by the weights that are on no hub."""
    return "\n".join(f"{e.name}: {registry.how_to_make(e)}" for e in registry.entries().values() if not e.repo)


def terms() -> str:
    """The licences and terms of all entries, each with the names that it holds for."""
    names: dict[str, list[str]] = {}
    for entry in registry.entries().values():
        names.setdefault(entry.licence, []).append(entry.name)
    return "\n".join(f"{', '.join(held)}: {licence}" for licence, held in names.items())


def state(entry: Entry) -> str:
    """Whether an entry is here: "here", "not here", "by hand" or "unpublished". Nothing is hashed."""
    if entry.repo is None:
        return "by hand" if entry.source else "unpublished"
    there = registry.cached(entry) if entry.kind == "data" else weights.converted(entry)
    return "here" if there else "not here"


def place(name: str) -> Path | None:
    """Where a checkpoint (its folder) or sample data (its first file) is, or None; no network.

    Raises FileNotFoundError for a name that nobody knows, with the nearest one.
    """
    entry = registry.find(name)
    if entry is None:
        return weights.resolve(name)
    if entry.kind == "data":
        files = registry.cached(entry)
        return files and files.path
    return weights.converted(entry)


def verified() -> Iterator[tuple[str, str | None]]:
    """(name, what is wrong or None) of all embedded, converted and downloaded files, each hashed now."""
    for name in weights.embedded():
        try:
            weights.resolve(name)
            yield name, weights.damage(folders.root() / name)
        except (ValueError, OSError) as error:
            yield name, str(error)
    for entry in registry.entries().values():
        files = registry.cached(entry)
        for file, found in (files.files if files else {}).items():
            whole = found.path.exists() and registry.sha256(found.path) == found.sha256
            problem = f"{found.path} is not what was downloaded: companion weights pull {entry.name}"
            yield f"{entry.name}, download of {file}", None if whole else problem
        folder = weights.converted(entry) if entry.kind != "data" else None
        if folder:
            problem = weights.damage(folder)
            yield f"{entry.name}, converted", problem and f"{problem}: companion weights pull {entry.name}"


# ----------------------------------------------------------------------------------------------------
# The page


def report() -> str:
    """The page: machine, weights, data, papers."""
    parts = {"This machine": machine(), "Weights": weights_table(), "Data": data(), "Papers": papers()}
    return "\n\n".join(f"{title}\n{'-' * len(title)}\n{text}" for title, text in parts.items())


def machine() -> str:
    """Python, torch, device, cores, memory, disk, and where downloads go."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "CPU only: the demo profiles are made for it"
    if cuda:
        device += f", {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        ("companion", f"{companion.__version__}, {Path(companion.__file__).parent}"),
        ("project", _home()),
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("torch", torch.__version__),
        ("device", device),
        ("cores", f"{cores} usable of {os.cpu_count()}; torch uses {torch.get_num_threads()}"),
        ("memory", _memory()),
        ("disk", f"{_free(here())} free for runs, {_free(registry.home())} for weights"),
        ("weights go to", f"{registry.home()} (COMPANION_HOME) and {constants.HF_HUB_CACHE} (HF_HOME)"),
        ("hub", f"{constants.ENDPOINT}{', offline' if constants.is_offline_mode() else ''}"),
    ]
    for package, use in OPTIONAL.items():
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, f"not installed; needed for {use}: pip install {package}"))
    return _columns(rows)


def data() -> str:
    """Prepared data sets, and what stands for data where there are none."""
    files = sorted((here() / "data").glob("*.h5"))
    rows = [(str(path.relative_to(here())), _mb(path.stat().st_size)) for path in files]
    return _columns([("embedded cohorts (brain, heart)", "always here"), *rows])


def papers() -> str:
    """For each paper: what of its notebooks runs now with its default parameters, and what others lack."""
    blocks = []
    for paper, title in PAPERS.items():
        lines = [f"{paper}: {title}"]
        books = notebooks(paper)
        for book in books:
            shown = _shown(book)
            lacking = [f"\n      lacks {thing}: {remedy}" for thing, remedy in lacks(book)]
            lines.append(f"  {shown}:" + ("".join(lacking) or f" runs now: companion run {shown}"))
        if not books:
            lines.append("  no notebooks here: companion init FOLDER lays them down")
        mine = [entry for entry in registry.entries().values() if entry.name.startswith(f"{paper}/")]
        absent = [entry.name.partition("/")[2] for entry in mine if state(entry) == "not here"]
        if absent:
            lines.append(f"  published, not here: {', '.join(absent)}: companion weights pull {paper}/NAME")
        lines += [f"  {entry.name} is unpublished: {registry.how_to_make(entry)}" for entry in mine if not entry.repo]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def notebooks(paper: str) -> list[Path]:
    """The notebooks of a paper, in order; those at the top belong to "brain"."""
    books = here() / "notebooks"
    if not books.is_dir() and (project := find_project()):  # data and runs are elsewhere, by COMPANION_HOME
        books = project / "notebooks"
    return sorted((books / ("" if paper == "brain" else paper)).glob("*.ipynb"))


def lacks(notebook: Path) -> list[tuple[str, str]]:
    """(what a notebook's default parameters name that is not here, the command that gets it)."""
    try:
        defaults = read_signature(notebook).defaults
    except (ValueError, OSError) as error:
        return [("a readable parameters cell", str(error))]
    found = []
    file, maker = defaults.get("data"), notebook.with_name("1_data.ipynb")
    if file and maker.exists() and notebook != maker and not (here() / file).exists():
        found.append((f"data = {file}", f"companion run {_shown(maker)}"))
    for parameter in CHECKPOINTS:
        name = defaults.get(parameter)
        if isinstance(name, str) and name:
            remedy = _remedy(name)
            if remedy:
                found.append((f"{parameter} = {name}", remedy))
    return found


def _remedy(name: str) -> str | None:
    """None if a checkpoint is here, else how to get it."""
    if name == "embedded" or name in weights.embedded() or (here() / name / weights.CONFIG).exists():
        return None
    if entry := registry.find(name):
        if entry.repo is None:
            return registry.how_to_make(entry)
        return None if weights.converted(entry) else f"companion weights pull {name}"
    if name.startswith("hf:"):
        return f"companion weights pull {name}"
    paper = name.split("/")[1 if name.startswith("runs/") else 0]
    trainer = here() / "notebooks" / paper / "2_train.ipynb"
    if trainer.exists():
        return f"companion run {_shown(trainer)}"
    return f"no embedded checkpoint of this name; it comes with the repository (git pull), or train one for {paper}"


def here() -> Path:
    """Where data and runs are looked for: the project, else the current folder."""
    try:
        return project_root()
    except FileNotFoundError:
        return Path.cwd()


def _shown(path: Path) -> str:
    return str(path.relative_to(here()) if path.is_relative_to(here()) else path)


def _home() -> str:
    try:
        return f"data and runs in {project_root()}"
    except FileNotFoundError:
        return "no project here: companion init FOLDER lays one down"


# ----------------------------------------------------------------------------------------------------
# Words


def _columns(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.1f} MB"


def _free(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**30:.0f} GiB"


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "unknown on this system"
    return f"{total / 2**30:.0f} GiB, {free / 2**30:.0f} GiB of it free now"
