"""Training of a translator of LMI on the target contrast alone.

Its source is the clean target, as published, or that target under a random map (`remapped`), and is seen as ranks of
its tissue (`equalised`), however faint its contrast. No other contrast is ever read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from companion.data.cohort import standard
from companion.data.contrast_people import array_of
from companion.data.store import open_dataset
from companion.files import project_root
from companion.parameters import param
from companion.training.loop import TrainResult
from companion.training.recipe import Training, begin, fit, main
from companion.training.translation import Model, translation_loss, translator_config


@dataclass(frozen=True)
class TrainTranslator(
    Model,
    Training,
    model_channels=32,
    channel_mult=(1, 2, 4),
    steps=3600,
    learning_rate=8e-4,
    ema_decay=0.995,
):
    """Parameters of lmi/2_train.ipynb."""

    data: str = param("data/lmi_brain_64.h5", "prepared slices, made by 1_data")
    target: str = param("T2w", "the contrast to learn; no other is read")
    remapped_share: float = param(
        0.85, "share of the sources that are remapped; the others are the target itself", minimum=0, maximum=1
    )
    dropout: float = param(
        0.5, "share of the images that are told only some of the maps, or none", minimum=0, maximum=1
    )
    lesion_weight: float = param(
        1.0, "how many times a pixel of a lesion counts in the loss, where the data mark lesions (edm)", minimum=1
    )
    look_ahead: bool = param(False, "of ddpm: the cross map is that of the next, noisier step, as published")
    P_mean: float = param(-0.6, "mean of ln sigma in training (edm)")
    P_std: float = param(1.4, "standard deviation of ln sigma in training (edm)", minimum=0)
    mirror: bool = param(True, "mirror images left to right at random")
    schedule: str = param("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "target", standard(self.target))
        if self.lesion_weight != 1 and self.diffusion != "edm":
            raise ValueError(
                f"lesion_weight={self.lesion_weight:g} is for diffusion edm; leave it at 1 for {self.diffusion}"
            )

    def before_start(self) -> None:
        """Raise for data that are not there, have not this contrast, or nobody to train on."""
        prepared = open_dataset(project_root() / self.data)
        array_of(prepared, self.target)
        if not prepared.rows("train"):
            raise ValueError(f"{self.data} has nobody to train on; prepare more people")


def train(p: TrainTranslator, progress: bool = True) -> tuple[TrainResult, dict]:
    """The trained model, which continues what `p.out` holds, and its config; torchrun's processes share the work."""
    prepared = open_dataset(project_root() / p.data)
    target = array_of(prepared, p.target)
    config = translator_config(p, prepared, target)
    D = begin(config, p.seed, p.start_from, p.autocast, p.device)
    options = p.pick("remapped_share", "dropout", "lesion_weight", "look_ahead", "P_mean", "P_std", "mirror")
    loss = partial(translation_loss, conditioning=p.conditioning)
    names = (target, "lesion") if "lesion" in prepared.shapes else (target,)
    images = prepared.slices(names, "train")  # no other contrast is opened
    return fit(D, loss, images, p, config, options, progress=progress, schedule=p.schedule, log_every=20), config


if __name__ == "__main__":  # torchrun --nproc_per_node=4 -m companion.papers.lmi.prior params.yaml
    main(TrainTranslator, train)
