"""Posteriors of volumes from oblique lines: their law, how they are cut and tied, what they cost, what is delivered."""

import dataclasses

import pytest
import torch

from companion.acquisition.pet import Scan
from companion.diffusion.covariance import Factor, Measured
from companion.diffusion.exact import GaussianDenoiser
from companion.diffusion.poisson import Posterior
from companion.diffusion.sampling import Bill
from companion.diffusion.sets import EachSlice
from companion.operators.counts import poisson_counts
from companion.operators.cylinder import Cylinder, Projector3D
from companion.operators.linear import Identity
from companion.reconstruction import activity, trust_counts
from companion.reconstruction.activity import Prior, Sampler, schedule, trusted


class Told:
    """A denoiser that believes in nothing, and is sure of it."""

    def __call__(self, x, sigma, cond=None):
        return torch.zeros_like(x)

    def moments(self, x, sigma, cond=None):
        return self(x, sigma, cond), torch.full_like(x, 1e-6)


@dataclasses.dataclass(frozen=True)
class Exact:
    """The covariance of p(x0 | x) of slices that are drawn from N(., C)."""

    C: torch.Tensor

    def __call__(self, D, x, sigma, cond=None):
        conditional = torch.linalg.inv(torch.linalg.inv(self.C) + torch.eye(len(self.C)) / sigma[0].double() ** 2)
        L = torch.linalg.cholesky(conditional).float()
        by, to = ((lambda z, M=M: (z.flatten(-2) @ M).unflatten(-1, z.shape[-2:])) for M in (L.mT, L))
        return D.moments(x, sigma, cond)[0], Factor(by, to)


@pytest.mark.parametrize("warm", [activity.WARM, None])
def test_warm_draws_of_a_volume_are_those_of_linear_algebra(warm):
    """Oblique lines, a Gaussian prior of each slice, many counts: the law is nearly Gaussian and known."""
    c = Cylinder((3, 8, 8), (6.0, 6.0), 8, 10, 5.0, 3, 8.0, 80.0, span=3)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    near = torch.exp(-((torch.arange(8)[:, None] - torch.arange(8)) ** 2) / 3.0).double()
    std = torch.full((64,), 0.3).double()
    C = std[:, None] * torch.kron(near, near) * std + 1e-4 * torch.eye(64)
    D = GaussianDenoiser((1 + torch.exp(-(x**2 + y**2))).double()[None], C)
    prior = Prior(D, 25.0, Measured.fit(D, D.draw(60, torch.Generator().manual_seed(0)).float()))
    if warm is not None:  # means of sweeps in much noise are those of the covariance, which `Measured` is not quite
        prior = dataclasses.replace(prior, error=Exact(C))
    image = 25 * D.draw(3, torch.Generator().manual_seed(1)).float().transpose(0, 1)[None]
    A = Projector3D(c)
    A = (2e5 / A(image).sum().item()) * A
    scan = Scan(image, poisson_counts(A(image) + 3.0, [0]), A, torch.full((1, *c.sinogram_shape), 3.0))
    found = activity.posterior(prior, scan, Sampler(draws=40, evaluations=12, last_noise=1.0), warm=warm)
    M = A(torch.eye(192).reshape(192, *c.volume_shape)).flatten(1).mT.double()
    weights = 1 / (A(image) + 3.0).flatten().double()
    within = torch.linalg.inv(torch.block_diag(*[625 * C] * 3))
    precision = M.mT @ (weights[:, None] * M) + within
    middle = 25 * D.mean.float().expand(3, 8, 8).flatten().double()
    pull = M.mT @ (weights * (scan.y.flatten() - 3.0).double()) + within @ middle
    mean = torch.linalg.solve(precision, pull)
    spread = torch.linalg.inv(precision).diagonal().sqrt()
    away = ((found.mean.flatten() - mean) / spread).square().mean().sqrt()
    assert away < 0.2, "of a standard deviation; chance is 0.16 or less"
    assert 0.85 < (found.x.flatten(1).var(0) / spread.square()).mean() < 1.15


def test_volumes_of_enough_cubes_are_cut_in_turn_and_no_volume_is_widened(monkeypatch):
    turned = []

    class Cut(EachSlice):
        def __init__(self, D, turning=False):
            super().__init__(D, turning)
            turned.append(turning)

    monkeypatch.setattr(activity, "EachSlice", Cut)
    c = Cylinder((8, 8, 8), (6.0, 6.0), 8, 10, 5.0, 3, 8.0, 80.0)
    scan = Scan(None, torch.full((1, *c.sinogram_shape), 5.0), 0.1 * Projector3D(c))
    sampler, error = Sampler(draws=2, evaluations=2), Measured(torch.tensor([1.0]), torch.ones(1, 1))

    def x(scan, widening=1.0):
        return activity.posterior(Prior(Told(), 25.0, error, widening=widening), scan, sampler).x

    cubes = dataclasses.replace(scan, step=1.0)
    assert torch.equal(x(cubes), x(cubes, widening=4.0))
    monkeypatch.setattr(activity, "LEAST_ROWS", 8)
    for one in (cubes, scan, dataclasses.replace(scan, step=2.0)):
        x(one)
    assert turned == [False, False, True, False, False]


def test_the_cost_of_a_volume_is_told_and_grows_with_its_draws():
    c = Cylinder((3, 8, 8), (6.0, 6.0), 8, 10, 5.0, 3, 8.0, 80.0)
    scan = Scan(None, torch.ones(1, *c.sinogram_shape), Projector3D(c))
    prior = Prior(Told(), 25.0, Measured(torch.tensor([1.0]), torch.ones(1, 1)))
    few, many = (activity.cost(prior, scan, Sampler(draws=n)) for n in (2, 2000))
    assert 0 < few.seconds < many.seconds and 0 < few.gib < many.gib
    assert "min of processor time" in str(few)
    flat = Scan(None, torch.ones(1, 1, 4, 4), Identity((1, 4, 4), torch.float32))
    with pytest.raises(ValueError, match="of volumes"):
        activity.cost(prior, flat, Sampler())


def empty(step: float | None = None) -> tuple[Prior, Scan]:
    """A volume of eight slices of 5 counts a bin, and a prior of nothing."""
    c = Cylinder((8, 8, 8), (6.0, 6.0), 8, 10, 5.0, 3, 8.0, 80.0)
    scan = Scan(None, torch.full((1, *c.sinogram_shape), 5.0), 0.1 * Projector3D(c), step=step)
    return Prior(Told(), 25.0, Measured(torch.tensor([1.0]), torch.ones(1, 1))), scan


@pytest.mark.parametrize(("step", "ties"), [(None, 0.0), (1.0, activity.TIES), (2.0, activity.TIES / 2), (3.0, 0.0)])
def test_only_slices_that_are_known_to_be_near_are_tied(step, ties, monkeypatch):
    found = []

    def sweeps(D, G, levels, **options):
        found.append((G.ties, options["averaged"] >= len(levels) - 1))
        x = torch.zeros(2, *G.A.domain_shape)
        return Posterior(x, x, Bill(1, 1, 0.0))

    monkeypatch.setattr(activity, "poisson_gibbs", sweeps)
    prior, scan = empty(step)
    activity.posterior(prior, scan, Sampler(draws=2, evaluations=4))
    activity.posterior(prior, scan, Sampler(draws=2, evaluations=4), warm=None)
    assert found == [(ties, True), (ties, False)], "the mean of warm draws is that of all sweeps"


def test_warm_schedules_end_before_the_prior_hardens_what_is_open():
    whole, warm = schedule(16, 0.05, None), schedule(16, 0.05, 1.0)
    assert len(whole) == 17 and whole[-2].item() == pytest.approx(0.05)
    assert 3 <= len(warm) - 1 < 8 and warm[0] <= 1 and warm[-2].item() == pytest.approx(activity.LAST_WARM)
    assert schedule(16, 0.7, 1.0)[-2].item() == pytest.approx(0.7), "few counts: not below their own noise"
    assert len(schedule(16, 2.0, 1.0)) == 2, "one sweep in any case"


def test_posteriors_at_hand_are_not_drawn_again(monkeypatch):
    prior, scan = empty(1.0)
    sampler, drawn = Sampler(draws=2, evaluations=4), []
    before = activity.posterior

    def counted(prior, scan, *rest, **options):
        drawn.append(scan.y.sum().item())
        return before(prior, scan, *rest, **options)

    monkeypatch.setattr(activity, "posterior", counted)
    found = before(prior, scan, sampler)
    monkeypatch.setattr(activity.trust_counts, "SCALES", (1.0,))
    flat = torch.ones(1, *scan.A.domain_shape)
    done = trusted({"nothing": prior}, scan, lambda part: flat, sampler, at_hand={"nothing": found})
    if done.trusts[0].chosen.scale == 1:
        assert max(drawn) < scan.y.sum(), "of part of the counts only"
    assert done.image.shape == flat.shape
    two = Scan(None, scan.y.repeat(2, 1, 1, 1, 1), scan.A)
    with pytest.raises(ValueError, match="those of one scan, got 2"):
        trusted({"nothing": prior}, two, lambda part: flat, sampler, at_hand={"nothing": found})


def test_a_wrong_background_outside_of_the_body_does_not_choose_the_mixture():
    """Half of the bins see the body. Outside, counts are fewer than estimated, which `mean` follows with < 0."""
    body = torch.cat([torch.ones(1, 1, 2, 4, 4), torch.zeros(1, 1, 2, 4, 4)], -1)
    A, background = Identity((1, 2, 4, 8), torch.float32), torch.full((1, 1, 2, 4, 8), 50.0)
    truth, other = 200 * body, 180 * body
    mean = 160 * body - 10 * (1 - body)  # worse than `other` where there is something
    held = Scan(None, truth + background - 10 * (1 - body), 1.0 * A, background)
    assert trust_counts.best_share(held, mean, other).item() == 0
    slices = Scan(None, held.y[0].transpose(0, 1), Identity((1, 4, 8), torch.float32), background[0].transpose(0, 1))
    of_slices = trust_counts.best_share(slices, *(v[0].transpose(0, 1) for v in (mean, other)))
    assert (of_slices > 0).all(), "the same of slices, where all bins count"
    assert trust_counts.best_share(held, truth, other).item() == 1
