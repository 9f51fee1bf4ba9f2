"""Measures of a population of volumes, against cases with a known answer."""

import pytest
import torch
from torch import nn

from companion.evaluation import metrics
from companion.evaluation import population as generative
from companion.evaluation.segmenter import Segmenter


def volumes(n, seed=0, size=24):
    x = torch.rand(n, 1, size, size, size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool3d(x, 3, 1, 1)


def test_ms_ssim_is_the_usual_one_but_for_its_border():
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as reference

    x = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (x + 0.2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    weights = torch.tensor(metrics.MS_SSIM_WEIGHTS[:3])
    known = reference(x, y, data_range=1.0, betas=tuple((weights / weights.sum()).tolist()), reduction="none")
    assert metrics.ms_ssim(x, y, 1.0) == pytest.approx(known, abs=3e-3)


def test_slices_come_from_the_middle_half_of_every_axis():
    x = torch.arange(24.0).reshape(1, 1, 1, 1, 24).expand(2, 1, 24, 24, 24)
    sagittal = generative.plane_slices(x, "sagittal", 4)
    assert sagittal.shape == (8, 1, 24, 24)
    assert sagittal[:4].flatten(1).unique(dim=1).flatten().tolist() == [6, 10, 13, 17]
    assert generative.plane_slices(x, "axial", 4).shape == (8, 1, 24, 24)


def test_frechet_distance_sees_a_shift_and_nothing_else():
    def mean_and_deviation(slices):
        return torch.stack([slices.mean((1, 2, 3)), slices.std((1, 2, 3))], 1)

    x = volumes(6)
    assert generative.frechet_by_plane(mean_and_deviation, x, x.flip(0))["mean"] == pytest.approx(0, abs=1e-9)
    shifted = generative.frechet_by_plane(mean_and_deviation, x + 0.5, x)
    assert shifted["coronal"] == pytest.approx(0.25, rel=1e-4) and set(shifted) == {*generative.PLANES, "mean"}


def test_features_do_not_depend_on_the_batch():
    features = generative.load_features("brain/t1w")
    slices = generative.plane_slices(volumes(2, size=30), "axial", 3)
    seen = features(slices)
    assert seen.shape == (6, 128) and seen.std(0).max() > 0
    assert torch.allclose(seen, features(slices, batch=4), atol=1e-4)


def test_pairs_of_copies_are_one_and_pairs_of_strangers_are_less():
    x = volumes(4)
    same = generative.pairwise_ms_ssim(x[:1].expand(3, -1, -1, -1, -1))
    assert same == pytest.approx([1.0] * 3)
    assert (generative.pairwise_ms_ssim(x) < 0.9).all() and len(generative.pairwise_ms_ssim(x)) == 6
    assert len(generative.pairwise_ms_ssim(x, pairs=2)) == 2
    with pytest.raises(ValueError, match="at least two"):
        generative.pairwise_ms_ssim(x[:1])


def test_nearest_finds_the_planted_volume_in_whichever_batch():
    training, x = volumes(9), volumes(2, seed=1)
    x[1] = training[7].flip(-1)
    found = generative.nearest(x, training.split(4))
    assert found.index[1] == 7 and found.distance[1] == pytest.approx(0, abs=1e-3)
    found = generative.nearest(x, training.split(4), mirror=False)
    assert found.distance[1] > 0.1
    a, b = generative.coarse(x[:1])[0], generative.coarse(training)[found.index[0]]
    assert found.distance[0] == pytest.approx(((a - b).norm() / ((a @ a + b @ b) / 2).sqrt()).item(), rel=1e-4)
    with pytest.raises(ValueError, match="no training"):
        generative.nearest(x, [])


class Halves(nn.Module):
    """Judges bright pixels to be white matter and others half grey, half background."""

    total_stride = (2, 2)

    def forward(self, x, t):
        shares = torch.cat([(x < 0.5) * 0.5, 0 * x, (x < 0.5) * 0.5, (x >= 0.5) * 1.0], 1)
        return shares.clamp(min=1e-6).log()


def test_tissue_volumes_count_millilitres():
    x = torch.zeros(2, 1, 10, 10, 10)
    x[0, :, :5], x[1, :, :5], x[1, :, 5:] = 0.2, 1, 0.2
    ml = generative.tissue_volumes(x, Segmenter(Halves()), (2.0, 5.0, 10.0))
    # of the first the dark half and the slice that touches it; what a segmenter says of empty slices does not count
    assert ml == pytest.approx(torch.tensor([[0, 30.0, 0], [0, 25.0, 50.0]], dtype=torch.float64), abs=0.01)
    assert generative.tissue_fractions(ml)[1] == pytest.approx(torch.tensor([0, 1 / 3, 2 / 3]).double(), abs=1e-3)
    table = generative.tissue_table({"real": ml, "synthetic": ml[1:]}, "real")
    assert table[0]["n"] == 2 and table[1]["white share"] == "2.000 x" and table[0]["grey share"] == "1.000 x"


def test_symmetric_heads_are_symmetric():
    x = volumes(1)
    assert generative.left_right(x + x.flip(-1)) == pytest.approx(1, abs=1e-5)
    assert generative.left_right(x[..., 1:-1, 1:-1, 1:-1]) < 0.5


def test_other_things_than_volumes_are_refused():
    for bad in (torch.rand(1, 8, 8, 8), torch.rand(1, 2, 8, 8, 8), torch.rand(1, 1, 8, 8, 8) + 0j):
        with pytest.raises(ValueError, match="expected real volumes"):
            generative.left_right(bad)
    with pytest.raises(ValueError, match="NaN"):
        generative.nearest(torch.full((1, 1, 8, 8, 8), torch.nan), [])
    with pytest.raises(ValueError, match="2D UNet"):
        generative.load_features("aid/brain")
