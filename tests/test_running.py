"""Running in other people's surroundings: foreign kernels, odd paths and texts, no home, old tokens, no checkout."""

import dataclasses
import http.server
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

import companion
from companion.models import registry
from companion.parameters import Parameters, check, coerce, param
from companion.workbench import doctor, run, surroundings
from companion.workbench.runner import run_notebook
from companion.workbench.surroundings import settle

SRC = Path(__file__).parents[1] / "src"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path))


def foreign(folder):
    """A kernel called python3 that belongs to another Python, where there is nothing."""
    spec = folder / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(
        json.dumps({"argv": ["/nowhere/python", "-f", "{connection_file}"], "display_name": "x", "language": "x"})
    )


def test_the_kernel_is_this_interpreter_whatever_specs_lie_about_and_braces_are_no_fields(
    tiny_notebook, tmp_path, monkeypatch
):
    foreign(tmp_path / "home" / ".local" / "share" / "jupyter")
    foreign(tmp_path / "path")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "path"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    odd = tmp_path / "a {seed} {} b"
    odd.mkdir()
    notebook = odd / "tiny {x}.ipynb"
    notebook.write_text(
        tiny_notebook.read_text().replace("import os, time", "import os, sys, time; print(sys.executable)")
    )
    folder = run_notebook(notebook, {"scale": "4"}, str(odd / "out {scale}"))
    assert folder == odd / "out {scale}"
    assert json.loads((folder / "metrics.json").read_text()) == {"double": 8}
    assert sys.executable in (folder / "notebook.ipynb").read_text()


def test_a_companion_of_another_version_is_refused(monkeypatch):
    monkeypatch.setenv(run.VERSION, "0.0.1")
    with pytest.raises(RuntimeError, match=f"has companion {companion.__version__} .* runner has 0.0.1"):
        run.Run.start(Parameters(out="runs/x"), paper="none", stage="x")
    assert not Path("runs").exists()
    monkeypatch.setenv(run.VERSION, companion.__version__)
    run.Run.start(Parameters(out="runs/x"), paper="none", stage="x")


def test_an_old_companion_in_the_kernel_is_seen_afterwards(tmp_path, monkeypatch):
    from companion.workbench.runner import RunFailed, _verify

    monkeypatch.setenv(run.EXECUTION, "mark")
    made = run.Run.start(Parameters(out="runs/x"), paper="none", stage="x")
    made.finish()
    _verify(made.folder, "mark")
    record = json.loads((made.folder / "run.json").read_text())
    record["packages"]["companion"] = "0.0.1"
    (made.folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunFailed, match="computed by companion 0.0.1"):
        _verify(made.folder, "mark")


# -------------------------------------------------------------------------------------------------------- parameters

MODELS = ("AID", "AID, newest slice only", "single image", "1,2")


@dataclasses.dataclass(frozen=True)
class Texts(Parameters):
    models: tuple[str, ...] = param(("AID",), "some", choices=MODELS)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("AID", ("AID",)),
        ("AID, newest slice only", ("AID, newest slice only",)),
        ("AID,newest slice only,AID", ("AID, newest slice only", "AID")),
        ("[single image, AID, newest slice only, 1,2]", ("single image", "AID, newest slice only", "1,2")),
        ("'AID, newest slice only', AID", ("AID, newest slice only", "AID")),
        ("", ()),
    ],
)
def test_choices_with_commas_come_whole_from_the_command_line(text, items):
    assert check(Texts, {"models": text})["models"] == items


def test_lists_and_quotes_in_texts():
    assert coerce("x", "1, 2,3", tuple[int, ...]) == (1, 2, 3)
    assert coerce("x", "(0.5)", tuple[float, ...]) == (0.5,)
    assert coerce("x", '"a, b", c', tuple[str, ...]) == ("a, b", "c")
    assert coerce("x", "it's, fine", tuple[str, ...]) == ("it's", "fine")


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert coerce("x", "~/data", str) == "/home/ada/data"
    assert coerce("x", "~/data", str | None) == "/home/ada/data"
    assert coerce("x", "~/a, b", tuple[str, ...]) == ("/home/ada/a", "b")
    assert coerce("x", "~", str | None) is None and coerce("x", "a~/b", str) == "a~/b"


# --------------------------------------------------------------------------------------------------------------- home


@pytest.mark.parametrize("home", [None, "", "/proc/none", "relative"])
def test_where_there_is_no_home_a_temporary_folder_stands_for_it(tmp_path, monkeypatch, home):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("LOGNAME", raising=False)
    monkeypatch.setenv("HOME", "x") if home is None else monkeypatch.setenv("HOME", home)
    if home is None:
        monkeypatch.delenv("HOME")

    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(surroundings.pwd, "getpwuid", nobody)
    folder = settle()
    assert folder == tmp_path / f"companion-{os.getuid()}" and os.environ["HOME"] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and os.environ["LOGNAME"] == f"uid{os.getuid()}"
    assert settle() is None  # now there is one
    monkeypatch.setenv("HOME", "")
    assert settle() == folder
    folder.chmod(0o777)  # anybody may have put something there
    monkeypatch.setenv("HOME", "")
    other = settle()
    assert other != folder and other.parent == tmp_path


def test_a_home_that_is_not_named_is_found(tmp_path, monkeypatch):
    class Entry:
        pw_dir = str(tmp_path)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(surroundings.pwd, "getpwuid", lambda uid: Entry)
    assert settle() is None and os.environ["HOME"] == str(tmp_path)


def _python_for_strangers():
    """A Python of this version that a user without rights can start, and the folders that it needs, or None."""
    site = next((p for p in sys.path if p.endswith("site-packages")), "")
    for name in (sys.executable, "/usr/bin/python3"):
        test = [
            "setpriv",
            "--reuid=12345",
            "--regid=12345",
            "--clear-groups",
            "env",
            "-u",
            "HOME",
            f"PYTHONPATH={SRC}:{site}",
        ]
        code = f"import sys, numpy, companion; assert sys.version_info[:2] == {sys.version_info[:2]}"
        try:
            if subprocess.run([*test, name, "-c", code], capture_output=True, timeout=60).returncode == 0:
                return [*test, name]
        except OSError:
            return None
    return None


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become a user without an entry in passwd")
@pytest.mark.parametrize("home", ["HOME=", "HOME=/"])
def test_a_random_user_runs_a_notebook_and_numba(tiny_notebook, tmp_path, home):
    start = _python_for_strangers()
    if start is None:
        pytest.skip("no Python of this version that a user without rights can start")
    free = Path(tempfile.mkdtemp(prefix="companion-test-"))
    free.chmod(0o777)
    notebook = free / "tiny.ipynb"
    body = "import numba, sigpy.mri, matplotlib.pyplot\\nsigpy.mri.poisson((16, 16), 2)\\nimport os, time"
    notebook.write_text(tiny_notebook.read_text().replace("import os, time", body))
    start = [*start[:4], "env", home, f"TMPDIR={free}", f"COMPANION_HOME={free}", start[-2], start[-1]]
    command = [*start, "-m", "companion.cli", "run", notebook, "--out", free / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SRC.parent, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((free / "out" / "metrics.json").read_text()) == {"double": 2}
    made = {path.name for path in (free / "companion-12345").rglob("*")}
    assert "numba" in " ".join(made) or any(".nbi" in name for name in made)


# ------------------------------------------------------------------------------------------------------ hub and doctor


def test_an_expired_token_says_so(monkeypatch, tmp_path):
    """As the hub does: 401 to any request with a token that is not valid, also for public repositories."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session, hf_raise_for_status

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *a):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        with (
            pytest.raises(PermissionError, match="token: it has expired .*hf auth login.*need no token"),
            registry.explained("aid/x", "owner/name", "main"),
        ):
            answer = get_session().get(
                f"http://127.0.0.1:{server.server_port}/owner/name/resolve/main/model.safetensors"
            )
            hf_raise_for_status(answer)
    finally:
        server.shutdown()
    assert issubclass(HfHubHTTPError, OSError)


def test_the_doctor_outside_a_checkout_tells_the_truth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COMPANION_HOME", raising=False)
    assert "no project here: companion init FOLDER" in doctor.machine() and str(SRC / "companion") in doctor.machine()
    assert "no notebooks here: companion init FOLDER" in doctor.papers()
    assert "in this version" not in doctor.papers()


def test_a_run_does_not_wait_for_a_grammar_of_web_addresses():
    """jsonschema would compile one for its format checks, in a few seconds; nbformat checks notebooks without."""
    code = (
        "import sys\nfrom companion.workbench.surroundings import without_grammar\n"
        "with without_grammar():\n    import nbformat\n"
        "assert 'rfc3987_syntax' not in sys.modules and 'jsonschema' in sys.modules\n"
        "nbformat.validate(nbformat.v4.new_notebook())\n"
        "try:\n    nbformat.validate({'cells': 3})\nexcept nbformat.ValidationError:\n    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
