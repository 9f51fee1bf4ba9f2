"""The sequence prior of AID: parameters, training, validation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Generator, Tensor

from companion.data.sequences import brightness
from companion.data.store import open_dataset
from companion.data.virtual import SPACING_MM
from companion.diffusion.denoisers import Denoiser
from companion.files import project_root
from companion.models.architectures import network_of
from companion.models.checkpoint import load
from companion.papers.general import crop, scanned
from companion.parameters import param
from companion.training.loop import TrainResult
from companion.training.recipe import Training, begin, fit, main
from companion.training.sequences import SequenceModel, sequence_config, sequence_loss, start

SYMMETRIES = ("mirror", "turn", "phase")  # of crops, which are turned, with the phase of scans


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
    scanned: bool = param(False, "signals get the phase and the noise of scans of heads; phase_spacing_mm is none then")
    crop: int | None = param(
        None, "pixels that a step sees of a sequence, turned, mirrored and with a new gain; none: all", minimum=16
    )
    schedule: str = param("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))


def train(p: TrainSequence, progress: bool = True) -> tuple[TrainResult, dict]:
    """The trained model, which continues what `p.out` holds, and its config; torchrun's processes share the work.

    Raises ValueError for parameters of images where the file holds latents.
    """
    prepared = open_dataset(project_root() / p.data)
    name = next(iter(prepared.shapes))
    images_only = p.phase_spacing_mm is not None or p.validation != "none" or p.mirror or p.scanned or p.crop
    if name == "latent" and (images_only or (p.diffusion == "edm" and p.sigma_data != 1)):
        raise ValueError(
            f"{prepared.path.name} holds latents, which have no phase, no mirror image and deviation 1; "
            "set phase_spacing_mm: null, mirror: false, sigma_data: 1, validation: none, and neither scanned nor crop"
        )
    if p.scanned and p.phase_spacing_mm is not None:
        raise ValueError(f"scanned gives phases of its own; set phase_spacing_mm: null, not {p.phase_spacing_mm}")
    symmetries = SYMMETRIES if p.scanned and p.crop else ()
    config = sequence_config(p, prepared, p.scanned or p.phase_spacing_mm is not None, symmetries)
    D = begin(config, p.seed, None, p.autocast, p.device)
    network, single = network_of(D), p.model == "single"
    if p.start_from:
        start(network, network_of(load(p.start_from)))
    if p.stage == "second":
        network.freeze_main()
    options = p.pick("stage", "diffusion", "P_mean", "P_std", "variance_weight", "start_dropout", "context_noise",
                     "phase_spacing_mm", "mirror")  # fmt: skip
    windows = prepared.sequences(name, "train", 1 if single else p.window + (p.stage != "first"))
    loss = partial(scanned_loss if p.scanned else sequence_loss, single=single)
    augment = None if p.crop is None else partial(crop, size=p.crop)
    if augment:
        config["crop"] = p.crop
    result = fit(D, loss, windows, p, config, options, augment=augment, progress=progress, schedule=p.schedule,
                 log_every=10)  # fmt: skip
    if name != "latent":
        config["data"]["magnitude_q99"] = brightness(prepared)
    return result, config


def scanned_loss(D: Denoiser, sequence: Tensor, generator: Generator, **options) -> Tensor:
    """Return `sequence_loss` of signals (batch, window + 1, 1, y, x) as scans show them, see `general.scanned`."""
    return sequence_loss(D, scanned(sequence.float(), generator), generator, **options)


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.aid.prior params.yaml
    main(TrainSequence, train)
