import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_training as tiny
import torch
from safetensors.torch import load_file
from tiny_training import DATA, augment, loss, new_model
from torch import nn

from companion.files import sha256
from companion.training.loop import TrainConfig, derive, permutation, train

CONFIG = dataclasses.replace(tiny.CONFIG, grad_accumulation=1, ema_halflife=None, channels_last=False)


def run(
    folder,
    config=CONFIG,
    *,
    model=None,
    loss=loss,
    data=DATA,
    augment=augment,
    about=None,
    validate=None,
    **changes,
):
    """A tiny training in this process; `changes` are of the config."""
    config, model = dataclasses.replace(config, **changes), model or new_model()
    hooks = {"augment": augment, "about": about, "validate": validate}
    return train(model, loss, data, config, folder, **hooks, progress=False)


def losses(folder) -> list[float]:
    lines = map(json.loads, (Path(folder) / "stats.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def start(*command) -> str:
    """The output of `python *command` in a process with one thread; fails with its errors."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ----------------------------------------------------------------------------------------------------------
# The mathematics


def test_learning_rate_follows_the_published_formula():
    """Linear from 1e-5 to 2e-4, then half a cosine to 4e-6."""
    steps, warmup = 1000, 100
    config = TrainConfig(steps=steps, warmup=warmup, learning_rate=2e-4, schedule="cosine")
    for n in (0, 40, 99, 100, 333, 999):
        if n <= warmup:
            expected = 1e-5 + (2e-4 - 1e-5) * n / warmup
        else:
            expected = 4e-6 + (2e-4 - 4e-6) / 2 * (1 + math.cos(math.pi * (n - warmup) / (steps - warmup)))
        assert math.isclose(config.rate(n), expected, rel_tol=1e-12)
    assert TrainConfig(learning_rate=3e-4).rate(777) == 3e-4


def test_ema_halflife_halves_in_so_many_images():
    config = TrainConfig(batch_size=10, ema_halflife=200, ema_rampup=None)
    assert math.isclose(config.ema_beta(5) ** (200 / 10), 0.5)
    ramp = TrainConfig(batch_size=10, ema_halflife=200, ema_rampup=0.05)
    assert ramp.ema_beta(0) == 0
    assert math.isclose(ramp.ema_beta(100), 0.5 ** (10 / 50))  # 1,000 images seen: half-life 50
    assert math.isclose(ramp.ema_beta(10**6), 0.5 ** (10 / 200))


def test_loop_is_plain_adamw_with_clipping_and_averaging(tmp_path):
    """The loop against eight lines of textbook PyTorch."""
    config = dataclasses.replace(CONFIG, clip_norm=0.3, weight_decay=0.1, ema_decay=0.9, grad_accumulation=2)
    result = run(tmp_path, config, augment=None)

    model = new_model()
    average = [p.detach().clone() for p in model.parameters()]
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    for step in range(config.steps):
        stream = range(step * 8, step * 8 + 8)
        indices = [int(permutation(0, i // 29, 29)[i % 29]) for i in stream]
        batch_loss = 0.0
        for piece in range(2):
            torch.manual_seed(derive(0, 3, step, piece))
            generator = torch.Generator().manual_seed(derive(0, 4, step, piece))
            batch_loss = batch_loss + loss(model, DATA[indices[piece * 4 : piece * 4 + 4]], generator).sum() / 8
        optimiser.zero_grad()
        batch_loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimiser.param_groups[0]["lr"] = config.rate(step)
        optimiser.step()
        average = [0.9 * a + 0.1 * p.detach() for a, p in zip(average, model.parameters(), strict=True)]
        assert math.isclose(losses(tmp_path)[step], batch_loss.item(), rel_tol=1e-5)
    for ours, theirs in zip(result.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(result.ema.parameters(), average, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_epoch_shows_every_item_once():
    order = [permutation(5, epoch, 29).tolist() for epoch in (0, 1)]
    assert sorted(order[0]) == sorted(order[1]) == list(range(29)) and order[0] != order[1]


def test_pieces_of_a_batch_change_nothing(tmp_path):
    def plain(model, x, generator):
        return (model(x) - x).square().flatten(1).mean(1)

    model = nn.Conv2d(1, 1, 3, padding=1)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    a = run(tmp_path / "1", model=model, loss=plain)
    model.load_state_dict(state)
    b = run(tmp_path / "4", model=model, loss=plain, grad_accumulation=4, workers=1)
    np.testing.assert_allclose(losses(a.folder), losses(b.folder), rtol=1e-5)


def test_precision_and_layout_are_only_rounding(tmp_path):
    reference = run(tmp_path / "a")
    layout = run(tmp_path / "b", channels_last=True)
    bf16 = run(tmp_path / "c", channels_last=True, autocast="bfloat16")
    np.testing.assert_allclose(losses(layout.folder), losses(reference.folder), rtol=1e-4)
    np.testing.assert_allclose(losses(bf16.folder), losses(reference.folder), rtol=3e-2)
    assert all(p.dtype == torch.float32 for p in bf16.ema.parameters())


def test_global_random_state_is_left_alone(tmp_path):
    model = new_model()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    run(tmp_path, model=model)
    assert torch.equal(torch.rand(3), expected)


# ----------------------------------------------------------------------------------------------------------
# Stopping and going on


def test_ten_kills_change_no_bit(tmp_path):
    """Ten times kill -9 at random moments: the losses and the final state are those of the quiet run."""
    assert "kills: 10" in start(tiny.__file__, "kills", tmp_path)
    assert losses(tmp_path / "killed") == losses(tmp_path / "quiet")
    killed, quiet = (load_file(tmp_path / name / "state.safetensors") for name in ("killed", "quiet"))
    assert killed.keys() == quiet.keys() and all(torch.equal(killed[k], quiet[k]) for k in quiet)
    assert not [path for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]


def test_two_processes_match_one(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start(*launcher, tiny.__file__, "plain", tmp_path / "two")
    one = run(tmp_path / "one", tiny.CONFIG)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(one.folder), rtol=1e-6)
    two = load_file(tmp_path / "two" / "state.safetensors")
    for name, value in one.ema.state_dict().items():
        torch.testing.assert_close(two[f"ema.{name}"], value, rtol=1e-4, atol=1e-6)


def test_four_processes_one_of_them_killed_match_one(tmp_path):
    """A rank is killed after the checkpoint of step 6; torchrun starts all again, and the losses are those of one."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "--max-restarts=1"]
    start(*launcher, tiny.__file__, "killed", tmp_path / "four")
    one = run(tmp_path / "one", dataclasses.replace(tiny.CONFIG, **tiny.FOUR))
    assert len(losses(tmp_path / "four")) == 12
    np.testing.assert_allclose(losses(tmp_path / "four"), losses(one.folder), rtol=1e-6)


def test_shards_match_one_process(tmp_path):
    """FSDP of a small 3D network over two processes, stopped and continued, against one process without shards."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start(*launcher, tiny.__file__, "sharded", tmp_path / "two")
    tiny.sharded(tmp_path / "one", shard=False)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-6)
    two, one = (load_file(tmp_path / name / "state.safetensors") for name in ("two", "one"))
    assert two.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)


def test_pieces_that_cannot_be_shared_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="set it to a multiple of 2"):
        run(tmp_path)


def test_time_budget_stops_with_a_checkpoint_and_more_time_goes_on(tmp_path):
    stopped = run(tmp_path / "a", seconds=1e-6)
    assert stopped.step == 1 and not stopped.finished
    assert run(tmp_path / "a", seconds=1e-6).step == 1  # the time is used up
    finished = run(tmp_path / "a")
    assert finished.finished and losses(finished.folder) == losses(run(tmp_path / "b").folder)


def test_finished_training_returns_at_once(tmp_path):
    first = run(tmp_path)
    before = sha256(tmp_path / "state.safetensors"), len(first.stats)

    def never(*_):
        raise AssertionError("a finished training computes nothing")

    again = run(tmp_path, loss=never)
    assert (sha256(tmp_path / "state.safetensors"), len(again.stats)) == before
    assert again.finished and again.loss == first.loss == first.stats[-1]["loss"]
    for a, b in zip(again.ema.parameters(), first.ema.parameters(), strict=True):
        assert torch.equal(a, b)


def test_constant_rate_may_go_on_for_longer(tmp_path):
    run(tmp_path / "a", schedule="constant", steps=6)
    longer = run(tmp_path / "a", schedule="constant")
    assert losses(longer.folder) == losses(run(tmp_path / "b", schedule="constant").folder)


def test_another_training_is_refused_with_the_differences(tmp_path):
    run(tmp_path, about={"sigma_data": 0.5})
    before = sha256(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=r"config\.learning_rate: 0\.01 there, 0\.02 here"):
        run(tmp_path, about={"sigma_data": 0.5}, learning_rate=2e-2)
    with pytest.raises(ValueError, match=r"about\.sigma_data: 0\.5 there, 0\.4 here"):
        run(tmp_path, about={"sigma_data": 0.4})
    with pytest.raises(ValueError, match=r"model\.weight: \(absent\) there, \[1, 1, 3, 3\] here"):
        run(tmp_path, about={"sigma_data": 0.5}, model=nn.Conv2d(1, 1, 3, padding=1))
    with pytest.raises(ValueError, match="dataset length: 29 there, 28 here"):
        run(tmp_path, about={"sigma_data": 0.5}, data=DATA[:28])
    assert sha256(tmp_path / "state.safetensors") == before


def test_validation_sees_the_average_and_is_logged(tmp_path):
    seen = []

    def validate(ema):
        seen.append(ema[0].weight.clone())
        return {"error": torch.tensor(0.25)}

    result = run(tmp_path, validate=validate)
    assert [line["step"] for line in result.stats if line.get("error") == 0.25] == [5, 10, 12]
    assert torch.equal(seen[-1], result.ema[0].weight)


# ----------------------------------------------------------------------------------------------------------
# What goes wrong


def test_nan_image_is_named_and_nothing_is_written(tmp_path):
    bad = DATA.clone()
    bad[17, 0, 3, 3] = math.nan
    with pytest.raises(ValueError, match="item 17 of the training data holds NaN"):
        run(tmp_path, data=bad)
    assert not (tmp_path / "state.safetensors").exists()


def test_non_finite_loss_names_the_step_and_keeps_the_checkpoint(tmp_path):
    calls = []

    def fails(model, x, generator):
        calls.append(0)
        return loss(model, x, generator) * (math.inf if len(calls) == 9 else 1)

    model = new_model()
    with pytest.raises(FloatingPointError, match="step 8: the loss is inf"):
        run(tmp_path, loss=fails, model=model)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses(run(tmp_path).folder) == losses(run(tmp_path.with_name("quiet")).folder)


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    wide = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 1, 3, padding=1))
    run(tmp_path, model=wide, schedule="constant", steps=5)
    before = sha256(tmp_path / "state.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))  # files beyond 8 kB fail, as on a full disk
    try:
        with pytest.raises(OSError, match="could not be written .* last checkpoint is untouched"):
            run(tmp_path, model=wide, schedule="constant", steps=10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sha256(tmp_path / "state.safetensors") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "state.safetensors",
        "stats.jsonl",
        "tensorboard",
    ]


def test_damaged_checkpoint_is_one_message(tmp_path):
    run(tmp_path)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is no training checkpoint .* delete it"):
        run(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps is 0; it must be positive"),
        ({"schedule": "linear"}, "choose one of .*cosine"),
        ({"batch_size": 10, "grad_accumulation": 3}, "cannot be cut into 3 equal pieces"),
        ({"steps": 10, "warmup": 10}, "does not end before"),
        ({"autocast": "float16"}, "bfloat16"),
    ],
)
def test_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_config_reads_text_as_numbers():
    assert TrainConfig(learning_rate="1e-3", betas=[0.9, "0.99"]).learning_rate == 1e-3
    with pytest.raises(TypeError, match="steps must be a whole number"):
        TrainConfig(steps="many")


def test_loss_must_be_per_sample(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(\); expected \(8,\)"):
        run(tmp_path, loss=lambda model, x, generator: (model(x) - x).square().mean())
