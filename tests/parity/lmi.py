"""Cases of the LMI paper: maps, information of whole images, networks, checkpoints, schedules, loss, chains."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from companion.diffusion.ddpm import DiscreteProcess
from companion.diffusion.noise import DiscreteSchedule, linear_betas, scaled_linear_betas
from companion.information.grid import Grid
from companion.information.local_mi import LocalMI, mutual_information
from companion.information.pairs import grey_levels, joint, kernels, marginal
from companion.networks import UNet
from companion.networks.ddim_unet import DDIMUNet, describe, load_published, read_published, translate

from .ledger import Case, handles

CLEAR = 1e-4  # a winner counts where it leads by more; the reference decides the others by rounding
NETWORKS = {"UNet": UNet, "DDIMUNet": DDIMUNet}


def says(text: str):
    """Accepts the cases of this paper whose description contains `text`."""
    return lambda case: case.spec["section"] == "files" and text in str(case.spec.get("what", ""))


def tolerance(case: Case) -> float:
    return float(next(iter(case.spec["tolerance"].values())))


def absolute(name: str, ours: Tensor, reference: Tensor, limit: float) -> tuple:
    """A row whose error is max |ours - reference|, whatever the size of the reference."""
    if ours.shape != reference.shape:
        return name, ours, reference, limit
    return name, ours - reference, torch.zeros_like(reference), limit


# --- maps


def published(patch: int, sigma: float, normalise: bool, bins: int | None = None) -> LocalMI:
    return LocalMI(patch, bins, 2 * sigma**2, mode="published", normalise=normalise)


@handles(says("= LMI map, 'aligned'"))
def maps(case: Case) -> Iterator[tuple]:
    io, limit = case.io, tolerance(case)
    for spec in case.spec["cases"]:
        lmi = published(spec["patch_size"], spec["sigma"], spec["normalize"], spec["num_bins"])
        yield from both(spec["key"], lmi, io[spec["source"]], io[spec["target"]], io, limit)
    if "batch2" in case.spec:
        spec = case.spec["batch2"]
        lmi = published(spec["patch_size"], spec["sigma"], spec["normalize"])
        yield from both("batch2", lmi, io["batch2.source"], io["batch2.target"], io, limit)


def both(key: str, lmi: LocalMI, source: Tensor, target: Tensor, io, limit: float) -> Iterator[tuple]:
    """The map, and the aligned values where the winner is clear."""
    score, aligned = lmi.align(source, target)
    yield absolute(f"{key}.sim", score, io[f"{key}.sim"], limit)
    yield f"{key}.aligned", where_clear(lmi, source, target, aligned, io[f"{key}.aligned"]), io[f"{key}.aligned"], 1e-6


def where_clear(lmi: LocalMI, source: Tensor, target: Tensor, ours: Tensor, reference: Tensor) -> Tensor:
    """Our values; where they differ and the best two candidates do not, those of the reference."""
    unclear = (ours - reference).abs() > 1e-6
    grid = Grid.of(lmi.mode, lmi.patch, tuple(source.shape[2:]), source.device)
    levels1, levels2 = (
        torch.nn.functional.pad(grey_levels(x, lmi.clamp, lmi.quantise), [grid.pad] * 4).flatten(1)
        for x in (source, target)
    )
    for image, pixel in unclear.flatten(1).nonzero().tolist():
        place = grid.position[pixel]
        patch = levels1[image, place + grid.patch]
        candidates = levels2[image, place + grid.candidates[grid.border.flatten()[pixel]]].T
        scores = mutual_information(patch[None], candidates, lmi.bins, lmi.width, lmi.normalise)
        best, second = scores.topk(2).values
        unclear.flatten(1)[image, pixel] = best - second <= CLEAR
    return torch.where(unclear, reference, ours)


@handles(says("MutualInformation("))
def whole_images(case: Case) -> Iterator[tuple]:
    io, limit = case.io, tolerance(case)
    _ = [io[name] for name in io if name.startswith("img.")]  # inputs, which not every case uses

    def levels(name: str) -> Tensor:
        return grey_levels(io[name], clamp=False, quantise=True).flatten(1)

    for spec in case.spec["cases"]:
        bins, width = spec["num_bins"], 2 * spec["sigma"] ** 2
        ours = mutual_information(levels(spec["source"]), levels(spec["target"]), bins, width, spec["normalize"])
        yield absolute(spec["key"], ours, io[spec["key"]], limit)
    if "patch.values" in io:
        k1, k2 = (kernels(levels(name), 27, 8.0) for name in ("patch.values", "patch.values2"))
        yield "patch.kernel", k1, io["patch.kernel"], limit
        yield "patch.pdf", marginal(k1), io["patch.pdf"], limit
        yield "patch.joint", joint(k1, k2), io["patch.joint"], limit
        x1, x2 = (255 * io[name].flatten(1) for name in ("img.structA", "img.structB"))
        yield "hist.pdf", marginal(kernels(x1, 32, 2 * 0.7**2)), io["hist.pdf"], limit
        yield "hist2d.pdf", joint(kernels(x1, 32, 8.0), kernels(x2, 32, 8.0)), io["hist2d.pdf"], limit


@handles(says("statistical_align_normal("))
def three_channels(case: Case) -> Iterator[tuple]:
    """The release returns map and aligned values of red alone, each scaled to its own range."""
    io, limit = case.io, tolerance(case)
    lmi = published(3, 2.0, normalise=True)
    red = io["rgb"][:, :1]
    for part, ours in zip(("sim", "aligned"), lmi.align(io["gray"], red), strict=True):
        ours = (ours - ours.amin()) / (ours.amax() - ours.amin())
        yield absolute(f"normal.{part}", ours, io[f"normal.{part}"], limit)
    source, target = (io[name].flatten(0, 1)[:, None] for name in ("rgb", "rgb2"))
    each = {f"perchannel.{part}": io[f"perchannel.{part}"].flatten(0, 1)[:, None] for part in ("sim", "aligned")}
    yield from both("perchannel", lmi, source, target, each, limit)


# --- networks


# What `create_model` of the release takes beside sizes, under our names; and what it does not take.
CREATE_MODEL = {
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
}
SIZES = {"fn", "cls", "image_size", "num_in_channels", "in_channels", "num_channels", "ch", "out_ch", "num_res_blocks"}
SIZES |= {"channel_mult", "ch_mult", "attention_resolutions", "attn_resolutions", "dropout", "resamp_with_conv"}


def network(case: Case, weights: dict[str, Tensor] | None = None) -> UNet:
    """The network of a case, in evaluation mode: its weights' shapes, and what the manifest says beside them.

    Raises ValueError where the two contradict, or the manifest has an option that is not known here.
    """
    weights = case.folder.tensors(case.spec["file"]) if weights is None else weights
    said = case.spec["constructor"] if isinstance(case.spec.get("constructor"), dict) else {}
    unknown = said.keys() - CREATE_MODEL.keys() - SIZES
    if unknown:
        raise ValueError(f"the manifest builds the network with {sorted(unknown)}, which the ledger does not know")
    told = ("num_heads", "num_head_channels", "num_heads_upsample", "use_new_attention_order")
    options = describe(weights, **{name: said[name] for name in told if name in said})
    for name in ("use_scale_shift_norm", "resblock_updown"):
        if name in said and bool(options.get(name, False)) != bool(said[name]):
            raise ValueError(f"the manifest says {name}={said[name]}, the weights {options.get(name, False)}")
    blocks = said.get("num_res_blocks", options["num_res_blocks"])
    if blocks != options["num_res_blocks"]:
        raise ValueError(f"the manifest says num_res_blocks={blocks}, the weights {options['num_res_blocks']}")
    made = NETWORKS[options.pop("name")](**options).eval()
    made.load_state_dict(translate({name: x.float() for name, x in weights.items()}))
    return made


def parameters(made: UNet) -> int:
    return sum(p.numel() for p in made.parameters())


@handles(lambda case: case.spec["section"] == "paper_size_parameters")
def parameter_list(case: Case) -> Iterator[tuple]:
    """Names and shapes of a published network at its published size, without memory for its weights."""
    with torch.device("meta"):
        theirs = {name: torch.empty(shape) for name, shape in case.spec["shapes"].items()}
        options = describe(theirs)
        made = NETWORKS[options.pop("name")](**options)
    ours, theirs = made.state_dict(), translate(theirs)
    yield "names that differ", len(ours.keys() ^ theirs.keys()), 0, 0.0
    differ = sum(ours[name].shape != theirs[name].shape for name in ours.keys() & theirs.keys())
    yield "shapes that differ", differ, 0, 0.0
    yield "parameters", parameters(made), case.spec["n_params"], 0.0


@handles(says("state_dict, every parameter re-randomised"))
def networks(case: Case) -> Iterator[tuple]:
    made, io = network(case), case.folder.tensors(case.spec["io"])
    cond = io["cond"] if made.in_channels > io["x"].shape[1] else None
    labels = {"y": io["labels"]} if made.num_classes else {}
    yield "parameters", parameters(made), case.spec["n_params"], 0.0
    yield absolute("y", made(io["x"], io["t"], cond, **labels), io["y"], tolerance(case))


@handles(says("a checkpoint in the seed's own layout"))
def checkpoint(case: Case) -> Iterator[tuple]:
    path, io = case.folder.path / case.spec["file"], case.folder.tensors(case.spec["io"])
    for name, ema in (("y_raw", False), ("y_ema", True)):
        yield name, load_published(path, ema)(io["x"], io["t"]), io[name], 2e-4
    yield "prefixes left", sum("module" in name for name in read_published(path, ema=False)), 0, 0.0


def referred(case: Case) -> tuple[UNet, UNet | None]:
    """The networks that the description of a case names: the one with a condition, and the one without or None."""
    text = f"{case.spec['what']} {case.spec.get('network', '')}"
    cases = {name.removesuffix(".weights.safetensors"): c for name, c in case.folder.cases.items() if "weights" in name}
    named = [network(c) for name, c in cases.items() if re.search(rf"\b{re.escape(name)}\b", text)]
    conditional = [made for made in named if made.in_channels > 1]
    plain = [made for made in named if made.in_channels == 1]
    if len(conditional) != 1 or len(plain) > 1:
        raise ValueError(f"the description must name one network with a condition, one without, of {sorted(cases)}")
    return conditional[0], plain[0] if plain else None


def said_lmi(case: Case) -> LocalMI:
    """The maps that a description names: patch 3, sigma 2, normalize True."""
    patch, sigma, normalise = (
        re.search(rf"\b{name} ([\w.]+)", case.spec["what"])[1] for name in ("patch", "sigma", "normalize")
    )
    return published(int(patch), float(sigma), normalise == "True")


def said_schedule(case: Case) -> DiscreteSchedule:
    """The linear schedule with the number of steps that a description names as T=1000."""
    found = re.search(r"\bT ?= ?(\d+)", f"{case.spec.get('betas', '')} {case.spec['what']}")
    return DiscreteSchedule.linear(int(found[1]) if found else 1000, 1e-4, 0.02)


# --- diffusion


def betas(kind: str, steps: int) -> Tensor:
    """The schedules of the published training code, from 1e-4 to 0.02."""
    start, end = 1e-4, 0.02
    return {
        "linear": lambda: linear_betas(steps, start, end),
        "quad": lambda: scaled_linear_betas(steps, start, end),
        "const": lambda: torch.full((steps,), end, dtype=torch.float64),
        "jsd": lambda: 1 / torch.linspace(steps, 1, steps, dtype=torch.float64),
        "sigmoid": lambda: torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid() * (end - start) + start,
    }[kind]()


@handles(says("float64 tables"))
def tables(case: Case) -> Iterator[tuple]:
    io = case.io
    for name in io:
        kind = re.fullmatch(r"(betas|alphas_cumprod|logvar)(?:_(\w+?))?(\d+)", name)
        if not kind:
            continue  # the ledger reports what was not compared
        schedule = DiscreteSchedule.linear(int(kind[3]), 1e-4, 0.02)
        if kind[1] == "betas":
            ours = betas(kind[2] or "linear", int(kind[3]))
        elif kind[1] == "alphas_cumprod":
            ours = schedule.alphas_cumprod
        else:
            t = torch.arange(len(schedule))
            x = torch.zeros(len(t), 1, dtype=torch.float64)
            ours = DiscreteProcess(schedule, variance=VARIANCE[kind[2]]).p_mean_variance(x, x, t).log_variance[:, 0]
            if kind[2] == "fixedsmall":  # at t = 0 the release has ln(1e-20), DiscreteSchedule the value of t = 1
                ours = torch.cat([torch.full((1,), 1e-20, dtype=torch.float64).log(), ours[1:]])
        yield name, ours, io[name], 1e-12


VARIANCE = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}


@handles(says("training loss of the seed"))
def loss(case: Case) -> Iterator[tuple]:
    io, schedule, limit = case.io, said_schedule(case), tolerance(case)
    x0, e, t = io["x0"], io["e"], io["t"].long()
    future = schedule.q_sample(x0, (t + 1).clamp(max=len(schedule) - 1), e)
    yield "x_future", future, io["x_future"], limit
    lmi, (unet, plain) = said_lmi(case), referred(case)
    source = lmi.prepare(x0)
    yield absolute("cross", lmi(source, io["x_future"]), io["cross"], 1e-5)
    yield absolute("self", source.self_map, io["self"], 1e-5)
    condition = torch.cat([lmi(source, future), source.self_map], dim=1)
    x_t = schedule.q_sample(x0, t, e)
    each = (e - unet(x_t, t, condition)).square().flatten(1).sum(1)
    yield "loss_per_item", each, io["loss_per_item"], limit
    yield "loss", each.mean().expand_as(io["loss"]), io["loss"], limit
    if "loss_sdedit" in io and plain is not None:
        sdedit = (e - plain(x_t, t)).square().flatten(1).sum(1).mean()
        yield "loss_sdedit", sdedit.expand_as(io["loss_sdedit"]), io["loss_sdedit"], limit


@handles(says("3-step sampling of the seed"))
def trajectory(case: Case) -> Iterator[tuple]:
    """The published chain: noise is added at t = 0 too."""
    io, limit = case.io, tolerance(case)
    schedule = said_schedule(case)
    process = DiscreteProcess(schedule, variance=VARIANCE[case.spec["var_type"]])
    lmi = said_lmi(case)
    source = lmi.prepare(io["source"])
    yield absolute("self", source.self_map, io["self"], 1e-5)
    times = range(len(io["noise"]) - 1, -1, -1)
    start = schedule.q_sample(io["source"], torch.tensor([times[0]]), io["start"])
    yield "sdedit_start", start, io["sdedit_start"], limit
    unet, plain = referred(case)
    x, edited = io["start"], start
    for i, noise in zip(times, io["noise"], strict=True):
        t = torch.tensor([i])
        cross = lmi(source, x)
        yield f"cross{i}", cross, io[f"cross{i}"], limit
        p = process.p_mean_variance(unet(x, t, torch.cat([cross, source.self_map], dim=1)), x, t)
        x = p.mean + noise * last_std(process, p, i)
        yield f"x{i}", x, io[f"x{i}"], limit
        p = process.p_mean_variance(plain(edited, t), edited, t)
        edited = p.mean + noise * last_std(process, p, i)
        yield f"sdedit_x{i}", edited, io[f"sdedit_x{i}"], limit


def last_std(process: DiscreteProcess, p, i: int) -> Tensor:
    """The standard deviation of a step; that of the last is 1e-10 where the release takes the small variance."""
    small = process.variance == "fixed_small" and i == 0
    return torch.full_like(p.mean, 1e-10) if small else (p.log_variance / 2).exp()
