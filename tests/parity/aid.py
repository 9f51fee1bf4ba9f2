"""Cases of the AID paper: networks, parameter lists, diffusion tables, losses, chains, reconstruction."""

import itertools
import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from companion.diffusion.complexify import to_channels, to_complex
from companion.diffusion.ddpm import DiscreteProcess
from companion.diffusion.denoisers import ComplexDenoiser, DiscreteDenoiser
from companion.diffusion.guidance import landweber
from companion.diffusion.losses import discrete_terms
from companion.diffusion.noise import DiscreteSchedule
from companion.diffusion.solvers import aid_stochastic
from companion.networks import CausalUNet, UNet
from companion.networks.blocks import timestep_embedding
from companion.networks.causal_blocks import positional_embedding
from companion.operators.mri import crop_kspace, normalise, sense

from .ledger import Case, Folder, handles

EXACT = 1e-12  # float64 tables
IDENTITY = 1e-5  # two of our own ways to the same number
CHAIN = 10  # rounding grows along a chain: so many times the tolerance of one evaluation

# The published networks fix the image size, compute in half precision on request, and ignore these dilations.
NOT_OURS = ("image_size", "use_fp16", "dilations")


# The published code sets NumPy's global generator to these seeds; here it stays untouched.
MASK_SEEDS = {"random": 1234, "high": 42}


def published_columns(width: int, acceleration: int, kind: str = "equal") -> Tensor:
    """Sorted indices of the k-space columns that the published experiments measure, without centre lines.

    equal: every acceleration-th from column 0. random: width // acceleration columns, uniform. high: as many,
    meant to be of variable density, but a condition that is always true makes it uniform. The same columns as
    in the published code; for new experiments use `operators.mri.cartesian_mask`.
    """
    if kind == "equal":
        return torch.arange(0, width, acceleration)
    if kind not in MASK_SEEDS:
        raise ValueError(f'published masks are "equal", "random" and "high", not "{kind}"')
    density = np.full(width, 1 / width) if kind == "high" else None
    draw = np.random.RandomState(MASK_SEEDS[kind])
    return torch.from_numpy(np.sort(draw.choice(width, width // acceleration, replace=False, p=density)))


def build(spec: dict) -> UNet:
    """The network that a manifest describes by class and constructor, in eval mode."""
    options = {name: value for name, value in spec["constructor"].items() if name not in NOT_OURS}
    if options.get("dims", 2) == 3:
        options["halve_depth"] = False
    return (CausalUNet if is_causal(spec) else UNet)(**options).eval()


def load(case: Case) -> UNet:
    network = build(case.spec)
    network.load_state_dict(case.weights(), strict=True)
    return network


def is_causal(spec: dict) -> bool:
    return spec.get("class", "").startswith("CausalUNetModel")


def is_unet(spec: dict) -> bool:
    return spec.get("class", "").startswith("UNetModel")


def has(case: Case, *starts: str) -> bool:
    """Whether the manifest names tensors of this case that start so."""
    io = case.spec.get("io", {})
    return isinstance(io, dict) and any(name.startswith(starts) for name in io)


# --- networks


@handles(lambda case: "state_dict" in case.spec and (is_causal(case.spec) or is_unet(case.spec)))
def parameter_list(case: Case) -> Iterator[tuple]:
    """Names and shapes of a published model, built without memory for its weights."""
    with torch.device("meta"):
        network = build(case.spec)
    ours = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    theirs = case.spec["state_dict"]
    yield "names that differ", len(ours.keys() ^ theirs.keys()), 0, 0.0
    yield (
        "shapes that differ",
        sum(ours[name] != theirs[name] for name in ours.keys() & theirs.keys()),
        0,
        0.0,
    )
    yield "parameters", sum(p.numel() for p in network.parameters()), case.spec["n_params"], 0.0


@handles(lambda case: is_unet(case.spec))
def unet(case: Case) -> Iterator[tuple]:
    network, io = load(case), case.io
    yield "parameters", sum(p.numel() for p in network.parameters()), case.spec["n_params"], 0.0
    yield "out", network(io["x"], io["t"], y=io.get("y")), io["out"]


@handles(lambda case: is_causal(case.spec))
def causal_unet(case: Case) -> Iterator[tuple]:
    network, io = load(case), case.io
    x, t, ctx, y = io["x"], io["t"], io["ctx"], io.get("y")
    yield "parameters", sum(p.numel() for p in network.parameters()), case.spec["n_params"], 0.0
    for name in (name for name in io if name.startswith("train.")):
        stage = name.removeprefix("train.")
        if stage not in ("multistage0", "multistage1", "multistage2", "t_float"):
            continue  # the ledger reports what was not compared
        context = None if stage == "multistage1" else ctx
        yield name, network(x, io["t_float"] if stage == "t_float" else t, context, y), io[name]
    training = io["train.multistage0"] if "train.multistage0" in io else network(x, t, ctx, y)
    for name in (name for name in io if name.startswith("sample.idx")):
        slot = int(name.removeprefix("sample.idx")) % ctx.shape[1]
        given = x[:, slot], t, ctx[:, : slot + 1], y
        network.context = "last"
        yield f"{name} (last)", network(*given)[:, None], io[name]
        network.context = "full"
        yield f"{name} (full = training)", network(*given), training[:, slot], IDENTITY


# --- diffusion


def schedule_named(name: str) -> DiscreteSchedule | None:
    """The schedule called linear1000, cosine250, linear_respaced25, linear_ddim25 and the like, or None."""
    found = re.fullmatch(r"(linear|cosine)(\d*)(?:_(?:respaced([\d,]+)|(ddim\d+)))?", name)
    if not found:
        return None
    kind, steps, spec = found[1], int(found[2] or 1000), found[3] or found[4]
    # The published linear schedule keeps the total noise when the number of steps changes.
    scale = 1000 / steps
    linear = DiscreteSchedule.linear(steps, 1e-4 * scale, 0.02 * scale)
    schedule = linear if kind == "linear" else DiscreteSchedule.cosine(steps)
    return schedule.respace(spec) if spec else schedule


def at_times(schedule: DiscreteSchedule, times: Tensor) -> DiscreteSchedule:
    """The chain that visits only these times, increasing; a fractional one has the signal level below it."""
    abar = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[times.long()]])
    return DiscreteSchedule(1 - abar[1:] / abar[:-1], times)


@handles(lambda case: has(case, "linear", "cosine", "pmv.", "timestep_embedding."))
def diffusion(case: Case) -> Iterator[tuple]:
    io = case.io
    for name in io:
        start, _, table = name.partition(".")
        schedule = schedule_named(start)
        if schedule is not None:
            yield name, getattr(schedule, "timesteps" if table == "timestep_map" else table), io[name], EXACT
    yield from mean_and_variance(case)
    yield from ddim_steps(case)
    for name in io:
        if found := re.fullmatch(r"timestep_embedding\.dim(\d+)", name):
            yield name, timestep_embedding(io["timestep_embedding.t"], int(found[1])), io[name]
        if found := re.fullmatch(r"positional_embedding\.dim(\d+)_len(\d+)", name):
            yield name, positional_embedding(int(found[2]), int(found[1])), io[name]


def mean_and_variance(case: Case) -> Iterator[tuple]:
    """pmv.*: p(x_{t-1} | x_t) for a given network output."""
    io = case.io
    ours = {"mean": "mean", "variance": "variance", "log_variance": "log_variance", "pred_xstart": "x0_hat"}
    for name in io:
        found = re.fullmatch(r"pmv\.(clipTrue|clipFalse|fixed_large|fixed_small)\.(\w+)", name)
        if not found:
            continue
        x_t, output, t = io["pmv.x_t"], io["pmv.model_output"], io["pmv.t"]
        fixed = found[1].startswith("fixed")
        variance = found[1] if fixed else "learned_range"
        clip = None if found[1] == "clipFalse" else (-1, 1)
        process = DiscreteProcess(noted_schedule(case.spec["note"]), variance=variance, clip=clip)
        result = process.p_mean_variance(output[:, : x_t.shape[1]] if fixed else output, x_t, t)
        yield name, getattr(result, ours[found[2]]), io[name]


def ddim_steps(case: Case) -> Iterator[tuple]:
    """ddim.skipK.sample: one deterministic step by K times, from where the note says."""
    io = case.io
    for name in io:
        if not (found := re.fullmatch(r"ddim\.skip(\d+)\.sample", name)):
            continue
        row = int(re.search(r"x_t\[(\d+)", case.spec["note"])[1])
        t = int(re.search(r"\bt=(\d+)", case.spec["note"])[1])
        schedule = at_times(noted_schedule(case.spec["note"]), torch.tensor([t - int(found[1]), t]))
        process = DiscreteProcess(schedule, variance="learned_range", clip=(-1, 1))
        x_t, output = (io[f"pmv.{part}"][row : row + 1] for part in ("x_t", "model_output"))
        yield name, process.ddim_step(output, x_t, torch.tensor([1])), io[name]


# --- networks in other cases


def referred(case: Case, causal: bool) -> UNet:
    """The network that the note of a case names: the sequence model or the single-image one."""
    folder: Folder = case.folder
    wanted = is_causal if causal else is_unet
    candidates = {name: c for name, c in folder.cases.items() if "param_prefix" in c.spec and wanted(c.spec)}
    named = [name for name in candidates if re.search(rf"\b{re.escape(name)}\b", case.spec.get("note", ""))]
    if len(named) != 1:
        raise ValueError(f"the note must name one of the networks {sorted(candidates)}, it names {named}")
    network = load(candidates[named[0]])
    if causal:
        network.context = "last"  # as the published code samples
    return network


def denoiser(network: UNet, schedule: DiscreteSchedule, channel_axis: int = 1) -> DiscreteDenoiser:
    """The denoiser around an epsilon network, whose variance is learned if it has the channels for it."""
    learned = network.out_channels == 2 * network.in_channels
    return DiscreteDenoiser(network, schedule, learned_variance=learned, channel_axis=channel_axis)


def noted_schedule(note: str) -> DiscreteSchedule:
    """The schedule that a note names: "linear 1000", "cosine schedule, 500 steps", "T=250"; else linear 1000."""
    kind = re.search(r"\b(linear|cosine)\b", note)
    steps = re.search(
        r"\b(?:linear|cosine)[ \w,]*?\b(\d{2,})\b|\bT ?= ?(\d{2,})\b(?! of)|\b(\d{2,}) (?:time)?steps\b", note
    )
    count = next((n for n in steps.groups() if n), "1000") if steps else "1000"
    return schedule_named(f"{kind[1] if kind else 'linear'}{count}")


def number(text: str, name: str, default: float) -> float:
    """The number after `name` in a note."""
    found = re.search(rf"\b{name}\s+([\d.]*\d)", text)
    return float(found[1]) if found else default


@handles(lambda case: has(case, "loss.", "image.loss.", "noisy_x0.loss.", "rescaled_"))
def training_loss(case: Case) -> Iterator[tuple]:
    io, schedule = case.io, noted_schedule(case.spec["note"])
    seq, noise, t = io["seq"], io["noise"], io["t"]
    labels = {"y": io["y"]} if "y" in io else {}
    context, target = seq[:, :-1], seq[:, 1:]
    networks = {}

    def terms(kind="mse", causal=True, cond=None):
        if causal not in networks:
            networks[causal] = denoiser(referred(case, causal), schedule, 2 if causal else 1)
        x0, n = (target, noise) if causal else (seq[:, 1], noise[:, 0])
        return discrete_terms(networks[causal], x0, kind=kind, cond=cond, t=t, noise=n, **labels)

    for name in io:
        start, _, term = name.rpartition(".")
        if start == "loss":
            yield name, getattr(terms(cond=context), term), io[name]
        elif start == "noisy_x0.loss":
            noisy = schedule.q_sample(context, t, io["noisy_x0.noise"])
            yield name, getattr(terms(cond=noisy), term), io[name]
        elif start in ("rescaled_mse", "rescaled_kl"):
            yield name, getattr(terms(start, cond=context), term), io[name]
        elif start == "image.loss":
            yield name, getattr(terms(causal=False), term), io[name]


# --- chains


def noises(case: Case, name: str) -> list[Tensor]:
    """The recorded draws of a chain, in order."""
    draws = (case.io.get(f"{name}.noise{k}") for k in itertools.count())
    return list(itertools.takewhile(lambda draw: draw is not None, draws))


class Chain:
    """One of the two published samplers with recorded noise: frames of a sequence from pure noise."""

    def __init__(self, network: CausalUNet, kind: str, note: str):
        self.network, schedule = network, noted_schedule(note)
        self.variance = denoiser(network, schedule).process.variance.replace("fixed_small", "fixed_large")
        if kind == "ddpm":
            schedule = schedule.respace(re.search(r'timestep_respacing="([^"]+)"', note)[1])
        else:
            steps, total = (int(n) for n in re.search(r"\bT=(\d+) of (\d+)", note).groups())
            schedule = at_times(schedule, torch.arange(steps, dtype=torch.float64) * (total / steps))
        self.ancestral, self.schedule = kind == "ddpm", schedule

    def __call__(self, draws: Iterator[Tensor], context: Tensor, sequence: bool) -> Tensor:
        """All frames of a sequence at once (batch, frame, ...), or the one after context (batch, ...)."""
        clip = (-1, 1) if self.ancestral else None
        axis = 2 if sequence else 1
        process = DiscreteProcess(self.schedule, "epsilon", self.variance, clip, axis)
        step = process.step if self.ancestral else process.stochastic_step

        def draw():
            return next(draws) if sequence else next(draws)[:, 0]

        x = draw()
        for i in reversed(range(len(self.schedule))):
            t = torch.tensor([i])
            output = self.network(x, process.network_t(t).to(x.dtype), context)
            x = step(output, x, t, draw())
        return x

    def continued(self, draws: Iterator[Tensor], window: Tensor, frames: int) -> Tensor:
        """The window after so many new frames, each appended while the oldest is dropped."""
        for _ in range(frames):
            window = torch.cat([window[:, 1:], self(draws, window, False)[:, None]], dim=1)
        return window

    def published_cold_start(self, draws: Iterator[Tensor], blank: Tensor, frames: int) -> Tensor:
        """A cold start with the faults of the published bookkeeping, which are not faults of the network.

        Frame i is conditioned on slot i, which is still blank; the last slot stays blank when the window
        begins to slide, and the first frame is dropped. blank (batch, window, ...) are zeros.
        """
        first = [self(draws, blank[:, :1], False)[:, None] for _ in range(blank.shape[1] - 1)]
        sequence = torch.cat([*first, blank[:, :1]], dim=1)
        for _ in range(frames - len(first)):
            sequence = torch.cat([sequence, self(draws, sequence[:, -1:], False)[:, None]], dim=1)
        return sequence[:, 1:]


@handles(lambda case: has(case, "ddpm_", "ddnm_"))
def sampling(case: Case) -> Iterator[tuple]:
    io, note, network = case.io, case.spec["note"], referred(case, causal=True)
    tolerance = CHAIN * case.folder.tolerance()
    for name in [name.removesuffix(".out") for name in io if name.endswith(".out")]:
        kind, _, start = name.partition("_")
        chain, recorded, window = Chain(network, kind, note), noises(case, name), io["ctx"]
        draws, frames = iter(recorded), len(recorded) // (len(chain.schedule) + 1)
        if start == "retrospective":
            ours = chain(draws, window, True)
        elif start == "warm":
            ours = chain.continued(draws, window, frames)
        elif start == "cold_extra":
            ours = chain.published_cold_start(draws, torch.zeros_like(window), frames)
        else:
            continue
        yield name, ours, io[f"{name}.out"], tolerance


# --- reconstruction


def complex_last(x: Tensor) -> Tensor:
    """Complex from a trailing (re, im) axis."""
    return torch.view_as_complex(x.contiguous())


def identity(x: Tensor, sigma: Tensor, cond=None) -> Tensor:
    return x


@handles(lambda case: has(case, "sense.", "recon.", "unfold.", "kcrop.", "normalize."))
def reconstruction(case: Case) -> Iterator[tuple]:
    io = case.io
    note, _, unfold_note = case.spec["note"].partition("unfold.*")
    if "kspace" in io:
        maps, y = complex_last(io["coil_maps"]), complex_last(io["kspace"])[None]
        yield "kspace", sense(maps, torch.ones(1))(complex_last(io["image"])[None, None]), y
        A = sense(maps, io["mask"])
        yield "zero_filled_normalised", normalise(A.H(y)[0, 0])[0], complex_last(io["zero_filled_normalised"])
        yield from gradients(case, A, y, "sense", note)
        yield from posterior_chains(case, A, y, "recon", note)
    if "unfold.zero_filled_normalised" in io:
        image = complex_last(io["image"])
        A = sense(torch.ones(1, *image.shape, dtype=image.dtype), io["mask"])
        y = A(image[None, None])
        expected = complex_last(io["unfold.zero_filled_normalised"])
        yield "unfold.zero_filled_normalised", normalise(A.H(y)[0, 0])[0], expected
        yield from gradients(case, A, y, "unfold", unfold_note)
        yield from posterior_chains(case, A, y, "unfold", unfold_note)
    yield from preparation(case)


def gradients(case: Case, A, y: Tensor, prefix: str, note: str) -> Iterator[tuple]:
    """The data-consistency gradient and iterations at x, without a network."""
    io, scale = case.io, number(note, "scale", 0.3)
    for name in (name for name in io if name.startswith(f"{prefix}.")):
        x = to_complex(io["x"][:, 0])
        if name.endswith(".grad") or name.endswith(".grad_nontemporal"):
            grad = to_channels(A.normal(x) - landweber(A, y, scale=scale).target())
            yield name, grad if name.endswith("nontemporal") else grad[:, None], io[name]
        if found := re.search(r"\.x_after_(\d+)_iters_step([\d.]+)$", name):
            G = landweber(A, y, scale=scale, iterations=int(found[1]), step_size=float(found[2]))
            yield name, to_channels(G(identity)(x, torch.ones(1)))[:, None], io[name]


def posterior_chains(case: Case, A, y: Tensor, prefix: str, note: str) -> Iterator[tuple]:
    """Posterior samples with recorded noise, through our guidance and solver."""
    io = case.io
    G = landweber(
        A,
        y,
        scale=number(note, "scale", 0.3),
        step_size=number(note, "step_size", 1.0),
        iterations=int(number(note, "cond_iters", 4)),
    )
    for name in [name.removesuffix(".out") for name in io if re.fullmatch(rf"{prefix}\.\w+\.out", name)]:
        kind, steps = re.match(rf"{prefix}\.(causal|image)_T(\d+)", name).groups()
        schedule = noted_schedule(note)
        stride = len(schedule) / int(steps)
        schedule = at_times(schedule, torch.arange(int(steps), dtype=torch.float64) * stride)
        network = referred(case, causal=kind == "causal")
        D = G(ComplexDenoiser(denoiser(network, schedule)))
        cond = known_frames(case) if kind == "causal" else None
        start = io[f"{prefix}.x_start"][:, 0]
        draws, levels = iter(noises(case, name)), schedule.levels().tolist()
        # The published state has unit variance, ours is in data units.
        x = to_complex(start) * (1 + levels[0] ** 2) ** 0.5
        for i in range(len(levels) - 1):
            noise = to_complex(next(draws).reshape(start.shape))
            x = aid_stochastic().step(bound(D, cond), x, levels, i, lambda n=noise: n, None).x
        yield (
            name,
            to_channels(x).reshape(io[f"{name}.out"].shape),
            io[f"{name}.out"],
            CHAIN * case.folder.tolerance(),
        )


def known_frames(case: Case) -> Tensor:
    """The frames of the window up to the slot that the note calls idx_t."""
    window, slot = case.io["recon.window"], re.search(r"idx_t=(-?\d+)", case.spec["note"])
    return window[:, : int(slot[1]) % window.shape[1] + 1] if slot else window


def bound(D, cond: Tensor | None):
    return lambda x, sigma: D(x, torch.full((len(x),), sigma), cond)


def preparation(case: Case) -> Iterator[tuple]:
    """Masks, cropping, normalisation."""
    io = case.io
    for name in io:
        if found := re.fullmatch(r"mask\.(\w+?)_(\d+)_(\d+)(_columns)?", name):
            kind, width, acceleration = found[1], int(found[2]), int(found[3])
            columns = published_columns(width, acceleration, kind)
            mask = torch.zeros(width, width)
            mask[:, columns] = 1
            yield name, columns if found[4] else mask, io[name], 0.0
        if found := re.fullmatch(r"kcrop\.out_(\d+)x(\d+)", name):
            kspace = complex_last(io["kcrop.in"]).movedim(-1, 0)  # (kx, ky, coil) -> (coil, kx, ky)
            ours = crop_kspace(kspace, (int(found[1]), int(found[2]))).movedim(0, -1)
            yield name, ours, complex_last(io[name])
    if "normalize.out" in io:
        # The published code divides by the complex value with the largest real part, we by the largest
        # magnitude: the results differ by one complex factor.
        ours, _ = normalise(complex_last(io["normalize.in"])[:, None])
        theirs, _ = normalise(to_complex(io["normalize.out"]))
        turn = (ours * theirs.conj()).sum()
        yield "normalize.out (up to a complex factor)", theirs * turn / turn.abs(), ours
