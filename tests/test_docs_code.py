"""Every Python block of the guide runs, page by page, one after the other, as a reader would run them.

A line before a block may say otherwise: `<!-- skip: reason -->`, or `<!-- needs: MODULE -->` for one that another
package must be installed for; a page's later blocks then run without it.
"""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"(?:<!-- (skip|needs): (.*?) -->\n+)?```python\n(.*?)```", re.DOTALL)
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "```python" in page.read_text()]


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(skip, needs or nothing; why; code) of every block of a page."""
    return BLOCK.findall(page.read_text())


def test_there_is_a_guide_to_run_and_whatever_is_skipped_says_why():
    every = [block for page in PAGES for block in blocks(page)]
    assert sum(not kind for kind, _, _ in every) >= 20
    assert all(len(why) > 10 for kind, why, _ in every if kind == "skip")
    assert sum(page.read_text().count("```python") for page in PAGES) == len(every)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, ran, left = {"__name__": "page"}, 0, []
    for kind, why, code in blocks(page):
        if kind == "skip" or (kind == "needs" and find_spec(why) is None):
            left.append(why)
            continue
        exec(compile(code, page.name, "exec"), names)  # our own pages, not a loaded file
        ran += 1
    if not ran:
        pytest.skip(f"no block can run here: {'; '.join(left)}")
