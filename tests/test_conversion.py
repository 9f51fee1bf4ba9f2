"""Published checkpoints: read to the bit, translated by place; hostile files are refused and run nothing."""

import io
import json
import os
import pickle
import struct
import sys
import time
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import published
import pytest
import torch
from published_edm import PublishedNetwork
from safetensors.torch import load_file, save_file
from torch import nn

from companion.diffusion import EDMDenoiser
from companion.models import architectures, kinds, obtain
from companion.models import checkpoint as weights
from companion.models import published as conversion
from companion.models.checkpoint import load
from companion.models.folder import save_checkpoint

CLASSES = "EDMPrecond DhariwalUNet UNetBlock Conv2d Linear GroupNorm PositionalEmbedding".split()


@pytest.fixture(scope="module")
def network():
    """The tensors of a published network, and what it answers."""
    theirs = PublishedNetwork((8, 8), width=8, mult=(1, 2))
    torch.manual_seed(0)
    x, t, augment = torch.randn(2, 2, 8, 8), torch.tensor([-1.0, 0.5]), torch.randn(2, 9)
    out = theirs(x, t, augment=augment)
    return theirs.tensors, (x, t, augment, out)


@pytest.fixture
def module(network, monkeypatch):
    """The same network as modules of the published classes, which exist while a test writes its file."""
    place = types.ModuleType("training.networks")
    monkeypatch.setitem(sys.modules, "training", types.ModuleType("training"))
    monkeypatch.setitem(sys.modules, "training.networks", place)
    for name in CLASSES:
        setattr(place, name, type(name, (nn.Module,), {"__module__": "training.networks"}))

    def child(parent, name):
        if name not in parent._modules:
            kinds = {"model": "DhariwalUNet", "skip": "Conv2d", "qkv": "Conv2d", "proj": "Conv2d"}
            kind = kinds.get(name, "UNetBlock" if "x" in name else "Linear")
            parent.add_module(name, nn.ModuleDict() if name in ("enc", "dec") else getattr(place, kind)())
        return parent._modules[name]

    root = place.EDMPrecond()
    root.img_resolution, root.sigma_data, root.label_dim = [8, 8], 0.25, 0
    for name, tensor in network[0].items():
        *path, last = name.split(".")
        inner = root
        for part in path:
            inner = child(inner, part)
        if last == "resample_filter":
            inner.register_buffer(last, tensor)
        else:
            inner.register_parameter(last, nn.Parameter(tensor.clone()))
        inner.dropout = 0.1
    return root


@pytest.fixture
def snapshot(module, tmp_path):
    path = tmp_path / "network-snapshot-000001.pkl"
    path.write_bytes(pickle.dumps({"ema": module}))
    return path


@pytest.fixture
def state(module, tmp_path):
    """A training state after one step, with a learning rate as numpy leaves it."""
    optimiser = torch.optim.Adam(module.parameters(), 1e-3)
    for i, p in enumerate(module.parameters()):
        p.grad = torch.full_like(p, i + 1.0)
    optimiser.step()
    optimiser.param_groups[0]["lr"] = np.float64(1.25e-4)
    path = tmp_path / "training-state-000001.pt"
    torch.save({"net": module, "optimizer_state": optimiser.state_dict()}, path)
    return path


# --- what is read


def test_a_snapshot_is_read_to_the_bit(snapshot, network):
    published = conversion.read(snapshot)
    assert published.kind == "network-snapshot" and published.optimiser == {}
    assert published.tensors.keys() == network[0].keys()
    assert all(torch.equal(published.tensors[name], tensor) for name, tensor in network[0].items())
    assert published.attributes == {"img_resolution": [8, 8], "sigma_data": 0.25, "label_dim": 0, "dropout": 0.1}


def test_it_becomes_a_checkpoint_of_ours(snapshot, network, tmp_path):
    published = conversion.read(snapshot)
    save_checkpoint(tmp_path / "ours", published.network(), published.config, published.record)
    D = load(tmp_path / "ours")
    assert isinstance(D, EDMDenoiser) and D.sigma_data == 0.25 and D.cond_scale == 4
    assert D.network.in_channels == 2 and D.network.augment_dim == 9
    x, t, augment, out = network[1]
    torch.testing.assert_close(D.network(x, t, augment=augment), out, rtol=1e-4, atol=1e-4)


def test_a_training_state_is_read_with_its_optimiser(state, module):
    published = conversion.read(state)
    weights = module.state_dict()
    assert all(torch.equal(published.tensors[name], tensor) for name, tensor in weights.items())
    assert published.learning_rate == 1.25e-4
    ours, numbers = dict(published.network().named_parameters()), {}
    assert published.optimiser.keys() == ours.keys()
    names = conversion.rename(weights)
    for i, (name, _) in enumerate(module.named_parameters()):
        numbers[names[name]] = i + 1.0
    for name, moments in published.optimiser.items():
        assert moments["step"] == 1
        assert moments["exp_avg"].shape == ours[name].shape
        torch.testing.assert_close(moments["exp_avg"], torch.full_like(ours[name], 0.1 * numbers[name]))


def test_weights_serve_every_image_size(network):
    def at(size):
        return {name.replace("8x8", size[0]).replace("4x4", size[1]): t for name, t in network[0].items()}

    ours = conversion.translate(network[0])
    for size in (("256x96", "128x48"), ("16x8", "8x4"), ("100x8", "50x4")):
        theirs = conversion.translate(at(size))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)
        assert conversion.describe(at(size)) == conversion.describe(network[0])


def test_names_that_are_not_published_are_refused(network):
    with pytest.raises(ValueError, match="model.enc.8x8_block0.conv9.weight is not a parameter"):
        conversion.rename([*network[0], "model.enc.8x8_block0.conv9.weight"])
    with pytest.raises(ValueError, match="unet.weight is not a parameter"):
        conversion.rename(["unet.weight"])
    with pytest.raises(ValueError, match="not those of a published network"):
        conversion.describe({"model.out_conv.weight": torch.zeros(1, 8, 3, 3)})


# --- what is refused


class Call:
    """Pickles as a call of `function` with `arguments`: what an attacker writes."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def refused(path, message="refused and nothing in it was run"):
    began = time.process_time()
    with pytest.raises(ValueError, match=message):
        conversion.read(path)
    assert time.process_time() - began < 20


def write(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.fixture
def canary(tmp_path):
    """A file that hostile pickles try to make; it must not exist after the test."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def attacks(canary):
    """Calls that would make the canary, by several ways into Python."""
    inner = pickle.dumps(Call(os.system, f"touch {canary}"))
    return {
        "os.system": Call(os.system, f"touch {canary}"),
        "exec": Call(exec, f"open({str(canary)!r}, 'w')"),
        "eval": Call(eval, f"open({str(canary)!r}, 'w')"),
        "open": Call(open, str(canary), "w"),
        "import": Call(__import__, "os"),
        "torch.load": Call(torch.load, str(canary)),
        "bytes": Call(torch.storage._load_from_bytes, inner),
        "type": Call(torch._tensor._rebuild_from_type_v2, torch.storage._load_from_bytes, OrderedDict, (inner,), {}),
    }


WAYS = ["os.system", "exec", "eval", "open", "import", "torch.load", "bytes", "type"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_snapshot_runs_nothing(way, protocol, tmp_path, canary):
    refused(write(tmp_path / "network-snapshot-000000.pkl", {"ema": attacks(canary)[way]}, protocol))


@pytest.mark.parametrize("way", WAYS)
def test_a_hostile_training_state_runs_nothing(way, tmp_path, canary):
    path = tmp_path / "training-state-000000.pt"
    torch.save({"net": attacks(canary)[way], "optimizer_state": {}}, path)
    refused(path)


@pytest.mark.parametrize("place", ["attribute", "parameter", "hook", "module", "entry"])
def test_hostile_parts_of_a_true_network_run_nothing(place, module, tmp_path, canary):
    evil, content = attacks(canary)["os.system"], {"ema": module}
    if place == "attribute":
        module.dropout = evil
    elif place == "parameter":
        module.model._parameters["weight"] = evil
    elif place == "hook":
        module._forward_hooks[0] = evil
    elif place == "module":
        module._modules["extra"] = evil
    else:
        content["training_set_kwargs"] = evil
    refused(write(tmp_path / "n.pkl", content))


def test_hostile_opcodes_of_old_protocols_run_nothing(tmp_path, canary):
    command = f"touch {canary}".encode()
    for program in (
        b"(S'" + command + b"'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'" + command + b"'\no.",  # OBJ
        b"cposix\nsystem\n(S'" + command + b"'\ntR.",
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",
        b"\x80\x02ctraining.networks\nEDMPrecond\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb.",
        b"\x80\x04\x8c\x13training.networks.a\x8c\x0a__import__\x93.",
        b"Pname\n.",  # PERSID
    ):
        path = tmp_path / "n.pkl"
        path.write_bytes(program)
        refused(path)


def test_a_hostile_storage_runs_nothing(tmp_path, canary):
    """The bytes of a storage are pickles themselves, once loaded with torch.load."""
    buffer = io.BytesIO()
    torch.save(Call(os.system, f"touch {canary}"), buffer, _use_new_zipfile_serialization=False)
    call = Call(torch.storage._load_from_bytes, buffer.getvalue())
    refused(write(tmp_path / "n.pkl", {"ema": call}))


# --- bombs


def program(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


def doubling(levels):
    """A tuple of two tuples of two tuples ...: small as a program, 2^levels long when hashed or printed."""
    return b")\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(levels))


BOMBS = {
    "opcodes": program(b"N0" * 10),
    "many opcodes": program(b"]" + b"Na" * 600_000),
    "nested tuples": program(b")" + b"\x85" * 1_100_000),
    "marks": program(b"(" * 1_100_000),
    "hash": program(b"}", doubling(60), b"Ns"),
    "hash in a set": program(b"\x8f(", doubling(60), b"\x90"),
    "print": program(doubling(60), b"\x8c\x01a\x93"),
    "print a size": program(b"\x8c\x0ctorch._utils\x8c\x12_rebuild_tensor_v2\x93(NK\x00", doubling(60), b"h\x00tR"),
    "length": program(b"\x8e" + (2**62).to_bytes(8, "little") + b"abc"),
    "frame": program(b"\x95" + (2**62).to_bytes(8, "little") + b"abc"),
    "memo": b"\x80\x02}r\xff\xff\xff\xff.",
    "number": program(b"\x8b" + (2**31 - 1).to_bytes(4, "little") + b"1"),
    "decimal": b"I" + b"9" * 1_000_000 + b"\n.",
    "same dictionary": program(b"}\x94\x8c\x01ah\x00s"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_quickly(name, tmp_path):
    path = tmp_path / "network-snapshot-000000.pkl"
    path.write_bytes(BOMBS[name])
    refused(path, "refused and nothing in it was run|is damaged")


@pytest.mark.parametrize(
    "size, stride, offset",
    [
        ((2**40,), (0,), 0),
        ((2**62, 2**62), (0, 0), 0),
        ((5,), (1,), 0),
        ((4,), (1,), 1),
        ((2, 2), (3, 1), 0),
        ((0, 2**62), (1, 1), 0),
        ((-1,), (1,), 0),
        ((2,), (-1,), 1),
        ((1,) * 9, (1,) * 9, 0),
        ((4,), (1, 1), 0),
        ((2.0,), (1,), 0),
    ],
)
def test_a_tensor_larger_than_its_storage_is_refused(size, stride, offset, tmp_path):
    held = torch.zeros(4)._typed_storage()
    call = Call(torch._utils._rebuild_tensor_v2, held, offset, size, stride, False, OrderedDict())
    refused(write(tmp_path / "n.pkl", {"ema": call}), "impossible size|of 4 stored numbers|is no storage")


def test_views_of_one_storage_may_not_multiply_it(tmp_path):
    held = torch.zeros(100_000)._typed_storage()
    view = (held, 0, (1,), (1,), False, OrderedDict())
    calls = [Call(torch._utils._rebuild_tensor_v2, *view) for _ in range(50)]
    refused(write(tmp_path / "n.pkl", {"ema": calls}), "tensors are larger than the file")


def test_a_compressed_archive_is_refused(state, tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02}.")
        archive.writestr("bomb/data/0", bytes(50_000_000))
    refused(path, "compressed")


def test_modules_too_deep_or_in_a_circle_are_refused(module, tmp_path):
    root = inner = type(module)()
    for _ in range(40):
        child = type(module)()
        inner._modules["a"] = child
        inner = child
    refused(write(tmp_path / "deep.pkl", {"ema": root}), "not a tree of modules")
    inner._modules["a"] = root
    refused(write(tmp_path / "circle.pkl", {"ema": root}), "not a tree of modules")
    twins = type(module)()
    twins._modules["a"] = twins._modules["b"] = type(module)()
    refused(write(tmp_path / "twins.pkl", {"ema": twins}), "not a tree of modules")


def test_damage_is_a_clear_error(snapshot, state, tmp_path):
    for source in (snapshot, state):
        whole = source.read_bytes()
        for part in (0, 1, 10, 0.01, 0.2, 0.5, 0.9, 0.999):
            size = part if isinstance(part, int) else int(part * len(whole))
            path = tmp_path / f"cut{source.suffix}"
            path.write_bytes(whole[:size])
            refused(path, "is damaged|is refused")
    random = np.random.default_rng(0)
    whole = np.frombuffer(snapshot.read_bytes(), np.uint8)
    for _ in range(30):
        damaged = whole.copy()
        damaged[random.integers(0, 20_000, 20)] = random.integers(0, 256, 20)
        path.write_bytes(damaged.tobytes())
        try:
            conversion.read(path)
        except ValueError as problem:
            assert str(path) in str(problem)


def test_other_files_are_refused(tmp_path):
    refused(write(tmp_path / "n.pkl", {"weights": [1, 2]}), "no network as its entry")
    refused(write(tmp_path / "n.pkl", [1, 2]), "no network as its entry")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", "no network as its entry|refused")
    with pytest.raises(FileNotFoundError, match="give a network-snapshot"):
        conversion.read(tmp_path / "none.pkl")


# --- the files of all papers, through weights.convert

GOLDEN = Path(__file__).parent / "golden" / "aid"


@pytest.fixture(scope="module")
def aid():
    return published.network()


@pytest.fixture
def pt(aid, tmp_path):
    """A published AID file."""
    return published.aid_file(tmp_path / "model.pt", aid)


def converted(folder):
    return architectures.network_of(load(folder)).state_dict()


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_aid_file_is_renamed_and_nothing_else(aid, pt, tmp_path):
    folder = obtain.convert(pt, "aid", tmp_path / "ours", published.CONFIG)
    assert equal(converted(folder), aid.state_dict())
    config = weights.describe(folder)
    assert config["origin"] == {"file": "model.pt", "sha256": weights.sha256(pt)}
    names = {"model.safetensors", "config.json", "training.json", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    save_file(aid.state_dict(), tmp_path / "model.safetensors")
    again = obtain.convert(tmp_path / "model.safetensors", "aid", tmp_path / "again", published.CONFIG)
    assert equal(converted(again), aid.state_dict())
    with pytest.raises(ValueError, match="does not say which network .* aid/fastmri-320-cplx"):
        obtain.convert(pt, "aid", tmp_path / "c")


def test_a_conversion_repeats_published_outputs(tmp_path):
    """The golden network of the published single-image layout, with its recorded input and output."""
    case = json.loads((GOLDEN / "manifest.json").read_text())["cases"]["unet_plain"]
    tensors = load_file(GOLDEN / case["file"])
    torch.save(OrderedDict((k.removeprefix("param."), nn.Parameter(x.float())) for k, x in tensors.items()
                           if k.startswith("param.")), tmp_path / "model.pt")  # fmt: skip
    golden = {name: tensors[f"io.{name}"] for name in ("x", "t", "out")}
    save_file(golden, tmp_path / "golden.safetensors")
    network = {"name": "UNet"} | {k: v for k, v in case["constructor"].items() if k != "image_size"}
    folder = obtain.convert(tmp_path / "model.pt", "aid", tmp_path / "ours", {"network": network},
                             tmp_path / "golden.safetensors")  # fmt: skip
    assert json.loads((folder / "training.json").read_text())["parity"]["relative_error"] < 1e-5
    save_file(golden | {"out": golden["out"] * 1.01}, tmp_path / "golden.safetensors")
    with pytest.raises(ValueError, match="does not repeat the output .*relative error 0.0099"):
        obtain.convert(tmp_path / "model.pt", "aid", tmp_path / "no", {"network": network},
                        tmp_path / "golden.safetensors")  # fmt: skip
    assert not (tmp_path / "no").exists()


def test_a_lightning_checkpoint_gives_its_autoencoder(tmp_path, monkeypatch):
    """Settings under the class of a callback, a loss network and an optimiser are looked past."""
    config = {"network": dict(name="VQModel", channels=32, channel_mult=[1, 2], num_res_blocks=1, num_embeddings=16)}
    net = architectures.build(config)
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
        place = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, place)
    callback = place.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": place.__name__})
    content = {"epoch": 3, "callbacks": {callback: {"best": torch.ones(1)}}, "optimizer_states": [{"state": {0: 1}}]}
    content["state_dict"] = dict(net.state_dict()) | {"loss.perceptual.weight": torch.ones(3)}
    torch.save(content, tmp_path / "vq.ckpt")
    folder = obtain.convert(tmp_path / "vq.ckpt", "taming", tmp_path / "ours", config)
    assert equal(load(folder).state_dict(), net.state_dict())
    torch.save(content | {"state_dict": Call(callback)}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="it makes a pytorch_lightning.* by itself"):
        obtain.convert(tmp_path / "evil.ckpt", "taming", tmp_path / "no", config)


def test_lmi_files_give_their_averaged_weights(tmp_path):
    options = dict(in_channels=3, model_channels=32, out_channels=1, num_res_blocks=1, channel_mult=[1.0, 1.0],
                   attention_resolutions=[2], conv_resample=True, use_scale_shift_norm=False)  # fmt: skip
    raw, averaged = (published.network({"network": {"name": "UNet"} | options}, seed) for seed in (0, 1))
    content = [{f"module.{k}": x for k, x in raw.state_dict().items()}, {"state": {}}, 1, 10]
    torch.save([*content, dict(averaged.state_dict())], tmp_path / "ckpt.pth")
    folder = obtain.convert(tmp_path / "ckpt.pth", "lmi", tmp_path / "ema")
    assert equal(converted(folder), averaged.state_dict())
    assert weights.load_denoiser(folder).process.prediction == "epsilon"
    torch.save(content, tmp_path / "ckpt.pth")
    assert equal(converted(obtain.convert(tmp_path / "ckpt.pth", "lmi", tmp_path / "raw")), raw.state_dict())
    with pytest.raises(ValueError, match="is not of kind 'lmi'"):
        torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
        obtain.convert(tmp_path / "a.pth", "lmi", tmp_path / "no")


def test_heads_that_weights_do_not_say_are_told_or_said_to_be_assumed(tmp_path, capsys):
    options = dict(in_channels=3, model_channels=32, out_channels=1, num_res_blocks=1, channel_mult=[1.0, 1.0],
                   attention_resolutions=[2], num_heads=4)  # fmt: skip
    network = published.network({"network": {"name": "UNet"} | options}, 0)
    file, word = tmp_path / "ckpt.pth", "assumed, for weights do not say it"
    torch.save([dict(network.state_dict()), {"state": {}}, 1, 10], file)
    told = obtain.convert(file, "lmi", tmp_path / "told", {"network": {"num_heads": 4}})
    assumed = obtain.convert(file, "lmi", tmp_path / "assumed")
    records = [json.loads((folder / "training.json").read_text()) for folder in (told, assumed)]
    assert records[0][word] == {"use_new_attention_order": False}
    assert records[1][word] == {"num_heads": 1, "use_new_attention_order": False}
    x, t = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0])
    with torch.no_grad():
        expected, one_head = network.eval()(x, t), load(assumed).network(x, t)
        torch.testing.assert_close(load(told).network(x, t), expected)
        assert (one_head - expected).abs().max() > 1e-4


def test_pet_snapshots_convert_by_the_same_command(snapshot, network, tmp_path):
    D = load(obtain.convert(snapshot, "pet", tmp_path / "ours"))
    x, t, augment, out = network[1]
    torch.testing.assert_close(D.network(x, t, augment=augment), out, rtol=1e-4, atol=1e-4)


def test_monai_files_convert(tmp_path):
    config = {"network": dict(name="VQVAE", dims=2, channels=[32, 32], num_embeddings=8, embedding_dim=4)}
    net = architectures.build(config)
    torch.save(net.state_dict(), tmp_path / "vqvae.pt")
    folder = obtain.convert(tmp_path / "vqvae.pt", "monai", tmp_path / "ours", config)
    assert equal(load(folder).state_dict(), net.state_dict())


# --- and what is refused, each with its own message


def refuse(file, folder, message):
    with pytest.raises(ValueError, match=message):
        obtain.convert(file, "aid", folder, published.CONFIG)
    assert not folder.exists()


def test_wrong_tensors_are_named(aid, tmp_path):
    whole = OrderedDict(aid.named_parameters())
    width, turned = "time_embed.0.weight", torch.zeros(32, 128)

    def spoilt(**changes):
        tensors = {k: x for k, x in (whole | changes).items() if x is not None}
        torch.save(OrderedDict(tensors), tmp_path / "spoilt.pt")
        return tmp_path / "spoilt.pt"

    out = tmp_path / "out"
    refuse(spoilt(**{width: None}), out, r"time_embed.0.weight \(128, 32\) is missing")
    refuse(spoilt(extra=torch.ones(2)), out, r"extra \(2,\) is not part of the network")
    refuse(spoilt(**{width: turned}), out, r"\(32, 128\): expected \(128, 32\) \(is it transposed\?\)")
    refuse(spoilt(**{width: torch.full((128, 32), torch.nan)}), out, "time_embed.0.weight of .* holds NaN")
    refuse(spoilt(**{width: "text"}), out, "its entry 'time_embed.0.weight' is no tensor")
    torch.save([1, 2], tmp_path / "list.pt")
    refuse(tmp_path / "list.pt", out, "holds a list; expected a dictionary of tensors")
    with pytest.raises(ValueError, match="no kind 'unet' of published file; choose one of aid, taming"):
        obtain.convert(tmp_path / "list.pt", "unet", out)


@pytest.mark.parametrize("way", WAYS)
def test_a_hostile_state_dict_runs_nothing(way, tmp_path, canary, aid):
    torch.save(OrderedDict(aid.named_parameters()) | {"x": attacks(canary)[way]}, tmp_path / "evil.pt")
    refuse(tmp_path / "evil.pt", tmp_path / "out", "is refused and nothing in it was run|is damaged")
    assert not canary.exists()


def test_bombs_and_lies_are_refused(pt, tmp_path, aid):
    with zipfile.ZipFile(pt) as archive, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for info in archive.infolist():
            bomb.writestr(info.filename, bytes(30_000_000) if "/data/" in info.filename else archive.read(info))
            if "/data/" in info.filename:
                break
    refuse(tmp_path / "bomb.pt", tmp_path / "out", "refused .* it is compressed, which files of torch.save are not")

    spoilt = bytearray(pt.read_bytes())
    spoilt[len(spoilt) // 2] ^= 1  # in the numbers of some tensor
    (tmp_path / "flipped.pt").write_bytes(spoilt)
    refuse(tmp_path / "flipped.pt", tmp_path / "out", "its part .* is damaged: the checksum differs")

    save_file(aid.state_dict(), tmp_path / "lie.safetensors")
    data = (tmp_path / "lie.safetensors").read_bytes()
    for lie in (struct.pack("<Q", 2**40) + data[8:], data.replace(b'"shape":[128,32]', b'"shape":[128,33]'), data[:-9]):
        (tmp_path / "lie.safetensors").write_bytes(lie)
        refuse(tmp_path / "lie.safetensors", tmp_path / "out", "refused .* its header does not fit its .* bytes")


def test_tensors_that_share_numbers_become_independent(tmp_path):
    x = torch.arange(6.0)
    torch.save({"a": x, "b": x.view(2, 3).T, "c": x[2:]}, tmp_path / "shared.pt")
    tensors, _ = kinds.read_kind(tmp_path / "shared.pt", "aid")
    assert torch.equal(tensors["b"], x.view(2, 3).T) and torch.equal(tensors["c"], x[2:])
    tensors["a"].zero_()
    assert torch.equal(tensors["c"], x[2:])
    assert torch.equal(kinds.read_kind(tmp_path / "shared.pt", "aid")[0]["a"], x)  # the file is untouched
