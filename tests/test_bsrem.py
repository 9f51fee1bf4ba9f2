"""Relaxed ordered subsets reach the maximum of the line search, in 2D and 3D, for a fraction of its projections."""

from dataclasses import dataclass, field

import pytest
import torch

from companion.operators.counts import poisson_counts
from companion.operators.cylinder import Cylinder, Projector3D
from companion.operators.linear import Diagonal, LinearOperator, derived
from companion.operators.pet import ParallelBeam, Projector, sensitivity
from companion.reconstruction.bsrem import bsrem
from companion.reconstruction.pet import map_rdp, relative_difference

STRENGTH = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class Counted(LinearOperator):
    """A projector that adds up which share of the angles it has projected, forth or back."""

    inner: Projector3D
    done: list = field(default_factory=lambda: [0.0])
    share: float = 1.0

    domain_shape = derived(lambda self: self.inner.domain_shape)
    range_shape = derived(lambda self: self.inner.range_shape)
    domain_dtype = range_dtype = torch.float32

    def forward(self, x):
        self.done[0] += self.share
        return self.inner.forward(x)

    def adjoint(self, y):
        self.done[0] += self.share
        return self.inner.adjoint(y)

    def to(self, device):
        return self

    def some_angles(self, angles):
        some = self.inner.some_angles(angles)
        return Counted(some, self.done, self.share * some.range_shape[-2] / self.range_shape[-2])


def scan(P, x, counts, share=0.3):
    """Attenuated counts with a background of `share` in the mean, of items of different activity."""
    attenuation = torch.exp(-0.0096 * P((x > 0).float()))
    A = Diagonal(counts / (attenuation * P(x)).sum() * attenuation, P.range_shape) @ P
    b = torch.full((1, *P.range_shape), share) * A(x).mean()
    return poisson_counts(A(x) + b, range(len(x))), A, b


def volume():
    c = Cylinder((8, 18, 18), (3.0, 3.0), 24, 21, 3.0, 4, 6.0, 70.0, span=3)
    z, y, x = torch.meshgrid(*[(torch.arange(n) - (n - 1) / 2) * 3.0 for n in c.shape], indexing="ij")
    image = 10.0 * ((x.square() + y.square() < 24**2) & (z.abs() < 9))
    image[(x - 8) ** 2 + (y + 5) ** 2 + z**2 < 36] = 30.0
    return Counted(Projector3D(c)), image[None, None]


def slices(items=2):
    axis = (torch.arange(24) - 11.5) * 4.0
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    images = [10.0 * (x**2 + y**2 < 40**2) + 20.0 * ((x - 12) ** 2 + (y - 4 * k) ** 2 < 60) for k in range(items)]
    return Projector(ParallelBeam((24, 24), 48, pixel_mm=4.0)), torch.stack(images)[:, None]


def objective(x, y, A, b):
    """Log likelihood less the prior, (batch,), in double precision but for the projection."""
    ndim = len(A.domain_shape) - 1
    total, expected = sensitivity(A), (A(x) + b).double()
    weight = STRENGTH * total.double().flatten(-ndim - 1).mean(-1).flatten()
    fit = (torch.xlogy(y.double(), expected) - expected).flatten(1).sum(1)
    return fit - weight * relative_difference(x.double(), 2.0, ndim)[0]


@pytest.fixture(scope="module", params=[slices, volume], ids=["2D", "3D"])
def known(request):
    """A scan and the image where 250 steps of the line search end."""
    P, x = request.param()
    y, A, b = scan(P, x, 2e5)
    return y, A, b, map_rdp(y, A, b, strength=STRENGTH, iterations=250, tol=0).x


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "relaxation alone"])
def test_the_maximum_is_that_of_the_line_search(known, memory):
    """Within 1 of some 10^6 in log posterior, within 4 without the memory of gradients, which still rises."""
    y, A, b, best = known
    options = {"relaxation": 0.1} if memory else {"memory": False, "relaxation": 0.3}
    top, gaps = objective(best, y, A, b), []

    def watch(k, image):
        assert (image >= 0).all() and image.isfinite().all()
        gaps.append((top - objective(image, y, A, b)).max().item())

    found = bsrem(y, A, b, strength=STRENGTH, iterations=25, subsets=12, callback=watch, **options)
    assert len(gaps) == 25 and found.iterations.tolist() == [25] * len(y)
    assert abs(gaps[-1]) < (1 if memory else 4) and gaps[-1] < gaps[9] < gaps[4] < gaps[0]
    assert (found.x - best).norm() < (0.003 if memory else 0.006) * best.norm()


@pytest.mark.parametrize("known", [volume], indirect=True, ids=["3D"])
def test_it_takes_a_fraction_of_the_projections(known):
    """Projections, forth and back, until the image is within 1 % of the maximum: half of those of the line search."""
    y, A, b, best = known
    taken = []
    for method, options in ((bsrem, {"iterations": 15, "subsets": 24}), (map_rdp, {"iterations": 60})):
        start, spent = A.inner.done[0], []

        def watch(k, image, start=start, spent=spent):
            if (image - best).norm() < 0.01 * best.norm():
                spent.append(A.inner.done[0] - start)

        method(y, A, b, strength=STRENGTH, callback=watch, **options)
        taken.append(spent[0])
    assert taken[0] < taken[1] / 2


@pytest.mark.parametrize(("counts", "off"), [(1e5, 0.05), (2e4, 0.8)])
def test_one_angle_a_subset_and_few_counts_do_not_diverge(counts, off):
    """Kept gradients once made the second image 10^15 times too bright, and left the first one 11 % off."""
    P, x = volume()
    y, A, b = scan(P, x, counts, share=0.03)
    best = map_rdp(y, A, b, strength=0.003, iterations=100, tol=0).x
    found = bsrem(y, A, b, strength=0.003, iterations=12, subsets=24).x
    assert (found - best).norm() < off * best.norm()


def test_an_item_is_the_same_alone_and_in_a_batch():
    P, x = slices()
    y, A, b = scan(P, x, 2e5)
    both = bsrem(y, A, b, iterations=4).x
    A1 = Diagonal(A.outer.weights[1:], P.range_shape) @ P
    assert torch.allclose(bsrem(y[1:], A1, b, iterations=4).x, both[1:], rtol=1e-4, atol=1e-4)


def test_a_fixed_point_stays_and_neighbours_can_be_chosen(known):
    y, A, b, best = known
    again = bsrem(y, A, b, strength=STRENGTH, iterations=3, subsets=8, x0=best, relaxation=1.0).x
    assert (again - best).norm() < 0.02 * best.norm()
    ndim = best.ndim - 2
    nobody = torch.zeros((3**ndim - 1) // 2, 1, 1, *best.shape[2:])
    free = bsrem(y, A, b, strength=STRENGTH, iterations=2, alike=nobody).x
    assert torch.allclose(free, bsrem(y, A, b, strength=0, iterations=2).x)


@pytest.mark.parametrize(
    "make", [torch.zeros_like, lambda y: (torch.arange(y.numel()).reshape(y.shape) == 777).float()]
)
def test_hardly_any_counts_are_safe(make):
    P, _ = slices()
    y = make(torch.ones(2, *P.range_shape))
    for memory in (True, False):
        found = bsrem(y, P, iterations=6, subsets=24, memory=memory).x
        assert found.isfinite().all() and (found >= 0).all()
        assert found[y.flatten(1).sum(1) == 0].abs().max() < 1e-3


def test_clear_errors():
    P, x = slices()
    y, A, b = scan(P, x, 1e4)
    for change, message in (
        ({"strength": -1}, "strength"),
        ({"relaxation": -1}, "relaxation"),
        ({"subsets": 1000}, "subsets"),
        ({"x0": torch.ones(1, 1, 3, 3)}, "x0"),
    ):
        with pytest.raises(ValueError, match=message):
            bsrem(y, A, b, **change)
