"""The blocks of CONTRIBUTING.md run, one after the other, as a reader would."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def test_the_examples_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    names = {"__name__": "contributing"}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)  # our own page, not a loaded file
    assert names["draws"].bill.denoiser_calls == 20
