"""Complex images outside networks, two real channels inside: the one place where they meet."""

import torch
from torch import Tensor


def to_channels(x: Tensor, axis: int = 1) -> Tensor:
    """Real tensor with 2C channels from a complex one with C, in the order re, im for each channel.

    x: (batch, C, *space) complex -> (batch, 2C, *space) real; `axis` is the channel axis (2 for sequences).
    Real input is returned unchanged, so that condition images of either kind may pass.
    """
    if not x.is_complex():
        return x
    axis = axis % x.ndim
    return torch.view_as_real(x.resolve_conj()).movedim(-1, axis + 1).flatten(axis, axis + 1)


def to_complex(x: Tensor, axis: int = 1) -> Tensor:
    """Complex tensor with C channels from a real one with 2C: the inverse of `to_channels`.

    x: (batch, 2C, *space) real -> (batch, C, *space) complex. Raises TypeError for complex input and
    ValueError for an odd number of channels.
    """
    if x.is_complex():
        raise TypeError(f"to_complex got a {x.dtype} tensor; it expects real (re, im) channels")
    if x.shape[axis] % 2:
        raise ValueError(
            f"to_complex got {x.shape[axis]} channels on axis {axis} of {tuple(x.shape)}; (re, im) "
            "pairs need an even number"
        )
    axis = axis % x.ndim
    pairs = x.unflatten(axis, (-1, 2))
    return torch.complex(pairs.select(axis + 1, 0), pairs.select(axis + 1, 1))
