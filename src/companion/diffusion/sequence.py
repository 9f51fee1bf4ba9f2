"""Sequences, frame by frame: p(x_0 .. x_N) = prod_n p(x_n | x_<n), each factor drawn by a diffusion model.

D is any denoiser that takes the frames before as cond (draws or 1, frame, *shape), oldest first, such as one around
`CausalUNet`. `sample_sequence` draws from the prior, `reconstruct_sequence` from the posterior, a guidance for each
frame; both are `draw_sequence`, the one loop, with a rule that draws one frame. [luo2024].

| the paper's mode    | here                                                                                   |
|---------------------|----------------------------------------------------------------------------------------|
| prospective, warm   | context=frames; `frames` counts the new ones, the window slides                        |
| prospective, cold   | start="blank" for networks trained with blank starts, start=None for two-stage ones    |
| a given first frame | context=first[:, None], also for reconstruction                                        |
| first stage         | first_stage=True: each frame by itself                                                 |
| start point         | sigma_start=s: each frame starts from the one before it, noised to s                   |
| retrospective       | `sample_retrospective`: all frames at once, each given the true ones before it         |
| unfolding           | frames=1, context (1, frame, *shape), many seeds: conditioning is worked out once      |
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from companion.diffusion.denoisers import Denoiser, moments_of
from companion.diffusion.gibbs import annealed_gibbs
from companion.diffusion.guidance import Guidance, posterior_mean
from companion.diffusion.sampling import Bill, Samples, check_sigmas, sample
from companion.diffusion.solvers import Solver
from companion.randomness import antithetic, are_antithetic, generators, parse_seeds

DrawFrame = Callable[[int, Tensor | None, list[Generator]], Samples]


@dataclass(frozen=True)
class SequenceSamples:
    """x: the drawn frames (draw, frame, *shape), without given context. bill: the cost of them, per draw.

    mean: the conditional means of the last noise level, alike, see `Samples`; None where a frame has none. paired:
    draws 2k and 2k + 1 are antithetic, see `Samples`.
    """

    x: Tensor
    bill: Bill
    mean: Tensor | None = None
    paired: bool = False


@torch.no_grad()
def draw_sequence(
    draw_frame: DrawFrame,
    frames: int,
    *,
    shape: Sequence[int],
    seeds: str | int | Iterable[int],
    window: int | None = None,
    context: Tensor | None = None,
    start: str | None = "blank",
    shared_context: str | None = None,
    first_stage: bool = False,
    paired: bool = False,
    resume: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> SequenceSamples:
    """Draws so many frames one after another: SequenceSamples(x (draw, frame, *shape), bill).

    draw_frame: draw_frame(n, cond, generators) -> Samples draws frame n, (draw, *shape), one draw for each generator.
        cond holds the newest frames before it, (draws or 1, at most `window`, *shape), oldest first, or is None. It
        has a batch of 1 if all draws share it, so that a network may work it out once.
    shape: of one frame, without the batch axis.
    seeds: ints or text such as "0-7". Each frame of each draw has its own generator, see `frame_generators`: its
        noise depends neither on the batch nor on the number of frames.
    window: frames that the network sees at most; by default all that there are.
    context: frames that come before, (draws or 1, frame, *shape). They slide out of the window as others do.
    start: what the first frame sees without context: "blank" is one frame of zeros, which no later frame sees (to keep
        it in the window give it as context); None is cond=None, for networks that can do without.
    shared_context: "mean" replaces each frame in the window by its mean over the draws, so that all draws share the
        conditioning, at the price of draws that are too narrow and depend on one another. By default each draw has its
        own past, and a seed gives the same sequence alone and in any batch.
    first_stage: gives no frame any cond.
    paired: an even number of draws comes in antithetic pairs (`randomness.antithetic`), for means of posteriors.
    resume: frames drawn before, (draw, frame, *shape), with the same arguments. The result, which includes them, is
        that of an uninterrupted run; the bill is not.
    callback: gets dict(frame, x, cond, bill) after every frame, x (draw, *shape): store x to be able to resume.
    progress: shows a bar with the time left.

    Raises ValueError or TypeError for arguments that do not fit, FloatingPointError for a frame with NaN.
    """
    numbers, shape = check_seeds(seeds), tuple(shape)
    check_loop(frames, window, start, shared_context)
    given = check_frames("context", context, (1, len(numbers)), shape, dtype, device)
    drawn = check_frames("resume", resume, (len(numbers),), shape, dtype, device)
    if len(drawn) > frames:
        raise ValueError(f"resume holds {len(drawn)} frames, more than the {frames} wanted; raise `frames`")

    def remembered(frame: Tensor) -> Tensor:
        # Rounding in networks depends on strides: frames drawn now and frames given to resume must have the same.
        frame = frame.clone(memory_format=torch.contiguous_format)
        return frame.mean(0, keepdim=True) if shared_context else frame

    past = [remembered(frame) for frame in (*given, *drawn)]
    blank = torch.zeros(1, 1, *shape, dtype=dtype, device=device) if start else None
    bill = Bill(0.0, 0.0, 0.0)
    means: list[Tensor | None] = [None] * len(drawn)
    with tqdm(initial=len(drawn), total=frames, desc="frames", disable=not progress) as bar:
        for n in range(len(drawn), frames):
            newest = past[-window:] if window else past
            cond = None if first_stage else side_by_side(newest) if newest else blank
            samples = draw_frame(n, cond, frame_generators(numbers, n, paired))
            check_drawn(n, samples.x, (len(numbers), *shape))
            drawn.append(samples.x)
            means.append(samples.mean)
            past.append(remembered(samples.x))
            bill = add(bill, samples.bill)
            bar.update()
            if callback is not None:
                callback(dict(frame=n, x=samples.x, cond=cond, bill=bill))
    known = [mean for mean in means if mean is not None]
    whole = len(known) == len(means)
    in_pairs = are_antithetic(frame_generators(numbers, 0, paired))
    return SequenceSamples(torch.stack(drawn, 1), bill, torch.stack(known, 1) if whole else None, in_pairs)


def sample_sequence(
    D: Denoiser,
    sigmas: Tensor | Sequence[float],
    *,
    frames: int,
    shape: Sequence[int],
    seeds: str | int | Iterable[int],
    solver: str | Solver = "heun",
    sigma_start: float | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **loop,
) -> SequenceSamples:
    """Draws sequences from the prior in D: SequenceSamples(x (draw, frame, *shape), bill).

    sigmas, solver, batch_size: for each frame, as for `sample`. sigma_start: frames start from the one before them,
    noised to this level, instead of pure noise (SDEdit); the first one only if there is context. loop: window, context,
    start, shared_context, first_stage, paired, resume, callback and progress as for `draw_sequence`. Raises as they do.
    """
    options = dict(solver=solver, shape=tuple(shape), dtype=dtype, device=device, batch_size=batch_size)
    draw_frame = diffusion(lambda n: D, sigmas, sigma_start, loop, options)
    return draw_sequence(draw_frame, frames, shape=shape, seeds=seeds, dtype=dtype, device=device, **loop)


def reconstruct_sequence(
    D: Denoiser,
    guidances: Sequence[Guidance],
    sigmas: Tensor | Sequence[float],
    *,
    seeds: str | int | Iterable[int],
    solver: str | Solver = "heun",
    refresh: float | None = None,
    sigma_start: float | None = None,
    batch_size: int | None = None,
    device: torch.device | str = "cpu",
    **loop,
) -> SequenceSamples:
    """Draws sequences given data of every frame: SequenceSamples(x (draw, frame, *A.domain_shape), bill).

    guidances: G_n for frame n, which know its operator and data, on `device`. solver: with which `sample` solves
    G_n(D), or "annealed_gibbs", with its `refresh`, for guidances that are `posterior_mean`. All else as for
    `sample_sequence`.

    Frame n is drawn from p(x_n | x_<n, y_n), as in the paper: data of later frames do not reach back, as they would in
    draws from p(x_0 .. x_N | y_0 .. y_N). Raises as `draw_sequence` does, and ValueError or TypeError for guidances
    that do not fit together or do not fit the solver.
    """
    shape, dtype = check_guidances(guidances, solver, sigma_start)
    options: dict[str, Any] = dict(dtype=dtype, device=device, batch_size=batch_size)
    draw_frame: DrawFrame
    if solver == "annealed_gibbs":
        exact = cast("Sequence[posterior_mean]", guidances)  # as check_guidances saw to

        def gibbs(n: int, cond: Tensor | None, draws: list[Generator]) -> Samples:
            return annealed_gibbs(D, exact[n], sigmas, seeds=draws, refresh=refresh, cond=cond, **options)

        draw_frame = gibbs
    else:
        options |= dict(solver=solver, shape=shape)
        draw_frame = diffusion(lambda n: guidances[n](D), sigmas, sigma_start, loop, options)
    return draw_sequence(draw_frame, len(guidances), shape=shape, seeds=seeds, dtype=dtype, device=device, **loop)


def sample_retrospective(
    D: Denoiser,
    sigmas: Tensor | Sequence[float],
    *,
    context: Tensor,
    seeds: str | int | Iterable[int],
    solver: str | Solver = "heun",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    callback: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> SequenceSamples:
    """Draws what may follow each frame of a true sequence, all at once: SequenceSamples(x (draw, frame, *shape), bill).

    context: true frames, (draws or 1, frame, *shape). Frame n of x follows frames 0..n of the context, and has the
    noise of frame n of `draw_sequence`. D must take whole sequences, x and cond (draw, frame, *shape), as in training;
    one evaluation of it serves all frames. callback gets the steps of `sample`, with a batch of draws times frames.
    Raises as `sample` and `draw_sequence` do.
    """
    numbers = check_seeds(seeds)
    true = check_frames("context", context, (1, len(numbers)), tuple(context.shape[2:]), dtype, device)
    whole = side_by_side(true).expand(len(numbers), *[-1] * (context.ndim - 1))
    by_frame = [frame_generators(numbers, n) for n in range(len(true))]
    samples = sample(
        AllFrames(D, whole),
        sigmas,
        shape=whole.shape[2:],
        seeds=[draw for of_one_seed in zip(*by_frame, strict=True) for draw in of_one_seed],
        solver=solver,
        dtype=dtype,
        device=device,
        callback=callback,
        progress=progress,
    )
    bill = replace(samples.bill, seconds=samples.bill.seconds * len(true))
    return SequenceSamples(samples.x.unflatten(0, (len(numbers), -1)), bill)


# --- rules and windows


def diffusion(
    denoiser: Callable[[int], Denoiser],
    sigmas: Tensor | Sequence[float],
    sigma_start: float | None,
    loop: dict,
    options: dict,
) -> DrawFrame:
    """The rule that samples denoiser(n) for frame n, from pure noise or from the frame before it noised."""
    levels = check_sigmas(sigmas)
    if sigma_start is None:
        return lambda n, cond, draws: sample(denoiser(n), levels, seeds=draws, cond=cond, **options)
    if not levels[-1] < sigma_start <= levels[0] or loop.get("first_stage"):
        raise ValueError(
            f"sigma_start={sigma_start} must lie in the range of sigmas, above {levels[-1]:.4g} and up to "
            f"{levels[0]:.4g}, and first_stage must be False: its frames have none before them to start from"
        )
    lower = [sigma_start, *(sigma for sigma in levels if sigma < sigma_start)]

    def draw_frame(n: int, cond: Tensor | None, draws: list[Generator]) -> Samples:
        if cond is None or (n == 0 and loop.get("context") is None):
            return sample(denoiser(n), levels, seeds=draws, cond=cond, **options)
        return sample(denoiser(n), lower, seeds=draws, cond=cond, start=cond[:, -1], **options)

    return draw_frame


class AllFrames:
    """D on whole sequences, for a sampler whose batch is (draw * frame)."""

    def __init__(self, D: Denoiser, context: Tensor):
        self.D, self.context = D, context

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.D(*self._whole(x, sigma)).flatten(0, 1)

    def _moments(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x0_hat, variance = moments_of(self.D)(*self._whole(x, sigma))
        return x0_hat.flatten(0, 1), variance.expand(*x0_hat.shape[:2], *variance.shape[2:]).flatten(0, 1)

    def _whole(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        draws, frames = self.context.shape[:2]
        return x.unflatten(0, (draws, frames)), sigma[::frames], self.context

    @property
    def moments(self) -> Callable:
        if not hasattr(self.D, "moments"):
            raise AttributeError("the denoiser has no moments")
        return self._moments

    @property
    def denoiser_calls(self) -> float:
        return getattr(self.D, "denoiser_calls", 1)


def frame_generators(seeds: Sequence[int], frame: int, paired: bool = False) -> list[Generator]:
    """A CPU generator for this frame of each draw; that of frame 0 is the one that `sample` has for the seed.

    The seeds move by 2^32 / golden ratio a frame, modulo the 2^32 seeds that torch tells apart: of all constants this
    one keeps multiples furthest apart, so N neighbouring seeds of F frames do not meet while N F < 2^32 / 8.
    paired: as `antithetic` makes them.
    """
    numbers = [(seed + frame * 0x9E3779B1) % 2**32 for seed in seeds]
    return antithetic(numbers) if paired else generators(numbers)


def side_by_side(frames: Sequence[Tensor]) -> Tensor:
    """(draws or 1, frame, *shape) from frames (draws or 1, *shape); its batch is 1 if that of all is."""
    return torch.stack(torch.broadcast_tensors(*frames), dim=1)


def add(one: Bill, other: Bill) -> Bill:
    return Bill(
        one.denoiser_calls + other.denoiser_calls,
        one.operator_calls + other.operator_calls,
        one.seconds + other.seconds,
    )


# --- checks


def check_seeds(seeds: str | int | Iterable[int]) -> list[int]:
    several = seeds if isinstance(seeds, str | int) else [seeds] if isinstance(seeds, Generator) else list(seeds)
    if isinstance(several, list) and any(isinstance(seed, Generator) for seed in several):
        raise TypeError("a sequence makes a generator for every frame from ints; give seeds instead of generators")
    numbers = parse_seeds(cast("str | int | list[int]", several))
    if not numbers:
        raise ValueError("no seeds were given; one sequence is drawn per seed")
    return numbers


def check_loop(frames: int, window: int | None, start: str | None, shared_context: str | None) -> None:
    if frames < 1:
        raise ValueError(f"frames={frames}: expected how many frames to draw, at least 1")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected at least 1 frame; to draw without context say first_stage=True")
    if start not in ("blank", None):
        raise ValueError(f"start={start!r}: expected 'blank' or None; a given first frame is context=first[:, None]")
    if shared_context not in ("mean", None):
        raise ValueError(f"shared_context={shared_context!r}: expected 'mean' or None")


def check_frames(
    name: str, x: Tensor | None, batches: tuple[int, ...], shape: tuple, dtype: torch.dtype, device
) -> list[Tensor]:
    """The frames (draws or 1, *shape) of x (draws or 1, frame, *shape), oldest first; none for None."""
    if x is None:
        return []
    if x.ndim < 2 or x.shape[0] not in batches or tuple(x.shape[2:]) != shape:
        wanted = " or ".join(f"({', '.join(map(str, (batch, 'frames', *shape)))})" for batch in dict.fromkeys(batches))
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {wanted}")
    if x.shape[1] == 0:
        raise ValueError(f"{name} holds no frames; leave it out (None) to start from nothing")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} contains NaN or infinity; remove it before sampling")
    if x.is_complex() and not dtype.is_complex:
        raise TypeError(f"{name} is {x.dtype} but dtype={dtype}; give dtype=torch.complex64")
    return list(x.to(device, dtype).unbind(1))


def check_drawn(n: int, x: Tensor, shape: tuple) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"frame {n} was drawn with shape {tuple(x.shape)}; expected {shape}")
    if not torch.isfinite(x).all():
        raise FloatingPointError(f"frame {n} has NaN or infinity, and all after it would; check its guidance and data")


def check_guidances(
    guidances: Sequence[Guidance], solver: str | Solver, sigma_start: float | None
) -> tuple[tuple, torch.dtype]:
    """Shape and dtype of the frames that all guidances act on."""
    spaces = [(tuple(G.A.domain_shape), G.A.domain_dtype) for G in guidances]
    if len(set(spaces)) != 1:
        found = ", ".join(map(str, dict.fromkeys(spaces))) or "none"
        raise ValueError(f"expected a guidance for each frame, all for images of one shape and dtype; got {found}")
    if solver == "annealed_gibbs":
        if sigma_start is not None:
            raise ValueError("annealed_gibbs has no start; leave out sigma_start, or choose a solver of `sample`")
        for n, G in enumerate(guidances):
            if not isinstance(G, posterior_mean):
                raise TypeError(f"annealed_gibbs needs posterior_mean; the guidance of frame {n} is {type(G).__name__}")
    return spaces[0]
