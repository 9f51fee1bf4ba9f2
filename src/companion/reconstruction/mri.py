"""Reconstructions without a learned prior: what a diffusion posterior has to beat.

All are called alike, `method(y, maps, mask, regularisation, iterations)`: y complex `(batch, coil, *space)`,
maps `(coil, *space)` or `(batch, coil, *space)`, mask broadcastable to space, of zeros and ones. All return a
complex image `(batch, 1, *space)`. The regularisation weighs against |A x - y|^2 / 2, so it scales with the
image: the defaults suit images of magnitude about 1. Tune it on validation cases with `tune`.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from companion.data.cfl import read_cfl, write_cfl
from companion.evaluation.metrics import psnr
from companion.operators.linear import check_finite
from companion.operators.masks import CartesianMask
from companion.operators.mri import Sense, sense
from companion.operators.solve import conjugate_gradient


def zero_filled(y: Tensor, maps: Tensor, mask, regularisation=None, iterations=None) -> Tensor:
    """A^H y: the coil-combined image with zeros for what was not measured. The last two arguments do
    nothing."""
    return _operator(y, maps, mask).H(y)


def cg_sense(y: Tensor, maps: Tensor, mask, regularisation: float = 0.01, iterations: int = 50) -> Tensor:
    """The minimum of |A x - y|^2 / 2 + regularisation |x|^2 / 2, by conjugate gradients. Pruessmann et al.
    2001."""
    A = _operator(y, maps, mask)
    return conjugate_gradient(lambda x: A.normal(x) + regularisation * x, A.H(y), iterations=iterations, tol=1e-6)


def l1_wavelet(y: Tensor, maps: Tensor, mask, regularisation: float = 0.001, iterations: int = 100) -> Tensor:
    """The minimum of |A x - y|^2 / 2 + regularisation |W x|_1, db4 wavelets, by FISTA (sigpy).

    From the zero-filled image, 100 iterations are within 0.1 dB of the minimum at R = 4; at R = 8 they stop
    early, which for this penalty is better than the minimum (by 0.6 dB on the embedded cohort). Lustig et al.
    2007.
    """
    from sigpy.mri.app import L1WaveletRecon

    def solve(y, maps, mask, start, bound):
        return L1WaveletRecon(
            y, maps, regularisation, mask, x=start, alpha=1 / bound, max_iter=iterations, show_pbar=False
        ).run()

    return _per_item(solve, y, maps, mask)


def total_variation(y: Tensor, maps: Tensor, mask, regularisation: float = 0.001, iterations: int = 150) -> Tensor:
    """The minimum of |A x - y|^2 / 2 + regularisation |grad x|_1, by primal-dual steps (sigpy). Block et al.
    2007.

    sigpy's own step sizes need thousands of iterations, because the dual variables (at most `regularisation`)
    are so much smaller than the image; these balance the two and converge to 0.1 dB in about 150.
    """
    from sigpy.mri.app import TotalVariationRecon

    def solve(y, maps, mask, start, bound):
        dual = 0.6 * (regularisation / max(np.abs(start).max(), 1e-12)) ** 0.5
        primal = 1 / (dual * (bound + 4 * start.ndim))  # |A|^2 + |grad|^2 <= bound + 4 ndim
        return TotalVariationRecon(
            y,
            maps,
            regularisation,
            mask,
            x=start,
            sigma=dual,
            tau=primal,
            max_iter=iterations,
            show_pbar=False,
        ).run()

    if not regularisation > 0:
        raise ValueError(f"total_variation needs a positive regularisation, got {regularisation}; else use cg_sense")
    return _per_item(solve, y, maps, mask)


def bart_pics(
    y: Tensor, maps: Tensor, mask, regularisation: float = 0.001, iterations: int = 100, timeout: float = 600.0
) -> Tensor:
    """The minimum of |A x - y|^2 / 2 + regularisation |W x|_1 by `bart pics -l1`, the program of the BART toolbox.

    As `l1_wavelet`, with its shorter wavelets (Daubechies 2) and random shifts. `-w 1` switches off its own scaling of
    the data, so that the regularisation means the same here and there. timeout: seconds for each item. Called as its
    documentation says; tested only with a stand-in, so compare with `l1_wavelet` when it first runs somewhere.

    Raises FileNotFoundError when `bart` is not on PATH, TimeoutError, and RuntimeError with its message when it fails
    or leaves no image of the right size. [uecker2015].
    """
    program = shutil.which("bart")
    if program is None:
        raise FileNotFoundError(
            "the program `bart` is not on PATH; install BART (https://mrirecon.github.io/bart) or do without it"
        )

    def solve(y, maps, mask, start, bound):
        options = ["-l1", "-r", regularisation, "-i", iterations, "-w", 1, "-s", f"{0.95 / bound:.6g}", "-p", "pattern"]
        with tempfile.TemporaryDirectory(prefix="bart-") as folder:
            for name, array in (("kspace", y), ("maps", maps), ("pattern", mask[None])):
                write_cfl(Path(folder, name), _to_bart(array))
            command = [program, "pics", *map(str, options), "kspace", "maps", "image"]
            return _from_bart(run_bart(command, folder, timeout), start)

    return _per_item(solve, y, maps, mask)


def _to_bart(array: np.ndarray) -> np.ndarray:
    """(coil, *space) in BART's order: readout y, phase encoding x and z, coil."""
    array = array if array.ndim == 4 else array[:, None]
    return array.transpose(2, 3, 1, 0)


def run_bart(command: list[str], folder: str, timeout: float) -> np.ndarray:
    """The array `image` that a BART command leaves in its folder, with BART's dimensions.

    Raises TimeoutError, and RuntimeError with what BART said when it fails or leaves no image.
    """
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"`bart pics` did not finish within {timeout:g} s; allow more time") from None
    said = " | ".join((done.stdout + done.stderr).strip().splitlines()[-5:]) or "nothing"
    if done.returncode:
        raise RuntimeError(f"`bart pics` failed with status {done.returncode}; it said: {said}")
    try:
        return read_cfl(Path(folder, "image")).numpy()
    except (FileNotFoundError, ValueError) as error:
        raise RuntimeError(f"`bart pics` left no usable image: {error}; it said: {said}") from error


def _from_bart(image: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The image in BART's order, shaped like `like`, ([z,] y, x)."""
    z, y, x = (1, *like.shape)[-3:]
    if image.shape[:3] != (y, x, z) or image.size != math.prod(like.shape):
        raise RuntimeError(f"`bart pics` left an image of shape {image.shape}; expected {(y, x, z)}")
    return image.reshape(y, x, z).transpose(2, 0, 1).reshape(like.shape)


METHODS: dict[str, Callable[..., Tensor]] = {
    "zero-filled": zero_filled,
    "CG-SENSE": cg_sense,
    "L1-wavelet": l1_wavelet,
    "TV": total_variation,
}


BART = "BART l1-wavelet"
NAMES = (*METHODS, BART)  # of all classical methods, whether they can run here or not


def available_methods() -> dict[str, Callable[..., Tensor]]:
    """METHODS, and BART where the program `bart` is on PATH."""
    return METHODS | ({BART: bart_pics} if shutil.which("bart") else {})


@dataclass(frozen=True)
class Tuned:
    """The best `regularisation`, and the mean PSNR in dB on the cases for each value of `grid`."""

    regularisation: float
    grid: tuple[float, ...]
    psnr: tuple[float, ...]


def tune(
    method: Callable[..., Tensor],
    cases: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]],
    grid: Sequence[float],
    iterations: int | None = None,
) -> Tuned:
    """The regularisation of `grid` with the best mean PSNR on validation cases (y, maps, mask, truth).

    PSNR of magnitudes, peak = max of each truth. A best value at an end of the grid gives a UserWarning: the
    baseline may be better than it looks, so extend the grid.
    """
    cases, grid = list(cases), tuple(sorted(float(v) for v in grid))
    if not cases or not grid:
        raise ValueError(f"tuning needs cases and values, got {len(cases)} cases and {len(grid)} values")
    extra = {} if iterations is None else {"iterations": iterations}

    def score(value: float) -> float:
        scores = [psnr(method(y, maps, mask, regularisation=value, **extra), truth) for y, maps, mask, truth in cases]
        return torch.cat(scores).mean().item()

    scores = tuple(score(value) for value in grid)
    best = int(np.argmax(scores))
    if len(grid) > 1 and best in (0, len(grid) - 1):
        warnings.warn(
            f"{method.__name__}: the best regularisation {grid[best]:g} is at the end of the grid "
            f"{grid[0]:g}..{grid[-1]:g}; extend it",
            stacklevel=2,
        )
    return Tuned(grid[best], grid, scores)


def tune_all(cases: Iterable[tuple], grids: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """The regularisation of each available method of `grids` that is best on the cases, see `tune`; first zero-filled.

    Raises ValueError for a name that no method has.
    """
    if unknown := set(grids) - set(NAMES):
        raise ValueError(f"there is no method {', '.join(sorted(unknown))}; expected some of {', '.join(NAMES)}")
    methods, cases = available_methods(), list(cases)
    tuned = {name: tune(methods[name], cases, grid).regularisation for name, grid in grids.items() if name in methods}
    return {"zero-filled": None} | tuned


def reconstruct_all(y: Tensor, maps: Tensor, mask, tuned: Mapping[str, float | None]) -> dict[str, Tensor]:
    """The image of each method by name, with the regularisation that `tune_all` found."""
    methods = available_methods()
    return {name: methods[name](y, maps, mask, value) for name, value in tuned.items()}


def _operator(y: Tensor, maps: Tensor, mask) -> Sense:
    A = sense(maps, mask, ndim=y.ndim - 2)
    if y.ndim not in (4, 5) or y.shape[1:] != A.range_shape or not y.is_complex():
        raise ValueError(
            f"y must be complex (batch, {', '.join(map(str, A.range_shape))}) for these maps, got "
            f"{tuple(y.shape)} {y.dtype}"
        )
    check_finite(y, "y")
    return A


def _per_item(solve: Callable[..., Any], y: Tensor, maps: Tensor, mask) -> Tensor:
    """Run a sigpy solver for each batch item; sigpy's centred orthonormal Fourier transform is the same as
    ours."""
    mask = mask.mask if isinstance(mask, CartesianMask) else mask
    A = _operator(y, maps, mask)
    weights = A.mask.mask
    if not torch.all((weights == 0) | (weights == 1)):
        raise ValueError("this baseline takes masks of zeros and ones; whiten the k-space instead of weighting it")
    start = A.H(y)
    coils = maps.expand(y.shape).cpu().to(torch.complex64).numpy()
    weights = weights.expand(len(y), 1, *y.shape[2:])[:, 0].cpu().to(torch.float32).numpy()
    bounds = (np.abs(coils) ** 2).sum(1).reshape(len(y), -1).max(1)  # |A|^2 <= max_r sum_c |S_c(r)|^2
    samples = y.cpu().to(torch.complex64).numpy()
    firsts = start[:, 0].cpu().to(torch.complex64).numpy()
    images = [
        solve(samples[i] * weights[i], coils[i], weights[i], firsts[i].copy(), max(float(bounds[i]), 1e-12))
        for i in range(len(y))
    ]
    return torch.from_numpy(np.stack(images))[:, None].to(start)
