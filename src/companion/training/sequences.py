"""A network of sequences, and its loss: a frame given those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from companion.data import anatomy
from companion.data.store import Prepared
from companion.data.virtual import SPACING_MM
from companion.diffusion.denoisers import Denoiser
from companion.diffusion.losses import discrete_loss, edm_loss
from companion.parameters import param
from companion.randomness import randn
from companion.training.recipe import UNetSize

DDPM = {"name": "DiscreteDenoiser", "schedule": {"name": "linear", "steps": 1000}, "prediction": "epsilon"}


@dataclass(frozen=True)
class SequenceModel(UNetSize):
    """The part of a form that describes a sequence network and its diffusion."""

    model: str = param(
        "sequence", "sequence: a frame given those before; single: each image by itself", choices=("sequence", "single")
    )
    window: int = param(8, "frames of context, seq_len", minimum=1)
    attention_resolutions: tuple[int, ...] = param((), "strides at which the main branch attends over pixels")
    num_heads: int = param(4, "attention heads; 0: none over pixels", minimum=0)
    context_heads: int | None = param(None, "attention heads over frames; none: num_heads", minimum=1)
    concat_cond: bool = param(False, "context joins by concatenation, as published; else by connectors")
    num_complicated: int = param(-1, "further pairs of blocks a context group; -1: simple groups", minimum=-1)
    pos_emb: bool = param(False, "further pairs know the position in the window")
    diffusion: str = param(
        "edm",
        "edm: Karras et al. 2022; ddpm: 1000 steps, epsilon, learned range, as published",
        choices=("edm", "ddpm"),
    )
    sigma_data: float = param(0.34, "standard deviation of the data's real components (edm)", minimum=1e-3)


def start(network: Any, given: nn.Module) -> None:
    """Begin with the weights of a trained network; those of a single-image one become a sequence's main branch."""
    if hasattr(network, "x0_blocks") and not hasattr(given, "x0_blocks"):
        network.start_from_main(given.state_dict())
    else:
        network.load_state_dict(given.state_dict())


def sequence_config(m: SequenceModel, prepared: Prepared, add_phase: bool, symmetries: Sequence[str] = ()) -> dict:
    """What `architectures.build` makes the denoiser from, for the sequences of a prepared file.

    add_phase: whether stored magnitudes become complex images in training. symmetries: of the law of the sequences.
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
    sequence |= {} if m.context_heads is None else {"context_heads": m.context_heads}
    scales = {"sigma_data": m.sigma_data, "variance_channels": 1, "cond_scale": round(1 / m.sigma_data, 3)}
    denoiser = {"name": "EDMDenoiser"} | scales if edm else DDPM
    denoiser |= {"symmetries": list(symmetries)} if symmetries else {}
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
