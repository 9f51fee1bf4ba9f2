"""Does an image show what a prior learnt from? A linear readout of what the prior itself sees in it.

    organ = known_to("general/2d")     # "head"; None for a prior that has no readout
    organ.look(D, image)               # Look("head", probability 0.98, at least 0.5)

Held-out samples ask whether a prior predicts a scan. A prior of heads predicts knees too, by their edges, and helps:
what it does not know of them is anatomy, and that no sample says (docs/trust.md). Its network, though, has features of
heads. A logistic regression on them was shown heads and what is none (`companion.papers.organ`), as any reconstruction
shows them. It changes no image, only what is said of it.

The readout is a part of the prior's errors.json (`companion.models.errors`), which is bound to its weights: a prior of
another organ, or one trained on, is not judged by a readout of heads.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from companion.diffusion.denoisers import Denoiser
from companion.models.architectures import network_of
from companion.models.errors import organ_of

SIDE = 64  # pixels along y and x of what the network sees
BRIGHT, MOST = 0.99, 1.5  # quantile of the magnitudes that becomes 1, and what brighter pixels are cut to
ZONES = (0.45, 0.85)  # radii, of half the side of an image, that part its middle, what is around, and the rim
SIGMA = 0.05  # the noise that the network is told to expect


@dataclass(frozen=True)
class Look:
    """What a classifier said of an image: the probability that it shows the organ, and the least that is accepted."""

    organ: str
    probability: float
    accept: float

    @property
    def like(self) -> bool:
        """Whether the image looks like the organ."""
        return self.probability >= self.accept

    def __str__(self) -> str:
        what = "looks like" if self.like else "does not look like"
        return f"{what} a {self.organ} ({self.probability:.2f}, {'at least' if self.like else 'below'} {self.accept:g})"


@dataclass(frozen=True, eq=False)
class Organ:
    """A readout of the features of one prior: the logit of an image is features @ weight (d,) + bias.

    accept: the probability from which an image looks like the organ.
    """

    name: str
    accept: float
    weight: Tensor
    bias: float

    def probability(self, D: Denoiser, image: Tensor) -> Tensor:
        """The probability (batch,) that images (batch, set, y, x), real or complex, of any size and scale, show it.

        D: the prior that the readout is of. The same for an image that is turned by quarters or mirrored: it is the
        mean logit of all eight. Raises ValueError for a readout of other features.
        """
        x = standard(image)
        turned = torch.stack([v.rot90(k, (2, 3)) for v in (x, x.flip(3)) for k in range(4)])
        seen = features(D, turned.flatten(0, 1)).unflatten(0, (8, len(x)))
        if seen.shape[-1] != len(self.weight):
            raise ValueError(
                f"the readout of a {self.name} has {len(self.weight)} weights, the network {seen.shape[-1]} features: "
                "it is of another network or an older version; fit it again (python -m companion.papers.organ NAME)"
            )
        return (seen.mean(0) @ self.weight.to(seen) + self.bias).sigmoid()

    def look(self, D: Denoiser, image: Tensor) -> Look:
        """What it says of one image (1, set, y, x). Raises ValueError for several, and for what is no image."""
        if len(image) != 1:
            raise ValueError(f"got {len(image)} images; look at one, (1, set, y, x)")
        return Look(self.name, self.probability(D, image).item(), self.accept)


@torch.no_grad()
def features(D: Denoiser, x: Tensor) -> Tensor:
    """What the network of a prior of complex images sees in magnitudes (batch, 1, SIDE, SIDE): (batch, d).

    Mean and standard deviation of every channel of the blocks of its encoder and of its bottom, in the middle of the
    image, around it and at its rim (`zones`).
    """
    network, seen = network_of(D), []
    blocks = [layer for block in network.input_blocks for layer in block] + [network.middle_block]
    hooks = [block.register_forward_hook(lambda *args: seen.append(args[-1].float())) for block in blocks]
    found = []
    try:
        for part in x.split(32):
            seen.clear()
            D(part.to(torch.complex64), torch.full((len(part),), SIGMA, device=x.device))
            parts = [y[..., zone] for y in seen for zone in zones(y.shape[-2:])]
            found.append(torch.cat([v for part in parts for v in (part.mean(-1), part.std(-1))], 1))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(found)


def zones(space: tuple[int, ...]) -> list[Tensor]:
    """The middle of an image, what lies around it, and its rim with the corners: three masks (y, x)."""
    y, x = ((torch.arange(n) + 0.5) * 2 / n - 1 for n in space)
    radius = (y[:, None].square() + x.square()).sqrt()
    edges = (0.0, *ZONES, math.inf)
    return [(radius >= low) & (radius < high) for low, high in pairwise(edges)]


def standard(image: Tensor) -> Tensor:
    """The magnitudes (batch, 1, SIDE, SIDE) that the classifier sees of images (batch, set, y, x), real or complex.

    Sets of coil maps are added up in root mean square; the longer side becomes SIDE, the shorter one is padded.
    Raises ValueError for other shapes, and for NaN and infinity.
    """
    if image.ndim != 4:
        raise ValueError(f"expected images (batch, set, y, x), got {tuple(image.shape)}; of a volume give slices")
    if not torch.isfinite(image).all():
        raise ValueError("the image holds NaN or infinity; mask or repair it first")
    x = image.abs().float().square().sum(1, keepdim=True).sqrt()
    height, width = (max(1, round(n * SIDE / max(x.shape[-2:]))) for n in x.shape[-2:])
    x = F.interpolate(x, size=(height, width), mode="bilinear", antialias=True)
    top = x.flatten(1).quantile(BRIGHT, dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    x = (x / top[:, None, None, None]).clamp(0, MOST)
    rows, columns = SIDE - height, SIDE - width
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def known_to(prior: str | os.PathLike, default: str | None = None) -> Organ | None:
    """The readout that belongs to a prior; None where it has none. Raises ValueError for one that is damaged."""
    plain = organ_of(prior, default)
    if plain is None:
        return None
    try:
        weight = torch.tensor([float(v) for v in plain["weight"]])
        return Organ(str(plain["name"]), float(plain["accept"]), weight, float(plain["bias"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the organ in errors.json of {prior} is damaged ({error!r}); fit it again") from error
