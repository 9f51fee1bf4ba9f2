"""Published weights through the real hub client, against a hub on loopback: they arrive whole or not at all."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import published
import pytest
import torch
import yaml
from hub_server import Hub

from companion import cli
from companion.models import architectures, obtain, registry
from companion.models import checkpoint as weights
from companion.models import folder as models_folder
from companion.models.hub import HubModel, push
from companion.models.registry import Entry, fetch, moved
from companion.papers import train_prior

REPO, FILE, NAME = "authors/priors", "AID/model.pt", "test/model"


@pytest.fixture(scope="module")
def net():
    return published.network()


@pytest.fixture(scope="module")
def data(net, tmp_path_factory) -> bytes:
    """A published file."""
    return published.aid_file(tmp_path_factory.mktemp("published") / "model.pt", net).read_bytes()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, and a client that knows no other and has an empty cache."""
    with Hub() as hub:
        constants = huggingface_hub.constants
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
                            "HF_HUB_CACHE": str(tmp_path / "hub")}.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("COMPANION_HOME", str(tmp_path / "home"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(time, "sleep", _short(time.sleep))
        yield hub


def _short(sleep):
    return lambda seconds: sleep(min(seconds, 0.05))


@pytest.fixture
def model(hub, data, tmp_path) -> Entry:
    """A published model on the hub and in the user's registry."""
    hub.commit(REPO, {FILE: data, "README.md": b"# priors"})
    facts = {"repo": REPO, "file": FILE, "kind": "aid", "config": published.CONFIG, "licence": "CC0", "title": "a test"}
    return register(tmp_path, facts)


def register(tmp_path, facts) -> Entry:
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "registry.yaml").write_text(yaml.safe_dump({NAME: facts}))
    registry._read.cache_clear()
    return registry.find(NAME)


def empty_cache(tmp_path):
    """What is left when the user clears the client's cache."""
    (tmp_path / "hub").rename(tmp_path / f"old{time.monotonic_ns()}")


def client(hub, tmp_path) -> subprocess.Popen:
    """A process of its own that fetches from this hub."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "COMPANION_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    program = f"from companion.models import registry; print(registry.fetch(registry.find({NAME!r})).sha256)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = architectures.network_of(a).state_dict(), architectures.network_of(b).state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ----------------------------------------------------------------------------------------------------------
# It arrives


def test_a_published_name_is_loaded_like_any_other(model, hub, net, tmp_path):
    assert weights.converted(model) is None
    D = weights.load_denoiser(NAME)
    assert same(D, net) and hub.count("GET", "/lfs/") == 1
    source = weights.describe_source(NAME)
    assert source.sha256 in str(source) and "converted from authors/priors" in str(source)
    before = len(hub.requests)
    (tmp_path / "hub").rename(tmp_path / "gone")  # the converted checkpoint needs neither hub nor cache
    assert same(weights.load(NAME), net) and len(hub.requests) == before
    card = (weights.converted(model) / "README.md").read_text()
    assert "CC0" in card and hub.heads[REPO] in card


def test_a_moving_revision_is_recorded_and_later_changes_are_refused(model, hub, data, tmp_path):
    first = fetch(model)
    assert registry.recorded(model)["commit"] == first.revision and moved(model) is None
    before = len(hub.requests)
    assert fetch(model) == first and len(hub.requests) == before  # a known commit needs no network

    hub.commit(REPO, {"README.md": b"# news"})  # other files may change
    assert moved(model) is None
    hub.commit(REPO, {FILE: data + b"changed"})
    assert "has changed AID/model.pt since" in moved(model)
    assert fetch(model) == first  # the change is not taken
    empty_cache(tmp_path)
    assert fetch(model).sha256 == first.sha256  # not even then: the recorded commit is asked for

    changed = fetch(model, accept_change=True)
    assert changed.sha256 != first.sha256 and registry.recorded(model)["commit"] == changed.revision
    assert moved(model) is None


def test_a_recorded_commit_that_is_gone_or_rewritten_is_refused(model, hub, data, tmp_path):
    commit = fetch(model).revision
    empty_cache(tmp_path)
    hub.repos[REPO][commit] = {FILE: data[:-1] + b"!"}  # the same commit now holds other bytes
    with pytest.raises(ValueError, match=r"now holds another AID/model.pt .* was verified on .* --accept-change"):
        fetch(model)
    del hub.repos[REPO][commit]
    hub.heads[REPO] = hub.commit(REPO, {FILE: data})
    hub.repos[REPO].pop(commit, None)
    empty_cache(tmp_path)
    with pytest.raises(FileNotFoundError, match="no revision .* gone from the hub since"):
        fetch(model)


def test_a_pinned_revision_ignores_what_comes_later(model, hub, data, tmp_path):
    pinned = dataclasses.replace(model, revision=hub.heads[REPO])
    hub.commit(REPO, {FILE: b"later" * 1000})
    assert fetch(pinned).path.read_bytes() == data
    empty_cache(tmp_path)
    with pytest.raises(ValueError, match="the registry lists"):
        fetch(dataclasses.replace(pinned, sha256="0" * 64, revision=hub.heads[REPO]))


def test_sizes_are_compared_before_anything_is_downloaded(model, hub, data):
    for about in ({"bytes": len(data) + 1}, {"about": 2 * len(data)}):
        with pytest.raises(ValueError, match="Nothing was downloaded"):
            fetch(dataclasses.replace(model, **about))
    assert hub.count("GET", "/lfs/") == 0
    fetch(dataclasses.replace(model, about=round(1.01 * len(data))))


def test_patterns_take_all_files_of_a_name(hub, tmp_path):
    hub.commit(REPO, {"Data/seq.hdr": b"# Dimensions\n4 4\n", "Data/seq.cfl": bytes(2000), "Data/sequel": b"no"})
    entry = register(tmp_path, {"repo": REPO, "file": "Data/seq.*", "kind": "data"})
    files = fetch(entry).files
    assert list(files) == ["Data/seq.cfl", "Data/seq.hdr"] and len({f.path.parent for f in files.values()}) == 1
    assert registry.cached(entry).files.keys() == files.keys()
    with pytest.raises(ValueError, match="sample data, no model"):
        weights.load(NAME)


# ----------------------------------------------------------------------------------------------------------
# It does not


def test_flipped_bytes_of_the_right_length_are_caught(model, hub, net, tmp_path):
    hub.faults[FILE] = lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    with pytest.raises(ValueError, match="is damaged: .* not what the hub lists .* copy was removed"):
        weights.load(NAME)
    assert registry.recorded(model) is None and not any((tmp_path / "hub").rglob("model.pt"))
    hub.faults.clear()
    assert same(weights.load(NAME), net)


def test_a_file_spoilt_in_the_cache_is_mended(model, hub, data):
    path = fetch(model).path
    path.write_bytes(data[:5000] + b"?" + data[5001:])
    assert fetch(model).path.read_bytes() == data


def test_a_spoilt_converted_checkpoint_is_refused_and_mended(model, net):
    folder = weights.pull(NAME)
    path = folder / "model.safetensors"
    spoilt = bytearray(path.read_bytes())
    spoilt[-1] ^= 1
    path.write_bytes(spoilt)
    with pytest.raises(ValueError, match="SHA-256 differs"):
        weights.load(NAME)
    weights.pull(NAME)
    assert same(weights.load(NAME), net)


def test_truncated_and_missing_files(model, hub, tmp_path):
    hub.faults[FILE] = lambda content: content[:-100]
    with pytest.raises(OSError, match="nothing incomplete is used"):
        fetch(model)
    hub.faults.clear()
    with pytest.raises(FileNotFoundError, match=r"does not hold AID/renamed.pt; .* look at http"):
        fetch(dataclasses.replace(model, file="AID/renamed.pt"))
    with pytest.raises(FileNotFoundError, match="has no repository authors/none, or it is private"):
        fetch(dataclasses.replace(model, repo="authors/none"))
    with pytest.raises(FileNotFoundError, match="has no revision nowhere"):
        fetch(dataclasses.replace(model, revision="nowhere"))
    assert not registry.lock_file().exists()


def test_a_cut_connection_is_taken_up_again(model, hub, data):
    hub.cuts[FILE] = 2
    assert fetch(model).path.read_bytes() == data
    assert hub.count("GET", "/lfs/") == 3


def test_a_connection_that_always_breaks(model, hub, monkeypatch, tmp_path):
    hub.faults[FILE] = lambda content: content[:1] if hub.cuts.get(FILE) else content
    hub.cuts[FILE] = 100
    with pytest.raises(OSError, match="Nothing incomplete is used|nothing incomplete is used"):
        fetch(model)
    assert not any((tmp_path / "hub").rglob("model.pt"))


def test_gated_repositories_say_how_to_get_in(model, hub, monkeypatch):
    hub.gated.add(REPO)
    with pytest.raises(PermissionError, match="is gated: accept its conditions at .*authors/priors.*hf auth login"):
        fetch(model)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert fetch(model).path.exists()


def test_offline_with_and_without_cache(model, hub, net, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set: .* companion weights pull test/model"):
        weights.load(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    files = fetch(model)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert fetch(model) == files and same(weights.load(NAME), net) and moved(model) is None
    assert len(hub.requests) == before


def test_full_disks_are_seen_before_and_during(model, hub, monkeypatch, tmp_path):
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(registry.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(OSError, match="test/model needs 2 MB in .*, where 0 MB are free"):
            fetch(model)
        assert hub.count("GET", "/lfs/") == 0
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # larger files fail, as on a full disk
    try:
        with pytest.raises(OSError, match="the disk is full; free some space"):
            fetch(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert registry.recorded(model) is None
    fetch(model)


def test_kill_during_a_pull_leaves_nothing_that_loads(model, hub, net, tmp_path):
    hub.slow[FILE] = 30
    process = client(hub, tmp_path)
    deadline = time.monotonic() + 120
    partial = []
    while not partial and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        partial = list((tmp_path / "hub").rglob("*.incomplete")) if hub.count("GET", "/lfs/") else []
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert partial and process.returncode == -signal.SIGKILL
    assert registry.cached(model) is None and weights.converted(model) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError):
            weights.load(NAME)
    hub.slow.clear()
    assert same(weights.load(NAME), net)  # no lock is left behind either


def test_two_processes_pull_at_once(model, hub, net, tmp_path):
    hub.slow[FILE] = 1
    pulls = [client(hub, tmp_path) for _ in range(2)]
    for process in pulls:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and len(out.strip()) == 64, err
    assert hub.count("GET", "/lfs/") == 1
    with ThreadPoolExecutor() as pool:  # and two convert at once
        folders = list(pool.map(weights.pull, [NAME, NAME]))
    assert folders[0] == folders[1] and [p.name for p in folders[0].parent.iterdir()] == [folders[0].name]
    assert same(weights.load(NAME), net)


# ----------------------------------------------------------------------------------------------------------
# Hub ids, and the way back


def test_push_and_load_by_hub_id(hub, net, tmp_path, monkeypatch):
    folder = models_folder.save_checkpoint(
        tmp_path / "mine", net, published.CONFIG, {"steps": 1}, "---\nlicense: mit\n---\n# mine\n"
    )
    with pytest.raises(OSError, match="hf auth login"):
        push(folder, "me/prior")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert "/me/prior/commit/" in push(folder, "me/prior")
    commit = hub.heads["me/prior"]
    assert hub.repos["me/prior"][commit]["README.md"] == (folder / "README.md").read_bytes()

    D = weights.load_denoiser("hf:me/prior")
    assert same(D, net)
    assert f"me/prior at {commit[:12]}" in str(weights.describe_source("hf:me/prior"))
    before = len(hub.requests)
    assert same(HubModel.from_pretrained("me/prior", revision=commit).model, net)
    assert same(weights.load(f"hf:me/prior@{commit}"), net) and len(hub.requests) == before
    x, cond = torch.randn(1, 1, 8, 8, dtype=torch.complex64), torch.randn(1, 2, 1, 8, 8, dtype=torch.complex64)
    model = HubModel.from_pretrained(str(folder))
    assert torch.equal(model(x, torch.ones(1), cond), D(x, torch.ones(1), cond))

    hub.commit("me/prior", {"small/config.json": (folder / "config.json").read_bytes()})
    hub.commit("me/prior", {"small/model.safetensors": (folder / "model.safetensors").read_bytes()})
    assert same(weights.load("hf:me/prior:small"), net)
    hub.commit("me/prior", {"config.json": json.dumps(published.CONFIG | {"sha256": "0" * 64}).encode()})
    with pytest.raises(ValueError, match="SHA-256 differs"):
        weights.load("hf:me/prior")


def test_hub_ids_of_published_files_are_converted_and_others_refused(model, hub, net, data):
    assert same(weights.load(f"hf:{REPO}:{FILE}"), net)
    assert same(weights.load(f"hf:{REPO}@{hub.heads[REPO]}:{FILE}"), net)
    hub.commit("me/pickles", {"a.pt": data})
    with pytest.raises(ValueError, match="a pickle that the registry does not know"):
        weights.load("hf:me/pickles:a.pt")
    with pytest.raises(ValueError, match="is no hub id; expected hf:owner/name"):
        weights.load("hf:pickles")
    with pytest.raises(FileNotFoundError, match="does not hold config.json"):
        weights.load("hf:me/pickles")


def test_fine_tuning_is_the_same_from_embedded_converted_and_hub_checkpoints(hub, tmp_path):
    """The same weights from three places: the same training, to the bit."""
    start = weights.load("brain/t1w")
    config = {key: weights.describe("brain/t1w")[key] for key in ("network", "denoiser", "data")}
    published.aid_file(tmp_path / "prior.pt", architectures.network_of(start))
    folder = obtain.convert(tmp_path / "prior.pt", "aid", tmp_path / "converted", config)
    hub.commit("me/prior", {path.name: path.read_bytes() for path in folder.iterdir()})

    trained = []
    for name in ("brain/t1w", str(folder), "hf:me/prior"):
        p = train_prior.TrainPrior(
            out=str(tmp_path / f"run{len(trained)}"), data=str(tmp_path / "slices.h5"), image_size=16, subjects=1,
            slices_per_subject=2, steps=2, batch_size=2, grad_accumulation=1, warmup=0, autocast=None, start_from=name,
        )  # fmt: skip
        trained.append(train_prior.train(p, progress=False)[0])
    assert all(same(trained[0].ema, other.ema) for other in trained[1:]) and not same(trained[0].ema, start)


# ----------------------------------------------------------------------------------------------------------
# The command


def command(monkeypatch, *words) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["companion", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_the_command(model, hub, data, monkeypatch, capsys):
    assert command(monkeypatch, "weights", "where", NAME) == 1
    assert f"not here: companion weights pull {NAME}" in capsys.readouterr().out
    assert command(monkeypatch, "weights", "pull", NAME) in (0, None)
    assert "converted from authors/priors" in capsys.readouterr().out
    assert command(monkeypatch, "weights", "where", NAME) in (0, None)
    folder = capsys.readouterr().out.strip()
    assert command(monkeypatch, "weights", "list") in (0, None)
    assert re.search(rf"{NAME} .* here +a test", capsys.readouterr().out)

    assert command(monkeypatch, "weights", "verify") in (0, None)
    assert f"{NAME}, download of {FILE}: whole" in capsys.readouterr().out
    with open(f"{folder}/model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    assert command(monkeypatch, "weights", "verify") == 1
    assert f"SHA-256 differs); fetch it again: companion weights pull {NAME}" in capsys.readouterr().out

    hub.commit(REPO, {FILE: data + b"changed"})
    assert command(monkeypatch, "weights", "pull", NAME) in (0, None)  # mends; says that the hub has changed
    assert "The change is refused" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "companion weights pull" in command(monkeypatch, "weights", "pull", "aid/abide")
    assert "did you mean" in command(monkeypatch, "weights", "pull", "aid/abid")
