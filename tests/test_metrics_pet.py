"""Regional metrics of emission tomography on images whose answers are known."""

import pytest
import torch

from companion.evaluation.metrics import lesion_recovery, linearity, region_bias, region_noise


@pytest.fixture
def regions():
    labels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    labels[:, :, :4] = 1
    labels[0, :, 4:] = 2
    reference = torch.where(labels == 1, 10.0, 4.0)
    return reference, labels


def test_region_bias_and_noise(regions):
    reference, labels = regions
    checker = torch.tensor([1.0, -1.0]).repeat(32).reshape(8, 8)
    x = torch.where(labels == 1, 1.1 * reference, 0.5 * reference) + 2 * checker
    bias, noise = region_bias(x, reference, labels, (1, 2)), region_noise(x, reference, labels, (1, 2))
    assert bias[0].tolist() == pytest.approx([0.1, -0.5])
    assert noise[0].tolist() == pytest.approx([0.2, 0.5])
    assert bias[1, 0].item() == pytest.approx(0.1)
    assert bias[1, 1].isnan() and noise[1, 1].isnan()  # the second image has no region 2


def test_lesion_recovery(regions):
    reference, labels = regions
    lesion = torch.zeros(8, 8, dtype=torch.bool)
    lesion[1:3, 1:3] = True
    hot = torch.where(lesion, 30.0, reference)
    blurred = torch.where(lesion, 20.0, reference)
    around = (labels == 1) & ~lesion
    assert lesion_recovery(5 * blurred, hot, lesion, around).tolist() == pytest.approx([0.5, 0.5])
    assert lesion_recovery(hot, hot, torch.zeros(8, 8), around).isnan().all()
    with pytest.raises(ValueError, match="no contrast"):
        lesion_recovery(hot, reference, lesion, around)


def test_linearity():
    true = torch.tensor([1.0, 2.0, 5.0, 10.0])
    assert linearity(0.9 * true + 0.2, true) == pytest.approx((0.9, 0.2, 1.0))
    with pytest.raises(ValueError, match="at least 3"):
        linearity(true[:2], true[:2])


def test_labels_of_another_shape(regions):
    with pytest.raises(ValueError, match="broadcast"):
        region_bias(*regions[:1], regions[0], torch.zeros(3, 1, 8, 8))
