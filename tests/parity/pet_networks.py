"""Cases of the PET paper without physics: network, loss, training, samplers, augmentation, checkpoints."""

import copy
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from companion.data.augmentation import AugmentPipe
from companion.diffusion.class_guidance import ClassGuidance
from companion.diffusion.denoisers import EDMDenoiser
from companion.diffusion.losses import edm_loss
from companion.diffusion.noise import karras
from companion.diffusion.solvers import heun, heun_churn
from companion.models import published as conversion
from companion.networks import EDMUNet
from companion.networks.blocks import AttentionBlock, ResBlock, Stage, Upsample, timestep_embedding
from companion.networks.edm_unet import edm_norm
from companion.training.loop import TrainConfig, permutation, train

from .ledger import Case, handles

EXACT = 1e-12
EVALUATION = 2e-5  # of one evaluation of a network, as the manifest says
CHAIN = 1e-4  # of a sampler run
RESAMPLED = 1e-4  # images that do not move are resampled there, and left alone by ours


def has(case: Case, *names: str) -> bool:
    """Whether the manifest lists these tensors for this case."""
    return set(names) <= set(case.spec.get("tensors", ()))


def exact(*values: float) -> Tensor:
    """Plain numbers as float64, which torch would otherwise round."""
    return torch.tensor(values, dtype=torch.float64)


def made_by(case: Case) -> str:
    return (case.spec.get("constructor") or {}).get("cls", "")


# Constructor options that name no part of the network: sizes fit any image, the scale belongs to the denoiser.
NO_PART = {"cls", "img_resolution", "sigma_data", "label_dim", "label_dropout", "attn_stages"}


def options(spec: dict) -> dict:
    """Ours for the constructor options of the published network. Raises ValueError for one that is not known here."""
    names = {"model_channels": "model_channels", "out_channels": "out_channels", "dropout": "dropout"}
    names |= {"channel_mult": "channel_mult", "img_channels": "in_channels", "num_blocks": "num_res_blocks"}
    names |= {"channel_mult_emb": "emb_mult", "augment_dim": "augment_dim"}
    unknown = spec.keys() - names.keys() - NO_PART
    if unknown:
        raise ValueError(f"the manifest builds the network with {sorted(unknown)}, which the ledger does not know")
    ours = {names[name]: value for name, value in spec.items() if name in names}
    ours["attention_resolutions"] = [2**stage for stage in spec["attn_stages"]]
    if spec["label_dim"]:
        ours |= {"num_classes": spec["label_dim"], "label_dropout": spec.get("label_dropout", 0.0)}
    return ours


def denoiser(case: Case, name: str | None = None) -> EDMDenoiser:
    """The denoiser whose weights are in the file that this case uses, or in `name`."""
    source = case.folder.cases[name or case.spec["uses"]]
    spec = source.spec["constructor"]
    network = EDMUNet(**options(spec))
    weights = {k: w.clone() for k, w in case.folder.tensors(source.spec["file"]).items()}
    network.load_state_dict(conversion.translate(weights))
    s = spec["sigma_data"]
    return EDMDenoiser(network, s, cond_scale=1 / s).eval()


def renamed(names, factor: int) -> dict[str, str]:
    """Published names for images `factor` times as large."""

    def larger(found: re.Match) -> str:
        return f".{int(found[1]) * factor}x{int(found[2]) * factor}_"

    return {name: re.sub(r"\.(\d+)x(\d+)_", larger, name) for name in names}


# --- network


@handles(lambda case: made_by(case) == "EDMPrecond" and case.name.endswith(".safetensors"))
def weights(case: Case) -> Iterator[tuple]:
    """A published state_dict: what network it is, and that it is found whole, for every image size."""
    theirs, wanted = case.folder.tensors(case.spec["file"]), options(case.spec["constructor"])
    network = EDMUNet(**wanted)
    ours, expected = conversion.translate(theirs), network.state_dict()
    yield "names that differ", len(ours.keys() ^ expected.keys()), 0, 0.0
    yield "shapes that differ", sum(ours[k].shape != expected[k].shape for k in ours), 0, 0.0
    yield "names at 4 times the size", len(conversion.rename(renamed(theirs, 4).values())), len(ours), 0.0
    read = conversion.describe(theirs, case.spec["constructor"])
    # a level too narrow for a head has no attention, whoever asked for it
    attends = [2**i for i, w in enumerate(network.widths) if w >= 64 and 2**i in wanted["attention_resolutions"]]
    wanted |= {"attention_resolutions": attends}
    yield "options that differ", sum(read.get(k, 0) != v for k, v in wanted.items()), 0, 0.0


@handles(lambda case: case.name == "published_parameters.json")
def published_parameters(case: Case) -> Iterator[tuple]:
    """The published network's names and shapes, at its own and at another image size."""
    spec = json.loads((case.folder.path / case.name).read_text())
    theirs = {name: torch.empty(shape, device="meta") for name, shape in spec["parameters"].items()}
    theirs |= {name: torch.empty(shape, device="meta") for name, shape in spec.get("buffers", {}).items()}
    with torch.device("meta"):
        network = EDMUNet(**options(spec["constructor"]))
    expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    yield "parameters", sum(p.numel() for p in network.parameters()), spec["n_parameters"], 0.0
    for factor in (1, 3):
        names = renamed(theirs, factor)
        ours = conversion.translate({names[name]: t for name, t in theirs.items()})
        shapes = {name: tuple(t.shape) for name, t in ours.items()}
        differ = sum(shapes.get(name) != expected.get(name) for name in shapes | expected)
        yield f"names and shapes at {factor} times the size", differ, 0, 0.0
    read = conversion.describe(theirs, spec["constructor"])
    yield "options that differ", sum(read.get(k, 0) != v for k, v in options(spec["constructor"]).items()), 0, 0.0


@handles(lambda case: has(case, "D", "F"))
def evaluation(case: Case) -> Iterator[tuple]:
    D, io = denoiser(case), case.io
    x, sigma, cond = io["x"], io["sigma"], io.get("x_cond")
    labels = {"y": io["class_labels"]} if "class_labels" in io else {}
    features = timestep_embedding(sigma.log() / 4, D.network.model_channels)
    yield "map_noise_out", features, io["map_noise_out"], EVALUATION
    yield "F", D.raw(x, sigma, cond, **labels)[0], io["F"], EVALUATION
    yield "D", D(x, sigma, cond, **labels), io["D"], EVALUATION
    augmented = D(x, sigma, cond, augment=io["augment_labels"], **labels)
    yield "D_augment", augmented, io["D_augment"], EVALUATION
    if labels:
        yield "D_null", D(x, sigma), io["D_null"], EVALUATION
        yield "D with integer labels", D(x, sigma, y=labels["y"].argmax(1)), io["D"], EVALUATION
    for name in io:
        if name.startswith("D_cfg_"):
            weight = float(name.removeprefix("D_cfg_"))
            yield name, ClassGuidance(D, labels["y"], weight)(x, sigma), io[name], EVALUATION


@handles(lambda case: made_by(case) == "UNetBlock")
def block(case: Case) -> Iterator[tuple]:
    """One residual block with attention, whose q, k and v lie in another order in the published weights."""
    spec, io = case.spec["constructor"], case.io
    width, heads = spec["out_channels"], spec["out_channels"] // spec["channels_per_head"]
    up = Upsample(spec["in_channels"], 2, (2, 2), learned=False) if spec.get("up") else None
    residual = ResBlock(spec["in_channels"], spec["emb_channels"], width, 2, 0.0, True, up, edm_norm)
    residual.emb_layers[0] = nn.Identity()  # the published block is given the embedding after its SiLU
    stage = Stage(residual, AttentionBlock(width, heads, norm=edm_norm))
    state = {f"dec.1x1_in0.{k.removeprefix('state/')}": io[k] for k in io if k.startswith("state/")}
    ours = conversion.translate(state)
    stage.load_state_dict({name.removeprefix("middle_block."): w for name, w in ours.items()})
    yield "y", stage(io["x"], io["emb"]), io["y"], EVALUATION


# --- loss and training


@handles(lambda case: has(case, "rnd_normal", "noise_unit", "loss"))
def loss(case: Case) -> Iterator[tuple]:
    io = case.io
    sigma = (-1.2 + 1.2 * io["rnd_normal"]).exp()
    yield "sigma", sigma, io["sigma"], EVALUATION
    yield "loss per pixel", pixel_loss(case, sigma), io["loss"], EVALUATION
    losses, gradients = gradient(case)
    yield "loss per image", losses, io["loss"].mean((1, 2, 3)), EVALUATION
    theirs = {name: torch.zeros(()) for name in case.folder.tensors(case.spec["uses"])}
    ours = conversion.rename(theirs)
    for name in io:
        kind, _, parameter = name.partition("/")
        if kind == "grad_norm":
            yield name, gradients[ours[parameter]].norm(), io[name], CHAIN
        if kind == "grad":
            yield name, gradients[ours[parameter]], io[name], CHAIN


def images(case: Case) -> tuple[Tensor, Tensor | None, dict]:
    """Target, condition and class labels of a loss case."""
    io, conditional = case.io, case.io["images"].shape[1] > 1
    labels = {"y": io["class_labels"]} if "class_labels" in io else {}
    return io["images"][:, :1], io["images"][:, 1:] if conditional else None, labels


def pixel_loss(case: Case, sigma: Tensor) -> Tensor:
    D, (x0, cond, labels) = denoiser(case), images(case)
    error = D(x0 + sigma * case.io["noise_unit"], sigma.flatten(), cond, **labels) - x0
    return (sigma**2 + D.sigma_data**2) / (sigma * D.sigma_data) ** 2 * error**2


def gradient(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Our loss of each image, and the gradient of the published sum over pixels, a mean over images."""
    with torch.inference_mode(False), torch.enable_grad():
        D = denoiser(case)
        x0, cond, labels = images(case)
        noise, z = case.io["noise_unit"], case.io["rnd_normal"]
        x0, noise, z = (t.clone() for t in (x0, noise, z))
        cond = None if cond is None else cond.clone()
        sigma = (-1.2 + 1.2 * z.flatten()).exp()
        labels = {name: label.clone() for name, label in labels.items()}
        losses = edm_loss(D, x0, cond=cond, sigma=sigma, noise=noise, **labels)
        (losses.mean() * x0[0].numel()).backward()
        zero = torch.zeros(())
        gradients = {n: zero if p.grad is None else p.grad for n, p in D.network.named_parameters()}
        if "label_emb.weight" in gradients:
            gradients["label_emb.weight"] = gradients["label_emb.weight"].T
        return losses.detach(), gradients


@handles(lambda case: has(case, "rnd_normal_0", "probe_x"))
def training(case: Case) -> Iterator[tuple]:
    """A few steps of the published training, by our training loop."""
    io, steps = case.io, len(case.io["loss_mean"])
    config, D, ema, stats = replay(case, steps)
    lines = [line for line in stats if "loss" in line][:steps]
    yield "loss_mean", [line["loss"] for line in lines], io["loss_mean"], CHAIN
    yield "grad_norm", [line["grad_norm"] for line in lines], io["grad_norm"], CHAIN
    yield "lr", exact(*(line["lr"] for line in lines)), io["lr"], EXACT
    yield "ema_beta", exact(*map(config.ema_beta, range(steps))), io["ema_beta"], EXACT
    probe = io["probe_x"], io["probe_sigma"], io["probe_x_cond"]
    for name, model in (("net", D), ("ema", ema)):
        yield f"probe_D_{name}", model(*probe), io[f"probe_D_{name}"], CHAIN
    for key, model in (("final", D), ("ema", ema)):
        yield f"{key} weights", model.network.out[2].weight, io[f"{key}/model.out_conv.weight"], CHAIN


class Done(Exception):
    """The recorded steps are over; the schedule of the training is longer."""


class Replay:
    """The recorded items, at the indices where our order of the data looks for them."""

    def __init__(self, items: list[dict], config: TrainConfig):
        total = config.steps * config.batch_size
        self.items = [items[0]] * total
        for i, index in enumerate(permutation(config.seed, 0, total)[: len(items)].tolist()):
            self.items[index] = items[i]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict:
        return self.items[i]


def published_config(spec: dict, total: int, **more) -> TrainConfig:
    """Our options for a published schedule of `total` images."""
    batch = spec["batch_size"]
    warmup = spec.get("warmup_nimg", batch * round(spec.get("lr_rampup_ratio", 0) * total / batch))
    return TrainConfig(
        steps=total // batch,
        batch_size=batch,
        optimiser="adam",
        learning_rate=spec["lr_max"],
        warmup=warmup // batch,
        warmup_from=spec["lr_start"] / spec["lr_max"],
        schedule="cosine",
        final_fraction=spec["lr_end"] / spec["lr_max"],
        clip_norm=None,
        ema_halflife=1000 * spec["ema_halflife_kimg"],
        ema_rampup=spec["ema_rampup_ratio"],
        **more,
    )


def replay(case: Case, steps: int) -> tuple[TrainConfig, EDMDenoiser, EDMDenoiser, list[dict]]:
    """The config, the trained and the averaged model after so many steps, and the lines of the log."""
    spec, io = case.spec["schedule"], case.io
    more = dict(device="cpu", log_every=1, checkpoint_every=steps)
    config = published_config(spec, spec["total_nimg"], **more)
    averaged = []

    def loss(D, batch, generator):
        pixels = batch["noise"][0].numel()  # the published gradient is that of a sum over pixels
        sigma = (-1.2 + 1.2 * batch["z"]).exp()
        x0, cond = batch["images"][:, :1], batch["images"][:, 1:]
        return pixels * edm_loss(D, x0, cond=cond, sigma=sigma, noise=batch["noise"])

    def stop(ema):
        averaged.append(copy.deepcopy(ema))
        raise Done

    with torch.inference_mode(False), torch.enable_grad(), tempfile.TemporaryDirectory() as folder:
        parts = {"images": "images", "z": "rnd_normal", "noise": "noise_unit"}
        batches = [{key: io[f"{name}_{i}"].clone() for key, name in parts.items()} for i in range(steps)]
        items = [{k: v[j] for k, v in batch.items()} for batch in batches for j in range(config.batch_size)]
        for item in items:
            item["z"] = item["z"].reshape(())
        D = denoiser(case)
        try:
            train(D, loss, Replay(items, config), config, folder, validate=stop, progress=False)
        except Done:
            pass
        stats = [json.loads(line) for line in (Path(folder) / "stats.jsonl").read_text().splitlines()]
    pixels = io["noise_unit_0"][0].numel()
    stats = [line | {"loss": line["loss"] / pixels} for line in stats if "loss" in line]
    return config, D.eval(), averaged[0], stats


@handles(lambda case: has(case, "nimg", "t_steps_18"))
def schedules(case: Case) -> Iterator[tuple]:
    io, spec = case.io, case.spec["settings"]
    config = published_config(spec, 1000 * spec["total_kimg"])
    steps = [n / config.batch_size for n in io["nimg"].tolist()]
    yield "lr", exact(*map(config.rate, steps)), io["lr"], EXACT
    yield "ema_beta", exact(*map(config.ema_beta, steps)), io["ema_beta"], EXACT
    yield "warmup_nimg", config.warmup * config.batch_size, io["warmup_nimg"], 0.0
    for name in io:
        if found := re.fullmatch(r"t_steps_(\d+)", name):
            yield name, karras(int(found[1])), io[name], EXACT
        if found := re.fullmatch(r"inf_n(\d+)_rank(\d+)of(\d+)_seed(\d+)", name):
            n, rank, world, seed = map(int, found.groups())
            yield f"{name} (the published order)", published_order(n, rank, world, seed, len(io[name])), io[name], 0.0


def published_order(n: int, rank: int, world: int, seed: int, count: int) -> list[int]:
    """The order in which the published training sees n images. Ours shuffles anew in each epoch."""
    random = np.random.RandomState(seed)
    order = np.arange(n)
    random.shuffle(order)
    window, seen, i = round(n / 2), [], 0
    while len(seen) < count:
        here = i % n
        if i % world == rank:
            seen.append(int(order[here]))
        other = (here - random.randint(window)) % n
        order[[here, other]] = order[[other, here]]
        i += 1
    return seen


# --- samplers


@handles(lambda case: "sampler_kwargs" in case.spec)
def sampler(case: Case) -> Iterator[tuple]:
    """A sampler run with recorded noise: every evaluation of the network in order, and the result."""
    io, options = case.io, dict(case.spec["sampler_kwargs"])
    levels = karras(options.pop("num_steps"), *(options.pop(k) for k in ("sigma_min", "sigma_max", "rho"))).tolist()
    solver = heun_churn(**options) if options else heun()
    D, cond, seen = denoiser(case), io.get("x_cond"), []
    labels = {"y": io["class_labels"]} if "class_labels" in io else {}

    def recorded(x, sigma):
        x0_hat = D(x, torch.full((len(x),), sigma, dtype=x.dtype), cond, **labels)
        seen.append((x, sigma, x0_hat))
        return x0_hat

    draws = torch.zeros(len(levels), 1)
    if "noises_float32" in io:
        draws = io["noises_float32"].double()
        yield "noise is what the seeds give", seeded(case), io["noises_first_float64"], EXACT
        draws[0] = io["noises_first_float64"]
    x = levels[0] * io["latents"].double()
    for i in range(len(levels) - 1):
        x = solver.step(recorded, x, levels, i, lambda i=i: draws[i], None).x
    xs, sigmas, x0_hats = zip(*seen, strict=True)
    yield "eval_sigma", exact(*sigmas), io["eval_sigma"], EXACT
    yield "eval_x", torch.stack(xs), io["eval_x"], CHAIN
    yield "eval_D", torch.stack(x0_hats), io["eval_D"], CHAIN
    yield "final", x, io["final"], CHAIN


def seeded(case: Case) -> Tensor:
    """The first noise of a run after the latents, from one generator per seed."""
    noises = []
    for seed in case.spec["seeds"]:
        generator, shape = torch.Generator().manual_seed(seed), case.io["latents"].shape[1:]
        torch.randn(shape, generator=generator)
        noises.append(torch.randn(shape, dtype=torch.float64, generator=generator))
    return torch.stack(noises)


# --- augmentation


@handles(lambda case: made_by(case) == "AugmentPipe")
def augmentation(case: Case) -> Iterator[tuple]:
    io, spec = case.io, case.spec["constructor"]
    n = len(io["images"])
    names = {"flip_x": "xflip", "flip_y": "yflip", "scale": "scale", "rotate": "rotate_frac"}
    names |= {"stretch": "aniso", "shift": "translate_frac"}
    multipliers = {ours: spec[theirs] for ours, theirs in names.items()}
    pipe = AugmentPipe(spec["p"], **multipliers, stretch_label="published")
    recorded = [io[name].reshape(-1, n).squeeze(0) for name in sorted(io) if name.startswith("draw_")]
    drawn = pipe.draw(n, torch.Generator().manual_seed(case.spec["global_seed"]))
    for i, (ours, theirs) in enumerate(zip(drawn, recorded, strict=True)):
        yield f"draw {i}", ours, theirs, EXACT
    moves = pipe.moves(recorded)
    yield "labels", pipe.labels(moves), io["labels"], EVALUATION
    moving = (io["labels"][:, 2:] != 0).any(1)
    out = pipe.apply(io["images"], moves)
    yield "out of images that move", out[moving], io["out"][moving], EVALUATION
    if not moving.all():
        yield "out of images that do not", out[~moving], io["out"][~moving], RESAMPLED


# --- checkpoints


@handles(lambda case: case.name.endswith((".pkl", ".pt")))
def checkpoint(case: Case) -> Iterator[tuple]:
    """The published network in a pickle, read as data: its tensors to the bit, and the network they make."""
    published = conversion.read(case.folder.path / case.name)
    expected = case.folder.tensors(case.spec["uses"])
    if "lr" in expected:
        yield "learning rate", exact(published.learning_rate)[0], expected["lr"], 0.0
        expected = {k.removeprefix("net/"): w for k, w in expected.items() if k.startswith("net/")}
    yield "names that differ", len(published.tensors.keys() ^ expected.keys()), 0, 0.0
    differ = sum(not torch.equal(published.tensors[k], w) for k, w in expected.items())
    yield "tensors that differ", differ, 0, 0.0
    network, ours = published.network(), conversion.translate(expected)
    yield "weights that differ", sum(not torch.equal(ours[k], w) for k, w in network.state_dict().items()), 0, 0.0


@handles(lambda case: case.name == "training_state_expected.safetensors")
def optimiser(case: Case) -> Iterator[tuple]:
    """The state of Adam in a training state, by parameter."""
    (source,) = (c for c in case.folder.cases.values() if c.spec.get("uses") == case.name)
    published, io = conversion.read(case.folder.path / source.name), case.io
    names = list(published.tensors)
    differ, count = 0, 0
    for name in io:
        if found := re.fullmatch(r"opt/(\d+)/(\w+)", name):
            parameter, quantity = names[int(found[1])], found[2]
            ((ours, expected),) = conversion.translate({parameter: io[name]}, names).items()
            differ += not torch.equal(published.optimiser[ours][quantity], expected)
            count += 1
        elif name.startswith("net/"):
            differ += not torch.equal(published.tensors[name.removeprefix("net/")], io[name])
    yield "tensors that differ", differ, 0, 0.0
    yield "moments", sum(len(state) for state in published.optimiser.values()), count, 0.0
    yield "lr", exact(published.learning_rate)[0], io["lr"], 0.0
