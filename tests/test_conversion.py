"""Published checkpoints: read to the bit, translated by place; hostile files are refused and run nothing."""

import io
import os
import pickle
import sys
import time
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from published_edm import PublishedNetwork
from torch import nn

from companion import conversion
from companion.diffusion import EDMDenoiser
from companion.weights import load, save_checkpoint

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
    assert time.process_time() - began < 5


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
    return {
        "os.system": Call(os.system, f"touch {canary}"),
        "exec": Call(exec, f"open({str(canary)!r}, 'w')"),
        "eval": Call(eval, f"open({str(canary)!r}, 'w')"),
        "open": Call(open, str(canary), "w"),
        "import": Call(__import__, "os"),
        "torch.load": Call(torch.load, str(canary)),
        "bytes": Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, f"touch {canary}"))),
    }


WAYS = ["os.system", "exec", "eval", "open", "import", "torch.load", "bytes"]


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
