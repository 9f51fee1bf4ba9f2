"""The prior of any head, and a scan that chooses between priors by its own counts."""

import pytest
import torch

from companion.acquisition.pet import acquire
from companion.data.pet import held_out
from companion.models.checkpoint import describe
from companion.models.errors import load_errors
from companion.reconstruction.activity import HEADS, PRIOR, Prior, Sampler, posterior, trusted
from companion.reconstruction.pet import METHODS


@pytest.fixture(scope="module")
def scan():
    people = held_out("validation", 2, 32)
    return acquire(people.image, people.mu, 5e4, [1, 2], pixel_mm=people.pixel_mm)


@pytest.mark.parametrize("name, own", [(HEADS, "heads"), (PRIOR, "virtual people")])
def test_the_errors_of_embedded_priors_are_known(name, own):
    assert list(load_errors(name)) == [own, "dead leaves"]


def test_the_prior_of_any_head_is_of_any_size(scan):
    prior = Prior.known(HEADS, load_errors(HEADS)["heads"])
    assert describe(HEADS)["data"]["pixel_mm"] == [1.0, 4.0]
    found = prior.D.moments(torch.zeros(1, 1, 40, 56), torch.ones(1))
    assert all(v.shape == (1, 1, 40, 56) for v in found)
    wider = prior.times(4.0).error.spectrum / prior.error.spectrum
    assert torch.allclose(wider, torch.full_like(wider, 4.0))
    one = posterior(prior, scan, Sampler(2, 3), seed=1)
    again = posterior(prior, scan.some([1]), Sampler(2, 3), seed=10_001)
    assert torch.allclose(one.x[:, 1], again.x[:, 0], atol=1e-3)


def test_a_scan_of_ones_own_is_told_what_its_counts_say(scan):
    priors = {f"{HEADS} ({kind})": Prior.known(HEADS, error) for kind, error in load_errors(HEADS).items()}
    priors[PRIOR] = Prior.known(PRIOR, load_errors(PRIOR)["virtual people"])
    done = trusted(priors, scan, lambda s: METHODS["MAP"](s.y, s.A, s.background, 0.1), Sampler(2, 3))
    assert done.image.shape == (2, 1, 32, 32) and done.x.shape == (2, 2, 1, 32, 32)
    tried = {c.name for t in done.trusts for c in t.tried}
    assert tried == {"pet/heads (heads)", "pet/heads (dead leaves)", "pet/prior"}
    assert all(" this scan: held-out chi-square " in t.verdict for t in done.trusts)
