"""Augmentation: moves do what they say, labels tell moves apart, randomness comes from the generator."""

import math

import pytest
import torch

from companion.data.augmentation import AugmentPipe, Moves, resample

SIZE = 32


def moves(n=1, **given):
    """Moves that do nothing but what is given."""
    fields = {name: torch.zeros(n) for name in Moves._fields} | {"shift": torch.zeros(2, n)}
    return Moves(**fields | {name: torch.as_tensor(value).float() for name, value in given.items()})


def blob(x=3.0, y=-2.0, width=2.5, height=2.5, n=1):
    """A Gaussian (n, 1, SIZE, SIZE) at (x, y) from the centre, with these standard deviations, in pixels."""
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    image = torch.exp(-(((axis - x) / width) ** 2) / 2 - (((axis[:, None] - y) / height) ** 2) / 2)
    return image.expand(n, 1, SIZE, SIZE).clone()


def statistics(image):
    """Centre (x, y) and covariance (2, 2) of an image's intensity."""
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    places = torch.stack([axis.expand(SIZE, -1), axis[:, None].expand(-1, SIZE)])
    weights = image[0] / image.sum()
    centre = (weights * places).sum((1, 2))
    offset = places - centre[:, None, None]
    return centre, torch.einsum("yx,iyx,jyx->ij", weights, offset, offset)


PIPE = AugmentPipe(p=1)


def test_doing_nothing_changes_nothing():
    images = torch.randn(3, 2, 24, SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(PIPE.apply(images, moves(3)), images)
    identity = torch.eye(3).expand(3, 3, 3)
    assert (resample(images, identity) - images).abs().max() < 1e-4  # on white noise
    assert not PIPE.labels(moves(3)).any()


def test_flips_are_exact_and_of_single_images():
    images = torch.randn(3, 1, 8, 6)
    out = PIPE.apply(images, moves(3, flip_x=[1, 0, 1], flip_y=[0, 0, 1]))
    assert torch.equal(out[0], images[0].flip(2))
    assert torch.equal(out[1], images[1])
    assert torch.equal(out[2], images[2].flip(1, 2))


def test_a_shift_moves_by_an_eighth_of_each_side():
    image = blob()
    out = PIPE.apply(image, moves(shift=[[1.0], [-0.5]]))
    torch.testing.assert_close(out, image.roll((-2, 4), (2, 3)), atol=2e-3, rtol=0)


def test_a_turn_by_90_degrees_is_a_quarter_turn():
    image = blob(width=2.5, height=4.0)
    out = PIPE.apply(image, moves(angle=[math.pi / 2]))
    torch.testing.assert_close(out, torch.rot90(image, 1, (2, 3)), atol=2e-2, rtol=0)


@pytest.mark.parametrize("w", [-1.5, 1.0])
def test_scale_is_in_fifths_of_an_octave(w):
    centre, covariance = statistics(blob()[0])
    new, spread = statistics(PIPE.apply(blob(), moves(scale=[w]))[0])
    factor = 2 ** (0.2 * w)
    torch.testing.assert_close(new, factor * centre, atol=0.03, rtol=0)
    torch.testing.assert_close(spread, factor**2 * covariance, atol=0.15, rtol=0.02)


@pytest.mark.parametrize("r", [0.0, 0.7, -2.0])
def test_a_stretch_lengthens_its_direction_and_narrows_the_other(r):
    w = 1.5
    _, spread = statistics(PIPE.apply(blob(0, 0), moves(stretch=[w], direction=[r]))[0])
    along = torch.tensor([math.cos(r), -math.sin(r)])  # angles run from x towards the top of the picture
    across = along.flip(0) * torch.tensor([-1, 1])
    factor = 4 ** (0.2 * w)
    assert (along @ spread @ along).item() == pytest.approx(2.5**2 * factor, rel=0.03)
    assert (across @ spread @ across).item() == pytest.approx(2.5**2 / factor, rel=0.03)
    assert abs(along @ spread @ across) < 0.2


def test_all_channels_move_together_and_each_image_by_itself():
    images = torch.cat([blob(n=2), 2 * blob(n=2)], dim=1)
    m = moves(2, angle=[0.5, 0.0], shift=[[0.5, 0.0], [0.0, 0.0]])
    out = PIPE.apply(images, m)
    torch.testing.assert_close(out[:, 1], 2 * out[:, 0])
    assert torch.equal(out[1], images[1])
    alone = PIPE.apply(images[:1], Moves(*(move[..., :1] for move in m)))
    torch.testing.assert_close(alone, out[:1])


# --- labels


def test_the_published_label_of_a_stretch_is_ambiguous_and_ours_is_not():
    w, r = torch.tensor([0.8]), torch.tensor([0.6])
    one, other = moves(stretch=w, direction=r), moves(stretch=-w, direction=r + math.pi)
    published = AugmentPipe(stretch_label="published")
    size = (SIZE, SIZE)
    assert not torch.allclose(published.inverse(one, size), published.inverse(other, size), atol=0.1)
    torch.testing.assert_close(published.labels(one), published.labels(other))
    assert (PIPE.labels(one) - PIPE.labels(other)).abs().max() > 0.5


def test_one_label_is_one_stretch():
    """Labels agree exactly where the transforms do."""
    generator = torch.Generator().manual_seed(1)
    w, r = torch.randn(40, generator=generator), 6 * torch.rand(40, generator=generator) - 3
    first = moves(40, stretch=w, direction=r)
    for same in (moves(40, stretch=w, direction=r + math.pi), moves(40, stretch=-w, direction=r + math.pi / 2)):
        torch.testing.assert_close(PIPE.labels(first), PIPE.labels(same), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(PIPE.inverse(first, (8, 8)), PIPE.inverse(same, (8, 8)), atol=1e-5, rtol=1e-5)
    labels, matrices = PIPE.labels(first), PIPE.inverse(first, (8, 8)).flatten(1)
    apart = torch.cdist(labels, labels), torch.cdist(matrices, matrices)
    assert (apart[0] / apart[1].clamp(min=1e-9)).fill_diagonal_(9).min() > 0.5


def test_labels_are_what_was_drawn():
    m = moves(flip_x=[1], scale=[0.3], angle=[0.5], shift=[[0.1], [-0.2]])
    expected = [1, 0, 0.3, math.cos(0.5) - 1, math.sin(0.5), 0, 0, 0.1, -0.2]
    torch.testing.assert_close(PIPE.labels(m)[0], torch.tensor(expected))


# --- chance


def test_moves_happen_as_often_as_asked():
    pipe, n = AugmentPipe(p=0.05), 20_000
    m = pipe.moves(pipe.draw(n, torch.Generator().manual_seed(0)))
    assert m.flip_x.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert m.flip_y.float().mean().item() == pytest.approx(0.025, abs=0.005)
    for move in (m.scale, m.angle, m.stretch, m.shift[0]):
        assert (move != 0).float().mean().item() == pytest.approx(0.05, abs=0.01)
    moved = (m.scale != 0) | (m.angle != 0) | (m.stretch != 0) | (m.shift[0] != 0)
    assert moved.float().mean().item() == pytest.approx(1 - 0.95**4, abs=0.01)
    assert m.angle.abs().max() <= math.pi


def test_the_generator_decides_everything():
    images, pipe = torch.randn(4, 2, 16, 16), AugmentPipe(p=0.7)
    torch.manual_seed(5)
    one = pipe(images, torch.Generator().manual_seed(3))
    torch.manual_seed(6)
    same = pipe(images, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], pipe(images, torch.Generator().manual_seed(4))[0])
    image, label = pipe.item(images[0], torch.Generator().manual_seed(3))
    batch, labels = pipe(images[:1], torch.Generator().manual_seed(3))
    assert torch.equal(image, batch[0]) and torch.equal(label, labels[0])
    assert label.shape == (9,)


def test_large_moves_of_small_images_stay_finite():
    images = torch.rand(20, 1, 6, 9)
    pipe = AugmentPipe(p=1, scale_std=2.0, shift_std=2.0)
    out, _ = pipe(images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape and torch.isfinite(out).all() and out.abs().max() < 3


def test_a_switched_off_pipe_does_nothing():
    images = torch.randn(4, 1, 8, 8)
    out, labels = AugmentPipe(p=0)(images, torch.Generator().manual_seed(0))
    assert torch.equal(out, images) and not labels.any()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(p=1.5), "from 0 to 1"),
        (dict(p=math.nan), "from 0 to 1"),
        (dict(scale=-1), "scale=-1: expected a multiplier"),
        (dict(stretch_label="single"), "'double_angle' or 'published'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AugmentPipe(**options)


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected real images"):
        PIPE(torch.zeros(2, 8, 8), torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="expected real images"):
        PIPE(torch.zeros(2, 1, 8, 8, dtype=torch.complex64), torch.Generator().manual_seed(0))
