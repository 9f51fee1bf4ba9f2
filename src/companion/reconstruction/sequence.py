"""Posterior draws of volumes with a sequence prior: slice n given its data and the slices before it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from companion.acquisition.mri import Scan
from companion.diffusion.covariance import Measured
from companion.diffusion.denoisers import AnySize, Denoiser, inner_denoiser
from companion.diffusion.guidance import Guidance, ddnm, dds, diffpir, dps, landweber, pigdm, posterior_mean
from companion.diffusion.langevin import langevin
from companion.diffusion.noise import karras
from companion.diffusion.recalibration import ErrorModel
from companion.diffusion.sampling import Samples
from companion.diffusion.sequence import SequenceSamples, add, draw_sequence, reconstruct_sequence
from companion.diffusion.solvers import ddim
from companion.evaluation import metrics, tables
from companion.evaluation.organ import Organ
from companion.models.architectures import network_of
from companion.models.checkpoint import load_denoiser
from companion.models.errors import for_pixels
from companion.operators.linear import LinearOperator
from companion.parameters import param
from companion.randomness import randn
from companion.reconstruction import nullspace
from companion.reconstruction.kept import Kept

FIRST_SIGMA = 5.0  # noise level at which posterior draws begin: an image is invisible in it
CONTEXT_ERROR = 0.05  # deviation of drawn slices from the truth, roughly
CONTEXT_GIVEN = ", slices given"  # ends the name of an error that was measured with a window of context
GUIDANCES: dict[str, Callable[..., Guidance]] = {
    "annealed_gibbs": posterior_mean,
    "published": landweber,
    "dds": dds,
    "ddnm": ddnm,
    "diffpir": diffpir,
    "pigdm": pigdm,
    "dps": dps,
}
METHODS = tuple(GUIDANCES)
SOLVERS = {"annealed_gibbs": "annealed_gibbs", "published": "aid_stochastic"}  # the others: "ddim", stochastic


@dataclass(frozen=True)
class Sampler:
    """The part of a form that says how posterior draws are made."""

    start: str = param(
        "nothing",
        "what the first slice is given: nothing, or truth, the fully sampled slice (paper's protocol)",
        choices=("nothing", "truth"),
    )
    method: str = param(
        "annealed_gibbs", "posterior sampler; published: gradient steps, stochastic rule", choices=METHODS
    )
    draws: int = param(4, "posterior draws of a volume", minimum=2)
    at_once: int | None = param(None, "draws that share an evaluation; fewer take less memory; none: all", minimum=1)
    evaluations: int = param(24, "network evaluations a draw and slice", minimum=2)
    last_sigma: float = param(0.04, "noise level of the last evaluation; about 4 noise_std", minimum=1e-4)
    refresh: float | None = param(
        10.0,
        "annealed_gibbs: how often the noise is renewed while sigma falls by e; none: "
        "in every evaluation, which drifts over hundreds of them",
        minimum=0,
    )

    def levels(self, D: Denoiser | None = None) -> Tensor:
        """The noise levels; for the published method those of the prior's own schedule, if it has one."""
        own = None if D is None else getattr(inner_denoiser(D), "schedule", None)
        if self.method == "published" and own is not None:
            return own.levels(self.evaluations)
        return karras(self.evaluations, sigma_min=self.last_sigma, sigma_max=FIRST_SIGMA)


@dataclass(frozen=True, eq=False)
class Prior:
    """A denoiser of any image size, with what its errors look like: `alone` without context, `given` a window of it.

    start: what the first slice sees, see `draw_sequence`. errors: all models of its error that are `known`, by name,
    those nearest to the scan first, of which it may choose. organ: the readout of what it learnt from, if it has one.
    """

    D: Denoiser
    alone: Measured | ErrorModel | None = None
    given: Measured | ErrorModel | None = None
    window: int = 0
    start: str | None = None
    errors: Mapping[str, ErrorModel] = field(default_factory=dict)
    organ: Organ | None = None

    @classmethod
    def load(cls, name: str, default: str, device: str = "cpu", autocast: str | None = None) -> Prior:
        """The prior of a checkpoint, its errors not measured yet. default: what the name "embedded" means."""
        D = load_denoiser(name, device, autocast, default=default)
        network = network_of(D)
        start = "blank" if getattr(network, "concat_cond", False) else None
        return cls(AnySize(D, network.total_stride), window=getattr(network, "seq_len", 0), start=start)

    @property
    def device(self) -> torch.device:
        return next(network_of(self.D).parameters()).device

    @property
    def frames(self) -> int:
        """How many frames of a person `measured` needs."""
        return max(self.window, 3) + 1

    def seconds(self, draws: int, shape: tuple[int, ...], alone: bool) -> float:
        """How long an evaluation takes, for so many draws of images of a shape, with the context of a late slice."""
        x = randn((draws, *shape), torch.complex64, torch.Generator().manual_seed(0), self.device)
        cond = x.new_zeros(1, 1, *shape) if self.start == "blank" else None
        if self.window and not alone:
            cond = x[:, None].expand(-1, self.window, *shape)
        began = time.perf_counter()
        with torch.no_grad():
            self.D(x, torch.full((draws,), 0.1, device=self.device), cond)
        return time.perf_counter() - began

    def measured(self, x: Tensor, seed: int = 0) -> Prior:
        """The same with its errors measured on sequences x (person, frames, 1, y, x) that it was not trained on.

        The context that it is measured with has errors, as draws have.
        """
        x = x.to(self.device)
        images = x[:, ::3].flatten(0, 1)
        blank = torch.zeros_like(images[:1, None]) if self.start == "blank" else None
        alone, given = Measured.fit(self.D, images, seed=seed, cond=blank), None
        if self.window:
            given = Measured.fit(self.D, x[:, -1], seed=seed, cond=drawn(x, seed)[:, -1 - self.window : -1])
        return replace(self, alone=alone, given=given)

    def known(
        self, errors: Mapping[str, ErrorModel], pixel_mm: float | None = None, organ: Organ | None = None
    ) -> Prior:
        """The same with its errors as they are kept beside its weights (`models.errors.load_errors`): those of its own
        images, measured at pixels nearest to `pixel_mm`, and the others to choose from.

        Raises ValueError where one was not measured with context too though this prior takes some.
        """
        nearest = for_pixels(errors, pixel_mm)
        alone = [name for name in nearest if not name.endswith(CONTEXT_GIVEN)]
        if not alone or (self.window and any(name + CONTEXT_GIVEN not in nearest for name in alone)):
            raise ValueError(
                f"errors were measured of {', '.join(errors)}; expected some alone and, of a prior of sequences, the "
                f"same with names that end in {CONTEXT_GIVEN!r}: measure them with tools/prior_errors.py"
            )
        given = nearest[alone[0] + CONTEXT_GIVEN] if self.window else None
        return replace(self, alone=nearest[alone[0]], given=given, errors=nearest, organ=organ)

    @contextlib.contextmanager
    def seeing(self, context: str | None) -> Iterator[dict[str, Any]]:
        """The network attends to "full" or "last" context, or to none; the options of `draw_sequence` that say so."""
        network = network_of(self.D)
        with contextlib.ExitStack() as stack:
            if self.window:
                stack.enter_context(network.attending(context or "full"))
                stack.enter_context(network.caching())
            yield {
                "window": self.window or None,
                "start": self.start,
                "first_stage": context is None,
                "device": self.device,
            }


def drawn(x: Tensor, seed: int) -> Tensor:
    """True slices x with errors as large as those of drawn ones, roughly: what a prior's error with context is
    measured with."""
    return x + CONTEXT_ERROR * randn(x.shape, x.dtype, torch.Generator().manual_seed(seed), x.device)


def guidance(
    method: str,
    A: LinearOperator,
    y: Tensor,
    noise_std: float,
    error: Measured | ErrorModel | None,
    peak: float | None = None,
) -> Guidance:
    """What data of one slice do to a prior: with its measured error, if known, where the method asks for it.

    peak: of the zero-filled image in the units of the prior, for the published steps.
    """
    options: dict[str, object] = {"scale": peak} if method == "published" else {}
    if method == "annealed_gibbs" and error is not None:
        options["covariance"] = error
    return GUIDANCES[method](A, y, noise_std, **options)


def reconstruct(
    prior: Prior,
    scan: Scan,
    sampler: Sampler,
    context: str | None,
    seed: int,
    peak: float | None = None,
    progress: bool = False,
    keep: Path | None = None,
) -> SequenceSamples:
    """Posterior draws (draw, frame, 1, y, x) of a volume, slice n given the draws of the slices before it; an even
    number of them in antithetic pairs (`Samples.paired`).

    context: "full" or "last", see `CausalUNet`; None gives no slice any context, as a single-image prior works.
    keep: file for the slices drawn so far; after a stop the same call goes on from it, to the same result.
    """
    network, scan = network_of(prior.D), scan.to(prior.device)
    given = known_first(scan, sampler)
    frames = range(0 if given is None else 1, len(scan.y))
    errors = [prior.alone if context is None or (n == 0 and given is None) else prior.given for n in frames]
    data = [
        guidance(sampler.method, scan.operator(n), scan.y[n : n + 1], scan.noise_std, error, peak)
        for n, error in zip(frames, errors, strict=True)
    ]
    kept = Kept(
        keep, network, type(inner_denoiser(prior.D)), scan, sampler, context, seed, peak, prior.alone, prior.given
    )
    with prior.seeing(context) as seen:
        samples = reconstruct_sequence(
            prior.D,
            data,
            sampler.levels(prior.D),
            seeds=range(seed, seed + sampler.draws),
            paired=True,
            solver=SOLVERS.get(sampler.method, ddim(eta=1.0)),
            refresh=sampler.refresh,
            context=None if given is None else given[None],
            batch_size=sampler.at_once,
            progress=progress,
            **seen,
            **kept.options,
        )
    return SequenceSamples(with_known(given, samples.x), add(kept.bill, samples.bill), paired=samples.paired)


def known_first(scan: Scan, sampler: Sampler) -> Tensor | None:
    """The first slice (1, 1, y, x), where it is known beforehand."""
    return scan.x[:1] if sampler.start == "truth" and scan.x is not None else None


def with_known(given: Tensor | None, x: Tensor) -> Tensor:
    """Drawn slices (draw, frame, 1, y, x) after the one that was given, on the CPU."""
    known = [] if given is None else [given[None].expand(len(x), *[-1] * given.ndim)]
    return torch.cat([*known, x], 1).cpu()


def csgm(
    prior: Prior, scan: Scan, sampler: Sampler, steps: int, seed: int, keep: Path | None = None
) -> SequenceSamples:
    """Draws (draw, frame, 1, y, x) by annealed Langevin dynamics, `steps` a level, each slice by itself.

    keep: as for `reconstruct`.
    """
    levels = karras(sampler.evaluations, sigma_min=sampler.last_sigma, sigma_max=FIRST_SIGMA)
    scan = scan.to(prior.device)
    kept = Kept(keep, network_of(prior.D), type(inner_denoiser(prior.D)), scan, sampler, steps, seed)

    def draw_frame(n: int, cond: Tensor | None, generators: list[Generator]) -> Samples:
        G = posterior_mean(scan.operator(n), scan.y[n : n + 1], scan.noise_std)
        return langevin(prior.D, G, levels, seeds=generators, steps=steps, device=prior.device)

    samples = draw_sequence(
        draw_frame,
        len(scan.y),
        shape=scan.shape,
        seeds=range(seed, seed + sampler.draws),
        first_stage=True,
        dtype=scan.y.dtype,
        device=prior.device,
        **kept.options,
    )
    return SequenceSamples(samples.x.cpu(), add(kept.bill, samples.bill))


def unfold(prior: Prior, scan: Scan, frame: int, sampler: Sampler, seed: int) -> dict[str, Tensor]:
    """Slice `frame` of a scan, drawn knowing the true slice before it and not: the paper's single-coil unfolding.

    Keys "before", "truth", "zero-filled" (1, y, x) and "with", "without" context, draws (draw, 1, y, x) each.
    """
    scan = scan.to(prior.device)
    A, y, before = scan.operator(frame), scan.y[frame : frame + 1], scan.truth[frame - 1 : frame]
    result = {"before": before[0], "truth": scan.truth[frame], "zero-filled": A.H(y)[0]}
    for name, context, error in (("with", before[None], prior.given), ("without", None, prior.alone)):
        result[name] = reconstruct_sequence(
            prior.D,
            [guidance("annealed_gibbs", A, y, scan.noise_std, error)],
            karras(sampler.evaluations, sigma_min=sampler.last_sigma, sigma_max=FIRST_SIGMA),
            seeds=range(seed, seed + sampler.draws),
            start=None,
            solver="annealed_gibbs",
            refresh=sampler.refresh,
            context=context,
            device=prior.device,
        ).x[:, 0]
    return result


def measured_and_inferred(
    scan: Scan, samples: SequenceSamples, frame: int, prior_std: float = 0.34
) -> dict[str, Tensor]:
    """Maps of one slice, (1, y, x): what its data say and what the prior filled in.

    "measured": how much of each pixel the data determine, 0 to 1; "measured part" and "inferred part" of the mean of
    the draws (draw, frame, 1, y, x); "agreement" of the inferred part over the draws, 0 to 1; see `nullspace`.
    """
    A, weight = scan.operator(frame), (scan.noise_std / prior_std) ** 2
    x = samples.x[:, frame]
    inferred = x - nullspace.measured_part(A, x, weight)
    return {
        "measured": nullspace.measured_fraction(A, weight),
        "measured part": (x - inferred).mean(0),
        "inferred part": inferred.mean(0),
        "agreement": nullspace.agreement(inferred, samples.paired),
    }


def score(x: Tensor, scan: Scan, skip_first: bool) -> dict[str, float]:
    """PSNR (dB), SSIM and NRMSE of a volume x (frame, 1, y, x), of magnitudes after a least-squares scale.

    One scale and one peak for the volume; SSIM is the mean over slices.
    """
    first = int(skip_first)
    x, truth = x[first:].abs().double().cpu(), scan.truth[first:].abs().double().cpu()
    x = x * ((x * truth).sum() / x.square().sum().clamp_min(1e-30))
    volume, true = (v.movedim(0, 1)[None] for v in (x, truth))
    return {
        "PSNR": metrics.psnr(volume, true).item(),
        "SSIM": metrics.ssim(x, truth, data_range=truth.max()).mean().item(),
        "NRMSE": metrics.nrmse(volume, true).item(),
    }


def summary(rows: list[dict], versus: str = "AID") -> list[dict]:
    """A table row for each method: mean and standard error over volumes, and the paired gain of `versus`.

    Of one volume there is no error, of none (no truth) no row.
    """
    columns = {"PSNR": "PSNR (dB)", "SSIM": "SSIM", "NRMSE": "NRMSE"}
    gains = {"PSNR": f"{versus} gains (dB)", "SSIM": f"{versus} gains SSIM"}
    return tables.summary(rows, columns, versus=versus, gains=gains)
