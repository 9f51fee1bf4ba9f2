"""The index shows every run and asks for nothing from the network."""

import fcntl
import json
import re
import shutil
from dataclasses import dataclass
from html.parser import HTMLParser

import nbformat
import nbformat.v4 as nb
import pytest

from companion.parameters import Parameters
from companion.workbench.index import find_runs, numbers, write_index
from companion.workbench.pages import mathml, write_page
from companion.workbench.run import MANIFEST, Run


@dataclass(frozen=True)
class Plain(Parameters):
    pass


class Links(HTMLParser):
    """Collects what a page refers to and checks that its tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.found, self.images, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.found += [v for k, v in attributes.items() if k in ("href", "src")]
        if tag == "img":
            self.images.append(attributes)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag != "img":
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def runs(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    for name in ("good", "bad"):
        run = Run.start(Plain(out=f"runs/brain/{name} <1>", device="cpu"), paper="brain", stage=name)
        fig = plt.figure(figsize=(1, 1))
        run.figure(fig, "overview", alt='four "brains" & one <map>', caption="A < B")
        plt.close(fig)
        run.metrics({"psnr_db": 31.23456, "methods": {"tv": {"ssim": 0.9}, "draws": {"ssim": 0.95}}})
        run.finish()
    (run.folder / "metrics.json").write_text("{}")
    (tmp_path / "runs" / "brain" / "stopped").mkdir()
    (tmp_path / "runs" / "brain" / "stopped" / "notebook.ipynb").write_text("{}")
    return tmp_path / "runs"


def test_every_run_is_shown_offline(runs):
    text = write_index(runs).read_text()
    page = Links(text)
    assert "1 of 3 runs are done" in text
    assert "31.23" in text and "0.95" in text and "A &lt; B" in text
    assert "metrics.json is not the file that the run wrote" in text and "stopped, failed" in text
    assert [image["alt"] for image in page.images] == ['four "brains" & one <map>']
    assert "://" not in re.sub(r"<!--.*?-->", "", text)
    from urllib.parse import unquote

    for link in page.found:
        assert link.startswith("#") or (runs / unquote(link)).is_file(), link


def change(folder, **values):
    """Edit run.json: values given, or keys dropped where None."""
    record = json.loads((folder / MANIFEST).read_text())
    record |= values
    (folder / MANIFEST).write_text(json.dumps({k: v for k, v in record.items() if v is not None}))


def test_every_kind_of_folder_has_its_state_and_reason(runs):
    brain = runs / "brain"
    for name in ("future", "old", "ancient", "foreign", "rubbish"):
        shutil.copytree(brain / "good <1>", brain / name)
    change(brain / "future", packages={"companion": "99.0"})
    change(brain / "old", packages={"companion": "0.0.9"})
    change(brain / "ancient", parameters=None, end=None)
    change(brain / "foreign", results=["overview.png"])
    (brain / "rubbish" / MANIFEST).write_text("{")
    hidden = brain / "good <1>" / ".examples"
    hidden.mkdir()
    (hidden / MANIFEST).write_text("{}")
    (brain / "future" / "notebook.ipynb").write_text("no notebook")  # the log of a run is not among its results
    with open(brain / "stopped" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        states = {state.folder.name: state for state in find_runs(runs)}
        assert states["stopped"].state == "running"
    assert {name: state.state for name, state in states.items()} == {
        "good <1>": "done",
        "bad <1>": "corrupt",
        "stopped": "running",
        "future": "done",
        "old": "older",
        "ancient": "older",
        "foreign": "older",
        "rubbish": "corrupt",
    }
    assert "0.0.9" in states["old"].reason and "lacks parameters, end" in states["ancient"].reason
    states = {state.folder.name: state.state for state in find_runs(runs)}
    assert states["stopped"] == "incomplete"
    text = write_index(runs).read_text()
    Links(text)
    assert "lacks parameters, end" in text and 'class="older"' in text


def test_size_is_enough_to_list_and_the_hash_to_trust(runs):
    metrics = runs / "brain" / "good <1>" / "metrics.json"
    metrics.write_text(metrics.read_text().replace("31.2", "99.9"))
    assert [s.state for s in find_runs(runs, hashes=False)].count("done") == 1
    assert [s.state for s in find_runs(runs)].count("done") == 0


MATHS = r"""# Title

The cost is $5, and `$HOME` is no formula. Inline $A^H y$ and

$$ x = \underbrace{(A^H A + w)^{-1} A^H A\, x}_{\text{measured}} $$

[the next notebook](next.ipynb), [a paper](https://example.org/paper)

```sh
echo $a $b
```
"""


def test_a_notebook_becomes_one_page_without_requests(tmp_path):
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    outputs = [
        nb.new_output(
            "display_data",
            {"image/png": png, "text/plain": "<Figure>", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}},
            metadata={"image/png": {"alt": "a head <1>"}},
        ),
        nb.new_output("display_data", {"image/png": png}),
        nb.new_output("stream", text="a < b & c"),
    ]
    cell = nb.new_code_cell("print('hello $x$')", outputs=outputs)
    notebook = nb.new_notebook(cells=[nb.new_markdown_cell(MATHS), cell], metadata={"widgets": {"state": {}}})
    path = tmp_path / "notebook.ipynb"
    nbformat.write(notebook, path)
    page = write_page(path)
    text = page.read_text()
    parsed = Links(text)
    assert text.count("<math") == 2 and "munder" in text and "companionmaths" not in text
    assert "$5, and" in text and "$HOME" in text and ">$b<" in text
    assert [image["alt"] for image in parsed.images] == ["a head <1>", "picture made by the cell above"]
    sources = [link for link in parsed.found if not link.startswith(("#", "data:"))]
    assert sources == ["https://example.org/paper"], "links out are for clicking; nothing is fetched"
    assert "<script src" not in text and "@import" not in text and "url(" not in text
    before = page.stat().st_mtime_ns
    assert write_page(path).stat().st_mtime_ns == before, "a page that is up to date stays"
    (tmp_path / "broken.ipynb").write_text("{")
    with pytest.raises(ValueError, match="broken.ipynb is not a notebook"):
        write_page(tmp_path / "broken.ipynb")


def test_a_formula_beyond_the_converter_is_shown_as_it_was_written():
    assert mathml("x_0", block=False).startswith("<math")
    assert mathml(r"\frac{", block=True) == r"<code>\frac{</code>"


def test_nested_numbers_become_one_table():
    html = numbers({"a": {"x": 1.0}, "b": {"x": 2, "y": [1, 2]}})
    assert html.count("<table>") == 1 and "1, 2" in html
    assert numbers({}) == ""


def test_missing_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_index(tmp_path / "none")
