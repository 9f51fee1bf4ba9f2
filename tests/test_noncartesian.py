"""Off the grid: the transform is the stated sum, the adjoint exact, the Toeplitz normal the direct one."""

import math

import pytest
import torch

from companion.acquisition.noise import mix
from companion.acquisition.trajectory import (
    gradient_delay,
    gridded_centre,
    prepare_radial,
    prepare_trajectory,
    radial_angles,
)
from companion.operators.linear import adjoint_error
from companion.operators.mri import birdcage_maps, centre_crop, fft
from companion.operators.noncartesian import (
    GOLDEN,
    NUFFT,
    density_compensation,
    noncartesian_sense,
    nufft,
    nufft_adjoint,
    radial_trajectory,
    spiral_trajectory,
)
from companion.operators.solve import conjugate_gradient

pytest.importorskip("finufft")


def draw(*shape, dtype=torch.complex64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def random_trajectory(space, samples=150, seed=1):
    unit = torch.rand(samples, len(space), generator=torch.Generator().manual_seed(seed)) - 0.5
    return unit * torch.tensor(space)


def matrix(trajectory, space):
    """The transform as a dense matrix (sample, pixel), from its definition."""
    axes = [(torch.arange(n, dtype=torch.float64) - n // 2) / n for n in space]
    r = torch.stack([g.flatten() for g in torch.meshgrid(*axes, indexing="ij")], -1)
    return torch.exp(-2j * torch.pi * (trajectory.double() @ r.mT)) / math.prod(space) ** 0.5


SPACES = [(8, 8), (9, 7), (10, 13), (6, 5, 8)]


@pytest.mark.parametrize("space", SPACES)
def test_the_transform_is_the_stated_sum_and_the_adjoint_its_adjoint(space):
    k = random_trajectory(space)
    F, x, y = matrix(k, space), draw(3, *space, dtype=torch.complex128), draw(2, 3, 150, dtype=torch.complex128)
    assert torch.allclose(nufft(x, k), x.flatten(1) @ F.mT, atol=1e-8)
    back = nufft_adjoint(y, k, space)
    assert back.shape == (2, 3, *space) and torch.allclose(back.flatten(2), y @ F.conj(), atol=1e-8)
    assert adjoint_error(NUFFT(k, (3, *space))) < 1e-5


@pytest.mark.parametrize("space", [(9, 8), (4, 5, 6)])
def test_at_integers_it_is_the_cartesian_transform(space):
    axes = torch.meshgrid(*[torch.arange(n) - n // 2 for n in space], indexing="ij")
    k = torch.stack([a.flatten() for a in axes], -1).float()
    x = draw(2, *space)
    assert torch.allclose(nufft(x, k), fft(x, len(space)).flatten(1), atol=1e-5)
    assert torch.allclose(density_compensation(k, space), torch.ones(len(k)), atol=1e-3)
    assert torch.allclose(NUFFT(k, (2, *space)).normal(x), x, atol=1e-5)


@pytest.mark.parametrize("space", [*SPACES, (23, 16)])
def test_toeplitz_equals_direct(space):
    A = NUFFT(random_trajectory(space), (2, *space))
    x = draw(3, 2, *space)
    direct = A.adjoint(A.forward(x))
    assert (A.normal(x) - direct).abs().max() < 1e-5 * direct.abs().max()


@pytest.mark.parametrize("sets", [None, 2])
def test_sense_off_the_grid(sets):
    space = (24, 20)
    maps = birdcage_maps(space, 4) if sets is None else draw(sets, 4, *space)
    angles = GOLDEN * torch.arange(15)
    A = noncartesian_sense(maps, radial_trajectory(angles, 40, 20).flatten(0, 1))
    assert A.domain_shape == (sets or 1, *space) and A.range_shape == (4, 600)
    assert adjoint_error(A) < 1e-5
    x = draw(2, *A.domain_shape)
    direct = A.H(A(x))
    assert (A.normal(x) - direct).abs().max() < 1e-5 * direct.abs().max()


def test_density_of_a_radial_scan_is_a_ramp_and_grids_the_image():
    n, spokes = 32, 60
    k = radial_trajectory(torch.pi * torch.arange(spokes) / spokes, 2 * n, n).flatten(0, 1)
    w = density_compensation(k, (n, n))
    radius = k.norm(dim=-1)
    ramp = torch.pi * radius * 0.5 / spokes  # area of each sample: the part of a ring that it stands for
    middle = (radius > 3) & (radius < n / 2 - 5)
    assert ((w / ramp)[middle] - 1).abs().max() < 0.15
    grid = torch.linspace(-1, 1, n)
    image = torch.exp(-8 * (grid[:, None] ** 2 + (grid - 0.2) ** 2)).to(torch.complex64)
    gridded = nufft_adjoint(w * nufft(image, k), k, (n, n))
    assert ((gridded - image).norm() / image.norm()).item() < 0.03


def test_trajectories_go_where_they_say():
    delay = torch.tensor([[0.5, 0.1], [0.1, -0.3]])
    k = radial_trajectory(torch.tensor([0.0, torch.pi / 2]), 8, 16, delay)
    assert torch.allclose(k[0, 4], 2 * torch.tensor([0.1, -0.3])) and torch.allclose(k[1, 4], 2 * delay[:, 0])
    assert torch.allclose(k[0, 5] - k[0, 4], torch.tensor([0.0, 2.0]))
    spiral = spiral_trajectory(4, 100, 3.0, 32)
    assert spiral.shape == (4, 100, 2) and spiral.norm(dim=-1).amax().item() == pytest.approx(16)
    assert (spiral[:, 0] == 0).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="check the unit"):
        NUFFT(torch.tensor([[0.0, 20.0]]), (1, 16, 16))
    with pytest.raises(ValueError, match="expected"):
        NUFFT(torch.zeros(5, 3), (1, 16, 16))


# ------------------------------------------------------------------------------- acquisition: delays, maps and units


def phantom(n=64):
    grid = torch.linspace(-1, 1, n)
    y, x = grid[:, None], grid[None]
    inside = ((y / 0.8) ** 2 + (x / 0.6) ** 2 < 1).float()
    return torch.polar(inside * (1 + 0.5 * torch.cos(8 * x) * torch.sin(5 * y)), 0.7 * x.expand(n, n))


def spokes(angles, delay=None, n=64, coils=6, noise=0.005, seed=0):
    k = radial_trajectory(angles, 2 * n, n, delay).clamp(-n / 2, n / 2)
    y = nufft(birdcage_maps((n, n), coils) * phantom(n), k.reshape(-1, 2)).reshape(coils, *k.shape[:2])
    return y + noise * 2**0.5 * draw(*y.shape, seed=seed)


@pytest.mark.parametrize("angles", [radial_angles(45), radial_angles(30, torch.pi), GOLDEN * torch.arange(40)])
def test_the_delay_of_simulated_gradients_is_recovered(angles):
    delay = torch.tensor([[0.5, 0.1], [0.1, -0.3]])
    y = spokes(angles, delay) * torch.exp(0.5j * torch.sin(3 * angles))[:, None]  # and a phase for each spoke
    assert (gradient_delay(y, angles) - delay).abs().max() < 0.02


def test_a_radial_scan_is_prepared_and_its_delay_corrected():
    angles, delay = radial_angles(61), torch.tensor([[-0.65, 0.0], [0.0, -0.4]])
    y = spokes(angles, delay)
    m, found = prepare_radial(y, angles, (64, 64), brightness=None)
    assert (found - delay).abs().max() < 0.02 and m.found.sets == 1
    blind = prepare_trajectory(y, radial_trajectory(angles, 128, 64), (64, 64), brightness=None)
    truth = mix(m.found.matrix, birdcage_maps((64, 64), 6) * phantom()).abs().square().sum(0).sqrt()
    errors = []
    for one in (m, blind):
        x = conjugate_gradient(lambda v, A=one.A: A.normal(v) + 0.01 * v, one.A.H(one.y), iterations=30)[0, 0].abs()
        errors.append(((x - truth)[4:-4, 4:-4].norm() / truth.norm()).item())
    assert errors[0] < 0.1 and errors[0] < 0.5 * errors[1]


def test_samples_and_trajectory_must_agree():
    with pytest.raises(ValueError, match="one position a sample"):
        prepare_trajectory(draw(4, 10, 20), torch.zeros(10, 19, 2), (16, 16))


def test_the_gridded_centre_is_that_of_the_cartesian_scan():
    y = spokes(radial_angles(61), noise=0)
    k = radial_trajectory(radial_angles(61), 128, 64).reshape(-1, 2).clamp(-32, 32)
    box = gridded_centre(y.flatten(1), k, (64, 64), 16)
    cartesian = centre_crop(fft(birdcage_maps((64, 64), 6) * phantom()), (16, 16))
    middle = (..., slice(3, -3), slice(3, -3))
    assert ((box - cartesian)[middle].norm() / cartesian[middle].norm()).item() < 0.05
