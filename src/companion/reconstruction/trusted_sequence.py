"""Volumes drawn slice by slice with a sequence prior, each slice as far as the scan trusts the prior (docs/aid.md).

`reconstruction.sequence` draws a slice given the draws of those before it; `reconstruction.trust` asks a scan how far a
prior may be believed. Together: one slice is asked; what it says of the prior's error, of the error bars and of the
classical method serves all; every slice begins with its classical image and has a share of it of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Generator, Tensor

from companion.acquisition.mri import Scan
from companion.diffusion.denoisers import inner_denoiser
from companion.diffusion.sampling import Samples
from companion.diffusion.sequence import SequenceSamples, add, draw_sequence
from companion.models.architectures import network_of
from companion.reconstruction import regularised, trust
from companion.reconstruction.held_out import Blend, hold_out
from companion.reconstruction.kept import Kept
from companion.reconstruction.sequence import CONTEXT_GIVEN, Prior, Sampler, known_first, with_known
from companion.reconstruction.trust import Trust


def reconstruct(
    prior: Prior,
    scan: Scan,
    sampler: Sampler,
    context: str | None,
    seed: int,
    progress: bool = False,
    keep: Path | None = None,
) -> tuple[SequenceSamples, list[Trust]]:
    """Draws (draw, frame, 1, y, x) about images that the scan trusts, which are their means, and the trust of each
    slice that was drawn.

    As `sequence.reconstruct`, by annealed Gibbs sampling; start, draws, at_once and evaluations of the sampler count,
    noise levels are those of `trust.levels_for`. A slice is given the slices before it as they are returned, moved and
    widened. keep: file for the slices drawn so far; after a stop the same call asks the scan anew and goes on.

    Raises ValueError for a prior without models of its error to choose from, for a scan without noise, and as
    `trust.assess` does for too few evaluations.
    """
    scan = scan.to(prior.device)
    found, classical = ask(prior, scan, sampler, seed)
    informed = found
    if prior.window:
        informed = replace(found, error=prior.errors[found.chosen.name + CONTEXT_GIVEN].times(found.chosen.scale))
    given = known_first(scan, sampler)
    first = 0 if given is None else 1
    made_from = (network_of(prior.D), type(inner_denoiser(prior.D)), scan, sampler, context, seed, prior.errors)
    kept = Kept(keep, "trusted", *made_from)

    def draw_frame(n: int, cond: Tensor | None, generators: list[Generator]) -> Samples:
        i = first + n
        samples, own = trust.draw(
            prior.D, scan.operator(i), scan.y[i : i + 1], scan.noise_std,
            found if context is None or i == 0 else informed,
            seeds=generators, evaluations=sampler.evaluations, classical=classical, cond=cond,
            batch_size=sampler.at_once,
        )  # fmt: skip
        kept.notes.append(own.share)
        return samples

    with prior.seeing(context) as seen:
        samples = draw_sequence(
            draw_frame,
            len(scan.y) - first,
            shape=scan.shape,
            seeds=range(seed, seed + sampler.draws),
            paired=True,
            context=None if given is None else given[None],
            dtype=scan.y.dtype,
            progress=progress,
            **seen,
            **kept.options,
        )
    drawn = SequenceSamples(with_known(given, samples.x), add(kept.bill, samples.bill), paired=samples.paired)
    return drawn, [replace(found, share=share) for share in kept.notes]


def ask(prior: Prior, scan: Scan, sampler: Sampler, seed: int) -> tuple[Trust, Blend]:
    """What the middle slice says of the prior, without context, and the classical method that its samples ask for.

    The trial is half as long as the draws of a slice.
    """
    alone = {name: error for name, error in prior.errors.items() if not name.endswith(CONTEXT_GIVEN)}
    if not alone:
        raise ValueError(
            "of this prior no models of its error are known, of which a scan could choose; expected errors.json beside "
            "the weights (tools/prior_errors.py), read by Prior.known(load_errors(name)), and method annealed_gibbs"
        )
    if not scan.noise_std > 0:
        raise ValueError(f"{scan.name or 'the scan'} has noise_std {scan.noise_std}; a trial needs to know the noise")
    middle = len(scan.y) // 2
    split = hold_out(scan.operator(middle), scan.y[middle : middle + 1], scan.mask.acs, seed=seed)
    classical = regularised.blend(split, scan.noise_std)
    found = trust.assess(
        prior.D, split, scan.noise_std, alone, evaluations=trial_evaluations(sampler), seed=seed, classical=classical,
        final=sampler.draws, organ=prior.organ,
    )  # fmt: skip
    return found, classical


def trial_evaluations(sampler: Sampler) -> int:
    """Of the network, all chains together."""
    return int(trust.EXTRA * sampler.evaluations * sampler.draws)


def of_volume(found: Sequence[Trust]) -> Trust:
    """What its slices say together: the verdict of the one that was asked, with the mean of all shares."""
    return replace(found[0], share=sum(one.share for one in found) / len(found))
