"""Cases of the PET paper's physics: projector, sinograms, thinned counts, MLEM."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from companion.operators.counts import expected_deviance, poisson_deviance, thin
from companion.operators.linear import adjoint_error
from companion.operators.pet import ParallelBeam, Projector, column_normalised, sensitivity, with_counts
from companion.reconstruction.pet import mlem

from .ledger import Case, handles

EXACT = 1e-12  # projector, float64
SINGLE, DOUBLE = 1e-4, 1e-9  # MLEM, relative Euclidean error
STORAGES = ("sparse", "matrix-free")


def holds(case: Case, *names: str) -> bool:
    """Whether the manifest lists these tensors for this case."""
    return set(names) <= set(case.spec.get("tensors", {}))


def relative(ours: Tensor, reference: Tensor) -> Tensor:
    """|ours - reference| / |reference|."""
    ours, reference = ours.double().flatten(), reference.double().flatten()
    return torch.linalg.norm(ours - reference) / torch.linalg.norm(reference)


@handles(lambda case: holds(case, "row", "col", "length"))
def projector(case: Case) -> Iterator[tuple]:
    """Every chord length, by row and column; both ways of computing; sensitivity; adjoint."""
    io, size = case.io, case.spec["resolution"]
    beam = ParallelBeam.published(size)
    yield "shape", torch.tensor([beam.rays, size**2]), io["shape"], 0.0
    yield "thetas", torch.tensor(beam.angles, dtype=torch.float64), io["thetas"], EXACT
    shifts = (torch.arange(beam.bins, dtype=torch.float64) - (beam.bins - 1) / 2) * beam.bin_mm
    yield "shifts", shifts, io["shifts"], EXACT
    rays, pixels, lengths = Projector(beam).triplets()
    ours = torch.argsort(rays * size**2 + pixels)
    theirs = torch.argsort(io["row"].long() * size**2 + io["col"])
    yield "row", rays[ours], io["row"][theirs], 0.0
    yield "col", pixels[ours], io["col"][theirs], 0.0
    yield "length", lengths[ours], io["length"][theirs], EXACT
    dense = torch.zeros(beam.rays, size**2, dtype=torch.float64)
    dense[io["row"].long(), io["col"].long()] = io["length"]
    x = torch.rand(2, size**2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for storage in STORAGES:
        A = Projector(beam, storage)
        total = sensitivity(A, torch.float64).flatten()
        yield f"sensitivity ({storage})", total, io["sensitivity"], EXACT
        yield f"projection ({storage})", A(x.reshape(2, 1, size, size)).flatten(1), x @ dense.T, EXACT
        yield f"adjoint ({storage})", adjoint_error(A), 0.0, 1e-6


@handles(lambda case: holds(case, "sinogram_clean", "counts_low"))
def counts(case: Case) -> Iterator[tuple]:
    """Sinograms, the scale of counts, thinning, and MLEM in both precisions."""
    io, size = case.io, case.spec["resolution"]
    beam = ParallelBeam.published(size)
    A = column_normalised(Projector(beam), torch.float64)
    phantom = io["phantom"].double().reshape(1, 1, size, size)
    yield "sinogram_clean", A(phantom).flatten(), io["sinogram_clean"], EXACT
    scan = with_counts(A, phantom, case.spec["total_counts"])
    yield "sinogram_expected", scan(phantom).flatten(), io["sinogram_expected"], DOUBLE
    high, low = (io[f"counts_{dose}"].double().reshape(1, *beam.sinogram_shape) for dose in ("high", "low"))
    yield from likely(scan(phantom), high, low, case.spec["thinning"])
    for dose, y in (("high", high), ("low", low)):
        yield from reconstructions(case, dose, y)


def likely(expected: Tensor, high: Tensor, low: Tensor, fraction: float) -> Iterator[tuple]:
    """Random counts are not ours to repeat: their deviance and spread must be those of chance."""
    bins = high.numel()
    chance = 5 * (2 / bins) ** 0.5
    deviance = poisson_deviance(high, expected) / expected_deviance(expected)
    yield "counts_high (deviance / expected)", deviance, torch.ones(1), chance
    ours = thin(high, fraction, [0])
    for name, kept in (("counts_low", low), ("counts_low (ours)", ours)):
        yield f"{name} <= counts_high", (kept > high).sum(), 0, 0.0
        z = (kept - fraction * high).sum() / (fraction * (1 - fraction) * high.sum()).sqrt()
        yield f"{name} (mean, in standard errors)", z, 0.0, 5.0
        spread = ((kept - fraction * high) ** 2).sum() / (fraction * (1 - fraction) * high).sum()
        yield f"{name} (variance / binomial)", spread, 1.0, chance


def reconstructions(case: Case, dose: str, y: Tensor) -> Iterator[tuple]:
    """mlem_<dose>_<k> (float32), mlem64_<dose>_<k> (float64), and the image scaled to [-1, 1]."""
    io, size = case.io, case.spec["resolution"]
    for bits, dtype, tolerance in (("", torch.float32, SINGLE), ("64", torch.float64, DOUBLE)):
        wanted = {int(name.rsplit("_", 1)[1]): name for name in io if re.fullmatch(rf"mlem{bits}_{dose}_\d+", name)}
        A = column_normalised(Projector(ParallelBeam.published(size)), dtype)
        iterates = {}
        x0 = torch.ones(1, 1, size, size, dtype=dtype)
        mlem(y.to(dtype), A, iterations=max(wanted), x0=x0, callback=iterates.__setitem__)
        for k, name in sorted(wanted.items()):
            yield name, relative(iterates[k], io[name]), 0.0, tolerance
        if not bits:
            last = iterates[max(wanted)]
            yield f"image_{dose}", relative(last / (last.max() / 2) - 1, io[f"image_{dose}"]), 0.0, SINGLE
            yield f"counts of mlem_{dose}", last.double().sum() / y.sum(), 1.0, 1e-5
