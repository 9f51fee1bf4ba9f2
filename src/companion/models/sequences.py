"""A prior of sequences, and sequences drawn from it frame by frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from companion.data.sequences import image_name
from companion.data.store import open_dataset
from companion.data.virtual import SOURCES, volumes
from companion.diffusion.denoisers import ComplexDenoiser, Denoiser, inner_denoiser
from companion.diffusion.latent import LatentSpace, cine_space
from companion.diffusion.noise import karras
from companion.diffusion.sampling import Bill, find_solver
from companion.diffusion.sequence import sample_retrospective, sample_sequence
from companion.diffusion.solvers import SOLVERS
from companion.files import project_root
from companion.models.architectures import network_of
from companion.models.checkpoint import describe, load, load_denoiser
from companion.models.latent import load_autoencoder, load_prior
from companion.networks.autoencoder import VQModel
from companion.parameters import param

MODES = ("retrospective", "warm", "cold", "first stage", "noised start")
CHOOSE = ("warm", "cold")  # modes that are drawn with every context asked for
CONTINUE = ("retrospective", "warm", "noised start")  # modes that go on from a person's frames
EMBEDDED = "aid/brain"


@dataclass(frozen=True)
class Drawing:
    """The part of a form that says how sequences are drawn."""

    modes: tuple[str, ...] = param(
        MODES, "how to sample; first stage needs a network without concat_cond", choices=MODES
    )
    contexts: tuple[str, ...] = param(
        ("full", "last"),
        "what warm and cold starts are given: the full window, or the last frame only, as published",
        choices=("full", "last"),
    )
    draws: int = param(4, "sequences of each mode: a seed each and, if warm, a person each", minimum=2)
    extra_frames: int = param(4, "frames drawn beyond one window", minimum=0)
    start: str | None = param(
        None,
        "first frame of a cold start sees: blank, a frame of zeros, if the network was "
        "trained so; none, for two-stage networks",
        choices=("blank", None),
    )
    sigma_start: float = param(1.0, "noised start: level to which the frame before is noised", minimum=1e-3)
    solver: str = param("dpmpp_2m", "any of companion.diffusion.SOLVERS", choices=tuple(SOLVERS))
    evaluations: int = param(24, "network evaluations a frame", minimum=2)
    levels: str = param(
        "karras",
        "noise levels: karras, or schedule, those of a network trained at discrete times",
        choices=("karras", "schedule"),
    )
    first_sigma: float = param(40.0, "highest noise level (karras)", minimum=1e-3)
    last_sigma: float = param(0.01, "lowest noise level above 0 (karras)", minimum=1e-5)
    cache_mib: int = param(1024, "memory for keys and values of context frames while the window grows", minimum=0)

    def noise_levels(self, D: Denoiser) -> Tensor:
        """Noise levels for about `evaluations` network evaluations a frame, whatever the solver asks of a step."""
        steps = max(1, self.evaluations // find_solver(self.solver).calls)
        if self.levels == "karras":
            return karras(steps, self.last_sigma, self.first_sigma)
        schedule = getattr(inner_denoiser(D), "schedule", None)
        if schedule is None:
            raise ValueError("the prior was not trained at discrete times; choose levels: karras")
        return schedule.levels(steps)


@dataclass(frozen=True, eq=False)
class SequencePrior:
    """A sequence denoiser D with the space it works in: images, or the latents of `space`."""

    D: Denoiser
    space: LatentSpace | None
    data: dict  # what it was trained on, from its config

    @classmethod
    def load(
        cls, weights: str = EMBEDDED, codec: str | None = None, device: str = "cpu", autocast: str | None = None
    ) -> SequencePrior:
        """The prior of a checkpoint, on the latents of an autoencoder if given. Raises ValueError for other priors."""
        about = describe(weights, EMBEDDED)
        if codec is None:
            D, space = load_denoiser(weights, device, autocast, EMBEDDED), None
        elif "latent" in about:
            prior = load_prior(weights, load_autoencoder(codec), device, autocast)
            D, space = prior.D, prior.space
        else:  # the published cine prior does not say what its latents are
            D, space = (
                load_denoiser(weights, device, autocast),
                cine_space(cast(VQModel, load(codec))).to(device).eval(),
            )
        if not hasattr(network_of(D), "seq_len"):
            raise ValueError(
                f"{weights} holds a {about['network']['name']}, which knows no sequences; give weights "
                "that aid/2_train made with model: sequence"
            )
        return cls(D, space, about.get("data", {}))

    @property
    def device(self) -> torch.device:
        return next(network_of(self.D).parameters()).device

    @property
    def window(self) -> int:
        """Frames of context at most."""
        return network_of(self.D).seq_len

    @property
    def dtype(self) -> torch.dtype:
        """Of what D sees: complex64, or float32 for magnitudes and latents."""
        return torch.complex64 if isinstance(self.D, ComplexDenoiser) else torch.float32

    def encode(self, images: Tensor, seed: int = 0) -> Tensor:
        """What D sees of images (sequence, frame, 1, y, x)."""
        if self.space is None:
            return images
        return self.space.encode(images, Generator(images.device).manual_seed(seed))

    def decode(self, x: Tensor) -> Tensor:
        """Images (sequence, frame, 1, y, x) of what D draws; colour images become grey."""
        return x if self.space is None else self.space.decode(x).mean(-3, keepdim=True)


def held_out(prior: SequencePrior, source: str, count: int, frames: int) -> Tensor:
    """Held-out images (subject, frame, 1, y, x): complex, or magnitudes if the prior works on them.

    From an embedded cohort the sequences go on for `frames`, past where training ended. A prepared file gives its test
    sequences, or else its validation sequences, as far as they go.
    Raises ValueError if the file has none, or the prior does not say what it was trained on.
    """
    if source in SOURCES:
        if missing := {"frames", "image_size"} - prior.data.keys():
            raise ValueError(
                f"the prior does not say on which {' and '.join(sorted(missing))} it was trained; give "
                "a prepared file as source"
            )
        trained, size = prior.data["frames"], prior.data["image_size"][-1]
        size *= prior.space.codec.factor if prior.space else 1
        spacing, beyond = prior.data.get("spacing_mm", 3.25), max(0, frames - trained)
        x = volumes(source, "test", count, trained, size, spacing, beyond=beyond)
    else:
        prepared = open_dataset(project_root() / source)
        split = next((name for name in ("test", "validation") if prepared.split.get(name)), None)
        if split is None:
            raise ValueError(f"{source} has no test or validation sequences; prepare it with a test_share")
        name = image_name(prepared)
        whole = prepared.sequences(name, split, prepared.shapes[name][1])
        x = torch.stack([whole[i] for i in range(min(count, len(whole)))])
    if x.is_complex() != prior.dtype.is_complex:
        if not x.is_complex():
            raise ValueError(f"{source} holds magnitudes, but the prior draws complex images")
        x = x.abs()
    return x.to(prior.device)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Drawn sequences: images x (draw, frame, 1, y, x); frame 0 is number `first` of the true sequences."""

    mode: str
    context: str
    x: Tensor
    first: int
    bill: Bill

    @property
    def name(self) -> str:
        """As tables and figures show it."""
        return f"{self.mode}, {self.context}" if self.mode in CHOOSE else self.mode


def draw_sequences(
    prior: SequencePrior, true: Tensor, mode: str, context: str, drawing: Drawing, seed: int = 0
) -> Drawn:
    """The sequences drawn in one mode; the warm ones continue the first frames of true images.

    retrospective: frame n + 1 given true frames 0 .. n, all at once. warm: given one true window, then on and on. cold:
    from nothing. first stage: each frame by itself. noised start: warm, each frame from the one before it, noised.
    """
    W, network = prior.window, network_of(prior.D)
    options = {"seeds": range(seed, seed + drawing.draws), "solver": drawing.solver, "dtype": prior.dtype}
    x, levels = prior.encode(true[: drawing.draws, :W], seed), drawing.noise_levels(prior.D)
    with network.attending(context), network.caching(drawing.cache_mib * 2**20):
        if mode == "retrospective":
            samples, first = sample_retrospective(prior.D, levels, context=x, device=prior.device, **options), 1
        else:
            how, first = {
                "warm": ({"context": x}, W),
                "cold": ({"start": drawing.start}, 0),
                "first stage": ({"first_stage": True}, 0),
                "noised start": ({"context": x, "sigma_start": drawing.sigma_start}, W),
            }[mode]
            options |= {"frames": W + drawing.extra_frames, "shape": x.shape[2:], "window": W, "device": prior.device}
            samples = sample_sequence(prior.D, levels, **how, **options)
    return Drawn(mode, context, prior.decode(samples.x), first, samples.bill)


def draw_all(prior: SequencePrior, true: Tensor, drawing: Drawing, seed: int = 0, progress: bool = True) -> list[Drawn]:
    """What every mode draws; warm and cold starts with every context. Raises ValueError for too few true images."""
    if len(true) < drawing.draws or true.shape[1] < prior.window:
        raise ValueError(
            f"there are {len(true)} held-out sequences of {true.shape[1]} frames; need {drawing.draws} (draws) of "
            f"at least {prior.window} (the window)"
        )
    plan = [(m, context) for m in drawing.modes for context in (drawing.contexts if m in CHOOSE else ("full",))]
    return [draw_sequences(prior, true, *which, drawing, seed) for which in tqdm(plan, "modes", disable=not progress)]
