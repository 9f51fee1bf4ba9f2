"""What a prior is told in vain: motions that leave the law of its images as it is, and that its network has to learn.

    found = annealed_gibbs(D, G, levels, seeds=range(4))       # D states its symmetries: each sweep sees x moved anew
    D_moved = Moved(D, Symmetries(mirror=True, phase=True).draw(generators))

A denoiser of a law with a symmetry commutes with it; a network does so nearly, and errs otherwise in each position.
Where every sweep of a chain has another one, its errors neither add up over the sweeps nor agree between draws.
[terris2024] (equivariant plug and play).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from companion.diffusion.denoisers import Denoiser, inner_denoiser, moments_of

SHIFT = 16  # pixels along each axis, as far as a shift goes: a period of the usual networks


class Motion(NamedTuple):
    """What is done to an image: turned by quarters, mirrored along x, shifted (y, x), conjugated, given a phase."""

    turns: int = 0
    mirror: bool = False
    shift: tuple[int, int] = (0, 0)
    conj: bool = False
    phase: float = 0.0

    def there(self, x: Tensor) -> Tensor:
        """x (batch, channel, *, y, x) moved; a real x is not given a phase."""
        x = torch.rot90(x, self.turns, (-2, -1)) if self.turns else x
        x = x.flip(-1) if self.mirror else x
        x = torch.roll(x, self.shift, (-2, -1)) if any(self.shift) else x
        if not x.is_complex():
            return x
        x = x.conj().resolve_conj() if self.conj else x
        return x * complex(math.cos(self.phase), math.sin(self.phase)) if self.phase else x

    def back(self, x: Tensor) -> Tensor:
        """What `there` moved, where it was."""
        if x.is_complex():
            x = x * complex(math.cos(self.phase), -math.sin(self.phase)) if self.phase else x
            x = x.conj().resolve_conj() if self.conj else x
        x = torch.roll(x, (-self.shift[0], -self.shift[1]), (-2, -1)) if any(self.shift) else x
        x = x.flip(-1) if self.mirror else x
        return torch.rot90(x, -self.turns, (-2, -1)) if self.turns else x


@dataclass(frozen=True)
class Symmetries:
    """Under which motions the law of a prior's images stays as it is.

    mirror: along the last axis. turn: by quarters; with mirror, all eight positions. shift: by up to `SHIFT` pixels,
    what leaves on one side enters on the other. phase: of complex images, times exp(i phase), and conjugation.
    """

    mirror: bool = False
    turn: bool = False
    shift: bool = False
    phase: bool = False

    @classmethod
    def named(cls, names: Sequence[str]) -> Symmetries:
        """Those of a list such as ["mirror", "phase"]. Raises ValueError for a name that is none."""
        known = [field.name for field in fields(cls)]
        if wrong := sorted(set(names) - set(known)):
            raise ValueError(f"symmetries {', '.join(wrong)} are not known; expected some of {', '.join(known)}")
        return cls(**dict.fromkeys(names, True))

    def draw(self, generators: Sequence[Generator]) -> list[Motion]:
        """One motion of each generator, all alike likely."""

        def number(n: int, wanted: bool, generator: Generator) -> int:
            return int(torch.randint(n, (), generator=generator, device=generator.device)) if wanted else 0

        return [
            Motion(
                number(4, self.turn, g),
                bool(number(2, self.mirror, g)),
                (number(SHIFT, self.shift, g), number(SHIFT, self.shift, g)),
                bool(number(2, self.phase, g)),
                number(360, self.phase, g) * math.pi / 180,
            )
            for g in generators
        ]


class Moved:
    """D of moved images, moved back: motions has one for each image of a batch, or one for all.

    The condition moves along. Its moments are those of D.
    """

    def __init__(self, D: Denoiser, motions: Sequence[Motion]):
        self.D, self.motions = D, list(motions)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """x0_hat, the shape and dtype of x."""
        return self._each(lambda x, s, c: (self.D(x, s, c),), x, sigma, cond)[0]

    def _moments(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x0_hat, variance = self._each(moments_of(self.D), x, sigma, cond)
        return x0_hat, variance

    @property
    def moments(self):
        """moments(x, sigma, cond) -> (x0_hat, variance); exists if D has it."""
        if not hasattr(self.D, "moments"):
            raise AttributeError("the wrapped denoiser has no moments")
        return self._moments

    def _each(self, f, x: Tensor, sigma: Tensor, cond: Tensor | None) -> list[Tensor]:
        """The results of f for images that are each moved by themselves; those of one shape go through D together."""
        motions = self.motions * len(x) if len(self.motions) == 1 else self.motions
        if len(motions) != len(x):
            raise ValueError(f"{len(motions)} motions for {len(x)} images; expected one for each, or one")
        sigma = sigma.reshape(-1).expand(len(x))
        cond = None if cond is None else cond.expand(len(x), *cond.shape[1:])
        images = [motion.there(x[i : i + 1]) for i, motion in enumerate(motions)]
        order: list[int] = []
        results: list[list[Tensor]] = []  # of each image in that order
        for shape in dict.fromkeys(image.shape for image in images):  # quarter turns exchange y and x
            index = [i for i, image in enumerate(images) if image.shape == shape]
            given = None if cond is None else torch.cat([motions[i].there(cond[i : i + 1]) for i in index])
            found = f(torch.cat([images[i] for i in index]), sigma[index], given)
            order += index
            results += [[motions[i].back(v[k : k + 1]) for v in found] for k, i in enumerate(index)]
        place = torch.tensor(order, device=x.device).argsort()
        return [torch.cat(values)[place] for values in zip(*results, strict=True)]


def symmetries_of(D: Denoiser) -> Symmetries:
    """The symmetries that the denoiser inside D states, under any number of wrappers; none where it states none."""
    return Symmetries.named(getattr(inner_denoiser(D), "symmetries", ()))


def moved(D: Denoiser, draws: Sequence[Generator]) -> Denoiser:
    """D as one sweep of these draws sees it: moved by symmetries of its own, drawn anew; D itself where it has none."""
    symmetries = symmetries_of(D)
    return D if symmetries == Symmetries() else Moved(D, symmetries.draw(draws))
