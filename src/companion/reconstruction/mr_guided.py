"""PET with the help of the same person's MR image: what a PET/MR scanner always has, without a learned prior.

Both methods take from the MR which pixels belong together, never how active they are: Bowsher's prior smooths a pixel
with those neighbours alone that look like it, the kernel method writes activity as a mixture of alike pixels. Where
the MR shows nothing, at a lesion that only the tracer sees, Bowsher smooths over it like any prior, and the kernel
method may lose it; `evaluation.activity` measures what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.operators.linear import LinearOperator, Shape, check_finite, derived
from companion.reconstruction.pet import Reconstruction, map_rdp, mlem, pairs

CHUNK = 4096  # pixels whose candidates are compared at a time


def bowsher_weights(mr: Tensor, neighbours: int | None = None) -> Tensor:
    """The weights (pair, batch, 1, *space) for `map_rdp(alike=...)` of MR images (batch, 1, *space).

    A pixel is tied to the `neighbours` (by default half of all: 4 in a plane, 13 in a stack) whose MR value is nearest
    to its own; a pair counts 1 where both chose each other, one half where one did, and 0 else, so that each pair has
    one weight and the prior has a value. Only the order of differences matters, so the unit of the MR does not.
    Bowsher et al. 2004.
    Raises ValueError for values that are not finite, and for more neighbours than there are.
    """
    kinds = list(pairs(mr.shape[2:]))
    neighbours = len(kinds) if neighbours is None else neighbours
    if not 1 <= neighbours <= 2 * len(kinds):
        raise ValueError(f"{neighbours} neighbours of a pixel that has {2 * len(kinds)}; give 1 to {2 * len(kinds)}")
    check_finite(mr, "the MR image")
    far = mr.new_full((2 * len(kinds), *mr.shape), torch.inf)  # differences to both ends of each kind of pair
    for k, (_, here, there) in enumerate(kinds):
        difference = (mr[here] - mr[there]).abs()
        far[2 * k][here], far[2 * k + 1][there] = difference, difference
    order = far.argsort(stable=True, dim=0).argsort(stable=True, dim=0)  # rank of each neighbour, ties by their order
    there_are = far.isfinite()  # at the rim of the image, or of a stack, fewer: half of them, or edges are crossed
    chosen = (order < neighbours * there_are.sum(0) / len(far)) & there_are
    weights = torch.zeros(len(kinds), *mr.shape, device=mr.device)
    for k, (_, here, there) in enumerate(kinds):
        weights[k][here] = (chosen[2 * k][here].float() + chosen[2 * k + 1][there].float()) / 2
    return weights


def map_bowsher(
    y: Tensor,
    A: LinearOperator,
    mr: Tensor,
    background: Tensor | None = None,
    *,
    strength: float = 0.1,
    neighbours: int | None = None,
    step: float = 1.0,
    **options,
) -> Reconstruction:
    """`map_rdp` that smooths each pixel with its neighbours of like MR value alone; mr (batch or 1, 1, *space).

    step: distance of the planes of a stack (z, y, x), in pixels. `strength` smooths a pixel of a stack as much in all
    as one of a plane, though it has three times as many neighbours.
    Raises ValueError for an MR image on another grid: resample it first (`data.alignment.resample`).
    """
    _check_grid(mr, y, A)
    alike = bowsher_weights(mr, neighbours)
    if mr.ndim == 5:  # a stack: pairs count by their distance in pixels, which `map_rdp` takes to be that of indices
        steps = torch.tensor([offset for offset, *_ in pairs(mr.shape[2:])], dtype=torch.float32)
        index, true = steps.norm(dim=1), (steps * torch.tensor([step, 1.0, 1.0])).norm(dim=1)
        alike = alike * (index / true).to(alike).reshape(-1, *[1] * mr.ndim)
        strength = strength * (1 / true[steps[:, 0] == 0]).sum().item() / (1 / true).sum().item()
    return map_rdp(y, A, background, strength=strength, alike=alike, **options)


@dataclass(frozen=True, eq=False, repr=False)
class Kernel(LinearOperator):
    """K of the kernel method: image_j = sum_l weight_jl coefficient_l over the nearest pixels l of j in the MR.

    places, weights (pixel, near): which pixels, and weights that sum to 1 over each row. Images (..., 1, *space).
    """

    places: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    shape: Shape

    domain_dtype = torch.float32
    range_dtype = torch.float32
    domain_shape = derived(lambda self: tuple(self.shape))
    range_shape = derived(lambda self: tuple(self.shape))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.places.shape[0])
        return (flat[:, self.places] * self.weights.to(x)).sum(-1).reshape(x.shape)

    def adjoint(self, y: Tensor) -> Tensor:
        flat = y.reshape(-1, self.places.shape[0], 1) * self.weights.to(y)
        out = torch.zeros(len(flat), self.places.shape[0], dtype=y.dtype, device=y.device)
        return out.index_add_(1, self.places.flatten(), flat.flatten(1)).reshape(y.shape)


def kernel(mr: Tensor, near: int = 48, reach: int = 4, width: float = 0.1) -> Kernel:
    """The kernel of one MR image (1, 1, *space): Gaussian in the difference of small patches (3 pixels wide).

    Of the pixels within `reach` along each axis the `near` most alike ones count, exp(-d^2 / (2 width^2)), d the root
    mean square difference of patches in units of the standard deviation of the image: wider than the noise of the MR,
    narrower than the steps between its tissues, across which it would blur. Wang and Qi 2015, with normalised rows.
    Raises ValueError for values that are not finite, and for more than one image.
    """
    if mr.ndim < 4 or tuple(mr.shape[:2]) != (1, 1):
        raise ValueError(f"one MR image (1, 1, *space) makes a kernel, got {tuple(mr.shape)}")
    check_finite(mr, "the MR image")
    space, ndim = mr.shape[2:], mr.ndim - 2
    scaled = (mr / mr.std().clamp(min=1e-12)).float()
    unfold = [F.pad(scaled, [1] * 2 * ndim, mode="replicate")]
    for axis in range(2, 2 + ndim):  # all shifts of the padded image that keep its size: the patch of each pixel
        unfold = [u.narrow(axis, s, space[axis - 2]) for u in unfold for s in range(3)]
    patches = torch.cat(unfold, 1)[0].flatten(1).T  # (pixel, patch)
    index = torch.arange(len(patches)).reshape(space)
    steps = torch.cartesian_prod(*[torch.arange(-reach, reach + 1)] * ndim)
    at = torch.stack(torch.meshgrid(*[torch.arange(n) for n in space], indexing="ij"), -1).reshape(-1, 1, ndim)
    to = at + steps  # (pixel, candidate, axis)
    inside = ((to >= 0) & (to < torch.tensor(space))).all(-1)
    to = to.minimum(torch.tensor(space) - 1).clamp(min=0)
    candidates = index[tuple(to.unbind(-1))].to(mr.device)
    parts = zip(candidates.split(CHUNK), patches.split(CHUNK), strict=True)
    distance = torch.cat([(patches[c] - p[:, None]).square().mean(-1) for c, p in parts])
    distance = torch.where(inside.to(mr.device), distance, torch.inf)
    found, chosen = distance.topk(min(near, distance.shape[1]), largest=False)
    weights = torch.exp(-found / (2 * width**2))
    return Kernel(candidates.gather(1, chosen), weights / weights.sum(1, keepdim=True), (1, *space))


def kernel_em(
    y: Tensor, A: LinearOperator, mr: Tensor, background: Tensor | None = None, *, iterations: int = 60, **options
) -> Reconstruction:
    """MLEM of the coefficients of `kernel(mr)`, of one scan or of several of the same slice; x is the image K a.

    Raises ValueError for an MR image on another grid.
    """
    _check_grid(mr, y, A)
    K = kernel(mr, **options)
    found = mlem(y, A @ K, background, iterations=iterations)
    return Reconstruction(K(found.x), found.iterations)


def _check_grid(mr: Tensor, y: Tensor, A: LinearOperator) -> None:
    if tuple(mr.shape[1:]) != tuple(A.domain_shape) or len(mr) not in (1, len(y)):
        wanted = ", ".join(map(str, A.domain_shape))
        raise ValueError(
            f"the MR image has shape {tuple(mr.shape)}, expected (1 or {len(y)}, {wanted}): the grid of the PET image; "
            "resample it first"
        )
