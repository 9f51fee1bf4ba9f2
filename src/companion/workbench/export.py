"""`companion export`: a run as one zip for a paper's supplement, described as a Process Run Crate (RO-Crate 1.1).

https://w3id.org/ro/wfrun/process/0.5: an action (the run) with an instrument (the notebook), objects (what was read, by
name and hash) and results (files in the zip).
"""

from __future__ import annotations

import json
import mimetypes
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from companion.files import atomic_write, find_project, shipped
from companion.workbench.run import MANIFEST, NOTEBOOK, read_run

CRATE = "ro-crate-metadata.json"
CONTEXT = "https://w3id.org/ro/crate/1.1/context"
PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
LICENSES = {"MIT": "https://spdx.org/licenses/MIT"}
MOMENT = (1980, 1, 1, 0, 0, 0)  # of every file in the zip: the same run, the same bytes


def export(run: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
    """The path of the zip, by default <run>.zip: executed notebook, results, run.json, parameters, environment, crate.

    Raises ValueError when the run is not done.
    """
    run = Path(run).resolve()
    state = read_run(run)
    if state.state != "done":
        raise ValueError(f"{run} is {state.state} and cannot be exported: {state.reason}")
    record, out = state.record, Path(out) if out else run.with_name(f"{run.name}.zip")
    texts = {
        "parameters.yaml": yaml.safe_dump(record.get("parameters", {}), sort_keys=False),
        "requirements.txt": "".join(_requirements(record)),
    }
    names = [name for name in (MANIFEST, NOTEBOOK, *record["results"]) if (run / name).is_file()]
    if (lock := (find_project() or shipped("workflow").parent) / "constraints.txt").is_file():
        texts["constraints.txt"] = lock.read_text(encoding="utf-8")
    texts[CRATE] = json.dumps(crate(run, record, names, list(texts)), indent=1) + "\n"
    with atomic_write(out) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            archive.writestr(_entry(name), text)
        for name in names:
            with archive.open(_entry(name), "w", force_zip64=True) as into, open(run / name, "rb") as file:
                while piece := file.read(1 << 20):
                    into.write(piece)
    return out


def crate(run: Path, record: Mapping[str, Any], names: list[str], texts: list[str]) -> dict[str, Any]:
    """The RO-Crate metadata of a run with these files."""
    origin, packages = record.get("origin") or {}, record.get("packages", {})
    title = f"{record.get('paper', '')}: {record.get('stage', '')}, {run.name}"
    when = record["end"]
    files = [_file(name, run, record) for name in names] + [
        {"@id": name, "@type": "File", "name": name, "encodingFormat": _kind(name)} for name in texts
    ]
    notebook = origin.get("notebook") or f"{record.get('stage')}.ipynb"
    instrument = {
        "@id": NOTEBOOK if NOTEBOOK in names else "#notebook",
        "@type": ["File", "SoftwareSourceCode"] if NOTEBOOK in names else "SoftwareApplication",
        "name": f"{notebook}, executed by companion {packages.get('companion', '')}",
        "version": str(record.get("code", "")),
        "encodingFormat": "application/x-ipynb+json",
        "programmingLanguage": {"@id": "#python"},
    }
    inputs = [
        {"@id": f"#input/{quote(name)}", "@type": "CreativeWork", "name": name, "identifier": f"sha256:{digest}"}
        for name, digest in record.get("inputs", {}).items()
    ]
    values = [
        {"@id": f"#parameter/{name}", "@type": "PropertyValue", "name": name, "value": json.dumps(value)}
        for name, value in record.get("parameters", {}).items()
    ]
    action = {
        "@id": "#run",
        "@type": "CreateAction",
        "name": f"run of {notebook}",
        "description": f"{notebook} with the parameters below, on {_where(record)}",
        "startTime": record["start"],
        "endTime": when,
        "actionStatus": "http://schema.org/CompletedActionStatus",
        "instrument": {"@id": instrument["@id"]},
        "agent": {"@id": "#runner"},
        "object": [{"@id": entity["@id"]} for entity in (*inputs, *values)],
        "result": [{"@id": quote(name)} for name in record["results"]],
    }
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": title,
        "description": f"Results of {notebook}: files, parameters, environment and the hashes of what was read.",
        "datePublished": when,
        "license": {"@id": LICENSES["MIT"]},
        "conformsTo": {"@id": PROFILE},
        "hasPart": [{"@id": entity["@id"]} for entity in files],
        "mentions": {"@id": "#run"},
    }
    others = [
        {"@id": CRATE, "@type": "CreativeWork", "about": {"@id": "./"},
         "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"}},
        {"@id": PROFILE, "@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"},
        {"@id": LICENSES["MIT"], "@type": "CreativeWork", "name": "MIT License",
         "description": "The licence of the code; the data's own licences hold for what was read."},
        {"@id": "#python", "@type": "ComputerLanguage", "name": "Python", "version": packages.get("python", "")},
        {"@id": "#runner", "@type": "SoftwareApplication", "name": "companion", "url": PROFILE,
         "version": packages.get("companion", "")},
    ]  # fmt: skip
    graph = [root, *others, *files, instrument, action, *inputs, *values]
    merged: dict[str, dict] = {}
    for entity in graph:  # the notebook is a file and the instrument
        merged[entity["@id"]] = merged.get(entity["@id"], {}) | entity
    return {"@context": [CONTEXT, "https://w3id.org/ro/terms/workflow-run/context"], "@graph": list(merged.values())}


def _file(name: str, run: Path, record: Mapping) -> dict[str, Any]:
    about = record["results"].get(name, {})
    entity = {"@id": quote(name), "@type": "File", "name": name, "encodingFormat": _kind(name),
              "contentSize": str((run / name).stat().st_size)}  # fmt: skip
    if about.get("alt") or about.get("caption"):
        entity["description"] = about.get("caption") or about["alt"]
    return entity | ({"sha256": about["sha256"]} if about.get("sha256") else {})


def _kind(name: str) -> str:
    known = {".ipynb": "application/x-ipynb+json", ".h5": "application/x-hdf5", ".npz": "application/zip",
             ".yaml": "application/yaml", ".safetensors": "application/octet-stream"}  # fmt: skip
    return known.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"


def _where(record: Mapping) -> str:
    platform, device = record.get("platform", {}), record.get("device", {})
    return ", ".join(str(v) for v in (platform.get("cpu"), device.get("name") or device.get("device")) if v)


def _requirements(record: Mapping) -> Iterator[str]:
    packages = record.get("packages", {})
    yield f"# Python {packages.get('python')}, companion {packages.get('companion')} ({record.get('code')})\n"
    for name, version in packages.items():
        if name not in ("python", "companion") and version != "missing":
            yield f"{name}=={version}\n"


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, MOMENT)
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    return entry
