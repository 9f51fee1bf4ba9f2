"""The blocks of CONTRIBUTING.md run, one after the other, as a reader would."""

import re
from pathlib import Path

from companion.data.intake import readers

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def test_the_examples_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    monkeypatch.setattr(readers, "READERS", readers.READERS)  # the page adds one
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))
    names = {"__name__": "contributing", "folder": tmp_path}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)  # our own page, not a loaded file
    assert names["draws"].bill.denoiser_calls == 20
