"""runs/index.html: one page, no network, with every run, its figures, numbers and links; and how runs are found."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import companion
from companion.files import atomic_write
from companion.workbench.attempts import locked
from companion.workbench.run import MANIFEST, NOTEBOOK, RunState, read_run

RECORD = ("paper", "stage", "parameters", "results", "end")  # what this version's run.json has


def write_index(runs: str | os.PathLike) -> Path:
    """The path of index.html in folder `runs`, which shows every run found below it, finished or not.

    Figures and files are linked relatively, so the folder can be moved or zipped as a whole.
    Raises FileNotFoundError when there is no such folder.
    """
    runs = Path(runs)
    if not runs.is_dir():
        raise FileNotFoundError(f"there is no folder {runs}; finish a run first (make demo)")
    from companion.workbench.pages import write_page

    states = find_runs(runs)
    for state in states:
        if state.state == "done" and (state.folder / NOTEBOOK).is_file():
            with contextlib.suppress(ValueError):  # a damaged log does not make results worthless
                write_page(state.folder / NOTEBOOK)
    path = runs / "index.html"
    with atomic_write(path) as aside:
        aside.write_text(page(states, runs), encoding="utf-8")
    return path


def page(states: list[RunState], runs: Path) -> str:
    """The HTML of the index of `states`, with links relative to `runs`."""
    done = sum(s.state == "done" for s in states)
    lines = "".join(_line(s, runs) for s in states)
    summary = f"{done} of {len(states)} runs are done" if done < len(states) else f"{done} runs, all done"
    columns = ("Run", "State", "Finished (UTC)", "Took", "Device", "Code")
    head = "".join(f'<th scope="col"><button type="button">{column}</button></th>' for column in columns)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>companion: runs</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>Runs</h1><p>{summary}.</p>\n"
        f'<div class="scroll"><table id="runs"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
        "</header>\n<main>\n"
        + "\n".join(_section(s, runs) for s in states)
        + f"\n</main>\n<script>{SORT}</script>\n</body>\n</html>\n"
    )


def find_runs(runs: str | os.PathLike, hashes: bool = True) -> list[RunState]:
    """Every run below a folder, finished or not, start_here first: done, running, incomplete, corrupt or older.

    hashes: compare every result with its hash (the index), or only with its size (the gallery, to be fast).
    Raises FileNotFoundError when there is no such folder.
    """
    runs = Path(runs)
    if not runs.is_dir():
        raise FileNotFoundError(f"there is no folder {runs}; finish a run first (make demo)")
    return sorted((_state(folder, hashes) for folder in _folders(runs)), key=lambda state: _order(state, runs))


def _folders(runs: Path) -> Iterator[Path]:
    """Folders with a done mark, an executed notebook, or one that is being executed; hidden folders are left out."""
    for folder, inside, files in os.walk(runs):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if {MANIFEST, NOTEBOOK, f".{NOTEBOOK}"} & set(files):
            yield Path(folder)


def _state(folder: Path, hashes: bool) -> RunState:
    state = read_run(folder, hashes)
    if state.state == "incomplete":
        return RunState(folder, "running", "a notebook is being executed here") if locked(folder) else state
    record = state.record
    if not record:  # unreadable for this version: is it another version's, or rubbish?
        try:
            record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (ValueError, OSError):
            return state
        if not isinstance(record, dict):
            return state
        missing = [key for key in RECORD if key not in record]
        lacks = f"lacks {', '.join(missing)}" if missing else "lists its results in another way"
        return RunState(folder, "older", f"{MANIFEST} {lacks}: written by an older version; run it again", record)
    if missing := [key for key in RECORD if key not in record]:
        return RunState(
            folder, "older", f"{MANIFEST} lacks {', '.join(missing)}: written by an older version; run it again", record
        )
    version = str(_dict(record.get("packages")).get("companion", ""))
    if state.state == "done" and _number(version) < _number(companion.__version__):
        said = f"written by companion {version or 'of unknown version'}, this is {companion.__version__}; run it again"
        return RunState(folder, "older", said, record)
    return state


def _number(version: str) -> tuple[int, ...]:
    """(major, minor) of a version, () of none: what changes the meaning of results."""
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()


def _order(state: RunState, runs: Path) -> tuple:
    name = _name(state, runs)
    return ("start_here" not in name, name)


def _name(state: RunState, runs: Path) -> str:
    return state.folder.relative_to(runs).as_posix()


def _line(state: RunState, runs: Path) -> str:
    name, record = _name(state, runs), state.record
    cells = [
        f'<a href="#{quote(name)}">{escape(name)}</a>',
        f'<span class="{state.state}">{state.state}</span>',
        escape(str(record.get("end", ""))[:16].replace("T", " ")),
        f'<span data-value="{record.get("seconds", "")}">{duration(record.get("seconds"))}</span>',
        escape(str(_dict(record.get("device")).get("name", _dict(record.get("device")).get("device", "")))),
        f"<code>{escape(str(record.get('code', '')))}</code>" if record else "",
    ]
    return f'<tr class="{state.state}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'


def _section(state: RunState, runs: Path) -> str:
    name, folder = _name(state, runs), state.folder
    files = [(NOTEBOOK, "notebook"), (MANIFEST, "record")]
    if state.state == "done":  # else a page would be that of a former run
        files.insert(0, (NOTEBOOK.replace(".ipynb", ".html"), "read"))
    links = [_link(folder / file, runs, label) for file, label in files]
    title = f"<h2>{escape(name)}</h2>\n<p class=links>{' · '.join(link for link in links if link)}</p>"
    if state.state != "done":
        body = f"<p><strong>{state.state.capitalize()}</strong>: {escape(state.reason)}.</p>"
    else:
        body = _body(state, runs)
    return f'<section id="{escape(name)}" class="{state.state}">\n{title}\n{body}\n</section>'


def _body(state: RunState, runs: Path) -> str:
    record, folder = state.record, state.folder
    results = record["results"]
    figures = "".join(
        _figure(folder / name, about, runs) for name, about in results.items() if about["kind"] == "figure"
    )
    files = "".join(
        f"<tr><td>{_link(folder / name, runs, name)}</td><td>{_size(about['bytes'])}</td>"
        f"<td><code>{about['sha256'][:12]}</code></td></tr>"
        for name, about in results.items()
    )
    inputs = {name: digest[:12] for name, digest in record.get("inputs", {}).items()}
    parts = [
        figures,
        numbers(_metrics(folder / "metrics.json")),
        _details("Parameters", numbers(record.get("parameters", {}))),
        _details("Cost", numbers(record.get("bill", {}))),
        _details("Read", numbers(inputs)),
        _details("Files", f'<div class="scroll"><table>{files}</table></div>' if files else ""),
        _details("Versions", numbers(record.get("packages", {}))),
    ]
    return "\n".join(part for part in parts if part)


def _metrics(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _figure(path: Path, about: Mapping[str, str], runs: Path) -> str:
    source = _href(path, runs)
    caption = f"<figcaption>{escape(about['caption'])}</figcaption>" if about.get("caption") else ""
    image = f'<img loading="lazy" src="{source}" alt="{escape(about.get("alt", ""))}">'
    return f'<figure><a href="{source}">{image}</a>{caption}</figure>\n'


def numbers(values: Mapping[str, Any]) -> str:
    """HTML tables of a mapping: plain values as rows, a mapping of mappings as one table of its own."""
    plain = {k: v for k, v in values.items() if not isinstance(v, Mapping)}
    nested = {k: v for k, v in values.items() if isinstance(v, Mapping) and v}
    tables = []
    if plain:
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{_value(v)}</td></tr>" for k, v in plain.items())
        tables.append(f'<div class="scroll"><table>{rows}</table></div>')
    if nested and all(not isinstance(v, Mapping) for row in nested.values() for v in row.values()):
        columns = list(dict.fromkeys(column for row in nested.values() for column in row))
        head = "<tr><th></th>" + "".join(f"<th>{escape(c)}</th>" for c in columns) + "</tr>"
        rows = "".join(
            f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{_value(row.get(c, ''))}</td>" for c in columns) + "</tr>"
            for name, row in nested.items()
        )
        tables.append(f'<div class="scroll"><table>{head}{rows}</table></div>')
    else:
        tables += [f"<h3>{escape(name)}</h3>{numbers(inner)}" for name, inner in nested.items()]
    return "\n".join(tables)


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value[:12])) + (", …" if len(value) > 12 else "")
    return "" if value is None else escape(str(value))


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>{body}</details>" if body else ""


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _href(path: Path, runs: Path) -> str:
    return escape(quote(path.relative_to(runs).as_posix()))


def _link(path: Path, runs: Path, label: str) -> str:
    return f'<a href="{_href(path, runs)}">{escape(label)}</a>' if path.exists() else ""


def duration(seconds: Any) -> str:
    """A time in the unit that suits it; nothing for what is no number."""
    if not isinstance(seconds, (int, float)):
        return ""
    return (
        f"{seconds:.1f} s"
        if seconds < 100
        else f"{seconds / 60:.1f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


STYLE = """
:root { color-scheme: light dark; --text: #1d2329; --soft: #5d6873; --line: #dfe3e8; --back: #fcfcfb;
        --accent: #1f5f8b; --good: #2c6e49; --bad: #a33b2b; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e6e8; --soft: #98a2ab; --line: #343b42; --back: #15181b; --accent: #7fb6dd;
          --good: #83c79f; --bad: #e39183; } }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 5rem; background: var(--back);
       color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.9rem; font-weight: 600; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; font-weight: 600; margin: 0; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.5rem 0 .25rem; }
p { margin: .25rem 0 1rem; }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: 2px; }
section { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1.5rem; }
section:not(.done), #runs tbody tr:not(.done) td { color: var(--soft); font-style: italic; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
header p, .links, figcaption { color: var(--soft); }
figure { margin: 1.25rem 0; }
img { max-width: 100%; height: auto; display: block; border-radius: 4px; background: #fff; }
figcaption { font-size: .9rem; margin-top: .5rem; max-width: 46rem; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1.25rem .3rem 0; border-bottom: 1px solid var(--line);
         vertical-align: top; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
code { font: .85em ui-monospace, monospace; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--accent); width: max-content; }
span.done { color: var(--good); }
span.running { color: var(--accent); }
span.incomplete, span.corrupt, span.older { color: var(--bad); }
"""

SORT = """
const table = document.getElementById("runs");
table.tHead.querySelectorAll("button").forEach((button, column) => button.addEventListener("click", () => {
  const cell = button.parentElement, up = cell.getAttribute("aria-sort") != "ascending";
  table.tHead.querySelectorAll("th").forEach(th => th.removeAttribute("aria-sort"));
  cell.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = row => row.cells[column].querySelector("[data-value]")?.dataset.value ?? row.cells[column].textContent;
  [...table.tBodies[0].rows]
    .sort((a, b) => value(a).localeCompare(value(b), undefined, {numeric: true}) * (up ? 1 : -1))
    .forEach(row => table.tBodies[0].append(row));
}));
"""
