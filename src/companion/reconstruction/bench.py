"""A posterior sampler of anybody's, entered into one bench: what it draws against what is known.

    entry = read_entry("my_sampler.py")
    row = run(entry, Settings())              # one row: exact posteriors, ranks, virtual people, real heads if given

The file defines one function, whose arguments are passed by name; it takes those that it wants (or **others):

    def sample(D, A, y, noise_std, seeds, calls, images): -> draws (draw, *A.domain_shape), one a seed
    def guidance(A, y, noise_std, D, images):             -> a companion guidance, sampled with SOLVER ("dpmpp_2m")

D: the prior, D(x, sigma) -> E[x0 | x], complex images (batch, 1, y, x), with `moments` where it knows its error.
A: the operator, A(x), A.H(y), A.normal(x). y: data (1 or draw, *A.range_shape), one scan or one for each draw.
noise_std: of each real component. seeds: ints; a draw's noise must depend on its own alone. calls: evaluations of D a
draw. images: validation images (image, 1, y, x), never those that are tested on; none for real heads. NAME, a text, is
the name of the row.

Every entry has the same priors, operators, data, seeds and budget, and evaluations are counted. Where the file has a
GRID, {"step_size": (0.3, 1, 3)}, of further arguments of its function, each prior's best are taken: those of the lowest
energy score, which only the posterior itself makes least [gneiting2007], on scans of a few of `images`.
"""

from __future__ import annotations

import importlib.util
import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from companion.data import anatomy
from companion.data.heads import dead_leaves
from companion.data.intake.look import find
from companion.data.upright import head_slices
from companion.data.virtual import slices
from companion.diffusion.denoisers import AnySize, Denoiser, moments_of
from companion.diffusion.noise import karras
from companion.diffusion.sampling import Samples, sample
from companion.evaluation import conformal, metrics, ranks
from companion.evaluation.intervals import Drawn, intervals
from companion.evaluation.known_posterior import Problem, make_problem, score
from companion.files import sha256
from companion.models.architectures import network_of
from companion.models.checkpoint import load_denoiser
from companion.operators.linear import LinearOperator
from companion.operators.masks import cartesian_mask
from companion.operators.mri import birdcage_maps, sense
from companion.randomness import randn

FIRST_SIGMA = 5.0  # an image is invisible in it
TUNED_ON, TUNED_ON_EXACT, TUNING_DRAWS = 3, 32, 4  # validation images, small ones of exact priors, draws of each
FRACTION = 0.08  # of the peak: above it a pixel counts as of the person


@dataclass(frozen=True)
class Settings:
    """What an entry is asked; the defaults take a few minutes on one core.

    priors: exact ones, of known_posterior.PRIORS. size: of their images. draws: for mean and variance. cases: scans
    simulated for the ranks, of rank_draws draws each. people: virtual ones to test on, people_draws draws each, or 0;
    calibration: others, for conformal intervals, at least 9. heads: a folder of real heads, and slices of each.
    """

    calls: int = 25
    priors: tuple[str, ...] = ("gaussian", "mixture")
    size: int = 12
    draws: int = 128
    cases: int = 50
    rank_draws: int = 9
    weights: str = "brain/t1w"
    people: int = 6
    people_draws: int = 4
    calibration: int = 15
    image_size: int = 64
    acceleration: float = 4
    noise_std: float = 0.01
    heads: str | None = None
    head_slices: int = 2
    head_weights: str = "general/2d"
    seed: int = 0

    def __post_init__(self):
        least = {"calls": 2, "size": 8, "draws": 16, "cases": 20, "rank_draws": 4, "people": 0, "calibration": 9}
        low = [
            f"{name}={getattr(self, name)}"
            for name, n in (least | {"people_draws": 3}).items()
            if getattr(self, name) < n
        ]
        if low:
            raise ValueError(f"{', '.join(low)}: too few; the least are {least}, people_draws 3")


@dataclass(frozen=True)
class Entry:
    """A sampler by name: draw(**what the head of this module lists) -> draws (draw, *A.domain_shape).

    grid: values to try of further arguments; options: those chosen.
    """

    name: str
    draw: Callable[..., Tensor | Samples]
    sha256: str = ""
    grid: Mapping[str, Sequence] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)


def read_entry(path: str | Path) -> Entry:
    """The entry of a Python file, which is run: enter files that you trust.

    Raises FileNotFoundError, and ValueError for a file with neither or both of `sample` and `guidance`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a Python file with a function sample or guidance")
    spec = importlib.util.spec_from_file_location(f"entry_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {name: getattr(module, name) for name in ("sample", "guidance") if _own(module, name)}
    if len(found) != 1:
        raise ValueError(
            f"{path} defines {' and '.join(found) or 'neither sample nor guidance'}; define one of the two: "
            "sample(D, A, y, noise_std, seeds, calls) -> draws, or guidance(A, y, noise_std) -> a companion guidance"
        )
    ((kind, function),) = found.items()
    draw = function if kind == "sample" else guided(function, getattr(module, "SOLVER", "dpmpp_2m"))
    return Entry(getattr(module, "NAME", path.stem), draw, sha256(path), getattr(module, "GRID", {}))


def _own(module, name: str) -> bool:
    """Whether a module defines a function itself: an imported `sample` is a tool, not the entry."""
    return getattr(getattr(module, name, None), "__module__", None) == module.__name__


def guided(guidance: Callable, solver="dpmpp_2m") -> Callable[..., Samples]:
    """The entry of a guidance: `calls` evaluations between FIRST_SIGMA and half the noise, with a solver."""

    def draw(D, A, y, noise_std, seeds, calls, images, **options) -> Samples:
        D_y = _call(guidance, A=A, y=y, noise_std=noise_std, D=D, images=images, **options)(D)
        steps = max(2, round(calls / D_y.guidance.denoiser_calls))
        sigmas = karras(steps, noise_std / 2, FIRST_SIGMA)
        return sample(D_y, sigmas, shape=A.domain_shape, seeds=seeds, solver=solver, dtype=torch.complex64)

    return draw


def _call(function: Callable, **given):
    """The function with those of the arguments that it takes."""
    takes = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in takes):
        names = {p.name for p in takes}
        if missing := [p.name for p in takes if p.name not in given and p.default is p.empty]:
            raise ValueError(f"{function.__name__} asks for {', '.join(missing)}; the bench gives {', '.join(given)}")
        given = {name: value for name, value in given.items() if name in names}
    return function(**given)


# ----------------------------------------------------------------------------------------------------
# What is counted


class Counted:
    """A denoiser whose evaluations are counted, image by image; a gradient through one is another evaluation."""

    def __init__(self, D: Denoiser):
        self.D, self.images = D, 0

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return self._count(self.D(x, sigma, cond), x)

    def _count(self, out: Tensor, x: Tensor) -> Tensor:
        self.images += len(x)
        if out.requires_grad:
            out.register_hook(self._gradient)
        return out

    def _gradient(self, grad: Tensor) -> None:
        self.images += len(grad)

    def __getattr__(self, name: str):
        if name != "moments":
            raise AttributeError(name)
        moments = moments_of(self.D)  # an AttributeError where D has none

        def counted(x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
            mean, variance = moments(x, sigma, cond)
            return self._count(mean, x), variance

        return counted


@dataclass
class Draws:
    """Draws (draw, *shape) and what one of them cost."""

    x: Tensor
    denoiser_calls: float
    seconds: float


def draw(entry: Entry, D: Denoiser, A, y: Tensor, noise_std: float, seeds: Iterable[int], calls: int, images) -> Draws:
    """The entry's draws, checked and counted. Raises ValueError for another shape or number, or NaN."""
    counted, seeds, began = Counted(D), list(seeds), time.perf_counter()
    found = _call(
        entry.draw, D=counted, A=A, y=y, noise_std=noise_std, seeds=seeds, calls=calls, images=images, **entry.options
    )  # fmt: skip
    x = found.x if isinstance(found, Samples) else found
    if (
        not isinstance(x, Tensor)
        or tuple(x.shape) != (len(seeds), *A.domain_shape)
        or not torch.isfinite(x.abs()).all()
    ):
        what = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{entry.name} returned {what}; expected finite draws {(len(seeds), *A.domain_shape)}")
    return Draws(x.detach(), counted.images / len(seeds), (time.perf_counter() - began) / len(seeds))


# ----------------------------------------------------------------------------------------------------
# What is tuned


def tuned(
    entry: Entry, D: Denoiser, A: LinearOperator, noise_std: float, images: Tensor, calls: int, on: int = TUNED_ON
) -> Entry:
    """The entry with the options of its grid that have the lowest mean energy score on scans of the first images."""
    if not entry.grid:
        return entry
    truth, generator = images[:on], torch.Generator().manual_seed(4242)
    y = A(truth) + noise_std * randn((len(truth), *A.range_shape), truth.dtype, generator)
    y = y.repeat_interleave(TUNING_DRAWS, 0)
    scores = {}
    for values in product(*entry.grid.values()):
        one = replace(entry, options=dict(zip(entry.grid, values, strict=True)))
        x = draw(one, D, A, y, noise_std, range(90_000, 90_000 + len(y)), calls, images).x
        found = map(energy_score, x.unflatten(0, (len(truth), TUNING_DRAWS)), truth)
        scores[values] = sum(found) / len(truth)
    best = min(scores, key=lambda values: scores[values])
    return replace(entry, options=dict(zip(entry.grid, best, strict=True)))


def energy_score(draws: Tensor, truth: Tensor) -> float:
    """mean |x_i - truth| - mean |x_i - x_j| / 2 of draws (draw, ...), over pairs: the lower, the better."""
    n, flat = len(draws), draws.flatten(1)
    apart = (flat[:, None] - flat[None]).abs().square().sum(-1).sqrt().sum().item()
    return (flat - truth.flatten()).abs().square().sum(-1).sqrt().mean().item() - apart / (2 * n * (n - 1))


# ----------------------------------------------------------------------------------------------------
# What is asked


def run(entry: Entry, s: Settings, say: Callable[[str], None] = lambda text: None) -> dict:
    """One row: {"name", "sha256", "exact": {prior: ...}, "people": ..., "heads": ...} as asked, plain numbers."""
    row: dict = {"name": entry.name, "sha256": entry.sha256, "exact": {}}
    for name in s.priors:
        row["exact"][name] = exact(entry, s, name)
        say(f"{entry.name}, exact posterior, {name}: done")
    if s.people:
        row["people"] = people(entry, s)
        say(f"{entry.name}, virtual people: done")
    if s.heads:
        row["heads"] = heads(entry, s)
        say(f"{entry.name}, real heads: done")
    return row


def exact(entry: Entry, s: Settings, name: str) -> dict:
    """Mean, variance, coverage and cost against a posterior in closed form, and the ranks of simulated truths."""
    problem = make_problem(name, s.size, draws=1000)
    images = problem.images(32)
    entry = tuned(entry, problem.prior, problem.A, problem.noise_std, images, s.calls, TUNED_ON_EXACT)
    found = draw(entry, problem.prior, problem.A, problem.y, problem.noise_std, range(s.draws), s.calls, images)
    cost = {"denoiser_calls": found.denoiser_calls, "milliseconds": 1000 * found.seconds}
    return score(found.x, problem) | cost | _ranks(entry, s, problem, images) | {"options": dict(entry.options)}


def _ranks(entry: Entry, s: Settings, problem: Problem, images: Tensor) -> dict:
    generator = torch.Generator().manual_seed(s.seed + 77)
    truth = problem.truth.draw(s.cases, generator, torch.complex64)
    y = problem.A(truth)
    y = y + problem.noise_std * randn(y.shape, y.dtype, generator)
    seeds = range(10_000, 10_000 + s.cases * s.rank_draws)
    y = y.repeat_interleave(s.rank_draws, 0)
    x = draw(entry, problem.prior, problem.A, y, problem.noise_std, seeds, s.calls, images).x
    x = x.unflatten(0, (s.cases, s.rank_draws)).transpose(0, 1)
    directions = ranks.projections(problem.shape, 3, torch.complex64, s.seed)

    def numbers(images: Tensor) -> Tensor:  # the misfit sees what projections do not: data that were not used up
        misfit = (problem.A(images) - y[:: s.rank_draws]).abs().square().flatten(-len(problem.A.range_shape)).sum(-1)
        return torch.cat([ranks.along(images, directions), misfit[..., None]], -1)

    found = ranks.rank(numbers(truth), numbers(x))
    return {"ranks_p": ranks.all_uniform(found, s.rank_draws), "ranks": found.flatten().tolist()}


def people(entry: Entry, s: Settings) -> dict:
    """Virtual people of the prior's own cohort: image quality, calibration, intervals before and after conformal."""
    D = load_denoiser(s.weights)
    x = slices("test", s.people, s.image_size)
    others = slices("validation", s.calibration, s.image_size)
    A = sense(birdcage_maps((s.image_size,) * 2, 8), cartesian_mask(s.image_size, s.acceleration, acs=4).mask)
    entry = tuned(entry, D, A, s.noise_std, others, s.calls)
    tested, calibrated = (_slices(entry, D, A, images, others, s, seed) for images, seed in ((x, 0), (others, 5000)))
    return _quality(tested, calibrated) | {"options": dict(entry.options)}


def heads(entry: Entry, s: Settings) -> dict:
    """Real heads of a folder (any format that `companion look` knows), with the general prior; ValueError if none.

    Tuned, and the prior's error measured, on no head: virtual validation people and dead leaves in turn.
    """
    if s.heads is None:
        raise ValueError("heads are needed; give the folder of real heads")
    found = [
        item for item in find(Path(s.heads)).items if len(item.what.shape) >= 3 and min(item.what.shape[-3:]) >= 16
    ]
    if not found:
        raise ValueError(f"{s.heads} holds no volume of a head; companion look {s.heads} says what it holds")
    D = load_denoiser(s.head_weights)
    D = AnySize(D, network_of(D).total_stride)
    images = []
    for item in found:
        frame = {"frame": 0} if item.what.axes[0] == "t" else {}
        volume = item.reader.read((*item.files, *item.what.parts), **frame)
        images.append(head_slices(volume.array, volume.affine, "64", s.head_slices))
    x = anatomy.random_phase(torch.cat(images), torch.Generator().manual_seed(s.seed))
    A = sense(birdcage_maps((64, 64), 8), cartesian_mask(64, s.acceleration, acs=4).mask)
    others = people_and_leaves(s.calibration)
    entry = tuned(entry, D, A, s.noise_std, others, s.calls)
    return _quality(_slices(entry, D, A, x, others, s, 0)) | {"heads": len(found), "options": dict(entry.options)}


def people_and_leaves(count: int, size: int = 64) -> Tensor:
    """Complex images (count, 1, y, x), every other one a virtual validation person, the others dead leaves."""
    leaves = torch.stack([torch.from_numpy(dead_leaves(np.random.default_rng(i), size)) for i in range(count // 2)])
    images = [*slices("validation", count - count // 2, size)]
    for i, leaf in enumerate(anatomy.random_phase(leaves[:, None], torch.Generator().manual_seed(3))):
        images.insert(2 * i + 1, leaf)
    return torch.stack(images)


@dataclass
class Slices:
    """Truths (slice, 1, y, x), draws (draw, slice, 1, y, x), what a draw of a slice cost."""

    truth: Tensor
    draws: Tensor
    cost: dict = field(default_factory=dict)

    def drawn(self) -> Drawn:
        """The same, with where the person is."""
        size = self.truth.abs()
        return Drawn(self.truth, self.draws, size > FRACTION * size.amax((-1, -2), keepdim=True))


def _slices(entry: Entry, D, A: LinearOperator, x: Tensor, images: Tensor, s: Settings, seed: int) -> Slices:
    n, generator = s.people_draws, torch.Generator().manual_seed(s.seed + seed + 1)
    y = A(x) + s.noise_std * randn((len(x), *A.range_shape), torch.complex64, generator)
    found = [
        draw(entry, D, A, y[i : i + 1], s.noise_std, range(seed + i * n, seed + (i + 1) * n), s.calls, images)
        for i in range(len(x))
    ]
    cost = {
        "denoiser_calls": sum(f.denoiser_calls for f in found) / len(found),
        "milliseconds": 1000 * sum(f.seconds for f in found) / len(found),
    }
    return Slices(x, torch.stack([f.x for f in found], 1), cost)


def _quality(tested: Slices, calibrated: Slices | None = None) -> dict:
    """PSNR of the mean and of a draw, calibration, coverage of 90 % intervals inside the person."""
    drawn = tested.drawn()
    psnr = metrics.psnr(drawn.draws.mean(0), tested.truth)
    raw = conformal.pixel_coverage(*drawn.numbers("pixel")[:3], drawn.student("pixel"), drawn.mask)
    row = {
        "slices": len(psnr),
        "psnr": psnr.mean().item(),
        "psnr_draw": metrics.psnr(tested.draws[0], tested.truth).mean().item(),
        "calibration": metrics.calibration_ratio(tested.draws, tested.truth).mean().item(),
        "coverage": raw.mean().item(),
        "coverages": raw.tolist(),
        **tested.cost,
    }
    if calibrated is None:
        return row
    held = intervals(calibrated.drawn(), drawn)
    row |= {"conformal_factor": held["pixel"].factor, "conformal_coverage": held["pixel"].coverage}
    row |= {"conformal_coverages": list(held["pixel"].each), "conformal_width": held["pixel"].width}
    for name, kind in (("region", "region"), ("psnr", "PSNR")):
        row |= {f"{name}_{part}": getattr(held[kind], part) for part in ("raw", "factor", "coverage", "width")}
    return row
