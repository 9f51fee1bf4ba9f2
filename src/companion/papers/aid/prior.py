"""The sequence prior of AID: parameters, training, validation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor, nn

from companion.data import anatomy
from companion.data.store import Prepared, open_dataset
from companion.data.virtual import volumes
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.losses import discrete_loss, edm_loss
from companion.evaluation.denoising import denoising_errors
from companion.files import project_root
from companion.models.architectures import network_of
from companion.models.checkpoint import load
from companion.parameters import param
from companion.randomness import randn
from companion.training.loop import TrainResult
from companion.training.recipe import Training, UNetSize, begin, fit, main

DDPM = {"name": "DiscreteDenoiser", "schedule": {"name": "linear", "steps": 1000}, "prediction": "epsilon"}
SPACING_MM = 3.25  # of the slices of virtual people whose file does not say


@dataclass(frozen=True)
class SequenceModel(UNetSize):
    """The part of a form that describes a sequence network and its diffusion."""

    model: str = param(
        "sequence", "sequence: a frame given those before; single: each image by itself", choices=("sequence", "single")
    )
    window: int = param(8, "frames of context, seq_len", minimum=1)
    attention_resolutions: tuple[int, ...] = param((), "strides at which the main branch attends over pixels")
    num_heads: int = param(4, "attention heads", minimum=1)
    concat_cond: bool = param(False, "context joins by concatenation, as published; else by connectors")
    num_complicated: int = param(-1, "further pairs of blocks a context group; -1: simple groups", minimum=-1)
    pos_emb: bool = param(False, "further pairs know the position in the window")
    diffusion: str = param(
        "edm",
        "edm: Karras et al. 2022; ddpm: 1000 steps, epsilon, learned range, as published",
        choices=("edm", "ddpm"),
    )
    sigma_data: float = param(0.34, "standard deviation of the data's real components (edm)", minimum=1e-3)


@dataclass(frozen=True)
class TrainSequence(SequenceModel, Training, batch_size=8):
    """Parameters of aid/2_train.ipynb."""

    data: str = param("data/aid_brain_64.h5", "prepared sequences, made by 1_data")
    validation: str = param("brain", "embedded cohort to validate on", choices=("brain", "heart", "none"))
    stage: str = param(
        "one",
        "one: all at once; first: plain frames, context ignored; second: context branch only",
        choices=("one", "first", "second"),
    )
    start_from: str | None = param(
        None, "checkpoint to begin with: a sequence network, or a single-image network that becomes the main branch"
    )
    variance_weight: float = param(0.05, "weight of the variance channel's likelihood (edm)", minimum=0)
    P_mean: float = param(-1.2, "mean of ln sigma in training (edm)")
    P_std: float = param(1.4, "standard deviation of ln sigma in training (edm)", minimum=0)
    start_dropout: float = param(
        0.0, "share of windows that begin with a blank frame, for cold starts", minimum=0, maximum=1
    )
    context_noise: float = param(
        0.0, "noise of random deviation up to this on context frames: drawn ones have errors", minimum=0
    )
    phase_spacing_mm: float | None = param(
        SPACING_MM, "magnitudes get a new smooth phase, of frames so far apart; none: data are used as they are"
    )
    mirror: bool = param(True, "mirror sequences left to right at random")
    schedule: str = param("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))


def train(p: TrainSequence, progress: bool = True) -> tuple[TrainResult, dict]:
    """The trained model, which continues what `p.out` holds, and its config; torchrun's processes share the work.

    Raises ValueError for parameters of images where the file holds latents.
    """
    prepared = open_dataset(project_root() / p.data)
    name = next(iter(prepared.shapes))
    images_only = p.phase_spacing_mm is not None or p.validation != "none" or p.mirror
    if name == "latent" and (images_only or (p.diffusion == "edm" and p.sigma_data != 1)):
        raise ValueError(
            f"{prepared.path.name} holds latents, which have no phase, no mirror image and deviation 1; "
            "set phase_spacing_mm: null, mirror: false, sigma_data: 1 and validation: none"
        )
    config = sequence_config(p, prepared, p.phase_spacing_mm is not None)
    D = begin(config, p.seed, None, p.autocast, p.device)
    network, single = network_of(D), p.model == "single"
    if p.start_from:
        start(network, network_of(load(p.start_from)))
    if p.stage == "second":
        network.freeze_main()
    options = p.pick("stage", "diffusion", "P_mean", "P_std", "variance_weight", "start_dropout", "context_noise",
                     "phase_spacing_mm", "mirror")  # fmt: skip
    windows = prepared.sequences(name, "train", 1 if single else p.window + (p.stage != "first"))
    loss = partial(sequence_loss, single=single)
    result = fit(D, loss, windows, p, config, options, progress=progress, schedule=p.schedule, log_every=10)
    if name != "latent":
        config["data"]["magnitude_q99"] = brightness(prepared)
    return result, config


def start(network: nn.Module, given: nn.Module) -> None:
    """Begin with the weights of a trained network; those of a single-image one become a sequence's main branch."""
    if hasattr(network, "x0_blocks") and not hasattr(given, "x0_blocks"):
        network.start_from_main(given.state_dict())
    else:
        network.load_state_dict(given.state_dict())


def sequence_config(m: SequenceModel, prepared: Prepared, add_phase: bool) -> dict:
    """What `architectures.build` makes the denoiser from, for the sequences of a prepared file.

    add_phase: whether stored magnitudes become complex images in training.
    """
    name, shape = next(iter(prepared.shapes.items()))
    as_complex = add_phase or prepared.sequences(name, "train", 1)[0].is_complex()
    channels, single, edm = shape[2] * (1 + as_complex), m.model == "single", m.diffusion == "edm"
    size = m.unet(
        in_channels=channels,
        out_channels=channels + 1 if edm else 2 * channels,
        attention_resolutions=list(m.attention_resolutions),
        num_heads=m.num_heads,
    )
    sequence = {
        "name": "CausalUNet",
        "seq_len": m.window,
        "concat_cond": m.concat_cond,
        "pos_emb": m.pos_emb,
        "complicated_x0": m.num_complicated >= 0,
        "num_complicated": max(m.num_complicated, 0),
    }
    scales = {"sigma_data": m.sigma_data, "variance_channels": 1, "cond_scale": round(1 / m.sigma_data, 3)}
    denoiser = {"name": "EDMDenoiser"} | scales if edm else DDPM
    data = {
        "source": prepared.source,
        "scale": prepared.scale[name],
        "subjects": len(prepared.rows("train")),
        "frames": shape[1],
        "image_size": list(shape[-2:]),
    }
    data |= {key: value for key, value in prepared.attrs.items() if isinstance(value, str | int | float)}
    return {
        "network": size if single else size | sequence,
        "data": data,
        "denoiser": denoiser | {"complex": as_complex, "learned_variance": True, "channel_axis": 1 if single else -3},
    } | {key: prepared.attrs[key] for key in ("latent",) if key in prepared.attrs}


def sequence_loss(
    D: Denoiser,
    sequence: Tensor,
    generator: Generator,
    *,
    diffusion: str = "edm",
    stage: str = "one",
    single: bool = False,
    P_mean: float = -1.2,
    P_std: float = 1.4,
    variance_weight: float = 0.05,
    start_dropout: float = 0.0,
    context_noise: float = 0.0,
    phase_spacing_mm: float | None = SPACING_MM,
    mirror: bool = True,
) -> Tensor:
    """The loss (batch,) of windows (batch, window + 1, channel, y, x): frame n + 1 given frames 0 .. n.

    All frames of a window share one noise level (the paper's Eq. for p(x_0 .. x_N), teacher forcing). A window that
    begins with a blank frame, `start_dropout` of them, teaches how a sequence starts. single: windows of one image.
    """
    options = {"device": generator.device, "generator": generator}
    batch = len(sequence)
    if mirror:
        sequence = torch.where(torch.rand(batch, 1, 1, 1, 1, **options) < 0.5, sequence.flip(-1), sequence)
    if phase_spacing_mm is not None:
        sequence = anatomy.random_sequence_phase(sequence, phase_spacing_mm, generator)
    context, x0 = sequence[:, :-1], sequence[:, 1:]
    if single:
        context, x0 = None, sequence[:, 0]
    elif stage == "first":
        context, x0 = None, sequence
    elif start_dropout:
        begins = torch.rand(batch, 1, 1, 1, 1, **options) < start_dropout
        shifted = torch.cat([torch.zeros_like(context[:, :1]), context[:, :-1]], 1)
        context, x0 = torch.where(begins, shifted, context), torch.where(begins, context, x0)
    if context is not None and context_noise:
        std = context_noise * torch.rand(batch, 1, 1, 1, 1, **options)
        context = context + std.to(x0.device) * randn(context.shape, context.dtype, generator, x0.device)
    if diffusion == "ddpm":
        return discrete_loss(D, x0, generator, cond=context)
    return edm_loss(D, x0, generator, P_mean, P_std, context, variance_weight=variance_weight)


def context_errors(D: Denoiser, x: Tensor, sigmas: list[float], seed: int = 0) -> list[dict]:
    """For each sigma, the error of a sequence denoiser on the last frame of x (batch, window + 1, channel, y, x).

    Root mean squared error per real component: with all frames before as context, with the published sampling's
    context (the newest frame only), and with none.
    """
    network, context = network_of(D), x[:, :-1]
    blank = torch.zeros_like(context[:, :1]) if network.concat_cond else None

    def told(cond: Tensor | None, mode: str = "full"):
        def estimate(x: Tensor, sigma: Tensor) -> Tensor:
            with network.attending(mode):
                return D(x, sigma, cond)

        return estimate

    estimates = {
        "no context": told(blank),
        "newest frame only": told(context, "last"),
        f"{context.shape[1]} frames": told(context),
    }
    return denoising_errors(estimates, x[:, -1], sigmas, seed=seed)


def validation_sequences(source: str, prepared: Prepared, window: int, people: int = 16) -> Tensor:
    """Validation people (person, window + 1, 1, y, x) of an embedded cohort, spaced and sized as a prepared file's."""
    side = next(iter(prepared.shapes.values()))[-1]
    spacing = float(prepared.attrs.get("spacing_mm", SPACING_MM))
    return volumes(source, "validation", people, window + 1, side, spacing)


def brightness(prepared: Prepared, count: int = 64) -> float:
    """The magnitude that 99 % of a training volume's pixels do not exceed, mean over the first volumes.

    Reconstruction brings data of unknown units to the prior's by it.
    """
    name, shape = next(iter(prepared.shapes.items()))
    whole = prepared.sequences(name, "train", shape[1])
    levels = [torch.quantile(whole[i].abs().flatten(), 0.99).item() for i in range(min(count, len(whole)))]
    return round(sum(levels) / len(levels), 4)


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.aid.prior params.yaml
    main(TrainSequence, train)
