"""Linear operators: a small protocol, its algebra, the adjoint test and conjugate gradients.

An operator maps `(..., *domain_shape)` to `(..., *range_shape)`; all axes in front are batch axes. Complex
stays complex. Operators are frozen dataclasses, so an operator never changes after it is built, and they are
made of differentiable torch operations, so autograd flows through them (for a complex operator the gradient
of |A x - y|^2 / 2 is A^H (A x - y)).

A new operator is a frozen dataclass (`@dataclass(frozen=True, eq=False, repr=False)`) with `domain_shape`,
`range_shape`, `domain_dtype`, `range_dtype`, `forward` and `adjoint`; test it with `adjoint_error`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from numbers import Number
from operator import add
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]
T = TypeVar("T")
unset: Any = None  # the default of a field that __post_init__ fills in


def derived(of: Callable[[Any], T]) -> T:
    """A property that stands for a field: computed from the others, of the type that the field has."""
    return cast(T, property(of))


class LinearOperator:
    """A linear map from `(..., *domain_shape)` to `(..., *range_shape)`.

    `domain_dtype` and `range_dtype` say real or complex; the precision follows the input. `batch_shape` is
    not empty when the operator itself differs between batch items (coil maps of several slices, for example).
    """

    domain_shape: Shape
    range_shape: Shape
    domain_dtype: torch.dtype
    range_dtype: torch.dtype
    batch_shape: Shape = ()
    __array_ufunc__ = None  # lets `numpy_scalar * A` reach __rmul__

    def forward(self, x: Tensor) -> Tensor:
        """A x, without input checks."""
        raise NotImplementedError

    def adjoint(self, y: Tensor) -> Tensor:
        """A^H y, without input checks."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """A x: `(..., *domain_shape)` to `(..., *range_shape)`; ValueError or TypeError if x does not fit."""
        _check(self, x)
        return self.forward(x)

    def normal(self, x: Tensor) -> Tensor:
        """A^H A x, same shape as x."""
        return self.H(self(x))

    @property
    def H(self) -> LinearOperator:
        """The adjoint operator A^H."""
        return Adjoint(self)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        """The composition `(A @ B)(x) = A(B(x))`; identities vanish and zeros absorb."""
        if not isinstance(other, LinearOperator):
            return NotImplemented
        if self.domain_shape != other.range_shape:
            raise ValueError(
                f"cannot compose: {_name(self)} takes {self.domain_shape} but {_name(other)} gives "
                f"{other.range_shape}; build both for the same shape"
            )
        if self.domain_dtype.is_complex != other.range_dtype.is_complex:
            raise TypeError(
                f"cannot compose: {_name(self)} takes {self.domain_dtype} but {_name(other)} gives {other.range_dtype}"
            )
        if isinstance(other, Identity):
            return self
        if isinstance(self, Identity):
            return other
        if isinstance(self, Zero) or isinstance(other, Zero):
            return Zero(other.domain_shape, self.range_shape, other.domain_dtype, self.range_dtype)
        return Composition(self, other)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        """The sum `(A + B)(x) = A(x) + B(x)`; zeros vanish."""
        if not isinstance(other, LinearOperator):
            return NotImplemented
        ours, theirs = (self.domain_shape, self.range_shape), (other.domain_shape, other.range_shape)
        if ours != theirs:
            raise ValueError(
                f"cannot add: {_name(self)} maps {ours[0]} to {ours[1]} but {_name(other)} maps "
                f"{theirs[0]} to {theirs[1]}"
            )
        if self.domain_dtype.is_complex != other.domain_dtype.is_complex:
            raise TypeError(f"cannot add: {_name(self)} takes {self.domain_dtype}, {_name(other)} {other.domain_dtype}")
        if isinstance(other, Zero):
            return self
        return other if isinstance(self, Zero) else Sum(self, other)

    def __mul__(self, scalar: complex | Tensor) -> LinearOperator:
        """The operator scaled by a number or a tensor with a single element."""
        if not isinstance(scalar, Number | Tensor):
            return NotImplemented
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise ValueError(f"a scalar has one element, got shape {tuple(scalar.shape)}; use Diagonal for weights")
        if isinstance(scalar, Tensor):
            scalar = scalar.reshape(())
        is_complex = scalar.is_complex() if isinstance(scalar, Tensor) else isinstance(scalar, complex)
        if is_complex and not self.range_dtype.is_complex:
            raise TypeError(f"complex scalar times the real operator {_name(self)}; use a real scalar")
        if isinstance(scalar, Number) and scalar == 0:
            return Zero(self.domain_shape, self.range_shape, self.domain_dtype, self.range_dtype)
        if isinstance(self, Zero) or (isinstance(scalar, Number) and scalar == 1):
            return self
        return Scaled(self.scalar * scalar, self.operator) if isinstance(self, Scaled) else Scaled(scalar, self)

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return -1 * self

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return self + (-1) * other

    def __repr__(self) -> str:
        return f"{_name(self)}{self.domain_shape} -> {self.range_shape}"

    def to(self, device) -> LinearOperator:
        """The same operator with its tensors on `device`."""

        def move(value):
            if isinstance(value, tuple):
                return tuple(move(v) for v in value)
            return value.to(device) if isinstance(value, Tensor | LinearOperator) else value

        whole: Any = self  # every operator is a dataclass
        fields = [f.name for f in dataclasses.fields(whole) if f.init]
        return dataclasses.replace(whole, **{name: move(getattr(self, name)) for name in fields})


@dataclass(frozen=True, eq=False, repr=False)
class Adjoint(LinearOperator):
    """A^H as an operator; `A.H.H` is A."""

    operator: LinearOperator

    domain_shape = derived(lambda self: self.operator.range_shape)
    range_shape = derived(lambda self: self.operator.domain_shape)
    domain_dtype = derived(lambda self: self.operator.range_dtype)
    range_dtype = derived(lambda self: self.operator.domain_dtype)
    batch_shape = derived(lambda self: self.operator.batch_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.operator.adjoint(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.operator.forward(y)

    @property
    def H(self) -> LinearOperator:
        return self.operator


@dataclass(frozen=True, eq=False, repr=False)
class Composition(LinearOperator):
    """outer(inner(x)); made by `outer @ inner`."""

    outer: LinearOperator
    inner: LinearOperator

    domain_shape = derived(lambda self: self.inner.domain_shape)
    range_shape = derived(lambda self: self.outer.range_shape)
    domain_dtype = derived(lambda self: self.inner.domain_dtype)
    range_dtype = derived(lambda self: self.outer.range_dtype)
    batch_shape = derived(lambda self: _join(self.outer, self.inner))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer.forward(self.inner.forward(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))

    def normal(self, x: Tensor) -> Tensor:
        _check(self, x)
        return self.inner.adjoint(self.outer.normal(self.inner.forward(x)))


@dataclass(frozen=True, eq=False, repr=False)
class Sum(LinearOperator):
    """first(x) + second(x); made by `first + second`."""

    first: LinearOperator
    second: LinearOperator

    domain_shape = derived(lambda self: self.first.domain_shape)
    range_shape = derived(lambda self: self.first.range_shape)
    domain_dtype = derived(lambda self: self.first.domain_dtype)
    range_dtype = derived(lambda self: self.first.range_dtype)
    batch_shape = derived(lambda self: _join(self.first, self.second))

    def forward(self, x: Tensor) -> Tensor:
        return self.first.forward(x) + self.second.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.first.adjoint(y) + self.second.adjoint(y)


@dataclass(frozen=True, eq=False, repr=False)
class Scaled(LinearOperator):
    """scalar * operator(x); made by `scalar * operator`."""

    scalar: complex | Tensor
    operator: LinearOperator

    domain_shape = derived(lambda self: self.operator.domain_shape)
    range_shape = derived(lambda self: self.operator.range_shape)
    domain_dtype = derived(lambda self: self.operator.domain_dtype)
    range_dtype = derived(lambda self: self.operator.range_dtype)
    batch_shape = derived(lambda self: self.operator.batch_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.scalar * self.operator.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        conjugate = self.scalar.conj() if isinstance(self.scalar, Tensor) else self.scalar.conjugate()
        return conjugate * self.operator.adjoint(y)

    def normal(self, x: Tensor) -> Tensor:
        return abs(self.scalar) ** 2 * self.operator.normal(x)


@dataclass(frozen=True, eq=False, repr=False)
class Identity(LinearOperator):
    """x itself."""

    domain_shape: Shape
    domain_dtype: torch.dtype = torch.complex64

    range_shape = derived(lambda self: self.domain_shape)
    range_dtype = derived(lambda self: self.domain_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return y

    @property
    def H(self) -> LinearOperator:
        return self


@dataclass(frozen=True, eq=False, repr=False)
class Zero(LinearOperator):
    """Zeros of shape `(..., *range_shape)`."""

    domain_shape: Shape
    range_shape: Shape
    domain_dtype: torch.dtype = torch.complex64
    range_dtype: torch.dtype = torch.complex64

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[: x.ndim - len(self.domain_shape)]
        return x.new_zeros(*lead, *self.range_shape, dtype=_with_precision(self.range_dtype, x.dtype))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.H.forward(y)

    @property
    def H(self) -> LinearOperator:
        return Zero(self.range_shape, self.domain_shape, self.range_dtype, self.domain_dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(LinearOperator):
    """weights * x, weights broadcastable to `(..., *domain_shape)`, real or complex.

    `domain_dtype` defaults to the kind of the weights; give it when real weights act on complex data.
    """

    weights: Tensor
    domain_shape: Shape
    domain_dtype: torch.dtype = unset

    def __post_init__(self):
        dtype = self.weights.dtype if self.domain_dtype is None else self.domain_dtype
        object.__setattr__(self, "domain_dtype", dtype)
        if self.weights.is_complex() and not dtype.is_complex:
            raise TypeError(f"complex weights on {dtype} data; use domain_dtype=torch.complex64 or real weights")
        check_finite(self.weights, "weights")
        _broadcasts(self.weights, self.domain_shape, "weights")

    range_shape = derived(lambda self: self.domain_shape)
    range_dtype = derived(lambda self: self.domain_dtype)
    batch_shape = derived(lambda self: tuple(self.weights.shape[: max(0, self.weights.ndim - len(self.domain_shape))]))

    def forward(self, x: Tensor) -> Tensor:
        return self.weights * x

    def adjoint(self, y: Tensor) -> Tensor:
        return self.weights.conj() * y

    def normal(self, x: Tensor) -> Tensor:
        _check(self, x)
        return (self.weights.conj() * self.weights) * x


@dataclass(frozen=True, eq=False, repr=False)
class Stack(LinearOperator):
    """Operators over the same domain, their ranges concatenated along the first range axis (the coil
    axis)."""

    operators: tuple[LinearOperator, ...]

    def __post_init__(self):
        object.__setattr__(self, "operators", tuple(self.operators))
        if not self.operators:
            raise ValueError("Stack needs at least one operator")
        first = self.operators[0]
        for other in self.operators[1:]:
            if other.domain_shape != first.domain_shape or other.range_shape[1:] != first.range_shape[1:]:
                raise ValueError(
                    f"cannot stack: {_name(first)} maps {first.domain_shape} to {first.range_shape} but "
                    f"{_name(other)} maps {other.domain_shape} to {other.range_shape}; domains must agree, "
                    "and ranges in all axes but the first"
                )

    domain_shape = derived(lambda self: self.operators[0].domain_shape)
    domain_dtype = derived(lambda self: self.operators[0].domain_dtype)
    range_dtype = derived(lambda self: self.operators[0].range_dtype)
    range_shape = derived(
        lambda self: (sum(op.range_shape[0] for op in self.operators), *self.operators[0].range_shape[1:])
    )
    batch_shape = derived(lambda self: _join(*self.operators))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([op.forward(x) for op in self.operators], dim=-len(self.range_shape))

    def adjoint(self, y: Tensor) -> Tensor:
        parts = y.split([op.range_shape[0] for op in self.operators], dim=-len(self.range_shape))
        return reduce(add, (op.adjoint(part) for op, part in zip(self.operators, parts, strict=True)))

    def normal(self, x: Tensor) -> Tensor:
        return reduce(add, (op.normal(x) for op in self.operators))


def adjoint_error(A: LinearOperator, seed: int = 0, batch: int = 2, device="cpu") -> float:
    """|<A x, y> - <x, A^H y>| / (|A x| |y|) for random x and y: about 1e-7 for a right adjoint in single
    precision.

    Raises ValueError when A or A^H returns another shape or kind of number than it states.
    """
    generator = torch.Generator().manual_seed(seed)
    lead = A.batch_shape or (batch,)
    x = torch.randn(*lead, *A.domain_shape, dtype=A.domain_dtype, generator=generator).to(device)
    y = torch.randn(*lead, *A.range_shape, dtype=A.range_dtype, generator=generator).to(device)
    Ax, AHy = A(x), A.H(y)
    for name, got, want in (("A(x)", Ax, y), ("A.H(y)", AHy, x)):
        if got.shape != want.shape or got.is_complex() != want.is_complex():
            raise ValueError(
                f"{name} of {_name(A)} has shape {tuple(got.shape)} and {got.dtype}, stated are "
                f"{tuple(want.shape)} and {want.dtype}"
            )
    wide = torch.complex128 if A.domain_dtype.is_complex or A.range_dtype.is_complex else torch.float64
    x, y, Ax, AHy = (v.detach().flatten().to(wide) for v in (x, y, Ax, AHy))
    left, right = torch.vdot(y, Ax), torch.vdot(AHy, x)
    if not (A.domain_dtype.is_complex and A.range_dtype.is_complex):  # real-linear pairing
        left, right = left.real, right.real
    scale = (torch.linalg.norm(Ax) * torch.linalg.norm(y)).item()
    difference = abs((left - right).item())
    return difference / scale if scale > 0 else difference


def check_finite(x: Tensor, name: str) -> Tensor:
    """x itself; ValueError when it holds NaN or infinite values."""
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name}: {bad} of {math.prod(x.shape)} values are NaN or infinite; mask or repair them first")
    return x


def _check(A: LinearOperator, x: Tensor) -> None:
    n = len(A.domain_shape)
    if x.ndim < n or tuple(x.shape[x.ndim - n :]) != tuple(A.domain_shape):
        wanted = ", ".join(["...", *map(str, A.domain_shape)])
        raise ValueError(f"{_name(A)} takes ({wanted}) but got {tuple(x.shape)}; batch axes come first")
    if x.is_complex() != A.domain_dtype.is_complex:
        wanted = "complex; use x.to(torch.complex64)" if A.domain_dtype.is_complex else "real"
        raise TypeError(f"{_name(A)} got {x.dtype} but its input is {wanted}")
    lead = x.shape[: x.ndim - n]
    try:
        fits = np.broadcast_shapes(lead, A.batch_shape) == lead
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{_name(A)} differs between {A.batch_shape} batch items but got a batch of {tuple(lead)}; "
            "expand x to one item each, or build the operator for a single item"
        )


def _broadcasts(tensor: Tensor, shape: Shape, name: str) -> None:
    """Check that `tensor`, with or without batch axes, broadcasts to `(..., *shape)`."""
    trailing = tensor.shape[-len(shape) :] if shape else ()
    try:
        fits = np.broadcast_shapes(trailing, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} do not broadcast to (..., {', '.join(map(str, shape))})"
        )


def _join(*operators: LinearOperator) -> Shape:
    try:
        return np.broadcast_shapes(*(op.batch_shape for op in operators))  # torch's imports sympy: 2 s
    except ValueError as error:
        shapes = ", ".join(f"{_name(op)} {op.batch_shape}" for op in operators)
        raise ValueError(f"operators for different batches: {shapes}") from error


def _with_precision(kind: torch.dtype, like: torch.dtype) -> torch.dtype:
    real = like.to_real()
    return real.to_complex() if kind.is_complex else real


def _name(A: LinearOperator) -> str:
    return f"{_name(A.operator)}.H" if isinstance(A, Adjoint) else type(A).__name__
