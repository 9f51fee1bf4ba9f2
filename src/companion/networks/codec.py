"""Codecs: what any autoencoder of volumes promises, tile by tile where memory is short."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------
# What all autoencoders share


class Autoencoded(NamedTuple):
    """One pass through an autoencoder: the output, what keeps its latents in order (batch,), and details."""

    x_hat: Tensor
    regulariser: Tensor
    details: dict[str, Tensor]


class Codec(nn.Module):
    """An autoencoder: images (batch, in_channels, *space) <-> latents (batch, latent_channels, *space / factor).

    A subclass has `encoder_path` and `decoder_path`, which do the work, and gives the sizes to __init__.
    regulariser_weight: the usual weight of `Autoencoded.regulariser` beside a mean reconstruction error.
    use_checkpoint: recompute blocks in the backward pass: less memory, same numbers.
    """

    regulariser_weight = 1.0
    encoder_path: Any  # of each subclass
    decoder_path: Any

    def __init__(self, dims: int, in_channels: int, latent_channels: int, factor: int, use_checkpoint: bool = False):
        super().__init__()
        if dims not in (1, 2, 3):
            raise ValueError(f"dims must be 1, 2 or 3, got {dims}")
        self.dims, self.in_channels, self.latent_channels = dims, in_channels, latent_channels
        self.factor, self.use_checkpoint = factor, use_checkpoint

    def encode(self, x: Tensor, tile: int | None = None, overlap: int = 8) -> Tensor:
        """Latents (batch, latent_channels, *space / factor) of images x (batch, in_channels, *space).

        tile, overlap: work in pieces of so many latent cells, see `tiled`. Raises ValueError for images of
        another shape, of a size that is no multiple of `factor`, and with NaN or infinity.
        """
        self.check_image(x)
        _check_finite(x, "image")
        return self.in_pieces(self.encoder_path, x, tile, overlap, up=False)

    def decode(self, z: Tensor, tile: int | None = None, overlap: int = 8) -> Tensor:
        """Images (batch, out_channels, *space * factor) of latents z (batch, latent_channels, *space).

        tile, overlap: as for `encode`. Raises ValueError for latents of another shape, with NaN or infinity.
        """
        if z.ndim != 2 + self.dims or z.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents of shape {tuple(z.shape)} were given; expected (batch, {self.latent_channels}, "
                f"{', '.join('zyx'[-self.dims :])}): were they made by this autoencoder?"
            )
        _check_finite(z, "latent")
        return self.in_pieces(self.decoder_path, z, tile, overlap, up=True)

    def in_pieces(self, path: Callable, x: Tensor, tile: int | None, overlap: int, up: bool) -> Tensor:
        return path(x) if tile is None else tiled(path, x, self.factor, tile, overlap, up=up)

    def check_image(self, x: Tensor) -> None:
        """Raises ValueError unless x is a batch of images that this autoencoder takes."""
        if x.ndim != 2 + self.dims or x.shape[1] != self.in_channels:
            raise ValueError(
                f"images of shape {tuple(x.shape)} were given; expected (batch, {self.in_channels}, "
                f"{', '.join('zyx'[-self.dims :])})"
            )
        if any(size % self.factor for size in x.shape[2:]):
            raise ValueError(
                f"image size {tuple(x.shape[2:])} is not a multiple of the autoencoder's factor {self.factor} "
                "along each axis; pad or crop the image"
            )

    def run(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        """x through blocks in order; with use_checkpoint each is recomputed in the backward pass."""
        for block in blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def _check_finite(x: Tensor, what: str) -> None:
    if not torch.isfinite(x).all():
        raise ValueError(f"the {what} holds NaN or infinity; find out where it comes from, or mask it out")


def tiled(f: Callable[[Tensor], Tensor], x: Tensor, factor: int, tile: int, overlap: int = 8, *, up: bool) -> Tensor:
    """f(x), computed in tiles and blended: memory for one tile at a time, besides x and the result.

    f maps (batch, channel, *cells) to (batch, channel', *cells * factor) if `up`, else back. A tile is
    responsible for `tile` cells along each axis and sees `overlap` more on either side; its weight falls
    linearly to zero over the inner half of that margin, and the outer half is context only. So the result
    equals f(x), but for rounding, when overlap / 2 is at least the reach of f in cells and f is local; a
    network with attention or norms over all pixels is not local and is approximated, without seams.
    """
    if tile < 1 or overlap < 0:
        raise ValueError(f"tile={tile}, overlap={overlap}: expected at least 1 cell and no negative overlap")
    scale_in, scale_out = (1, factor) if up else (factor, 1)
    cells = [size // scale_in for size in x.shape[2:]]
    spans = [[(max(i - overlap, 0), min(i + tile + overlap, n)) for i in range(0, n, tile)] for n in cells]
    weights = [_tile_weights(n, tile, overlap, scale_out, x) for n in cells]
    out: Tensor | None = None
    for index in itertools.product(*(range(len(axis)) for axis in spans)):
        here = [axis[i] for axis, i in zip(spans, index, strict=True)]
        piece = f(x[(..., *(slice(a * scale_in, b * scale_in) for a, b in here))])
        place = [slice(a * scale_out, b * scale_out) for a, b in here]
        for axis, (i, where) in enumerate(zip(index, place, strict=True)):
            w = weights[axis][i, where].to(piece.dtype)
            piece = piece * w.reshape(-1, *[1] * (len(place) - axis - 1))
        if out is None:
            out = piece.new_zeros(*piece.shape[:2], *(n * scale_out for n in cells))
        out[(..., *place)] += piece
    if out is None:
        raise ValueError(f"x has shape {tuple(x.shape)}: nothing to compute")
    return out


def _tile_weights(cells: int, tile: int, overlap: int, scale: int, like: Tensor) -> Tensor:
    """Weights (tile, cells * scale) of the tiles along one axis; they sum to 1 at every pixel."""
    p = (torch.arange(cells * scale, dtype=torch.float64, device=like.device) + 0.5) / scale
    start = torch.arange(0, cells, tile, dtype=torch.float64, device=like.device)[:, None]
    stop = (start + tile).clamp(max=cells)
    outside = torch.maximum(start - p, p - stop).clamp(min=0)
    weights = (1 - outside / max(overlap / 2, 1e-9)).clamp(min=0)
    return weights / weights.sum(0)
