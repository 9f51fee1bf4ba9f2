"""Other people's packages that some tests compare with: imported if they are there, else the test says why it skips."""

import contextlib

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
