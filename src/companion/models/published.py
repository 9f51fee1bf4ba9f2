"""Published checkpoints, read without running anything in them, and their tensors under our names.

The published PET code (an EDM network, Karras et al. 2022, conditioned on the low-dose image) keeps its
weights in two kinds of pickle: network-snapshot-*.pkl, the averaged network, and training-state-*.pt, the raw
network with the state of Adam. Unpickling is running a program. Here the opcodes of that program are read one
by one and only build numbers, text, containers and tensors. A class is a name, never looked up or called.

    from companion.models import published as conversion
    from companion.models.checkpoint import load
    from companion.models.folder import save_checkpoint

    published = conversion.read("network-snapshot-000600.pkl")
    save_checkpoint("checkpoints/pet/mine", published.network(), published.config, published.record)
    D = load("checkpoints/pet/mine")                  # an EDMDenoiser; D(x, sigma, low_dose)

The names of the published parameters contain the image size (`enc.64x64_block0`). Ours do not, so that one
set of weights serves every size.

Files of other papers: `companion.models.kinds`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from companion.files import sha256
from companion.models.pickles import MAX_BYTES, Module, Refused, _read_pickle, _read_zip
from companion.networks.edm_unet import EDMUNet

HEAD_CHANNELS = 64  # of the published attention


@dataclass(frozen=True)
class Published:
    """A published checkpoint. `tensors` have the published names; all the rest is in our terms.

    attributes: what the file says of the network besides: see ATTRIBUTES.
    optimiser: state of Adam {parameter: {"step", "exp_avg", "exp_avg_sq"}}, laid out as our parameters;
    empty for a snapshot. learning_rate: the one in use when a training state was written.
    """

    kind: str  # "network-snapshot" (averaged weights) or "training-state" (raw weights)
    tensors: dict[str, Tensor] = field(repr=False)
    attributes: dict[str, Any]
    optimiser: dict[str, dict[str, Tensor]] = field(repr=False)
    learning_rate: float | None
    record: dict[str, str]

    @property
    def config(self) -> dict:
        """What `companion.models.checkpoint` builds from: network, denoiser, data."""
        network = describe(self.tensors, self.attributes)
        sigma_data = float(self.attributes.get("sigma_data", 0.5))
        denoiser = {"name": "EDMDenoiser", "sigma_data": sigma_data}
        if network["in_channels"] > network["out_channels"]:
            denoiser["cond_scale"] = 1 / sigma_data
        data = {"source": f"published weights, {self.record['file']}"}
        data["scale"] = "each image divided by half its own maximum, minus 1"
        return {"network": network, "denoiser": denoiser, "data": data}

    def network(self) -> EDMUNet:
        """The network with these weights, in evaluation mode."""
        options = {name: value for name, value in self.config["network"].items() if name != "name"}
        network = EDMUNet(**options)
        network.load_state_dict(translate(self.tensors))
        return network.eval()


def read(path: str | os.PathLike) -> Published:
    """The checkpoint in a network-snapshot-*.pkl or training-state-*.pt; nothing in the file is executed.

    Raises ValueError for a file that asks for anything but a published network, its tensors and the state of
    its optimiser, that unpacks to more than its own size, or that is damaged; FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a network-snapshot-*.pkl or training-state-*.pt")
    with _refusals(path):
        return _published(path)


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except Refused as problem:
        raise ValueError(f"{path} is refused and nothing in it was run: {problem}") from None
    except Exception as problem:  # whatever libraries say of bytes that are not what they claim to be
        reason = f"{type(problem).__name__}: {problem}"[:300]
        raise ValueError(f"{path} is damaged, or no published checkpoint: {reason}") from problem


def _content(path: Path):
    """What the pickle in a file says: a bare one, or the one in a file of torch.save."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if path.stat().st_size > MAX_BYTES:
        raise Refused(f"it is larger than {MAX_BYTES / 2**30:g} GiB; the published ones have less than 1 GiB")
    return _read_zip(path) if is_zip else _read_pickle(path)


def _published(path: Path) -> Published:
    content = _content(path)
    kinds = {"ema": "network-snapshot", "net": "training-state"}
    found = [key for key in kinds if isinstance(content, dict) and isinstance(content.get(key), Module)]
    if len(found) != 1:
        raise Refused("it has no network as its entry 'ema' (network-snapshot) or 'net' (training-state)")
    kind = kinds[found[0]]
    parameters, buffers, attributes = content[found[0]].collect()
    optimiser, rate = _optimiser(content.get("optimizer_state"), list(parameters))
    record = {"file": path.name, "file_sha256": sha256(path), "kind": kind}
    return Published(kind, parameters | buffers, attributes, optimiser, rate, record)


def _optimiser(state: dict | None, names: list[str]) -> tuple[dict, float | None]:
    """The state of Adam by our names, and the learning rate. Its tensors are numbered like the parameters."""
    if state is None:
        return {}, None
    (group,) = state["param_groups"]
    if list(group["params"]) != list(range(len(names))):
        raise Refused(f"an optimiser of {len(group['params'])} parameters, for a network of {len(names)}")
    moments: dict[str, dict[str, Tensor]] = {}
    for quantity in ("step", "exp_avg", "exp_avg_sq"):
        tensors = {names[i]: torch.as_tensor(of[quantity]) for i, of in state["state"].items()}
        if quantity == "step":
            ours = {new: tensors[old] for old, new in rename(names).items() if old in tensors}
        else:
            ours = translate(tensors, names)
        for name, tensor in ours.items():
            moments.setdefault(name, {})[quantity] = tensor
    return moments, float(group["lr"])


# ----------------------------------------------------------------------------------------------------
# Their names -> ours

PLACE = re.compile(r"(enc|dec)\.(\d+)x(\d+)_(conv|down|up|in0|in1|block(\d+))\.(?:(\w+)\.)?(\w+)")
TOP = {
    "map_layer0": "time_embed.0",
    "map_layer1": "time_embed.2",
    "map_augment": "map_augment",
    "map_label": "label_emb",
    "out_norm": "out.0",
    "out_conv": "out.2",
}
RESIDUAL = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}


def rename(names) -> dict[str, str]:
    """Our name of each published one (`resample_filter` buffers, constants there, have none).

    Blocks are known by stage and role: the sizes in the names, in falling order, are the stages. Raises
    ValueError for a name that is not of the published network.
    """
    places = {name: PLACE.fullmatch(name.removeprefix("model.")) for name in names}
    found = [place for place in places.values() if place]
    sizes = sorted({(int(p[2]), int(p[3])) for p in found}, reverse=True)
    blocks = 1 + max((int(p[5]) for p in found if p[1] == "enc" and p[5]), default=-1)
    attending = {(p[1], sizes.index((int(p[2]), int(p[3]))), p[4]) for p in found if p[6] == "qkv"}
    ours = {}
    for name, p in places.items():
        if name.endswith(".resample_filter"):
            continue
        if p is None:
            layer, _, kind = name.removeprefix("model.").partition(".")
            if layer not in TOP or kind not in ("weight", "bias"):
                raise ValueError(f"{name} is not a parameter of the published network")
            ours[name] = f"{TOP[layer]}.{kind}"
            continue
        stage, layer = sizes.index((int(p[2]), int(p[3]))), p[6]
        block, i = _block(p[1], stage, p[4], len(sizes), blocks, attending)
        if p[4] == "conv" and layer is None:
            inside = ""
        elif layer in RESIDUAL:
            inside = RESIDUAL[layer] + "."
        elif layer in ATTENTION:
            inside, i = ATTENTION[layer] + ".", i + 1
        else:
            raise ValueError(f"{name} is not a parameter of the published network")
        ours[name] = f"{block}.{i}.{inside}{p[7]}"
    return ours


def _block(side: str, stage: int, role: str, stages: int, blocks: int, attending: set) -> tuple[str, int]:
    """Our block that holds a published one, and its index there; attention follows the block it belongs to."""
    if role.startswith("in"):
        return "middle_block", 0 if role == "in0" else 1 + ((side, stage, "in0") in attending)
    number = int(role.removeprefix("block")) if role.startswith("block") else None
    if side == "enc":  # each stage begins with a convolution or a block that halves the image
        return f"input_blocks.{stage * (blocks + 1) + (0 if number is None else 1 + number)}", 0
    first = (stages - 1 - stage) * (blocks + 1)
    if number is not None:
        return f"output_blocks.{first + number}", 0
    # the block that doubles the image is the last part of the stage below
    return f"output_blocks.{first - 1}", 1 + ((side, stage + 1, f"block{blocks}") in attending)


def translate(tensors: Mapping[str, Tensor], names=None) -> dict[str, Tensor]:
    """Published tensors (or moments of them) under our names, in our layout. names: all of the network's."""
    ours = rename(tensors if names is None else names)
    return {ours[name]: _layout(name, tensor) for name, tensor in tensors.items() if name in ours}


def _layout(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("map_label.weight"):
        return tensor.T.contiguous()
    if ".proj." in name and tensor.ndim == 4:
        return tensor.flatten(2)
    if ".qkv." in name:  # (head, channel, q k v) there, (head, q k v, channel) here
        heads = len(tensor) // 3 // HEAD_CHANNELS
        tensor = tensor.unflatten(0, (heads, -1, 3)).transpose(1, 2).flatten(0, 2)
        return (tensor.flatten(2) if tensor.ndim == 4 else tensor).contiguous()
    return tensor


def describe(tensors: Mapping[str, Tensor], attributes: Mapping[str, Any] | None = None) -> dict:
    """The config of the EDMUNet that holds these published tensors, read off names and shapes.

    attributes: for what shapes do not say, dropout and label_dropout. Raises ValueError when `tensors` are
    not those of a published network.
    """
    attributes, ours = attributes or {}, translate(tensors)
    try:
        depth = 1 + max(int(name.split(".")[1]) for name in ours if name.startswith("input_blocks."))
        halving = [i for i in range(1, depth) if f"input_blocks.{i}.0.in_layers.2.weight" in ours]
        first = ours["input_blocks.0.0.weight"]
        embedding, width = ours["time_embed.0.weight"].shape
        places = [PLACE.fullmatch(name.removeprefix("model.")) for name in tensors]
        stages = len({(p[2], p[3]) for p in places if p})
    except (KeyError, ValueError):
        raise ValueError("these tensors are not those of a published network") from None
    blocks = depth // stages - 1
    if not halving or blocks < 1 or depth != stages * (blocks + 1):
        raise ValueError(f"{depth} blocks in {stages} stages are not those of a published network")
    ends = [s * (blocks + 1) + blocks for s in range(stages)]
    mult = [ours[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] / width for i in ends]
    if first.shape[0] != mult[0] * width:
        raise ValueError(
            f"the first convolution has {first.shape[0]} channels and the first level {mult[0] * width:g}; "
            "an EDMUNet has as many in both"
        )
    config = {
        "name": "EDMUNet",
        "in_channels": first.shape[1],
        "model_channels": width,
        "out_channels": ours["out.2.weight"].shape[0],
        "num_res_blocks": blocks,
        "attention_resolutions": [2**s for s, i in enumerate(ends) if f"input_blocks.{i}.1.qkv.weight" in ours],
        "channel_mult": [int(m) if m == int(m) else m for m in mult],
        "dropout": float(attributes.get("dropout", 0.0)),
        "emb_mult": embedding // width,
    }
    if "label_emb.weight" in ours:
        config["num_classes"] = ours["label_emb.weight"].shape[0]
        config["label_dropout"] = float(attributes.get("label_dropout", 0.0))
    if "map_augment.weight" in ours:
        config["augment_dim"] = ours["map_augment.weight"].shape[1]
    return config
