"""The operator algebra is matrix algebra, and conjugate gradients solve what they are given."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from companion.operators.linear import (
    Diagonal,
    Identity,
    LinearOperator,
    Stack,
    Zero,
    adjoint_error,
    check_finite,
)
from companion.operators.solve import conjugate_gradient
from companion.operators.stacked import Stacked, Tied

REAL, COMPLEX = torch.float32, torch.complex64


@dataclass(frozen=True, eq=False, repr=False)
class Matrix(LinearOperator):
    """A dense matrix, to hold the algebra against."""

    matrix: torch.Tensor

    domain_shape = property(lambda self: (self.matrix.shape[-1],))
    range_shape = property(lambda self: (self.matrix.shape[-2],))
    domain_dtype = property(lambda self: self.matrix.dtype)
    range_dtype = property(lambda self: self.matrix.dtype)

    def forward(self, x):
        return x @ self.matrix.mT

    def adjoint(self, y):
        return y @ self.matrix.conj()


def matrix(rows: int, columns: int, dtype=COMPLEX, seed: int = 0) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    return Matrix(torch.randn(rows, columns, dtype=dtype, generator=generator))


def dense(A: LinearOperator) -> torch.Tensor:
    """The matrix of A, column by column."""
    return A(torch.eye(A.domain_shape[0], dtype=A.domain_dtype)).mT


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_algebra_is_matrix_algebra(dtype):
    A, B, C = matrix(4, 3, dtype, 1), matrix(4, 3, dtype, 2), matrix(3, 5, dtype, 3)
    a, b, c = A.matrix, B.matrix, C.matrix
    cases = [
        (A @ C, a @ c),
        ((A + B) @ C, (a + b) @ c),
        (2.5 * A - B, 2.5 * a - b),
        (-A, -a),
        (A.H, a.mH),
        ((A @ C).H, (a @ c).mH),
        ((A + 0.5 * B).H @ A, (a + 0.5 * b).mH @ a),
        (Stack((A, B, matrix(2, 3, dtype))), torch.cat([a, b, matrix(2, 3, dtype).matrix])),
        (Diagonal(c[:, 0], (3,)), torch.diag(c[:, 0])),
        (torch.tensor(3.0) * A, 3 * a),
        (np.float64(3.0) * A * 2, 6 * a),
    ]
    if dtype is COMPLEX:
        cases += [((1j * A).H, -1j * a.mH), ((2j * (1 - 1j)) * A, (2 + 2j) * a)]
    for operator, expected in cases:
        assert torch.allclose(dense(operator), expected, atol=1e-5), operator
        assert adjoint_error(operator) < 1e-6
        x = torch.randn(2, *operator.domain_shape, dtype=dtype)
        assert torch.allclose(operator.normal(x), operator.H(operator(x)), atol=1e-4)


def test_identities_vanish_and_zeros_absorb():
    A = matrix(4, 3)
    one, none = Identity((3,)), Zero((3,), (4,))
    assert A @ one is A and Identity((4,)) @ A is A and one.H is one
    assert A + none is A and none + A is A and 1 * A is A and A.H.H is A
    assert isinstance(A.H @ none, Zero) and isinstance(0 * A, Zero) and isinstance(2 * none, Zero)
    assert none(torch.ones(2, 3, dtype=torch.complex128)).dtype == torch.complex128
    assert none.H(torch.ones(2, 4, dtype=COMPLEX)).shape == (2, 3)


def test_adjoint_error_finds_a_wrong_adjoint():
    class Wrong(Matrix):
        def adjoint(self, y):
            return y @ self.matrix  # forgets the conjugate

    assert adjoint_error(Wrong(matrix(4, 3).matrix)) > 1e-2

    class Shape(Matrix):
        def adjoint(self, y):
            return y

    with pytest.raises(ValueError, match="stated"):
        adjoint_error(Shape(matrix(4, 3).matrix))


def test_gradients_are_adjoints():
    A = matrix(4, 3)
    x = torch.randn(2, 3, dtype=COMPLEX, requires_grad=True)
    y = torch.randn(2, 4, dtype=COMPLEX)
    (A(x) - y).abs().square().sum().div(2).backward()
    assert torch.allclose(x.grad, A.H(A(x) - y), atol=1e-5)
    scalar = torch.tensor(2.0, requires_grad=True)
    (scalar * A)(x.detach()).abs().square().sum().backward()
    assert scalar.grad == pytest.approx(2 * 2 * A(x.detach()).abs().square().sum().item(), rel=1e-5)


def test_slices_become_a_volume():
    weights = torch.rand(4, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    A = Stacked(Diagonal(weights, (1, 2, 3)), 4)
    assert A.domain_shape == A.range_shape == (1, 4, 2, 3) and adjoint_error(A) < 1e-6
    x = torch.rand(5, 1, 4, 2, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(A(x), weights.transpose(0, 1) * x), "each slice has its own operator"
    with pytest.raises(ValueError, match="one for each of 3 slices"):
        Stacked(Diagonal(weights, (1, 2, 3)), 3)
    with pytest.raises(ValueError, match="one channel"):
        Stacked(Diagonal(torch.ones(2, 2, 3), (2, 2, 3)), 4)


def test_errors_say_what_does_not_fit():
    A = matrix(4, 3)
    with pytest.raises(ValueError, match=r"takes \(..., 3\) but got \(2, 4\)"):
        A(torch.zeros(2, 4, dtype=COMPLEX))
    with pytest.raises(TypeError, match="complex64"):
        A(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="cannot compose"):
        A @ A
    with pytest.raises(ValueError, match="cannot add"):
        A + A.H
    with pytest.raises(TypeError, match="cannot compose"):
        A @ Identity((3,), REAL)
    with pytest.raises(TypeError, match="real scalar"):
        1j * matrix(4, 3, REAL)
    with pytest.raises(ValueError, match="Diagonal"):
        torch.ones(2) * A
    with pytest.raises(ValueError, match="cannot stack"):
        Stack((A, matrix(2, 2)))
    with pytest.raises(ValueError, match="broadcast"):
        Diagonal(torch.ones(2), (3,))
    per_item = Diagonal(torch.ones(4, 3), (3,))
    assert per_item.batch_shape == (4,)
    with pytest.raises(ValueError, match="4.*batch items"):
        per_item(torch.ones(2, 3))
    with pytest.raises(ValueError, match="1 of 2"):
        check_finite(torch.tensor([1.0, float("nan")]), "x")


def system(n: int = 6, dtype=torch.complex128, condition: float = 100.0):
    q, _ = torch.linalg.qr(matrix(n, n, dtype).matrix)
    eigenvalues = torch.logspace(0, np.log10(condition), n, dtype=torch.float64)
    return Matrix((q * eigenvalues) @ q.mH)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_cg_is_exact_after_n_steps(dtype):
    N, b = system(dtype=dtype), torch.randn(3, 6, dtype=dtype)
    x = conjugate_gradient(N, b, iterations=6)
    assert torch.allclose(x, torch.linalg.solve(N.matrix, b.mT).mT, rtol=1e-8)
    assert torch.allclose(conjugate_gradient(N, b, iterations=60), x, rtol=1e-8)  # no drift, no 0 / 0
    assert torch.allclose(conjugate_gradient(N, b, x0=x + 1, iterations=6), x, rtol=1e-8)


def test_cg_treats_items_independently():
    N, b = system(), torch.randn(4, 6, dtype=torch.complex128)
    b[1], b[2] = 0, 1e6 * b[2]
    together = conjugate_gradient(N, b, iterations=4, tol=1e-3)
    alone = torch.cat([conjugate_gradient(N, item[None], iterations=4, tol=1e-3) for item in b])
    assert torch.allclose(together, alone, rtol=1e-12) and together[1].abs().max() == 0


def test_cg_stops_each_item_at_its_tolerance():
    N, calls = system(), []
    b = torch.stack([N.matrix @ torch.ones(6, dtype=torch.complex128), torch.zeros(6, dtype=torch.complex128)])

    def normal(x):
        calls.append(x)
        return N(x)

    exact = torch.ones(2, 6, dtype=torch.complex128) * torch.tensor([[1.0], [0.0]])
    assert torch.equal(conjugate_gradient(normal, b, x0=exact, tol=1e-6), exact) and len(calls) == 1
    x = conjugate_gradient(N, b, iterations=100, tol=1e-3)
    assert (N(x) - b)[0].norm() <= 1e-3 * b[0].norm() * (1 + 1e-9)


def test_cg_gradient_is_the_adjoint_solve():
    N, b = system(), torch.randn(1, 6, dtype=torch.complex128, requires_grad=True)
    g = torch.randn(1, 6, dtype=torch.complex128)
    (conjugate_gradient(N, b, iterations=6).conj() * g).sum().real.backward()
    assert torch.allclose(b.grad, torch.linalg.solve(N.matrix, g.mT).mT, rtol=1e-6)


def test_cg_refuses_nan_and_indefinite():
    N, b = system(), torch.ones(1, 6, dtype=torch.complex128)
    with pytest.raises(ValueError, match="NaN"):
        conjugate_gradient(N, b * float("nan"))
    with pytest.raises(ValueError, match="positive"):
        conjugate_gradient(-1 * N, b)
    with pytest.raises(ValueError, match="NaN or infinite"):
        conjugate_gradient(lambda x: x * float("nan"), b)
    with pytest.raises(ValueError, match="x0 has shape"):
        conjugate_gradient(N, b, x0=b[0])


def test_tied_slices_are_data_and_differences_in_one_row():
    generator = torch.Generator().manual_seed(0)
    A = Diagonal(torch.rand(2, 1, 3, 4, 5, generator=generator) + 0.1, (1, 3, 4, 5))
    root = torch.rand(2, 1, 2, 4, 5, generator=generator)
    T = Tied(A, root)
    assert T.range_shape == (60 + 40,) and T.batch_shape == (2,)
    assert adjoint_error(T) < 1e-5
    x = torch.randn(2, 1, 3, 4, 5, generator=generator)
    rows, ties = T(x).split([60, 40], -1)
    assert torch.equal(rows, A(x).flatten(1))
    assert torch.allclose(ties, (root * (x[:, :, 1:] - x[:, :, :-1])).flatten(1))
    assert torch.allclose(T.normal(x), T.H(T(x)), atol=1e-5)
    with pytest.raises(ValueError, match=r"slices of \(1, z, y, x\) are tied"):
        Tied(Identity((1, 4, 5), REAL), root)
    with pytest.raises(ValueError, match="weights"):
        Tied(A, torch.ones(7, 4, 5))
