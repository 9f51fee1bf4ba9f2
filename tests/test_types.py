"""The type checker over src, here rather than before the tests so that it shares the cores with them."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_no_type_error():
    checker = Path(sys.executable).with_name("basedpyright")
    if not checker.exists():
        pytest.skip("basedpyright is not installed: pip install companion[test]")
    done = subprocess.run([checker], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
