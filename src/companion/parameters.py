"""The parameters of a notebook: a frozen dataclass whose fields carry help, choices and range.

A notebook sets its defaults as plain assignments in one cell tagged `parameters`; its second cell reads

    p = resolve(StartHere, globals())

and gets every value coerced, checked and printed. The runner does the same before a kernel starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

Value = Any  # int, float, bool, str, None, or a tuple of them

# Former names of parameters: a file that still uses one is told the new one.
RENAMED: dict[str, str] = {"real": "held_out"}


def param(default: Value, help: str, *, choices: Iterable | None = None, minimum=None, maximum=None):
    """A dataclass field with a default, one line of help, and the values it accepts (bounds inclusive)."""
    rules = {"help": help, "choices": None if choices is None else tuple(choices)}
    return dataclasses.field(default=default, metadata=rules | {"minimum": minimum, "maximum": maximum})


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What every notebook takes. Subclass as a frozen dataclass and add fields with `param`.

    Values are coerced to the annotated type (int, float, bool, str, `X | None`, `tuple[X, ...]`) when the
    object is made. Raises TypeError for a value of another type, ValueError for one out of range.
    """

    seed: int = param(0, "seed of everything random", minimum=0)
    device: str = param("auto", "auto, cpu, cuda or cuda:N")
    out: str = param("runs/unnamed", "folder of the results")

    def __init_subclass__(cls, **defaults):
        """Other defaults for inherited fields, which keep their help and range: `class Train(Training, steps=4000)`."""
        super().__init_subclass__()
        known = {k: v for base in reversed(cls.__mro__) for k, v in getattr(base, "__dataclass_fields__", {}).items()}
        for name, value in defaults.items():
            inherited = known[name]
            cls.__annotations__[name] = inherited.type
            setattr(cls, name, dataclasses.field(default=value, metadata=inherited.metadata))

    def __post_init__(self):
        for name, value in check(type(self), dataclasses.asdict(self)).items():
            object.__setattr__(self, name, value)

    def before_start(self) -> None:
        """Raise for what is known to be wrong before any work: files or weights that are not there, or do not fit.

        The runner asks before it starts a kernel, `resolve` in the notebook's first cell.
        """

    def pick(self, *names: str) -> dict[str, Value]:
        """Some of the values by name: what a function takes, or a record keeps."""
        return {name: getattr(self, name) for name in names}


P = typing.TypeVar("P", bound=Parameters)


def check(cls: type, values: Mapping[str, Value]) -> dict[str, Value]:
    """`values` coerced to the types of `cls` and checked against its choices and ranges.

    Names may be left out. Raises ValueError for a name that `cls` does not have, and for a bad value.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown_names(values, fields, cls.__name__)
    hints = _hints(cls)
    checked = {}
    for name, value in values.items():
        checked[name] = value = coerce(name, value, hints[name], fields[name].metadata.get("choices") or ())
        _in_range(name, value, fields[name].metadata)
    return checked


@functools.cache
def _hints(cls: type[Parameters]) -> dict[str, Any]:
    return typing.get_type_hints(cls)  # evaluates every annotation: once a form, not once a cell of a grid


def unknown_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ValueError for the first name that is not known, with the nearest one that is."""
    for name in given:
        if name in RENAMED and name not in known and RENAMED[name] in known:
            raise ValueError(f"parameter {name} of {where} was renamed to {RENAMED[name]}; write {RENAMED[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"unknown parameter {name}: {where} has none of that name; {hint}")


def coerce(name: str, value: Value, kind: Any, choices: Iterable = ()) -> Value:
    """`value` as `kind`; text is read as YAML 1.2 would, so "1e-3" is a number, and "~/x" is in the home folder.

    choices: of the items of a list; those that hold commas are known in a text by them. Raises TypeError.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or isinstance(value, str) and value.lower() in ("none", "null", "~", ""):
            return None
        (kind,) = (k for k in arguments if k is not type(None))
        return coerce(name, value, kind, choices)
    if origin in (tuple, list) or kind in (tuple, list):
        if isinstance(value, str):
            value = _items(value, choices)
        if not isinstance(value, (tuple, list)):
            value = (value,)
        if not arguments:
            return tuple(value)
        return tuple(coerce(f"{name}[{i}]", item, arguments[0]) for i, item in enumerate(value))
    try:
        return _SCALARS[kind](value)
    except KeyError:
        raise TypeError(f"parameter {name} is declared as {kind}, which cannot be read from text") from None
    except (ValueError, TypeError, OverflowError):
        got = f"{value!r} ({type(value).__name__})"
        raise TypeError(f"parameter {name} must be {_WORDS[kind]}, got {got}") from None


def _items(text: str, choices: Iterable = ()) -> list[str]:
    """The items of "1, 2, 3", "[1, 2, 3]" or "a, 'b, c'"; choices that hold commas stay whole, quoted or not."""
    text = text.strip()
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    parts = [part.strip() for part in re.findall(r"""(?:"[^"]*"|'[^']*'|[^,])+""", text)]
    whole, items = {_squeezed(str(choice)): str(choice) for choice in choices}, []
    while parts:
        length = next((n for n in range(len(parts), 1, -1) if _squeezed(",".join(parts[:n])) in whole), 1)
        item = whole[_squeezed(",".join(parts[:length]))] if length > 1 else _unquoted(parts[0])
        items.append(item)
        del parts[:length]
    return [item for item in items if item]


def _squeezed(text: str) -> str:
    """A text with no space around its commas, to compare."""
    return ",".join(part.strip() for part in text.split(","))


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _boolean(value: Value) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise TypeError


def _real(value: Value) -> float:
    if isinstance(value, bool) or value is None or math.isnan(number := float(value)):
        raise TypeError
    return number


def _integer(value: Value) -> int:
    if isinstance(value, str) and value.strip().lstrip("+-").isdigit():
        return int(value)  # not through float: exact beyond 2**53
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not (number := _real(value)).is_integer():
        raise TypeError
    return int(number)


def _text(value: Value) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    text = str(value)  # `seeds: 7` in YAML means the text "7"
    return os.path.expanduser(text) if text.startswith("~/") else text  # no shell does it after NAME=


_SCALARS = {bool: _boolean, float: _real, int: _integer, str: _text}
_WORDS = {bool: "true or false", float: "a number", int: "a whole number", str: "text"}


def _in_range(name: str, value: Value, rules: Mapping) -> None:
    for item in value if isinstance(value, tuple) else (value,):
        if item is None:
            continue
        if (choices := rules.get("choices")) and item not in choices:
            raise ValueError(f"parameter {name} is {item!r}; choose one of {', '.join(map(str, choices))}")
        if (low := rules.get("minimum")) is not None and item < low:
            raise ValueError(f"parameter {name} is {item}; it must be at least {low}")
        if (high := rules.get("maximum")) is not None and item > high:
            raise ValueError(f"parameter {name} is {item}; it must be at most {high}")


def resolve(cls: type[P], namespace: Mapping[str, Value], quiet: bool = False) -> P:
    """The parameters of a notebook, taken by name from its globals: coerced, checked, printed.

    `device` "auto" becomes "cuda" where there is one, else "cpu"; `autocast` "auto" becomes "bfloat16" where the
    device computes in it faster, else None. Raises ValueError when a field is not set
    in the notebook, when a value is out of range, and when CUDA is asked for and missing; TypeError for a
    value of the wrong type.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    if missing := [name for name in names if name not in namespace]:
        raise ValueError(
            f"the parameters cell does not set {', '.join(missing)}; {cls.__name__} needs {', '.join(names)}"
        )
    p = cls(**{name: namespace[name] for name in names})
    p = dataclasses.replace(p, device=resolve_device(p.device))
    if "autocast" in names:
        p = dataclasses.replace(p, autocast=resolve_autocast(namespace["autocast"], p.device))
    p.before_start()
    if not quiet:
        print(table(p))
    return p


def resolve_device(device: str) -> str:
    """One of "cpu", "cuda" or "cuda:N" that exists here. Raises ValueError when it does not."""
    if device == "cpu":
        return device
    import torch

    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if cuda else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or index and not index.isdigit():
        raise ValueError(f"device is {device!r}; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= cuda:
        raise ValueError(f"device {device} was asked for but torch sees {cuda} CUDA devices; use auto or cpu")
    return device


def resolve_autocast(autocast: str | None, device) -> str | None:
    """`autocast` itself, or for "auto" what the device computes convolutions fastest in: "bfloat16" or None (float32).

    bfloat16 pays on GPUs with tensor cores for it, and on CPUs with AVX512-BF16 or AMX. Other processors emulate
    it, several times slower than float32.
    """
    if autocast != "auto":
        return autocast
    import torch

    kind = torch.device(resolve_device("auto") if device == "auto" else device).type
    if kind == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bfloat16" if fast else None


def autocast_dtype(autocast: str | None, device) -> Any:
    """The torch.dtype that a network computes in under `autocast`, or None for that of its weights."""
    import torch

    name = resolve_autocast(autocast, device)
    return None if name is None else getattr(torch, name)


def table(p: Parameters) -> str:
    """The parameters as aligned lines: name, value, help."""
    rows = [(f.name, str(getattr(p, f.name)), f.metadata.get("help", "")) for f in dataclasses.fields(p)]
    wide = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{n:<{wide[0]}}  {v:<{wide[1]}}  {h}".rstrip() for n, v, h in rows)


def read_yaml(path) -> dict[str, Value]:
    """The mapping of parameter names to values in a YAML file; numbers such as 1e-3 are numbers.

    Raises FileNotFoundError, or ValueError for a file that is not a YAML mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, Loader=_Loader)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no parameter file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} must hold lines of the form 'name: value'")
    return values


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that 1e-3 is a number (PyYAML wants 1.0e-3) and a name given twice is refused."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := sorted({str(n) for n in names if names.count(n) > 1}):
            raise yaml.YAMLError(f"{', '.join(twice)} given twice")
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
