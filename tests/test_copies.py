"""The detector of copies: people in disguise are found, others are not."""

import pytest
import torch

from companion.evaluation import copies


def person(seed: int, size: int = 24) -> torch.Tensor:
    """A head that all people share, with folds of its own (1, z, y, x)."""
    g = torch.Generator().manual_seed(seed)
    z, y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 3, indexing="ij")
    head = ((z / 0.7) ** 2 + (y / 0.8) ** 2 + (x / 0.6) ** 2 < 1).float() * (0.7 + 0.3 * y)
    folds = copies.smooth(torch.randn(1, 1, size, size, size, generator=g), 5)[0]
    return head * (1 + 2 * folds)


def people(first: int, count: int) -> torch.Tensor:
    return torch.stack([person(first + i) for i in range(count)])


def test_people_in_disguise_are_found_and_others_are_not():
    training, others = people(0, 12), people(100, 20)
    detector = copies.CopyDetector.of(training.split(5))
    who = torch.tensor([3, 0, 7, 11, 5, 2])
    planted = copies.disguised(training[who], torch.Generator().manual_seed(1))
    rows = copies.table(detector, {"people": others, "copies": training[:4].flip(-1)}, "people", planted, who)
    assert [row["n"] for row in rows] == [20, 4, 6]
    assert rows[0]["copies"] == 1  # the false alarms that the limit allows
    assert rows[1]["copies"] == 4  # mirror images
    assert rows[2]["copies"] == 6
    assert rows[2]["likeness to the nearest"] > 0.3 + rows[0]["likeness to the nearest"]


def test_brightness_and_batch_do_not_matter():
    training = people(0, 6)
    detector = copies.CopyDetector.of([training])
    value, who = detector.likeness(torch.cat([2 * training[4:5], 0.5 * training[1:2]]))
    assert who.tolist() == [4, 1]
    assert value.min() > 0.99
    alone, _ = detector.likeness(0.5 * training[1:2])
    torch.testing.assert_close(alone, value[1:], atol=1e-4, rtol=0)


def test_a_disguise_is_a_draw_of_its_seed_and_moves_the_volume():
    x = people(0, 3)
    a, b, c = (copies.disguised(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)
    assert a.shape == x.shape
    assert ((a - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).min() > 0.1


def test_one_volume_shares_nothing():
    with pytest.raises(ValueError, match="2 or more"):
        copies.CopyDetector.of([people(0, 1)])
