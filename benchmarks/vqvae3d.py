"""Compares a training step of the 3D VQ-VAE with MONAI's, in time and memory, and encodes a large volume.

    python benchmarks/vqvae3d.py --out runs/benchmarks/vqvae3d

Both have the same layout and weights, loss (L1 + quantisation), optimiser (Adam) and volumes; their outputs,
losses and codebooks must agree before anything is timed. Where MONAI is not installed a plain re-expression of
its layers, below, takes its place, and the table says so. Ways:
    reference       MONAI's VQVAE, or the re-expression
    ours            VQVAE
    ours, checkpointed    VQVAE(use_checkpoint=True): activations are recomputed in the backward pass
    ours, channels last   weights and volumes in that memory format, as `companion.training.loop` keeps them
    reference, channels last    the same call on the reference
Times: one process, the ways in turn, processor time on CPUs; the ratios are medians over rounds of
reference / ours, with their quartiles. Memory: the most that one step adds to a process of its own, weights,
gradients and moments of Adam included. Then the peak memory of whole processes that encode and decode a
volume at once, or in tiles. Writes table.md and results.json into --out, whole or not at all.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion.files import atomic_write, code_version
from companion.networks import VQVAE, AutoencoderKL

try:
    from monai.networks.nets import VQVAE as MonaiVQVAE
except ImportError:
    MonaiVQVAE = None

WAYS = ("reference", "ours", "ours, checkpointed", "ours, channels last", "reference, channels last")
CODECS = {
    "VQVAE 96,96,192 (MONAI's default)": lambda: VQVAE(),
    "AutoencoderKL 32,64,64 (MONAI's 3D tutorial)": lambda: AutoencoderKL(
        3, 1, 1, 32, (1, 2, 2), 1, 3, decoder_blocks=1, middle=False, norm_groups=16
    ),
}


# ------------------------------------------------------------ the published computation, plainly, from the formulas
class Plain(nn.Module):
    """MONAI's VQVAE from its formulas: ReLUs that keep their input, one-hot codes, matrices of all distances."""

    def __init__(self, codec: VQVAE):
        super().__init__()
        self.codec = codec

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.path(self.codec.encoder.blocks, x)
        q, loss = self.quantise(z)
        return self.path(self.codec.decoder.blocks, q), loss

    def path(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            if hasattr(block, "conv1"):
                x = F.relu(x + block.conv2.conv(F.relu(block.conv1.conv(x))), inplace=True)
            else:
                x = block.conv(x)
                x = F.relu(x) if block.act else x
        return x

    def quantise(self, z: Tensor) -> tuple[Tensor, Tensor]:
        book = self.codec.quantizer["quantizer"]
        e, d, K = book.embedding.weight, book.decay, len(book.embedding.weight)
        channels_last = z.float().movedim(1, -1).contiguous()
        flat = channels_last.reshape(-1, e.shape[1])
        distances = (flat**2).sum(1, keepdim=True) + (e.T**2).sum(0, keepdim=True) - 2 * flat @ e.T
        chosen = distances.argmin(1)
        onehot = F.one_hot(chosen, K).type_as(z)
        q = F.embedding(chosen.reshape(channels_last.shape[:-1]), e).movedim(-1, 1).contiguous()
        if self.training:
            with torch.no_grad():
                book.ema_cluster_size.mul_(d).add_(onehot.sum(0) * (1 - d))
                total = book.ema_cluster_size.sum()
                size = (book.ema_cluster_size + book.epsilon) / (total + K * book.epsilon) * total
                book.ema_w.mul_(d).add_((onehot.T @ flat) * (1 - d))
                book.embedding.weight.copy_(book.ema_w / size[:, None])
        loss = book.commitment * F.mse_loss(q.detach(), z)
        return z + (q - z).detach(), loss


# ------------------------------------------------------------------------------------------------------- both ways
def layout(args) -> dict:
    return dict(channels=args.channels, num_res_channels=args.channels, num_res_layers=2, num_embeddings=256)


def network(way: str, args) -> nn.Module:
    """One of WAYS in training mode, with the same weights for all."""
    torch.manual_seed(0)
    ours = VQVAE(3, 1, 1, **layout(args), embedding_dim=32, use_checkpoint=way.endswith("checkpointed"))
    if way.startswith("ours"):
        return ours.to(args.device).train()
    if MonaiVQVAE is None:
        return Plain(ours).to(args.device).train()
    levels = len(args.channels)
    reference = MonaiVQVAE(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        **layout(args),
        embedding_dim=32,
        downsample_parameters=[(2, 4, 1, 1)] * levels,
        upsample_parameters=[(2, 4, 1, 1, 0)] * levels,
    )
    reference.load_state_dict(ours.state_dict())
    return reference.to(args.device).train()


class Training:
    """A network with its optimiser; `step` is one step of training."""

    def __init__(self, way: str, args):
        self.net = network(way, args)
        self.format = torch.channels_last_3d if way.endswith("channels last") else torch.contiguous_format
        self.net.to(memory_format=self.format)
        self.optimiser = torch.optim.Adam([p for p in self.net.parameters() if p.requires_grad], 1e-4)

    def step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x_hat, regulariser = self.net(x.contiguous(memory_format=self.format))[:2]
        loss = F.l1_loss(x_hat, x) + regulariser.mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.detach(), x_hat.detach()

    def codebook(self) -> Tensor:
        return next(v for k, v in self.net.state_dict().items() if k.endswith("embedding.weight"))


def volumes(size: int, args) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(args.batch, 1, *[size] * 3, generator=generator).to(args.device)


def check(trainings: dict[str, Training], x: Tensor) -> float:
    """Two steps of each way; the largest difference from the reference. RuntimeError if it is not rounding."""
    results = {}
    for way, training in trainings.items():
        losses = [training.step(x) for _ in range(2)]
        results[way] = [*(part for pair in losses for part in pair), training.codebook()]
    worst = 0.0
    for way in WAYS[1:]:
        for ours, reference in zip(results[way], results["reference"], strict=True):
            worst = max(worst, ((ours - reference).abs().max() / reference.abs().max()).item())
    if not worst < 1e-3:
        raise RuntimeError(f"the ways differ by {worst:.2g} of their size after two steps")
    return worst


def seconds(training: Training, x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if x.is_cuda else time.process_time
    began = clock()
    training.step(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - began


def race(args) -> tuple[list[dict], float]:
    """Times of each way, taken in turn, and how many times faster than the reference it is."""
    trainings, x = {way: Training(way, args) for way in WAYS}, volumes(args.size, args)
    difference = check(trainings, x)
    times = {way: [] for way in WAYS}
    for i in range(args.rounds):
        for way in WAYS[i % len(WAYS) :] + WAYS[: i % len(WAYS)]:
            times[way].append(seconds(trainings[way], x))
    rows = []
    for way in WAYS:
        ratios = [a / b for a, b in zip(times["reference"], times[way], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row = dict(way=way, seconds=statistics.median(times[way]), faster=middle, low=low, high=high)
        rows.append(row | dict(memory=apart(f"step:{way}", args)))
    return rows, difference


# ---------------------------------------------------------------------------------------------------------- memory
def apart(task: str, args) -> float:
    """The MiB that a task needs, measured in a process of its own."""
    given = [f"--{k}={v}" for k, v in vars(args).items() if k in ("large", "batch", "volume", "device")]
    given += ["--channels", *map(str, args.channels), "--task", task]
    done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task} failed: {done.stderr[-500:]}")
    return float(done.stdout.split()[-1])


def peak(device: str, field: str = "VmHWM:") -> float:
    """MiB: of the GPU, or of the whole process, its highest or (field="VmRSS:") present size."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:  # ru_maxrss would start from the size of the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(status.split(field)[1].split()[0]) / 2**10
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes


def measure(task: str, args) -> float:
    """What `apart` runs: "step:WAY", or "volume:CODEC:TILE"."""
    kind, name, *tile = task.split(":")
    if kind == "step":
        x = volumes(args.large, args)
        before = peak(args.device, "VmRSS:")
        training = Training(name, args)
        for _ in range(2):
            training.step(x)
        return peak(args.device) - before
    tile = int(tile[0]) or None
    with torch.inference_mode():
        codec = CODECS[name]().to(args.device).eval()
        x = torch.rand(1, 1, *[args.volume] * 3, device=args.device)
        x_hat = codec.decode(codec.encode(x, tile, 6), tile, 6)
    if x_hat.shape != x.shape:
        raise RuntimeError(f"{name}: {tuple(x.shape)} became {tuple(x_hat.shape)}")
    return peak(args.device)


# ---------------------------------------------------------------------------------------------------------- tables
def report(rows: list[dict], codecs: list[dict], about: dict) -> str:
    lines = [
        f"Reference: {about['reference']}. Channels {about['channels']}, {about['batch']} volumes of "
        f"{about['size']}^3, {about['threads']} thread(s), {about['device']}, torch {about['torch']}. Largest "
        f"difference after two steps: {about['difference']:.1g}.",
        "",
        f"| training step | s | reference / this (quartiles) | MiB at {about['large']}^3 |",
        "|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['way']} | {r['seconds']:.2f} | {r['faster']:.3f} ({r['low']:.3f} - {r['high']:.3f}) | "
            f"{r['memory']:.0f} |"
        )
    lines += ["", f"| encode and decode {about['volume']}^3 | tiles | process, GiB | s |", "|---|---|---|---|"]
    for r in codecs:
        tiles = f"{r['tile']} cells" if r["tile"] else "whole"
        lines.append(f"| {r['codec']} | {tiles} | {r['memory'] / 1024:.2f} | {r['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/vqvae3d"))
    parser.add_argument("--size", type=int, default=32, help="side of the training volumes")
    parser.add_argument("--large", type=int, default=96, help="side of those whose memory is measured")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--volume", type=int, default=128, help="side of the volume to encode; 0: none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(measure(args.task, args))
        return
    rows, difference = race(args)
    codecs = []
    for name in CODECS if args.volume else ():
        for tile in (0, 12):
            began = time.perf_counter()
            row = dict(codec=name, tile=tile, memory=apart(f"volume:{name}:{tile}", args))
            codecs.append(row | dict(seconds=time.perf_counter() - began))
    reference = "a plain re-expression of MONAI's VQVAE"
    if MonaiVQVAE is not None:
        import monai

        reference = f"MONAI {monai.__version__}"
    about = {k: v for k, v in vars(args).items() if k not in ("out", "task")}
    about |= dict(reference=reference, difference=difference, threads=torch.get_num_threads())
    about |= dict(torch=torch.__version__, code=code_version())
    args.out.mkdir(parents=True, exist_ok=True)
    text = report(rows, codecs, about)
    for name, content in ("table.md", text), ("results.json", json.dumps([about, rows, codecs], indent=1)):
        with atomic_write(args.out / name) as aside:
            aside.write_text(content)
    print(text)


if __name__ == "__main__":
    main()
