"""The site without building it: every public name has an entry, every page is reached, every link and citation leads
somewhere. `make docs` builds the whole, with warnings as errors, and checks the links of what came out."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import reference  # noqa: E402

import docs  # noqa: E402

MODULES = {module.name: module for module in reference.modules(ROOT / "src" / "companion")}


def test_every_public_name_has_an_entry():
    """The names as Python sees them, against those that the reference read from the sources."""
    missing, seen = [], 0
    for name, module in MODULES.items():
        listed = {item.name for item in module.names}
        for public, value in vars(importlib.import_module(name)).items():
            own = inspect.isfunction(value) or inspect.isclass(value)
            if own and not public.startswith("_") and value.__module__ == name and value.__qualname__ == public:
                seen += 1
                missing += [] if public in listed else [f"{name}.{public}"]
    assert seen > 1000 and not missing


def test_every_entry_is_on_a_page_of_the_reference():
    pages = dict(reference.pages(ROOT / "src" / "companion"))
    for name, module in MODULES.items():
        text = pages[f"{name}.md"]
        assert all(re.search(rf"{{py:{item.kind}}} {item.name}\b", text) for item in module.names), name
        assert name in pages["index.md"]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """All pages laid out as Sphinx gets them; laying out raises for a link or a citation that leads nowhere."""
    folder = tmp_path_factory.mktemp("site")
    stage = docs.Stage(folder / "pages", folder / "no-runs")
    stage.lay_out()
    return stage


def test_every_page_is_in_the_contents(stage):
    reached, waiting = set(), ["index"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        text = (stage.folder / f"{page}.md").read_text() if (stage.folder / f"{page}.md").exists() else ""
        for block in re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            targets = [re.sub(r".*<(.*)>", r"\1", entry) for entry in entries]
            names = {docs.os.path.normpath(f"{page}/../{target}") for target in targets}
            waiting += sorted(names - reached)
    written = {p.relative_to(stage.folder).with_suffix("").as_posix() for p in stage.folder.rglob("*.md")}
    written |= {p.relative_to(stage.folder).with_suffix("").as_posix() for p in stage.folder.rglob("*.ipynb")}
    assert len(written) > 200
    assert not written - reached, "a new page goes into a toctree, such as that of docs/guide/index.md or docs/about.md"
    assert not reached - written


def test_every_notebook_has_a_card_with_a_picture(stage):
    gallery = (stage.folder / "notebooks" / "index.md").read_text()
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        name = path.relative_to(ROOT / "notebooks").with_suffix("").as_posix()
        assert f":link: {name}\n" in gallery
        assert (stage.folder / "_thumbnails" / f"{name.replace('/', '-')}.png").stat().st_size > 1000


def test_a_link_or_citation_that_leads_nowhere_is_refused(stage):
    with pytest.raises(ValueError, match="links to nowhere.md"):
        stage.relinked("see [this](nowhere.md)", "docs/index.md")
    with pytest.raises(ValueError, match="cites nobody1900"):
        stage.cited("as in [nobody1900]", "docs/index.md")
    assert stage.cited("[karras2022, ho2020]", "x") == "{cite:p}`karras2022,ho2020`"
    assert stage.relinked("[t](trust.md#counts) `[x](y)`", "docs/pet.md") == "[t](trust.md#counts) `[x](y)`"
    assert stage.relinked("[`code`](../LICENSE), [`x`](../setup.py)", "docs/pet.md") == "[`code`](licence.md), `x`"


def test_broken_links_and_fetched_files_of_a_built_site_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">b</a><a id="x" href="#x">x</a><img src="//cdn/x.png">')
    (tmp_path / "b.html").write_text('<script src="https://cdn.org/x.js"></script><a href="c.html">c</a>')
    wrong = docs.check(tmp_path)
    assert [line.split(": ")[-1] for line in wrong] == [
        "a.html fetches //cdn/x.png",
        "that page has no such place",
        "b.html fetches https://cdn.org/x.js",
        "b.html links to c.html, which is not there",
    ]


def test_badges_appear_where_the_address_is_known(monkeypatch):
    assert docs.badges("notebooks/start_here.ipynb", "../") == ""
    monkeypatch.setattr(docs, "REPOSITORY", "https://github.com/owner/name")
    text = docs.badges("notebooks/start_here.ipynb", "../")
    assert "github/owner/name/blob/main/notebooks/start_here.ipynb" in text and "gh/owner/name/main" in text


def test_messages_of_the_troubleshooting_page_are_those_of_the_package():
    sources = " ".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # literals that run over lines
    rows = re.findall(r"^\| (.*?) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = [code for row in rows for code in re.findall(r"`([^`]{12,})`", row)]
    assert len(messages) > 25
    assert [message for message in messages if message not in sources] == []
