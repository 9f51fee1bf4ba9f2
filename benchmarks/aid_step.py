"""Compares one step of the sequence network with the published computation: operations and CPU time.

    python benchmarks/aid_step.py --out runs/benchmarks/aid_step

A step is one evaluation of the network for a new frame (or several draws of it) given a full window. Ways:
    published     a plain re-expression of how the released code samples (arXiv 2405.14327), below
    last          CausalUNet(context="last"): the same numbers, from the one frame that they depend on
    full          CausalUNet(context="full"): all frames of the window count, as in training
    full, cached  the same numbers again, by `CausalUNet.caching`, when all but the newest frame were seen before
Operations are counted (multiply-add = 2) at the published configurations, without memory for them. CPU times are
taken at a small fastMRI-like size and at the published cardiac layout: one process, one thread, same weights,
the ways in turn; the ratios are medians over rounds of published / ours. Before anything is timed `last` must
equal the published computation, and the cache must change nothing.
Writes table.md, table.csv and results.json into --out, whole or not at all.
"""

import argparse
import csv
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from companion.files import atomic_write, code_version
from companion.networks import CausalUNet, default_channel_mult
from companion.networks.causal_blocks import DiTBlock, FrameAttention, Memory

FASTMRI = dict(
    seq_len=10,
    in_channels=2,
    model_channels=128,
    out_channels=4,
    num_res_blocks=2,
    channel_mult=default_channel_mult(320),
    attention_resolutions=(16, 32),
    num_heads=4,
    use_scale_shift_norm=True,
)
CARDIAC = dict(
    seq_len=42,
    in_channels=3,
    model_channels=64,
    out_channels=6,
    num_res_blocks=2,
    channel_mult=default_channel_mult(32),
    attention_resolutions=(2, 4, 8),
    num_heads=4,
    use_scale_shift_norm=True,
    complicated_x0=True,
    num_complicated=1,
)
COUNTED = {"fastMRI 320": (FASTMRI, 320), "cardiac latent 32": (CARDIAC, 32)}
TIMED = {"fastMRI-like 128": (FASTMRI | {"model_channels": 64}, 128), "cardiac latent 32": (CARDIAC, 32)}
WAYS = ("published", "last", "full", "full, cached")


# ------------------------------------------------------------ the published computation, plainly, from the formulas
def published(net: CausalUNet, x: Tensor, t: Tensor, window: Tensor, slot: int = -1) -> Tensor:
    """The output for x (draw, channel, y, x) given slot `slot` of window (1, frame, channel, y, x).

    The window is repeated for each draw and all of its frames go through the context branch; the transformer
    blocks see sequences (draw * pixel, frame, channel), and every sequence has its own adaLN vectors; queries
    and keys are those of the one slot, whose answer is added to all frames.
    """
    frames = window.shape[1]
    h = window.expand(len(x), -1, -1, -1, -1).flatten(0, 1)
    emb = net.embed(t.expand(len(x)))
    of_frames = emb.repeat_interleave(frames, dim=0)
    h = net.x0_blocks[0][0](h)
    features = []
    for group in net.x0_blocks[1:]:
        for block in group.values():
            h = published_dit(block, h, emb, slot) if isinstance(block, DiTBlock) else block(h, of_frames)
        features.append(h.unflatten(0, (-1, frames))[:, slot])
    return net.run(x, emb, lambda level, h: torch.cat([h, features[level]], dim=1))


def published_dit(block: DiTBlock, h: Tensor, emb: Tensor, slot: int) -> Tensor:
    """A transformer block on h (draw * frame, channel, y, x)."""
    channels, height, width = h.shape[1:]
    x = h.unflatten(0, (len(emb), -1)).permute(0, 3, 4, 1, 2).flatten(0, 2)  # (draw * pixel, frame, channel)
    vectors = block.adaLN_modulation(emb.repeat_interleave(height * width, dim=0))[:, None]
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors.chunk(6, dim=-1)
    x = x + gate_a * published_attention(block.attn, norm(x) * (1 + scale_a) + shift_a, slot)
    x = x + gate_m * block.mlp(norm(x) * (1 + scale_m) + shift_m)
    return x.unflatten(0, (-1, height, width)).permute(0, 3, 4, 1, 2).reshape(-1, channels, height, width)


def published_attention(attn: FrameAttention, x: Tensor, slot: int) -> Tensor:
    """The answer (sequence, 1, channel) of one slot of x (sequence, frame, channel) to itself."""
    own = x[:, [slot]]
    q, k, v = (f(own).unflatten(-1, (attn.num_heads, -1)) for f in (attn.queries, attn.keys, attn.values))
    logits = torch.einsum("snhc,smhc->shnm", q, k)
    mask = torch.ones_like(logits).tril()
    weights = ((logits + (1 - mask) * -1e9) / x.shape[-1] ** 0.5).softmax(-1)
    return attn.fc_out(torch.einsum("shnm,smhc->snhc", weights, v).flatten(2))


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


# ------------------------------------------------------------------------------------------------------- both ways
def network(options: dict) -> CausalUNet:
    """A network with random weights, also where training starts from zero."""
    net = CausalUNet(**options).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        if not p.is_meta:
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.1
            p.copy_(scale * torch.randn(p.shape, generator=generator) + (p.ndim == 1) * p)
    return net


def inputs(options: dict, size: int, draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (draw, channel, size, size), t (1,), window (1, frame, channel, size, size)."""
    generator = torch.Generator().manual_seed(1)
    shape = (options["in_channels"], size, size)
    x = torch.randn(draws, *shape, generator=generator, device="cpu")
    window = torch.randn(1, options["seq_len"], *shape, generator=generator, device="cpu")
    device = torch.get_default_device()
    return x.to(device), torch.full((1,), 500.0), window.to(device)


def step(net: CausalUNet, way: str, x: Tensor, t: Tensor, window: Tensor) -> Tensor:
    """One step; "full, cached" needs a net within `caching` that has seen window[:, :-1] at t."""
    if way == "published":
        return published(net, x, t, window)
    net.context = "last" if way == "last" else "full"
    return net(x, t, window)


def operations(call: Callable) -> float:
    """10^9 floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


@torch.inference_mode()
def count(name: str, draws: int) -> list[dict]:
    """Operations of each way at a published configuration."""
    options, size = COUNTED[name]
    with torch.device("meta"):
        net = network(options)
        x, t, window = inputs(options, size, draws)
        memory = Memory()  # tensors without values cannot be compared, so the cache is bypassed
        net.condition_anew(window[:, :-1], t, memory=memory)
        calls = {way: lambda way=way: step(net, way, x, t, window) for way in WAYS[:-1]}
        calls["full, cached"] = lambda: net(x, t, net.condition_anew(window, t, memory=memory))
        return [dict(size=name, draws=draws, way=way, gflop=operations(calls[way])) for way in WAYS]


# ----------------------------------------------------------------------------------------------------------- times
@torch.inference_mode()
def timed(net: CausalUNet, way: str, x: Tensor, t: Tensor, window: Tensor) -> tuple[Tensor, float]:
    """(output, seconds) of one step."""
    if way != "full, cached":
        began = time.process_time()
        return step(net, way, x, t, window), time.process_time() - began
    net.context = "full"
    with net.caching(2**33) as report:
        net.condition(window[:, :-1], t)
        began = time.process_time()
        out = step(net, way, x, t, window)
        seconds = time.process_time() - began
    if report.extensions != 1:
        raise RuntimeError(f"the cache did not serve the new frame: {report}")
    return out, seconds


def same(name: str, ours: Tensor, reference: Tensor, tolerance: float) -> float:
    """The largest difference in units of the largest value; RuntimeError if it exceeds tolerance."""
    difference = ((ours - reference).abs().max() / reference.abs().max()).item()
    if not difference <= tolerance:
        raise RuntimeError(f"{name}: the results differ by {difference:.2g} of their size")
    return difference


def race(name: str, draws: int, rounds: int) -> list[dict]:
    """Times of each way, taken in turn, and how many times faster than the published one it is."""
    options, size = TIMED[name]
    net, given = network(options), inputs(options, size, draws)
    outputs = {way: timed(net, way, *given)[0] for way in WAYS}  # the warm-up
    differences = dict.fromkeys(WAYS, 0.0)
    differences["last"] = same(f"{name}, last", outputs["last"], outputs["published"], 1e-4)
    differences["full, cached"] = same(f"{name}, cache", outputs["full, cached"], outputs["full"], 1e-4)
    seconds = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            seconds[way].append(timed(net, way, *given)[1])
    rows = []
    for way in WAYS:
        ratios = sorted(a / b for a, b in zip(seconds["published"], seconds[way], strict=True))
        row = dict(size=name, draws=draws, way=way, seconds=statistics.median(seconds[way]))
        row |= dict(ratio=statistics.median(ratios), ratio_min=ratios[0], ratio_max=ratios[-1])
        rows.append(row | dict(rounds=rounds, difference=differences[way]))
    return rows


# ---------------------------------------------------------------------------------------------------------- report
def markdown(counts: list[dict], times: list[dict]) -> str:
    """Two tables: operations, times."""
    lines = ["Operations of one step, 10^9 (multiply-add = 2).\n"]
    lines += ["| configuration | draws | " + " | ".join(WAYS) + " |", "|---" * (2 + len(WAYS)) + "|"]
    for i in range(0, len(counts), len(WAYS)):
        rows = counts[i : i + len(WAYS)]
        cells = " | ".join(f"{r['gflop']:.1f}" for r in rows)
        lines.append(f"| {rows[0]['size']} | {rows[0]['draws']} | {cells} |")
    lines += ["\nCPU time of one step, one thread; how many times faster than the published computation.\n"]
    lines += ["| configuration | draws | way | seconds | faster (least to most of the rounds) |", "|---" * 5 + "|"]
    for r in times:
        ratio = f"{r['ratio']:.2f} ({r['ratio_min']:.2f} to {r['ratio_max']:.2f})"
        lines.append(f"| {r['size']} | {r['draws']} | {r['way']} | {r['seconds']:.3f} | {ratio} |")
    return "\n".join(lines) + "\n"


def main(argv=None) -> tuple[list[dict], list[dict]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/aid_step"))
    parser.add_argument("--rounds", type=int, default=7, help="timed repetitions of each way")
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 4], help="draws of the frame in one step")
    parser.add_argument("--sizes", nargs="+", default=list(TIMED), choices=list(TIMED), help="which to time")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    counts = [row for name in COUNTED for draws in args.draws for row in count(name, draws)]
    times = []
    for name in args.sizes:
        for draws in args.draws:
            times += race(name, draws, args.rounds)
            for r in times[-len(WAYS) :]:
                print(f"{name}, {draws} draws, {r['way']}: {r['seconds']:.3f} s, {r['ratio']:.2f} x", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, times[0])
    writer.writeheader()
    writer.writerows(times)
    results = dict(torch=torch.__version__, code=code_version(), threads=1, operations=counts, times=times)
    for name, content in {
        "table.md": markdown(counts, times),
        "table.csv": text.getvalue(),
        "results.json": json.dumps(results, indent=1) + "\n",
    }.items():
        with atomic_write(args.out / name) as path:
            path.write_text(content)
    print(markdown(counts, times))
    return counts, times


if __name__ == "__main__":
    main()
