"""Has a prior copied somebody? A detector of copies in disguise, judged by copies that are planted.

The distance between voxels misses a copy that is turned, shifted, mirrored, larger, brighter or blurred. Here every
volume is first brought to the mean of the training people (affine, by gradient steps), cut to the scales between blur
and shading, and freed from what all people share. What is left is the person, and the cosine between two of those is
how alike they are. How alike is a copy? More than all but FALSE_ALARMS of the people held out are to anybody in the
training set. And how often it is right, training people say who are disguised (`disguised`) and looked for.

planted copies of virtual people of one template after 150 steps, half a minute; this finds all, in six seconds.
planted copies of virtual people of one template after 150 steps, in half a minute; this finds all, in six seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from companion.evaluation.population import check_volumes

SIDE = 32  # voxels along the longest axis, about, at which people are compared; half of it where they are aligned
STEPS, RATE = 60, 0.02  # of the alignment, and the size of the first: shares of the field of view
FINE, SLOW = 3, 9  # widths in voxels of SIDE: what is finer is noise, what is slower is shading
FALSE_ALARMS = 0.05  # share of the people held out that may be called copies
TURN, SHIFT, SCALE = 0.15, 0.06, 0.08  # of a disguise: radians about each axis, share of the field of view, either way
GAIN, NOISE = 0.2, 0.03  # largest ln of its gain, and standard deviation of its noise; 1 is bright tissue


def disguised(x: Tensor, generator: Generator) -> Tensor:
    """Volumes (batch, 1, z, y, x), turned, shifted, scaled, perhaps mirrored, brighter or darker, softer, noisy."""
    n = len(x)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(shape, generator=generator) - 1

    turn = torch.zeros(n, 3, 3)
    for i, j in ((0, 1), (1, 2), (0, 2)):
        turn[:, i, j] = TURN * uniform(n)
    matrix = torch.matrix_exp(turn - turn.transpose(1, 2)) * (1 + SCALE * uniform(n, 1, 1))
    matrix = matrix * torch.stack([uniform(n).sign(), torch.ones(n), torch.ones(n)], 1)[:, None]
    copy = moved(x, torch.cat([matrix, 2 * SHIFT * uniform(n, 3, 1)], 2))
    blur, gain, noise = (v.reshape(n, 1, 1, 1, 1).to(x) for v in (uniform(n).abs(), uniform(n), uniform(n).abs()))
    copy = ((1 - blur) * copy + blur * smooth(copy, 3)) * (GAIN * gain).exp()
    return copy + NOISE * noise * torch.randn(copy.shape, generator=generator).to(x)


def moved(x: Tensor, theta: Tensor) -> Tensor:
    """Volumes under affine maps theta (batch, 3, 4) of `torch.nn.functional.affine_grid`."""
    grid = F.affine_grid(theta.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def smooth(x: Tensor, width: int) -> Tensor:
    """Means over cubes of an odd width, of what lies inside the volume."""
    return F.avg_pool3d(x, width, 1, width // 2, count_include_pad=False)


def coarse(x: Tensor) -> Tensor:
    """Volumes (batch, 1, z, y, x) averaged over cubes until about SIDE voxels are left along the longest axis."""
    factor = max(1, round(max(x.shape[2:]) / SIDE))
    return F.avg_pool3d(check_volumes(x).float().cpu(), factor)


def standardised(x: Tensor) -> Tensor:
    """Volumes with mean 0 and norm 1."""
    x = x - x.mean((1, 2, 3, 4), keepdim=True)
    return x / x.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None, None]


@torch.enable_grad()
def aligned(x: Tensor, atlas: Tensor, steps: int = STEPS) -> Tensor:
    """Volumes under the affine maps that correlate them most with the atlas (1, 1, z, y, x), found by Adam."""
    half, aim = F.avg_pool3d(x, 2), standardised(F.avg_pool3d(atlas, 2))
    still, theta = torch.eye(3, 4).expand(len(x), 3, 4), torch.zeros(len(x), 3, 4, requires_grad=True)
    optimiser = torch.optim.Adam([theta])
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = RATE * (1 - 0.9 * step / steps)
        loss = -(standardised(moved(half, still + theta)) * aim).sum()
        (theta.grad,) = torch.autograd.grad(loss, theta)
        optimiser.step()
    return moved(x, still + theta.detach())


@dataclass(frozen=True, eq=False)
class CopyDetector:
    """atlas: the mean of the training people and their mirror images; shared: of their `band`s when aligned, with it.
    people: what is left of each training person, unit rows (n, voxels).
    """

    atlas: Tensor
    shared: Tensor
    people: Tensor

    @classmethod
    def of(cls, training: Iterable[Tensor]) -> CopyDetector:
        """That of training volumes, which come in batches (batch, 1, z, y, x). Raises ValueError for fewer than 2."""
        x = torch.cat([coarse(batch) for batch in training])
        if len(x) < 2:
            raise ValueError(f"got {len(x)} training volumes; what people share is found in 2 or more")
        atlas = x.mean(0, keepdim=True)
        atlas = (atlas + atlas.flip(-1)) / 2
        bands = torch.cat([band(aligned(part, atlas)) for part in x.split(32)])
        shared = bands.mean(0, keepdim=True)
        found = cls(atlas, shared + shared.flip(-1), bands)
        return cls(atlas, found.shared, found.person(bands))

    def person(self, bands: Tensor) -> Tensor:
        """Unit rows (batch, voxels): bands without their part along the shared one."""
        rows, shared = bands.flatten(1), F.normalize(self.shared.flatten(1))
        return F.normalize(rows - (rows @ shared.T) * shared)

    def likeness(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The cosine (batch,) of volumes x (batch, 1, z, y, x) with the training person most like them, and who."""
        best = []
        for part in coarse(x).split(32):
            bands = band(aligned(part, self.atlas))
            best.append(torch.maximum(*(self.person(b) @ self.people.T for b in (bands, bands.flip(-1)))))
        value, who = torch.cat(best).max(1)
        return value, who


def band(x: Tensor) -> Tensor:
    """Volumes without what is finer than FINE and slower than SLOW voxels."""
    x = standardised(x)
    slow = smooth(smooth(x, SLOW), SLOW)
    return smooth(smooth(x - slow, FINE), FINE)


def table(
    detector: CopyDetector, sets: Mapping[str, Tensor], novel: str, planted: Tensor, who: Tensor
) -> list[dict[str, object]]:
    """How many volumes of each set are called copies, and how many planted ones, `who` in the training set, are found.

    novel: the set of people that were not trained on, who set what is alike enough.
    """
    seen = {name: detector.likeness(x) for name, x in sets.items()}
    limit = seen[novel][0].quantile(1 - FALSE_ALARMS)
    copied = {name: value > limit for name, (value, _) in seen.items()}
    value, at = seen["planted copies"] = detector.likeness(planted)
    copied["planted copies"] = (value > limit) & (at == who)
    return [
        {
            "volumes": name,
            "n": len(value),
            "likeness to the nearest": value.mean().item(),
            "largest": value.max().item(),
            "copies": int(copied[name].sum()),
        }
        for name, (value, _) in seen.items()
    ]
