"""Other people's packages that some tests compare with: imported if they are there, else the test says why it skips."""

import contextlib
import importlib.util
import sys
import types

import pytest
import torch


def deepinv():
    """The package deepinv. It imports torchvision, whose compiled half does not load beside a CPU build of torch when
    it was built for CUDA; deepinv never calls that half, but its import asks for the name of two operators."""
    if not hasattr(torch.ops.torchvision, "nms"):
        with contextlib.suppress(RuntimeError):
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            deepinv.library = library  # the definition lives as long as this does
    return pytest.importorskip("deepinv", reason="deepinv is not installed: docs/bridges.md says how")


def direct():
    """deepinv with the package DIRECT (direct-recon). Its three compiled modules draw masks, which no network does;
    where they do not load, as on an older Python than they were made for, empty ones stand for them."""
    found = deepinv()
    if importlib.util.find_spec("direct") is None or importlib.util.find_spec("omegaconf") is None:
        pytest.skip("DIRECT is not installed: docs/bridges.md says how")
    for name in ("direct.common._gaussian", "direct.common._poisson", "direct.ssl._gaussian_fill"):
        try:
            importlib.import_module(name)
        except ImportError:
            empty = types.ModuleType(name)
            names = ("gaussian_mask_1d", "gaussian_mask_2d", "poisson", "gaussian_fill")
            empty.__dict__.update(dict.fromkeys(names, None))
            sys.modules[name] = empty
    return found
