"""Classical reconstructions for any operator: the minimum of |A x - y|^2 / 2 + regularisation * penalty(x).

For several sets of coil maps, 3D and non-Cartesian data alike, because only A^H y and A^H A are used. x, `(batch, set,
*space)`, has a penalty for each set. The regularisation suits images of magnitude about 1 and scales with them.
`reconstruction.mri` holds the same penalties for Cartesian SENSE through sigpy.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from companion.data.cfl import write_cfl
from companion.operators.linear import LinearOperator
from companion.operators.mri import Sense
from companion.operators.noncartesian import NUFFT
from companion.operators.solve import conjugate_gradient
from companion.reconstruction.held_out import Blend, Split, tuned
from companion.reconstruction.mri import run_bart

Shape = tuple[int, ...]
FACTORS = (1.0, 2.0, 4.0, 8.0)  # of noise_std^1.5: regularisations that a scan chooses from
FITS, EDGE = 5, 0.3  # of `tv`: conjugate-gradient steps in each iteration; shrinkage, as a share of bright tissue


def cg(A: LinearOperator, y: Tensor, regularisation: float = 0.01, iterations: int = 50) -> Tensor:
    """The penalty |x|^2 / 2, by conjugate gradients. [pruessmann2001]."""
    return conjugate_gradient(lambda x: A.normal(x) + regularisation * x, A.H(y), iterations=iterations, tol=1e-6)


def tv(A: LinearOperator, y: Tensor, regularisation: float = 0.001, iterations: int = 25) -> Tensor:
    """The penalty sum |grad x|, isotropic, by ADMM (split Bregman). [block2007]; [goldstein2009], Section 4.2.

    iterations: of FITS conjugate-gradient steps each. 25 come within 0.1 dB of the minimum of a real head at R = 4 and
    8, on spokes too. Primal-dual steps need 400 for that, although 100 come within 0.2 % of the least objective: what
    is not measured moves by no more than the regularisation in each of them, and the image is 2 dB short.

    Raises ValueError when the regularisation is not positive.
    """
    if not regularisation > 0:
        raise ValueError(f"tv needs a positive regularisation, got {regularisation}; else use cg")
    axes = tuple(range(1 - len(A.domain_shape), 0))
    target, bound = A.H(y), largest_eigenvalue(A)
    x = conjugate_gradient(lambda v: A.normal(v) + 1e-3 * bound * v, target, iterations=4 * FITS)
    size = x.abs().flatten(1)
    top = size.kthvalue(math.ceil(0.99 * size.shape[1]), 1).values.reshape(-1, *[1] * len(A.domain_shape))
    step = EDGE * top.clamp_min(torch.finfo(top.dtype).tiny)  # differences up to it are smoothed away by one shrinkage
    weight = regularisation / step
    grad = _gradient(x, axes)
    u = torch.zeros_like(grad)
    for _ in range(iterations):
        s = grad + u
        z = s * (1 - step / s.abs().square().sum(0).sqrt().clamp_min(1e-30)).clamp_min(0)
        u = s - z
        b = target + weight * _divergence(z - u, axes)
        x = conjugate_gradient(
            lambda v: A.normal(v) + weight * _divergence(_gradient(v, axes), axes), b, x0=x, iterations=FITS
        )
        grad = _gradient(x, axes)
    return x


def wavelet(
    A: LinearOperator,
    y: Tensor,
    regularisation: float = 0.001,
    iterations: int = 100,
    wave: str = "db2",
    seed: int = 0,
) -> Tensor:
    """The penalty |W x|_1 with an orthonormal wavelet transform, by FISTA. [lustig2007]; [beck2009].

    Each iteration shrinks a randomly shifted image, which stands in for a transform without a grid of its own and is
    worth 0.5 to 1.3 dB of a head. [figueiredo2003]. seed: of the shifts, and so the result has one.
    """
    from sigpy.wavelet import fwt, get_wavelet_shape, iwt

    space = A.domain_shape[1:]
    axes = tuple(range(-len(space), 0))
    target, bound = A.H(y), largest_eigenvalue(A)
    _, slices = get_wavelet_shape(space, wave_name=wave)
    rng = np.random.default_rng(seed)

    def shrink(x: Tensor) -> Tensor:
        shift = [int(rng.integers(n)) for n in space]
        out = []
        for image in x.roll(shift, axes).reshape(-1, *space).cpu().numpy():
            coefficients = fwt(image, wave_name=wave)
            size = np.abs(coefficients)
            coefficients *= np.maximum(1 - regularisation / bound / np.maximum(size, 1e-12), 0)
            out.append(iwt(coefficients, space, slices, wave_name=wave))
        return torch.from_numpy(np.stack(out)).reshape(x.shape).to(x).roll([-n for n in shift], axes)

    x = momentum = target / bound
    t = 1.0
    for _ in range(iterations):
        new = shrink(momentum - (A.normal(momentum) - target) / bound)
        t, before = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
        x, momentum = new, new + (before - 1) / t * (new - x)
    return x


def blend(split: Split, noise_std: float) -> Blend:
    """The mixture of total variation and wavelets that held-out samples ask for, each with the best of FACTORS."""
    settings = [factor * noise_std**1.5 for factor in FACTORS]
    return Blend.of(split, *(tuned(split, method, settings) for method in (tv, wavelet)))


METHODS: dict[str, Callable[..., Tensor]] = {"CG": cg, "L1-wavelet": wavelet, "TV": tv}


def bart_pics(
    A: LinearOperator,
    y: Tensor,
    maps: Tensor,
    regularisation: float = 0.001,
    iterations: int | None = None,
    penalty: str = "W",
    timeout: float = 600.0,
) -> Tensor:
    """What `bart pics` makes of a single slice y `(1, coil, *k-space)`, an image `(1, set, *space)`.

    maps: (set, coil, *space), the maps within A. penalty: W for l1-wavelet, T for total variation. iterations: 100, of
    total variation 400, without which it is 1 to 2 dB short. `-w 1` switches off BART's own scaling of the data.
    Raises FileNotFoundError when `bart` is not on PATH, ValueError for other operators than Sense, on the grid or off
    it, and as `run_bart` does. [uecker2015].
    """
    program = shutil.which("bart")
    if program is None:
        raise FileNotFoundError("the program `bart` is not on PATH; install BART (https://mrirecon.github.io/bart)")
    space = maps.shape[2:]
    F = getattr(A, "outer", None)
    options = ["-S", "-R", f"{penalty}:{2 ** (3 if len(space) == 3 else 2) - 1}:0:{regularisation}"]
    iterations = (400 if penalty == "T" else 100) if iterations is None else iterations
    options += ["-i", iterations, "-w", 1] + (["-u", 1] if penalty == "T" else [])
    with tempfile.TemporaryDirectory(prefix="bart-") as folder:
        if isinstance(F, NUFFT):
            write_cfl(Path(folder, "kspace"), y[0].mT[None, :, None])  # 1, sample, 1, coil
            k = torch.zeros(3, len(F.trajectory))
            k[: len(space)] = F.trajectory[:, _bart_axes(len(space))].mT
            write_cfl(Path(folder, "trajectory"), k)
            options += ["-t", "trajectory", "-e"]  # its steps are right for operators of norm 1, which gridding is not
        elif isinstance(A, Sense):
            write_cfl(Path(folder, "kspace"), _to_bart(y[0]))
            mask = A.mask.mask
            pattern = mask.expand(A.range_shape) if mask.ndim <= len(space) else mask[0]
            write_cfl(Path(folder, "pattern"), _to_bart(pattern[:1]))
            options += ["-p", "pattern"]
        else:
            raise ValueError(f"`bart pics` is for Sense, on the grid or with a NUFFT; got {type(A).__name__}")
        write_cfl(Path(folder, "maps"), torch.stack([_to_bart(m) for m in maps], -1))
        image = run_bart([program, "pics", *map(str, options), "kspace", "maps", "image"], folder, timeout)
    image = torch.from_numpy(image).reshape(*_to_bart(maps[0]).shape[:3], len(maps))  # dimension 4 holds the sets
    return image.permute(3, 2, 0, 1).reshape(1, len(maps), *space)


def _bart_axes(ndim: int) -> list[int]:
    """The space axes in BART's order: y, x and then z."""
    return [0, 1] if ndim == 2 else [1, 2, 0]


def _to_bart(x: Tensor) -> Tensor:
    """(coil, [z,] y, x) in BART's order: y, x, z, coil."""
    return (x if x.ndim == 4 else x[:, None]).permute(2, 3, 1, 0)


def largest_eigenvalue(A: LinearOperator, iterations: int = 15, margin: float = 1.02, seed: int = 0) -> float:
    """The largest eigenvalue of A^H A, by power iteration, and a little more, so that steps of 1 / it are safe."""
    x = torch.randn(1, *A.domain_shape, dtype=A.domain_dtype, generator=torch.Generator().manual_seed(seed))
    x = x.expand(*A.batch_shape, *A.domain_shape) if A.batch_shape else x
    value = 1.0
    for _ in range(iterations):
        x = A.normal(x)
        value = torch.linalg.vector_norm(x).item()
        x = x / value
    return margin * value


def _gradient(x: Tensor, axes: Shape) -> Tensor:
    """Forward differences (axis, ...), zero at the last pixel."""
    return torch.stack([x.diff(dim=a, append=x.narrow(a, -1, 1)) for a in axes])


def _divergence(u: Tensor, axes: Shape) -> Tensor:
    """The adjoint of `_gradient`."""
    total = torch.zeros_like(u[0])
    for part, a in zip(u, axes, strict=True):
        inner = part.narrow(a, 0, part.shape[a] - 1)
        zero = torch.zeros_like(part.narrow(a, 0, 1))
        total = total - torch.cat([inner, zero], a).diff(dim=a, prepend=zero)
    return total
