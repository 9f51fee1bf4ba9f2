"""The list of published files: complete, consistent with the papers' facts, and honest about what is missing."""

import hashlib
import json

import pytest

from companion.models import checkpoint as weights
from companion.models import registry
from companion.models.kinds import KINDS
from companion.models.registry import entries, find

# From the published lists of parameters: tensors, parameters, and the SHA-256 of the sorted [name, shape] as JSON.
AID = {
    "aid/fastmri-320-cplx": (696, 139201540, "f51613cea8ebc2f0b756e994d09e11e1ac679f22488775d0a4f4b23eabdeb22b"),
    "aid/normal-fastmri-320-cplx": (518, 121022404, "70a1c90716de188a38a8c74c7e7403d4a559b8dbb660886251b0a3be0b80cf96"),
    "aid/cardiac-latent": (658, 26056582, "cacd984899c500b904554f37c4168b1a8f10de78b58c7f3148bef5d7b54bd489"),
    "aid/abide": (526, 26955010, "94d4d5c3058416b3bfbab0aebc9ae8206b5f794fa04159713e84820fde67588a"),
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPANION_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("name", AID)
def test_configs_build_the_published_networks(name):
    tensors = weights._blank(find(name).config).state_dict()
    shapes = json.dumps(sorted([key, list(x.shape)] for key, x in tensors.items()))
    count, parameters, digest = AID[name]
    assert len(tensors) == count and sum(x.numel() for x in tensors.values()) == parameters
    assert hashlib.sha256(shapes.encode()).hexdigest() == digest
    assert find(name).about == pytest.approx(4 * parameters, rel=registry.ROUNDING)  # float32


def test_every_entry_is_complete():
    known = entries()
    assert {"aid/vq-cardiac-d4", "aid/image_seq", "aid/cardiac_seq", "aid/fastmri-example"} <= known.keys()
    assert not known.keys() & set(weights.embedded())
    for entry in known.values():
        assert entry.title and entry.citation and (entry.kind == "data" or entry.kind in KINDS)
        if entry.repo:
            assert entry.file and entry.size and entry.licence
        if entry.repo and entry.kind != "data":
            weights._blank(entry.config)
            assert {"source", "scale"} <= entry.config["data"].keys()


def test_last_parts_of_names_will_do_if_unique():
    assert find("image_seq") is find("aid/image_seq") and find("nothing") is None
    assert find("vqvae").name == "latent3d/vqvae"


def test_unpublished_weights_say_how_to_make_them():
    with pytest.raises(ValueError, match="nobody has published .*/2_train.ipynb.* --kind pet"):
        weights.load("pet/dose-enhancement")
    with pytest.raises(FileNotFoundError, match="did you mean 'aid/cardiac-latent'"):
        weights.load("aid/cardiac_latent")


def test_users_add_entries_and_bad_lists_are_named(home):
    home.mkdir()
    (home / "registry.yaml").write_text("lab/prior: {repo: lab/prior, file: model.safetensors, kind: aid}\n")
    assert find("lab/prior").repo == "lab/prior" and find("aid/abide")
    (home / "registry.yaml").write_text("lab/prior: {repository: lab/prior}\n")
    registry._read.cache_clear()
    with pytest.raises(ValueError, match="registry.yaml is no registry: .*repository"):
        entries()


def test_a_damaged_lock_is_not_taken_for_an_empty_one(home):
    home.mkdir()
    registry.lock_file().write_text("{")
    with pytest.raises(ValueError, match="lock.json is not JSON .* says which downloads are trusted"):
        weights.converted(find("aid/abide"))


def test_embedded_names(monkeypatch):
    monkeypatch.setattr(weights, "embedded", lambda: ["brain/t1w", "aid/brain"])
    with pytest.raises(ValueError, match="which embedded checkpoint. Give its name: brain/t1w, aid/brain"):
        weights.load("embedded")
    monkeypatch.undo()
    if "brain/t1w" in weights.embedded():
        source = weights.describe_source("embedded", default="brain/t1w")
        assert source.name == "brain/t1w" and source.sha256 == weights.describe("brain/t1w")["sha256"]
        assert str(source).startswith("brain/t1w: embedded in the repository; ")
