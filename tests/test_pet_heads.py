"""The prior of any head, and a scan that chooses between priors by its own counts."""

import pytest
import torch

from companion.acquisition.pet import acquire
from companion.data.pet import held_out
from companion.models.checkpoint import describe
from companion.models.errors import load_errors
from companion.reconstruction.activity import HEADS, MR_GIVEN, PRIOR, Prior, Sampler, posterior, trusted
from companion.reconstruction.pet import METHODS


@pytest.fixture(scope="module")
def scan():
    people = held_out("validation", 2, 32)
    return acquire(people.image, people.mu, 5e4, [1, 2], pixel_mm=people.pixel_mm)


def test_the_errors_of_embedded_priors_are_known():
    assert list(load_errors(PRIOR)) == ["virtual people", "dead leaves"]
    kinds = ["heads", "dead leaves"]
    assert list(load_errors(HEADS)) == [*kinds, *(f"{kind}{MR_GIVEN}" for kind in kinds)]


def test_a_scan_with_an_mr_is_offered_priors_that_use_it_first():
    plain, both = Prior.every(HEADS, mr=False), Prior.every(HEADS, mr=True)
    assert [p.with_mr for p in plain.values()] == [False, False]
    assert [p.with_mr for p in both.values()] == [True, True, False, False]
    assert set(plain) < set(both) and "pet/heads (heads, MR given)" in both


def test_the_prior_of_any_head_is_of_any_size(scan):
    prior = Prior.known(HEADS, load_errors(HEADS)["heads"])
    assert describe(HEADS)["data"]["pixel_mm"] == [1.0, 4.0]
    found = prior.D.moments(torch.zeros(1, 1, 40, 56), torch.ones(1))
    assert all(v.shape == (1, 1, 40, 56) for v in found)
    wider = prior.times(4.0).error.spectrum / prior.error.spectrum
    assert torch.allclose(wider, torch.full_like(wider, 4.0))


@pytest.mark.parametrize("name, bound", [(HEADS, 4e-3), (PRIOR, 3e-4)])
def test_a_draw_is_the_same_in_any_batch(scan, name, bound):
    """Conjugate gradients and sweeps enlarge rounding, by `pet/heads` most: to 2e-3 of the largest activity here."""
    prior = Prior.known(name, next(iter(load_errors(name).values())))
    one = posterior(prior, scan, Sampler(2, 12), seed=1)
    again = posterior(prior, scan.some([1]), Sampler(2, 12), seed=10_001)
    assert (one.x[:, 1] - again.x[:, 0]).abs().max() < bound * one.x.max()


def test_a_scan_of_ones_own_is_told_what_its_counts_say(scan):
    priors = Prior.every(HEADS, mr=False)
    priors[PRIOR] = Prior.known(PRIOR, load_errors(PRIOR)["virtual people"])
    done = trusted(priors, scan, lambda s: METHODS["MAP"](s.y, s.A, s.background, 0.1), Sampler(2, 3))
    assert done.image.shape == (2, 1, 32, 32) and done.x.shape == (2, 2, 1, 32, 32)
    tried = {c.name for t in done.trusts for c in t.tried}
    assert tried == {"pet/heads (heads)", "pet/heads (dead leaves)", "pet/prior"}
    assert all(" this scan: held-out chi-square " in t.verdict for t in done.trusts)
