"""Build the site into build/site: `make docs`, or `python tools/docs.py --runs runs --out build/site`.

A copy of all pages is laid out under build/site-source: docs/, the notebooks, the reference from the docstrings. Links
to files of the repository become links between pages. Notebooks are shown as their latest finished run left them;
without a run, without outputs and with a figure of docs/. Nothing is executed, nothing is fetched.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from base64 import b64decode
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import reference

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = os.environ.get("COMPANION_REPOSITORY", "")
ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "data/README.md": "data.md",
}
FIGURES = {"pet": "pet-images", "pet/5_transmission": "pet-transmission", "pet/1_data": "pet", "tables": "pet"}
FIGURES |= {
    "general": "heads",
    "train_prior": "heads",
    "pet/2_train_heads": "heads",
    "lmi/4_translate": "lmi_directions",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]`]|`[^`\n]*`|\[[^\]]*\])*)\]\(([^()\s]+)\)|`[^`\n]+`")  # or code in a line
NAMED = re.compile(r"\{py:(?:obj|mod)\}`(?:[^`<]*<)?([\w.]+)>?`")
CITATION = re.compile(r"\[([a-z]+\d{4}[a-z]*(?:, [a-z]+\d{4}[a-z]*)*)\](?!\()")
FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


@dataclass
class Stage:
    """The copy of all pages that Sphinx reads, and where each file of the repository went."""

    folder: Path
    runs: Path
    places: dict[str, str] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)

    def lay_out(self) -> None:
        pages = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*") if p.is_file())
        notebooks = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "notebooks").rglob("*.ipynb"))
        self.places = {p: p.removeprefix("docs/") for p in pages} | {p: p for p in notebooks} | ROOT_PAGES
        self.places |= {"LICENSE": "licence.md"}
        self.keys = set(re.findall(r"^@\w+\{(\S+),", (ROOT / "docs/references.bib").read_text(), re.MULTILINE))
        for module in reference.modules(ROOT / "src" / "companion"):
            self.names |= {module.name} | {f"{module.name}.{name}" for name in module.every_name()}
        for page in pages + [p for p in ROOT_PAGES if p != "README.md"]:
            self.copy(page)
        self.write("version.txt", (ROOT / "src/companion/__init__.py").read_bytes())
        cards = [self.notebook(path) for path in notebooks]
        self.write("notebooks/index.md", gallery(cards))
        for name, text in reference.pages(ROOT / "src" / "companion"):
            self.write(f"reference/{name}", self.cited(text, name))
        for path in self.folder.rglob("*"):
            if path.is_file() and path.relative_to(self.folder).as_posix() not in self.written:
                path.unlink()

    def write(self, place: str, content: str | bytes) -> None:
        """A staged file; one that is the same already keeps its date, so that Sphinx does not read it again."""
        content = content.encode() if isinstance(content, str) else content
        path = self.folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)
        self.written.add(place)

    def copy(self, page: str) -> None:
        """One file of the repository to its place; Markdown with its links and citations rewritten."""
        if page.endswith(".md"):
            self.write(self.places[page], self.cited(self.relinked((ROOT / page).read_text(), page), page))
        else:
            self.write(self.places[page], (ROOT / page).read_bytes())

    def relinked(self, text: str, page: str) -> str:
        """Links between files of the repository as links between pages. ValueError for one that leads nowhere."""

        def replace(match: re.Match) -> str:
            bang, label, target = match.groups()
            path, _, anchor = (target or "").partition("#")
            if not path or urlsplit(target).scheme:
                return match[0]
            file = os.path.normpath(os.path.join(os.path.dirname(page), unquote(path)))
            if not (ROOT / file).exists():
                raise ValueError(f"{page} links to {target}, which is not in the repository")
            if file in self.places:
                there = os.path.relpath(self.places[file], os.path.dirname(self.places[page]))
                return f"{bang}[{label}]({there}{'#' + anchor if anchor else ''})"
            return f"[{label}]({REPOSITORY}/blob/main/{file})" if REPOSITORY else label

        return outside(FENCED, text, lambda part: LINK.sub(replace, part))

    def cited(self, text: str, page: str) -> str:
        """[key] of references.bib as a citation. ValueError for a key, or a name of the package, that is not there."""

        def replace(match: re.Match) -> str:
            unknown = set(match[1].split(", ")) - self.keys
            if unknown:
                raise ValueError(f"{page} cites {', '.join(unknown)}; docs/references.bib has no such key")
            return f"{{cite:p}}`{match[1].replace(', ', ',')}`"

        unknown = [name for name in NAMED.findall(text) if name not in self.names]
        if unknown:
            raise ValueError(f"{page} names {', '.join(unknown)}, which the package has not")
        return outside(CODE, text, lambda part: CITATION.sub(replace, part))

    def notebook(self, path: str) -> dict:
        """Write the page and the thumbnail of a notebook; what its card says."""
        name = path.removeprefix("notebooks/").removesuffix(".ipynb")
        run = latest_run(self.runs, path)
        content = nbformat.read(run / "notebook.ipynb" if run else ROOT / path, as_version=4)
        thumbnail, said = f"_thumbnails/{name.replace('/', '-')}.png", ""
        picture = first_picture(content) if run else None
        figure = ROOT / "docs" / f"{FIGURES.get(name) or FIGURES.get(name.split('/')[0]) or name.split('/')[0]}.png"
        figure = figure if figure.exists() else ROOT / "docs" / "start_here.png"
        self.write(thumbnail, small(picture or figure.read_bytes()))
        up = "../" * name.count("/") + "../"
        if run:
            record = json.loads((run / "run.json").read_text())
            said = f"As recorded on {record['end'][:10]}, {record['seconds'] / 60:.1f} minutes, in {run.name}."
        else:
            said = "No recorded run was at hand when this page was built, so cells have no outputs."
            said += f"\n\n![a figure of the guide]({up}{figure.name})"
        for cell in content.cells:
            if cell.cell_type == "markdown":
                cell.source = self.cited(self.relinked(cell.source, path), path)
            strip_widgets(cell)
        content.metadata.pop("widgets", None)
        title = next(line[2:] for c in content.cells for line in c.source.splitlines() if line.startswith("# "))
        first = next(i for i, c in enumerate(content.cells) if c.cell_type == "markdown")
        content.cells.insert(first + 1, nbformat.v4.new_markdown_cell(f"{badges(path, up)}{said}", id="recorded"))
        self.write(path, nbformat.writes(content))
        return dict(name=name, title=title, thumbnail=thumbnail)


def outside(code: re.Pattern, text: str, change) -> str:
    """The text with `change` applied to what is not code."""
    return "".join(part if i % 2 else change(part) for i, part in enumerate(code.split(text)))


def latest_run(runs: Path, path: str) -> Path | None:
    """The folder of the newest finished run of a notebook; those of the profile `smoke` come last."""
    *folders, stage = path.removeprefix("notebooks/").removesuffix(".ipynb").split("/")
    found = []
    for file in runs.rglob("run.json"):
        record = json.loads(file.read_text())
        same = record.get("stage") == stage and (not folders or record.get("paper") == folders[0])
        if same and (file.parent / "notebook.ipynb").exists():
            found.append(("smoke" not in file.parent.parts, record.get("end", ""), file.parent))
    return max(found)[2] if found else None


def first_picture(content) -> bytes | None:
    """The first picture among a notebook's outputs."""
    for cell in content.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                return b64decode(data["image/png"])
    return None


@cache
def small(picture: bytes, size: tuple[int, int] = (480, 300)) -> bytes:
    """A PNG: the left of a picture on white."""
    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    scale = max(size[0] / image.width, size[1] / image.height)
    scale = min(scale, 1.6 * size[0] / image.width)  # of a very wide picture the left part, not a sliver
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", size, "white")
    canvas.paste(image, (0, max(0, (size[1] - image.height) // 2)))
    out = io.BytesIO()
    canvas.save(out, "PNG")
    return out.getvalue()


def strip_widgets(cell) -> None:
    """Leave of a widget the still picture only; a page has no kernel."""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if data.pop("application/vnd.jupyter.widget-view+json", None) and not {"image/png", "text/html"} & set(data):
            data.clear()
    if cell.cell_type == "code":
        cell.outputs = [o for o in cell.outputs if o.output_type in ("stream", "error") or o.get("data")]


def badges(path: str, up: str) -> str:
    """Links to run a notebook in a browser; none where the repository's address is not known."""
    if not REPOSITORY:
        return ""
    owner_name = urlsplit(REPOSITORY).path.strip("/")
    colab = f"https://colab.research.google.com/github/{owner_name}/blob/main/{path}"
    binder = f"https://mybinder.org/v2/gh/{owner_name}/main?labpath={path}"
    pictures = {"Open in Colab": (colab, "colab.svg"), "Launch on Binder": (binder, "binder.svg")}
    return " ".join(f"[![{text}]({up}_static/{svg})]({link})" for text, (link, svg) in pictures.items()) + "\n\n"


def gallery(cards: list[dict]) -> str:
    """The page of all notebooks, as cards with thumbnails."""
    titles = {"": "Start here", "aid": "AID", "pet": "PET", "lmi": "LMI", "general": "A general prior"}
    groups: dict[str, list[dict]] = {group: [] for group in titles}
    for card in cards:
        groups.setdefault(card["name"].split("/")[0] if "/" in card["name"] else "", []).append(card)
    lines = ["# Notebooks", "", "Each has one cell of parameters and runs from the browser or the shell."]
    for group, members in groups.items():
        members.sort(key=lambda card: (card["name"] != "start_here", card["name"]))
        lines += ["", f"## {titles.get(group, group)}", "", "::::{grid} 1 2 3 3", ":gutter: 3", ""]
        for card in members:
            lines += [
                f":::{{grid-item-card}} {card['title']}",
                f":img-top: ../{card['thumbnail']}",
                f":img-alt: picture of {card['name']}",
                f":link: {card['name']}",
                ":link-type: doc",
                "",
                f"`{card['name']}`",
                ":::",
                "",
            ]
        lines += ["::::"]
    ordered = [card["name"] for group in groups.values() for card in group]
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *ordered, "```", ""])


class Page(HTMLParser):
    """What a page of the site links to, fetches, and is linked to by."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.fetched, self.anchors = [], [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[k] for k in ("id", "name") if given.get(k)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "link" and given.get("href") and given.get("rel") not in ("canonical",):
            self.fetched.append(given["href"])
        self.fetched += [given["src"]] if given.get("src") else []


def check(site: Path) -> list[str]:
    """What is wrong in a built site: links inside that lead nowhere, and whatever would be fetched from elsewhere."""
    written = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.relative_to(site).parts]
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in written}
    wrong = []
    for path, page in pages.items():
        here = path.relative_to(site)
        for target in page.fetched:
            if urlsplit(target).scheme not in ("", "data") or target.startswith("//"):
                wrong.append(f"{here} fetches {target}")
        for target in [*page.links, *page.fetched]:
            parts = urlsplit(target)
            if parts.scheme or target.startswith("//"):
                continue
            file = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            file = file / "index.html" if file.is_dir() else file
            if not file.exists():
                wrong.append(f"{here} links to {target}, which is not there")
            elif file in pages and parts.fragment and unquote(parts.fragment) not in pages[file].anchors:
                wrong.append(f"{here} links to {target}: that page has no such place")
    for style in site.rglob("*.css"):
        fetched = re.findall(r"url\(['\"]?(https?:[^)]*)", style.read_text())
        wrong += [f"{style.relative_to(site)} fetches {url}" for url in fetched]
    return wrong


def build(runs: Path, out: Path) -> int:
    """Stage, build with warnings as errors, check; 0 if all is well."""
    from sphinx.cmd.build import main

    out = out.resolve()
    source = out.with_name(f"{out.name}-source")
    Stage(source, runs).lay_out()
    doctrees = str(out.with_name(f"{out.name}-doctrees"))
    failed = main(["-W", "--keep-going", "-q", "-b", "html", "-d", doctrees, str(source), str(out)])
    wrong = check(out) if out.exists() else []
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    if not failed and not wrong:
        print(f"{sum(1 for _ in out.rglob('*.html'))} pages: {out / 'index.html'}")
    return int(bool(failed or wrong))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="folder of recorded runs")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", help="folder of the built site")
    given = parser.parse_args()
    raise SystemExit(build(given.runs, given.out))
