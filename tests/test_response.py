"""Preconditioned systems of counts: the same solution, in fewer steps, for slices and for volumes of oblique planes."""

import pytest
import torch

from companion.diffusion.covariance import Factor, Measured
from companion.diffusion.guidance import posterior_mean
from companion.diffusion.response import Response
from companion.operators.cylinder import Cylinder, Projector3D
from companion.operators.linear import Diagonal
from companion.operators.pet import ParallelBeam, Projector
from companion.operators.solve import conjugate_gradient

PROJECTORS = {
    "slice": lambda: Projector(ParallelBeam((16, 16), 24, 20, 4.0, 4.0)),
    "volume": lambda: Projector3D(Cylinder((5, 12, 12), (4.0, 4.0), 16, 14, 4.0, 3, 8.0, 60.0)),
}


class Stated:
    """A denoiser that is certain outside of a disc, and not inside."""

    def moments(self, x, sigma, cond=None):
        line = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
        inside = (line[:, None] ** 2 + line**2 < 0.5).to(x.dtype)
        return torch.zeros_like(x), (1e-4 + inside * (1 + line)).expand(x.shape)


def problem(kind: str):
    """The operator, whitened for each of two items, the data, and the covariance of a prior."""
    P, g = PROJECTORS[kind](), torch.Generator().manual_seed(0)
    root = 0.2 + torch.rand(2, *P.range_shape, generator=g, dtype=torch.float64)
    A = Diagonal(root, P.range_shape) @ P
    r = torch.randn(2, *P.range_shape, generator=g, dtype=torch.float64)
    measured = Measured(torch.tensor([0.1, 1.0]), torch.tensor([[2.0, 1.0, 0.2], [2.0, 1.0, 0.2]]))
    x = torch.zeros(2, *P.domain_shape, dtype=torch.float64)
    return A, r, measured(Stated(), x, torch.tensor([0.5, 0.5], dtype=torch.float64))[1]


@pytest.mark.parametrize("kind", PROJECTORS)
def test_a_preconditioned_system_has_the_same_solution_and_is_nearer_sooner(kind):
    A, r, C = problem(kind)
    response = Response.of(A, r)

    def solved(iterations, response):
        return posterior_mean(A, r, 3.0, iterations=iterations, tol=1e-12, response=response).correction(C, r, 2)

    exact = solved(3000, None)
    assert torch.allclose(solved(1000, response), exact, atol=1e-8 * exact.abs().max().item())
    plain, sooner = ((solved(12, v) - exact).norm() for v in (None, response))
    assert sooner < 0.3 * plain


@pytest.mark.parametrize("kind", PROJECTORS)
def test_a_preconditioner_is_symmetric_positive_and_knows_no_other_item(kind):
    A, r, C = problem(kind)
    near = Response.of(A, r).inverse(C, 3.0)
    g = torch.Generator().manual_seed(1)
    u, v = torch.randn(2, 2, *A.domain_shape, generator=g, dtype=torch.float64)
    assert torch.allclose((near(u) * v).sum(), (u * near(v)).sum())
    assert ((near(u) * u).flatten(1).sum(1) > 0).all()
    alone = Diagonal(A.outer.weights[1:], A.outer.domain_shape) @ A.inner
    one = Factor(C.L, C.LH, C.variance[1:], C.spectrum[1:])
    assert torch.allclose(Response.of(alone, r).inverse(one, 3.0)(u[1:]), near(u)[1:])


def test_where_a_covariance_does_not_say_its_parts_nothing_is_preconditioned():
    A, r, C = problem("slice")
    assert Response.of(A, r).inverse(Factor(C.L, C.LH), 0.5) is None


def test_one_step_is_enough_with_the_inverse_itself():
    g = torch.Generator().manual_seed(0)
    M = torch.randn(6, 6, generator=g, dtype=torch.float64)
    M = M @ M.T + torch.eye(6, dtype=torch.float64)
    b, inverse = torch.randn(3, 6, generator=g, dtype=torch.float64), torch.linalg.inv(M)
    x = conjugate_gradient(lambda v: v @ M, b, iterations=1, precondition=lambda v: v @ inverse)
    assert torch.allclose(x, b @ inverse)
