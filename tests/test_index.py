"""The index shows every run and asks for nothing from the network."""

import re
from dataclasses import dataclass
from html.parser import HTMLParser

import pytest

from companion.index import numbers, write_index
from companion.parameters import Parameters
from companion.runs import Run


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
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def runs(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
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


def test_nested_numbers_become_one_table():
    html = numbers({"a": {"x": 1.0}, "b": {"x": 2, "y": [1, 2]}})
    assert html.count("<table>") == 1 and "1, 2" in html
    assert numbers({}) == ""


def test_missing_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_index(tmp_path / "none")
