"""3D MRI with a latent prior as one more denoiser, and what it has to beat."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from companion.acquisition.mri import Scan
from companion.diffusion.denoisers import AnySize, Denoiser
from companion.diffusion.latent_guidance import Errors, LatentGuidance, explain, gradient, projection
from companion.diffusion.noise import karras
from companion.diffusion.recalibration import ErrorModel
from companion.diffusion.sampling import Bill, Samples, sample
from companion.evaluation import metrics
from companion.evaluation.tables import average, check_unique
from companion.models.architectures import network_of
from companion.models.latent import LatentPrior
from companion.operators.linear import Diagonal, LinearOperator
from companion.parameters import param
from companion.randomness import antithetic
from companion.reconstruction import held_out, mri, trust

GUIDANCES = {"projection": projection, "gradient": gradient}
TRIAL = 2  # draws of a trial, which some of the data judge
LEAST_SHARE = 0.5  # of the posterior mean in the image, below which the prior does not know the scan


@dataclass(frozen=True)
class Sampler:
    """The part of a form that says how posterior draws of latents are made."""

    methods: tuple[str, ...] = param(
        tuple(GUIDANCES),
        "how latents are led to the data: decode, correct, encode; or by the decoder's derivatives",
        choices=tuple(GUIDANCES),
    )
    draws: int = param(4, "posterior draws of a volume", minimum=1)
    evaluations: int = param(16, "network evaluations a draw", minimum=2)
    first_sigma: float = param(20.0, "noise level at which draws begin", minimum=1e-3)
    last_sigma: float = param(0.1, "noise level of the last evaluation", minimum=1e-5)
    iterations: int = param(8, "conjugate-gradient steps an evaluation", minimum=1)

    @property
    def levels(self) -> Tensor:
        """The noise levels (evaluations + 1,), the last 0."""
        return karras(self.evaluations, self.last_sigma, self.first_sigma)


@dataclass(frozen=True)
class Classical:
    """The part of a form that says how methods without a learned prior are regularised."""

    regularisation: float = param(0.03, "of CG-SENSE, chosen on validation people, as the next two", minimum=0)
    wavelets: float | None = param(0.004, "weight of |wavelets|_1; none: without that baseline", minimum=0)
    variation: float | None = param(0.0015, "weight of the total variation; none: without that baseline", minimum=1e-9)
    sparse_iterations: int = param(80, "steps of these two", minimum=1)

    def total_variation(self, scan: Scan) -> Tensor | None:
        """The total variation image (1, 1, z, y, x), 0 and above; None without that baseline."""
        if self.variation is None:
            return None
        image = mri.total_variation(scan.y, scan.maps, scan.mask, self.variation, self.sparse_iterations)
        return image.real.clamp(min=0)

    def images(self, scan: Scan) -> dict[str, Tensor]:
        """What they make of a scan, by name, 0 and above: they too are told that it is real."""
        methods = {
            "zero-filled": (mri.zero_filled, 0.0, None),
            "CG-SENSE": (mri.cg_sense, self.regularisation, 30),
            "L1 of wavelets": (mri.l1_wavelet, self.wavelets, self.sparse_iterations),
            "total variation": (mri.total_variation, self.variation, self.sparse_iterations),
        }
        return {
            name: method(scan.y, scan.maps, scan.mask, weight, iterations).real.clamp(min=0)
            for name, (method, weight, iterations) in methods.items()
            if weight is not None
        }


@torch.no_grad()
def drawn_anew(
    prior: LatentPrior, z: Tensor, start_sigmas: Sequence[float], evaluations: int, seed: int = 0
) -> dict[str, Tensor]:
    """The code z (1, *latent_shape), and that code noised to each level and drawn from there, as volumes.

    Little noise must bring the same brain back, much noise another brain; noise in between shows which features the
    prior holds on to. A decoder that fails does so without any noise; a prior that fails does so with much.
    """
    check_unique([f"sigma {sigma:g}" for sigma in start_sigmas], "noise levels")
    made = {"code": prior.decode(z)}
    for sigma in start_sigmas:
        levels = karras(max(2, evaluations), min(0.02, sigma / 10), sigma)
        drawn = sample(
            prior.D, levels, shape=prior.latent_shape, seeds=seed, start=z, solver="dpmpp_2m", device=prior.device
        )
        made[f"sigma {sigma:g}"] = prior.decode(drawn.x)
    return made


@dataclass(frozen=True)
class Verdict:
    """What held-out readouts say of the latent prior beside total variation, without a truth.

    share: of the posterior mean in the image that errs least, the rest is total variation. widening: factor on the
    variance of the draws about that image. excess: squared error at held-out readouts, less the noise, of each image.
    """

    share: float
    widening: float
    excess: Mapping[str, float]

    @property
    def text(self) -> str:
        """In words and numbers."""
        told = ", ".join(f"{name} {value:.3g}" for name, value in self.excess.items())
        bars = f"; error bars widened by {self.widening**0.5:.2f}" if self.widening > 1 else ""
        says = f"held-out readouts (squared error: {told}) give the latent prior {self.share:.0%} of the image{bars}"
        return says if self.share >= LEAST_SHARE else f"WARNING: the prior does not know this scan; {says}"

    def apply(self, draws: Tensor, other: Tensor | None) -> tuple[Tensor, Tensor]:
        """The image (1, 1, z, y, x), in part `other`, and draws (draw, 1, z, y, x) that scatter about it."""
        mean = draws.mean(0, keepdim=True)
        image = mean if other is None else self.share * mean + (1 - self.share) * other
        return image, image + self.widening**0.5 * (draws - mean)


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Real-valued images (1, 1, z, y, x) of a scan, draws (draw, 1, z, y, x), bills and verdicts by method.

    paired: whether draws are antithetic (`Samples.paired`), as an even number of them is.
    """

    images: dict[str, Tensor]
    draws: dict[str, Tensor]
    bills: dict[str, Bill]
    verdicts: dict[str, str]
    paired: bool = False

    def spread(self, method: str) -> metrics.Spread:
        """How far the draws of a method scatter, (1, z, y, x) each."""
        return metrics.spread(self.draws[method], self.paired)

    def calibration(self, truth: Tensor) -> dict[str, float]:
        """The variance of draws over the squared error of their mean, in the brain, by method; 1: right.

        truth (1, 1, z, y, x).
        """
        return {
            name: metrics.calibration_ratio(x[:, None], truth, truth > 0, self.paired).item()
            for name, x in self.draws.items()
        }


def posterior(
    prior: LatentPrior, errors: Errors, scan: Scan, method: str, sampler: Sampler, seeds: Sequence[int]
) -> tuple[dict[str, Tensor], Bill]:
    """Draws (draw, 1, z, y, x) by one of GUIDANCES, antithetic if even, decoded and "+ data", and what one cost."""
    G = GUIDANCES[method](scan.A, scan.y, scan.noise_std, sampler.iterations, space=prior.space, errors=errors)
    began = time.perf_counter()
    z = sample(
        G(prior.D),
        sampler.levels,
        shape=prior.latent_shape,
        seeds=antithetic(seeds),
        solver="dpmpp_2m",
        device=prior.device,
        batch_size=1,
    )
    decoded = prior.decode(z.x)
    explained = with_data(decoded, G, sampler.last_sigma)
    bill = replace(z.bill, seconds=(time.perf_counter() - began) / len(seeds))
    return {method: decoded.clamp(min=0), f"{method} + data": explained.clamp(min=0)}, bill


@torch.no_grad()
def with_data(decoded: Tensor, G: LatentGuidance, sigma: float) -> Tensor:
    """Decoded volumes (draw, 1, z, y, x) made to agree with the data once more, outside the latents.

    What the autoencoder cannot express returns. sigma: the noise level whose errors they have.
    """
    last = G.errors.at(torch.full((len(decoded),), sigma, device=decoded.device))
    return torch.cat([explain(x[None], v[None], G) for x, v in zip(decoded, last, strict=True)])


def posterior_of_voxels(
    D: Denoiser,
    errors: Mapping[str, ErrorModel],
    scan: Scan,
    baseline: Classical,
    evaluations: int,
    iterations: int,
    seeds: Sequence[int],
) -> tuple[Samples, trust.Trust]:
    """Draws of a scan by a prior of voxels, and what held-out samples say of it: `trust.reconstruct` in 3D.

    Chains begin with total variation, if `baseline` has it, and the image leans on it as far as the scan asks. Whole
    readouts judge it here, which lie as far from measured ones as missing ones do, so they tell of all errors.
    """

    def classical(_: LinearOperator, y: Tensor) -> Tensor:
        measured = (y[0] != 0).any(0).to(scan.mask.mask.dtype)
        image = baseline.total_variation(replace(scan, y=y, mask=replace(scan.mask, mask=measured)))
        assert image is not None
        return image

    D, most = AnySize(D, network_of(D).total_stride), evaluations * len(seeds)
    how = {"classical": None if baseline.variation is None else classical, "iterations": iterations}
    allowed = max(most // 2, TRIAL * trust.LEAST_CALLS)
    split, noise_std = held_out_readouts(scan, seeds[0]), scan.noise_std
    found = trust.assess(
        D,
        split,
        noise_std,
        errors,
        evaluations=allowed,
        draws=TRIAL,
        seed=seeds[0],
        final=len(seeds),
        beside=False,
        **how,
    )
    return trust.reconstruct(
        D,
        scan.A,
        scan.y,
        noise_std,
        errors,
        acs=scan.mask.acs,
        seeds=seeds,
        evaluations=evaluations,
        trust=found,
        **how,
    )


HELD = 0.1  # of the readouts outside of the centre: kept back to judge methods by


def without_some(scan: Scan, share: float = HELD, seed: int = 0) -> tuple[Scan, Tensor]:
    """The scan without a share of its readouts outside of the centre, and which samples these are, (z, y, x), bool.

    Raises ValueError where all readouts lie in the centre.
    """
    plane = scan.mask.mask[0] > 0
    free = plane.clone()
    rows, columns = (slice(n // 2 - scan.mask.acs // 2, n // 2 + scan.mask.acs // 2) for n in plane.shape)
    free[rows, columns] = False
    places = free.flatten().nonzero()[:, 0]
    if not len(places):
        raise ValueError(f"all readouts lie in the centre of {scan.mask.acs} x {scan.mask.acs}; none can be held out")
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).to(places.device)
    held = torch.zeros_like(plane).flatten()
    held[places[order[: max(1, round(share * len(places)))]]] = True
    held = held.view_as(plane).expand(scan.mask.mask.shape)
    mask = replace(scan.mask, mask=torch.where(held, 0, scan.mask.mask))
    return replace(scan, y=torch.where(held, 0, scan.y), mask=mask), held


def held_out_readouts(scan: Scan, seed: int = 0) -> held_out.Split:
    """The scan in two parts, the second of whole readouts: what lies between measured ones along z tells nothing new.

    They are weighed, ring by ring of k-space, by how many places there were never measured: these are what a prior has
    to tell.
    """
    seen, held = without_some(scan, seed=seed)
    group, weight = rings(scan.mask.mask == 0, held)
    judge = Diagonal(weight.sqrt(), scan.A.range_shape, scan.y.dtype) @ scan.A
    return held_out.Split(seen.A, seen.y, judge, weight.sqrt() * scan.y, held, group)


@torch.no_grad()
def assess(
    prior: LatentPrior,
    errors: Errors,
    scan: Scan,
    method: str,
    sampler: Sampler,
    classical: Classical,
    seed: int = 0,
) -> Verdict:
    """What a scan says of the prior: draws from one part of it have to predict the other, see `held_out_readouts`.

    As `companion.reconstruction.trust`, with two draws.
    """
    split, (seen, _) = held_out_readouts(scan, seed), without_some(scan, seed=seed)
    drawn, bill = posterior(prior, errors, seen, method, sampler, range(seed, seed + TRIAL))
    samples = Samples(drawn[f"{method} + data"], bill, paired=TRIAL % 2 == 0)
    other, share = classical.total_variation(seen), 1.0
    excess = {"latent prior": held_out.predictive_score(split, samples, scan.noise_std).excess}
    if other is not None:
        share = held_out.best_share(
            split, samples.centres, other, sampler.draws // 2 if samples.paired else sampler.draws
        )
        excess["total variation"] = held_out.predictive_score(split, samples, scan.noise_std, other).excess
    image, _ = Verdict(share, 1.0, {}).apply(samples.x, other)
    found = held_out.predictive_score(split, samples, scan.noise_std, image)
    return Verdict(share, max(1.0, found.widening), excess | {"both": found.excess})


def rings(missing: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """The ring of k-space of each held-out sample, and its weight, of mean 1: how many missing ones it speaks for.

    missing, held (z, y, x), bool. Both are (z, y, x), the weight 0 where nothing is held out.
    """
    group = torch.zeros(held.shape, dtype=torch.long, device=held.device)
    radius = held_out.radii(held[0]).expand(held.shape)
    group[held] = held_out.bands(radius[held])
    counts = [
        torch.bincount(g, minlength=held_out.BANDS)
        for g in (held_out.bands(radius[missing], radius[held]), group[held])
    ]
    share = (counts[0] / counts[1].clamp(min=1))[group[held]]
    weight = torch.zeros(held.shape, device=held.device)
    weight[held] = share / share.mean()
    return group, weight


def score(reconstructions: Sequence[Reconstruction], scans: Sequence[Scan]) -> list[dict[str, object]]:
    """PSNR and SSIM of every method, mean and standard error over people; peak 1, and inside the brain."""
    rows, truth = [], torch.cat([scan.truth for scan in scans])
    for name in reconstructions[0].images:
        x = torch.cat([r.images[name] for r in reconstructions])
        values = {
            "PSNR (dB)": metrics.psnr(x, truth, 1.0),
            "PSNR (brain, dB)": metrics.psnr(x, truth, 1.0, truth > 0),
            "SSIM": metrics.ssim(x, truth, 1.0),
            "SSIM (brain)": metrics.ssim(x, truth, 1.0, truth > 0),
        }
        rows.append({"method": name, "n": len(x)} | {key: average(v) for key, v in values.items()})
    return rows
