"""The 3D projector is the matrix of its definition; counts are conserved; MLEM and OSEM run on it."""

import math

import numpy as np
import pytest
import torch

from companion.operators.counts import poisson_counts
from companion.operators.cylinder import Cylinder, Projector3D
from companion.operators.linear import Diagonal, adjoint_error
from companion.operators.pet import ParallelBeam, Projector, sensitivity, subset
from companion.reconstruction.pet import mlem, osem
from companion.reconstruction.rebinning import rebinned_model, ssrb

SMALL = {"shape": (5, 6, 7), "voxel_mm": (3.0, 4.0), "angles": 4, "bins": 5, "bin_mm": 5.0}
RING = {"rings": 3, "ring_mm": 5.0, "radius_mm": 60.0}
SCANNERS = {
    "all pairs": Cylinder(**SMALL, **RING),
    "span 3": Cylinder(**SMALL, **RING, span=3),
    "direct planes": Cylinder(**SMALL, **RING, max_difference=0),
    "no arc correction": Cylinder(**SMALL, **RING, arc_corrected=False),
    "TOF": Cylinder(**SMALL, **RING, tof_bins=5, tof_bin_mm=9.0, tof_fwhm_mm=12.0),
}


def written_out(c: Cylinder) -> np.ndarray:
    """The matrix (bin of the sinogram, voxel), one sample after another, from the definition of a line alone."""
    depth, height, width = c.shape
    steps = math.ceil(math.hypot(height, width)) + 1
    rows = []
    for k in range(c.tof_bins):
        for plane in c.planes:
            for angle in c.angles:
                for j in range(c.bins):
                    row = np.zeros(c.shape)
                    s = (j - (c.bins - 1) / 2) * c.bin_mm
                    s = s if c.arc_corrected else c.radius_mm * math.sin(s / c.radius_mm)
                    half = math.sqrt(c.radius_mm**2 - s**2)
                    for one, other in plane:
                        low, high = ((r - (c.rings - 1) / 2) * c.ring_mm for r in (one, other))
                        for i in range(steps):
                            t = (i - (steps - 1) / 2) * c.voxel_mm[1]
                            share = (t + half) / (2 * half)
                            place = np.array([low + share * (high - low), s * math.sin(angle) + t * math.cos(angle),
                                              s * math.cos(angle) - t * math.sin(angle)])  # fmt: skip
                            at = place / (c.voxel_mm[0], -c.voxel_mm[1], c.voxel_mm[1]) + (np.array(c.shape) - 1) / 2
                            length = math.hypot(2 * half, high - low) / (2 * half)
                            weight = length * c.voxel_mm[1]
                            if c.tof_bins > 1:
                                sigma = c.tof_fwhm_mm / 2.354820045
                                edges = [(k + e - c.tof_bins / 2) * c.tof_bin_mm for e in (0, 1)]
                                edges[0] = -math.inf if k == 0 else edges[0]
                                edges[1] = math.inf if k == c.tof_bins - 1 else edges[1]
                                parts = [math.erf((e - t * length) / sigma / math.sqrt(2)) / 2 for e in edges]
                                weight *= parts[1] - parts[0]
                            base = np.floor(at).astype(int)
                            for corner in np.ndindex(2, 2, 2):
                                voxel = base + corner
                                if (voxel >= 0).all() and (voxel < c.shape).all():
                                    row[tuple(voxel)] += weight * np.prod(1 - np.abs(at - voxel))
                    rows.append(row.ravel())
    return np.stack(rows)


@pytest.mark.parametrize("name", SCANNERS)
def test_projector_is_the_matrix_of_its_definition(name):
    c = SCANNERS[name]
    A, matrix = Projector3D(c), torch.from_numpy(written_out(c))
    x = torch.rand(2, *c.volume_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(A(x).flatten(1), x.flatten(1) @ matrix.T, rtol=1e-5, atol=1e-5)
    assert adjoint_error(A) < 1e-6
    some = subset(A, slice(1, None, 2))
    assert torch.equal(some(x), A(x)[..., 1::2, :])


@pytest.mark.parametrize("name", ["span 3", "TOF"])
def test_mlem_is_that_of_the_dense_matrix(name):
    """Fifteen iterations with attenuation and background, double precision, against the formula on the matrix."""
    c = SCANNERS[name]
    generator = torch.Generator().manual_seed(1)
    factors = 0.5 + torch.rand(1, *c.sinogram_shape, dtype=torch.float64, generator=generator)
    A = Diagonal(factors, c.sinogram_shape) @ Projector3D(c)
    matrix = factors.flatten()[:, None] * torch.from_numpy(written_out(c))
    truth = 3 * torch.rand(1, *c.volume_shape, dtype=torch.float64, generator=generator)
    r = torch.full((1, *c.sinogram_shape), 2.0, dtype=torch.float64)
    y = poisson_counts(A(truth) + r, [0])
    ours = mlem(y, A, r, iterations=15).x.flatten()
    x = torch.ones_like(ours) * mlem(y, A, r, iterations=0).x.max()
    for _ in range(15):
        x = x / matrix.sum(0) * (matrix.T @ (y.flatten() / (matrix @ x + r.flatten())))
    assert torch.allclose(ours, x, rtol=1e-5)


def test_counts_are_conserved_and_osem_climbs():
    c = SCANNERS["all pairs"]
    A = Projector3D(c)
    x = torch.rand(1, *c.volume_shape, generator=torch.Generator().manual_seed(0))
    y = poisson_counts(A(x), [0])
    found = mlem(y, A, iterations=5).x
    assert (sensitivity(A) * found).sum().item() == pytest.approx(y.sum().item(), rel=1e-5)
    fast = osem(y, A, iterations=3, subsets=2).x

    def likelihood(x):
        return (torch.xlogy(y, A(x)) - A(x)).sum()

    assert likelihood(fast) > likelihood(mlem(y, A, iterations=3).x)


def test_tof_bins_add_up_to_the_measurement_without():
    plain, tof = SCANNERS["all pairs"], SCANNERS["TOF"]
    x = torch.rand(1, *plain.volume_shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Projector3D(tof)(x).sum(2), Projector3D(plain)(x), rtol=1e-5)


def test_michelogram_order():
    c = Cylinder(**SMALL, rings=4, ring_mm=5.0, radius_mm=60.0, max_difference=2)
    assert [p[0] for p in c.planes] == [(0, 0), (1, 1), (2, 2), (3, 3), (0, 1), (1, 2), (2, 3), (1, 0), (2, 1), (3, 2),
                                        (0, 2), (1, 3), (2, 0), (3, 1)]  # fmt: skip
    spanned = Cylinder(**SMALL, rings=4, ring_mm=5.0, radius_mm=60.0, span=3)
    assert sum(map(len, spanned.planes)) == 16 and len({p for plane in spanned.planes for p in plane}) == 16
    assert spanned.planes[:3] == [[(0, 0)], [(1, 0), (0, 1)], [(1, 1)]]
    assert all(len({sum(p) for p in plane}) == 1 for plane in spanned.planes)


@pytest.fixture(scope="module")
def blob():
    """A scanner with fine steps, a smooth blob that is off the axis, and the blob's integral along any line."""
    c = Cylinder((20, 32, 32), (3.0, 3.0), 8, 32, 3.0, 10, 6.0, 120.0)
    z, y, x = torch.meshgrid(*[(torch.arange(n) - (n - 1) / 2) * 3.0 for n in c.shape], indexing="ij")
    centre, sigma = np.array([9.0, -6.0, 4.0]), 10.0  # x, y, z
    squared = (x - centre[0]) ** 2 + (-y - centre[1]) ** 2 + (z - centre[2]) ** 2
    return c, torch.exp(-squared / (2 * sigma**2))[None, None], centre, sigma


def test_lines_have_the_integrals_of_a_gaussian(blob):
    """The integral of a Gaussian along a line depends on its distance alone: geometry without our own projector."""
    c, x, centre, sigma = blob
    y = Projector3D(c)(x)[0, 0]
    exact = np.empty(y.shape)
    for p, ((first, last),) in enumerate(c.planes):
        for v, angle in enumerate(c.angles):
            for j in range(c.bins):
                s = (j - (c.bins - 1) / 2) * c.bin_mm
                half = math.sqrt(c.radius_mm**2 - s**2)
                cos, sin, middle = math.cos(angle), math.sin(angle), (c.rings - 1) / 2
                ends = [
                    np.array([s * cos - t * sin, s * sin + t * cos, (r - middle) * c.ring_mm])
                    for t, r in ((-half, first), (half, last))
                ]
                along = (ends[1] - ends[0]) / np.linalg.norm(ends[1] - ends[0])
                distance = np.linalg.norm(np.cross(centre - ends[0], along))
                exact[p, v, j] = math.exp(-(distance**2) / (2 * sigma**2)) * math.sqrt(2 * math.pi) * sigma
    assert np.abs(y.numpy() - exact).max() < 0.035 * exact.max()  # the blob leaves the volume at its lower end
    assert np.abs(y.numpy() - exact).mean() < 0.01 * exact.mean() + 1e-3 * exact.max()


def test_rebinning_keeps_counts_and_gives_slices(blob):
    c, x, _, _ = blob
    P = Projector3D(c)
    y = poisson_counts(20 * P(x), [0])
    slices = ssrb(y, c)
    assert slices.shape == (1, 1, 19, 8, 32) and slices.sum() == y.sum()
    A = 20 * rebinned_model(c)
    found = mlem(slices, A, iterations=30).x
    assert found.shape == (1, 1, 19, 32, 32)
    flat = found[0, 0].argmax().item()
    z, row, column = flat // 1024, flat % 1024 // 32, flat % 32
    assert abs((z - 9) * 3.0 - 4.0) < 4 and abs((column - 15.5) * 3 - 9) < 4 and abs((15.5 - row) * 3 + 6) < 4
    assert found.max().item() == pytest.approx(1, abs=0.25)
    beam = ParallelBeam((1, 32, 32), c.angles, c.bins, 3.0, 3.0)
    direct = Projector3D(Cylinder((1, 32, 32), (3.0, 3.0), 8, 32, 3.0, 1, 6.0, 120.0))
    assert torch.allclose(direct(x[:, :, 10:11]), Projector(beam)(x[:, :, 10:11]), atol=0.4)  # of 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"span": 2}, "odd"),
        ({"max_difference": 3}, "below the number of rings"),
        ({"radius_mm": 12.0}, "leave the ring"),
        ({"tof_bins": 5}, "TOF bins"),
        ({"angles": 0}, "positive"),
        ({"shape": (6, 7)}, "positive"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        Cylinder(**(SMALL | RING | change))
