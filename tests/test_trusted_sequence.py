"""Volumes as far as a scan trusts the prior: what is moved and handed on, seeds, batches, stops, and a file's way."""

import dataclasses

import pytest
import torch
from test_aid_mri import config, save, write

from companion.acquisition.mri import Protocol, acquire
from companion.diffusion.gibbs import annealed_gibbs
from companion.diffusion.sampling import Bill
from companion.diffusion.sequence import frame_generators
from companion.models.errors import load_errors
from companion.operators.mri import birdcage_maps
from companion.papers.aid import reconstruct as aid
from companion.papers.aid.reconstruct import Reconstruct
from companion.reconstruction import held_out, regularised, trust, trusted_sequence
from companion.reconstruction.kept import Kept
from companion.reconstruction.sequence import CONTEXT_GIVEN, Prior, Sampler
from companion.reconstruction.trusted_sequence import ask, of_volume, reconstruct

SIZE, SLICES = 24, 3
SAMPLER = Sampler(draws=3, evaluations=6)


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """A sequence prior of random weights, with the errors of another."""
    weights = save(tmp_path_factory.mktemp("prior"), config("CausalUNet", seq_len=2, concat_cond=False))
    return Prior.load(weights, "").known(load_errors("aid/heads"), 3.25)


@pytest.fixture(scope="module")
def scan():
    axis = torch.linspace(-1, 1, SIZE)
    disc = torch.sigmoid(20 * (0.6 - axis[:, None] ** 2 - axis**2))
    x = torch.stack([disc * (1 + 0.3 * torch.cos((4 + n) * axis)) for n in range(SLICES)])[:, None]
    lines = Protocol(acceleration=3, acs=4).lines(SIZE, SLICES, 0)
    return acquire(torch.polar(x, 0.5 * x), birdcage_maps((SIZE, SIZE), 4), lines, 0.01, 0)


def models_of(p):
    return aid.models_of(p.models, p.weights, p.single, p.source, p.method)


def classical(A, y):
    return regularised.cg(A, y, 0.01)


def told(prior, share, scale=1.0, widening=1.0):
    """What a trial may have found, of which every slice keeps the share."""
    score = held_out.Score(0.0, 1.0, 1.0, 1.0)
    first, chosen = (trust.Candidate(name, scale, score) for name in ("heads, large pixels", "dead leaves"))
    error = prior.errors["dead leaves"].times(scale)
    return trust.Trust(error, share, widening, chosen, (first, chosen), 1.0, Bill(0, 0, 0.0), held_share=share)


@pytest.fixture
def asked(monkeypatch, prior):
    """asked(share, ...) says what every trial finds."""

    def set_to(*values, **options):
        found = told(prior, *values, **options)
        monkeypatch.setattr(trusted_sequence, "ask", lambda *_: (found, classical))
        return found

    return set_to


def test_the_image_is_classical_the_prior_s_or_a_mixture_as_the_share_says(prior, scan, asked):
    images = torch.cat([classical(scan.operator(n), scan.y[n : n + 1]) for n in range(SLICES)])
    found = asked(0.0)
    nothing, slices = reconstruct(prior, scan, SAMPLER, "full", 5)
    torch.testing.assert_close(nothing.x.mean(0), images, rtol=1e-4, atol=1e-5)
    assert nothing.x.std(0).mean() > 1e-3 and [one.share for one in slices] == [0.0] * SLICES
    assert of_volume(slices).verdict == found.verdict and "classical reconstruction preferred" in found.verdict

    asked(1.0, widening=4.0)
    whole, _ = reconstruct(prior, scan, SAMPLER, "full", 5)
    G = trust.problem(scan.operator(0), scan.y[:1], scan.noise_std, found.error, 30)
    levels = trust.levels_for(scan.noise_std, True, SAMPLER.evaluations)
    alone = annealed_gibbs(prior.D, G, levels, seeds=frame_generators([5, 6, 7], 0), start=images[:1])
    torch.testing.assert_close(whole.x[:, 0].mean(0), alone.mean.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.x[:, 0].var(0), 4 * alone.x.var(0), rtol=1e-3, atol=1e-6)

    asked(0.25)
    some, _ = reconstruct(prior, scan, SAMPLER, None, 5)
    expected = 0.25 * alone.mean.mean(0) + 0.75 * images[0]
    torch.testing.assert_close(some.x[:, 0].mean(0), expected, rtol=1e-4, atol=1e-5)


def test_a_slice_is_given_what_was_returned_and_the_error_of_a_prior_with_context(prior, scan, asked, monkeypatch):
    asked(0.5, scale=2.0, widening=2.0)
    seen, draw = [], trust.draw

    def spy(*args, **options):
        seen.append((args[4].error, options["cond"]))
        return draw(*args, **options)

    monkeypatch.setattr(trust, "draw", spy)
    samples, _ = reconstruct(prior, scan, SAMPLER, "full", 0)
    given = prior.errors["dead leaves" + CONTEXT_GIVEN].times(2.0)
    for (error, cond), n in zip(seen, range(SLICES), strict=True):
        right = given if n else prior.errors["dead leaves"].times(2.0)
        assert error.to_dict() == right.to_dict()
        assert cond is None if n == 0 else torch.equal(cond, samples.x[:, :n])
    seen.clear()
    start = dataclasses.replace(SAMPLER, start="truth")
    known, slices = reconstruct(prior, scan, start, "full", 0)
    assert torch.equal(known.x[:, 0], scan.x[:1].expand(3, -1, -1, -1)) and len(slices) == SLICES - 1 == len(seen)
    assert seen[0][0].to_dict() == given.to_dict() and torch.equal(seen[0][1][0, 0], scan.x[0])


def test_a_seed_gives_the_same_volume_in_any_batch_and_later_data_do_not_reach_back(prior, scan, asked):
    asked(0.7, widening=1.5)
    whole, _ = reconstruct(prior, scan, SAMPLER, "full", 3)
    few, _ = reconstruct(prior, scan, dataclasses.replace(SAMPLER, at_once=2), "full", 3)
    assert (few.x - whole.x).norm() < 3e-3 * whole.x.norm(), "rounding, which conjugate gradients enlarge"
    changed = dataclasses.replace(scan, y=torch.cat([scan.y[:1], -scan.y[1:2], scan.y[2:]]))
    other, _ = reconstruct(prior, changed, SAMPLER, "full", 3)
    assert torch.equal(other.x[:, 0], whole.x[:, 0]) and not torch.allclose(other.x[:, 2], whole.x[:, 2], atol=1e-4)
    alone, _ = reconstruct(prior, changed, SAMPLER, None, 3)
    first, _ = reconstruct(prior, scan, SAMPLER, None, 3)
    assert torch.equal(alone.x[:, 2], first.x[:, 2])


def test_a_drawing_that_is_stopped_goes_on_with_its_shares(prior, scan, monkeypatch, tmp_path):
    monkeypatch.setattr(regularised, "FACTORS", (4.0,))
    found, leaning = ask(prior, scan, SAMPLER, 1)
    assert found.bias is not None and leaning.share == ask(prior, scan, SAMPLER, 1)[1].share
    assert found.chosen.name in ("heads", "heads, large pixels", "dead leaves")
    assert found.bill.denoiser_calls <= trusted_sequence.trial_evaluations(SAMPLER) == 9
    monkeypatch.setattr(
        trusted_sequence, "ask", lambda *_: (dataclasses.replace(found, held_share=0.1, bias=0.0), leaning)
    )
    whole, slices = reconstruct(prior, scan, SAMPLER, "full", 1)
    assert len({one.share for one in slices}) == SLICES, "each slice has a share of its own"
    store, keep = Kept._store, tmp_path / "kept.safetensors"

    def store_and_stop(self, step):
        store(self, step)
        if step["frame"] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "_store", store_and_stop)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(prior, scan, SAMPLER, "full", 1, keep=keep)
    monkeypatch.setattr(Kept, "_store", store)
    again, same = reconstruct(prior, scan, SAMPLER, "full", 1, keep=keep)
    assert (again.x - whole.x).norm() < 3e-3 * whole.x.norm(), "rounding: context is worked out anew"
    assert torch.equal(again.x[:, :2], whole.x[:, :2])
    assert [one.share for one in same] == pytest.approx([one.share for one in slices], abs=1e-2)
    assert dataclasses.replace(again.bill, seconds=0.0) == dataclasses.replace(whole.bill, seconds=0.0)


def test_errors_say_what_to_do(prior, scan):
    with pytest.raises(ValueError, match=r"no models of its error are known.*tools/prior_errors.py"):
        reconstruct(dataclasses.replace(prior, errors={}), scan, SAMPLER, "full", 0)
    with pytest.raises(ValueError, match="noise_std 0.0; a trial needs to know the noise"):
        reconstruct(prior, dataclasses.replace(scan, noise_std=0.0), SAMPLER, "full", 0)
    with pytest.raises(ValueError, match="too few for 2 chains"):
        reconstruct(prior, scan, Sampler(draws=2, evaluations=4), "full", 0)
    for options in ({"weights": "aid/brain"}, {"source": "scan.h5", "method": "dds"}):
        with pytest.raises(ValueError, match=r"'AID, trusted' needs method annealed_gibbs .* take 'AID' instead"):
            models_of(Reconstruct(models=("AID, trusted",), **options))
    half = {name: error for name, error in load_errors("aid/heads").items() if name != "dead leaves, slices given"}
    with pytest.raises(ValueError, match="names that end in ', slices given'"):
        prior.known(half)


def test_scans_are_trusted_by_default_and_virtual_people_are_not():
    assert models_of(Reconstruct()) == tuple(aid.MODELS)
    assert models_of(Reconstruct(source="scan.h5")) == ("AID, trusted", "AID", "single image, trusted")
    for options in ({"method": "published"}, {"weights": "aid/brain"}, {"single": "brain/t1w"}):
        assert models_of(Reconstruct(source="scan.h5", **options)) == tuple(aid.MODELS)


def test_a_file_goes_to_a_table_and_verdicts(tmp_path, monkeypatch):
    monkeypatch.setattr(regularised, "FACTORS", (4.0,))
    write(tmp_path / "head.h5", 4)
    p = Reconstruct(
        source=str(tmp_path / "head.h5"), frames=2, acceleration=3, acs=12, maps="acs", draws=2, evaluations=8,
        models=("AID, trusted", "single image, trusted"), langevin_steps=0, classical=False, autocast=None,
        device="cpu",
    )  # fmt: skip
    cases = aid.prepare(p)
    cost = {row["model"]: row for row in aid.cost(cases, p, models_of(p), 0)}
    assert set(cost) == set(p.models) and all(row["slices"] == 2 for row in cost.values())
    study = aid.study(p, cases, progress=False, keep=tmp_path / "kept")
    scores = {row["method"]: row["PSNR"] for row in study.rows}
    assert set(scores) == {*p.models, *(f"{name}, one draw" for name in p.models)}
    assert set(study.calibration) == set(p.models) and all(scores[name] > 20 for name in p.models)
    verdicts = {row["model"]: row for row in study.verdicts}
    assert set(verdicts) == set(p.models) and {row["volume"] for row in verdicts.values()} == {"head"}
    for row in verdicts.values():
        assert "held-out chi-square" in row["verdict"] and len(row["shares"]) == 2 and row["widening"] >= 1.2
        assert all(0 <= share <= 1 for share in row["shares"])
    assert "head (" in verdicts["single image, trusted"]["verdict"], "general/2d says whether it looks like a head"
