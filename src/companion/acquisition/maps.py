"""Coil maps from the fully sampled centre of undersampled data: where it lies, and ESPIRiT with one or more sets.

The centre (autocalibration signal, ACS) is read off the mask, wherever it is and however wide along each axis. ESPIRiT
(Uecker et al. 2014) finds at every pixel the coil vectors that neighbouring k-space samples allow: one where the image
is S x, several where the field of view folds and two tissues share a pixel (soft SENSE).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from companion.operators.linear import check_finite
from companion.operators.mri import Shape, ifft

Box = tuple[tuple[int, int], ...]  # [first, last) along each space axis

WIDEST = 32  # samples of the centre that are used along an axis: more cost time and change little
CROP = 0.8  # eigenvalue below which a pixel has no coil vector
FOLDED = 0.02  # share of the energy where a second coil vector exists, above which there are two sets


def echo_of(kspace: Tensor, ndim: int = 2) -> Shape:
    """The index of the peak of energy of k-space `(..., coil, *space)`, summed over all but space."""
    energy = kspace.abs().square().flatten(0, -ndim - 1).sum(0)
    if not energy.any():
        raise ValueError("all of k-space is zero; check the file and its mask")
    return tuple(int(i) for i in torch.unravel_index(energy.argmax(), energy.shape))


def centre_of_mask(mask: Tensor, echo: Shape, widest: int = WIDEST) -> Box:
    """The fully sampled box around the echo: `[first, last)` along each axis of mask (*space), zero = not measured.

    It grows from the echo by one sample a side in turn while all of the new side is measured, to at most `widest`
    samples an axis: near a square within a disc, a band across undersampled lines. Raises ValueError when the echo
    itself was not measured.
    """
    measured = mask != 0
    if not measured[tuple(echo)]:
        raise ValueError(
            f"sample {tuple(echo)}, the echo, is not measured, so there is no centre; give maps or calibration"
        )
    box = [[e, e + 1] for e in echo]
    growing = True
    while growing:
        growing = False
        for axis, (n, side) in enumerate(zip(measured.shape, box, strict=True)):
            for end in (0, 1):
                new = side[0] - 1 if end == 0 else side[1]
                face = tuple(new if a == axis else slice(*s) for a, s in enumerate(box))
                if 0 <= new < n and side[1] - side[0] < widest and measured[face].all():
                    side[end] = new + end
                    growing = True
    return tuple((first, last) for first, last in box)


@dataclass(frozen=True, eq=False)
class Maps:
    """Coil maps (set, coil, *space) complex64, unit sum of squares over coils, or zero where a set has none.

    eigenvalues: (set + 1, *space), largest first; the last belongs to the set left out. 1 where the coil vector
    explains neighbouring samples wholly. folded: share of the image's energy in pixels with a second vector.
    """

    maps: Tensor = field(repr=False)
    eigenvalues: Tensor = field(repr=False)
    folded: float
    kernel: Shape


def espirit(
    centre: Tensor,
    shape: Shape,
    sets: int | None = None,
    kernel: int | None = None,
    crop: float = CROP,
    air: float = 0.0,
    threshold: float = 0.02,
    noise_std: float = 0.0,
    phase: str = "image",
    first: Shape | None = None,
) -> Maps:
    """ESPIRiT coil maps on a grid `shape` from the fully sampled centre `(coil, *box)` of k-space.

    sets: 1, 2, ...; None decides: 2 when a share FOLDED of the energy lies where the second eigenvalue exceeds `crop`
    (.0004 of a head within its field of view, .06 to .8 of folded ones), else 1. Several sets are turned so that the
    first holds all of the low-resolution image, and the others what only finer detail brings.
    first: frequency of the first sample of the centre along each axis, by default -(width // 2).
    kernel: width in samples, at most 6 and a third of the centre (by default; 3 at least). threshold: singular values
    of the calibration matrix below this share of the largest are noise, and so are those that white noise of deviation
    noise_std (per real component) would have.
    crop: eigenvalue below which a pixel has no vector in the second set; air: the same for the first, by default never,
    so that the data say of air that it is empty, where a sampler would otherwise draw what its prior likes to see.
    phase: "image", the image loses the phase of its low-resolution version, with it any ramp of an echo off the
    centre; "coil", it has the phase of the first coil.
    Raises ValueError when the centre is too small or holds no signal. Uecker et al. 2014.
    """
    ndim, coils = len(shape), len(centre)
    check_finite(centre, "the calibration centre")
    widths = centre.shape[1:]
    taps = tuple(min(w, kernel or min(6, max(3, w // 3))) for w in widths)
    if centre.ndim != ndim + 1 or min(widths) < 3 or any(w > n for w, n in zip(widths, shape, strict=True)):
        raise ValueError(
            f"a calibration centre of {tuple(widths)} samples for an image of {tuple(shape)}: need at least 3 along "
            "each axis (12 are good); measure more centre lines or give maps"
        )
    image = low_resolution(centre, shape, first)
    if coils == 1:
        one = torch.ones_like(image)[None]
        values = torch.stack([one.real[0, 0], 0 * one.real[0, 0]])
        return Maps(_with_phase(one, image, phase), values, 0.0, taps)
    space = _signal_space(centre, taps, threshold, noise_std)
    kept = min(coils, 2 if sets is None else sets)
    values, vectors = _eigenmaps(_correlations(space, coils, taps), shape, min(kept + 1, coils))
    if not (values[0] > crop).any():
        raise ValueError(
            f"ESPIRiT finds no coil maps in a centre of {tuple(widths)} samples with kernel {taps} and crop {crop}; "
            "use a wider centre (12 or more), a smaller kernel or a lower crop"
        )
    energy = image.abs().square().sum(0)
    folded = (energy[values[1] > crop].sum() / energy.sum()).item()
    kept = (2 if folded > FOLDED else 1) if sets is None else kept
    least = torch.tensor([air] + [crop] * (kept - 1)).to(values)
    maps = vectors[:kept] * (values[:kept] > least.reshape(-1, *[1] * ndim))[:, None]
    maps = _turned(maps, image) if kept == 2 else maps
    return Maps(_with_phase(maps, image, phase), values[: kept + 1], folded, taps)


def low_resolution(centre: Tensor, shape: Shape, first: Shape | None) -> Tensor:
    """The coil images (coil, *shape) of the centre alone, whose first sample has the frequency `first`."""
    widths = centre.shape[1:]
    first = tuple(-(w // 2) for w in widths) if first is None else first
    padded = centre.new_zeros(len(centre), *shape, dtype=torch.complex64)
    place = tuple(slice(n // 2 + f, n // 2 + f + w) for n, f, w in zip(shape, first, widths, strict=True))
    padded[(slice(None), *place)] = centre.to(torch.complex64)
    return ifft(padded, len(shape))


def _turned(maps: Tensor, image: Tensor) -> Tensor:
    """Two sets (2, coil, *space) that span the same, the first along the image (coil, *space) where both exist."""
    both = (maps != 0).any(1).all(0)
    first = ((maps.conj() * image).sum(1, keepdim=True) * maps).sum(0)  # the image, projected
    first = first / first.abs().square().sum(0).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    a, b = (maps.conj() * first).sum(1)  # first = a maps[0] + b maps[1], so the rest is along (-b*, a*)
    second = -b.conj() * maps[0] + a.conj() * maps[1]
    return torch.where(both, torch.stack([first, second]), maps)


def _with_phase(maps: Tensor, image: Tensor, phase: str) -> Tensor:
    if phase not in ("image", "coil"):
        raise ValueError(f"phase {phase!r} is unknown; use image or coil")
    turn = (maps[:1].conj() * image).sum(1, keepdim=True).sgn() if phase == "image" else maps[:, :1].conj().sgn()
    return maps * torch.where(turn == 0, 1, turn)


def _signal_space(centre: Tensor, taps: Shape, threshold: float, noise_std: float) -> Tensor:
    """The projection (coil * taps, coil * taps) onto what patches of k-space look like."""
    patches = centre.to(torch.complex64)
    for axis, k in enumerate(taps):
        patches = patches.unfold(1 + axis, k, 1)
    ndim = len(taps)
    rows = patches.movedim(0, ndim).flatten(0, ndim - 1).flatten(1)  # (patch, coil * taps)
    gram = (rows.mH @ rows).to(torch.complex128)
    values, vectors = torch.linalg.eigh(gram)
    # largest singular value of white noise of variance 2 noise_std^2 (Marchenko & Pastur)
    bound = 2**0.5 * noise_std * (rows.shape[0] ** 0.5 + rows.shape[1] ** 0.5)
    floor = max(threshold**2 * values[-1].item(), bound**2)
    signal = vectors[:, values > floor].conj()  # rows are patches, so the row space is that of conjugated vectors
    if not signal.shape[1]:
        raise ValueError("the calibration centre holds nothing but noise; check the noise covariance or give maps")
    return (signal @ signal.mH).to(torch.complex64)


def _correlations(space: Tensor, coils: int, taps: Shape) -> Tensor:
    """R (coil, coil, 2 k - 1, ...): the projection summed along equal distances of its taps, / number of taps."""
    full = space.reshape(coils, *taps, coils, *taps)
    ndim = len(taps)
    full = full.permute(0, ndim + 1, *[a for i in range(ndim) for a in (1 + i, ndim + 2 + i)])
    total = full / torch.tensor(taps).prod()
    for axis, k in enumerate(taps):  # sum over pairs (o, o') with o - o' = d, one axis after the other
        pairs = total.movedim((2 + axis, 3 + axis), (-2, -1))
        sums = [pairs.diagonal(-d, -2, -1).sum(-1) for d in range(1 - k, k)]
        total = torch.stack(sums, -1).movedim(-1, 2 + axis)
    return total


def _eigenmaps(correlations: Tensor, shape: Shape, count: int, chunk: int = 16384) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues (count, *shape) and their vectors (count, coil, *shape) of the matrix of each
    pixel, sum_d R(d) exp(2 pi i d x), made and solved in chunks so that memory stays small."""
    coils, taps = len(correlations), [(n + 1) // 2 for n in correlations.shape[2:]]
    device = correlations.device
    waves = []
    for n, k in zip(shape, taps, strict=True):
        x = (torch.arange(n, device=device) - n // 2).double() / n
        d = torch.arange(1 - k, k, device=device).double()
        waves.append(torch.polar(torch.ones_like(x)[:, None] * torch.ones_like(d), 2 * torch.pi * torch.outer(x, d)))
    waves = [w.to(torch.complex64) for w in waves]
    lead = 1
    for n in shape[:-1]:
        lead *= n
    rows = max(1, chunk // shape[-1])
    values, vectors = [], []
    flat = correlations.flatten(0, 1)  # (coil^2, d...)
    for first in range(0, lead, rows):
        index = torch.unravel_index(torch.arange(first, min(first + rows, lead), device=device), shape[:-1])
        part = flat
        if len(shape) == 3:
            part = torch.einsum("cdef,rd,re->rcf", flat, waves[0][index[0]], waves[1][index[1]])
        else:
            part = torch.einsum("cdf,rd->rcf", flat, waves[0][index[0]])
        matrices = (part @ waves[-1].mT).mT.unflatten(-1, (coils, coils))  # (row, x, coil, coil)
        w, v = torch.linalg.eigh(matrices)
        values.append(w[..., -count:].flip(-1))
        vectors.append(v[..., -count:].flip(-1))
    values, vectors = torch.cat(values), torch.cat(vectors)  # (row, x, count), (row, x, coil, count)
    values = values.movedim(-1, 0).reshape(count, *shape)
    return values, vectors.permute(3, 2, 0, 1).reshape(count, coils, *shape)
