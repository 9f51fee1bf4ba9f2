"""A translator of LMI: its network, what it is told, and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Generator, Tensor

from companion.data.cohort import standard
from companion.data.remap import remapped
from companion.data.store import Prepared
from companion.diffusion.denoisers import Denoiser, DiscreteDenoiser
from companion.diffusion.local_information import MAPS, Conditioning, conditions, told
from companion.diffusion.losses import discrete_loss, edm_loss
from companion.information.pairs import grey
from companion.parameters import param
from companion.randomness import randn
from companion.training.recipe import UNetSize

COND_SCALE = 2.0  # brings conditions to the size of images in the network
DDPM = {"name": "DiscreteDenoiser", "schedule": {"name": "linear", "steps": 1000}, "prediction": "epsilon"}
NETWORKS = {  # what the two networks differ in
    "UNet": {"num_heads": 4, "use_scale_shift_norm": True},
    "DDIMUNet": {"num_heads": 1, "use_scale_shift_norm": False},
}


@dataclass(frozen=True)
class Model(UNetSize):
    """The part of a form that describes a translator: what it is told, its network and its diffusion."""

    maps: tuple[str, ...] = param(MAPS, "what the network is told: some of cross, self, source", choices=MAPS)
    patches: tuple[int, ...] = param((3, 7), "odd sides of the patches of cross and self", minimum=3)
    bins: int | None = param(10, "of the histograms; none: the map's own number", minimum=2)
    mode: str = param("centre", "of the maps: centre, shifts, or published", choices=("centre", "shifts", "published"))
    equalised: bool = param(True, "sources are seen as ranks of their tissue, freed from shading")
    diffusion: str = param(
        "edm", "edm: Karras et al. 2022; ddpm: 1000 steps, epsilon, as published", choices=("edm", "ddpm")
    )
    network: str = param(
        "UNet",
        "UNet: guided-diffusion; DDIMUNet: the one that the published recipe trains",
        choices=tuple(NETWORKS),
    )
    attention_resolutions: tuple[int, ...] = param((), "strides at which the network attends, besides the bottom")
    dropout_rate: float = param(0.0, "dropout inside the network", minimum=0, maximum=0.9)
    sigma_data: float | None = param(None, "root mean square of the images (edm); none: measured", minimum=1e-3)

    @property
    def conditioning(self) -> Conditioning:
        return Conditioning(self.maps, self.patches, self.bins, self.mode, equalised=self.equalised)


def translator_config(m: Model, prepared: Prepared, target: str) -> dict:
    """What `architectures.build` makes the denoiser from, for the prepared slices of a contrast."""
    shape, images = prepared.shapes[target], prepared.slices(target, "train")
    sigma_data = m.sigma_data
    if sigma_data is None:
        shown = range(0, len(images), max(1, len(images) // 200))
        sigma_data = round(
            sum(torch.as_tensor(images[i]).square().mean().item() for i in shown) ** 0.5 / len(shown) ** 0.5, 3
        )
    network = m.unet(
        name=m.network,
        in_channels=shape[2] + m.conditioning.channels,
        out_channels=shape[2],
        attention_resolutions=list(m.attention_resolutions),
        dropout=m.dropout_rate,
        **NETWORKS[m.network],
    )
    edm = {"name": "EDMDenoiser", "sigma_data": sigma_data, "cond_scale": COND_SCALE}
    return {
        "network": network,
        "denoiser": edm if m.diffusion == "edm" else DDPM,
        "data": {
            "source": f"{prepared.source}, {target} only",
            "scale": prepared.scale[target],
            "contrast": standard(target),
            "subjects": len(prepared.rows("train")),
            "slices_per_subject": shape[1],
            "image_size": list(shape[-2:]),
            "conditioning": asdict(m.conditioning),
        },
    }


def translation_loss(
    D: Denoiser,
    images: Tensor | Sequence[Tensor],
    generator: Generator,
    *,
    conditioning: Conditioning,
    remapped_share: float,
    dropout: float,
    look_ahead: bool,
    P_mean: float,
    P_std: float,
    mirror: bool,
    lesion_weight: float = 1.0,
) -> Tensor:
    """The loss (batch,) of target images (batch, channel, y, x), told of sources made from themselves.

    images: or images and the share of lesion in each pixel, which look their own way in the source. lesion_weight: how
    many times a pixel of a lesion counts (edm): lesions are few pixels of few images.
    """
    x0 = images if isinstance(images, Tensor) else images[0]
    lesion = None if isinstance(images, Tensor) else images[1]
    options = {"generator": generator, "device": generator.device}
    c, batch = conditioning, len(x0)
    if mirror:
        turned = (torch.rand(batch, 1, 1, 1, **options) < 0.5).to(x0.device)
        x0 = torch.where(turned, x0.flip(-1), x0)
        lesion = None if lesion is None else torch.where(turned, lesion.flip(-1), lesion)
    source = remapped(x0, generator, remapped_share, lesion) if remapped_share else grey(x0)
    keep = told(batch, len(c.maps), dropout, generator)
    noise = randn(x0.shape, x0.dtype, generator, x0.device)
    if not isinstance(D, DiscreteDenoiser):
        sigma = (P_mean + P_std * randn((batch,), x0.dtype, generator, x0.device)).exp()
        cond = conditions(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma, source, c, keep)
        weight = None if lesion is None or lesion_weight == 1 else 1 + (lesion_weight - 1) * lesion.to(x0)
        return edm_loss(D, x0, cond=cond, sigma=sigma, noise=noise, weight=weight)
    t = torch.randint(len(D.schedule), (batch,), **options).to(x0.device)
    seen = (t + look_ahead).clamp(max=len(D.schedule) - 1)
    sigma = D.schedule.sigmas.to(x0.device)[seen].to(x0.dtype)
    cond = conditions(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma, source, c, keep)
    return discrete_loss(D, x0, cond=cond, t=t, noise=noise)
