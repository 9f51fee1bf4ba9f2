"""Stacks of slices of warped heads: seeds, neighbours, phase, crops; what 1_data makes of them, and aid/heads."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from companion.data import head_sequences
from companion.data.head_sequences import draw_gaps, head_sequence, leaves_sequence
from companion.data.heads import bias_field, bias_fields, texture, textures
from companion.data.phase import OWN_CONSTANT, add_phase
from companion.data.sequences import brightness, shown_sequences
from companion.diffusion.symmetry import Symmetries, symmetries_of
from companion.models.architectures import build, network_of
from companion.models.checkpoint import describe, load_denoiser
from companion.models.errors import load_errors
from companion.models.folder import save_checkpoint
from companion.networks.causal_unet import CONTEXT_BRANCH, CausalUNet
from companion.papers.aid import data as aid
from companion.papers.aid import prior as aid_prior
from companion.papers.aid.reconstruct import weights_of
from companion.papers.general import crop, scanned
from companion.reconstruction.sequence import CONTEXT_GIVEN, Prior
from companion.training.sequences import sequence_config


def rng(*seed):
    return np.random.default_rng(seed)


def test_seed_decides_stack(head):
    for make in (lambda seed: head_sequence(head, rng(seed), 48, 3), lambda seed: leaves_sequence(rng(seed), 48, 3)):
        stack = make(3)
        assert stack.shape == (3, 48, 48) and stack.dtype == np.float32 and np.isfinite(stack).all()
        assert np.array_equal(stack, make(3)) and not np.array_equal(stack, make(4))


def test_neighbours_are_alike_more_than_far_slices(head):
    near, far = [], []
    for seed in range(8):
        stack = head_sequence(head, rng(seed), 48, 4, 2.0, [2.0] * 3)
        near.append(np.abs(stack[1:] - stack[:-1]).mean())
        far.append(np.abs(stack[-1] - stack[0]).mean())
    assert sum(near) < 0.6 * sum(far)


def test_slices_at_one_place_are_the_same(head):
    for seed in range(4):  # lesions, texture, bias and resolution among them
        stack = head_sequence(head, rng(seed), 32, 3, 3.0, [0.0, 0.0])
        assert np.array_equal(stack[0], stack[1]) and np.array_equal(stack[0], stack[2])


def test_slices_of_a_stack_are_as_far_apart_as_said(head):
    stacks = [head_sequence(head, rng(7), 32, 2, 2.0, [gap]) for gap in (1.0, 10.0)]
    assert np.abs(stacks[0][1] - stacks[0][0]).mean() < np.abs(stacks[1][1] - stacks[1][0]).mean()
    for wrong in ([1.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="expected 2 distances of at least 0 for 3 frames"):
            head_sequence(head, rng(0), 32, 3, 2.0, wrong)


def test_some_neighbours_tell_little():
    gaps = np.stack([draw_gaps(rng(i), 4, 1.0) for i in range(300)])
    assert 0.05 < (gaps.max(1) > 8).mean() < 0.2
    assert 0.1 < (np.ptp(gaps, 1) > 0).mean() < 0.35
    assert draw_gaps(rng(0), 1, 1.0).shape == (0,)


def test_texture_and_bias_of_one_slice_are_those_of_stacks():
    assert np.array_equal(texture(24, rng(1)), textures(24, rng(1), [2.0, 3.0])[0])
    assert np.array_equal(bias_field(24, rng(1)), bias_fields(24, rng(1), [0.0])[0])
    grain = textures(64, rng(1), [0.5, 100.0])
    assert np.corrcoef(grain[0].ravel(), grain[1].ravel())[0, 1] > np.corrcoef(grain[1].ravel(), grain[2].ravel())[0, 1]


def test_phase_changes_slowly_along_a_stack():
    stack = torch.ones(40, 4, 1, 24, 24)
    phased = add_phase(stack, torch.Generator().manual_seed(0))
    assert phased.shape == stack.shape and torch.equal(phased, add_phase(stack, torch.Generator().manual_seed(0)))
    change = (phased[:, 1:] * phased[:, :-1].conj()).mean((2, 3, 4)).abs()
    jumps = torch.angle((phased[:, 1:] * phased[:, :-1].conj()).mean((2, 3, 4))).abs().amax(1) > 0.8
    assert change.mean() > 0.8 and jumps.float().mean() < 3 * OWN_CONSTANT
    one = torch.rand(3, 1, 16, 16)
    assert torch.equal(
        add_phase(one, torch.Generator().manual_seed(2)),
        add_phase(one[:, None], torch.Generator().manual_seed(2))[:, 0],
    )


def test_stacks_are_cropped_and_scanned_as_one():
    stack = torch.rand(1, 1, 12, 10).expand(3, 1, 12, 10).half()
    part = crop(stack, torch.Generator().manual_seed(3), 6)
    assert part.shape == (3, 1, 6, 6) and part.dtype == torch.float32 and torch.equal(part[0], part[2])
    x = scanned(torch.rand(2, 3, 1, 16, 16), torch.Generator().manual_seed(0))
    assert x.shape == (2, 3, 1, 16, 16) and x.is_complex()


# ------------------------------------------------------------------------------------------------------------ notebooks


def options(folder, **values):
    return aid.PrepareData(
        **dict(source="heads", data=str(folder / "heads.h5"), image_size=32, frames=3, subjects=4, validation_share=0.5)
        | values
    )


def test_without_the_real_heads_it_is_said_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="is missing; run: companion data get heads"):
        aid.prepare(options(tmp_path, heads=str(tmp_path / "nothing")), progress=False)
    assert not (tmp_path / "heads.h5").exists()


@pytest.fixture
def prepared(tmp_path, head, monkeypatch):
    monkeypatch.setattr(head_sequences, "load_heads", lambda folder, split: [replace(head, name=split)])
    return aid.prepare(options(tmp_path), progress=False)


def test_stacks_are_prepared(prepared):
    assert prepared.shapes == {"signal": (6, 3, 1, 32, 32)} and len(prepared.rows("validation")) == 2
    x = shown_sequences(prepared, 2, 3.0, 0)
    assert x.dtype == torch.complex64 and 0 < brightness(prepared) < 3


def test_a_step_of_training_moves_the_context_branch_alone(prepared, tmp_path):
    p = aid_prior.TrainSequence(
        data=str(prepared.path), out=str(tmp_path / "out"), validation="none", stage="second", window=2,
        model_channels=32, channel_mult=(1, 1), num_heads=0, context_heads=2, scanned=True, crop=16,
        phase_spacing_mm=None, mirror=False, batch_size=2, steps=2, warmup=1, checkpoint_every=1, context_noise=0.1,
        start_from=str(tmp_path / "single"), autocast=None,
    )  # fmt: skip
    single = sequence_config(replace(p, model="single"), prepared, True, aid_prior.SYMMETRIES)
    D = build(single).eval()
    for i, tensor in enumerate(D.parameters()):
        torch.nn.init.normal_(tensor, std=0.05, generator=torch.Generator().manual_seed(i))
    save_checkpoint(tmp_path / "single", D, single, {"steps": 0})
    result, config = aid_prior.train(p, progress=False)
    assert result.finished and symmetries_of(result.model) == Symmetries(mirror=True, turn=True, phase=True)
    main, trained = network_of(D).state_dict(), network_of(result.model).state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in main.items())
    assert trained.keys() - main.keys() == {name for name in trained if name.startswith(CONTEXT_BRANCH)}
    assert any(trained[name].any() for name in trained if name.endswith("modulation.1.weight"))
    x, sigma = torch.randn(1, 1, 16, 16, dtype=torch.complex64), torch.tensor([0.3])
    with torch.no_grad():
        assert torch.allclose(result.model(x, sigma), D(x, sigma), atol=1e-3)
        assert not torch.equal(result.model(x, sigma, x[:, None]), result.model(x, sigma))
    with pytest.raises(ValueError, match=r"set phase_spacing_mm: null, not 3.25"):
        aid_prior.train(replace(p, phase_spacing_mm=3.25), progress=False)


def test_context_has_heads_of_its_own(prepared):
    network = CausalUNet(2, 2, 32, 3, concat_cond=False, channel_mult=(1, 1), num_heads=0, context_heads=2)
    assert network.x0_blocks[1]["1"].attn.num_heads == 2 and len(network.middle_block) == 2
    p = aid_prior.TrainSequence(num_heads=0, context_heads=2)
    assert sequence_config(p, prepared, True)["network"]["context_heads"] == 2
    assert "context_heads" not in sequence_config(aid_prior.TrainSequence(), prepared, True)["network"]


# ------------------------------------------------------------------------------------------------------------- weights


def test_without_context_aid_heads_is_its_main_branch():
    about, D = describe("aid/heads"), load_denoiser("aid/heads", autocast=None)
    general = describe("general/2d")["network"]
    single = build({"network": general, "denoiser": about["denoiser"], "data": about["data"]}).eval()
    state = network_of(D).state_dict()
    network_of(single).load_state_dict({k: v for k, v in state.items() if not k.startswith(CONTEXT_BRANCH)})
    x = torch.randn(2, 1, 32, 16, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 1.0])
    with torch.no_grad():
        for ours, theirs in zip(D.moments(x, sigma), single.moments(x, sigma), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
        assert not torch.allclose(D(x, sigma, x[:, None]), D(x, sigma), atol=1e-3)
    assert about["data"]["magnitude_q99"] == pytest.approx(0.72, abs=0.01)


def test_errors_are_kept_beside_aid_heads():
    prior, errors = Prior.load("aid/heads", ""), load_errors("aid/heads")
    near = prior.known(errors, 1.0)
    assert near.alone is errors["heads"] and near.given is errors[f"heads{CONTEXT_GIVEN}"]
    far = prior.known(errors, 3.25)
    assert far.given is errors[f"heads, large pixels{CONTEXT_GIVEN}"]
    with pytest.raises(ValueError, match="expected some alone and, of a prior of sequences"):
        prior.known(load_errors("general/2d"), 1.0)
    assert weights_of(None, "brain") == "aid/brain" and weights_of(None, "scan.h5") == "aid/heads"
    assert weights_of("mine", "brain") == "mine"
