"""Do the images of a sequence hang together? Measures of what neighbouring frames share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from companion.diffusion.denoisers import Denoiser
from companion.evaluation import metrics
from companion.evaluation.denoising import denoising_errors
from companion.models.architectures import network_of
from companion.models.sequences import CONTINUE, Drawn, SequencePrior

Line = tuple[list[float], list[float], list[float]]  # x, mean, standard error, as `figures.curves` takes it


def strangers(x: Tensor) -> Tensor:
    """Sequences whose every frame is of another person: frame n of sequence i is that of person i + n.

    What neighbours have in common when nothing but their place in the sequence is.
    """
    return torch.stack([x[:, n].roll(-n, 0) for n in range(x.shape[1])], 1)


def change(a: Tensor, b: Tensor) -> Tensor:
    """||a| - |b|| / sqrt((|a|^2 + |b|^2) / 2) of images (..., 1, y, x): 0 the same, 1.4 nothing in common."""
    a, b = a.abs().flatten(-3).double(), b.abs().flatten(-3).double()
    return (a - b).norm(dim=-1) / ((a.square() + b.square()).sum(-1) / 2).sqrt().clamp(min=1e-12)


def frame_change(x: Tensor, lag: int = 1) -> Tensor:
    """The mean change between frames `lag` apart of sequences x (sequence, frame, 1, y, x), (sequence,)."""
    return change(x[:, lag:], x[:, : x.shape[1] - lag]).mean(1)


def phase_agreement(x: Tensor) -> Tensor:
    """How well the phases of neighbouring frames agree, (sequence,): 1 the same, 0 at random.

    Re sum conj(x_n) x_n+1 / sum |x_n| |x_n+1|, mean over neighbours.
    """
    a, b = x[:, :-1].flatten(2), x[:, 1:].flatten(2)
    return ((a.conj() * b).sum(2).real / (a.abs() * b.abs()).sum(2).clamp(min=1e-12)).mean(1)


def line(x: Sequence[float], values: Iterable[Tensor]) -> Line:
    """The mean and standard error of the values (sequence,) at each x."""
    pairs = [metrics.mean_and_error(v) for v in values]
    return list(x), [mean for mean, _ in pairs], [error for _, error in pairs]


def context_errors(D: Denoiser, x: Tensor, sigmas: list[float], seed: int = 0) -> list[dict]:
    """For each sigma, the error of a sequence denoiser on the last frame of x (batch, window + 1, channel, y, x).

    Root mean squared error per real component: with all frames before as context, with the published sampling's
    context (the newest frame only), and with none.
    """
    network, context = network_of(D), x[:, :-1]
    blank = torch.zeros_like(context[:, :1]) if network.concat_cond else None

    def told(cond: Tensor | None, mode: str = "full"):
        def estimate(x: Tensor, sigma: Tensor) -> Tensor:
            with network.attending(mode):
                return D(x, sigma, cond)

        return estimate

    estimates = {
        "no context": told(blank),
        "newest frame only": told(context, "last"),
        f"{context.shape[1]} frames": told(context),
    }
    return denoising_errors(estimates, x[:, -1], sigmas, seed=seed)


def coherence_table(true: Tensor, drawn: list[Drawn], window: int) -> list[dict[str, object]]:
    """What neighbouring frames share in true sequences, in each mode, and among strangers; mean and error.

    Beside the change to the next frame stands that of held-out people, at the same frames where a mode continues a
    person; and for these modes the change from what truly followed, at the last frame that is known.
    """
    errors, rows = error_by_frame(true, drawn, window), []
    parts = {d.name: true[:, d.first : d.first + d.x.shape[1]] for d in drawn if d.mode in CONTINUE}
    named = {"held-out people": true} | {d.name: d.x for d in drawn} | {"frames of different people": strangers(true)}
    for name, x in named.items():
        same = parts.get(name, true)
        row = {
            "sequences": name,
            "n": len(x),
            "change to next frame": metrics.mean_and_error(frame_change(x)),
            "of held-out people": metrics.mean_and_error(frame_change(same)) if same.shape[1] > 1 else "-",
        }
        if x.is_complex():
            row["phase agreement"] = metrics.mean_and_error(phase_agreement(x))
        frame, mean, error = (values[-1] for values in errors[name]) if name in errors else (0, 0, 0)
        rows.append(row | {"change from truth": f"{mean:.3f} ± {error:.3f} (frame {frame})" if frame else "-"})
    return rows


def change_by_lag(true: Tensor, drawn: list[Drawn], window: int) -> dict[str, Line]:
    """Lines (lag, change between frames so far apart, standard error): does memory reach further than one frame?

    Warm starts and the first stage, beside held-out people and strangers at the frames that warm starts draw (at all
    frames, if fewer than two of those are known).
    """
    same = true[:, window:] if true.shape[1] > window + 1 else true
    chosen = {d.name: d.x for d in drawn if d.mode in ("warm", "first stage")}
    lines = {}
    for name, x in ({"held-out people": same} | chosen | {"different people": strangers(same)}).items():
        lags = range(1, min(x.shape[1], same.shape[1]))
        lines[name] = line(lags, (frame_change(x, lag) for lag in lags))
    return lines


def error_by_frame(true: Tensor, drawn: list[Drawn], window: int) -> dict[str, Line]:
    """Lines (frame, change from what truly followed, standard error) of warm starts and of two rules of thumb.

    The rules: the last given frame, repeated; and another person's frame. A draw is not the mean of all draws: one that
    is right in law differs from the truth sqrt(2) times as much as that mean.
    """
    people = min(len(d.x) for d in drawn) if drawn else len(true)
    guesses = {d.name: (d.x, d.first) for d in drawn if d.mode in ("warm", "noised start")}
    rest = true[:, window:]
    guesses["last given frame"] = (true[:people, window - 1 : window].expand(-1, rest.shape[1], -1, -1, -1), window)
    guesses["another person"] = (rest.roll(1, 0), window)
    lines = {}
    for name, (x, first) in guesses.items():
        known = true[: len(x), first : first + x.shape[1]]
        if not known.shape[1]:
            continue
        values = change(x[:, : known.shape[1]], known).T
        lines[name] = line(range(first + 1, first + 1 + len(values)), values)
    return lines


def signal_by_frame(true: Tensor, drawn: list[Drawn]) -> dict[str, Line]:
    """Lines (frame, mean magnitude, standard error) of true and drawn sequences: does anything drift?"""
    sequences = {"held-out people": (true, 0)} | {d.name: (d.x, d.first) for d in drawn}
    lines = {}
    for name, (x, first) in sequences.items():
        values = x.abs().flatten(2).mean(2).T
        lines[name] = line(range(first + 1, first + 1 + len(values)), values)
    return lines


@torch.no_grad()
def bill_table(prior: SequencePrior, drawn: list[Drawn], true: Tensor, seed: int = 0) -> list[dict[str, object]]:
    """What a frame of each mode cost: network evaluations, operations, seconds.

    Operations are those of one evaluation for one new frame when the window is full (and slides), counted, not timed;
    multiply-add = 2.
    """
    rows, counted, x = [], {}, prior.encode(true[:1, : prior.window], seed)
    for d in drawn:
        at_once, alone = d.mode == "retrospective", d.mode == "first stage"
        if (kind := (d.context, at_once, alone)) not in counted:
            noisy, level = (x if at_once else x[:, -1]), torch.ones(1, device=x.device)
            with network_of(prior.D).attending(d.context), FlopCounterMode(display=False) as counter:
                prior.D(noisy, level, None if alone else x)
            counted[kind] = counter.get_total_flops() / 1e9 / (prior.window if at_once else 1)
        frames, gflop = d.x.shape[1], counted[kind]
        calls = d.bill.denoiser_calls / (1 if at_once else frames)
        rows.append(
            {
                "mode": d.name,
                "frames": frames,
                "evaluations a frame": calls,
                "GFLOP an evaluation": gflop,
                "GFLOP a frame": calls * gflop,
                "seconds a frame": d.bill.seconds / frames,
            }
        )
    return rows
