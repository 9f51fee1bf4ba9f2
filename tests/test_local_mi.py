"""The LMI map against its definition written out pixel by pixel, its gradients, symmetries, sizes and errors."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from companion.information import local_mi
from companion.information.local_mi import LocalMI, mutual_information
from companion.information.pairs import grey_levels, luma


def images(*shape, seed=0, count=2, dtype=torch.float32):
    """Smooth random images in [0, 1] with a flat lower part."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        x = torch.rand(1, 1, *shape, generator=generator, dtype=torch.float64)
        x[:, :, max(1, 2 * shape[0] // 3) :] = 0.1
        made.append(x.to(dtype))
    return made


def by_definition(lmi: LocalMI, source, target):
    """The map of modes "shifts" and "centre", one pixel and one candidate at a time."""
    h, n = lmi.patch // 2, source.ndim - 2
    reach = h if lmi.mode == "shifts" else 0
    out = torch.zeros_like(source)
    clamped = [torch.arange(-2 * h, size + 2 * h).clamp(0, size - 1) for size in source.shape[2:]]

    def patch(x, centre):
        for axis, c in enumerate(centre):
            x = x.index_select(axis, clamped[axis][c + h : c + 3 * h + 1])
        return grey_levels(x.reshape(1, -1), lmi.clamp, lmi.quantise)

    for pixel in torch.cartesian_prod(*(torch.arange(s) for s in source.shape[2:])).reshape(-1, n).tolist():
        scores = []
        for shift in torch.cartesian_prod(*[torch.arange(-reach, reach + 1)] * n).reshape(-1, n).tolist():
            moved = [c + s for c, s in zip(pixel, shift, strict=True)]
            pair = patch(source[0, 0], pixel), patch(target[0, 0], moved)
            scores.append(mutual_information(*pair, lmi.bins, lmi.width, lmi.normalise))
        out[(0, 0, *pixel)] = torch.stack(scores).max()
    return out


@pytest.mark.parametrize(
    "shape, options",
    [
        ((9, 6), {}),
        ((6, 9), {"mode": "centre", "patch": 5, "bins": 12, "normalise": False}),
        ((6, 6), {"patch": 5, "bins": 40, "quantise": True}),
        ((7,), {"patch": 7, "bins": 9}),
        ((1, 5), {}),
        ((6, 3, 4), {"bins": 16, "normalise": False}),
    ],
)
def test_the_map_is_its_definition(shape, options):
    source, target = images(*shape, dtype=torch.float64)
    lmi = LocalMI(**options)
    torch.testing.assert_close(lmi(source, target), by_definition(lmi, source, target), rtol=0, atol=1e-7)


def test_slabs_and_chunks_do_not_change_the_map(monkeypatch):
    source, target = (torch.cat(images(11, 8, seed=s, count=3)) for s in (1, 2))
    for lmi in (LocalMI(), LocalMI(mode="published")):
        whole = lmi(source, target)
        monkeypatch.setattr(local_mi, "TABLE", 27 * 3 * 8)  # three rows at a time
        monkeypatch.setitem(local_mi.JOINT, "cpu", 1)  # one pixel at a time
        torch.testing.assert_close(lmi(source, target), whole, rtol=0, atol=2e-6)
        each = torch.cat([lmi(s[None], t[None]) for s, t in zip(source, target, strict=True)])
        torch.testing.assert_close(each, whole, rtol=0, atol=2e-6)
        torch.testing.assert_close(
            lmi(source[:1], target), torch.cat([lmi(source[:1], t[None]) for t in target]), rtol=0, atol=2e-6
        )
        monkeypatch.undo()


@pytest.mark.parametrize("mode", ["shifts", "centre", "published"])
def test_flips_and_transposition_commute_with_the_map(mode):
    source, target = images(10, 7, seed=3)
    lmi = LocalMI(mode=mode)
    expected = lmi(source, target)
    torch.testing.assert_close(lmi(source.flip(2, 3), target.flip(2, 3)).flip(2, 3), expected, rtol=0, atol=3e-6)
    torch.testing.assert_close(lmi(source.mT, target.mT).mT, expected, rtol=0, atol=3e-6)


def test_the_map_does_not_see_an_inverted_contrast():
    source, target = images(12, 12, seed=4)
    lmi = LocalMI()
    torch.testing.assert_close(lmi(1 - source, target), lmi(source, target), rtol=0, atol=1e-5)


def test_flat_patches_know_nothing_and_bounds_hold():
    source, target = images(12, 9, seed=5)
    bits = LocalMI(normalise=False)(source, target)
    assert (bits[:, :, 9:] == 0).all()
    assert bits.min() > -1e-5 and bits.max() <= math.log2(9)
    assert LocalMI()(source, target).max() <= 1


def test_align_finds_a_shift():
    """The target is the source moved by one pixel: the best candidate's centre is where the pixel went."""
    generator = torch.Generator().manual_seed(6)
    source = torch.rand(1, 1, 10, 10, generator=generator)
    _, aligned = LocalMI().align(source, source.roll((1, -1), (2, 3)))
    inside = (..., slice(1, -2), slice(2, -1))
    assert (aligned == source)[inside].float().mean() > 0.9


def test_far_out_of_range_is_an_artefact_of_the_published_mode_only():
    source = images(8, 8, seed=7)[0]
    noise = 40 + torch.zeros_like(source)  # not a single level between 0 and 255
    assert LocalMI(mode="published")(source, noise)[..., 2:4, 2:6].min() > 1.9  # where 1 is the most
    assert LocalMI()(source, noise).abs().max() < 1e-5


@pytest.mark.parametrize(
    "shape, options",
    [((4, 5), {}), ((4, 4), {"mode": "centre", "normalise": False, "bins": 12}), ((3, 3, 3), {"bins": 6})],
)
def test_gradcheck(shape, options):
    generator = torch.Generator().manual_seed(8)
    source, target = (0.1 + 0.8 * torch.rand(1, 1, *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    source[0, 0, 0] = 0.3  # a flat border
    lmi = LocalMI(**options)
    assert gradcheck(lmi, (source.requires_grad_(), target.requires_grad_()), fast_mode=len(shape) == 3)


def test_the_gradient_reaches_a_prepared_sources_target():
    source, target = images(16, 16, seed=9)
    prepared = LocalMI().prepare(source)
    with torch.inference_mode():
        prepared_value = LocalMI()(source, target)
    x = target.clone().requires_grad_()
    value = LocalMI()(prepared, x)
    torch.testing.assert_close(value.detach(), prepared_value, rtol=0, atol=2e-6)
    (gradient,) = torch.autograd.grad(value.mean(), x)
    step = 1e-2 * gradient / gradient.abs().max()
    assert LocalMI()(prepared, target + step).mean() > prepared_value.mean()


def test_the_compiled_expression_is_the_joint_entropy():
    generator = torch.Generator().manual_seed(10)
    k1 = torch.rand(5, 9, 27, generator=generator)
    k2 = torch.rand(5, 9, 3, 27, generator=generator) / (9 * 27**2 / 4)
    p = torch.einsum("snb,snkc->skbc", k1, k2)
    torch.testing.assert_close(local_mi.unrolled_joint_entropy(k1, k2), local_mi.entropy(p, 2), rtol=1e-5, atol=0)


def test_the_compiled_path_takes_every_pixel_at_once(monkeypatch):
    """With the compiler left out, which needs one that builds for this machine."""
    monkeypatch.setattr(local_mi, "fused_joint_entropy", lambda: local_mi.unrolled_joint_entropy)
    source, target = images(9, 8, seed=11)
    torch.testing.assert_close(LocalMI(compiled=True)(source, target), LocalMI()(source, target), rtol=0, atol=3e-6)


def test_luma_weighs_the_colours():
    rgb = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(luma(rgb)[:, 0], 0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2])
    with pytest.raises(ValueError, match="expected colours"):
        luma(rgb[:, :1])


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="odd number of pixels"):
        LocalMI(patch=4)
    with pytest.raises(ValueError, match="choose one of shifts, centre, published"):
        LocalMI(mode="fast")
    with pytest.raises(ValueError, match="2 or more"):
        LocalMI(bins=1)
    with pytest.raises(ValueError, match="levels between two bins would be lost"):
        LocalMI(width=0.32)
    assert LocalMI(mode="published", width=0.32).bins == 27
    assert LocalMI(bins=4).width == pytest.approx(0.8 * 85)


def test_images_that_cannot_be():
    grey, other = images(8, 8)
    lmi = LocalMI()
    with pytest.raises(ValueError, match="3 channels.*luma"):
        lmi(grey, torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"size \(8, 8\), target of size \(8, 7\)"):
        lmi(grey, other[..., :7])
    with pytest.raises(ValueError, match="target holds NaN"):
        lmi(grey, other.masked_fill(other > 0.9, math.nan))
    with pytest.raises(ValueError, match="image 1 of the batch is constant"):
        lmi(torch.cat([grey, torch.full_like(grey, 0.2)]), torch.cat([grey, other]))
    with pytest.raises(TypeError, match="uint8"):
        lmi((grey * 255).byte(), other)
    with pytest.raises(ValueError, match="expected \\(batch, 1"):
        lmi(grey[0, 0], other[0, 0])
    with pytest.raises(ValueError, match="2 source images for 3 targets"):
        lmi(torch.cat([grey, other]), torch.rand(3, 1, 8, 8))
    with pytest.raises(ValueError, match="prepared by"):
        LocalMI(patch=5)(lmi.prepare(grey), other)
    assert lmi(lmi.prepare(torch.zeros(1, 1, 8, 8), allow_constant=True), other).abs().max() == 0
