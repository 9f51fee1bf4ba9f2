"""A reader of pickled checkpoints that executes nothing; all but numbers, text, containers and tensors is refused."""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# ----------------------------------------------------------------------------------------------------
# Reading a pickle as data


class Refused(Exception):
    """A pickle wants more than to be data."""


NETWORK_CLASSES = {
    *(
        f"training.networks.{name}"
        for name in "EDMPrecond DhariwalUNet SongUNet UNetBlock Conv2d Linear GroupNorm PositionalEmbedding "
        "FourierEmbedding".split()
    ),
    "torch.nn.modules.container.ModuleDict",
}
# Lightning keeps settings under the classes of its callbacks: names that may be keys, and nothing else
CALLBACKS = re.compile(r"(pytorch_lightning|lightning\.pytorch)\.callbacks\.[\w.]+")
# MONAI's tensors carry a record of the image that they came from, whose texts are of these enumerations
ENUMERATIONS = re.compile(r"monai\.utils\.enums\.\w+")
META_TENSOR = "monai.data.meta_tensor.MetaTensor"
DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
ATTRIBUTES = {"img_resolution", "img_channels", "label_dim", "label_dropout", "sigma_data", "dropout"}
MAX_BYTES = 8 * 2**30
MAX_OPCODES = 1_000_000  # a published training state needs about 100,000
MAX_DEPTH = 32  # of modules inside modules; the published network needs 5


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names. It stays a name."""

    name: str


@dataclass(eq=False)
class Storage:
    """The numbers that tensors are views of: a part of a mapped file (memoryview), or bytes."""

    dtype: torch.dtype
    data: bytes | memoryview
    used: bool = False

    def numbers(self) -> Tensor:
        """All of them, in one dimension. The first caller gets a mapped file itself, others copies."""
        view = self.data if isinstance(self.data, memoryview) and not self.used else bytearray(self.data)
        self.used = True
        return torch.frombuffer(view, dtype=self.dtype)  # of memory that it may write to, as torch wants


@dataclass(eq=False)
class Module:
    """What a pickle says of a network module: its attributes, and which class it claims to be."""

    name: str
    state: dict = field(default_factory=dict)

    def collect(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Parameters, buffers and ATTRIBUTES of this module and all below, in order of registration."""
        parameters, buffers, attributes, seen = {}, {}, {}, set()

        def visit(module: Module, prefix: str, depth: int) -> None:
            if not isinstance(module, Module) or id(module) in seen or depth > MAX_DEPTH:
                raise Refused(f"{prefix or 'the network'} is not a tree of modules")
            seen.add(id(module))
            for key, found in (("_parameters", parameters), ("_buffers", buffers)):
                for name, tensor in module.state.get(key, {}).items():
                    if tensor is not None and not isinstance(tensor, Tensor):
                        raise Refused(f"{prefix}{name} is no tensor")
                    if tensor is not None:
                        found[f"{prefix}{name}"] = tensor
            for name in ATTRIBUTES & module.state.keys():
                if _plain(module.state[name]):
                    attributes.setdefault(name, module.state[name])
            for name, child in module.state.get("_modules", {}).items():
                visit(child, f"{prefix}{name}.", depth + 1)

        visit(self, "", 0)
        return parameters, buffers, attributes


def _plain(value) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= 8 and all(isinstance(v, (int, float, str)) for v in value)
    return isinstance(value, (bool, int, float, str))


class Reader:
    """Evaluates the opcodes of pickles from bytes, with a fixed list of what they may build.

    size: bytes of the file; storages and tensors, each in all, may not be larger, so that a small file cannot
    fill the memory. persistent: answers the references to storages that lie outside the pickle.
    """

    def __init__(self, size: int, persistent: Callable[[tuple], Any] | None = None):
        self.budget, self.persistent, self.opcodes = {"storages": size, "tensors": size}, persistent, 0
        self.functions: dict[str, Callable] = {
            "collections.OrderedDict": self.ordered_dict,
            "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._tensor._rebuild_from_type_v2": self.meta_tensor,
            "torch.storage._load_from_bytes": self.storage_in_bytes,
            "__builtin__.set": lambda items=(): (),
            "builtins.set": lambda items=(): (),
            "numpy.dtype": self.float64_type,
            "numpy._core.multiarray.scalar": self.float64,
            "numpy.core.multiarray.scalar": self.float64,
            "_codecs.encode": self.encode,
            "torch_utils.persistence._reconstruct_persistent_obj": self.persistent_object,
            "dnnlib.util.EasyDict": self.ordered_dict,
        }

    # --- the machine

    def load(self, stream: io.BytesIO):
        """The value of the next pickle in `stream`, which is left at its end."""
        stack, marks, memo = [], [], {}

        def since_mark() -> list:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        for opcode, argument, _ in pickletools.genops(stream):
            self.opcodes += 1
            if self.opcodes > MAX_OPCODES:
                raise Refused(f"its pickle has more than {MAX_OPCODES:,} opcodes")
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    marks.append(len(stack))
                case "NONE":
                    stack.append(None)
                case "NEWTRUE" | "NEWFALSE":
                    stack.append(opcode.name == "NEWTRUE")
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                    stack.append(argument)
                case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                    stack.append(argument)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE" | "EMPTY_SET":
                    stack.append(())
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    marks.append(len(stack) - int(opcode.name[-1]))
                    stack.append(tuple(since_mark()))
                case "APPEND":
                    item = stack.pop()
                    self.extend(stack[-1], [item])
                case "APPENDS":
                    items = since_mark()
                    self.extend(stack[-1], items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    self.update(stack[-1], [key, value])
                case "SETITEMS":
                    items = since_mark()
                    self.update(stack[-1], items)
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(self.name(*str(argument).split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(self.name(module, name))
                case "NEWOBJ" | "REDUCE":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(self.call(function, arguments))
                case "BUILD":
                    state = stack.pop()
                    self.build(stack[-1], state)
                case "BINPERSID":
                    stack.append(self.reference(stack.pop()))
                case other:
                    raise Refused(f"the opcode {other} is not needed for weights")
        raise Refused("its pickle has no end")

    def name(self, module, name) -> Name:
        """The Name of a class or function, if it is one of those that published files need."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("it asks for something without a name")
        full = f"{module}.{name}"
        known = full in self.functions or full in NETWORK_CLASSES or full in DTYPES
        if not known and full != META_TENSOR and not CALLBACKS.fullmatch(full) and not ENUMERATIONS.fullmatch(full):
            raise Refused(f"it asks for {full[:100]!r}, which is no part of a published network")
        return Name(full)

    def call(self, function, arguments):
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise Refused("it calls something that is no function")
        if function.name in NETWORK_CLASSES:
            return Module(function.name)
        if ENUMERATIONS.fullmatch(function.name) and len(arguments) == 1 and isinstance(arguments[0], str):
            return arguments[0]
        if function.name not in self.functions:
            raise Refused(f"it makes a {function.name} by itself")
        return self.functions[function.name](*arguments)

    def build(self, thing, state) -> None:
        if isinstance(thing, Module):
            self.update(thing.state, [part for item in state.items() for part in item])
        # what else carries state (dtypes, ordered dictionaries) is complete without it

    def extend(self, thing, items: list) -> None:
        if not isinstance(thing, list):
            raise Refused("it appends to something that is no list")
        thing.extend(items)

    def update(self, thing, items: list) -> None:
        """Adds [key, value, key, value, ...]. Other keys than these can be made to take years to hash."""
        for key in items[::2]:
            if not (type(key) in (str, Name) or (type(key) is int and 0 <= key < 2**31)):
                raise Refused("it has a dictionary whose keys are neither text nor counts")
        if not isinstance(thing, dict):
            raise Refused("it sets items of something that is no dictionary")
        thing.update(zip(items[::2], items[1::2], strict=True))

    def reference(self, key):
        if self.persistent is None:
            raise Refused("it refers to data outside")
        return self.persistent(key)

    def spend(self, kind: str, count: int) -> None:
        self.budget[kind] -= count
        if self.budget[kind] < 0:
            raise Refused(f"its {kind} are larger than the file")

    # --- what published pickles call

    def persistent_object(self, meta) -> Module:
        """A module that EDM pickled with the source text of its class, which is neither read nor run."""
        if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
            raise Refused("it makes a persistent object of something else")
        return Module(f"training.networks.{meta.get('class_name')}", meta["state"])

    def ordered_dict(self, items=()) -> dict:
        made: dict = {}
        self.update(made, [part for key, value in items for part in (key, value)])
        return made

    def tensor(self, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> Tensor:
        """A tensor with memory of its own, from a view of a storage that lies wholly inside it."""
        if not isinstance(storage, Storage) or len(size) != len(stride) or len(size) > 8:
            raise Refused("it makes a tensor of something that is no storage")
        if any(type(n) is not int or not 0 <= n < 2**40 for n in (offset, *size, *stride)) or 0 in size:
            raise Refused("it makes a tensor of an impossible size")
        stored = len(storage.data) // storage.dtype.itemsize
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= stored or math.prod(size) > stored:
            raise Refused(f"it makes a tensor of size {tuple(size)} of {stored} stored numbers")
        self.spend("tensors", len(storage.data))
        return storage.numbers().as_strided(size, stride, offset).contiguous()

    def meta_tensor(self, function, kind, arguments, state) -> Tensor:
        """The numbers of a MONAI tensor, without its record of the image."""
        if function != Name("torch._utils._rebuild_tensor_v2") or kind != Name(META_TENSOR):
            raise Refused("it makes a tensor of a class of its own")
        return self.tensor(*arguments)

    def storage_in_bytes(self, data: bytes) -> Storage:
        """The one storage in bytes as torch wrote them before zip files: five pickles, a length, the data."""
        self.spend("storages", len(data))
        stream, outer = io.BytesIO(data), self.persistent
        self.persistent = _storage_type
        try:
            for _ in range(3):  # magic number, version, sizes of C types
                self.load(stream)
            dtype, count = self.load(stream)
            self.load(stream)  # its key
        finally:
            self.persistent = outer
        stored = int.from_bytes(stream.read(8), "little")
        if stored != count:
            raise Refused("the length of a storage is not what its reference says")
        return _storage(dtype, stream.read(), count)

    def float64_type(self, name, align=False, copy=True) -> np.dtype:
        if name != "f8":
            raise Refused("it makes numbers of another type than float64")
        return np.dtype("<f8")

    def float64(self, dtype, data: bytes) -> float:
        if not isinstance(dtype, np.dtype) or len(data) != 8:
            raise Refused("it makes a number of something else")
        return float(np.frombuffer(data, dtype)[0])

    def encode(self, text: str, encoding: str = "") -> bytes:
        if encoding != "latin1" or len(text) > 64:
            raise Refused("it encodes text that is not a number")
        return text.encode("latin1")


def _storage_type(reference) -> tuple[torch.dtype, int]:
    """The type and the length of the storage that a pickle refers to."""
    kind, name, key, _, count, *_ = reference
    if kind != "storage" or not isinstance(name, Name) or name.name not in DTYPES:
        raise Refused("it refers to something that is no storage")
    if not isinstance(key, str) or type(count) is not int:
        raise Refused("it refers to something that is no storage")
    return DTYPES[name.name], count


def _storage(dtype: torch.dtype, data: bytes | memoryview, count: int) -> Storage:
    if len(data) != count * dtype.itemsize:
        raise Refused(f"a storage of {count} numbers has {len(data)} bytes")
    return Storage(dtype, data)


def _read_pickle(path: Path):
    data = path.read_bytes()
    return Reader(len(data)).load(io.BytesIO(data))


def _read_zip(path: Path):
    """The pickle in a file of torch.save, whose storages are other members of the zip file."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in members):
            raise Refused("it is compressed, which files of torch.save are not")
        if sum(info.file_size for info in members) > size:
            raise Refused("it unpacks to more than its size")
        (program,) = (i.filename for i in members if re.fullmatch(r"[^/]+/data\.pkl", i.filename))
        folder = program.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise Refused("it was written on a big-endian machine")

        with open(path, "rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))

        storages: dict[str, Storage] = {}

        def storage(reference) -> Storage:
            dtype, count = _storage_type(reference)
            key = reference[2]
            if key not in storages:
                data = _member(mapped, archive.getinfo(f"{folder}data/{key}"))
                storages[key] = _storage(dtype, data, count)
            if storages[key].dtype != dtype:
                raise Refused("it reads the same numbers as two types")
            return storages[key]

        return Reader(size, storage).load(io.BytesIO(archive.read(program)))


def _member(mapped: memoryview, info: zipfile.ZipInfo) -> memoryview:
    """The bytes of an uncompressed member of a mapped zip file, after a look at its checksum."""
    # the member's own header, of 30 bytes, may have other extra fields than the directory's
    name, extra = struct.unpack_from("<HH", mapped, info.header_offset + 26)
    start = info.header_offset + 30 + name + extra
    data = mapped[start : start + info.file_size]
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise Refused(f"its part {info.filename[:100]!r} is damaged: the checksum differs")
    return data
