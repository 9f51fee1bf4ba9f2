"""Scripts of situations that people reported, run as they are; only names that have moved since are replaced."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parents[2] / "shared" / "cases"
MOVED = {"companion.stack": "companion.show.stack"}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases")]


def said(script: str, out: Path) -> dict[str, str]:
    """What a case prints, its label -> the rest of the line."""
    text = (CASES / script).read_text()
    for old, new in MOVED.items():
        text = text.replace(old, new)
    path = os.pathsep.join([str(CASES / "04-fastmri-variants"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, timeout=500,
        env=os.environ | {"CASES": str(CASES), "OUT": str(out), "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return {line[:29].strip(): line[29:].strip() for line in lines} | {line.split()[0]: line for line in lines}


def test_fastmri_variants(tmp_path):
    told = said("04-fastmri-variants/t_fm.py", tmp_path)
    assert "mask outside lines [0.0," in told["lines"] and "1.0" not in told["lines"]
    assert told["full"] == "full (2, 4, 64, 64) (8, 56) (32, 64) (5.0, 6.875, 3.4375)"
    assert told["pf"] == "pf (2, 4, 64, 64) (16, 64)" and told["peak"] == "peak col 32"
    for name in ("nolim", "otherns", "bom", "latin", "nul"):
        assert told[name] == f"{name} ok (32, 64) (0, 64)"


def test_cfl_headers_and_strange_files_in_the_viewer(tmp_path):
    told = said("07-cfl-and-view/try.py", tmp_path)
    for name in ("plain", "crlf", "cr", "comments", "after", "tabs", "nospace", "lower", "bom", "na me ü", "a.b.c"):
        assert told[f"read {name}"] == "ok ((4, 6, 1, 1), True)", name
    for name in ("big", "small", "zero", "neg", "empty", "float", "huge", "c16"):
        assert f"/{name}." in told[f"read {name}"] and "ValueError" in told[f"read {name}"], "an error names its file"
    for label, line in told.items():
        if label.startswith(("view ", "fastmri ", "series ", "read ")) and not line.startswith("ok "):
            kind, _, message = line.partition(": ")
            assert kind in ("ValueError", "FileNotFoundError", "Unreadable"), f"{label} {line}"
            named = [e for e in ".cfl .hdr .npy .npz .h5 .mat .rawb .mnc .GZ 07".split() if e in message]
            assert named, f"{label}: {line} names no file"
