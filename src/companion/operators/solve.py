"""Conjugate gradients for normal equations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from companion.operators.linear import LinearOperator, check_finite


def conjugate_gradient(
    normal: Callable[[Tensor], Tensor],
    b: Tensor,
    x0: Tensor | None = None,
    iterations: int = 10,
    tol: float = 0.0,
    item_ndim: int | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """x with normal(x) = b, for a Hermitian positive (semi)definite `normal`; same shape as b.

    Each batch item has step sizes of its own and stops for itself once |b - normal(x)| <= tol |b|, so an item
    gives the same answer alone and in a batch; a zero right-hand side gives zero. The last `item_ndim` axes
    make an item: by default the domain axes of an operator, else all axes but the first. precondition: a Hermitian
    positive definite map near the inverse of `normal`; the better it is, the fewer steps it takes to the same x.

    Raises ValueError for NaN or infinite b, and when `normal` turns out not to be positive or overflows.
    [hestenes1952]; unrolled, so gradients flow into b, x0 and the parameters of `normal`.
    """
    if item_ndim is None:
        item_ndim = len(normal.domain_shape) if isinstance(normal, LinearOperator) else max(1, b.ndim - 1)
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(f"x0 has shape {tuple(x0.shape)} but b has {tuple(b.shape)}")
    check_finite(b, "the right-hand side b")

    def dot(u: Tensor, v: Tensor) -> Tensor:  # real part of <u, v>, one number per item, kept broadcastable
        value = torch.linalg.vecdot(u.flatten(-item_ndim), v.flatten(-item_ndim)).real
        return value[(...,) + (None,) * item_ndim]

    x = torch.zeros_like(b) if x0 is None else x0
    r = b if x0 is None else b - normal(x)
    p = r if precondition is None else precondition(r)
    rr, rz = dot(r, r), dot(r, p)
    smallest = torch.finfo(rr.dtype).tiny
    stop = torch.clamp(tol**2 * dot(b, b), min=smallest)
    for step in range(iterations):
        active = rr > stop
        if not active.any():
            break
        q = normal(p)
        curvature = dot(p, q)
        if step == 0 and (curvature < -1e-5 * rz.abs()).any():
            raise ValueError(
                "conjugate gradients need a positive operator, but <p, normal(p)> is negative; use A.normal"
            )
        active = active & ~(curvature <= smallest)  # NaN passes, to be reported below
        alpha = torch.where(active, rz / torch.where(active, curvature, 1.0), 0.0)
        x = x + alpha * p
        r = r - alpha * q
        z = r if precondition is None else precondition(r)
        rz_next = dot(r, z)
        beta = torch.where(active, rz_next / torch.where(active, rz, 1.0), 0.0)
        p, rz = z + beta * p, rz_next
        rr = torch.where(active, rz if precondition is None else dot(r, r), 0.0)
    check_finite(x, "the conjugate gradient solution (overflow in `normal`, or it is not positive)")
    return x
