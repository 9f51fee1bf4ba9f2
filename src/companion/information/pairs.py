"""Counts of pairs of grey levels in patches."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-10  # of the published code, in normalisers and logarithms
TINY = 1e-18  # kernels below are 0, far below what the EPS let through
MODES = ("shifts", "centre", "published")
AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}

REACH = 6.0  # a kernel is nothing, exp(-18), so many widths away from its centre
CROP = 4  # cropped histograms have a multiple of so many bins, so that few sizes occur
ENOUGH = 1e-2  # with this much mass in a joint histogram the EPS do not show
JOINT = {"cpu": 2**19, "cuda": 2**27}  # elements of the joint histograms in flight: a core's cache, or half a GB
TABLE = 2**22  # elements of a kernel table


# ------------------------------------------------------------------------------------------- of two samples


def luma(rgb: Tensor) -> Tensor:
    """The grey image (batch, 1, *space) of colours (batch, 3, *space): 0.299 R + 0.587 G + 0.114 B."""
    if rgb.ndim < 3 or rgb.shape[1] != 3:
        raise ValueError(f"expected colours (batch, 3, *space), got shape {tuple(rgb.shape)}")
    return (rgb * rgb.new_tensor([0.299, 0.587, 0.114]).view(1, 3, *[1] * (rgb.ndim - 2))).sum(1, keepdim=True)


def grey(image: Tensor) -> Tensor:
    """Images (batch, 1, *space), of colours (batch, 3, *space) their luma."""
    return luma(image) if image.ndim > 2 and image.shape[1] == 3 else image


def grey_levels(image: Tensor, clamp: bool = True, quantise: bool = False) -> Tensor:
    """255 * image; clamp: into 0..255; quantise: to integers towards zero, which has no gradient."""
    levels = 255 * image
    levels = levels.trunc() if quantise else levels
    return levels.clamp(0, 255) if clamp else levels


def kernels(levels: Tensor, bins: int, width: float) -> Tensor:
    """Gaussians (..., bins) of grey levels (...) at centres evenly spaced from 0 to 255, not normalised."""
    centres = torch.linspace(0, 255, bins, dtype=levels.dtype, device=levels.device)
    k = torch.exp((-0.5 * ((levels[..., None] - centres) / width) ** 2).clamp(min=-80))
    return F.threshold(k, TINY, 0.0)  # products of smaller numbers are denormal, which are slow on a CPU


def marginal(k: Tensor) -> Tensor:
    """Histogram (..., bins) of samples with kernels k (..., sample, bins); its sum is 1 unless k is empty."""
    m = k.mean(-2)
    return m / (m.sum(-1, keepdim=True) + EPS)


def joint(k1: Tensor, k2: Tensor) -> Tensor:
    """Histogram (..., bins, bins) of paired samples with kernels k1, k2 (..., sample, bins)."""
    p = k1.mT @ k2
    return p / (p.sum((-2, -1), keepdim=True) + EPS)


def entropy(p: Tensor, dims: int = 1) -> Tensor:
    """Entropy in bits of histograms p over the last `dims` axes."""
    return p_log_p(p).sum(tuple(range(-dims, 0))) / -math.log(2)


def p_log_p(p: Tensor) -> Tensor:
    """p ln(p + EPS)."""
    if p.device.type != "cpu" or (torch.is_grad_enabled() and p.requires_grad):
        return p * torch.log(p + EPS)
    log = p + EPS
    np.log(log.numpy(), out=log.numpy())  # several times faster than torch.log on a CPU
    return log.mul_(p)


def normalised(information: Tensor, h1: Tensor, h2: Tensor) -> Tensor:
    """2 I / (H1 + H2), as published."""
    return 2 * (information + EPS) / (h1 + h2 + EPS)
