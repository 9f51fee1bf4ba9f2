import json
import pickle
import resource
import runpy
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from companion import files
from companion.diffusion.noise import DiscreteSchedule
from companion.models import architectures
from companion.models import checkpoint as weights
from companion.models import folder as model_folder
from companion.models.architectures import build
from companion.models.checkpoint import describe, find, load, load_denoiser
from companion.models.folder import save_checkpoint, write_sums

CONFIG = {
    "network": dict(name="UNet", in_channels=2, model_channels=32, out_channels=3, channel_mult=[1, 1]),
    "denoiser": dict(name="EDMDenoiser", complex=True, sigma_data=0.35, learned_variance=True, variance_channels=1),
    "data": dict(source="noise", scale="standard deviation 1"),
}
RECORD = {"steps": 7, "seed": 0}


def trained():
    """A denoiser whose weights are all away from their initial values."""
    torch.manual_seed(0)
    D = build(CONFIG).eval()
    for p in D.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return D


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("saved") / "prior", trained(), CONFIG, RECORD)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A checkpoint of one's own, to be spoilt; without the hash, so that the next line of defence shows."""
    folder = shutil.copytree(saved, tmp_path / "prior")
    config = describe(folder)
    del config["sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def repository(saved, tmp_path, monkeypatch) -> Path:
    """The folder of embedded checkpoints, holding brain/t1w."""
    monkeypatch.setattr(model_folder, "root", lambda: tmp_path / "checkpoints")
    shutil.copytree(saved, tmp_path / "checkpoints" / "brain" / "t1w")
    write_sums()
    return tmp_path / "checkpoints"


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ----------------------------------------------------------------------------------------------------------
# Saving and loading


def test_what_is_loaded_is_what_was_saved(saved):
    D, E = trained(), load(saved)
    x, sigma = torch.randn(2, 1, 8, 8, dtype=torch.complex64), torch.tensor([0.1, 3.0])
    with torch.no_grad():
        for ours, theirs in zip(E.moments(x, sigma), D.moments(x, sigma), strict=True):
            assert torch.equal(ours, theirs)
    assert not E.training and not any(p.requires_grad for p in E.parameters())
    assert describe(saved)["data"] == CONFIG["data"]
    assert json.loads((saved / "training.json").read_text()) == RECORD
    assert "noise" in (saved / "README.md").read_text()


def test_a_file_and_a_folder_are_the_same_checkpoint(saved):
    a, b = load_denoiser(saved), load_denoiser(str(saved / "model.safetensors"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_discrete_denoisers_keep_their_schedule(tmp_path):
    discrete = {"name": "DiscreteDenoiser", "schedule": {"name": "cosine", "steps": 50}, "prediction": "v"}
    config = CONFIG | {"denoiser": discrete, "network": CONFIG["network"] | {"in_channels": 3}}
    D = build(config).eval()
    E = load(save_checkpoint(tmp_path / "discrete", D, config, RECORD))
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 3.0])
    torch.testing.assert_close(E(x, sigma), D(x, sigma), rtol=0, atol=0)
    assert torch.equal(E.schedule.betas, DiscreteSchedule.cosine(50).betas)
    discrete["schedule"]["name"] = "triangle"
    with pytest.raises(ValueError, match="'triangle'; this package knows linear, scaled_linear, zero_terminal, cosine"):
        build(config)


def test_bare_networks_are_loaded_but_are_no_denoisers(tmp_path):
    config = {k: v for k, v in CONFIG.items() if k != "denoiser"}
    save_checkpoint(tmp_path / "net", architectures.network_of(trained()), config, RECORD)
    assert type(load(tmp_path / "net")).__name__ == "UNet"
    with pytest.raises(ValueError, match="bare network"):
        load_denoiser(tmp_path / "net")


def test_half_precision_files_become_float32_and_autocast_is_only_rounding(folder):
    exact = load(folder)
    rewrite(folder, lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}))
    half = load(folder)
    x, sigma = torch.randn(2, 1, 8, 8, dtype=torch.complex64), torch.tensor([0.1, 3.0])
    assert all(p.dtype == torch.float32 for p in half.parameters())
    torch.testing.assert_close(half(x, sigma), exact(x, sigma), rtol=0.05, atol=0.05)
    fast = load(folder, autocast="bfloat16")
    torch.testing.assert_close(fast(x, sigma), exact(x, sigma), rtol=0.05, atol=0.05)


def test_saving_again_replaces_the_checkpoint(folder):
    D = trained()
    with torch.no_grad():
        architectures.network_of(D).out[2].bias.fill_(5)
    save_checkpoint(folder, D, CONFIG, RECORD)
    assert (architectures.network_of(load(folder)).out[2].bias == 5).all()
    assert [path.name for path in folder.parent.iterdir()] == ["prior"]


def test_saving_refuses_what_could_not_be_loaded(folder):
    before = weights.sha256(folder / "model.safetensors")
    wide = CONFIG | {"network": CONFIG["network"] | {"model_channels": 64}}
    with pytest.raises(ValueError, match=r"time_embed.0.weight \(128, 32\): expected \(256, 64\)"):
        save_checkpoint(folder, trained(), wide, RECORD)
    D = trained()
    with torch.no_grad():
        next(D.parameters())[0] = torch.nan
    with pytest.raises(ValueError, match="time_embed.0.weight of the model holds NaN"):
        save_checkpoint(folder, D, CONFIG, RECORD)
    with pytest.raises(ValueError, match="lacks scale"):
        save_checkpoint(folder, trained(), CONFIG | {"data": {"source": "noise"}}, RECORD)
    (folder / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="also holds mine.txt"):
        save_checkpoint(folder, trained(), CONFIG, RECORD)
    assert weights.sha256(folder / "model.safetensors") == before


def test_full_disk_leaves_what_was_there(folder, tmp_path):
    before = weights.sha256(folder / "model.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # larger files fail, as on a full disk
    try:
        for target in (folder, tmp_path / "new"):
            with pytest.raises(OSError, match="could not be written"):
                save_checkpoint(target, trained(), CONFIG, RECORD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert weights.sha256(folder / "model.safetensors") == before
    assert [path.name for path in tmp_path.iterdir()] == ["prior"]


# ----------------------------------------------------------------------------------------------------------
# Embedded names


def test_embedded_names(repository):
    assert weights.embedded() == ["brain/t1w"]
    assert type(load("brain/t1w")).__name__ == "ComplexDenoiser"
    with pytest.raises(FileNotFoundError, match="did you mean 'brain/t1w'"):
        load("brain/t1")


def test_embedded_files_must_be_the_listed_ones(repository):
    path = repository / "brain" / "t1w" / "config.json"
    path.write_text(path.read_text().replace("0.35", "0.36"))
    with pytest.raises(ValueError, match="SHA-256 differs"):
        load("brain/t1w")
    (repository / "SHA256SUMS").write_text("")
    with pytest.raises(ValueError, match="brain/t1w/config.json is not in .*write_sums"):
        load("brain/t1w")


def test_a_load_hashes_each_file_once(repository, saved, tmp_path, monkeypatch):
    """Whoever needs the config and the model finds the name once."""
    hashed = []
    monkeypatch.setattr(model_folder, "sha256", lambda path: hashed.append(Path(path).name) or files.sha256(path))
    load("brain/t1w")
    assert sorted(hashed) == ["config.json", "model.safetensors"]
    hashed.clear()
    found = find("embedded", default="brain/t1w")
    assert found.name == "brain/t1w" and found.config["data"] and isinstance(found.denoiser(), torch.nn.Module)
    assert sorted(hashed) == ["config.json", "model.safetensors"]
    hashed.clear()
    load(shutil.copytree(saved, tmp_path / "mine"))
    assert hashed == ["model.safetensors"]


def test_installed_without_the_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "root", lambda: tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="come with the package: install"):
        load("brain/t1w")


def test_the_repository_lists_its_own_checkpoints():
    for name in weights.embedded():
        load(name)


# ----------------------------------------------------------------------------------------------------------
# Files that are not what they should be


@pytest.mark.parametrize("name", ["model.pt", "ema_0.9999_440000.pt", "network-snapshot.pkl", "last.CKPT"])
def test_pickles_are_refused_unread(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="is a pickle: .* Convert it once, without running it"):
        load(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_tensors_that_do_not_fit_are_named(folder):
    def change(tensors):
        tensors["out.2.biass"] = tensors.pop("out.2.bias")
        tensors["out.2.weight"] = tensors["out.2.weight"][:1].clone()

    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        load(folder)
    assert "out.2.weight (1, 32, 3, 3): expected (3, 32, 3, 3)" in str(error.value)
    assert "out.2.biass (3,) is not part of the network; is it out.2.bias?" in str(error.value)
    assert "out.2.bias (3,) is missing" in str(error.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-100],  # truncated
        lambda data: data[:5],
        lambda data: b"",
        lambda data: struct.pack("<Q", 2**62) + data[8:],  # a header longer than the file
        lambda data: data.replace(b'"shape":[3]', b'"shape":[4]'),  # shapes that are not those of the bytes
        lambda data: pickle.dumps({"weights": 1}),
    ],
)
def test_damaged_files_are_one_message(folder, spoil):
    path = folder / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match="is not a whole safetensors file: .*fetch it again"):
        load(folder)


def test_missing_parts_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load(folder / "nowhere")


def test_bytes_other_than_the_hashed_ones_are_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "prior")
    rewrite(folder, lambda tensors: tensors["out.2.bias"].add_(1))
    with pytest.raises(ValueError, match="SHA-256 differs"):
        load(folder)


def test_nan_weights_are_refused(folder):
    rewrite(folder, lambda tensors: tensors["out.2.bias"].fill_(torch.nan))
    with pytest.raises(ValueError, match="out.2.bias of .* holds NaN"):
        load(folder)


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("network", {"name": "os.system"}, "is 'os.system'; this package knows UNet"),
        ("network", {"depth": 3}, "does not describe a UNet.*depth"),
        ("denoiser", {"sigma": 3}, "does not describe a EDMDenoiser.*sigma"),
    ],
)
def test_configs_build_only_what_is_known(folder, part, change, message):
    config = describe(folder)
    config[part] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_config_that_is_not_json(folder):
    (folder / "config.json").write_text('{"network": ')
    with pytest.raises(ValueError, match="is not JSON"):
        load(folder)


def test_weights_are_rounded_with_what_is_bound_to_them(folder):
    before, sha256 = load_file(folder / "model.safetensors"), files.sha256(folder / "model.safetensors")
    (folder / "errors.json").write_text(json.dumps({"sha256": sha256, "errors": {}}))
    tool = runpy.run_path(str(files.project_root() / "tools" / "round_weights.py"))
    tool["main"].__globals__["write_sums"] = lambda: None  # those of the embedded weights
    tool["main"]([str(folder), "--bits", "4"])
    after = load_file(folder / "model.safetensors")
    for key, value in before.items():
        assert after[key].dtype == torch.bfloat16
        assert ((after[key].float() - value).abs() <= value.abs() / 2**5 + 1e-30).all()  # half of the last bit
    now = files.sha256(folder / "model.safetensors")
    assert json.loads((folder / "errors.json").read_text())["sha256"] == now != sha256
    load_denoiser(folder)
