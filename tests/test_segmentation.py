"""The segmenter: soft labels are learned, any size is taken, and what it cannot read is refused."""

import pytest
import torch

from companion.data import anatomy
from companion.evaluation import segmenter as segmentation
from companion.evaluation.segmenter import (
    load_segmenter,
    save_segmenter,
    segmenter_config,
    train_segmenter,
    training_slices,
)


def blobs(count: int = 24, size: int = 16):
    """Discs whose three rings have three grey levels, and the shares of their tissues."""
    generator = torch.Generator().manual_seed(0)
    line = torch.linspace(-1, 1, size)
    centre = 0.3 * torch.rand(count, 2, 1, 1, generator=generator) - 0.15
    radius = ((line[:, None] - centre[:, 0]) ** 2 + (line - centre[:, 1]) ** 2).sqrt()
    label = 3 - torch.bucketize(radius, torch.tensor([0.3, 0.55, 0.8]))
    shares = torch.nn.functional.one_hot(label, 4).movedim(-1, 1).float()
    return torch.tensor([0.0, 1.0, 0.5, 0.3])[label][:, None], shares


@pytest.fixture(scope="module")
def trained():
    images, shares = blobs()
    return train_segmenter(images, shares, steps=60), images, shares


def test_it_learns_rings(trained):
    segmenter, images, shares = trained
    probabilities = segmenter.probabilities(images)
    assert torch.allclose(probabilities.sum(1), torch.ones(len(images), 16, 16), atol=1e-5)
    assert (probabilities - shares).abs().mean() < 0.1
    agree = segmenter.labels(images)[:, 0] == shares.argmax(1)
    assert agree.float().mean() > 0.9 and segmenter.labels(images).dtype == torch.uint8
    assert torch.equal(segmenter.fractions(images), probabilities[:, 1:])


def test_any_size_and_volumes_slice_by_slice(trained):
    segmenter, images, _ = trained
    odd = images[:1, :, :15, :13]
    assert segmenter.labels(odd).shape == odd.shape
    volume = images[None, :6, 0]  # (batch, 6 slices, y, x)
    found = segmenter.fractions(volume[:, None])
    assert found.shape == (1, 3, 6, 16, 16)
    assert torch.allclose(found[0].movedim(1, 0), segmenter.fractions(images[:6]), atol=1e-5)
    assert segmenter.labels(volume[:, None]).shape == (1, 1, 6, 16, 16)


def test_features_tell_images_apart(trained):
    segmenter, images, _ = trained
    features = segmenter.features(images)
    assert features.shape == (len(images), 32)
    assert torch.allclose(features[:3], segmenter.features(images[:3]), atol=1e-5)
    assert (segmenter.features(1 - images) - features).abs().mean() > 0.1 * features.abs().mean()


def test_saved_and_loaded_it_is_the_same(trained, tmp_path):
    segmenter, images, _ = trained
    folder = save_segmenter(tmp_path / "seg", segmenter, segmenter_config("T2w", 16, 24), {"steps": 60})
    loaded = load_segmenter(folder, "T2w")
    assert (loaded.probabilities(images) - segmenter.probabilities(images)).abs().max() < 0.02  # half precision
    with pytest.raises(ValueError, match="trained on T2w, not on T1w"):
        load_segmenter(folder, "T1w")


def test_training_slices_are_those_of_the_cohort():
    images, shares = training_slices("T1w", 1, 2, 16, split="validation")
    assert images.shape == (2, 1, 16, 16) and shares.shape == (2, 4, 16, 16)
    assert torch.allclose(shares.sum(1), torch.ones(2, 16, 16), atol=1e-5)
    white = anatomy.labels_from_tissue(shares[0, 1:]) == anatomy.LABELS["white"]
    assert not white.any() or images[0, 0][white].mean() > images[0, 0].mean()
    again, _ = training_slices("T1w", 1, 2, 16, split="validation")
    assert torch.equal(images, again)


@pytest.mark.parametrize(
    "x, match",
    [
        (torch.zeros(2, 16, 16), "batch, 1, y, x"),
        (torch.zeros(1, 2, 16, 16), "batch, 1, y, x"),
        (torch.zeros(1, 1, 16, 16, dtype=torch.complex64), "magnitude"),
        (torch.full((1, 1, 16, 16), torch.nan), "NaN"),
    ],
)
def test_images_it_cannot_read(trained, x, match):
    with pytest.raises(ValueError, match=match):
        trained[0].labels(x)


def test_shares_must_belong_to_the_images():
    with pytest.raises(ValueError, match="do not belong together"):
        train_segmenter(torch.zeros(4, 1, 16, 16), torch.zeros(4, 3, 16, 16), steps=2)
    assert segmentation.GAIN[0] < 1 < segmentation.GAIN[1]
