"""Trust by splitting counts, against priors known exactly."""

import pytest
import torch

from companion.acquisition.pet import Scan
from companion.diffusion.covariance import Measured
from companion.diffusion.exact import FourierBasis, GaussianDenoiser
from companion.diffusion.noise import karras
from companion.diffusion.poisson import Posterior, poisson_gibbs, poisson_mean
from companion.evaluation import metrics
from companion.operators.counts import poisson_counts
from companion.operators.pet import ParallelBeam, Projector
from companion.reconstruction import trust_counts as trust
from companion.reconstruction.pet import mlem

SIZE = 16


def prior(mean: float, std: float = 0.5) -> GaussianDenoiser:
    k = torch.fft.fftfreq(SIZE, dtype=torch.float64) * SIZE
    spectrum = (1 + (k[:, None] ** 2 + k**2) / 4) ** -1.5
    return GaussianDenoiser(
        torch.full((1, SIZE, SIZE), mean), (std**2 * spectrum / spectrum.mean())[None].float(), FourierBasis(2)
    )


def scan_of(D: GaussianDenoiser, people: int = 3, per_pixel: float = 3.0) -> Scan:
    x = D.draw(people, torch.Generator().manual_seed(4), torch.float32).clamp(min=0)
    A = per_pixel / SIZE * Projector(ParallelBeam((SIZE, SIZE)))
    return Scan(x, poisson_counts(A(x) + 0.5, range(people)), A, torch.full((1, *A.range_shape), 0.5))


def drawer(D: GaussianDenoiser, draws: int = 6):
    levels = karras(12, 0.05, 10.0)
    images = D.draw(32, torch.Generator().manual_seed(5), torch.float32)
    known = Measured.fit(D, images, torch.logspace(-1.5, 1.3, 8))

    def draw(scan: Scan, scale: float) -> Posterior:
        error = Measured(known.sigmas, scale * known.spectrum, known.prior_std)
        n = len(scan.y)
        some = scan.some(torch.arange(n).repeat(draws))
        G = poisson_mean(some.A, some.y, background=some.background, covariance=error, iterations=20)
        found = poisson_gibbs(D, G, levels, seeds=range(n * draws), tails=None)
        x, mean = (v.unflatten(0, (draws, n)) for v in (found.x, found.mean))
        return Posterior(x, mean.mean(0), found.bill)

    return draw


def classical(scan: Scan) -> torch.Tensor:
    return mlem(scan.y, scan.A, scan.background, iterations=30).x


def test_the_two_parts_are_scans_of_the_same_image():
    scan = scan_of(prior(3.0))
    seen, held = trust.split(scan, [1, 2, 3], kept=0.75)
    assert torch.equal(seen.y + held.y, scan.y) and 0.7 < (seen.y.sum() / scan.y.sum()).item() < 0.8
    both = seen.A(scan.x) + held.A(scan.x)
    assert torch.allclose(both, scan.A(scan.x), rtol=1e-5)
    assert torch.allclose(seen.background + held.background, scan.background)


def test_the_right_prior_is_known_and_the_wrong_one_is_not():
    right, wrong = drawer(prior(3.0)), drawer(prior(0.2, 0.05))
    scan = scan_of(prior(3.0))
    trusts = trust.assess(scan, {"right": right, "wrong": wrong}, classical)
    assert [t.chosen.name for t in trusts] == ["right"] * 3
    assert all(t.knows and t.share > 0.8 for t in trusts)
    assert all(0.8 < t.chosen.score.chi2 < 1.2 for t in trusts)
    assert "right knows this scan" in trusts[0].verdict
    alone = trust.assess(scan, {"wrong": wrong}, classical)
    assert not any(t.knows for t in alone) and all("does not know" in t.verdict for t in alone)
    assert all(t.tried[0].score.log_score < trusts[0].chosen.score.log_score for t in alone)


def test_the_trusted_image_is_never_much_worse_than_the_classical_one():
    scan, wrong = scan_of(prior(3.0)), drawer(prior(0.2, 0.05))
    trusts = trust.assess(scan, {"wrong": wrong}, classical)
    done = trust.reconstruct(scan, trusts, {"wrong": wrong}, classical)
    error = [(x - scan.x).square().mean().item() for x in (done.image, classical(scan), wrong(scan, 1.0).mean)]
    assert error[0] < 1.1 * error[1] and error[0] < error[2]
    assert torch.allclose(done.x.mean(0), done.image, atol=1e-4)


def test_a_scan_is_judged_alone():
    scan, draw = scan_of(prior(3.0)), drawer(prior(3.0), draws=2)

    def each(one: Scan, scale: float) -> Posterior:
        found = [draw(one.some([i]), scale) for i in range(len(one.y))]
        return Posterior(torch.cat([f.x for f in found], 1), torch.cat([f.mean for f in found]), found[0].bill)

    together = trust.assess(scan, {"a": each}, classical)
    first = trust.assess(scan.some([0]), {"a": each}, classical)
    assert first[0].share == pytest.approx(together[0].share, abs=1e-4)
    assert first[0].chosen.score.chi2 == pytest.approx(together[0].chosen.score.chi2, rel=1e-4)


def test_scores_know_exact_laws():
    generator = torch.Generator().manual_seed(0)
    noise, power = torch.full((64, 64), 9.0).double(), torch.full((64, 64), 3.0).double()
    residual = (noise + power).sqrt() * torch.randn(64, 64, generator=generator, dtype=torch.float64)
    right, sure = trust.one_score(residual, noise, power), trust.one_score(residual, noise, 0 * power)
    assert right.fits and not sure.fits and right.log_score > sure.log_score
    assert right.widening == pytest.approx(1, abs=0.1) and sure.chi2 == pytest.approx(4 / 3, rel=0.06)


def test_the_best_share_is_that_of_the_least_error():
    A = Projector(ParallelBeam((SIZE, SIZE)))
    x = prior(4.0).draw(1, torch.Generator().manual_seed(1), torch.float32).clamp(min=0)
    a, b = x + 0.3, (x - 0.1).clamp(min=0)
    held = Scan(x, poisson_counts(200 * A(x), [0]), 200 * A)
    assert trust.best_share(held, a, b).item() == pytest.approx(0.25, abs=0.03)
    assert trust.best_share(held, x, x).item() == 1.0


def test_noise_around_nothing_does_not_speak_against_a_prior():
    """In air a posterior mean scatters about 0; cut off at 0 it would let more counts be expected than there are."""
    A = Projector(ParallelBeam((SIZE, SIZE)))
    line = torch.linspace(-1, 1, SIZE)
    head = ((line[:, None] ** 2 + line**2) < 0.4).float()[None, None]
    air, inside = torch.randn(2, 1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    mean, other = 4 * head + 0.2 * air * (1 - head), 4 * head * (1 + 0.1 * inside)
    b = torch.full((1, *A.range_shape), 200 * A(4 * head).mean().item())
    held = Scan(4 * head, poisson_counts(200 * A(4 * head) + b, [0]), 200 * A, b)
    assert metrics.nrmse(mean, 4 * head) < metrics.nrmse(other, 4 * head)
    share, when_cut = (trust.best_share(held, x, other).item() for x in (mean, mean.clamp(min=0)))
    assert share > 0.5 and when_cut < 0.75 * share
    plain, cut = (trust.scores(held, x.expand(2, 1, 1, SIZE, SIZE), x)[0] for x in (mean, mean.clamp(min=0)))
    assert plain.excess < 0.6 * cut.excess
