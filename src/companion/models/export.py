"""A prior for other programs: one file that holds D(x, sigma) and says what its noise level means.

    export("general/2d", "general.pt")       # TorchScript, for C++ and for Python without this package
    export("general/2d", "general.onnx")     # ONNX, for any runtime

Both take x (batch, channel, *space) and sigma (batch,) of any batch and any size that the network takes, and a
condition image `cond` where the denoiser has one. Complex images go as two real channels, re and im of each. What the
numbers mean travels in the file as JSON under `CONVENTION`: an extra file of TorchScript, metadata of ONNX.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from companion.diffusion.denoisers import ComplexDenoiser, DiscreteDenoiser, inner_denoiser
from companion.extras import extra
from companion.files import atomic_write
from companion.models.architectures import network_of
from companion.models.checkpoint import Checkpoint, find
from companion.randomness import randn

CONVENTION = "noise_level.json"
OPSET = 17  # of ONNX; every runtime since 2022 knows it
TOLERANCE = 1e-5  # relative, of the exported file against the denoiser itself


def export(name: str | os.PathLike | Checkpoint, path: str | os.PathLike, space: Sequence[int] | None = None) -> Path:
    """The file of a denoiser of any name that `load` takes: TorchScript for .pt, ONNX (extra `bridges`) for .onnx.

    space: the image size at which it is traced; 16 times the network's total stride along each axis where that is
    known (the file takes other sizes too). The file is run at another size and batch before it gets its name, and
    must give what the denoiser gives, to `TOLERANCE`.
    Raises ValueError for a checkpoint that is no denoiser of images, another suffix, or a file that disagrees.
    """
    path, found = Path(path), name if isinstance(name, Checkpoint) else find(name)
    if path.suffix not in (".pt", ".onnx"):
        raise ValueError(f"{path.name} ends in {path.suffix!r}; give FILE.pt for TorchScript or FILE.onnx for ONNX")
    D = real_channels(found.denoiser())
    channels, cond = image_channels(D)
    stride = network_of(D).total_stride
    space = tuple(space or (8 * s for s in stride))
    bigger = tuple(n + s for n, s in zip(space, stride, strict=True))
    inputs = _example(2, channels, cond, space, 0)
    says = json.dumps(convention(found.config, channels, cond, stride))
    with atomic_write(path) as aside, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracers warn of checks of shapes, which hold for every size that fits
        (_to_onnx if path.suffix == ".onnx" else _to_torchscript)(D, inputs, aside, says)
        for again in (inputs, _example(3, channels, cond, bigger, 1)):
            ours, theirs = D(*again), run(aside, *again, onnx=path.suffix == ".onnx")
            error = ((theirs - ours).norm() / ours.norm()).item()
            if not error < TOLERANCE:
                raise ValueError(f"{path.name} would differ from {found.name} by {error:.2g} of its norm; not written")
    return path


def real_channels(D: nn.Module) -> nn.Module:
    """The denoiser of real channels inside one of complex images; any other as it is."""
    return cast(nn.Module, D.D) if isinstance(D, ComplexDenoiser) else D


def image_channels(D: nn.Module) -> tuple[int, int]:
    """Real channels of the image and of the condition that a denoiser takes; ValueError if it is not one of images."""
    inner, network = inner_denoiser(D), network_of(D)
    if getattr(inner, "channel_axis", None) != 1 or not hasattr(network, "total_stride"):
        raise ValueError(f"a {type(network).__name__} denoises sequences; single images and volumes can be exported")
    channels = network.out_channels
    if getattr(inner, "learned_variance", False):
        shared = None if isinstance(inner, DiscreteDenoiser) else inner.variance_channels
        channels = channels - shared if shared else channels // 2
    return channels, network.in_channels - channels


def convention(config: Mapping, channels: int, cond: int, stride: Sequence[int]) -> dict:
    """What the inputs and the output of an exported denoiser mean."""
    is_complex = bool(config["denoiser"].get("complex"))
    return {
        "function": "x0_hat = D(x, sigma, cond)" if cond else "x0_hat = D(x, sigma)",
        "x": "x0 + sigma * n, n standard normal in every real channel; float32 (batch, channel, *space)",
        "sigma": "standard deviation of the noise of each real channel, in the units of x; float32 (batch,), above 0",
        "x0_hat": "mean of the clean image x0 given x, the shape of x",
        "channels": channels,
        "order of channels": "re and im of each complex channel" if is_complex else "as the data",
        "channels of cond": cond,
        "multiples": list(stride),
        "data": dict(config.get("data") or {}),
        "weights": config.get("sha256"),
    }


def _example(batch: int, channels: int, cond: int, space: Sequence[int], seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = randn((batch, channels, *space), torch.float32, generator)
    sigma = torch.logspace(-1.3, 0.3, batch)
    return (x, sigma, randn((batch, cond, *space), torch.float32, generator)) if cond else (x, sigma)


def _to_torchscript(D: nn.Module, inputs: tuple[Tensor, ...], path: Path, says: str) -> None:
    traced = torch.jit.trace(D, inputs, check_trace=False)
    torch.jit.save(traced, str(path), _extra_files={CONVENTION: says})


def _to_onnx(D: nn.Module, inputs: tuple[Tensor, ...], path: Path, says: str) -> None:
    with extra("bridges"):
        import onnx
    names = ["x", "sigma", "cond"][: len(inputs)]
    spatial = {0: "batch"} | {2 + i: axis for i, axis in enumerate("zyx"[-(inputs[0].ndim - 2) :])}
    axes = {name: {0: "batch"} if name == "sigma" else spatial for name in (*names, "x0_hat")}
    torch.onnx.export(
        D, inputs, str(path), input_names=names, output_names=["x0_hat"], dynamic_axes=axes, opset_version=OPSET,
        dynamo=False,
    )  # fmt: skip
    model = onnx.load(str(path))
    model.metadata_props.add(key=CONVENTION, value=says)
    onnx.save(model, str(path))


def run(path: str | os.PathLike, *inputs: Tensor, onnx: bool = False) -> Tensor:
    """x0_hat of an exported file that this package has written: a TorchScript file is a program, and is executed."""
    if not onnx:
        return torch.jit.load(str(path))(*inputs)
    with extra("bridges"):
        import onnxruntime
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, given)[0])
