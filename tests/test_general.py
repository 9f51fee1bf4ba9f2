"""The general prior: a network without attention, for any size; its bank, crops and loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from companion.evaluation.denoising import expected_errors
from companion.models.architectures import build
from companion.models.checkpoint import describe
from companion.models.general import LARGE_MM, general_prior
from companion.networks.blocks import AttentionBlock
from companion.papers.crops import Bank
from companion.papers.general import (
    TrainGeneral,
    crop,
    of_large_pixels,
    prepare_bank,
    prior_config,
    train_general,
    validation_slices,
)


def test_network_has_no_attention_and_costs_at_most_15_gflop():
    from torch.utils.flop_counter import FlopCounterMode

    D = build(prior_config(**TrainGeneral().pick("model_channels", "channel_mult", "patch", "images")))
    assert not any(isinstance(m, AttentionBlock) for m in D.modules())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        D(torch.zeros(1, 1, 80, 80, dtype=torch.complex64), torch.ones(1))
    assert counter.get_total_flops() * 16 <= 15.01e9  # convolutions: proportional to the pixels of 320 x 320


def write_bank(folder, parts=(3, 2), size=40):
    folder.mkdir()
    for i, n in enumerate(parts):
        np.save(folder / f"{i:03d}.npy", np.random.default_rng(i).random((n, size, size)).astype(np.float16))
    return folder


def test_bank_joins_its_files(tmp_path):
    folder = write_bank(tmp_path / "bank")
    bank = Bank(folder, 5)
    assert len(bank) == 5
    assert np.array_equal(bank[3][0], np.load(folder / "001.npy")[0].astype(np.float32))
    with pytest.raises(ValueError, match="holds 5 images; expected 6"):
        Bank(folder, 6)


def test_crops_are_parts_of_the_image():
    image = torch.arange(64.0).reshape(1, 8, 8) + 1
    part = crop(image, torch.Generator().manual_seed(1), 5)
    ratio = part[0, 1, 1] / part
    values = (part / part.min()).flatten()
    assert part.shape == (1, 5, 5) and ratio.isfinite().all() and len(values.unique()) == 25
    assert torch.equal(part, crop(image, torch.Generator().manual_seed(1), 5))


def test_training_finishes_once(tmp_path):
    folder = write_bank(tmp_path / "bank")
    options = dict(
        bank=str(folder), images=5, crop=16, channel_mult=(1, 1), batch_size=2, warmup=1, steps=4, checkpoint_every=2
    )
    p = TrainGeneral(**options, out=str(tmp_path / "a"))
    result = train_general(p, progress=False)
    again = train_general(p, progress=False)  # finished: read from its checkpoint
    assert result.step == again.step == 4 and result.finished
    for a, b in zip(result.ema.parameters(), again.ema.parameters(), strict=True):
        assert torch.equal(a, b)
    x0 = validation_slices(None, count=2, size=32)
    (row,) = expected_errors(result.ema, x0, [0.1])
    assert 0 < row["error"] < 1 and 0 < row["expected"] < 1


def test_bank_is_completed_and_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr("companion.papers.general.PART", 2)
    p = TrainGeneral(heads=None, bank=str(tmp_path / "bank"), images=3)
    first = prepare_bank(p)
    assert first[2].shape == (1, 128, 128) and len(list((tmp_path / "bank").iterdir())) == 2
    (tmp_path / "bank" / "001.npy").unlink()
    assert torch.equal(prepare_bank(p)[2], first[2])


def test_crops_prefer_what_is_not_air():
    image = torch.zeros(1, 64, 64)
    image[:, 40:, 40:] = 1.0
    filled = [crop(image, torch.Generator().manual_seed(i), 16).count_nonzero().item() / 256 for i in range(400)]
    anywhere = 0.337**2  # what one random place shows of the bright part, on average
    assert np.mean(filled) > 1.4 * anywhere


def test_images_of_large_pixels_are_found_without_making_them(monkeypatch):
    from companion.papers import general

    made = []
    monkeypatch.setattr(general, "dead_leaves", lambda rng, size: made.append(("", general.draw_pixel_mm(rng))))
    monkeypatch.setattr(
        general, "head_image", lambda head, rng, size: made.append((head.name, general.draw_pixel_mm(rng)))
    )
    heads = [SimpleNamespace(name=name) for name in ("a", "a_brain", "b", "a_no_fat", "b_no_fat")]
    for i in range(800):
        general.bank_image(heads, np.random.default_rng([17, i]))
    chosen = of_large_pixels([head.name for head in heads], 800, 2.5)
    assert chosen == [i for i, (_, mm) in enumerate(made) if mm >= 2.5] and len(chosen) > 150
    share = {name: sum(made[i][0] == name for i in chosen) / len(chosen) for name in ("", "a", "a_brain", "b_no_fat")}
    assert share[""] == pytest.approx(0.2, abs=0.06)  # leaves, as in the whole bank
    assert share["a"] == pytest.approx(0.73 * 0.7 / 2, abs=0.08) and share["b_no_fat"] == pytest.approx(0.11, abs=0.05)


def test_banks_of_large_pixels_hold_whole_files(tmp_path, monkeypatch):
    monkeypatch.setattr("companion.papers.general.PART", 2)
    p = TrainGeneral(heads=None, bank=str(tmp_path / "bank"), images=24, pixels_from_mm=2.2)
    bank = prepare_bank(p)
    assert len(bank) % 2 == 0 and 2 <= len(bank) < 24 and (tmp_path / "bank_2.2_mm").is_dir()
    more = prepare_bank(TrainGeneral(heads=None, bank=p.bank, images=40, pixels_from_mm=2.2))
    assert len(more) > len(bank) and torch.equal(more[1], bank[1])
    with pytest.raises(ValueError, match="of 24 images fewer than 2 have pixels so large"):
        prepare_bank(TrainGeneral(heads=None, bank=p.bank, images=24, pixels_from_mm=5.0))


def test_the_prior_suits_the_pixels():
    assert general_prior("general", None) == general_prior("general", 1.0) == "general/2d"
    assert general_prior("general", LARGE_MM) == "general/coarse"
    assert general_prior("brain/t1w", 3.0) == "brain/t1w"
    assert describe("general/coarse")["data"]["pixel_mm"] == f"{LARGE_MM:g} to 4"
    assert describe("general/coarse")["network"] == describe("general/2d")["network"]
